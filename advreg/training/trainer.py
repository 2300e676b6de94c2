"""The methods of the wrapper that Keras calls: `fit`, `evaluate`, and their steps.

`fit` compiles `train_step`. That gives the batch and a `Request` to `training.step`,
applies the gradients that come back, and updates metrics. `evaluate` and `predict` run
the base model.

Each public method first prepares its arguments: preprocessing of a task of KerasHub,
labels out of dictionaries for `class_weight`, callbacks of advreg's own. Then Keras's
method does the work. Traps of Keras, each handled below:

- Keras compiles `train_step` once, and does not notice if the model changes later. So
  the three `make_..._function` compile again if the base has changed (`Parts`).
- Keras tracks attributes of a model: it wraps lists and dictionaries, and saves layers.
  What is no part of the model is in `self._hidden`, which Keras does not look into.
- TensorFlow may write into the arrays that a generator yields. So each step runs on a
  copy of its batch (`_own_copy`).
- Keras divides the loss of each replica by the number of replicas, before it is
  tracked. `_track` undoes this.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import keras
from keras import tree

from advreg import backend
from advreg._types import Features, Schedule, Tensor
from advreg.backend import keras_private
from advreg.backend.parts import Parts, attributes_written
from advreg.config.configs import AdvRegConfig, check_adv_config
from advreg.network.compiled_loss import CompiledLoss
from advreg.network.images import as_floats, unperturbed_integers_message
from advreg.network.inputs import BatchForm, explain_unknown_class
from advreg.network.last_activation import of_logits
from advreg.network.network import Network
from advreg.network.preprocessing import (
    preprocess,
    preprocess_data,
    preprocess_fit,
    preprocesses,
)
from advreg.network.states import as_array
from advreg.training.request import Request
from advreg.training.step import Step, num_examples
from advreg.training.watch import NamesMissingValues, Watch

LABELED_LOSS = "labeled_loss"
ADVERSARIAL_LOSS = "scaled_adversarial_loss"


class Trainer(backend.BackendTrainer):
    """A Keras model that trains a base model on clean and on perturbed inputs.

    Args:
        form: The `BatchForm`, which takes batches apart and holds the base model.
        adv_config: The configuration, `None` for `AdvRegConfig()`.
        **kwargs: Arguments of `keras.Model`.
    """

    # Whether the data must lie in the clip range, and labels and weights in
    # dictionaries are checked (see `BatchForm`). Neural Structured Learning checked
    # neither, so `advreg.nsl` switches it off.
    checks_data = True
    train_function: Any
    test_function: Any
    predict_function: Any

    def __init__(
        self, form: BatchForm, adv_config: AdvRegConfig | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.autocast = False  # The base casts its inputs itself, if at all.
        self.base_model = form.base_model
        self.adv_config = check_adv_config(adv_config)
        self._form = form
        self._labeled_loss_tracker = keras.metrics.Mean(name=LABELED_LOSS)
        self._adversarial_loss_tracker = keras.metrics.Mean(name=ADVERSARIAL_LOSS)
        self._training_seed = backend.ReplicaSeedGenerator(name="training_seed")
        # `perturb_on_batch` has a generator of its own, so that it changes no training.
        self._perturbing_seed = backend.ReplicaSeedGenerator(name="perturbing_seed")
        # An object that Keras does not look into. As attributes of the model, Keras
        # would wrap lists and dictionaries, and save layers and models a second time.
        self._hidden = SimpleNamespace(
            network=Network(form),
            watch=Watch(),
            # The `Parts` of the base when the functions of `fit`, `evaluate` and
            # `predict` were compiled, and the attributes that a call writes.
            parts={},
            written=set(),
        )
        self.built = form.base_model.built

    @property
    def adv_config(self) -> AdvRegConfig:
        """The configuration. A new one takes effect with the next step."""
        return self._adv_config

    @adv_config.setter
    def adv_config(self, value: AdvRegConfig) -> None:
        self._adv_config = check_adv_config(value)
        if self.train_function is not None:
            self.make_train_function(force=True)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics, including those that the base model itself keeps."""
        return [*super().metrics, *keras_private.metrics_of(self.base_model)]

    @functools.wraps(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        arguments = self._bind(keras.Model.compile, args, kwargs)
        loss = arguments.get("loss")
        super().compile(**{**arguments, "loss": of_logits(loss)})
        self.loss = loss

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile` as a serialisable dictionary."""
        config = super().get_compile_config()
        if self.compiled:
            config["loss"] = keras.saving.serialize_keras_object(self.loss)
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model like the one that was saved.

        Args:
            config: The dictionary that `get_compile_config` returned.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._check_compiled("fit")
        arguments = self._with_labels_beside(
            preprocess_fit(self._form, self._bind(keras.Model.fit, args, kwargs))
        )
        callbacks = arguments.pop("callbacks", None)
        if self.checks_data:
            watch = self._hidden.watch
            watch.begin()
            callbacks = _append_callback(self, callbacks, NamesMissingValues(watch))
        for own in self._callbacks_of_devices(arguments.get("initial_epoch", 0)):
            callbacks = _append_callback(self, callbacks, own)
        with self._explained():
            return super().fit(callbacks=callbacks, **arguments)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._check_compiled("evaluate")
        arguments = self._bind(keras.Model.evaluate, args, kwargs)
        # Within `fit`, Keras passes its cached validation data, which `fit` has already
        # preprocessed.
        if not arguments.get("_use_cached_eval_dataset", False):
            arguments = preprocess_data(self._form, arguments)
        with self._explained():
            return super().evaluate(**arguments)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        arguments = self._bind(keras.Model.predict, args, kwargs)
        arguments = preprocess_data(self._form, arguments)
        with self._watched_devices():
            return super().predict(**arguments)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._check_compiled("train_on_batch")
        arguments = self._bind(keras.Model.train_on_batch, args, kwargs)
        arguments = self._with_labels_beside(self._preprocessed(arguments))
        with self._explained():
            return super().train_on_batch(**arguments)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._check_compiled("test_on_batch")
        arguments = self._bind(keras.Model.test_on_batch, args, kwargs)
        with explain_unknown_class():
            return super().test_on_batch(**self._preprocessed(arguments))

    @functools.wraps(keras.Model.predict_on_batch)
    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if not preprocesses(self.base_model):
            return super().predict_on_batch(*args, **kwargs)
        arguments = self._bind(keras.Model.predict_on_batch, args, kwargs)
        return super().predict_on_batch(self._preprocessed(arguments)["x"])

    def make_train_function(self, force: bool = False) -> Any:
        """Compiles the step of `fit`, again if the base has changed.

        The function also checks the units of the first batch.

        Args:
            force: Whether to compile again in any case.
        """
        known = self.train_function
        if self._must_compile("train", known, force):
            super().make_train_function(force=True)
            if self.checks_data:
                self.train_function = self._hidden.watch.checking(
                    self.train_function,
                    lambda: self.adv_config.adv_neighbor_config,
                    self._updated_value,
                    self._keep_state,
                )
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Compiles the step of `evaluate`, again if the base has changed.

        Args:
            force: Whether to compile again in any case.
        """
        if self._must_compile("test", self.test_function, force):
            super().make_test_function(force=True)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Compiles the step of `predict`, again if the base has changed.

        Args:
            force: Whether to compile again in any case.
        """
        if self._must_compile("predict", self.predict_function, force):
            super().make_predict_function(force=True)
        return self.predict_function

    def _run_train_step(self, data: Any) -> dict[str, Tensor]:
        """Runs one step: clean pass, attack, adversarial pass, one update of weights.

        Args:
            data: A batch, in the form of `fit`.

        Returns:
            The logs: metrics, and the losses of the step.
        """
        with self._traced():
            return self._train_step(self._own_copy(data))

    def _train_step(self, data: Any) -> dict[str, Tensor]:
        x, y, sample_weight = self._unpack_labeled(data)
        self._form.check_weights(data)
        x = tree.map_structure(backend.to_tensor, x)
        # Only an attack needs images as floats. Without one, this is plain training.
        if isinstance(multiplier := self.adv_config.multiplier, Schedule) or multiplier:
            if names := self._hidden.network.unperturbed_integers(x):
                message = unperturbed_integers_message(names)
                backend.functions_of(self).warn_once(message, stacklevel=2)
            x = as_floats(x, self._form.fixed_keys, self.base_model)
        request = self._request(self._training_seed)
        step = Step(request, x, y, sample_weight)
        result = step.run()
        self.built = True
        if result.gradients:
            backend.apply_gradients(
                self.optimizer, result.gradients, self.trainable_weights
            )
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=2
            )
        trackers = [self._adversarial_loss_tracker]
        self._track_loss(result.loss, step.examples)
        _track(self._adversarial_loss_tracker, result.adversarial_loss, step.examples)
        if result.labeled_loss is not None:
            trackers.insert(0, self._labeled_loss_tracker)
            _track(self._labeled_loss_tracker, result.labeled_loss, step.examples)
        # As in Keras, metrics are of the predictions before the update.
        logs = self.compute_metrics(x, y, result.predictions, sample_weight)
        if result.labeled_loss is None:
            logs = _named_adversarial(logs)
        return {**logs, **{t.name: t.result() for t in trackers}}

    def _run_test_step(self, data: Any) -> dict[str, Tensor]:
        """Evaluates a batch as the base model does: one forward pass on clean inputs.

        Args:
            data: A batch, in the form of `evaluate`.
        """
        with self._traced():
            return self._test_step(self._own_copy(data))

    def _test_step(self, data: Any) -> dict[str, Tensor]:
        x, y, sample_weight = self._unpack_labeled(data)
        examples = num_examples(x)
        # Before the forward pass. In this exchange replicas wait for each other. Were
        # it after the pass, the next replica would run its own meanwhile, and replace
        # the losses that this one has added to the model.
        weight = backend.replica_weight(examples, sample_weight)
        y_pred = self._run_base(x, training=False)
        compiled = self._compiled_loss()
        labeled_loss = compiled.labeled(y, y_pred, sample_weight, weight)
        loss = compiled.total(labeled_loss, self.losses, weight)
        examples = examples if weight is None else weight.examples
        self._track_loss(loss, examples)
        _track(self._labeled_loss_tracker, labeled_loss, examples)
        logs = self.compute_metrics(x, y, y_pred, sample_weight)
        hidden = self.hidden_in_evaluation()
        return {name: value for name, value in logs.items() if name not in hidden}

    def _run_predict_step(self, data: Any) -> Any:
        """Predicts a batch, with or without labels in it.

        Args:
            data: A batch, in the form of `predict`.
        """
        with self._traced():
            x, _, _ = self._form.unpack(self._own_copy(data))
            return self._run_base(x, training=False)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Computes the clean loss of a batch, with labels in `y` or in `x`.

        Args:
            x: Features, or a dictionary of features and labels.
            y: Labels, or `None`.
            y_pred: Outputs.
            sample_weight: Weights of the examples, or `None`.
            training: Passed on to Keras.

        Raises:
            ValueError: Labels are missing.
        """
        data = (x, y, sample_weight)
        x, y, sample_weight = self._form.unpack(data)
        if y is None:
            self._form.raise_missing_labels(data)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        """Updates the compiled metrics, with labels in `y` or in `x`.

        Args:
            x: Features, or a dictionary of features and labels.
            y: Labels, or `None`.
            y_pred: Outputs.
            sample_weight: Weights of the examples, or `None`.
        """
        x, y, sample_weight = self._form.unpack((x, y, sample_weight))
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Returns the results of all metrics, as Keras logs them.

        Keras calls this at the end of an epoch and at the end of an evaluation. In the
        latter the metrics of training have been reset, and are left out.
        """
        results = super().get_metrics_result()
        clean, adversarial = self._labeled_loss_tracker, self._adversarial_loss_tracker
        if not (backend.is_eager() and as_array(adversarial.count.value)):
            for name in self.hidden_in_evaluation():
                results.pop(name, None)
        elif self._num_replicas > 1 and not as_array(clean.count.value):
            # Without a clean pass. On one device Keras logs the results of the last
            # step, which have these names already.
            results = {
                **_named_adversarial(results),
                adversarial.name: results[adversarial.name],
            }
        return results

    def hidden_in_evaluation(self) -> Sequence[str]:
        """Returns the names of logs that `evaluate` omits, as those of training."""
        return (LABELED_LOSS, ADVERSARIAL_LOSS)

    def _more_state(self) -> Sequence[keras.Variable]:
        """Returns the variables that a step assigns, and that are of no layer."""
        return [self._hidden.watch.variable] if self.checks_data else []

    def _check_batch(self, data: Any) -> None:
        """Checks the labels of a batch whose values are known: before a step.

        Args:
            data: A batch, in the form of `fit` or `evaluate`.
        """
        if backend.BACKEND == "tensorflow":  # `explain_unknown_class` is for it.
            return
        _, y, _ = self._form.unpack(data)
        if y is not None:
            self._compiled_loss().check_classes(y, self.base_model)

    def _request(self, seed: keras.random.SeedGenerator) -> Request:
        """Makes the `Request` of a step, or of `perturb_on_batch`."""
        return Request(
            config=self.adv_config,
            network=self._hidden.network,
            loss=self._compiled_loss(),
            optimizer=self.optimizer,
            seed=seed,
            jit_compile=self.jit_compile,
            run_eagerly=self.run_eagerly,
            trainable_weights=lambda: self.trainable_weights,
            added_losses=lambda: self.losses,
            inspect=self._hidden.watch.record if self.checks_data else None,
            checks_data=self.checks_data,
        )

    def _compiled_loss(self) -> CompiledLoss:
        container = keras_private.compiled_losses_of(self)
        if container is None:
            raise ValueError(
                "Adversarial regularisation perturbs inputs so that the compiled loss "
                "grows: `compile` needs a `loss`. Received: loss=None"
            )
        weights = keras_private.loss_weights_of(self)
        return CompiledLoss(container, self.loss, weights, lambda: self.output_names)

    def _run_base(self, features: Features, training: bool | None) -> Any:
        """Runs the base model on features from which the labels have been taken."""
        outputs = self._hidden.network.forward(features, training)
        self.built = True
        return outputs

    def _unpack_labeled(self, data: Any) -> tuple[Features, Any, Any]:
        """Takes a batch apart into features, labels and weights, and checks labels."""
        self._compiled_loss()
        x, y, sample_weight = self._form.unpack(data)
        if y is None:
            self._form.raise_missing_labels(data)
        self._form.check_labels(data)
        return x, y, sample_weight

    def _track_loss(self, loss: Tensor, examples: Tensor) -> None:
        _track(keras_private.loss_tracker_of(self), loss, examples)

    def _own_copy(self, data: Any) -> Any:
        # XLA writes its results into its own memory.
        return data if self.jit_compile else backend.own_copy(data)

    @contextmanager
    def _traced(self) -> Iterator[None]:
        """Records what layers write on themselves while a step is traced."""
        if backend.is_eager():
            yield
            return
        with attributes_written(self.base_model, self._hidden.written):
            yield

    def _must_compile(self, name: str, function: Any, force: bool) -> bool:
        """Returns whether a function is missing, or the base has changed since.

        Args:
            name: `"train"`, `"test"` or `"predict"`. Each has its own record: `fit`
                uses two of them in turns, when it evaluates.
            function: The function, or `None`.
            force: Whether it is to be compiled again in any case.
        """
        base, parts = self.base_model, self._hidden.parts
        known = parts.get(name)
        if known is not None and known.same_objects(base):
            return force or function is None
        now = Parts(base, self._hidden.written)
        changed = known is not None and bool(known.differences(now))
        # The first step builds a base that is not built yet. That is no change.
        if known is not None or base.built:
            parts[name] = now
        return force or changed or function is None

    def _check_compiled(self, method: str) -> None:
        """Checks that the wrapper, and not only the base, is compiled."""
        if not self.compiled:
            raise ValueError(
                f"`{method}` needs a compiled model: call `compile()` with a loss on "
                "the wrapper, whether or not its `base_model` is compiled. Received: a "
                "wrapper that is not compiled"
            )
        self._check_devices()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Replaces errors that do not say what to do, and lets `fit` run again."""
        try:
            with self._watched_devices(), explain_unknown_class():
                yield
        except Exception:
            # A function of TensorFlow that failed in its first call, which creates the
            # variables of the optimizer, cannot be called again.
            self.train_function = None
            raise

    def _bind(
        self, method: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[str, Any]:
        """Binds the arguments of a method of `keras.Model` to their names."""
        try:
            arguments = inspect.signature(method).bind(self, *args, **kwargs).arguments
        except TypeError:
            method(self, *args, **kwargs)  # Keras's own error is the usual one.
            raise
        del arguments["self"]
        others = arguments.pop("kwargs", {})
        return {**arguments, **others}

    def _with_labels_beside(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Puts labels where Keras looks for them, if there are class weights."""
        if arguments.get("class_weight") is None:
            return arguments
        return self._form.put_labels_beside(arguments)

    def _preprocessed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Applies the preprocessing of the base to a batch, if it has one."""
        if not preprocesses(self.base_model):
            return arguments
        names = ("x", "y", "sample_weight")
        data = preprocess(self._form, tuple(arguments.get(name) for name in names))
        found = zip(names, data, strict=True)
        return {**arguments, **{n: part for n, part in found if part is not None}}


def _append_callback(
    model: keras.Model, callbacks: Any, last: keras.callbacks.Callback
) -> Any:
    """Adds a callback at the end of those of `fit`, after those that restore.

    Args:
        model: The model.
        callbacks: `callbacks`, as `fit` received them.
        last: The callback to add.

    Returns:
        The new `callbacks`.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*tree.flatten(callbacks or []), last]
    # `fit` does not set the model of callbacks that come in a `CallbackList`. And the
    # list may hold such a callback already, from an earlier `fit`.
    last.set_model(model)
    others = [each for each in callbacks.callbacks if type(each) is not type(last)]
    callbacks.callbacks = [*others, last]
    return callbacks


def _named_adversarial(logs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prefixes names of metrics with `adversarial_`, without the trackers of losses."""

    def name_of(name: str) -> str:
        is_named = name == "loss" or name.startswith("adversarial_")
        return name if is_named else f"adversarial_{name}"

    trackers = (LABELED_LOSS, ADVERSARIAL_LOSS)
    return {
        name_of(name): value for name, value in logs.items() if name not in trackers
    }


def _track(tracker: keras.metrics.Mean, loss: Tensor, examples: Tensor) -> None:
    tracker.update_state(backend.unscale_loss(loss), sample_weight=examples)
