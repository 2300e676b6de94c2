"""Auto-PGD: gradient ascent that chooses its step sizes itself.

How it works ([Croce and Hein, 2020](https://arxiv.org/abs/2003.01690)): each example
begins with a step size of twice the radius. A step is a usual PGD step, plus momentum
from the step before. At certain checkpoints each example is judged on its own. If its
loss has grown in too few steps, or its best loss has not improved at all, it is stuck:
its step size is halved, and it goes on from the best point so far.

Because examples differ, everything is an array with one row for each: the step size,
the counters, the best point and the gradient there. `step` has no branches. It computes
both cases and chooses by `where`, so that it compiles to one graph for all examples and
all iterations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg._types import Tensor
from advreg.attacks.arguments import check_loss, check_restarts, loss_for
from advreg.attacks.attack import Attack
from advreg.attacks.engine.losses import dlr_towards, of_class, one_hot
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import Batch
from advreg.attacks.engine.solver import Evaluation, Scalars, Solver
from advreg.checks import check_bool, check_count
from advreg.config.norms import NormType

# The α of the paper: weight of the new step. The rest, 1 - α, is that of the last one.
_MOMENTUM = 0.75
# The ρ of the paper: share of the steps in an interval that must have raised the loss.
_RISING = 0.75


@dataclasses.dataclass(frozen=True)
class ApgdSteps(Solver):
    """Gradient steps with momentum, whose size is halved where an example is stuck.

    `steps` is one more than the number of iterations: a step begins with an evaluation,
    and the point after the last iteration needs one, too. In this last step the
    displacement becomes the best point of all.
    """

    random_init: bool = True

    def key(self) -> tuple[Any, ...]:
        """Returns the key, with `steps`: the checkpoints in the graph depend on it."""
        return (*super().key(), self.steps)

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Makes the first state of each row. See `Solver`."""
        ball = problem.ball(batch)
        zero, column = ball.zero(), ball.zero()[:, :1]
        radius = problem.threat_model.epsilon
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

    def step(self, evaluation: Evaluation, batch: Batch, scalars: Scalars) -> Batch:
        """Computes the next state. See `Solver`."""
        here, gradient, index = (
            batch["displacement"],
            evaluation.gradient,
            scalars["index"],
        )
        loss = ops.cast(evaluation.loss, here.dtype)[:, None]
        better = loss > batch["best_loss"]
        best = ops.where(better, here, batch["best"])
        best_gradient = ops.where(better, gradient, batch["best_gradient"])
        best_loss = ops.where(better, loss, batch["best_loss"])
        rises = batch["rises"] + ops.cast(loss > batch["loss"], here.dtype)

        points = checkpoints(self.steps - 1)
        checked = ops.any(ops.equal(index, points))
        since = ops.cast(_since(points, self.steps)[index], here.dtype)
        # Condition 2 of the paper: the step was not halved at the last checkpoint, and
        # still the best loss is the same. Condition 1 counts the steps that raised it.
        unchanged = ops.logical_and(
            ops.logical_not(batch["halved"]), best_loss <= batch["record"]
        )
        stuck = ops.logical_or(rises < _RISING * since, unchanged)
        stuck = ops.logical_and(ops.logical_and(checked, index > 0), stuck)
        here = ops.where(stuck, best, here)
        gradient = ops.where(stuck, best_gradient, gradient)
        step = ops.where(stuck, batch["step"] / 2, batch["step"])

        # The first step has no step before it.
        share = ops.where(index > 0, _MOMENTUM, 1.0)
        share = ops.cast(share, here.dtype)
        # In the paper, with the projection P: z = P(x + step), and the next point is
        # P(x + α (z - x) + (1 - α) (x - previous)).
        there = evaluation.ball.ascend(here, gradient, step)
        there = evaluation.ball.constrain(
            here + share * (there - here) + (1 - share) * (here - batch["previous"])
        )
        return {
            "displacement": ops.where(index < self.steps - 1, there, best),
            "previous": here,
            "step": step,
            "loss": loss,
            "rises": ops.where(checked, 0.0, rises),
            "halved": ops.where(checked, stuck, batch["halved"]),
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": best_loss,
            "record": ops.where(checked, best_loss, batch["record"]),
        }


@dataclasses.dataclass(frozen=True)
class TargetedApgdSteps(ApgdSteps):
    """Auto-PGD steps towards one wrong class of each example.

    The loss is `dlr_towards`. It needs four classes; with fewer the loss is the
    difference of the two logits. The attack succeeds if any wrong class is predicted.

    Args:
        rank: Which wrong class: 0 for the most likely one at the clean input, 1 for the
            next, and so on.
    """

    rank: int = 0

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Makes the first state of each row, with its target. See `Solver`."""
        logits = problem.logits(batch["features"])
        wrong = ops.where(one_hot(batch["classes"], logits), -np.inf, logits)
        order = ops.top_k(wrong, self.rank + 1)[1]
        return {**super().init(problem, batch, seed), "targets": order[:, self.rank]}

    def objective(self, logits: Tensor, batch: Batch) -> Tensor:
        """Computes the loss towards the target, for each row. See `Solver`."""
        if logits.shape[1] >= 4:
            return dlr_towards(logits, batch["classes"], batch["targets"])
        targets, classes = batch["targets"], batch["classes"]
        return of_class(logits, targets) - of_class(logits, classes)


def checkpoints(iterations: int) -> list[int]:
    """Returns the checkpoints of Auto-PGD as numbers of steps, 0 first.

    The first interval is 22 % of all steps. Each is 3 % of all steps shorter than the
    one before, but never under 6 %.
    """
    points, share, interval = [0], 22, 22
    while share <= 100:
        points.append(-(-share * iterations // 100))  # Rounded up.
        interval = max(interval - 3, 6)
        share += interval
    return sorted(set(points))


def _since(points: Sequence[int], steps: int) -> Tensor:
    """Returns for each checkpoint the number of steps since the one before, else 0."""
    since = np.zeros(steps, "int32")
    since[points[1:]] = np.diff(points)
    return ops.convert_to_tensor(since)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class APGD(Attack):
    """Auto-PGD: PGD with momentum that chooses its step sizes itself.

    See [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). The step size begins
    at twice the radius. At checkpoints it is halved for each example whose loss has
    stopped growing, and the example goes on from its best point so far.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        iterations: Number of steps from each start.
        random_init: Whether to start from a uniformly random point of the ball, rather
            than from the input.
        restarts: Number of starts. Each attacks only examples that those before have
            not fooled.
        loss: Name of the loss that the attack increases. See `FGSM`. `"dlr"` and
            `"margin"` do not saturate, as the cross-entropy does.
        targeted: Whether `y` is the class to reach. See `FGSM`.
        feature_mask: Weights in [0, 1] of the gradient. See `FGSM`.
        clip_value_min: Smallest value of a perturbed feature. See `FGSM`.
        clip_value_max: Largest value of a perturbed feature. See `FGSM`.
        from_logits: Whether the outputs of the model are logits. See `FGSM`.
        seed: Seed of random numbers. See `FGSM`.

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
    supports_regression = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        self._set("iterations", check_count("iterations", self.iterations))
        self._set("random_init", check_bool("random_init", self.random_init))
        self._set("restarts", check_count("restarts", self.restarts))
        check_restarts(self.restarts, self.random_init)

    @property
    def name(self) -> str:
        """Name in reports, iterations and restarts included."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"APGD-{self.iterations}{restarts}"

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver for each restart."""
        one = ApgdSteps(
            self.iterations + 1,
            loss_for(self, problem),
            self.targeted,
            random_init=self.random_init,
        )
        return [one] * self.restarts
