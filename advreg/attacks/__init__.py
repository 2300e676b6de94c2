"""Attacks to evaluate models with: objects that are called with a model and data.

Comes in: a model, inputs and labels. Goes out: perturbed inputs, as NumPy arrays. An
attack object holds hyperparameters only, so that a report can bind the same object to a
model and run it over all data.

Read in this order:

- `attack`: the base class, and how an attack is called.
- `fgsm`, `pgd`, `apgd`, `square` and so on: one file for each attack, with its
  hyperparameters and its solver.
- `engine`: runs solvers.
- `substitution`: replaces tokens, which lie in no ball.
- `foreign`: callables that are not advreg's own.
- `transfer`: attacks one model with examples that were made for another.
- `art`: the bridge to the Adversarial Robustness Toolbox.
"""

from advreg.attacks.apgd import APGD
from advreg.attacks.art.attack import ART
from advreg.attacks.attack import Attack
from advreg.attacks.auto_attack import AutoAttack
from advreg.attacks.bim import BIM
from advreg.attacks.fgsm import FGSM
from advreg.attacks.pgd import PGD
from advreg.attacks.random_noise import RandomNoise
from advreg.attacks.square import Square
from advreg.attacks.substitution import RandomSubstitution, TokenSubstitution
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
    "RandomSubstitution",
    "Square",
    "TokenSubstitution",
    "Transfer",
]
