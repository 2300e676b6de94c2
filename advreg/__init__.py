"""Adversarial regularisation for Keras 3: wrap a model, `compile`, `fit`."""

from advreg import _backend as _backend  # First: it checks Keras's backend.
from advreg import attacks, callbacks
from advreg._version import __version__
from advreg.config import (
    AdvNeighborConfig,
    AdvRegConfig,
    NormType,
    make_adv_reg_config,
)
from advreg.evaluation import evaluate_robustness
from advreg.model import AdversarialRegularization
from advreg.objectives import Objective
from advreg.perturbation import adversarial_loss, gen_adv_neighbor
from advreg.report import RobustnessReport

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
    "evaluate_robustness",
    "gen_adv_neighbor",
    "make_adv_reg_config",
]
