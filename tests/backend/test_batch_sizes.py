"""Compiled functions take batches of every size, whatever they do about it inside."""

import keras
import numpy as np
import pytest
from helpers.models import rows
from keras import layers

from advreg.attacks import FGSM

pytestmark = pytest.mark.every_backend(tensorflow="slow")
X, Y = rows(11, 6), np.arange(11) % 3
ATTACK = FGSM(0.1)


def network(batch_size=None):
    model = keras.Sequential(
        [keras.Input((6,), batch_size=batch_size), layers.Dense(3)]
    )
    model.set_weights([rows(6, 3, seed=1), np.zeros(3)])
    return model


@pytest.fixture(scope="module")
def expected():
    return ATTACK(network(), X, Y, batch_size=11)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
def test_the_first_batch_may_have_any_size(size, expected):
    found = ATTACK(network(), X, Y, batch_size=size)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_later_batches_may_have_another_size(expected):
    model = network()
    for size in (7, 8, 11, 5, 2, 1):
        found = ATTACK(model, X, Y, batch_size=size)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("fixed", [4, 5, 7])
@pytest.mark.parametrize("size", [3, 32])
def test_a_network_for_one_size(fixed, size, expected):
    found = ATTACK(network(fixed), X, Y, batch_size=min(size, fixed))
    np.testing.assert_allclose(found, expected, atol=1e-6)
