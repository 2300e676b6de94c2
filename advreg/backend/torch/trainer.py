"""The part of the wrapper that depends on Keras's trainer for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch

from advreg._types import Tensor
from advreg.backend.one_device import OneDeviceTrainer


class BackendTrainer(OneDeviceTrainer):
    """A Keras model whose steps are those of the wrapper, on PyTorch.

    A subclass defines `_run_train_step`, `_run_test_step`, `_run_predict_step`
    and `_check_batch`, which take a batch. Keras calls the methods below.
    """

    _run_train_step: Callable[[Any], dict[str, Tensor]]
    _run_test_step: Callable[[Any], dict[str, Tensor]]
    _run_predict_step: Callable[[Any], Any]
    _check_batch: Callable[[Any], None]
    train_function: Any
    test_function: Any
    predict_function: Any

    def train_step(self, data: Any) -> dict[str, Tensor]:
        """Runs one step: clean pass, attack, adversarial pass, one update of weights.

        Args:
            data: A batch, in the form of `fit`.

        Returns:
            The logs: metrics, and the losses of the step.
        """
        self._check_batch(data)
        # The step records for gradients only where it takes one.
        with torch.no_grad():
            return self._run_train_step(data)

    def test_step(self, data: Any) -> dict[str, Tensor]:
        """Evaluates a batch as the base model does: one forward pass on clean inputs.

        Args:
            data: A batch, in the form of `evaluate`.
        """
        self._check_batch(data)
        with torch.no_grad():
            return self._run_test_step(data)

    def predict_step(self, data: Any) -> Any:
        """Predicts a batch, with or without labels in it.

        Args:
            data: A batch, in the form of `predict`.
        """
        with torch.no_grad():
            return self._run_predict_step(data)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step.

        Args:
            force: Whether to make it again if there is one.

        Raises:
            ValueError: PyTorch is to compile the step, which it cannot.
        """
        if self.jit_compile:
            raise ValueError(
                "`jit_compile` must be false or 'auto' on PyTorch: its compiler cannot "
                "trace a step that takes gradients inside. Compile the model without "
                f"it. Received: jit_compile={self.jit_compile}"
            )
        super().make_train_function(force=force)
        return self.train_function

    def _updated_value(self, outputs: Any, variable: keras.Variable) -> Tensor:
        """Returns the value of a variable after a step of training.

        Args:
            outputs: What the function of `make_train_function` has returned.
            variable: The variable.
        """
        return variable.value

    def _keep_state(self, outputs: Any) -> None:
        """Does nothing, because a step has changed the variables themselves.

        Args:
            outputs: What the function of `make_train_function` has returned.
        """


def sync_state(model: keras.Model) -> None:
    """Does nothing, because variables keep their values during training."""
