"""The classes of classifiers that ART's attacks get, one for each kind of backend.

On TensorFlow it is a subclass of ART's own wrapper, because some attacks of ART have a
variant for it. On JAX and PyTorch it is a classifier that says nothing about its
framework: ART's wrapper for PyTorch takes modules with channels first, which no Keras
model is, and for JAX there is none. ART then runs its variants for NumPy.

Predictions and gradients are computed by compiled functions of advreg in both.
"""

from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from advreg import backend
from advreg._extras import import_extra
from advreg._types import Tensor

EXTRA = "attacks"


@functools.cache
def evasion() -> Any:
    """Imports ART's attacks, without its warning that PyTorch is not installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PyTorch not found")
        # A warning about progress bars, in a notebook without ipywidgets.
        warnings.filterwarnings("ignore", "IProgress not found")
        return import_extra("art.attacks.evasion", EXTRA)


@functools.cache
def estimator_class() -> type:
    """Defines the class of classifiers for ART, when ART has been imported."""
    evasion()
    return _of_tensorflow() if backend.BACKEND == "tensorflow" else _of_any_framework()


def may_be_art_s(error: Exception) -> bool:
    """Returns whether an error of a type that the backend raises may be one of ART's.

    PyTorch raises errors of Python's own types, such as `RuntimeError`, and so does
    ART. Those that a run of the model raised have come through this module.
    """
    if type(error).__module__ != "builtins":
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return all(frame.f_globals.get("__name__") != __name__ for frame, _ in frames)


class _Compiled:
    """Predictions in batches, and gradients of scores, by compiled functions.

    Args:
        model: Function from inputs to scores.
        slope: Function of inputs and columns that returns the gradient of that score of
            each example.
        rows: Number of examples that go through the model at once.
        **kwargs: Arguments of ART's class.
    """

    nb_classes: int  # ART's class sets it.

    def __init__(
        self,
        *,
        model: Callable[..., Tensor],
        slope: Callable[..., Tensor],
        rows: int,
        **kwargs: Any,
    ) -> None:
        self._scores, self._slope, self._rows = model, slope, rows
        super().__init__(model=model, **kwargs)  # type: ignore[call-arg]

    def predict(self, x: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        """Returns the scores, `[batch, classes]`."""
        parts = [
            ops.convert_to_numpy(self._scores(x[start : start + self._rows]))
            for start in range(0, len(x), self._rows)
        ]
        empty = np.zeros((0, self.nb_classes), "float32")
        return np.concatenate([empty, *parts])

    def class_gradient(
        self, x: np.ndarray, label: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Returns gradients of scores, `[batch, classes or 1, ...]`."""
        columns = range(self.nb_classes) if label is None else [label]
        found = []
        for column in columns:
            places = np.broadcast_to(np.asarray(column, "int32"), len(x))
            slope = self._slope(x, ops.convert_to_tensor(np.array(places)))
            found.append(ops.convert_to_numpy(slope))
        return np.stack(found, axis=1).astype("float32")


def _of_tensorflow() -> type:
    """Returns a subclass of ART's classifier for TensorFlow."""
    import tensorflow as tf

    module: Any = import_extra("art.estimators.classification", EXTRA)
    base: Any = module.TensorFlowV2Classifier

    @tf.custom_gradient
    def connected(scores: Tensor, x: Tensor) -> Any:
        # If the scores do not depend on `x`, their gradient would be `None`, which ART
        # cannot use. With this it is zero.
        def gradient(upstream: Tensor) -> Any:
            return upstream, tf.zeros_like(x)

        return tf.identity(scores), gradient

    class TensorFlowClassifier(_Compiled, base):
        """ART's classifier for TensorFlow."""

        def __init__(self, *, model: Callable[..., Tensor], **kwargs: Any) -> None:
            def scores(x: Any, training: bool = False) -> Tensor:
                # In inference mode, whatever ART passes.
                return connected(model(x), tf.convert_to_tensor(x))

            super().__init__(model=scores, **kwargs)

    return TensorFlowClassifier


def _of_any_framework() -> type:
    """Returns a classifier of ART that says nothing about its framework."""
    estimators: Any = import_extra("art.estimators", EXTRA)
    mixins: Any = import_extra("art.estimators.classification.classifier", EXTRA)
    bases: tuple[Any, ...] = (
        mixins.ClassGradientsMixin,
        mixins.ClassifierMixin,
        estimators.LossGradientsMixin,
        estimators.NeuralNetworkMixin,
        estimators.BaseEstimator,
    )

    class AnyClassifier(_Compiled, *bases):  # type: ignore[misc]
        """A classifier with predictions and gradients, and nothing else.

        Args:
            loss: Function of inputs and classes that returns the loss of each example.
            loss_slope: Function of the same that returns the gradient of their sum.
            input_shape: The shape of one input.
            nb_classes: Number of classes.
            **kwargs: Arguments of `_Compiled`.
        """

        def __init__(
            self,
            *,
            loss: Callable[..., Tensor],
            loss_slope: Callable[..., Tensor],
            input_shape: tuple[int, ...],
            nb_classes: int,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self._loss, self._loss_slope = loss, loss_slope
            self._shape = input_shape
            self.nb_classes = nb_classes

        @property
        def input_shape(self) -> tuple[int, ...]:
            """The shape of one input."""
            return self._shape

        def loss_gradient(self, x: np.ndarray, y: Any, **kwargs: Any) -> np.ndarray:
            """Returns the gradient of the loss, of the shape of `x`."""
            slope = self._loss_slope(x, ops.convert_to_tensor(_classes(y)))
            return np.array(ops.convert_to_numpy(slope), "float32")

        def compute_loss(
            self, x: np.ndarray, y: Any, reduction: str = "none", **kwargs: Any
        ) -> np.ndarray:
            """Returns the loss of each example, `[batch]`, or its mean or sum.

            Args:
                x: Inputs.
                y: Classes, or one-hot rows.
                reduction: "none", "mean" or "sum".
                **kwargs: Have no effect.
            """
            found = self._loss(x, ops.convert_to_tensor(_classes(y)))
            values = np.array(ops.convert_to_numpy(found), "float32")
            if reduction == "none":
                return values
            return np.asarray(values.mean() if reduction == "mean" else values.sum())

        def fit(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> None:
            """Raises an error, because an attack trains nothing."""
            raise NotImplementedError("Train the Keras model itself.")

        def get_activations(self, x: np.ndarray, *args: Any, **kwargs: Any) -> Any:
            """Raises an error, because layers are not shown to ART."""
            raise NotImplementedError("Activations of layers are not available.")

    return AnyClassifier


def _classes(y: Any) -> np.ndarray:
    """Converts ART's labels, one-hot rows or numbers, to int32 of shape `[batch]`."""
    y = np.asarray(y)
    return (y.argmax(axis=1) if y.ndim > 1 else y).astype("int32")
