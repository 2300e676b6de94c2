"""One attack at one radius, over data that comes batch by batch.

`feed` gets batches of examples, `flush` runs those that still wait, and `_note` is
called by the pipeline with finished rows. Two things are kept: one byte for each
example (robust or fooled), and for the fooled ones the length of the perturbation in
each norm, because a report also asks which of them lie inside the ball of another
attack.

If the model draws random numbers, an example is not simply fooled or robust: it is
right in some of the draws. These are counted twice, in different draws: `EndPoints`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from advreg._types import Features
from advreg.attacks.engine.rows import Batch, Result
from advreg.attacks.engine.runner import Pipeline
from advreg.attacks.engine.substitution import BoundSubstitution
from advreg.attacks.foreign import as_attack
from advreg.config.norms import NormType
from advreg.evaluation.byte_array import FOOLED, ROBUST, ByteArray
from advreg.evaluation.report import Accuracy

# Relative tolerance of the radius, for rounding errors in foreign arithmetic.
_RADIUS_TOLERANCE = 1e-4


class EndPoints(NamedTuple):
    """Results of examples that an attack may have fooled, and that are in its range.

    Args:
        examples: The numbers of the examples.
        lengths: Length of the perturbation of each, in each norm.
        chosen: Number of draws in which each was right. By these the worst attack for
            an example is chosen.
        right: The same number in other draws, for the report. The attack is partly
            chosen by chance. Counted in the same draws, it would seem stronger than it
            is.
    """

    examples: np.ndarray
    lengths: dict[NormType, np.ndarray]
    chosen: np.ndarray
    right: np.ndarray


class AttackRun:
    """An attack at one radius, and its results.

    Args:
        attack: An `Attack`, or any callable `attack(model, x, y) -> x_adv`.
        model: The model to attack.
        name: Name in reports.
        batch_size: Number of examples in a batch.
        from_logits: Whether outputs are logits, where the attack does not say.
        draws: Number of draws to average over if the model draws random numbers.
    """

    def __init__(
        self,
        attack: Any,
        model: keras.Model,
        name: str,
        batch_size: int,
        from_logits: bool | None = None,
        draws: int | None = None,
    ) -> None:
        self.attack, self.name = as_attack(attack), name
        self.epsilon = self.attack.epsilon
        self.norm = None if self.epsilon is None else self.attack.norm
        self.status = ByteArray()
        # Time of the attack, and the part of it in which functions were compiled.
        self.seconds = self.tracing = 0.0
        self.robust = self.fooled = 0  # Numbers of examples.
        self.left_ball = self.left_range = self.not_finite = 0
        # Number of robust examples; for random models its mean over draws.
        self.mean_robust = 0.0
        # The ends of the range of each perturbed value, in the first batch.
        self.range: tuple[np.ndarray, np.ndarray] | None = None
        self._draws = draws
        self._ended: list[EndPoints] = []
        self._pipeline: Pipeline | None = None
        self._bound = self.attack.bind(model, from_logits, batch_size)
        self._target = self._bound.target

    @property
    def label(self) -> str:
        """Label in the progress bar: name, norm and radius."""
        norm = "" if self.norm is None else NormType(self.norm).symbol
        radius = "" if self.epsilon is None else f"{self.epsilon:.3g}"
        return " ".join(part for part in (self.name, norm, radius) if part)

    def replaces(self, features: Features) -> int | None:
        """Returns which leaf of the features has its tokens replaced, if any."""
        if isinstance(self._bound, BoundSubstitution):
            return self._bound.place(features)
        return None

    @property
    def white_box(self) -> bool:
        """Whether it is an attack of advreg that uses the model's gradient."""
        return self.attack.is_native and bool(self.attack.uses_gradient)

    @property
    def may_follow_gradient(self) -> bool:
        """Whether the attack uses the model's gradient, or does not say."""
        return self.attack.uses_gradient is not False

    @property
    def iterative(self) -> bool:
        """Whether the attack takes several steps."""
        return self.attack.iterations_per_start > 1

    @property
    def evaluations(self) -> int:
        """Number of evaluations of single examples, 0 where they are not counted."""
        return self._target.evaluations

    def feed(self, batch: Batch) -> None:
        """Attacks examples that the model classifies correctly.

        Args:
            batch: `features`, `classes`, `labels` and `index`, the numbers of the
                examples.
        """
        began, traced = time.perf_counter(), self._target.functions.seconds
        self._target.settle(batch["features"], self._draws)
        # Radius 0 allows no perturbation.
        if self.epsilon == 0 and not self._target.random:
            self.status.set(batch["index"], ROBUST)
            self.robust += len(batch["index"])
            self.mean_robust += len(batch["index"])
            return
        if self.range is None:
            self.range = self._bound.problem.range(batch["features"])
        self._bound.check(batch["features"])
        if self._pipeline is None:
            self._pipeline = self._bound.pipeline(self._note)
        self._pipeline.feed(self._bound.select(batch))
        self._note_time(began, traced)

    def flush(self) -> None:
        """Attacks the examples that have been waiting for a full batch."""
        began, traced = time.perf_counter(), self._target.functions.seconds
        if self._pipeline is not None:
            self._pipeline.flush()
        self._note_time(began, traced)

    def result(self, examples: int, correct: float) -> Accuracy:
        """Makes a line of the report.

        Args:
            examples: Number of examples.
            correct: Number of them that are robust, its mean over draws.
        """

        def median(norm: NormType) -> float | None:
            lengths = [e.lengths[norm][2 * e.chosen < draws] for e in self._ended]
            found = np.concatenate([np.zeros(0), *lengths])
            # Replaced tokens have no length.
            known = len(found) and np.isfinite(found).all()
            return float(np.median(found)) if known else None

        draws = self._target.draws
        return Accuracy(
            name=self.name,
            correct=round(correct * draws),
            examples=examples,
            epsilon=self.epsilon,
            norm=None if self.norm is None else NormType(self.norm).value,
            seconds=self.seconds,
            settings=repr(self.attack),
            median_l2=median(NormType.L2),
            median_linf=median(NormType.INFINITY),
            draws=draws,
        )

    def _note_time(self, began: float, traced: float) -> None:
        self.seconds += time.perf_counter() - began
        self.tracing += self._target.functions.seconds - traced

    def _note(self, batch: Batch, result: Result) -> None:
        """Records the results of finished rows. The pipeline calls it."""
        index, fooled, target = batch["index"], result.fooled, self._target
        self.status.set(index, np.where(fooled, FOOLED, ROBUST))
        self.fooled += int(fooled.sum())
        self.robust += int((~fooled).sum())
        self.not_finite += int(result.not_finite.sum())
        lengths = self._bound.lengths(batch, result)
        valid = self._bound.in_range(batch, result)
        if self.norm is not None:
            inside = _within(lengths[NormType(self.norm)], self.epsilon)
            self.left_ball += int((~inside).sum())
        self.left_range += int((~valid).sum())
        if target.random:
            # Two counts in different draws, see `EndPoints`. All examples are kept,
            # because any of them may be wrong in some draws.
            chosen, right = (
                self._bound.problem.correct_draws(
                    batch, result.displacement, target.draws
                )
                for _ in range(2)
            )
            kept = valid
        else:
            chosen = right = (~fooled).astype("int64")
            kept = valid & fooled
        self.mean_robust += float(right.sum()) / target.draws
        if kept.any():
            lengths = {norm: length[kept] for norm, length in lengths.items()}
            ended = EndPoints(index[kept], lengths, chosen[kept], right[kept])
            self._ended.append(ended)

    def end_points(
        self, norm: NormType = NormType.INFINITY, epsilon: float = np.inf
    ) -> Iterator[EndPoints]:
        """Yields results of examples whose perturbations are in range and in a ball.

        Args:
            norm: Norm of the ball.
            epsilon: Radius of the ball, by default infinite.
        """
        for ended in self._ended:
            inside = _within(ended.lengths[norm], epsilon)
            yield EndPoints(
                ended.examples[inside],
                {},
                ended.chosen[inside],
                ended.right[inside],
            )

    def fooled_inside(
        self, norm: NormType = NormType.INFINITY, epsilon: float = np.inf
    ) -> np.ndarray:
        """Returns the numbers of examples that were fooled in range and in a ball.

        Args:
            norm: Norm of the ball.
            epsilon: Radius of the ball, by default infinite.
        """
        draws = self._target.draws
        found = [
            e.examples[2 * e.chosen < draws] for e in self.end_points(norm, epsilon)
        ]
        return np.concatenate([np.zeros(0, "int64"), *found])

    def shares(self, index: np.ndarray) -> np.ndarray:
        """Returns for each example the share of draws in which it is robust.

        Args:
            index: The numbers of the examples.
        """
        draws = self._target.draws
        if not self._target.random:
            return (self.status.get(index) == ROBUST).astype("float64")
        shares = np.zeros(int(index.max(initial=-1)) + 1)
        for ended in self._ended:
            known = ended.examples < len(shares)
            shares[ended.examples[known]] = ended.right[known] / draws
        return shares[index]


def _within(lengths: np.ndarray, epsilon: float | None) -> np.ndarray:
    """Returns which lengths lie in a ball. NaN does not."""
    assert epsilon is not None
    return lengths <= epsilon * (1 + _RADIUS_TOLERANCE)


def balls(runs: Sequence[AttackRun]) -> list[tuple[NormType, float]]:
    """Returns the different balls of runs, sorted by norm and radius."""
    found = {
        (NormType(run.norm), run.epsilon)
        for run in runs
        if run.norm is not None and run.epsilon is not None
    }
    return sorted(found, key=lambda ball: (ball[0].value, ball[1]))
