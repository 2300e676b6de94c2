"""PGD: many small gradient steps from random points of the ball."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from advreg.attacks.arguments import check_restarts, loss_for
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.solver import Solver
from advreg.attacks.gradient_steps import GradientSteps
from advreg.attacks.iterative import IterativeAttack
from advreg.checks import (
    check_bool,
    check_count,
    describe_value,
    is_number,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PGD(IterativeAttack):
    """Projected gradient descent: many small steps from random points of the ball.

    See [Madry et al., 2017](https://arxiv.org/abs/1706.06083).

    Args:
        epsilon: Radius of the ball, in units of the input.
        step_size: Length of a step; `None` is `2.5 * epsilon / iterations`.
        iterations: Number of steps from each start.
        random_init: Whether to start from a uniformly random point of the ball, rather
            than from the input.
        restarts: Number of starts. Each attacks only examples that those before have
            not fooled.
        momentum: Factor of the last direction that is added to the next gradient, in
            [0, 1] ([Dong et al., 2017](https://arxiv.org/abs/1710.06081)).
        norm: Norm of the ball. See `FGSM`.
        loss: Name of the loss that the attack increases. See `FGSM`.
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
    >>> attack = PGD(epsilon=0.3, iterations=100, restarts=5,
    ...     clip_value_min=0.0, clip_value_max=1.0)
    >>> x_adv = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    random_init: bool = True
    restarts: int = 1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("random_init", check_bool("random_init", self.random_init))
        self._set("restarts", check_count("restarts", self.restarts))
        check_restarts(self.restarts, self.random_init)
        if not is_number(self.momentum) or not 0 <= self.momentum <= 1:
            raise ValueError(
                "`momentum` must be a number in [0, 1]. Received: "
                f"{describe_value(self.momentum)}"
            )

    @property
    def name(self) -> str:
        """Name in reports, with the numbers of iterations and restarts."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"{super().name}{restarts}"

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver for each restart."""
        one = GradientSteps(
            self.iterations,
            loss_for(self, problem),
            self.targeted,
            step_size=self.length_of_step(),
            random_init=self.random_init,
            momentum=float(self.momentum),
        )
        return [one] * self.restarts
