"""Explains names that Neural Structured Learning has and advreg has not."""

from collections.abc import Callable, Mapping
from typing import NoReturn

_STILL_RUNS = (
    "is no part of advreg, which is for adversarial learning. NSL 1.4.0 still runs, in "
    "an environment of its own with Python 3.11, TensorFlow 2.15 and numpy < 2"
)
GRAPHS = f"graph regularisation {_STILL_RUNS}"
FUSION = f"multimodal fusion {_STILL_RUNS}"
ESTIMATORS = (
    "TensorFlow 2.16 and later have no Estimators. Build the network as a Keras model "
    "and wrap it: `nsl.keras.AdversarialRegularization(model, ...)`"
)


def absent(module: str, reasons: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Makes the `__getattr__` of a module, whose error says why a name is missing.

    Args:
        module: Name of the module.
        reasons: For each missing name of Neural Structured Learning, why advreg does
            not have it, and what to use instead.
    """

    def look_up(name: str) -> NoReturn:
        reason = f": {reasons[name]}." if name in reasons else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{reason}")

    return look_up
