"""Outputs of a classifier as logits."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.geometry import Tensor

# Losses of Keras that take probabilities unless told otherwise.
_OF_PROBABILITIES = (
    "(sparse_)?categorical_crossentropy|binary_crossentropy|"
    "(categorical|binary)_focal_crossentropy|kl_?divergence"
)


def logits_of(outputs: Tensor, from_logits: bool) -> Tensor:
    """Returns the logits of each class, float32 at least.

    Args:
        outputs: Scores with the classes as last axis; one score, with the axis or
            without, tells two classes apart, and gives two logits.
        from_logits: Whether the scores are logits, or probabilities. The logits that a
            last softmax or sigmoid was applied to are found, where they are known.
    """
    scores = outputs if from_logits else _before_activation(outputs)
    if scores is None:
        scores = _log(outputs)
    scores = widen(scores)
    if scores.shape.rank == 1:
        scores = scores[:, None]
    if scores.shape[-1] > 1:
        return scores
    return tf.concat([tf.zeros_like(scores), scores], axis=-1)


def takes_logits(loss: Any) -> bool | None:
    """Whether a loss takes logits; `None` where nothing says so.

    Args:
        loss: One loss, as `compile` takes it.
    """
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    config = config.get("fn_kwargs") or config
    if config.get("from_logits") is not None:
        return bool(config["from_logits"])
    name = loss_name(loss)
    return False if name and re.fullmatch(_OF_PROBABILITIES, name) else None


def loss_name(loss: Any) -> str | None:
    """The name of a loss in Keras's spelling, `None` where there is not just one."""
    losses = [item for item in tree.flatten(loss) if item is not None]
    if len(losses) != 1:
        return None
    if _fits_labels(losses[0]):
        return "categorical_crossentropy"
    loss = keras.losses.get(losses[0])
    name = getattr(loss, "__name__", type(loss).__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def get_loss(loss: Any, labels: Tensor, outputs: Tensor) -> Any:
    """The loss, a function or an object, that `compile` makes of what it is given.

    Args:
        loss: One loss, as `compile` takes it.
        labels: Labels of a batch.
        outputs: Outputs for it.
    """
    if not _fits_labels(loss):
        return keras.losses.get(loss)
    if outputs.shape[-1] == 1:
        return keras.losses.binary_crossentropy
    if labels.shape.rank < outputs.shape.rank or labels.shape[-1] == 1:
        return keras.losses.sparse_categorical_crossentropy
    return keras.losses.categorical_crossentropy


def _fits_labels(loss: Any) -> bool:
    """Whether a loss is the cross-entropy that fits the labels, whichever it is."""
    return isinstance(loss, str) and loss.lower() in ("ce", "crossentropy")


def widen(tensor: Tensor) -> Tensor:
    """Casts to float32 what is narrower."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def _before_activation(outputs: Tensor) -> Tensor | None:
    """The logits that a last softmax or sigmoid was applied to, where they are known.

    A probability that rounds to 1 has lost them, and the gradient with them.
    """
    scores = getattr(outputs, "_keras_logits", None)
    if scores is None and not tf.executing_eagerly():
        while outputs.op.type in ("Identity", "Cast"):
            outputs = outputs.op.inputs[0]
        if outputs.op.type in ("Softmax", "Sigmoid"):
            scores = outputs.op.inputs[0]
    return scores


def _log(probabilities: Tensor) -> Tensor:
    """Logits that give these probabilities."""
    probabilities = widen(probabilities)
    tiny = tf.constant(np.finfo(probabilities.dtype.as_numpy_dtype).tiny)
    scores = tf.math.log(tf.maximum(probabilities, tiny))
    if probabilities.shape.rank > 1 and probabilities.shape[-1] > 1:
        return scores
    return scores - tf.math.log(tf.maximum(1 - probabilities, tiny))
