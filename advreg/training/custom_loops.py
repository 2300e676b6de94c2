"""`adversarial_loss` and `gen_adv_neighbor`, for training loops of the user's own.

The names and arguments are those of Neural Structured Learning. There is no wrapper
here, and no compiled loss: the caller brings a model and a loss function. On TensorFlow
the caller may bring the clean pass, too: with a tape that has recorded it, the gradient
at the clean features costs no other forward pass. For further iterations the model is
called again.

JAX and PyTorch have no tapes. There the loss is a function of the features, which gives
the gradient anywhere.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.checks import brief, describe, describe_value
from advreg.config.configs import AdvNeighborConfig, AdvRegConfig, check_adv_config
from advreg.network.gradients import align, differentiable, scaled_gradients, select
from advreg.network.last_activation import on_logits, recorded, warn_of_clipping
from advreg.network.masks import can_move
from advreg.network.precision import Precision
from advreg.objectives import LabeledLoss
from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Settings
from advreg.perturbation.packing import NothingMovesError, name_of


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
    """Generates the adversarial neighbour of each example, for custom training loops.

    A neighbour is the example with perturbed features. The perturbation is a constant
    to a gradient that is taken around this function. What the attack changes in
    variables of Keras layers is discarded.

    With a function as `labeled_loss` it works in eager code, in a `tf.function` and in
    `jax.jit`. Random starts are not possible in `jax.jit`, because they draw from a
    generator of Keras.

    Args:
        input_features: A tensor, or a nested structure of tensors, whose first axis is
            the batch. Dense float tensors that the loss depends on are perturbed,
            everything else is returned unchanged.
        labeled_loss: Function from features to the loss, a float tensor. On TensorFlow
            also the loss at `input_features` itself, with a `gradient_tape`.
        config: An `AdvNeighborConfig` without schedules.
        raise_invalid_gradient: Whether a leaf that cannot be perturbed is an error.
        gradient_tape: For a tensor as `labeled_loss`, the `tf.GradientTape` that
            watched `input_features` while it was computed. It may be left out inside a
            `tf.function`.
        pgd_model_fn: For a tensor as `labeled_loss`, a function from features to
            predictions. Needed for more than one iteration and for random starts. With
            a function as `labeled_loss`, a `keras.Model` here only says which layers
            compute in half precision.
        pgd_loss_fn: Function `(labels, predictions) -> loss`, needed with
            `pgd_model_fn` for a tensor as `labeled_loss`.
        pgd_labels: The labels that `pgd_loss_fn` receives.
        use_while_loop: Has no effect. It is accepted for callers of Neural Structured
            Learning. In a graph the iterations always are one loop, with the same
            result.

    Returns:
        The perturbed features, in the structure of `input_features`, and the weight of
        each neighbour, ones of shape `[batch, 1]` in float32.

    Raises:
        TypeError: `config` is not an `AdvNeighborConfig`, or `labeled_loss` is a tensor
            on JAX or PyTorch.
        ValueError: No feature has a gradient, an argument that the configuration needs
            is missing, or a mask or range does not fit; `gradient_tape` is given where
            there are no tapes, or beside a function; or a random start is wanted inside
            `jax.jit`.

    Example:
    >>> neighbor, _ = gen_adv_neighbor(x, lambda x: loss_fn(y, model(x)), config)

    With a tape, on TensorFlow:
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
        base_model=pgd_model_fn,
    )
    return neighbor, ops.ones((batch, 1), "float32")


def _neighbor(
    input_features: Features,
    labeled_loss: Any,
    config: AdvNeighborConfig,
    gradient_tape: Any,
    pgd_model_fn: Callable[[Features], Any] | None,
    pgd_loss_fn: Callable[[Any, Any], Tensor] | None,
    pgd_labels: Any,
    raise_invalid_gradient: bool = False,
    can_move: Sequence[Tensor | None] | None = None,
    base_model: Any = None,
) -> tuple[Features, Tensor]:
    """Generates adversarial neighbours, for both public functions.

    Args:
        input_features: See `gen_adv_neighbor`, as for all arguments but `can_move` and
            `base_model`.
        labeled_loss: The loss at `input_features`, or a function from features to it.
        config: An `AdvNeighborConfig`.
        gradient_tape: The tape that watched `input_features`, or `None`.
        pgd_model_fn: Function from features to predictions, or `None`.
        pgd_loss_fn: Function `(labels, predictions) -> loss`, or `None`.
        pgd_labels: The labels that `pgd_loss_fn` receives.
        raise_invalid_gradient: Whether a leaf that cannot be perturbed is an error.
        can_move: For each leaf, `None` or where it may be perturbed. See `perturb`.
        base_model: The model, which shows whether it computes in half precision.

    Returns:
        The perturbed features, and the batch size: a scalar tensor or a number.
    """
    if not isinstance(config, AdvNeighborConfig):
        raise TypeError(
            "`config` must be an `AdvNeighborConfig`, such as the "
            "`adv_neighbor_config` of an `AdvRegConfig`. Received: "
            f"{describe_value(config)}"
        )
    if config.perturbs_layers:
        raise ValueError(
            '`perturb` must be "inputs" in a custom loop, which perturbs the features '
            "that it gets. To perturb outputs of layers, train with "
            "`AdversarialRegularization`, or call `model.displace_on_batch` and "
            f"`advreg.displaced` of it. Received: perturb={config.perturb!r}"
        )
    settings = Settings.of(config)
    is_function = callable(labeled_loss)
    _check_tape(labeled_loss, gradient_tape)
    can_be_taken = is_function or (pgd_model_fn is not None and pgd_loss_fn is not None)
    if (settings.pgd_iterations > 1 or settings.random_init) and not can_be_taken:
        raise ValueError(
            "`pgd_model_fn` and `pgd_loss_fn` are needed where `pgd_iterations` is "
            "above 1 or `random_init` is set: the gradient must be taken at perturbed "
            f"inputs. Received: pgd_iterations={settings.pgd_iterations}, "
            f"random_init={settings.random_init}, pgd_model_fn={pgd_model_fn}, "
            f"pgd_loss_fn={pgd_loss_fn}"
        )
    seed = None
    if settings.random_init and backend.BACKEND == "jax":
        # Within the caller's scope the global generator would count for nothing, and
        # draw the same numbers in every call.
        seed = keras.random.SeedGenerator()
    if seed is not None and not backend.is_eager():
        raise ValueError(
            "`random_init` must be false inside `jax.jit`: the start is drawn by a "
            "generator of Keras, and compiled code would draw the same numbers in "
            "every call. Make the perturbation outside of it, by "
            "`gen_adv_neighbor`, or train with `AdversarialRegularization`. Received: "
            "random_init=True"
        )
    if is_function:
        input_features = tree.map_structure(_to_tensor, input_features)
    wanted = differentiable(input_features)
    precision = Precision(base_model, input_features, retakes=can_be_taken)

    def loss_at(features: Features) -> Tensor:
        with backend.StatelessScope():
            if is_function:
                return _checked_loss(labeled_loss(features))
            # Never called without these functions: see `can_be_taken`.
            return pgd_loss_fn(pgd_labels, pgd_model_fn(features))  # type: ignore[misc]

    def taken(features: Features, wanted: Sequence[bool], scale: Any) -> Gradients:
        if is_function:
            features = tree.map_structure(_constant, features)
        with backend.constants():
            return scaled_gradients(loss_at, features, wanted, scale)

    if is_function:
        gradients = taken(input_features, wanted, precision.scale)
    else:
        gradients = align(
            backend.recorded_gradient(
                labeled_loss,
                select(input_features, wanted),
                gradient_tape,
                precision.scale,
            ),
            wanted,
        )
    if all(gradient is None for gradient in gradients):
        needs = (
            "They must be dense float tensors that the function uses."
            if is_function
            else "They must be dense float tensors, not NumPy arrays, that the loss "
            "depends on and that `gradient_tape` watched before the forward pass "
            "(`tape.watch`)."
        )
        raise NothingMovesError(
            "Nothing can be perturbed: `labeled_loss` has no gradient with respect to "
            f"`input_features`. {needs} Received: {describe(input_features)}"
        )
    if raise_invalid_gradient and any(gradient is None for gradient in gradients):
        names = _name_leaves(input_features, [g is None for g in gradients])
        raise ValueError(
            f"Cannot perturb the features {names}, and `raise_invalid_gradient` is "
            "set: they are not dense floats, or the loss does not depend on them. "
            f"Received: {describe(input_features)}"
        )
    moving = [gradient is not None for gradient in gradients]

    def gradient_at(features: Features) -> Gradients:
        return precision.gradients(functools.partial(taken, features, moving))

    gradients = precision.unscale(
        gradients, precision.scale, functools.partial(taken, input_features, moving)
    )
    neighbor = perturb(
        input_features, gradients, gradient_at, settings, seed, can_move=can_move
    )
    return neighbor, backend.num_rows(select(input_features, moving)[0])


def _check_tape(labeled_loss: Any, gradient_tape: Any) -> None:
    """Checks that a tape comes with a tensor, and both on TensorFlow only."""
    if callable(labeled_loss):
        if gradient_tape is not None:
            raise ValueError(
                "`gradient_tape` must be left out where `labeled_loss` is a function, "
                "which gives the gradient without a tape. Received: "
                f"{brief(gradient_tape)}"
            )
    elif backend.BACKEND != "tensorflow":
        raise TypeError(
            "`labeled_loss` must be a function from features to the loss, such as "
            "`lambda x: loss_fn(y, model(x))`. Only TensorFlow has tapes that "
            "remember how a loss was computed, and Keras runs on "
            f"{backend.BACKEND!r}. Received: {describe_value(labeled_loss)}"
        )


def _checked_loss(loss: Any) -> Tensor:
    if backend.is_tensor(loss) and keras.backend.is_float_dtype(loss.dtype):
        return loss
    raise TypeError(
        "The function `labeled_loss` must return a float tensor, which depends on the "
        f"features. Received: {describe_value(loss)}"
    )


def _to_tensor(leaf: Any) -> Any:
    """Converts arrays to tensors, but for strings where there are none of these."""
    is_text = isinstance(leaf, (str, bytes)) or (
        isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU"
    )
    if is_text and backend.BACKEND != "tensorflow":
        return leaf
    return backend.to_tensor(leaf)


def _constant(leaf: Any) -> Any:
    """Makes a tensor a constant to gradients around the attack, which has its own.

    Without this JAX would differentiate all iterations.
    """
    return ops.stop_gradient(leaf) if backend.is_tensor(leaf) else leaf


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

    It works in eager code and inside a `tf.function`. It also works inside `jax.jit`,
    except for random starts. The gradient with respect to the weights is that of the
    final pass, because the perturbation is a constant. Take it by an outer tape, by
    `loss.backward()` or by `jax.grad`. On JAX the weights must come from a
    `keras.StatelessScope`, as in the example, or from `model.stateless_call`.

    State that the model updates during the attack is discarded; the final pass updates
    it as any forward pass does. On TensorFlow a clean pass that this function makes
    itself updates it, too. Elsewhere that pass is part of the attack.

    In eager code on TensorFlow an outer tape records the attack as well, and memory
    grows with the iterations. Inside a `tf.function` it does not.

    On JAX and PyTorch, Keras clips probabilities. So if `model` is a `keras.Model` that
    ends in a softmax or sigmoid, a cross-entropy of Keras is computed from the logits
    behind it. It is the same number, without the clipping. A warning says so if they
    are not found. Your own labelled loss is clipped all the same: let the model return
    logits where you can, and use `from_logits=True`.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        labels: The labels that `loss_fn` receives.
        model: Callable from features to predictions, such as a `keras.Model`.
        loss_fn: Callable `(labels, predictions)`, and a third argument where
            `sample_weights` are given, such as a `keras.losses.Loss`.
        sample_weights: Weights of the examples, as `loss_fn` takes them.
        adv_config: An `AdvRegConfig` with the labelled loss as objective, by default
            `AdvRegConfig()`. Only its `adv_neighbor_config` is used. The caller
            multiplies the result by the `multiplier`, which is
            `multiplier(optimizer.iterations)` for a schedule; `clean_weight` and
            `weight_perturbation` are left to the caller, too.
        predictions: `model(features)`, where it is known already. On TensorFlow only,
            as the next two.
        labeled_loss: `loss_fn(labels, model(features))`, where it is known already.
        gradient_tape: The `tf.GradientTape` that watched `features` while these two
            were computed. Needed with them in eager code.
        model_kwargs: Further keyword arguments of `model`, such as `training`.

    Returns:
        The loss at the perturbed features, as `loss_fn` returns it.

    Raises:
        TypeError: `adv_config` is not an `AdvRegConfig`, or `loss_fn` not callable.
        ValueError: No feature has a gradient, a mask or range does not fit, the
            objective is not the labelled loss, an argument that only TensorFlow takes
            is given on another backend, or a random start is wanted inside `jax.jit`.

    Example:
    >>> with tf.GradientTape() as tape:
    ...     with tf.GradientTape() as input_tape:
    ...         input_tape.watch(x)
    ...         loss = loss_fn(y, model(x))
    ...     loss += 0.2 * adversarial_loss(
    ...         x, y, model, loss_fn, adv_config=config, labeled_loss=loss,
    ...         gradient_tape=input_tape)
    >>> gradients = tape.gradient(loss, model.trainable_variables)

    On PyTorch:
    >>> loss = loss_fn(y, model(x))
    >>> loss += 0.2 * adversarial_loss(x, y, model, loss_fn, adv_config=config)
    >>> loss.backward()

    On JAX:
    >>> @jax.jit
    ... @jax.grad
    ... def gradients(weights, x, y):
    ...     with keras.StatelessScope(zip(model.trainable_variables, weights)):
    ...         loss = loss_fn(y, model(x))
    ...         return loss + 0.2 * adversarial_loss(
    ...             x, y, model, loss_fn, adv_config=config)
    """
    return loss_at_neighbors(
        features,
        labels,
        model,
        loss_fn,
        () if sample_weights is None else (sample_weights,),
        sample_weights,
        adv_config,
        predictions,
        labeled_loss,
        gradient_tape,
        model_kwargs,
    )


def loss_at_neighbors(
    features: Features,
    labels: Any,
    model: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    weights: tuple[Any, ...] = (),
    counts: Tensor | None = None,
    adv_config: AdvRegConfig | None = None,
    predictions: Any = None,
    labeled_loss: Tensor | None = None,
    gradient_tape: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Computes the loss at adversarially perturbed features.

    It is `adversarial_loss`, but for two arguments.

    Args:
        features: See `adversarial_loss`, as for all arguments but `weights` and
            `counts`.
        labels: The labels.
        model: Callable from features to predictions.
        loss_fn: Callable of labels, predictions, and `weights`.
        weights: The arguments that `loss_fn` gets after labels and predictions.
        counts: Weights of the examples, `None` for none. An example of weight 0 is not
            perturbed.
        adv_config: An `AdvRegConfig`, or `None`.
        predictions: The predictions, where they are known.
        labeled_loss: The labelled loss, where it is known.
        gradient_tape: The tape under which they were computed.
        model_kwargs: Further keyword arguments of `model`.

    Returns:
        The loss at the perturbed features.
    """
    adv_config = check_adv_config(adv_config)
    if adv_config.objective != LabeledLoss():
        raise ValueError(
            "`adv_config` must have the objective 'labeled_loss' in a custom loop: "
            "`AdversarialRegularization` trains with the others. Received: objective="
            f"{brief(adv_config.objective)}"
        )
    if not callable(loss_fn):
        raise TypeError(
            "`loss_fn` must be callable, such as a `keras.losses.Loss`; "
            f"`keras.losses.get` makes one of a name. Received: {brief(loss_fn)}"
        )
    known = predictions is not None or labeled_loss is not None
    if backend.BACKEND != "tensorflow":
        _check_no_tape(
            predictions=predictions,
            labeled_loss=labeled_loss,
            gradient_tape=gradient_tape,
        )
    elif known and gradient_tape is None and backend.is_eager():
        raise ValueError(
            "`gradient_tape` is needed in eager code where `predictions` or "
            "`labeled_loss` are given: pass the `tf.GradientTape` that watched "
            "`features` while they were computed. Received: gradient_tape=None"
        )
    base_model = model if isinstance(model, keras.Model) else None
    taking_logits = on_logits(loss_fn)

    def predict(features: Features) -> Any:
        with contextlib.nullcontext() if base_model is None else recorded(base_model):
            return model(features, **(model_kwargs or {}))

    def loss_of(labels: Any, predictions: Any) -> Tensor:
        return taking_logits(labels, predictions, *weights)

    def loss_at(features: Features) -> Tensor:
        return loss_of(labels, predict(features))

    if not known and gradient_tape is None:
        features = tree.map_structure(_to_tensor, features)
        if backend.BACKEND == "tensorflow":
            gradient_tape = backend.new_tape()
    if backend.BACKEND == "tensorflow" and labeled_loss is None:
        with backend.recording(gradient_tape):
            if gradient_tape is not None:
                gradient_tape.watch(select(features, differentiable(features)))
            if predictions is None:
                predictions = predict(features)
            labeled_loss = loss_of(labels, predictions)
    neighbor, _ = _neighbor(
        features,
        labeled_loss if backend.BACKEND == "tensorflow" else loss_at,
        adv_config.adv_neighbor_config,
        gradient_tape,
        predict,
        loss_of,
        labels,
        can_move=can_move(features, counts, base_model),
        base_model=base_model,
    )
    predictions = predict(neighbor)
    advice = (
        "Or pass the `keras.Model` itself as `model`." if base_model is None else ""
    )
    warn_of_clipping([loss_fn], labels, predictions, advice)
    return loss_of(labels, predictions)


def _check_no_tape(**arguments: Any) -> None:
    """Checks that arguments which belong to a tape are left out.

    Raises:
        ValueError: One is given.
    """
    given = {name: each for name, each in arguments.items() if each is not None}
    if given:
        received = ", ".join(f"{name}={brief(each)}" for name, each in given.items())
        raise ValueError(
            "`predictions`, `labeled_loss` and `gradient_tape` must be left out, "
            "because they go with the tapes of TensorFlow, and Keras runs on "
            f"{backend.BACKEND!r}: `adversarial_loss` calls `model` and `loss_fn` "
            f"itself. Received: {received}"
        )


def _name_leaves(features: Features, chosen: Sequence[bool]) -> list[str]:
    paths = [path for path, _ in tree.flatten_with_path(features)]
    return [name_of(p) for p, choose in zip(paths, chosen, strict=True) if choose]
