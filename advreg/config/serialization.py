"""Saves configurations as JSON, compares them by it, and reads them again.

Reading is the difficult part, because a saved model may come from a stranger.
`keras.saving.deserialize_keras_object` makes any registered object that a file names,
and even builds it. `deserialize` makes only configurations, objectives, schedules and
arrays of floats, and checks the rest like a value that a user passes.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import keras
import numpy as np

from advreg._types import Schedule
from advreg.checks import brief, is_number
from advreg.objectives import Objective


class SerializableConfig:
    """Base class that gives configurations equality, a hash and Keras serialisation.

    Schedules have no `==` by value, and that of arrays returns an array. So two
    configurations are equal if their JSON is.
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
        # Keyword-only fields were added later. Older files do not have them.
        old = [f.name for f in dataclasses.fields(cls) if not f.kw_only]  # type: ignore[arg-type]
        missing = [name for name in old if name not in config]
        unknown = [name for name in config if name not in names]
        if missing or unknown:
            raise ValueError(
                f"A serialised `{cls.__name__}` must have the fields {names}. "
                f"Received: missing={missing}, unknown={unknown}"
            )
        return cls(**{name: deserialize(name, value) for name, value in config.items()})


def deserialize(name: str, value: Any) -> Any:
    """Reads a value that `get_config` of a configuration has written.

    No object is made but those that a configuration may hold: a file may come from a
    stranger, and Keras would make, and even build, any layer that the file names.

    Args:
        name: Name of the field or argument, for errors.
        value: The value to read: JSON.

    Raises:
        TypeError: The value describes an object of another kind.
        ValueError: It describes a schedule or objective that cannot be made.
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
        and issubclass(cls, (SerializableConfig, Objective, Schedule))
        and isinstance(config, dict)
    ):
        raise TypeError(
            f"`{name}` must be a number, an array, a configuration, an objective or a "
            "schedule. A schedule or objective of one's own has to be registered with "
            "`keras.saving.register_keras_serializable` or to be in `custom_objects`. "
            f"Received: {brief(value)}"
        )
    if issubclass(cls, SerializableConfig):
        return cls.from_config(config)
    if issubclass(cls, Objective):
        try:
            return cls.from_config(config)
        except Exception as error:  # Code of the user's own may raise any error.
            raise ValueError(
                f"`{name}` must describe a {cls.__name__}: {error}. Received: "
                f"{brief(config)}"
            ) from error
    try:
        schedule = cls.from_config(config)
        float(schedule(0))  # Wrong arguments often show in a call only.
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a number, or a schedule that gives numbers. "
            f"{cls.__name__}: {error} Received: {brief(config)}"
        ) from error
    return schedule


def _deserialize_array(name: str, config: Any) -> np.ndarray:
    # So strict, because NumPy converts strings to numbers, and allocates any size that
    # a dtype asks for.
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
        f"{brief(config)}"
    )
