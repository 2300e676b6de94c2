"""One training step: from a batch to the gradients of the total loss.

`Step` gets a `Request` and a batch, and returns a `StepResult`. It does not apply the
gradients, and changes neither the optimizer nor a compiled metric. Gradients come from
`backend`, the attack from `perturbation`.

There are four kinds of steps, and `_passes` chooses the cheapest that the configuration
allows:

- `_clean_alone`: plain training, if `multiplier` is 0.
- `_one_after_the_other`: the usual one, for the labelled loss. One clean forward and
  backward pass gives the gradient of the weights, and that of the input with which the
  attack begins. Then come the other iterations of the attack, and a forward and
  backward pass at the perturbed features. Both gradients of the weights are added.
- `_adversarial_alone`: without a clean pass, if `clean_weight` is 0 and the objective
  needs no clean predictions.
- `_together`: for objectives that compare clean and perturbed predictions. Both passes
  are under one tape, because the gradient goes through both predictions.

Three things to know when changing it:

- The order of the passes matters for state. What the attack changes in layers is
  discarded. Recurrent states and metrics of layers are those of the clean pass, moving
  averages are updated by both passes (see `network.states`).
- Losses that the base model adds itself count once, in the clean pass, or in the
  adversarial pass if that is the only one.
- The attack may perturb outputs of layers, in place of inputs or beside them. The clean
  pass records these outputs (see `network.attack_space`).
- Replicas may not exchange values inside a loop or a condition. So every exchange is
  outside of the loop of the attack, or this loop is unrolled (`_in_step`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Schedule, Tensor, Watch
from advreg.config.norms import NormType
from advreg.network.attack_space import AttackSpace, naming_embeddings
from advreg.network.gradients import (
    align,
    input_gradients,
    scaled_gradients,
    select,
    with_leaves,
)
from advreg.network.logits import logits_of
from advreg.network.precision import Precision
from advreg.network.states import (
    assign,
    metric_variables,
    recurrent_states,
    statistics,
    values_of,
)
from advreg.objectives import Batch, Objective, Output
from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Settings
from advreg.perturbation.geometry import (
    l2_norm,
    make_finite,
    steepest_direction,
    widen,
)
from advreg.training.request import Request


class StepResult(NamedTuple):
    """The result of a step.

    Args:
        predictions: The predictions for the metrics: clean ones, or perturbed ones
            without a clean pass.
        gradients: The gradient of the total loss for each trainable weight, scaled as
            the optimizer expects it.
        loss: The total loss.
        labeled_loss: The labelled loss on clean features, `None` without a clean pass.
        adversarial_loss: The adversarial term, times its weight.
    """

    predictions: Any
    gradients: list[Tensor]
    loss: Tensor
    labeled_loss: Tensor | None
    adversarial_loss: Tensor


class Step:
    """One training step on one batch, up to the gradients.

    Args:
        request: The parts of the wrapper.
        x: Features, as tensors.
        y: Labels.
        sample_weight: Weights of the examples, or `None`.
    """

    def __init__(
        self, request: Request, x: Features, y: Any, sample_weight: Any
    ) -> None:
        self._request, self._config = request, request.config
        self._network, self._base = request.network, request.network.base
        self._objective: Any = self._config.objective
        self._x, self._y, self._sample_weight = x, y, sample_weight
        self._perturbs = not _is_zero(self._config.multiplier)
        self._space = AttackSpace(
            self._base,
            self._config.adv_neighbor_config,
            x,
            self._network.form.fixed_keys,
        )
        self._in_step = backend.synchronizes(self._base)
        self._precision = Precision(self._base, x, in_step=self._in_step)
        # Replicas exchange the sizes of their parts here, because they cannot do so
        # inside the loop of the attack.
        self._weight = backend.replica_weight(num_examples(x), sample_weight)

    @property
    def examples(self) -> Tensor:
        """Number of examples by which the losses of this replica are weighted."""
        return num_examples(self._x) if self._weight is None else self._weight.examples

    def run(self) -> StepResult:
        """Runs the passes. Replicas then agree on moving averages and overflows."""
        if self._weight is None:
            return self._passes()
        averages = statistics(self._base)
        before = values_of(averages)
        result = self._passes()
        backend.average_changes(averages, before, self._weight)
        gradients = backend.zero_grads_of_empty_replicas(result.gradients, self._weight)
        optimizer = self._request.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = backend.sync_overflow(gradients)
        return result._replace(gradients=gradients)

    def _passes(self) -> StepResult:
        """Runs the passes that the configuration needs, and no others."""
        if not self._perturbs:
            return self._clean_alone()
        if self._objective.uses_clean:
            return self._together()
        if _is_zero(self._config.clean_weight):
            return self._adversarial_alone()
        return self._one_after_the_other()

    def _clean_alone(self) -> StepResult:
        y_pred, labeled_loss, loss, gradients, _, _ = self._clean_pass(attacked=False)
        return StepResult(
            y_pred, gradients, loss, labeled_loss, ops.zeros_like(labeled_loss)
        )

    def _one_after_the_other(self) -> StepResult:
        """Runs a clean pass, an attack that uses its gradient, and a last pass."""
        carried = recurrent_states(self._base)
        before = values_of(carried)
        # The clean pass gives the input gradient of the labelled loss. An objective
        # that attacks another loss needs a pass of its own.
        attacks_labels = type(self._objective).attack is Objective.attack
        y_pred, labeled_loss, loss, gradients, input_grads, scale = self._clean_pass(
            attacks_labels
        )
        with self._states_of_the_clean_pass(carried, before):
            x_adv = self._perturb(input_grads if attacks_labels else None, None, scale)
            adversarial_loss, _, _, more = self._adversarial_pass(x_adv)
        gradients = [
            backend.add_gradients(*pair) for pair in zip(gradients, more, strict=True)
        ]
        loss = loss + adversarial_loss
        return StepResult(y_pred, gradients, loss, labeled_loss, adversarial_loss)

    def _adversarial_alone(self) -> StepResult:
        """Runs no clean pass at all."""
        x_adv = self._perturb(None, None)
        adversarial_loss, y_pred, loss, gradients = self._adversarial_pass(
            x_adv, alone=True
        )
        return StepResult(y_pred, gradients, loss, None, adversarial_loss)

    def _together(self) -> StepResult:
        """Runs both passes under one tape, for losses that compare predictions."""
        carried = recurrent_states(self._base)
        before = values_of(carried)
        x_adv = y_first = None
        # Inputs are perturbed at the original weights. So with perturbed weights this
        # needs a clean pass before, whose predictions also serve the metrics.
        if not _is_zero(self._config.weight_perturbation):
            with backend.StatelessScope(), self._space.recording():
                y_first = self._forward(self._x)
            x_adv = self._perturb(None, y_first)

        def both_terms() -> Tensor:
            y_pred = self._forward(self._x)
            labeled_loss = self._labeled_loss(y_pred)
            with self._states_of_the_clean_pass(carried, before):
                y_adv = self._forward_at(x_adv)
            return self._clean_total(labeled_loss, []) + self._compare(y_pred, y_adv)

        def both_passes(*_: Any) -> tuple[Tensor, None, Any]:
            with self._space.recording() if x_adv is None else contextlib.nullcontext():
                y_pred = self._forward(self._x)
            labeled_loss = self._labeled_loss(y_pred)
            loss = self._clean_total(labeled_loss, self._request.added_losses())
            with self._states_of_the_clean_pass(carried, before):
                moved = x_adv
                if moved is None:
                    # The tape of this step must not record the iterations.
                    with backend.constants():
                        moved = self._perturb(None, y_pred)
                y_adv = self._forward_at(moved)
            # The container of losses has counted the clean pass already.
            with backend.StatelessScope():
                adversarial_loss = self._compare(y_pred, y_adv)
            loss = loss + adversarial_loss
            found = (y_pred, loss, labeled_loss, adversarial_loss)
            return self._request.scaled(loss), None, found

        with self._perturbed_weights(both_terms):
            found, gradients, _ = backend.differentiate_step(
                both_passes, self._request.trainable_weights
            )
        y_pred, loss, labeled_loss, adversarial_loss = found
        y_pred = y_pred if y_first is None else y_first
        return StepResult(y_pred, gradients, loss, labeled_loss, adversarial_loss)

    def _clean_pass(
        self, attacked: bool
    ) -> tuple[Any, Tensor, Tensor, list[Tensor], Gradients, Tensor | float | None]:
        """Runs the clean pass, and takes its two gradients.

        They are the gradient of the total loss with respect to the weights, and that of
        the labelled loss with respect to the input. One backward pass gives both, where
        the two losses differ only by terms that do not depend on the input. The weight
        of the labelled loss does not matter, because a perturbation does not depend on
        the scale of the gradient.

        Args:
            attacked: Whether the gradient of the labelled loss is wanted.

        Returns:
            The predictions, the labelled and the total loss, the gradients of the total
            loss with respect to the weights, those of the labelled loss with respect to
            the features of the attack, and the scale of the latter, which matters in
            half precision.
        """
        request, space = self._request, self._space
        wanted = space.inputs if attacked else []
        watched = select(self._x, wanted) if wanted else []
        watches = attacked and space.has_layers
        scale: Any = request.scaled(ops.ones([]))

        def passed(leaves: list[Tensor], watch: Watch) -> tuple[Tensor, Tensor, Any]:
            nonlocal scale
            x = with_leaves(self._x, wanted, leaves) if leaves else self._x
            with self._recording(watch if watches else None):
                y_pred = self._forward(x, for_input_gradient=bool(leaves))
            labeled_loss = self._labeled_loss(y_pred)
            added = request.added_losses()
            loss = self._clean_total(labeled_loss, added)
            total = climbed = request.scaled(loss)
            weights = request.trainable_weights()
            # `add_loss` and activity regularisers may add losses that depend on the
            # input, and the attack must raise the labelled loss alone. They are there
            # if there are more added losses than weights with a regulariser. In half
            # precision the input gradient needs a scale, too.
            apart = len(added) > sum(v.regularizer is not None for v in weights)
            apart = apart or (self._precision.half and total is loss)
            if attacked and apart:
                scale = self._precision.scale
                climbed = labeled_loss
                if scale is not None:
                    climbed = climbed * ops.cast(scale, climbed.dtype)
            return total, climbed, (y_pred, labeled_loss, loss, space.recorded)

        others, gradients, found = backend.differentiate_step(
            passed, request.trainable_weights, watched, watches
        )
        y_pred, labeled_loss, loss, space.recorded = others
        of_inputs = align(found[: len(watched)], wanted)
        if attacked:
            of_inputs = space.gradients(of_inputs, found[len(watched) :])
        return y_pred, labeled_loss, loss, gradients, of_inputs, scale

    def _recording(
        self, watch: Watch | None
    ) -> contextlib.AbstractContextManager[None]:
        """Records outputs of layers, as a context manager, if this step needs them."""
        if not self._perturbs:
            return contextlib.nullcontext()
        return self._space.recording(watch)

    def _adversarial_pass(
        self, x_adv: Features, alone: bool = False
    ) -> tuple[Tensor, Any, Tensor, list[Tensor]]:
        """Runs a pass at perturbed features.

        Args:
            x_adv: Perturbed features.
            alone: Whether there is no clean pass. If there is, it has counted the
                losses of single outputs in their metrics, and the losses that the base
                adds.

        Returns:
            The adversarial term times its weight, the predictions, the total loss of
            this pass, and its gradients with respect to the weights.
        """

        def adversarial_term() -> Tensor:
            return self._compare(None, self._forward_at(x_adv))

        def passed(*_: Any) -> tuple[Tensor, None, Any]:
            y_pred = self._forward_at(x_adv)
            with contextlib.nullcontext() if alone else backend.StatelessScope():
                loss = self._compare(None, y_pred)
            added = self._request.added_losses() if alone else []
            total = self._total(loss, added)
            return self._request.scaled(total), None, (loss, y_pred, total)

        with self._perturbed_weights(adversarial_term):
            (loss, y_pred, total), gradients, _ = backend.differentiate_step(
                passed, self._request.trainable_weights
            )
        return loss, y_pred, total, gradients

    def _perturb(
        self,
        gradients: Gradients | None,
        clean: Any,
        scale: Tensor | float | None = None,
    ) -> Features:
        """Perturbs the features so that the loss that the objective attacks grows.

        Args:
            gradients: The gradients of the labelled loss at the features, `None` if
                they are not known yet.
            clean: Predictions for clean features, with which an objective may compare.
            scale: The scale of known gradients, which matters in half precision.
        """
        request = self._request

        def loss_at(features: Features) -> Tensor:
            with backend.StatelessScope():
                y_pred = self._forward_at(features, for_input_gradient=True)
                batch = self._batch(clean, y_pred, constant=True)
                return self._objective.attack(batch)

        settings = Settings.of(self._config.adv_neighbor_config, request.iteration)
        # Examples of weight 0 stay unperturbed, unless the objective uses them.
        weights = None if self._objective.uses_unlabeled else self._sample_weight
        space = self._space
        if space.has_layers and space.recorded is None:
            # In a graph only shapes and masks of this pass are computed.
            with backend.StatelessScope(), space.recording():
                self._forward(self._x)
        start, wanted = space.start(), space.wanted()

        def gradient_at(features: Features) -> Gradients:
            return input_gradients(loss_at, features, wanted, self._precision)

        if gradients is None:
            gradients = gradient_at(start)
        else:
            again = functools.partial(scaled_gradients, loss_at, start, wanted)
            gradients = self._precision.unscale(gradients, scale, again)
        with naming_embeddings(self._base):
            return perturb(
                start,
                gradients,
                gradient_at,
                space.settings(settings),
                request.seed,
                space.can_move(weights),
                unroll=self._in_step,
                inspect=request.inspect,
            )

    @contextlib.contextmanager
    def _perturbed_weights(self, term: Callable[[], Tensor]) -> Iterator[None]:
        """Perturbs the kernels so that a term grows, as a context manager.

        This is the adversarial weight perturbation of
        [Wu et al., 2020](https://arxiv.org/abs/2004.05884). The gradient that training
        uses is taken inside, and the kernels are restored afterwards.

        Args:
            term: Function that computes the term, a scalar.
        """
        gamma = self._at_this_step(self._config.weight_perturbation)
        if _is_zero(gamma):
            yield
            return
        weights = self._request.trainable_weights()
        # Vectors, such as biases and the scales of normalisation, are not perturbed.
        kernels = [weight for weight in weights if len(weight.shape) > 1]

        def take(scale: Tensor | float | None) -> list[Tensor]:
            found = backend.weight_gradients(term, kernels, scale)
            return [ops.reshape(gradient, (1, -1)) for gradient in found]

        before = values_of(kernels)
        found = self._precision.gradients(take)
        gradients = backend.sum_over_replicas(found)
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
        """Resets recurrent states to those before the clean pass, as a context manager.

        The passes inside begin with these states, as the clean pass did. On exit the
        states, and the metrics of layers, are again those after the clean pass.

        Args:
            carried: The recurrent states.
            before: Their values before the clean pass.
        """
        clean = [*carried, *metric_variables(self._base)]
        after = values_of(clean)
        assign(carried, before)
        try:
            yield
        finally:
            assign(clean, after)

    def _batch(self, clean: Any, adversarial: Any, constant: bool = False) -> Batch:
        """Makes the `Batch` that the objective gets.

        Args:
            clean: Predictions for clean features, `None` where there are none.
            adversarial: Predictions for perturbed features.
            constant: Whether the clean predictions have no gradient, as in the attack.
        """
        compiled = self._request.loss

        def outputs() -> list[Output]:
            after = tree.flatten(adversarial)
            before = [None] * len(after) if clean is None else tree.flatten(clean)
            weights = compiled.by_output(self._sample_weight, adversarial)
            share = None if self._weight is None else self._weight.by_examples
            if len(weights) == 1:
                weights = weights * len(after)
            objective = type(self._objective).__name__
            found = []
            for label, old, new, from_logits, weight, loss_weight in zip(
                compiled.by_output(self._y, adversarial),
                before,
                after,
                compiled.takes_logits(objective, adversarial),
                weights,
                compiled.weights(adversarial),
                strict=True,
            ):
                logits = None if old is None else logits_of(old, from_logits)
                if constant and logits is not None:
                    logits = ops.stop_gradient(logits)
                moved = logits_of(new, from_logits)
                found.append(
                    Output(label, logits, moved, weight, new, loss_weight, share)
                )
            return found

        return Batch(outputs, lambda: self._labeled_loss(adversarial))

    def _labeled_loss(self, predictions: Any) -> Tensor:
        """Computes the compiled loss: with several replicas, this one's share of it."""
        return self._request.loss.labeled(
            self._y, predictions, self._sample_weight, self._weight
        )

    def _compare(self, clean: Any, adversarial: Any) -> Tensor:
        """Computes the adversarial term, times its weight."""
        loss = self._objective.loss(self._batch(clean, adversarial))
        multiplier = self._at_this_step(self._config.multiplier)
        return loss * ops.convert_to_tensor(multiplier, loss.dtype)

    def _clean_total(self, labeled_loss: Tensor, added: Sequence[Tensor]) -> Tensor:
        weight = self._config.clean_weight
        if weight != 1.0:
            labeled_loss = labeled_loss * weight
        return self._total(labeled_loss, added)

    def _total(self, loss: Tensor, added: Sequence[Tensor]) -> Tensor:
        return self._request.loss.total(loss, added, self._weight)

    def _forward_at(self, features: Any, for_input_gradient: bool = False) -> Any:
        """Runs the model on features of the attack, see `AttackSpace.start`."""
        with self._space.at(features) as x:
            return self._forward(x, for_input_gradient)

    def _forward(self, features: Features, for_input_gradient: bool = False) -> Any:
        return self._network.forward(
            features,
            training=True,
            floats=self._perturbs,
            # XLA compiles the gradient of a convolution in its own way, and needs no
            # replacement.
            for_input_gradient=for_input_gradient and not self._request.jit_compile,
        )

    def _at_this_step(self, value: Any) -> Any:
        if isinstance(value, Schedule):
            return value(self._request.iteration)
        return value


def _is_zero(value: Any) -> bool:
    """Returns whether a weight is the number 0, and not a schedule that is at 0."""
    return isinstance(value, float) and value == 0.0


def _moved(value: Tensor, gradient: Tensor, gamma: Any) -> Tensor:
    """Adds `gamma` times its L2 norm to a kernel, in the direction of the gradient."""
    rows = widen(ops.reshape(value, (1, -1)))
    slope = make_finite(ops.reshape(gradient, (1, -1)))
    direction = steepest_direction(slope, NormType.L2)
    gamma = ops.convert_to_tensor(gamma, rows.dtype)
    rows = rows + gamma * l2_norm(rows) * direction
    return ops.cast(ops.reshape(rows, ops.shape(value)), value.dtype)


def num_examples(x: Features) -> Tensor:
    """Returns the number of examples of a batch, a scalar tensor."""
    leaf = next(leaf for leaf in tree.flatten(x) if leaf is not None)
    return backend.num_rows(leaf)
