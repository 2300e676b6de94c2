"""Checks that clean data lie in the clip range, and that epsilon fits into it.

The mistake to catch: data and settings in different units. If pixels from 0 to 255 meet
a clip range from 0 to 1, all are clipped to 1. An epsilon of 8 is small for the former,
and for the latter larger than any distance in the range.

`summarize` reduces a batch to a few numbers, in the graph of training or at once.
`check_units` reads these numbers and raises the error, where values are known.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.config.norms import NormType
from advreg.perturbation.ball import Ball
from advreg.perturbation.geometry import machine_epsilon


class DataSummary(NamedTuple):
    """Statistics of the values of a batch that may be perturbed, and of their range.

    Ranges may differ from feature to feature: hence four numbers for their ends. Values
    that are NaN or infinite are counted, and have no part in the other statistics.

    Args:
        outside: Number of values outside the range, by more than a rounding error.
        missing: Number of values that are NaN or infinite.
        smallest: The smallest value.
        largest: The largest value.
        low_from: The smallest of the lower ends of the ranges.
        low_to: The largest of the lower ends.
        high_from: The smallest of the upper ends.
        high_to: The largest of the upper ends.
        diameter: The largest distance between two inputs in the range, in the norm of
            the ball.
    """

    outside: Any
    missing: Any
    smallest: Any
    largest: Any
    low_from: Any
    low_to: Any
    high_from: Any
    high_to: Any
    diameter: Any


def summarize(ball: Ball) -> Tensor:
    """Computes a `DataSummary` of a batch, as one float64 vector of its fields.

    A single vector, because the training step keeps it in a variable
    (`training.watch`).
    """
    ends, free = ball.range, ball.free
    if not backend.is_eager():
        found = _statistics(ops, ball, ops.stop_gradient(ball.x), *ends, free)
        return ops.stack([ops.cast(value, backend.widest_float()) for value in found])
    # In eager mode TensorFlow takes longer to start an operation than to compute it on
    # a batch. NumPy does not.
    arrays = [
        None if each is None else ops.convert_to_numpy(each) for each in (*ends, free)
    ]
    with np.errstate(invalid="ignore", over="ignore"):  # As in a graph.
        found = _statistics(np, ball, ops.convert_to_numpy(ball.x), *arrays)
    numbers = [float(value) for value in found]
    return ops.convert_to_tensor(numbers, backend.widest_float())


def _statistics(
    xp: Any, ball: Ball, x: Any, low: Any, high: Any, free: Any
) -> DataSummary:
    """Computes a `DataSummary` by NumPy or by `keras.ops`, whichever `xp` is."""
    allowed = xp.ones_like(x, dtype="bool")
    if free is not None:
        allowed = xp.logical_and(allowed, free)
    finite = xp.isfinite(x)
    counts = xp.logical_and(allowed, finite)

    def least(values: Any) -> Any:
        return xp.min(xp.where(counts, values, math.inf))

    def most(values: Any) -> Any:
        return xp.max(xp.where(counts, values, -math.inf))

    def magnitude(values: Any) -> Any:
        return most(xp.where(xp.isfinite(values), xp.abs(values), 0.0))

    largest = xp.maximum(magnitude(x), xp.maximum(magnitude(low), magnitude(high)))
    # Data may have been float16 before Keras cast them to float32. If every value is
    # one of float16, the tolerance is a rounding error of float16.
    if xp is np:
        rounded = x.astype("float16").astype(x.dtype)
    else:
        rounded = ops.cast(ops.cast(x, "float16"), x.dtype)
    halves = xp.all(xp.logical_or(rounded == x, xp.logical_not(counts)))
    least_step = max(1e-6, ball.machine_epsilon)
    step = xp.where(halves, machine_epsilon("float16"), least_step)
    step = step if xp is np else ops.cast(step, x.dtype)
    # One rounding error of the largest number that occurs, of the data or the range.
    slack = step * xp.maximum(largest, 0.0)
    outside = xp.logical_or(x < low - slack, x > high + slack)
    # The two most distant inputs are opposite corners of the range.
    widths = xp.where(counts, high - low, 0.0)
    if ball.norm is NormType.L1:
        lengths = xp.sum(widths, axis=1)
    elif ball.norm is NormType.L2:
        lengths = xp.sqrt(xp.sum(xp.square(widths), axis=1))
    else:
        lengths = xp.max(widths, axis=1)
    return DataSummary(
        outside=xp.count_nonzero(xp.logical_and(counts, outside)),
        missing=xp.count_nonzero(xp.logical_and(allowed, xp.logical_not(finite))),
        smallest=least(x),
        largest=most(x),
        low_from=least(low),
        low_to=most(low),
        high_from=least(high),
        high_to=most(high),
        diameter=xp.max(lengths),
    )


def check_units(
    found: DataSummary, norm: NormType, name: str = "", radius: float | None = None
) -> None:
    """Checks that data lie in the clip range, and that a radius fits into it.

    Args:
        found: The summary of the data, with numbers as fields.
        norm: The norm of the radius.
        name: Name of the argument that is the radius, for errors.
        radius: The radius, `None` where it is not known.

    Raises:
        ValueError: A value lies outside the range, or no two inputs in the range are as
            far apart as the radius.
    """
    if found.outside:
        raise ValueError(
            "`x` must lie in the clip range: scale it, or set `clip_value_min` and "
            f"`clip_value_max` to the range of the data. Received: x from "
            f"{found.smallest:.6g} to {found.largest:.6g}, and a clip range from "
            f"{_span(found.low_from, found.low_to)} to "
            f"{_span(found.high_from, found.high_to)}"
        )
    diameter = found.diameter
    counted = found.smallest <= found.largest and diameter < math.inf
    if counted and radius is not None and radius > diameter * (1 + 1e-6):
        raise ValueError(
            f"`{name}` must not be larger than the clip range: no two inputs in it are "
            f"further apart than {diameter:.6g} in the {norm.value} norm. "
            f"Received: {radius:g}"
        )


def warn_of_missing(found: str, stacklevel: int) -> None:
    """Warns of inputs that are NaN or infinite.

    Args:
        found: How many there are, in words.
        stacklevel: The `stacklevel` of `warnings.warn`, as the caller would pass it.
    """
    warnings.warn(
        "`x` should hold numbers. What is NaN or infinite stays what it is when inputs "
        "are perturbed, the gradient of its example is usually NaN, so that nothing of "
        "that example moves, and the loss may become NaN. Drop or fill such values. "
        f"Received: {found} input values that are NaN or infinite",
        stacklevel=stacklevel + 1,
    )


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} ... {high:g}"
