"""Finds out which features of an input are perturbed, and why others are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from advreg._types import Constraint, Features
from advreg.attacks.engine.target import TargetModel
from advreg.checks import check_constraint, check_mask
from advreg.evaluation.report import Feature
from advreg.network.declared import declared_inputs
from advreg.perturbation.packing import lookup, name_of, reason_unperturbed


def perturbed_features(
    model: keras.Model, x: Any, y: Any = None, *, feature_mask: Constraint = None
) -> tuple[Feature, ...]:
    """Returns which features training and attacks perturb, and why they skip others.

    Both follow the same rule. Perturbed are dense floats, images of type uint8, and
    integers for which the model declares an input of floats, if the outputs have a
    gradient with respect to them. Categories have no gradient, because `Embedding` and
    lookups use them as numbers of rows.

    Args:
        model: A Keras 3 model, wrapped or not.
        x: One batch of features: an array or tensor, or a structure of them. For a
            wrapped model labels may be in it if it is a dictionary.
        y: Labels, which are ignored.
        feature_mask: Weights in [0, 1] of the gradient. See `AdvNeighborConfig`. By
            default that of a wrapped model.

    Returns:
        One `Feature` for each leaf of `x`, with `name`, `dtype`, `perturbed` and
        `reason`.

    Raises:
        TypeError: `model` is not a Keras 3 model, or `x` holds no arrays.

    Example:
    >>> for feature in advreg.perturbed_features(model, x):
    ...     print(feature.name, feature.perturbed, feature.reason)
    """
    target = TargetModel(model)
    features = target.features((x, y))
    if feature_mask is None:
        config = getattr(model, "adv_config", None)
        feature_mask = getattr(
            getattr(config, "adv_neighbor_config", None), "feature_mask", None
        )
    else:
        feature_mask = check_constraint("feature_mask", feature_mask)
        check_mask(feature_mask)
    return features_of(target, features, [feature_mask])


def features_of(
    target: TargetModel, features: Features, masks: Iterable[Constraint]
) -> tuple[Feature, ...]:
    """Returns which features are perturbed on a model.

    Args:
        target: The model.
        features: A batch, as `TargetModel.unpack` returns it.
        masks: The masks of all attacks. A feature is perturbed if one of them allows
            it.
    """
    masks = list(masks) or [None]
    moving = target.moving(features)
    found = []
    for (path, leaf), moves in zip(
        tree.flatten_with_path(features), moving, strict=True
    ):
        reason = "" if moves else _reason(target, features, path, leaf)
        if moves and all(_masked(mask, path) for mask in masks):
            reason = "masked by `feature_mask`"
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        found.append(Feature(name_of(path), dtype, not reason, reason))
    return tuple(found)


def _reason(
    target: TargetModel, features: Features, path: Sequence[Any], leaf: Any
) -> str:
    """Returns the reason why a leaf is not perturbed."""
    if path and path[0] in target.form.fixed_keys:
        return "a label"
    if not keras.backend.is_int_dtype(leaf.dtype):
        return reason_unperturbed(leaf)
    if declared_inputs(target.base, features, path):
        return "the model declares an input of integers"
    return "integers, and the model declares no input of floats for them"


def _masked(mask: Constraint, path: Sequence[Any]) -> bool:
    value, _ = lookup(mask, path)
    return value is not None and not np.any(value)
