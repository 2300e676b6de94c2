"""The report of an evaluation: accuracies, checks, and how they are shown.

`RobustnessReport` and its parts are frozen dataclasses of plain numbers and strings, so
that a report can be written as JSON and read again without the model or the data. It
checks what it reads.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from advreg import plots
from advreg.checks import check_nonnegative, describe_value
from advreg.config.norms import NormType
from advreg.evaluation.tables import html_table, text_table

_Z95 = 1.959963984540054  # 95 % of a normal distribution lie between -z and z.
_VERSION = 2
INTERRUPTED = "interrupted"
NOT_MADE = "Could not be made"
OF_EACH_FEATURE = "that of each feature"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy of a model, clean or under an attack: one line of a report.

    Args:
        name: The attack, `"clean"`, or `"worst case"`.
        correct: Number of examples that the model classifies correctly under every try
            of the attack. For a model that draws random numbers, the sum of these
            numbers over all draws.
        examples: Number of examples.
        epsilon: Radius of the ball, in units of the input, `None` where there is none.
        norm: Norm of the ball: `"l1"`, `"l2"`, `"infinity"` or `None`.
        seconds: Time that the attack took.
        settings: The attack with its arguments.
        median_l2: Median length of the perturbations that fooled the model, in the L2
            norm. `None` where no correctly classified example was fooled.
        median_linf: The same in the infinity norm.
        draws: How often the model was called on each example: more than once if it
            draws random numbers when it predicts.

    Raises:
        ValueError: `correct` is larger than the number of examples, or the norm or the
            radius is invalid.
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
    draws: int = 1

    def __post_init__(self) -> None:
        possible = self.examples * self.draws
        if not 0 <= self.correct <= possible or not (
            0 < self.examples < 2**63 and self.draws > 0
        ):
            raise ValueError(
                "`correct` must lie between 0 and `examples`, times `draws`, which are "
                f"at least 1. Received: correct={self.correct}, examples="
                f"{self.examples} and draws={self.draws}"
            )
        norms = [norm.value for norm in NormType]
        if self.norm is not None and self.norm not in norms:
            raise ValueError(f"`norm` must be one of {norms}. Received: {self.norm!r}")
        if self.epsilon is not None:
            check_nonnegative("epsilon", self.epsilon)

    @property
    def accuracy(self) -> float:
        """Share of correct examples, the mean over draws."""
        return self.correct / (self.examples * self.draws)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy on data of the same kind.

        It is [Wilson's](https://doi.org/10.1080/01621459.1927.10502953) score interval.
        Several draws of one example count as one, because they are not independent.
        """
        n, p, z2 = self.examples, self.accuracy, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low = 0.0 if self.correct == 0 else max(0.0, centre - half)
        high = 1.0 if p == 1 else min(1.0, centre + half)
        return low, high


@dataclasses.dataclass(frozen=True)
class Feature:
    """A part of the input, and whether it is perturbed.

    Args:
        name: Its key in the structure of the input, or `"the input"`.
        dtype: The dtype in which the model gets it.
        perturbed: Whether attacks perturb it.
        reason: Why it is not perturbed, empty where it is.
    """

    name: str
    dtype: str
    perturbed: bool
    reason: str = ""

    def __str__(self) -> str:
        return self.name if self.perturbed else f"{self.name} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Check:
    """One of the checks of an honest evaluation.

    Args:
        name: What was checked, such as `"zero_gradients"`.
        passed: `True` if there is nothing to warn of, `False` if there is, `None` if it
            could not be made.
        message: The warning and what to do, or why it could not be made.
    """

    name: str
    passed: bool | None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """The result of `evaluate_robustness`.

    `str(report)` is a table for a terminal. Notebooks show an HTML table.

    Args:
        model: Name of the model.
        clean: The accuracy on clean examples.
        results: The accuracy under each attack at each radius.
        worst_cases: The worst-case accuracy for each ball of the report: an example
            counts only if no attack has fooled it inside this ball. All attacks count,
            whatever their radius, with perturbations that lie in the ball and in the
            range of the attack.
        overall: The accuracy over all balls: an example counts only if it was fooled in
            none of them. Where no attack has a radius, all attacks count.
        threat_model: The perturbations that were allowed, in words.
        checks: The checks of an honest evaluation
            ([Carlini et al., 2019](https://arxiv.org/abs/1902.06705)).
        seconds: Time of the whole evaluation.
        complete: Whether all attacks ran on all data; `False` after an interruption.
        features: Which parts of the input were perturbed, and why others were not.
        notes: Further facts that a reader of the accuracies must know, in words.

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
    features: tuple[Feature, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.clean.examples

    @property
    def clean_accuracy(self) -> float:
        """Share of the clean examples that the model classifies correctly."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the examples that no attack has fooled. See `overall`."""
        return self.overall.accuracy

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust these accuracies, and what to do about them."""
        return tuple(check.message for check in self.checks if check.passed is False)

    def __str__(self) -> str:
        lines = [_wrap(self._title()), "", text_table(_HEAD, self._rows()), ""]
        lines.append(_wrap(f"Threat model: {self.threat_model}"))
        lines += [_wrap(note) for note in self._notes()]
        lines.append(_wrap(self._verdict()))
        lines += [_wrap(f"  ! {message}") for message in self.warnings]
        lines += [_wrap(f"  ? {message}") for message in self._failures]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows the report in a notebook."""
        messages = [*self.warnings, *self._failures]
        items = "".join(f"<li>{html.escape(text)}</li>" for text in messages)
        threat_model = f"Threat model: {self.threat_model}"
        lines = [threat_model, *self._notes(), self._verdict()]
        return (
            f"<p><b>{html.escape(self._title())}</b></p>"
            f"{html_table(_HEAD, self._rows())}"
            f"<p>{'<br>'.join(html.escape(line) for line in lines)}</p>"
            + (f"<ul>{items}</ul>" * bool(items))
        )

    def to_json(self) -> str:
        """Returns the report as JSON text, which `from_json` reads.

        Each line also has its `accuracy` and `interval`, beside the counts.
        """
        fields = {"version": _VERSION, **_as_dict(self)}
        return json.dumps(fields, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        """Reads a report that `to_json` has written.

        Args:
            text: JSON text.

        Raises:
            ValueError: It is not such a text.
        """
        try:
            data = json.loads(text, parse_constant=_refuse)
            if not isinstance(data, dict) or data.pop("version", None) not in (1, 2):
                raise ValueError("no report of a version that is known")
            return _read(cls, data)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                "`text` must be what `RobustnessReport.to_json` returns. Received: "
                f"{describe_value(text)[:100]}... ({type(error).__name__}: {error})"
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

    @property
    def _failures(self) -> list[str]:
        """Messages of checks in which an error was raised."""
        return [
            f"{check.name}: {check.message}"
            for check in self.checks
            if check.passed is None and check.message.startswith(NOT_MADE)
        ]

    def _notes(self) -> list[str]:
        """Returns the notes that are shown after the threat model."""
        moving = [feature.name for feature in self.features if feature.perturbed]
        standing = [str(feature) for feature in self.features if not feature.perturbed]
        notes = list(self.notes)
        if standing:
            notes.insert(
                0,
                f"Perturbed: {', '.join(moving) or 'nothing'}. Not perturbed: "
                f"{', '.join(standing)}.",
            )
        return notes

    def _title(self) -> str:
        return f"{self.subject}, {self.seconds:.1f} s"

    @property
    def subject(self) -> str:
        """The model, and the number of examples, in words."""
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


def _as_dict(record: Any) -> Any:
    """Converts dataclasses to dictionaries, with values that follow from counts."""
    if isinstance(record, tuple):
        return [_as_dict(item) for item in record]
    if not dataclasses.is_dataclass(record):
        return record
    found = {
        field.name: _as_dict(getattr(record, field.name))
        for field in dataclasses.fields(record)
    }
    for name in _derived(type(record)):
        found[name] = getattr(record, name)
    return found


def _derived(kind: Any) -> tuple[str, ...]:
    """Returns the properties of a record that are written beside its fields."""
    return ("accuracy", "interval") if kind is Accuracy else ()


def _read(kind: Any, data: Any) -> Any:
    """Makes a dataclass of this module from data of JSON.

    Args:
        kind: The dataclass.
        data: A dictionary of its fields.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is missing or unknown, or has an invalid value.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    old = {  # Older files lack fields that were added later. These have a default.
        name for name, field in fields.items() if name in _LATER.get(kind.__name__, ())
    }
    known = {*fields, *_derived(kind)}
    if not isinstance(data, dict) or not fields.keys() - old <= data.keys() <= known:
        raise ValueError(f"{kind.__name__} must have the fields {list(fields)}")
    return kind(
        **{
            name: _value(name, str(fields[name].type), value)
            for name, value in data.items()
            if name in fields
        }
    )


def _value(name: str, kind: str, value: Any) -> Any:
    """Reads one field, and checks it against its annotation.

    Args:
        name: Name of the field, for errors.
        kind: Its annotation, such as `"float | None"`.
        value: Its value in JSON.
    """
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
        return check_nonnegative(name, value)
    if type(value).__name__ != kind:
        raise TypeError(f"`{name}` must be {kind}")
    return value


_RECORDS: dict[str, Any] = {"Accuracy": Accuracy, "Check": Check, "Feature": Feature}
# Fields that reports of version 1 do not have.
_LATER = {"Accuracy": ("draws",), "RobustnessReport": ("features", "notes")}


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
    most_changes: int = 0,
) -> str:
    """Returns the description of a threat model.

    Args:
        radii: For each norm the largest radius.
        ranges: The smallest and the largest value of an input, for each range that
            attacks have. An empty string means no limit.
        white_box: Names of attacks that use the gradient of the model.
        black_box: Names of attacks that do not use it.
        unbounded: Names of attacks without a radius in a norm.
        most_changes: Largest number of tokens that attacks may replace.
    """
    balls = " or ".join(
        f"up to {radius:.4g} in the {NormType(norm).symbol} norm"
        for norm, radius in radii.items()
    )
    tokens = f"up to {most_changes} token{'s' * (most_changes > 1)}"
    if most_changes and not balls and not unbounded:
        text = f"In an example {tokens} may be replaced."
        ranges = ()
    else:
        text = f"An input may move {balls or 'any distance'}"
    if not ranges:
        pass
    elif len(ranges) > 1:
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
    if most_changes and ranges:
        text += f" Or {tokens} of it may be replaced."
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
