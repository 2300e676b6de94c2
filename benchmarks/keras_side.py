"""What the sides on Keras share, in words that Keras 2 and Keras 3 share.

NSL's environment has neither Keras 3 nor advreg, so that the tutorial's network stands
here once more. A test holds it to `advreg.apps.recipes.mnist_network`.
"""

import pathlib

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from side import CLASSES

CHECKED = 64  # Examples whose logits are compared.
KEPT = pathlib.Path(__file__).with_name("networks")
SHAPES = {"mnist": (28, 28, 1), "resnet": (32, 32, 3), "mlp": (100,), "tiny": (8,)}


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


def make_file(path, network, sizes=None, examples=1024, epochs=None):
    """Writes a file, of random examples unless `epochs` of training on MNIST."""
    keras.utils.set_random_seed(0)
    model = build(network, sizes)
    if epochs is None:
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(examples, *model.input_shape[1:])).astype("float32")
        y = rng.integers(0, model.output_shape[-1], examples)
    else:
        x, y = train(model, epochs)
    x, y = x[:examples], y[:examples].astype("int64")
    weights = {
        f"weights/{layer.name}/{number}": array
        for layer in model.layers
        for number, array in enumerate(layer.get_weights())
    }
    logits = logits_of(model)(x[:CHECKED])
    np.savez(path, x=np.ascontiguousarray(x), y=y, logits=logits, **weights)


def train(model, epochs):
    """Trains a network plainly, unless its weights are kept; returns test data."""
    from advreg import datasets

    data = datasets.load("mnist")
    kept = KEPT / f"compare-mnist-{epochs}.weights.h5"
    if kept.exists():
        model.load_weights(kept)
    elif epochs:
        compiled(model)
        model.fit(data.x_train, data.y_train, epochs=epochs, verbose=0)
        KEPT.mkdir(exist_ok=True)
        model.save_weights(kept)
    return data.x_test, data.y_test


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model):
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return model


def logits_of(model):
    return lambda x: np.asarray(model(x, training=False))


def fresh_copy(model):
    """Returns a copy of a network for which nothing is compiled yet."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def repeated(step, *data):
    """Returns a function that takes steps on one batch."""
    iterator = iter(tf.data.Dataset.from_tensors(data).repeat())

    def run(steps):
        for _ in range(steps):
            logs = step(iterator)
        tf.nest.map_structure(np.asarray, logs)  # Waits for the last step.

    return run


def steps_of(model, *data):
    """Returns a function that trains a compiled model as its `fit` does."""
    model.make_train_function()
    # Keras 2 has a counter besides, and makes its function anew where there is none.
    return repeated(lambda iterator: model.train_function(iterator), *data)


def kinds(wrap=lambda base, job: base, arrange=lambda x, y: (x, y)):
    """Returns the kinds of work that Keras does: training, evaluation, prediction.

    Args:
        wrap: Function from a network and a job to the model that is trained.
        arrange: Function from examples and labels to what `fit` takes.
    """

    def do(job):
        base, (x, y) = load(job), job.data()
        options = {"batch_size": job.batch, "verbose": 0}
        if job.kind != "first_step":
            model = compiled(wrap(base, job))

        def run(count):
            if job.kind == "first_step":
                compiled(wrap(base, job)).fit(*arrange(x, y), **options)
            elif job.kind == "predict":
                model.predict(x[:count], **options)
            else:
                model.evaluate(*arrange(x[:count], y[:count]), **options)

        if job.kind == "step":
            run = steps_of(model, *arrange(x, y))
        return lambda: run, logits_of(base)

    return dict.fromkeys(("step", "evaluate", "predict", "first_step"), do)
