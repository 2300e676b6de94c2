"""Interception of a layer's method, for each kind of model and each way to run it."""

import itertools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import rows
from keras import layers, ops

from advreg.backend.parts import Parts
from advreg.network.taps import intercepted

X = rows(5, 4)


class Subclassed(keras.Model):
    def __init__(self, inner, times=1):
        super().__init__()
        self.inner, self.last, self.times = inner, layers.Dense(2), times

    def call(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return self.last(x)


def functional(layer, times=1):
    x = inputs = keras.Input((4,))
    for _ in range(times):
        x = layer(x)
    return keras.Model(inputs, layers.Dense(2)(x))


def nested(layer):
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layer])
    middle = keras.Sequential([keras.Input((4,)), inner])
    return keras.Model(inputs, layers.Dense(2)(middle(inputs)))


MODELS = {
    "functional": functional,
    "sequential": lambda layer: keras.Sequential(
        [keras.Input((4,)), layer, layers.Dense(2)]
    ),
    "nested": nested,
    "subclassed": Subclassed,
}
WAYS = {
    "eager": lambda function: function,
    "tf.function": lambda function: tf.function(function),
    "xla": lambda function: tf.function(function, jit_compile=True),
}


def add(amount):
    return lambda call, *args, **kwargs: call(*args, **kwargs) + amount


def made(kind):
    layer = layers.Dense(4, activation="tanh")
    model = MODELS[kind](layer)
    model(X)
    return model, layer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_added_to_an_output_goes_on_from_there(kind, way):
    model, layer = made(kind)
    last = [one for one in model.layers if isinstance(one, layers.Dense)][-1]
    expected = last(layer(X) + 0.5)
    with intercepted(layer, "call", add(0.5)):
        moved = WAYS[way](lambda x: model(x))(tf.constant(X))
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert "call" not in vars(layer)
    np.testing.assert_allclose(model(X), last(layer(X)), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_reaches_what_is_added(way):
    model, layer = made("nested")
    delta = tf.Variable(tf.zeros((5, 4)))

    def gradient(x):
        with tf.GradientTape() as tape, intercepted(layer, "call", add(delta)):
            loss = tf.reduce_sum(model(x) ** 2)
        return tape.gradient(loss, delta)

    with tf.GradientTape() as tape:
        hidden = layer(X)
        tape.watch(hidden)
        loss = tf.reduce_sum(model.layers[-1](hidden) ** 2)
    expected = tape.gradient(loss, hidden)
    np.testing.assert_allclose(WAYS[way](gradient)(tf.constant(X)), expected, rtol=1e-5)


@pytest.mark.parametrize("make", [functional, Subclassed])
def test_each_call_of_a_layer_that_is_called_several_times(make):
    layer, seen = layers.Dense(4), []
    model = make(layer, times=3)
    model(X)

    def record(call, inputs, **kwargs):
        outputs = call(inputs, **kwargs)
        seen.append((inputs, outputs))
        return outputs

    with intercepted(layer, "call", record):
        model(X)
    assert len(seen) == 3
    for (_, before), (after, _) in itertools.pairwise(seen):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "last",
    [
        lambda: [layers.Dense(3, activation="softmax")],
        lambda: [layers.Dense(3), layers.Activation("softmax")],
        lambda: [layers.Dense(1, activation="sigmoid")],
    ],
    ids=["softmax", "activation", "sigmoid"],
)
def test_the_logits_behind_a_last_activation_are_what_it_receives(last, way):
    model = keras.Sequential([keras.Input((4,)), *last()])

    def logits(x):
        seen = []

        def record(activation, values):
            seen.append(values)
            return activation(values)

        with intercepted(model.layers[-1], "activation", record):
            model(x)
        return seen[0]

    dense = model.layers[0]
    expected = X @ dense.kernel.numpy() + dense.bias.numpy()
    found = WAYS[way](logits)(tf.constant(X))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.layers[-1].activation in {
        keras.activations.softmax,
        keras.activations.sigmoid,
    }


def test_an_arithmetic_is_replaced_in_half_precision():
    layer = layers.Dense(3, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), layer])

    def twice(call, inputs, **kwargs):
        assert inputs.dtype == tf.float16
        return 2 * call(inputs, **kwargs)

    plain = model(X)
    with intercepted(layer, "call", twice):
        doubled = model(X)
    assert doubled.dtype == tf.float16
    np.testing.assert_array_equal(doubled, 2 * plain)


def test_of_two_handlers_the_inner_one_comes_first():
    model, layer = made("functional")
    order = []

    def note(name):
        def handler(call, *args, **kwargs):
            order.append(name)
            return call(*args, **kwargs)

        return handler

    with intercepted(layer, "call", note("outer")):
        with intercepted(layer, "call", note("inner")):
            model(X)
        model(X)
    assert order == ["inner", "outer", "outer"]
    assert "call" not in vars(layer)


def test_after_an_exception_nothing_stays():
    model, layer = made("sequential")
    before = dict(vars(layer))

    def fail(call, *args, **kwargs):
        raise ArithmeticError("as it is")

    with pytest.raises(ArithmeticError), intercepted(layer, "call", fail):
        model(X)
    assert vars(layer) == before


def test_a_function_of_the_user_s_own_is_called_and_stays():
    _, layer = made("functional")

    def own(inputs, **kwargs):
        return ops.ones((5, 4))

    vars(layer)["call"] = own
    with intercepted(layer, "call", add(1.0)):
        np.testing.assert_array_equal(layer(X), np.full((5, 4), 2.0))
    assert vars(layer)["call"] is own


def test_threads_do_not_hear_each_other():
    model, layer = made("functional")
    plain = model(X).numpy()
    entered, measured = threading.Event(), threading.Event()
    found = {}

    def intercepting():
        with intercepted(layer, "call", add(0.5)):
            entered.set()
            assert measured.wait(10)
            found["with"] = model(X).numpy()

    thread = threading.Thread(target=intercepting)
    thread.start()
    assert entered.wait(10)
    found["without"] = model(X).numpy()
    # Another thread that intercepts meanwhile leaves the first one its handler.
    with intercepted(layer, "call", add(2.0)):
        found["other"] = model(X).numpy()
    measured.set()
    thread.join()
    np.testing.assert_array_equal(found["without"], plain)
    assert (found["with"] != plain).any()
    assert (found["other"] != found["with"]).any()
    assert "call" not in vars(layer)


def test_a_model_that_is_looked_at_meanwhile_has_not_changed():
    model, layer = made("functional")
    layer.activation = keras.activations.tanh
    before = Parts(model)
    with (
        intercepted(layer, "call", add(0.0)),
        intercepted(layer, "activation", lambda function, x: function(x)),
    ):
        assert not before.differences(Parts(model))
    assert before.same_objects(model)


def test_saving_and_export_see_nothing(tmp_path):
    model, layer = made("functional")
    expected = model(X).numpy()
    with intercepted(layer, "call", add(0.5)):
        model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(X), expected, atol=1e-6)
