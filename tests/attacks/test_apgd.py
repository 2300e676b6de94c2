import dataclasses
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import oracle
from helpers.models import classifier, labelled, regularized
from helpers.slow import slow
from helpers.targets import UNIT, assert_sound, digits, left_by, predicted, tracings
from hypothesis import given
from hypothesis import strategies as st

from advreg.attacks import APGD, PGD
from advreg.attacks.apgd import ApgdSteps, checkpoints
from advreg.attacks.engine.runner import run
from advreg.config.norms import NormType

NORMS = ("infinity", "l2")


class TestCheckpoints:
    def test_of_100_steps(self):
        assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]

    def test_of_20_steps(self):
        # 4.4, 8.2, 11.4, 14, 16, 17.4, 18.6 and 19.8, rounded up.
        assert checkpoints(20) == [0, 5, 9, 12, 14, 16, 18, 19, 20]

    def test_of_one_step(self):
        assert checkpoints(1) == [0, 1]


class Tanh:
    """Two layers, differentiated by hand, in NumPy and as a Keras model in float64."""

    def __init__(self, values=6, hidden=7, classes=4):
        draw = np.random.default_rng(3).normal
        self.a, self.b = draw(size=(values, hidden)), draw(size=(hidden, classes)) * 2
        self.model = keras.Sequential(
            [
                keras.Input((values,), dtype="float64"),
                keras.layers.Dense(hidden, "tanh", use_bias=False, dtype="float64"),
                keras.layers.Dense(classes, use_bias=False, dtype="float64"),
            ]
        )
        self.model.set_weights([self.a, self.b])

    def loss_and_gradient(self, x, y, loss):
        hidden = np.tanh(x @ self.a)
        logits = hidden @ self.b
        own = np.eye(logits.shape[1])[y]
        if loss == "cross_entropy":
            top = logits.max(1, keepdims=True)
            odds = np.exp(logits - top)
            value = np.log(odds.sum(1)) + top[:, 0] - (own * logits).sum(1)
            slope = odds / odds.sum(1, keepdims=True) - own
        else:
            other = np.eye(logits.shape[1])[(logits - 1e9 * own).argmax(1)]
            value = ((other - own) * logits).sum(1)
            slope = other - own
        return value, (slope @ self.b.T * (1 - hidden**2)) @ self.a.T


def auto_pgd(x, gradient_at, norm, radius, iterations, points, low, high):
    """Algorithm 1 of Croce and Hein, one example at a time.

    The comparison at checkpoint `k` is made with the losses of the points 0 to `k`.
    """

    def constrained(z):
        return np.clip(x + oracle.project((z - x)[None], radius, norm)[0], low, high)

    points_at, losses, step, steps = [x], [], 2 * radius, []
    best, record, halved = None, None, False
    previous = here = x
    for k in range(iterations + 1):
        loss, gradient = gradient_at(here)
        losses.append(loss)
        if best is None or loss > best[0]:
            best = (loss, here, gradient)
        if k in points:
            if k > 0:
                last = points[points.index(k) - 1]
                rises = sum(losses[i + 1] > losses[i] for i in range(last, k))
                stuck = rises < 0.75 * (k - last)
                stuck = stuck or (not halved and best[0] == record)
                if stuck:
                    step, here, gradient = step / 2, best[1], best[2]
                halved = stuck
            record = best[0]
        if k == iterations:
            points_at.append(best[1])
            break
        ascent = constrained(here + step * oracle.steepest(gradient[None], norm)[0])
        share = 0.75 if k else 1.0
        there = constrained(
            here + share * (ascent - here) + (1 - share) * (here - previous)
        )
        previous, here = here, there
        points_at.append(here)
        steps.append(step)
    return np.array(points_at[1:]), np.array(steps)


@dataclasses.dataclass(frozen=True)
class Recorded(ApgdSteps):
    trail: ClassVar[list] = []

    def step(self, evaluation, batch, scalars):
        moved = super().step(evaluation, batch, scalars)
        tf.py_function(self._record, (moved["displacement"], moved["step"]), ())
        return moved

    def _record(self, displacement, step):
        self.trail.append((displacement.numpy(), step.numpy()))


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_each_step_is_that_of_the_paper(norm, loss):
    network = Tanh()
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (12, 6)), rng.integers(0, 4, 12)
    radius, iterations = 0.7, 15
    attack = APGD(radius, norm=norm, clip_value_min=-1.2, clip_value_max=1.2)
    features = tf.constant(x)
    problem = attack.problem(network.model)
    rows = attack.batch(problem, features, tf.constant(y))
    # Nothing is fooled where there are no classes to tell, so that all rows stay.
    problem = dataclasses.replace(problem, classify=False)
    Recorded.trail.clear()
    solver = Recorded(iterations + 1, loss, random_init=False)
    run(solver, problem, rows, keras.random.SeedGenerator(0))
    halvings = 0
    for i in range(len(x)):
        expected, steps = auto_pgd(
            x[i],
            lambda z, i=i: tuple(
                part[0]
                for part in network.loss_and_gradient(z[None], y[i : i + 1], loss)
            ),
            norm,
            radius,
            iterations,
            checkpoints(iterations),
            -1.2,
            1.2,
        )
        found = x[i] + [displacement[i] for displacement, _ in Recorded.trail]
        np.testing.assert_allclose(found[:-1], expected[:-1], rtol=0, atol=1e-9)
        # Near the top the loss is flat: which of two points is the best is rounding.
        ends = np.array([found[-1], expected[-1]])
        losses, _ = network.loss_and_gradient(ends, y[[i, i]], loss)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-13)
        taken = [step[i, 0] for _, step in Recorded.trail[:-1]]
        np.testing.assert_allclose(taken, steps, rtol=1e-12)
        halvings += len(set(steps)) - 1
    assert halvings >= 5


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@given(epsilon=st.floats(0, 0.6), seed=st.integers(0, 2**32 - 1))
def test_examples_are_allowed_and_fooled(norm, epsilon, seed):
    assert_sound(APGD(epsilon, norm=norm, iterations=3, **UNIT), seed)


@pytest.mark.slow
def test_seeds_repeat():
    network, x, y = digits()
    moved = [
        APGD(0.05, iterations=3, seed=seed, **UNIT)(network, x, y) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).any()


@pytest.mark.parametrize("norm", NORMS)
def test_the_size_of_batches_does_not_matter(norm):
    network, x, y = digits()
    attack = APGD(0.1, norm=norm, iterations=10, random_init=False, **UNIT)
    whole = attack(network, x, y, batch_size=len(x))
    np.testing.assert_allclose(
        attack(network, x, y, batch_size=7), whole, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [*slow(None, "margin"), "dlr"])
def test_no_weaker_than_pgd(norm, loss):
    network, x, y = digits()
    arguments = {"norm": norm, "iterations": 20, "seed": 0, "loss": loss, **UNIT}
    epsilon = {"infinity": 0.1, "l2": 0.6}[norm]
    left = left_by(APGD(epsilon, **arguments), network, x, y)
    assert 0 < left <= left_by(PGD(epsilon, **arguments), network, x, y) < 0.8


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
def test_targeted(loss):
    network, x, y = digits()
    target = (y + 1) % 10
    attack = APGD(0.3, iterations=20, targeted=True, loss=loss, seed=0, **UNIT)
    assert np.mean(predicted(network, attack(network, x, target)) == target) > 0.9


def test_restarts_leave_less():
    network, x, y = digits()
    left = [
        left_by(
            APGD(0.1, iterations=5, restarts=restarts, seed=0, **UNIT), network, x, y
        )
        for restarts in (1, 8)
    ]
    assert left[1] <= left[0]
    assert APGD(0.1, restarts=8).name == "APGD-100 ×8"
    assert APGD(0.1, iterations=5).name == "APGD-5"
    assert APGD(0.1, iterations=5).iterations_per_start == 5
    assert APGD(0.1).uses_gradient


def test_compiled_once_for_all_batches_and_radii():
    x, y = labelled(20)
    network = classifier()
    for epsilon, size in ((0.1, 20), (0.5, 3), (2.0, 1)):
        APGD(epsilon, iterations=6, restarts=2)(network, x, y, batch_size=size)
    traced = tracings(network)
    assert len([key for key in traced if key[0][0] == "step"]) == 1


def test_regression_ends_where_the_loss_was_largest():
    x = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(9, "tanh"), keras.layers.Dense(1)]
    )
    y = model.predict(x, verbose=0)
    model.compile(loss="mean_squared_error")
    before = APGD(0.3, iterations=3, seed=0)(model, x, y)
    after = APGD(0.3, iterations=30, seed=0)(model, x, y)
    losses = [((model.predict(z, verbose=0) - y) ** 2)[:, 0] for z in (before, after)]
    assert np.all(losses[0] > 0)
    assert losses[1].mean() >= losses[0].mean()


def test_a_wrapped_model_with_labels_in_its_dictionary():
    x, y = labelled()
    model = regularized(classifier())
    inside = APGD(1.0, iterations=5, seed=0)(model, {"x": x, "label": y})
    np.testing.assert_array_equal(
        inside["x"], APGD(1.0, iterations=5, seed=0)(model.base_model, x, y)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": "l1"}, ValueError, r"`norm` .* `APGD`.*Received: 'l1'"),
        ({"iterations": 0}, ValueError, "`iterations` must be at least 1.*: 0"),
        ({"iterations": 2.0}, TypeError, "`iterations` must be an integer.*2.0"),
        ({"restarts": 0}, ValueError, "`restarts` must be at least 1.*: 0"),
        ({"restarts": 2, "random_init": False}, ValueError, "`restarts` above 1 need"),
        ({"random_init": 1}, TypeError, "`random_init` must be a bool.*: 1"),
        ({"loss": "hinge"}, ValueError, "`loss` must be one of.*Received: 'hinge'"),
        ({"epsilon": -1.0}, ValueError, "`epsilon` must be finite.*-1.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        APGD(**{"epsilon": 0.1, **arguments})


def test_too_few_classes_for_a_loss():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`loss='dlr'` needs 3 classes"):
        APGD(0.1, loss="dlr")(model, np.ones((2, 3), "float32"), np.array([0, 1]))


def test_norms():
    assert APGD(0.1).norm is NormType.INFINITY
    assert APGD(0.1, norm=2).norm is NormType.L2
