import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.linear import LINEAR, linear_config, linear_step
from helpers.models import X, Y, busy_base, cross_entropy, regularized, rows
from helpers.oracle import norms
from helpers.slow import slow
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers, ops

from advreg import (
    AdversarialRegularization,
    AdvRegConfig,
    adversarial_loss,
    make_adv_reg_config,
)
from advreg.attacks import BIM, FGSM
from advreg.datasets import load
from advreg.network.precision import Precision


def test_float64_models_stay_float64():
    base = keras.Sequential([keras.Input((4,), dtype="float64")])
    base.add(layers.Dense(1, dtype="float64"))
    base.layers[0].set_weights([LINEAR.w[:, None], np.array([LINEAR.b])])
    model = AdversarialRegularization(base, linear_config("l2", 4), dtype="float64")
    model.compile("sgd", "mse")
    x, y = rows(7, 4).astype("float64"), rows(7, seed=1).astype("float64")
    x_adv, *_ = linear_step(x, y, np.ones(7), "l2", 4)
    # Keras computes losses in float32 unless it is told otherwise: directions of a
    # linear model do not notice.
    np.testing.assert_allclose(model.perturb_on_batch(x, y), x_adv, atol=1e-12)


def test_inputs_are_cast_by_the_base_alone():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        cast = layers.Lambda(lambda x: ops.cast(x, "float32"), dtype="float32")
        base = keras.Sequential([keras.Input((1,)), cast])
        model = AdversarialRegularization(base)
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.array([[70000.125]], "float32")  # Infinite in float16.
    np.testing.assert_array_equal(model(x), base(x))
    np.testing.assert_array_equal(model(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        base = busy_base()
    finally:
        keras.config.set_dtype_policy("float32")
    config = make_adv_reg_config(
        adv_step_size=0.1, adv_grad_norm="l2", pgd_iterations=2, pgd_epsilon=0.15
    )
    model = regularized(base, config, optimizer="adam")
    assert model.dtype_policy.name == policy
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    history = model.fit(X, Y, epochs=5, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())
    moved = model.perturb_on_batch(X, Y) - X
    assert moved.dtype == np.float32
    size = norms(moved, "l2")
    assert (size <= 0.15 + 1e-6).all()
    assert size.max() > 0.1


@pytest.mark.parametrize("iterations", [1, 3])
def test_attacks_take_the_gradient_of_the_scaled_loss(iterations, mode):
    """In half precision the gradient of this loss underflows unless it is scaled."""
    config = make_adv_reg_config(
        adv_step_size=0.2, pgd_iterations=iterations, pgd_epsilon=0.3
    )
    base = keras.Sequential([keras.Input((6,)), layers.Dense(3, dtype="mixed_float16")])
    moved = []
    for weight in (1.0, 1e-7):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        model = regularized(
            base, config, optimizer=optimizer, loss_weights=[weight], **mode
        )
        moved.append(model.perturb_on_batch(X, Y) - X)
    assert norms(moved[0], "l2").min() > 0.19
    np.testing.assert_allclose(moved[1], moved[0], atol=0.02)


# --- The range of float16


def half():
    return Precision(keras.Sequential([layers.Dense(2, dtype="mixed_float16")]))


def held(slope, asked=None):
    """A function that returns a gradient times a scale, as float16 holds it."""
    slope = tf.convert_to_tensor(slope)

    def take(scale):
        if asked is not None:
            asked.append(scale)
        if scale is None:
            return [slope, None]
        return [tf.cast(slope * tf.cast(scale, slope.dtype), "float16"), None]

    return take


magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
slopes = hnp.arrays(
    "float32",
    (3, 1),
    elements=st.one_of(magnitudes, magnitudes.map(lambda value: -value), st.just(0.0)),
)


@given(slopes)
def test_gradients_are_in_the_range_of_float16(slope):
    gradient, missing = half().gradients(held(slope))
    np.testing.assert_allclose(gradient, slope, rtol=2e-2)
    assert gradient.dtype == tf.float32
    assert missing is None


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("slope", [[[3.0, 40.0], [0.0, 1e-13]], [[1e6, -0.1]]])
def test_what_float16_cannot_hold_in_a_compiled_function(slope, jit):
    precision = half()

    @tf.function(jit_compile=jit)
    def taken(slope):
        return precision.gradients(held(slope))[0]

    np.testing.assert_allclose(taken(tf.constant(slope)), slope, rtol=2e-3)


@pytest.mark.parametrize(
    ("slope", "retaken"),
    [
        ([[1.0, 0.0], [-1e-3, 0.0]], False),
        ([[4.0], [1e-9]], False),
        ([[4.0], [1e-12]], True),
        ([[4.0], [0.0]], True),
        ([[2.0]], True),  # 65536 is infinite.
        ([[np.inf], [1.0]], True),
        ([[np.nan]], True),
    ],
)
def test_a_gradient_is_taken_again_only_where_it_must_be(slope, retaken):
    asked = []
    found, _ = half().gradients(held(slope, asked))
    assert asked == [2.0**15, None] if retaken else [2.0**15]
    np.testing.assert_allclose(found, slope, rtol=2e-2)
    model = keras.Sequential([layers.Dense(2, dtype="mixed_float16")])
    asked.clear()
    Precision(model, retakes=False).gradients(held(slope, asked))
    assert asked == [2.0**15]
    # Replicas that wait for each other compute in float32 at once.
    asked.clear()
    Precision(model, in_step=True).gradients(held(slope, asked))
    assert asked == [None]


def test_in_float32_gradients_are_taken_as_they_are():
    asked = []
    model = keras.Sequential([layers.Dense(2, dtype="mixed_bfloat16")])
    gradients = [tf.constant([[np.nan]]), None]
    found = Precision(model).gradients(lambda scale: asked.append(scale) or gradients)
    assert asked == [None]
    assert found is gradients


def test_which_models_compute_in_half_precision():
    def built(dtype):
        return keras.Sequential([layers.Dense(2, dtype=dtype)])

    assert Precision(built("mixed_float16")).half
    assert Precision(keras.Sequential([built("float16"), layers.Dense(2)])).half
    assert not Precision(built("mixed_bfloat16")).half
    assert not Precision(built("float32"), {"x": tf.zeros(2)}).half
    assert Precision(built("float32"), {"x": tf.zeros(2, "float16")}).half
    assert not Precision(lambda x: x, [None, tf.constant("a")]).half


def test_layers_come_back_to_their_precision_after_an_error():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, dtype="float16")])

    def fail(scale):
        if scale is None:
            assert model.layers[0].compute_dtype == "float32"
            assert model(np.ones((1, 2))).dtype == tf.float32
            raise RuntimeError("no more")
        scales.append(scale)
        return [tf.fill((1, 1), 3.0 if scale < 2.0**15 else np.inf)]

    scales = []
    # What cannot be computed in float32 is taken under a smaller scale.
    (found,) = Precision(model).gradients(fail)
    np.testing.assert_array_equal(found, [[3 / 2.0**7]])
    assert scales == [2.0**15, 2.0**7]
    assert model.layers[0].dtype_policy.name == "float16"
    assert model(np.ones((1, 2))).dtype == tf.float16


def narrowing(policy):
    """Its gradient shrinks from layer to layer further than float16 reaches.

    The softmax in float16 allows no scale that would make up for it.
    """
    keras.config.set_dtype_policy(policy)
    try:
        base = keras.Sequential([keras.Input((6,))])
        for _ in range(4):
            base.add(layers.Dense(6, kernel_initializer="orthogonal"))
            base.add(layers.Rescaling(1 / 32))
        base.add(layers.Dense(3, "softmax"))
    finally:
        keras.config.set_dtype_policy("float32")
    return base


@pytest.mark.parametrize("mode", ["eager", *slow("function", "jit")], indirect=True)
@pytest.mark.parametrize("fields", [*slow({}), {"pgd_iterations": 3}])
def test_no_scale_is_needed_that_float16_has_not(fields, mode):
    config = make_adv_reg_config(1.0, adv_step_size=0.2, adv_grad_norm="linf", **fields)
    moved = []
    for policy in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(0)
        loss = "sparse_categorical_crossentropy"
        model = regularized(narrowing(policy), config, loss, **mode)
        moved.append(model.perturb_on_batch(X, Y) - X)
        logs = model.train_on_batch(X, Y, return_dict=True)
        assert np.isfinite(logs["scaled_adversarial_loss"])
    assert (moved[0] != 0).all()
    np.testing.assert_array_equal(moved[1], moved[0])


def steep(dtype):
    """A linear model, whose gradient float16 cannot hold at the scale of Keras."""
    base = keras.Sequential([keras.Input((6,)), layers.Dense(3, dtype=dtype)])
    base.set_weights([rows(6, 3, seed=4), np.zeros(3)])
    return base


STEEP = [2.0**10]  # The weight of its loss.


@pytest.mark.parametrize("scaling", ["by Keras", *slow("large", "none")])
@pytest.mark.parametrize(
    "fields", [{"pgd_iterations": 3}, *slow({}, {"random_init": True})]
)
def test_as_much_moves_in_half_precision_as_in_float32(scaling, fields, mode):
    config = make_adv_reg_config(
        1.0, adv_step_size=0.2, adv_grad_norm="linf", pgd_epsilon=0.2, **fields
    )
    logs = []
    for dtype in ("float32", "mixed_float16"):
        optimizer = keras.optimizers.SGD(0.0)
        if dtype == "mixed_float16" and scaling != "none":
            scale = 2.0 ** (15 if scaling == "by Keras" else 30)
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, scale)
        keras.utils.set_random_seed(1)
        model = regularized(
            steep(dtype), config, optimizer=optimizer, loss_weights=STEEP, **mode
        )
        moved = model.perturb_on_batch(X, Y) - X
        assert (moved != 0).all()
        np.testing.assert_allclose(np.abs(moved).max(), 0.2, rtol=1e-5)
        logs.append(model.train_on_batch(X, Y, return_dict=True))
    for name, value in logs[0].items():
        np.testing.assert_allclose(logs[1][name], value, rtol=1e-2)
    assert logs[0]["scaled_adversarial_loss"] > 1.2 * logs[0]["labeled_loss"]


@pytest.mark.parametrize("name", ["mart", *slow("trades", "logit_pairing")])
def test_every_objective_moves_in_half_precision(name):
    config = getattr(AdvRegConfig, name)(0.2, iterations=2, init_radius=0.1)
    logs = []
    for dtype in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(1)
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0))
        model = regularized(
            steep(dtype), config, optimizer=optimizer, loss_weights=STEEP
        )
        logs.append(model.train_on_batch(X, Y, return_dict=True))
    for key, value in logs[0].items():
        np.testing.assert_allclose(logs[1][key], value, rtol=2e-2)


def test_weights_move_in_half_precision_too():
    config = make_adv_reg_config(1.0, adv_step_size=0.1, weight_perturbation=0.1)
    logs = []
    for dtype in ("float32", "mixed_float16"):
        optimizer = keras.optimizers.SGD(0.0)
        if dtype == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0**30)
        model = regularized(
            steep(dtype), config, optimizer=optimizer, loss_weights=STEEP
        )
        logs.append(model.train_on_batch(X, Y, return_dict=True))
    for key, value in logs[0].items():
        np.testing.assert_allclose(logs[1][key], value, rtol=1e-2)


@pytest.mark.parametrize("graph", [False, *slow(True)])
@pytest.mark.parametrize("iterations", [1, *slow(3)])
def test_custom_loops_in_half_precision(graph, iterations):
    config = make_adv_reg_config(
        1.0, adv_step_size=0.2, adv_grad_norm="linf", pgd_iterations=iterations
    )

    def loss_fn(y, y_pred):
        return cross_entropy()(y, y_pred) * STEEP[0] * 2.0**8

    losses = []
    for dtype in ("float32", "mixed_float16"):
        model = steep(dtype)

        def run(x, y, model=model):
            return adversarial_loss(x, y, model, loss_fn, adv_config=config)

        run = tf.function(run) if graph else run
        losses.append(float(run(tf.constant(X), tf.constant(Y))))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("iterations", [*slow(1), 4])
@pytest.mark.parametrize(("gain", "bias"), [(1.0, 18.0), (1.0, 28.0), (1e3, 0.0)])
def test_attacks_in_half_precision(iterations, gain, bias, run_eagerly):
    """Losses of confident examples have gradients that float16 takes for 0."""
    x, moved = X / gain, []
    for dtype in ("float32", "mixed_float16"):
        base = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Rescaling(gain, dtype=dtype),
                layers.Dense(3, dtype=dtype),
            ]
        )
        base.set_weights([rows(6, 3, seed=4) * 0.1, np.array([bias, 0.0, 0.0])])
        base.compile(run_eagerly=run_eagerly)
        attack = BIM(0.1 / gain, iterations=iterations, from_logits=True)
        found = attack(base, x, np.zeros(12, int), early_stop=False)
        moved.append((found - x) * gain)
    assert (moved[0] != 0).all()
    assert (np.sign(moved[1]) == np.sign(moved[0])).all()
    np.testing.assert_allclose(moved[1], moved[0], atol=1e-4)


def test_black_pixels_behind_a_root_move_in_half_precision():
    root = layers.Lambda(lambda x: ops.sqrt(x), dtype="mixed_float16")
    base = keras.Sequential([keras.Input((6,)), root, layers.Dense(3)])
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="linf")
    model = regularized(base, config)
    moved = model.perturb_on_batch(np.zeros((12, 6), "float32"), Y)
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-6)


def test_regularizers_in_half_precision(mode):
    """Keras itself stumbles over losses of two types."""
    stack = [
        layers.Dense(5, activity_regularizer="l2", dtype="mixed_float16"),
        layers.Dense(3),
    ]
    model = regularized(keras.Sequential([keras.Input((6,)), *stack]), **mode)
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert logs["loss"] > logs["labeled_loss"] + logs["scaled_adversarial_loss"]
    assert np.isfinite(model.evaluate(X, Y, verbose=0))


def train_on_mnist(data, policy):
    keras.utils.set_random_seed(0)
    optimizer = keras.optimizers.Adam(3e-3)
    keras.config.set_dtype_policy(policy)
    try:
        stack = [
            layers.Conv2D(8, 5, strides=2, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(10),
        ]
        base = keras.Sequential([keras.Input((28, 28, 1)), *stack])
    finally:
        keras.config.set_dtype_policy("float32")
    if policy == "mixed_float16":
        # Too large a scale at first, and a larger one every 40 steps, overflow.
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**22, dynamic_growth_steps=40
        )
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="linf")
    model = regularized(base, config, optimizer=optimizer, metrics=["accuracy"])
    batch, steps = 32, 600
    size = batch * steps
    model.fit(
        data.x_train[:size],
        data.y_train[:size],
        batch_size=batch,
        shuffle=False,
        verbose=0,
    )
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    logs = model.evaluate(
        data.x_test, data.y_test, batch_size=500, verbose=0, return_dict=True
    )
    return logs["accuracy"], steps - int(optimizer.iterations)


@pytest.mark.slow
def test_overflows_in_half_precision_do_no_harm(mnist_dir):
    data = load("mnist")
    accuracy, skipped = train_on_mnist(data, "float32")
    assert skipped == 0
    half, skipped = train_on_mnist(data, "mixed_float16")
    assert skipped >= 8
    assert half > accuracy - 0.005
    assert accuracy > 0.93


class OfItsOwnType(keras.Model):
    """Code that fixes its type, so that its layers cannot compute in float32."""

    def __init__(self, gain):
        super().__init__(dtype="mixed_float16")
        self.hidden = layers.Dense(8, "relu", dtype="mixed_float16")
        self.last = layers.Dense(3, dtype="mixed_float16")
        self.gain = gain

    def call(self, inputs):
        inputs = tf.cast(inputs, "float16")
        joined = tf.concat([self.hidden(inputs), inputs], -1) * self.gain
        return tf.cast(self.last(joined), "float32")


@pytest.mark.parametrize("gain", slow(1.0, 30.0))
def test_code_that_fixes_its_type_trains_and_moves_in_float16(gain):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    y = np.arange(16) % 3
    model = AdversarialRegularization(
        OfItsOwnType(gain),
        make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="infinity"),
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, verbose=0)
    moved = np.abs(model.perturb_on_batch(x, y) - x)
    assert (moved > 0.09).mean() > 0.9
    moved = np.abs(FGSM(0.1)(model, x, y, early_stop=False) - x)
    assert (moved > 0.09).mean() > 0.9
