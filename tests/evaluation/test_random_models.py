"""Models that draw random numbers when they predict: figures are means over draws."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.slow import slow, slow_but
from keras import layers, ops

from advreg import evaluate_robustness
from advreg.attacks import FGSM, PGD, AutoAttack, RandomNoise, Square
from advreg.attacks.engine.target import DRAWS, TargetModel
from advreg.callbacks import RobustAccuracy

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype("float32")
Y = (X[:, 0] > 0).astype(int)
SLOPE = 4.0


class SeededNoise(layers.Layer):
    def __init__(self, stddev=1.0):
        super().__init__()
        self.stddev, self.generator = stddev, keras.random.SeedGenerator(7)

    def call(self, x):
        noise = keras.random.normal(
            ops.shape(x), stddev=self.stddev, seed=self.generator
        )
        return x + noise


class GlobalNoise(layers.Layer):
    def call(self, x):
        return x + keras.random.normal(ops.shape(x))


class TensorFlowNoise(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


class Sign(layers.Layer):
    """One sign for the whole batch, so that rows are not independent."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x * ops.sign(keras.random.uniform((), -0.1, 0.9, seed=self.generator))


NOISE = {
    "SeedGenerator": SeededNoise,
    "Keras's global state": GlobalNoise,
    "tf.random": TensorFlowNoise,
    "dropout": lambda: layers.Lambda(
        lambda x: keras.random.dropout(x, 0.3, seed=GENERATOR)
    ),
}
GENERATOR = keras.random.SeedGenerator(1)


def linear(noise, **kwargs):
    """Tells the classes apart by the first coordinate, noise added."""
    dense = layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), noise, dense])
    dense.set_weights([np.float32([[-SLOPE, SLOPE], [0, 0]])])
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs
    )
    return model


def normal(z):
    return 0.5 * (1 + np.vectorize(__import__("math").erf)(z / np.sqrt(2)))


def expected(epsilon, stddev=1.0):
    """The closed form: noise keeps the sign of `|x| - epsilon`."""
    return normal((np.abs(X[:, 0]) - epsilon) / stddev).mean()


def evaluate(model, attacks, **kwargs):
    return evaluate_robustness(model, X, Y, attacks=attacks, verbose=0, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("noise", list(NOISE)[:3])
@pytest.mark.parametrize("eagerly", [False, True])
def test_accuracies_are_those_of_the_closed_form(noise, eagerly):
    model = linear(NOISE[noise](), run_eagerly=eagerly)
    attacks = [FGSM(0.3), PGD(0.3, iterations=5, seed=0)]
    report = evaluate(model, attacks, draws=10 if eagerly else 200)
    # A standard error of 200 draws of 60 examples is below 0.005.
    slack = 0.05 if eagerly else 0.02
    assert report.clean_accuracy == pytest.approx(expected(0.0), abs=slack)
    for line in (*report.results, *report.worst_cases, report.overall):
        assert line.accuracy == pytest.approx(expected(0.3), abs=slack)
        assert line.draws == (10 if eagerly else 200)
    assert any("draws random numbers" in note for note in report.notes)
    assert "draws random numbers" in str(report)


@pytest.mark.parametrize("noise", slow_but(NOISE, "SeedGenerator"))
def test_a_radius_that_changes_nothing_leaves_the_clean_accuracy(noise):
    report = evaluate(linear(NOISE[noise]()), [PGD(1e-4, seed=0), RandomNoise(1e-4)])
    low, high = report.clean.interval
    for line in (*report.results, *report.worst_cases):
        assert low <= line.accuracy <= high


def test_the_gradient_is_the_mean_over_draws():
    """A single draw in eleven has the wrong sign; a mean of many has the right one."""
    model = linear(Sign())
    moved = FGSM(0.2)(model, X, Y, draws=51)
    np.testing.assert_allclose(
        moved[:, 0] - X[:, 0], -0.2 * np.sign(X[:, 0]), rtol=1e-4
    )


@pytest.mark.parametrize(
    "attack",
    [
        *slow(
            Square(0.3, queries=30, seed=0),
            AutoAttack(0.3, iterations=5, queries=10, seed=0),
        ),
        lambda model, x, y: x - 0.3 * np.sign(x),
    ],
    ids=["Square", "AutoAttack", "a callable"],
)
def test_other_attacks(attack):
    report = evaluate(linear(SeededNoise()), attack, draws=50)
    assert report.results[0].accuracy == pytest.approx(expected(0.3), abs=0.05)
    assert report.robust_accuracy == pytest.approx(expected(0.3), abs=0.05)


def test_what_a_report_says_is_what_fresh_draws_find():
    model = linear(SeededNoise())
    attack = PGD(0.3, iterations=5, seed=0)
    moved = attack(model, X, Y)
    fresh = np.mean([np.argmax(model(moved), axis=1) == Y for _ in range(200)])
    report = evaluate(model, attack, draws=100)
    assert report.robust_accuracy == pytest.approx(fresh, abs=0.02)


def test_reports_repeat_and_leave_the_random_state_alone():
    model = linear(SeededNoise())
    generator = model.layers[0].generator
    before = generator.state.numpy()
    first, second = (evaluate(model, PGD(0.3, seed=0)) for _ in range(2))
    assert first.clean.correct == second.clean.correct
    assert first.overall.correct == second.overall.correct
    np.testing.assert_array_equal(generator.state.numpy(), before)


def test_only_models_that_draw_are_called_several_times():
    for layer in (layers.Dropout(0.5), layers.GaussianNoise(1.0), layers.Identity()):
        model = linear(layer)
        target = TargetModel(model)
        target.settle(tf.constant(X))
        assert target.draws == 1
        report = evaluate(model, FGSM(0.1), draws=20)
        assert report.clean.draws == 1
        assert not report.notes
    target = TargetModel(linear(SeededNoise()))
    target.settle(tf.constant(X))
    assert target.draws == DRAWS == 10


def test_checks_that_compare_examples_are_not_made():
    report = evaluate(linear(SeededNoise()), [FGSM(0.3), PGD(0.3, seed=0)])
    made = {check.name: check.passed for check in report.checks}
    for name in (
        "single_step_beats_iterative",
        "black_box_beats_white_box",
        "more_effort_lowers_accuracy",
    ):
        assert made[name] is None
    assert not report.warnings


def test_the_callback_measures_means_as_well():
    model = linear(SeededNoise())
    callback = RobustAccuracy(PGD(0.3, iterations=5), (X, Y))
    model.optimizer.learning_rate = 0.0
    history = model.fit(X, Y, verbose=0, callbacks=[callback]).history
    assert history["val_robust_accuracy"][0] == pytest.approx(expected(0.3), abs=0.06)


@pytest.mark.parametrize(
    ("draws", "error"), [(0, ValueError), (256, ValueError), (2.0, TypeError)]
)
def test_bad_numbers_of_draws(draws, error):
    with pytest.raises(error, match="`draws`"):
        evaluate(linear(SeededNoise()), FGSM(0.1), draws=draws)


def test_one_draw_is_said_to_be_one_and_is_no_unlucky_one():
    report = evaluate(linear(SeededNoise()), PGD(1e-4, seed=0), draws=1)
    assert "over 1 draw," in report.notes[0]
    low, high = report.clean.interval
    assert low <= report.robust_accuracy <= high


class Counted(layers.Layer):
    """Draws from a number that it counts up itself, without a `SeedGenerator`."""

    def build(self, shape):
        self.count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, x):
        self.count.assign_add(1)
        seed = ops.stack([self.count.value, 0])
        return x + tf.random.stateless_normal(tf.shape(x), seed)


class Categorical(layers.Layer):
    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(5)

    def call(self, x):
        logits = tf.zeros((tf.shape(x)[0], 3))
        drawn = keras.random.categorical(logits, 2, seed=self.generator)
        return x + 1.5 * (tf.cast(drawn, x.dtype) - 1)


class Truncated(layers.Layer):
    def call(self, x):
        return x + tf.random.truncated_normal(tf.shape(x))


@pytest.mark.parametrize("noise", [Counted, *slow(Categorical, Truncated)])
def test_noise_of_other_operations(noise):
    report = evaluate(linear(noise()), RandomNoise(1e-4, draws=3, seed=0))
    assert report.clean.draws == 10
    low, high = report.clean.interval
    assert low <= report.robust_accuracy <= high
