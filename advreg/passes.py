"""The passes that make up one step of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops, tree

from advreg.ball import Settings
from advreg.checks import Schedule
from advreg.config import NormType
from advreg.distribution import (
    average,
    finite_without_examples,
    overflowing_everywhere,
    share_of_batch,
    share_of_loss,
    sum_over_replicas,
    synchronizes,
    weigh,
)
from advreg.geometry import Tensor, l2_norm, steepest_direction, widen
from advreg.movable import movable
from advreg.objectives import Batch, Objective, Output
from advreg.outputs import loss_weights, outputs_are_logits
from advreg.packing import Features, Gradients
from advreg.perturbation import (
    align,
    differentiable,
    input_gradients,
    perturb,
    select,
)
from advreg.scores import logits_of
from advreg.state import (
    assign,
    metric_variables,
    recurrent_states,
    statistics,
    values_of,
)

if TYPE_CHECKING:
    from advreg.model import AdversarialRegularization


class Outcome(NamedTuple):
    """What a step found.

    Args:
        predictions: What the metrics are to be computed on.
        gradients: Of the scaled total loss, one for each trainable weight.
        loss: The total loss.
        labeled_loss: The labelled loss on clean features, `None` without a clean pass.
        adversarial_loss: The adversarial term, with its weight.
    """

    predictions: Any
    gradients: list[Tensor]
    loss: Tensor
    labeled_loss: Tensor | None
    adversarial_loss: Tensor


class Step:
    """One step of training on one batch, up to the gradients.

    Args:
        model: The wrapped model, compiled.
        x: Features, as tensors.
        y: Labels.
        sample_weight: Weights of the examples, or `None`.
    """

    def __init__(
        self, model: AdversarialRegularization, x: Features, y: Any, sample_weight: Any
    ) -> None:
        self._model, self._config = model, model.adv_config
        self._objective: Any = self._config.objective
        self._x, self._y, self._sample_weight = x, y, sample_weight
        self._perturbs = not _is_zero(self._config.multiplier)
        self._can_move = differentiable(x, model.batch_form.fixed_keys)
        # Replicas speak to each other here, for they cannot within an attack's loop.
        self._share = share_of_batch(model._batch_size(x), sample_weight)

    @property
    def examples(self) -> Tensor:
        """How many examples the losses of this replica stand for."""
        share = self._share
        return self._model._batch_size(self._x) if share is None else share.examples

    def take(self) -> Outcome:
        """Runs the passes, and lets replicas agree on what they are to share."""
        if self._share is None:
            return self._passes()
        averages = statistics(self._model.base_model)
        before = values_of(averages)
        outcome = self._passes()
        average(averages, before, self._share)
        gradients = finite_without_examples(outcome.gradients, self._share)
        if isinstance(self._model.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = overflowing_everywhere(gradients)
        return outcome._replace(gradients=gradients)

    def _passes(self) -> Outcome:
        """Runs the passes that the configuration asks for, and no others."""
        if not self._perturbs:
            return self._clean_alone()
        if self._objective.uses_clean:
            return self._together()
        if _is_zero(self._config.clean_weight):
            return self._adversarial_alone()
        return self._one_after_the_other()

    def _clean_alone(self) -> Outcome:
        y_pred, labeled_loss, loss, gradients, _ = self._clean_pass([])
        return Outcome(
            y_pred, gradients, loss, labeled_loss, ops.zeros_like(labeled_loss)
        )

    def _one_after_the_other(self) -> Outcome:
        """A clean pass, whose input gradient the attack begins with, and another."""
        carried = recurrent_states(self._model.base_model)
        before = values_of(carried)
        # The input gradient is that of the labelled loss: another attack needs its own.
        attacks_labels = type(self._objective).attack is Objective.attack
        y_pred, labeled_loss, loss, gradients, input_grads = self._clean_pass(
            self._can_move if attacks_labels else []
        )
        with self._states_of_the_clean_pass(carried, before):
            x_adv = self._perturb(input_grads if attacks_labels else None, None)
            adversarial_loss, _, more = self._adversarial_pass(x_adv)
        gradients = [_add(*pair) for pair in zip(gradients, more, strict=True)]
        loss = loss + adversarial_loss
        return Outcome(y_pred, gradients, loss, labeled_loss, adversarial_loss)

    def _adversarial_alone(self) -> Outcome:
        """No clean pass at all."""
        x_adv = self._perturb(None, None)
        adversarial_loss, y_pred, gradients = self._adversarial_pass(x_adv, alone=True)
        loss = self._total(adversarial_loss, self._model.losses)
        return Outcome(y_pred, gradients, loss, None, adversarial_loss)

    def _together(self) -> Outcome:
        """Both passes on one tape, for a loss that compares their predictions."""
        model = self._model
        moves_weights = not _is_zero(self._config.weight_perturbation)
        carried = recurrent_states(model.base_model)
        before = values_of(carried)
        x_adv = y_first = None
        if moves_weights:
            with keras.StatelessScope():
                y_first = self._forward(self._x)
            x_adv = self._perturb(None, y_first)

        def both_terms() -> Tensor:
            y_pred = self._forward(self._x)
            labeled_loss = self._labeled_loss(y_pred)
            with self._states_of_the_clean_pass(carried, before):
                y_adv = self._forward(x_adv)
            return self._clean_total(labeled_loss, []) + self._compare(y_pred, y_adv)

        with self._moved_weights(both_terms):
            with tf.GradientTape() as tape:
                y_pred = self._forward(self._x)
                labeled_loss = self._labeled_loss(y_pred)
                loss = self._clean_total(labeled_loss, model.losses)
                with self._states_of_the_clean_pass(carried, before):
                    if x_adv is None:
                        with tape.stop_recording():
                            x_adv = self._perturb(None, y_pred)
                    y_adv = self._forward(x_adv)
                with keras.StatelessScope():
                    adversarial_loss = self._compare(y_pred, y_adv)
                loss = loss + adversarial_loss
                scaled_loss = self._scaled(loss)
            gradients = tape.gradient(scaled_loss, model.trainable_weights)
        y_pred = y_pred if y_first is None else y_first
        return Outcome(y_pred, gradients, loss, labeled_loss, adversarial_loss)

    def _clean_pass(
        self, wanted: Sequence[bool]
    ) -> tuple[Any, Tensor, Tensor, list[Tensor], Gradients]:
        """Returns predictions, labelled and total loss, and their two gradients.

        One backward pass gives the gradient of the total loss with respect to the
        weights, and that of the labelled loss with respect to the input.
        """
        model = self._model
        watched = select(self._x, wanted)
        # Persistent, because the losses that a model adds show only once it has run.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(watched)
            with self._model._to_the_input() if watched else contextlib.nullcontext():
                y_pred = self._forward(self._x)
            labeled_loss = self._labeled_loss(y_pred)
            losses = model.losses
            loss = self._clean_total(labeled_loss, losses)
            scaled_loss = self._scaled(loss)
            scaled_labeled_loss = self._scaled(labeled_loss)
        weights = model.trainable_weights
        if len(losses) > sum(v.regularizer is not None for v in weights):
            # What `add_loss` and activity regularisers add may depend on the input,
            # and the attack is to raise the labelled loss alone.
            gradients = tape.gradient(scaled_loss, weights)
            input_grads = tape.gradient(scaled_labeled_loss, watched)
        else:
            both = tape.gradient(scaled_loss, [*weights, *watched])
            gradients, input_grads = both[: len(weights)], both[len(weights) :]
        return y_pred, labeled_loss, loss, gradients, align(input_grads, wanted)

    def _adversarial_pass(
        self, x_adv: Features, alone: bool = False
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Returns the adversarial term, its predictions and its gradient.

        Args:
            x_adv: Perturbed features.
            alone: Whether there is no clean pass, which would track the losses of
                single outputs and count those that the base adds.
        """

        def adversarial_term() -> Tensor:
            return self._compare(None, self._forward(x_adv))

        tracked = contextlib.nullcontext() if alone else keras.StatelessScope()
        with self._moved_weights(adversarial_term):
            with tf.GradientTape() as tape:
                y_pred = self._forward(x_adv)
                with tracked:
                    loss = self._compare(None, y_pred)
                added = self._model.losses if alone else []
                scaled_loss = self._scaled(self._total(loss, added))
            gradients = tape.gradient(scaled_loss, self._model.trainable_weights)
        return loss, y_pred, gradients

    def _perturb(self, gradients: Gradients | None, clean: Any) -> Features:
        """Moves the features so that what the objective attacks grows.

        Args:
            gradients: Those of the labelled loss at the features, where known.
            clean: Predictions for clean features, which the attack may compare with.
        """
        model = self._model

        def loss_at(features: Features) -> Tensor:
            with keras.StatelessScope():
                with self._model._to_the_input():
                    y_pred = self._forward(features)
                batch = self._batch(clean, y_pred, constant=True)
                return self._scaled(self._objective.attack(batch))

        def gradient_at(features: Features) -> Gradients:
            return input_gradients(loss_at, features, self._can_move)

        weights = None if self._objective.uses_unlabeled else self._sample_weight
        return perturb(
            self._x,
            gradient_at(self._x) if gradients is None else gradients,
            gradient_at,
            Settings.of(self._config.adv_neighbor_config, model.optimizer.iterations),
            model._training_seed,
            movable(self._x, weights, model.base_model),
            unroll=synchronizes(model.base_model),
        )

    @contextlib.contextmanager
    def _moved_weights(self, term: Callable[[], Tensor]) -> Iterator[None]:
        """Moves the kernels so that a term grows, as far as is configured, and back."""
        gamma = self._at_this_step(self._config.weight_perturbation)
        if _is_zero(gamma):
            yield
            return
        kernels = [w for w in self._model.trainable_weights if len(w.shape) > 1]
        with tf.GradientTape() as tape, keras.StatelessScope():
            scaled = self._scaled(term())
        before = values_of(kernels)
        gradients = tape.gradient(scaled, kernels, unconnected_gradients="zero")
        gradients = sum_over_replicas([tf.convert_to_tensor(g) for g in gradients])
        pairs = zip(before, gradients, strict=True)
        assign(kernels, [_moved(*pair, gamma) for pair in pairs])
        try:
            yield
        finally:
            assign(kernels, before)

    @contextlib.contextmanager
    def _states_of_the_clean_pass(
        self, carried: Sequence[keras.Variable], before: Sequence[Tensor]
    ) -> Iterator[None]:
        """Lets passes begin in the states in which the clean one began.

        Afterwards the states, and the metrics of layers, are those of the clean pass.
        """
        clean = [*carried, *metric_variables(self._model.base_model)]
        after = values_of(clean)
        assign(carried, before)
        yield
        assign(clean, after)

    def _batch(self, clean: Any, adversarial: Any, constant: bool = False) -> Batch:
        """What the objective may look at.

        Args:
            clean: Predictions for clean features, `None` where there are none.
            adversarial: Predictions for perturbed features.
            constant: Whether no gradient is to reach the clean predictions.
        """
        model, weight = self._model, self._sample_weight

        def outputs() -> list[Output]:
            after = tree.flatten(adversarial)
            before = [None] * len(after) if clean is None else tree.flatten(clean)
            weights = self._per_output(weight, adversarial)
            share = None if self._share is None else self._share.by_examples
            if len(weights) == 1:
                weights = weights * len(after)
            made = []
            for label, old, new, from_logits, w, loss_weight in zip(
                self._per_output(self._y, adversarial),
                before,
                after,
                outputs_are_logits(model, adversarial),
                weights,
                loss_weights(model, adversarial),
                strict=True,
            ):
                logits = None if old is None else logits_of(old, from_logits)
                if constant and logits is not None:
                    logits = ops.stop_gradient(logits)
                moved = logits_of(new, from_logits)
                made.append(Output(label, logits, moved, w, new, loss_weight, share))
            return made

        return Batch(outputs, lambda: self._labeled_loss(adversarial))

    def _labeled_loss(self, predictions: Any) -> Tensor:
        """The compiled loss, weighed so that all replicas' add up to the batch's."""
        loss = self._model._compile_loss(self._y, predictions, self._sample_weight)
        return weigh(loss, share_of_loss(self._share, self._model._compile_loss))

    def _per_output(self, values: Any, predictions: Any) -> list[Any]:
        """Lists what belongs to outputs in their order, which names may stand for."""
        if isinstance(values, Mapping) and not isinstance(predictions, Mapping):
            return [values[name] for name in self._model.output_names]
        return tree.flatten(values)

    def _compare(self, clean: Any, adversarial: Any) -> Tensor:
        """The adversarial term, with its weight."""
        loss = self._objective.loss(self._batch(clean, adversarial))
        multiplier = self._at_this_step(self._config.multiplier)
        return loss * ops.convert_to_tensor(multiplier, loss.dtype)

    def _clean_total(self, labeled_loss: Tensor, losses: Sequence[Tensor]) -> Tensor:
        weight = self._config.clean_weight
        if weight != 1.0:
            labeled_loss = labeled_loss * weight
        return self._total(labeled_loss, losses)

    def _total(self, loss: Tensor, losses: Sequence[Tensor]) -> Tensor:
        return self._model._total_loss(loss, losses, self._share)

    def _forward(self, features: Features) -> Any:
        return self._model._forward(features, training=True, floats=self._perturbs)

    def _scaled(self, loss: Tensor) -> Tensor:
        return self._model._scale(loss)

    def _at_this_step(self, value: Any) -> Any:
        if isinstance(value, Schedule):
            return value(self._model.optimizer.iterations)
        return value


def _is_zero(value: Any) -> bool:
    """Whether a weight is the number 0; a schedule that is at 0 is not."""
    return isinstance(value, float) and value == 0.0


def _moved(value: Tensor, gradient: Tensor, gamma: Any) -> Tensor:
    """Moves a kernel along its gradient, by `gamma` times its own length."""
    rows = widen(ops.reshape(value, (1, -1)))
    slope = widen(ops.reshape(gradient, (1, -1)))
    slope = ops.where(ops.isfinite(slope), slope, 0.0)
    direction = steepest_direction(slope, NormType.L2)
    gamma = ops.convert_to_tensor(gamma, rows.dtype)
    rows = rows + gamma * l2_norm(rows) * direction
    return ops.cast(ops.reshape(rows, ops.shape(value)), value.dtype)


def _add(a: Any, b: Any) -> Any:
    """Adds two gradients, either of which may be missing or sparse."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([a.values, b.values], 0),
            tf.concat([a.indices, b.indices], 0),
            a.dense_shape,
        )
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)
