"""The part of the wrapper that depends on Keras's trainer for TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.backend.tensorflow.replicas import num_replicas
from advreg.backend.tensorflow.strategies import check_compiled
from advreg.backend.tensorflow.workers import (
    FirstWorkersState,
    explain_lost_worker,
    function_over_workers,
    local_example,
    spans_workers,
)


class BackendTrainer(keras_private.BuildsFromOneReplica):
    """A Keras model whose steps are those of the wrapper, on TensorFlow.

    A subclass defines `_run_train_step`, `_run_test_step` and `_run_predict_step`,
    which take a batch. Keras calls the methods below.
    """

    _run_train_step: Callable[[Any], dict[str, Tensor]]
    _run_test_step: Callable[[Any], dict[str, Tensor]]
    _run_predict_step: Callable[[Any], Any]
    train_function: Any
    test_function: Any

    def train_step(self, data: Any) -> dict[str, Tensor]:
        """Runs one step: clean pass, attack, adversarial pass, one update of weights.

        Args:
            data: A batch, in the form of `fit`.

        Returns:
            The logs: metrics, and the losses of the step.
        """
        return self._run_train_step(data)

    def test_step(self, data: Any) -> dict[str, Tensor]:
        """Evaluates a batch as the base model does: one forward pass on clean inputs.

        Args:
            data: A batch, in the form of `evaluate`.
        """
        return self._run_test_step(data)

    def predict_step(self, data: Any) -> Any:
        """Predicts a batch, with or without labels in it.

        Args:
            data: A batch, in the form of `predict`.
        """
        return self._run_predict_step(data)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step.

        Args:
            force: Whether to make it again if there is one.
        """
        if force and spans_workers(self.distribute_strategy):
            self.train_function = function_over_workers(self, self.train_step)
        else:
            super().make_train_function(force=force)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the function that `evaluate` calls for each step.

        Args:
            force: Whether to make it again if there is one.
        """
        if force and spans_workers(self.distribute_strategy):
            self.test_function = function_over_workers(self, self.test_step)
        else:
            super().make_test_function(force=force)
        return self.test_function

    def part_of_one_replica(self, iterator: Any) -> Any:
        """Returns a batch, or its type, from which Keras is to build the model.

        `None` means Keras's default, the first batch. With several replicas that would
        be the parts of all of them, which workers do not have.

        Args:
            iterator: The iterator of Keras.
        """
        if self._num_replicas == 1:
            return None
        return local_example(iterator, self.distribute_strategy)

    @property
    def _num_replicas(self) -> int:
        """Number of replicas among which batches are split."""
        return num_replicas(self.distribute_strategy)

    def _check_devices(self) -> None:
        """Checks that the model is compiled in a way that its replicas can run.

        Raises:
            ValueError: TensorFlow cannot run its steps on several replicas.
        """
        check_compiled(self)

    def _callbacks_of_devices(
        self, initial_epoch: int
    ) -> Sequence[keras.callbacks.Callback]:
        """Returns the callbacks that several workers need in `fit`.

        Args:
            initial_epoch: The `initial_epoch` that `fit` received.
        """
        if spans_workers(self.distribute_strategy):
            return [FirstWorkersState(initial_epoch)]
        return []

    def _watched_devices(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the error of a lost worker says what to do."""
        return explain_lost_worker(self.distribute_strategy)

    def _updated_value(self, outputs: Any, variable: keras.Variable) -> Any:
        """Returns the value of a variable after a step of training.

        Args:
            outputs: What the function of `make_train_function` has returned.
            variable: The last of `metrics_variables`, or a variable of no layer.
        """
        return variable.value

    def _keep_state(self, outputs: Any) -> None:
        """Does nothing, because a step has changed the variables themselves.

        Args:
            outputs: What the function of `make_train_function` has returned.
        """


def sync_state(model: keras.Model) -> None:
    """Does nothing. On JAX, it puts values back into the variables of a model.

    Args:
        model: The model, which may be in training.
    """


def creation_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which variables of a model are created."""
    return model.distribute_strategy.scope()
