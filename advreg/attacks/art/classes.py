"""Finds the classes of ART's evasion attacks, and their arguments."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import numpy as np

from advreg._extras import import_extra
from advreg.attacks.art.estimators import EXTRA, evasion
from advreg.checks import brief, describe_value


def attack_class(attack: Any) -> Any:
    """Finds a class of ART's evasion attacks.

    Raises:
        TypeError: It is no such class.
        ValueError: There is none of that name.
    """
    module = evasion()
    base = import_extra("art.attacks", EXTRA).EvasionAttack
    if isinstance(attack, str):
        names = [
            name
            for name, cls in vars(module).items()
            if inspect.isclass(cls) and issubclass(cls, base)
        ]
        if attack not in names:
            numba = " It needs the package numba." if "Brendel" in attack else ""
            raise ValueError(
                "`attack` must be the name of a class in `art.attacks.evasion`."
                f"{similar(attack, names)}{numba} Received: {brief(attack)}"
            )
        return getattr(module, attack)
    if not inspect.isclass(attack) or not issubclass(attack, base):
        raise TypeError(
            "`attack` must be a class from `art.attacks.evasion`, or its name; other "
            "attacks of ART give no adversarial examples. Received: "
            f"{describe_value(attack)}"
        )
    return attack


def parameters_of(attack: Any) -> dict[str, Any]:
    """Returns the arguments of an attack after the classifier, and their defaults."""
    parameters = list(inspect.signature(attack).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def plain(value: Any) -> Any:
    """Converts a NumPy scalar to a Python number, because ART's checks refuse it."""
    return value.item() if isinstance(value, np.generic) else value


def similar(name: str, names: Any) -> str:
    """Returns a sentence with the most similar name, empty if there is none."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {found[0]!r}?" if found else ""
