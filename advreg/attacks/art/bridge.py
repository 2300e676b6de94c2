"""Makes a classifier of ART's kind of a Keras 3 model: see `estimators`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.attacks.art.estimators import estimator_class
from advreg.attacks.engine.losses import Loss, cross_entropy, dlr
from advreg.attacks.engine.target import TargetModel
from advreg.network.gradients import input_gradients
from advreg.network.masks import can_move
from advreg.network.output_form import OutputForm
from advreg.network.precision import Precision

# The losses that ART's attacks name, where advreg computes them.
_LOSSES: dict[str | None, Loss] = {
    None: cross_entropy,
    "cross_entropy": cross_entropy,
    "difference_logits_ratio": dlr,
}


class Bridge:
    """A model and its data, in the forms that ART needs.

    Args:
        target: The model.
        features: Its features, a structure that holds one tensor.
        form: The form of its outputs.
        batch_size: Number of examples that go through it at once.
    """

    def __init__(
        self, target: TargetModel, features: Features, form: OutputForm, batch_size: int
    ) -> None:
        self._target, self._features, self._form = target, features, form
        self.batch_size = batch_size
        self.x = np.array(ops.convert_to_numpy(tree.flatten(features)[0]))
        flag = can_move(features, None, target.base)[0]
        self.movable = True if flag is None else ops.convert_to_numpy(flag)
        self._classifiers: dict[tuple[bool, str | None], Any] = {}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._form.classes

    def pack(self, x: Any) -> Features:
        """Puts inputs into the structure of the features."""
        return tree.pack_sequence_as(self._features, [x])

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Returns the logits, `[batch, classes]`."""
        features = self.pack(ops.convert_to_tensor(x))
        return np.array(ops.convert_to_numpy(self._compiled(False)(features)))

    def predicted(self) -> np.ndarray:
        """Returns the predicted classes of all examples, `[examples]`."""
        parts = [
            np.argmax(self.scores(self.x[start : start + self.batch_size]), axis=1)
            for start in range(0, len(self.x), self.batch_size)
        ]
        return np.concatenate(parts)

    def classifier(
        self, probabilities: bool, clip_values: Any, loss: str | None = None
    ) -> Any:
        """Makes a classifier for ART.

        Args:
            probabilities: Whether it returns probabilities, or logits.
            clip_values: Smallest and largest value of an input, or `None`.
            loss: Name of the loss that is attacked. On TensorFlow ART replaces the loss
                itself.
        """
        place = (probabilities, loss)
        if place in self._classifiers:  # Attacks made of attacks share it.
            return self._classifiers[place]
        compiled = self._compiled(probabilities)
        slope = self._slope(probabilities)
        dtype = self.x.dtype

        def packed(x: Any) -> Features:
            return self.pack(ops.cast(ops.convert_to_tensor(x), dtype))

        kwargs: dict[str, Any] = {}
        if backend.BACKEND == "tensorflow":
            # With a sum, the gradient of an example does not depend on the batch size.
            kwargs["loss_object"] = keras.losses.CategoricalCrossentropy(
                from_logits=not probabilities, reduction="sum"
            )
        else:
            value, value_slope = self._loss(loss)
            kwargs["loss"] = lambda x, classes: value(packed(x), classes)
            kwargs["loss_slope"] = lambda x, classes: value_slope(packed(x), classes)
        classifier = self._classifiers[place] = estimator_class()(
            model=lambda x: compiled(packed(x)),
            slope=lambda x, columns: slope(packed(x), columns),
            rows=self.batch_size,
            nb_classes=self.classes,
            input_shape=self.x.shape[1:],
            clip_values=clip_values,
            channels_first=False,
            preprocessing=None,
            **kwargs,
        )
        return classifier

    def _compiled(self, probabilities: bool) -> Callable[..., Tensor]:
        return self._target.compile(
            ("art", probabilities),
            functools.partial(_scores, self._target, self._form, probabilities),
            self._example(),
        )

    def _slope(self, probabilities: bool) -> Callable[..., Tensor]:
        """Makes a function that computes the gradient of one score of each example."""
        score = functools.partial(_scores, self._target, self._form, probabilities)

        precision = Precision(self._target.base, self._features)

        def slope(features: Features, columns: Tensor) -> Tensor:
            def chosen(features: Features) -> Tensor:
                places = ops.expand_dims(columns, 1)
                return ops.sum(ops.take_along_axis(score(features), places, axis=1))

            return _dense(
                input_gradients(chosen, features, [True], precision), features
            )

        columns = ops.zeros([1], "int32")
        return self._target.compile(
            ("art slope", probabilities), slope, self._example(), columns
        )

    def _loss(self, name: str | None) -> tuple[Callable[..., Tensor], ...]:
        """Makes functions that compute a loss of each example, and its gradient."""
        score = functools.partial(_scores, self._target, self._form, False)
        precision = Precision(self._target.base, self._features)
        loss = _LOSSES[name]

        def value(features: Features, classes: Tensor) -> Tensor:
            return loss(score(features), classes, False)

        def slope(features: Features, classes: Tensor) -> Tensor:
            def total(features: Features) -> Tensor:
                return ops.sum(value(features, classes))

            return _dense(input_gradients(total, features, [True], precision), features)

        classes = ops.zeros([1], "int32")
        return tuple(
            self._target.compile((key, name), function, self._example(), classes)
            for key, function in (("art loss", value), ("art loss slope", slope))
        )

    def _example(self) -> Features:
        return tree.map_structure(lambda leaf: leaf[:1], self._features)


def _scores(
    target: TargetModel, form: OutputForm, probabilities: bool, features: Features
) -> Tensor:
    """Computes logits or probabilities of each class, whatever the outputs are."""
    scores = form.logits(target.outputs(features))
    # A single score gives the logits 0 and s, and 0 has no gradient. -s/2 and s/2 have.
    if form.columns == 1:
        scores -= ops.mean(scores, axis=1, keepdims=True)
    scores = ops.softmax(scores) if probabilities else scores
    return ops.cast(scores, "float32")


def _dense(gradients: Gradients, features: Features) -> Tensor:
    """Returns the gradient, zero where there is none."""
    (gradient,), (x,) = gradients, tree.flatten(features)
    return ops.zeros_like(x) if gradient is None else gradient
