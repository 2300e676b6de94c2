"""The names of `_tensorflow` on JAX and PyTorch, in `keras.ops`.

The reductions are those of `tf.compat.v1.losses`. A scope and a collection of losses
belong to TensorFlow's graph, and have no effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.checks import brief
from advreg.nsl._reductions import Reduction

# The tolerance of `tf.debugging.assert_near` in float32, at 1.
_NEAR = 20 * 2.0**-23


def compute_weighted_loss(
    losses: Tensor,
    weights: Tensor | float = 1.0,
    scope: str | None = None,
    loss_collection: str | None = None,
    reduction: str = Reduction.SUM_BY_NONZERO_WEIGHTS,
) -> Tensor:
    """Weighs and reduces losses, in float32.

    Args:
        losses: Float tensor.
        weights: Scalar, or tensor of the same rank that broadcasts to the losses.
        scope: Has no effect.
        loss_collection: Has no effect.
        reduction: One of `Reduction`.

    Returns:
        The weighted loss, in the dtype of `losses`.

    Raises:
        ValueError: The weights do not broadcast to the losses.
    """
    del scope, loss_collection
    given, losses = losses, ops.cast(losses, "float32")
    weights = ops.cast(ops.convert_to_tensor(weights), "float32")
    shape, of_weights = tuple(losses.shape), tuple(weights.shape)
    if of_weights and not (
        len(of_weights) == len(shape)
        and all(n in (1, m) for n, m in zip(of_weights, shape, strict=True))
    ):
        raise ValueError(
            "`weights` must be a scalar, or broadcast to the distances, whose shape is "
            f"{shape}. Received shape: {of_weights}"
        )
    weighted = losses * weights
    if reduction == Reduction.NONE:
        return ops.cast(weighted, given.dtype)
    total, everywhere = ops.sum(weighted), ops.broadcast_to(weights, shape)
    if reduction != Reduction.SUM:
        if reduction == Reduction.MEAN:
            number = ops.sum(everywhere)
        elif reduction == Reduction.SUM_OVER_BATCH_SIZE:
            number = ops.sum(ops.ones_like(losses))
        else:
            number = ops.sum(ops.cast(ops.not_equal(everywhere, 0.0), "float32"))
        none = ops.equal(number, 0.0)
        total = ops.where(none, 0.0, total / ops.where(none, 1.0, number))
    return ops.cast(total, given.dtype)


def absolute_difference(
    labels: Tensor, predictions: Tensor, **arguments: Any
) -> Tensor:
    """Computes the absolute difference. See `compute_weighted_loss`."""
    labels, predictions = _floats(labels, predictions)
    return compute_weighted_loss(ops.abs(predictions - labels), **arguments)


def mean_squared_error(labels: Tensor, predictions: Tensor, **arguments: Any) -> Tensor:
    """Computes the squared difference. See `compute_weighted_loss`."""
    labels, predictions = _floats(labels, predictions)
    return compute_weighted_loss(ops.square(predictions - labels), **arguments)


def cosine_distance(
    labels: Tensor, predictions: Tensor, axis: int | None = None, **arguments: Any
) -> Tensor:
    """Computes 1 minus the product of unit vectors. See `compute_weighted_loss`."""
    if axis is None:
        raise ValueError(
            "The axis of the vectors must be given: `sum_over_axis` of the "
            "`DistanceConfig`. Received: None"
        )
    labels, predictions = _floats(labels, predictions)
    products = ops.sum(predictions * labels, axis=axis, keepdims=True)
    return compute_weighted_loss(1 - products, **arguments)


def l2_normalize(tensor: Tensor, axis: int | None = None) -> Tensor:
    """Divides by the L2 norm along an axis, which counts as 1e-6 at least."""
    squares = ops.sum(ops.square(tensor), axis=axis, keepdims=True)
    return tensor * ops.rsqrt(ops.maximum(squares, 1e-12))


def softmax(tensor: Tensor, axis: int | None = None) -> Tensor:
    """Computes the softmax, by default along the last axis."""
    return ops.softmax(tensor, axis=-1 if axis is None else axis)


def check_same_shape(labels: Tensor, predictions: Tensor) -> None:
    """Checks that two shapes do not differ.

    Raises:
        ValueError: They do.
    """
    shapes = tuple(labels.shape), tuple(predictions.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Both tensors must have the same shape. Received shapes: "
            f"{shapes[0]} and {shapes[1]}"
        )


def probabilities(
    scope: str, sides: Mapping[str, Tensor], axis: int
) -> contextlib.AbstractContextManager[None]:
    """Checks that tensors are probabilities, where their values are known.

    Args:
        scope: Has no effect.
        sides: The tensors, by the names of the arguments.
        axis: The axis of the classes.

    Raises:
        ValueError: They are not.
    """
    del scope
    for name, side in sides.items():
        far = ops.abs(ops.sum(side, axis=axis) - 1.0) > _NEAR
        _check(
            f"`{name}` must be probabilities that sum to 1 along the axis {axis}.",
            side,
            ops.any(side < 0),
            ops.any(far),
        )
    return contextlib.nullcontext()


def unit_interval(name: str, values: Tensor) -> contextlib.AbstractContextManager[None]:
    """Checks that values lie in [0, 1], where they are known.

    Args:
        name: Name of the argument.
        values: The values.

    Raises:
        ValueError: One does not.
    """
    _check(
        f"`{name}` must lie in [0, 1].",
        values,
        ops.any(values < 0),
        ops.any(values > 1),
    )
    return contextlib.nullcontext()


def argmin(scores: Tensor) -> Tensor:
    """Returns the place of the smallest score of each row, int32."""
    return ops.cast(ops.argmin(scores, axis=-1), "int32")


def random_targets(logits: Tensor, seed: int) -> Tensor:
    """Draws a class for each row, int32. The same seed gives the same classes."""
    batch, classes = ops.shape(logits)
    return keras.random.randint((batch,), 0, classes, "int32", seed=seed)


def normal_like(tensor: Tensor) -> Tensor:
    """Draws a tensor of the same shape and dtype from the normal distribution."""
    return keras.random.normal(
        ops.shape(tensor), dtype=keras.backend.standardize_dtype(tensor.dtype)
    )


def passes() -> contextlib.AbstractContextManager[Any]:
    """Discards what passes change in layers: JAX could not keep it."""
    return backend.StatelessScope()


def _floats(labels: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(labels, predictions)
    return ops.cast(labels, "float32"), ops.cast(predictions, "float32")


def _check(message: str, values: Tensor, *wrong: Tensor) -> None:
    """Raises an error if a flag is true. Inside `jax.jit` no values are known."""
    if any(not backend.is_symbolic(flag) and bool(flag) for flag in wrong):
        raise ValueError(f"{message} Received: {brief(values)}")
