"""One attack, and what came of each example."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, rows
from hypothesis import given
from hypothesis import strategies as st

from advreg.attacks import BIM, PGD, RandomNoise, Transfer
from advreg.config.norms import NormType
from advreg.evaluation.attack_run import AttackRun, balls
from advreg.evaluation.byte_array import FOOLED, ROBUST, UNKNOWN, ByteArray
from advreg.evaluation.evaluation_run import keep_smallest

L1, L2, LINF = NormType.L1, NormType.L2, NormType.INFINITY
X = rows(50, 6)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    return classifier()


def predict(model, x):
    return model.predict(x, verbose=0).argmax(1)


def feed(model, x=X):
    """All rows at once, as `Survey` hands them on."""
    classes = predict(model, x)
    return {
        "features": tf.constant(x),
        "classes": tf.constant(classes, tf.int32),
        "labels": tf.constant(classes),
        "index": np.arange(len(x)),
    }


def run(attack, model, x=X, batch_size=16):
    attack_run = AttackRun(attack, model, "attack", batch_size)
    attack_run.feed(feed(model, x))
    attack_run.flush()
    return attack_run


class Callable:
    """An attack of which only this much is known."""

    def __init__(self, move, **said):
        self.move, self.sizes = move, []
        vars(self).update(said)

    def __call__(self, model, x, y):
        self.sizes.append(len(x))
        return self.move(x)


def test_marks_are_those_of_a_dictionary():
    @given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255))))
    def check(written):
        marks, expected = ByteArray(), {}
        for index, value in written:
            marks.set(np.array([index]), value)
            expected[index] = value
        asked = np.array([0, 4999, 5001, 10**6, *expected])
        assert list(marks.get(asked)) == [expected.get(i, 0) for i in asked]
        marks.set(np.zeros(0, int), 1)
        assert list(marks.get(asked)) == [expected.get(i, 0) for i in asked]

    check()


def test_what_came_of_each_example_is_what_the_model_says(model):
    attack = BIM(0.4, iterations=5)
    attack_run = run(attack, model)
    fooled = predict(model, attack(model, X, predict(model, X))) != predict(model, X)
    assert 5 < fooled.sum() < 45
    np.testing.assert_array_equal(
        attack_run.status.get(np.arange(50)), np.where(fooled, FOOLED, ROBUST)
    )
    assert attack_run.status.get(np.array([50])) == UNKNOWN
    assert (attack_run.fooled, attack_run.robust) == (fooled.sum(), (~fooled).sum())
    np.testing.assert_array_equal(
        np.sort(attack_run.fooled_inside()), np.flatnonzero(fooled)
    )


def test_medians_are_of_the_perturbations_that_fooled(model):
    attack = PGD(1.0, norm="l2", iterations=7, seed=4)
    result = run(attack, model, batch_size=50).result(50, 1)
    y = predict(model, X)
    x_adv = attack(model, X, y, batch_size=50)
    moved = (x_adv - X)[predict(model, x_adv) != y]
    assert result.median_l2 == pytest.approx(
        np.median(np.linalg.norm(moved, axis=1)), rel=1e-5
    )
    assert result.median_linf == pytest.approx(
        np.median(np.abs(moved).max(1)), rel=1e-5
    )
    assert result.settings == repr(attack)
    assert (result.epsilon, result.norm) == (1.0, "l2")


def test_where_nothing_fell_there_is_no_median(model):
    result = run(RandomNoise(1e-6), model).result(50, 50)
    assert (result.median_l2, result.median_linf) == (None, None)


def test_a_radius_of_zero_runs_nothing(model):
    attack = Callable(lambda x: x / 0, epsilon=0.0, norm="l2")
    attack_run = run(attack, model)
    assert not attack.sizes
    assert (attack_run.robust, attack_run.fooled, attack_run.left_ball) == (50, 0, 0)


# Balls


@pytest.mark.parametrize("norm", [L1, L2, LINF])
def test_what_fell_in_a_ball_is_known_for_every_ball(model, norm):
    def away(x):
        return x * (1 - np.linspace(0, 3, 50)[:, None])

    order = {L1: 1, L2: 2, LINF: np.inf}[norm]
    attack_run = run(Callable(away), model, batch_size=50)
    lengths = np.linalg.norm(away(X) - X, ord=order, axis=1)
    fooled = predict(model, away(X)) != predict(model, X)
    for epsilon in (0.0, 0.5, 2.0, 4.0, 50.0):
        expected = np.flatnonzero(fooled & (lengths <= epsilon * (1 + 1e-4)))
        np.testing.assert_array_equal(attack_run.fooled_inside(norm, epsilon), expected)
    assert (
        0
        < len(attack_run.fooled_inside(norm, 4.0))
        < len(attack_run.fooled_inside(norm, 50.0))
    )


def test_leaving_the_ball_is_counted(model):
    def away(x):
        x = x.copy()
        x[::2] += 0.5
        x[1::2] += 0.1
        return x

    attack_run = run(Callable(away, epsilon=0.1, norm="infinity"), model, batch_size=50)
    assert attack_run.left_ball == 25
    assert attack_run.left_range == 0
    assert run(Callable(away, epsilon=0.1), model).left_ball == 0  # Of no norm.


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_is_no_breach_of_the_ball(model, offset):
    x = X + np.float32(offset)
    step = np.float32(0.1)
    for attack in (
        Callable(lambda x: x + step, epsilon=0.1, norm="infinity"),
        Callable(lambda x: x + step, epsilon=0.1 * 6**0.5, norm="l2"),
        Callable(lambda x: x + step, epsilon=0.6, norm="l1"),
    ):
        assert run(attack, model, x).left_ball == 0
        if not offset:
            attack.epsilon *= 0.99
            assert run(attack, model, x).left_ball == 50


def test_our_own_attacks_stay_in_their_balls(model):
    for norm, epsilon in ((L1, 2.0), (L2, 1.0), (LINF, 0.3)):
        attack_run = run(PGD(epsilon, norm=norm, iterations=5, seed=0), model)
        assert attack_run.left_ball == 0
        assert len(attack_run.fooled_inside(norm, epsilon)) == attack_run.fooled > 0


# The range


def test_leaving_the_range_is_counted_and_counts_in_no_ball(model):
    def away(x):
        x = x.copy()
        x[:10] = 9.0
        return x

    attack = Callable(away, clip_value_min=-5.0, clip_value_max=5.0)
    attack_run = run(attack, model, batch_size=50)
    fooled = predict(model, away(X)) != predict(model, X)
    assert fooled[:10].any()
    assert attack_run.left_range == 10
    assert attack_run.fooled == fooled.sum()
    assert not len(attack_run.fooled_inside())


def test_what_is_not_finite_is_in_no_ball_and_no_range(model):
    def away(x):
        x = x.copy()
        x[0, 0], x[1, 1] = np.nan, np.inf
        return x

    attack_run = run(Callable(away, epsilon=9.0, norm="l2"), model, batch_size=50)
    assert (attack_run.left_ball, attack_run.left_range) == (2, 2)
    assert not len(attack_run.fooled_inside())


def test_a_missing_value_that_stays_missing_has_not_moved(model):
    x = X.copy()
    x[::2, 0] = np.nan
    attack = Callable(lambda x: x + np.float32(0.1), epsilon=0.1, norm="infinity")
    attack_run = run(attack, model, x)
    assert (attack_run.left_ball, attack_run.left_range) == (0, 0)


def test_data_outside_a_stated_range_is_an_error(model):
    attack = Callable(lambda x: x, clip_value_min=0.0, clip_value_max=1.0)
    with pytest.raises(ValueError, match=r"`x` must lie in the clip range.*Received"):
        run(attack, model)


# Callables


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[:, :5],
        lambda x: x[:3],
        lambda x: [x],
        lambda x: None,
        lambda x: "x",
        lambda x: {"x": x},
    ],
)
def test_an_attack_that_returns_something_else_is_named(model, move):
    attack = Callable(move)
    with pytest.raises(
        ValueError, match=r"`attacks` must return features like"
    ) as info:
        run(attack, model)
    assert "Callable" in str(info.value)
    assert "Received: " in str(info.value)


def test_an_error_of_the_attack_itself_is_not_changed(model):
    def fail(x):
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        run(Callable(fail), model)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"epsilon": "0.1"}, TypeError, "`epsilon` must be a number"),
        ({"epsilon": -1.0}, ValueError, "`epsilon` must be finite"),
        ({"epsilon": 1.0, "norm": "l7"}, ValueError, "`norm` must be one of"),
    ],
)
def test_what_an_attack_says_of_itself_is_checked(model, said, error, message):
    with pytest.raises(error, match=message):
        AttackRun(Callable(lambda x: x, **said), model, "attack", 16)


def test_an_attack_is_told_the_batch_size_if_it_asks(model):
    told = []

    def attack(model, x, y, batch_size=1):
        told.append(batch_size)
        return x

    run(attack, model)
    assert set(told) == {16}


def test_an_attack_without_a_signature_is_called(model):
    class Odd:
        __signature__ = "none"

        def __call__(self, model, x, y):
            return x

    assert run(Odd(), model).robust == 50


def test_a_model_of_one_batch_size_gets_no_other():
    inputs = keras.Input(batch_shape=(16, 6))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    x = X[:32]
    y = model.predict(x, batch_size=16, verbose=0).argmax(1)
    attack = Callable(lambda x: x * np.float32(0.5))
    attack_run = AttackRun(attack, model, "attack", 16)
    data = {
        "features": tf.constant(x[:20]),
        "classes": tf.constant(y[:20], tf.int32),
        "labels": tf.constant(y[:20]),
        "index": np.arange(20),
    }
    attack_run.feed(data)
    attack_run.flush()
    assert attack.sizes == [16, 16]  # The second is 4 rows and copies of the last.
    moved = model.predict(x * np.float32(0.5), batch_size=16, verbose=0).argmax(1)
    assert attack_run.fooled == (moved != y)[:20].sum()
    assert attack_run.fooled + attack_run.robust == 20


# What an attack is


def test_which_attacks_follow_the_gradient(model):
    def kind(attack):
        attack_run = AttackRun(attack, model, "attack", 16)
        return (
            attack_run.white_box,
            attack_run.may_follow_gradient,
            attack_run.iterative,
        )

    assert kind(PGD(0.1)) == (True, True, True)
    assert kind(PGD(0.1, iterations=1)) == (True, True, False)
    assert kind(RandomNoise(0.1)) == (False, False, False)
    assert kind(Transfer(PGD(0.1), model)) == (False, False, True)
    assert kind(lambda model, x, y: x) == (False, True, False)


def test_balls_are_those_of_attacks_with_a_radius_and_a_norm(model):
    attacks = [
        PGD(0.2),
        PGD(0.1),
        RandomNoise(0.1),
        PGD(1.0, norm="l2"),
        Callable(lambda x: x, epsilon=0.7),
        Callable(lambda x: x, norm="l1"),
    ]
    attack_runs = [AttackRun(attack, model, "attack", 16) for attack in attacks]
    assert balls(attack_runs) == [(LINF, 0.1), (LINF, 0.2), (L2, 1.0)]


def test_a_sample_is_the_rows_of_the_smallest_keys_in_their_order():
    keys = np.array([0.5, 0.1, 0.9, 0.3])
    kept, left = keep_smallest({"x": tf.range(4), "index": np.arange(4)}, keys, 3)
    assert list(kept["index"]) == list(kept["x"].numpy()) == [0, 1, 3]
    assert list(left) == [0.5, 0.1, 0.3]
