"""What NSL's functions need from TensorFlow itself.

The distances use `tf.compat.v1.losses`, as NSL does, because its reductions are NSL's
arguments. `_elsewhere` has the same names, for JAX and PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from advreg._types import Tensor

absolute_difference = tf.compat.v1.losses.absolute_difference
compute_weighted_loss = tf.compat.v1.losses.compute_weighted_loss
cosine_distance = tf.compat.v1.losses.cosine_distance
mean_squared_error = tf.compat.v1.losses.mean_squared_error
l2_normalize = tf.nn.l2_normalize
softmax = tf.nn.softmax


def check_same_shape(labels: Tensor, predictions: Tensor) -> None:
    """Checks that the known parts of two shapes do not differ.

    Raises:
        ValueError: They do.
    """
    labels.shape.assert_is_compatible_with(predictions.shape)


@contextlib.contextmanager
def probabilities(scope: str, sides: Mapping[str, Tensor], axis: int) -> Iterator[None]:
    """Checks that tensors are probabilities, before anything inside is computed.

    Args:
        scope: Name of the operations inside.
        sides: The tensors, by the names of the arguments.
        axis: The axis of the classes.

    Raises:
        tf.errors.InvalidArgumentError: They are not.
    """
    checks = []
    for name, side in sides.items():
        message = f"`{name}` must be probabilities that sum to 1 along the axis {axis}."
        total = tf.reduce_sum(side, axis)
        checks.append(tf.debugging.assert_non_negative(side, message))
        checks.append(tf.debugging.assert_near(total, 1.0, message=message))
    with tf.name_scope(scope), tf.control_dependencies(checks):
        yield


@contextlib.contextmanager
def unit_interval(name: str, values: Tensor) -> Iterator[None]:
    """Checks that values lie in [0, 1], before anything inside is computed.

    Args:
        name: Name of the argument.
        values: The values.

    Raises:
        tf.errors.InvalidArgumentError: One does not.
    """
    message = f"`{name}` must lie in [0, 1]."
    checks = [
        tf.debugging.assert_non_negative(values, message),
        tf.debugging.assert_less_equal(values, tf.ones([], values.dtype), message),
    ]
    with tf.control_dependencies(checks):
        yield


def argmin(scores: Tensor) -> Tensor:
    """Returns the place of the smallest score of each row, int32."""
    return tf.argmin(scores, axis=-1, output_type=tf.int32)


def random_targets(logits: Tensor, seed: int) -> Tensor:
    """Draws a class for each row, int32."""
    batch, classes = tf.unstack(tf.shape(logits))
    return tf.random.uniform([batch], maxval=classes, dtype=tf.int32, seed=seed)


def normal_like(tensor: Tensor) -> Tensor:
    """Draws a tensor of the same shape and dtype from the normal distribution."""
    return tf.random.normal(tf.shape(tensor), dtype=tensor.dtype)


def passes() -> contextlib.AbstractContextManager[Any]:
    """Returns a context that does nothing: each pass changes the state of layers."""
    return contextlib.nullcontext()
