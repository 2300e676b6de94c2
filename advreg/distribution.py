"""What `tf.distribute` needs from the model."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops, tree

Tensor = Any  # a tensor of the Keras backend


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
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return _sums(tensors)


def _sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Adds up over replicas what may be of several types, all of one type at once."""
    context = tf.distribute.get_replica_context()
    of_type: dict[tf.DType, Iterator[Tensor]] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        of_type[dtype] = iter(context.all_reduce("SUM", alike))
    return [next(of_type[tensor.dtype]) for tensor in tensors]


class Share(NamedTuple):
    """How much of a global batch a replica has.

    Keras gives the means of all replicas the same weight, of whatever size their parts
    are, and the last batch of an epoch is seldom divided evenly. With these shares,
    what the replicas find adds up to what one device would find.

    Args:
        by_examples: Weight of a mean over this replica's examples, 1 on average.
        by_weights: Weight of such a mean that is divided by the sum of the weights;
            `None` where each output has weights of its own.
        examples: The size of the global batch over the number of replicas.
    """

    by_examples: Tensor
    by_weights: Tensor | None
    examples: Tensor


def share_of_batch(examples: Tensor, sample_weight: Any) -> Share | None:
    """Asks all replicas how large their parts are; `None` if there is only one.

    Args:
        examples: How many examples this replica has, a scalar.
        sample_weight: Their weights, a tensor or `None`; or a structure of them.
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
    return Share(shares[0], by_weights, mean[0])


def share_of_loss(share: Share | None, compile_loss: Any) -> Tensor | None:
    """What a replica's compiled loss counts for, which depends on how it averages.

    Args:
        share: This replica's share, `None` if it is the only one.
        compile_loss: Keras's container of compiled losses, which has been called.
    """
    if share is None:
        return None
    reductions = {loss.loss.reduction for loss in compile_loss._flat_losses}
    if reductions <= {"sum_over_batch_size", "mean"}:
        return share.by_examples
    if reductions == {"mean_with_sample_weight"} and share.by_weights is not None:
        return share.by_weights
    if reductions - {"sum", "none", None}:
        warnings.warn(
            "With several replicas batches count as on one device only if all losses "
            "of `compile` reduce in the same way, and those that divide by sample "
            "weights have one weight for each example. Received: "
            f"reduction={sorted(map(str, reductions))}",
            stacklevel=2,
        )
    return None  # Sums of replicas add up to that of the batch.


def weigh(mean: Tensor, share: Tensor | None) -> Tensor:
    """Gives a replica's mean its share; a replica without examples has none."""
    if share is None:
        return mean
    return tf.math.multiply_no_nan(mean, tf.cast(share, mean.dtype))


def unscale_loss(loss: Any) -> Any:
    """Undoes Keras's division of a replica's loss by the number of replicas."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss * ops.cast(replicas, loss.dtype)


def average(
    variables: Sequence[keras.Variable], before: Sequence[Tensor], share: Share
) -> None:
    """Lets variables change by the mean of the replicas' changes, by their examples.

    Keras leaves moving averages of `BatchNormalization` different on each replica, so
    that each worker would evaluate, and save, another model.

    Args:
        variables: What replicas may have changed, each for itself.
        before: What the variables held before, on all replicas alike.
        share: This replica's share.
    """
    part = share.by_examples / tf.distribute.get_strategy().num_replicas_in_sync
    changes = [
        weigh(variable.value - old, part)
        for variable, old in zip(variables, before, strict=True)
    ]
    # What no replica changes stays as it is to the last bit.
    for variable, old, change in zip(variables, before, _sums(changes), strict=True):
        variable.assign(old + change)


def finite_without_examples(gradients: Sequence[Any], share: Share) -> list[Any]:
    """Makes gradients finite where a replica had no example to take them at.

    The mean of no examples is not a number, in a layer as `BatchNormalization`.
    """

    def finite(gradient: Any) -> Any:
        if gradient is None or isinstance(gradient, tf.IndexedSlices):
            return gradient
        fine = tf.math.is_finite(gradient) | (share.by_examples > 0)
        return tf.where(fine, gradient, tf.zeros_like(gradient))

    return [finite(gradient) for gradient in gradients]


def overflowing_everywhere(gradients: Sequence[Any]) -> list[Any]:
    """Makes no gradient finite if one of any replica is not.

    In half precision Keras skips a step whose gradients overflow, and each replica
    looks at its own: they would not do the same, and workers would wait for ever.
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
    """Whether replicas speak to each other while a model runs."""
    return tf.distribute.get_strategy().num_replicas_in_sync > 1 and any(
        getattr(layer, "synchronized", False) for layer in model._flatten_layers()
    )


def check_scope(base_model: keras.Model) -> None:
    """Checks that a base model was made under the strategy that is in force.

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
    """Checks that no strategy would divide what is to be read batch by batch.

    Args:
        what: What the user calls.

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
    """What users call a strategy."""
    if type(strategy).__name__.startswith("_Default"):
        return "no strategy"
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return "MultiWorkerMirroredStrategy"
    return type(strategy).__name__


def check_compiled(model: keras.Model) -> None:
    """Checks that a model is compiled in a way that replicas can run.

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


@contextlib.contextmanager
def lost_workers_named(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Says what to do where TensorFlow says that an exchange between workers failed.

    Raises:
        RuntimeError: A worker has gone while this one waited for it.
    """
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
        if not spans_workers(strategy):
            raise
        resolver = strategy.cluster_resolver
        # Where a cluster has a chief, that is a worker of another kind.
        workers = sum(map(len, resolver.cluster_spec().as_dict().values()))
        this = f"{resolver.task_type.capitalize()} {resolver.task_id} of {workers}"
        raise RuntimeError(
            f"{this} has lost another one, and cannot go on alone. Find out what ended "
            "that one, and start all workers again: "
            "with `keras.callbacks.BackupAndRestore` they go on from the last epoch. "
            f"Received: {_reason(error)}"
        ) from error


def _reason(error: tf.errors.OpError) -> str:
    """The sentences of a long message of TensorFlow's that say why."""
    _, _, reason = str(error.message).rpartition("aborted by: ")
    return " ".join(reason.splitlines()[:2])


class FirstWorkersState(keras.callbacks.Callback):
    """Lets all workers begin to train with the weights and the epoch of the first one.

    A worker that died while it wrote its backup restores an older one than the others,
    and workers without a common start end as different models.

    Args:
        initial_epoch: The epoch that `fit` was told to begin with.
    """

    def __init__(self, initial_epoch: int) -> None:
        super().__init__()
        self._given, self._restored = initial_epoch, None

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the epoch for the next `fit` as it was."""
        self.model._initial_epoch = self._restored

    def on_train_begin(self, logs: Any = None) -> None:
        """Takes over the state of the first worker."""
        model = self.model
        self._restored = model._initial_epoch
        strategy = model.distribute_strategy
        variables = [*model.variables, *model.optimizer.variables]

        def replica(epoch: Tensor) -> Sequence[Tensor]:
            context = tf.distribute.get_replica_context()
            first = tf.equal(context.replica_id_in_sync_group, 0)
            sent = [_sendable(variable.value) for variable in variables]
            sent = [tf.where(first, v, tf.zeros_like(v)) for v in [*sent, epoch]]
            return _sums(sent)

        epoch = tf.constant(self._restored or self._given)
        function = tf.function(lambda e: strategy.run(replica, (e,)), autograph=False)
        # As a concrete function, which TensorFlow does not warn of tracing in each fit.
        *values, epoch = (
            strategy.experimental_local_results(value)[0]
            for value in function.get_concrete_function(epoch)(epoch)
        )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(tf.cast(value, variable.dtype))
        model._initial_epoch = int(epoch)


def _sendable(value: Any) -> Tensor:
    """A value in a type that can be added up over workers."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, "int64")


def and_last(callbacks: Any, last: keras.callbacks.Callback) -> Any:
    """Adds a callback to those of `fit`, after those that restore."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*tree.flatten(callbacks or []), last]
    # Such a list has told its callbacks of the model, and may have been used before.
    last.set_model(callbacks._model)
    others = [each for each in callbacks.callbacks if type(each) is not type(last)]
    callbacks.callbacks = [*others, last]
    return callbacks


# What follows mends Keras, up to 3.15 at least: `fit` and `evaluate` fail under a
# `MultiWorkerMirroredStrategy` (https://github.com/keras-team/keras/issues/20585).


def spans_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy keeps several processes in step."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and strategy.extended._in_multi_worker_mode()
    )


def local_example(iterator: Any, strategy: tf.distribute.Strategy) -> Any:
    """What a batch of one replica looks like, of an iterator of Keras's.

    Keras builds a model from the mean of the parts of all replicas, which tensors of
    another process do not have, nor parts of different sizes. And it takes a batch for
    that, and more ahead of it, which a generator does not give again. Shapes and types
    are enough, where the dataset knows them.
    """
    spec = tree.map_structure(_local_spec, iterator._distributed_dataset.element_spec)
    if all(map(_is_enough, tree.flatten(spec))):
        return spec
    batch = next(next(iter(iterator))[-1])
    return tree.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], batch
    )


def _local_spec(spec: Any) -> Any:
    """The specification of what the first replica gets; `None` for what is missing."""
    spec = getattr(spec, "_value_specs", [spec])[0]  # Of a value for each replica.
    return None if isinstance(spec, tf.OptionalSpec) else spec


def _is_enough(spec: Any) -> bool:
    """Whether a specification says what a model is built from."""
    if spec is None:
        return True
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None


def function_over_workers(
    model: keras.Model, step: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """What Keras calls with an iterator, for a step of training or evaluation.

    Keras averages each result of a step along its first axis, and scalars have none.
    Here all are averaged at once, for workers wait for each other each time.

    Args:
        model: The model, compiled.
        step: Its `train_step` or `test_step`.
    """
    strategy = model.distribute_strategy

    def replica(data: Any) -> Any:
        return _mean_over_replicas(step(data))

    def on_data(data: Any) -> Any:
        return tree.map_structure(
            lambda value: strategy.experimental_local_results(value)[0],
            strategy.run(replica, (data,)),
        )

    # Weights that are missing come as optional values, in newer versions of Keras.
    as_none = getattr(model, "_autoconvert_optionals", lambda function: function)
    on_data = as_none(on_data)
    if not model.run_eagerly:
        on_data = tf.function(on_data, autograph=False, reduce_retracing=True)

    def on_iterator(iterator: Any) -> Any:
        return on_data(iterator.get_next())

    if not model.run_eagerly:
        on_iterator = tf.function(on_iterator, autograph=False, reduce_retracing=True)

    def function(iterator: Any) -> Any:
        if isinstance(iterator, tf.distribute.DistributedIterator):
            return on_iterator(iterator)
        return on_data(next(iter(iterator)))

    return function


def _mean_over_replicas(results: Any) -> Any:
    """Averages what steps report, in one exchange."""
    context = tf.distribute.get_replica_context()
    values = [tf.convert_to_tensor(value) for value in tree.flatten(results)]
    flat = [tf.reshape(tf.cast(value, "float64"), [-1]) for value in values]
    means = tf.split(
        context.all_reduce("MEAN", tf.concat(flat, 0)), [tf.size(part) for part in flat]
    )
    return tree.pack_sequence_as(
        results,
        [
            tf.cast(tf.reshape(mean, tf.shape(value)), value.dtype)
            for mean, value in zip(means, values, strict=True)
        ],
    )
