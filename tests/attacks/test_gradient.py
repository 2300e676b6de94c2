import functools

import keras
import numpy as np
import pytest
from helpers.backends import dtype_of, only_tensorflow, tensor
from helpers.models import rows
from helpers.oracle import NORMS, attack, norms
from helpers.slow import slow, slow_on_jax
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops
from scipy import stats

from advreg.attacks import BIM, FGSM, PGD

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}
WEIGHTS = np.random.default_rng(5).normal(size=(5, 3))
BIAS = np.random.default_rng(6).normal(size=3)
seeds = st.integers(0, 2**32 - 1)
norm_names = st.sampled_from(NORMS)


class Linear(layers.Layer):
    """Linear logits in float64, which `Dense` computes in float32 on PyTorch."""

    def call(self, inputs):
        return ops.sum(inputs[:, :, None] * tensor(WEIGHTS), axis=1) + tensor(BIAS)


def linear():
    return keras.Sequential(
        [keras.Input((5,), dtype="float64"), Linear(dtype="float64")]
    )


@functools.cache
def shared():
    """One model for all, so that each attack is compiled once for all examples."""
    return linear()


def logits(x):
    return x @ WEIGHTS + BIAS


def entropy_gradient(y, sign=1.0):
    """That of the cross-entropy of linear logits."""

    def gradient_at(x):
        z = logits(x)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return sign * (p - np.eye(3)[y]) @ WEIGHTS.T

    return gradient_at


def margin_gradient(y):
    def gradient_at(x):
        other = np.where(np.eye(3)[y] == 1, -np.inf, logits(x)).argmax(1)
        return (WEIGHTS[:, other] - WEIGHTS[:, y]).T

    return gradient_at


def examples(seed, count=7):
    x = np.random.default_rng(seed).uniform(0, 1, (count, 5))
    return x, logits(x).argmax(1)


def stopped(x, y, gradient_at, norm, step, iterations, radius, low=None, high=None):
    """The oracle's ascent, each row kept where it was fooled first."""
    path = [
        attack(x, gradient_at, norm, step, count, radius, low, high)
        for count in range(iterations + 1)
    ]
    found = path[-1].copy()
    for points in reversed(path):
        fooled = logits(points).argmax(1) != y
        found[fooled] = points[fooled]
    return found


@given(seeds, norm_names, st.booleans())
def test_fgsm_is_one_step_of_the_oracle(seed, norm, in_range):
    x, y = examples(seed)
    limits = UNIT if in_range else {}
    got = FGSM(epsilon=0.2, norm=norm, **limits)(shared(), x, y)
    low, high = (0, 1) if in_range else (None, None)
    expected = attack(x, entropy_gradient(y), norm, 0.2, 1, 0.2, low, high)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@given(seeds, st.sampled_from(["l2", "infinity"]))
def test_bim_is_the_oracle_s_ascent_until_a_row_is_fooled(seed, norm):
    x, y = examples(seed)
    bim = BIM(epsilon=0.4, step_size=0.1, iterations=6, norm=norm, **UNIT)
    expected = stopped(x, y, entropy_gradient(y), norm, 0.1, 6, 0.4, 0, 1)
    np.testing.assert_allclose(bim(shared(), x, y), expected, atol=1e-12)


@given(seeds, norm_names)
def test_bim_in_every_norm_without_a_range(seed, norm):
    x, y = examples(seed)
    bim = BIM(epsilon=0.4, step_size=0.1, iterations=5, norm=norm)
    expected = stopped(x, y, entropy_gradient(y), norm, 0.1, 5, 0.4)
    np.testing.assert_allclose(bim(shared(), x, y), expected, atol=1e-9)


@given(seeds)
def test_the_margin_is_raised_where_it_is_asked_for(seed):
    x, y = examples(seed)
    bim = BIM(epsilon=0.4, step_size=0.1, iterations=5, norm="l2", loss="margin")
    expected = stopped(x, y, margin_gradient(y), "l2", 0.1, 5, 0.4)
    np.testing.assert_allclose(bim(shared(), x, y), expected, atol=1e-12)


@given(seeds)
def test_a_targeted_attack_goes_to_the_target(seed):
    x, y = examples(seed)
    target = (y + 1) % 3
    got = FGSM(epsilon=0.05, norm="l2", targeted=True)(shared(), x, target)
    gradient_at = entropy_gradient(target, sign=-1.0)
    np.testing.assert_allclose(
        got, attack(x, gradient_at, "l2", 0.05, 1, 0.05), atol=1e-12
    )


@given(seeds)
def test_momentum_adds_up_normalised_gradients(seed):
    x, y = examples(seed)
    got = PGD(
        epsilon=0.4, step_size=0.05, iterations=4, random_init=False, momentum=0.7
    )(shared(), x, y)
    d, velocity, expected = np.zeros_like(x), np.zeros_like(x), None
    standing, expected = np.full(len(x), True), x.copy()
    for _ in range(4):
        standing &= logits(x + d).argmax(1) == y
        gradient = entropy_gradient(y)(x + d)
        velocity = 0.7 * velocity + gradient / norms(gradient, "l1")[:, None]
        d = np.clip(d + 0.05 * np.sign(velocity), -0.4, 0.4)
        expected[standing] = (x + d)[standing]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_momentum_of_0_is_none():
    x, y = examples(0)
    arguments = {"epsilon": 0.3, "iterations": 5, "seed": 1}
    np.testing.assert_array_equal(
        PGD(momentum=0.0, **arguments)(shared(), x, y), PGD(**arguments)(shared(), x, y)
    )


def of_roots(sign):
    """A linear classifier of the roots of pixels: at 0 their gradient is infinite."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Lambda(lambda x: ops.sqrt(x)), layers.Dense(2)]
    )
    kernel = sign * np.array([[1e-5, -1e-5], [1.0, -1.0], [1.0, -1.0]])
    model.set_weights([kernel, np.array([-9.0, 9.0])])
    return model


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("infinity", [0.1, 0.1, 0.1]),
        ("l2", [0.0, 0.1 / 2**0.5, 0.1 / 2**0.5]),
        ("l1", [0.0, 0.05, 0.05]),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        FGSM,
        *slow(functools.partial(BIM, step_size=0.1, iterations=1)),
        functools.partial(
            PGD, step_size=0.1, iterations=1, random_init=False, momentum=0.9
        ),
    ],
)
@pytest.mark.parametrize("run_eagerly", [False, *slow(True)])
def test_black_pixels_move_where_the_gradient_is_infinite(
    make, norm, expected, run_eagerly
):
    x = np.array([[0.25, 0.0, 0.0]], "float32")
    model = of_roots(1)
    model.compile(run_eagerly=run_eagerly)
    # The second class is told by a large bias, and the first by bright pixels.
    moved = make(epsilon=0.1, norm=norm, **UNIT)(model, x, np.array([1])) - x
    np.testing.assert_allclose(moved[0], expected, atol=1e-6)
    # Where darker ones tell it, the black ones are at the end of their range.
    moved = make(epsilon=0.1, norm=norm, **UNIT)(of_roots(-1), x, np.array([1])) - x
    assert not moved[0, 1:].any()
    # L1 then turns to the next pixel, and L∞ moves all at once.
    assert (moved[0, 0] < -0.09) == (norm != "l2")


@pytest.mark.parametrize("make", [BIM, PGD])
def test_an_attack_that_cannot_move_is_refused(make):
    with pytest.raises(ValueError, match=r"`step_size` must be positive.*epsilon=0.1"):
        make(epsilon=0.1, step_size=0)
    # A radius of 0 says itself that nothing is to move.
    assert make(epsilon=0.0, step_size=0.0).step_size == 0.0
    assert make(epsilon=0.1, step_size=0.05).with_epsilon(0).step_size == 0.0


@pytest.mark.parametrize("make", [BIM, PGD])
def test_the_step_is_2_5_times_the_radius_over_the_iterations(make):
    x, y = examples(0)
    kwargs = {"epsilon": 0.2, "iterations": 8, "seed": 1}
    expected = make(step_size=2.5 * 0.2 / 8, **kwargs)(shared(), x, y)
    np.testing.assert_array_equal(make(**kwargs)(shared(), x, y), expected)
    other = make(step_size=0.2 / 8, **kwargs)(shared(), x, y)
    assert np.abs(other - expected).max() > 1e-3


def network():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, activation="tanh", kernel_initializer="random_normal"),
            layers.Dense(3, kernel_initializer="orthogonal"),
        ]
    )


NETWORK = network()


def on_network(seed, count=9):
    x = np.random.default_rng(seed).uniform(0, 1, (count, 6)).astype("float32")
    return x, NETWORK.predict(x, verbose=0).argmax(1)


@pytest.mark.slow
@settings(max_examples=20)
@given(seeds, norm_names, st.sampled_from([None, "margin", "dlr"]))
def test_invariants(seed, norm, loss):
    x, y = on_network(seed)
    mask = (np.arange(6) % 3 > 0).astype("float32")
    pgd = PGD(
        epsilon=0.3,
        iterations=4,
        restarts=2,
        norm=norm,
        loss=loss,
        feature_mask=mask,
        seed=seed,
        **UNIT,
    )
    x_adv = pgd(NETWORK, x, y, batch_size=4)
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    np.testing.assert_array_equal(x_adv[:, mask == 0], x[:, mask == 0])
    size = norms(x_adv.astype("float64") - x.astype("float64"), norm)
    assert (size <= 0.3 * (1 + 1e-6) + 6e-7).all()
    np.testing.assert_array_equal(pgd(NETWORK, x, y, batch_size=4), x_adv)


@settings(max_examples=20)
@given(seeds)
def test_what_is_fooled_already_stays(seed):
    x, y = on_network(seed)
    wrong = np.random.default_rng(seed).random(len(y)) < 0.5
    y = np.where(wrong, (y + 1) % 3, y)
    for iterative in (FGSM(epsilon=0.3), BIM(epsilon=0.3, iterations=3)):
        x_adv = iterative(NETWORK, x, y)
        np.testing.assert_array_equal(x_adv[wrong], x[wrong])
        assert (x_adv != x)[~wrong].any(axis=1).all()


@slow_on_jax
@settings(max_examples=15)
@given(seeds, norm_names, st.integers(1, 12))
def test_bim_does_not_know_the_batch_size(seed, norm, batch_size):
    x, y = on_network(seed)
    bim = BIM(epsilon=0.2, iterations=4, norm=norm)
    expected = bim(NETWORK, x, y, batch_size=9)
    got = bim(NETWORK, x, y, batch_size=batch_size)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def accuracy(model, x, y):
    return np.mean(model.predict(x, verbose=0).argmax(1) == y)


def test_restarts_never_make_it_weaker():
    x, y = on_network(0, 1000)
    left = []
    for restarts in (1, 2, 4, 8):
        arguments = {"step_size": 0.02, "restarts": restarts, "seed": 1}
        pgd = PGD(epsilon=0.08, iterations=2, **arguments)
        left.append(accuracy(NETWORK, pgd(NETWORK, x, y, batch_size=1000), y))
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0] < 1


def test_more_iterations_are_stronger_than_one_on_a_curved_loss():
    x, y = on_network(0, 200)
    once, often = FGSM(epsilon=0.2), PGD(epsilon=0.2, iterations=20, seed=1)
    assert accuracy(NETWORK, often(NETWORK, x, y), y) <= accuracy(
        NETWORK, once(NETWORK, x, y), y
    )


def test_a_random_start_fills_the_ball():
    x, y = on_network(0, 200)
    pgd = PGD(epsilon=0.1, step_size=1e-9, iterations=1, norm="l2", seed=1)
    size = norms(pgd(NETWORK, x, y).astype("float64") - x, "l2")
    assert size.max() <= 0.1 * (1 + 1e-5)
    # In six dimensions, this power of it is uniform.
    assert stats.kstest((size / 0.1) ** 6, "uniform").pvalue > 1e-3


def test_seeds_repeat_and_differ():
    x, y = on_network(0)

    def run(seed):
        # Longer steps would take all starts to the same corner.
        pgd = PGD(epsilon=0.05, iterations=2, step_size=0.01, seed=seed)
        return pgd(NETWORK, x, y)

    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()
    keras.utils.set_random_seed(4)
    first, second = run(None), run(None)
    assert (first != second).any()
    keras.utils.set_random_seed(4)
    np.testing.assert_array_equal(run(None), first)


def test_a_radius_of_0_moves_nothing():
    x, y = on_network(0)
    for make in (FGSM, BIM, PGD):
        np.testing.assert_array_equal(make(epsilon=0)(NETWORK, x, y), x)


def test_a_disconnected_gradient_moves_nothing():
    inputs = keras.Input((6,))
    hidden = ops.one_hot(ops.argmax(layers.Dense(3)(inputs), axis=-1), 3)
    model = keras.Model(inputs, hidden * 7.0)
    x, _ = on_network(0)
    y = model.predict(x, verbose=0).argmax(1)
    np.testing.assert_array_equal(FGSM(epsilon=0.1)(model, x, y), x)


def test_names():
    assert FGSM(0.1).name == "FGSM"
    assert BIM(0.1, iterations=7).name == "BIM-7"
    assert PGD(0.1).name == "PGD-40"
    assert PGD(0.1, iterations=10, restarts=5).name == "PGD-10 ×5"
    assert FGSM(0.1).iterations_per_start == 1
    assert PGD(0.1).iterations_per_start == 40


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (PGD, {"iterations": 0}, ValueError, "`iterations`.*at least 1.*0"),
        (BIM, {"iterations": 2.0}, TypeError, "`iterations`.*integer.*2.0"),
        (PGD, {"step_size": -0.1}, ValueError, "`step_size`.*not negative.*-0.1"),
        (BIM, {"step_size": "a"}, TypeError, "`step_size`.*number.*'a'"),
        (PGD, {"restarts": 0}, ValueError, "`restarts`.*at least 1.*0"),
        (
            PGD,
            {"restarts": 2, "random_init": False},
            ValueError,
            "`restarts` above 1 need `random_init=True`.*restarts=2",
        ),
        (PGD, {"random_init": 1}, TypeError, "`random_init`.*bool.*1"),
        (PGD, {"momentum": 1.5}, ValueError, r"`momentum`.*\[0, 1\].*1.5"),
        (PGD, {"momentum": -0.1}, ValueError, r"`momentum`.*\[0, 1\].*-0.1"),
        (PGD, {"momentum": np.nan}, ValueError, r"`momentum`.*\[0, 1\].*nan"),
        (PGD, {"momentum": "a"}, ValueError, r"`momentum`.*\[0, 1\].*'a'"),
        (FGSM, {"loss": "mse"}, ValueError, "`loss`.*'dlr', 'model'.*'mse'"),
        (PGD, {"loss": ["dlr"]}, ValueError, r"`loss`.*\['dlr'\]"),
        (BIM, {"loss": np.ones(2)}, ValueError, "`loss`.*array"),
        (FGSM, {"iterations": 3}, TypeError, "iterations"),
    ],
)
def test_wrong_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(epsilon=0.1, **arguments)


class TestRegression:
    """FGSM on the compiled loss of a linear model has a closed form."""

    w = np.array([1.0, -2.0, 0.5, 0.25])

    def model(self, loss, outputs=1):
        model = keras.Sequential(
            [keras.Input((4,), dtype="float64"), layers.Dense(outputs, dtype="float64")]
        )
        kernel = np.repeat(self.w[:, None], outputs, 1)
        model.set_weights([kernel, np.full(outputs, 0.1)])
        model.compile("sgd", loss)
        return model

    @pytest.mark.parametrize(
        "loss",
        [
            "mse",
            "mean_squared_error",
            "mae",
            "huber",
            "log_cosh",
            keras.losses.MeanSquaredError(),
            keras.losses.MeanAbsoluteError(reduction="sum"),
            keras.losses.mean_squared_error,
            [keras.losses.LogCosh()],
        ],
    )
    @pytest.mark.parametrize("trailing", [*slow(()), (1,)])
    def test_fgsm(self, loss, trailing):
        x, y = rows(6, 4).astype("float64"), rows(6, seed=1).astype("float64")
        residual = x @ self.w + 0.1 - y
        got = FGSM(epsilon=0.2)(self.model(loss), x, y.reshape(6, *trailing))
        expected = x + 0.2 * np.sign(residual[:, None] * self.w)
        np.testing.assert_allclose(got, expected, atol=1e-12)

    def test_a_loss_of_one_s_own_has_to_be_asked_for(self):
        def pinball(y_true, y_pred):
            over = y_true - y_pred
            return keras.ops.mean(keras.ops.maximum(0.9 * over, -0.1 * over), axis=-1)

        x, y = rows(6, 4).astype("float64"), rows(6, seed=1).astype("float64")
        over = np.sign(x @ self.w + 0.1 - y)
        model = self.model(pinball)
        got = FGSM(epsilon=0.2, loss="model")(model, x, y.reshape(6, 1))
        expected = x + 0.2 * over[:, None] * np.sign(self.w)
        np.testing.assert_allclose(got, expected, atol=1e-12)
        with pytest.raises(ValueError, match="`y` must hold classes from 0 to 1"):
            FGSM(epsilon=0.2)(model, x, y)

    @pytest.mark.parametrize("norm", NORMS)
    def test_pgd_goes_as_far_as_it_can(self, norm):
        x, y = rows(6, 4).astype("float64"), rows(6, seed=1).astype("float64")
        residual = x @ self.w + 0.1 - y
        expected = attack(x, lambda _: residual[:, None] * self.w, norm, 0.1, 6, 0.3)
        pgd = PGD(
            epsilon=0.3, step_size=0.1, iterations=6, norm=norm, random_init=False
        )
        got = pgd(self.model("mse"), x, y)
        np.testing.assert_allclose(got, expected, atol=1e-12)

    def test_of_several_starts_the_worst_counts(self):
        x, y = rows(20, 4).astype("float64"), rows(20, seed=1).astype("float64")
        model = self.model("mse")

        def loss(restarts):
            pgd = PGD(
                epsilon=0.3, step_size=0.01, iterations=1, restarts=restarts, seed=1
            )
            x_adv = pgd(model, x, y, batch_size=20)
            return (x_adv @ self.w + 0.1 - y) ** 2

        assert (loss(6) >= loss(1) - 1e-12).all()
        assert loss(6).mean() > loss(1).mean()

    def test_targeted_comes_closer(self):
        x, y = rows(6, 4).astype("float64"), rows(6, seed=1).astype("float64") * 9
        got = FGSM(epsilon=0.01, targeted=True)(self.model("mse"), x, y)
        before, after = (np.abs(v @ self.w + 0.1 - y) for v in (x, got))
        assert (after < before).all()

    def test_a_new_loss_is_a_new_attack(self):
        x, y = rows(6, 4).astype("float64"), rows(6, 2, seed=1).astype("float64")
        model = self.model("mse", 2)
        residual = x @ self.w[:, None] + 0.1 - y
        for loss, weight in (("mse", residual), ("mae", np.sign(residual))):
            model.compile("sgd", loss)
            got = FGSM(epsilon=0.2, norm="l2")(model, x, y)
            gradient = weight.sum(1, keepdims=True) * self.w
            expected = attack(x, lambda _, g=gradient: g, "l2", 0.2, 1, 0.2)
            np.testing.assert_allclose(got, expected, atol=1e-9)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (
                np.zeros((6, 2)),
                r"`y` must hold numbers.*\[None, 1\].*6, 2",
            ),
            (np.full(6, np.nan), "`y` must be finite. Received: 6 values"),
            pytest.param(
                np.array(["a"] * 6),
                "`y` must hold numbers.*string",
                marks=only_tensorflow,
            ),
            ([np.zeros(6), np.zeros(6)], "`y` must hold numbers"),
        ],
    )
    def test_values_that_do_not_fit(self, y, message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            FGSM(epsilon=0.1)(self.model("mse"), rows(6, 4).astype("float64"), y)


def test_the_loss_of_the_model_is_the_compiled_one():
    x, y = examples(0)
    model = linear()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = FGSM(epsilon=0.2, norm="l2")(model, x, y)
    got = FGSM(epsilon=0.2, norm="l2", loss="model")(model, x, y)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    one_hot = linear()
    one_hot.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    got = FGSM(epsilon=0.2, norm="l2", loss="model")(one_hot, x, np.eye(3)[y])
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"(?s)`y`.*cal_crossentropy.*Received"):
        FGSM(epsilon=0.2, loss="model")(one_hot, x, y)


@pytest.mark.parametrize(
    ("units", "labels", "name"),
    [
        (3, [0, 1, 2, 0], "sparse_categorical_crossentropy"),
        (3, np.eye(3)[[0, 1, 2, 0]], "categorical_crossentropy"),
        (1, [0, 1, 1, 0], "binary_crossentropy"),
    ],
)
def test_the_cross_entropy_that_fits_the_labels_is_found(units, labels, name):
    activation = "sigmoid" if units == 1 else "softmax"
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, activation)])
    # By this one, some rows are right: what is wrong already does not move.
    model.layers[0].set_weights([rows(4, units, seed=2), np.zeros(units)])
    x, y = rows(4, 4), np.array(labels)
    got = []
    for loss in ("crossentropy", name):
        model.compile("sgd", loss)
        got.append(FGSM(epsilon=0.2, norm="l2", loss="model")(model, x, y))
        FGSM(epsilon=0.2)(model, x, y)
    np.testing.assert_array_equal(*got)
    assert np.abs(got[0] - x).max() > 0.01


def test_a_function_of_one_s_own_gets_labels_as_in_keras():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.set_weights([np.float32([[1], [-2], [0.5], [0.25]]), np.float32([0.1])])
    seen = []

    def squared(y, scores):
        seen.append((dtype_of(y), len(y.shape), len(scores.shape)))
        return ops.mean(ops.square(y - scores), axis=-1)

    model.compile("sgd", squared)
    x, y = rows(6, 4), np.array([0, 1, 0, 1, 1, 0])
    FGSM(epsilon=0.1, loss="model")(model, x, y)
    assert set(seen) == {("float32", 2, 2)}


def test_a_loss_that_gives_a_scalar_is_none():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile("sgd", lambda y, scores: ops.mean(ops.square(y - scores)))
    with pytest.raises(ValueError, match=r"value for each example.*lambda.*a scalar"):
        FGSM(epsilon=0.1, loss="model")(model, rows(6, 4), np.zeros(6))


@pytest.mark.parametrize("loss", [None, ["mse", "mse"]])
def test_the_loss_of_the_model_needs_one(loss):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    if loss is not None:
        model.compile("sgd", loss)
    with pytest.raises(ValueError, match=r"`loss='model'`.*`model.compile.*Received: "):
        FGSM(epsilon=0.1, loss="model")(model, rows(6, 4), np.zeros(6))
