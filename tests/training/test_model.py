import inspect
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.linear import (
    LEARNING_RATE,
    LINEAR,
    linear_base,
    linear_config,
    linear_step,
)
from helpers.models import (
    X,
    Y,
    busy_base,
    classifier,
    cross_entropy,
    labelled,
    regularized,
    rows,
    two_outputs,
)
from helpers.oracle import NORMS, attack
from helpers.slow import slow, slow_but
from keras import layers, ops

from advreg import AdversarialRegularization, AdvRegConfig, make_adv_reg_config

# --- One training step against its closed form


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [*slow(1), 4])
@pytest.mark.parametrize("weighted", [*slow(False), True])
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


@pytest.mark.parametrize("norm", slow_but(NORMS, "l2"))
@pytest.mark.parametrize("names", [*slow(("a", "b"), ("b", "a")), ("d", "c", "b", "a")])
@pytest.mark.parametrize("iterations", [*slow(1), 4])
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


@pytest.mark.parametrize("iterations", [*slow(1), 3])
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
    config = make_adv_reg_config(
        multiplier=multiplier, adv_step_size=0.0, pgd_epsilon=0.0
    )
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


@pytest.mark.slow
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
