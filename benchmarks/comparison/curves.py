"""Cost curves: what a step of training costs against one quantity at a time."""

import dataclasses

from comparison.ratios import straight_line
from comparison.works import step_job


@dataclasses.dataclass(frozen=True)
class Curve:
    """Steps of training that differ in one quantity.

    Args:
        name: The quantity.
        straight_in: What the cost of a step is a straight line in.
        points: For each step the quantity, the abscissa of that line, and fields of
            the `Job`.
    """

    name: str
    straight_in: str
    points: tuple


def curves():
    """The curves, each over the whole range that it is promised for."""
    iterations = [
        (count, count, step_job("mnist", 32, count, 0.2 if count == 1 else 0.05))
        for count in (1, 2, 3, 5, 10, 20, 40)
    ]
    batches = [
        (batch, batch, step_job("mnist", batch, 1, 0.2))
        for batch in (8, 16, 32, 64, 128, 256, 512, 1024)
    ]
    widths = [
        (width, weights(width, 2), perceptron(width, 2))
        for width in (64, 128, 256, 512, 1024, 2048)
    ]
    depths = [(depth, depth, perceptron(256, depth)) for depth in (1, 2, 4, 8, 16, 32)]
    return (
        Curve("iterations", "iterations", tuple(iterations)),
        Curve("batch", "examples", tuple(batches)),
        Curve("width", "weights", tuple(widths)),
        Curve("depth", "layers", tuple(depths)),
    )


def perceptron(width, depth):
    sizes = {"width": width, "depth": depth}
    return {**step_job("mlp", 256, 1, 0.2), "sizes": sizes}


def weights(width, depth):
    """The weights of the matrices of a multi-layer perceptron."""
    return 100 * width + (depth - 1) * width**2 + 10 * width


def described(curve, milliseconds):
    """What the medians of a curve's points come to, as JSON can hold it."""
    start, slope, residual = straight_line(
        [abscissa for _, abscissa, _ in curve.points], milliseconds
    )
    return {
        "name": curve.name,
        "straight in": curve.straight_in,
        "points": [
            {
                curve.name: quantity,
                "ms per step": value,
                "µs per example": value / job["batch"] * 1e3,
            }
            for (quantity, _, job), value in zip(
                curve.points, milliseconds, strict=True
            )
        ],
        "ms at 0": start,
        "ms per unit": slope,
        "largest residual": residual,
    }
