import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.linear import linear_base
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
from helpers.oracle import NORMS, norms
from helpers.slow import slow, slow_but
from keras import layers, ops

from advreg import AdversarialRegularization, make_adv_reg_config


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
            X, Y, adv_step_size=value, pgd_epsilon=value / 2, clip_value_min=-9 - value
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


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        ({"first": Y, "second": rows(12, 2)}, {"first": 0, "second": 1}),
        ([Y, rows(12, 2)], [0, 1]),
        ({"first": Y, "second": rows(12, 2)}, [0, 1]),
    ],
)
def test_labels_by_name_need_no_training_before(labels, loss):
    inputs = keras.Input((6,))
    heads = [
        layers.Dense(units, name=name)(inputs)
        for units, name in ((3, "first"), (2, "second"))
    ]
    model = regularized(
        keras.Model(inputs, heads),
        loss=keras.tree.map_structure(lambda i: (cross_entropy(), "mse")[i], loss),
    )
    before = model.perturb_on_batch(X, labels)
    assert np.abs(before - X).max() > 1e-4
    assert all(metric.count.numpy() == 0 for metric in model._compile_loss.metrics)
    model.evaluate(X, labels, verbose=0)
    np.testing.assert_array_equal(model.perturb_on_batch(X, labels), before)


@pytest.mark.parametrize("random_init", [False, True])
def test_the_scale_of_the_optimizer_is_none_of_the_attack_s(random_init):
    """Scaled like this, the gradient would be infinite."""
    base, config = classifier(), make_adv_reg_config(0.2, random_init=random_init)
    moved = []
    for optimizer in (
        keras.optimizers.SGD(0.0),
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.0), initial_scale=2.0**120
        ),
    ):
        keras.utils.set_random_seed(2)
        model = regularized(base, config, optimizer=optimizer, loss_weights=[2.0**20])
        moved.append(model.perturb_on_batch(X, Y))
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("norm", slow_but(NORMS, "l2"))
@pytest.mark.parametrize("iterations", [*slow(1), 3])
def test_perturbations_know_no_scale_of_the_loss(norm, iterations):
    config = make_adv_reg_config(
        adv_step_size=0.2, adv_grad_norm=norm, pgd_iterations=iterations
    )
    base = two_outputs()
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
    clean = model.perturb_on_batch(X, Y)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = model.perturb_on_batch(x, Y)
    assert len(said) == 1
    assert all("1 input values that are NaN" in str(each.message) for each in said)
    assert all(each.filename == __file__ for each in said)
    others = np.arange(12) != 3
    np.testing.assert_allclose(got[others], clean[others], atol=1e-6)
    np.testing.assert_array_equal(got[3, 2], x[3, 2])
    assert np.isfinite(np.delete(got[3], 2)).all()
    # No rectifier here, which would hide what is not a number itself.
    linear = regularized(keras.Sequential([keras.Input((6,)), layers.Dense(3)]), config)
    assert not np.isfinite(linear.train_on_batch(x, Y)).any()


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_where_every_gradient_is_nan_an_error_says_so(run_eagerly):
    nan = layers.Lambda(lambda x: x * np.nan)
    base = keras.Sequential([keras.Input((6,)), nan, layers.Dense(3)])
    model = regularized(base, run_eagerly=run_eagerly)
    with pytest.raises(ValueError, match=r"NaN for every value.*\(12, 6\)"):
        model.perturb_on_batch(X, Y)
    # Nothing is expected of what may not move.
    mask = np.array([1.0, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="NaN for every value"):
        model.perturb_on_batch(X, Y, feature_mask=mask)
    got = model.perturb_on_batch(X, Y, feature_mask=0.0)
    np.testing.assert_array_equal(got, X)
    got = model.perturb_on_batch(X, Y, np.zeros(12))
    np.testing.assert_array_equal(got, X)


UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_data_outside_the_range_are_refused(run_eagerly):
    x = np.random.default_rng(0).integers(0, 256, (12, 6)).astype("float32")
    x[0, :2] = [0, 255]
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="linf", **UNIT)
    model = regularized(classifier(), config, run_eagerly=run_eagerly)
    match = r"`x` must lie.*Received: x from 0 to 255, and a clip range from 0 to 1$"
    with pytest.raises(ValueError, match=match):
        model.perturb_on_batch(x, Y)
    model.perturb_on_batch(x / 255, Y)
    model.perturb_on_batch(x, Y, clip_value_max=255.0)
    with pytest.raises(ValueError, match="`x` must lie in the clip range"):
        model.perturb_on_batch(x / 255, Y, clip_value_max=0.5)
    # In the units of the range a radius of L2 can be as long as its diagonal.
    model.perturb_on_batch(x / 255, Y, adv_grad_norm="l2", adv_step_size=6**0.5)
    match = r"`adv_step_size` must not be larger.*than 2.44949 in the l2 norm.*: 2.5"
    with pytest.raises(ValueError, match=match):
        model.perturb_on_batch(x / 255, Y, adv_grad_norm="l2", adv_step_size=2.5)
