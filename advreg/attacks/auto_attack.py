"""AutoAttack: several attacks, one after another, with nothing to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from advreg.attacks.apgd import ApgdSteps, TargetedApgdSteps
from advreg.attacks.attack import Attack
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.solver import Solver
from advreg.attacks.square import P_INIT, SquareSearch
from advreg.checks import check_count
from advreg.config.norms import NormType


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AutoAttack(Attack):
    """The standard attack for measuring robustness: three attacks in sequence.

    See [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). Each part attacks only
    the examples that the parts before it have not fooled. They fail for different
    reasons, so that together they are hard to withstand by hiding the gradient:

    1. `APGD` on the cross-entropy fools most examples fast.
    2. `APGD` towards the most likely wrong classes one after another, on the targeted
       difference of logits ratio (DLR), which does not saturate, however large the
       logits. Any misclassification counts. That loss needs four classes. With two or
       three it is the margin: the logit of the wrong class minus that of the true one.
    3. `Square` uses no gradient, so that it works on models that hide theirs.

    The original has a fourth part, FAB, which is left out: by the tables of its authors
    it fools hardly any example that the others do not.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        iterations: Number of steps of each run of APGD.
        queries: Number of points that Square tries for each example.
        target_classes: Number of wrong classes that the second part targets; all, if
            there are fewer.
        targeted: Must be false, because the second part targets several classes itself.
        feature_mask: Weights in [0, 1] of the gradient. See `FGSM`.
        clip_value_min: Smallest value of a perturbed feature. See `FGSM`.
        clip_value_max: Largest value of a perturbed feature. See `FGSM`.
        from_logits: Whether the outputs of the model are logits. See `FGSM`.
        seed: Seed of random numbers. See `FGSM`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> attack = AutoAttack(epsilon=0.3, clip_value_min=0.0, clip_value_max=1.0)
    >>> x_adv = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    iterations: int = 100
    queries: int = 5000
    target_classes: int = 9

    norms = (NormType.INFINITY, NormType.L2)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "queries", "target_classes"):
            self._set(name, check_count(name, getattr(self, name)))
        if self.targeted:
            raise ValueError(
                "`targeted` must be False for `AutoAttack`, which runs towards several "
                "classes in turn. Use `APGD(targeted=True, loss='dlr')` to reach one. "
                "Received: True"
            )

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes the solvers: APGD, APGD towards each class, Square."""
        steps = self.iterations + 1  # See `ApgdSteps`.
        wrong_classes = problem.target.known_form.classes - 1
        return [
            ApgdSteps(steps, "cross_entropy"),
            *(
                TargetedApgdSteps(steps, "towards", rank=rank)
                for rank in range(min(self.target_classes, wrong_classes))
            ),
            SquareSearch(
                self.queries, "margin", norm=NormType(self.norm), p_init=P_INIT
            ),
        ]
