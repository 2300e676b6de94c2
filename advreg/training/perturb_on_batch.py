"""The configured perturbation of one batch, outside of training.

`perturb_on_batch` returns perturbed inputs, and `displace_on_batch` what would be added
to the outputs of layers.

The arithmetic is that of a training step, but the model runs in inference mode and the
gradient is always that of the compiled loss. The work is in `_perturbed`, which runs as
one compiled function. It is compiled once for all batch lengths and all numbers,
because numbers such as the step size are its arguments. `_build` runs before it:
variables cannot be created while the updates of variables are discarded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.checks import describe
from advreg.config.configs import EMBEDDINGS, INPUTS, AdvNeighborConfig
from advreg.config.norms import NormType
from advreg.network.attack_space import AttackSpace, naming_embeddings
from advreg.network.gradients import input_gradients
from advreg.network.images import as_floats, unperturbed_integers_message
from advreg.network.precision import Precision
from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Ball, Settings
from advreg.perturbation.packing import as_given
from advreg.perturbation.units import (
    DataSummary,
    check_units,
    summarize,
    warn_of_missing,
)
from advreg.training.request import Request

# Fields that are arguments of the compiled function, as tensors, so that other values
# need no new compilation.
_NUMBERS = (
    *("feature_mask", "adv_step_size", "clip_value_min", "clip_value_max"),
    *("pgd_epsilon", "init_radius"),
)


def perturb_on_batch(
    request: Request,
    model: keras.Model,
    x: Any,
    batch: tuple[Features, Any, Any],
    overrides: dict[str, Any],
) -> Any:
    """Computes the result of `AdversarialRegularization.perturb_on_batch`.

    Args:
        request: The parts of the wrapper.
        model: The wrapper, to which the cache of compiled functions belongs.
        x: The features as the user passed them, with or without labels among them.
        batch: Features, labels and sample weights, taken apart.
        overrides: Fields of `AdvNeighborConfig` that replace the configured ones.

    Returns:
        The perturbed features, in the structure of `x`.
    """
    config = _override(request.config.adv_neighbor_config, overrides)
    if config.perturbs_layers:
        raise ValueError(
            "`perturb_on_batch` returns inputs, and the configuration perturbs outputs "
            "of layers. Call `displace_on_batch` to get what is added to these, or "
            f'pass `perturb="{INPUTS}"`. Received: perturb={config.perturb!r}'
        )
    features, moved, _ = _attacked(request, model, batch, config)
    leaves = tree.flatten(features)
    names = [str(index) for index in range(len(leaves))]
    perturbed = as_given(
        tree.pack_sequence_as(
            features,
            [moved.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)],
        ),
        batch[0],
        [name in moved for name in names],
    )
    if not isinstance(x, Mapping):
        return perturbed
    kept = request.network.form.fixed_keys
    return {
        key: perturbed[key] if key in perturbed and key not in kept else value
        for key, value in x.items()
    }


def displace_on_batch(
    request: Request,
    model: keras.Model,
    batch: tuple[Features, Any, Any],
    overrides: dict[str, Any],
) -> dict[str, list[np.ndarray]]:
    """Computes the result of `AdversarialRegularization.displace_on_batch`.

    Args:
        request: The parts of the wrapper.
        model: The wrapper, to which the cache of compiled functions belongs.
        batch: Features, labels and sample weights, taken apart.
        overrides: Fields of `AdvNeighborConfig` that replace the configured ones.

    Returns:
        What the attack adds to the outputs of layers, `{path: [arrays]}`.
    """
    config = _override(request.config.adv_neighbor_config, overrides)
    if config.perturbs_inputs:
        others = [n for n in map(str, np.atleast_1d(config.perturb)) if n != INPUTS]
        named = others[0] if len(others) == 1 else tuple(others) or EMBEDDINGS
        raise ValueError(
            "`displace_on_batch` returns what is added to the outputs of layers, so "
            "`perturb` must name layers, and not inputs. Pass "
            f"`perturb={named!r}`. Received: "
            f"perturb={config.perturb!r}"
        )
    _, _, displacements = _attacked(request, model, batch, config)
    return tree.map_structure(ops.convert_to_numpy, displacements)


def _attacked(
    request: Request,
    model: keras.Model,
    batch: tuple[Features, Any, Any],
    config: AdvNeighborConfig,
) -> tuple[Features, dict[str, Tensor], dict[str, list[Tensor]]]:
    """Attacks a batch, and checks its data.

    Returns:
        The features as tensors, the perturbed leaves of them by their numbers, and the
        displacements of outputs of layers.
    """
    for name, part in zip(("x", "y", "sample_weight"), batch, strict=True):
        _check_arrays(name, part)
    features, labels, weights = (
        tree.map_structure(backend.to_tensor, part) for part in batch
    )
    _build(request, model, features, labels)
    moved, displacements, summary, has_no_gradient = _run(
        request, model, features, labels, weights, config
    )
    if request.checks_data:
        _check_data(config, summary, has_no_gradient, features)
    return features, moved, displacements


def check_runs_eagerly(name: str = "perturb_on_batch") -> None:
    """Checks that a function is not called while another one is traced.

    Args:
        name: Name of the function.

    Raises:
        RuntimeError: It is.
    """
    if not backend.is_eager():
        raise RuntimeError(
            f"`{name}` returns NumPy arrays, which do not exist inside a "
            "`tf.function` or `tf.data.Dataset.map`. Call it outside, or use "
            "`advreg.gen_adv_neighbor` there."
        )


def check_one_batch(x: Any, name: str = "perturb_on_batch") -> None:
    """Checks that `x` is one batch, and not a dataset of them.

    Args:
        x: The argument.
        name: Name of the function that it is passed to.

    Raises:
        TypeError: It is a dataset.
    """
    if backend.is_dataset(x) or isinstance(x, keras.utils.PyDataset):
        raise TypeError(
            "`x` must be one batch. Loop over a dataset: `for x, y in dataset: "
            f"model.{name}(x, y)`. Received: {type(x).__name__}"
        )


def _run(
    request: Request,
    model: keras.Model,
    features: Features,
    labels: Any,
    weights: Any,
    config: AdvNeighborConfig,
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor, Tensor]:
    """Runs `_perturbed`, compiled once for batches of any length and any numbers."""
    settings = Settings.of(config, request.iteration)
    batch = {"features": features, "labels": labels}
    if weights is not None:
        batch["weights"] = weights
    numbers = _numbers(settings)
    fixed = settings._replace(**dict.fromkeys(_NUMBERS))  # type: ignore[arg-type]

    def function(batch: dict[str, Any], numbers: dict[str, Any]) -> Any:
        return _perturbed(
            request,
            batch["features"],
            batch["labels"],
            batch.get("weights"),
            config,
            fixed._replace(**numbers),
        )

    cache, network = backend.functions_of(model), request.network
    names = cache.fact(
        ("unperturbed integers", repr(backend.signature_of(features))),
        lambda: network.unperturbed_integers(features),
    )
    if names:
        cache.warn_once(unperturbed_integers_message(names), stacklevel=5)
    if request.run_eagerly:
        return function(batch, numbers)
    losses = request.loss.container
    compiled = cache.compiled(
        (
            *("perturb_on_batch", fixed, config.perturb, config.relative),
            *(id(losses), request.jit_compile),
        ),
        function,
        (batch,),
        constants=(numbers,),
        takes=lambda specs: cache.takes_sizes(
            network.predict, specs["features"], features
        ),
        keep=losses,
        jit_compile=request.jit_compile,
        # Rows of padding would count in the loss, which is one of the whole batch, and
        # among the values that are missing.
        pads=False,
    )
    return compiled(batch, numbers)


def _perturbed(
    request: Request,
    features: Features,
    labels: Any,
    weights: Any,
    config: AdvNeighborConfig,
    settings: Settings,
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor, Tensor]:
    """Perturbs features, or outputs of layers.

    Returns:
        The perturbed leaves by their numbers, the displacements of outputs of layers, a
        `DataSummary` of the features, and whether every gradient is NaN.
    """
    network = request.network
    base, fixed = network.base, network.form.fixed_keys
    floats = as_floats(features, fixed, base)
    space = AttackSpace(base, config, floats, fixed)
    precision = Precision(base, floats)

    def forward(features: Features) -> Any:
        return network.forward(
            features,
            training=False,
            floats=True,
            for_input_gradient=not request.jit_compile,
        )

    def loss_at(features: Any) -> Tensor:
        with backend.StatelessScope():
            with space.at(features) as x:
                y_pred = forward(x)
            return request.loss.labeled(labels, y_pred, weights)

    def gradient_at(features: Features) -> Gradients:
        return input_gradients(loss_at, features, wanted, precision)

    if space.has_layers:
        with backend.StatelessScope(), space.recording():
            forward(floats)
    start, wanted = space.start(), space.wanted()
    gradients, seen = gradient_at(start), []

    def inspect(ball: Ball) -> None:
        seen.extend([summarize(ball), ball.all_gradients_nan(gradients)])

    with naming_embeddings(base):
        perturbed = perturb(
            start,
            gradients,
            gradient_at,
            space.settings(settings),
            request.seed,
            space.can_move(weights),
            inspect=inspect,
        )
    if space.has_layers:
        return {}, space.displacements(perturbed), *seen
    leaves = zip(tree.flatten(perturbed), gradients, strict=True)
    moved = {str(i): leaf for i, (leaf, g) in enumerate(leaves) if g is not None}
    return moved, {}, *seen


def _check_data(
    config: AdvNeighborConfig,
    summary: Tensor,
    has_no_gradient: Tensor,
    features: Features,
) -> None:
    """Checks the units of a batch, and that not every gradient is NaN."""
    data = DataSummary(*ops.convert_to_numpy(summary))
    check_units(data, NormType(config.adv_grad_norm), *config.stated_radius)
    if data.missing:
        warn_of_missing(f"{data.missing:.0f}", stacklevel=5)
    if has_no_gradient:
        raise ValueError(
            "The gradient of the loss must be known somewhere, and it is NaN for every "
            "value that could move: check that `x`, the weights and the loss are "
            "finite, and in half precision that no layer overflows. Received: "
            f"{describe(features)}"
        )


def _override(
    config: AdvNeighborConfig, overrides: dict[str, Any]
) -> AdvNeighborConfig:
    names = [field.name for field in dataclasses.fields(AdvNeighborConfig)]
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise TypeError(
            "Overrides of `perturb_on_batch` and `displace_on_batch` must be fields of "
            f"`AdvNeighborConfig`: {names}. Received: {unknown}"
        )
    return dataclasses.replace(config, **overrides)


def _build(
    request: Request, model: keras.Model, features: Features, labels: Any
) -> None:
    """Builds the base model and the container of losses, if that is still to do."""
    network = request.network
    with backend.creation_scope(model):
        if not network.base.built:
            network.forward(features, training=False)
        request.loss.build(labels, lambda: network.forward(features, training=False))


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


def _numbers(settings: Settings) -> dict[str, Any]:
    """Converts the numbers of the settings to tensors, by their names."""

    def convert(value: Any) -> Any:
        return tree.map_structure(
            lambda leaf: (
                None
                if leaf is None
                else ops.convert_to_tensor(leaf, backend.widest_float())
            ),
            value,
        )

    found = {name: convert(getattr(settings, name)) for name in _NUMBERS}
    return {name: value for name, value in found.items() if value is not None}
