"""A wrapped model beside the plain one, feature by feature.

One step of the wrapped model equals two nested tapes written straight from the formula;
its metrics, `evaluate` and `predict` equal those of the plain model.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.cases import (
    BATCH,
    CASES,
    CLASSES,
    SEQUENCE,
    Case,
    classes,
    dense,
    sequential,
)
from helpers.models import rows
from helpers.oracle import steepest
from helpers.slow import slow, slow_but
from keras import layers, optimizers, tree

from advreg import AdversarialRegularization, make_adv_reg_config

MULTIPLIER, STEP_SIZE, NORM = 0.7, 0.3, "l2"


def wrap(base):
    config = make_adv_reg_config(
        multiplier=MULTIPLIER, adv_step_size=STEP_SIZE, adv_grad_norm=NORM
    )
    return AdversarialRegularization(base, config)


def nested_tapes(base, x, y, sample_weight, jit_compile=False):
    """One step straight from the formula, with the losses and optimizer of Keras."""
    x = tree.map_structure(tf.constant, x)
    moving = [leaf for leaf in tree.flatten(x) if leaf.dtype.is_floating]

    def losses_at(x):
        y_pred = base(x, training=True)
        total = base.compute_loss(x, y, y_pred, sample_weight)
        own = sum((tf.reduce_sum(loss) for loss in base.losses), tf.zeros(()))
        return tf.cast(total, "float32"), tf.cast(own, "float32")

    if jit_compile:
        losses_at = tf.function(losses_at, jit_compile=True)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(moving)
            total, own = losses_at(x)
            labeled_loss = base.optimizer.scale_loss(total - own)
        gradients = [
            tf.cast(g, "float64") for g in inner.gradient(labeled_loss, moving)
        ]
        flat = np.concatenate([np.reshape(g, (BATCH, -1)) for g in gradients], axis=1)
        direction, start, perturbed = steepest(flat, NORM), 0, []
        for leaf in moving:
            width = int(np.prod(leaf.shape[1:]))
            step = STEP_SIZE * direction[:, start : start + width]
            perturbed.append(leaf + tf.cast(np.reshape(step, leaf.shape), leaf.dtype))
            start += width
        ahead = iter(perturbed)
        x_adv = tree.map_structure(
            lambda leaf: next(ahead) if leaf.dtype.is_floating else leaf, x
        )
        again, own_again = losses_at(x_adv)
        objective = base.optimizer.scale_loss(total + MULTIPLIER * (again - own_again))
    weights = base.trainable_variables
    base.optimizer.apply_gradients(
        zip(outer.gradient(objective, weights), weights, strict=True)
    )


# The fast suite compiles the steps of these; eagerly it runs all.
COMPILED = (
    "weights",
    "named outputs",
    "inputs",
    "add_loss",
    "regularizers",
    "batch normalization",
    "mixed_float16",
)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in CASES),
        *((name, "function") for name in COMPILED),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for mode in ("function", "jit")
            for name in CASES
            if mode == "jit" or name not in COMPILED
        ),
    ],
    indirect=["mode"],
)
def test_a_step_equals_the_formula_and_reports_what_keras_would(name, mode):
    case = CASES[name]
    x, y, sample_weight = case.x, case.y, case.sample_weight
    plain, reference = (case.model(lambda base: base, mode) for _ in range(2))
    model = case.model(wrap, mode)
    # XLA draws other random numbers.
    jit_compile = case.draws and mode.get("jit_compile", False)

    expected = plain.train_on_batch(x, y, sample_weight, return_dict=True)
    logs = model.train_on_batch(x, y, sample_weight, return_dict=True)
    nested_tapes(reference, x, y, sample_weight, jit_compile)
    assert set(logs) == {*expected, "labeled_loss", "scaled_adversarial_loss"}
    for key in set(expected) - {"loss"}:
        np.testing.assert_allclose(
            logs[key], expected[key], case.rtol, case.atol, err_msg=key
        )
    np.testing.assert_allclose(
        logs["loss"] - logs["scaled_adversarial_loss"],
        expected["loss"],
        case.rtol,
        case.atol,
    )
    for _ in range(case.steps - 1):
        model.train_on_batch(x, y, sample_weight)
        nested_tapes(reference, x, y, sample_weight, jit_compile)
    for variable, wanted in zip(
        model.base_model.variables, reference.variables, strict=True
    ):
        np.testing.assert_allclose(
            variable, wanted, case.rtol, case.atol, err_msg=variable.path
        )


@pytest.mark.parametrize("name", slow_but(CASES, "weights", "named outputs"))
def test_evaluate_and_predict_are_the_base_s(name):
    case = CASES[name]
    model = case.model(wrap, {"jit_compile": False})
    base = case.model(lambda base: base, {"jit_compile": False})
    model.train_on_batch(case.x, case.y, case.sample_weight)
    base(case.x)
    base.set_weights(model.base_model.get_weights())
    arguments = {"batch_size": 4, "verbose": 0}
    evaluate = {**arguments, "sample_weight": case.sample_weight, "return_dict": True}
    got = model.evaluate(case.x, case.y, **evaluate)
    expected = base.evaluate(case.x, case.y, **evaluate)
    assert got == expected
    assert list(got) == list(expected)
    tree.map_structure(
        np.testing.assert_array_equal,
        model.predict(case.x, **arguments),
        base.predict(case.x, **arguments),
    )


# --- However `fit` is run

X, Y = rows(13, 4), rows(13, 3, seed=9)


def fitted(**compile_arguments):
    model = Case(dense, compile=compile_arguments).model(wrap, {})
    history = model.fit(X, Y, batch_size=2, epochs=2, shuffle=False, verbose=0).history
    return history, model.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"steps_per_execution": 3},
        {"jit_compile": True},
        *slow({"jit_compile": True, "steps_per_execution": 3}, {"jit_compile": "auto"}),
        *slow({"run_eagerly": True}),
    ],
    ids=str,
)
def test_fit_is_the_same_however_it_is_run(arguments):
    expected, weights = fitted(jit_compile=False)
    history, got = fitted(**arguments)
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-4)
    for a, b in zip(got, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_single_batches_are_the_base_s(mode):
    model, base = (
        Case(dense, compile={"metrics": lambda: ["mae"]}).model(side, mode)
        for side in (wrap, lambda base: base)
    )
    got = model.test_on_batch(X, Y, return_dict=True)
    assert got == base.test_on_batch(X, Y, return_dict=True)
    np.testing.assert_array_equal(model.predict_on_batch(X), base.predict_on_batch(X))
    np.testing.assert_array_equal(model(X), base(X))


def test_nothing_to_train():
    base = dense()
    base.trainable = False
    for model in (base, wrap(base)):
        model.compile("sgd", "mse")
        before = model.get_weights()
        with pytest.warns(UserWarning, match="does not have any trainable weights"):
            model.fit(X, Y, verbose=0)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_models_may_share_a_base():
    base = dense()
    head = keras.Sequential([base, layers.Dense(2)])
    first, second = wrap(base), wrap(head)
    for model in (first, second):
        model.compile("sgd", "mse")
    before = base.get_weights()
    second.train_on_batch(X, Y[:, :2])
    assert (base.get_weights()[0] != before[0]).any()
    # The first goes on from there as a model of its own would.
    alone = dense()
    alone.set_weights(base.get_weights())
    alone = wrap(alone)
    alone.compile("sgd", "mse")
    for model in (first, alone):
        model.train_on_batch(X, Y)
    for a, b in zip(first.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def augmented():
    return sequential(
        layers.RandomFlip(seed=0),
        layers.RandomTranslation(0.2, 0.2, seed=1),
        layers.Resizing(4, 4),
        layers.Flatten(),
        layers.Dense(3),
        shape=(8, 8, 1),
    )


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_augmentation_inside_the_model(run_eagerly):
    images = np.random.default_rng(0).uniform(size=(BATCH, 8, 8, 1)).astype("float32")
    case = Case(augmented, x=images, y=CLASSES, compile={"loss": classes})
    mode = {"run_eagerly": run_eagerly, "jit_compile": False}
    model, reference = (case.model(side, mode) for side in (wrap, lambda base: base))
    for _ in range(2):
        model.train_on_batch(images, CLASSES)
        nested_tapes(reference, images, CLASSES, None)
    for got, wanted in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(got, wanted, case.rtol, case.atol)


def test_augmentation_that_xla_does_not_compile():
    images = np.random.default_rng(0).uniform(size=(BATCH, 8, 8, 1)).astype("float32")
    base = augmented()
    model = wrap(base)
    for side in (base, model):
        with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
            side.compile("sgd", classes(), jit_compile=True)
        assert np.isfinite(side.train_on_batch(images, CLASSES)).all()


def stateful():
    gru = layers.GRU(3, stateful=True)
    return keras.Sequential([keras.Input(batch_shape=(BATCH, 5, 4)), gru])


@pytest.mark.slow
def test_recurrent_states_are_those_of_the_clean_pass(mode):
    case = Case(
        stateful, x=SEQUENCE, compile={"optimizer": lambda: optimizers.SGD(0.0)}
    )
    model, plain = (case.model(side, mode) for side in (wrap, lambda base: base))
    for _ in range(3):
        logs = model.train_on_batch(SEQUENCE, case.y, return_dict=True)
        expected = plain.train_on_batch(SEQUENCE, case.y, return_dict=True)
        np.testing.assert_allclose(logs["labeled_loss"], expected["loss"], rtol=1e-5)
        states = [m.layers[0].states[0] for m in (model.base_model, plain)]
        np.testing.assert_allclose(*states, rtol=1e-5, atol=1e-6)
        # The adversarial pass starts where the clean one did.
        assert logs["scaled_adversarial_loss"] > MULTIPLIER * logs["labeled_loss"]


@pytest.mark.slow
def test_mobilenet():
    def mobilenet():
        return keras.applications.MobileNetV2(
            (32, 32, 3), weights=None, classes=3, classifier_activation=None
        )

    images = np.random.default_rng(0).uniform(-1, 1, (BATCH, 32, 32, 3))
    case = Case(
        mobilenet,
        x=images,
        y=CLASSES,
        compile={"loss": classes},
        policy="float64",  # Statistics of 6 values, 52 times, magnify rounding.
    )
    model, reference = (
        case.model(side, {"jit_compile": False}) for side in (wrap, lambda base: base)
    )
    model.train_on_batch(case.x, case.y)
    nested_tapes(reference, case.x, case.y, None)
    for variable, wanted in zip(
        model.base_model.variables, reference.variables, strict=True
    ):
        np.testing.assert_allclose(
            variable, wanted, rtol=1e-3, atol=1e-4, err_msg=variable.path
        )
