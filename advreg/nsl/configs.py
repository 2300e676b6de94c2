"""`nsl.configs`: what a user of Neural Structured Learning sets.

The configurations of adversarial regularisation are advreg's own, and checked as these
are; but their fields can be assigned, as NSL's users are used to.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from typing import Any

import keras
import tensorflow as tf

from advreg import config
from advreg.checks import Constraint, Number, count, is_number, length, show
from advreg.config import NormType
from advreg.nsl._absent import FUSION, GRAPHS, absent

__all__ = [
    "DEFAULT_ADVERSARIAL_PARAMS",
    "DEFAULT_DISTANCE_PARAMS",
    "AdvNeighborConfig",
    "AdvRegConfig",
    "AdvTargetConfig",
    "AdvTargetType",
    "DecayConfig",
    "DecayType",
    "DistanceConfig",
    "DistanceType",
    "NormType",
    "TransformType",
    "VirtualAdvConfig",
    "make_adv_reg_config",
]

__getattr__ = absent(
    __name__,
    {
        "GraphBuilderConfig": GRAPHS,
        "GraphNeighborConfig": GRAPHS,
        "GraphRegConfig": GRAPHS,
        "IntegrationConfig": FUSION,
        "IntegrationType": FUSION,
        "make_graph_reg_config": GRAPHS,
    },
)

configs = sys.modules[__name__]  # NSL's inner module.

_Reduction = tf.compat.v1.losses.Reduction


class _Type(enum.Enum):
    """An enumeration that lists its members as NSL's do."""

    @classmethod
    def all(cls) -> list[Any]:
        """Returns all members."""
        return list(cls)

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(
            f"A `{cls.__name__}` must be one of {[member.value for member in cls]}. "
            f"Received: {value!r}"
        )


class AdvTargetType(_Type):
    """Which class a targeted attack aims at."""

    SECOND = "second"
    LEAST = "least"
    RANDOM = "random"
    GROUND_TRUTH = "ground_truth"


class DistanceType(_Type):
    """How `nsl.lib.pairwise_distance_wrapper` measures."""

    L1 = "l1"
    L2 = "l2"
    COSINE = "cosine"
    JENSEN_SHANNON_DIVERGENCE = "jensen_shannon_divergence"
    KL_DIVERGENCE = "kl_divergence"


class TransformType(_Type):
    """What is done to both sides before a distance is measured."""

    SOFTMAX = "softmax"
    NONE = "none"


class DecayType(_Type):
    """How `nsl.lib.decay_over_time` decays."""

    EXPONENTIAL_DECAY = "exponential_decay"
    INVERSE_TIME_DECAY = "inverse_time_decay"
    NATURAL_EXP_DECAY = "natural_exp_decay"


class _Assignable(config._Config):
    """Lets the fields of a frozen configuration be assigned, each value checked."""

    __hash__ = None  # type: ignore[assignment]  # What can change has none.

    def __setattr__(self, name: str, value: Any) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            raise AttributeError(
                f"`{type(self).__name__}` has the fields {names}. Received: {name!r}"
            )
        changed = dataclasses.replace(self, **{name: value})  # type: ignore[type-var]
        object.__setattr__(self, name, getattr(changed, name))


@keras.saving.register_keras_serializable(package="advreg.nsl")
class AdvNeighborConfig(_Assignable, config.AdvNeighborConfig):
    """How an adversarial neighbour is found: `advreg.AdvNeighborConfig`, assignable.

    Args: as those of `advreg.AdvNeighborConfig`.
    """


@keras.saving.register_keras_serializable(package="advreg.nsl")
class AdvRegConfig(_Assignable, config.AdvRegConfig):
    """How much the adversarial loss counts: `advreg.AdvRegConfig`, assignable.

    What is assigned after training has begun takes effect with the next `fit`.

    Args:
        multiplier: As of `advreg.AdvRegConfig`.
        adv_neighbor_config: An `AdvNeighborConfig`; `None` for one with defaults.
    """

    def __init__(
        self,
        multiplier: Number = config.AdvRegConfig.multiplier,
        adv_neighbor_config: config.AdvNeighborConfig | None = None,
    ) -> None:
        if adv_neighbor_config is None:
            adv_neighbor_config = AdvNeighborConfig()
        super().__init__(multiplier, adv_neighbor_config)


def make_adv_reg_config(
    multiplier: Number = config.AdvRegConfig.multiplier,
    feature_mask: Constraint = config.AdvNeighborConfig.feature_mask,
    adv_step_size: Number = config.AdvNeighborConfig.adv_step_size,
    adv_grad_norm: NormType | str | float = config.AdvNeighborConfig.adv_grad_norm,
    clip_value_min: Constraint = config.AdvNeighborConfig.clip_value_min,
    clip_value_max: Constraint = config.AdvNeighborConfig.clip_value_max,
    pgd_iterations: int = config.AdvNeighborConfig.pgd_iterations,
    pgd_epsilon: Number | None = config.AdvNeighborConfig.pgd_epsilon,
    random_init: bool = config.AdvNeighborConfig.random_init,
) -> AdvRegConfig:
    """Makes an `AdvRegConfig` from the fields of both configurations.

    Args: as those of `advreg.make_adv_reg_config`.

    Returns:
        An `AdvRegConfig`, whose fields can be assigned.

    Example:
    >>> nsl.configs.make_adv_reg_config(adv_step_size=0.2, adv_grad_norm="infinity")
    """
    return AdvRegConfig(
        multiplier,
        AdvNeighborConfig(
            feature_mask,
            adv_step_size,
            adv_grad_norm,
            clip_value_min,
            clip_value_max,
            pgd_iterations,
            pgd_epsilon,
            random_init,
        ),
    )


@dataclasses.dataclass
class AdvTargetConfig:
    """Which class `nsl.lib.get_target_indices` chooses.

    Args:
        target_method: An `AdvTargetType`, or its value.
        random_seed: Seed of the operation that draws random targets.
    """

    target_method: AdvTargetType | str = AdvTargetType.GROUND_TRUTH
    random_seed: float = 0.0

    def __post_init__(self) -> None:
        self.target_method = AdvTargetType(self.target_method)


@dataclasses.dataclass
class DistanceConfig:
    """How `nsl.lib.pairwise_distance_wrapper` measures a distance.

    Args:
        distance_type: A `DistanceType`, or its value.
        reduction: One of `tf.compat.v1.losses.Reduction`.
        sum_over_axis: The axis over which differences add up, as those of a vector;
            `None` for the mean over all values.
        transform_fn: A `TransformType`, or its value.
    """

    distance_type: DistanceType | str = DistanceType.L2
    reduction: str = _Reduction.SUM_BY_NONZERO_WEIGHTS
    sum_over_axis: int | None = None
    transform_fn: TransformType | str = TransformType.NONE

    def __post_init__(self) -> None:
        self.distance_type = DistanceType(self.distance_type)
        self.transform_fn = TransformType(self.transform_fn)
        if self.reduction not in (reductions := _Reduction.all()):
            raise ValueError(
                f"`reduction` must be one of {reductions}. Received: {self.reduction!r}"
            )


@dataclasses.dataclass
class DecayConfig:
    """How `nsl.lib.decay_over_time` makes a value smaller.

    In `AdvRegConfig` a `keras.optimizers.schedules.LearningRateSchedule` does the same.

    Args:
        decay_steps: Number of training steps in which the value decays by
            `decay_rate`, positive.
        decay_rate: The rate.
        min_value: What the value does not go below.
        decay_type: A `DecayType`, or its value.
    """

    decay_steps: Any
    decay_rate: Any = 0.96
    min_value: Any = 0.0
    decay_type: DecayType | str = DecayType.EXPONENTIAL_DECAY

    def __post_init__(self) -> None:
        self.decay_type = DecayType(self.decay_type)
        if is_number(self.decay_steps) and self.decay_steps <= 0:
            raise ValueError(
                f"`decay_steps` must be positive. Received: {self.decay_steps!r}"
            )


@dataclasses.dataclass
class VirtualAdvConfig:
    """How `nsl.lib.virtual_adv_regularizer` finds its neighbour, and how it measures.

    Args:
        adv_neighbor_config: An `AdvNeighborConfig`, of which the mask, the step and
            the norm are used.
        distance_config: A `DistanceConfig`.
        num_approx_steps: Number of power iterations; 0 keeps the random direction.
        approx_difference: Length of the finite difference, ξ in equation 12 of
            [Miyato et al., 2018](https://arxiv.org/abs/1704.03976).
    """

    adv_neighbor_config: config.AdvNeighborConfig = dataclasses.field(
        default_factory=AdvNeighborConfig
    )
    distance_config: DistanceConfig = dataclasses.field(default_factory=DistanceConfig)
    num_approx_steps: int = 1
    approx_difference: float = 1e-6

    def __post_init__(self) -> None:
        for name, kind in (
            ("adv_neighbor_config", config.AdvNeighborConfig),
            ("distance_config", DistanceConfig),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"`{name}` must be of the class `{kind.__name__}`. Received: "
                    f"{show(getattr(self, name))}"
                )
        count("num_approx_steps", self.num_approx_steps, least=0)
        length("approx_difference", self.approx_difference)


DEFAULT_ADVERSARIAL_PARAMS = {
    field.name: getattr(AdvNeighborConfig(), field.name)
    for field in dataclasses.fields(AdvNeighborConfig)
}
DEFAULT_DISTANCE_PARAMS = dataclasses.asdict(DistanceConfig())
