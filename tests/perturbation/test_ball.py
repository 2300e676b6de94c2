import keras
import numpy as np
import pytest
from helpers.backends import array, dtype_of, tensor
from helpers.oracle import NORMS, norms, project, steepest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from advreg.config.norms import NormType
from advreg.perturbation.ball import Ball

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

norm_names = st.sampled_from(NORMS)
seeds = st.integers(0, 2**32 - 1)


def case(seed, batch=4, width=5):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, (batch, width)), rng.normal(size=(batch, width))


def make(x, norm="infinity", radius=0.3, moving=(True,), **kwargs):
    return Ball(x, moving, NormType(norm), radius, **kwargs)


@given(seeds, norm_names)
def test_a_step_is_the_oracle_s(seed, norm):
    x, gradient = case(seed)
    ball = make(tensor(x), norm)
    start = project(gradient[::-1] * 0.2, 0.3, norm)
    moved = ball.ascend(tensor(start), ball.gradient([tensor(gradient)]), 0.2)
    expected = project(start + 0.2 * steepest(gradient, norm), 0.3, norm)
    np.testing.assert_allclose(moved, expected, atol=1e-12)


@given(seeds, norm_names)
def test_steps_may_differ_from_row_to_row(seed, norm):
    x, gradient = case(seed)
    ball = make(tensor(x), norm, radius=None)
    steps = np.random.default_rng(seed).uniform(0, 1, (4, 1))
    moved = ball.ascend(ball.zero(), tensor(gradient), tensor(steps))
    np.testing.assert_allclose(moved, steps * steepest(gradient, norm), atol=1e-12)


@given(seeds, norm_names, st.booleans())
def test_nothing_leaves_ball_or_range(seed, norm, start_at_random):
    x, gradient = (part.astype("float32") for part in case(seed))
    mask = (np.arange(5) % 2).astype("float32")
    ball = make(
        tensor(x), norm, feature_mask=mask, clip_value_min=0.0, clip_value_max=1.0
    )
    generator = keras.random.SeedGenerator(seed % 1000)
    moved = ball.random(generator, 0.3) if start_at_random else ball.zero()
    for _ in range(3):
        moved = ball.ascend(moved, ball.gradient([tensor(gradient)]), 0.2)
    x_adv = array(ball.perturbed(moved))
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    np.testing.assert_array_equal(x_adv[:, mask == 0], x[:, mask == 0])
    size = norms(x_adv.astype("float64") - x.astype("float64"), norm)
    assert (size <= 0.3 * (1 + 1e-6) + 1e-6).all()


def test_features_are_one_row():
    features = {
        "a": tensor([[3.0, 0.0]]),
        "b": tensor([[[4.0]]]),
        "n": tensor([7]),
    }
    ball = make(features, "l2", radius=1.0, moving=(True, True, False))
    gradient = ball.gradient([features["a"], features["b"], None])
    np.testing.assert_array_equal(gradient, [[3, 0, 4]])
    moved = ball.perturbed(ball.ascend(ball.zero(), gradient, 1.0))
    np.testing.assert_allclose(moved["a"], [[3.6, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(moved["b"], [[[4.8]]], rtol=1e-6)
    assert moved["n"] is features["n"]
    assert list(ball.moving) == [True, True, False]


def test_the_range_is_the_value_s_own_where_nothing_moves():
    x = tensor([[0.2, np.nan, 5.0]])
    ball = make(
        x,
        feature_mask=np.array([1.0, 1.0, 0.0]),
        clip_value_min=0.0,
        clip_value_max=1.0,
    )
    low, high = ball.range
    np.testing.assert_array_equal(low, np.float32([[0, np.nan, 5]]))
    np.testing.assert_array_equal(high, np.float32([[1, np.nan, 5]]))
    moved = ball.perturbed(ball.ascend(ball.zero(), ops.ones((1, 3)), 0.3))
    np.testing.assert_allclose(moved, [[0.5, np.nan, 5.0]])


def test_without_constraints_the_range_is_infinite():
    low, high = make(ops.zeros((2, 3))).range
    np.testing.assert_array_equal(low, np.full((2, 3), -np.inf))
    np.testing.assert_array_equal(high, np.full((2, 3), np.inf))


def test_the_range_wins_over_the_ball():
    ball = make(tensor([[5.0]]), clip_value_max=1.0)
    np.testing.assert_array_equal(ball.perturbed(ball.constrain(ball.zero())), [[1.0]])


def test_gradients_that_are_not_numbers_move_nothing():
    ball = make(ops.zeros((1, 3)), feature_mask=np.array([1, 1, 0.5]))
    gradient = ball.gradient([tensor([[np.nan, -2.0, 4.0]])])
    np.testing.assert_array_equal(gradient, [[0, -2, 2]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("infinity", [[0.2, -0.2, 0.2, 0.0, 0.0]]),
        ("l2", [[0.2 / 2**0.5, -0.2 / 2**0.5, 0.0, 0.0, 0.0]]),
        ("l1", [[0.1, -0.1, 0.0, 0.0, 0.0]]),
    ],
)
def test_infinite_gradients_count_by_their_sign(dtype, norm, expected):
    """Masked ones stay 0: a weight of 0 times infinity would not be a number."""
    x = ops.zeros((1, 5), dtype)
    ball = make(x, norm, feature_mask=np.array([1, 1, 1, 1, 0]))
    gradient = ball.gradient([tensor([[np.inf, -np.inf, 2.0, np.nan, np.inf]], dtype)])
    moved = ball.perturbed(ball.ascend(ball.zero(), gradient, 0.2))
    np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-20)


def test_an_infinite_gradient_at_the_end_of_the_range_has_had_its_turn():
    x = tensor([[0.0, 0.5]])
    ball = make(x, "l1", clip_value_min=0.0, clip_value_max=1.0)
    gradient = ball.gradient([tensor([[-np.inf, 2.0]])])
    gradient = ball.without_clipped(ball.zero(), gradient)
    np.testing.assert_allclose(ball.ascend(ball.zero(), gradient, 0.3), [[0, 0.3]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_inputs_that_are_not_finite_take_no_share_of_the_step(norm, value):
    ball = make(tensor([[value, 0.0]]), norm)
    gradient = ball.gradient([tensor([[np.inf, 1.0]])])
    moved = ball.perturbed(ball.ascend(ball.zero(), gradient, 0.2))
    np.testing.assert_allclose(moved, [[value, 0.2]])


def test_flags_hold_rows_and_values():
    flags = [tensor([[True, False], [False, False]])]
    ball = make(ops.zeros((2, 2)), can_move=flags)
    moved = array(ball.random(keras.random.SeedGenerator(1), 0.3))
    assert moved[0, 0] != 0
    assert not moved[0, 1]
    assert not moved[1].any()
    np.testing.assert_array_equal(ball.gradient([ops.ones((2, 2))]), [[1, 0], [0, 0]])


@pytest.mark.parametrize(("sign", "ends"), [(1, "clip_value_max"), (-1, "both")])
def test_l1_turns_to_the_next_value_at_the_end_of_the_range(sign, ends):
    limits = {"clip_value_max": 1.0}
    if ends == "both":
        limits = {"clip_value_min": -1.0, "clip_value_max": 1.0}
    x = tensor([[1.0 * sign, 0.0]])
    gradient = tensor([[3.0, 2.0]]) * sign
    ball = make(x, "l1", radius=None, **limits)
    np.testing.assert_array_equal(
        ball.without_clipped(ball.zero(), gradient), [[0.0, 2.0 * sign]]
    )
    # Away from the end it may move, and the other norms move all values at once.
    np.testing.assert_array_equal(
        ball.without_clipped(ball.zero(), -gradient), -gradient
    )
    for norm in ("l2", "infinity"):
        other = make(x, norm, radius=None, **limits)
        np.testing.assert_array_equal(
            other.without_clipped(ball.zero(), gradient), gradient
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_moves_in_float32_and_comes_back(dtype):
    x = ops.cast([[0.5, 0.25]], dtype)
    ball = make(x, radius=0.25)
    assert dtype_of(ball.zero()) == "float32"
    moved = ball.perturbed(ball.ascend(ball.zero(), tensor([[1.0, -1.0]]), 1.0))
    assert dtype_of(moved) == dtype
    np.testing.assert_array_equal(ops.cast(moved, "float32"), [[0.75, 0.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_mask": np.ones(3)}, r"`feature_mask` must broadcast.*\(3,\)"),
        ({"clip_value_min": {"a": 0.0}}, "`clip_value_min`.*is a dictionary, and"),
        ({"clip_value_max": [1.0, 1.0]}, "`clip_value_max`.*is a list, and"),
        ({"moving": (False,)}, "Nothing can be perturbed.*Received"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(ops.zeros((2, 2)), **arguments)
