"""`nsl.keras`: the wrapper and the loss, in the words of Neural Structured Learning."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from advreg import model, perturbation
from advreg.checks import show
from advreg.config import AdvRegConfig
from advreg.geometry import Tensor
from advreg.nsl._absent import GRAPHS, absent
from advreg.packing import Features
from advreg.perturbation import to_tensor

__all__ = ["AdversarialRegularization", "adversarial_loss"]

__getattr__ = absent(__name__, {"GraphRegularization": GRAPHS, "layers": GRAPHS})

adversarial_regularization = sys.modules[__name__]  # NSL's inner module.

# The task that a loss belongs to, where it is not the choice of one class.
_TASKS = {
    "binarycrossentropy": "binary",
    "hinge": "binary",
    "squaredhinge": "binary",
    "sparsecategoricalcrossentropy": "sparse_categorical",
}
# Overrides of `perturb_on_batch` for which `None` cannot stand for "none".
_NEVER_NONE = ("adv_step_size", "adv_grad_norm", "pgd_iterations", "random_init")


@keras.saving.register_keras_serializable(package="advreg.nsl")
class AdversarialRegularization(model.AdversarialRegularization):
    """`advreg.AdversarialRegularization` with NSL's arguments, logs and `save`.

    It trains as advreg's wrapper does, and takes all that it takes: labels in a
    dictionary, or beside the features. What it does as NSL did:

    - `compile` compiles the base model as well.
    - Logs carry NSL's names: the labelled loss that of its loss, `"accuracy"` that of
      the accuracy that goes with the loss, such as `sparse_categorical_accuracy`, and
      with several outputs each name ends in the label's.
    - `perturb_on_batch` returns labels and sample weights as tensors.
    - `save` saves the base model.

    Args:
        base_model: A Keras 3 model.
        label_keys: Keys of the labels in dictionary inputs; or an `AdvRegConfig`,
            which some code passes here.
        sample_weight_key: Key of the sample weights in dictionary inputs.
        adv_config: An `AdvRegConfig`, by default `AdvRegConfig()`.
        base_with_labels_in_features: Whether the base model is to receive labels that
            come in a dictionary as inputs too.
        **kwargs: As of `advreg.AdversarialRegularization`.

    Raises:
        TypeError: An argument has the wrong type, or there are two configurations.
        ValueError: As of `advreg.AdversarialRegularization`.

    Example:
    >>> config = nsl.configs.make_adv_reg_config(adv_step_size=0.2)
    >>> model = nsl.keras.AdversarialRegularization(
    ...     base_model, label_keys=["label"], adv_config=config)
    >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> model.fit({"image": x, "label": y}, epochs=5)
    """

    _strict = False

    def __init__(
        self,
        base_model: keras.Model,
        label_keys: Sequence[str] | AdvRegConfig = ("label",),
        sample_weight_key: str | None = None,
        adv_config: AdvRegConfig | None = None,
        base_with_labels_in_features: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(label_keys, AdvRegConfig):
            if adv_config is not None:
                raise TypeError(
                    "`adv_config` must come once. Received: a configuration as second "
                    f"argument, and adv_config={show(adv_config)}"
                )
            adv_config = label_keys
            label_keys = ("label",)
        if isinstance(sample_weight_key, AdvRegConfig):
            raise TypeError(
                "`sample_weight_key` must be a string or `None`, and comes before the "
                "configuration: pass that as `adv_config=...`. Received: "
                f"{show(sample_weight_key)}"
            )
        super().__init__(
            base_model,
            adv_config,
            label_keys=label_keys,
            sample_weight_key=sample_weight_key,
            base_with_labels_in_features=base_with_labels_in_features,
            **kwargs,
        )
        self._traced_config: AdvRegConfig | None = None

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compiles the wrapper, and the base model with metrics of its own.

        Args:
            optimizer: As of `keras.Model.compile`; both models share it.
            loss: As of `keras.Model.compile`.
            metrics: As of `keras.Model.compile`; with several outputs also a flat
                list, whose metrics then hold for each of them.
            loss_weights: As of `keras.Model.compile`.
            **kwargs: Further arguments of `keras.Model.compile`.

        Raises:
            ValueError: There are not as many losses or lists of metrics as labels.
        """
        losses = _losses_per_label(loss, self)
        given = _metrics_per_label(metrics, self)
        of_base = [list(map(_clone, some)) for some in given]
        resolved = [
            [_resolved(metric, one) for metric in some]
            for some, one in zip(given, losses, strict=True)
        ]
        make_name = _unique_names(self.label_keys)
        self._loss_names = list(map(make_name, losses, self.label_keys))
        self._metric_names = [
            [make_name(metric, label_key) for metric in some]
            for some, label_key in zip(resolved, self.label_keys, strict=True)
        ]
        # Callbacks look for what they monitor among the metrics, by name. The objects
        # of the user keep the names that they have.
        of_user = {id(metric) for metric in tree.flatten(given)}
        for some, its_names in zip(resolved, self._metric_names, strict=True):
            for metric, name in zip(some, its_names, strict=True):
                if id(metric) not in of_user:
                    metric.name = name
        # Keras 3.8 takes no lists of metrics for outputs in a dictionary, empty or not.
        several = len(self.label_keys) > 1 and any(given)
        super().compile(
            optimizer,
            loss,
            loss_weights,
            resolved if several else resolved[0],
            **kwargs,
        )
        self.base_model.compile(
            self.optimizer,
            loss,
            loss_weights,
            of_base if several else of_base[0],
            **tree.map_structure(_clone, kwargs),
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model as one that was saved."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function of a step; anew where the configuration has changed."""
        if self._traced_config != self.adv_config:
            force = True
            self._traced_config = copy.deepcopy(self.adv_config)
        return super().make_train_function(force)

    def train_step(self, data: Any) -> dict[str, Tensor]:
        """Takes one step, and reports it under NSL's names."""
        logs = super().train_step(data)
        if len(self.label_keys) == 1 and logs.pop("labeled_loss", None) is None:
            # It was under the name of its loss too, but there was no clean pass.
            del logs[f"adversarial_{self._loss_names[0]}"]
        return logs

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Returns what the trackers hold, under NSL's names."""
        results = super().get_metrics_result()
        if len(self.label_keys) == 1:
            of_losses = ["labeled_loss"]
        else:
            outputs = getattr(self.base_model, "output_names", None) or []
            of_losses = [f"{output}_loss" for output in outputs]
        # Weighted metrics, which NSL does not have, come last and keep their names.
        names = dict(
            zip(
                [*of_losses, *self._compiled_metric_names()],
                [
                    *self._loss_names[: len(of_losses)],
                    *itertools.chain(*self._metric_names),
                ],
                strict=False,
            )
        )
        return {names.get(name, name): value for name, value in results.items()}

    def perturb_on_batch(self, x: Any, *args: Any, **config_kwargs: Any) -> Any:
        """Returns the adversarial neighbours of a batch.

        Args:
            x: A dictionary of features, labels and, where there are any, sample
                weights; or what `advreg.AdversarialRegularization` takes.
            *args: Labels and sample weights that are not in `x`.
            **config_kwargs: Fields of `AdvNeighborConfig` that replace the configured
                ones for this call. `None` stands for no mask, range or ball; for a
                field that always has a value it is what is configured.

        Returns:
            The structure of `x`: NumPy arrays of the perturbed features, sparse
            tensors as they are; labels and sample weights in a dictionary as tensors.

        Raises:
            RuntimeError, TypeError, ValueError: As of
                `advreg.AdversarialRegularization`.
        """
        overrides = {
            name: value
            for name, value in config_kwargs.items()
            if not (value is None and name in _NEVER_NONE)
        }
        perturbed = super().perturb_on_batch(x, *args, **overrides)
        perturbed = tree.map_structure(
            lambda leaf: leaf.numpy() if isinstance(leaf, tf.RaggedTensor) else leaf,
            perturbed,
        )
        if not isinstance(x, Mapping):
            return perturbed
        keys = {*self.label_keys, self.sample_weight_key}
        return {
            key: tree.map_structure(to_tensor, x[key]) if key in keys else value
            for key, value in perturbed.items()
        }

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the base model: `keras.models.load_model` needs no advreg for it.

        Args:
            filepath: Path of the `.keras` file.
            *args: Further arguments of `keras.Model.save`.
            **kwargs: The same.
        """
        self.base_model.save(filepath, *args, **kwargs)

    def _flatten_metrics_in_order(self, logs: dict[str, Any]) -> Any:
        """Lists results as NSL does: each loss before the metrics of its output."""
        first = ["loss"]
        for loss, metrics in zip(self._loss_names, self._metric_names, strict=True):
            first += [loss, *metrics]
        last = [self._adversarial_loss_tracker.name]
        rest = [name for name in logs if name not in {*first, *last}]
        values = [logs[name] for name in [*first, *rest, *last] if name in logs]
        return values[0] if len(values) == 1 else values

    def _compiled_metric_names(self) -> list[str]:
        """The names that Keras gives the compiled metrics, in their order."""
        compiled = self._compile_metrics
        return (
            list(compiled.result()) if compiled is not None and compiled.built else []
        )

    @property
    def _hidden_in_evaluation(self) -> tuple[keras.metrics.Metric, ...]:
        return (self._adversarial_loss_tracker,)


def adversarial_loss(
    features: Features,
    labels: Any,
    model: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    sample_weights: Tensor | None = None,
    adv_config: AdvRegConfig | None = None,
    predictions: Any = None,
    labeled_loss: Tensor | None = None,
    gradient_tape: tf.GradientTape | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Computes the loss at adversarially perturbed features, for custom loops.

    It is `advreg.adversarial_loss`, but for `loss_fn`: a `keras.losses.Loss`, or a
    function `(labels, predictions, sample_weight)`, which always gets three arguments,
    the last of them `sample_weights`, `None` or not.

    Args: as those of `advreg.adversarial_loss` otherwise.

    Returns:
        The loss at the perturbed features, as `loss_fn` gives it.

    Raises:
        TypeError, ValueError: As of `advreg.adversarial_loss`.

    Example:
    >>> loss = nsl.keras.adversarial_loss(x, y, model, loss_fn, adv_config=config)
    """

    def weighted(labels: Any, predictions: Any) -> Tensor:
        return loss_fn(labels, predictions, sample_weights)

    return perturbation.adversarial_loss(
        features,
        labels,
        model,
        weighted,
        adv_config=adv_config,
        predictions=predictions,
        labeled_loss=labeled_loss,
        gradient_tape=gradient_tape,
        model_kwargs=model_kwargs,
    )


def mend_metrics_names() -> None:
    """Lets `metrics_names` of any Keras model name what `evaluate` returns.

    Keras 3 promises that in the documentation of `evaluate`, and says "compile_metrics"
    where the names should be. NSL's tutorial reads the accuracy of the plain model by
    `dict(zip(model.metrics_names, model.evaluate(...)))`.
    """
    of_keras = keras.Model.metrics_names

    @functools.wraps(of_keras.fget)
    def metrics_names(self: keras.Model) -> list[str]:
        try:
            results = self.get_metrics_result()
        except Exception:  # Any: what was never asked for a result may fail to give it.
            return of_keras.fget(self)
        for tracker in getattr(self, "_hidden_in_evaluation", ()):
            results.pop(tracker.name, None)
        names = self._flatten_metrics_in_order({name: name for name in results})
        return [names] if isinstance(names, str) else list(names)

    if not hasattr(of_keras.fget, "__wrapped__"):
        keras.Model.metrics_names = property(metrics_names)


def _losses_per_label(loss: Any, model: AdversarialRegularization) -> list[Any]:
    """Lists the loss of each output, in the order of the labels."""
    if isinstance(loss, Mapping):
        loss = _in_order("loss", loss, model)
    elif not isinstance(loss, (list, tuple)):
        loss = [loss] * len(model.label_keys)
    _check_number("loss", loss, model)
    return list(map(keras.losses.get, loss))


def _metrics_per_label(
    metrics: Any, model: AdversarialRegularization
) -> list[list[Any]]:
    """Lists the metrics of each output, in the order of the labels."""
    if isinstance(metrics, Mapping):
        metrics = _in_order("metrics", metrics, model)
    else:
        metrics = [] if metrics is None else metrics
        metrics = metrics if isinstance(metrics, (list, tuple)) else [metrics]
        if not any(map(tree.is_nested, metrics)):
            others = len(model.label_keys) - 1
            metrics = [metrics, *(list(map(_clone, metrics)) for _ in range(others))]
    _check_number("metrics", metrics, model)
    return [[] if some is None else tree.flatten(some) for some in metrics]


def _in_order(
    name: str, values: Mapping, model: AdversarialRegularization
) -> list[Any]:
    """Puts what belongs to named outputs in their order."""
    outputs = getattr(model.base_model, "output_names", None) or []
    if unknown := sorted(set(values) - set(outputs)):
        raise ValueError(
            f"`{name}` must have names of outputs as keys, which are {outputs}. "
            f"Received: {unknown}"
        )
    return [values.get(output) for output in outputs]


def _check_number(
    name: str, values: Sequence[Any], model: AdversarialRegularization
) -> None:
    if len(values) != len(model.label_keys):
        raise ValueError(
            f"`{name}` must have an entry for each of the label keys "
            f"{list(model.label_keys)}. Received: {show(values)}"
        )


def _unique_names(label_keys: Sequence[str]) -> Callable[[Any, str], str]:
    """Makes the function that names a loss or metric as NSL does."""
    taken: Counter[str] = Counter()

    def make_name(function: Any, label_key: str) -> str:
        name = str(getattr(function, "name", getattr(function, "__name__", "loss")))
        if len(label_keys) > 1:
            name = f"{name}_{label_key}"
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name]}"

    return make_name


def _resolved(metric: Any, loss: Any) -> keras.metrics.Metric:
    """Makes a metric of a string or function; what "accuracy" is, the loss says."""
    if metric in ("accuracy", "acc", "crossentropy", "ce"):
        kind = "accuracy" if metric in ("accuracy", "acc") else "crossentropy"
        metric = f"{_task(loss)}_{kind}"
    metric = keras.metrics.get(metric)
    if isinstance(metric, keras.metrics.Metric):
        return metric
    name = getattr(metric, "__name__", type(metric).__name__)
    return keras.metrics.MeanMetricWrapper(metric, name)


def _task(loss: Any) -> str:
    """The prefix of the accuracy and the cross-entropy that go with a loss."""
    name = loss.__name__ if hasattr(loss, "__name__") else type(loss).__name__
    return _TASKS.get(name.replace("_", "").lower(), "categorical")


def _clone(value: Any) -> Any:
    """Copies a metric, which belongs to one model, and leaves anything else."""
    if isinstance(value, keras.metrics.Metric):
        return type(value).from_config(value.get_config())
    return value
