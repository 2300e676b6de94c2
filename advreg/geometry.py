"""Norm-ball arithmetic on matrices with one row per example.

Every function is pure and treats each row of a `[batch, values]` matrix on its own.
Rows hold all perturbed features of an example, so each norm is a joint norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import backend, ops, random

from advreg.config import NormType

Tensor = Any  # a tensor of the Keras backend


def widen(tensor: Tensor) -> Tensor:
    """Casts half-precision floats to float32, and leaves wider ones alone."""
    return ops.cast(tensor, backend.result_type(tensor.dtype, "float32"))


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computes in float32 at least: half precision cannot hold sums of squares."""

    @functools.wraps(function)
    def widened(rows: Tensor, *args: Any) -> Tensor:
        return ops.cast(function(widen(rows), *args), rows.dtype)

    return widened


@_widened
def steepest_direction(gradient: Tensor, norm: NormType) -> Tensor:
    """Solves `max ⟨gradient, d⟩ subject to ‖d‖ ≤ 1` for each row.

    The solution is the sign for L∞, the normalised row for L2, and the signed unit
    vector of the largest component for L1, ties shared equally. It does not change
    when a row is scaled. A row of zeros gives zeros.

    Args:
        gradient: Float tensor of shape `[batch, values]`, finite.
        norm: A `NormType`.

    Returns:
        Tensor of the shape and dtype of `gradient`.
    """
    if norm is NormType.INFINITY:
        return ops.sign(gradient)
    magnitude = ops.abs(gradient)
    largest = ops.max(magnitude, axis=1, keepdims=True)
    tiny = _tiny(gradient)
    nonzero = largest >= tiny
    if norm is NormType.L1:
        ties = ops.cast(ops.logical_and(magnitude == largest, nonzero), gradient.dtype)
        count = ops.maximum(ops.sum(ties, axis=1, keepdims=True), 1.0)
        return ops.sign(gradient) * (ties / count)
    scaled = ops.where(nonzero, gradient / _scale(largest), 0.0)
    length = ops.sqrt(ops.sum(ops.square(scaled), axis=1, keepdims=True))
    return scaled / ops.maximum(length, tiny)


@_widened
def project(displacement: Tensor, radius: Tensor | float, norm: NormType) -> Tensor:
    """Solves `min ‖p - displacement‖₂ subject to ‖p‖ ≤ radius` for each row.

    Clips for L∞, shrinks for L2, and soft-thresholds for L1
    ([Duchi et al., 2008](https://doi.org/10.1145/1390156.1390191)). A row inside the
    ball comes back unchanged.

    Args:
        displacement: Float tensor of shape `[batch, values]`, finite.
        radius: Non-negative scalar.
        norm: A `NormType`.

    Returns:
        Tensor of the shape and dtype of `displacement`.
    """
    radius = ops.convert_to_tensor(radius, displacement.dtype)
    if norm is NormType.INFINITY:
        return ops.clip(displacement, -radius, radius)
    if norm is NormType.L2:
        return displacement * _shrinkage(l2_norm(displacement), radius)
    magnitude = ops.abs(displacement)
    outside = ops.sum(magnitude, axis=1, keepdims=True) > radius
    # All that follows is relative to the largest component, so that nothing cancels
    # where the displacement is much larger than the ball.
    below = magnitude - ops.max(magnitude, axis=1, keepdims=True)
    descending = -ops.sort(-below, axis=1)
    excess = ops.cumsum(descending, axis=1) - radius
    ranks = ops.cast(ops.arange(1, ops.shape(displacement)[1] + 1), excess.dtype)
    # If the k largest components stay, they share the threshold `excess / k`, and the
    # k that solves the problem is the one that makes it largest.
    threshold = ops.max(excess / ranks, axis=1, keepdims=True)
    shrunk = ops.maximum(below - threshold, 0.0)
    # A sum of many roundings is left: the last factor takes out what exceeds the ball.
    shrunk = shrunk * _shrinkage(ops.sum(shrunk, axis=1, keepdims=True), radius)
    return ops.where(outside, ops.sign(displacement) * shrunk, displacement)


def sample_unit_ball(
    shape: tuple[Any, Any],
    norm: NormType,
    seed: random.SeedGenerator | None = None,
    free: Tensor | None = None,
    dtype: str = "float32",
) -> Tensor:
    """Draws each row uniformly from the unit ball of its free coordinates.

    The uniform law on an L1 or L2 ball is that of a vector of independent Laplace or
    normal coordinates divided by its norm, once one exponential or two normal
    coordinates that are then dropped have been counted in
    ([Barthe et al., 2005](https://doi.org/10.1214/009117904000000874)).

    Args:
        shape: `(batch, values)`, numbers or scalar tensors.
        norm: A `NormType`.
        seed: The `keras.random.SeedGenerator` to draw from: Keras's global one if
            `None`.
        free: Optional boolean tensor that broadcasts to `shape`: where it is false,
            the coordinate is 0.
        dtype: Float type of the result.

    Returns:
        Tensor of the given shape and dtype.
    """
    batch, values = shape
    if norm is NormType.INFINITY:
        return _only(random.uniform(shape, -1.0, 1.0, dtype=dtype, seed=seed), free)
    if norm is NormType.L2:
        normal = random.normal((batch, values + 2), dtype=dtype, seed=seed)
        inside, extra = _only(normal[:, :values], free), normal[:, values:]
        square = ops.sum(ops.square(inside), axis=1, keepdims=True) + ops.sum(
            ops.square(extra), axis=1, keepdims=True
        )
        return inside / ops.sqrt(ops.maximum(square, _tiny(square)))
    uniform = random.uniform((batch, values + 1), -1.0, 1.0, dtype=dtype, seed=seed)
    exponential = -ops.log(ops.maximum(ops.abs(uniform), _tiny(uniform)))
    inside, extra = _only(exponential[:, :values], free), exponential[:, values:]
    total = ops.sum(inside, axis=1, keepdims=True) + extra
    return ops.sign(uniform[:, :values]) * inside / ops.maximum(total, _tiny(total))


def l2_norm(rows: Tensor) -> Tensor:
    """Returns the Euclidean norm of each row as `[batch, 1]`, safe at any scale."""
    scale = _scale(ops.max(ops.abs(rows), axis=1, keepdims=True))
    return scale * ops.sqrt(ops.sum(ops.square(rows / scale), axis=1, keepdims=True))


def _scale(largest: Tensor) -> Tensor:
    """What to divide rows by, lest their squares under- or overflow.

    It is 1, and costs no rounding, unless the largest magnitude is extreme.
    """
    safe = ops.logical_and(largest > 1e-15, largest < 1e15)
    return ops.where(safe, 1.0, ops.maximum(largest, _tiny(largest)))


def _shrinkage(length: Tensor, radius: Tensor) -> Tensor:
    """The factor that brings a vector of this length into the ball: 1 inside it."""
    return ops.where(length > radius, radius / ops.maximum(length, _tiny(length)), 1.0)


def _only(values: Tensor, free: Tensor | None) -> Tensor:
    return values if free is None else ops.where(free, values, 0.0)


def _tiny(tensor: Tensor) -> float:
    """The smallest normal number: below it, processors may flush to zero."""
    return float(np.finfo(backend.standardize_dtype(tensor.dtype)).tiny)
