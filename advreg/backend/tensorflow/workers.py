"""Training by workers on several machines, where Keras 3 alone fails.

This repairs Keras, up to 3.15 at least: `fit` and `evaluate` fail under a
`MultiWorkerMirroredStrategy` (https://github.com/keras-team/keras/issues/20585). What
is repaired:

- Keras builds the model from the parts of all replicas, but a worker has only its own.
  `local_example` gives it the part of one replica, or only its type.
- Keras averages results of a step along their first axis, but scalars have none.
  `function_over_workers` is the function that Keras calls instead.
- Workers may restore different states. `FirstWorkersState` sends the state of the first
  one to all, before they begin.
- If a worker dies, the error of the others is hard to read. `explain_lost_worker`
  replaces it.

A trap: workers must exchange the same values in the same order, or they wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.backend.tensorflow.replicas import all_reduce_sum


@contextlib.contextmanager
def explain_lost_worker(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Replaces the error of a failed exchange between workers, as a context manager.

    Args:
        strategy: The strategy of the model. The error stays if it has no workers.

    Raises:
        RuntimeError: Another worker has ended while this one waited for it.
    """
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
        if not spans_workers(strategy):
            raise
        resolver = strategy.cluster_resolver
        # A cluster may have a chief, which is a worker of another task type.
        workers = sum(map(len, resolver.cluster_spec().as_dict().values()))
        this = f"{resolver.task_type.capitalize()} {resolver.task_id} of {workers}"
        raise RuntimeError(
            f"{this} has lost another one, and cannot go on alone. Find out what ended "
            "that one, and start all workers again: "
            "with `keras.callbacks.BackupAndRestore` they go on from the last epoch. "
            f"Received: {_reason(error)}"
        ) from error


def _reason(error: tf.errors.OpError) -> str:
    """Returns the part of a long error of TensorFlow that says the reason."""
    _, _, reason = str(error.message).rpartition("aborted by: ")
    return " ".join(reason.splitlines()[:2])


class FirstWorkersState(keras.callbacks.Callback):
    """Makes all workers begin with the weights and the epoch of the first one.

    A worker that died while it wrote its backup restores an older one than the others.
    Workers that begin with different weights would end as different models.

    Args:
        initial_epoch: The `initial_epoch` that `fit` received.
    """

    def __init__(self, initial_epoch: int) -> None:
        super().__init__()
        self._given = initial_epoch
        self._restored: int | None = None

    def on_train_end(self, logs: Any = None) -> None:
        """Resets the initial epoch for the next `fit`."""
        keras_private.set_initial_epoch(self.model, self._restored)

    def on_train_begin(self, logs: Any = None) -> None:
        """Copies the state of the first worker to all others."""
        model = self.model
        self._restored = keras_private.initial_epoch_of(model)
        strategy = model.distribute_strategy
        variables = [*model.variables, *model.optimizer.variables]

        def replica(epoch: Tensor) -> Sequence[Tensor]:
            # A broadcast by a sum: all replicas but the first one send zeros.
            context = tf.distribute.get_replica_context()
            first = tf.equal(context.replica_id_in_sync_group, 0)
            sent = [_sendable(variable.value) for variable in variables]
            sent = [tf.where(first, v, tf.zeros_like(v)) for v in [*sent, epoch]]
            return all_reduce_sum(sent)

        epoch = tf.constant(self._restored or self._given)
        function = tf.function(lambda e: strategy.run(replica, (e,)), autograph=False)
        # A concrete function, because TensorFlow would warn of a `tf.function` that is
        # traced in each `fit`.
        *values, epoch = (
            strategy.experimental_local_results(value)[0]
            for value in function.get_concrete_function(epoch)(epoch)
        )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(tf.cast(value, variable.dtype))
        keras_private.set_initial_epoch(model, int(epoch))


def _sendable(value: Any) -> Tensor:
    """Returns a value in a type that can be added up over workers."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, "int64")


def spans_workers(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether a strategy keeps several processes in step."""
    return isinstance(
        strategy, tf.distribute.MultiWorkerMirroredStrategy
    ) and keras_private.spans_processes(strategy)


def local_example(iterator: Any, strategy: tf.distribute.Strategy) -> Any:
    """Returns a batch of one replica, or its type, to build a model from.

    Keras builds a model from the mean of the parts of all replicas. That fails for
    parts of other processes and for parts of different sizes. And Keras takes a batch
    from the iterator for it, which reads more ahead, and a generator does not yield
    them again. So shapes and types are used where the dataset knows them.

    Args:
        iterator: An iterator of Keras.
        strategy: The strategy of the model.
    """
    spec = tree.map_structure(
        _local_spec, keras_private.dataset_of(iterator).element_spec
    )
    if all(map(_is_enough, tree.flatten(spec))):
        return spec
    batch = next(next(iter(iterator))[-1])
    return tree.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], batch
    )


def _local_spec(spec: Any) -> Any:
    """Returns the type of the first replica's part, `None` where it is missing."""
    spec = keras_private.spec_of_first_replica(spec)
    return None if isinstance(spec, tf.OptionalSpec) else spec


def _is_enough(spec: Any) -> bool:
    """Returns whether a type spec is enough to build a model."""
    if spec is None:
        return True
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None


def function_over_workers(
    model: keras.Model, step: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """Builds the function that Keras calls for a step of training or evaluation.

    Keras averages each result of a step along its first axis, and scalars have none.
    Here all results are averaged in one exchange, because workers wait for each other
    in each.

    Args:
        model: The model, compiled.
        step: Its `train_step` or `test_step`.

    Returns:
        A function of an iterator that returns the results of a step.
    """
    strategy = model.distribute_strategy

    def replica(data: Any) -> Any:
        return _mean_over_replicas(step(data))

    def on_data(data: Any) -> Any:
        return tree.map_structure(
            lambda value: strategy.experimental_local_results(value)[0],
            strategy.run(replica, (data,)),
        )

    # Missing sample weights come as optional values in newer versions of Keras.
    on_data = keras_private.without_optionals(model, on_data)
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
    """Averages the results of a step over replicas, in one exchange."""
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
