"""FGSM: one gradient step of length epsilon."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from advreg.attacks.arguments import check_loss, loss_for
from advreg.attacks.attack import Attack
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.solver import Solver
from advreg.attacks.gradient_steps import GradientSteps


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FGSM(Attack):
    """The fast gradient (sign) method: one gradient step of length epsilon.

    See [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572). It is a weak attack.
    A model may withstand it and not be robust, so measure with an iterative attack,
    too.

    Args:
        epsilon: Radius of the ball and length of the step, in units of the input.
        norm: Norm of both, taken jointly over all perturbed features of an example:
            `"l1"`, `"l2"` or `"infinity"` (also `"linf"`, `"inf"`, `1`, `2`, `np.inf`).
        loss: The loss that the attack increases: `"cross_entropy"`, `"margin"` (the
            largest other logit minus the true one), `"dlr"` (the margin relative to the
            spread of the logits), or `"model"`, the compiled loss, of several outputs
            their weighted sum. `None` is the compiled loss for a model of regression
            (by its loss), of several outputs, or of one for each pixel or step; and
            else the cross-entropy.
        targeted: Whether `y` is the class to reach, rather than the true class.
        feature_mask: Weights in [0, 1] of the gradient. A feature with weight 0 is
            never changed. A number, an array, or a structure of these like the input.
        clip_value_min: Smallest value of a perturbed feature, given like the mask.
        clip_value_max: Largest value of a perturbed feature.
        from_logits: Whether the outputs of the model are logits rather than
            probabilities. If `None`, it is guessed: from a last softmax or sigmoid,
            where one is found, then from the compiled loss and the values of the first
            batch. Probabilities lie in [0, 1], and each row of several sums to 1.
        seed: Seed of random numbers. With `None` it comes from Keras's global one.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> x_adv = FGSM(epsilon=0.1, clip_value_min=0.0, clip_value_max=1.0)(model, x, y)
    """

    _: dataclasses.KW_ONLY
    loss: str | None = None

    supports_regression = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver of one step."""
        return [
            GradientSteps(
                1, loss_for(self, problem), self.targeted, step_size=self.epsilon
            )
        ]
