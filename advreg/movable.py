"""What in a batch may move: neither examples that do not count, nor padding.

Their gradient is zero, so that no step moves them. A random start or a clip range
would, and padding that has moved is no longer recognised as padding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from advreg.geometry import Tensor
from advreg.packing import Features


def movable(
    features: Features, sample_weight: Any, base_model: keras.Model | None = None
) -> list[Tensor | None]:
    """Tells for each leaf of the features where it may move.

    Args:
        features: A nested structure of tensors.
        sample_weight: `None`, weights of the examples, or a structure of them, one for
            each output. An example moves if it counts in any output.
        base_model: The model whose `Masking` layers say what is padding. Those are
            seen that an input goes straight into, in sequential and functional models.

    Returns:
        For each leaf a boolean tensor that broadcasts to it, or `None` where all of it
        may move.
    """
    counts = _counts(sample_weight)
    flags: list[Tensor | None] = []
    for path, leaf in tree.flatten_with_path(features):
        moves = []
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank:
            if counts is not None:
                moves.append(ops.reshape(counts, (-1, *[1] * (leaf.shape.rank - 1))))
            masking = _masking_layer(base_model, features, path, leaf.shape.rank)
            if masking is not None:
                moves.append(ops.expand_dims(masking.compute_mask(leaf), -1))
        flags.append(functools.reduce(ops.logical_and, moves) if moves else None)
    return flags


def _counts(sample_weight: Any) -> Tensor | None:
    """Tells for each example whether any weight of it is not zero."""
    weights = tree.flatten(sample_weight)
    if any(weight is None for weight in weights):
        return None
    counts = [ops.not_equal(weight, 0) for weight in weights]
    if not all(count.shape.rank for count in counts):
        return None
    counts = [
        ops.any(count, axis=tuple(range(1, count.shape.rank)))
        if count.shape.rank > 1
        else count
        for count in counts
    ]
    return functools.reduce(ops.logical_or, counts)


def _masking_layer(
    model: keras.Model | None, features: Features, path: Sequence[Any], rank: int
) -> keras.layers.Masking | None:
    """Finds the `Masking` layer that a leaf of the features goes straight into.

    On its way it may enter nested models.
    """
    if isinstance(model, keras.Sequential):
        first = model.layers[:1]
    else:
        tensors = _declared(model, features, path)
        first = [
            layer
            for layer in getattr(model, "layers", ())
            if any(
                given is tensor and rank == len(tensor.shape)
                for node in layer._inbound_nodes
                for given in node.input_tensors[:1]
                for tensor in tensors
            )
        ]
    for layer in first:
        if isinstance(layer, keras.layers.Masking) and rank > 2:
            return layer
        if isinstance(layer, keras.Model):
            inner = _masking_layer(layer, None, (), rank)
            if inner is not None:
                return inner
    return None


def _declared(model: Any, features: Features, path: Sequence[Any]) -> list:
    """Finds the declared input that a leaf of the features is for, by place or name."""
    declared = getattr(model, "_inputs_struct", None)
    alone = len(tree.flatten(features)) == 1
    return [
        tensor
        for place, tensor in tree.flatten_with_path(declared)
        if tensor is not None
        and (
            place == path
            or (alone and not place)
            or (isinstance(features, Mapping) and tensor.name == path[0])
        )
    ]
