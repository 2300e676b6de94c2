"""Images of bytes, which are perturbed as floats in the units of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from advreg.packing import Features


def as_floats(features: Features, fixed: Sequence[str] = ()) -> Features:
    """Casts images of type uint8 to float32, and leaves all else as it is.

    An image has a batch axis and two more axes at least. Other integers are categories
    or counts more often than quantities, and no perturbation is defined for those.

    Args:
        features: A tensor, or a structure of tensors.
        fixed: Keys of a dictionary of features that stay as they are.
    """
    leaves = [
        tf.cast(leaf, "float32")
        if _is_image(leaf) and not (path and path[0] in fixed)
        else leaf
        for path, leaf in tree.flatten_with_path(features)
    ]
    return tree.pack_sequence_as(features, leaves)


def float_twin(model: keras.Model, fixed: Sequence[str] = ()) -> keras.Model:
    """Returns the model, or, if it declares inputs of bytes, a twin that takes floats.

    Keras truncates what comes to an input declared as uint8. The twin has float32
    inputs there, in nested models as well, and shares all layers with the model.

    Args:
        model: The model.
        fixed: Names of inputs that keep their type.
    """

    def as_float(tensor: keras.KerasTensor) -> keras.KerasTensor:
        if tensor.name in fixed or not _is_image(tensor):
            return tensor
        return keras.Input(batch_shape=tensor.shape, dtype="float32", name=tensor.name)

    if not _declares_bytes(model):
        return model
    if isinstance(model, keras.Sequential):
        return keras.Sequential(
            [as_float(model.inputs[0]), *map(_twin_layer, model.layers)]
        )
    return keras.models.clone_model(
        model,
        input_tensors=tree.map_structure(as_float, model.input),
        clone_function=_twin_layer,
    )


def _is_image(tensor: Any) -> bool:
    """Whether a tensor, symbolic or not, holds bytes along three axes or more."""
    if not isinstance(tensor, (tf.Tensor, keras.KerasTensor)):
        return False
    return tensor.dtype == "uint8" and len(tf.TensorShape(tensor.shape).dims or ()) >= 3


def _declares_bytes(model: keras.Model) -> bool:
    """Whether Keras casts what this model is given, and to bytes."""
    call = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    if not call.__module__.startswith("keras."):
        return False  # Then the inputs are not all that there is to know.
    return any(_is_image(tensor) for tensor in getattr(model, "inputs", ()))


def _twin_layer(layer: keras.Layer) -> keras.Layer:
    return float_twin(layer) if isinstance(layer, keras.Model) else layer
