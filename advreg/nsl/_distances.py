"""Distances between outputs of a model, as in Neural Structured Learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keras import ops

from advreg._types import Tensor
from advreg.backend import BACKEND, to_tensor
from advreg.nsl._reductions import Reduction
from advreg.nsl.configs import DistanceConfig, DistanceType, TransformType

if TYPE_CHECKING or BACKEND == "tensorflow":
    from advreg.nsl import _tensorflow as losses
else:
    from advreg.nsl import _elsewhere as losses

_COLLECTION = "losses"  # `tf.compat.v1.GraphKeys.LOSSES`
# The reductions that divide by the number of values.
_MEANS = (
    Reduction.MEAN,
    Reduction.SUM_BY_NONZERO_WEIGHTS,
    Reduction.SUM_OVER_BATCH_SIZE,
)


def pairwise_distance_wrapper(
    sources: Tensor,
    targets: Tensor,
    weights: Tensor | float = 1.0,
    distance_config: DistanceConfig | None = None,
) -> Tensor:
    """Computes the distance between sources and targets.

    Args:
        sources: Float tensor.
        targets: Tensor of the same shape and dtype.
        weights: Scalar, or tensor that broadcasts to the distances; its size along
            `sum_over_axis` is then 1.
        distance_config: A `DistanceConfig`, by default `DistanceConfig()`. Where it
            has a `sum_over_axis`, the result is the mean over vectors along it, and
            not over their values.

    Returns:
        The weighted distance: a scalar unless the reduction is `NONE`.

    Raises:
        ValueError: Shapes or the axis do not fit, or an axis is missing.
    """
    config = DistanceConfig() if distance_config is None else distance_config
    kind, axis = DistanceType(config.distance_type), config.sum_over_axis
    sources, targets = to_tensor(sources), to_tensor(targets)
    _check_axis(axis, len(sources.shape))
    if TransformType(config.transform_fn) is TransformType.SOFTMAX:
        sources, targets = (losses.softmax(side, axis) for side in (sources, targets))
    arguments: dict[str, Any] = {
        "weights": weights,
        "reduction": config.reduction,
        "loss_collection": None,
    }
    if kind is DistanceType.COSINE:
        unit = (losses.l2_normalize(side, axis) for side in (sources, targets))
        return losses.cosine_distance(*unit, axis=axis, **arguments)
    if kind is DistanceType.KL_DIVERGENCE:
        return kl_divergence(sources, targets, axis, **arguments)
    if kind is DistanceType.JENSEN_SHANNON_DIVERGENCE:
        return jensen_shannon_divergence(sources, targets, axis, **arguments)
    if kind is DistanceType.L1:
        distance = losses.absolute_difference(sources, targets, **arguments)
    else:
        distance = losses.mean_squared_error(sources, targets, **arguments)
    if axis is None or config.reduction not in _MEANS:
        return distance
    shape = to_tensor(weights).shape
    if len(shape) and shape[axis] != 1:
        raise ValueError(
            f"`weights` must be of size 1 along `sum_over_axis`, which is {axis}. "
            f"Received shape: {tuple(shape)}"
        )
    return distance * ops.cast(ops.shape(sources)[axis], distance.dtype)


def kl_divergence(
    labels: Tensor,
    predictions: Tensor,
    axis: int | None = None,
    weights: Tensor | float = 1.0,
    scope: str | None = None,
    loss_collection: str | None = _COLLECTION,
    reduction: str = Reduction.SUM_BY_NONZERO_WEIGHTS,
) -> Tensor:
    """Computes the Kullback-Leibler divergence `KL(labels ‖ predictions)`.

    Args:
        labels: Probabilities that sum to 1 along `axis`.
        predictions: Probabilities likewise, of the same shape.
        axis: The axis of the classes. It must be given.
        weights: Scalar, or tensor that broadcasts to the divergences, whose size along
            `axis` is 1.
        scope: Name of the operations in TensorFlow's graph.
        loss_collection: Collection of TensorFlow's graph to which the loss is added.
        reduction: One of `tf.compat.v1.losses.Reduction`.

    Returns:
        The weighted divergence in float32: a scalar unless `reduction` is `NONE`.

    Raises:
        tf.errors.InvalidArgumentError: An argument holds no probabilities. On JAX and
            PyTorch that is a `ValueError`.
        ValueError: `axis` is missing or out of range, or shapes differ.
    """
    return _divergence(
        _kl,
        labels,
        predictions,
        axis,
        weights,
        scope or "kl_divergence",
        loss_collection,
        reduction,
    )


def jensen_shannon_divergence(
    labels: Tensor,
    predictions: Tensor,
    axis: int | None = None,
    weights: Tensor | float = 1.0,
    scope: str | None = None,
    loss_collection: str | None = _COLLECTION,
    reduction: str = Reduction.SUM_BY_NONZERO_WEIGHTS,
) -> Tensor:
    """Computes the Jensen-Shannon divergence of labels and predictions.

    Args:
        labels: Probabilities that sum to 1 along `axis`. See `kl_divergence` for all
            arguments.
        predictions: Probabilities likewise, of the same shape.
        axis: The axis of the classes. It must be given.
        weights: Scalar, or tensor that broadcasts to the divergences.
        scope: Name of the operations in TensorFlow's graph.
        loss_collection: Collection of TensorFlow's graph to which the loss is added.
        reduction: One of `tf.compat.v1.losses.Reduction`.

    Returns:
        The weighted divergence in float32: a scalar unless `reduction` is `NONE`.

    Raises:
        tf.errors.InvalidArgumentError: An argument holds no probabilities. On JAX and
            PyTorch that is a `ValueError`.
        ValueError: `axis` is missing or out of range, or shapes differ.
    """
    return _divergence(
        lambda p, q: (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2,
        labels,
        predictions,
        axis,
        weights,
        scope or "jensen_shannon_divergence",
        loss_collection,
        reduction,
    )


def _divergence(
    formula: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    predictions: Tensor,
    axis: int | None,
    weights: Tensor | float,
    scope: str,
    loss_collection: str | None,
    reduction: str,
) -> Tensor:
    """Computes a divergence: the weighted, reduced sum of a formula over classes."""
    if axis is None:
        raise ValueError("`axis` must say along which axis the classes lie.")
    labels, predictions = (
        ops.cast(to_tensor(side), "float32") for side in (labels, predictions)
    )
    losses.check_same_shape(labels, predictions)
    _check_axis(axis, len(labels.shape))
    sides = {"labels": labels, "predictions": predictions}
    with losses.probabilities(scope, sides, axis):
        divergence = ops.sum(formula(labels, predictions), axis, keepdims=True)
        return losses.compute_weighted_loss(
            divergence, weights, scope, loss_collection, reduction
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns the terms of the divergence, with 1e-7 added to avoid the log of 0."""
    return p * (ops.log(p + 1e-7) - ops.log(q + 1e-7))


def _check_axis(axis: int | None, rank: int) -> None:
    if axis is not None and not -rank <= axis < rank:
        raise ValueError(
            f"An axis must lie in [{-rank}, {rank}), as tensors of rank {rank} have. "
            f"Received: {axis}"
        )
