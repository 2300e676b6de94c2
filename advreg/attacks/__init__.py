"""Attacks to evaluate with: hyperparameters that are called with a model and data."""

from advreg.attacks.base import Attack
from advreg.attacks.gradient import BIM, FGSM, PGD

__all__ = ["BIM", "FGSM", "PGD", "Attack"]
