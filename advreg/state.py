"""State of layers that an adversarial pass must leave as the clean pass left it."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from advreg.geometry import Tensor


def metric_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables of the metrics that the model and its layers keep."""
    return [
        variable
        for layer in model._flatten_layers()
        for metric in layer._metrics
        for variable in metric.variables
    ]


def recurrent_states(model: keras.Model) -> list[keras.Variable]:
    """Returns what stateful RNNs carry from one batch to the next."""
    return [
        variable
        for layer in model._flatten_layers()
        if getattr(layer, "stateful", False)
        for variable in keras.tree.flatten(getattr(layer, "states", None))
        if isinstance(variable, keras.Variable)
    ]


def statistics(model: keras.Model) -> list[keras.Variable]:
    """Returns what layers learn of their inputs beside weights, as moving averages."""
    carried = {id(variable) for variable in recurrent_states(model)}
    return [
        variable
        for layer in model._flatten_layers()
        for variable in layer._non_trainable_variables
        if id(variable) not in carried and tf.as_dtype(variable.dtype).is_floating
    ]


def values_of(variables: Sequence[keras.Variable]) -> list[Tensor]:
    """Returns copies of what variables hold now."""
    return [tf.identity(variable.value) for variable in variables]


def assign(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> None:
    """Gives variables the values that they held."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
