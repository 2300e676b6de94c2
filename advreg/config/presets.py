"""Configurations that the literature has shown to work, named as in the papers."""

from __future__ import annotations

from typing import Any

from advreg._types import Number
from advreg.checks import check_count, check_nonnegative, check_nonnegative_or_schedule
from advreg.config.schedules import scaled
from advreg.objectives import LogitPairing, Mart


class Presets:
    """Class methods of `AdvRegConfig`, each of which returns an ordinary configuration.

    `epsilon` is the radius of the ball in units of the input, a number or a
    `LearningRateSchedule`, such as a ramp. Any field of `AdvRegConfig` and
    `AdvNeighborConfig` can be overridden by keyword, such as
    `clip_value_min=0.0, clip_value_max=1.0`, `adv_grad_norm="l2"` or `multiplier`.
    """

    @classmethod
    def _preset(cls, defaults: dict[str, Any], fields: dict[str, Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def fgsm(cls, epsilon: Number, **fields: Any) -> Any:
        """Returns a configuration for FGSM: one step of length epsilon.

        This is the fast gradient sign method of
        [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572). With a large
        `epsilon` training can collapse ("catastrophic overfitting"): the network learns
        to withstand the single step, and no other attack.

        Args:
            epsilon: Radius of the ball, and length of the step.
            **fields: Fields of both configurations to override.

        Example:
        >>> advreg.AdvRegConfig.fgsm(0.1, clip_value_min=0.0, clip_value_max=1.0)
        """
        epsilon = check_nonnegative_or_schedule("epsilon", epsilon)
        return cls._preset({"adv_step_size": epsilon, "pgd_epsilon": epsilon}, fields)

    @classmethod
    def fast(cls, epsilon: Number, **fields: Any) -> Any:
        """Returns a configuration for one step of 1.25 epsilon from a random start.

        See [Wong et al., 2020](https://arxiv.org/abs/2001.03994). The random start
        makes the collapse of `fgsm` less likely.

        Args:
            epsilon: Radius of the ball.
            **fields: Fields of both configurations to override.
        """
        epsilon = check_nonnegative_or_schedule("epsilon", epsilon)
        defaults = {
            "adv_step_size": scaled(1.25, epsilon),
            "pgd_epsilon": epsilon,
            "random_init": True,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def n_fgsm(cls, epsilon: Number, **fields: Any) -> Any:
        """Returns a configuration for one step from noise of size 2 epsilon (N-FGSM).

        See [de Jorge et al., 2022](https://arxiv.org/abs/2202.01181). The result is not
        projected back: by design, perturbations are up to three times as large as
        `epsilon`.

        Args:
            epsilon: Radius of the ball in which the model is to be robust.
            **fields: Fields of both configurations to override.
        """
        epsilon = check_nonnegative_or_schedule("epsilon", epsilon)
        defaults = {
            "adv_step_size": epsilon,
            "init_radius": scaled(2.0, epsilon),
            "random_init": True,
        }
        # A step of 0 is refused, unless a ball of radius 0 says that it is meant. The
        # other presets always have a ball.
        if epsilon == 0.0:
            defaults["pgd_epsilon"] = epsilon
        return cls._preset(defaults, fields)

    @classmethod
    def pgd(cls, epsilon: Number, iterations: int = 10, **fields: Any) -> Any:
        """Returns a configuration for projected gradient descent from a random start.

        See [Madry et al., 2017](https://arxiv.org/abs/1706.06083), who train on
        perturbed inputs alone: for this, set `clean_weight=0.0`. The steps add up to
        2.5 epsilon.

        Args:
            epsilon: Radius of the ball.
            iterations: Number of steps.
            **fields: Fields of both configurations to override.
        """
        return cls._preset(_many_steps(epsilon, iterations), fields)

    @classmethod
    def trades(
        cls, epsilon: Number, beta: Number = 6.0, iterations: int = 10, **fields: Any
    ) -> Any:
        """Returns a configuration for TRADES: the clean loss, and a divergence.

        See [Zhang et al., 2019](https://arxiv.org/abs/1901.08573), and
        `advreg.objectives.Trades` for the divergence.

        Args:
            epsilon: Radius of the ball.
            beta: Weight of the divergence, a number or a `LearningRateSchedule`. A
                larger one makes the model more robust and less accurate.
            iterations: Number of steps.
            **fields: Fields of both configurations to override.
        """
        defaults = {
            **_many_steps(epsilon, iterations),
            "objective": "trades",
            "multiplier": check_nonnegative_or_schedule("beta", beta),
            "init_radius": 1e-3,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def mart(
        cls, epsilon: Number, beta: float = 5.0, iterations: int = 10, **fields: Any
    ) -> Any:
        """Returns a configuration for MART: a boosted cross-entropy, and a divergence.

        See [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS), and
        `advreg.objectives.Mart` for both terms.

        Args:
            epsilon: Radius of the ball.
            beta: Weight of the divergence.
            iterations: Number of steps.
            **fields: Fields of both configurations to override.
        """
        defaults = {
            **_many_steps(epsilon, iterations),
            "objective": Mart(beta),
            "clean_weight": 0.0,
            "init_radius": 1e-3,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def virtual_adversarial(
        cls,
        epsilon: Number,
        difference: float = 1e-3,
        iterations: int = 1,
        **fields: Any,
    ) -> Any:
        """Returns a configuration for virtual adversarial training, in the L2 norm.

        See [Miyato et al., 2018](https://arxiv.org/abs/1704.03976). It needs no labels:
        give examples without a label any label, and the sample weight 0.

        Args:
            epsilon: Length of the perturbation.
            difference: Length of the finite difference, the ξ of the paper.
            iterations: Number of power iterations, the K of the paper, at least 1. The
                paper recommends 1.
            **fields: Fields of both configurations to override.
        """
        epsilon = check_nonnegative_or_schedule("epsilon", epsilon)
        defaults = {
            "adv_step_size": epsilon,
            "pgd_epsilon": epsilon,
            "adv_grad_norm": "l2",
            "random_init": True,
            "init_radius": check_nonnegative("difference", difference),
            # The last iteration is the step itself, to the length `epsilon`.
            "power_iterations": check_count("iterations", iterations) - 1,
            "objective": "virtual_adversarial",
        }
        return cls._preset(defaults, fields)

    @classmethod
    def logit_pairing(
        cls, epsilon: Number, weight: float = 0.5, iterations: int = 10, **fields: Any
    ) -> Any:
        """Returns a configuration for adversarial logit pairing.

        See [Kannan et al., 2018](https://arxiv.org/abs/1803.06373), and
        `advreg.objectives.LogitPairing` for the objective.

        Args:
            epsilon: Radius of the ball.
            weight: Weight of the mean squared difference of the logits.
            iterations: Number of steps.
            **fields: Fields of both configurations to override.
        """
        defaults = {
            **_many_steps(epsilon, iterations),
            "objective": LogitPairing(weight),
        }
        return cls._preset(defaults, fields)


def _many_steps(epsilon: Number, iterations: int) -> dict[str, Any]:
    """Returns fields for steps that add up to 2.5 radii.

    Two points of the ball are at most 2 radii apart, so that the steps can reach any of
    its points from any random start.
    """
    epsilon, iterations = (
        check_nonnegative_or_schedule("epsilon", epsilon),
        check_count("iterations", iterations),
    )
    return {
        "adv_step_size": scaled(2.5 / iterations, epsilon),
        "pgd_epsilon": epsilon,
        "pgd_iterations": iterations,
        "random_init": True,
    }
