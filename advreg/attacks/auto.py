"""AutoAttack: several attacks, one after another, with nothing to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from advreg.attacks.apgd import AscentTowards, AutoAscent
from advreg.attacks.base import Attack
from advreg.attacks.engine import Round, Scene
from advreg.attacks.square import P_INIT, Search
from advreg.checks import count
from advreg.config import NormType


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AutoAttack(Attack):
    """The standard of robustness: three attacks, each on what those before left.

    [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). They fail for different
    reasons, so that a model that holds out against all three has little to hide behind:

    1. `APGD` on the cross-entropy finds most examples fast.
    2. `APGD` towards the most likely wrong classes one after another, on the targeted
       difference of logits ratio (DLR), which does not saturate, however large the
       logits. Any misclassification counts. That loss needs four classes; with two or
       three it is the margin: the logit of the wrong class less that of the true one.
    3. `Square` uses no gradient, so that a model that hides its own is found out.

    The original has a fourth part, FAB, which is left out: by the tables of its
    authors it finds next to nothing that the others do not.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        iterations: Number of steps of each run of APGD.
        queries: Number of points that Square tries for each example.
        target_classes: Number of wrong classes that the second part runs towards; all,
            if there are not as many.
        targeted: Must be false: what runs towards several classes cannot be told one.
        feature_mask: As of `FGSM`.
        clip_value_min: As of `FGSM`.
        clip_value_max: As of `FGSM`.
        from_logits: As of `FGSM`.
        seed: As of `FGSM`.

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
            self._set(name, count(name, getattr(self, name)))
        if self.targeted:
            raise ValueError(
                "`targeted` must be False for `AutoAttack`, which runs towards several "
                "classes in turn. Use `APGD(targeted=True, loss='dlr')` to reach one. "
                "Received: True"
            )

    @property
    def iterations_per_round(self) -> int:
        """How many steps APGD takes from one start."""
        return self.iterations

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """APGD, APGD towards each class, Square."""
        looks = self.iterations + 1
        wrong_classes = scene.victim.known_form.classes - 1
        return [
            AutoAscent(looks, "cross_entropy"),
            *(
                AscentTowards(looks, "towards", rank=rank)
                for rank in range(min(self.target_classes, wrong_classes))
            ),
            Search(self.queries, "margin", norm=NormType(self.norm), p_init=P_INIT),
        ]
