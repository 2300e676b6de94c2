"""Makes the files that all sides work on: examples, labels, weights, logits.

It runs in advreg's environment. Steps of training are timed on random examples and
random weights; attacks on the tutorial's network trained on MNIST, or where that is not
there on scikit-learn's digits, enlarged.
"""

import pathlib

import keras
import numpy as np

from advreg import datasets
from peers import keras_networks
from peers.keras_tasks import compiled, logits_of

CHECKED = 64  # Examples whose logits are compared.


def make(path, network, sizes=None, examples=1024, trained=None):
    """Writes a file.

    Args:
        path: The file.
        network: Name of the network.
        sizes: Arguments of the network.
        examples: Number of examples.
        trained: `None` for random examples and weights; or a dictionary with the
            number of `epochs`, and the `folder` where trained weights are kept.

    Returns:
        A dictionary of what to tell: the name of the data and the accuracy.
    """
    keras.utils.set_random_seed(0)
    model = keras_networks.build(network, sizes)
    if trained is None:
        x, y = random_data(model, examples)
        told = {"data": "random"}
    else:
        x, y, told = train(model, **trained)
    x, y = x[:examples], y[:examples]
    arrays = {
        "x": np.ascontiguousarray(x, "float32"),
        "y": np.ascontiguousarray(y, "int64"),
        "logits": logits_of(model)(x[:CHECKED]),
    }
    np.savez(path, **arrays, **keras_networks.weights_of(model))
    return told | {"examples": len(x)}


def random_data(model, examples):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(examples, *model.input_shape[1:]))
    y = rng.integers(0, model.output_shape[-1], examples)
    return x.astype("float32"), y


def train(model, epochs, folder):
    """Trains a network plainly, unless its weights are kept; returns test data."""
    data, x_train, x_test = images()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"compare-{data.name}-{epochs}.weights.h5"
    if kept.exists():
        model.load_weights(kept)  # While no optimizer misses its own.
    compiled(model)
    if not kept.exists():
        model.fit(x_train, data.y_train, batch_size=32, epochs=epochs, verbose=0)
        model.save_weights(kept)
    _, accuracy = model.evaluate(x_test, data.y_test, batch_size=250, verbose=0)
    return x_test, data.y_test, {"data": data.name, "clean accuracy": accuracy}


def images():
    """MNIST, or else digits made as large: the data, training and test images."""
    try:
        data = datasets.load("mnist")
    except (datasets.DatasetError, ImportError):
        data = datasets.load("digits")
        return data, enlarged(data.x_train), enlarged(data.x_test)
    return data, data.x_train, data.x_test


def enlarged(x):
    """Images of 8×8 pixels as 28×28: each pixel thrice, and a border."""
    x = x.repeat(3, axis=1).repeat(3, axis=2)
    return np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
