"""The rules that arguments obey, and the errors that name argument, rule and value."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeAlias

import keras
import numpy as np

Schedule = keras.optimizers.schedules.LearningRateSchedule
Number: TypeAlias = Any  # float or Schedule; Keras ships no types to say so
Constraint: TypeAlias = Any  # None, a number, an array, or a structure of these


def show(value: Any) -> str:
    """What an error says of a value that it does not understand."""
    return f"{value!r} (of type {type(value).__name__})"


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which booleans are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def magnitude(name: str, value: Any) -> Number:
    """Checks a step, radius or multiplier: non-negative and finite, or a schedule."""
    if isinstance(value, Schedule):
        return value
    return length(
        name, value, "a number or a `keras.optimizers.schedules.LearningRateSchedule`"
    )


def length(name: str, value: Any, rule: str = "a number") -> float:
    """Checks a number that is non-negative and finite."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not is_number(value):
        raise TypeError(f"`{name}` must be {rule}. Received: {show(value)}")
    try:
        number = float(value)
    except OverflowError:  # An integer beyond all floats.
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(
            f"`{name}` must be finite and not negative. Received: {show(value)}"
        )
    return number


def count(name: str, value: Any, least: int = 1) -> int:
    """Checks a number of iterations, restarts or examples: an integer, at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Received: {show(value)}")
    if not least <= int(value) < 2**31:
        raise ValueError(
            f"`{name}` must be at least {least} and fit 32 bits. Received: {value!r}"
        )
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Checks a boolean."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be a bool. Received: {show(value)}")
    return bool(value)


def constraint(name: str, value: Any) -> Constraint:
    """Turns the leaves of a mask or range into floats and read-only float arrays."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: constraint(f"{name}[{key!r}]", v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        leaves = [constraint(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return leaves if isinstance(value, list) else tuple(leaves)
    if isinstance(value, str) or not (
        isinstance(value, numbers.Real) or hasattr(value, "__array__")
    ):
        raise TypeError(
            f"`{name}` must be a number, an array, or a dict, list or tuple of these. "
            f"Received: {show(value)}"
        )
    try:
        array = np.array(value)
        if not np.issubdtype(array.dtype, np.floating):
            array = array.astype("float64", casting="safe")
    # Symbolic tensors have no values, and say so by a NotImplementedError.
    except (TypeError, ValueError, NotImplementedError):
        raise TypeError(
            f"`{name}` must hold numbers whose values are known. Received: "
            f"{show(value)}"
        ) from None
    if np.isnan(array).any():
        raise ValueError(f"`{name}` must not hold NaN. Received: {show(value)}")
    if array.ndim == 0:
        return float(array)
    array.flags.writeable = False
    return array


def check_mask(mask: Constraint) -> None:
    """Checks that the weights of a mask lie in [0, 1]."""
    for leaf in keras.tree.flatten(mask):
        if leaf is not None and not (np.all(leaf >= 0.0) and np.all(leaf <= 1.0)):
            raise ValueError(
                "`feature_mask` must lie in [0, 1]. Received values from "
                f"{np.min(leaf)} to {np.max(leaf)}"
            )


def check_order(low: Constraint, high: Constraint, path: str = "") -> None:
    """Checks that no minimum is above its maximum."""
    if low is None or high is None:
        return
    low_keys, high_keys = _keys(low), _keys(high)
    if low_keys is not None and high_keys is not None:
        if type(low) is not type(high) or (
            not isinstance(low, dict) and low_keys != high_keys
        ):
            raise ValueError(
                f"`clip_value_min{path}` and `clip_value_max{path}` must have the same "
                f"structure. Received: {show(low)} and {show(high)}"
            )
        keys = [key for key in low_keys if key in high_keys]
    else:
        keys = low_keys or high_keys or []
    for key in keys:
        check_order(
            low if low_keys is None else low[key],
            high if high_keys is None else high[key],
            f"{path}[{key!r}]",
        )
    if low_keys is not None or high_keys is not None:
        return
    try:
        ordered = np.all(np.less_equal(low, high))
    except ValueError:
        raise ValueError(
            f"`clip_value_min{path}` and `clip_value_max{path}` must broadcast against "
            f"each other. Received shapes: {np.shape(low)} and {np.shape(high)}"
        ) from None
    if not ordered:
        raise ValueError(
            f"`clip_value_min{path}` must not be above `clip_value_max{path}`. "
            f"Received: {low!r} and {high!r}"
        )


def _keys(constraint: Constraint) -> list | None:
    """The keys of a structure, or `None` for a number or an array."""
    if isinstance(constraint, dict):
        return list(constraint)
    if isinstance(constraint, (list, tuple)):
        return list(range(len(constraint)))
    return None
