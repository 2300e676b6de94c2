"""Attacks to evaluate with: hyperparameters that are called with a model and data."""

from advreg.attacks.apgd import APGD
from advreg.attacks.art import ART
from advreg.attacks.auto import AutoAttack
from advreg.attacks.base import Attack
from advreg.attacks.gradient import BIM, FGSM, PGD
from advreg.attacks.noise import RandomNoise
from advreg.attacks.square import Square
from advreg.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "ART",
    "BIM",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "RandomNoise",
    "Square",
    "Transfer",
]
