"""Checks of the `tf.distribute` strategy under which a model is made and compiled.

TensorFlow or Keras cannot train in the cases that are refused here. They are refused
before training, with an error that says what to do instead.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def check_scope(base_model: keras.Model) -> None:
    """Checks that a base model was made under the strategy that is in force.

    Args:
        base_model: The model, built or not.

    Raises:
        ValueError: It was made elsewhere, or Keras cannot train under the strategy.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "Keras 3 cannot train under a `ParameterServerStrategy`: use "
            "`tf.distribute.MultiWorkerMirroredStrategy`. "
            f"Received: {_name(strategy)}"
        )
    created_here = strategy.extended.variable_created_in_scope
    strangers = [
        v.path
        for v in base_model.variables
        if not created_here(v.value)
        and (strategy.num_replicas_in_sync > 1 or _is_replicated(v.value))
    ]
    if strangers:
        raise ValueError(
            "`base_model` must be made under the same strategy as the wrapper: make "
            "both, and compile, inside one `with strategy.scope():`. Received: "
            f"{_name(strategy)} and variables that were made outside of it, "
            f"{strangers[:3]}"
        )


def _is_replicated(value: Any) -> bool:
    return isinstance(value, tf.distribute.DistributedValues)


def check_outside_of_scope(what: str) -> None:
    """Checks that no strategy would split batches among replicas.

    Args:
        what: What the user calls, for the error.

    Raises:
        ValueError: It is called inside the scope of a strategy with several replicas.
    """
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"{what} must be called outside of `with strategy.scope():`, in which only "
            "the model is to be made and compiled. "
            f"Received: the scope of a {_name(strategy)}"
        )


def _name(strategy: tf.distribute.Strategy) -> str:
    """Returns the public name of a strategy."""
    if type(strategy).__name__.startswith("_Default"):
        return "no strategy"
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return "MultiWorkerMirroredStrategy"
    return type(strategy).__name__


def check_compiled(model: keras.Model) -> None:
    """Checks that a model is compiled in a way that several replicas can run.

    Args:
        model: The model, compiled.

    Raises:
        ValueError: TensorFlow cannot run its steps on several replicas.
    """
    if model.distribute_strategy.num_replicas_in_sync == 1:
        return
    name = _name(model.distribute_strategy)
    if model.jit_compile:
        raise ValueError(
            f"`jit_compile` must be False under {name}: TensorFlow cannot compile "
            "what replicas exchange with XLA. Received: jit_compile=True"
        )
    if model.steps_per_execution > 1:
        raise ValueError(
            f"`steps_per_execution` must be 1 under {name}: TensorFlow cannot let "
            "replicas exchange gradients in a loop. Received: "
            f"steps_per_execution={model.steps_per_execution}"
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            f"`gradient_accumulation_steps` must be None under {name}: Keras cannot "
            "accumulate gradients of replicas. Make the global batch larger. Received: "
            f"gradient_accumulation_steps={steps}"
        )
