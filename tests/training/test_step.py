"""The passes of a step: how many, at which weights, and what they leave behind."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.formulas import (
    CLASSES,
    INPUT,
    LABELS,
    START,
    TERMS,
    WEIGHTS,
    Recipe,
    assert_same,
    base_of,
    exact_cross_entropy,
    step,
)
from helpers.models import (
    X,
    Y,
    busy_base,
    classifier,
    cross_entropy,
    regularized,
    rows,
    two_outputs,
)
from helpers.slow import slow, slow_but, slow_rows
from keras import layers

from advreg import AdvRegConfig, make_adv_reg_config
from advreg.training.step import _moved

TRUTH = np.eye(CLASSES)[LABELS]


def config_of(name, **fields):
    """Any objective, in one step from the input or, where it needs that, beside it."""
    fields = {"adv_step_size": 0.1, "adv_grad_norm": "linf", **fields}
    if name in ("trades", "virtual_adversarial"):
        fields = {"random_init": True, **fields}
    return make_adv_reg_config(1.0, objective=name, **fields)


class Counting(layers.Layer):
    """Counts how often it is run, where its output is used."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def count(self, values):
        self.times += 1
        return values

    def call(self, inputs):
        same = tf.numpy_function(self.count, [inputs], inputs.dtype, stateful=False)
        same.set_shape(inputs.shape)
        return inputs + tf.stop_gradient(same - inputs)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


# --- How many passes there are


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make_adv_reg_config(0.0), 1),
        (AdvRegConfig.fgsm(0.1), 2),
        (AdvRegConfig.pgd(0.1, 3), 5),
        (AdvRegConfig.pgd(0.1, 3, clean_weight=0.0), 4),
        (AdvRegConfig.fgsm(0.1, weight_perturbation=0.1), 3),
        *slow_rows(
            [
                (make_adv_reg_config(0.0, objective="trades", random_init=True), 1),
                (make_adv_reg_config(0.0, weight_perturbation=0.1), 1),
                (AdvRegConfig.fast(0.1), 3),
                (AdvRegConfig.fgsm(0.1, clean_weight=0.0), 2),
                (AdvRegConfig.fast(0.1, clean_weight=0.0), 2),
                (make_adv_reg_config(objective="mart"), 3),
                (make_adv_reg_config(objective="mart", clean_weight=0.0), 3),
                (AdvRegConfig.trades(0.1, iterations=3), 5),
                (AdvRegConfig.virtual_adversarial(0.1), 3),
                (AdvRegConfig.fgsm(0.1, weight_perturbation=0.0), 2),
                (AdvRegConfig.fgsm(0.1, clean_weight=0.0, weight_perturbation=0.1), 3),
                (AdvRegConfig.trades(0.1, iterations=3, weight_perturbation=0.1), 8),
            ]
        ),
    ],
    ids=lambda value: None if isinstance(value, int) else "config",
)
def test_no_pass_is_run_that_is_not_needed(config, expected):
    counting = Counting()
    stack = [layers.Dense(5), counting, layers.Dense(3)]
    base = keras.Sequential([keras.Input((6,)), *stack])
    model = regularized(base, config, jit_compile=False)
    model.train_on_batch(X, Y)
    counting.times = 0
    model.train_on_batch(X, Y)
    assert counting.times == expected


# --- Weight perturbation


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in TERMS),
        ("mart", "function"),
        *(
            pytest.param(name, "function", marks=pytest.mark.slow)
            for name in TERMS
            if name != "mart"
        ),
        pytest.param("labeled_loss", "jit", marks=pytest.mark.slow),
        pytest.param("trades", "jit", marks=pytest.mark.slow),
    ],
    indirect=["mode"],
)
def test_a_step_at_moved_weights_equals_one_by_hand(name, mode, fixed_start):
    base, recipe = base_of(), Recipe(name, START, gamma=0.1)
    expected = recipe.gradients(base.get_weights(), INPUT, TRUTH)
    assert_same(step(base, recipe, LABELS, exact_cross_entropy(), **mode), expected)


@pytest.mark.parametrize("name", TERMS)
def test_moved_weights_and_sample_weights(name, fixed_start):
    base, recipe = base_of(), Recipe(name, START, gamma=0.3)
    expected = recipe.gradients(base.get_weights(), INPUT, TRUTH, WEIGHTS)
    loss = exact_cross_entropy()
    got = step(base, recipe, LABELS, loss, WEIGHTS, run_eagerly=True)
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("name", "clean_weight", "mode"),
    [
        pytest.param("labeled_loss", 0.0, "function", marks=pytest.mark.slow),
        ("labeled_loss", 1.0, "eager"),
        pytest.param("labeled_loss", 1.0, "function", marks=pytest.mark.slow),
        ("trades", 1.0, "eager"),
        ("trades", 1.0, "function"),
        pytest.param("trades", 1.0, "jit", marks=pytest.mark.slow),
    ],
    indirect=["mode"],
)
def test_weights_come_back_exactly(name, clean_weight, mode):
    config = config_of(name, clean_weight=clean_weight, weight_perturbation=0.2)
    model = regularized(
        busy_base(), config, optimizer=keras.optimizers.SGD(0.0), **mode
    )
    before = [np.array(w) for w in model.trainable_weights]
    for _ in range(2):
        model.train_on_batch(X, Y)
    for weight, value in zip(model.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_weights_come_back_after_an_error(monkeypatch):
    model = regularized(
        classifier(),
        config_of("labeled_loss", weight_perturbation=0.2),
        run_eagerly=True,
    )
    before, calls = model.get_weights(), []
    call = model.base_model.call

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            assert (model.get_weights()[0] != before[0]).any()
            raise RuntimeError("no more")
        return call(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "call", fail)
    with pytest.raises(RuntimeError, match="no more"):
        model.train_on_batch(X, Y)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_do_not_move_along_a_gradient_that_overflows():
    """The optimizer skips the step; statistics would not be whole again."""
    stack = [
        layers.Dense(8, dtype="mixed_float16"),
        layers.BatchNormalization(),
        layers.Dense(3, dtype="mixed_float16"),
    ]
    base = keras.Sequential([keras.Input((6,)), *stack])
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=2.0**40
    )
    config = config_of("labeled_loss", weight_perturbation=0.1)
    model = regularized(base, config, optimizer=optimizer, run_eagerly=True)
    model.train_on_batch(X, Y)
    assert int(optimizer.iterations) == 0
    assert all(np.isfinite(weight).all() for weight in base.get_weights())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float16", 1.0), ("float32", 1e-30), ("float32", 1e30), ("float64", 1e100)],
)
def test_how_far_weights_move_does_not_depend_on_the_scale(scale, dtype):
    kernel = tf.constant([[300.0, 0.0], [0.0, 400.0]], dtype)  # Its norm is 500.
    gradient = tf.constant([[3 * scale, np.nan], [np.nan, -4 * scale]], dtype)
    moved = _moved(kernel, gradient, 0.1)
    assert moved.dtype == dtype
    np.testing.assert_allclose(moved, [[330, 0], [0, 360]], rtol=1e-5)
    still = _moved(kernel, tf.zeros((2, 2), dtype), 0.1)
    np.testing.assert_array_equal(still, kernel)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_move_along_infinite_gradients(dtype):
    kernel = tf.constant([[300.0, 0.0], [0.0, 400.0]], dtype)
    gradient = tf.constant([[3.0, np.inf], [np.nan, -4.0]], dtype)
    moved = _moved(kernel, gradient, 0.1)
    np.testing.assert_allclose(moved, [[300, 50], [0, 400]], rtol=1e-5)


@pytest.mark.slow
def test_how_far_weights_move_may_be_a_schedule(fixed_start):
    ramp = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.0, 0.1, 0.3])
    base = base_of()
    recipe = Recipe("labeled_loss", START)
    config = dataclasses.replace(
        make_adv_reg_config(**recipe.config()), weight_perturbation=ramp
    )
    sgd = keras.optimizers.SGD(1.0)
    model = regularized(base, config, exact_cross_entropy(), sgd, jit_compile=False)
    for gamma in (0.0, 0.1, 0.3):
        recipe = dataclasses.replace(recipe, gamma=gamma)
        before = base.get_weights()
        wanted, _ = recipe.gradients(before, INPUT, TRUTH)
        model.train_on_batch(INPUT, LABELS)
        for old, new, gradient in zip(before, base.get_weights(), wanted, strict=True):
            # Schedules are computed in float32.
            np.testing.assert_allclose(old - new, gradient, rtol=1e-6, atol=1e-8)


def with_embedding():
    """A table, whose gradient is sparse, and a regulariser."""
    ids, x = keras.Input((2,), dtype="int32"), keras.Input((3,))
    embedded = layers.Flatten()(layers.Embedding(6, 2)(ids))
    hidden = layers.Dense(4, "tanh", kernel_regularizer="l2")(
        layers.Concatenate()([embedded, x])
    )
    return keras.Model([ids, x], layers.Dense(3)(hidden))


@pytest.mark.parametrize("clean_weight", [*slow(0.0), 0.5])
def test_embeddings_and_regularizers_at_moved_weights(clean_weight, mode):
    base, gamma = with_embedding(), 0.2
    ids, x, y = np.array([[0, 1], [1, 1], [4, 0]]), rows(3, 3), np.array([0, 2, 1])
    config = config_of(
        "labeled_loss",
        adv_step_size=0.0,
        pgd_epsilon=0.0,
        clean_weight=clean_weight,
        weight_perturbation=gamma,
    )
    model = regularized(base, config, optimizer=keras.optimizers.SGD(1.0), **mode)
    before = base.get_weights()
    model.train_on_batch([ids, x], y)
    after = base.get_weights()

    def labeled():
        return cross_entropy()(y, base([ids, x]))

    def own():
        return sum(base.losses)

    def gradients(function, weights):
        base.set_weights(weights)
        with tf.GradientTape() as tape:
            value = function()
        found = tape.gradient(value, base.trainable_weights)
        return [0.0 if g is None else tf.convert_to_tensor(g).numpy() for g in found]

    moved = [
        w + gamma * np.linalg.norm(w) * g / np.linalg.norm(g) if w.ndim > 1 else w
        for w, g in zip(before, gradients(labeled, before), strict=True)
    ]
    # Regularisers count once, in the pass that comes first.
    regularizers = gradients(own, before if clean_weight else moved)
    for old, new, clean, adversarial, of_own in zip(
        before,
        after,
        gradients(labeled, before),
        gradients(labeled, moved),
        regularizers,
        strict=True,
    ):
        expected = clean_weight * clean + adversarial + of_own
        np.testing.assert_allclose(old - new, expected, rtol=1e-4, atol=1e-6)


# --- What passes leave behind


def moments(base):
    """Mean and variance of the first layer, which normalises the input."""
    return [v.numpy() for v in base.layers[0].non_trainable_variables]


@pytest.mark.parametrize("gamma", [*slow(0.0), 0.1])
@pytest.mark.parametrize("iterations", [*slow(1), 3])
@pytest.mark.parametrize(
    ("name", "clean_weight", "times"),
    [*((name, 1.0, 2) for name in TERMS), ("mart", 0.0, 2), ("labeled_loss", 0.0, 1)],
)
def test_statistics_move_once_in_each_pass_of_the_loss(
    name, clean_weight, times, iterations, gamma
):
    base = keras.Sequential(
        [keras.Input((6,)), layers.BatchNormalization(momentum=0.5), layers.Dense(3)]
    )
    # Nothing moves, so that all passes see the same.
    config = config_of(
        name,
        adv_step_size=0.0,
        pgd_epsilon=0.0,
        random_init=True,
        pgd_iterations=iterations,
        clean_weight=clean_weight,
        weight_perturbation=gamma,
    )
    model = regularized(base, config, run_eagerly=True)
    model.train_on_batch(X, Y)
    left = 0.5**times
    mean, variance = moments(base)
    np.testing.assert_allclose(mean, (1 - left) * X.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, left + (1 - left) * X.var(0), rtol=1e-4)


@pytest.mark.parametrize("name", [*slow("labeled_loss"), "trades"])
def test_statistics_in_compiled_functions(name, mode):
    base = keras.Sequential(
        [keras.Input((6,)), layers.BatchNormalization(momentum=0.5), layers.Dense(3)]
    )
    config = config_of(
        name, adv_step_size=0.0, pgd_epsilon=0.0, random_init=True, pgd_iterations=3
    )
    config = dataclasses.replace(config, weight_perturbation=0.1)
    model = regularized(base, config, **mode)
    for left in (0.25, 0.0625):
        model.train_on_batch(X, Y)
        mean, _ = moments(base)
        np.testing.assert_allclose(mean, (1 - left) * X.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [*slow(0.0), 0.1])
@pytest.mark.parametrize("name", slow_but(TERMS, "labeled_loss", "mart"))
def test_recurrent_states_are_those_of_the_clean_pass(name, gamma, monkeypatch):
    def stateful():
        keras.utils.set_random_seed(0)
        gru = layers.GRU(4, stateful=True)
        inputs = keras.Input(batch_shape=(6, 5, 4))
        return keras.Sequential([inputs, gru, layers.Dense(3)])

    sequence, y = rows(6, 5, 4), np.arange(6) % 3
    frozen = keras.optimizers.SGD(0.0)
    config = config_of(name, adv_step_size=0.5, weight_perturbation=gamma)
    model = regularized(stateful(), config, optimizer=frozen, run_eagerly=True)
    plain = stateful()
    begun, call = [], model.base_model.call

    def recording(*args, **kwargs):
        begun.append(np.array(model.base_model.layers[0].states[0].value))
        return call(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "call", recording)
    for _ in range(3):
        state = plain.layers[0].states[0].numpy()
        model.train_on_batch(sequence, y)
        plain(sequence, training=True)
        # Every pass begins where the clean one did.
        for found in begun:
            np.testing.assert_allclose(found, state, atol=1e-6)
        begun.clear()
        # Where weights move, the clean pass of a comparison runs at these.
        if gamma == 0.0 or name == "labeled_loss":
            states = [m.layers[0].states[0] for m in (model.base_model, plain)]
            np.testing.assert_allclose(*states, atol=1e-6)
        else:
            plain.layers[0].states[0].assign(model.base_model.layers[0].states[0])


@pytest.mark.parametrize("gamma", [*slow(0.0), 0.1])
@pytest.mark.parametrize("name", slow_but(TERMS, "labeled_loss", "trades"))
def test_random_states_do_not_depend_on_the_iterations(name, gamma):
    """Dropout draws for the passes of the loss; the attack draws from its own."""
    states = []
    for iterations in (1, 4):
        keras.utils.set_random_seed(0)
        base = busy_base()
        config = config_of(name, pgd_iterations=iterations, weight_perturbation=gamma)
        model = regularized(base, config, run_eagerly=True)
        model.train_on_batch(X, Y)
        (dropout,) = (one for one in base.layers if isinstance(one, layers.Dropout))
        states.append(dropout.seed_generator.state.numpy())
    np.testing.assert_array_equal(*states)
    keras.utils.set_random_seed(0)
    fresh = next(one for one in busy_base().layers if isinstance(one, layers.Dropout))
    for _ in range(2):
        fresh.seed_generator.next()
    np.testing.assert_array_equal(states[0], fresh.seed_generator.state)


@pytest.mark.parametrize(
    ("name", "clean_weight", "gamma"),
    slow_rows(
        [("labeled_loss", 0.0, 0.0), ("labeled_loss", 0.0, 0.1), ("trades", 1.0, 0.1)],
        0,
    ),
)
@pytest.mark.parametrize("mode", ["eager", "function"], indirect=True)
def test_a_base_that_is_built_by_its_first_batch(name, clean_weight, gamma, mode):
    found = []
    for inputs in ([keras.Input((6,))], []):
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dense(3)]
        config = config_of(name, clean_weight=clean_weight, weight_perturbation=gamma)
        base = keras.Sequential([*inputs, *stack])
        model = regularized(base, config, **mode)
        logs = [model.train_on_batch(X, Y, return_dict=True) for _ in range(2)]
        found.append([logs, *base.get_weights()])
    np.testing.assert_equal(*found)


class AddsLosses(keras.Model):
    """Adds a loss of its input, and keeps a metric."""

    def __init__(self):
        super().__init__()
        self.network = classifier()
        self.seen = keras.metrics.Sum(name="seen")

    def call(self, inputs, training=False):
        self.seen.update_state(keras.ops.mean(inputs))
        self.add_loss(0.3 * keras.ops.mean(inputs))
        return self.network(inputs)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("name", TERMS)
def test_what_a_model_adds_and_counts_is_of_the_clean_pass(name, gamma):
    config = config_of(name, adv_step_size=1.0, weight_perturbation=gamma)
    model = regularized(AddsLosses(), config, run_eagerly=True)
    logs = model.train_on_batch(X, Y, return_dict=True)
    own = logs["loss"] - logs["labeled_loss"] - logs["scaled_adversarial_loss"]
    np.testing.assert_allclose(own, 0.3 * X.mean(), rtol=1e-3)
    np.testing.assert_allclose(logs["seen"], X.mean(), rtol=1e-5)


def test_what_a_model_adds_counts_without_a_clean_pass():
    config = config_of(
        "labeled_loss", adv_step_size=0.0, pgd_epsilon=0.0, clean_weight=0.0
    )
    model = regularized(AddsLosses(), config, run_eagerly=True)
    logs = model.train_on_batch(X, Y, return_dict=True)
    own = logs["loss"] - logs["scaled_adversarial_loss"]
    np.testing.assert_allclose(own, 0.3 * X.mean(), rtol=1e-3)
    np.testing.assert_allclose(logs["adversarial_seen"], X.mean(), rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_metrics_are_those_of_the_clean_pass_at_the_weights_as_they_were(name):
    base = classifier()
    metric = keras.metrics.SparseCategoricalCrossentropy(name="ce", from_logits=True)
    config = config_of(name, adv_step_size=1.0, weight_perturbation=0.5)
    expected = cross_entropy()(Y, base(X))
    model = regularized(base, config, metrics=[metric], run_eagerly=True)
    logs = model.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(logs["ce"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["labeled_loss", "trades", "logit_pairing"])
def test_losses_of_single_outputs_are_those_of_the_clean_pass(name):
    config = config_of(name, adv_step_size=1.0)
    loss = [cross_entropy(), cross_entropy()]
    model = regularized(two_outputs(), config, loss, run_eagerly=True)
    logs = model.train_on_batch(X, [Y, Y % 2], return_dict=True)
    parts = [value for name, value in logs.items() if name in ("a_loss", "b_loss")]
    assert len(parts) == 2
    np.testing.assert_allclose(sum(parts), logs["labeled_loss"], rtol=1e-5)


# --- Without a clean pass


def perturbed_loss(config, base):
    """The labelled loss and the accuracy on perturbed inputs, with weights as now."""
    model = regularized(base, config)
    logits = base.predict(model.perturb_on_batch(X, Y), verbose=0)
    return float(cross_entropy()(Y, logits)), np.mean(logits.argmax(1) == Y)


@pytest.mark.parametrize(
    "arguments",
    [*slow({"run_eagerly": True}, {"jit_compile": False}), {"steps_per_execution": 3}],
    ids=str,
)
def test_logs_without_a_clean_pass(arguments):
    config = AdvRegConfig.fgsm(0.5, clean_weight=0.0)
    base = classifier()
    loss, accuracy = perturbed_loss(config, base)
    clean = regularized(base, config, metrics=["accuracy"])
    clean = clean.evaluate(X, Y, verbose=0, return_dict=True)
    assert accuracy != clean["accuracy"]
    frozen = keras.optimizers.SGD(0.0)
    model = regularized(base, config, None, frozen, metrics=["accuracy"], **arguments)
    history = model.fit(
        X, Y, batch_size=4, epochs=2, validation_data=(X, Y), verbose=0
    ).history
    assert set(history) == {
        "loss",
        "scaled_adversarial_loss",
        "adversarial_accuracy",
        "val_loss",
        "val_accuracy",
    }
    # Averages over the three batches of each epoch.
    for name, value in {
        "loss": loss,
        "scaled_adversarial_loss": loss,
        "adversarial_accuracy": accuracy,
        "val_loss": clean["loss"],
        "val_accuracy": clean["accuracy"],
    }.items():
        np.testing.assert_allclose(history[name], [value] * 2, rtol=1e-5, err_msg=name)


def test_logs_of_several_outputs_without_a_clean_pass(mode):
    config = AdvRegConfig.fgsm(0.1, clean_weight=0.0)
    model = regularized(
        two_outputs(),
        config,
        [cross_entropy(), cross_entropy()],
        metrics=[["accuracy"], []],
        **mode,
    )
    logs = model.train_on_batch(X, [Y, Y % 2], return_dict=True)
    of_outputs = {"adversarial_a_loss", "adversarial_b_loss", "adversarial_a_accuracy"}
    assert set(logs) == {"loss", "scaled_adversarial_loss", *of_outputs}
    parts = logs["adversarial_a_loss"] + logs["adversarial_b_loss"]
    np.testing.assert_allclose(parts, logs["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("clean_weight", [0.0, 0.25])
def test_the_clean_term_has_a_weight(name, clean_weight, fixed_start):
    base, recipe = base_of(), Recipe(name, START, clean_weight=clean_weight)
    expected, losses = recipe.gradients(base.get_weights(), INPUT, TRUTH)
    if name == "labeled_loss" and not clean_weight:
        del losses["labeled_loss"]
    got = step(base, recipe, LABELS, exact_cross_entropy(), run_eagerly=True)
    assert ("labeled_loss" in got[1]) == ("labeled_loss" in losses)
    assert_same(got, (expected, losses))


def test_only_the_weight_of_the_clean_term_is_left():
    config = make_adv_reg_config(0.0, clean_weight=0.5)
    model = regularized(classifier(), config)
    logs = model.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], 0.5 * logs["labeled_loss"], rtol=1e-6)
    assert logs["scaled_adversarial_loss"] == 0.0
