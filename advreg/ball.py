"""Where a perturbation may be, and the way up from there.

All arithmetic of perturbing is here, for training and for attacks alike: what they do
differently is where gradients come from and how often they look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import ops

from advreg.checks import Constraint, Schedule
from advreg.config import AdvNeighborConfig, NormType
from advreg.geometry import Tensor, project, sample_unit_ball, steepest_direction
from advreg.packing import Features, Gradients, Packing


class Settings(NamedTuple):
    """An `AdvNeighborConfig` at one moment of training: schedules have become numbers.

    Numbers, masks and ranges may be tensors, so that a compiled function can take them
    as arguments. Fields are those of the configuration, in its order.
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

    @classmethod
    def of(
        cls, config: AdvNeighborConfig, iteration: Tensor | int | None = None
    ) -> Settings:
        """Evaluates the schedules of a configuration.

        Args:
            config: An `AdvNeighborConfig`.
            iteration: Number of optimizer steps taken, which schedules need.
        """
        values = {name: getattr(config, name) for name in cls._fields}
        for name in ("adv_step_size", "pgd_epsilon", "init_radius"):
            if isinstance(values[name], Schedule):
                if iteration is None:
                    raise ValueError(
                        f"`{name}` is a schedule over the optimizer's iterations, "
                        "which a custom training loop keeps to itself. Pass its "
                        f"value: `dataclasses.replace(config, {name}=float(schedule("
                        f"optimizer.iterations)))`. Received: {name}={values[name]!r}"
                    )
                values[name] = values[name](iteration)
        return cls(**values)


class Ball:
    """The perturbations of a batch that are allowed: `‖d‖ ≤ radius`, and in range.

    What moves is the displacement `d`, one row for each example, in float32 at least.
    A value that is not finite stays where it is.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        moving: For each leaf of `features`, in the order of `keras.tree.flatten`,
            whether it may move.
        norm: The norm of the ball and of the steps.
        radius: Radius of the ball, `None` for no ball.
        feature_mask: Weights in [0, 1] of the gradient; 0 does not move.
        clip_value_min: Smallest value of a perturbed feature. It wins over the ball.
        clip_value_max: Largest value of a perturbed feature.
        flags: For each leaf, `None` or a boolean tensor that broadcasts to it: where
            it is false, nothing moves. `advreg.movable.movable` makes them.

    Raises:
        ValueError: Nothing may move, or a mask or range does not fit.
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
        flags: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._packing = packing = Packing(features, moving)
        self._norm, self._radius = norm, radius
        self.x = packing.pack(packing.leaves)
        mask = packing.spread("feature_mask", feature_mask, 1.0)
        moves = packing.spread_flags(flags)
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
    def moving(self) -> Sequence[bool]:
        """For each leaf of the features whether it may move."""
        return self._packing.moving

    @property
    def free(self) -> Tensor | None:
        """Where values may move: booleans that broadcast, `None` where all may."""
        return self._free

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Where each perturbed value may be: its own value where it may not move."""
        return (
            ops.full_like(self.x, -math.inf) if self._low is None else self._low,
            ops.full_like(self.x, math.inf) if self._high is None else self._high,
        )

    def zero(self) -> Tensor:
        """Returns the displacement of the input itself."""
        return ops.zeros_like(self.x)

    def random(self, seed: keras.random.SeedGenerator | None, radius: Tensor) -> Tensor:
        """Draws displacements uniformly from the ball, and brings them into range."""
        noise = sample_unit_ball(
            (ops.shape(self.x)[0], ops.shape(self.x)[1]),
            self._norm,
            seed,
            self._free,
            keras.backend.standardize_dtype(self.x.dtype),
        )
        return self.constrain(ops.convert_to_tensor(radius, self.x.dtype) * noise)

    def constrain(self, displacement: Tensor) -> Tensor:
        """Brings displacements back into the ball, then into the range."""
        if self._radius is not None:
            displacement = project(displacement, self._radius, self._norm)
        return _clip(displacement, self._nearest, self._farthest)

    def gradient(self, gradients: Gradients) -> Tensor:
        """Lays gradients out as displacements are, 0 where nothing can be gained."""
        gradient = self._packing.pack(gradients)
        gradient = ops.where(ops.isfinite(gradient), gradient, 0.0)
        return gradient if self._mask is None else gradient * self._mask

    def unblocked(self, displacement: Tensor, gradient: Tensor) -> Tensor:
        """Leaves out of an L1 gradient what the range keeps from moving.

        The L1 step goes to the largest component alone: once that has reached the end
        of its range, the next one's turn has come.
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
        """Takes a step up, and comes back into the ball and the range.

        Args:
            displacement: Where to start.
            gradient: What `gradient` returned there.
            step: Length of the step: a scalar, or one for each row, `[batch, 1]`.
        """
        direction = steepest_direction(gradient, self._norm)
        step = ops.convert_to_tensor(step, displacement.dtype)
        return self.constrain(displacement + step * direction)

    def perturbed(self, displacement: Tensor) -> Features:
        """Returns the features at a displacement, in their structure and dtypes."""
        # Clipping the sum again takes out the rounding of `x + (bound - x)`.
        return self._packing.unpack(_clip(self.x + displacement, self._low, self._high))

    def _bound(self, low: Tensor | None, high: Tensor | None) -> None:
        """Keeps the range of the perturbed input, and that of the displacement.

        A masked value and one that is not finite have the range of their own value.
        """
        self._low = self._nearest = self._high = self._farthest = None
        if low is None and high is None:
            return
        x = ops.stop_gradient(self.x)
        movable = ops.isfinite(x)
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
        value = ops.maximum(value, low)
    if high is not None:
        value = ops.minimum(value, high)
    return value
