"""One attack at one radius, over data that comes batch by batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.attacks.base import Attack, check_norm, check_range, make_seed
from advreg.attacks.engine import (
    Cascade,
    Outcome,
    Round,
    Rows,
    Scene,
    Threat,
    size,
    take,
)
from advreg.attacks.victim import Victim
from advreg.checks import length, show
from advreg.config import NormType
from advreg.geometry import Tensor
from advreg.packing import Features, describe
from advreg.report import Accuracy

UNKNOWN, STANDS, FOOLED = 0, 1, 2
# Share of the radius: rounding in somebody else's arithmetic is no breach of the ball.
_SLACK = 1e-4


class Marks:
    """A number of one byte for each example, however many there turn out to be."""

    def __init__(self) -> None:
        self._values = np.zeros(1024, "uint8")

    def set(self, index: np.ndarray, value: Any) -> None:
        """Marks examples."""
        if not len(index):
            return
        needed = int(index.max()) + 1
        if needed > len(self._values):
            grown = np.zeros(max(needed, 2 * len(self._values)), "uint8")
            grown[: len(self._values)] = self._values
            self._values = grown
        self._values[index] = value

    def get(self, index: np.ndarray) -> np.ndarray:
        """Reads the marks of examples, 0 where there is none."""
        marks = np.zeros(len(index), "uint8")
        known = index < len(self._values)
        marks[known] = self._values[index[known]]
        return marks


class Trial:
    """An attack at one radius, and what came of each example.

    Args:
        attack: An `Attack`, or any callable `attack(model, x, y) -> x_adv`.
        model: The model to attack.
        name: What reports call it.
        batch_size: Number of examples in a batch.
        from_logits: How outputs are read where the attack does not say.
    """

    def __init__(
        self,
        attack: Any,
        model: keras.Model,
        name: str,
        batch_size: int,
        from_logits: bool | None = None,
    ) -> None:
        self.attack, self.name = attack, name
        self.epsilon = _radius(attack)
        self.norm = None if self.epsilon is None else _norm(attack)
        self.status = Marks()
        self.seconds = 0.0
        self.stands = self.fooled = self.left_ball = self.left_range = 0
        self._fallen: list[tuple[np.ndarray, dict[NormType, np.ndarray]]] = []
        self._cascade: Cascade | None = None
        self._batch_size = batch_size
        self._scene: Scene | _Foreign
        if isinstance(attack, Attack):
            self._scene = attack.scene(model, from_logits)
        else:
            self._scene = _Foreign(attack, model, from_logits, batch_size)

    @property
    def white_box(self) -> bool:
        """Whether the attack is one of ours that follows the model's gradient."""
        return isinstance(self.attack, Attack) and self.attack.uses_gradient

    @property
    def may_follow_gradient(self) -> bool:
        """Whether nobody says that the attack does without the model's gradient."""
        return getattr(self.attack, "uses_gradient", None) is not False

    @property
    def iterative(self) -> bool:
        """Whether it takes several steps."""
        return (getattr(self.attack, "iterations_per_round", None) or 1) > 1

    def feed(self, rows: Rows) -> None:
        """Attacks examples that the model gets right.

        Args:
            rows: `features`, `classes`, `labels` and `index`.
        """
        began = time.perf_counter()
        if self.epsilon == 0:  # Nothing can move.
            self.status.set(rows["index"], STANDS)
            self.stands += len(rows["index"])
            return
        if isinstance(self._scene, _Foreign):
            self._scene.check(rows["features"])
        else:
            self.attack.check(self._scene, rows["features"])
            if not self.attack.wants_labels(self._scene):
                rows = {name: rows[name] for name in rows if name != "labels"}
        if self._cascade is None:
            seed = make_seed(getattr(self.attack, "seed", None))
            # To a cascade a foreign attack is a scene of its own, with one round.
            scene: Any = self._scene
            rounds: Sequence[Round] = [Round(1, "")]
            if isinstance(self._scene, Scene):
                rounds = self.attack.rounds(self._scene)
            self._cascade = Cascade(scene, rounds, self._batch_size, seed, self._note)
        self._cascade.feed(rows)
        self.seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Attacks what has been waiting for a full batch."""
        began = time.perf_counter()
        if self._cascade is not None:
            self._cascade.flush()
        self.seconds += time.perf_counter() - began

    def result(self, examples: int, correct: int) -> Accuracy:
        """Makes a line of the report."""

        def median(norm: NormType) -> float | None:
            lengths = [lengths[norm] for _, lengths in self._fallen]
            return float(np.median(np.concatenate(lengths))) if lengths else None

        return Accuracy(
            name=self.name,
            correct=correct,
            examples=examples,
            epsilon=self.epsilon,
            norm=None if self.norm is None else self.norm.value,
            seconds=self.seconds,
            settings=repr(self.attack),
            median_l2=median(NormType.L2),
            median_linf=median(NormType.INFINITY),
        )

    def _note(self, rows: Rows, outcome: Outcome) -> None:
        """Writes down what came of a batch."""
        index, fooled = rows["index"], outcome.fooled
        self.status.set(index, np.where(fooled, FOOLED, STANDS))
        self.fooled += int(fooled.sum())
        self.stands += int((~fooled).sum())
        lengths = _lengths(outcome.displacement)
        valid = np.full(len(index), True)
        if isinstance(self._scene, _Foreign):  # What is ours is right by construction.
            lengths = self._scene.shortened(lengths, rows, outcome)
            valid = self._scene.in_range(rows, outcome)
        if self.norm is not None:
            self.left_ball += int((~_within(lengths[self.norm], self.epsilon)).sum())
        self.left_range += int((~valid).sum())
        fell = fooled & valid
        if fell.any():
            lengths = {norm: length[fell] for norm, length in lengths.items()}
            self._fallen.append((index[fell], lengths))

    def fallen(
        self, norm: NormType = NormType.INFINITY, epsilon: float = np.inf
    ) -> np.ndarray:
        """The examples that fell to perturbations in range and inside a ball."""
        found = [
            index[_within(lengths[norm], epsilon)] for index, lengths in self._fallen
        ]
        return np.concatenate([np.zeros(0, "int64"), *found])


class _Foreign:
    """Calls an attack of which nothing is known but that it can be called."""

    early_stop = True

    def __init__(
        self, attack: Any, model: keras.Model, from_logits: bool | None, batch_size: int
    ) -> None:
        own = getattr(attack, "from_logits", None)
        self._attack, self._model = attack, model
        self.victim = Victim(model, from_logits if own is None else own)
        low = getattr(attack, "clip_value_min", None)
        high = getattr(attack, "clip_value_max", None)
        self._threat = Threat(0.0, NormType.INFINITY, None, low, high)
        self._scene = Scene(self.victim, self._threat, classify=True)
        self._options = {}
        if _takes(attack, "batch_size"):
            self._options["batch_size"] = batch_size

    def check(self, features: Features) -> None:
        """Checks that a batch lies in the stated range."""
        if self._threat.clip_value_min is not None or (
            self._threat.clip_value_max is not None
        ):
            check_range(self._scene, features)

    def play(self, round_: Round, rows: Rows, seed: Any) -> Outcome:
        """Calls the attack on a batch, and looks at what it returns."""
        count = size(rows)
        fixed = self.victim.fixed_batch
        if fixed is not None:  # The rows beyond the last one are copies of it.
            rows = take(rows, np.minimum(np.arange(max(fixed, count)), count - 1))
        features = rows["features"]
        x, y = (
            tree.map_structure(
                lambda leaf: leaf.numpy() if isinstance(leaf, tf.Tensor) else leaf, part
            )
            for part in (features, rows["labels"])
        )
        moved = self._checked(
            self._attack(self._model, x, y, **self._options), features
        )
        ball = self._scene.ball(rows)
        displacement = (self._scene.ball({"features": moved}).x - ball.x).numpy()
        # A value that was not finite, and still is not, has not moved.
        displacement = np.where(np.isfinite(ball.x), displacement, 0.0)
        form = self.victim.output_form(features)

        def predict(features: Features) -> Tensor:
            return form.predicted(self.victim.outputs(features))

        predicted = self.victim.compile("predict", predict, moved)(moved)
        fooled = (predicted != rows["classes"]).numpy()
        return Outcome(fooled[:count], displacement[:count], np.zeros(count))

    def shortened(
        self, lengths: dict[NormType, np.ndarray], rows: Rows, outcome: Outcome
    ) -> dict[NormType, np.ndarray]:
        """Takes from lengths what the rounding of `x_adv - x` may have added."""
        x = self._scene.ball(rows).x.numpy()
        x = np.where(np.isfinite(x), x, 0.0)
        rounding = _lengths(np.spacing(np.abs(x) + np.abs(outcome.displacement)))
        return {norm: np.maximum(lengths[norm] - rounding[norm], 0) for norm in lengths}

    def in_range(self, rows: Rows, outcome: Outcome) -> np.ndarray:
        """Tells which examples are finite and in the stated range."""
        ball = self._scene.ball(rows)
        low, high = (bound.numpy() for bound in ball.range)
        moved = ball.x.numpy() + outcome.displacement
        slack = _SLACK * np.maximum(1.0, np.abs(moved))
        inside = (moved >= low - slack) & (moved <= high + slack)
        inside &= np.isfinite(outcome.displacement)
        return (inside | ~np.isfinite(ball.x)).all(axis=1)

    def _checked(self, moved: Any, features: Features) -> Features:
        """Makes tensors of what an attack returned, if it is like the features."""
        try:
            moved = tree.map_structure(
                lambda new, old: (
                    tf.cast(tf.convert_to_tensor(new), old.dtype)
                    if isinstance(old, tf.Tensor)
                    else new
                ),
                moved,
                features,
            )
            alike = all(
                tuple(new.shape) == tuple(old.shape)
                for new, old in zip(
                    tree.flatten(moved), tree.flatten(features), strict=True
                )
            )
        except (TypeError, ValueError, AttributeError, tf.errors.OpError):
            alike = False
        if not alike:
            raise ValueError(
                "`attacks` must return features like those that they are given: for "
                f"x={describe(features)} {show(self._attack)} must return the same "
                f"structure and shapes. Received: {describe(moved)}"
            )
        return moved


def _lengths(displacement: np.ndarray) -> dict[NormType, np.ndarray]:
    """The length of each row in each norm."""
    sizes = np.abs(displacement.astype("float64"))
    return {
        NormType.L1: sizes.sum(1),
        NormType.L2: np.sqrt(np.square(sizes).sum(1)),
        NormType.INFINITY: sizes.max(1, initial=0.0),
    }


def _within(lengths: np.ndarray, epsilon: float | None) -> np.ndarray:
    """Tells which lengths are those of a ball; one that is NaN is not."""
    assert epsilon is not None
    return lengths <= epsilon * (1 + _SLACK)


def _radius(attack: Any) -> float | None:
    epsilon = getattr(attack, "epsilon", None)
    return None if epsilon is None else length("epsilon", epsilon)


def _norm(attack: Any) -> NormType | None:
    norm = getattr(attack, "norm", None)
    return None if norm is None else check_norm(norm)


def _takes(attack: Any, argument: str) -> bool:
    """Whether an attack has such an argument, as far as Python can tell."""
    try:
        return argument in inspect.signature(attack).parameters
    except (TypeError, ValueError):  # What is written in C need not say.
        return False


def balls(trials: Sequence[Trial]) -> list[tuple[NormType, float]]:
    """The balls that trials stay in, each once, by norm and radius."""
    found = {
        (trial.norm, trial.epsilon)
        for trial in trials
        if trial.norm is not None and trial.epsilon is not None
    }
    return sorted(found, key=lambda ball: (ball[0].value, ball[1]))


def sample(rows: Rows, keys: np.ndarray, size: int) -> tuple[Rows, np.ndarray]:
    """Keeps the rows with the smallest keys."""
    kept = np.sort(np.argsort(keys, kind="stable")[:size])
    return take(rows, kept), keys[kept]
