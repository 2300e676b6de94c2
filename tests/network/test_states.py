import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, rows
from keras import layers

from advreg.network.states import assign, metric_variables, recurrent_states, values_of


class Counting(layers.Layer):
    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean()

    def call(self, inputs):
        self.mean.update_state(inputs)
        return inputs


def stateful(layer):
    return keras.Sequential([keras.Input(batch_shape=(4, 5, 2)), layer])


def test_metrics_of_layers_at_any_depth():
    inner = Counting()
    model = keras.Sequential([keras.Sequential([inner, layers.Dense(2)])])
    model(rows(4, 3))
    pairs = zip(metric_variables(model), inner.mean.variables, strict=True)
    assert all(v is w for v, w in pairs)
    assert metric_variables(classifier()) == []


@pytest.mark.parametrize(
    ("layer", "states"),
    [
        (layers.GRU(3, stateful=True), 1),
        (layers.LSTM(3, stateful=True), 2),
        (layers.LSTM(3), 0),
        (layers.Bidirectional(layers.GRU(3, stateful=True)), 2),
    ],
)
def test_states_of_recurrent_layers(layer, states):
    variables = recurrent_states(stateful(layer))
    assert len({id(variable) for variable in variables}) == states
    assert all(variable.shape == (4, 3) for variable in variables)


@pytest.mark.parametrize("graph", [False, True])
def test_values_come_back(graph):
    model = stateful(layers.GRU(3, stateful=True))
    (state,) = recurrent_states(model)
    state.assign(np.full((4, 3), 0.5))

    def run(x):
        values = values_of([state])
        model(x)
        moved = tf.identity(state.value)
        assign([state], values)
        return moved

    moved = (tf.function(run) if graph else run)(tf.constant(rows(4, 5, 2)))
    assert np.abs(moved - 0.5).max() > 0.01
    np.testing.assert_array_equal(state, np.full((4, 3), 0.5))
