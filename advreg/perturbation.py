"""The perturbation loop of training: start, ascend, project, clip.

`perturb` is all of it. Training, `perturb_on_batch` and custom training loops call it;
they differ in where the gradients come from.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from advreg.ball import Ball, Settings
from advreg.config import AdvNeighborConfig, AdvRegConfig, check_adv_config
from advreg.geometry import Tensor
from advreg.movable import movable
from advreg.objectives import LabeledLoss
from advreg.packing import Features, Gradients, NothingMovesError, describe


def perturb(
    features: Features,
    gradients: Gradients,
    gradient_at: Callable[[Features], Gradients],
    settings: Settings,
    seed: keras.random.SeedGenerator | None = None,
    flags: Sequence[Tensor | None] | None = None,
    unroll: bool = False,
) -> Features:
    """Moves each example where its loss grows, inside the ball and the range.

    Solves `max loss(x + d) subject to ‖d‖ ≤ pgd_epsilon, clip_value_min ≤ x + d ≤
    clip_value_max` by projected steepest ascent over all features that have a gradient,
    from `x` itself or from a random point of the ball. The working state is the
    displacement `d`, in float32 at least. Where a gradient or an input is not finite,
    the input stays what it is.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        gradients: The gradient of the loss with respect to each leaf of `features`, in
            the order of `keras.tree.flatten`; `None` for a leaf that is not to move.
        gradient_at: Function that returns the same for other features of the same
            structure. It is called once per iteration after the first, and for the
            first one too after a random start.
        settings: The hyperparameters.
        seed: Where a random start draws from: Keras's global generator if `None`.
        flags: For each leaf, `None` or a boolean tensor that broadcasts to it: where
            it is false, nothing moves. `advreg.movable.movable` makes them.
        unroll: Whether to repeat the iterations in the graph, in place of a loop, for
            replicas cannot speak to each other in a loop.

    Returns:
        Features in the structure, shapes and dtypes of `features`.

    Raises:
        ValueError: No feature has a gradient, or a mask or range does not fit.
    """
    ball = Ball(
        features,
        [gradient is not None for gradient in gradients],
        settings.adv_grad_norm,
        settings.pgd_epsilon,
        feature_mask=settings.feature_mask,
        clip_value_min=settings.clip_value_min,
        clip_value_max=settings.clip_value_max,
        flags=flags,
    )

    def ascend(displacement: Tensor, gradients: Gradients) -> Tensor:
        gradient = ball.gradient(gradients)
        return ball.ascend(displacement, gradient, settings.adv_step_size)

    def iterate(displacement: Tensor) -> Tensor:
        return ascend(displacement, gradient_at(ball.perturbed(displacement)))

    def turn(displacement: Tensor) -> Tensor:
        gradient = ball.gradient(gradient_at(ball.perturbed(displacement)))
        return ball.ascend(ball.zero(), gradient, settings.init_radius)

    repeat = functools.partial(_repeat, unroll=unroll)
    if settings.random_init:
        radii = (settings.init_radius, settings.pgd_epsilon, settings.adv_step_size)
        displacement = ball.random(seed, next(r for r in radii if r is not None))
        displacement = repeat(turn, settings.power_iterations, displacement)
        remaining = settings.pgd_iterations
    else:
        displacement = ascend(ball.zero(), gradients)
        remaining = settings.pgd_iterations - 1
    displacement = repeat(iterate, remaining, ops.stop_gradient(displacement))
    return ball.perturbed(ops.stop_gradient(displacement))


def differentiable(features: Features, fixed: Sequence[str] = ()) -> list[bool]:
    """Tells for each leaf whether a gradient can be taken with respect to it.

    Dense float tensors can; integers, strings, ragged and sparse tensors cannot.

    Args:
        features: A nested structure.
        fixed: Keys of a dictionary of features that must not move.
    """
    return [
        isinstance(leaf, tf.Tensor)
        and leaf.dtype.is_floating
        and not (path and path[0] in fixed)
        for path, leaf in tree.flatten_with_path(features)
    ]


def input_gradients(
    loss_at: Callable[[Features], Tensor], features: Features, wanted: Sequence[bool]
) -> Gradients:
    """Returns the gradient of `loss_at` for each wanted leaf, `None` for the others."""
    watched = select(features, wanted)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        loss = loss_at(features)
    return align(tape.gradient(loss, watched), wanted)


def select(features: Features, wanted: Sequence[bool]) -> list[Tensor]:
    """Returns the wanted leaves."""
    return list(itertools.compress(tree.flatten(features), wanted))


def to_tensor(leaf: Any) -> Any:
    """Makes a tensor of an array or a variable; `None` and tensors stay."""
    if leaf is None or isinstance(leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
        return leaf
    return tf.convert_to_tensor(leaf)


def align(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    """Puts the gradients of the wanted leaves in their places, `None` elsewhere."""
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]


def gen_adv_neighbor(
    input_features: Features,
    labeled_loss: Tensor,
    config: AdvNeighborConfig,
    raise_invalid_gradient: bool = False,
    gradient_tape: tf.GradientTape | None = None,
    pgd_model_fn: Callable[[Features], Any] | None = None,
    pgd_loss_fn: Callable[[Any, Any], Tensor] | None = None,
    pgd_labels: Any = None,
    use_while_loop: bool = False,
) -> tuple[Features, Tensor]:
    """Generates the adversarial neighbour of each example, for custom training loops.

    Args:
        input_features: A tensor, or a nested structure of tensors, whose first axis is
            the batch. Dense float tensors that the loss depends on are perturbed,
            everything else comes back as it is.
        labeled_loss: Float tensor, the loss at `input_features`.
        config: An `AdvNeighborConfig` without schedules.
        raise_invalid_gradient: Whether a leaf that cannot be perturbed is an error.
        gradient_tape: The `tf.GradientTape` that watched `input_features` while
            `labeled_loss` was computed. It may be left out inside a `tf.function`.
        pgd_model_fn: Function from features to predictions. Needed for more than one
            iteration and for random starts. Variables of Keras layers that it updates
            keep their values.
        pgd_loss_fn: Function `(labels, predictions) -> loss`, needed with
            `pgd_model_fn`.
        pgd_labels: The labels to hand to `pgd_loss_fn`.
        use_while_loop: Accepted for callers of Neural Structured Learning. The
            iterations always are one `tf.while_loop`, with the same result.

    Returns:
        The perturbed features, in the structure of `input_features`, and the weight of
        each neighbour, ones of shape `[batch, 1]` in float32.

    Raises:
        TypeError: `config` is not an `AdvNeighborConfig`.
        ValueError: There is no gradient to follow, an argument that the configuration
            needs is missing, or a mask or range does not fit.

    Example:
    >>> with tf.GradientTape() as tape:
    ...     tape.watch(x)
    ...     loss = loss_fn(y, model(x))
    >>> neighbor, _ = gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    """
    del use_while_loop
    neighbor, batch = _neighbor(
        input_features,
        labeled_loss,
        config,
        gradient_tape,
        pgd_model_fn,
        pgd_loss_fn,
        pgd_labels,
        raise_invalid_gradient=raise_invalid_gradient,
    )
    return neighbor, tf.ones([batch, 1])


def _neighbor(
    input_features: Features,
    labeled_loss: Tensor,
    config: AdvNeighborConfig,
    gradient_tape: tf.GradientTape | None,
    pgd_model_fn: Callable[[Features], Any] | None,
    pgd_loss_fn: Callable[[Any, Any], Tensor] | None,
    pgd_labels: Any,
    raise_invalid_gradient: bool = False,
    flags: Sequence[Tensor | None] | None = None,
) -> tuple[Features, Tensor]:
    """Returns what `gen_adv_neighbor` does, and the batch size.

    Args: as its own, and `flags` as of `perturb`.
    """
    if not isinstance(config, AdvNeighborConfig):
        raise TypeError(
            "`config` must be an `AdvNeighborConfig`, such as the "
            "`adv_neighbor_config` of an `AdvRegConfig`. Received: "
            f"{config!r} (of type {type(config).__name__})"
        )
    settings = Settings.of(config)
    needs_model = settings.pgd_iterations > 1 or settings.random_init
    if needs_model and (pgd_model_fn is None or pgd_loss_fn is None):
        raise ValueError(
            "`pgd_model_fn` and `pgd_loss_fn` are needed where `pgd_iterations` is "
            "above 1 or `random_init` is set: the gradient must be taken at perturbed "
            f"inputs. Received: pgd_iterations={settings.pgd_iterations}, "
            f"random_init={settings.random_init}, pgd_model_fn={pgd_model_fn}, "
            f"pgd_loss_fn={pgd_loss_fn}"
        )
    wanted = differentiable(input_features)
    gradients = align(
        _loss_gradient(labeled_loss, select(input_features, wanted), gradient_tape),
        wanted,
    )
    if all(gradient is None for gradient in gradients):
        raise NothingMovesError(
            "Nothing can be perturbed: `labeled_loss` has no gradient with respect to "
            "`input_features`. They must be dense float tensors, not NumPy arrays, "
            "that the loss depends on and that `gradient_tape` watched before the "
            f"forward pass (`tape.watch`). Received: {describe(input_features)}"
        )
    if raise_invalid_gradient and any(gradient is None for gradient in gradients):
        names = _name_leaves(input_features, [g is None for g in gradients])
        raise ValueError(
            f"Cannot perturb the features {names}, and `raise_invalid_gradient` is "
            "set: they are not dense floats, or the loss does not depend on them. "
            f"Received: {describe(input_features)}"
        )

    def loss_at(features: Features) -> Tensor:
        # Never reached without the functions: `needs_model` has seen to it.
        with keras.StatelessScope():
            return pgd_loss_fn(pgd_labels, pgd_model_fn(features))  # type: ignore[misc]

    moving = [gradient is not None for gradient in gradients]
    neighbor = perturb(
        input_features,
        gradients,
        lambda features: input_gradients(loss_at, features, moving),
        settings,
        flags=flags,
    )
    return neighbor, tf.shape(select(input_features, moving)[0])[0]


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

    Works in eager code and inside `tf.function`. The perturbation is a constant to an
    outer tape. State that the model updates while the attack looks for a gradient is
    discarded; the final pass updates it as any forward pass does.

    In eager code an outer tape records the attack as well, and memory grows with the
    iterations. Inside a `tf.function` it does not.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        labels: The labels to hand to `loss_fn`.
        model: Callable from features to predictions, such as a `keras.Model`.
        loss_fn: Callable `(labels, predictions)`, and a third argument where
            `sample_weights` are given, such as a `keras.losses.Loss`.
        sample_weights: Weights of the examples, as `loss_fn` takes them.
        adv_config: An `AdvRegConfig`, by default `AdvRegConfig()`, whose objective is
            the labelled loss. Weights are the caller's to apply, and to perturb:
            `multiplier(optimizer.iterations)` if a schedule.
        predictions: `model(features)`, where it is known already.
        labeled_loss: `loss_fn(labels, model(features))`, where it is known already.
        gradient_tape: The `tf.GradientTape` that watched `features` while these were
            computed. Needed with them in eager code.
        model_kwargs: Further keyword arguments of `model`, such as `training`.

    Returns:
        The loss at the perturbed features, as `loss_fn` gives it.

    Raises:
        TypeError: `adv_config` is not an `AdvRegConfig`, or `loss_fn` not callable.
        ValueError: There is no gradient to follow, a mask or range does not fit, or
            the objective is another one.

    Example:
    >>> with tf.GradientTape() as tape:
    ...     with tf.GradientTape() as input_tape:
    ...         input_tape.watch(x)
    ...         loss = loss_fn(y, model(x))
    ...     loss += 0.2 * adversarial_loss(
    ...         x, y, model, loss_fn, adv_config=config, labeled_loss=loss,
    ...         gradient_tape=input_tape)
    >>> gradients = tape.gradient(loss, model.trainable_variables)
    """
    adv_config = check_adv_config(adv_config)
    if adv_config.objective != LabeledLoss():
        raise ValueError(
            "`adv_config` must have the objective 'labeled_loss' in a custom loop: "
            "`AdversarialRegularization` trains with the others. Received: objective="
            f"{adv_config.objective!r}"
        )
    if not callable(loss_fn):
        raise TypeError(
            "`loss_fn` must be callable, such as a `keras.losses.Loss`; "
            f"`keras.losses.get` makes one of a name. Received: {loss_fn!r}"
        )
    known = predictions is not None or labeled_loss is not None
    if known and gradient_tape is None and tf.executing_eagerly():
        raise ValueError(
            "`gradient_tape` is needed in eager code where `predictions` or "
            "`labeled_loss` are given: pass the `tf.GradientTape` that watched "
            "`features` while they were computed. Received: gradient_tape=None"
        )
    base_model = model if isinstance(model, keras.Model) else None
    model = functools.partial(model, **(model_kwargs or {}))
    weights = () if sample_weights is None else (sample_weights,)

    def loss_of(labels: Any, predictions: Any) -> Tensor:
        return loss_fn(labels, predictions, *weights)

    if not known and gradient_tape is None:
        features = tree.map_structure(to_tensor, features)
        gradient_tape = tf.GradientTape()
    if labeled_loss is None:
        with _recording(gradient_tape):
            if gradient_tape is not None:
                gradient_tape.watch(select(features, differentiable(features)))
            if predictions is None:
                predictions = model(features)
            labeled_loss = loss_of(labels, predictions)
    neighbor, _ = _neighbor(
        features,
        labeled_loss,
        adv_config.adv_neighbor_config,
        gradient_tape,
        model,
        loss_of,
        labels,
        flags=movable(features, sample_weights, base_model),
    )
    return loss_of(labels, model(neighbor))


def _repeat(
    function: Callable[[Tensor], Tensor], times: int, value: Tensor, unroll: bool
) -> Tensor:
    """Applies a function again and again.

    In a loop, unless told otherwise, whose memory does not grow with `times`.
    """
    if unroll or times <= 1 or tf.executing_eagerly():
        for _ in range(times):
            value = function(value)
        return value
    # TensorFlow inlines the body of a loop, and oneDNN, which then meets a cycle,
    # may keep slow kernels in it (seen on MaxPoolGrad in TensorFlow 2.21: half as slow
    # again, at random). As a function of its own the body is optimised as it should be.
    body = tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    )
    (value,) = tf.while_loop(
        lambda _: True,
        lambda value: (body(value),),
        (value,),
        maximum_iterations=times,
    )
    return value


def _loss_gradient(
    loss: Tensor, leaves: list[Tensor], tape: tf.GradientTape | None
) -> Sequence[Tensor]:
    """The gradient of a loss that is computed already."""
    if tape is None:
        if tf.executing_eagerly():
            raise ValueError(
                "`gradient_tape` is needed in eager code: pass the `tf.GradientTape` "
                "that watched `input_features` while `labeled_loss` was computed. "
                "Received: gradient_tape=None"
            )
        return tf.gradients(loss, leaves)
    # TensorFlow says whether a tape is recording or persistent by raising too late.
    if not getattr(tape, "_recording", False):
        return tape.gradient(loss, leaves)
    if not getattr(tape, "_persistent", True):
        raise ValueError(
            "`gradient_tape` is still recording. Leave its `with` block first, or make "
            "it with `persistent=True`. Received: a recording, non-persistent tape"
        )
    with tape.stop_recording():
        return tape.gradient(loss, leaves)


def _recording(tape: tf.GradientTape | None) -> Any:
    """Lets a tape record, unless there is none or it is recording already."""
    if tape is None or getattr(tape, "_recording", False):
        return contextlib.nullcontext()
    return tape


def _name_leaves(features: Features, chosen: Sequence[bool]) -> list[str]:
    paths = [path for path, _ in tree.flatten_with_path(features)]
    return [
        ".".join(str(key) for key in path) or "the input"
        for path, choose in zip(paths, chosen, strict=True)
        if choose
    ]
