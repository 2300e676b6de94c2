import keras
import numpy as np
import pytest
from helpers.models import classifier, labelled, regularized
from helpers.slow import slow_on_jax
from helpers.targets import UNIT, accuracy, digits

from advreg.attacks import PGD, Transfer
from advreg.config.norms import NormType

pytestmark = pytest.mark.every_backend


@pytest.fixture
def source():
    """A linear model of the same digits, known as `weak`."""
    _, x, y = digits()
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(10)],
        name="weak",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.fit(x, y, epochs=20, verbose=0)
    return model


@slow_on_jax
def test_examples_are_those_that_fool_the_source(source):
    network, x, y = digits()
    attack = PGD(0.2, iterations=10, seed=0, **UNIT)
    moved = Transfer(attack, source)(network, x, y, batch_size=50)
    expected = attack(source, x, y, batch_size=50, early_stop=False)
    np.testing.assert_array_equal(moved, expected)
    assert accuracy(source, moved, y) < 0.2
    direct = accuracy(network, attack(network, x, y), y)
    assert direct < accuracy(network, moved, y) < 1.0


@slow_on_jax
def test_what_reports_ask_of_it(source):
    attack = PGD(0.15, norm="l2", step_size=0.03, targeted=True, **UNIT)
    transfer = Transfer(attack, source)
    assert transfer.name == "PGD-40 on weak"
    assert transfer.epsilon == 0.15
    assert transfer.norm is NormType.L2
    assert (transfer.clip_value_min, transfer.clip_value_max) == (0.0, 1.0)
    assert transfer.targeted
    assert transfer.iterations_per_start == 40
    assert not transfer.uses_gradient
    wider = transfer.with_epsilon(0.3)
    assert wider.epsilon == 0.3
    assert wider.attack.step_size == pytest.approx(0.06)
    assert wider.source_model is source


def test_labels_in_a_dictionary_are_taken_out_as_the_model_would():
    x, y = labelled()
    wrapped = regularized(classifier())
    other = classifier()
    attack = PGD(0.5, iterations=3, seed=0)
    moved = Transfer(attack, other)(wrapped, {"feature": x, "label": y})
    assert list(moved) == ["feature"]
    expected = attack(other, x, y, early_stop=False)
    np.testing.assert_array_equal(moved["feature"], expected)


def test_an_attack_of_the_user_s_own(source):
    def shift(model, x, y, *, batch_size):
        assert model is source
        return np.asarray(x) + 1

    network, x, y = digits()
    transfer = Transfer(shift, source)
    np.testing.assert_array_equal(transfer(network, x, y), x + 1)
    assert transfer.name == "shift on weak"
    assert transfer.epsilon is None
    assert transfer.norm is None
    assert not transfer.targeted
    with pytest.raises(TypeError, match=r"`epsilon` cannot be set.*Received: attack="):
        transfer.with_epsilon(0.1)


def test_bad_arguments(source):
    with pytest.raises(TypeError, match=r"`attack` must be an attack.*Received: 0.3"):
        Transfer(0.3, source)
    with pytest.raises(
        TypeError, match=r"`attack` must be an attack.*Received: <class"
    ):
        Transfer(PGD, source)
    with pytest.raises(TypeError, match=r"`source_model` must be a Keras.*: 'weak'"):
        Transfer(PGD(0.1), "weak")
    with pytest.raises(TypeError, match=r"`model` must be a Keras 3 model.*None"):
        Transfer(PGD(0.1), source)(None, np.ones((2, 8, 8, 1)), np.zeros(2))
