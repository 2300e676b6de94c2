"""The wrapper that trains any Keras model against adversarial perturbations.

`AdversarialRegularization` adds what users see to `Trainer`: the constructor with its
checks, `perturb_on_batch`, saving and loading. The steps of training and evaluation are
in `Trainer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import tree

from advreg import backend
from advreg._types import Features
from advreg.checks import brief, check_model
from advreg.config.configs import AdvNeighborConfig, AdvRegConfig
from advreg.network.inputs import BatchForm, explain_unknown_class
from advreg.network.modes import layers_without_training_argument
from advreg.network.preprocessing import overridden_methods, preprocess, preprocesses
from advreg.network.states import as_array, assign
from advreg.training.perturb_on_batch import (
    check_one_batch,
    check_runs_eagerly,
    displace_on_batch,
    perturb_on_batch,
)
from advreg.training.saving import (
    deserialize_adv_config,
    deserialize_base,
    deserialize_dtype,
    save_whole,
)
from advreg.training.trainer import Trainer

_RANDOM_STATE = "random_state_"
# Methods that are the wrapper's own, even if the base model overrides them.
_STEPS = (
    *("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics"),
    *("fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
    *("make_train_function", "make_test_function", "make_predict_function"),
)


@keras.saving.register_keras_serializable(package="advreg")
class AdversarialRegularization(Trainer):
    """A Keras model that trains another one on clean and on perturbed inputs.

    The wrapper is a `keras.Model`: `compile` and `fit` it like any other. Training
    minimises

        clean_weight * labelled loss + multiplier * objective
            + the losses that the base model adds itself, once

    The default objective is the labelled loss at perturbed inputs
    ([Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572)). `fit` logs `loss` (the
    total), `labeled_loss`, `scaled_adversarial_loss`, and the compiled metrics on clean
    predictions. With `clean_weight=0.0` and an objective that needs no clean pass,
    there is no `labeled_loss`. Metrics are then computed on perturbed inputs, and their
    names begin with `adversarial_`. `predict` and `evaluate` are those of the base
    model: one forward pass on clean inputs. The trained network is `base_model`.

    Labels come as `y`, as for any Keras model. Where there is no `y`, and `x` is a
    dictionary that holds the `label_keys`, they come from there. A key is a feature,
    never a label, if the base model declares an input of that name or if `y` is given.

    Images of type uint8 are cast to float32 for training, in the same units, 0 to 255.
    The base model must give the same result for both types: a `Rescaling` layer does,
    `tf.image.convert_image_dtype` does not.

    A base model that preprocesses in its own `fit` and `predict`, as the tasks of
    KerasHub do, does so in the wrapper too. Perturbed is the input of its network after
    the preprocessing: step sizes and clip ranges are in the units of that.

    Saving keeps the wrapper, its configuration and the state of its optimizer;
    `keras.models.load_model` needs `import advreg` first. `base_model` is saved, loaded
    and served without advreg.

    Args:
        base_model: A Keras 3 model: sequential, functional or subclassed, built or
            not.
        adv_config: An `AdvRegConfig`, as `make_adv_reg_config` returns; by default
            `AdvRegConfig()`.
        label_keys: Keys of the labels in dictionary inputs. Several keys give a list of
            labels in that order; if the base model declares a dictionary of outputs,
            they must be keys of it. `predict`, which has no `y`, removes these keys:
            pass `()` for a base model that declares no inputs and has a feature of such
            a name.
        sample_weight_key: Key of the sample weights in dictionary inputs. In training
            it must be there. Where `y` is given and the base model declares no inputs,
            it is a feature.
        base_with_labels_in_features: Whether labels that come in a dictionary are also
            inputs of the base model. They are not perturbed.
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
        # Warnings show the user's line, also from a subclass with its own `__init__`.
        own = type(self).__init__ is AdversarialRegularization.__init__
        _check_base(base_model, stacklevel=3 if own else 4)
        backend.check_scope(base_model)
        _check_keywords(kwargs)
        kwargs.setdefault("dtype", base_model.dtype_policy)
        form = BatchForm(
            base_model,
            label_keys,
            sample_weight_key,
            base_with_labels_in_features,
            strict=self.checks_data,
        )
        super().__init__(form, adv_config, **kwargs)
        self._warned_of_preprocessing = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_model" and hasattr(self, name):
            raise AttributeError(
                "`base_model` cannot be exchanged: wrap the other model in an "
                f"`AdversarialRegularization` of its own. Received: {brief(value)}"
            )
        super().__setattr__(name, value)

    @property
    def batch_form(self) -> BatchForm:
        """The `BatchForm`, which takes batches apart."""
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
    def output_names(self) -> list[str]:
        """Names of the base model's outputs, which are part of the names of metrics."""
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
        # Only a call creates the layers' weights of such a model. If it cannot be
        # called on symbolic floats, its first batch will build it.
        dtype = self.base_model.input_dtype
        symbols = tree.map_shape_structure(
            lambda shape: keras.KerasTensor(shape, dtype=dtype), shapes
        )
        with contextlib.suppress(Exception):
            self.base_model(symbols)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Computes the shapes of the base model's outputs.

        Args:
            input_shape: Shape of the input, or a structure of shapes.
        """
        features = self._form.features(input_shape)
        return self.base_model.compute_output_shape(self._form.base_inputs(features))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`, because the outputs have the masks of the base model."""

    def call(self, inputs: Features, training: bool | None = None) -> Any:
        """Calls the base model, without labels that a dictionary of inputs may hold.

        Args:
            inputs: Features, or a dictionary of features and labels.
            training: Whether layers behave as in training.
        """
        return self._run_base(self._form.features(inputs), training)

    def perturb_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **overrides: Any
    ) -> Any:
        """Returns a batch with perturbed features: the adversarial neighbours.

        The attack is that of `adv_config`, against the current weights. It increases
        the compiled loss, whatever the objective of training is. The model runs in
        inference mode. No weight, metric, statistic or random state of training
        changes. Scalars in `overrides` are arguments of the compiled function, so that
        a sweep over them compiles once.

        Args:
            x: Features of one batch: an array or tensor, or a structure of them.
                Labels may be in it if it is a dictionary.
            y: Labels, where they are not in `x`.
            sample_weight: Weights of the examples. An example of weight 0 is not
                perturbed.
            **overrides: Fields of `AdvNeighborConfig` that replace the configured ones
                for this call. `None` replaces them too.

        Returns:
            The perturbed features as NumPy arrays, in the structure and dtypes of `x`,
            images of type uint8 as float32. Labels and weights in a dictionary are
            returned as the same objects. For a base model that preprocesses in its own
            `fit`, as tasks of KerasHub do, it is the perturbed input of the network,
            after the preprocessing: call `model.base_model(x_adv)` on it, because
            `evaluate` and `predict` would preprocess it again. A warning says so once.

        Raises:
            RuntimeError: It is called inside a `tf.function`.
            TypeError: `x` is a dataset, or an override is no field of
                `AdvNeighborConfig`.
            ValueError: The model is not compiled, labels are missing, nothing can be
                perturbed, a mask or range does not fit, `x` lies outside the clip
                range, or every gradient is NaN.

        Example:
        >>> x_adv = model.perturb_on_batch(x, y, adv_step_size=0.1, clip_value_min=0.0)
        """
        batch = self._batch_to_perturb("perturb_on_batch", (x, y, sample_weight))
        request = self._request(self._perturbing_seed)
        with explain_unknown_class():
            self._check_batch(batch)
            return perturb_on_batch(
                request, self, batch[0], self._unpack_labeled(batch), overrides
            )

    def displace_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **overrides: Any
    ) -> dict[str, list[Any]]:
        """Returns what the attack of training adds to the outputs of layers.

        It is `perturb_on_batch` for a configuration whose `perturb` names layers. See
        there for how the model runs, and what stays unchanged.

        Args:
            x: Features of one batch, such as token ids. Labels may be in it if it is a
                dictionary.
            y: Labels, where they are not in `x`.
            sample_weight: Weights of the examples. The displacement of an example of
                weight 0 is 0.
            **overrides: Fields of `AdvNeighborConfig` that replace the configured ones
                for this call, such as `perturb="embeddings"`.

        Returns:
            A dictionary from the path of each layer to a list of NumPy arrays, one for
            each output of each call of the layer, of its shape. Padding has the
            displacement 0. `advreg.displaced` applies them.

        Raises:
            RuntimeError: It is called inside a `tf.function`.
            TypeError: `x` is a dataset, or an override is no field of
                `AdvNeighborConfig`.
            ValueError: The model is not compiled, labels are missing, inputs are to be
                perturbed, or a layer is unknown or cannot be perturbed.

        Example:
        >>> displacements = model.displace_on_batch(ids, y, perturb="embeddings")
        >>> with advreg.displaced(model, displacements):
        ...     y_pred = model(ids, training=False)
        """
        batch = self._batch_to_perturb("displace_on_batch", (x, y, sample_weight))
        request = self._request(self._perturbing_seed)
        with explain_unknown_class():
            self._check_batch(batch)
            return displace_on_batch(
                request, self, self._unpack_labeled(batch), overrides
            )

    def _batch_to_perturb(self, name: str, batch: Any) -> Any:
        """Checks that a public method may run, and preprocesses its batch.

        Args:
            name: Name of the method.
            batch: Features, labels and sample weights.
        """
        check_runs_eagerly(name)
        check_one_batch(batch[0], name)
        self._check_compiled(name)
        backend.sync_state(self)  # A callback may ask in the midst of an epoch.
        if not preprocesses(self.base_model):
            return batch
        if name == "perturb_on_batch":
            self._warn_of_preprocessing()
        return preprocess(self._form, batch)

    def save(
        self,
        filepath: Any,
        overwrite: bool = True,
        zipped: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the model as `keras.Model.save` does, but replaces a file whole.

        Args:
            filepath: Path of the `.keras` file. If the process is killed while it
                saves, the old file is still there.
            overwrite: Whether to replace an existing file without asking the user.
            zipped: `False` saves a directory, in place.
            **kwargs: Further arguments of `keras.Model.save`.

        Raises:
            ValueError: `filepath` ends in `.h5` or `.hdf5`.

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
        """Saves weights as `keras.Model.save_weights` does, but replaces a file whole.

        Args:
            filepath: Path of the `.weights.h5` file. If the process is killed while it
                saves, the old file is still there.
            overwrite: Whether to replace an existing file without asking the user.
            max_shard_size: Largest size in GB of each of several files, which are
                written in place. `None` for one file.
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
        # An empty scope would hide the objects of an outer one.
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
        """Saves weights and random states. Keras leaves out the states of generators.

        Args:
            store: The store of Keras.
        """
        super().save_own_variables(store)
        for index, state in enumerate(self._random_state()):
            store[f"{_RANDOM_STATE}{index:06}"] = as_array(state.value)

    def load_own_variables(self, store: Any) -> None:
        """Loads weights and random states, so that training goes on bit for bit.

        Args:
            store: The store of Keras.

        Raises:
            ValueError: The store was written by the base model, not by a wrapper.
        """
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

    def _random_state(self) -> list[keras.Variable]:
        """Returns the states of all generators that the model draws from."""
        # `variables` are the weights and the states of generators.
        weights = {id(weight) for weight in self.weights}
        return [v for v in self.variables if id(v) not in weights]

    def _warn_of_preprocessing(self) -> None:
        """Warns once that a perturbed batch must not be preprocessed again."""
        if self._warned_of_preprocessing:
            return
        self._warned_of_preprocessing = True
        warnings.warn(
            "`perturb_on_batch` returns what the network receives after the "
            f"preprocessing of {type(self.base_model).__name__}, and `evaluate` and "
            "`predict` would preprocess it again. Call the network itself on it, "
            "`model.base_model(x_adv, training=False)`, or measure with "
            "`advreg.evaluate_robustness(model, x, y, attacks=...)`.",
            stacklevel=4,
        )


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """Checks keyword arguments for `keras.Model`, which older versions do not check."""
    fields = (
        *dataclasses.fields(AdvRegConfig),
        *dataclasses.fields(AdvNeighborConfig),
    )
    misplaced = sorted(set(kwargs) & {field.name for field in fields})
    if misplaced:
        raise TypeError(
            "Hyperparameters belong in the configuration: "
            "`AdversarialRegularization(base_model, make_adv_reg_config(...))`. "
            f"Received: {misplaced}"
        )
    if not isinstance(kwargs.get("trainable", True), bool):
        raise TypeError(
            f"`trainable` must be a bool. Received: {brief(kwargs['trainable'])}"
        )


def _check_base(base_model: Any, stacklevel: int) -> None:
    """Checks the base model, and warns of methods of it that the wrapper ignores."""
    if isinstance(base_model, AdversarialRegularization):
        raise ValueError(
            "`base_model` is adversarially regularised already: wrap its `base_model` "
            f"instead. Received: {brief(base_model)}"
        )
    check_model("base_model", base_model)
    kind = type(base_model).__name__
    if layers := layers_without_training_argument(base_model):
        warnings.warn(
            f"`call` of {kind} takes no `training` argument: `fit` and `evaluate` of "
            f"Keras leave {', '.join(layers)} in the mode that is the default there. "
            "The wrapper runs all layers in training mode where it trains, and in "
            "inference mode elsewhere. To get the same from both, add `training=None` "
            "to `call`, and pass it on to these layers.",
            stacklevel=stacklevel,
        )
    for name in overridden_methods(base_model, _STEPS):
        warnings.warn(
            f"{kind} overrides `{name}`, which the wrapper "
            "does not call: it trains and evaluates on the compiled loss and "
            "metrics, and on what the model adds by `add_loss`.",
            stacklevel=stacklevel,
        )
