"""A wrapped model beside the plain one, feature by feature.

One step of the wrapped model equals two nested tapes written straight from the formula;
its metrics, `evaluate` and `predict` equal those of the plain model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, metrics, ops, optimizers, tree
from models import rows, two_outputs
from oracle import steepest

from advreg import AdversarialRegularization, make_adv_reg_config

MULTIPLIER, STEP_SIZE, NORM = 0.7, 0.3, "l2"
BATCH = 6
CLASSES = np.array([0, 2, 1, 1, 0, 2])


def targets(*shape):
    return rows(BATCH, *shape, seed=9)


@dataclasses.dataclass
class Case:
    base: Callable[[], keras.Model]
    x: Any = dataclasses.field(default_factory=lambda: rows(BATCH, 4))
    y: Any = dataclasses.field(default_factory=lambda: targets(3))
    sample_weight: Any = None
    compile: dict = dataclasses.field(default_factory=dict)
    steps: int = 2
    rtol: float = 2e-4
    atol: float = 2e-5
    policy: str = "float32"
    draws: bool = False

    def model(self, wrap, mode):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(self.policy)
        try:
            model = wrap(self.base())
        finally:
            keras.config.set_dtype_policy("float32")
        arguments = {"loss": "mse", "optimizer": lambda: "sgd", **self.compile}
        # Optimizers, losses and metrics have state: every model gets its own.
        made = {
            name: value() if callable(value) else value
            for name, value in arguments.items()
        }
        model.compile(**made, **mode)
        return model


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


def sequential(*stack, shape=(4,), **kwargs):
    return keras.Sequential([keras.Input(shape, **kwargs), *stack])


def dense():
    return sequential(layers.Dense(5, "tanh"), layers.Dense(3))


def classes():
    return losses.SparseCategoricalCrossentropy(from_logits=True)


def three_inputs():
    """Floats, floats in a nest, and integers beside them."""
    x = {"a": keras.Input((4,), name="a"), "b": [keras.Input((2,)), keras.Input((3,))]}
    ids = keras.Input((2,), dtype="int32", name="ids")
    embedded = layers.Flatten()(layers.Embedding(5, 2)(ids))
    hidden = layers.Concatenate()([x["a"], *x["b"], embedded])
    return keras.Model({**x, "ids": ids}, layers.Dense(3)(hidden))


def masked_embedding():
    """A GRU over embedded tokens, of which 0 is padding, beside floats."""
    ids, x = keras.Input((5,), dtype="int32"), keras.Input((4,))
    hidden = layers.GRU(3)(layers.Embedding(6, 2, mask_zero=True)(ids))
    return keras.Model([ids, x], layers.Dense(3)(layers.Concatenate()([hidden, x])))


def nested_and_shared():
    inner = sequential(layers.Dense(4, "tanh"))
    left, right = keras.Input((4,)), keras.Input((4,))
    both = layers.Subtract()([inner(left), inner(right)])
    return keras.Model([left, right], layers.Dense(3)(both))


def frozen():
    base = sequential(
        layers.Dense(5, "tanh"), layers.BatchNormalization(), layers.Dense(3)
    )
    base.layers[0].trainable = base.layers[1].trainable = False
    return base


def attention():
    inputs = keras.Input((5, 4))
    attended = layers.MultiHeadAttention(2, 3, dropout=0.2)(inputs, inputs)
    hidden = layers.LayerNormalization()(inputs + attended)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(hidden)))


class AddsLosses(keras.Model):
    """Adds losses of the input and of the weights by `add_loss`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs, training=False):
        outputs = self.dense(inputs)
        self.add_loss(0.3 * ops.mean(ops.square(outputs)))
        self.add_loss(0.1 * ops.sum(ops.abs(self.dense.kernel)))
        return outputs


class KeepsMetrics(keras.Model):
    """Has a metric of its own, and one in a layer."""

    class Activity(layers.Layer):
        def __init__(self):
            super().__init__()
            self.mean = metrics.Mean(name="activity")

        def call(self, inputs):
            self.mean.update_state(ops.mean(ops.abs(inputs)))
            return inputs

    def __init__(self):
        super().__init__()
        self.network = sequential(layers.Dense(5), self.Activity(), layers.Dense(3))
        self.seen = metrics.Sum(name="seen")

    def call(self, inputs, training=False):
        self.seen.update_state(ops.mean(ops.square(inputs)))
        return self.network(inputs)


def regularizers():
    return sequential(
        layers.Dense(5, "tanh", kernel_regularizer="l1", activity_regularizer="l2"),
        layers.Dense(3, bias_regularizer="l2"),
    )


class Beside(layers.Layer):
    """Has a weight that nothing but its regulariser sees."""

    def __init__(self):
        super().__init__()
        self.beside = self.add_weight((3,), "ones", regularizer="l2")

    def call(self, inputs):
        return inputs


def normalized():
    normalization = layers.Normalization(mean=0.5, variance=2.0)
    return sequential(normalization, layers.Dense(3))


def padded():
    x = rows(BATCH, 5, 4)
    x[:, 3:] = x[2] = 0.0
    return x


def custom_loss(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred) ** 1.5, axis=-1)


class CustomLoss(losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sum(ops.square(y_true - y_pred), axis=-1)


WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.2], "float32")
SEQUENCE = rows(BATCH, 5, 4)

CASES = {
    "dense": Case(dense),
    "string": Case(
        dense, y=CLASSES, compile={"loss": "sparse_categorical_crossentropy"}
    ),
    "function": Case(dense, compile={"loss": lambda: custom_loss}),
    "custom loss": Case(dense, compile={"loss": CustomLoss}),
    **{
        f"reduction {reduction}": Case(
            dense,
            sample_weight=WEIGHTS,
            compile={
                "loss": lambda reduction=reduction: losses.MeanSquaredError(reduction)
            },
        )
        for reduction in (
            "sum",
            "mean",
            "sum_over_batch_size",
            "mean_with_sample_weight",
            "none",
        )
    },
    "weights": Case(
        dense,
        y=CLASSES,
        sample_weight=WEIGHTS,
        compile={
            "loss": classes,
            "metrics": lambda: ["accuracy"],
            "weighted_metrics": lambda: [
                metrics.SparseCategoricalCrossentropy(name="ce")
            ],
        },
    ),
    "weight column": Case(dense, sample_weight=WEIGHTS[:, None]),
    "no weight at all": Case(dense, sample_weight=np.zeros(BATCH, "float32")),
    "outputs": Case(
        lambda: two_outputs(width=4),
        y=[CLASSES, targets(2)],
        compile={
            "loss": lambda: [classes(), "mae"],
            "loss_weights": lambda: [0.5, 2.0],
            "metrics": lambda: [["accuracy"], ["mse", "mae"]],
        },
    ),
    "weighted outputs": Case(
        lambda: two_outputs(width=4),
        y=[CLASSES, targets(2)],
        sample_weight=[WEIGHTS, WEIGHTS[::-1].copy()],
        compile={
            "loss": lambda: [classes(), "mse"],
            "weighted_metrics": lambda: [["accuracy"], ["mae"]],
        },
    ),
    "named outputs": Case(
        lambda: two_outputs(names=True, width=4),
        y={"a": CLASSES, "b": targets(2)},
        compile={
            "loss": lambda: {"a": classes(), "b": "mse"},
            "loss_weights": lambda: {"a": 0.5, "b": 2.0},
            "metrics": lambda: {"a": ["accuracy"], "b": ["mae"]},
        },
    ),
    "inputs": Case(
        three_inputs,
        x={
            "a": rows(BATCH, 4),
            "b": [rows(BATCH, 2, seed=1), rows(BATCH, 3, seed=2)],
            "ids": np.arange(2 * BATCH, dtype="int32").reshape(BATCH, 2) % 5,
        },
    ),
    "list": Case(nested_and_shared, x=[rows(BATCH, 4), rows(BATCH, 4, seed=1)]),
    "tuple": Case(nested_and_shared, x=(rows(BATCH, 4), rows(BATCH, 4, seed=1))),
    "add_loss": Case(AddsLosses),
    "regularizers": Case(regularizers),
    "weight outside the loss": Case(lambda: sequential(layers.Dense(3), Beside())),
    "metrics of layers": Case(KeepsMetrics),
    "batch normalization": Case(
        lambda: sequential(
            layers.Dense(5), layers.BatchNormalization(momentum=0.5), layers.Dense(3)
        )
    ),
    "dropout": Case(
        lambda: sequential(
            layers.Dense(20, "tanh"), layers.Dropout(0.5), layers.Dense(3)
        ),
        draws=True,
    ),
    "lstm": Case(lambda: sequential(layers.LSTM(3), shape=(5, 4)), x=SEQUENCE),
    "gru": Case(
        lambda: sequential(
            layers.Bidirectional(layers.GRU(2)), layers.Dense(3), shape=(5, 4)
        ),
        x=SEQUENCE,
    ),
    "masking": Case(
        lambda: sequential(
            layers.Masking(),
            layers.GRU(4, return_sequences=True),
            layers.Dense(3),
            shape=(5, 4),
        ),
        x=padded(),
        y=targets(5, 3),
        compile={"weighted_metrics": lambda: ["mae"]},
    ),
    "embedding mask": Case(
        masked_embedding, x=[np.eye(BATCH, 5, dtype="int32") * 3, rows(BATCH, 4)]
    ),
    "attention": Case(attention, x=SEQUENCE, draws=True),
    "convolution": Case(
        lambda: sequential(
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3),
            shape=(8, 8, 1),
        ),
        x=rows(BATCH, 8, 8, 1),
    ),
    "normalization": Case(normalized),
    "frozen": Case(frozen),
    "clipping": Case(
        dense, compile={"optimizer": lambda: optimizers.SGD(0.1, global_clipnorm=0.1)}
    ),
    "average of weights": Case(
        dense,
        compile={
            "optimizer": lambda: optimizers.Adam(
                0.1, use_ema=True, ema_overwrite_frequency=2
            )
        },
        steps=3,
    ),
    "accumulation": Case(
        dense,
        compile={
            "optimizer": lambda: optimizers.Adam(0.1, gradient_accumulation_steps=2)
        },
        steps=4,
    ),
    "loss scaling": Case(
        dense,
        compile={
            "optimizer": lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1))
        },
    ),
    "float64": Case(
        dense, x=rows(BATCH, 4).astype("float64"), y=targets(3), policy="float64"
    ),
    "mixed_bfloat16": Case(dense, policy="mixed_bfloat16", rtol=0.05, atol=0.01),
    "mixed_float16": Case(dense, policy="mixed_float16", rtol=0.01, atol=2e-3),
}


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps_per_execution": 3},
        {"jit_compile": True},
        {"jit_compile": True, "steps_per_execution": 3},
        {"jit_compile": "auto"},
        {"run_eagerly": True},
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
