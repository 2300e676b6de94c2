"""Statistics of turns, and lines through costs."""

import statistics

import numpy as np


def quartiles(values):
    """The first quartile, the median and the third."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(own, other):
    """What one side takes of the other: the ratio of medians, and its spread.

    Returns:
        The first quartile of the ratios of the turns, the ratio of the medians, and
        the third quartile. A machine that slows down while the sides take turns moves
        the medians, and hardly the quartiles.
    """
    low, _, high = quartiles([a / b for a, b in zip(own, other, strict=True)])
    return low, statistics.median(own) / statistics.median(other), high


def straight_line(x, y):
    """Fits a line to costs, each counting in proportion to itself.

    Returns:
        The cost at 0, the slope, and the largest distance of a cost from the line,
        relative to the cost.
    """
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    residual = np.max(np.abs(start + slope * x - y) / y)
    return float(start), float(slope), float(residual)
