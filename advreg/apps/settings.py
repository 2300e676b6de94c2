"""The demo's settings: their defaults and their rules.

Keras is imported when settings are made. The command's help reads the defaults without
it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from advreg.apps.recipes import recipe_for

if TYPE_CHECKING:
    from advreg.config.configs import AdvRegConfig


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The demo's settings, checked when they are made.

    Where `epochs`, `multiplier` or `adv_step_size` is `None`, the dataset's recipe
    gives its value.

    Args:
        dataset: See `advreg.datasets.load`.
        epochs: Number of epochs.
        multiplier: Weight of the adversarial loss.
        adv_step_size: Step of the perturbation, and radius of every attack.
        adv_grad_norm: Norm of the step and of the radius.
        pgd_iterations: Number of steps of a perturbation in training.
        random_init: Whether perturbations in training start at random.
        seed: Seed of the weights, of the order of the batches, and of random starts.
        output_dir: Directory for the figure and the numbers.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that its rule forbids.
    """

    dataset: str = "digits"
    epochs: int | None = None
    multiplier: float | None = None
    adv_step_size: float | None = None
    adv_grad_norm: str = "infinity"
    pgd_iterations: int = 1
    random_init: bool = False
    seed: int = 0
    output_dir: str | Path = "advreg-demo"

    def __post_init__(self) -> None:
        from advreg.config.norms import check_norm

        recipe = recipe_for(self.dataset)
        norm = check_norm("adv_grad_norm", self.adv_grad_norm)
        defaults = {
            "epochs": recipe.epochs,
            "multiplier": recipe.multiplier,
            "adv_step_size": recipe.adv_step_size[norm.value],
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.epochs < 1:  # type: ignore[operator]
            raise ValueError(f"`epochs` must be at least 1. Received: {self.epochs!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"`seed` must lie between 0 and 2**32 - 1. Received: {self.seed!r}"
            )
        self.adv_config()

    @property
    def radius(self) -> float:
        """The radius of every attack, which is the step of training."""
        assert self.adv_step_size is not None  # __post_init__ has filled it in.
        return self.adv_step_size

    def adv_config(self) -> AdvRegConfig:
        """Returns the configuration that the regularised network trains with."""
        from advreg.config.configs import make_adv_reg_config

        # A radius of 0 means that nothing is perturbed.
        in_ball = self.pgd_iterations > 1 or self.random_init or not self.radius
        return make_adv_reg_config(
            multiplier=self.multiplier,
            adv_step_size=self.adv_step_size,
            adv_grad_norm=self.adv_grad_norm,
            pgd_iterations=self.pgd_iterations,
            random_init=self.random_init,
            pgd_epsilon=self.adv_step_size if in_ball else None,
            clip_value_min=0.0,
            clip_value_max=1.0,
        )
