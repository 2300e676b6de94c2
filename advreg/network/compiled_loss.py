"""The losses that a model was compiled with, and how they become one number.

`CompiledLoss` is for the wrapper and for attacks, and the only class that reads Keras's
container of losses. It is needed because `Model.compute_loss` adds the losses of
layers, such as weight decay, which an attack must not raise, and because attacks need
the loss of each example by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.checks import brief, describe
from advreg.network.inputs import check_classes
from advreg.network.last_activation import is_recorded, of_logits, warn_of_clipping
from advreg.network.losses import get_loss, loss_name, takes_logits
from advreg.perturbation.geometry import widen


class CompiledLoss:
    """The losses that a model was compiled with.

    Args:
        container: Keras's container of the compiled losses.
        loss: `loss`, as `compile` received it.
        loss_weights: `loss_weights`, as `compile` received them.
        output_names: Function that returns the names of the outputs. It is called late,
            because a first batch may be needed to build the model.
    """

    def __init__(
        self,
        container: Any,
        loss: Any,
        loss_weights: Any,
        output_names: Callable[[], Sequence[str]],
    ) -> None:
        self.container, self.loss = container, loss
        self._loss_weights, self._output_names = loss_weights, output_names

    @property
    def output_names(self) -> Sequence[str]:
        """Names of the outputs."""
        return self._output_names()

    def check_classes(self, y: Any, model: keras.Model) -> None:
        """Checks that labels, whose values are known, are classes of a model.

        Args:
            y: Labels of a batch.
            model: The base model.

        Raises:
            ValueError: A label is out of range.
        """
        outputs = keras_private.declared_outputs_of(model)
        if outputs is None:  # A `Sequential` model, or one that is not functional.
            outputs = getattr(model, "outputs", None) or ()
        try:
            labels = self.by_output(y, outputs)
        except KeyError:  # Keras says which output has no labels.
            return
        check_classes(labels, self._by_output(self.loss, outputs), model)

    def labeled(
        self,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        weight: backend.ReplicaWeight | None = None,
    ) -> Tensor:
        """Computes the labelled loss, a scalar.

        With several replicas, each computes its share. The shares add up to the loss of
        the global batch.

        Args:
            y: Labels.
            y_pred: Outputs.
            sample_weight: Weights of the examples, or `None`.
            weight: Weight of this replica, `None` if it is the only one.
        """
        loss = self.container(y, y_pred, sample_weight)
        warn_of_clipping(self._by_output(self.loss, y_pred), y, y_pred)
        return backend.scale_mean(loss, backend.weight_of_loss(weight, self.loss))

    def total(
        self,
        labeled_loss: Tensor,
        added: Sequence[Tensor],
        weight: backend.ReplicaWeight | None = None,
    ) -> Tensor:
        """Adds the base model's own losses, as `Model.compute_loss` does.

        With several replicas, each adds its share. This is right for losses that are a
        mean over the examples, and for those that are the same on all replicas.

        Args:
            labeled_loss: The labelled loss, with its weight.
            added: The losses that layers and regularisers have added.
            weight: Weight of this replica, `None` if it is the only one.
        """
        if not added:
            return labeled_loss
        by_examples = None if weight is None else weight.by_examples
        # The dtypes may differ in half precision. Keras raises an error then.
        terms = [
            ops.cast(
                backend.scale_mean(backend.sum_of_added_loss(loss), by_examples),
                labeled_loss.dtype,
            )
            for loss in added
        ]
        return ops.sum([labeled_loss, *terms])

    def build(self, y: Any, predict: Callable[[], Any]) -> None:
        """Builds the container, in which Keras matches labels and outputs.

        Args:
            y: Labels of a first batch.
            predict: Function that returns the outputs for the same examples.
        """
        if self.container.built:
            return
        with backend.StatelessScope():
            y_pred = predict()
        self.container(y, y_pred)
        # The call has counted the losses of this batch.
        for metric in self.container.metrics:
            metric.reset_state()

    def weights(self, predictions: Any) -> list[float]:
        """Returns the weight of each output, 1.0 where `compile` received none."""
        given = 1.0 if self._loss_weights is None else self._loss_weights
        listed = self._by_output(given, predictions)
        return [1.0 if weight is None else weight for weight in listed]

    def per_example(self, y: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        """Computes the labelled loss of each example, `[batch]`.

        The loss of each output is the mean over all axes but the first, and over what
        the output's mask lets count. The losses of all outputs are added with their
        weights.

        Args:
            y: Labels.
            y_pred: Outputs.
            sample_weight: Weights of examples, or of their parts, one for all outputs
                or one for each; or `None`.

        Raises:
            ValueError: A loss does not accept the labels, or returns a scalar, or there
                is another number of labels than of outputs.
        """
        outputs = tree.flatten(y_pred)
        losses, weights = self._by_output(self.loss, y_pred), self.weights(y_pred)
        if len(losses) != len(outputs):
            raise ValueError(
                "`loss='model'` attacks the compiled loss: `model.compile(loss=...)` "
                f"needs one for each output. Received: loss={brief(self.loss)} and "
                f"{len(outputs)} output{'s' * (len(outputs) > 1)}"
            )
        if len(outputs) == 1:
            return weights[0] * per_example(losses[0], y, outputs[0], sample_weight)
        labels = self._for_each(y, y_pred)
        of_samples = [sample_weight] * len(outputs)
        if isinstance(sample_weight, (Mapping, list, tuple)):
            of_samples = self._for_each(sample_weight, y_pred)
        if not len(labels) == len(of_samples) == len(outputs):
            raise ValueError(
                f"`y` must have labels for each of the {len(outputs)} outputs. "
                f"Received: {describe(y)}"
            )
        names = self._names(y_pred) or list(map(str, range(len(outputs))))
        for name, loss, label in zip(names, losses, labels, strict=True):
            if loss is not None and label is None:
                raise ValueError(
                    f"`y` must have labels for the output {name}, because it has a "
                    f"compiled loss. Received: {describe(y)}"
                )
        terms = [
            weight * per_example(loss, *rest)
            for weight, loss, *rest in zip(
                weights, losses, labels, outputs, of_samples, strict=True
            )
            if loss is not None
        ]
        return functools.reduce(ops.add, terms)

    def _for_each(self, values: Any, predictions: Any) -> list[Any]:
        """Lists labels or weights by output, `None` where a dictionary has none."""
        if not isinstance(values, Mapping):
            return list(tree.flatten(values))
        return [values.get(name) for name in self._names(predictions)]

    def _names(self, predictions: Any) -> list[Any]:
        """Lists the names of outputs in their order, none if the model has none."""
        if isinstance(predictions, Mapping):
            return [path[0] for path, _ in tree.flatten_with_path(predictions)]
        return list(self.output_names)

    def takes_logits(self, objective: str, predictions: Any) -> list[bool]:
        """Returns whether each output holds logits, for objectives that compare scores.

        Args:
            objective: Name of the objective, for errors.
            predictions: The outputs.

        Returns:
            A bool for each output: true for logits, false for probabilities.

        Raises:
            ValueError: A loss does not say which, or does not compare classes.
        """
        losses = self._by_output(self.loss, predictions)
        outputs = tree.flatten(predictions)
        found = [takes_logits(loss) for loss in losses]
        if len(found) != len(outputs) or None in found:
            raise ValueError(
                f"The objective {objective} compares scores of classes: every output "
                "needs a cross-entropy of Keras as loss, which says whether they are "
                f"logits. Received: loss={brief(self.loss)}"
            )
        for loss, output in zip(losses, outputs, strict=True):
            several = len(output.shape) > 1 and output.shape[-1] != 1
            if several and str(loss_name(loss)).startswith("binary"):
                raise ValueError(
                    f"The objective {objective} compares classes of which one is "
                    "right: a binary cross-entropy needs a single score, several need "
                    f"a categorical one. Received: loss={brief(self.loss)} and an "
                    f"output of shape {tuple(output.shape)}"
                )
        return [bool(form) for form in found]

    def by_output(self, values: Any, predictions: Any) -> list[Any]:
        """Lists labels or sample weights in the order of the outputs.

        As in Keras, a dictionary may go by the names of the outputs, where the outputs
        themselves are no dictionary.
        """
        if isinstance(values, Mapping) and not isinstance(predictions, Mapping):
            return [values[name] for name in self.output_names]
        return tree.flatten(values)

    def _by_output(self, values: Any, predictions: Any) -> list[Any]:
        """Lists losses, or their weights, in the order of the outputs."""
        if isinstance(values, Mapping):
            paths = tree.flatten_with_path(predictions)
            names = [path[0] for path, _ in paths if path]
            if not set(values) <= set(names):
                names = list(self.output_names)
            return [values.get(name) for name in names]
        listed = tree.flatten(values)
        outputs = len(tree.flatten(predictions))
        # A single loss is for every output.
        return listed * outputs if len(listed) == 1 else listed


def per_example(
    loss: Any, y: Any, outputs: Tensor, sample_weight: Any = None
) -> Tensor:
    """Computes a compiled loss for each example, `[batch]`.

    Args:
        loss: `loss`, as `compile` received it: one loss.
        y: Labels, one array with the batch as first axis.
        outputs: Outputs of the model for the same examples.
        sample_weight: Weights of the examples, or of their parts, or `None`.

    Returns:
        The loss of each example, `[batch]`, in float32 at least: the mean over all axes
        but the first, or the sum if the loss has `reduction="sum"`. What is masked, or
        of an `ignore_class`, does not count.

    Raises:
        ValueError: The loss does not accept these labels, or returns a scalar.
    """
    losses = [one for one in tree.flatten(loss) if one is not None]
    labels = tree.flatten(y)
    if len(labels) != 1:
        raise ValueError(f"`y` must be one array of labels. Received: {describe(y)}")
    # Keras does the same before it calls a loss: labels get the dtype of the outputs,
    # and for a loss that is a function also their rank.
    # Half precision is widened, unless the logits behind the outputs are known.
    mask = keras_private.mask_of(outputs)
    outputs = outputs if is_recorded(outputs) else widen(outputs)
    target = labels[0]
    loss = of_logits(get_loss(losses[0], target, outputs))
    if backend.dtype_name(target) not in ("string", "complex64", "complex128"):
        target = ops.cast(target, outputs.dtype)
    if isinstance(loss, keras.losses.Loss):
        function = loss.call
    else:
        function, target = loss, _of_rank(target, outputs)
    try:
        found = ops.convert_to_tensor(function(target, outputs))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`y` must hold labels as the compiled loss, {loss_name(loss)}, takes "
            f"them: {error} Received: {describe(y)}"
        ) from error
    values = widen(found)
    if not len(values.shape):
        raise ValueError(
            "The compiled loss must give a value for each example. Received: "
            f"{loss_name(loss)}, which returns a scalar"
        )
    axes = list(range(1, len(values.shape)))
    summed = getattr(loss, "reduction", None) == "sum"
    # That of the values comes from `ignore_class`.
    masks = [m for m in (mask, keras_private.mask_of(found)) if m is not None]
    if not masks and sample_weight is None:
        return (ops.sum if summed else ops.mean)(values, axis=axes)
    counts = ops.ones_like(values)
    for each in masks:
        counts *= _expanded(ops.cast(each, values.dtype), values)
    weighted = values * counts
    if sample_weight is not None:
        weighted *= _expanded(ops.cast(sample_weight, values.dtype), values)
    total = ops.sum(weighted, axis=axes)
    if summed:
        return total
    return total / backend.maximum(ops.sum(counts, axis=axes), 1.0)


def _expanded(weights: Tensor, values: Tensor) -> Tensor:
    """Returns weights of examples or steps in the rank of the values."""
    rank = len(values.shape)
    if len(weights.shape) == rank + 1 and weights.shape[-1] == 1:
        return weights[..., 0]
    for _ in range(rank - len(weights.shape)):
        weights = weights[..., None]
    return weights


def _of_rank(labels: Tensor, outputs: Tensor) -> Tensor:
    """Returns labels with or without a last axis of 1, as the outputs have it."""
    rank = len(outputs.shape)
    if len(labels.shape) == rank - 1 and outputs.shape[-1] == 1:
        return labels[..., None]
    if len(labels.shape) == rank + 1 and labels.shape[-1] == 1:
        return labels[..., 0]
    return labels
