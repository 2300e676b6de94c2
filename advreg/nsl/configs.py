"""`nsl.configs`: the configurations of Neural Structured Learning.

Those of adversarial regularisation are subclasses of advreg's own, with the same
checks. But their fields can be assigned, as in NSL. An assignment makes a new
configuration with the value, which checks it, and takes over the checked value.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from typing import Any

import keras

from advreg._types import Constraint, Number
from advreg.checks import (
    brief,
    check_count,
    check_nonnegative,
    describe_value,
    is_number,
)
from advreg.config import configs as config
from advreg.config.norms import NormType
from advreg.config.serialization import SerializableConfig
from advreg.nsl._absent import FUSION, GRAPHS, absent
from advreg.nsl._reductions import Reduction
from advreg.objectives import Objective

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


class _Type(enum.Enum):
    """An enumeration with the method `all` of NSL's enumerations."""

    @classmethod
    def all(cls) -> list[Any]:
        """Returns all members."""
        return list(cls)

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(
            f"A `{cls.__name__}` must be one of {[member.value for member in cls]}. "
            f"Received: {brief(value)}"
        )


class AdvTargetType(_Type):
    """The class that a targeted attack aims at."""

    SECOND = "second"
    LEAST = "least"
    RANDOM = "random"
    GROUND_TRUTH = "ground_truth"


class DistanceType(_Type):
    """The distance that `nsl.lib.pairwise_distance_wrapper` computes."""

    L1 = "l1"
    L2 = "l2"
    COSINE = "cosine"
    JENSEN_SHANNON_DIVERGENCE = "jensen_shannon_divergence"
    KL_DIVERGENCE = "kl_divergence"


class TransformType(_Type):
    """The transformation of both sides before a distance is computed."""

    SOFTMAX = "softmax"
    NONE = "none"


class DecayType(_Type):
    """The formula by which `nsl.lib.decay_over_time` decays."""

    EXPONENTIAL_DECAY = "exponential_decay"
    INVERSE_TIME_DECAY = "inverse_time_decay"
    NATURAL_EXP_DECAY = "natural_exp_decay"


class _Assignable(SerializableConfig):
    """Base class that makes fields of a frozen configuration assignable."""

    __hash__ = None  # type: ignore[assignment]  # Mutable objects have no hash.

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
    """`advreg.AdvNeighborConfig` with fields that can be assigned.

    As in NSL, the step size may be 0, and the radius larger than the clip range. See
    `advreg.AdvNeighborConfig` for the arguments.
    """

    _strict = False


@keras.saving.register_keras_serializable(package="advreg.nsl")
class AdvRegConfig(_Assignable, config.AdvRegConfig):
    """`advreg.AdvRegConfig` with fields that can be assigned.

    A value that is assigned during training takes effect with the next `fit`.

    Args:
        multiplier: Weight of the adversarial loss. See `advreg.AdvRegConfig`, as for
            all arguments.
        adv_neighbor_config: An `AdvNeighborConfig`; `None` for one with defaults.
        objective: The adversarial term of the loss.
        clean_weight: Weight of the labelled loss on clean inputs.
        weight_perturbation: Size of the adversarial weight perturbation.
    """

    def __init__(
        self,
        multiplier: Number = config.AdvRegConfig.multiplier,
        adv_neighbor_config: config.AdvNeighborConfig | None = None,
        *,
        objective: Objective | str = config.AdvRegConfig.objective,
        clean_weight: float = config.AdvRegConfig.clean_weight,
        weight_perturbation: Number = config.AdvRegConfig.weight_perturbation,
    ) -> None:
        if adv_neighbor_config is None:
            adv_neighbor_config = AdvNeighborConfig()
        super().__init__(
            multiplier,
            adv_neighbor_config,
            objective=objective,
            clean_weight=clean_weight,
            weight_perturbation=weight_perturbation,
        )


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

    See `advreg.make_adv_reg_config` for the arguments.

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
    """The choice of `nsl.lib.get_target_indices`.

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
    """The settings of `nsl.lib.pairwise_distance_wrapper`.

    Args:
        distance_type: A `DistanceType`, or its value.
        reduction: One of `tf.compat.v1.losses.Reduction`, which are strings.
        sum_over_axis: The axis of vectors, along which differences are summed; `None`
            for the mean over all values.
        transform_fn: A `TransformType`, or its value.
    """

    distance_type: DistanceType | str = DistanceType.L2
    reduction: str = Reduction.SUM_BY_NONZERO_WEIGHTS
    sum_over_axis: int | None = None
    transform_fn: TransformType | str = TransformType.NONE

    def __post_init__(self) -> None:
        self.distance_type = DistanceType(self.distance_type)
        self.transform_fn = TransformType(self.transform_fn)
        if self.reduction not in (reductions := Reduction.all()):
            raise ValueError(
                f"`reduction` must be one of {reductions}. Received: "
                f"{brief(self.reduction)}"
            )


@dataclasses.dataclass
class DecayConfig:
    """The settings of `nsl.lib.decay_over_time`.

    In `AdvRegConfig`, use a `keras.optimizers.schedules.LearningRateSchedule` instead.

    Args:
        decay_steps: Number of training steps in which the value decays by
            `decay_rate`, positive.
        decay_rate: The rate.
        min_value: Lower limit of the value.
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
                f"`decay_steps` must be positive. Received: {brief(self.decay_steps)}"
            )


@dataclasses.dataclass
class VirtualAdvConfig:
    """The settings of `nsl.lib.virtual_adv_regularizer`.

    Args:
        adv_neighbor_config: An `AdvNeighborConfig`, of which the mask, the step size
            and the norm are used.
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
                    f"{describe_value(getattr(self, name))}"
                )
        check_count("num_approx_steps", self.num_approx_steps, least=0)
        check_nonnegative("approx_difference", self.approx_difference)


DEFAULT_ADVERSARIAL_PARAMS = {
    field.name: getattr(AdvNeighborConfig(), field.name)
    for field in dataclasses.fields(AdvNeighborConfig)
    if not field.kw_only  # NSL does not have the keyword-only fields.
}
DEFAULT_DISTANCE_PARAMS = dataclasses.asdict(DistanceConfig())
