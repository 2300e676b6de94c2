"""Gradients of a loss with respect to the features of a network.

Features may be a structure with leaves that have no gradient, such as integers. So
every function takes a list `wanted`, one bool for each leaf, and the lists of gradients
hold `None` for the other leaves. Half precision needs scales and second tries, which
`precision` decides on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.network.precision import Precision


def differentiable(features: Features, fixed: Sequence[str] = ()) -> list[bool]:
    """Returns for each leaf whether a gradient can be taken with respect to it.

    This is true of dense float tensors, and false of integers, strings, ragged and
    sparse tensors.

    Args:
        features: A nested structure.
        fixed: Keys of a dictionary of features that must not be perturbed.
    """
    return [
        backend.is_tensor(leaf)
        and keras.backend.is_float_dtype(leaf.dtype)
        and not (path and path[0] in fixed)
        for path, leaf in tree.flatten_with_path(features)
    ]


def input_gradients(
    loss_at: Callable[[Features], Tensor],
    features: Features,
    wanted: Sequence[bool],
    precision: Precision | None = None,
) -> Gradients:
    """Computes the gradient of a loss with respect to each wanted leaf.

    Args:
        loss_at: Function from features to a loss.
        features: A nested structure.
        wanted: For each leaf whether its gradient is wanted.
        precision: The `Precision` of the model, `None` for float32.

    Returns:
        A gradient for each wanted leaf that the loss depends on, in float32 at least in
        half precision, and `None` for the others.
    """
    if precision is None:
        return scaled_gradients(loss_at, features, wanted, None)
    return precision.gradients(
        functools.partial(scaled_gradients, loss_at, features, wanted)
    )


def value_and_gradients(
    function: Callable[[Features], tuple[Tensor, Any]],
    features: Features,
    wanted: Sequence[bool],
    precision: Precision,
    zeros: bool = True,
) -> tuple[Tensor, Any, Gradients]:
    """Computes a loss, other results, and the gradients of the loss, in one pass.

    Args:
        function: Function from features to a loss, and anything else. It is called
            again only where half precision cannot hold the gradient.
        features: A nested structure.
        wanted: For each leaf whether its gradient is wanted.
        precision: The `Precision` of the model.
        zeros: Whether the gradient is zero, not `None`, where the loss does not depend
            on a leaf.

    Returns:
        The loss, what else the function returned, and for each leaf its gradient, or
        `None` where it is not wanted.
    """
    scale = precision.scale
    loss, others, found = backend.differentiate(
        lambda leaves: function(with_leaves(features, wanted, leaves)),
        select(features, wanted),
        scale,
        zeros,
    )
    # It is called only where float16 could not hold the gradient.
    again = functools.partial(
        scaled_gradients, lambda moved: function(moved)[0], features, wanted
    )
    return loss, others, precision.unscale(align(found, wanted), scale, again)


def scaled_gradients(
    loss_at: Callable[[Features], Tensor],
    features: Features,
    wanted: Sequence[bool],
    scale: Tensor | float | None,
) -> Gradients:
    """Computes the gradient of a loss times a scale.

    Args:
        loss_at: Function from features to a loss.
        features: A nested structure.
        wanted: For each leaf whether its gradient is wanted.
        scale: The scale. With `None` there is none, and float16 features are cast to
            float32, because this is how `Precision` asks for float32.
    """
    if scale is None:
        features = tree.map_structure(_no_half, features)
    _, _, found = backend.differentiate(
        lambda leaves: (loss_at(with_leaves(features, wanted, leaves)), None),
        select(features, wanted),
        scale,
    )
    return align(found, wanted)


def _no_half(leaf: Any) -> Any:
    is_half = backend.is_tensor(leaf) and backend.dtype_name(leaf) == "float16"
    return ops.cast(leaf, "float32") if is_half else leaf


def select(features: Features, wanted: Sequence[bool]) -> list[Tensor]:
    """Returns the wanted leaves."""
    return list(itertools.compress(tree.flatten(features), wanted))


def with_leaves(
    features: Features, wanted: Sequence[bool], leaves: Sequence[Tensor]
) -> Features:
    """Returns features in which other tensors replace the wanted leaves."""
    given = iter(leaves)
    flat = [
        next(given) if want else leaf
        for leaf, want in zip(tree.flatten(features), wanted, strict=True)
    ]
    return tree.pack_sequence_as(features, flat)


def align(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    """Returns a list with the gradients of the wanted leaves, and `None` between."""
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]
