import keras
import numpy as np
import pytest
from helpers.backends import only_tensorflow, tf
from helpers.models import classifier, labelled
from helpers.slow import slow_but, slow_on_jax
from helpers.targets import UNIT, digits, left_by, predicted
from hypothesis import given
from hypothesis import strategies as st

from advreg.attacks import PGD, RandomNoise

pytestmark = pytest.mark.every_backend

ORDERS = {"l1": 1, "l2": 2, "infinity": np.inf}


@slow_on_jax
@pytest.mark.parametrize("norm", slow_but(ORDERS, "l2"))
@given(epsilon=st.floats(0, 10), seed=st.integers(0, 2**32 - 1))
def test_draws_lie_in_the_ball(norm, epsilon, seed):
    network, x, _ = digits()
    x = np.zeros_like(x[:5])  # So that nothing is rounded off the displacement.
    attack = RandomNoise(epsilon, norm=norm, draws=1, seed=seed)
    moved = attack(network, x, predicted(network, x)).reshape(5, -1).astype("float64")
    assert np.linalg.norm(moved, ORDERS[norm], axis=1).max() <= epsilon * (1 + 1e-5)
    assert epsilon < 1e-30 or moved.any(axis=1).all()


@slow_on_jax
def test_seeds_repeat():
    network, x, y = digits()
    moved = [RandomNoise(0.05, seed=seed)(network, x, y) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).any()


@slow_on_jax
def test_the_range_and_the_mask_hold():
    network, x, y = digits()
    mask = np.zeros(x.shape[1:])
    mask[2:4] = 1.0
    x_adv = RandomNoise(0.9, feature_mask=mask, seed=0, **UNIT)(network, x, y)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not (x_adv - x)[:, mask == 0].any()
    assert (x_adv != x)[:, mask == 1].mean() > 0.5


def test_each_draw_is_another_and_what_is_fooled_stays():
    network, x, y = digits()
    left = [left_by(RandomNoise(0.6, draws=n, seed=0), network, x, y) for n in (1, 40)]
    assert left[1] < left[0] < 1.0


def test_noise_is_weaker_than_an_attack():
    network, x, y = digits()
    noisy = left_by(RandomNoise(0.1, seed=0, **UNIT), network, x, y)
    assert noisy > left_by(PGD(0.1, seed=0, **UNIT), network, x, y) + 0.3


@only_tensorflow
def test_of_what_stands_the_closest_draw_is_returned():
    network, x, y = digits()
    x, y = x[:20], y[:20]

    def margins(x_adv):
        logits = network.predict(x_adv, verbose=0)
        own = np.eye(10)[y] > 0
        return np.where(own, -np.inf, logits).max(1) - logits[own]

    draws = [RandomNoise(0.1, draws=n, seed=3)(network, x, y) for n in (1, 10)]
    before, after = map(margins, draws)
    stands = after < 0
    assert 15 < stands.sum() < 20
    assert np.all(after[stands] >= before[stands])
    assert np.any(after[stands] > before[stands])


@only_tensorflow
def test_no_gradient_is_taken(monkeypatch):
    monkeypatch.delattr(tf.GradientTape, "gradient")
    x, y = labelled()
    RandomNoise(0.1)(classifier(), x, y)
    assert not RandomNoise(0.1).uses_gradient


def test_regression_keeps_the_draw_of_the_largest_loss():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(loss="mean_squared_error")
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    y = model.predict(x, verbose=0)
    losses = [
        (model.predict(attack(model, x, y), verbose=0) - y) ** 2
        for attack in (RandomNoise(0.5, draws=n, seed=0) for n in (1, 8))
    ]
    assert np.all(losses[1] >= losses[0])
    assert np.any(losses[1] > losses[0])


def test_names():
    assert RandomNoise(0.1).name == "RandomNoise ×10"
    assert RandomNoise(0.1, draws=3).iterations_per_start == 1
    assert repr(RandomNoise(0.1, draws=3)) == "RandomNoise(epsilon=0.1, draws=3)"


@pytest.mark.parametrize(
    ("draws", "error", "message"),
    [
        (0, ValueError, "`draws` must be at least 1.*Received: 0"),
        (1.0, TypeError, "`draws` must be an integer. Received: 1.0"),
    ],
)
def test_bad_arguments(draws, error, message):
    with pytest.raises(error, match=message):
        RandomNoise(0.1, draws=draws)
