"""`nsl.keras`: the wrapper and the loss of Neural Structured Learning.

The wrapper is a subclass of advreg's. It changes arguments and names, not the training.
Most of the code maps names of metrics: NSL names them by their functions and the label
keys, Keras 3 by its outputs, and programs for NSL look for NSL's names in logs and in
`metrics_names`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.backend import keras_private
from advreg.checks import describe_value
from advreg.config.configs import AdvRegConfig
from advreg.nsl._absent import GRAPHS, absent
from advreg.training import custom_loops, model
from advreg.training.trainer import ADVERSARIAL_LOSS

__all__ = ["AdversarialRegularization", "adversarial_loss"]

__getattr__ = absent(__name__, {"GraphRegularization": GRAPHS, "layers": GRAPHS})

adversarial_regularization = sys.modules[__name__]  # NSL's inner module.

# The prefix of metrics that go with a loss, where it is not "categorical".
_TASKS = {
    "binarycrossentropy": "binary",
    "hinge": "binary",
    "squaredhinge": "binary",
    "sparsecategoricalcrossentropy": "sparse_categorical",
}
# Overrides of `perturb_on_batch` that cannot be `None`. As in NSL, `None` means the
# configured value.
_NEVER_NONE = ("adv_step_size", "adv_grad_norm", "pgd_iterations", "random_init")


@keras.saving.register_keras_serializable(package="advreg.nsl")
class AdversarialRegularization(model.AdversarialRegularization):
    """`advreg.AdversarialRegularization` with NSL's arguments, logs and `save`.

    It trains as advreg's wrapper does, and takes the same data: labels in a dictionary,
    or as `y`. These things are as in NSL:

    - `compile` compiles the base model as well.
    - Logs have NSL's names. The labelled loss has the name of its loss, `"accuracy"`
      becomes the accuracy that goes with the loss, such as
      `sparse_categorical_accuracy`, and with several outputs each name ends in the
      label key.
    - `perturb_on_batch` returns labels and sample weights as tensors.
    - `save` saves the base model.

    Args:
        base_model: A Keras 3 model.
        label_keys: Keys of the labels in dictionary inputs; or an `AdvRegConfig`,
            which some code passes here.
        sample_weight_key: Key of the sample weights in dictionary inputs.
        adv_config: An `AdvRegConfig`, by default `AdvRegConfig()`.
        base_with_labels_in_features: Whether labels that come in a dictionary are also
            inputs of the base model.
        **kwargs: `name`, `dtype` and `trainable` of the model. See
            `advreg.AdversarialRegularization`.

    Raises:
        TypeError: An argument has the wrong type, or there are two configurations.
        ValueError: `base_model` is itself adversarially regularised, or
            `sample_weight_key` is a label key.

    Example:
    >>> config = nsl.configs.make_adv_reg_config(adv_step_size=0.2)
    >>> model = nsl.keras.AdversarialRegularization(
    ...     base_model, label_keys=["label"], adv_config=config)
    >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> model.fit({"image": x, "label": y}, epochs=5)
    """

    checks_data = False

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
                    f"argument, and adv_config={describe_value(adv_config)}"
                )
            adv_config = label_keys
            label_keys = ("label",)
        if isinstance(sample_weight_key, AdvRegConfig):
            raise TypeError(
                "`sample_weight_key` must be a string or `None`, and comes before the "
                "configuration: pass that as `adv_config=...`. Received: "
                f"{describe_value(sample_weight_key)}"
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

    def compile(  # type: ignore[override]
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compiles the wrapper, and the base model with metrics of its own.

        Args:
            optimizer: The optimizer, which both models share. See
                `keras.Model.compile`, as for all arguments.
            loss: The loss, or a list or dictionary of losses.
            metrics: The metrics. With several outputs also a flat list, whose metrics
                are then used for each of them.
            loss_weights: The weights of the losses.
            **kwargs: Further arguments of `keras.Model.compile`.

        Raises:
            ValueError: There are not as many losses or lists of metrics as labels.
        """
        losses = _losses_per_label(loss, self)
        given = _metrics_per_label(metrics, self)
        # A metric belongs to one model, so the base gets copies.
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
        # Callbacks search the metrics for the name that they monitor. Metric objects of
        # the user keep their own names.
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
            loss_weights=loss_weights,
            metrics=of_base if several else of_base[0],
            **tree.map_structure(_clone, kwargs),
        )

    def make_train_function(self, force: bool = False) -> Any:
        """Compiles the step of `fit`, again if the configuration has changed.

        Its fields can be assigned here, which advreg's own wrapper does not notice.

        Args:
            force: Whether to compile again in any case.
        """
        if self._traced_config != self.adv_config:
            force = True
            self._traced_config = copy.deepcopy(self.adv_config)
        return super().make_train_function(force)

    def _run_train_step(self, data: Any) -> dict[str, Tensor]:
        """Runs one step, and returns its logs under NSL's names.

        Args:
            data: A batch, in the form of `fit`.
        """
        logs = super()._run_train_step(data)
        if len(self.label_keys) == 1 and logs.pop("labeled_loss", None) is None:
            # With a single output, the labelled loss also has the name of its loss.
            # Without a clean pass there is no such value.
            del logs[f"adversarial_{self._loss_names[0]}"]
        return logs

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Returns the results of all metrics, under NSL's names."""
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
        """Returns a batch with perturbed features: the adversarial neighbours.

        Args:
            x: A dictionary of features, labels and sample weights, if any; or features
                alone, as for `advreg.AdversarialRegularization`.
            *args: Labels and sample weights that are not in `x`.
            **config_kwargs: Fields of `AdvNeighborConfig` that replace the configured
                ones for this call. `None` means no mask, range or ball. For a field
                that cannot be `None` it means the configured value.

        Returns:
            The structure of `x`: NumPy arrays of the perturbed features, sparse tensors
            unchanged; labels and sample weights in a dictionary as tensors.

        Raises:
            RuntimeError, TypeError, ValueError: See
                `advreg.AdversarialRegularization.perturb_on_batch`.
        """
        overrides = {
            name: value
            for name, value in config_kwargs.items()
            if not (value is None and name in _NEVER_NONE)
        }
        perturbed = super().perturb_on_batch(x, *args, **overrides)
        perturbed = tree.map_structure(
            lambda leaf: leaf.numpy() if backend.is_ragged(leaf) else leaf,
            perturbed,
        )
        if not isinstance(x, Mapping) or not isinstance(perturbed, Mapping):
            return perturbed  # Preprocessing makes one array of a dictionary.
        keys = {*self.label_keys, self.sample_weight_key}
        return {
            key: tree.map_structure(backend.to_tensor, x[key]) if key in keys else value
            for key, value in perturbed.items()
        }

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the base model, which `keras.models.load_model` loads without advreg.

        Args:
            filepath: Path of the `.keras` file.
            *args: Further arguments of `keras.Model.save`.
            **kwargs: Further keyword arguments of `keras.Model.save`.
        """
        self.base_model.save(filepath, *args, **kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._listed(super().evaluate, keras.Model.evaluate, args, kwargs)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        method = keras.Model.train_on_batch
        return self._listed(super().train_on_batch, method, args, kwargs)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        method = keras.Model.test_on_batch
        return self._listed(super().test_on_batch, method, args, kwargs)

    def in_order(self, logs: dict[str, Any]) -> Any:
        """Lists results in NSL's order: each loss before the metrics of its output.

        Args:
            logs: The results by name.
        """
        first = ["loss"]
        for loss, metrics in zip(self._loss_names, self._metric_names, strict=True):
            first += [loss, *metrics]
        rest = [name for name in logs if name not in {*first, ADVERSARIAL_LOSS}]
        names = [*first, *rest, ADVERSARIAL_LOSS]
        values = [logs[name] for name in names if name in logs]
        return values[0] if len(values) == 1 else values

    def _listed(
        self, method: Callable[..., Any], of_keras: Any, args: Any, kwargs: Any
    ) -> Any:
        """Calls a method of Keras, and returns a list unless a dictionary is wanted."""
        arguments = self._bind(of_keras, args, kwargs)
        as_dictionary = arguments.pop("return_dict", False)
        logs = method(**arguments, return_dict=True)
        return logs if as_dictionary else self.in_order(logs)

    def _compiled_metric_names(self) -> list[str]:
        """Returns the names that Keras gives the compiled metrics, in their order."""
        compiled = keras_private.compiled_metrics_of(self)
        return (
            list(compiled.result()) if compiled is not None and compiled.built else []
        )

    def hidden_in_evaluation(self) -> Sequence[str]:
        """Returns the logs that `evaluate` omits: the labelled loss is none of them."""
        return (ADVERSARIAL_LOSS,)


def adversarial_loss(
    features: Features,
    labels: Any,
    model: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    sample_weights: Tensor | None = None,
    adv_config: AdvRegConfig | None = None,
    predictions: Any = None,
    labeled_loss: Tensor | None = None,
    gradient_tape: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Computes the loss at adversarially perturbed features, for custom loops.

    It is `advreg.adversarial_loss`, with one difference: `loss_fn` always gets three
    arguments, the last of which is `sample_weights`, even if that is `None`.

    Args:
        features: A tensor, or a nested structure of tensors. See
            `advreg.adversarial_loss`, as for all arguments.
        labels: The labels that `loss_fn` receives.
        model: Callable from features to predictions.
        loss_fn: A `keras.losses.Loss`, or a function
            `(labels, predictions, sample_weight)`.
        sample_weights: Weights of the examples, or `None`.
        adv_config: An `AdvRegConfig`, by default `AdvRegConfig()`.
        predictions: `model(features)`, where it is known already. On TensorFlow only,
            as the next two.
        labeled_loss: The loss at `features`, where it is known already.
        gradient_tape: The `tf.GradientTape` that watched `features`.
        model_kwargs: Further keyword arguments of `model`.

    Returns:
        The loss at the perturbed features, as `loss_fn` returns it.

    Raises:
        TypeError, ValueError: See `advreg.adversarial_loss`.

    Example:
    >>> loss = nsl.keras.adversarial_loss(x, y, model, loss_fn, adv_config=config)
    """
    return custom_loops.loss_at_neighbors(
        features,
        labels,
        model,
        loss_fn,
        (sample_weights,),
        None,
        adv_config,
        predictions,
        labeled_loss,
        gradient_tape,
        model_kwargs,
    )


def install_metrics_names() -> None:
    """Makes `metrics_names` of all Keras models name the results of `evaluate`.

    The documentation of Keras 3 promises this, but the property returns
    "compile_metrics" instead of the names. NSL's tutorial reads the accuracy of the
    plain model by `dict(zip(model.metrics_names, model.evaluate(...)))`.
    """
    of_keras = keras.Model.metrics_names

    @functools.wraps(of_keras.fget)
    def metrics_names(self: keras.Model) -> list[str]:
        try:
            results = self.get_metrics_result()
        except Exception:  # A metric that was never updated may raise any error.
            return of_keras.fget(self)
        if isinstance(self, model.AdversarialRegularization):
            for name in self.hidden_in_evaluation():
                results.pop(name, None)
        named = {name: name for name in results}
        if isinstance(self, AdversarialRegularization):
            names = self.in_order(named)
        else:
            names = keras_private.results_in_order(self, named)
        return [names] if isinstance(names, str) else list(names)

    if not hasattr(of_keras.fget, "__wrapped__"):  # It may have been replaced before.
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
    """Lists the values of a dictionary in the order of the named outputs."""
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
            f"{list(model.label_keys)}. Received: {describe_value(values)}"
        )


def _unique_names(label_keys: Sequence[str]) -> Callable[[Any, str], str]:
    """Makes a function that names losses and metrics as NSL does, each name once."""
    taken: Counter[str] = Counter()

    def make_name(function: Any, label_key: str) -> str:
        name = str(getattr(function, "name", getattr(function, "__name__", "loss")))
        if len(label_keys) > 1:
            name = f"{name}_{label_key}"
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name]}"

    return make_name


def _resolved(metric: Any, loss: Any) -> keras.metrics.Metric:
    """Makes a metric of a string or function. "accuracy" depends on the loss."""
    if metric in ("accuracy", "acc", "crossentropy", "ce"):
        kind = "accuracy" if metric in ("accuracy", "acc") else "crossentropy"
        metric = f"{_task(loss)}_{kind}"
    metric = keras.metrics.get(metric)
    if isinstance(metric, keras.metrics.Metric):
        return metric
    name = getattr(metric, "__name__", type(metric).__name__)
    return keras.metrics.MeanMetricWrapper(metric, name)


def _task(loss: Any) -> str:
    """Returns the prefix of the accuracy and the cross-entropy that fit a loss."""
    name = loss.__name__ if hasattr(loss, "__name__") else type(loss).__name__
    return _TASKS.get(name.replace("_", "").lower(), "categorical")


def _clone(value: Any) -> Any:
    """Copies a metric, because it belongs to one model, and returns other values."""
    if isinstance(value, keras.metrics.Metric):
        return type(value).from_config(value.get_config())
    return value
