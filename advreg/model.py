"""The wrapper that trains any Keras model against adversarial perturbations."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from advreg.ball import Settings
from advreg.batches import BatchForm, on_copies
from advreg.checks import Schedule
from advreg.config import AdvRegConfig, check_adv_config
from advreg.convolution import cheap_input_gradients
from advreg.distribution import (
    FirstWorkersState,
    ReplicaSeedGenerator,
    Share,
    and_last,
    check_compiled,
    check_scope,
    function_over_workers,
    local_example,
    lost_workers_named,
    share_of_batch,
    share_of_loss,
    spans_workers,
    unscale_loss,
    weigh,
)
from advreg.geometry import Tensor
from advreg.images import as_floats, float_twin
from advreg.on_batch import PerturbOnBatch
from advreg.packing import Features
from advreg.passes import Step
from advreg.perturbation import to_tensor
from advreg.saving import (
    deserialize_adv_config,
    deserialize_base,
    deserialize_dtype,
    save_whole,
)
from advreg.state import assign

_RANDOM_STATE = "random_state_"
# What the wrapper does itself, whatever the base model would do.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


@keras.saving.register_keras_serializable(package="advreg")
class AdversarialRegularization(keras.Model):
    """Trains a Keras model on its inputs and on adversarial neighbours of them.

    The wrapper is a `keras.Model`: `compile` and `fit` it like any other. Training
    minimises

        clean_weight * labelled loss + multiplier * objective
            + the losses that the base model adds itself, once

    The objective is, unless `adv_config` says otherwise, the labelled loss at perturbed
    inputs ([Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572)). `fit` logs
    `loss` (the total), `labeled_loss`, `scaled_adversarial_loss` and the compiled
    metrics on clean predictions. With `clean_weight=0.0` and an objective that needs no
    clean pass there is no `labeled_loss`, and metrics are of perturbed predictions,
    under names that begin with `adversarial_`. `predict` and `evaluate` are the base
    model's: clean, one forward pass. The trained network is `base_model`.

    Labels come as `y`, as for any Keras model. Where there is no `y`, and `x` is a
    dictionary that holds the `label_keys`, they come from there. A key is a feature,
    never a label, if the base model declares an input of that name or if `y` is given.

    Images of type uint8 reach the base model as float32 in training, in the units of
    the input: it must not treat the two types differently, as a `Rescaling` layer does
    not, and `tf.image.convert_image_dtype` does.

    Saving keeps the wrapper, its configuration and the state of its optimizer;
    `keras.models.load_model` needs `import advreg` first. `base_model` is saved, loaded
    and served without advreg.

    Args:
        base_model: A Keras 3 model: sequential, functional or subclassed, built or
            not.
        adv_config: An `AdvRegConfig`, as `make_adv_reg_config` returns; by default
            `AdvRegConfig()`.
        label_keys: Keys of the labels in dictionary inputs. Several keys give a list
            of labels in that order; if the base model declares a dictionary of outputs,
            they must be keys of it. `predict`, which has no `y`, takes them away: pass
            `()` for a base model that declares no inputs and has a feature of such a
            name.
        sample_weight_key: Key of the sample weights in dictionary inputs, which must be
            there in training. Where `y` is given and the base model declares no inputs,
            it is a feature.
        base_with_labels_in_features: Whether the base model is to receive labels that
            come in a dictionary as inputs too. They are not perturbed.
        **kwargs: `name`, `dtype` and `trainable` of the model. `dtype` is by default
            the policy of the base model.

    Raises:
        TypeError: `base_model` is not a Keras 3 model, or another argument has the
            wrong type.
        ValueError: `base_model` is itself adversarially regularised, or
            `sample_weight_key` is a label key.

    Example:
    >>> model = AdversarialRegularization(
    ...     base_model, make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="linf"))
    >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> model.fit(x, y, epochs=5)
    >>> model.base_model.save("robust.keras")
    """

    # Whether labels and weights in dictionaries are checked, see `BatchForm`.
    _strict = True

    def __init__(
        self,
        base_model: keras.Model,
        adv_config: AdvRegConfig | None = None,
        *,
        label_keys: Sequence[str] = ("label",),
        sample_weight_key: str | None = None,
        base_with_labels_in_features: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_base(base_model)
        check_scope(base_model)
        _check_keywords(kwargs)
        kwargs.setdefault("dtype", base_model.dtype_policy)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.autocast = False  # The base casts its inputs itself, where it does.
        self.base_model = base_model
        self.adv_config = check_adv_config(adv_config)
        self._form = BatchForm(
            base_model,
            label_keys,
            sample_weight_key,
            base_with_labels_in_features,
            strict=self._strict,
        )
        self._labeled_loss_tracker = keras.metrics.Mean(name="labeled_loss")
        self._adversarial_loss_tracker = keras.metrics.Mean(
            name="scaled_adversarial_loss"
        )
        self._training_seed = ReplicaSeedGenerator(name="training_seed")
        # `perturb_on_batch` draws from its own, so as not to change training.
        self._perturbing_seed = ReplicaSeedGenerator(name="perturbing_seed")
        # Keras leaves such an object alone where it would wrap a list or a dictionary.
        self._perturbing = PerturbOnBatch()
        self._twin = SimpleNamespace(model=None, layers=None)
        self.built = base_model.built

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_model" and hasattr(self, name):
            raise AttributeError(
                "`base_model` cannot be exchanged: wrap the other model in an "
                f"`AdversarialRegularization` of its own. Received: {value!r}"
            )
        super().__setattr__(name, value)

    @property
    def adv_config(self) -> AdvRegConfig:
        """The configuration. Another one takes effect with the next step."""
        return self._adv_config

    @adv_config.setter
    def adv_config(self, value: AdvRegConfig) -> None:
        self._adv_config = check_adv_config(value)
        if self.train_function is not None:
            self.make_train_function(force=True)

    @property
    def batch_form(self) -> BatchForm:
        """Tells features, labels and weights of a batch apart."""
        return self._form

    @property
    def label_keys(self) -> Sequence[str]:
        """Keys of the labels in dictionary inputs."""
        return self._form.label_keys

    @property
    def sample_weight_key(self) -> str | None:
        """Key of the sample weights in dictionary inputs."""
        return self._form.sample_weight_key

    @property
    def base_with_labels_in_features(self) -> bool:
        """Whether the base model receives labels in a dictionary as inputs too."""
        return self._form.base_with_labels_in_features

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics, those that the base model itself keeps among them."""
        return [*super().metrics, *self.base_model._metrics]

    @property
    def output_names(self) -> list[str]:
        """The base model's, so that metrics carry the names that it gives them."""
        return self.base_model.output_names

    def build(self, input_shape: Any) -> None:
        """Builds the base model.

        Args:
            input_shape: Shape of the input with the batch axis, or a structure of
                shapes like that of the inputs.
        """
        if self.base_model.built:
            return
        shapes = self._form.base_inputs(self._form.features(input_shape))
        if type(self.base_model).build is not keras.layers.Layer.build:
            self.base_model.build(shapes)
            return
        # Nothing but a call says what this model is made of. Where it does not take
        # symbolic floats, its first batch will build it.
        dtype = self.base_model.input_dtype
        symbols = tree.map_shape_structure(
            lambda shape: keras.KerasTensor(shape, dtype=dtype), shapes
        )
        with contextlib.suppress(Exception):
            self.base_model(symbols)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Computes the shapes of the base model's outputs; takes those of the input."""
        features = self._form.features(input_shape)
        return self.base_model.compute_output_shape(self._form.base_inputs(features))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Adds no mask: the outputs carry those that the base model gave them."""

    def call(self, inputs: Features, training: bool | None = None) -> Any:
        """Calls the base model; labels in a dictionary of inputs are left out."""
        return self._forward(self._form.features(inputs), training)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        arguments = self._arguments(keras.Model.fit, args, kwargs)
        strategy, callbacks = self.distribute_strategy, arguments.pop("callbacks", None)
        with lost_workers_named(strategy):
            if spans_workers(strategy):
                first = FirstWorkersState(arguments.get("initial_epoch", 0))
                callbacks = and_last(callbacks, first)
            return super().fit(callbacks=callbacks, **arguments)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        with lost_workers_named(self.distribute_strategy):
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        with lost_workers_named(self.distribute_strategy):
            return super().predict(*args, **kwargs)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return super().train_on_batch(
            **self._arguments(keras.Model.train_on_batch, args, kwargs)
        )

    def train_step(self, data: Any) -> dict[str, Tensor]:
        """Takes one step: clean pass, attack, adversarial pass, one update."""
        x, y, sample_weight = self._unpack_labelled(data)
        self._form.check_weights(data)
        x = tree.map_structure(to_tensor, x)
        if isinstance(multiplier := self.adv_config.multiplier, Schedule) or multiplier:
            x = as_floats(x, self._form.fixed_keys)
        step = Step(self, x, y, sample_weight)
        outcome = step.take()
        if outcome.gradients:
            self.optimizer.apply_gradients(
                zip(outcome.gradients, self.trainable_weights, strict=True)
            )
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=2
            )
        trackers = [self._adversarial_loss_tracker]
        self._track(self._loss_tracker, outcome.loss, step.examples)
        self._track(
            self._adversarial_loss_tracker, outcome.adversarial_loss, step.examples
        )
        if outcome.labeled_loss is not None:
            trackers.insert(0, self._labeled_loss_tracker)
            self._track(self._labeled_loss_tracker, outcome.labeled_loss, step.examples)
        logs = self.compute_metrics(x, y, outcome.predictions, sample_weight)
        if outcome.labeled_loss is None:
            logs = self._of_perturbed(logs)
        return {**logs, **{t.name: t.result() for t in trackers}}

    def test_step(self, data: Any) -> dict[str, Tensor]:
        """Evaluates a batch as the base model does: clean, one forward pass."""
        x, y, sample_weight = self._unpack_labelled(data)
        examples = self._batch_size(x)
        # Before the forward pass: when replicas wait for each other after it, the next
        # one replaces the losses that this one has added.
        share = share_of_batch(examples, sample_weight)
        y_pred = self._forward(x, training=False)
        labeled_loss = self._compile_loss(y, y_pred, sample_weight)
        labeled_loss = weigh(labeled_loss, share_of_loss(share, self._compile_loss))
        loss = self._total_loss(labeled_loss, self.losses, share)
        examples = examples if share is None else share.examples
        self._track(self._loss_tracker, loss, examples)
        self._track(self._labeled_loss_tracker, labeled_loss, examples)
        logs = self.compute_metrics(x, y, y_pred, sample_weight)
        names = {tracker.name for tracker in self._hidden_in_evaluation}
        return {name: value for name, value in logs.items() if name not in names}

    def predict_step(self, data: Any) -> Any:
        """Predicts a batch, with or without labels in it."""
        x, _, _ = self._form.unpack(data)
        return self._forward(x, training=False)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Computes the clean loss of a batch, whichever way its labels came."""
        x, y, sample_weight = self._form.unpack((x, y, sample_weight))
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        """Updates the compiled metrics, whichever way the labels came."""
        x, y, sample_weight = self._form.unpack((x, y, sample_weight))
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Returns what the trackers hold, those of training only if they hold any.

        Keras asks at the end of an epoch, and of an evaluation, which has reset them.
        """
        results = super().get_metrics_result()
        clean, adversarial = self._training_trackers
        if not (tf.executing_eagerly() and adversarial.count.numpy()):
            for tracker in self._hidden_in_evaluation:
                results.pop(tracker.name, None)
        elif self._replicas > 1 and not clean.count.numpy():
            # Of one device Keras takes what the last step returned.
            results = {
                **self._of_perturbed(results),
                adversarial.name: results[adversarial.name],
            }
        return results

    def perturb_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **overrides: Any
    ) -> Any:
        """Returns the adversarial neighbours of a batch under the model as it is.

        What grows is the compiled loss, whatever the objective of training attacks.
        The model runs in inference mode. No weight, metric, statistic or random state
        of training changes. Numbers in `overrides` reach the compiled function as
        tensors, so that a sweep over them compiles once.

        Args:
            x: Features of one batch: an array or tensor, or a structure of them.
                Labels may be in it if it is a dictionary.
            y: Labels, where they are not in `x`.
            sample_weight: Weights of the examples. An example of weight 0 does not
                move.
            **overrides: Fields of `AdvNeighborConfig` that replace the configured ones
                for this call, `None` included.

        Returns:
            The perturbed features as NumPy arrays, in the structure and dtypes of `x`,
            images of type uint8 as float32. Labels and weights in a dictionary come
            back as the objects that went in.

        Raises:
            RuntimeError: It is called inside a `tf.function`.
            TypeError: `x` is a dataset, or an override is no field of
                `AdvNeighborConfig`.
            ValueError: The model is not compiled, labels are missing, nothing can be
                perturbed, or a mask or range does not fit.

        Example:
        >>> x_adv = model.perturb_on_batch(x, y, adv_step_size=0.1, clip_value_min=0.0)
        """
        return self._perturbing(self, x, y, sample_weight, overrides)

    def save(
        self,
        filepath: Any,
        overwrite: bool = True,
        zipped: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the model as `keras.Model.save` does, all of the file or nothing.

        Args:
            filepath: Path of the `.keras` file. A process that is killed while it
                saves leaves the file that was there.
            overwrite: Whether to replace a file, or to ask the user.
            zipped: `False` saves a directory, in place.
            **kwargs: As of `keras.Model.save`.

        Example:
        Training that goes on where it was killed, at whatever moment that was. (A
        `BackupAndRestore` of Keras writes two files one after the other, and repeats
        an epoch if it is killed between them.)

        >>> model = make_model()
        >>> if os.path.exists("run.keras"):
        ...     model = keras.models.load_model("run.keras")
        >>> model.fit(dataset, epochs=50,
        ...     initial_epoch=int(model.optimizer.iterations.numpy()) // len(dataset),
        ...     callbacks=[keras.callbacks.ModelCheckpoint("run.keras")])
        """

        def save(path: Any, overwrite: bool) -> None:
            super(AdversarialRegularization, self).save(
                path, overwrite, zipped, **kwargs
            )

        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "`filepath` must end in '.keras': Keras cannot load a wrapped model "
                f"from the older format. Received: {filepath}"
            )
        if zipped is None or zipped:
            save_whole(save, filepath, overwrite, suffix=".keras")
        else:
            save(filepath, overwrite)

    def save_weights(
        self, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None
    ) -> None:
        """Saves weights as `keras.Model.save_weights` does, all of a file or nothing.

        Args:
            filepath: Path of the `.weights.h5` file. A process that is killed while it
                saves leaves the file that was there.
            overwrite: Whether to replace a file, or to ask the user.
            max_shard_size: Size in GB of each of several files, which are written in
                place. `None` for one file.
        """
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}

        def save(path: Any, overwrite: bool) -> None:
            super(AdversarialRegularization, self).save_weights(
                path, overwrite, **shards
            )

        if shards:
            save(filepath, overwrite)
        else:
            save_whole(save, filepath, overwrite, suffix=".weights.h5")

    @functools.wraps(keras.Model.export)
    def export(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self.base_model.export(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor as a serialisable dictionary."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "base_model": serialize(self.base_model),
            "adv_config": serialize(self.adv_config),
            "label_keys": list(self.label_keys),
            "sample_weight_key": self.sample_weight_key,
            "base_with_labels_in_features": self.base_with_labels_in_features,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> AdversarialRegularization:
        """Makes the model that `get_config` described.

        Raises:
            TypeError: An argument has the wrong type, or is of the wrong class.
            ValueError: An argument is missing or unknown, or has a value that its
                rule forbids.
        """
        names = ["base_model", "adv_config", "label_keys", "sample_weight_key"]
        names += ["base_with_labels_in_features", "dtype"]
        missing = [name for name in names if name not in config]
        if missing:
            raise ValueError(
                f"A serialised `{cls.__name__}` must have the arguments {names}. "
                f"Received: missing={missing}"
            )
        # A scope without objects would hide those of the scope around it.
        scope = (
            keras.saving.custom_object_scope(custom_objects)
            if custom_objects
            else contextlib.nullcontext()
        )
        with scope:
            arguments = {
                "adv_config": deserialize_adv_config(config["adv_config"]),
                "dtype": deserialize_dtype(config["dtype"]),
                "base_model": deserialize_base(config["base_model"]),
            }
        return cls(**{**config, **arguments})

    def save_own_variables(self, store: Any) -> None:
        """Saves the random state, of dropout as well, which Keras leaves out."""
        super().save_own_variables(store)
        for index, state in enumerate(self._random_state()):
            store[f"{_RANDOM_STATE}{index:06}"] = state.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Loads the random state too, so that training goes on where it was."""
        saved = {key: store[key] for key in sorted(store.keys())}
        states = self._random_state()
        found = [saved.pop(key) for key in list(saved) if key.startswith(_RANDOM_STATE)]
        if not found:
            raise ValueError(
                "The file holds no weights of an `AdversarialRegularization`. If its "
                "base model saved it, call `model.base_model.load_weights(...)`."
            )
        if len(found) == len(states):
            assign(states, found)
        else:
            warnings.warn(
                f"The model draws random numbers in {len(states)} places, the one that "
                f"was saved did in {len(found)}: random states are not restored.",
                stacklevel=2,
            )
        super().load_own_variables(saved)

    # What follows is the model's own.

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> Any:
        check_compiled(self)
        strategy = self.distribute_strategy
        if iterator is not None and self._replicas > 1:
            iterator, data_batch = None, local_example(iterator, strategy)
        return super()._maybe_symbolic_build(iterator, data_batch)

    def _make_function(self, step_function: Callable[[Any], Any]) -> Any:
        if not self.jit_compile:  # XLA writes into memory of its own.
            step_function = on_copies(step_function)
        if spans_workers(self.distribute_strategy):
            return function_over_workers(self, step_function)
        return super()._make_function(step_function)

    def _random_state(self) -> list[keras.Variable]:
        """The states of all generators that the model draws from."""
        weights = {id(weight) for weight in self.weights}
        return [v for v in self.variables if id(v) not in weights]

    @property
    def _training_trackers(self) -> tuple[keras.metrics.Metric, ...]:
        """What `fit` reports beside the results of the base model."""
        return self._labeled_loss_tracker, self._adversarial_loss_tracker

    @property
    def _hidden_in_evaluation(self) -> tuple[keras.metrics.Metric, ...]:
        """What `evaluate` does not report, because the base model would not."""
        return self._training_trackers

    def _forward(
        self, features: Features, training: bool | None, floats: bool = False
    ) -> Any:
        """Runs the base model on features from which the labels have been taken.

        Args:
            features: What goes into the base model, and nothing else.
            training: Whether layers are to behave as in training.
            floats: Whether images of bytes have become floats, which are to stay so.
        """
        model = self._float_twin() if floats else self.base_model
        outputs = model(self._form.base_inputs(features), training=training)
        self.built = True
        return outputs

    def _float_twin(self) -> keras.Model:
        """The base model, or one of the same layers that leaves floats as they are."""
        layers = getattr(self.base_model, "layers", None)
        if self._twin.layers != layers:
            twin = float_twin(self.base_model, self._form.fixed_keys)
            self._twin.layers, self._twin.model = layers, twin
        return self._twin.model

    def _to_the_input(self) -> contextlib.AbstractContextManager[None]:
        """Under which a forward pass runs whose gradient to the input is wanted."""
        if self.jit_compile:  # XLA makes its own of that gradient.
            return contextlib.nullcontext()
        return cheap_input_gradients(self.base_model)

    def _assert_compile_called(self, method_name: str | None = None) -> None:
        """Says more than Keras, whose users have no second model to compile."""
        if not self.compiled:
            raise ValueError(
                f"`{method_name or 'training'}` needs a compiled model: call "
                "`compile()` with a loss on the wrapper, whether or not its "
                "`base_model` is compiled. Received: a wrapper that is not compiled"
            )
        super()._assert_compile_called(method_name)

    def _arguments(
        self, method: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[str, Any]:
        """Binds the arguments of a method of `keras.Model` that takes class weights."""
        try:
            arguments = inspect.signature(method).bind(self, *args, **kwargs).arguments
        except TypeError:
            method(self, *args, **kwargs)  # Keras says what is wrong with them.
            raise
        del arguments["self"]
        if arguments.get("class_weight") is None:
            return arguments
        return self._form.put_labels_beside(arguments)

    def _unpack_labelled(self, data: Any) -> tuple[Features, Any, Any]:
        """Takes a batch apart that a loss is to be computed of."""
        if self._compile_loss is None:
            raise ValueError(
                "Adversarial regularisation perturbs inputs so that the compiled loss "
                "grows: `compile` needs a `loss`. Received: loss=None"
            )
        x, y, sample_weight = self._form.unpack(data)
        if y is None:
            self._form.raise_missing_labels(data)
        self._form.check_labels(data)
        return x, y, sample_weight

    def _total_loss(
        self,
        labeled_loss: Tensor,
        losses: Sequence[Tensor],
        share: Share | None = None,
    ) -> Tensor:
        """Adds the base model's own losses, in the way of `Model.compute_loss`.

        Of several replicas each adds its share of them, which are means over examples,
        or the same on all.
        """
        if not losses:
            return labeled_loss
        by_examples = None if share is None else share.by_examples
        # In half precision the labelled loss may be wider, which Keras trips over.
        added = [
            ops.cast(
                weigh(self._aggregate_additional_loss(loss), by_examples),
                labeled_loss.dtype,
            )
            for loss in losses
        ]
        return ops.sum([labeled_loss, *added])

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self.optimizer is None else self.optimizer.scale_loss(loss)

    def _of_perturbed(self, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Says in the names of metrics that they were computed on perturbed inputs."""
        trackers = {tracker.name for tracker in self._training_trackers}

        def name_of(name: str) -> str:
            said = name == "loss" or name.startswith("adversarial_")
            return name if said else f"adversarial_{name}"

        return {
            name_of(name): value for name, value in logs.items() if name not in trackers
        }

    @property
    def _replicas(self) -> int:
        return self.distribute_strategy.num_replicas_in_sync

    def _batch_size(self, x: Features) -> Tensor:
        return tf.shape(next(leaf for leaf in tree.flatten(x) if leaf is not None))[0]

    def _track(
        self, tracker: keras.metrics.Mean, loss: Tensor, examples: Tensor
    ) -> None:
        tracker.update_state(unscale_loss(loss), sample_weight=examples)


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """Checks what is passed to `keras.Model`, which older versions of it do not."""
    misplaced = sorted(set(kwargs) & {"multiplier", *Settings._fields})
    if misplaced:
        raise TypeError(
            "Hyperparameters belong in the configuration: "
            "`AdversarialRegularization(base_model, make_adv_reg_config(...))`. "
            f"Received: {misplaced}"
        )
    if not isinstance(kwargs.get("trainable", True), bool):
        raise TypeError(
            f"`trainable` must be a bool. Received: {kwargs['trainable']!r}"
        )


def _check_base(base_model: Any) -> None:
    """Checks that a base is a Keras 3 model whose training step is Keras's."""
    if isinstance(base_model, AdversarialRegularization):
        raise ValueError(
            "`base_model` is adversarially regularised already: wrap its `base_model` "
            f"instead. Received: {base_model!r}"
        )
    if not isinstance(base_model, keras.Model):
        modules = {cls.__module__.split(".")[0] for cls in type(base_model).__mro__}
        hint = ""
        if "tf_keras" in modules:
            hint = (
                " A `tf_keras` model is of Keras 2: build it with `import keras` in "
                "place of `tf_keras`, unset TF_USE_LEGACY_KERAS, and load its weights "
                "with `load_weights`."
            )
        raise TypeError(
            "`base_model` must be a Keras 3 model, an instance of `keras.Model`."
            f"{hint} Received: {base_model!r} (of type {type(base_model).__module__}."
            f"{type(base_model).__name__})"
        )
    for name in _STEPS:
        if getattr(type(base_model), name) is not getattr(keras.Model, name):
            warnings.warn(
                f"{type(base_model).__name__} overrides `{name}`, which the wrapper "
                "does not call: it trains and evaluates on the compiled loss and "
                "metrics, and on what the model adds by `add_loss`.",
                stacklevel=4,
            )
