"""Objectives: the adversarial term of the training loss, and the loss that is attacked.

Training minimises `clean_weight * labelled loss + multiplier * objective.loss(batch)`.
The attack perturbs the inputs so that `objective.attack(batch)` grows. An objective
gets a `Batch`, and never the model: the labelled loss at the perturbed features, and,
if it asks for them, the logits of each output for clean and for perturbed features.

`Output.mean` averages values over a batch. It does what Keras's own losses do with
sample weights, masks, several outputs and replicas, so that an objective needs only the
formula of its paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.checks import brief, check_nonnegative, describe_value


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the model, for clean and for perturbed features.

    Args:
        labels: Labels of this output, as `fit` received them.
        clean_logits: Logits for clean features, in float32 at least, with the classes
            as last axis. During an attack they have no gradient. `None` where the
            objective has `uses_clean = False`.
        adversarial_logits: Logits for perturbed features, in the same form.
        sample_weight: Weights of the examples, or `None`.
        predictions: The outputs of the model for perturbed features.
        loss_weight: Weight of this output, from the `loss_weights` of `compile`.
        share: Weight of this replica's mean, `None` if it is the only one.
    """

    labels: Tensor
    clean_logits: Tensor
    adversarial_logits: Tensor
    sample_weight: Tensor | None
    predictions: Tensor
    loss_weight: float = 1.0
    share: Tensor | None = None

    def mean(self, values: Tensor, weighted: bool = True) -> Tensor:
        """Averages values as Keras's losses do: with sample weights, without padding.

        The mean is multiplied by the weight of this output.

        Args:
            values: Tensor of the shape of the logits without their last axis.
            weighted: Whether sample weights count.

        Returns:
            A scalar in `keras.config.floatx()`.
        """
        weights = self.sample_weight if weighted else None
        given = _Given(name="given", dtype=values.dtype)
        # `predictions` carry the mask of padded time steps.
        mean = self.loss_weight * given(values, self.predictions, weights)
        mean = backend.scale_mean(mean, self.share)
        # Compiled losses have this dtype, whatever that of the model, and the mean may
        # be added to one.
        return ops.cast(mean, keras.config.floatx())

    def classes(self) -> Tensor:
        """Returns the labels as one-hot rows, in the shape and dtype of the logits."""
        shape, dtype = self.adversarial_logits.shape, self.adversarial_logits.dtype
        labels = self.labels
        if len(labels.shape) == len(shape) and labels.shape[-1] == shape[-1]:
            return ops.cast(labels, dtype)
        if len(labels.shape) == len(shape):
            labels = ops.squeeze(labels, -1)
        return ops.one_hot(ops.cast(labels, "int32"), shape[-1], dtype=dtype)


class Batch:
    """The values that an objective is computed from.

    Both are functions, because an objective that does not ask for logits must also work
    with losses that say nothing about logits.

    Args:
        outputs: Function that makes the list of outputs, for objectives that need
            logits.
        labeled_loss: Function that computes the compiled loss of the predictions for
            perturbed features, with the sample weights.
    """

    def __init__(
        self,
        outputs: Callable[[], Sequence[Output]],
        labeled_loss: Callable[[], Tensor],
    ) -> None:
        self._outputs, self._labeled_loss = outputs, labeled_loss

    @property
    def labeled_loss(self) -> Tensor:
        """The compiled loss at the perturbed features, a scalar."""
        return self._labeled_loss()

    @property
    def outputs(self) -> Sequence[Output]:
        """The outputs of the model, in the order of `keras.tree.flatten`."""
        return self._outputs()


class Objective:
    """Base class of objectives: the adversarial term, and the loss that is attacked.

    Write one of your own as a subclass that is registered with
    `keras.saving.register_keras_serializable` and has a method `loss`. A frozen
    dataclass needs nothing more; other classes need a `get_config`.

    Example:
    >>> @keras.saving.register_keras_serializable("mine")
    ... @dataclasses.dataclass(frozen=True)
    ... class SquaredProbabilities(advreg.Objective):
    ...     def loss(self, batch):
    ...         total = 0.0
    ...         for output in batch.outputs:
    ...             clean = keras.ops.softmax(output.clean_logits)
    ...             moved = keras.ops.softmax(output.adversarial_logits)
    ...             total += output.mean(keras.ops.sum((clean - moved) ** 2, -1))
    ...         return total
    """

    # Whether the loss needs the predictions for clean features.
    uses_clean = True
    # Whether the gradient of the attack is 0 at the clean features, as that of a
    # divergence from the clean predictions is, so that the attack must start elsewhere.
    needs_random_init = False
    # Whether examples of weight 0, such as those without a label, are used too.
    uses_unlabeled = False

    def attack(self, batch: Batch) -> Tensor:
        """Returns the scalar that the attack increases: here the labelled loss."""
        return batch.labeled_loss

    def loss(self, batch: Batch) -> Tensor:
        """Returns the scalar that training minimises, a subclass's own.

        Args:
            batch: The `Batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss`.")

    def get_config(self) -> dict[str, Any]:
        """Returns the fields of a dataclass.

        Raises:
            NotImplementedError: The class has arguments, and is no dataclass.
        """
        if not dataclasses.is_dataclass(self):
            if type(self).__init__ is not object.__init__:
                raise NotImplementedError(
                    f"{type(self).__name__} must define `get_config`, so that it can "
                    "be saved and compared: it is no dataclass, and has an `__init__`."
                )
            return {}
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes the objective that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True)
class LabeledLoss(Objective):
    """The compiled loss at the perturbed features.

    This is the objective of [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572),
    and with `clean_weight=0.0` that of
    [Madry et al., 2017](https://arxiv.org/abs/1706.06083).
    """

    uses_clean = False

    def loss(self, batch: Batch) -> Tensor:
        """Returns the labelled loss."""
        return batch.labeled_loss


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True)
class Trades(Objective):
    """The divergence of perturbed predictions from the clean ones (TRADES).

    It is the Kullback-Leibler divergence `KL(clean ‖ perturbed)` of
    [Zhang et al., 2019](https://arxiv.org/abs/1901.08573). The attack increases it, and
    training decreases it, with gradients through both predictions. Its weight, the β or
    1/λ of the paper, is the `multiplier`.
    """

    needs_random_init = True

    def attack(self, batch: Batch) -> Tensor:
        """Returns the divergence."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Returns the divergence."""
        return _divergence(batch)


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True)
class Mart(Objective):
    """A boosted cross-entropy, and a divergence that is weighted by example (MART).

    In [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS) examples that the
    model misclassifies without a perturbation count more. The loss includes the
    labelled term, so set `clean_weight=0.0`.

    Args:
        beta: Weight of the divergence, the λ of the paper, not negative.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check_nonnegative("beta", self.beta))

    def loss(self, batch: Batch) -> Tensor:
        """Computes the loss of the paper.

        Raises:
            ValueError: The model has several outputs.
        """
        outputs = batch.outputs
        if len(outputs) != 1:
            raise ValueError(
                "The objective Mart holds the labelled term of one output: take "
                '`objective="trades"` where there are several. Received: '
                f"{len(outputs)} outputs"
            )
        (output,) = outputs
        classes = output.classes()
        clean = ops.log_softmax(output.clean_logits)
        moved = ops.log_softmax(output.adversarial_logits)
        own = ops.sum(classes * moved, -1)
        # log(1 - p) of the most probable other class, as the logarithm of the sum of
        # all probabilities but p: 1 - p would round to 0.
        best = ops.argmax(ops.where(classes > 0.5, -math.inf, moved), -1)
        best = ops.one_hot(best, moved.shape[-1], dtype="bool")
        rest = ops.logsumexp(ops.where(best, -math.inf, moved), -1)
        sure = ops.sum(classes * ops.exp(clean), -1)
        divergence = ops.sum(ops.exp(clean) * (clean - moved), -1)
        return output.mean(self.beta * divergence * (1 - sure) - own - rest)


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True)
class VirtualAdversarial(Objective):
    """The divergence of perturbed predictions from the clean ones, taken as constants.

    It is the local distributional smoothness of
    [Miyato et al., 2018](https://arxiv.org/abs/1704.03976). It needs no labels: give
    examples without a label any label, and the sample weight 0. They are used too.
    """

    needs_random_init = True
    uses_unlabeled = True

    def attack(self, batch: Batch) -> Tensor:
        """Returns the divergence."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Returns the divergence, averaged over all examples without sample weights."""
        return _divergence(batch, constant=True, weighted=False)


@keras.saving.register_keras_serializable(package="advreg")
@dataclasses.dataclass(frozen=True)
class LogitPairing(Objective):
    """The labelled loss at perturbed features, and the distance between the logits.

    This is the adversarial logit pairing of
    [Kannan et al., 2018](https://arxiv.org/abs/1803.06373).

    Args:
        weight: Weight of the mean squared difference of the logits, not negative.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_nonnegative("weight", self.weight))

    def loss(self, batch: Batch) -> Tensor:
        """Returns the sum of both terms."""
        total = batch.labeled_loss
        for output in batch.outputs:
            difference = output.clean_logits - output.adversarial_logits
            total += self.weight * output.mean(ops.mean(ops.square(difference), -1))
        return total


OBJECTIVES = {
    "labeled_loss": LabeledLoss,
    "trades": Trades,
    "mart": Mart,
    "virtual_adversarial": VirtualAdversarial,
    "logit_pairing": LogitPairing,
}


def check_objective(value: Any) -> Objective:
    """Checks the argument `objective`: an object, or the name of one.

    Raises:
        TypeError: It is neither.
        ValueError: No objective has such a name.
    """
    if isinstance(value, str):
        if value not in OBJECTIVES:
            raise ValueError(
                f"`objective` must be one of {sorted(OBJECTIVES)}, or an "
                f"`advreg.Objective`. Received: {brief(value)}"
            )
        return OBJECTIVES[value]()
    if not isinstance(value, Objective):
        raise TypeError(
            f"`objective` must be a name out of {sorted(OBJECTIVES)}, or an "
            f"`advreg.Objective`. Received: {describe_value(value)}"
        )
    return value


def _divergence(batch: Batch, constant: bool = False, weighted: bool = True) -> Tensor:
    """Computes the divergence `KL(clean ‖ perturbed)` of the predictions.

    Args:
        batch: The `Batch`.
        constant: Whether the clean predictions have no gradient.
        weighted: Whether sample weights count.
    """
    total = 0.0
    for output in batch.outputs:
        clean = output.clean_logits
        clean = ops.log_softmax(ops.stop_gradient(clean) if constant else clean)
        moved = ops.log_softmax(output.adversarial_logits)
        divergence = ops.sum(ops.exp(clean) * (clean - moved), -1)
        total += output.mean(divergence, weighted)
    return total


class _Given(keras.losses.Loss):
    """A Keras loss of given values, of which only the reduction is used."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        del y_pred
        return y_true
