"""What lies behind a last softmax or sigmoid, wherever that stands."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import rows
from helpers.slow import slow_rows
from keras import layers, ops

from advreg import evaluate_robustness
from advreg.attacks import FGSM, PGD
from advreg.attacks.engine.target import TargetModel
from advreg.backend import may_draw
from advreg.network.logits import logits_of
from advreg.network.output_form import OutputForm

X = rows(30, 4)
# Logits so far apart that most probabilities round to 0 and 1.
FIRST, LAST = 40 * rows(4, 5, seed=1), np.float32([0.1, 0, 0, 0, 0])


def head(scale=1.0):
    dense = layers.Dense(5)
    dense.build((None, 4))
    dense.set_weights([scale * FIRST, LAST])
    return dense


def functional(*after, scale=1.0):
    inputs = keras.Input((4,))
    outputs = head(scale)(inputs)
    for layer in after:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


class Subclass(keras.Model):
    def __init__(self, activation):
        super().__init__()
        self.dense, self.activation = head(), activation

    def call(self, inputs):
        return self.activation(self.dense(inputs))


class Decorated(Subclass):
    @tf.function
    def call(self, inputs):
        if tf.reduce_sum(inputs) > 1e9:  # Control flow, which needs AutoGraph.
            inputs = inputs * 2
        return self.activation(self.dense(inputs))


class Inside(layers.Layer):
    """A layer whose call is a `tf.function`, in a model whose call is none."""

    @tf.function
    def call(self, inputs):
        return tf.nn.softmax(inputs)


NETWORKS = {
    "Dense": lambda: functional(),
    "Softmax": lambda: functional(layers.Softmax()),
    "Activation": lambda: functional(layers.Activation("softmax")),
    "ops.softmax": lambda: functional(ops.softmax),
    "cast": lambda: functional(
        layers.Softmax(), layers.Activation("linear", dtype="float64")
    ),
    "Reshape": lambda: functional(
        layers.Softmax(), layers.Reshape((1, 5)), layers.Reshape((5,))
    ),
    "Flatten": lambda: functional(
        layers.Reshape((1, 5)), layers.Softmax(), layers.Flatten()
    ),
    "subclass": lambda: Subclass(keras.activations.softmax),
    "tf.nn in a subclass": lambda: Subclass(tf.nn.softmax),
    "tf.function": lambda: Decorated(tf.nn.softmax),
    "layer with a tf.function": lambda: functional(Inside()),
    "nested": lambda: keras.Sequential(
        [keras.Input((4,)), functional(layers.Softmax()), layers.Identity()]
    ),
    "softmax twice": lambda: functional(layers.Softmax(), layers.Softmax()),
}
# Several sigmoids that round to 1 are a tie, so that decisions would not be equal.
ONE_VS_REST = {
    "sigmoid": lambda: functional(layers.Activation("sigmoid"), scale=0.1),
    "sigmoid, Reshape": lambda: functional(
        layers.Activation("sigmoid"),
        layers.Reshape((5, 1)),
        layers.Reshape((5,)),
        scale=0.1,
    ),
}
NAMES = [*NETWORKS, *ONE_VS_REST]
USUAL = ("Dense", "Softmax", "subclass", "sigmoid")
CASES = [(make, 1.0) for make in NETWORKS.values()]
CASES += [(make, 0.1) for make in ONE_VS_REST.values()]


@pytest.mark.parametrize(
    ("make", "scale"),
    slow_rows(CASES, *(i for i, name in enumerate(NAMES) if name in USUAL)),
    ids=NAMES,
)
def test_equal_decisions_are_equally_robust(make, scale):
    logits = scale * X @ FIRST + LAST
    y = logits.argmax(1)
    model = make()
    model(X[:1])
    target = TargetModel(model)
    form = target.output_form(tf.constant(X))
    assert not form.hidden
    compiled = tf.function(lambda x: form.logits(target.outputs(x)), autograph=False)
    got = compiled(tf.constant(X)).numpy()
    np.testing.assert_allclose(
        got - got.max(1, keepdims=True),
        logits - logits.max(1, keepdims=True),
        rtol=1e-4,
        atol=1e-2,
    )
    attacks = [FGSM(0.1), PGD(0.1, seed=0)]
    report, reference = (
        evaluate_robustness(each, X, y, attacks=attacks, verbose=0)
        for each in (model, functional(scale=scale))
    )
    for line, wanted in zip(report.results, reference.results, strict=True):
        assert line.accuracy == pytest.approx(wanted.accuracy, abs=0.02)
    assert reference.results[0].accuracy < 0.9


class Opaque(keras.Model):
    """A softmax that nobody can look behind: its code is in another process, say."""

    def __init__(self):
        super().__init__()
        self.dense = head()

    def call(self, inputs):
        odds = ops.exp(self.dense(inputs) - ops.max(self.dense(inputs), 1, True))
        return odds / ops.sum(odds, axis=1, keepdims=True)


def test_what_is_not_found_is_said():
    model = Opaque()
    y = np.argmax(model(X), axis=1)
    assert TargetModel(model).output_form(tf.constant(X)).hidden
    report = evaluate_robustness(model, X, y, attacks=FGSM(0.1), verbose=0)
    (text,) = [
        check.message for check in report.checks if check.name == "hidden_logits"
    ]
    assert "was not found" in text
    assert "from_logits=True" in text
    sure = 100 * np.mean(np.max(model(X), axis=1) == 1)
    assert f"For {sure:.1f} % of" in text


def test_probabilities_that_do_not_round_need_no_warning():
    model = Opaque()
    model.dense.set_weights([FIRST / 100, LAST])
    y = np.argmax(model(X), axis=1)
    report = evaluate_robustness(model, X, y, attacks=FGSM(0.1), verbose=0)
    assert [c.passed for c in report.checks if c.name == "hidden_logits"] == [True]


def test_a_softmax_over_another_axis_is_not_taken_for_the_last_one():
    inputs = keras.Input((4,))
    pairs = layers.Softmax()(layers.Reshape((2, 2))(layers.Dense(4)(inputs)))
    model = keras.Model(inputs, layers.Flatten()(pairs))
    target = TargetModel(model, from_logits=True)
    form = OutputForm(False, 4)
    scores = tf.function(lambda x: form.logits(target.outputs(x)))(tf.constant(X))
    # The logarithms of the probabilities of each pair.
    np.testing.assert_allclose(np.exp(scores), model(X), rtol=1e-5)


def test_one_vs_rest_scores_become_logits_even_where_nothing_is_found():
    logits = rows(6, 3)
    scores = tf.constant(1 / (1 + np.exp(-logits)))
    np.testing.assert_allclose(
        logits_of(scores, False, one_vs_rest=True), logits, rtol=1e-4
    )


@pytest.mark.parametrize("last", [True, False])
def test_nothing_stays_on_layers_whose_call_is_a_function(last):
    model = Decorated(tf.nn.softmax) if last else functional(Inside())
    model(X[:1])
    TargetModel(model).output_form(tf.constant(X))
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    assert isinstance(
        type(model).call if last else Inside.call,
        tf.types.experimental.PolymorphicFunction,
    )


@pytest.mark.parametrize(
    ("function", "may"),
    [
        (lambda x: x + 1, False),
        (lambda x: x + tf.random.normal(tf.shape(x)), True),
        (lambda x: x + keras.random.normal((2,), seed=1), True),
        (tf.function(lambda x: tf.random.shuffle(x)), True),
        (lambda x: tf.numpy_function(lambda a: a, [x], tf.float32), True),
    ],
    ids=["none", "tf.random", "keras.random", "in a function", "Python"],
)
def test_what_may_draw_random_numbers(function, may):
    compiled = tf.function(function).get_concrete_function(tf.TensorSpec([2]))
    assert may_draw(compiled) is may
