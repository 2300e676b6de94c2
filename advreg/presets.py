"""Configurations that the literature has shown to work, by the names it gives them."""

from __future__ import annotations

from typing import Any

from advreg.checks import Number, count, length, magnitude
from advreg.objectives import LogitPairing, Mart
from advreg.schedules import times


class Presets:
    """Class methods of `AdvRegConfig`, each returning an ordinary configuration.

    `epsilon` is the radius of the ball in units of the input, a number or a
    `LearningRateSchedule`, such as a ramp. Every field of
    `AdvRegConfig` and `AdvNeighborConfig` can be given by keyword and wins, such as
    `clip_value_min=0.0, clip_value_max=1.0`, `adv_grad_norm="l2"` or `multiplier`.
    """

    @classmethod
    def _preset(cls, defaults: dict[str, Any], fields: dict[str, Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def fgsm(cls, epsilon: Number, **fields: Any) -> Any:
        """The fast gradient sign method, one step of the length of the ball.

        [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572). With a large
        `epsilon` training can collapse: the network learns to mislead the one step.

        Args:
            epsilon: Radius of the ball.
            **fields: Fields of both configurations that are to differ.

        Example:
        >>> advreg.AdvRegConfig.fgsm(0.1, clip_value_min=0.0, clip_value_max=1.0)
        """
        epsilon = magnitude("epsilon", epsilon)
        return cls._preset({"adv_step_size": epsilon, "pgd_epsilon": epsilon}, fields)

    @classmethod
    def fast(cls, epsilon: Number, **fields: Any) -> Any:
        """One step of 1.25 radii from a random start, which resists the collapse.

        [Wong et al., 2020](https://arxiv.org/abs/2001.03994).

        Args:
            epsilon: Radius of the ball.
            **fields: Fields of both configurations that are to differ.
        """
        epsilon = magnitude("epsilon", epsilon)
        defaults = {
            "adv_step_size": times(1.25, epsilon),
            "pgd_epsilon": epsilon,
            "random_init": True,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def n_fgsm(cls, epsilon: Number, **fields: Any) -> Any:
        """One step from noise of twice the radius, without a ball around it all.

        [de Jorge et al., 2022](https://arxiv.org/abs/2202.01181). Perturbations leave
        the ball of `epsilon` by design, and go up to three times as far.

        Args:
            epsilon: Radius of the ball that the model is to withstand.
            **fields: Fields of both configurations that are to differ.
        """
        epsilon = magnitude("epsilon", epsilon)
        defaults = {
            "adv_step_size": epsilon,
            "init_radius": times(2.0, epsilon),
            "random_init": True,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def pgd(cls, epsilon: Number, iterations: int = 10, **fields: Any) -> Any:
        """Projected gradient descent from a random start.

        [Madry et al., 2017](https://arxiv.org/abs/1706.06083), who train on perturbed
        inputs alone: `clean_weight=0.0`. The steps add up to 2.5 radii.

        Args:
            epsilon: Radius of the ball.
            iterations: Number of steps.
            **fields: Fields of both configurations that are to differ.
        """
        return cls._preset(_many_steps(epsilon, iterations), fields)

    @classmethod
    def trades(
        cls, epsilon: Number, beta: Number = 6.0, iterations: int = 10, **fields: Any
    ) -> Any:
        """The clean loss, and a divergence that holds perturbed predictions to it.

        [Zhang et al., 2019](https://arxiv.org/abs/1901.08573).

        Args:
            epsilon: Radius of the ball.
            beta: Weight of the divergence, a number or a `LearningRateSchedule`: the
                larger, the more robust and the less accurate.
            iterations: Number of steps.
            **fields: Fields of both configurations that are to differ.
        """
        defaults = {
            **_many_steps(epsilon, iterations),
            "objective": "trades",
            "multiplier": magnitude("beta", beta),
            "init_radius": 1e-3,
        }
        return cls._preset(defaults, fields)

    @classmethod
    def mart(
        cls, epsilon: Number, beta: float = 5.0, iterations: int = 10, **fields: Any
    ) -> Any:
        """A boosted cross-entropy, and a divergence where the clean model errs.

        [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS).

        Args:
            epsilon: Radius of the ball.
            beta: Weight of the divergence.
            iterations: Number of steps.
            **fields: Fields of both configurations that are to differ.
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
        """Virtual adversarial training, in the L2 norm, which needs no labels.

        [Miyato et al., 2018](https://arxiv.org/abs/1704.03976). Examples without a
        label have any, and the sample weight 0.

        Args:
            epsilon: Length of the perturbation.
            difference: Length of the finite difference, the ξ of the paper.
            iterations: Number of power iterations, the K of the paper, at least 1; one
                is what the paper recommends.
            **fields: Fields of both configurations that are to differ.
        """
        epsilon = magnitude("epsilon", epsilon)
        defaults = {
            "adv_step_size": epsilon,
            "pgd_epsilon": epsilon,
            "adv_grad_norm": "l2",
            "random_init": True,
            "init_radius": length("difference", difference),
            # The last one is the step itself.
            "power_iterations": count("iterations", iterations) - 1,
            "objective": "virtual_adversarial",
        }
        return cls._preset(defaults, fields)

    @classmethod
    def logit_pairing(
        cls, epsilon: Number, weight: float = 0.5, iterations: int = 10, **fields: Any
    ) -> Any:
        """The labelled loss at perturbed inputs, and logits that are held together.

        [Kannan et al., 2018](https://arxiv.org/abs/1803.06373).

        Args:
            epsilon: Radius of the ball.
            weight: Weight of the mean squared difference of the logits.
            iterations: Number of steps.
            **fields: Fields of both configurations that are to differ.
        """
        defaults = {
            **_many_steps(epsilon, iterations),
            "objective": LogitPairing(weight),
        }
        return cls._preset(defaults, fields)


def _many_steps(epsilon: Number, iterations: int) -> dict[str, Any]:
    """Steps that add up to 2.5 radii, so that all of the ball can be reached."""
    epsilon, iterations = magnitude("epsilon", epsilon), count("iterations", iterations)
    return {
        "adv_step_size": times(2.5 / iterations, epsilon),
        "pgd_epsilon": epsilon,
        "pgd_iterations": iterations,
        "random_init": True,
    }
