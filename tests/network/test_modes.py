"""Layers that a model without `training` in its `call` leaves in their default mode."""

import warnings

import keras
import numpy as np
import pytest
from helpers.models import cross_entropy, labelled
from keras import layers

from advreg import AdversarialRegularization, make_adv_reg_config
from advreg.network.modes import layers_without_training_argument

pytestmark = pytest.mark.every_backend


class Deaf(keras.Model):
    """Whose `call` takes no `training`, as in many a tutorial."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = list(inside)
        self.dense = layers.Dense(3)

    def call(self, x):
        for layer in self.inside:
            x = layer(x)
        return self.dense(x)


class Hearing(Deaf):
    def call(self, x, training=None):
        for layer in self.inside:
            x = layer(x, training=training)
        return self.dense(x)


class Open(Deaf):
    def call(self, x, **kwargs):
        return super().call(x)


class Noise(layers.Layer):
    def call(self, x, training=False):
        return x


class Plain(layers.Layer):
    def call(self, x):
        return x


def block(*inside):
    return keras.Sequential([keras.Input((6,)), *inside])


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ([layers.Dropout(0.5)], ["Dropout"]),
        ([layers.GaussianNoise(1.0)], ["GaussianNoise"]),
        ([layers.BatchNormalization()], ["BatchNormalization"]),
        ([layers.BatchNormalization(trainable=False)], []),
        ([layers.RandomFlip()], ["RandomFlip"]),
        ([layers.LSTM(2, dropout=0.1)], ["LSTM", "LSTMCell"]),
        ([layers.LSTM(2), layers.GRU(2), layers.RNN(layers.LSTMCell(2))], []),
        ([layers.MultiHeadAttention(2, 2, dropout=0.2)], ["MultiHeadAttention"]),
        ([layers.MultiHeadAttention(2, 2), layers.Attention()], []),
        ([layers.Bidirectional(layers.GRU(2))], []),
        ([layers.Dense(3), layers.Dropout(0.0), layers.Resizing(4, 4)], []),
        ([layers.Lambda(abs), Plain()], []),
        ([block(layers.Dense(3))], []),
        ([block(layers.Dropout(0.5), layers.Dense(3))], ["Dropout"]),
        ([Deaf(layers.Dropout(0.5)), layers.Dropout(0.1)], ["Dropout"]),
        ([Noise(), layers.Dropout(0.5)], ["Dropout", "Noise"]),
        ([], []),
    ],
)
def test_layers_that_are_not_told(inside, expected):
    assert layers_without_training_argument(Deaf(*inside)) == expected
    assert layers_without_training_argument(Hearing(*inside)) == []
    assert layers_without_training_argument(Open(*inside)) == []


def test_models_of_keras_tell_their_layers():
    assert layers_without_training_argument(block(layers.Dropout(0.5))) == []
    inputs = keras.Input((6,))
    assert (
        layers_without_training_argument(
            keras.Model(inputs, layers.Dropout(0.5)(inputs))
        )
        == []
    )


def test_the_wrapper_says_so_once():
    with pytest.warns(UserWarning, match=r"`call` of Deaf takes no.*Dropout") as said:
        AdversarialRegularization(Deaf(layers.Dropout(0.5)))
    assert len(said) == 1
    assert "add `training=None` to `call`" in str(said[0].message)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdversarialRegularization(Hearing(layers.Dropout(0.5)))
        AdversarialRegularization(Deaf(layers.Dense(4)))


@pytest.mark.filterwarnings("ignore:`call` of Deaf takes no")
@pytest.mark.parametrize(("kind", "alike"), [(Deaf, False), (Hearing, True)])
def test_what_is_said_is_true(kind, alike):
    """With `training` in `call` the wrapper trains as Keras does, without it not."""
    x, y = labelled()

    def loss(wrap):
        keras.utils.set_random_seed(0)
        base = kind(layers.Dropout(0.5, seed=1))
        model = base
        if wrap:
            config = make_adv_reg_config(multiplier=0.0)
            model = AdversarialRegularization(base, config)
        model.compile("sgd", cross_entropy())
        return model.fit(x, y, batch_size=12, verbose=0).history["loss"]

    assert np.allclose(loss(True), loss(False)) == alike
