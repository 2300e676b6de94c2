"""The parts of the wrapper that one training step, or `perturb_on_batch`, needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras

from advreg._types import Tensor
from advreg.config.configs import AdvRegConfig
from advreg.network.compiled_loss import CompiledLoss
from advreg.network.network import Network
from advreg.perturbation.ball import Ball


@dataclasses.dataclass(frozen=True)
class Request:
    """The parts of a wrapper that a step needs, instead of the wrapper itself.

    A step can so be tested, and read, without Keras's trainer.

    Args:
        config: The configuration.
        network: The forward pass of the base model.
        loss: The losses that the wrapper was compiled with.
        optimizer: The optimizer, `None` where the wrapper has none.
        seed: The generator of random starts.
        jit_compile: Whether XLA compiles the step.
        run_eagerly: Whether nothing is compiled.
        trainable_weights: Function that returns the weights to train. It is called
            after the first forward pass, which may create them.
        added_losses: Function that returns the losses that layers and regularisers of
            the base added in the last forward pass.
        inspect: Function that is called with the `Ball` of the batch before the first
            step, to check the data, or `None`.
        checks_data: Whether the data must lie in the clip range.
    """

    config: AdvRegConfig
    network: Network
    loss: CompiledLoss
    optimizer: Any
    seed: keras.random.SeedGenerator
    jit_compile: bool
    run_eagerly: bool
    trainable_weights: Callable[[], Sequence[keras.Variable]]
    added_losses: Callable[[], Sequence[Tensor]]
    inspect: Callable[[Ball], None] | None = None
    checks_data: bool = True

    @property
    def iteration(self) -> Any:
        """Number of steps that the optimizer has taken, `None` without an optimizer."""
        return None if self.optimizer is None else self.optimizer.iterations

    def scaled(self, loss: Tensor) -> Tensor:
        """Scales a loss for the optimizer, before gradients are taken.

        Only a `LossScaleOptimizer`, in half precision, has a scale.
        """
        return loss if self.optimizer is None else self.optimizer.scale_loss(loss)
