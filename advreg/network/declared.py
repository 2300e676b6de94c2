"""The symbolic inputs that a sequential or functional model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import tree

from advreg._types import Features
from advreg.backend import keras_private


def declared_inputs(
    model: keras.Model | None, features: Features, path: Sequence[Any]
) -> list[keras.KerasTensor]:
    """Finds the declared input that a leaf of the features goes into.

    They are matched by their place in the structure or by name, as Keras does. A single
    leaf goes into a single input, whatever its name.

    Args:
        model: A model. A subclassed one declares nothing.
        features: A tensor, or a nested structure of tensors.
        path: The path of the leaf, as `keras.tree.flatten_with_path` gives it.

    Returns:
        A list of the matching symbolic inputs. It is empty where the model declares
        none.
    """
    declared = keras_private.declared_inputs_of(model)
    if declared is None and isinstance(model, keras.Sequential) and model.built:
        declared = model.inputs[0] if model.inputs else None
    alone = len(tree.flatten(features)) == 1
    return [
        tensor
        for place, tensor in tree.flatten_with_path(declared)
        if tensor is not None
        and (
            place == path
            or (alone and len(tree.flatten(declared)) == 1)
            or (isinstance(features, Mapping) and tensor.name == path[0])
        )
    ]
