"""Checks of arguments, with errors that name the argument, the rule and the value."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import keras
import numpy as np
from keras import tree

from advreg._types import Constraint, Features, Number, Schedule

# Limits of the part of a value that an error shows: characters, entries of a structure,
# and values of an array.
_LONGEST, _MOST, _FEW = 300, 20, 4


def describe_value(value: Any) -> str:
    """Describes a value of an unexpected type for an error, with its type."""
    shown = brief(value)
    kind = type(value).__name__
    return shown if shown.startswith(f"{kind}(shape=") else f"{shown} (of type {kind})"


def brief(value: Any) -> str:
    """Describes any value for an error, in one line.

    Arrays and tensors are shown by their type, shape and dtype, unless they are very
    small, because their values would fill a screen. Everything else is shown as its
    `repr`, cut if it is long.
    """
    text = _brief(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    few = isinstance(value, np.ndarray) and value.size <= _FEW
    if not (few or shape is None or isinstance(value, type) or _rank(shape) == 0):
        dtype = getattr(value, "dtype", None)
        # The shapes and dtypes of PyTorch show the name of their module.
        name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
        kind = "" if dtype is None else f", dtype={name}"
        plain = tuple(shape) if type(shape).__name__ == "Size" else shape
        return f"{type(value).__name__}(shape={plain}{kind})"
    if type(value) not in (dict, list, tuple):
        return repr(value)
    # Cut first, because describing each of many entries would take long.
    shown = list(value)[:_MOST]
    more = f", ... ({len(value)} in all)" if len(value) > _MOST else ""
    if isinstance(value, dict):
        pairs = ", ".join(f"{key!r}: {_brief(value[key])}" for key in shown)
        return f"{{{pairs}{more}}}"
    entries = ", ".join(map(_brief, shown)) + more
    if isinstance(value, list):
        return f"[{entries}]"
    return f"({entries},)" if len(value) == 1 else f"({entries})"


def _rank(shape: Any) -> int | None:
    """Returns the number of axes of a shape, `None` where it is unknown."""
    try:
        return len(shape)
    except (TypeError, ValueError):
        return None


def check_model(name: str, value: Any) -> None:
    """Checks that a value is a Keras 3 model.

    Args:
        name: Name of the argument, for the error.
        value: The value.

    Raises:
        TypeError: It is no `keras.Model`. The error has a hint for common mistakes.
    """
    if isinstance(value, keras.Model):
        return
    modules = {cls.__module__.split(".")[0] for cls in type(value).__mro__}
    hint = ""
    if "tf_keras" in modules:
        hint = (
            " A `tf_keras` model is of Keras 2: build it with `import keras` in "
            "place of `tf_keras`, unset TF_USE_LEGACY_KERAS, and load its weights "
            "with `load_weights`."
        )
    elif isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        hint = f" Load a saved model first: `keras.models.load_model({path!r})`."
    elif isinstance(value, type) and issubclass(value, keras.Model):
        hint = " Pass an object of the class, and not the class itself."
    elif hasattr(value, "shape") or isinstance(value, (list, tuple, dict)):
        hint = " The model comes first, and then the data."
    raise TypeError(
        f"`{name}` must be a Keras 3 model, an instance of `keras.Model`.{hint} "
        f"Received: {brief(value)} (of type {type(value).__module__}."
        f"{type(value).__name__})"
    )


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number. Booleans are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def check_nonnegative_or_schedule(name: str, value: Any) -> Number:
    """Checks that a value is a finite non-negative number, or a schedule.

    Raises:
        TypeError: It is neither a number nor a schedule.
        ValueError: It is negative or not finite.
    """
    if isinstance(value, Schedule):
        return value
    return check_nonnegative(
        name, value, "a number or a `keras.optimizers.schedules.LearningRateSchedule`"
    )


def check_nonnegative(name: str, value: Any, rule: str = "a number") -> float:
    """Checks that a value is a finite non-negative number, and returns it as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not is_number(value):
        raise TypeError(f"`{name}` must be {rule}. Received: {describe_value(value)}")
    try:
        number = float(value)
    except OverflowError:  # An integer larger than any float.
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(
            f"`{name}` must be finite and not negative. Received: "
            f"{describe_value(value)}"
        )
    return number


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Checks that a value is an integer, at least `least`, and returns it as an `int`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is too small, or does not fit into 32 bits.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be an integer. Received: {describe_value(value)}"
        )
    if not least <= int(value) < 2**31:
        raise ValueError(
            f"`{name}` must be at least {least} and fit 32 bits. Received: "
            f"{brief(value)}"
        )
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    """Checks that a value is a boolean, and returns it as a `bool`.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be a bool. Received: {describe_value(value)}")
    return bool(value)


def check_names(name: str, value: Any) -> str | tuple[str, ...]:
    """Checks that a value is a name, or several, and returns it with these as a tuple.

    Raises:
        TypeError: It is not.
        ValueError: There is no name, or an empty one, or one comes twice.
    """
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not all(
        isinstance(each, str) for each in several
    ):
        raise TypeError(
            f"`{name}` must be a name, or a list or tuple of names. Received: "
            f"{describe_value(value)}"
        )
    if not several or not all(several) or len(set(several)) < len(several):
        raise ValueError(
            f"`{name}` must hold at least one name, none of them empty, and each once. "
            f"Received: {brief(value)}"
        )
    return value if isinstance(value, str) else tuple(several)


def check_constraint(name: str, value: Any) -> Constraint:
    """Checks a mask or an end of a range, and makes it immutable.

    Args:
        name: Name of the argument, for errors.
        value: `None`, a number, an array, or a structure of these.

    Returns:
        The same structure of floats and read-only float arrays.

    Raises:
        TypeError: A leaf is no number or array.
        ValueError: A leaf holds NaN.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {
            key: check_constraint(f"{name}[{key!r}]", v) for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        leaves = [check_constraint(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return leaves if isinstance(value, list) else tuple(leaves)
    if isinstance(value, str) or not (
        isinstance(value, numbers.Real) or hasattr(value, "__array__")
    ):
        raise TypeError(
            f"`{name}` must be a number, an array, or a dict, list or tuple of these. "
            f"Received: {describe_value(value)}"
        )
    try:
        array = np.array(value)
        if not np.issubdtype(array.dtype, np.floating):
            array = array.astype("float64", casting="safe")
    # Symbolic tensors have no values, and raise a NotImplementedError.
    except (TypeError, ValueError, NotImplementedError):
        raise TypeError(
            f"`{name}` must hold numbers whose values are known. Received: "
            f"{describe_value(value)}"
        ) from None
    if np.isnan(array).any():
        raise ValueError(
            f"`{name}` must not hold NaN. Received: {describe_value(value)}"
        )
    if array.ndim == 0:
        return float(array)
    array.flags.writeable = False
    return array


def classes_rule(classes: int) -> str:
    """Returns the rule for labels of a model, as the beginning of an error."""
    return f"`y` must hold classes from 0 to {classes - 1}"


def unknown_class(rule: str, classes: int, received: str) -> str:
    """Returns the error message for a label that is no class of the model.

    Args:
        rule: The rule for labels, as `classes_rule` begins it.
        classes: Number of classes of the model.
        received: The label.
    """
    return f"{rule}, because the model has {classes} classes. Received: {received}"


def check_mask(mask: Constraint) -> None:
    """Checks that the weights of a mask lie in [0, 1].

    Raises:
        ValueError: One does not.
    """
    for leaf in keras.tree.flatten(mask):
        if leaf is not None and not (np.all(leaf >= 0.0) and np.all(leaf <= 1.0)):
            raise ValueError(
                "`feature_mask` must lie in [0, 1]. Received values from "
                f"{np.min(leaf)} to {np.max(leaf)}"
            )


def check_order(low: Constraint, high: Constraint, path: str = "") -> None:
    """Checks that no minimum of a range is above its maximum.

    Args:
        low: `clip_value_min`, checked by `check_constraint`.
        high: `clip_value_max`, likewise.
        path: Keys of the part of the structure that is checked, for errors.

    Raises:
        ValueError: One is, or the structures or shapes do not fit together.
    """
    if low is None or high is None:
        return
    low_keys, high_keys = _keys(low), _keys(high)
    if low_keys is not None and high_keys is not None:
        if type(low) is not type(high) or (
            not isinstance(low, dict) and low_keys != high_keys
        ):
            raise ValueError(
                f"`clip_value_min{path}` and `clip_value_max{path}` must have the same "
                f"structure. Received: {describe_value(low)} and {describe_value(high)}"
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
            f"Received: {brief(low)} and {brief(high)}"
        )


def check_width(
    name: str, radius: Number | None, norm: Any, low: Constraint, high: Constraint
) -> None:
    """Checks that an L∞ radius is not larger than the clip range, if both are known.

    Args:
        name: Name of the argument that is the radius, for the error.
        radius: The radius. Schedules are not checked.
        norm: A `NormType`. Other norms are not checked.
        low: `clip_value_min`, a number or an array.
        high: `clip_value_max`.

    Raises:
        ValueError: It is larger: no two values of the range are as far apart.
    """
    ends = (low, high)
    if getattr(norm, "value", None) != "infinity" or radius is None:
        return
    if not is_number(radius) or not all(
        is_number(end) or isinstance(end, np.ndarray) for end in ends
    ):
        return
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is never too narrow.
        width = float(np.max(np.subtract(high, low), initial=-math.inf))
    if radius > width * (1 + 1e-6) and width >= 0:
        hint = ""
        if 0 < width < 255:
            hint = (
                ". If that is in units of pixels from 0 to 255, divide it by "
                f"{255 / width:g}"
            )
        raise ValueError(
            f"`{name}` must not be larger than the range from `clip_value_min` to "
            f"`clip_value_max`, which is {width:g} wide. Received: {radius:g}{hint}"
        )


def _keys(constraint: Constraint) -> list | None:
    """Returns the keys of a structure, or `None` for a number or an array."""
    if isinstance(constraint, dict):
        return list(constraint)
    if isinstance(constraint, (list, tuple)):
        return list(range(len(constraint)))
    return None


def describe(features: Features) -> str:
    """Returns types, shapes and dtypes of features, for error messages."""
    described = str(
        tree.map_structure(
            lambda leaf: (
                f"{type(leaf).__name__}(shape={leaf.shape}, dtype={leaf.dtype})"
                if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
                else type(leaf).__name__
            ),
            features,
        )
    )
    described = described.replace('"', "")  # No quotes around what is no string.
    return described if len(described) <= 1000 else f"{described[:1000]}..."
