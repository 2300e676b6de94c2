"""Training: one step, then two more, by `fit`; and steps on other losses."""

import functools
import itertools

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from nsl_cases.common import BATCH, NORMS, STEP, Groups, floats, nsl, rng
from nsl_cases.networks import (
    classes_loss,
    cnn,
    mlp,
    set_weights,
    two_inputs,
    two_outputs,
    weights_of,
)

GROUPS = Groups()


def optimizer(name):
    if name == "sgd":
        return keras.optimizers.SGD(0.1)
    return keras.optimizers.Adam()


def train(network, optimizer_name, norm, times, compiled, weighted=False):
    model, features, labels = network(3 * BATCH)
    labels = labels if isinstance(labels, dict) else {"label": labels}
    config = nsl.configs.make_adv_reg_config(
        multiplier=0.5,
        adv_step_size=STEP,
        adv_grad_norm=norm,
        pgd_iterations=times,
        pgd_epsilon=None if norm == "l1" else 1.5 * STEP,
    )
    data = {**features, **labels}
    if weighted:
        data["weight"] = floats(rng(14).uniform(size=(3 * BATCH, 1)))
    wrapped = nsl.keras.AdversarialRegularization(
        model, tuple(labels), "weight" if weighted else None, config
    )
    wrapped.compile(optimizer(optimizer_name), **compiled())
    result = {}
    for steps, part in ((1, slice(0, BATCH)), (3, slice(BATCH, 3 * BATCH))):
        batch = {name: value[part] for name, value in data.items()}
        history = wrapped.fit(batch, batch_size=BATCH, shuffle=False, verbose=0)
        for name, value in {**weights_of(model), **history.history}.items():
            result[f"{steps} {name}"] = value
    return result


def one_output():
    return {"loss": classes_loss(), "metrics": ["accuracy"]}


def with_metric_objects():
    return {
        "loss": classes_loss(),
        "metrics": [
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce"),
            keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"),
        ],
    }


def outputs_by_name():
    return {
        "loss": {"kind": classes_loss(), "size": "mae"},
        "loss_weights": {"kind": 0.7, "size": 1.3},
        "metrics": ["mse"],
    }


def outputs_by_position():
    return {
        "loss": [classes_loss(), "mean_squared_error"],
        "loss_weights": [0.7, 1.3],
        "metrics": {
            "kind": ["sparse_categorical_accuracy"],
            "size": ["mean_absolute_error"],
        },
    }


def training(cases):
    for network, optimizers, times, norms, compiled, weighted in cases:
        for optimizer_name, iterations, norm in itertools.product(
            optimizers, times, norms
        ):
            yield (
                f"{network.__name__} {optimizer_name} {norm} {iterations} "
                f"{compiled.__name__}",
                functools.partial(
                    train, network, optimizer_name, norm, iterations, compiled, weighted
                ),
            )


@GROUPS.add("fit: weights, logs, metrics, float32")
def training_32():
    both = ("sgd", "adam")
    yield from training(
        [
            (mlp, both, (1, 3), NORMS, one_output, False),
            (cnn, both, (1,), ("l2", "infinity"), one_output, False),
            (cnn, ("sgd",), (3,), ("l2", "infinity"), one_output, False),
            (two_inputs, both, (1,), NORMS, with_metric_objects, False),
            (two_inputs, ("sgd",), (3,), NORMS, with_metric_objects, False),
        ]
    )


@GROUPS.add("fit: sample weights")
def training_weighted():
    yield from training([(mlp, ("sgd", "adam"), (1, 3), NORMS, one_output, True)])


@GROUPS.add("fit: two outputs, loss weights")
def training_two_outputs():
    yield from training(
        [
            (two_outputs, ("sgd", "adam"), (1, 3), NORMS, outputs_by_position, False),
            (two_outputs, ("sgd",), (1,), NORMS, outputs_by_name, False),
        ]
    )


@GROUPS.add("fit: weights, logs, metrics, float64", "float64")
def training_64():
    yield from training([(mlp, ("sgd", "adam"), (1, 3), NORMS, one_output, False)])


def cubed_error(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, axis=-1)


# A loss, what the network ends in, what its labels are, and metrics.
LOSSES = {
    "mse": ("mse", None, "values", ["mae"]),
    "mae, metrics twice": (
        "mean_absolute_error",
        None,
        "values",
        ["mse", "mean_squared_error"],
    ),
    "summed": (
        lambda: keras.losses.MeanSquaredError(reduction="sum"),
        None,
        "values",
        [],
    ),
    "huber": (lambda: keras.losses.Huber(0.5), None, "values", []),
    "function": (lambda: cubed_error, None, "values", [cubed_error]),
    "one-hot": ("categorical_crossentropy", "softmax", "one-hot", ["accuracy", "ce"]),
    "smoothed": (
        lambda: keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.1
        ),
        None,
        "one-hot",
        ["acc"],
    ),
    "sparse": (
        "sparse_categorical_crossentropy",
        "softmax",
        "classes",
        ["accuracy", "crossentropy"],
    ),
    "divergence": ("kl_divergence", "softmax", "one-hot", []),
    "binary": ("binary_crossentropy", "sigmoid", "bits", ["accuracy", "ce"]),
    "binary logits": (
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        None,
        "bits",
        [],
    ),
    "hinge": ("hinge", "tanh", "bits", ["acc"]),
    "squared hinge": ("squared_hinge", "sigmoid", "bits", ["accuracy", "ce"]),
}


def other_loss(name, evaluate, weighted):
    """A step of training, or an evaluation, on another loss."""
    loss, activation, kind, metrics = LOSSES[name]
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    model = keras.Model(x, layers.Dense(3, activation, name="scores")(hidden))
    set_weights(model)
    _, batch, classes = mlp()
    batch["label"] = {
        "values": lambda: floats(rng(25).normal(size=(BATCH, 3))),
        "one-hot": lambda: np.eye(3, dtype=keras.backend.floatx())[classes[:, 0]],
        "classes": lambda: classes,
        "bits": lambda: floats(rng(25).integers(2, size=(BATCH, 3))),
    }[kind]()
    if weighted:
        batch["weight"] = floats(rng(26).uniform(size=(BATCH, 1)))
    wrapped = nsl.keras.AdversarialRegularization(
        model,
        ["label"],
        "weight" if weighted else None,
        nsl.configs.make_adv_reg_config(adv_step_size=STEP, adv_grad_norm="l2"),
    )
    wrapped.compile(
        optimizer("sgd"), loss() if callable(loss) else loss, metrics=metrics
    )
    if evaluate:
        values = wrapped.evaluate(batch, verbose=0)
        logs = dict(zip(wrapped.metrics_names, values, strict=True))
        # NSL's `evaluate` attacks, and these are of that: see the defects.
        del logs["loss"]
        logs.pop("scaled_adversarial_loss", None)
        return logs
    return {**wrapped.train_on_batch(batch, return_dict=True), **weights_of(model)}


@GROUPS.add("fit and evaluate: other losses and metrics")
def other_losses():
    for name, evaluate, weighted in itertools.product(
        LOSSES, (False, True), (False, True)
    ):
        yield (
            f"{name}{' evaluate' * evaluate}{' weighted' * weighted}",
            functools.partial(other_loss, name, evaluate, weighted),
        )
