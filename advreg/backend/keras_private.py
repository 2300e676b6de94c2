"""The private names of Keras and TensorFlow that advreg needs.

No other module may use one of their names that begins with an underscore. Each function
here says why the name is needed, and which public one would replace it.
`tests/backend/test_keras_private.py` fails and names it if a new version drops one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras


def layers_of(model: Any, include_self: bool = True) -> list[Any]:
    """Returns all layers of a model, nested ones included, and the model itself.

    `Model.layers` has the direct ones only, not those inside other layers. A public,
    recursive `layers` would replace it.
    """
    return list(model._flatten_layers(include_self=include_self))


def layers_directly_in(layer: Any) -> list[Any]:
    """Returns the layers that a layer or model holds itself.

    `Model.layers` has them, but other layers that hold layers have no such name.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def metrics_of(layer: Any) -> list[Any]:
    """Returns the metrics that a layer or model keeps itself.

    `metrics` also has those that a model was compiled with. A public way to leave these
    out would replace it.
    """
    return list(layer._metrics)


def non_trainable_variables_of(layer: Any) -> list[Any]:
    """Returns the variables of a layer itself that gradients never change.

    `non_trainable_variables` also has those of layers inside it, and frozen weights. A
    public name for what `add_weight(trainable=False)` made would replace it.
    """
    return list(layer._non_trainable_variables)


def inputs_of_calls(layer: Any) -> Iterator[Any]:
    """Yields the first symbolic input of each call of a layer in a functional model.

    No public name says which layer consumes an input of such a model.
    """
    for node in layer._inbound_nodes:
        yield from node.input_tensors[:1]


def declared_inputs_of(model: Any) -> Any:
    """Returns the structure of symbolic inputs that a functional model declares.

    It is `None` for other models. `Functional.input` is the same in public, but a
    subclassed model that was called on symbols has an `input` too, and the class by
    which to tell them apart is not exported.
    """
    return getattr(model, "_inputs_struct", None)


def declared_outputs_of(model: Any) -> Any:
    """Returns the structure of symbolic outputs that a functional model declares.

    See `declared_inputs_of`.
    """
    return getattr(model, "_outputs_struct", None)


def compiled_losses_of(model: Any) -> Any:
    """Returns Keras's container of the compiled losses, `None` without any.

    `compute_loss` adds the losses of layers, which an attack must not raise. A public
    way to compute the labelled loss alone would replace it.
    """
    return model._compile_loss


def loss_weights_of(model: Any) -> Any:
    """Returns the `loss_weights` that a model was compiled with, `None` without any.

    The public `get_compile_config` serialises the optimizer, too, and fails for objects
    of the user's own that cannot be serialised.
    """
    return getattr(model._compile_loss, "_user_loss_weights", None)


def compiled_metrics_of(model: Any) -> Any:
    """Returns Keras's container of the compiled metrics, `None` without any.

    Neural Structured Learning named metrics in the order of `compile`. See `nsl.keras`.
    """
    return model._compile_metrics


def loss_tracker_of(model: Any) -> Any:
    """Returns the metric in which Keras averages the total loss.

    Keras resets it, mirrors it over replicas and logs it as `loss`. A second metric of
    that name, of advreg's own, would be listed in `metrics` beside it.
    """
    return model._loss_tracker


def initial_epoch_of(model: Any) -> int | None:
    """Returns the epoch in which `BackupAndRestore` lets `fit` begin."""
    return model._initial_epoch


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """Sets the epoch in which `fit` begins.

    `BackupAndRestore` sets it too. Workers that have restored different epochs must
    agree on one.
    """
    model._initial_epoch = epoch


def dataset_of(iterator: Any) -> Any:
    """Returns the distributed dataset that an iterator of Keras reads.

    It is needed only for `fit` over several workers, where Keras 3 fails
    (https://github.com/keras-team/keras/issues/20585).
    """
    return iterator._distributed_dataset


def without_optionals(model: Any, function: Any) -> Any:
    """Wraps a function, so that it gets `None` for a missing part of a batch.

    Newer versions of Keras pass missing sample weights as optional values. It is needed
    only for several workers, like `dataset_of`.
    """
    wrap = getattr(model, "_autoconvert_optionals", None)
    return function if wrap is None else wrap(function)


def spec_of_first_replica(spec: Any) -> Any:
    """Returns the type spec of the first replica's part. For several workers only."""
    return getattr(spec, "_value_specs", [spec])[0]


def spans_processes(strategy: Any) -> bool:
    """Returns whether a `MultiWorkerMirroredStrategy` has other processes."""
    return bool(strategy.extended._in_multi_worker_mode())


def is_persistent(tape: Any) -> bool:
    """Returns whether a `tf.GradientTape` is persistent.

    A tape that is not, and still records, would give this gradient and no later one.
    The error of TensorFlow would come only when the user asks for the later one.
    """
    return bool(getattr(tape, "_persistent", True))


def known_logits_of(outputs: Any) -> Any:
    """Returns the logits of a tensor that Keras's softmax or sigmoid returned.

    Keras stores them as an attribute of that tensor, in eager code. See
    `network.logits`.
    """
    return getattr(outputs, "_keras_logits", None)


def mask_of(tensor: Any) -> Any:
    """Returns the mask of a tensor, in which padded time steps are false, or `None`.

    Layers and losses of Keras read it. No public name does.
    """
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)


def copy_mask(source: Any, target: Any, rows: int | None = None) -> None:
    """Gives a tensor the mask of another one. No public name writes it.

    Args:
        source: A tensor, with a mask or without.
        target: A tensor of the same shape, or of its first rows.
        rows: Number of these rows, `None` for all.
    """
    from keras.src.backend import set_keras_mask

    mask = mask_of(source)
    if mask is not None:
        set_keras_mask(target, mask[:rows])


def results_in_order(model: Any, logs: dict[str, Any]) -> Any:
    """Lists results of a model in the order in which `evaluate` returns them.

    Programs for Neural Structured Learning zip them with `metrics_names`. See
    `nsl.keras`.
    """
    return model._flatten_metrics_in_order(logs)


def estimator_requirements_of(attack: Any) -> Sequence[Any]:
    """Returns the classes of classifiers that an attack of ART accepts.

    Without this private name, ART raises an error, but only once there is a classifier.
    """
    return attack._estimator_requirements or ()


class BuildsFromOneReplica(keras.Model):
    """A model that can choose the batch from which Keras builds it.

    `fit` and `evaluate` take the first batch of an iterator, with the parts of all
    replicas in it. A public way to build a model from the type of its data would
    replace it.
    """

    def part_of_one_replica(self, iterator: Any) -> Any:
        """Returns a batch, or its type, to build from, or `None` for Keras's default.

        Args:
            iterator: The iterator that Keras would take the first batch of.
        """
        return None

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> Any:
        if iterator is not None:
            part = self.part_of_one_replica(iterator)
            if part is not None:
                iterator, data_batch = None, part
        return super()._maybe_symbolic_build(iterator, data_batch)
