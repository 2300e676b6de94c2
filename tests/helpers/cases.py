"""Models with all that Keras offers, beside which a wrapped one is held."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, losses, metrics, ops, optimizers

from helpers.models import rows, two_outputs

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
