"""Steps, projections and random points of norm balls, for one example in each row.

Every function is pure and treats each row of a `[batch, values]` matrix on its own. A
row holds all perturbed features of an example, so each norm is a joint norm.

Each docstring states the problem that its function solves. Much of the code is there
for extreme values, which real gradients have. A saturated softmax has gradients of
1e-30, whose squares are 0 in float32. A gradient may be exactly 0, or infinite. Half
precision cannot add up squares. And no result may depend on the scale of a gradient,
because the scale of a loss means nothing to the direction of an attack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, random

from advreg import backend
from advreg._types import Tensor
from advreg.config.norms import NormType


def widen(tensor: Tensor) -> Tensor:
    """Casts half-precision floats to float32, and leaves wider ones alone."""
    return ops.cast(tensor, wide_type(tensor))


def wide_type(*tensors: Tensor) -> str:
    """Returns the float type in which to compute with tensors, float32 at least.

    Keras's `result_type` is float32 for float64, too, but on TensorFlow.
    """
    return "float64" if "float64" in map(_type_of, tensors) else "float32"


def make_finite(gradient: Tensor) -> Tensor:
    """Makes a gradient finite: ±inf becomes a very large number, and NaN becomes 0.

    A root or a logarithm has an infinite gradient at 0. The sign of an infinite
    gradient still says in which direction the loss grows, so it is kept. Usual values
    vanish beside the large number: a step of L2 or L1 goes to the infinite values
    alone, in equal shares. That is the limit of the steps for larger and larger
    gradients. NaN has no sign, so such a value takes no step.

    Args:
        gradient: Float tensor of any shape.

    Returns:
        Finite tensor of the shape of `gradient`, in float32 at least.
    """
    gradient = widen(gradient)
    # A tensor, because Keras on PyTorch would take a number for one of float32.
    most = ops.convert_to_tensor(_most(gradient), gradient.dtype)
    gradient = ops.where(ops.isnan(gradient), 0.0, gradient)
    return ops.clip(gradient, -most, most)


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a function of rows, to compute in float32 at least and return their dtype.

    Half precision cannot hold sums of squares: the largest float16 is 65,504.
    """

    @functools.wraps(function)
    def widened(rows: Tensor, *args: Any) -> Tensor:
        return ops.cast(function(widen(rows), *args), rows.dtype)

    return widened


@_widened
def steepest_direction(gradient: Tensor, norm: NormType) -> Tensor:
    """Solves `max ⟨gradient, d⟩ subject to ‖d‖ ≤ 1` for each row.

    The solution is the sign for L∞ (FGSM,
    [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572)), the row divided by its
    norm for L2, and for L1 the signed unit vector of the component with the largest
    magnitude, shared equally among ties. It does not change when a row is scaled. A row
    of zeros gives zeros.

    Args:
        gradient: Float tensor of shape `[batch, values]`, finite. `make_finite` makes
            any gradient finite.
        norm: A `NormType`.

    Returns:
        Tensor of the shape and dtype of `gradient`.
    """
    if norm is NormType.INFINITY:
        return ops.sign(gradient)
    magnitude = ops.abs(gradient)
    largest = ops.max(magnitude, axis=1, keepdims=True)
    tiny = _tiny(gradient)
    # Denormal numbers count as 0, because some processors flush them to zero.
    nonzero = largest >= tiny
    if norm is NormType.L1:
        # Any share among ties solves the problem. An equal one depends on no order.
        ties = ops.cast(ops.logical_and(magnitude == largest, nonzero), gradient.dtype)
        count = backend.maximum(ops.sum(ties, axis=1, keepdims=True), 1.0)
        return ops.sign(gradient) * (ties / count)
    scaled = ops.where(nonzero, gradient / _scale(largest), 0.0)
    length = ops.sqrt(ops.sum(ops.square(scaled), axis=1, keepdims=True))
    return scaled / backend.maximum(length, tiny)  # A row of zeros has length 0.


@_widened
def project(displacement: Tensor, radius: Tensor | float, norm: NormType) -> Tensor:
    """Solves `min ‖p - displacement‖₂ subject to ‖p‖ ≤ radius` for each row.

    The solution is the clipped row for L∞, the row scaled down to the radius for L2,
    and the soft-thresholded row for L1
    ([Duchi et al., 2008](https://doi.org/10.1145/1390156.1390191)). A row inside the
    ball is returned unchanged.

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
    # What follows is relative to the largest component. In absolute numbers the sum of
    # the k largest minus the radius would lose all digits of the radius where the
    # displacement is much larger than the ball.
    below = magnitude - ops.max(magnitude, axis=1, keepdims=True)
    descending = -ops.sort(-below, axis=1)
    excess = backend.cumsum(descending, axis=1) - radius
    ranks = ops.cast(ops.arange(1, ops.shape(displacement)[1] + 1), excess.dtype)
    # If the k largest components stay nonzero, each must lose `excess / k`. The
    # solution is the k for which this threshold is largest, so no search for k is
    # needed.
    threshold = ops.max(excess / ranks, axis=1, keepdims=True)
    shrunk = backend.maximum(below - threshold, 0.0)
    # Rounding errors have added up over the row. This last factor takes out what still
    # exceeds the ball.
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

    In L∞ each coordinate is uniform in [-1, 1]. In L2 a row is drawn with two
    coordinates more than are asked for, all of them normal; it is divided by its norm,
    and the two are dropped. In L1 it is drawn with Laplace coordinates and one
    exponential one, divided by its norm, and that one is dropped. The rest is uniform
    on the ball ([Barthe et al., 2005](https://doi.org/10.1214/009117904000000874)).

    Args:
        shape: `(batch, values)`, numbers or scalar tensors.
        norm: A `NormType`.
        seed: The `keras.random.SeedGenerator` to draw from: Keras's global one if
            `None`.
        free: Boolean tensor that broadcasts to `shape`, or `None`. Where it is false,
            the coordinate is 0, and the row is uniform on the ball of the others.
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
        return inside / ops.sqrt(backend.maximum(square, _tiny(square)))
    # One uniform number gives both parts of a Laplace coordinate: its magnitude gives
    # an exponential number, its sign the sign.
    uniform = random.uniform((batch, values + 1), -1.0, 1.0, dtype=dtype, seed=seed)
    exponential = -ops.log(backend.maximum(ops.abs(uniform), _tiny(uniform)))
    inside, extra = _only(exponential[:, :values], free), exponential[:, values:]
    total = ops.sum(inside, axis=1, keepdims=True) + extra
    return ops.sign(uniform[:, :values]) * inside / backend.maximum(total, _tiny(total))


def l2_norm(rows: Tensor) -> Tensor:
    """Computes the L2 norm of each row, as `[batch, 1]`, without over- or underflow."""
    scale = _scale(ops.max(ops.abs(rows), axis=1, keepdims=True))
    return scale * ops.sqrt(ops.sum(ops.square(rows / scale), axis=1, keepdims=True))


def _scale(largest: Tensor) -> Tensor:
    """Returns what to divide rows by, so that their squares do not under- or overflow.

    Args:
        largest: The largest magnitude of each row.

    Returns:
        `largest` where it is extreme, else 1, by which a division does not round.
    """
    safe = ops.logical_and(largest > 1e-15, largest < 1e15)
    return ops.where(safe, 1.0, backend.maximum(largest, _tiny(largest)))


def machine_epsilon(dtype: str) -> float:
    """Returns the step from 1 to the next number of a dtype, 0 if it is no float."""
    return {
        "float16": 2.0**-10,
        "bfloat16": 2.0**-7,
        "float32": 2.0**-23,
        "float64": 2.0**-52,
    }.get(dtype, 0.0)


def _shrinkage(length: Tensor, radius: Tensor) -> Tensor:
    """Returns the factor that scales a vector down to the radius, 1 inside the ball."""
    return ops.where(
        length > radius, radius / backend.maximum(length, _tiny(length)), 1.0
    )


def _only(values: Tensor, free: Tensor | None) -> Tensor:
    return values if free is None else ops.where(free, values, 0.0)


def _most(tensor: Tensor) -> float:
    """Returns the number that stands for infinity.

    It is a millionth of the largest float, so that a million of them can be added up.
    """
    return 1e-6 * float(np.finfo(_type_of(tensor)).max)


def _type_of(tensor: Tensor) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def _tiny(tensor: Tensor) -> float:
    """Returns the smallest normal number. Processors may flush smaller ones to zero."""
    return float(np.finfo(_type_of(tensor)).tiny)
