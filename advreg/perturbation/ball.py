"""The set of allowed perturbations, and the step that increases the loss inside it.

A `Ball` is made of the clean features of one batch. It packs those that may be
perturbed into a matrix `x`, `[batch, values]`, and keeps masks and ranges in the same
layout. One step of an attack is then

    gradient = ball.gradient(gradients)                    # packed, finite, masked
    displacement = ball.ascend(displacement, gradient, step)
    features = ball.perturbed(displacement)                # for the next evaluation

`ascend` adds the steepest direction, projects onto the norm ball, and clips to the
range, in this order: so the range always holds. If the clean input lies in its range,
clipping only shortens a displacement, and the ball holds too.

The state is the displacement `d`, not the perturbed input `x + d`. Pixels near 255, or
inputs of half precision, would round a small `d` away, and the radius is one of `d`.

Training and attacks share all of this. They differ in where the gradients come from,
and in how often the model is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import ops

from advreg import backend
from advreg._types import Constraint, Features, Gradients, Schedule, Tensor
from advreg.checks import brief
from advreg.config.configs import AdvNeighborConfig
from advreg.config.norms import NormType
from advreg.perturbation.geometry import (
    machine_epsilon,
    make_finite,
    project,
    sample_unit_ball,
    steepest_direction,
)
from advreg.perturbation.packing import Packing


class Settings(NamedTuple):
    """The values of an `AdvNeighborConfig` at one moment, its schedules evaluated.

    Scalars, masks and ranges may be tensors, so that a compiled function can take them
    as arguments. The fields are those of the configuration, in its order.
    """

    feature_mask: Constraint
    adv_step_size: Tensor | float
    adv_grad_norm: NormType
    clip_value_min: Constraint
    clip_value_max: Constraint
    pgd_iterations: int
    pgd_epsilon: Tensor | float | None
    random_init: bool
    init_radius: Tensor | float | None
    power_iterations: int

    def beside_layers(self) -> Settings:
        """Returns the settings for `(inputs, displacements)` in place of inputs.

        Masks and clip values concern the inputs alone.
        """
        constraints = {
            name: None if value is None else (value, None)
            for name in ("feature_mask", "clip_value_min", "clip_value_max")
            for value in [getattr(self, name)]
        }
        return self._replace(**constraints)  # type: ignore[arg-type]

    @classmethod
    def of(
        cls, config: AdvNeighborConfig, iteration: Tensor | int | None = None
    ) -> Settings:
        """Evaluates the schedules of a configuration.

        Args:
            config: An `AdvNeighborConfig`.
            iteration: Number of optimizer steps taken so far. Only schedules need it.

        Raises:
            ValueError: A field is a schedule, and `iteration` is `None`.
        """
        values = {name: getattr(config, name) for name in cls._fields}
        for name in ("adv_step_size", "pgd_epsilon", "init_radius"):
            if isinstance(values[name], Schedule):
                if iteration is None:
                    raise ValueError(
                        f"`{name}` is a schedule over the optimizer's iterations, "
                        "which a custom training loop keeps to itself. Pass its "
                        f"value: `dataclasses.replace(config, {name}=float(schedule("
                        f"optimizer.iterations)))`. Received: {name}="
                        f"{brief(values[name])}"
                    )
                values[name] = values[name](iteration)
        return cls(**values)


class Ball:
    """The perturbations of a batch that are allowed: `‖d‖ ≤ radius`, and in range.

    The methods work with the displacement `d`, a matrix with one row for each example,
    in float32 at least. "To move" means to be perturbed. A value that is NaN or
    infinite never moves.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        moving: For each leaf of `features`, in the order of `keras.tree.flatten`,
            whether it may move.
        norm: The norm of the ball and of the steps.
        radius: Radius of the ball, `None` for no ball.
        feature_mask: Weights in [0, 1] of the gradient. A value of weight 0 does not
            move.
        clip_value_min: Smallest value of a perturbed feature. It wins over the ball
            where the clean value is smaller.
        clip_value_max: Largest value of a perturbed feature. It wins likewise.
        can_move: For each leaf, `None` or a boolean tensor that broadcasts to it. Where
            it is false, the value does not move. `network.masks.can_move` makes them.

    Raises:
        ValueError: No leaf may move, or a mask or range does not fit the features.
    """

    def __init__(
        self,
        features: Features,
        moving: Sequence[bool],
        norm: NormType,
        radius: Tensor | float | None,
        *,
        feature_mask: Constraint = None,
        clip_value_min: Constraint = None,
        clip_value_max: Constraint = None,
        can_move: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._packing = packing = Packing(features, moving)
        self._norm, self._radius = norm, radius
        self.x = packing.pack(packing.leaves)
        self._finite = ops.isfinite(self.x)
        mask = packing.spread("feature_mask", feature_mask, 1.0)
        moves = packing.spread_can_move(can_move)
        # Both keep values fixed. In one mask they cost one multiplication.
        if moves is not None:
            mask = ops.where(
                moves, ops.ones_like(self.x) if mask is None else mask, 0.0
            )
        self._mask = mask
        self._free = None if mask is None else mask > 0.0
        low = packing.spread("clip_value_min", clip_value_min, -math.inf)
        high = packing.spread("clip_value_max", clip_value_max, math.inf)
        self._bound(low, high)

    @property
    def machine_epsilon(self) -> float:
        """The largest machine epsilon among the dtypes of the features that move."""
        dtypes = (
            keras.backend.standardize_dtype(t.dtype) for t in self._packing.tensors
        )
        return max(map(machine_epsilon, dtypes))

    @property
    def moving(self) -> Sequence[bool]:
        """Whether each leaf of the features may move."""
        return self._packing.moving

    @property
    def norm(self) -> NormType:
        """The norm of the ball and of the steps."""
        return self._norm

    @property
    def free(self) -> Tensor | None:
        """Booleans that broadcast to `x`, true where it may move, or `None` for all."""
        return self._free

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest value that each entry of `x` may be perturbed to.

        Both are the value itself where it may not move, and infinite where there is no
        limit.
        """
        return (
            ops.full_like(self.x, -math.inf) if self._low is None else self._low,
            ops.full_like(self.x, math.inf) if self._high is None else self._high,
        )

    def zero(self) -> Tensor:
        """Returns the displacement of the input itself."""
        return ops.zeros_like(self.x)

    def random(self, seed: keras.random.SeedGenerator | None, radius: Tensor) -> Tensor:
        """Draws displacements uniformly from a ball, then constrains them.

        Args:
            seed: The generator to draw from: Keras's global one if `None`.
            radius: Radius of that ball, which may be another than that of this one.
        """
        noise = sample_unit_ball(
            (ops.shape(self.x)[0], ops.shape(self.x)[1]),
            self._norm,
            seed,
            self._free,
            keras.backend.standardize_dtype(self.x.dtype),
        )
        return self.constrain(ops.convert_to_tensor(radius, self.x.dtype) * noise)

    def constrain(self, displacement: Tensor) -> Tensor:
        """Projects displacements onto the ball, then clips them to the range."""
        if self._radius is not None:
            displacement = project(displacement, self._radius, self._norm)
        return _clip(displacement, self._nearest, self._farthest)

    def gradient(self, gradients: Gradients) -> Tensor:
        """Packs gradients into the layout of displacements, and makes them finite.

        Args:
            gradients: One tensor for each leaf of the features.

        Returns:
            A finite matrix, times `feature_mask`. It is 0 where the gradient is NaN or
            the value may not move. An infinite gradient counts by its sign, see
            `make_finite`.
        """
        gradient = make_finite(self._packing.pack(gradients))
        if self._norm is not NormType.INFINITY:
            # Inputs that are not finite do not move. Their gradients would use up part
            # of the length of the step. In L∞ each value has a step of its own.
            gradient = ops.where(self._finite, gradient, 0.0)
        return gradient if self._mask is None else gradient * self._mask

    def all_gradients_nan(self, gradients: Gradients) -> Tensor:
        """Returns whether each value that may move has a NaN as its gradient.

        It is false where no value may move. `gradients` are those before `gradient`.
        """
        counts = self._finite
        if self._free is not None:
            counts = ops.logical_and(counts, self._free)
        known = ops.logical_not(ops.isnan(self._packing.pack(gradients)))
        seen = ops.any(ops.logical_and(counts, known))
        return ops.logical_and(ops.any(counts), ops.logical_not(seen))

    def without_clipped(self, displacement: Tensor, gradient: Tensor) -> Tensor:
        """Sets an L1 gradient to 0 where the range stops a further step.

        The L1 step changes the value with the largest gradient alone. Once that value
        has reached the end of its range, every further step would be clipped to
        nothing. Without it, the step goes to the value with the next largest gradient.
        """
        if self._norm is not NormType.L1:
            return gradient
        if self._farthest is not None:
            up = ops.logical_and(displacement >= self._farthest, gradient > 0)
            gradient = ops.where(up, 0.0, gradient)
        if self._nearest is not None:
            down = ops.logical_and(displacement <= self._nearest, gradient < 0)
            gradient = ops.where(down, 0.0, gradient)
        return gradient

    def ascend(self, displacement: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """Takes one step of steepest ascent, then constrains the displacement.

        Args:
            displacement: The displacement at which the step starts.
            gradient: The gradient there, as the method `gradient` returns it.
            step: Length of the step in the norm of the ball: a scalar, or one for each
                row, `[batch, 1]`.

        Returns:
            The displacement after the step.
        """
        direction = steepest_direction(gradient, self._norm)
        step = ops.convert_to_tensor(step, displacement.dtype)
        return self.constrain(displacement + step * direction)

    def perturbed(self, displacement: Tensor) -> Features:
        """Returns the features at a displacement, in their structure and dtypes."""
        # `x + (bound - x)` may round to a number just outside of the range. So the sum
        # is clipped again.
        return self._packing.unpack(_clip(self.x + displacement, self._low, self._high))

    def _bound(self, low: Tensor | None, high: Tensor | None) -> None:
        """Stores the range of the perturbed input, and that of the displacement.

        A value that is masked or not finite has itself as its range, so that clipping
        never moves it. Without this a padding value of -1 in a range from 0 to 1 would
        become 0.
        """
        self._low = self._nearest = self._high = self._farthest = None
        if low is None and high is None:
            return
        x = ops.stop_gradient(self.x)
        # The limits of the displacement are those of the perturbed input minus `x`. The
        # displacement itself is clipped, so that it is always one that is allowed.
        movable = self._finite
        if self._free is not None:
            movable = ops.logical_and(movable, self._free)
        if low is not None:
            self._low = ops.where(movable, low, x)
            self._nearest = ops.where(movable, low - x, 0.0)
        if high is not None:
            self._high = ops.where(movable, high, x)
            self._farthest = ops.where(movable, high - x, 0.0)


def _clip(value: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    if low is not None:
        value = backend.maximum(value, low)
    if high is not None:
        value = backend.minimum(value, high)
    return value
