"""What `tf.distribute` needs from the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator whose replicas draw different numbers.

    Keras mirrors the state of a generator, so that all replicas would draw the same
    random starts. Here each one adds its number to the first half of the seed.

    Args:
        seed: Integer, or `None` for one derived from the name and from Python's random
            state, which is left as it was: wrapping a model then changes nothing in how
            it trains.
        name: Name of the generator.
    """

    def __init__(self, seed: int | None = None, name: str | None = None) -> None:
        if seed is None:
            state = random.getstate()
            # Not the number itself: the next layer that is made will draw it, too.
            derived = random.Random(f"{name} {random.random()}")
            random.setstate(state)
            seed = derived.randint(1, 10**9)
        super().__init__(seed=seed, name=name)

    def next(self, ordered: bool = True) -> Any:
        """Returns the next seed of this replica, a tensor of shape `[2]`."""
        seed = super().next(ordered)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return seed
        replica = ops.cast(context.replica_id_in_sync_group, seed.dtype)
        return seed + ops.stack([replica, ops.zeros_like(replica)])


def sum_over_replicas(tensors: Sequence[Any]) -> Sequence[Any]:
    """Adds up what each replica has found, so that all go the same way."""
    context = tf.distribute.get_replica_context()
    if not tensors or context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce("SUM", list(tensors))


def unscale_loss(loss: Any) -> Any:
    """Undoes Keras's division of a replica's loss by the number of replicas."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss * ops.cast(replicas, loss.dtype)
