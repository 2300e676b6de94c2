"""BIM: many small gradient steps from the clean input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from advreg.attacks.arguments import loss_for
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.solver import Solver
from advreg.attacks.gradient_steps import GradientSteps
from advreg.attacks.iterative import IterativeAttack


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BIM(IterativeAttack):
    """The basic iterative method: PGD without a random start.

    See [Kurakin et al., 2016](https://arxiv.org/abs/1607.02533).

    Args:
        epsilon: Radius of the ball, in units of the input.
        step_size: Length of a step; `None` is `2.5 * epsilon / iterations`.
        iterations: Number of steps.
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
    >>> x_adv = BIM(epsilon=0.1, step_size=0.01, iterations=20)(model, x, y)
    """

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver, which starts from the clean input."""
        return [
            GradientSteps(
                self.iterations,
                loss_for(self, problem),
                self.targeted,
                step_size=self.length_of_step(),
            )
        ]
