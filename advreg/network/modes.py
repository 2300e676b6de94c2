"""Finds layers that do not learn from their model whether it is training."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from advreg.backend import keras_private

# Layers that take `training` only to pass it on, or for what does not change outputs.
_INDIFFERENT = (
    *(keras.Sequential, keras.layers.Wrapper, keras.layers.Bidirectional),
    *(keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Lambda),
    *(keras.layers.Resizing, keras.layers.CenterCrop),
)
# Attributes that are 0 in a layer whose random part is switched off.
_STRENGTHS = ("rate", "stddev", "dropout", "_dropout", "recurrent_dropout")


def layers_without_training_argument(base: keras.Model) -> list[str]:
    """Names the layers that behave differently in training, but do not learn of it.

    Keras passes `training` to a model if its `call` takes that argument. Where it does
    not, `fit` leaves layers such as `Dropout` in the mode that is their default.

    Args:
        base: The model itself, not a wrapper of it.

    Returns:
        The class names of those layers, each once. The list is empty where `call` of
        the model takes `training`.
    """
    if _takes_training(base):
        return []
    layers = keras_private.layers_of(base, include_self=False)
    return sorted({type(layer).__name__ for layer in layers if _has_modes(layer)})


def _has_modes(layer: Any) -> bool:
    """Returns whether a layer itself behaves differently in training."""
    if not isinstance(layer, keras.Layer) or isinstance(layer, _INDIFFERENT):
        return False
    if type(layer).__module__.startswith("keras.") and isinstance(layer, keras.Model):
        return False
    # `RNN` itself has no modes. Its cells have, if they use dropout.
    if type(layer) in (keras.layers.RNN, keras.layers.StackedRNNCells):
        return False
    if isinstance(layer, keras.layers.BatchNormalization) and not layer.trainable:
        return False
    strengths = [getattr(layer, name, None) for name in _STRENGTHS]
    known = [each for each in strengths if isinstance(each, (int, float))]
    return _takes_training(layer, named=True) and (not known or any(known))


def _takes_training(layer: keras.Layer, named: bool = False) -> bool:
    """Returns whether `call` takes `training`.

    Args:
        layer: The layer.
        named: Whether it must be a parameter of that name, not one of `**kwargs`.
    """
    parameters = inspect.signature(layer.call).parameters.values()
    return any(
        each.name == "training" or (not named and each.kind is each.VAR_KEYWORD)
        for each in parameters
    )
