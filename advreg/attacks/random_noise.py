"""Random noise: the baseline that any attack must beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras

from advreg.attacks.attack import Attack
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import Batch
from advreg.attacks.engine.solver import Solver
from advreg.checks import check_count


@dataclasses.dataclass(frozen=True)
class RandomDraw(Solver):
    """A random point of the ball, without any step from there."""

    uses_gradient = False

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Draws the displacement of each row. See `Solver`."""
        return {
            "displacement": problem.ball(batch).random(
                seed, problem.threat_model.epsilon
            )
        }


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomNoise(Attack):
    """Points drawn uniformly from the ball, without any gradient.

    It measures how sensitive a model is to noise, and it is a check of other attacks:
    if noise fools more examples than an attack does, the attack is broken, or the model
    hides its gradient.

    Args:
        epsilon: Radius of the ball, in units of the input.
        draws: Number of points. Each is tried only on examples that those before have
            not fooled. For a model of regression, the point of the largest compiled
            loss counts.
        norm: Norm of the ball. See `FGSM`.
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
    >>> attack = RandomNoise(epsilon=0.3, clip_value_min=0.0, clip_value_max=1.0)
    >>> x_noisy = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    draws: int = 10

    uses_gradient = False
    supports_regression = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("draws", check_count("draws", self.draws))

    @property
    def name(self) -> str:
        """Name in reports, with the number of draws."""
        return f"RandomNoise ×{self.draws}"

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver for each draw."""
        loss = "margin" if problem.classify else "model"
        return [RandomDraw(0, loss, self.targeted)] * self.draws
