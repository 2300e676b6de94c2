import keras
import numpy as np
import pytest
from keras import layers, ops
from linear import LINEAR, linear_config, linear_step
from models import X, Y, busy_base, regularized, rows
from oracle import norms

from advreg import AdversarialRegularization, make_adv_reg_config
from advreg.datasets import load
from advreg.demo import mnist_network


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
    optimizer = keras.optimizers.Adam()
    keras.config.set_dtype_policy(policy)
    try:
        base = mnist_network((28, 28, 1), 10)
    finally:
        keras.config.set_dtype_policy("float32")
    if policy == "mixed_float16":
        # Too large a scale at first, and a larger one every 20 steps, overflow.
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**22, dynamic_growth_steps=20
        )
    config = make_adv_reg_config(adv_step_size=0.2, adv_grad_norm="linf")
    model = regularized(base, config, optimizer=optimizer, metrics=["accuracy"])
    batch, steps = 32, 200
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
