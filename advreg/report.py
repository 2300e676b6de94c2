"""What an evaluation found, and what it is worth."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from advreg.tables import html_table, text_table

_Z95 = 1.959963984540054  # The normal law holds 95 % between -z and z.
_VERSION = 1

SYMBOLS = {"l1": "L1", "l2": "L2", "infinity": "L∞"}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many examples a model gets right, under an attack or without.

    Args:
        name: The attack, `"clean"`, or `"worst case"`.
        correct: Number of examples that it gets right whatever the attack tried.
        examples: Number of examples.
        epsilon: Radius of the ball, in units of the input, `None` where there is none.
        norm: Norm of the ball: `"l1"`, `"l2"`, `"infinity"` or `None`.
        seconds: Time that the attack took.
        settings: The attack with its arguments.
        median_l2: Median length of the perturbations that fooled the model, in the L2
            norm. `None` where nothing was fooled that had been right.
        median_linf: The same in the infinity norm.
    """

    name: str
    correct: int
    examples: int
    epsilon: float | None = None
    norm: str | None = None
    seconds: float | None = None
    settings: str | None = None
    median_l2: float | None = None
    median_linf: float | None = None

    @property
    def accuracy(self) -> float:
        """The share of correct examples."""
        return self.correct / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy on data of the same kind.

        [Wilson's](https://doi.org/10.1080/01621459.1927.10502953) score interval.
        """
        n, p, z2 = self.examples, self.accuracy, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low = 0.0 if self.correct == 0 else max(0.0, centre - half)
        high = 1.0 if self.correct == n else min(1.0, centre + half)
        return low, high


@dataclasses.dataclass(frozen=True)
class Check:
    """One of the checks of an honest evaluation.

    Args:
        name: What was checked, such as `"zero_gradients"`.
        passed: `False` if it draws a warning, `None` if it could not be made.
        message: The warning and what to do, or why it could not be made.
    """

    name: str
    passed: bool | None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """What `evaluate_robustness` found.

    `str(report)` is a table for a terminal; a notebook shows one of its own.

    Args:
        model: Name of the model.
        clean: The accuracy on the examples as they are.
        results: The accuracy under each attack at each radius.
        worst_cases: For each ball of the report the accuracy if each example is met by
            the attack that is worst for it: over all attacks, whatever their radius,
            whose perturbations lie in that ball.
        overall: The accuracy if each example has to withstand all attacks that have a
            radius, or all attacks where none has.
        threat_model: What the attacker was allowed to do, in words.
        checks: The checks of an honest evaluation
            ([Carlini et al., 2019](https://arxiv.org/abs/1902.06705)).
        seconds: Time of the whole evaluation.
        complete: Whether all data was seen; `False` after an interruption.

    Example:
    >>> report = advreg.evaluate_robustness(model, x, y, attacks=PGD(epsilon=0.1))
    >>> print(report)
    >>> report.robust_accuracy, report.warnings
    """

    model: str
    clean: Accuracy
    results: tuple[Accuracy, ...]
    worst_cases: tuple[Accuracy, ...]
    overall: Accuracy
    threat_model: str
    checks: tuple[Check, ...]
    seconds: float
    complete: bool = True

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.clean.examples

    @property
    def clean_accuracy(self) -> float:
        """Share of the examples that the model gets right as they are."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the examples that withstand all attacks. See `overall`."""
        return self.overall.accuracy

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these accuracies may be too high, and what to do about it."""
        return tuple(check.message for check in self.checks if check.passed is False)

    def __str__(self) -> str:
        lines = [self._title(), "", text_table(_HEAD, self._rows()), ""]
        lines.append(_wrap(f"Threat model: {self.threat_model}"))
        lines.append(self._verdict())
        lines += [_wrap(f"  ! {message}") for message in self.warnings]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows the report in a notebook."""
        items = "".join(f"<li>{html.escape(text)}</li>" for text in self.warnings)
        return (
            f"<p><b>{html.escape(self._title())}</b></p>"
            f"{html_table(_HEAD, self._rows())}"
            f"<p>Threat model: {html.escape(self.threat_model)}<br>"
            f"{html.escape(self._verdict())}</p>" + (f"<ul>{items}</ul>" * bool(items))
        )

    def to_json(self) -> str:
        """Returns the report as JSON text, which `from_json` reads."""
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        """Reads what `to_json` wrote.

        Args:
            text: JSON text.

        Raises:
            ValueError: It is no such report.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != _VERSION:
                raise ValueError("another version wrote it")
            for name in ("clean", "overall"):
                data[name] = Accuracy(**data[name])
            for name, kind in (
                ("results", Accuracy),
                ("worst_cases", Accuracy),
                ("checks", Check),
            ):
                data[name] = tuple(kind(**item) for item in data[name])
            report = cls(**data)
            str(report)  # Fields of the wrong type show here.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "`text` must be what `RobustnessReport.to_json` returns. Received: "
                f"{text[:100]!r}... ({type(error).__name__}: {error})"
            ) from error
        return report

    def plot(self, ax: Any = None) -> Any:
        """Draws accuracy against radius, a line for each attack.

        Args:
            ax: Matplotlib axes to draw into, by default those of a new figure.

        Returns:
            The axes. Their `figure` can be saved.

        Raises:
            ImportError: Matplotlib is not installed; the extra `demo` has it.

        Example:
        >>> report.plot().figure.savefig("robustness.png")
        """
        from advreg import plots  # Reports are read where no figure is ever drawn.

        return plots.robustness_curves(self, ax=ax)

    def _title(self) -> str:
        seen = f"{self.examples:,} example{'s' * (self.examples != 1)}"
        part = "" if self.complete else ", interrupted before the end of the data"
        return f"Robustness of {self.model!r}: {seen}{part}, {self.seconds:.1f} s"

    def _rows(self) -> list[list[str]]:
        worst = self.worst_cases if len(self.results) > 1 else ()
        return [_row(line) for line in (self.clean, *self.results, *worst)]

    def _verdict(self) -> str:
        made = [check for check in self.checks if check.passed is not None]
        if not made:
            return "Checks of an honest evaluation: none could be made."
        if not self.warnings:
            return f"Checks of an honest evaluation: {len(made)} made, no warning."
        return "These accuracies may be too high:"


_HEAD = [
    "attack",
    "norm",
    "ε",
    "accuracy",
    "95 % interval",
    "median L2",
    "median L∞",
    "time",
]


def _wrap(text: str) -> str:
    return textwrap.fill(text, 88, subsequent_indent="    ")


def _row(line: Accuracy) -> list[str]:
    low, high = (100 * bound for bound in line.interval)

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        line.name,
        SYMBOLS.get(line.norm or "", ""),
        number(line.epsilon, ".4g"),
        f"{100 * line.accuracy:.2f} %",
        f"{low:.2f}–{high:.2f} %",
        number(line.median_l2, ".3g"),
        number(line.median_linf, ".3g"),
        "" if line.seconds is None else f"{line.seconds:.1f} s",
    ]


def in_words(
    radii: Mapping[str, float],
    low: str,
    high: str,
    *,
    white_box: Sequence[str],
    other: Sequence[str],
    unbounded: Sequence[str],
) -> str:
    """Puts a threat model into words.

    Args:
        radii: For each norm the largest radius.
        low: The smallest value of an input, empty if there is no limit.
        high: The largest.
        white_box: Names of attacks that follow the gradient of the model.
        other: Names of the other attacks.
        unbounded: Names of attacks without a radius.
    """
    balls = " or ".join(
        f"up to {radius:.4g} in the {SYMBOLS[norm]} norm"
        for norm, radius in radii.items()
    )
    text = f"An input may move {balls or 'any distance'}, "
    if low or high:
        text += f"inside the range from {low or '-∞'} to {high or '∞'}."
    else:
        text += "and take any value."
    if white_box:
        text += (
            f" The attacker knows the model and the labels ({', '.join(white_box)})."
        )
    if other:
        text += f" Without following the model's own gradient: {', '.join(other)}."
    if unbounded:
        text += (
            f" Without a radius: {', '.join(unbounded)}; these count in the worst case "
            "where they stayed in the ball."
        )
    return text
