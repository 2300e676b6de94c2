"""Adversarial regularisation for Keras 3: wrap a model, `compile`, `fit`.

The names are loaded when they are asked for, but `import advreg` already checks
Keras's backend, and registers the classes of wrapped models: Keras loads a saved model
only if its classes are registered.

The command `advreg` is the exception, because its help must not wait for TensorFlow.
The command does both when it needs Keras. Python imports this file before any other of
the package, so that only the arguments of the process show that it is the command.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advreg._version import __version__

if TYPE_CHECKING:
    from advreg import attacks as attacks
    from advreg import callbacks as callbacks
    from advreg import datasets as datasets
    from advreg import nsl as nsl
    from advreg import objectives as objectives
    from advreg import plots as plots
    from advreg.config.configs import (
        AdvNeighborConfig,
        AdvRegConfig,
        make_adv_reg_config,
    )
    from advreg.config.norms import NormType
    from advreg.evaluation.features import perturbed_features
    from advreg.evaluation.report import RobustnessReport
    from advreg.evaluation.robustness import evaluate_robustness
    from advreg.objectives import Objective
    from advreg.training.custom_loops import adversarial_loss, gen_adv_neighbor
    from advreg.training.displaced import displaced
    from advreg.training.model import AdversarialRegularization

__all__ = [
    "AdvNeighborConfig",
    "AdvRegConfig",
    "AdversarialRegularization",
    "NormType",
    "Objective",
    "RobustnessReport",
    "__version__",
    "adversarial_loss",
    "attacks",
    "callbacks",
    "displaced",
    "evaluate_robustness",
    "gen_adv_neighbor",
    "make_adv_reg_config",
    "perturbed_features",
]

_MODULES = ("attacks", "callbacks", "datasets", "nsl", "objectives", "plots")
_MODULE_OF = {
    "AdvNeighborConfig": "config.configs",
    "AdvRegConfig": "config.configs",
    "AdversarialRegularization": "training.model",
    "NormType": "config.norms",
    "Objective": "objectives",
    "RobustnessReport": "evaluation.report",
    "adversarial_loss": "training.custom_loops",
    "displaced": "training.displaced",
    "evaluate_robustness": "evaluation.robustness",
    "gen_adv_neighbor": "training.custom_loops",
    "make_adv_reg_config": "config.configs",
    "perturbed_features": "evaluation.features",
}


if not TYPE_CHECKING:  # Type checkers read the imports above, and report other names.

    def __getattr__(name: str) -> Any:
        """Loads a public name, or a public module."""
        if name in _MODULES:
            return importlib.import_module(f"advreg.{name}")
        if name in _MODULE_OF:
            return getattr(importlib.import_module(f"advreg.{_MODULE_OF[name]}"), name)
        raise AttributeError(f"module 'advreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted({*__all__, *_MODULES})


def _is_command() -> bool:
    """Returns whether this process is `advreg` or `python -m advreg`."""
    program, *arguments = getattr(sys, "argv", None) or [""]
    if program != "-m":
        return Path(program).stem == "advreg"
    # Python has not found the module yet. Its name comes before its arguments.
    return sys.orig_argv[-1 - len(arguments) :][:1] == ["advreg"]


if not _is_command():
    importlib.import_module("advreg.backend.check")
    importlib.import_module("advreg.training.model")
