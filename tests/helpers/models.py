"""Small models and data that several test files share."""

import keras
import numpy as np
from keras import layers, ops

from advreg import AdversarialRegularization


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def aligned(array):
    """A copy at an address from which TensorFlow takes arrays without copying them."""
    memory = np.empty(array.nbytes + 64, "uint8")
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def classifier(**kwargs):
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(3),
        ],
        **kwargs,
    )


def busy_base():
    """Regularised, normalised, and with dropout."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )


def two_outputs(names=False, width=6):
    inputs = keras.Input((width,))
    hidden = layers.Dense(5, "tanh")(inputs)
    heads = [layers.Dense(3, name="a")(hidden), layers.Dense(2, name="b")(hidden)]
    return keras.Model(inputs, dict(zip("ab", heads, strict=True)) if names else heads)


def labelled(batch=12, width=6, classes=3):
    labels = np.random.default_rng(1).integers(0, classes, batch)
    return rows(batch, width), labels


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def regularized(base, config=None, loss=None, optimizer="sgd", **kwargs):
    model = AdversarialRegularization(base, config)
    model.compile(optimizer, cross_entropy() if loss is None else loss, **kwargs)
    return model


class Subclassed(keras.Model):
    """Takes any structure of float inputs and says what it received."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)
        self.received = None

    def call(self, inputs, training=False):
        self.received = keras.tree.map_structure(lambda leaf: 0, inputs)
        leaves = keras.tree.flatten(inputs)
        return self.dense(ops.concatenate(leaves, axis=-1))


X, Y = labelled()
LEFT, RIGHT = X[:, :2], X[:, 2:]
