"""Finds what must not be perturbed: examples of weight 0, and padding.

The gradient of both is zero, so that no step of an attack changes them. But a random
start would, and so would a clip range that does not contain them. Padding that has been
changed is no longer equal to the mask value, and the model would read it as data.

`can_move` makes a boolean tensor for each leaf of the features, which the `Ball` turns
into part of its mask. Padding is found by calling the `Masking` layer that the leaf
goes into: the layer is looked up in the graph of a sequential or functional model.
Behind other layers, and in subclassed models, it is not found.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.backend import keras_private
from advreg.network.declared import declared_inputs


def can_move(
    features: Features, sample_weight: Any, base_model: keras.Model | None = None
) -> list[Tensor | None]:
    """Returns for each leaf of the features where it may be perturbed.

    Args:
        features: A nested structure of tensors.
        sample_weight: `None`, weights of the examples, or a structure of them, one for
            each output. An example may be perturbed if its weight is not zero for any
            output.
        base_model: The model whose `Masking` layers say what is padding. Only those
            that an input goes straight into are found, in sequential and functional
            models.

    Returns:
        For each leaf a boolean tensor that broadcasts to it, or `None` where all of it
        may be perturbed.
    """
    counts = _counts(sample_weight)
    flags: list[Tensor | None] = []
    for path, leaf in tree.flatten_with_path(features):
        moves = []
        # Ragged and sparse leaves are never perturbed, and need no mask.
        rank = backend.rank(leaf) if backend.is_tensor(leaf) else 0
        if rank:
            if counts is not None:
                moves.append(ops.reshape(counts, (-1, *[1] * (rank - 1))))
            masking = _masking_layer(base_model, features, path, rank)
            if masking is not None:
                moves.append(ops.expand_dims(masking.compute_mask(leaf), -1))
        flags.append(functools.reduce(ops.logical_and, moves) if moves else None)
    return flags


def _counts(sample_weight: Any) -> Tensor | None:
    """Returns for each example whether a weight of it is not zero, `None` for all."""
    weights = tree.flatten(sample_weight)
    # For an output without weights every example counts.
    if any(weight is None for weight in weights):
        return None
    counts = [ops.not_equal(weight, 0) for weight in weights]
    # Scalars are not weights of single examples.
    if not all(map(backend.rank, counts)):
        return None
    counts = [
        ops.any(count, axis=tuple(range(1, len(count.shape))))
        if len(count.shape) > 1
        else count
        for count in counts
    ]
    return functools.reduce(ops.logical_or, counts)


def _masking_layer(
    model: keras.Model | None, features: Features, path: Sequence[Any], rank: int
) -> keras.layers.Masking | None:
    """Finds the `Masking` layer that a leaf of the features goes straight into.

    It may lie in a nested model, if the input of that model goes straight into it.
    """
    if isinstance(model, keras.Sequential):
        first = model.layers[:1]
    else:
        tensors = declared_inputs(model, features, path)
        first = [
            layer
            for layer in getattr(model, "layers", ())
            if any(
                given is tensor and rank == len(tensor.shape)
                for given in keras_private.inputs_of_calls(layer)
                for tensor in tensors
            )
        ]
    for layer in first:
        # A mask of time steps needs a time axis beside those of batch and features.
        if isinstance(layer, keras.layers.Masking) and rank > 2:
            return layer
        if isinstance(layer, keras.Model):
            inner = _masking_layer(layer, None, (), rank)
            if inner is not None:
                return inner
    return None
