"""What an attack that is not advreg's own says of itself is read once."""

import keras
import numpy as np
import pytest

from advreg.attacks import FGSM, PGD, Transfer
from advreg.attacks.foreign import ForeignAttack, as_attack
from advreg.config.norms import NormType

pytestmark = pytest.mark.every_backend


def shift(model, x, y):
    return x + 0.1


class Described:
    epsilon, norm, seed = np.float32(0.25), "linf", 3
    clip_value_min, clip_value_max = 0.0, 1.0
    uses_gradient, iterations_per_start = False, 7

    def __init__(self, epsilon=0.25):
        self.epsilon = epsilon

    def __call__(self, model, x, y, batch_size=32):
        return x

    def with_epsilon(self, epsilon):
        return Described(epsilon)

    def __repr__(self):
        return f"Described({self.epsilon})"


def test_an_attack_of_advreg_comes_back_as_it_is():
    attack = PGD(0.1)
    assert as_attack(attack) is attack
    assert attack.is_native


def test_nothing_is_known_of_a_bare_function():
    attack = as_attack(shift)
    assert (attack.name, attack.epsilon, attack.norm) == ("shift", None, None)
    assert (attack.targeted, attack.uses_gradient) == (False, None)
    assert attack.iterations_per_start == 1
    assert not attack.is_native
    assert not attack.has_radius
    assert repr(attack) == repr(shift)


def test_what_an_object_says_is_believed():
    attack = as_attack(Described())
    assert attack.name == "Described"
    assert (attack.epsilon, attack.norm) == (0.25, NormType.INFINITY)
    assert (attack.clip_value_min, attack.clip_value_max) == (0.0, 1.0)
    assert (attack.uses_gradient, attack.iterations_per_start) == (False, 7)
    assert repr(attack) == "Described(0.25)"
    assert attack.has_radius
    larger = attack.with_epsilon(0.5)
    assert isinstance(larger, ForeignAttack)
    assert (larger.epsilon, larger.attack.epsilon) == (0.5, 0.5)
    assert as_attack(attack) is attack


def test_a_transfer_has_the_radius_of_its_attack():
    source = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)], name="source")
    attack = as_attack(Transfer(FGSM(0.1, norm="l2"), source))
    assert attack.name == "FGSM on source"
    assert (attack.epsilon, attack.norm) == (0.1, NormType.L2)
    assert attack.uses_gradient is False
    assert attack.with_epsilon(0.3).attack.attack.epsilon == 0.3


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (PGD, TypeError, "must be an object such as .* not a class.*PGD"),
        ("pgd", TypeError, "Received: 'pgd'"),
        (Described("far"), TypeError, "`epsilon` must be a number.*'far'"),
        (Described(-1), ValueError, "`epsilon` must be finite and not negative.*-1"),
        (type("Odd", (Described,), {"norm": 3})(), ValueError, "`norm` must be one"),
    ],
    ids=["class", "name", "radius", "negative", "norm"],
)
def test_what_is_no_attack(attack, error, message):
    with pytest.raises(error, match=message):
        as_attack(attack)
