"""The norms in which a perturbation is measured."""

from __future__ import annotations

import enum
import math
import numbers
from typing import Any

from advreg.checks import brief


class NormType(str, enum.Enum):
    """The norm in which a perturbation is measured: `"l1"`, `"l2"` or `"infinity"`.

    `NormType(value)` also accepts `"linf"`, `"inf"`, `1`, `2` and `np.inf`.

    Raises:
        ValueError: The value is none of these.

    Example:
    >>> NormType("linf")
    <NormType.INFINITY: 'infinity'>
    """

    L1 = "l1"
    L2 = "l2"
    INFINITY = "infinity"

    @property
    def symbol(self) -> str:
        """Name of the norm in texts and figures: L1, L2 or L∞."""
        return {"l1": "L1", "l2": "L2"}.get(self.value, "L∞")

    @property
    def order(self) -> float:
        """Order of the norm as NumPy and ART take it: 1, 2 or infinity."""
        return {"l1": 1, "l2": 2}.get(self.value, math.inf)

    @classmethod
    def all(cls) -> list[NormType]:
        """Returns all norms."""
        return list(cls)

    @classmethod
    def _missing_(cls, value: object) -> NormType:
        aliases = {"linf": "infinity", "inf": "infinity"}
        if isinstance(value, str):
            name = aliases.get(value.lower(), value.lower())
            for norm in cls:
                if norm.value == name:
                    return norm
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            orders: dict[Any, NormType] = {1: cls.L1, 2: cls.L2, math.inf: cls.INFINITY}
            if value in orders:
                return orders[value]
        raise ValueError(_rule("norm", value))


def check_norm(name: str, value: Any) -> NormType:
    """Checks that a value is a norm, and returns it as a `NormType`.

    Args:
        name: Name of the argument, for the error.
        value: The value.

    Raises:
        ValueError: It is no norm.
    """
    try:
        return NormType(value)
    except (TypeError, ValueError):  # Some values cannot be compared with the names.
        raise ValueError(_rule(name, value)) from None


def _rule(name: str, value: Any) -> str:
    return (
        f"`{name}` must be one of 'l1', 'l2' and 'infinity' (or 'linf', 'inf', 1, 2, "
        f"np.inf). Received: {brief(value)}"
    )
