"""The variables of layers that a forward pass changes, and how they are put back.

A training step runs the model several times: clean, during the attack, and at the
perturbed features. The passes of the attack run in a `keras.StatelessScope`, which
discards all changes. The clean and the last pass do change variables, and these belong
to different groups:

- metrics that layers keep, and the states of stateful RNNs: those of the clean pass are
  kept. They are saved before the last pass and put back after it.
- statistics, such as the moving averages of `BatchNormalization`: both passes count.
  Replicas must average them, because each has seen other examples.
- random states: they go on from pass to pass.

Where a model draws random numbers even when it predicts, attacks set the random states
for each call. `RecordingScope` finds these variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.backend import keras_private


class RecordingScope(backend.StatelessScope):
    """A `StatelessScope` that records which random generators were drawn from.

    Every random number of Keras updates the integer state of a generator, whether a
    layer, a global variable or Keras itself holds it. So every integer variable that is
    updated is recorded. Among them are integers that a layer counts up, which may be
    the seed of random numbers that do not come from Keras.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generators: list[keras.Variable] = []

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        """Records the update of a variable."""
        variable = update[0]
        known = any(variable is other for other in self.generators)
        if keras.backend.is_int_dtype(variable.dtype) and not known:
            self.generators.append(variable)
        super().add_update(update)


def metric_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables of the metrics that the model and its layers keep."""
    return [
        variable
        for layer in keras_private.layers_of(model)
        for metric in keras_private.metrics_of(layer)
        for variable in metric.variables
    ]


def recurrent_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the states that stateful RNNs carry from one batch to the next."""
    return [
        variable
        for layer in keras_private.layers_of(model)
        if getattr(layer, "stateful", False)
        for variable in keras.tree.flatten(getattr(layer, "states", None))
        if isinstance(variable, keras.Variable)
    ]


def statistics(model: keras.Model) -> list[keras.Variable]:
    """Returns the float variables that layers update themselves, as moving averages."""
    carried = {id(variable) for variable in recurrent_states(model)}
    return [
        variable
        for layer in keras_private.layers_of(model)
        for variable in keras_private.non_trainable_variables_of(layer)
        if id(variable) not in carried and keras.backend.is_float_dtype(variable.dtype)
    ]


def values_of(variables: Sequence[keras.Variable]) -> list[Tensor]:
    """Returns copies of the current values of variables."""
    return [backend.copy(variable.value) for variable in variables]


def as_array(value: Any) -> np.ndarray:
    """Returns a tensor, or the value of a variable, as an array.

    NumPy warns of TensorFlow's variables, but not of its tensors.

    Args:
        value: A tensor, or what `variable.value` returns.
    """
    return ops.convert_to_numpy(backend.copy(value))


def assign(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> None:
    """Assigns a value to each variable."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
