"""Auto-PGD: an ascent that chooses its step sizes itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from advreg.attacks.base import Attack, check_loss
from advreg.attacks.engine import Look, Numbers, Round, Rows, Scene
from advreg.attacks.gradient import check_restarts, loss_for
from advreg.attacks.losses import dlr_towards
from advreg.checks import count, flag
from advreg.config import NormType
from advreg.geometry import Tensor

_MOMENTUM = 0.75  # Share of the step; the rest goes where the last step went.
_RISING = 0.75  # Share of the steps that must have raised the loss.


@dataclasses.dataclass(frozen=True)
class AutoAscent(Round):
    """Ascent that halves its steps and goes back to the best point when it is stuck.

    Its `looks` are the starting point and one for each step. After the last it goes to
    the best point that it has seen.
    """

    random_init: bool = True

    def key(self) -> tuple[Any, ...]:
        """See `Round`: checkpoints depend on the number of steps."""
        return (*super().key(), self.looks)

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """See `Round`."""
        ball = scene.ball(rows)
        zero, column = ball.zero(), ball.zero()[:, :1]
        radius = scene.threat.epsilon
        start = ball.random(seed, radius) if self.random_init else zero
        return {
            "displacement": start,
            "previous": start,
            "step": column + 2 * radius,
            "loss": column + np.inf,
            "rises": column,  # Steps since the last checkpoint that raised the loss.
            "halved": column > 0,  # Whether the last checkpoint halved the step.
            "best": start,
            "best_gradient": zero,
            "best_loss": column - np.inf,
            "record": column - np.inf,  # The best loss at the last checkpoint.
        }

    def advance(self, look: Look, rows: Rows, numbers: Numbers) -> Rows:
        """See `Round`."""
        here, gradient, index = rows["displacement"], look.gradient, numbers["index"]
        loss = ops.cast(look.loss, here.dtype)[:, None]
        better = loss > rows["best_loss"]
        best = ops.where(better, here, rows["best"])
        best_gradient = ops.where(better, gradient, rows["best_gradient"])
        best_loss = ops.where(better, loss, rows["best_loss"])
        rises = rows["rises"] + ops.cast(loss > rows["loss"], here.dtype)

        points = checkpoints(self.looks - 1)
        checked = ops.any(ops.equal(index, points))
        since = ops.cast(_since(points, self.looks)[index], here.dtype)
        unchanged = ops.logical_and(
            ops.logical_not(rows["halved"]), best_loss <= rows["record"]
        )
        stuck = ops.logical_or(rises < _RISING * since, unchanged)
        stuck = ops.logical_and(ops.logical_and(checked, index > 0), stuck)
        here = ops.where(stuck, best, here)
        gradient = ops.where(stuck, best_gradient, gradient)
        step = ops.where(stuck, rows["step"] / 2, rows["step"])

        share = ops.where(index > 0, _MOMENTUM, 1.0)
        share = ops.cast(share, here.dtype)
        there = look.ball.ascend(here, gradient, step)
        there = look.ball.constrain(
            here + share * (there - here) + (1 - share) * (here - rows["previous"])
        )
        return {
            "displacement": ops.where(index < self.looks - 1, there, best),
            "previous": here,
            "step": step,
            "loss": loss,
            "rises": ops.where(checked, 0.0, rises),
            "halved": ops.where(checked, stuck, rows["halved"]),
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": best_loss,
            "record": ops.where(checked, best_loss, rows["record"]),
        }


@dataclasses.dataclass(frozen=True)
class AscentTowards(AutoAscent):
    """Ascent towards one wrong class of each example. Any misclassification counts.

    The loss is `dlr_towards`. It needs four classes; with fewer the loss is the
    difference of the two logits.

    Args:
        rank: Which class: 0 for the wrong class that is most likely at the input
            itself, 1 for the next.
    """

    rank: int = 0

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """See `Round`."""
        logits = scene.logits(rows["features"])
        own = tf.one_hot(
            rows["classes"], logits.shape[1], on_value=True, off_value=False
        )
        wrong = tf.where(own, tf.constant(-np.inf, logits.dtype), logits)
        order = tf.math.top_k(wrong, self.rank + 1).indices
        return {**super().start(scene, rows, seed), "targets": order[:, self.rank]}

    def objective(self, logits: Tensor, rows: Rows) -> Tensor:
        """See `Round`."""
        if logits.shape[1] >= 4:
            return dlr_towards(logits, rows["classes"], rows["targets"])
        target = tf.gather(logits, rows["targets"], batch_dims=1)
        return target - tf.gather(logits, rows["classes"], batch_dims=1)


def checkpoints(iterations: int) -> list[int]:
    """The numbers of steps after which Auto-PGD looks back, 0 first.

    The first interval is 22 % of all steps; each is 3 % shorter than the one before,
    but never under 6 %.
    """
    points, share, interval = [0], 22, 22
    while share <= 100:
        points.append(-(-share * iterations // 100))  # Rounded up.
        interval = max(interval - 3, 6)
        share += interval
    return sorted(set(points))


def _since(points: Sequence[int], looks: int) -> Tensor:
    """The number of steps since the last checkpoint, for each look at a checkpoint."""
    since = np.zeros(looks, "int32")
    since[points[1:]] = np.diff(points)
    return ops.convert_to_tensor(since)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class APGD(Attack):
    """Auto-PGD: PGD with momentum that finds its step sizes itself.

    [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). Its steps begin at twice
    the radius. At checkpoints each example whose loss has stopped growing halves its
    step, and goes on from the best point so far.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        iterations: Number of steps from each start.
        random_init: Whether to start from a uniformly random point of the ball, rather
            than from the input.
        restarts: Number of starts. What one has fooled, the next leaves alone.
        loss: As of `FGSM`. `"dlr"` and `"margin"` do not saturate as the
            cross-entropy does.
        targeted: As of `FGSM`.
        feature_mask: As of `FGSM`.
        clip_value_min: As of `FGSM`.
        clip_value_max: As of `FGSM`.
        from_logits: As of `FGSM`.
        seed: As of `FGSM`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> attack = APGD(epsilon=0.3, loss="dlr", clip_value_min=0.0, clip_value_max=1.0)
    >>> x_adv = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    iterations: int = 100
    random_init: bool = True
    restarts: int = 1
    loss: str | None = None

    norms = (NormType.INFINITY, NormType.L2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        self._set("iterations", count("iterations", self.iterations))
        self._set("random_init", flag("random_init", self.random_init))
        self._set("restarts", count("restarts", self.restarts))
        check_restarts(self.restarts, self.random_init)

    @property
    def name(self) -> str:
        """What reports call it, iterations and restarts included."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"APGD-{self.iterations}{restarts}"

    @property
    def iterations_per_round(self) -> int:
        """How many steps it takes from one start."""
        return self.iterations

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round for each restart."""
        one = AutoAscent(
            self.iterations + 1,
            loss_for(self, scene),
            self.targeted,
            random_init=self.random_init,
        )
        return [one] * self.restarts
