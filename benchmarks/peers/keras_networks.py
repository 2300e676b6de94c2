"""The networks, in words that Keras 2 and Keras 3 share.

NSL's environment has neither Keras 3 nor advreg, so that `mnist` stands here once more;
a test holds it to `advreg.demo.mnist_network`.
"""

import keras
from keras import layers

from peers.job import CLASSES

SHAPES = {
    "mnist": (28, 28, 1),
    "resnet": (32, 32, 3),
    "mlp": (100,),
    "tiny": (8,),
}


def build(network, sizes=None):
    """Makes a network whose outputs are logits."""
    inputs = keras.Input(SHAPES[network], name="image")
    return keras.Model(inputs, NETWORKS[network](inputs, **(sizes or {})))


def load(job):
    """Makes the network of a job, with its weights."""
    model = build(job.network, job.sizes)
    for name, arrays in job.weights().items():
        model.get_layer(name).set_weights(arrays)
    return model


def weights_of(model):
    """The weights of a network under the names that a file has them by."""
    return {
        f"weights/{layer.name}/{number}": array
        for layer in model.layers
        for number, array in enumerate(layer.get_weights())
    }


def mnist(x):
    """The network of NSL's tutorial on MNIST."""
    for number, filters in enumerate((32, 64, 64), 1):
        x = layers.Conv2D(filters, 3, activation="relu", name=f"conv{number}")(x)
        if number < 3:
            x = layers.MaxPooling2D()(x)
    x = layers.Dense(64, activation="relu", name="dense")(layers.Flatten()(x))
    return layers.Dense(CLASSES, name="logits")(x)


def resnet(x):
    """Three residual blocks with batch normalisation, halved between them."""
    x = layers.ReLU()(convolution(x, 16, "stem"))
    for number, filters in enumerate((16, 32, 64), 1):
        if number > 1:
            x = layers.AveragePooling2D(2)(x)
        x = block(x, filters, f"block{number}")
    x = layers.GlobalAveragePooling2D()(x)
    return layers.Dense(CLASSES, name="logits")(x)


def block(x, filters, name):
    shortcut = x
    if x.shape[-1] != filters:
        shortcut = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_short")(x)
    x = layers.ReLU()(convolution(x, filters, f"{name}_a"))
    x = convolution(x, filters, f"{name}_b")
    return layers.ReLU()(layers.add([x, shortcut]))


def convolution(x, filters, name):
    """A convolution and its batch normalisation."""
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
    return layers.BatchNormalization(name=f"{name}_norm")(x)


def mlp(x, width=256, depth=2):
    for number in range(1, depth + 1):
        x = layers.Dense(width, activation="relu", name=f"dense{number}")(x)
    return layers.Dense(CLASSES, name="logits")(x)


def tiny(x):
    """Two layers of eight."""
    x = layers.Dense(8, activation="relu", name="dense")(x)
    return layers.Dense(8, name="logits")(x)


NETWORKS = {"mnist": mnist, "resnet": resnet, "mlp": mlp, "tiny": tiny}
