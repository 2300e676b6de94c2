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
        # Files come from anywhere: no object but a schedule is made.
        described = config["schedule"]
        kind = keras.saving.get_registered_object(
            str(described.get("registered_name"))
        ) or getattr(keras.optimizers.schedules, str(described.get("class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, Schedule)):
            raise TypeError(
                f"`schedule` must be a `LearningRateSchedule`. Received: {described!r}"
            )
        schedule = kind.from_config(described["config"])  # type: ignore[attr-defined]
        return cls(schedule, config["factor"])


def times(factor: float, value: Number) -> Number:
    """A multiple of a number or of a schedule."""
    if isinstance(value, Schedule):
        return Scaled(value, factor)
    return factor * magnitude("epsilon", value)
