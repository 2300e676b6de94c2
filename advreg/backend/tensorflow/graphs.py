"""Reads TensorFlow's graph: which operation made the outputs of a model.

A model with a softmax at its end returns probabilities. Attacks need the logits in
front of the softmax, and whether a model draws random numbers. Both are found by
reading the graph backwards from the outputs. In eager code there is no graph. There
Keras notes the logits on the tensor that its own softmax returned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from advreg._types import Tensor
from advreg.backend import keras_private

# Operations that change neither values nor their order.
_COPIES = ("Identity", "Cast", "Reshape", "Squeeze", "ExpandDims", "EnsureShape")
_ACTIVATIONS = ("Softmax", "Sigmoid")
# Parts of the names of operations that draw random numbers, or run Python, which may. A
# few others match as well. That does no harm: the model is then run twice to compare.
_DRAWS = re.compile(
    "Random|Normal|Uniform|Multinomial|Poisson|Gamma|Binomial|Rng|NonDeterministic|"
    "Distorted|Fractional|PyFunc"
)
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def made_by(outputs: Tensor) -> str | None:
    """Returns which operation made outputs, casts and reshapes left out.

    Args:
        outputs: Outputs, symbolic or not.

    Returns:
        `"softmax"` or `"sigmoid"`, or TensorFlow's name of another operation. `None`
        where it is unknown, as for a function that was compiled elsewhere.
    """
    kind, logits = _last_activation(outputs)
    if kind is not None or logits is not None:
        # Keras's note does not say which. For the caller both mean probabilities.
        return kind or "softmax"
    if not tf.is_symbolic_tensor(outputs):
        return None
    kind = _skip_copies(outputs).op.type
    return None if kind in (*_CALLS, "Placeholder") else kind


def logits_behind(outputs: Tensor) -> Tensor | None:
    """Returns the logits that a last softmax or sigmoid was applied to, if known.

    They cannot be computed from a probability that rounds to 1, and its gradient is 0.
    """
    _, logits = _last_activation(outputs)
    return None if logits is None else tf.reshape(logits, tf.shape(outputs))


def outputs_of(compiled: Any) -> Tensor | None:
    """Returns the first symbolic output of a compiled function, or `None`."""
    graph = getattr(compiled, "graph", None)
    return None if graph is None else graph.outputs[0]


def may_draw(compiled: Any) -> bool:
    """Returns whether a function may draw random numbers, true if it has no graph."""
    graph = getattr(compiled, "graph", None)
    if graph is None:
        return True
    definition = graph.as_graph_def()
    nodes = [*definition.node]
    # Loops, conditions and nested functions are in the library, not in the graph
    # itself.
    for function in definition.library.function:
        nodes.extend(function.node_def)
    return any(_DRAWS.search(node.op) for node in nodes)


def is_compiled(function: Any) -> bool:
    """Returns whether a function is a `tf.function`."""
    return isinstance(function, tf.types.experimental.PolymorphicFunction)


def without_compilation(compiled: Any) -> Callable[..., Any]:
    """Returns the Python function that a `tf.function` was made of.

    AutoGraph converts it again where its source is available, so that `if` and `while`
    on tensors still work.
    """
    function = compiled.python_function
    try:
        return tf.autograph.to_graph(function)
    except Exception:  # Its source is not available.

        def plain(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return plain


def _last_activation(outputs: Tensor) -> tuple[str | None, Tensor | None]:
    """Finds the softmax or sigmoid that made outputs, and its input.

    Returns:
        The name of the last activation, and the input of the first one, where several
        follow each other. All of them keep the order of the classes.
    """
    kind = logits = None
    if tf.is_symbolic_tensor(outputs):
        tensor, last = outputs, outputs.shape[-1:]
        while True:
            tensor = _skip_copies(tensor)
            activation = tensor.op.type
            if activation not in _ACTIVATIONS:
                break
            # A softmax over another axis than that of the classes does not keep their
            # order.
            if activation == "Softmax" and tensor.shape[-1:] != last:
                break
            kind = kind or activation.lower()
            tensor = logits = tensor.op.inputs[0]
    if logits is None:
        logits = keras_private.known_logits_of(outputs)
    return kind, logits


def _skip_copies(tensor: Tensor) -> Tensor:
    while tensor.op.type in _COPIES:
        tensor = tensor.op.inputs[0]
    return tensor
