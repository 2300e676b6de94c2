"""Distances between the outputs of a model, as Neural Structured Learning has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from advreg.geometry import Tensor
from advreg.nsl.configs import DistanceConfig, DistanceType, TransformType

_REDUCTION = tf.compat.v1.losses.Reduction.SUM_BY_NONZERO_WEIGHTS
# The reductions that divide by the number of values.
_MEANS = (
    tf.compat.v1.losses.Reduction.MEAN,
    tf.compat.v1.losses.Reduction.SUM_BY_NONZERO_WEIGHTS,
    tf.compat.v1.losses.Reduction.SUM_OVER_BATCH_SIZE,
    tf.compat.v1.losses.Reduction.SUM_OVER_NONZERO_WEIGHTS,
)


def pairwise_distance_wrapper(
    sources: Tensor,
    targets: Tensor,
    weights: Tensor | float = 1.0,
    distance_config: DistanceConfig | None = None,
) -> Tensor:
    """Measures how far targets are from their sources.

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
    sources, targets = tf.convert_to_tensor(sources), tf.convert_to_tensor(targets)
    _check_axis(axis, sources.shape.rank)
    if TransformType(config.transform_fn) is TransformType.SOFTMAX:
        sources, targets = (tf.nn.softmax(side, axis) for side in (sources, targets))
    arguments: dict[str, Any] = {
        "weights": weights,
        "reduction": config.reduction,
        "loss_collection": None,
    }
    losses = tf.compat.v1.losses
    if kind is DistanceType.COSINE:
        unit = (tf.nn.l2_normalize(side, axis) for side in (sources, targets))
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
    shape = tf.convert_to_tensor(weights).shape
    if shape.rank and shape[axis] != 1:
        raise ValueError(
            f"`weights` must be of size 1 along `sum_over_axis`, which is {axis}. "
            f"Received shape: {shape}"
        )
    return distance * tf.cast(tf.shape(sources)[axis], distance.dtype)


def kl_divergence(
    labels: Tensor,
    predictions: Tensor,
    axis: int | None = None,
    weights: Tensor | float = 1.0,
    scope: str | None = None,
    loss_collection: str | None = tf.compat.v1.GraphKeys.LOSSES,
    reduction: str = _REDUCTION,
) -> Tensor:
    """Computes the Kullback-Leibler divergence `KL(labels ‖ predictions)`.

    Args:
        labels: Probabilities that sum to 1 along `axis`.
        predictions: The same, of the same shape.
        axis: The axis of the classes.
        weights: Scalar, or tensor that broadcasts to the divergences, whose size along
            `axis` is 1.
        scope: Name of the operations.
        loss_collection: Collection of the graph that the loss is added to.
        reduction: One of `tf.compat.v1.losses.Reduction`.

    Returns:
        The weighted divergence in float32: a scalar unless `reduction` is `NONE`.

    Raises:
        tf.errors.InvalidArgumentError: An argument holds no probabilities.
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
    loss_collection: str | None = tf.compat.v1.GraphKeys.LOSSES,
    reduction: str = _REDUCTION,
) -> Tensor:
    """Computes the Jensen-Shannon divergence of labels and predictions.

    Args: as those of `kl_divergence`.

    Returns:
        The weighted divergence in float32: a scalar unless `reduction` is `NONE`.

    Raises:
        tf.errors.InvalidArgumentError, ValueError: As of `kl_divergence`.
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
    """Sums a formula over the classes of two distributions, weighs and reduces."""
    if axis is None:
        raise ValueError("`axis` must say along which axis the classes lie.")
    labels, predictions = (tf.cast(side, tf.float32) for side in (labels, predictions))
    labels.shape.assert_is_compatible_with(predictions.shape)
    _check_axis(axis, labels.shape.rank)
    checks = []
    for name, side in (("labels", labels), ("predictions", predictions)):
        message = f"`{name}` must be probabilities that sum to 1 along the axis {axis}."
        total = tf.reduce_sum(side, axis)
        checks.append(tf.debugging.assert_non_negative(side, message))
        checks.append(tf.debugging.assert_near(total, 1.0, message=message))
    with tf.name_scope(scope), tf.control_dependencies(checks):
        divergence = tf.reduce_sum(formula(labels, predictions), axis, keepdims=True)
        return tf.compat.v1.losses.compute_weighted_loss(
            divergence, weights, scope, loss_collection, reduction
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """The terms of the divergence, with a little added so that 0 has a logarithm."""
    return p * (tf.math.log(p + 1e-7) - tf.math.log(q + 1e-7))


def _check_axis(axis: int | None, rank: int) -> None:
    if axis is not None and not -rank <= axis < rank:
        raise ValueError(
            f"An axis must lie in [{-rank}, {rank}), as tensors of rank {rank} have. "
            f"Received: {axis}"
        )
