"""A schedule that is a multiple of another."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from advreg.checks import Number, Schedule, length, magnitude


@keras.saving.register_keras_serializable(package="advreg")
class Scaled(Schedule):
    """A multiple of another schedule.

    Args:
        schedule: A `LearningRateSchedule`.
        factor: A non-negative number.
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        super().__init__()
        self.schedule, self.factor = schedule, length("factor", factor)

    def __call__(self, step: Any) -> Any:
        """Returns the value at a step of the optimizer."""
        return self.schedule(step) * ops.convert_to_tensor(self.factor, "float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "factor": self.factor,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Scaled:
        """Makes the schedule that `get_config` described."""
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"`schedule` must be a `LearningRateSchedule`. Received: {schedule!r}"
            )
        return cls(schedule, config["factor"])


def times(factor: float, value: Number) -> Number:
    """A multiple of a number or of a schedule."""
    if isinstance(value, Schedule):
        return Scaled(value, factor)
    return factor * magnitude("epsilon", value)
