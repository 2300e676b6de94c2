"""Datasets of the backend's own kind: `tf.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def is_dataset(value: Any) -> bool:
    """Returns whether a value is a `tf.data.Dataset`."""
    return isinstance(value, tf.data.Dataset)


def is_infinite(dataset: tf.data.Dataset) -> bool:
    """Returns whether a dataset is known never to end."""
    return bool(dataset.cardinality() == tf.data.INFINITE_CARDINALITY)


def dataset_of_arrays(arrays: Any, batch_size: int) -> tf.data.Dataset:
    """Makes a dataset of batches of a structure of arrays.

    Args:
        arrays: Arrays with the batch as first axis, in a nested structure.
        batch_size: Number of rows in a batch. The last one may have fewer.

    Raises:
        TypeError: TensorFlow cannot make a tensor of a leaf.
        ValueError: Leaves differ in length, or have no first axis.
    """
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)


def map_dataset(dataset: tf.data.Dataset, step: Callable[..., Any]) -> tf.data.Dataset:
    """Applies a function to each batch, in several threads and before it is needed."""
    mapped = dataset.map(step, num_parallel_calls=tf.data.AUTOTUNE)
    return mapped.prefetch(tf.data.AUTOTUNE)
