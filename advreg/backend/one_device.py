"""What replicas of `tf.distribute` do, on backends that have none.

On JAX `keras.distribution` splits a batch among devices, and one step still computes
over the whole batch, as if there were one device. On PyTorch there is one device. So a
batch has no parts that would have to be weighted. The names are those of
`backend.tensorflow.replicas` and its neighbours, which say what they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from advreg._types import Tensor
from advreg.backend.seeds import seed_from_name


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator whose seed is derived from its name.

    Args:
        seed: Integer, or `None` for one derived from the name: see `backend.seeds`.
        name: Name of the generator.
    """

    def __init__(self, seed: int | None = None, name: str | None = None) -> None:
        super().__init__(seed_from_name(name) if seed is None else seed, name=name)


class OneDeviceTrainer(keras.Model):
    """A Keras model that does nothing for several replicas.

    `backend.tensorflow.trainer` says what these methods are for.
    """

    _num_replicas = 1

    def _check_devices(self) -> None:
        """Does nothing."""

    def _callbacks_of_devices(
        self, initial_epoch: int
    ) -> Sequence[keras.callbacks.Callback]:
        return []

    def _watched_devices(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def creation_scope(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Returns a context that does nothing: variables of a model need none here."""
    return contextlib.nullcontext()


ReplicaWeight = None  # Nothing needs a weight.


def has_strategy() -> bool:
    """Returns whether a `tf.distribute` strategy is in force: never."""
    return False


def check_scope(base_model: keras.Model) -> None:
    """Does nothing, because there is no strategy that a model could be made outside of.

    Args:
        base_model: The model.
    """


def check_outside_of_scope(what: str) -> None:
    """Does nothing, because there is no scope.

    Args:
        what: What the user calls.
    """


def synchronizes(model: keras.Model) -> bool:
    """Returns whether replicas exchange values while a model runs: never."""
    return False


def replica_weight(examples: Any, sample_weight: Any) -> None:
    """Returns `None`, because no part of a batch needs a weight."""


def weight_of_loss(weight: None, loss: Any) -> None:
    """Returns `None`, because no loss needs a weight."""


def scale_mean(mean: Tensor, share: None) -> Tensor:
    """Returns a mean, which is that of the whole batch."""
    return mean


def sum_of_added_loss(loss: Tensor) -> Tensor:
    """Sums a loss that the model has added itself, as Keras does."""
    if not keras.backend.is_float_dtype(loss.dtype):
        loss = ops.cast(loss, keras.config.floatx())
    return ops.sum(loss)


def unscale_loss(loss: Tensor) -> Tensor:
    """Returns a loss, which Keras has divided by nothing."""
    return loss


def sum_over_replicas(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns tensors, which are those of the whole batch."""
    return tensors


def _not_called(*_: Any) -> Any:
    raise AssertionError("Only TensorFlow has what this is for.")


average_changes: Callable[..., None] = _not_called
sync_overflow: Callable[..., list[Any]] = _not_called
zero_grads_of_empty_replicas: Callable[..., list[Any]] = _not_called


def has_only_cpus() -> bool:
    """Returns false, because the convolution for CPUs is one of TensorFlow's graph."""
    return False


convolve: Callable[..., Tensor] = _not_called
gains: Callable[..., bool] = _not_called


def is_compiled(function: Any) -> bool:
    """Returns whether a function is a `tf.function`: never."""
    return False


without_compilation: Callable[..., Callable[..., Any]] = _not_called


def made_by(outputs: Tensor) -> None:
    """Returns `None`, because there is no graph that says what made outputs."""


def logits_behind(outputs: Tensor) -> None:
    """Returns `None`, because there is no graph in which logits could be found."""


def outputs_of(compiled: Any) -> None:
    """Returns `None`, because a compiled function has no graph to look into."""


def may_draw(compiled: Any) -> bool:
    """Returns true, because a compiled function does not say whether it draws."""
    return True
