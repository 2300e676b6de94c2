import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.slow import slow
from helpers.targets import UNIT, digits
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from advreg import AdversarialRegularization, make_adv_reg_config
from advreg.attacks import BIM
from advreg.attacks.engine.target import TargetModel
from advreg.backend.tensorflow import convolution
from advreg.backend.tensorflow.convolution import input_gradient
from advreg.network import network as network_module
from advreg.network.convolution import cheap_input_gradients

RNG = np.random.default_rng(0)


def draw(*shape):
    return tf.constant(RNG.normal(size=shape).astype("float32"))


def conv(filters=9, kernel=3, **kwargs):
    return layers.Conv2D(filters, kernel, bias_initializer="normal", **kwargs)


def network(*stack, shape=(6, 5, 1)):
    return keras.Sequential([keras.Input(shape), *stack])


def way(name):
    """How a function is run."""
    return {
        "eager": lambda function: function,
        "function": tf.function,
        "jit": lambda function: tf.function(function, jit_compile=True),
    }[name]


WAYS = ("eager", "function", "jit")


def plain_and_cheap(model, x, run="function"):
    """Outputs and gradients to input and weights, by TensorFlow and by us."""

    def differentiated(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = model(x, training=False)
            loss = tf.reduce_sum(tf.sin(outputs))
        return outputs, tape.gradient(loss, [x, *model.trainable_variables])

    def cheap(x):
        with cheap_input_gradients(model):
            return differentiated(x)

    return way(run)(differentiated)(x), way(run)(cheap)(x)


def assert_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * scale)


@pytest.fixture
def calls(monkeypatch):
    """The paddings of the gradients that were made our way."""
    made = []

    def noted(upstream, inputs, kernel, padding):
        made.append(padding)
        return input_gradient(upstream, inputs, kernel, padding)

    convolution._convolution.cache_clear()  # What was traced before notes nothing.
    monkeypatch.setattr(convolution, "input_gradient", noted)
    yield made
    convolution._convolution.cache_clear()


def assert_left_alone(model, x, calls):
    plain, cheap = plain_and_cheap(model, x)
    np.testing.assert_array_equal(plain[0], cheap[0])
    assert_close(cheap[1], plain[1])
    assert not calls


@given(st.data())
def test_gradients_are_those_of_tensorflow(data):
    high, wide = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (2, 4), (1, 3)]))
    padding = data.draw(st.sampled_from(["valid", "same"]))
    least = (1, 1) if padding == "same" else (high, wide)
    height, width = (data.draw(st.integers(size, size + 5)) for size in least)
    batch, filters = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 17))
    x, kernel = draw(batch, height, width, 1), draw(high, wide, 1, filters)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nn.conv2d(x, kernel, 1, padding.upper())
    upstream = draw(*y.shape)
    expected = tape.gradient(y, x, output_gradients=upstream)
    got = input_gradient(upstream, x, kernel, padding)
    assert got.shape == x.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * filters)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_the_gradient_is_that_of_finite_differences(padding):
    x, kernel = (RNG.normal(size=shape) for shape in ((2, 5, 4, 1), (3, 2, 1, 7)))
    upstream = RNG.normal(size=tf.nn.conv2d(x, kernel, 1, padding.upper()).shape)

    def loss(x):
        return np.sum(upstream * tf.nn.conv2d(x, kernel, 1, padding.upper()))

    got = input_gradient(*map(tf.constant, (upstream, x, kernel)), padding).numpy()
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = 0.5  # The loss is linear, so that no step is too long.
        assert got[place] == pytest.approx(loss(x + step) - loss(x - step), abs=1e-12)


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_network_gives_the_same_with_the_same_gradients(padding, run, calls):
    model = network(conv(12, (3, 2), padding=padding, activation="relu"), conv())
    plain, cheap = plain_and_cheap(model, draw(4, 6, 5, 1), run)
    if run != "jit":  # XLA fuses what it is given, so that sums may round otherwise.
        np.testing.assert_array_equal(plain[0], cheap[0])
    assert_close([cheap[0], *cheap[1]], [plain[0], *plain[1]])
    assert calls == [padding] * len(calls) != []


@pytest.mark.parametrize("run", WAYS)
def test_second_derivatives_are_right(run):
    model = network(conv(activation="tanh"))
    x, kernel = draw(2, 6, 5, 1), model.layers[0].kernel.value

    def penalty(context):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                with context:
                    loss = tf.reduce_sum(model(x) ** 2)
            size = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(size, [x, kernel])

    got = way(run)(lambda: penalty(cheap_input_gradients(model)))()
    assert_close(got, penalty(tf.name_scope("plain")))


def test_any_size_of_image_and_batch(calls):
    model = network(conv(padding="same"), conv(padding="valid"), shape=(None, None, 1))
    spec = tf.TensorSpec([None, None, None, 1])

    @tf.function(input_signature=[spec])
    def gradient(x):
        with tf.GradientTape() as tape, cheap_input_gradients(model):
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(model(x)))
        return tape.gradient(loss, x)

    for shape in ((1, 3, 7, 1), (3, 6, 4, 1)):
        x = draw(*shape)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(model(x)))
        assert_close([gradient(x)], [tape.gradient(loss, x)])
    assert set(calls) == {"same"}  # The other layer has many channels.


def test_the_batch_size_stays_known():
    class Pairs(layers.Layer):
        def call(self, inputs):
            return tf.stack([inputs[i] for i in range(inputs.shape[0])])

    model = keras.Sequential([keras.Input(batch_shape=(2, 4, 4, 1)), conv(), Pairs()])
    plain, cheap = plain_and_cheap(model, draw(2, 4, 4, 1))
    assert_close(cheap[1], plain[1])


def shared():
    layer = conv(padding="same")
    inputs = keras.Input((4, 4, 1))
    flat = layers.Lambda(lambda x: keras.ops.mean(x, -1, keepdims=True))
    return keras.Model(inputs, layer(flat(layer(inputs))))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [network(conv()), {"second": conv()}]

    def call(self, inputs):
        return self.parts[0](inputs)[..., :3, :3, :] + self.parts[1]["second"](inputs)


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (lambda: network(network(network(conv()))), 1),
        (lambda: network(conv(), shape=(4, 4, 1)), 1),
        (shared, 2),
        (Subclassed, 2),
    ],
)
def test_nested_and_shared_layers(make, times, calls):
    model = make()
    shape = model.input_shape[1:] if model.built else (5, 5, 1)
    x = draw(2, *shape)
    model(x)
    plain, cheap = plain_and_cheap(model, x)
    assert_close([cheap[0], *cheap[1]], [plain[0], *plain[1]])
    assert calls
    found = convolution._convolution.cache_info()
    assert found.hits + found.misses == times


def test_a_layer_over_time_has_right_gradients():
    model = network(layers.TimeDistributed(conv()), shape=(3, 4, 4, 1))
    plain, cheap = plain_and_cheap(model, draw(2, 3, 4, 4, 1))
    assert_close([cheap[0], *cheap[1]], [plain[0], *plain[1]])


def test_a_model_that_is_not_built_is_built_meanwhile():
    model = keras.Sequential([conv(), layers.Flatten()])
    x = draw(2, 4, 4, 1)
    with cheap_input_gradients(model):
        outputs = model(x)
    np.testing.assert_array_equal(outputs, model(x))


@pytest.mark.parametrize("run", WAYS)
def test_nothing_is_left_on_the_layers(run, calls):
    model = network(conv(), layers.Flatten(), layers.Dense(2))
    target = TargetModel(model)
    before, x = (
        [set(vars(layer)) for layer in model._flatten_layers()],
        draw(2, 6, 5, 1),
    )
    way(run)(lambda: target.outputs(x))()
    assert convolution._convolution.cache_info().misses == 1
    assert before == [set(vars(layer)) for layer in model._flatten_layers()]


def test_nothing_is_left_on_the_layers_after_an_error():
    class Broken(layers.Layer):
        def call(self, inputs):
            raise ZeroDivisionError

    first = conv()
    target = TargetModel(keras.Sequential([first, Broken()]))
    with pytest.raises(ZeroDivisionError):
        target.outputs(draw(2, 6, 5, 1))
    assert first.built
    assert "convolution_op" not in vars(first)


def test_contexts_within_each_other():
    model = network(conv())
    with cheap_input_gradients(model):
        ours = vars(model.layers[0])["convolution_op"]
        with cheap_input_gradients(model):
            assert vars(model.layers[0])["convolution_op"] is ours
        assert vars(model.layers[0])["convolution_op"] is ours
    assert "convolution_op" not in vars(model.layers[0])


class Own(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return 2 * super().convolution_op(inputs, kernel)


def with_lora():
    model = network(conv())
    model.layers[0].enable_lora(2)
    return model


def overridden():
    model = network(conv())
    layer = model.layers[0]
    usual = layer.convolution_op
    vars(layer)["convolution_op"] = lambda inputs, kernel: 3 * usual(inputs, kernel)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(conv(strides=2)),
        lambda: network(conv(dilation_rate=2)),
        lambda: network(conv(filters=8)),
        lambda: network(conv(filters=18), shape=(6, 5, 2)),
        lambda: network(conv(filters=18, groups=2), shape=(6, 5, 2)),
        lambda: network(conv(dtype="float64")),
        lambda: network(conv(dtype="mixed_bfloat16")),
        lambda: network(layers.DepthwiseConv2D(3)),
        lambda: network(Own(9, 3)),
        with_lora,
        overridden,
    ],
)
def test_layers_that_are_left_alone(make, calls):
    model = make()
    hooks = [vars(layer).get("convolution_op") for layer in model.layers]
    assert_left_alone(model, draw(2, *model.input_shape[1:]), calls)
    assert hooks == [vars(layer).get("convolution_op") for layer in model.layers]


def test_the_plain_layer_is_not_left_alone(calls):
    model = network(conv())
    plain_and_cheap(model, draw(2, 6, 5, 1))
    assert calls


def test_it_keeps_out_where_there_is_a_gpu(calls, monkeypatch):
    devices = [tf.config.PhysicalDevice(f"/{kind}:0", kind) for kind in ("CPU", "GPU")]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: devices)
    assert_left_alone(network(conv()), draw(2, 6, 5, 1), calls)


def test_an_image_smaller_than_the_kernel_is_left_to_keras(calls):
    layer = conv()
    layer.build((None, 4, 4, 1))
    small, large = draw(1, 2, 4, 1), draw(1, 3, 4, 1)
    expected = layer(small)
    with cheap_input_gradients(network(layer, shape=(4, 4, 1))):
        # What TensorFlow gives is not even the same each time, but of the same shape.
        assert layer(small).shape == expected.shape
        assert convolution._convolution.cache_info().misses == 0
        layer(large)
        assert convolution._convolution.cache_info().misses == 1


def test_many_networks_draw_no_warning_of_tracing(caplog):
    for size in range(4, 12):
        plain_and_cheap(network(conv(), shape=(size, 5, 1)), draw(1, size, 5, 1))
    assert "Bind" not in caplog.text


def test_memory_of_a_model_is_given_back():
    graphs = []

    class Spy(layers.Layer):
        def call(self, inputs):
            if not tf.executing_eagerly() and isinstance(inputs, tf.Tensor):
                graphs.append(weakref.ref(inputs.graph))
            return inputs

    model = network(conv(), Spy(), layers.Flatten(), layers.Dense(3))
    graphs.clear()
    BIM(epsilon=0.1, step_size=0.05, iterations=2)(
        model, draw(4, 6, 5, 1).numpy(), np.zeros(4, int)
    )
    assert graphs
    del model
    gc.collect()
    gc.collect()  # What was compiled goes once the model has gone.
    assert [graph() for graph in graphs] == [None] * len(graphs)


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", [*slow(False), True])
def test_an_attack_finds_the_same_examples(run_eagerly, calls, monkeypatch):
    network, x, y = digits()
    model = keras.models.clone_model(network)
    model.set_weights(network.get_weights())
    model.compile(run_eagerly=run_eagerly)
    attack = BIM(epsilon=0.1, step_size=0.04, iterations=4, **UNIT)
    cheap = attack(model, x, y, batch_size=60)
    assert calls
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    plain.compile(run_eagerly=run_eagerly)
    monkeypatch.setattr(
        network_module, "cheap_input_gradients", lambda model: tf.name_scope("plain")
    )
    del calls[:]
    expected = attack(plain, x, y, batch_size=60)
    assert not calls
    # Where a gradient is zero but for rounding, its sign may be either.
    assert np.mean(np.abs(cheap - expected) > 1e-6) < 1e-3
    agreed = model(cheap).numpy().argmax(1) == model(expected).numpy().argmax(1)
    assert agreed.all()


def weights_after_training(config, **compiled):
    model = AdversarialRegularization(
        network(conv(activation="tanh"), layers.Flatten(), layers.Dense(3)), config
    )
    rng = np.random.default_rng(0)
    for weight in model.base_model.weights:
        weight.assign(rng.normal(size=weight.shape) / 3)
    # Plain descent: Adam would make a step of any rounding where a gradient is zero.
    model.compile("sgd", "mse", **compiled)
    x, y = rng.normal(size=(8, 6, 5, 1)), rng.normal(size=(8, 3))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model.base_model.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_training_ends_with_the_same_weights(
    iterations, run_eagerly, calls, monkeypatch
):
    config = make_adv_reg_config(
        adv_step_size=0.1,
        adv_grad_norm="l2",
        pgd_iterations=iterations,
        pgd_epsilon=None if iterations == 1 else 0.2,
    )
    got = weights_after_training(config, run_eagerly=run_eagerly)
    assert calls
    monkeypatch.setattr(
        network_module, "cheap_input_gradients", lambda model: tf.name_scope("plain")
    )
    del calls[:]
    assert_close(got, weights_after_training(config, run_eagerly=run_eagerly))
    assert not calls


@pytest.mark.slow
def test_training_has_no_use_for_it_under_xla_or_without_perturbation(calls):
    weights_after_training(make_adv_reg_config(), jit_compile=True)
    weights_after_training(make_adv_reg_config(multiplier=0.0))
    assert not calls
