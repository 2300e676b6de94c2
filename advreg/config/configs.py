"""The two configurations: how an input is perturbed, and how its loss is weighted.

The names and defaults are those of Neural Structured Learning, which calls a perturbed
input an adversarial neighbour. A configuration is frozen, and checked when it is made.
To change a field, use `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from advreg._types import Constraint, Number
from advreg.checks import (
    brief,
    check_bool,
    check_constraint,
    check_count,
    check_mask,
    check_names,
    check_nonnegative,
    check_nonnegative_or_schedule,
    check_order,
    check_width,
    describe_value,
    is_number,
)
from advreg.config.norms import NormType, check_norm
from advreg.config.presets import Presets
from advreg.config.serialization import SerializableConfig
from advreg.objectives import Objective, check_objective

# Names in `perturb` that stand for no single layer.
INPUTS, EMBEDDINGS = "inputs", "embeddings"


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True, eq=False)
class AdvNeighborConfig(SerializableConfig):
    """The settings of the attack that perturbs inputs during training.

    One iteration takes a step of length `adv_step_size` in the direction in which the
    loss grows fastest. The result is projected onto the ball of radius `pgd_epsilon`
    around the clean input, then clipped. One iteration is the fast gradient (sign)
    method of [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572), several are
    projected gradient descent, [Madry et al., 2017](https://arxiv.org/abs/1706.06083).

    A mask or clip value is a number, which holds for every perturbed feature, or an
    array that broadcasts to the feature. Where the model takes several inputs, it may
    also be a dictionary, list or tuple of these in the structure of the input. There
    `None` means no constraint, and a dictionary may leave features out. A list of
    numbers is a structure, not an array: write `np.array([1, 1, 0])` for the columns of
    a feature.

    Args:
        feature_mask: Weights in [0, 1] of the gradient. A feature with weight 0 is
            never changed.
        adv_step_size: Length of one step in `adv_grad_norm`, in units of the input; a
            non-negative number, or a `LearningRateSchedule` over the optimizer's
            iterations. The default is that of Neural Structured Learning; choose your
            own, such as 0.1 in the infinity norm for pixels in [0, 1]. It may be 0 only
            with a random start, or with `pgd_epsilon=0`.
        adv_grad_norm: The norm of the step and of the ball, taken jointly over all
            perturbed features of an example: `"l1"`, `"l2"` or `"infinity"` (also
            `"linf"`, `"inf"`, `1`, `2`, `np.inf`, a `NormType`). An L1 step changes the
            value with the largest gradient alone. As in Neural Structured Learning, it
            does so even if that value is at the end of its range, and the step is lost.
            In `advreg.attacks` it changes the next one then.
        clip_value_min: Smallest value of a perturbed feature. It wins over the ball
            where the clean value is smaller.
        clip_value_max: Largest value of a perturbed feature. It wins likewise.
        pgd_iterations: Number of steps, at least 1; or 0 with `random_init`, for a
            random perturbation alone.
        pgd_epsilon: Radius of the ball around the clean input: a non-negative number, a
            `LearningRateSchedule`, or `None` for no ball. Without a ball the
            perturbation may be as large as the sum of all steps. With 0 inputs are not
            perturbed. In the infinity norm it must not be larger than the clip range;
            nor must the length of a single step without a ball.
        random_init: Whether to start from a uniformly random point of the ball of
            `pgd_epsilon`, or of `adv_step_size` where `pgd_epsilon` is not set.
        init_radius: Radius of the ball of the random start, where it is another one: a
            non-negative number, a `LearningRateSchedule`, or `None`.
        power_iterations: Number of power iterations before the first step. Each
            replaces the random start by a vector of length `init_radius` in the
            direction of the gradient there. With a small radius, and an objective whose
            gradient is 0 at the input, they converge to the direction of the largest
            curvature ([Miyato et al., 2018](https://arxiv.org/abs/1704.03976)). Each
            costs as much as a step.
        perturb: What is perturbed: `"inputs"`; `"embeddings"`, which are the outputs of
            all `Embedding` layers; the output of a layer, by its name or the end of its
            path, such as `"backbone/token_embedding"`; or a tuple of these, which share
            one ball for each example. Step and radius are in the units of what is
            perturbed. Masks and clip values concern inputs only.
        relative: Whether step and radius are multiples of the root mean square of each
            layer's output, taken for each example without its padding. So the model
            cannot evade the perturbation by larger embeddings. Inputs have no such
            unit.

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
    perturb: str | Sequence[str] = dataclasses.field(default=INPUTS, kw_only=True)
    relative: bool = dataclasses.field(default=False, kw_only=True)

    # Whether the radius is compared with the clip range, and a step of 0 refused, as in
    # attacks. The configuration of `advreg.nsl` does not, as NSL did not.
    _strict = True

    def __post_init__(self) -> None:
        random_init = check_bool("random_init", self.random_init)
        least = 0 if random_init else 1
        checked = {
            "feature_mask": check_constraint("feature_mask", self.feature_mask),
            "adv_step_size": check_nonnegative_or_schedule(
                "adv_step_size", self.adv_step_size
            ),
            "adv_grad_norm": check_norm("adv_grad_norm", self.adv_grad_norm),
            "clip_value_min": check_constraint("clip_value_min", self.clip_value_min),
            "clip_value_max": check_constraint("clip_value_max", self.clip_value_max),
            "pgd_iterations": check_count("pgd_iterations", self.pgd_iterations, least),
            "random_init": random_init,
            "power_iterations": check_count(
                "power_iterations", self.power_iterations, 0
            ),
            "perturb": check_names("perturb", self.perturb),
            "relative": check_bool("relative", self.relative),
        }
        if self.pgd_epsilon is not None:
            checked["pgd_epsilon"] = check_nonnegative_or_schedule(
                "pgd_epsilon", self.pgd_epsilon
            )
        if self.init_radius is not None:
            checked["init_radius"] = check_nonnegative_or_schedule(
                "init_radius", self.init_radius
            )
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
        self._check_what_is_perturbed()
        if self._strict:
            self._check_reach()

    @property
    def stated_radius(self) -> tuple[str, float | None]:
        """Name and value of the argument that limits the size of the perturbation.

        The value is `None` for several steps without `pgd_epsilon`, which have no
        limit, and for a schedule.
        """
        name, value = "pgd_epsilon", self.pgd_epsilon
        if value is None and self.pgd_iterations == 1:
            name, value = "adv_step_size", self.adv_step_size
        return name, value if is_number(value) else None

    @property
    def perturbs_inputs(self) -> bool:
        """Whether inputs are perturbed, alone or beside the outputs of layers."""
        return INPUTS in _as_tuple(self.perturb)

    @property
    def perturbs_layers(self) -> bool:
        """Whether outputs of layers are perturbed."""
        return set(_as_tuple(self.perturb)) != {INPUTS}

    def _check_what_is_perturbed(self) -> None:
        """Checks that no field is set that has no effect on what is perturbed."""
        if self.relative and not self.perturbs_layers:
            raise ValueError(
                "`relative` is about the outputs of layers: name some in `perturb`, "
                "or set `relative=False`. Received: relative=True and "
                f"perturb={self.perturb!r}"
            )
        if self.perturbs_inputs:
            return
        for name in ("feature_mask", "clip_value_min", "clip_value_max"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` concerns inputs, which are not perturbed here: set it "
                    f'to `None`, or add "{INPUTS}" to `perturb`. Received: '
                    f"{name}={brief(getattr(self, name))} and perturb={self.perturb!r}"
                )

    def _check_reach(self) -> None:
        """Checks that inputs are perturbed at all, and not beyond the clip range."""
        name, radius = self.stated_radius
        check_width(
            name, radius, self.adv_grad_norm, self.clip_value_min, self.clip_value_max
        )
        radii = (self.init_radius, self.pgd_epsilon, self.adv_step_size)
        start = next(each for each in radii if each is not None)
        steps = self.pgd_iterations and not _is_zero(self.adv_step_size)
        starts = self.random_init and not _is_zero(start)
        if not (steps or starts or _is_zero(self.pgd_epsilon)):
            raise ValueError(
                "`adv_step_size` must be positive: nothing would move. Where a random "
                "start is to be all, set `random_init=True` and a radius for it; to "
                "train on inputs as they are, set `pgd_epsilon=0`. Received: "
                f"adv_step_size={self.adv_step_size!r}, "
                f"pgd_iterations={self.pgd_iterations}, "
                f"random_init={self.random_init}, start={start!r}"
            )


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_zero(value: Number | None) -> bool:
    """Returns whether a radius or step size is the number 0, and not a schedule."""
    return is_number(value) and value == 0


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True, eq=False)
class AdvRegConfig(Presets, SerializableConfig):
    """The settings of adversarial training: the loss, and how inputs are perturbed.

    Args:
        multiplier: Weight of the adversarial loss in the total: a non-negative number,
            or a `LearningRateSchedule` over the optimizer's iterations. Values of a
            schedule are not checked, so that they may be negative. The number 0 turns
            adversarial training off and costs nothing. A schedule that is at 0 still
            costs the adversarial pass.
        adv_neighbor_config: An `AdvNeighborConfig`: how inputs are perturbed.
        objective: The adversarial term of the loss: `"labeled_loss"`, `"trades"`,
            `"mart"`, `"virtual_adversarial"`, `"logit_pairing"`, or an
            `advreg.Objective`.
        clean_weight: Weight of the labelled loss on clean inputs, a non-negative
            number. With 0 and the labelled loss as objective there is no clean pass:
            metrics are computed on perturbed inputs, and their names begin with
            `adversarial_`.
        weight_perturbation: Size of the adversarial weight perturbation, relative to
            the norm of each kernel: a non-negative number or a `LearningRateSchedule`,
            the γ of [Wu et al., 2020](https://arxiv.org/abs/2004.05884), who take 0.005
            to 0.01. Before the gradient of the adversarial term is taken, the kernels
            are changed so that this term grows, and afterwards they are restored. Where
            the objective needs clean predictions, the sum of both terms grows, and both
            gradients are taken at the changed weights. The number 0 costs nothing.

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
            "multiplier": check_nonnegative_or_schedule("multiplier", self.multiplier),
            "objective": check_objective(self.objective),
            "clean_weight": check_nonnegative("clean_weight", self.clean_weight),
            "weight_perturbation": check_nonnegative_or_schedule(
                "weight_perturbation", self.weight_perturbation
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.adv_neighbor_config, AdvNeighborConfig):
            raise TypeError(
                "`adv_neighbor_config` must be an `AdvNeighborConfig`. Received: "
                f"{describe_value(self.adv_neighbor_config)}"
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
                f"{brief(self.adv_neighbor_config)}"
            )

    @classmethod
    def _preset(cls, defaults: dict[str, Any], fields: dict[str, Any]) -> AdvRegConfig:
        """Makes a configuration of defaults, and of fields that override them."""
        common = {"multiplier": 1.0, "adv_grad_norm": NormType.INFINITY}
        return make_adv_reg_config(**{**common, **defaults, **fields})


def check_adv_config(value: Any) -> AdvRegConfig:
    """Checks the argument `adv_config` of a public function, and returns it.

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
            f"Received: {describe_value(value)}"
        )
    return value


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
    perturb: str | Sequence[str] = AdvNeighborConfig.perturb,
    relative: bool = AdvNeighborConfig.relative,
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
        random_init: Whether to start from a random point of the ball.
        init_radius: Radius of the ball of the random start, where it is another one.
        power_iterations: Number of power iterations before the first step.
        perturb: What is perturbed: `"inputs"`, `"embeddings"`, layers by name.
        relative: Whether step and radius are in units of the layers' outputs.
        objective: The adversarial term of the loss. See `AdvRegConfig`, as for all that
            follow.
        clean_weight: Weight of the labelled loss on clean inputs.
        weight_perturbation: Size of the adversarial weight perturbation.

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
            perturb=perturb,
            relative=relative,
        ),
        objective=objective,
        clean_weight=clean_weight,
        weight_perturbation=weight_perturbation,
    )
