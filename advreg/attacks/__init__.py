"""Attacks to evaluate with: hyperparameters that are called with a model and data."""

from advreg.attacks.art import ART
from advreg.attacks.base import Attack
from advreg.attacks.gradient import BIM, FGSM, PGD

__all__ = ["ART", "BIM", "FGSM", "PGD", "Attack"]
