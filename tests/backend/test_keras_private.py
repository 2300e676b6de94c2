"""The private names of Keras and TensorFlow that advreg uses are there.

If one of these fails, a new version has dropped or changed the name that the test is
called by: see what `advreg.backend.keras_private` says of it.
"""

import ast
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from advreg.backend import keras_private

X, Y = np.ones((4, 3), "float32"), np.array([0, 1, 1, 0])


@pytest.fixture(scope="module")
def model():
    inner = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    inputs = keras.Input((3,))
    outputs = layers.Dense(2, name="last")(inner(inputs))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    return model


def test_flatten_layers(model):
    kinds = [type(layer).__name__ for layer in keras_private.layers_of(model)]
    assert {"Functional", "Sequential", "BatchNormalization", "Dense"} <= set(kinds)
    assert model not in keras_private.layers_of(model, include_self=False)


def test_layers_directly_in_another(model):
    assert keras_private.layers_directly_in(model) == model.layers
    bidirectional = layers.Bidirectional(layers.LSTM(2))
    found = keras_private.layers_directly_in(bidirectional)
    assert bidirectional.forward_layer in found
    assert bidirectional.forward_layer.cell not in found


def test_metrics():
    layer = layers.Dense(2)
    layer.own = keras.metrics.Mean(name="own")
    assert keras_private.metrics_of(layer) == [layer.own]


def test_non_trainable_variables(model):
    layer = model.layers[1].layers[0]
    names = {v.name for v in keras_private.non_trainable_variables_of(layer)}
    assert names == {"moving_mean", "moving_variance"}


def test_inbound_nodes_and_input_tensors(model):
    (given,) = keras_private.inputs_of_calls(model.get_layer("last"))
    assert given.shape == (None, 3)
    of_inner = keras_private.inputs_of_calls(model.layers[1])
    assert any(tensor is model.input for tensor in of_inner)


def test_inputs_struct_and_outputs_struct():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    outputs = {"c": layers.Dense(2)(inputs["a"]), "d": layers.Dense(1)(inputs["b"])}
    model = keras.Model(inputs, outputs)
    assert keras_private.declared_inputs_of(model) == inputs
    assert keras_private.declared_outputs_of(model) == outputs
    assert keras_private.declared_inputs_of(keras.Sequential()) is None


def test_compile_loss(model):
    container = keras_private.compiled_losses_of(model)
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
    assert float(container(Y, model(X))) == pytest.approx(expected, rel=1e-5)
    assert container.built
    assert isinstance(container.metrics, list)
    assert keras_private.compiled_losses_of(keras.Sequential()) is None
    assert keras_private.loss_weights_of(model) is None
    assert keras_private.loss_weights_of(keras.Sequential()) is None
    weighted = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    weighted.compile("sgd", "mse", loss_weights=[0.5])
    assert keras_private.loss_weights_of(weighted) == [0.5]


def test_compile_metrics(model):
    container = keras_private.compiled_metrics_of(model)
    assert "accuracy" in container.result()


def test_loss_tracker(model):
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
    assert float(keras_private.loss_tracker_of(model).result()) == expected


def test_initial_epoch(model):
    assert keras_private.initial_epoch_of(model) is None
    keras_private.set_initial_epoch(model, 3)
    try:
        history = model.fit(X, Y, epochs=5, verbose=0)
    finally:
        keras_private.set_initial_epoch(model, None)
    assert history.epoch == [3, 4]


def test_distributed_dataset_and_maybe_symbolic_build():
    seen = []

    class Model(keras_private.BuildsFromOneReplica):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def part_of_one_replica(self, iterator):
            seen.append(keras_private.dataset_of(iterator).element_spec)

    model = Model()
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=2, verbose=0)
    (x, _), *_ = seen
    assert x.shape[-1] == 3
    assert keras_private.spec_of_first_replica(x) is x


def test_value_specs():
    two = tf.distribute.MirroredStrategy(["CPU:0"])
    data = two.experimental_distribute_dataset(tf.data.Dataset.range(4).batch(2))
    spec = keras_private.spec_of_first_replica(data.element_spec)
    assert isinstance(spec, tf.TensorSpec)


def test_autoconvert_optionals(model):
    assert callable(keras_private.without_optionals(model, lambda data: data))


def test_in_multi_worker_mode():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    assert keras_private.spans_processes(strategy) is False


@pytest.mark.parametrize("persistent", [False, True])
def test_persistent(persistent):
    tape = tf.GradientTape(persistent=persistent)
    assert keras_private.is_persistent(tape) is persistent


def test_keras_logits():
    logits = tf.constant([[1.0, 2.0]])
    found = keras_private.known_logits_of(keras.activations.softmax(logits))
    np.testing.assert_array_equal(found, logits)
    assert keras_private.known_logits_of(logits) is None


def test_flatten_metrics_in_order(model):
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    listed = model.evaluate(X, Y, verbose=0)
    assert keras_private.results_in_order(model, logs) == listed


def test_estimator_requirements():
    evasion = pytest.importorskip("art.attacks.evasion", reason="needs the extra")
    assert keras_private.estimator_requirements_of(evasion.FastGradientMethod)


def test_masks():
    masked = keras.layers.Masking()(np.ones((2, 3, 4), "float32"))
    target = keras.ops.zeros((2, 3, 4))
    assert np.array(keras_private.mask_of(masked)).all()
    assert keras_private.mask_of(target) is None
    keras_private.copy_mask(masked, target)
    mean = keras.losses.MeanSquaredError()
    assert float(mean(np.ones((2, 3, 4)), target)) == 1.0
    half = np.ones((2, 3, 4), "float32")
    half[0] = 0.0
    other = keras.ops.zeros((2, 3, 4))
    keras_private.copy_mask(keras.layers.Masking()(half), other)
    labels = np.zeros((2, 3, 4))
    labels[0] = 5.0  # What is masked does not count.
    assert float(mean(labels, other)) == 0.0


def test_each_of_them_is_tested_here():
    tree = ast.parse(inspect.getsource(keras_private))
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    here = inspect.getsource(inspect.getmodule(test_each_of_them_is_tested_here))
    assert [name for name in functions if f"keras_private.{name}(" not in here] == []
