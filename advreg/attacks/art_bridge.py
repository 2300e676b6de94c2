"""What ART is handed: a Keras 3 model in the form of its classifiers, and mended code.

ART is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg._extras import import_extra
from advreg.attacks.victim import OutputForm, Victim
from advreg.geometry import Tensor
from advreg.movable import movable
from advreg.packing import Features

EXTRA = "attacks"


class Bridge:
    """A model and data in the forms that ART takes them in.

    Args:
        victim: The model.
        features: Its features, a structure that holds one tensor.
        form: How its outputs are read.
        batch_size: Number of examples that go through it at once.
    """

    def __init__(
        self, victim: Victim, features: Features, form: OutputForm, batch_size: int
    ) -> None:
        self._victim, self._features, self._form = victim, features, form
        self.batch_size = batch_size
        self.x = np.array(tree.flatten(features)[0])
        flag = movable(features, None, victim.base)[0]
        self.movable = True if flag is None else flag.numpy()
        self._classifiers: dict[bool, Any] = {}

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self._form.classes

    def pack(self, x: Any) -> Features:
        """Puts inputs into the structure of the features."""
        return tree.pack_sequence_as(self._features, [x])

    def scores(self, x: np.ndarray) -> np.ndarray:
        """The logits, `[batch, classes]`."""
        return np.array(self._compiled(False)(self.pack(tf.convert_to_tensor(x))))

    def predicted(self) -> np.ndarray:
        """The classes that the model takes the examples for."""
        parts = [
            np.argmax(self.scores(self.x[start : start + self.batch_size]), axis=1)
            for start in range(0, len(self.x), self.batch_size)
        ]
        return np.concatenate(parts)

    def classifier(self, probabilities: bool, clip_values: Any) -> Any:
        """Makes ART's classifier of the model.

        Args:
            probabilities: Whether it gives probabilities, or logits.
            clip_values: Smallest and largest value of an input, or `None`.
        """
        if probabilities in self._classifiers:  # Attacks made of attacks share it.
            return self._classifiers[probabilities]
        compiled = self._compiled(probabilities)
        slope = self._slope(probabilities)
        dtype = self.x.dtype

        def packed(x: Any) -> Features:
            return self.pack(tf.cast(tf.convert_to_tensor(x), dtype))

        def model(x: Any, training: bool = False) -> Tensor:
            return compiled(packed(x))  # In inference mode, whatever ART says.

        classifier = self._classifiers[probabilities] = estimator_class()(
            slope=lambda x, columns: slope(packed(x), columns),
            rows=self.batch_size,
            model=model,
            nb_classes=self.classes,
            input_shape=self.x.shape[1:],
            # The sum leaves the gradient of an example as it is, whatever the batch.
            loss_object=keras.losses.CategoricalCrossentropy(
                from_logits=not probabilities, reduction="sum"
            ),
            clip_values=clip_values,
            channels_first=False,
            preprocessing=None,
        )
        return classifier

    def _compiled(self, probabilities: bool) -> Callable[..., Tensor]:
        return self._victim.compile(
            ("art", probabilities),
            functools.partial(_scores, self._victim, self._form, probabilities),
            self._example(),
        )

    def _slope(self, probabilities: bool) -> Callable[..., Tensor]:
        """Makes what gives the gradient of one score of each example."""
        score = functools.partial(_scores, self._victim, self._form, probabilities)

        def slope(features: Features, columns: Tensor) -> Tensor:
            (leaf,) = tree.flatten(features)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(leaf)
                chosen = tf.gather(score(features), columns, batch_dims=1)
            return tape.gradient(chosen, leaf)

        columns = tf.zeros([1], tf.int32)
        return self._victim.compile(
            ("art slope", probabilities), slope, self._example(), columns
        )

    def _example(self) -> Features:
        return tree.map_structure(lambda leaf: leaf[:1], self._features)


def _scores(
    victim: Victim, form: OutputForm, probabilities: bool, features: Features
) -> Tensor:
    """Logits or probabilities of each class, whatever the model itself gives."""
    scores = form.logits(victim.outputs(features))
    if form.columns == 1:  # Each class has a score that moves, and so a gradient.
        scores -= tf.reduce_mean(scores, axis=1, keepdims=True)
    scores = tf.nn.softmax(scores) if probabilities else scores
    return _connected(tf.cast(scores, "float32"), tree.flatten(features)[0])


@tf.custom_gradient
def _connected(scores: Tensor, x: Tensor) -> Any:
    """Returns the scores, whose gradient is zero, not missing, if they know no `x`."""

    def gradient(upstream: Tensor) -> Any:
        return upstream, tf.zeros_like(x)

    return tf.identity(scores), gradient


@functools.cache
def evasion() -> Any:
    """Imports ART's attacks, which warn of PyTorch that is not installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PyTorch not found")
        # Of progress bars, in a notebook without ipywidgets.
        warnings.filterwarnings("ignore", "IProgress not found")
        return import_extra("art.attacks.evasion", EXTRA)


@functools.cache
def estimator_class() -> type:
    """Makes the class of classifiers that are handed to ART, once ART is there."""
    evasion()
    module = import_extra("art.estimators.classification", EXTRA)
    base: Any = module.TensorFlowV2Classifier

    class KerasClassifier(base):
        """ART's classifier, with batches where it has none, and compiled gradients."""

        def __init__(self, slope: Callable, rows: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._slope, self._rows = slope, rows

        def predict(self, x: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            """Returns the scores, `[batch, classes]`."""
            parts = [
                np.array(self.model(x[start : start + self._rows]))
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
                found.append(self._slope(x, tf.constant(places)).numpy())
            return np.stack(found, axis=1).astype("float32")

    return KerasClassifier


@contextlib.contextmanager
def geoda_mended() -> Iterator[None]:
    """Lets GeoDA run with NumPy 2, without leaving files where it is run."""
    module = import_extra("art.attacks.evasion.geometric_decision_based_attack", EXTRA)
    files: dict[str, np.ndarray] = {}
    numpy = {**vars(np), "mat": np.asarray}
    numpy.update(save=files.__setitem__, load=files.__getitem__)
    path = SimpleNamespace(exists=files.__contains__)
    with (
        mock.patch.object(module, "np", SimpleNamespace(**numpy)),
        mock.patch.object(module, "os", SimpleNamespace(path=path)),
    ):
        yield
