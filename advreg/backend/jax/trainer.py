"""The part of the wrapper that depends on Keras's trainer for JAX.

Keras gives a step its state as arguments, and takes the new state as a result. Here a
step runs inside a `StatelessScope` that has this state, so that one code serves all
backends.

A trap: while `fit` runs, Keras takes the values out of the variables. If the first step
fails, as for a wrong label or bad data, it does not put them back, and the model would
be lost. `_keeping_state` puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from advreg._types import Tensor
from advreg.backend.jax.scopes import StatelessScope
from advreg.backend.one_device import OneDeviceTrainer

Variables = Sequence[keras.Variable]


class BackendTrainer(OneDeviceTrainer):
    """A Keras model whose steps are those of the wrapper, on JAX.

    A subclass defines `_run_train_step`, `_run_test_step` and `_run_predict_step`,
    which take a batch, `_check_batch` and `_more_state`. Keras calls the methods below.
    """

    _run_train_step: Callable[[Any], dict[str, Tensor]]
    _run_test_step: Callable[[Any], dict[str, Tensor]]
    _run_predict_step: Callable[[Any], Any]
    _more_state: Callable[[], Variables]
    _check_batch: Callable[[Any], None]
    train_function: Any
    test_function: Any
    predict_function: Any

    @property
    def metrics_variables(self) -> list[keras.Variable]:
        """The variables of metrics, and those in which a step keeps statistics."""
        return [*super().metrics_variables, *self._more_state()]

    def train_step(self, state: Any, data: Any) -> tuple[dict[str, Tensor], Any]:
        """Runs one step: clean pass, attack, adversarial pass, one update of weights.

        Args:
            state: The values of all variables, as Keras's trainer for JAX passes them.
            data: A batch, in the form of `fit`.

        Returns:
            The logs (metrics, and the losses of the step), and the new state.
        """
        return _run_with_state(self._run_train_step, self._train_state(), state, data)

    def test_step(self, state: Any, data: Any) -> tuple[dict[str, Tensor], Any]:
        """Evaluates a batch as the base model does: one forward pass on clean inputs.

        Args:
            state: The values of all variables but those of the optimizer.
            data: A batch, in the form of `evaluate`.
        """
        return _run_with_state(self._run_test_step, self._test_state(), state, data)

    def predict_step(self, state: Any, data: Any) -> tuple[Any, Any]:
        """Predicts a batch, with or without labels in it.

        Args:
            state: The values of the variables of the model.
            data: A batch, in the form of `predict`.

        Returns:
            The outputs, and the new values of variables that are not trained.
        """
        outputs, (_, changed) = _run_with_state(
            self._run_predict_step, self._predict_state(), state, data
        )
        return outputs, changed

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step.

        Args:
            force: Whether to make it again if there is one.
        """
        if force or self.train_function is None:
            super().make_train_function(force=True)
            self.train_function = _keeping_state(
                self.train_function, self._train_state, self._checked_batch
            )
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the function that `evaluate` calls for each step.

        Args:
            force: Whether to make it again if there is one.
        """
        if force or self.test_function is None:
            super().make_test_function(force=True)
            self.test_function = _keeping_state(
                self.test_function, self._test_state, self._checked_batch
            )
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes the function that `predict` calls for each step.

        Args:
            force: Whether to make it again if there is one.
        """
        if force or self.predict_function is None:
            super().make_predict_function(force=True)
            self.predict_function = _keeping_state(
                self.predict_function, self._predict_state
            )
        return self.predict_function

    def _train_state(self) -> Sequence[Variables]:
        """Returns the variables of a training step, in the groups of Keras's state."""
        *of_model, of_metrics = self._test_state()
        return (*of_model, self.optimizer.variables, of_metrics)

    def _test_state(self) -> Sequence[Variables]:
        """Returns the variables of a step of `evaluate`."""
        return (*self._predict_state(), self.metrics_variables)

    def _predict_state(self) -> Sequence[Variables]:
        """Returns the variables of a step of `predict`."""
        return (self.trainable_variables, self.non_trainable_variables)

    def _checked_batch(self, data: Any) -> Any:
        """Returns a batch whose values are known, after a check of it."""
        self._check_batch(data)
        return data

    def _updated_value(self, outputs: Any, variable: keras.Variable) -> Tensor:
        """Returns the value of a variable after a step of training.

        Args:
            outputs: What the function of `make_train_function` has returned.
            variable: One of `_more_state`.
        """
        _, (*_, of_metrics) = outputs
        place = next(
            place
            for place, known in enumerate(self.metrics_variables)
            if known is variable
        )
        return of_metrics[place]

    def _keep_state(self, outputs: Any) -> None:
        """Assigns to the variables what a step of training has made of them.

        Keras does so at the end of an epoch only.

        Args:
            outputs: What the function of `make_train_function` has returned.
        """
        _, state = outputs
        for variable, value in _pairs(self._train_state(), state):
            variable.assign(value)


def sync_state(model: keras.Model) -> None:
    """Puts the values back into the variables of a model that `fit` is training.

    Keras takes them out at the first step of an epoch, and puts them back at its end,
    or when a callback asks for its `model`. Afterwards `fit` goes on with them.

    Args:
        model: The model, which may be in training.

    Raises:
        RuntimeError: It is the base of a model in training, which alone has the values.
    """
    model.jax_state_sync()
    for variable in model.trainable_variables:
        try:
            variable.value  # noqa: B018
        except TypeError:  # There is neither a value nor an initializer.
            raise RuntimeError(
                "The model has no weights at this moment: while `fit` trains a model "
                "on JAX, Keras keeps its weights elsewhere. Use the model that is "
                "trained, or `self.model` of a callback, before its parts. Received: "
                f"{model.name!r}"
            ) from None


def _run_with_state(
    step: Callable[[Any], Any], variables: Sequence[Variables], state: Any, data: Any
) -> tuple[Any, Any]:
    """Runs a step in which variables have the values of a state.

    Args:
        step: Function of a batch.
        variables: Groups of variables.
        state: For each group the values.
        data: The batch.

    Returns:
        What the step returned, and the new state.
    """
    with StatelessScope(_pairs(variables, state), collect_losses=True) as scope:
        results = step(data)
    return results, tuple(
        [scope.get_current_value(variable) for variable in group] for group in variables
    )


def _pairs(
    variables: Sequence[Variables], state: Any
) -> list[tuple[keras.Variable, Tensor]]:
    """Returns each variable with its value, out of groups of both."""
    return [
        pair
        for group, values in zip(variables, state, strict=True)
        for pair in zip(group, values, strict=True)
    ]


def _keeping_state(
    function: Callable[[Any, Any], Any],
    variables: Callable[[], Sequence[Variables]],
    check: Callable[[Any], Any] | None = None,
) -> Callable[[Any, Any], Any]:
    """Wraps a function of Keras's trainer, so that an error does not lose the state.

    Args:
        function: Function of a state and an iterator.
        variables: Function that returns the variables that the state belongs to.
        check: Function that checks a batch, and returns it; `None` for no check.
    """

    def keeping(state: Any, iterator: Any) -> Any:
        try:
            return function(state, iterator if check is None else map(check, iterator))
        except StopIteration:
            raise
        except BaseException:
            for variable, value in _pairs(variables(), state):
                if isinstance(value, jax.Array) and not value.is_deleted():
                    variable.assign(value)
            raise

    return keeping
