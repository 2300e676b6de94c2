"""What an evaluation found, and what it is worth."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from advreg import plots
from advreg.checks import length, show
from advreg.config import NormType
from advreg.tables import html_table, text_table

_Z95 = 1.959963984540054  # The normal law holds 95 % between -z and z.
_VERSION = 1
INTERRUPTED = "interrupted"
OF_EACH_FEATURE = "that of each feature"


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

    Raises:
        ValueError: More are correct than there are, or the ball is none.
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

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.examples or not 0 < self.examples < 2**63:
            raise ValueError(
                "`correct` must lie between 0 and `examples`, which must be at least "
                f"1. Received: correct={self.correct} and examples={self.examples}"
            )
        norms = [norm.value for norm in NormType]
        if self.norm is not None and self.norm not in norms:
            raise ValueError(f"`norm` must be one of {norms}. Received: {self.norm!r}")
        if self.epsilon is not None:
            length("epsilon", self.epsilon)

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
            whose perturbations lie in that ball, and in the range of the attack.
        overall: The accuracy if each example has to withstand all that was found in
            any of these balls, or all attacks where none has a radius.
        threat_model: What the attacker was allowed to do, in words.
        checks: The checks of an honest evaluation
            ([Carlini et al., 2019](https://arxiv.org/abs/1902.06705)).
        seconds: Time of the whole evaluation.
        complete: Whether all attacks met all data; `False` after an interruption.

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
        """Why these accuracies may not be what they seem, and what to do about it."""
        return tuple(check.message for check in self.checks if check.passed is False)

    def __str__(self) -> str:
        lines = [_wrap(self._title()), "", text_table(_HEAD, self._rows()), ""]
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
        fields = {"version": _VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        """Reads what `to_json` wrote.

        Args:
            text: JSON text.

        Raises:
            ValueError: It is no such report.
        """
        try:
            data = json.loads(text, parse_constant=_refuse)
            if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
                raise ValueError("no report of this version")
            return _read(cls, data)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                "`text` must be what `RobustnessReport.to_json` returns. Received: "
                f"{show(text)[:100]}... ({type(error).__name__}: {error})"
            ) from error

    def plot(self, ax: Any = None) -> Any:
        """Draws accuracy against radius, a line for each attack.

        Args:
            ax: Matplotlib axes to draw into, by default those of a new figure, which
                has a title.

        Returns:
            The axes. Their `figure` can be saved.

        Raises:
            ImportError: Matplotlib is not installed; the extra `demo` has it.

        Example:
        >>> report.plot().figure.savefig("robustness.png")
        """
        return plots.robustness_curves(self, ax=ax)

    def _title(self) -> str:
        return f"{self.subject}, {self.seconds:.1f} s"

    @property
    def subject(self) -> str:
        """What was measured, and on how many examples."""
        seen = f"{self.examples:,} example{'s' * (self.examples != 1)}"
        part = "" if self.complete else ", interrupted before the end of the data"
        return f"Robustness of {self.model!r}: {seen}{part}"

    def _rows(self) -> list[list[str]]:
        worst = self.worst_cases if len(self.results) > 1 else ()
        return [_row(line) for line in (self.clean, *self.results, *worst)]

    def _verdict(self) -> str:
        interrupted = any(check.name == INTERRUPTED for check in self.checks)
        if self.warnings:
            when = " before they were interrupted" * interrupted
            return f"What the checks of an honest evaluation found{when}:"
        made = len([check for check in self.checks if check.passed is not None])
        found = f"{made} made, no warning" if made else "none could be made"
        found += ", but interrupted before the others" * interrupted
        return f"Checks of an honest evaluation: {found}."


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


def _read(kind: Any, data: Any) -> Any:
    """Makes a dataclass of this module of what JSON says of it."""
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if not isinstance(data, dict) or data.keys() != types.keys():
        raise ValueError(f"{kind.__name__} must have the fields {list(types)}")
    values = {name: _value(name, types[name], data[name]) for name in types}
    return kind(**values)


def _value(name: str, kind: str, value: Any) -> Any:
    """Reads one field, whose annotation says what it must be."""
    kind, *others = kind.split(" | ")
    if value is None and others == ["None"]:
        return None
    if kind in _RECORDS:
        return _read(_RECORDS[kind], value)
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise TypeError(f"`{name}` must be a list")
        record = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(name, record, item) for item in value)
    if kind == "float" and type(value) in (int, float):
        return length(name, value)
    if type(value).__name__ != kind:
        raise TypeError(f"`{name}` must be {kind}")
    return value


_RECORDS: dict[str, Any] = {"Accuracy": Accuracy, "Check": Check}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _wrap(text: str) -> str:
    return textwrap.fill(text, 88, subsequent_indent="    ")


def _row(line: Accuracy) -> list[str]:
    low, high = (100 * bound for bound in line.interval)

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        line.name,
        "" if line.norm is None else NormType(line.norm).symbol,
        number(line.epsilon, ".4g"),
        f"{100 * line.accuracy:.2f} %",
        f"{low:.2f}–{high:.2f} %",
        number(line.median_l2, ".3g"),
        number(line.median_linf, ".3g"),
        "" if line.seconds is None else f"{line.seconds:.1f} s",
    ]


def in_words(
    radii: Mapping[str, float],
    ranges: Collection[tuple[str, str]],
    *,
    white_box: Sequence[str],
    black_box: Sequence[str],
    unbounded: Sequence[str],
) -> str:
    """Puts a threat model into words.

    Args:
        radii: For each norm the largest radius.
        ranges: The smallest and the largest value of an input, for each range that
            attacks have; empty if there is no limit.
        white_box: Names of attacks that follow the gradient of the model.
        black_box: Names of attacks that do without it.
        unbounded: Names of attacks without a radius in a norm.
    """
    balls = " or ".join(
        f"up to {radius:.4g} in the {NormType(norm).symbol} norm"
        for norm, radius in radii.items()
    )
    text = f"An input may move {balls or 'any distance'}"
    if len(ranges) > 1:
        text += ", inside the range of each attack, which are not the same."
    else:
        low, high = next(iter(ranges), ("", ""))
        text += (
            ", inside the range of each feature."
            if low == high == OF_EACH_FEATURE
            else f", inside the range from {low or '-∞'} to {high or '∞'}."
            if low or high
            else ", and take any value."
        )
    if white_box:
        text += (
            f" The attacker knows the model and the labels ({', '.join(white_box)})."
        )
    if black_box:
        text += f" Without the model's own gradient: {', '.join(black_box)}."
    if unbounded and balls:
        text += (
            f" Without a radius: {', '.join(unbounded)}; these count in the worst case "
            "where they stayed in the ball."
        )
    return text
