"""What a user sets: how a neighbour is found, and how much its loss counts.

The names and defaults are those of Neural Structured Learning. A configuration is
frozen and checked when it is made; vary one with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
from typing import Any

import keras
import numpy as np

from advreg.checks import (
    Constraint,
    Number,
    Schedule,
    check_mask,
    check_order,
    constraint,
    count,
    flag,
    is_number,
    length,
    magnitude,
    show,
)
from advreg.objectives import Objective, check_objective
from advreg.presets import Presets


class NormType(str, enum.Enum):
    """The norm that measures a perturbation: `"l1"`, `"l2"` or `"infinity"`.

    `NormType(value)` also understands `"linf"`, `"inf"`, `1`, `2` and `np.inf`.

    Raises:
        ValueError: It is none of these.

    Example:
    >>> NormType("linf")
    <NormType.INFINITY: 'infinity'>
    """

    L1 = "l1"
    L2 = "l2"
    INFINITY = "infinity"

    @property
    def symbol(self) -> str:
        """What texts and figures call it: L1, L2 or L∞."""
        return {"l1": "L1", "l2": "L2"}.get(self.value, "L∞")

    @classmethod
    def all(cls) -> list[NormType]:
        """Returns all norms."""
        return list(cls)

    @classmethod
    def _missing_(cls, value: object) -> NormType:
        aliases = {"linf": "infinity", "inf": "infinity"}
        if isinstance(value, str):
            name = aliases.get(value.lower(), value.lower())
            for norm in cls:
                if norm.value == name:
                    return norm
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            orders: dict[Any, NormType] = {1: cls.L1, 2: cls.L2, math.inf: cls.INFINITY}
            if value in orders:
                return orders[value]
        raise ValueError(
            "`adv_grad_norm` must be one of 'l1', 'l2' and 'infinity' (or 'linf', "
            f"'inf', 1, 2, np.inf). Received: {value!r}"
        )


class _Config:
    """Equality, hash and Keras serialisation of the frozen configurations.

    Schedules and arrays have no usable `==`, so two configurations are equal if their
    JSON is.
    """

    @property
    def _json(self) -> str:
        return json.dumps(keras.saving.serialize_keras_object(self), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._json == other._json

    def __hash__(self) -> int:
        return hash(self._json)

    def get_config(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that JSON can hold."""
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes the configuration that `get_config` described.

        Raises:
            TypeError: A field has the wrong type.
            ValueError: A field is missing or unknown, or has a value that its rule
                forbids.
        """
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        # What is keyword-only came later: older files do not have it.
        old = [f.name for f in dataclasses.fields(cls) if not f.kw_only]  # type: ignore[arg-type]
        missing = [name for name in old if name not in config]
        unknown = [name for name in config if name not in names]
        if missing or unknown:
            raise ValueError(
                f"A serialised `{cls.__name__}` must have the fields {names}. "
                f"Received: missing={missing}, unknown={unknown}"
            )
        return cls(**{name: deserialize(name, value) for name, value in config.items()})


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True, eq=False)
class AdvNeighborConfig(_Config):
    """How an adversarial neighbour of an input is found.

    One iteration moves the input by `adv_step_size` in the direction that raises the
    loss fastest, and brings it back into the ball of `pgd_epsilon` and into the clip
    range. One iteration is the fast gradient (sign) method of
    [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572), several are projected
    gradient descent, [Madry et al., 2017](https://arxiv.org/abs/1706.06083).

    Masks and clip values are a number, which holds for every perturbed feature; an
    array that broadcasts to the feature; or, where the model takes several inputs, a
    dictionary, list or tuple of these in the structure of the input, `None` standing
    for no constraint. A dictionary may leave features out. A list of numbers is a
    structure, not an array: write `np.array([1, 1, 0])` for the columns of a feature.

    Args:
        feature_mask: Weights in [0, 1] of the gradient. A feature masked by 0 never
            moves.
        adv_step_size: Length of one step in `adv_grad_norm`, in units of the input; a
            non-negative number, or a `LearningRateSchedule` over the optimizer's
            iterations. The default is that of Neural Structured Learning; choose your
            own, such as 0.1 in the infinity norm for pixels in [0, 1].
        adv_grad_norm: The norm of the step and of the ball, taken jointly over all
            perturbed features of an example: `"l1"`, `"l2"` or `"infinity"` (also
            `"linf"`, `"inf"`, `1`, `2`, `np.inf`, a `NormType`). A step in L1 goes to
            the largest component of the gradient alone, also where the range keeps that
            one from moving, as in Neural Structured Learning; those of
            `advreg.attacks` go to the next one then.
        clip_value_min: Smallest value of a perturbed feature. It wins over the ball.
        clip_value_max: Largest value of a perturbed feature.
        pgd_iterations: Number of steps, at least 1; or 0 with `random_init`, for a
            random perturbation alone.
        pgd_epsilon: Radius of the ball around the input that the perturbation stays
            in: a non-negative number, a `LearningRateSchedule`, or `None` for no ball,
            where several steps may go as far as their lengths add up to.
        random_init: Whether to start from a uniformly random point of the ball of
            `pgd_epsilon`, or of `adv_step_size` where that is not set.
        init_radius: Radius of the random start where it is another one: a non-negative
            number, a `LearningRateSchedule`, or `None`.
        power_iterations: How often the random start is turned, before the first step,
            into the direction of the gradient there, at the length `init_radius`. With
            a small radius and an attack that is flat at the input these are power
            iterations to the direction of the largest curvature
            ([Miyato et al., 2018](https://arxiv.org/abs/1704.03976)); each costs as
            much as a step.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that its rule forbids.

    Example:
    >>> pgd = AdvNeighborConfig(
    ...     adv_step_size=0.05, adv_grad_norm="infinity", pgd_iterations=10,
    ...     pgd_epsilon=0.2, clip_value_min=0.0, clip_value_max=1.0)
    """

    feature_mask: Constraint = None
    adv_step_size: Number = 0.001
    adv_grad_norm: NormType | str | float = NormType.L2
    clip_value_min: Constraint = None
    clip_value_max: Constraint = None
    pgd_iterations: int = 1
    pgd_epsilon: Number | None = None
    random_init: bool = False
    init_radius: Number | None = dataclasses.field(default=None, kw_only=True)
    power_iterations: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        random_init = flag("random_init", self.random_init)
        least = 0 if random_init else 1
        checked = {
            "feature_mask": constraint("feature_mask", self.feature_mask),
            "adv_step_size": magnitude("adv_step_size", self.adv_step_size),
            "adv_grad_norm": NormType(self.adv_grad_norm),
            "clip_value_min": constraint("clip_value_min", self.clip_value_min),
            "clip_value_max": constraint("clip_value_max", self.clip_value_max),
            "pgd_iterations": count("pgd_iterations", self.pgd_iterations, least),
            "random_init": random_init,
            "power_iterations": count("power_iterations", self.power_iterations, 0),
        }
        if self.pgd_epsilon is not None:
            checked["pgd_epsilon"] = magnitude("pgd_epsilon", self.pgd_epsilon)
        if self.init_radius is not None:
            checked["init_radius"] = magnitude("init_radius", self.init_radius)
            if not random_init:
                raise ValueError(
                    "`init_radius` is the radius of a random start: set "
                    "`random_init=True`, or `init_radius=None`. Received: "
                    f"init_radius={self.init_radius!r} and random_init=False"
                )
        if self.power_iterations and self.init_radius is None:
            raise ValueError(
                "`power_iterations` need an `init_radius`, the length of what they "
                "turn. Received: "
                f"power_iterations={self.power_iterations} and init_radius=None"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_mask(self.feature_mask)
        check_order(self.clip_value_min, self.clip_value_max)


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True, eq=False)
class AdvRegConfig(Presets, _Config):
    """How much the adversarial loss counts, and how its input is found.

    Args:
        multiplier: Weight of the adversarial loss in the total: a non-negative
            number, or a `LearningRateSchedule` over the optimizer's iterations, whose
            values are taken as they come, negative ones too. The number 0 turns
            adversarial training off and costs nothing; a schedule that happens to be
            at 0 still pays for the adversarial pass.
        adv_neighbor_config: An `AdvNeighborConfig`.
        objective: What the adversarial term measures: `"labeled_loss"`, `"trades"`,
            `"mart"`, `"virtual_adversarial"`, `"logit_pairing"`, or an
            `advreg.Objective`.
        clean_weight: Weight of the labelled loss on clean inputs, a non-negative
            number. With 0 and the labelled loss as objective there is no clean pass:
            metrics are computed on perturbed inputs, and their names begin with
            `adversarial_`.
        weight_perturbation: How far the weights move, so that the adversarial term
            grows, before its gradient is taken, relative to the norm of each kernel: a
            non-negative number or a `LearningRateSchedule`, the γ of adversarial
            weight perturbation ([Wu et al., 2020](https://arxiv.org/abs/2004.05884),
            who take 0.005 to 0.01). Where the objective looks at clean predictions,
            weights move so that both terms grow, and both gradients are taken there.
            The number 0 costs nothing.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is negative or not finite, nothing is left to train on,
            or the objective needs a random start.

    Example:
    >>> AdvRegConfig(
    ...     multiplier=keras.optimizers.schedules.PolynomialDecay(0.0, 1000, 0.5),
    ...     adv_neighbor_config=AdvNeighborConfig(adv_step_size=0.1))
    """

    multiplier: Number = 0.2
    adv_neighbor_config: AdvNeighborConfig = dataclasses.field(
        default_factory=AdvNeighborConfig
    )
    objective: Objective | str = dataclasses.field(default="labeled_loss", kw_only=True)
    clean_weight: float = dataclasses.field(default=1.0, kw_only=True)
    weight_perturbation: Number = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        checked = {
            "multiplier": magnitude("multiplier", self.multiplier),
            "objective": check_objective(self.objective),
            "clean_weight": length("clean_weight", self.clean_weight),
            "weight_perturbation": magnitude(
                "weight_perturbation", self.weight_perturbation
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.adv_neighbor_config, AdvNeighborConfig):
            raise TypeError(
                "`adv_neighbor_config` must be an `AdvNeighborConfig`. Received: "
                f"{show(self.adv_neighbor_config)}"
            )
        if checked["multiplier"] == checked["clean_weight"] == 0:
            raise ValueError(
                "`multiplier` and `clean_weight` must not both be 0: nothing would be "
                "left to train on. Received: 0 and 0"
            )
        objective = checked["objective"]
        if objective.needs_random_init and not self.adv_neighbor_config.random_init:
            raise ValueError(
                f"`random_init` must be set for {type(objective).__name__}: at the "
                "input itself its gradient is zero. Received: "
                f"{self.adv_neighbor_config!r}"
            )

    @classmethod
    def _preset(cls, defaults: dict[str, Any], fields: dict[str, Any]) -> AdvRegConfig:
        """Makes a configuration of the fields of both, those of the user winning."""
        common = {"multiplier": 1.0, "adv_grad_norm": NormType.INFINITY}
        return make_adv_reg_config(**{**common, **defaults, **fields})


def check_adv_config(value: Any) -> AdvRegConfig:
    """Returns the argument `adv_config` of a public function, checked.

    Args:
        value: An `AdvRegConfig`, or `None` for `AdvRegConfig()`.

    Raises:
        TypeError: It is neither.
    """
    if value is None:
        return AdvRegConfig()
    if not isinstance(value, AdvRegConfig):
        raise TypeError(
            "`adv_config` must be an `AdvRegConfig`, as `make_adv_reg_config` returns. "
            f"Received: {show(value)}"
        )
    return value


def deserialize(name: str, value: Any) -> Any:
    """Reads what `get_config` of a configuration wrote.

    Files come from anywhere: no object is made but those that a configuration may
    hold, where Keras would make, and even build, whatever layer the file names.

    Args:
        name: Name of the field or argument.
        value: What is to be read.

    Raises:
        TypeError: It describes anything else.
        ValueError: It describes a schedule that cannot be made.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(
            deserialize(f"{name}[{i}]", item) for i, item in enumerate(value)
        )
    if not isinstance(value, dict):
        return value
    if "class_name" not in value or "config" not in value:
        return {k: deserialize(f"{name}[{k!r}]", item) for k, item in value.items()}
    class_name, config = value["class_name"], value["config"]
    if class_name == "__numpy__":
        return _deserialize_array(name, config)
    cls = keras.saving.get_registered_object(
        str(value.get("registered_name"))
    ) or getattr(keras.optimizers.schedules, str(class_name), None)
    if not (
        isinstance(cls, type)
        and issubclass(cls, (_Config, Objective, Schedule))
        and isinstance(config, dict)
    ):
        raise TypeError(
            f"`{name}` must be a number, an array, a configuration, an objective or a "
            "schedule. A schedule or objective of one's own has to be registered with "
            "`keras.saving.register_keras_serializable` or to be in `custom_objects`. "
            f"Received: {value!r}"
        )
    if issubclass(cls, _Config):
        return cls.from_config(config)
    if issubclass(cls, Objective):
        try:
            return cls.from_config(config)
        except Exception as error:  # Any: it may be one of the user's own.
            raise ValueError(
                f"`{name}` must describe a {cls.__name__}: {error}. Received: "
                f"{config!r}"
            ) from error
    try:
        schedule = cls.from_config(config)
        float(schedule(0))
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a number, or a schedule that gives numbers. "
            f"{cls.__name__}: {error} Received: {config!r}"
        ) from error
    return schedule


def _deserialize_array(name: str, config: Any) -> np.ndarray:
    # NumPy turns strings into numbers, and takes what memory a dtype asks for.
    try:
        value, dtype = config["value"], config["dtype"]
        if dtype in ("float16", "float32", "float64") and all(
            is_number(leaf) for leaf in keras.tree.flatten(value)
        ):
            return np.array(value, dtype)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise TypeError(
        f"`{name}` must be an array of floats: nested lists of numbers as `value`, all "
        "of one length, and a float `dtype` of 16, 32 or 64 bits. Received: "
        f"{config!r}"
    )


def make_adv_reg_config(
    multiplier: Number = AdvRegConfig.multiplier,
    feature_mask: Constraint = AdvNeighborConfig.feature_mask,
    adv_step_size: Number = AdvNeighborConfig.adv_step_size,
    adv_grad_norm: NormType | str | float = AdvNeighborConfig.adv_grad_norm,
    clip_value_min: Constraint = AdvNeighborConfig.clip_value_min,
    clip_value_max: Constraint = AdvNeighborConfig.clip_value_max,
    pgd_iterations: int = AdvNeighborConfig.pgd_iterations,
    pgd_epsilon: Number | None = AdvNeighborConfig.pgd_epsilon,
    random_init: bool = AdvNeighborConfig.random_init,
    *,
    init_radius: Number | None = AdvNeighborConfig.init_radius,
    power_iterations: int = AdvNeighborConfig.power_iterations,
    objective: Objective | str = AdvRegConfig.objective,
    clean_weight: float = AdvRegConfig.clean_weight,
    weight_perturbation: Number = AdvRegConfig.weight_perturbation,
) -> AdvRegConfig:
    """Makes an `AdvRegConfig` from the fields of both configurations.

    Args:
        multiplier: See `AdvRegConfig`.
        feature_mask: See `AdvNeighborConfig`, as for all that follow.
        adv_step_size: Length of one step.
        adv_grad_norm: Norm of the step and of the ball.
        clip_value_min: Smallest value of a perturbed feature.
        clip_value_max: Largest value of a perturbed feature.
        pgd_iterations: Number of steps.
        pgd_epsilon: Radius of the ball.
        random_init: Whether to start at random in the ball.
        init_radius: Radius of the random start where it is another one.
        power_iterations: How often the random start is turned along the gradient.
        objective: What the adversarial term measures. See `AdvRegConfig`, as for all
            that follow.
        clean_weight: Weight of the labelled loss on clean inputs.
        weight_perturbation: How far the weights move before the gradient is taken.

    Returns:
        An `AdvRegConfig`.

    Raises:
        TypeError: A field is unknown or has the wrong type.
        ValueError: A field has a value that its rule forbids.

    Example:
    >>> config = make_adv_reg_config(
    ...     multiplier=0.2, adv_step_size=0.2, adv_grad_norm="infinity")
    """
    return AdvRegConfig(
        multiplier=multiplier,
        adv_neighbor_config=AdvNeighborConfig(
            feature_mask=feature_mask,
            adv_step_size=adv_step_size,
            adv_grad_norm=adv_grad_norm,
            clip_value_min=clip_value_min,
            clip_value_max=clip_value_max,
            pgd_iterations=pgd_iterations,
            pgd_epsilon=pgd_epsilon,
            random_init=random_init,
            init_radius=init_radius,
            power_iterations=power_iterations,
        ),
        objective=objective,
        clean_weight=clean_weight,
        weight_perturbation=weight_perturbation,
    )
