"""The networks: for each a Keras model, its features, and its labels."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from nsl_cases.common import BATCH, floats, rng


def set_weights(model, seed=0):
    """Draws weights of a sensible scale, layer by layer in the order of names."""
    generator = rng(seed)
    for layer in sorted(model.layers, key=lambda layer: layer.name):
        layer.set_weights(
            [
                floats(generator.normal(size=w.shape) / np.sqrt(np.prod(w.shape[:-1])))
                for w in layer.get_weights()
            ]
        )
    return model


def weights_of(model):
    return {
        f"{layer.name}/{number}": weight
        for layer in model.layers
        for number, weight in enumerate(layer.get_weights())
    }


def mlp(rows=BATCH):
    """Six values, three classes."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    model = keras.Model(x, layers.Dense(3, name="logits")(hidden))
    features = {"values": floats(rng(1).uniform(size=(rows, 6)))}
    return set_weights(model), features, rng(2).integers(3, size=(rows, 1))


def cnn(rows=BATCH):
    """Grey images of 8 x 8, ten classes."""
    x = keras.Input((8, 8, 1), name="image")
    hidden = layers.Conv2D(4, 3, activation="relu", name="convolution")(x)
    hidden = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(hidden))
    model = keras.Model(x, layers.Dense(10, name="logits")(hidden))
    features = {"image": floats(rng(3).uniform(size=(rows, 8, 8, 1)))}
    return set_weights(model), features, rng(4).integers(10, size=(rows, 1))


def two_inputs(rows=BATCH):
    """A row and a small image under names whose order is not that of the inputs."""
    row, patch = keras.Input((5,), name="row"), keras.Input((2, 3), name="patch")
    left = layers.Dense(7, name="of_row")(row)
    right = layers.Dense(7, name="of_patch")(layers.Flatten(name="flat")(patch))
    hidden = layers.Activation("tanh", name="tanh")(
        layers.Add(name="sum")([left, right])
    )
    model = keras.Model([row, patch], layers.Dense(3, name="logits")(hidden))
    generator = rng(5)
    features = {
        "row": floats(generator.uniform(size=(rows, 5))),
        "patch": floats(generator.uniform(size=(rows, 2, 3))),
    }
    return set_weights(model), features, rng(6).integers(3, size=(rows, 1))


def two_outputs(rows=BATCH):
    """Three classes, and a number."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    outputs = [layers.Dense(3, name="kind")(hidden), layers.Dense(1, name="size")(x)]
    model = keras.Model(x, outputs)
    features = {"values": floats(rng(7).uniform(size=(rows, 6)))}
    labels = {
        "kind_label": rng(8).integers(3, size=(rows, 1)),
        "size_label": floats(rng(9).uniform(size=(rows, 1))),
    }
    return set_weights(model), features, labels


def classes_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def predictor(model):
    """The model as a function of a dictionary, which Keras 2 and 3 read alike."""
    names = [tensor.name.split(":")[0] for tensor in model.inputs]

    def predict(features, **kwargs):
        inputs = [features[name] for name in names]
        return model(inputs if len(inputs) > 1 else inputs[0], **kwargs)

    return predict


def tensors(features):
    return {name: tf.constant(value) for name, value in features.items()}


def tree_floats(values):
    return {name: floats(value) for name, value in values.items()}
