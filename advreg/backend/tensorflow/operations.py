"""The operations that advreg needs from TensorFlow itself.

Each function here has an equivalent in JAX and PyTorch. Another backend must provide
all of them, a trainer, and compiled functions. Operations that `keras.ops` has are not
here: the other rooms use `keras.ops`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from advreg._types import Tensor, Watch
from advreg.backend import keras_private

ERRORS = (tf.errors.OpError,)  # The errors that operations of TensorFlow raise.
NUM_SEEDS = 2**32  # The seeds that a `SeedGenerator` of Keras takes.
# The scope in which changes of variables are discarded. On JAX it is another one.
StatelessScope = keras.StatelessScope


def is_tensor(leaf: Any) -> bool:
    """Returns whether a value is a dense tensor."""
    return isinstance(leaf, tf.Tensor)


def is_sparse(leaf: Any) -> bool:
    """Returns whether a value is a sparse tensor."""
    return isinstance(leaf, tf.SparseTensor)


def is_ragged(leaf: Any) -> bool:
    """Returns whether a value is a ragged tensor."""
    return isinstance(leaf, tf.RaggedTensor)


def is_eager() -> bool:
    """Returns whether operations run at once, rather than become part of a graph."""
    return tf.executing_eagerly()


def current_trace() -> Any:
    """Returns what equals itself only while the same function is traced.

    A loop, or a compiled function that the traced one calls, is a trace of its own: a
    tensor that is made there cannot be used outside.
    """
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def is_symbolic(tensor: Tensor) -> bool:
    """Returns whether a tensor has no value yet."""
    return tf.is_symbolic_tensor(tensor)


def rank(tensor: Any) -> int | None:
    """Returns the number of axes of a tensor, `None` where it is unknown."""
    return tf.TensorShape(tensor.shape).rank


def dtype_name(tensor: Any) -> str:
    """Returns the name of the dtype of a tensor or array, such as "float32"."""
    return str(tf.as_dtype(tensor.dtype).name)


def widest_float() -> str:
    """Returns the widest float type."""
    return "float64"


def to_tensor(leaf: Any) -> Any:
    """Converts an array or variable to a tensor, and returns tensors and `None`."""
    if leaf is None or isinstance(leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
        return leaf
    return tf.convert_to_tensor(leaf)


def num_rows(tensor: Any) -> Tensor:
    """Returns the length of the first axis, a scalar tensor."""
    return tf.shape(tensor)[0]


def copy(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same values."""
    return tf.identity(tensor)


def argmax(scores: Tensor) -> Tensor:
    """Returns the place of the largest score of each row, int32 `[batch]`.

    `keras.ops.argmax` tells 0 from -0 besides, which takes longer than the rest.
    """
    return tf.argmax(scores, axis=1, output_type=tf.int32)


maximum, minimum, cumsum = ops.maximum, ops.minimum, ops.cumsum


def own_copy(data: Any) -> Any:
    """Copies the tensors of a batch, so that a step may run on them.

    TensorFlow uses the memory of an array that a generator yields, without a copy. If
    such an array is sliced, as `rebatch` does and as each replica gets it, TensorFlow
    (2.19 to 2.21 at least) forgets that the memory belongs to someone else, and lets an
    operation write its result there. The sum of input and perturbation would replace
    the user's data.
    """

    def copied(leaf: Any) -> Any:
        return tf.raw_ops.DeepCopy(x=leaf) if isinstance(leaf, tf.Tensor) else leaf

    return tf.nest.map_structure(copied, data, expand_composites=True)


def gather(tensor: Tensor, places: Any) -> Tensor:
    """Returns some of the rows of a tensor. `places` are not negative."""
    return tf.gather(tensor, places)


def padding(rows: int, batch_size: int) -> np.ndarray | None:
    """Returns the rows of a batch that is filled up with copies of its last one.

    Args:
        rows: Number of rows that there are.
        batch_size: Number of rows of a full batch.

    Returns:
        The numbers of the rows, or `None` where no padding is needed. TensorFlow and
        PyTorch never need any.
    """
    return None


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """Joins tensors along their first axis."""
    return tf.concat(tensors, 0)


def uniform(shape: Any, seed: Tensor, dtype: Any) -> Tensor:
    """Draws uniformly from [0, 1). The same seed, `[2]`, gives the same numbers."""
    return tf.random.stateless_uniform(shape, seed, dtype=dtype)


def random_integers(shape: Any, seed: Tensor) -> Tensor:
    """Draws int32 from [0, 2**31 - 1). The same seed, `[2]`, gives the same numbers."""
    return tf.random.stateless_uniform(shape, seed, 0, 2**31 - 1, tf.int32)


def assert_at_most(number: Tensor, most: int, message: str) -> None:
    """Checks when a graph runs, or at once, that a number is not larger than `most`.

    Raises:
        tf.errors.InvalidArgumentError: It is. The error has this message.
    """
    tf.debugging.assert_less_equal(number, most, message)


def choose(condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """Runs one of two functions. In a graph both are traced, but only one runs."""
    if tf.executing_eagerly():
        return one() if condition else other()
    return tf.cond(condition, one, other)


def differentiate(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]],
    tensors: Sequence[Tensor],
    scale: Tensor | float | None = None,
    zeros: bool = False,
) -> tuple[Tensor, Any, list[Any]]:
    """Runs a function, and takes the gradient of the value that it returns.

    Args:
        function: Function of a list of tensors that returns a value and anything else.
        tensors: Its argument.
        scale: Factor of the value before its gradient is taken, `None` for 1.
        zeros: Whether a tensor that the value does not depend on has a gradient of
            zeros, and not `None`.

    Returns:
        The value, what else the function returned, and a gradient for each tensor.
    """
    tensors = list(tensors)
    # The weights need no gradient here, and recording for them would cost memory.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        value, others = function(tensors)
    gradients = tape.gradient(
        value, tensors, _upstream(value, scale), _unconnected(zeros)
    )
    return value, others, gradients


def differentiate_step(
    function: Callable[[list[Tensor], Watch], tuple[Tensor, Tensor | None, Any]],
    variables: Callable[[], Sequence[keras.Variable]],
    tensors: Sequence[Tensor] = (),
    watches: bool = False,
) -> tuple[Any, list[Any], list[Any]]:
    """Runs a function, and takes two gradients of the values that it returns.

    Args:
        function: Function of a list of tensors, and of a function `watch`. It returns a
            value to differentiate with respect to variables, a value to differentiate
            with respect to the tensors, and anything else. If the two values are one
            object, a single backward pass gives both gradients. `watch(tensor)` returns
            a tensor that is equal to what is computed on the way, and whose gradient is
            wanted too: the function must go on with the returned one.
        variables: Function that returns the variables. It is called after the other
            one, which may create some.
        tensors: The argument of the function.
        watches: Whether the function calls `watch`.

    Returns:
        What else the function returned, a gradient for each variable, and one for each
        tensor, after which come those of the watched ones in the order of the calls. A
        gradient may be `None`, or sparse.
    """
    tensors = list(tensors)
    # Two gradients of one tape need a persistent one.
    with tf.GradientTape(persistent=bool(tensors) or watches) as tape, _active(tape):

        def watch(tensor: Tensor) -> Tensor:
            tensor = tf.identity(tensor)
            tape.watch(tensor)
            watched.append(tensor)
            return tensor

        watched: list[Tensor] = []
        tape.watch(tensors)
        total, attacked, others = function(tensors, watch)
    tensors += watched
    weights = list(variables())
    if not tensors:
        return others, tape.gradient(total, weights), []
    if attacked is not total:
        of_weights = tape.gradient(total, weights)
        return others, of_weights, tape.gradient(attacked, tensors)
    both = tape.gradient(total, [*weights, *tensors])
    return others, both[: len(weights)], both[len(weights) :]


def weight_gradients(
    function: Callable[[], Tensor],
    variables: Sequence[keras.Variable],
    scale: Tensor | float | None,
) -> list[Tensor]:
    """Takes the gradient of a loss with respect to variables, times a scale.

    Args:
        function: Function that returns the loss. State that it changes is discarded.
        variables: The variables.
        scale: The scale, `None` for 1.

    Returns:
        A dense gradient for each variable, zero where the loss does not depend on it.
    """
    with tf.GradientTape() as tape, keras.StatelessScope():
        loss = function()
    found = tape.gradient(
        loss, variables, _upstream(loss, scale), _unconnected(zeros=True)
    )
    return [tf.convert_to_tensor(gradient) for gradient in found]


# The tapes of `differentiate_step` that record now. One stack for each thread, because
# each replica of a strategy runs in a thread of its own.
_tapes = threading.local()


@contextlib.contextmanager
def _active(tape: tf.GradientTape) -> Iterator[None]:
    """Makes a tape known to `constants` in this thread, as a context manager."""
    stack = _tapes.__dict__.setdefault("stack", [])
    stack.append(tape)
    try:
        yield
    finally:
        stack.pop()


@contextlib.contextmanager
def constants() -> Iterator[None]:
    """Stops the recording of `differentiate_step`, as a context manager.

    What is computed inside is a constant to its gradients. An attack within a step uses
    this: without it the tape would record, and keep in memory, all its iterations.
    """
    with contextlib.ExitStack() as stack:
        for tape in reversed(_tapes.__dict__.get("stack", [])):
            stack.enter_context(tape.stop_recording())
        yield


def add_gradients(a: Any, b: Any) -> Any:
    """Adds two gradients, each of which may be `None` or sparse."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([a.values, b.values], 0),
            tf.concat([a.indices, b.indices], 0),
            a.dense_shape,
        )
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


def dense(gradient: Any) -> Tensor:
    """Converts a gradient, which may be sparse, to a dense tensor."""
    return tf.convert_to_tensor(gradient)


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    weights: Sequence[keras.Variable],
) -> None:
    """Updates weights by an optimizer."""
    optimizer.apply_gradients(zip(gradients, weights, strict=True))


def repeat(
    function: Callable[[Tensor], Tensor], times: int, value: Tensor, unroll: bool
) -> Tensor:
    """Applies a function repeatedly, each time to its last result.

    In a graph it is a loop, whose memory does not grow with `times`.

    Args:
        function: Function from a tensor to one of the same shape and dtype.
        times: How often it is applied, 0 or more.
        value: The tensor to begin with.
        unroll: Whether the graph repeats the function instead of having a loop.
    """
    if unroll or times <= 1 or tf.executing_eagerly():
        for _ in range(times):
            value = function(value)
        return value
    # TensorFlow inlines the body of a loop. The graph then has a cycle, in which oneDNN
    # may leave slow kernels (seen on MaxPoolGrad in TensorFlow 2.21: half as slow
    # again, at random). A body that is a function of its own, not inlined, is optimised
    # as it should be.
    body = tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    )
    (value,) = tf.while_loop(
        lambda _: True,
        lambda value: (body(value),),
        (value,),
        maximum_iterations=times,
    )
    return value


def accumulate(
    add: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    times: int,
    sums: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Applies a function of several tensors repeatedly, in a loop.

    Args:
        add: Function from tensors to tensors of the same shapes and dtypes.
        times: How often it is applied, 0 or more.
        sums: The tensors to begin with.
    """
    if tf.executing_eagerly():
        for _ in range(times):
            sums = add(sums)
        return sums
    found = tf.while_loop(
        lambda *_: True,
        lambda *sums: list(add(sums)),
        list(sums),
        maximum_iterations=times,
    )
    return tuple(found)


def recorded_gradient(
    loss: Tensor,
    tensors: list[Tensor],
    tape: tf.GradientTape | None,
    scale: float | None,
) -> Sequence[Tensor]:
    """Takes the gradient of a loss that the user has computed, times a scale.

    Args:
        loss: The loss.
        tensors: The tensors to differentiate with respect to.
        tape: The `tf.GradientTape` that watched them. It may be `None` inside a
            `tf.function`.
        scale: The scale, `None` for 1.

    Raises:
        ValueError: There is no tape in eager code, or it is still recording and not
            persistent.
    """
    seed = _upstream(loss, scale)
    if tape is None:
        if tf.executing_eagerly():
            raise ValueError(
                "`gradient_tape` is needed in eager code: pass the `tf.GradientTape` "
                "that watched `input_features` while `labeled_loss` was computed. "
                "Received: gradient_tape=None"
            )
        return tf.gradients(loss, tensors, seed)
    if not is_recording(tape):
        return tape.gradient(loss, tensors, seed)
    if not keras_private.is_persistent(tape):
        raise ValueError(
            "`gradient_tape` is still recording. Leave its `with` block first, or make "
            "it with `persistent=True`. Received: a recording, non-persistent tape"
        )
    with tape.stop_recording():
        return tape.gradient(loss, tensors, seed)


def new_tape() -> tf.GradientTape:
    """Makes a tape, for `recorded_gradient`."""
    return tf.GradientTape()


def recording(tape: tf.GradientTape | None) -> Any:
    """Returns a context manager inside which a tape records, if there is one."""
    if tape is None or is_recording(tape):
        return contextlib.nullcontext()
    return tape


def is_recording(tape: tf.GradientTape) -> bool:
    """Returns whether a tape is recording.

    Its public names do not say so, except by an error.
    """
    try:
        with tape.stop_recording():
            return True
    except (RuntimeError, ValueError):
        return False


def signature_of(value: Any) -> Any:
    """Returns the type specs of the tensors in a structure, for any batch size."""
    return tree.map_structure(_spec, value)


def _upstream(value: Tensor, scale: Tensor | float | None) -> Tensor | None:
    """Returns the `output_gradients` of a tape that scale the gradient of a value."""
    if scale is None:
        return None
    return tf.fill(tf.shape(value), tf.cast(scale, value.dtype))


def _unconnected(zeros: bool) -> tf.UnconnectedGradients:
    return tf.UnconnectedGradients.ZERO if zeros else tf.UnconnectedGradients.NONE


def _spec(leaf: Any) -> Any:
    """Returns the type spec of a tensor, with an open batch size."""
    spec = tf.type_spec_from_value(leaf)
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            [None, *spec.shape[1:]], spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return spec
