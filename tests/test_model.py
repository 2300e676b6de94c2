import inspect
import random
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from linear import LEARNING_RATE, LINEAR, linear_base, linear_config, linear_step
from models import (
    LEFT,
    RIGHT,
    Subclassed,
    X,
    Y,
    busy_base,
    classifier,
    cross_entropy,
    labelled,
    regularized,
    rows,
)
from oracle import NORMS, attack, norms

from advreg import AdversarialRegularization, AdvRegConfig, make_adv_reg_config

# --- One training step against its closed form


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_equals_its_closed_form(norm, iterations, weighted, mode):
    x, y = rows(7, 4), rows(7, seed=1)
    weights = np.abs(rows(7, seed=2)) if weighted else np.ones(7)
    x_adv, kernel, bias, logs = linear_step(x, y, weights, norm, iterations)
    base = linear_base()
    model = regularized(
        base,
        linear_config(norm, iterations),
        "mse",
        keras.optimizers.SGD(LEARNING_RATE),
        metrics=["mae"],
        **mode,
    )
    sample_weight = weights if weighted else None
    np.testing.assert_allclose(
        model.perturb_on_batch(x, y, sample_weight), x_adv, atol=1e-6
    )
    history = model.fit(x, y, sample_weight=sample_weight, batch_size=7, verbose=0)
    got_kernel, got_bias = base.get_weights()
    np.testing.assert_allclose(got_kernel[:, 0], kernel, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(got_bias[0], bias, rtol=2e-6, atol=1e-6)
    for name, value in logs.items():
        np.testing.assert_allclose(history.history[name], [value], rtol=2e-6)
    # Metrics are those of the clean predictions before the step.
    mae = np.abs(x @ LINEAR.w + LINEAR.b - y).mean()
    np.testing.assert_allclose(history.history["mae"], [mae], rtol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("d", "c", "b", "a")])
@pytest.mark.parametrize("iterations", [1, 4])
def test_several_inputs_share_one_norm(norm, names, iterations):
    x, y = rows(5, 4), rows(5, seed=1)
    x_adv, kernel, bias, _ = linear_step(x, y, np.ones(5), norm, iterations)
    width = 4 // len(names)
    parts = {n: x[:, i * width : (i + 1) * width] for i, n in enumerate(names)}
    base = linear_base(names)
    sgd = keras.optimizers.SGD(LEARNING_RATE)
    model = regularized(base, linear_config(norm, iterations), "mse", sgd)
    perturbed = model.perturb_on_batch({**parts, "label": y})
    joined = np.concatenate([perturbed[n] for n in names], axis=1)
    np.testing.assert_allclose(joined, x_adv, atol=1e-6)
    model.fit({**parts, "label": y}, batch_size=5, verbose=0)
    got_kernel, got_bias = base.get_weights()
    np.testing.assert_allclose(got_kernel[:, 0], kernel, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(got_bias[0], bias, rtol=2e-6, atol=1e-6)


def test_logs_are_averages_over_examples_not_batches():
    x, y = rows(7, 4), rows(7, seed=1)
    frozen = keras.optimizers.SGD(0.0)
    model = regularized(linear_base(), linear_config("l2", 1), "mse", frozen)
    whole = model.fit(x, y, batch_size=7, verbose=0).history
    parts = model.fit(x, y, batch_size=3, verbose=0).history
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


# --- Against nested tapes, with all that makes training stateful


def stateful_base():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(
                8,
                activation="tanh",
                kernel_regularizer=keras.regularizers.L2(0.1),
                activity_regularizer=keras.regularizers.L2(0.3),
            ),
            layers.BatchNormalization(momentum=0.5),
            layers.Dense(3),
        ]
    )


def nested_tape_step(base, x, y, iterations, step, radius, multiplier):
    """The objective straight from its formula; statistics move in two passes."""
    loss_fn = cross_entropy()
    x, norm = tf.constant(x), base.layers[1]
    with tf.GradientTape() as tape:
        logits = base(x, training=True)
        labeled_loss = loss_fn(y, logits)
        total = labeled_loss + sum(tf.reduce_sum(loss) for loss in base.losses)
        statistics = [v.numpy() for v in norm.non_trainable_variables]
        x_adv = x
        for _ in range(iterations):
            with tape.stop_recording(), tf.GradientTape() as inner:
                inner.watch(x_adv)
                loss = loss_fn(y, base(x_adv, training=True))
            with tape.stop_recording():
                x_adv = x_adv + step * tf.sign(inner.gradient(loss, x_adv))
                x_adv = tf.clip_by_value(x_adv, x - radius, x + radius)
        for variable, value in zip(
            norm.non_trainable_variables, statistics, strict=True
        ):
            variable.assign(value)
        adversarial_loss = multiplier * loss_fn(y, base(x_adv, training=True))
        total = total + adversarial_loss
    weights = base.trainable_variables
    for variable, gradient in zip(weights, tape.gradient(total, weights), strict=True):
        variable.assign_sub(LEARNING_RATE * gradient)
    return float(total), float(labeled_loss), float(adversarial_loss)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_step_equals_nested_tapes(iterations, mode):
    # BatchNorm statistics move twice, regularisers and `add_loss` count once, and the
    # attack follows the labelled loss alone.
    x, y = labelled()
    base = stateful_base()
    reference = keras.models.clone_model(base)
    reference.set_weights(base.get_weights())
    config = make_adv_reg_config(
        multiplier=0.5,
        adv_step_size=0.2,
        adv_grad_norm="linf",
        pgd_iterations=iterations,
        pgd_epsilon=0.3,
    )
    sgd = keras.optimizers.SGD(LEARNING_RATE)
    model = regularized(base, config, optimizer=sgd, **mode)
    for _ in range(2):
        model.reset_metrics()  # Older versions of Keras average over calls.
        logs = model.train_on_batch(x, y, return_dict=True)
        expected = nested_tape_step(reference, x, y, iterations, 0.2, 0.3, 0.5)
    got = [logs[n] for n in ("loss", "labeled_loss", "scaled_adversarial_loss")]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(base.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def embedding_step(multiplier, regularizer=None):
    """The step that SGD takes with the table of an embedding, and its gradient."""

    class Base(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = layers.Embedding(5, 2, embeddings_regularizer=regularizer)
            self.dense = layers.Dense(3)

        def call(self, inputs):
            embedded = self.embed(inputs["token"])
            return self.dense(ops.concatenate([embedded, inputs["x"]], axis=-1))

    class Recording(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            pairs = list(grads_and_vars)
            self.received = {v.path: g for g, v in pairs}
            return super().apply_gradients(pairs)

    x = {"token": np.array([0, 1, 1, 4]), "x": rows(4, 2)}
    y = np.array([0, 1, 2, 1])
    keras.utils.set_random_seed(0)
    base = Base()
    base(x)
    table = base.embed.trainable_weights[0]
    before = table.numpy()
    # A step of size zero makes the adversarial loss the clean one.
    config = make_adv_reg_config(multiplier=multiplier, adv_step_size=0.0)
    optimizer = Recording(LEARNING_RATE)
    model = regularized(base, config, optimizer=optimizer)
    model.train_on_batch(x, y)
    return table.numpy() - before, optimizer.received[table.path]


def test_embedding_gradients_of_both_passes_count():
    clean, _ = embedding_step(0.0)
    both, gradient = embedding_step(1.0)
    np.testing.assert_allclose(both, 2 * clean, rtol=1e-4, atol=1e-7)
    assert np.abs(clean).sum() > 0
    # Rows that no example has looked up take no memory and no time.
    assert isinstance(gradient, tf.IndexedSlices)


def test_sparse_gradients_add_to_those_of_a_regularizer():
    data, _ = embedding_step(0.0)
    clean, _ = embedding_step(0.0, "l2")
    both, _ = embedding_step(1.0, "l2")
    np.testing.assert_allclose(both - clean, data, rtol=1e-4, atol=1e-7)
    assert not np.allclose(clean, data)


# --- A multiplier of zero


def train(wrap, **kwargs):
    keras.utils.set_random_seed(3)
    base = busy_base()
    model = wrap(base)
    model.compile("adam", cross_entropy(), metrics=["accuracy"], **kwargs)
    x, y = labelled(50)
    history = model.fit(
        x, y, batch_size=8, epochs=3, validation_split=0.2, verbose=0
    ).history
    return base.get_weights(), history


def test_at_zero_training_is_bit_for_bit_that_of_keras(mode):
    plain, plain_history = train(lambda base: base, **mode)
    config = make_adv_reg_config(multiplier=0)
    wrapped, history = train(
        lambda base: AdversarialRegularization(base, config), **mode
    )
    for a, b in zip(plain, wrapped, strict=True):
        np.testing.assert_array_equal(a, b)
    assert history.pop("scaled_adversarial_loss") == [0.0, 0.0, 0.0]
    assert len(history.pop("labeled_loss")) == 3
    assert history == plain_history


def test_at_zero_there_is_no_adversarial_pass():
    passes = []

    class Counting(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            passes.append(tuple(x.shape))
            return self.dense(x)

    x, y = labelled()
    for multiplier, expected in [(0.0, 1), (0.2, 2)]:
        model = regularized(
            Counting(), make_adv_reg_config(multiplier), run_eagerly=True
        )
        model.train_on_batch(x, y)
        passes.clear()
        model.train_on_batch(x, y)
        assert len(passes) == expected


@pytest.mark.parametrize(
    ("iterations", "random_init", "expected"),
    [(1, False, 2), (1, True, 3), (5, False, 6)],
)
def test_forward_passes_of_a_step(iterations, random_init, expected):
    passes = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            passes.append(1)
            return x

    base = keras.Sequential([keras.Input((6,)), Counting(), layers.Dense(3)])
    config = make_adv_reg_config(pgd_iterations=iterations, random_init=random_init)
    model = regularized(base, config, run_eagerly=True)
    x, y = labelled()
    passes.clear()
    model.train_on_batch(x, y)
    assert len(passes) == expected
    passes.clear()
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("arguments", "iterations", "expected"),
    [
        ({}, 1, 2),
        ({}, 4, 5),
        ({"kernel_regularizer": "l2"}, 1, 2),
        # What depends on the input must not steer the attack: one more pass.
        ({"activity_regularizer": "l2"}, 1, 3),
    ],
)
def test_backward_passes_of_a_step(arguments, iterations, expected):
    passes = []

    @tf.custom_gradient
    def counted(x):
        def backward(gradient):
            passes.append(1)
            return gradient

        return tf.identity(x), backward

    class Counting(layers.Layer):
        def call(self, x):
            return counted(x)

    # Behind weights, so that each backward pass goes through it, for whatever gradient.
    base = keras.Sequential(
        [keras.Input((6,)), layers.Dense(3, **arguments), Counting()]
    )
    config = make_adv_reg_config(pgd_iterations=iterations)
    model = regularized(base, config, run_eagerly=True)
    model.train_on_batch(X, Y)
    passes.clear()
    model.train_on_batch(X, Y)
    assert len(passes) == expected


# --- Outputs, losses and metrics carry the names that Keras gives them


def two_outputs(names):
    inputs = keras.Input((6,))
    heads = [layers.Dense(3, name="a")(inputs), layers.Dense(2, name="b")(inputs)]
    return keras.Model(inputs, dict(zip("ab", heads, strict=True)) if names else heads)


@pytest.mark.parametrize("names", [False, True])
def test_several_outputs_are_reported_as_the_plain_model_reports_them(names):
    target = rows(12, 2)
    y = {"a": Y, "b": target} if names else [Y, target]
    losses = {"a": cross_entropy(), "b": "mse"} if names else [cross_entropy(), "mse"]
    metrics = {"a": ["accuracy"], "b": ["mae"]} if names else [["accuracy"], ["mae"]]
    results = []
    for wrap in (lambda base: base, AdversarialRegularization):
        keras.utils.set_random_seed(0)
        model = wrap(two_outputs(names))
        model.compile("sgd", losses, metrics=metrics, loss_weights=_weights(names))
        history = model.fit(X, y, batch_size=12, verbose=0).history
        results.append((history, model.evaluate(X, y, verbose=0, return_dict=True)))
    (plain, _), (history, evaluated) = results
    extra = {"labeled_loss", "scaled_adversarial_loss"}
    assert set(history) == set(plain) | extra
    assert set(evaluated) == set(plain)
    for name in set(plain) - {"loss"}:
        # Trackers of the single losses see clean predictions only.
        np.testing.assert_allclose(history[name], plain[name], rtol=1e-6)
    np.testing.assert_allclose(history["labeled_loss"], plain["loss"], rtol=1e-6)


def _weights(names):
    return {"a": 1.0, "b": 0.3} if names else [1.0, 0.3]


# --- Schedules


class Steps(keras.optimizers.schedules.LearningRateSchedule):
    """Off for the first step, on from the second."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return ops.where(step < 1, 0.0, self.value)

    def get_config(self):
        return {"value": self.value}


def test_schedules_follow_the_optimizer_without_retracing():
    config = make_adv_reg_config(
        multiplier=Steps(0.5),
        adv_step_size=Steps(0.3),
        adv_grad_norm="linf",
        pgd_epsilon=Steps(0.2),
    )
    model = regularized(linear_base(), config, "mse", keras.optimizers.SGD(0.0))
    x, y = rows(7, 4), rows(7, seed=1)
    assert not (model.perturb_on_batch(x, y) - x).any()
    first = model.train_on_batch(x, y, return_dict=True)
    assert first["scaled_adversarial_loss"] == 0
    model.reset_metrics()  # Older versions of Keras average over calls.
    second = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(np.abs(model.perturb_on_batch(x, y) - x), 0.2, rtol=1e-5)
    x_adv = attack(
        x, lambda x: LINEAR.input_gradient(x, y, 1.0), "infinity", 0.3, 1, 0.2
    )
    np.testing.assert_allclose(
        second["scaled_adversarial_loss"], 0.5 * LINEAR.loss(x_adv, y, 1.0), rtol=1e-5
    )


# --- perturb_on_batch


def state_of(model):
    own = model._perturbing_seed.state
    model_state = [v.numpy() for v in model.variables if v is not own]
    metric_state = [v.numpy() for m in model.metrics for v in m.variables]
    optimizer_state = [v.numpy() for v in model.optimizer.variables]
    seeds = [
        layer.seed_generator.state.numpy()
        for layer in model._flatten_layers()
        if hasattr(layer, "seed_generator")
    ]
    seeds.append(model._training_seed.state.numpy())
    return model_state + metric_state + optimizer_state + seeds


def test_perturbing_changes_nothing(mode):
    model = regularized(busy_base(), metrics=["accuracy"], **mode)
    model.fit(X, Y, verbose=0)
    before, python, numpy = state_of(model), random.getstate(), np.random.get_state()
    model.perturb_on_batch(X, Y)
    model.perturb_on_batch(X, Y, random_init=True, pgd_iterations=3, pgd_epsilon=0.1)
    for a, b in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert python == random.getstate()
    np.testing.assert_array_equal(numpy[1], np.random.get_state()[1])


def test_the_first_perturbation_changes_nothing_either():
    class NoisyMemory(layers.Layer):
        """Random and stateful in inference, too."""

        def __init__(self):
            super().__init__()
            self.seed_generator = keras.random.SeedGenerator(1)
            self.count = self.add_weight(shape=(), trainable=False, name="count")

        def call(self, x):
            self.count.assign_add(1.0)
            return keras.random.dropout(x, 0.5, seed=self.seed_generator)

    base = keras.Sequential([keras.Input((6,)), NoisyMemory(), layers.Dense(3)])
    model = regularized(base)
    before = state_of(model)
    model.perturb_on_batch(X, Y)
    for a, b in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_perturbing_runs_in_inference_mode():
    class Mode(layers.Layer):
        def call(self, x, training=False):
            # In training the gradient points the other way.
            return -x if training else x

    base = keras.Sequential([keras.Input((4,)), Mode(), layers.Dense(1)])
    base.layers[1].set_weights([np.ones((4, 1)), np.zeros(1)])
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="linf")
    model = regularized(base, config, "mse")
    x = np.zeros((2, 4), "float32")
    np.testing.assert_allclose(model.perturb_on_batch(x, -np.ones(2)), 0.1)


def test_overrides_replace_the_config_for_one_call():
    config = make_adv_reg_config(
        adv_step_size=0.3, adv_grad_norm="linf", pgd_epsilon=0.1, clip_value_max=0.0
    )
    model = regularized(linear_base(), config, "mse")
    x, y = np.full((3, 4), -0.5, "float32"), rows(3)

    def size(**overrides):
        return np.abs(model.perturb_on_batch(x, y, **overrides) - x).max()

    assert size() == pytest.approx(0.1)
    assert size(pgd_epsilon=None) == pytest.approx(0.3)
    assert size(pgd_epsilon=None, adv_step_size=0.9) == pytest.approx(0.9)
    assert size(adv_step_size=0.05) == pytest.approx(0.05)
    up = model.perturb_on_batch(x, y, adv_step_size=2.0, pgd_epsilon=None)
    assert up.max() == 0.0
    both = model.perturb_on_batch(
        x, y, adv_step_size=2.0, pgd_epsilon=None, clip_value_max=None
    )
    assert both.max() == pytest.approx(1.5)
    assert size() == pytest.approx(0.1)


def test_a_sweep_compiles_once():
    traces = []

    class Traced(layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    base = keras.Sequential([keras.Input((6,)), Traced(), layers.Dense(3)])
    config = make_adv_reg_config(clip_value_min=-9.0, pgd_epsilon=1.0)
    model = regularized(base, config)
    model.perturb_on_batch(X, Y)
    traces.clear()
    for value in np.linspace(0.01, 0.5, 5):
        model.perturb_on_batch(
            X, Y, adv_step_size=value, pgd_epsilon=value / 2, clip_value_min=-value
        )
    assert traces == []


def test_calls_of_another_shape_do_not_disturb_each_other():
    model = regularized(classifier(), make_adv_reg_config(adv_step_size=0.5))
    masks = [np.ones(6), 1.0, np.ones((12, 6)), np.ones((1, 6)), np.ones(1), None]
    expected = model.perturb_on_batch(X, Y)
    for mask in masks:
        got = model.perturb_on_batch(X, Y, feature_mask=mask)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    for labels in (Y[:, None], Y):
        got = model.perturb_on_batch(X, labels, np.ones(len(Y)))
        np.testing.assert_allclose(got, expected, atol=1e-6)
    got = model.perturb_on_batch(X[:5], Y[:5])
    np.testing.assert_allclose(got, expected[:5], atol=1e-5)


def test_recompiling_is_noticed():
    base = linear_base()
    model = regularized(base, make_adv_reg_config(adv_step_size=0.1), "mse")
    x, y = rows(3, 4), rows(3, 1)
    before = model.perturb_on_batch(x, y)
    model.compile("sgd", lambda y, y_pred: -ops.square(y - y_pred))
    after = model.perturb_on_batch(x, y)
    np.testing.assert_allclose(after - x, x - before, atol=1e-6)


def test_what_is_no_feature_comes_back_as_it_went_in():
    inputs = {
        "x": keras.Input((6,), name="x"),
        "id": keras.Input((1,), dtype="int32", name="id"),
    }
    hidden = layers.Flatten()(layers.Embedding(9, 2)(inputs["id"]))
    base = keras.Model(
        inputs, layers.Dense(3)(layers.Concatenate()([inputs["x"], hidden]))
    )
    model = AdversarialRegularization(
        base, make_adv_reg_config(adv_step_size=0.5), sample_weight_key="w"
    )
    model.compile("sgd", cross_entropy())
    batch = {
        "id": np.arange(12).reshape(12, 1) % 9,
        "x": X.astype("float64"),
        "label": Y,
        "w": np.ones(12),
    }
    text = np.array(list("abcdefabcdef"))
    got = model.perturb_on_batch({**batch, "text": text})
    assert list(got) == [*batch, "text"]
    assert got["label"] is batch["label"]
    assert got["w"] is batch["w"]
    np.testing.assert_array_equal(got["id"], batch["id"])
    assert got["id"].dtype == batch["id"].dtype
    np.testing.assert_array_equal(got["text"], text)
    assert got["x"].dtype == np.float64
    assert not np.allclose(got["x"], X)
    model.fit(batch, verbose=0)


def test_ragged_and_sparse_features_stay_as_they_are():
    class Base(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def build(self, input_shape):
            self.dense.build((None, 6))

        def call(self, inputs):
            lengths = ops.cast(inputs["ragged"].row_lengths(), "float32")
            total = tf.reduce_sum(tf.sparse.to_dense(inputs["sparse"]), axis=1)
            return self.dense(inputs["x"]) + ops.expand_dims(lengths + total, -1)

    x = {
        "x": tf.constant(X),
        "ragged": tf.RaggedTensor.from_row_lengths(tf.ones(24), [2] * 12),
        "sparse": tf.sparse.from_dense(tf.eye(12)),
    }
    model = regularized(Base(), make_adv_reg_config(adv_step_size=0.5))
    data = tf.data.Dataset.from_tensor_slices((x, Y)).batch(6)
    history = model.fit(data, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    perturbed = model.perturb_on_batch(x, Y)
    np.testing.assert_allclose(norms(perturbed["x"] - X, "l2"), 0.5, rtol=1e-5)
    assert perturbed["ragged"].to_list() == x["ragged"].to_list()
    np.testing.assert_array_equal(
        tf.sparse.to_dense(perturbed["sparse"]), tf.sparse.to_dense(x["sparse"])
    )


def test_perturbations_know_no_batch_size_and_no_scale():
    model = regularized(classifier(), make_adv_reg_config(adv_step_size=0.5))
    together = model.perturb_on_batch(X, Y)
    single = [model.perturb_on_batch(X[i : i + 1], Y[i : i + 1]) for i in range(12)]
    np.testing.assert_allclose(np.concatenate(single), together, atol=1e-5)
    for scale in (1e-6, 1e6):
        scaled = model.perturb_on_batch(X, Y, np.full(12, scale))
        np.testing.assert_allclose(scaled, together, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_perturbations_know_no_scale_of_the_loss(norm, iterations):
    config = make_adv_reg_config(
        adv_step_size=0.2, adv_grad_norm=norm, pgd_iterations=iterations
    )
    base = two_outputs(names=False)
    perturbed = []
    for scale, optimizer in (
        (1.0, keras.optimizers.SGD()),
        (1e-5, keras.optimizers.SGD()),
        (1e5, keras.optimizers.SGD()),
        (
            1.0,
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(), initial_scale=2.0**20
            ),
        ),
    ):
        model = regularized(
            base,
            config,
            loss=[cross_entropy(), "mse"],
            loss_weights=[scale, 0.3 * scale],
            optimizer=optimizer,
        )
        perturbed.append(model.perturb_on_batch(X, [Y, rows(12, 2)]))
    for other in perturbed[1:]:
        np.testing.assert_allclose(other, perturbed[0], atol=1e-5)
    assert np.abs(perturbed[0] - X).max() > 0.1


def test_random_starts_differ_from_call_to_call_and_repeat_with_the_seed():
    def three():
        keras.utils.set_random_seed(5)
        model = regularized(classifier(), make_adv_reg_config(random_init=True))
        return [model.perturb_on_batch(X, Y, adv_step_size=0.5) for _ in range(3)]

    first, again = three(), three()
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(first[0], first[1])


# --- What is not finite


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_neither_spread_nor_hidden(value):
    x = X.copy()
    x[3, 2] = value
    config = make_adv_reg_config(adv_step_size=0.1, clip_value_min=-9, clip_value_max=9)
    model = regularized(classifier(), config)
    got, clean = model.perturb_on_batch(x, Y), model.perturb_on_batch(X, Y)
    others = np.arange(12) != 3
    np.testing.assert_allclose(got[others], clean[others], atol=1e-6)
    np.testing.assert_array_equal(got[3, 2], x[3, 2])
    assert np.isfinite(np.delete(got[3], 2)).all()
    # No rectifier here, which would hide what is not a number itself.
    linear = regularized(keras.Sequential([keras.Input((6,)), layers.Dense(3)]), config)
    assert not np.isfinite(linear.train_on_batch(x, Y)).any()


# --- As a part of another model


@pytest.mark.filterwarnings("ignore:Layer 'sequential:UserWarning")  # Of the base.
@pytest.mark.parametrize("return_sequences", [False, True])
def test_it_is_a_layer_as_its_base_is(return_sequences):
    gru = layers.GRU(3, return_sequences=return_sequences)
    base = keras.Sequential([keras.Input((5, 2)), gru])
    x = rows(12, 5, 2)
    x[:, 3:] = 0.0
    y = rows(*((12, 5, 3) if return_sequences else (12, 3)), seed=1)
    results = []
    for layer in (base, AdversarialRegularization(base)):
        inputs = keras.Input((5, 2))
        model = keras.Model(inputs, layer(layers.Masking()(inputs)))
        model.compile("sgd", "mse")
        results.append(model.evaluate(x, y, verbose=0))
    assert results[0] == results[1]


# --- Looking


def test_it_looks_like_a_keras_model():
    base = classifier(name="base")
    model = AdversarialRegularization(base, name="robust")
    assert model.layers == [base]
    assert model.get_layer("base") is base
    assert model.count_params() == base.count_params()
    assert all(v is w for v, w in zip(model.weights, base.weights, strict=True))
    assert model.compute_output_shape((None, 6)) == (None, 3)
    assert model.compute_output_shape({"x": (5, 6), "label": (5,)}) == (5, 3)
    assert model.compute_output_spec(keras.KerasTensor((None, 6))).shape == (None, 3)
    config = model.get_config()
    assert {"name", "base_model", "adv_config", "label_keys"} <= set(config)
    twin = AdversarialRegularization.from_config(config)
    assert twin.get_config() == config


@pytest.mark.parametrize("built", [False, True])
def test_summaries(built):
    base = keras.Sequential([layers.Dense(3, name="inside")], name="base")
    model = AdversarialRegularization(base, name="robust")
    if built:
        model.build((None, 6))
    lines = []
    model.summary(print_fn=lines.append, expand_nested=True)
    text = "\n".join(map(str, lines))
    assert "robust" in text
    assert "base" in text
    assert ("(None, 3)" in text) == built
    assert ("Total params: 21" in text) == built


def test_training_makes_no_parameter_beside_those_of_the_base():
    model = regularized(classifier(), make_adv_reg_config(random_init=True))
    model.fit(X, Y, verbose=0)
    assert model.count_params() == model.base_model.count_params()


def test_plots_of_the_model(monkeypatch):
    pytest.importorskip("pydot")
    # Drawing takes Graphviz, which pip does not install; describing the graph does not.
    drawing = sys.modules["keras.src.utils.model_visualization"]
    monkeypatch.setattr(drawing, "check_graphviz", lambda: True)
    model = AdversarialRegularization(classifier(), name="robust")
    arguments = {"show_shapes": True, "show_layer_names": True}
    # As for any model with a `call` of its own; the network is in the base.
    assert "robust" in keras.utils.model_to_dot(model, **arguments).to_string()
    dot = keras.utils.model_to_dot(model.base_model, **arguments)
    assert dot.to_string().count("Dense") == 2


# --- Saving


def test_saved_and_loaded_it_trains_on_as_if_nothing_had_happened(tmp_path):
    config = make_adv_reg_config(
        multiplier=keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9),
        adv_step_size=0.2,
        random_init=True,
        feature_mask=np.array([1, 1, 0, 1, 0.5, 1]),
    )
    model = AdversarialRegularization(
        busy_base(), config, label_keys=["y"], sample_weight_key="w", name="robust"
    )
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    model.fit(X, Y, batch_size=6, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is AdversarialRegularization
    assert loaded.adv_config == config
    assert loaded.label_keys == ("y",)
    assert loaded.sample_weight_key == "w"
    assert loaded.name == "robust"
    logs = [
        m.fit(X, Y, batch_size=6, shuffle=False, epochs=2, verbose=0).history
        for m in (model, loaded)
    ]
    assert logs[0] == logs[1]
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_alone_carry_the_random_state(tmp_path):
    def make(seed):
        keras.utils.set_random_seed(seed)
        return regularized(busy_base(), make_adv_reg_config(random_init=True))

    model, other = make(0), make(1)
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    model.reset_metrics()  # Older versions of Keras average over calls.
    for call in ("train_on_batch", "perturb_on_batch"):
        got, expected = (getattr(side, call)(X, Y) for side in (other, model))
        np.testing.assert_array_equal(got, expected)


def test_weights_load_where_dropout_has_been_turned_off(tmp_path):
    path = tmp_path / "model.weights.h5"
    model, other = (
        AdversarialRegularization(
            keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dropout(rate)])
        )
        for rate in (0.5, 0.0)
    )
    model.save_weights(path)
    with pytest.warns(UserWarning, match=r"in 2 places.*did in 3.*not restored"):
        other.load_weights(path)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_of_the_base_are_for_the_base(tmp_path):
    path = tmp_path / "base.weights.h5"
    classifier().save_weights(path)
    with pytest.raises(ValueError, match=r"model\.base_model\.load_weights"):
        AdversarialRegularization(classifier()).load_weights(path)


def test_the_older_format_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.keras'.*model\.h5"):
        AdversarialRegularization(classifier()).save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_the_base_saves_without_advreg(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.base_model.save(tmp_path / "base.keras")
    code = (
        "import sys, keras, numpy as np\n"
        f"model = keras.models.load_model({str(tmp_path / 'base.keras')!r})\n"
        "assert 'advreg' not in sys.modules\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, model(np.ones((2, 6))))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), model(np.ones((2, 6))), rtol=1e-6
    )


def test_another_config_takes_effect_with_the_next_step():
    x, y = rows(7, 4), rows(7, seed=1)
    model = regularized(
        linear_base(), make_adv_reg_config(0.0), "mse", keras.optimizers.SGD(0.0)
    )
    model.train_on_batch(x, y)

    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.adv_config = make_adv_reg_config(0.5, adv_step_size=0.0)

    history = model.fit(x, y, epochs=2, callbacks=[Switch()], verbose=0).history
    off, on = history["scaled_adversarial_loss"]
    assert off == 0.0
    np.testing.assert_allclose(on, 0.5 * history["labeled_loss"][1], rtol=1e-6)
    with pytest.raises(TypeError, match=r"`adv_config` must be an `AdvRegConfig`"):
        model.adv_config = {"multiplier": 0.5}


@pytest.mark.parametrize("kind", ["sequential", "subclassed", "own build"])
def test_built_from_a_shape_it_loads_weights(kind, tmp_path):
    class OwnBuild(Subclassed):
        def build(self, input_shape):
            self.dense.build(input_shape)

        def call(self, inputs):
            return self.dense(inputs)

    def make():
        base = {
            "sequential": lambda: keras.Sequential([layers.Dense(3)]),
            "subclassed": Subclassed,
            "own build": OwnBuild,
        }[kind]()
        return regularized(base)

    model, other = make(), make()
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.build((None, 6))
    assert len(other.trainable_weights) == 2
    other.optimizer.build(other.trainable_weights)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        model.predict(X, verbose=0), other.predict(X, verbose=0)
    )


def test_called_before_it_is_built():
    class OneHot(keras.Model):
        """Takes integers alone, and cannot be traced on floats."""

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            assert "int" in inputs["id"].dtype.name
            hot = ops.one_hot(inputs["id"], 9)
            return self.dense(ops.concatenate([hot, inputs["x"]], axis=-1))

    for base, x in [
        (keras.Sequential([layers.Dense(3)]), {"image": X, "label": Y}),
        (Subclassed(), {"a": LEFT, "b": RIGHT, "label": Y}),
        (OneHot(), {"id": Y, "x": X, "label": Y}),
    ]:
        model = regularized(base)
        called = model(x)
        assert called.shape == (12, 3)
        np.testing.assert_allclose(called, model.predict(x, verbose=0), rtol=1e-5)
        assert np.isfinite(model.train_on_batch(x)).all()


def test_exports_the_base(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), model.predict(X, verbose=0), rtol=1e-5)


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10),
    reason="this version of Keras exports no dictionaries of inputs",
)
def test_exports_keep_the_types_of_inputs(tmp_path):
    ids, x = keras.Input((2,), dtype="int32", name="ids"), keras.Input((4,), name="x")
    embedded = layers.Flatten()(layers.Embedding(5, 2)(ids))
    outputs = layers.Dense(3)(layers.Concatenate()([embedded, x]))
    model = regularized(keras.Model({"ids": ids, "x": x}, outputs))
    data = {"ids": np.ones((12, 2), "int32"), "x": rows(12, 4)}
    model.fit(data, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    signature = served.signatures["serving_default"].structured_input_signature[1]
    assert {name: spec.dtype for name, spec in signature.items()} == {
        "ids": tf.int32,
        "x": tf.float32,
    }
    np.testing.assert_allclose(
        served.serve(data), model.predict(data, verbose=0), rtol=1e-5
    )


@pytest.mark.slow
def test_exports_are_served_without_advreg(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    script = (
        "import sys; sys.modules['advreg'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        "served = tf.saved_model.load(sys.argv[1])\n"
        "np.save(sys.argv[1] + '/got.npy', served.serve(np.load(sys.argv[2])))"
    )
    np.save(tmp_path / "x.npy", X)
    paths = [str(tmp_path / "served"), str(tmp_path / "x.npy")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    got = np.load(tmp_path / "served" / "got.npy")
    np.testing.assert_allclose(got, model.predict(X, verbose=0), rtol=1e-5)


# --- Errors


def test_bases_that_are_no_keras_model():
    with pytest.raises(TypeError, match=r"`base_model` must be a Keras 3 model.*Dense"):
        AdversarialRegularization(layers.Dense(3))
    legacy = type("Model", (), {"__module__": "tf_keras.src.engine.training"})
    with pytest.raises(
        TypeError, match=r"`tf_keras` model is of Keras 2.*import keras"
    ):
        AdversarialRegularization(legacy())
    with pytest.raises(ValueError, match=r"`sample_weight_key` must not.*'label'"):
        AdversarialRegularization(classifier(), sample_weight_key="label")
    with pytest.raises(ValueError, match="regularised already"):
        AdversarialRegularization(AdversarialRegularization(classifier()))


def test_a_base_with_a_step_of_its_own_is_warned_about():
    class Own(keras.Sequential):
        def train_step(self, data):
            pytest.fail("The wrapper takes its own steps.")

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            pytest.fail("The wrapper takes its own steps.")

    with pytest.warns(UserWarning, match="which the wrapper does not call") as caught:
        AdversarialRegularization(Own([layers.Dense(3)]))
    assert [str(warning.message).split(",")[0] for warning in caught] == [
        "Own overrides `train_step`",
        "Own overrides `compute_metrics`",
    ]


def test_the_base_cannot_be_exchanged():
    model = AdversarialRegularization(classifier())
    with pytest.raises(AttributeError, match="`base_model` cannot be exchanged"):
        model.base_model = classifier()


def test_unknown_arguments_are_refused_as_keras_refuses_them():
    messages = []
    for model in (classifier(), regularized(classifier())):
        with pytest.raises(TypeError, match=r"unexpected keyword.*'foo'") as caught:
            model.fit(X, Y, foo=1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "class_weight" in inspect.signature(model.fit).parameters
    assert "format" in inspect.signature(model.export).parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adv_config": {"multiplier": 0.1}}, "adv_config.*AdvRegConfig.*multiplier"),
        ({"label_keys": "label"}, "label_keys.*'label'"),
        ({"label_keys": [1]}, r"label_keys.*\[1\]"),
        ({"label_keys": None}, "label_keys.*None"),
        ({"base_with_labels_in_features": "x"}, "base_with_labels_in_features.*'x'"),
        ({"multiplier": 1, "adv_step_size": 1}, r"make_adv_reg_config.*\['adv_step"),
        ({"sample_weight_key": 3}, "sample_weight_key.*3"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        AdversarialRegularization(classifier(), **arguments)


def test_models_that_are_not_compiled():
    model = AdversarialRegularization(classifier())
    model.base_model.compile("sgd", cross_entropy())
    for name in ("fit", "evaluate", "train_on_batch", "perturb_on_batch"):
        message = rf"`{name}` needs a compiled.*`compile\(\)`.*wrapper.*not compiled"
        with pytest.raises(ValueError, match=message):
            getattr(model, name)(X, Y)
    model.compile("sgd")
    for call in (model.train_on_batch, model.test_on_batch, model.perturb_on_batch):
        with pytest.raises(ValueError, match=r"needs a `loss`.*loss=None"):
            call(X, Y)


def test_inputs_that_cannot_be_perturbed(mode):
    tokens = keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(9, 2), layers.Flatten()]
    )
    tokens.add(layers.Dense(3))
    model = regularized(tokens, **mode)
    x = np.ones((12, 4), "int32")
    for call in (model.train_on_batch, model.perturb_on_batch):
        with pytest.raises(
            ValueError, match=r"Nothing can be perturbed.*float32.*int32"
        ):
            call(x, Y)
    # Without an adversarial pass there is nothing to perturb.
    off = regularized(tokens, make_adv_reg_config(0.0), **mode)
    assert np.isfinite(off.train_on_batch(x, Y)).all()


def test_gradients_that_do_not_reach_the_input(mode):
    class Step(layers.Layer):
        def call(self, x):
            return ops.stop_gradient(x)

    base = keras.Sequential([keras.Input((6,)), Step(), layers.Dense(3)])
    with pytest.raises(ValueError, match="Nothing can be perturbed"):
        regularized(base, **mode).train_on_batch(X, Y)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature_mask", {"y": 1.0}, r"keys \['y'\]"),
        ("feature_mask", np.ones(5), r"\(5,\)"),
        ("clip_value_min", [0.0, 1.0], "list"),
        ("clip_value_max", {"x": np.ones((7, 6))}, r"\(7, 6\)"),
    ],
)
def test_constraints_that_do_not_fit(field, value, message, mode):
    config = make_adv_reg_config(**{field: value})
    model = regularized(classifier(), config, **mode)
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(ValueError, match=f"(?s)`{field}.*{message}"):
        model.fit({"x": X, "label": Y}, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fitting = regularized(model.base_model)
    with pytest.raises(ValueError, match=f"(?s)`{field}.*{message}"):
        fitting.perturb_on_batch({"x": X, "label": Y}, **{field: value})


def test_perturbing_takes_one_batch_outside_of_graphs():
    model = regularized(classifier())
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    with pytest.raises(TypeError, match=r"`x` must be one batch.*BatchDataset"):
        model.perturb_on_batch(data)
    with pytest.raises(RuntimeError, match=r"gen_adv_neighbor"):
        data.map(lambda x, y: model.perturb_on_batch(x, y))


def test_lists_of_numbers_are_no_arrays():
    model = regularized(classifier())
    for data, name in (
        ((X, list(Y)), "y"),
        ((X, Y, [1.0] * 12), "sample_weight"),
        (({"x": 1.0}, Y), "x"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must be an array.*list of"):
            model.perturb_on_batch(*data)
    with pytest.raises(ValueError, match="must be an array") as caught:
        model.perturb_on_batch(X.tolist() * 100, Y)
    assert len(str(caught.value)) < 2000


def test_unknown_and_wrong_overrides():
    model = regularized(classifier())
    with pytest.raises(TypeError, match=r"(?s)fields of.*pgd_epsilon.*\['epsilon'\]"):
        model.perturb_on_batch(X, Y, epsilon=0.1)
    with pytest.raises(ValueError, match=r"adv_step_size.*-1"):
        model.perturb_on_batch(X, Y, adv_step_size=-1)


# --- Memory

MEMORY = """
import resource, sys
import keras, numpy as np, advreg
layers = keras.layers
base = keras.Sequential([
    keras.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"),
    layers.Conv2D(32, 3, activation="relu"), layers.Flatten(), layers.Dense(10)])
config = advreg.make_adv_reg_config(
    adv_step_size=0.1, pgd_epsilon=0.2, pgd_iterations=int(sys.argv[1]))
model = advreg.AdversarialRegularization(base, config)
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x, y = np.ones((128, 28, 28, 1), "float32"), np.zeros(128)
for _ in range(3):
    model.train_on_batch(x, y)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_iterations():
    def peak(iterations):
        command = [sys.executable, "-c", MEMORY, str(iterations)]
        return float(subprocess.run(command, check=True, capture_output=True).stdout)

    # One pass keeps some 22 MB of activations: forty of them would be 880 MB.
    assert peak(40) < peak(1) + 60


def test_default_config():
    assert AdversarialRegularization(classifier()).adv_config == AdvRegConfig()
