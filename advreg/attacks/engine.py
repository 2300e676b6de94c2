"""How attacks run: batch by batch, round by round, on what still stands.

A round is a start and an advance over arrays with one row for each example. It looks at
the model at the rows' displacements, and every look does two things at once: it tells
which rows are fooled there, which then drop out, and it gives the gradient for the next
step. One compiled function serves all looks of all batches and all radii; the loop is
Python's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.attacks.losses import LOSSES, Loss
from advreg.attacks.victim import Victim, signature_of
from advreg.ball import Ball
from advreg.checks import Constraint
from advreg.config import NormType
from advreg.geometry import Tensor
from advreg.movable import movable
from advreg.packing import Features
from advreg.perturbation import align, differentiable, select

SIZES = 16  # That a batch has while it shrinks.
Rows = dict[str, Any]  # structures of tensors and arrays, one row for each example
Numbers = dict[str, Tensor]  # scalars


class Look(NamedTuple):
    """What a look at the model shows of each row.

    Args:
        loss: What the attack makes grow, `[batch]`.
        gradient: Its gradient as a displacement, `[batch, values]`, or `None` where the
            round asks for none.
        ball: The `Ball` of the batch.
    """

    loss: Tensor
    gradient: Tensor | None
    ball: Ball


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of an attack from one start.

    Args:
        looks: How often the round advances; one last look follows.
        loss: Name of what it makes grow: a key of `LOSSES`, or `"model"`.
        targeted: Whether the labels are the classes to reach.
    """

    looks: int
    loss: str
    targeted: bool = False

    uses_gradient = True

    def key(self) -> tuple[Any, ...]:
        """What `advance` depends on beside its arguments."""
        return (type(self), self.loss, self.targeted)

    def numbers(self, epsilon: float) -> dict[str, float]:
        """The scalars that `advance` takes, beside `epsilon` and `index`."""
        return {}

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """Makes the state of each row: `displacement`, and what else it needs."""
        raise NotImplementedError

    def objective(self, logits: Tensor, rows: Rows) -> Tensor:
        """What the round makes grow, for each row."""
        loss: Loss = LOSSES[self.loss]
        return loss(logits, rows["classes"], self.targeted)

    def advance(self, look: Look, rows: Rows, numbers: Numbers) -> Rows:
        """Moves on from a look at `rows["displacement"]`; returns what has changed."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Threat:
    """What the attacker may do.

    Args:
        epsilon: Radius of the ball.
        norm: Its norm.
        feature_mask: As of `AdvNeighborConfig`, like all that follow.
        clip_value_min: Smallest value of a perturbed feature.
        clip_value_max: Largest value of a perturbed feature.
    """

    epsilon: float
    norm: NormType
    feature_mask: Constraint = None
    clip_value_min: Constraint = None
    clip_value_max: Constraint = None

    def key(self) -> Hashable:
        """What the ball depends on, its radius left out."""
        constraints = (self.feature_mask, self.clip_value_min, self.clip_value_max)
        return (self.norm, repr(tree.map_structure(_plain, constraints)))

    def ball(self, victim: Victim, features: Features, epsilon: Tensor | float) -> Ball:
        """The ball around the features of a batch."""
        return Ball(
            features,
            differentiable(features, victim.form.fixed_keys),
            self.norm,
            epsilon,
            feature_mask=self.feature_mask,
            clip_value_min=self.clip_value_min,
            clip_value_max=self.clip_value_max,
            flags=movable(features, None, victim.base),
        )


class Outcome(NamedTuple):
    """Where a round left its rows, in NumPy.

    Args:
        fooled: Whether the attack has succeeded, `[batch]`.
        displacement: Where, or where the round ended, `[batch, values]`.
        closeness: How close an example that stands came to being fooled, `[batch]`.
    """

    fooled: np.ndarray
    displacement: np.ndarray
    closeness: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scene:
    """A model and what an attacker may do to its inputs.

    Args:
        victim: The model.
        threat: What the attacker may do.
        classify: Whether the model tells classes apart; otherwise nothing is ever
            fooled, and the loss is what counts.
        early_stop: Whether examples that are fooled are left alone, or all rounds and
            looks go on, to end as far beyond the boundary as they get.
    """

    victim: Victim
    threat: Threat
    classify: bool
    early_stop: bool = True

    def ball(self, rows: Rows) -> Ball:
        """The ball around the features of a batch."""
        return self.threat.ball(self.victim, rows["features"], self.threat.epsilon)

    def logits(self, features: Features) -> Tensor:
        """The logits of a batch as it is."""
        form = self.victim.output_form(features)

        def logits(features: Features) -> Tensor:
            return form.logits(self.victim.outputs(features))

        return self.victim.compile("logits", logits, features)(features)

    def play(
        self, round_: Round, rows: Rows, seed: keras.random.SeedGenerator
    ) -> Outcome:
        """Runs a round over a batch.

        Args:
            round_: The `Round`.
            rows: `features`, and `classes` or `labels`: tensors.
            seed: Where random starts draw from.

        Returns:
            An `Outcome`.
        """
        count = int(tf.shape(tree.flatten(rows["features"])[0])[0])
        state = {**rows, **round_.start(self, rows, seed)}
        numbers = {
            name: tf.constant(value, tf.float64)
            for name, value in round_.numbers(self.threat.epsilon).items()
        }
        numbers["epsilon"] = tf.constant(self.threat.epsilon, tf.float64)
        numbers["index"] = tf.constant(0, tf.int32)
        # A round without looks has no advance: it is judged where it starts.
        advance = self._compiled(round_, state, numbers) if round_.looks else None

        outcome = Outcome(
            np.zeros(count, bool),
            np.zeros(
                (count, state["displacement"].shape[1]),
                state["displacement"].dtype.as_numpy_dtype,
            ),
            np.full(count, -np.inf),
        )
        place = np.arange(count)  # Of the rows of the state, among those that came.
        for index in range(round_.looks):
            numbers["index"] = tf.constant(index, tf.int32)
            assert advance is not None
            fooled, moved = advance(state, numbers)
            there = state["displacement"]
            state = {**state, **moved}
            if not (self.classify and self.early_stop):
                continue
            # Rows may go on that have fallen before, and fall again.
            fallen = np.flatnonzero(fooled.numpy() & ~outcome.fooled[place])
            if not len(fallen):
                continue
            out = place[fallen]
            outcome.displacement[out] = tf.gather(there, fallen).numpy()
            outcome.fooled[out], outcome.closeness[out] = True, np.inf
            if outcome.fooled.all():
                return outcome
            going = _going(outcome.fooled[place], count)
            if len(going) < len(place):
                place, state = place[going], take(state, going)
        fooled, closeness = self._judge(round_, state)(state, numbers["epsilon"])
        last = np.flatnonzero(~outcome.fooled[place])
        out = place[last]
        outcome.closeness[out] = closeness.numpy()[last]
        outcome.fooled[out] = fooled.numpy()[last]
        outcome.displacement[out] = tf.gather(state["displacement"], last).numpy()
        return outcome

    def _compiled(self, round_: Round, state: Rows, numbers: Numbers) -> Callable:
        def advance(rows: Rows, numbers: Numbers) -> tuple[Tensor, Rows]:
            ball = self.threat.ball(self.victim, rows["features"], numbers["epsilon"])
            with _tape(round_.uses_gradient) as tape:
                features = ball.perturbed(rows["displacement"])
                leaves = select(features, ball.moving)
                if tape is not None:
                    tape.watch(leaves)
                outputs = self.victim.outputs(features)
                loss = self._loss(round_, outputs, rows)
            gradient = None
            if tape is not None:
                # What the loss does not depend on has a gradient of zero.
                found = tape.gradient(
                    loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO
                )
                gradient = ball.gradient(align(found, ball.moving))
            moved = round_.advance(Look(loss, gradient, ball), rows, numbers)
            return self._fooled(round_, outputs, rows), moved

        key = ("advance", round_.key(), self.threat.key(), self.classify)
        return self.victim.compile(key, advance, state, numbers)

    def _judge(self, round_: Round, state: Rows) -> Callable:
        def judge(rows: Rows, epsilon: Tensor) -> tuple[Tensor, Tensor]:
            ball = self.threat.ball(self.victim, rows["features"], epsilon)
            outputs = self.victim.outputs(ball.perturbed(rows["displacement"]))
            return self._fooled(round_, outputs, rows), self._closeness(
                round_, outputs, rows
            )

        names = ("features", "classes", "labels", "displacement")
        key = ("judge", round_.targeted, self.threat.key(), self.classify)
        compiled = self.victim.compile(
            key, judge, _only(state, names), tf.constant(0.0, tf.float64)
        )
        return lambda rows, epsilon: compiled(_only(rows, names), epsilon)

    def _loss(self, round_: Round, outputs: Tensor, rows: Rows) -> Tensor:
        if round_.loss == "model":
            loss = self.victim.compiled_loss(rows["labels"], outputs)
            return -loss if round_.targeted else loss
        form = self.victim.known_form
        return round_.objective(form.logits(outputs), rows)

    def _fooled(self, round_: Round, outputs: Tensor, rows: Rows) -> Tensor:
        if not self.classify:
            return tf.zeros(tf.shape(outputs)[:1], tf.bool)
        predicted = self.victim.known_form.predicted(outputs)
        reached = tf.equal(predicted, rows["classes"])
        return reached if round_.targeted else tf.logical_not(reached)

    def _closeness(self, round_: Round, outputs: Tensor, rows: Rows) -> Tensor:
        """What tells which of several ends of an example was the best."""
        if not self.classify:
            return self._loss(round_, outputs, rows)
        logits = self.victim.known_form.logits(outputs)
        return LOSSES["margin"](logits, rows["classes"], round_.targeted)


class Cascade:
    """Rounds one after another, each on what has withstood those before it.

    Rows wait before each round until there are enough for a full batch, so that late
    rounds run as efficiently as the first, in memory that does not grow with the data.

    Args:
        scene: The model and what may be done to its inputs.
        rounds: The `Round`s.
        batch_size: Number of rows of a batch.
        seed: Where random starts draw from.
        done: Function that is called with rows whose fate is known: their `Rows`, and
            their `Outcome`.
    """

    def __init__(
        self,
        scene: Scene,
        rounds: Sequence[Round],
        batch_size: int,
        seed: keras.random.SeedGenerator,
        done: Callable[[Rows, Outcome], None],
    ) -> None:
        self._scene, self._rounds = scene, rounds
        self._batch_size = min(batch_size, scene.victim.fixed_batch or batch_size)
        self._seed, self._done = seed, done
        self._waiting: list[list[tuple[Rows, Outcome | None]]] = [[] for _ in rounds]

    def feed(self, rows: Rows) -> None:
        """Takes rows in: `features`, `classes` or `labels`, and whatever comes along.

        Only those three go into the model; the rest comes out with them.
        """
        self._push(0, rows, None)

    def flush(self) -> None:
        """Runs what is waiting, full batch or not."""
        for stage in range(len(self._rounds)):
            while self._waiting[stage]:
                self._run(stage)

    def _push(self, stage: int, rows: Rows, before: Outcome | None) -> None:
        waiting = self._waiting[stage]
        if waiting and not fit(waiting[-1][0], rows):
            self._run(stage)  # Sequences of another length make another batch.
        waiting.append((rows, before))
        while sum(size(rows) for rows, _ in waiting) >= self._batch_size:
            self._run(stage)

    def _run(self, stage: int) -> None:
        """Runs the next batch that waits before a round."""
        rows, before = _joined(self._waiting[stage])
        self._waiting[stage].clear()
        if size(rows) > self._batch_size:
            rest = np.arange(self._batch_size, size(rows))
            self._waiting[stage].append((take(rows, rest), _take(before, rest)))
            now = np.arange(self._batch_size)
            rows, before = take(rows, now), _take(before, now)
        played = _only(rows, ("features", "classes", "labels"))
        outcome = self._scene.play(self._rounds[stage], played, self._seed)
        if before is not None:
            outcome = _better(outcome, before)
        ended = outcome.fooled & self._scene.early_stop
        if stage + 1 == len(self._rounds):
            ended[:] = True
        self._emit(rows, outcome, np.flatnonzero(ended))
        on = np.flatnonzero(~ended)
        if len(on):
            self._push(stage + 1, take(rows, on), _take(outcome, on))

    def _emit(self, rows: Rows, outcome: Outcome, places: np.ndarray) -> None:
        if len(places):
            taken = _take(outcome, places)
            assert taken is not None
            self._done(take(rows, places), taken)


def _going(fooled: np.ndarray, count: int) -> np.ndarray:
    """Which rows go on: all that stand, and as many others as make a round number.

    A batch of a size that was not there before has oneDNN prepare its kernels for it,
    which can take longer than a few rows less give. Sixteen sizes are few enough.

    Args:
        fooled: Which rows have fallen, `[rows]`.
        count: Number of rows that the batch began with.
    """
    share = -(-count // SIZES)
    standing = len(fooled) - np.count_nonzero(fooled)
    number = min(-(-standing // share) * share, len(fooled))
    # Those that stand come first, and all keep their order.
    return np.sort(np.argsort(fooled, kind="stable")[:number])


def take(rows: Rows, places: np.ndarray) -> Rows:
    """Returns some of the rows of all arrays and tensors."""
    return tree.map_structure(
        lambda leaf: (
            leaf[places] if isinstance(leaf, np.ndarray) else tf.gather(leaf, places)
        ),
        rows,
    )


def join(parts: Sequence[Rows]) -> Rows:
    """Puts rows below rows."""
    return tree.map_structure(
        lambda *leaves: (
            np.concatenate(leaves)
            if isinstance(leaves[0], np.ndarray)
            else tf.concat(leaves, 0)
        ),
        *parts,
    )


def fit(one: Rows, other: Rows) -> bool:
    """Whether rows can stand in one batch: sequences may differ in length."""
    names = ("features", "classes", "labels")
    return repr(signature_of(_only(one, names))) == repr(
        signature_of(_only(other, names))
    )


def size(rows: Rows) -> int:
    """The number of rows."""
    leaf = tree.flatten(rows)[0]
    return int(leaf.shape[0])


def _take(outcome: Outcome | None, places: np.ndarray) -> Outcome | None:
    return None if outcome is None else Outcome(*(part[places] for part in outcome))


def _better(outcome: Outcome, before: Outcome) -> Outcome:
    """The better end of each row, of two rounds."""
    kept = before.closeness > outcome.closeness
    return Outcome(
        outcome.fooled | before.fooled,
        np.where(kept[:, None], before.displacement, outcome.displacement),
        np.where(kept, before.closeness, outcome.closeness),
    )


def _joined(
    waiting: Sequence[tuple[Rows, Outcome | None]],
) -> tuple[Rows, Outcome | None]:
    if len(waiting) == 1:
        return waiting[0]
    rows = join([rows for rows, _ in waiting])
    outcomes = [before for _, before in waiting if before is not None]
    if not outcomes:
        return rows, None
    return rows, Outcome(*(np.concatenate(p) for p in zip(*outcomes, strict=True)))


def _only(rows: Rows, names: Sequence[str]) -> Rows:
    return {name: rows[name] for name in names if name in rows}


def _tape(needed: bool) -> Any:
    if needed:
        return tf.GradientTape(watch_accessed_variables=False)
    return contextlib.nullcontext()


def _plain(leaf: Any) -> Any:
    return leaf.tolist() if isinstance(leaf, np.ndarray) else leaf
