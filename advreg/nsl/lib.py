"""`nsl.lib`: the functions of Neural Structured Learning, by advreg's arithmetic.

NSL's functions take a tensor or a structure of tensors. `_on_rows` packs them into a
matrix, calls a function of `perturbation.geometry`, and unpacks the result.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Schedule, Tensor
from advreg.checks import describe, describe_value
from advreg.config.configs import AdvNeighborConfig
from advreg.config.norms import NormType
from advreg.nsl._absent import GRAPHS, absent
from advreg.nsl._distances import (
    jensen_shannon_divergence,
    kl_divergence,
    pairwise_distance_wrapper,
)
from advreg.nsl.configs import (
    AdvTargetConfig,
    AdvTargetType,
    DecayConfig,
    DecayType,
    VirtualAdvConfig,
)
from advreg.perturbation import geometry
from advreg.perturbation.packing import NothingMovesError, Packing
from advreg.training import custom_loops

if TYPE_CHECKING or backend.BACKEND == "tensorflow":
    from advreg.nsl import _tensorflow as native
else:
    from advreg.nsl import _elsewhere as native

__all__ = [
    "adv_regularizer",
    "apply_feature_mask",
    "decay_over_time",
    "gen_adv_neighbor",
    "get_target_indices",
    "jensen_shannon_divergence",
    "kl_divergence",
    "maximize_within_unit_norm",
    "normalize",
    "pairwise_distance_wrapper",
    "project_to_ball",
    "random_in_norm_ball",
    "virtual_adv_regularizer",
]

# Programs also use the functions by the names of NSL's inner modules.
adversarial_neighbor = distances = regularizer = utils = sys.modules[__name__]

Norm: TypeAlias = NormType | str | float

__getattr__ = absent(
    __name__,
    {
        "GenNeighbor": "it was an abstract class without behaviour. Write a function",
        "replicate_embeddings": GRAPHS,
        "strip_neighbor_features": GRAPHS,
        "unpack_neighbor_features": GRAPHS,
    },
)


def gen_adv_neighbor(
    input_features: Features,
    labeled_loss: Tensor | Callable[[Features], Tensor],
    config: AdvNeighborConfig,
    raise_invalid_gradient: bool = False,
    gradient_tape: Any = None,
    pgd_model_fn: Callable[[Features], Any] | None = None,
    pgd_loss_fn: Callable[[Any, Any], Tensor] | None = None,
    pgd_labels: Any = None,
    use_while_loop: bool = False,
) -> tuple[Features, Tensor]:
    """Generates the adversarial neighbour of each example.

    It is `advreg.gen_adv_neighbor`, with one difference: if nothing can be perturbed,
    it warns and returns the features, unless `raise_invalid_gradient` is set. See
    `advreg.gen_adv_neighbor` for the arguments.

    Returns:
        The perturbed features, and the weight of each neighbour, ones of shape
        `[batch, 1]` in float32.

    Raises:
        TypeError, ValueError: See `advreg.gen_adv_neighbor`.

    Example:
    >>> neighbor, _ = nsl.lib.gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    """
    try:
        return custom_loops.gen_adv_neighbor(
            input_features,
            labeled_loss,
            config,
            raise_invalid_gradient,
            gradient_tape,
            pgd_model_fn,
            pgd_loss_fn,
            pgd_labels,
            use_while_loop,
        )
    except NothingMovesError as error:
        if raise_invalid_gradient:
            raise
        warnings.warn(str(error), stacklevel=2)
        batch = backend.num_rows(tree.flatten(input_features)[0])
        return input_features, ops.ones((batch, 1), "float32")


def normalize(tensor: Tensor, norm_type: Norm, epsilon: float = 1e-6) -> Tensor:
    """Divides each example by its norm.

    Args:
        tensor: Float tensor whose first axis is the batch.
        norm_type: The norm, taken over all other axes.
        epsilon: Lower limit of the divisor.

    Returns:
        Tensor of the shape and dtype of `tensor`.
    """
    norm_type = NormType(norm_type)

    def divide(rows: Tensor) -> Tensor:
        if norm_type is NormType.L2:
            norm = geometry.l2_norm(rows)
        else:
            total = ops.sum if norm_type is NormType.L1 else ops.max
            norm = total(ops.abs(rows), axis=1, keepdims=True)
        return rows / ops.maximum(norm, epsilon)

    return _on_rows(divide, tensor)


def project_to_ball(
    tensors: Features, radius: float, norm_type: Norm, epsilon: float = 1e-6
) -> Features:
    """Projects each example onto a ball around the origin.

    Args:
        tensors: A float tensor, or a structure of them, whose first axis is the batch.
        radius: Radius of the ball.
        norm_type: The norm of the ball, joint over all tensors.
        epsilon: Has no effect, because the projection divides by no small number. It is
            accepted for callers of Neural Structured Learning.

    Returns:
        The structure of `tensors`, of the same shapes and dtypes.
    """
    del epsilon
    norm_type = NormType(norm_type)
    return _on_rows(lambda rows: geometry.project(rows, radius, norm_type), tensors)


def random_in_norm_ball(
    tensor_structure: Features, radius: float, norm_type: Norm
) -> Features:
    """Draws each example uniformly from a ball around the origin.

    It draws from Keras's global generator, which `keras.utils.set_random_seed` seeds.

    Args:
        tensor_structure: A float tensor, or a structure of them, whose first axis is
            the batch. Only its shapes and dtypes are used.
        radius: Radius of the ball.
        norm_type: The norm of the ball, joint over all tensors.

    Returns:
        The structure of `tensor_structure`, of the same shapes and dtypes.

    Raises:
        ValueError: A tensor is not of floats, or the batches differ in size.
    """
    norm_type = NormType(norm_type)

    def draw(rows: Tensor) -> Tensor:
        dtype = keras.backend.standardize_dtype(rows.dtype)
        return radius * geometry.sample_unit_ball(
            tuple(ops.shape(rows)), norm_type, dtype=dtype
        )

    return _on_rows(draw, tensor_structure)


def maximize_within_unit_norm(
    weights: Features, norm_type: Norm, epsilon: float = 1e-6
) -> Features:
    """Solves `max ⟨weights, d⟩ subject to ‖d‖ ≤ 1` for each example.

    Args:
        weights: A float tensor, or a structure of them, whose first axis is the batch.
        norm_type: The norm, joint over all tensors.
        epsilon: Has no effect, because the solution does not change when the weights
            are scaled, however small they are. It is accepted for callers of Neural
            Structured Learning.

    Returns:
        The structure of `weights`, of the same shapes and dtypes.
    """
    del epsilon
    norm_type = NormType(norm_type)
    return _on_rows(
        lambda rows: geometry.steepest_direction(geometry.make_finite(rows), norm_type),
        weights,
    )


def apply_feature_mask(features: Tensor, feature_mask: Tensor | None = None) -> Tensor:
    """Multiplies features by a mask.

    Args:
        features: Float tensor.
        feature_mask: Weights in [0, 1] that broadcast to `features`, or `None`.

    Returns:
        Tensor of the shape and dtype of `features`.

    Raises:
        tf.errors.InvalidArgumentError: A weight is not in [0, 1]. On JAX and PyTorch
            that is a `ValueError`.
    """
    if feature_mask is None:
        return features
    mask = ops.cast(backend.to_tensor(feature_mask), features.dtype)
    with native.unit_interval("feature_mask", mask):
        return features * mask


def get_target_indices(
    logits: Tensor, labels: Tensor, adv_target_config: AdvTargetConfig
) -> Tensor:
    """Chooses the class that a targeted attack aims at.

    Args:
        logits: Float tensor of shape `[batch, classes]`.
        labels: Integer tensor of shape `[batch]`.
        adv_target_config: An `AdvTargetConfig`.

    Returns:
        Integer tensor of shape `[batch]`: in int32, or the labels themselves.
    """
    method = AdvTargetType(adv_target_config.target_method)
    if method is AdvTargetType.SECOND:
        return ops.cast(ops.top_k(logits, k=2)[1][:, 1], "int32")
    if method is AdvTargetType.LEAST:
        return native.argmin(logits)
    if method is AdvTargetType.RANDOM:
        return native.random_targets(logits, int(adv_target_config.random_seed))
    return labels


def decay_over_time(
    global_step: Tensor | int, decay_config: DecayConfig, init_value: Any = 1.0
) -> Tensor:
    """Decays a value over the steps of training.

    Args:
        global_step: Number of steps taken.
        decay_config: A `DecayConfig`.
        init_value: The value at step 0.

    Returns:
        Scalar float32 tensor.
    """
    times = _float32(global_step) / _float32(decay_config.decay_steps)
    rate = _float32(decay_config.decay_rate)
    kind = DecayType(decay_config.decay_type)
    if kind is DecayType.EXPONENTIAL_DECAY:
        factor = rate**times
    elif kind is DecayType.INVERSE_TIME_DECAY:
        factor = 1.0 / (1.0 + rate * times)
    else:
        factor = ops.exp(-rate * times)
    decayed = _float32(init_value) * factor
    return ops.maximum(decayed, _float32(decay_config.min_value))


def _float32(value: Any) -> Tensor:
    return ops.cast(backend.to_tensor(value), "float32")


def adv_regularizer(
    adv_neighbors: Tensor,
    target_scores: Tensor,
    model_fn: Callable[..., Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Computes the loss at adversarial neighbours.

    Args:
        adv_neighbors: Float tensor whose first axis is the batch.
        target_scores: The targets that `loss_fn` receives.
        model_fn: Function of the neighbours, with the keyword arguments `is_train`, a
            tensor that is false, and `reuse`, which is `True`.
        loss_fn: Function `(targets, predictions) -> loss`.

    Returns:
        The result of `loss_fn`.
    """
    predictions = model_fn(
        adv_neighbors, is_train=ops.convert_to_tensor(False), reuse=True
    )
    return loss_fn(target_scores, predictions)


def virtual_adv_regularizer(
    input_layer: Tensor,
    embedding_fn: Callable[[Tensor], Tensor],
    virtual_adv_config: VirtualAdvConfig,
    embedding: Tensor | None = None,
) -> Tensor:
    """Computes the virtual adversarial loss, which needs no labels.

    It is the distance between the embedding of an input and that of a neighbour. The
    neighbour lies in the direction that changes the embedding most, found by power
    iterations from a random one
    ([Miyato et al., 2018](https://arxiv.org/abs/1704.03976)).

    Args:
        input_layer: Float tensor whose first axis is the batch.
        embedding_fn: Function from inputs to embeddings.
        virtual_adv_config: A `VirtualAdvConfig`.
        embedding: `embedding_fn(input_layer)`, where it is known already.

    Returns:
        The distance, a scalar unless the reduction is `NONE`. Its gradient goes through
        the neighbour alone.

    Raises:
        TypeError: `input_layer` is not one float tensor, or the step is a schedule.
        ValueError: The embedding does not depend on the input.
    """
    input_layer = _one_float_tensor(input_layer)
    step = virtual_adv_config.adv_neighbor_config.adv_step_size
    if isinstance(step, Schedule):
        raise TypeError(
            "`adv_step_size` must be a number here: there is no optimizer to count "
            "steps. Pass `float(schedule(optimizer.iterations))`. Received: "
            f"{describe_value(step)}"
        )
    if embedding is None:
        embedding = embedding_fn(input_layer)
    direction = native.normal_like(input_layer)
    return _virtual_adv_regularizer(
        input_layer, embedding_fn, virtual_adv_config, embedding, direction
    )


def _virtual_adv_regularizer(
    input_layer: Tensor,
    embedding_fn: Callable[[Tensor], Tensor],
    virtual_adv_config: VirtualAdvConfig,
    embedding: Tensor,
    seed_perturbation: Tensor,
) -> Tensor:
    """Computes the virtual adversarial loss from a given first direction."""
    config = virtual_adv_config.adv_neighbor_config

    def unit(direction: Tensor) -> Tensor:
        masked = apply_feature_mask(direction, config.feature_mask)
        return normalize(masked, config.adv_grad_norm)

    def distance(embedding: Tensor, moved: Tensor) -> Tensor:
        neighbor = embedding_fn(input_layer + moved)
        return pairwise_distance_wrapper(
            embedding, neighbor, distance_config=virtual_adv_config.distance_config
        )

    def of_moved(moved: list[Tensor]) -> tuple[Tensor, None]:
        with native.passes():
            return distance(embedding, moved[0]), None

    direction = unit(seed_perturbation)
    for _ in range(virtual_adv_config.num_approx_steps):
        moved = virtual_adv_config.approx_difference * direction
        _, _, (gradient,) = backend.differentiate(of_moved, [moved])
        if gradient is None:
            raise ValueError(
                "`embedding_fn` must return a tensor that depends on its input by "
                "operations that have a gradient."
            )
        gradient = ops.cast(unit(geometry.make_finite(gradient)), gradient.dtype)
        direction = ops.stop_gradient(gradient)
    return distance(ops.stop_gradient(embedding), config.adv_step_size * direction)


def _one_float_tensor(value: Any) -> Tensor:
    """Converts a value to one float tensor.

    Raises:
        TypeError: It is a structure, or of another type.
    """
    if tree.is_nested(value):
        raise TypeError(
            "`input_layer` must be one tensor: concatenate features, or perturb one "
            f"and let `embedding_fn` add the others. Received: {describe(value)}"
        )
    tensor = backend.to_tensor(value)
    is_dense = backend.is_tensor(tensor)
    if not (is_dense and keras.backend.is_float_dtype(tensor.dtype)):
        raise TypeError(
            f"`input_layer` must be a dense float tensor. Received: {describe(value)}"
        )
    return tensor


def _on_rows(function: Callable[[Tensor], Tensor], tensors: Features) -> Features:
    """Applies a function of a matrix to tensors, joined example by example.

    Args:
        function: Function of a matrix `[batch, values]` that returns one of that shape.
        tensors: A float tensor, or a structure of them.

    Returns:
        The structure of `tensors`.
    """
    tensors = tree.map_structure(backend.to_tensor, tensors)
    leaves = tree.flatten(tensors)
    if not leaves:
        return tensors
    if not all(keras.backend.is_float_dtype(leaf.dtype) for leaf in leaves):
        raise ValueError(
            "All tensors must be of floats. Received: "
            f"{[backend.dtype_name(leaf) for leaf in leaves]}"
        )
    if len({leaf.shape[0] for leaf in leaves} - {None}) > 1:
        raise ValueError(
            "The first dimension, the batch, must be the same for all tensors. "
            f"Received shapes: {[tuple(leaf.shape) for leaf in leaves]}"
        )
    packing = Packing(tensors, [True] * len(leaves))
    return packing.unpack(function(packing.pack(leaves)))
