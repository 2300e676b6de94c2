"""`perturb_on_batch`: the configured perturbation of one batch, outside training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from advreg.ball import Settings
from advreg.config import AdvNeighborConfig
from advreg.geometry import Tensor
from advreg.images import as_floats
from advreg.movable import movable
from advreg.packing import Features, Gradients, describe
from advreg.perturbation import differentiable, input_gradients, perturb, to_tensor

if TYPE_CHECKING:
    from advreg.model import AdversarialRegularization

_NUMBERS = (
    *("feature_mask", "adv_step_size", "clip_value_min", "clip_value_max"),
    *("pgd_epsilon", "init_radius"),
)


class PerturbOnBatch:
    """Perturbs batches, by a function that is compiled as the model is, and kept."""

    def __init__(self) -> None:
        self._function: Callable[..., Features] | None = None
        self._compiled_for: tuple[Any, ...] = ()

    def __call__(
        self,
        model: AdversarialRegularization,
        x: Any,
        y: Any,
        sample_weight: Any,
        overrides: dict[str, Any],
    ) -> Any:
        """Returns what `AdversarialRegularization.perturb_on_batch` does."""
        config = _override(model.adv_config.adv_neighbor_config, overrides)
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`perturb_on_batch` returns NumPy arrays, which do not exist inside a "
                "`tf.function` or `tf.data.Dataset.map`. Call it outside, or use "
                "`advreg.gen_adv_neighbor` there."
            )
        if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
            raise TypeError(
                "`x` must be one batch. Loop over a dataset: `for x, y in dataset: "
                f"model.perturb_on_batch(x, y)`. Received: {type(x).__name__}"
            )
        model._assert_compile_called("perturb_on_batch")
        batch = model._unpack_labelled((x, y, sample_weight))
        for name, part in zip(("x", "y", "sample_weight"), batch, strict=True):
            _check_arrays(name, part)
        features, labels, weights = (
            tree.map_structure(to_tensor, part) for part in batch
        )
        _build_by_running(model, features, labels)
        iteration = model.optimizer.iterations if model.optimizer is not None else None
        settings = _as_tensors(Settings.of(config, iteration))
        function = self._function_for(model)
        perturbed = function(features, labels, weights, settings)
        perturbed = tree.map_structure(_to_numpy, perturbed, batch[0])
        if not isinstance(x, Mapping):
            return perturbed
        kept = model.batch_form.fixed_keys
        return {
            key: perturbed[key] if key in perturbed and key not in kept else value
            for key, value in x.items()
        }

    def _function_for(self, model: AdversarialRegularization) -> Callable[..., Any]:
        """The function, compiled anew where the model has been."""

        def function(*arguments: Any) -> Features:
            return _perturbed(model, *arguments)

        if model.run_eagerly:
            return function
        # Before it is built, an optimizer that scales losses scales by a constant.
        built = getattr(model.optimizer, "built", None)
        # The tuple keeps what it was compiled for alive, so that `is` stays safe.
        wanted = (model._compile_loss, model.optimizer, built, model.jit_compile)
        known = self._compiled_for
        if not known or any(a is not b for a, b in zip(wanted, known, strict=True)):
            self._compiled_for = wanted
            self._function = tf.function(
                function, autograph=False, jit_compile=model.jit_compile
            )
        return self._function  # type: ignore[return-value]


def _perturbed(
    model: AdversarialRegularization,
    features: Features,
    labels: Any,
    weights: Any,
    settings: Settings,
) -> Features:
    """Perturbs features; what cannot be perturbed keeps its type."""
    fixed = model.batch_form.fixed_keys
    floats = as_floats(features, fixed)
    wanted = differentiable(floats, fixed)

    def loss_at(features: Features) -> Tensor:
        with keras.StatelessScope():
            with model._to_the_input():
                y_pred = model._forward(features, training=False, floats=True)
            loss = model._compile_loss(labels, y_pred, weights)
        return model._scale(loss)

    def gradient_at(features: Features) -> Gradients:
        return input_gradients(loss_at, features, wanted)

    gradients = gradient_at(floats)
    perturbed = perturb(
        floats,
        gradients,
        gradient_at,
        settings,
        model._perturbing_seed,
        movable(floats, weights, model.base_model),
    )
    leaves = zip(
        tree.flatten(features), tree.flatten(perturbed), gradients, strict=True
    )
    return tree.pack_sequence_as(
        features, [leaf if g is None else moved for leaf, moved, g in leaves]
    )


def _override(
    config: AdvNeighborConfig, overrides: dict[str, Any]
) -> AdvNeighborConfig:
    unknown = sorted(set(overrides) - set(Settings._fields))
    if unknown:
        raise TypeError(
            "Overrides of `perturb_on_batch` must be fields of "
            f"`AdvNeighborConfig`: {list(Settings._fields)}. Received: {unknown}"
        )
    return dataclasses.replace(config, **overrides)


def _build_by_running(
    model: AdversarialRegularization, features: Features, labels: Any
) -> None:
    """Creates all state, which cannot be done while updates are discarded."""
    with model.distribute_strategy.scope():
        if not model.base_model.built:
            model._forward(features, training=False)
        if not model._compile_loss.built:
            with keras.StatelessScope():
                y_pred = model._forward(features, training=False)
            model._compile_loss(labels, y_pred)  # Which finds out what goes with what.
            for metric in model._compile_loss.metrics:
                metric.reset_state()


def _check_arrays(name: str, part: Any) -> None:
    """Checks that a part of a batch is made of arrays, and not of numbers."""
    if any(
        leaf is not None and getattr(leaf, "shape", ()) == ()
        for leaf in tree.flatten(part)
    ):
        raise ValueError(
            f"`{name}` must be an array with a batch axis, or a structure of arrays; a "
            "list of numbers is a structure, so make it a NumPy array. Received: "
            f"{describe(part)}"
        )


def _to_numpy(leaf: Any, given: Any) -> Any:
    """Makes an array of a tensor; what never was a number stays what it was."""
    if not isinstance(leaf, tf.Tensor):
        return leaf
    return np.asarray(given) if leaf.dtype == tf.string else leaf.numpy()


def _as_tensors(settings: Settings) -> Settings:
    """Makes every number a tensor, so that another value needs no new compilation."""

    def convert(value: Any) -> Any:
        return tree.map_structure(
            lambda leaf: (
                None if leaf is None else ops.convert_to_tensor(leaf, "float64")
            ),
            value,
        )

    numbers = {name: convert(getattr(settings, name)) for name in _NUMBERS}
    return settings._replace(**numbers)
