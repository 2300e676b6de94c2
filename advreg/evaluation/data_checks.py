"""The checks of an evaluation that need no further attack.

They check that the data, the model and the radii are as the reported accuracies assume.
Each uses a `RunSummary`: statistics that were collected while the attacks ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from advreg.attacks.engine.rows import Batch
from advreg.evaluation.attack_run import AttackRun
from advreg.evaluation.report import NOT_MADE, Check
from advreg.evaluation.values import Values
from advreg.network.images import unperturbed_integers_message

# Share of examples that draws no warning. An attack may fool fewer examples than a
# weaker one by this share, because chance decides at the edge of the ball. In some 120
# reports on honest networks (digits and MNIST, plain and regularised, all norms) the
# share was never larger.
TOLERANCE = 0.01
# A radius below this share of the range most likely has the wrong unit.
_TINY = 1e-3


class RunSummary(Protocol):
    """The statistics of the data and the model that checks need.

    `EvaluationRun` has them.
    """

    sample: Batch | None
    examples: int
    right: int
    zero_gradient: int
    not_finite: int
    saturated: int
    disconnected: bool
    compiled_differs: str | None
    unperturbed: list[str]
    bypassed: list[str]
    values: Values

    @property
    def random(self) -> bool:
        """Whether the model draws random numbers when it predicts."""


def data_checks(seen: RunSummary, runs: Sequence[AttackRun]) -> Iterator[Check]:
    """Makes the checks of the data, the model and the radii.

    Args:
        seen: Statistics of the data.
        runs: The runs of the report.
    """
    yield checked("nan_in_data", lambda: _nan_in_data(seen))
    yield checked("nan_outputs", lambda: _nan_outputs(seen, runs))
    yield checked("compiled_differs", lambda: _compiled_differs(seen))
    if seen.right:
        yield checked("hidden_logits", lambda: _hidden_logits(seen))
    yield checked("standing_integers", lambda: _standing_integers(seen))
    yield checked("code_columns", lambda: _code_columns(seen))
    yield checked("bypassed_methods", lambda: _bypassed_methods(seen))
    yield checked("tiny_radius", lambda: _tiny_radius(seen, runs))


def checked(name: str, make: Callable[[], Check]) -> Check:
    """Makes a check. An error in it is reported, because it must not lose the report.

    Args:
        name: The name of the check.
        make: Function that makes the check.
    """
    try:
        return make()
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return Check(name, None, f"{NOT_MADE}: {type(error).__name__}: {said}")


def _nan_in_data(seen: RunSummary) -> Check:
    """Checks that the data are finite, because no attack perturbs other values."""
    name = "nan_in_data"
    if not seen.values.not_finite:
        return Check(name, True)
    where = ", ".join(
        f"{feature} in {count:,} of {seen.examples:,} examples"
        for feature, count in seen.values.not_finite.items()
    )
    return Check(
        name,
        False,
        f"The data holds values that are NaN or infinite: {where}. They stay as they "
        "are under attack. Fill them in, or leave these examples out.",
    )


def _nan_outputs(seen: RunSummary, runs: Sequence[AttackRun]) -> Check:
    """Checks that the outputs are finite, because others count as wrong answers."""
    name = "nan_outputs"
    attacked = {run.name: run.not_finite for run in runs if run.not_finite}
    if not seen.not_finite and not attacked:
        return Check(name, True)
    where = [f"{seen.not_finite:,} of {seen.examples:,} examples as they are"] * bool(
        seen.not_finite
    )
    where += [f"{count:,} under {attack}" for attack, count in attacked.items()]
    return Check(
        name,
        False,
        f"The outputs are NaN or infinite for {', '.join(where)}. They count as wrong "
        "answers. If an attack leads to inputs that cannot occur, state their range: "
        "clip_value_min and clip_value_max.",
    )


def _compiled_differs(seen: RunSummary) -> Check:
    """Checks that the compiled model gives the same outputs as a direct call."""
    name = "compiled_differs"
    if seen.compiled_differs is None:
        return Check(name, True)
    return Check(
        name,
        False,
        "The model gives other outputs when it is compiled than when it is called "
        f"directly: they differ by up to {seen.compiled_differs}. The figures are "
        "those of the compiled model. Its `call` may use Python values or NumPy's "
        "random numbers, which compilation keeps as they are: make them variables, or "
        "compile the model with run_eagerly=True.",
    )


def _hidden_logits(seen: RunSummary) -> Check:
    """Checks that the logits were found where probabilities round to 1."""
    name = "hidden_logits"
    share = seen.saturated / seen.right
    if share <= TOLERANCE:
        return Check(name, True)
    return Check(
        name,
        False,
        "The model gives probabilities, and what lies behind its last softmax or "
        f"sigmoid was not found. For {100 * share:.1f} % of the correctly classified "
        "examples a probability rounds to 1, where no loss has a gradient. Evaluate "
        "the same network without its last activation, with from_logits=True.",
    )


def _standing_integers(seen: RunSummary) -> Check:
    """Checks that no quantities stay unperturbed because they come as integers."""
    if not seen.unperturbed:
        return Check("standing_integers", True)
    return Check(
        "standing_integers", False, unperturbed_integers_message(seen.unperturbed)
    )


def _code_columns(seen: RunSummary) -> Check:
    """Checks that no columns of categories are perturbed together with quantities."""
    name, columns = "code_columns", seen.values.code_columns
    if not columns:
        return Check(name, True)
    shown = ", ".join(columns[:10]) + ", ..." * (len(columns) > 10)
    return Check(
        name,
        False,
        f"Some columns hold whole numbers, and the loss has no gradient there: {shown}."
        " They may be categories, which random starts, noise and searches move into "
        "others. Hold them with a feature_mask that is 0 there.",
    )


def _bypassed_methods(seen: RunSummary) -> Check:
    """Checks that the model has no `predict` of its own, because it is not called."""
    name = "bypassed_methods"
    if not seen.bypassed:
        return Check(name, True)
    listed = ", ".join(f"`{method}`" for method in seen.bypassed)
    return Check(
        name,
        False,
        f"The model has its own {listed}, which the report does not call: all figures "
        "are those of calling the model with training=False. What these methods add "
        "belongs into a layer, where it is measured too.",
    )


def _tiny_radius(seen: RunSummary, runs: Sequence[AttackRun]) -> Check:
    """Checks that no radius is far too small for the scale of the data."""
    found: dict[str, None] = {}  # Each once, in their order.
    for run in runs:
        width, what = _usual_width(run, seen)
        if run.epsilon is not None and 0 < run.epsilon < _TINY * width:
            found[
                f"The radius ε {run.epsilon:.4g} is less than a thousandth of {what}."
            ] = None
    if not found:
        return Check("tiny_radius", True)
    return Check(
        "tiny_radius",
        False,
        f"{' '.join(found)} It may be meant for data of another scale. State it in the "
        "units of the model's input.",
    )


def _usual_width(run: AttackRun, seen: RunSummary) -> tuple[float, str]:
    """Returns the median width of the ranges of values, and a description of it.

    The range of a value is the clip range where one is set, and else the range of the
    data. It is the median, because values may have different scales, and one with a
    wide range says nothing about the others.
    """
    what, low, high = "the range of the data", seen.values.lowest, seen.values.highest
    moves = np.full(len(low), True)
    if run.range is not None:
        lowest, highest = run.range
        if np.any(np.isfinite(highest - lowest) & (highest > lowest)):
            what, low, high = "the clip range", lowest, highest
        elif len(lowest) == len(low):
            moves = highest > lowest
    widths = high - low
    wide = np.isfinite(widths) & (widths > 0) & (moves if len(moves) == len(low) else 1)
    if not wide.any():
        return 0.0, ""
    width = float(np.median(widths[wide]))
    ends = f"from {low[wide].min():.4g} to {high[wide].max():.4g}"
    alike = np.ptp(widths[wide]) <= 0.5 * width
    return width, f"{what}, {ends}" if alike else f"{what}, mostly {width:.4g} wide"
