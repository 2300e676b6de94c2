"""Types that several rooms share. Keras has no type hints, so most are `Any`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras

Tensor: TypeAlias = Any  # A tensor of Keras's backend.
Features: TypeAlias = Any  # A tensor, or a nested dict, list or tuple of tensors.
Gradients: TypeAlias = list  # One tensor, or `None`, for each leaf of the features.
Schedule = keras.optimizers.schedules.LearningRateSchedule
Number: TypeAlias = Any  # A float, or a `Schedule`.
Constraint: TypeAlias = Any  # `None`, a number, an array, or a structure of these.
Watch: TypeAlias = Callable[[Tensor], Tensor]  # See `backend.differentiate_step`.
