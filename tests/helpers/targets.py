"""Models to attack, trained in seconds, and what must hold of any attack on them."""

import functools

import keras
import numpy as np
from keras import layers

from advreg import backend, datasets
from advreg.apps import recipes
from advreg.attacks.engine.runner import run
from helpers.backends import array, tensor

UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}
ORDERS = {"l2": 2, "infinity": np.inf}


@functools.cache
def digits():
    """A network that knows scikit-learn's digits, and 120 of them that it gets right.

    Tests must not change it.
    """
    data = datasets.load("digits")
    keras.utils.set_random_seed(0)
    network = recipes.digits_network(data.x_train.shape[1:], 10)
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    network.fit(data.x_train, data.y_train, epochs=8, verbose=0)
    right = predicted(network, data.x_test) == data.y_test
    return network, data.x_test[right][:120], data.y_test[right][:120]


def saturated(network):
    """The same decisions, with logits so far apart that the softmax is 0 or 1."""
    scaled = layers.Rescaling(10_000.0)(network.outputs[0])
    return keras.Model(network.inputs[0], scaled)


class Quantise(layers.Layer):
    def call(self, inputs):
        return keras.ops.round(inputs * 8) / 8


def quantised(network):
    """The same network behind a layer that has no gradient."""
    inputs = keras.Input(network.input_shape[1:])
    return keras.Model(inputs, network(Quantise()(inputs)))


def predicted(network, x):
    return network.predict_on_batch(x).argmax(1)


def accuracy(network, x, y):
    return np.mean(predicted(network, x) == y)


def left_by(attack, network, x, y):
    return accuracy(network, attack(network, x, y, batch_size=60), y)


def assert_allowed(x_adv, x, epsilon, norm, low=0.0, high=1.0):
    """Asserts that examples lie in the ball, to within roundings, and in the range."""
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= low
    assert x_adv.max() <= high
    moved = (x_adv.astype("float64") - x).reshape(len(x), -1)
    assert np.linalg.norm(moved, ORDERS[norm], axis=1).max() <= epsilon + 1e-6


def assert_sound(attack, seed):
    """Asserts that what an attack finds is allowed, and fools if it says so."""
    network, x, y = digits()
    x, y = x[:12], y[:12]
    problem = attack.problem(network)
    rows = attack.batch(problem, tensor(x), tensor(y))
    solver = attack.solvers(problem)[0]
    outcome = run(solver, problem, rows, keras.random.SeedGenerator(seed))
    x_adv = array(problem.ball(rows).perturbed(tensor(outcome.displacement)))
    assert_allowed(x_adv, x, attack.epsilon, attack.norm.value)
    np.testing.assert_array_equal(predicted(network, x_adv) != y, outcome.fooled)


def tracings(network):
    """The keys of what attacks have compiled for a model, each traced once."""
    return backend.functions_of(network).keys
