"""One attack at one radius, over data that comes batch by batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.attacks.base import Attack, make_seed
from advreg.attacks.engine import Cascade, Outcome, Round, Rows, Scene, Threat, take
from advreg.attacks.victim import Victim
from advreg.config import NormType
from advreg.geometry import Tensor
from advreg.packing import Features
from advreg.report import Accuracy

UNKNOWN, STANDS, FOOLED = 0, 1, 2
_SLACK = 1e-4  # Roundings of somebody else's arithmetic are no breach of the ball.


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
        self.status = Marks()
        self.seconds = 0.0
        self.stands = self.fooled = self.left_ball = self.left_range = 0
        self.fallen: list[tuple[np.ndarray, dict[NormType, np.ndarray]]] = []
        rounds: list[Round] | None = None
        if isinstance(attack, Attack):
            self._scene: Any = attack.scene(model, from_logits)
        else:
            self._scene = _Foreign(attack, model, from_logits, batch_size)
            rounds = [Round(1, "")]
        self._cascade: Cascade | None = None
        self._rounds, self._batch_size = rounds, batch_size

    @property
    def epsilon(self) -> float | None:
        """Radius of the attack, if it has one."""
        epsilon = getattr(self.attack, "epsilon", None)
        return None if epsilon is None else float(epsilon)

    @property
    def norm(self) -> NormType | None:
        """Norm of the radius, if it has one."""
        norm = getattr(self.attack, "norm", None)
        return None if norm is None or self.epsilon is None else NormType(norm)

    @property
    def white_box(self) -> bool:
        """Whether the attack follows the gradient of the very model."""
        return isinstance(self.attack, Attack) and self.attack.uses_gradient

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
        if isinstance(self.attack, Attack):
            self.attack.check(self._scene, rows["features"])
            if not self.attack.wants_labels(self._scene):
                rows = {name: rows[name] for name in rows if name != "labels"}
        if self._cascade is None:
            rounds = self._rounds or self.attack.rounds(self._scene)
            seed = make_seed(getattr(self.attack, "seed", None))
            self._cascade = Cascade(
                self._scene, rounds, self._batch_size, seed, self._note
            )
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
            lengths = [lengths[norm] for _, lengths in self.fallen]
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
        index = rows["index"]
        self.status.set(index, np.where(outcome.fooled, FOOLED, STANDS))
        displacement = outcome.displacement.astype("float64")
        lengths = {
            NormType.L1: np.abs(displacement).sum(1),
            NormType.L2: np.sqrt(np.square(displacement).sum(1)),
            NormType.INFINITY: np.abs(displacement).max(1, initial=0.0),
        }
        self.fooled += int(outcome.fooled.sum())
        self.stands += int((~outcome.fooled).sum())
        if self.norm is not None:
            assert self.epsilon is not None
            beyond = lengths[self.norm] > self.epsilon * (1 + _SLACK) + _SLACK**2
            self.left_ball += int(beyond.sum())
        self.left_range += self._scene.count_outside(rows, outcome)
        fooled = outcome.fooled
        if fooled.any():
            lengths = {norm: length[fooled] for norm, length in lengths.items()}
            self.fallen.append((index[fooled], lengths))

    def fallen_within(self, norm: NormType, epsilon: float) -> Iterator[np.ndarray]:
        """Yields the examples that fell to perturbations inside a ball."""
        for index, lengths in self.fallen:
            yield index[lengths[norm] <= epsilon * (1 + _SLACK) + _SLACK**2]


class _Foreign:
    """Calls an attack of which nothing is known but that it can be called."""

    early_stop = True

    def __init__(
        self, attack: Any, model: keras.Model, from_logits: bool | None, batch_size: int
    ) -> None:
        own = getattr(attack, "from_logits", None)
        self._attack, self._model = attack, model
        self._victim = Victim(model, from_logits if own is None else own)
        low = getattr(attack, "clip_value_min", None)
        high = getattr(attack, "clip_value_max", None)
        self._threat = Threat(0.0, NormType.INFINITY, None, low, high)
        self._scene = Scene(self._victim, self._threat, classify=True)
        self._options = {}
        if "batch_size" in inspect.signature(attack).parameters:
            self._options["batch_size"] = batch_size

    def play(self, round_: Round, rows: Rows, seed: Any) -> Outcome:
        """Calls the attack on a batch, and looks at what it returns."""
        features = rows["features"]
        x, y = (
            tree.map_structure(
                lambda leaf: leaf.numpy() if isinstance(leaf, tf.Tensor) else leaf, part
            )
            for part in (features, rows["labels"])
        )
        moved = tree.map_structure(
            lambda new, old: (
                tf.cast(tf.convert_to_tensor(new), old.dtype)
                if isinstance(old, tf.Tensor)
                else new
            ),
            self._attack(self._model, x, y, **self._options),
            features,
        )
        ball = self._scene.ball(rows)
        displacement = (self._scene.ball({"features": moved}).x - ball.x).numpy()
        # A value that was not finite, and still is not, has not moved.
        displacement = np.where(np.isfinite(ball.x), displacement, 0.0)
        form = self._victim.output_form(features)

        def predict(features: Features) -> Tensor:
            return form.predicted(self._victim.outputs(features))

        predicted = self._victim.compile("predict", predict, moved)(moved)
        fooled = (predicted != rows["classes"]).numpy()
        return Outcome(fooled, displacement, np.zeros(len(fooled)))

    def count_outside(self, rows: Rows, outcome: Outcome) -> int:
        """Counts examples that were moved out of the stated range."""
        ball = self._scene.ball(rows)
        low, high = (bound.numpy() for bound in ball.range)
        moved = ball.x.numpy() + outcome.displacement
        slack = _SLACK * np.maximum(1.0, np.abs(moved))
        return int(((moved < low - slack) | (moved > high + slack)).any(axis=1).sum())


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
