"""The logits behind the last activation, recorded while a model runs.

A network that ends in a softmax returns probabilities. A loss must not be computed from
these alone. Keras clips them to [1e-7, 1 - 1e-7] on JAX and PyTorch, and beyond that a
gradient is zero: the network trains worse, and seems robust against attacks. On
TensorFlow Keras finds the logits behind the softmax in the graph, and so does advreg
(`backend.logits_behind`). JAX and PyTorch have no such graph.

How it works: `recorded` intercepts activations, and notes for each softmax and sigmoid
what went in. The note belongs to the tensor that came out, and goes when it goes. So
`logits_behind` finds the logits of an output while it is still the same tensor: within
the same pass, compiled or not. Layers that only reshape hand the note on.

Not found are activations that no layer and no operation of a functional model applies:
`keras.activations.softmax` called by a `call` of the user's own. `warn_of_clipping`
warns of that.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import tree

from advreg import backend
from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.checks import brief
from advreg.network.losses import (
    ACTIVATION_OF,
    cross_entropy_of_probabilities,
    fits_labels,
    get_loss,
    is_own,
    loss_name,
)
from advreg.network.taps import intercepted

_NAMES = {
    keras.activations.softmax: "softmax",
    keras.activations.sigmoid: "sigmoid",
}
_RESHAPING = (keras.layers.Reshape, keras.layers.Flatten, keras.layers.Permute)


class _Note(NamedTuple):
    """What is known of a tensor.

    Args:
        tensor: A weak reference to it.
        kind: "softmax" or "sigmoid".
        logits: What the activation was applied to.
    """

    tensor: weakref.ref
    kind: str
    logits: Tensor


_notes: dict[int, _Note] = {}  # By the `id` of the tensor that an activation returned.


def made_by(outputs: Tensor) -> str | None:
    """Returns which operation made outputs, `None` where it is unknown.

    Args:
        outputs: Outputs of a model, within the pass that made them.

    Returns:
        "softmax" or "sigmoid"; on TensorFlow also the name of another operation.
    """
    note = _note_of(outputs)
    return backend.made_by(outputs) if note is None else note.kind


def logits_behind(outputs: Tensor) -> Tensor | None:
    """Returns the logits that a last softmax or sigmoid was applied to, if known.

    They cannot be computed from a probability that rounds to 1, and its gradient is 0.

    Args:
        outputs: Outputs of a model, within the pass that made them.
    """
    note = _note_of(outputs)
    return backend.logits_behind(outputs) if note is None else note.logits


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[None]:
    """Records the logits behind activations while a model runs, as a context manager.

    On TensorFlow nothing is recorded, because its graph has them.

    Args:
        model: The model, built or not.
    """
    with contextlib.ExitStack() as stack:
        if backend.BACKEND != "tensorflow":
            for part in _parts_of(model):
                for name, handler in _taps(part):
                    stack.enter_context(intercepted(part, name, handler))
        yield


def _parts_of(model: Any) -> list[Any]:
    """Returns the layers of a model, and the operations of functional models."""
    layers = keras_private.layers_of(model)
    return layers + [
        operation
        for layer in layers
        for operation in getattr(layer, "operations", ())
        if not isinstance(operation, keras.Layer)
    ]


def _taps(part: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the methods of a layer or operation to intercept, with their handlers."""
    kind = _NAMES.get(vars(part).get("activation"))
    if kind is not None:
        yield "activation", _noting(kind)
    elif isinstance(part, keras.layers.Softmax) and part.axis == -1:
        yield "call", _noting("softmax")
    elif isinstance(part, _RESHAPING):
        yield "call", _handing_on
    elif not isinstance(part, keras.Layer):
        # An operation of `keras.ops`, applied to a symbolic tensor.
        name = type(part).__name__.lower()
        if name == "sigmoid" or (name == "softmax" and part.axis == -1):
            yield "call", _noting(name)
        elif name in ("reshape", "squeeze", "expanddims"):
            yield "call", _handing_on


def _noting(kind: str) -> Callable[..., Tensor]:
    def handler(
        method: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        outputs = method(inputs, *args, **kwargs)
        # A mask changes the logits, and another axis their order.
        others = [*args, *(value for key, value in kwargs.items() if key != "training")]
        if all(value is None for value in others):
            before = _note_of(inputs)
            logits = inputs if before is None else before.logits
            _take_note(outputs, kind, logits)
        return outputs

    return handler


def _handing_on(
    method: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    outputs, note = method(inputs, *args, **kwargs), _note_of(inputs)
    if note is not None:
        _take_note(outputs, note.kind, method(note.logits, *args, **kwargs))
    return outputs


def _take_note(outputs: Tensor, kind: str, logits: Tensor) -> None:
    if not backend.is_tensor(outputs):  # A symbol of Keras, which has no values.
        return
    key = id(outputs)
    tensor = weakref.ref(outputs, lambda _: _notes.pop(key, None))
    _notes[key] = _Note(tensor, kind, logits)


def _note_of(tensor: Any) -> _Note | None:
    note = _notes.get(id(tensor))
    return note if note is not None and note.tensor() is tensor else None


class LossOfLogits(keras.losses.Loss):
    """A cross-entropy of Keras that takes logits where it is given probabilities.

    Where the logits behind the probabilities are recorded, the loss is that of a copy
    with `from_logits=True`. It is the same number, without the clipping.

    Args:
        loss: The loss, as `compile` takes it: a cross-entropy that takes probabilities,
            or "crossentropy".
    """

    def __init__(self, loss: Any) -> None:
        known = isinstance(loss, keras.losses.Loss)
        super().__init__(
            name=loss.name if known else loss_name(loss),
            reduction=loss.reduction if known else "sum_over_batch_size",
        )
        self._loss = loss

    def __call__(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            y_true: Labels.
            y_pred: Probabilities.
            sample_weight: Weights of the examples, or `None`.
        """
        loss, outputs = self._of_logits(y_true, y_pred)
        return loss(y_true, outputs, sample_weight)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        """Computes the loss of each example.

        Args:
            y_true: Labels.
            y_pred: Probabilities.
        """
        loss, outputs = self._of_logits(y_true, y_pred)
        return loss.call(y_true, outputs)

    def _of_logits(self, y_true: Any, y_pred: Tensor) -> tuple[Any, Tensor]:
        """Returns the loss to compute, and what to compute it of."""
        loss = cross_entropy_of_probabilities(get_loss(self._loss, y_true, y_pred))
        assert loss is not None  # `of_logits` has seen to it.
        kind, note = ACTIVATION_OF[type(loss)], _note_of(y_pred)
        if note is not None and note.kind == kind:
            # The mask of padded time steps is on the outputs.
            keras_private.copy_mask(y_pred, note.logits)
            config = {**loss.get_config(), "from_logits": True}
            return type(loss).from_config(config), note.logits
        return loss, y_pred


def of_logits(loss: Any) -> Any:
    """Replaces cross-entropies of Keras by those that take logits, if they are known.

    Args:
        loss: One loss, as `compile` takes it, or a structure of losses.

    Returns:
        The same structure. On TensorFlow it is the same object, because Keras itself
        finds the logits there.
    """
    if backend.BACKEND == "tensorflow":
        return loss

    def replaced(one: Any) -> Any:
        if fits_labels(one) or cross_entropy_of_probabilities(one) is not None:
            return LossOfLogits(one)
        return one

    return tree.map_structure(replaced, loss)


def on_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a loss that is called directly take logits, if they are known.

    Args:
        loss: Function of labels, predictions and perhaps more, or a
            `keras.losses.Loss`.

    Returns:
        A function of the same arguments, with the same result. It is `loss` itself on
        TensorFlow, and if it is no cross-entropy of Keras that takes probabilities.
    """
    replaced = of_logits(loss)
    if replaced is loss or isinstance(loss, keras.losses.Loss):
        return replaced

    def called(labels: Any, predictions: Tensor, *others: Any) -> Tensor:
        # A function of Keras has a loss for each example, and no weights.
        if any(other is not None for other in others):
            return loss(labels, predictions, *others)
        return replaced.call(labels, predictions)

    return called


def is_recorded(outputs: Tensor) -> bool:
    """Returns whether the logits behind outputs are recorded."""
    return _note_of(outputs) is not None


def warn_of_clipping(
    losses: Sequence[Any], labels: Any, outputs: Any, advice: str = ""
) -> None:
    """Warns of losses that are computed from probabilities.

    On TensorFlow there is no warning, because Keras itself finds the logits there.

    Args:
        losses: A loss for each output, as `compile` received them.
        labels: Labels of each output.
        outputs: The outputs, within the pass that made them.
        advice: What else helps if the logits were not found, a sentence.
    """
    if backend.BACKEND == "tensorflow":
        return
    found = [each for each in tree.flatten(outputs) if backend.is_tensor(each)]
    given = tree.flatten(labels)
    if len(found) != len(losses) or len(given) != len(losses):
        return  # Losses, labels and outputs that Keras itself matches.
    for loss, label, output in zip(losses, given, found, strict=True):
        note = _note_of(output)
        if note is not None and is_own(loss):
            warnings.warn(
                f"The loss {brief(loss)} is computed from the probabilities that a "
                f"{note.kind} returned. Where they round to 0 or 1, or are clipped, "
                "their gradient is zero: training is weaker, and so are attacks on "
                "this loss. Return logits from the model, and let the loss take them.",
                stacklevel=2,
            )
        one = None if loss is None else get_loss(loss, label, output)
        known = cross_entropy_of_probabilities(one)
        if known is None or (note and note.kind == ACTIVATION_OF[type(known)]):
            continue
        activation = ACTIVATION_OF[type(known)]
        warnings.warn(
            f"The loss `{known.name}` is computed from probabilities, because the "
            "logits behind them were not found. On this backend Keras clips them to "
            "[1e-7, 1 - 1e-7], where gradients are zero: training is weaker, and so "
            f"are attacks on this loss. Let the last layer apply the {activation} by "
            f"`activation={activation!r}`, or return logits and use a loss with "
            f"`from_logits=True`.{advice and ' '}{advice}",
            stacklevel=2,
        )
