"""Makes replicas of `tf.distribute` train the model that one device would train.

A strategy splits each global batch among its replicas. Each runs the same step on its
part, and Keras adds their gradients up. Four things then differ from one device, and
the functions here repair them:

- Parts may be of different sizes, or empty. A mean over a part must then be weighted by
  its size: `replica_weight`, `weight_of_loss`, `scale_mean`.
- Random numbers would be the same on all replicas: `ReplicaSeedGenerator`.
- Moving averages would differ from replica to replica: `average_changes`.
- In half precision each replica would decide alone whether to skip a step:
  `sync_overflow`.

A trap: an exchange between replicas (all-reduce) is allowed neither in a loop nor in a
condition of TensorFlow, and every replica must take part in it, or the others wait for
ever. So these functions are called outside of the loop of an attack, by all replicas.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops, tree

from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.backend.seeds import seed_from_name


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator that draws different numbers on each replica.

    Keras mirrors the state of a generator, so that all replicas would draw the same
    random starts. Here each replica adds its number to the first half of the seed.

    Args:
        seed: Integer, or `None` for one derived from the name: see `backend.seeds`.
        name: Name of the generator.
    """

    def __init__(self, seed: int | None = None, name: str | None = None) -> None:
        if seed is None:
            seed = seed_from_name(name)
        super().__init__(seed=seed, name=name)

    def next(self, ordered: bool = True) -> Any:
        """Returns the next seed of this replica, a tensor of shape `[2]`."""
        seed = super().next(ordered)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return seed
        replica = ops.cast(context.replica_id_in_sync_group, seed.dtype)
        return seed + ops.stack([replica, ops.zeros_like(replica)])


def has_strategy() -> bool:
    """Returns whether a `tf.distribute` strategy is in force."""
    return bool(tf.distribute.has_strategy())


def num_replicas(strategy: tf.distribute.Strategy | None = None) -> int:
    """Returns the number of replicas of a strategy, by default of the one in force."""
    strategy = strategy or tf.distribute.get_strategy()
    return int(strategy.num_replicas_in_sync)


def sum_over_replicas(tensors: Sequence[Any]) -> Sequence[Any]:
    """Adds up tensors over replicas, so that all replicas continue with the same ones.

    Args:
        tensors: One replica's tensors.

    Returns:
        The sums, or the tensors themselves if there is only one replica.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return all_reduce_sum(tensors)


def all_reduce_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Adds up tensors over replicas, in one exchange for each dtype."""
    context = tf.distribute.get_replica_context()
    of_type: dict[tf.DType, Iterator[Tensor]] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        of_type[dtype] = iter(context.all_reduce("SUM", alike))
    return [next(of_type[tensor.dtype]) for tensor in tensors]


class ReplicaWeight(NamedTuple):
    """The weight of a replica's part of a global batch.

    Keras gives the means of all replicas the same weight, whatever the sizes of their
    parts, and the last batch of an epoch is seldom split evenly. With these weights the
    sum over the replicas is what one device would compute.

    Args:
        by_examples: Weight of a mean over this replica's examples: their number,
            divided by the average number. It is 1 on average, and 0 for no examples.
        by_weights: Weight of a mean that is divided by the sum of the sample weights;
            `None` where each output has weights of its own.
        examples: The size of the global batch divided by the number of replicas.
    """

    by_examples: Tensor
    by_weights: Tensor | None
    examples: Tensor


def replica_weight(examples: Tensor, sample_weight: Any) -> ReplicaWeight | None:
    """Computes the weight of this replica, by an exchange with the others.

    Args:
        examples: Number of examples of this replica, a scalar.
        sample_weight: Their weights, a tensor or `None`, or a structure of them.

    Returns:
        The weight, or `None` if there is only one replica.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    sizes = [tf.cast(examples, "float64")]
    if sample_weight is not None and not tree.is_nested(sample_weight):
        sizes.append(tf.reduce_sum(tf.cast(sample_weight, "float64")))
    totals = context.all_reduce("SUM", tf.stack(sizes))
    mean = totals / context.num_replicas_in_sync
    shares = tf.unstack(tf.math.divide_no_nan(tf.stack(sizes), mean), len(sizes))
    by_weights = None if tree.is_nested(sample_weight) else shares[-1]
    return ReplicaWeight(shares[0], by_weights, mean[0])


def weight_of_loss(weight: ReplicaWeight | None, loss: Any) -> Tensor | None:
    """Returns the weight of a replica's compiled loss, which depends on its reduction.

    Args:
        weight: This replica's weight, `None` if it is the only one.
        loss: `loss`, as `compile` received it.

    Returns:
        A scalar to multiply the loss by, or `None` to leave it.
    """
    if weight is None:
        return None
    losses = [one for one in tree.flatten(loss) if one is not None]
    reductions = set(map(_reduction, losses))
    if reductions <= {"sum_over_batch_size", "mean"}:
        return weight.by_examples
    if reductions == {"mean_with_sample_weight"} and weight.by_weights is not None:
        return weight.by_weights
    if reductions - {"sum", "none", None}:
        warnings.warn(
            "With several replicas batches count as on one device only if all losses "
            "of `compile` reduce in the same way, and those that divide by sample "
            "weights have one weight for each example. Received: "
            f"reduction={sorted(map(str, reductions))}",
            stacklevel=2,
        )
    return None  # A sum needs no weight: the sums of all replicas add up to the whole.


def _reduction(loss: Any) -> str | None:
    """Returns the reduction of a loss, which for a function is Keras's default."""
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:  # "crossentropy", which Keras replaces by one that fits.
            return "sum_over_batch_size"
    return getattr(loss, "reduction", "sum_over_batch_size")


def sum_of_added_loss(loss: Tensor) -> Tensor:
    """Sums a loss that the model has added itself, as Keras does.

    With several replicas it is divided by their number, so that the sum over them is
    the loss, for one that is the same on all, as weight decay is.
    """
    if not keras.backend.is_float_dtype(loss.dtype):
        loss = ops.cast(loss, keras.config.floatx())
    loss = ops.sum(loss)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss * ops.cast(1.0 / replicas, loss.dtype)


def scale_mean(mean: Tensor, share: Tensor | None) -> Tensor:
    """Scales a replica's mean by its weight; the result is 0 for one without examples.

    The mean of no examples is NaN, and NaN times 0 would still be NaN.
    """
    if share is None:
        return mean
    return tf.math.multiply_no_nan(mean, tf.cast(share, mean.dtype))


def unscale_loss(loss: Any) -> Any:
    """Undoes Keras's division of a replica's loss by the number of replicas."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss * ops.cast(replicas, loss.dtype)


def average_changes(
    variables: Sequence[keras.Variable], before: Sequence[Tensor], share: ReplicaWeight
) -> None:
    """Averages changes of variables over replicas, weighted by their examples.

    Keras leaves moving averages of `BatchNormalization` different on each replica, so
    that each worker would evaluate, and save, another model.

    Args:
        variables: Variables that each replica may have changed in its own way.
        before: Their values before that, which were the same on all replicas.
        share: This replica's weight.
    """
    # The weights of all replicas add up to their number, these shares to 1.
    part = share.by_examples / tf.distribute.get_strategy().num_replicas_in_sync
    changes = [
        scale_mean(variable.value - old, part)
        for variable, old in zip(variables, before, strict=True)
    ]
    # Changes are averaged, not values: a variable that no replica changed keeps its
    # value to the last bit.
    for variable, old, change in zip(
        variables, before, all_reduce_sum(changes), strict=True
    ):
        variable.assign(old + change)


def zero_grads_of_empty_replicas(
    gradients: Sequence[Any], share: ReplicaWeight
) -> list[Any]:
    """Sets values of gradients that are not finite to 0 on replicas without examples.

    The mean of no examples, as in `BatchNormalization`, is NaN.

    Args:
        gradients: A gradient for each weight, which may be `None` or sparse.
        share: This replica's weight.
    """

    def finite(gradient: Any) -> Any:
        if gradient is None or isinstance(gradient, tf.IndexedSlices):
            return gradient
        fine = tf.math.is_finite(gradient) | (share.by_examples > 0)
        return tf.where(fine, gradient, tf.zeros_like(gradient))

    return [finite(gradient) for gradient in gradients]


def sync_overflow(gradients: Sequence[Any]) -> list[Any]:
    """Sets all gradients to NaN on every replica if any value of any is not finite.

    In half precision Keras skips a step whose gradients overflow. Each replica checks
    only its own. If they decided differently, some workers would wait for ever for the
    others.
    """

    def values_of(gradient: Any) -> Tensor:
        is_sparse = isinstance(gradient, tf.IndexedSlices)
        return gradient.values if is_sparse else gradient

    given = [gradient for gradient in gradients if gradient is not None]
    fine = [tf.reduce_all(tf.math.is_finite(values_of(each))) for each in given]
    context = tf.distribute.get_replica_context()
    bad = context.all_reduce("SUM", tf.cast(~tf.reduce_all(fine), "float32")) > 0

    def spoilt(gradient: Any) -> Any:
        if gradient is None:
            return None
        values = values_of(gradient)
        values = tf.where(bad, tf.cast(math.nan, values.dtype), values)
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return values

    return [spoilt(gradient) for gradient in gradients]


def synchronizes(model: keras.Model) -> bool:
    """Returns whether replicas exchange values while a model runs.

    Layers such as `BatchNormalization(synchronized=True)` do, under any strategy, even
    with a single replica. Such a model cannot run in a loop or condition of TensorFlow.
    """
    return tf.distribute.has_strategy() and any(
        getattr(layer, "synchronized", False)
        for layer in keras_private.layers_of(model)
    )
