"""A schedule that is a multiple of another one.

Presets need it. Their radius may be a schedule, and the step size is a multiple of the
radius.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from advreg._types import Number, Schedule
from advreg.checks import brief, check_nonnegative, check_nonnegative_or_schedule


@keras.saving.register_keras_serializable(package="advreg")
class Scaled(Schedule):
    """A multiple of another schedule.

    Args:
        schedule: A `LearningRateSchedule`.
        factor: A non-negative number.
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        super().__init__()
        self.schedule, self.factor = schedule, check_nonnegative("factor", factor)

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
        # A file may come from an attacker, so nothing but a schedule is made of it.
        described = config["schedule"]
        kind = keras.saving.get_registered_object(
            str(described.get("registered_name"))
        ) or getattr(keras.optimizers.schedules, str(described.get("class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, Schedule)):
            raise TypeError(
                "`schedule` must be a `LearningRateSchedule`. Received: "
                f"{brief(described)}"
            )
        schedule = kind.from_config(described["config"])  # type: ignore[attr-defined]
        return cls(schedule, config["factor"])


def scaled(factor: float, value: Number) -> Number:
    """Returns a multiple of a number or of a schedule."""
    if isinstance(value, Schedule):
        return Scaled(value, factor)
    return factor * check_nonnegative_or_schedule("epsilon", value)
