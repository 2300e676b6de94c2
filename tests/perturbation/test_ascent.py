import dataclasses
import inspect

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from helpers.ascent import ascend, follow
from helpers.oracle import NORMS, LinearRegression, attack, norms
from helpers.slow import slow
from hypothesis import given
from hypothesis import strategies as st

from advreg import (
    AdvNeighborConfig,
    AdvRegConfig,
    adversarial_loss,
    gen_adv_neighbor,
    make_adv_reg_config,
    nsl,
)
from advreg.backend.tensorflow.operations import to_tensor
from advreg.network.gradients import differentiable, input_gradients
from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Settings

RNG = np.random.default_rng(0)
LINEAR = LinearRegression([1.0, -2.0, 0.5, 0.0], 0.1)


def linear_model(dtype="float32"):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype=dtype)])
    model.layers[0].set_weights([LINEAR.w[:, None], np.array([LINEAR.b])])
    return model


# --- Invariants


@given(
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    batch=st.integers(1, 3),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    iterations=st.integers(1, 4),
    step=st.floats(0.0, 2.0, allow_subnormal=False),
    radius=st.floats(0.0, 2.0, allow_subnormal=False),
    random_init=st.booleans(),
    low=st.floats(-1.0, 0.0, allow_subnormal=False),
    high=st.floats(0.0, 1.0, allow_subnormal=False),
    mask=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=27, max_size=27),
    seed=st.integers(0, 10**6),
)
def test_stays_in_the_ball_and_the_range_and_behind_the_mask(
    norm,
    dtype,
    batch,
    shape,
    iterations,
    step,
    radius,
    random_init,
    low,
    high,
    mask,
    seed,
):
    rng = np.random.default_rng(seed)
    dtype = tf.as_dtype(dtype).as_numpy_dtype  # NumPy alone has no bfloat16.
    values = int(np.prod(shape))
    x = rng.uniform(low, high, (batch, *shape))
    x[abs(x) < np.finfo("float32").tiny] = 0.0  # TensorFlow flushes subnormals.
    x = x.astype(dtype)
    slope = rng.normal(size=(batch, values)) * rng.integers(0, 2, (batch, 1))
    mask = np.array(mask[:values])
    # NSL's configuration takes steps of 0, and radii larger than the range.
    config = nsl.configs.AdvNeighborConfig(
        feature_mask=mask.reshape(shape),
        adv_step_size=step,
        adv_grad_norm=norm,
        clip_value_min=low,
        clip_value_max=high,
        pgd_iterations=iterations,
        pgd_epsilon=radius,
        random_init=random_init,
    )
    x_adv = ascend(x, slope.reshape(x.shape), config, keras.random.SeedGenerator(seed))
    d = (x_adv.astype("float64") - x.astype("float64")).reshape(batch, values)
    rounding = float(ml_dtypes.finfo(dtype).eps) * 2
    assert (x_adv >= np.array(low, dtype)).all()
    assert (x_adv <= np.array(high, dtype)).all()
    assert np.isfinite(d).all()
    assert (norms(d, norm) <= radius + values * rounding).all()
    assert not d[:, mask == 0].any()
    if not random_init:
        assert not d[~slope.any(1)].any()


@given(
    norm=st.sampled_from(NORMS),
    values=st.integers(1, 6),
    radius=st.floats(0.01, 2.0),
    seed=st.integers(0, 10**6),
)
def test_no_random_point_of_the_ball_is_worse_for_a_linear_model(
    norm, values, radius, seed
):
    rng = np.random.default_rng(seed)
    x, slope = rng.normal(size=(2, 1, values))
    config = AdvNeighborConfig(adv_step_size=radius, adv_grad_norm=norm)
    d = follow(x, slope, config)
    points = rng.normal(size=(100, values))
    points *= radius / norms(points, norm)[:, None]
    assert (points @ slope[0] <= d @ slope[0] + 1e-12).all()


# --- Against the oracle


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [1, *slow(2), 7])
@pytest.mark.parametrize("radius", [None, 0.35])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("compile", ["eager", "function", *slow("jit")])
def test_equals_the_oracle(norm, iterations, radius, clip, compile):
    # The loss is the squared distance from a point: its gradient changes on the way.
    x = RNG.uniform(-1, 1, (5, 4))
    center = RNG.uniform(-1, 1, (5, 4))
    low, high = (-0.8, 0.9) if clip else (None, None)
    settings = Settings.of(
        AdvNeighborConfig(
            adv_step_size=0.2,
            adv_grad_norm=norm,
            pgd_iterations=iterations,
            pgd_epsilon=radius,
            clip_value_min=low,
            clip_value_max=high,
        )
    )

    def loss(x):
        return tf.reduce_sum((x - center) ** 2)

    def run(x):
        def gradient_at(x):
            return input_gradients(loss, x, [True])

        return perturb(x, gradient_at(x), gradient_at, settings)

    if compile != "eager":
        run = tf.function(run, jit_compile=compile == "jit")
    expected = attack(
        x, lambda x: 2 * (x - center), norm, 0.2, iterations, radius, low, high
    )
    np.testing.assert_allclose(run(tf.constant(x)), expected, atol=1e-12)


# --- What is not finite


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("random_init", [False, True])
def test_inputs_that_are_not_finite_stay_and_harm_nothing(
    norm, value, clip, random_init
):
    x = np.array([[value, 0.5], [0.2, 0.5]], "float32")
    config = AdvNeighborConfig(
        adv_step_size=0.1,
        adv_grad_norm=norm,
        pgd_iterations=3,
        pgd_epsilon=0.2,
        clip_value_min=0.0 if clip else None,
        clip_value_max=1.0 if clip else None,
        random_init=random_init,
    )
    slope = tf.constant([[np.nan, 1.0], [2.0, 1.0]])
    x_adv = perturb(
        tf.constant(x),
        [slope],
        lambda _: [slope],
        Settings.of(config),
        keras.random.SeedGenerator(0),
    ).numpy()
    np.testing.assert_array_equal(x_adv[0, 0], x[0, 0])
    assert np.isfinite(x_adv[0, 1])
    assert norms(x_adv[1:] - x[1:], norm) <= 0.2 + 1e-6
    assert norms(x_adv[1:] - x[1:], norm) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_not_numbers_move_nothing(norm):
    config = AdvNeighborConfig(adv_step_size=1.0, adv_grad_norm=norm)
    nan = np.nan
    d = follow(np.zeros((2, 2)), np.array([[nan, 1.0], [nan, nan]]), config)
    np.testing.assert_allclose(d, [[0, 1], [0, 0]])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_gradients_take_the_step(norm, sign):
    config = AdvNeighborConfig(adv_step_size=1.0, adv_grad_norm=norm)
    d = follow(np.zeros((1, 2)), np.array([[sign * np.inf, 1.0]]), config)
    np.testing.assert_allclose(d, [[sign, norm == "infinity"]], atol=1e-20)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("graph", [False, True])
def test_black_pixels_behind_a_root_move_in_custom_loops(norm, graph):
    x = tf.constant([[0.0, 0.25]])
    config = AdvNeighborConfig(adv_step_size=0.1, adv_grad_norm=norm)

    def neighbor(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sqrt(x))
        return gen_adv_neighbor(x, loss, config, gradient_tape=tape)[0]

    moved = (tf.function(neighbor) if graph else neighbor)(x)
    expected = [[0.1, 0.35 if norm == "infinity" else 0.25]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_zero_gradients_move_nothing(norm, dtype):
    config = AdvNeighborConfig(adv_step_size=1.0, adv_grad_norm=norm, pgd_iterations=2)
    x = tf.cast(RNG.normal(size=(2, 3)), dtype)
    assert not follow(x, tf.zeros((2, 3)), config).any()


# --- Random starts


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("radius", "reach"), [(None, 0.3), (0.0, 0.0), (0.7, 0.7)])
def test_random_starts_fill_the_ball(norm, radius, reach):
    config = AdvNeighborConfig(
        adv_step_size=0.3, pgd_epsilon=radius, adv_grad_norm=norm, random_init=True
    )
    # Without a gradient the random start is all that is left.
    d = follow(np.zeros((500, 3)), tf.zeros((500, 3)), config)
    size = norms(d, norm)
    assert (size <= reach + 1e-9).all()
    assert size.max() >= 0.95 * reach
    assert size.std() > 0 or reach == 0


def test_the_first_step_after_a_random_start_follows_its_own_gradient():
    seen = []

    def gradient_at(x):
        seen.append(x.numpy())
        return [-x]

    x = tf.ones((2, 3))
    config = AdvNeighborConfig(adv_step_size=0.5, random_init=True, pgd_iterations=2)
    perturb(x, [x], gradient_at, Settings.of(config))
    assert len(seen) == 2
    assert not np.allclose(seen[0], 1.0)


@pytest.mark.parametrize("times", [0, 1, 4])
def test_power_iterations_turn_the_start_to_the_largest_curvature(times):
    """`d ← radius · Hd / ‖Hd‖`, on a loss of which H is the second derivative."""
    rng = np.random.default_rng(1)
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    curvature = axes @ np.diag([5.0, 2.0, 1.0, 0.5, 0.0]) @ axes.T
    x = tf.constant(rng.normal(size=(40, 5)))
    config = AdvNeighborConfig(
        random_init=True, init_radius=0.1, adv_grad_norm="l2", pgd_iterations=0
    )

    def gradient_at(features):
        return [(features - x) @ curvature]

    @tf.function
    def start(config, seed):
        return perturb(x, [x], gradient_at, Settings.of(config), seed) - x

    first, found = (
        start(
            dataclasses.replace(config, power_iterations=power_iterations),
            keras.random.SeedGenerator(3),
        ).numpy()
        for power_iterations in (0, times)
    )
    expected = first @ np.linalg.matrix_power(curvature, times)
    if times:
        expected *= 0.1 / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_random_starts_with_unknown_batch_size():
    config = AdvNeighborConfig(adv_step_size=0.5, random_init=True, pgd_iterations=3)
    seed = keras.random.SeedGenerator(0)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 2))])
    def run(x):
        return perturb(x, [x], lambda x: [x], Settings.of(config), seed)

    for batch in (1, 5):
        x = np.ones((batch, 3, 2), "float32")
        assert np.isfinite(run(x)).all()


# --- What moves, and how


@pytest.mark.parametrize("norm", NORMS)
def test_flags_hold_values_in_place(norm):
    x = tf.constant(RNG.normal(size=(3, 2, 2)))
    flags = tf.constant([True, False, True])[:, None, None]
    config = AdvNeighborConfig(
        adv_step_size=0.5, adv_grad_norm=norm, random_init=True, clip_value_min=3.0
    )
    x_adv = perturb(
        x,
        [x],
        lambda x: [x],
        Settings.of(config),
        keras.random.SeedGenerator(0),
        [flags],
    )
    np.testing.assert_array_equal(x_adv[1], x[1])
    assert (x_adv.numpy()[::2] >= 3.0).all()


def test_a_mask_of_one_feature_leaves_the_weight_of_the_others():
    x = {"a": tf.zeros((1, 2)), "b": tf.zeros((1, 2))}
    slopes = [tf.constant([[3.0, 0.0]]), tf.constant([[0.0, 2.0]])]
    config = AdvNeighborConfig(adv_step_size=1.0, feature_mask={"a": 0.5})
    got = perturb(x, slopes, lambda _: slopes, Settings.of(config))
    np.testing.assert_allclose(got["a"], [[0.6, 0.0]], atol=1e-6)
    np.testing.assert_allclose(got["b"], [[0.0, 0.8]], atol=1e-6)


@pytest.mark.parametrize(("iterations", "loops"), [(1, 0), (2, 0), (3, 1), (40, 1)])
def test_many_iterations_are_one_loop(iterations, loops):
    config = AdvNeighborConfig(adv_step_size=0.5, pgd_iterations=iterations)
    run = tf.function(
        lambda x: perturb(x, [x], lambda x: [x], Settings.of(config))
    ).get_concrete_function(tf.TensorSpec((2, 3)))
    kinds = [operation.type for operation in run.graph.get_operations()]
    assert sum(kind in ("While", "StatelessWhile") for kind in kinds) == loops


def test_only_keys_of_the_outermost_dictionary_are_fixed():
    x = {
        "label": tf.zeros(2),
        "x": {"label": tf.zeros(2), "ids": tf.zeros(2, tf.int32)},
    }
    found = differentiable(x, fixed=["label"])
    paths = [path for path, _ in keras.tree.flatten_with_path(x)]
    assert dict(zip(paths, found, strict=True)) == {
        ("label",): False,
        ("x", "label"): True,
        ("x", "ids"): False,
    }


def test_what_becomes_a_tensor():
    ragged = tf.ragged.constant([[1.0], []])
    sparse = tf.sparse.from_dense([1.0])
    for leaf in (None, ragged, sparse, tf.zeros(2)):
        assert to_tensor(leaf) is leaf
    for leaf in (np.ones(2), keras.Variable([1.0]), tf.Variable([1.0])):
        assert isinstance(to_tensor(leaf), tf.Tensor)


# --- gen_adv_neighbor and adversarial_loss


def loss_fn(y, y_pred, sample_weight=None):
    return keras.losses.MeanSquaredError()(y, y_pred, sample_weight)


def data(dtype="float32"):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)).astype(dtype), rng.normal(size=(6, 1)).astype(dtype)
    return x, y, rng.uniform(0, 2, 6).astype(dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("graph", [False, True])
def test_gen_adv_neighbor_equals_the_oracle(norm, iterations, graph):
    x, y, _ = data()
    model = linear_model()
    config = AdvNeighborConfig(
        adv_step_size=0.2,
        adv_grad_norm=norm,
        pgd_iterations=iterations,
        pgd_epsilon=0.3,
    )

    def neighbor(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_fn(y, model(x))
        return gen_adv_neighbor(
            x,
            loss,
            config,
            gradient_tape=None if graph else tape,
            pgd_model_fn=model,
            pgd_loss_fn=loss_fn,
            pgd_labels=y,
        )

    run = tf.function(neighbor) if graph else neighbor
    got, weight = run(tf.constant(x), tf.constant(y))
    expected = attack(
        x.astype("float64"),
        lambda x: LINEAR.input_gradient(x, y[:, 0], 1.0),
        norm,
        0.2,
        iterations,
        0.3,
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(weight, np.ones((6, 1)))


@pytest.mark.parametrize("weighted", [*slow(False), True])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("known", ["nothing", "predictions", "loss"])
@pytest.mark.parametrize("graph", [False, True])
def test_adversarial_loss_equals_the_oracle(weighted, iterations, known, graph):
    x, y, weights = data()
    model = linear_model()
    config = make_adv_reg_config(
        adv_step_size=0.2,
        adv_grad_norm="l2",
        pgd_iterations=iterations,
        pgd_epsilon=0.3,
    )
    weight = weights if weighted else None

    def run(x, y):
        arguments = {}
        if known != "nothing":
            with tf.GradientTape() as tape:
                tape.watch(x)
                predictions = model(x)
                loss = loss_fn(y, predictions, weight)
            if known == "predictions":
                arguments = {"predictions": predictions, "gradient_tape": tape}
            else:
                arguments = {"labeled_loss": loss, "gradient_tape": tape}
        with tf.GradientTape() as outer:
            loss = adversarial_loss(
                x, y, model, loss_fn, weight, adv_config=config, **arguments
            )
        return loss, outer.gradient(loss, model.trainable_variables)

    if graph:
        run = tf.function(run)
    loss, (kernel, bias) = run(tf.constant(x), tf.constant(y))
    weights = weights.astype("float64") if weighted else np.ones(6)
    x_adv = attack(
        x.astype("float64"),
        lambda x: LINEAR.input_gradient(x, y[:, 0], weights),
        "l2",
        0.2,
        iterations,
        0.3,
    )
    expected = LINEAR.weight_gradient(x_adv, y[:, 0], weights)
    np.testing.assert_allclose(loss, LINEAR.loss(x_adv, y[:, 0], weights), rtol=1e-5)
    np.testing.assert_allclose(kernel[:, 0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias[0], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", ["predictions", "labeled_loss"])
def test_inside_a_function_what_is_known_needs_no_tape(known):
    x, y, _ = (tf.constant(a) for a in data())
    model = linear_model()
    expected = adversarial_loss(x, y, model, loss_fn)

    @tf.function
    def run(x, y):
        values = {"predictions": model(x)}
        values["labeled_loss"] = loss_fn(y, values["predictions"])
        return adversarial_loss(x, y, model, loss_fn, **{known: values[known]})

    np.testing.assert_allclose(run(x, y), expected, rtol=1e-6)


def test_adversarial_loss_leaves_what_cannot_move():
    x = {"x": tf.ones((2, 3)), "ids": tf.constant([0, 1])}
    seen = []

    def model(x):
        seen.append(x["ids"])
        return tf.reduce_sum(x["x"], axis=1, keepdims=True)

    loss = adversarial_loss(
        x,
        tf.zeros((2, 1)),
        model,
        loss_fn,
        adv_config=make_adv_reg_config(adv_step_size=1.0, adv_grad_norm="linf"),
    )
    np.testing.assert_allclose(loss, 36.0)
    assert all(ids is x["ids"] for ids in seen)


def test_adversarial_loss_under_an_active_persistent_tape():
    x, y, _ = (tf.constant(a) for a in data())
    model = linear_model()
    expected = adversarial_loss(x, y, model, loss_fn)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        loss = loss_fn(y, model(x))
        adv_loss = adversarial_loss(
            x, y, model, loss_fn, labeled_loss=loss, gradient_tape=tape
        )
        # No predictions and no loss: they are computed under the tape.
        again = adversarial_loss(x, y, model, loss_fn, gradient_tape=tape)
    np.testing.assert_allclose([adv_loss, again], expected, rtol=1e-6)


def test_model_kwargs_reach_the_model_and_statistics_move_twice():
    x = tf.constant(data()[0])
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.5)]
    )
    config = make_adv_reg_config(adv_step_size=0.0, pgd_epsilon=0.0, pgd_iterations=4)
    adversarial_loss(
        x,
        tf.zeros((6, 4)),
        model,
        loss_fn,
        adv_config=config,
        model_kwargs={"training": True},
    )
    mean = model.layers[0].moving_mean
    np.testing.assert_allclose(mean, 0.75 * np.mean(x, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_perturbation_is_a_constant_to_outer_tapes(graph, iterations):
    x, y, _ = (tf.constant(a) for a in data())
    model = linear_model()
    config = AdvNeighborConfig(adv_step_size=0.3, pgd_iterations=iterations)

    def gradients(x, y):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = loss_fn(y, model(x))
            neighbor, _ = gen_adv_neighbor(
                x,
                loss,
                config,
                gradient_tape=tape,
                pgd_model_fn=model,
                pgd_loss_fn=loss_fn,
                pgd_labels=y,
            )
        kernel = model.trainable_variables[0]
        return outer.gradient(neighbor, x), outer.gradient(neighbor, kernel)

    by_input, by_weight = (tf.function(gradients) if graph else gradients)(x, y)
    np.testing.assert_allclose(by_input, np.ones((6, 4)))
    assert by_weight is None


def test_errors_of_custom_loops():
    x, y, _ = (tf.constant(a) for a in data())
    model = linear_model()
    loss = loss_fn(y, model(x))
    config = AdvNeighborConfig()
    with pytest.raises(ValueError, match="`gradient_tape` is needed in eager code"):
        gen_adv_neighbor(x, loss, config)
    with pytest.raises(ValueError, match="`gradient_tape` is needed in eager code"):
        adversarial_loss(x, y, model, loss_fn, labeled_loss=loss)
    with pytest.raises(TypeError, match=r"`adv_config` must be an `AdvRegConfig`"):
        adversarial_loss(x, y, model, loss_fn, adv_config=config)
    with pytest.raises(TypeError, match=r"`config` must be an `AdvNeighborConfig`"):
        gen_adv_neighbor(x, loss, make_adv_reg_config())
    other = AdvRegConfig.trades(0.1)
    with pytest.raises(ValueError, match=r"the objective 'labeled_loss'.*Trades\(\)"):
        adversarial_loss(x, y, model, loss_fn, adv_config=other)
    with pytest.raises(TypeError, match=r"`loss_fn` must be callable.*'mse'"):
        adversarial_loss(x, y, model, "mse")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = loss_fn(y, model(x))
        with pytest.raises(ValueError, match="still recording"):
            gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    with pytest.raises(ValueError, match=r"`pgd_model_fn`.*pgd_iterations=2"):
        gen_adv_neighbor(
            x, loss, AdvNeighborConfig(pgd_iterations=2), gradient_tape=tape
        )
    with pytest.raises(ValueError, match=r"needed where.*pgd_loss_fn=None"):
        gen_adv_neighbor(
            x,
            loss,
            AdvNeighborConfig(random_init=True),
            gradient_tape=tape,
            pgd_model_fn=model,
        )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    with pytest.raises(ValueError, match="`adv_step_size` is a schedule"):
        gen_adv_neighbor(x, loss, AdvNeighborConfig(adv_step_size=schedule))


@pytest.mark.parametrize("numpy", [False, True])
def test_a_tape_that_watched_something_else(numpy):
    x, y, _ = data()
    x = x if numpy else tf.constant(x)
    model = linear_model()
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x))
    with pytest.raises(ValueError, match=r"not NumPy arrays.*tape.watch.*\(6, 4\)"):
        gen_adv_neighbor(x, loss, AdvNeighborConfig(), gradient_tape=tape)


def test_raise_invalid_gradient_names_what_cannot_be_perturbed():
    x = {"a": tf.ones((2, 1)), "b": tf.constant([1, 2]), "c": tf.ones((2, 1))}
    config = AdvNeighborConfig(adv_step_size=0.5)

    def neighbor(*raise_invalid_gradient):
        with tf.GradientTape() as tape:
            tape.watch([x["a"], x["c"]])
            loss = tf.reduce_sum(x["a"] ** 2)
        return gen_adv_neighbor(
            x, loss, config, *raise_invalid_gradient, gradient_tape=tape
        )

    result, _ = neighbor()
    np.testing.assert_allclose(result["a"], 1.5)
    np.testing.assert_allclose(result["c"], 1.0)
    with pytest.raises(ValueError, match=r"\['b', 'c'\]"):
        neighbor(True)
    x = {"a": x["a"], "c": x["a"]}
    result, _ = neighbor(True)  # Nothing is invalid here.
    np.testing.assert_allclose(result["a"], 1 + 0.5 / np.sqrt(2), rtol=1e-6)


def test_defaults_are_those_of_neural_structured_learning():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(gen_adv_neighbor).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert defaults == {
        "raise_invalid_gradient": False,
        "gradient_tape": None,
        "pgd_model_fn": None,
        "pgd_loss_fn": None,
        "pgd_labels": None,
        "use_while_loop": False,
    }
