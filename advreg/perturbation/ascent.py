"""The attack of training: start, take a step, project, clip, repeat.

Training, `perturb_on_batch` and custom training loops all call `perturb`. They differ
in where the gradients come from, which `perturb` does not know: it gets those at the
clean features as a list, and a function for those at any other point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
from keras import ops

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.perturbation.ball import Ball, Settings


def perturb(
    features: Features,
    gradients: Gradients,
    gradient_at: Callable[[Features], Gradients],
    settings: Settings,
    seed: keras.random.SeedGenerator | None = None,
    can_move: Sequence[Tensor | None] | None = None,
    unroll: bool = False,
    inspect: Callable[[Ball], None] | None = None,
) -> Features:
    """Perturbs each example so that its loss grows, inside the ball and the range.

    Solves `max loss(x + d) subject to ‖d‖ ≤ pgd_epsilon, clip_value_min ≤ x + d ≤
    clip_value_max` by projected steepest ascent over all features that have a gradient,
    from `x` itself or from a random point of the ball. The loop carries the
    displacement `d`, in float32 at least. A value whose gradient is NaN is not changed
    by that step, and a value that is not finite is never changed. An infinite gradient
    counts by its sign.

    Args:
        features: A tensor, or a nested structure of tensors, whose first axis is the
            batch.
        gradients: The gradient of the loss with respect to each leaf of `features`, in
            the order of `keras.tree.flatten`; `None` for a leaf that is not to be
            perturbed.
        gradient_at: Function that returns such a list for other features of the same
            structure. It is called once per iteration after the first; after a random
            start for the first one too, and once per power iteration.
        settings: The hyperparameters.
        seed: The generator of the random start: Keras's global one if `None`.
        can_move: For each leaf, `None` or a boolean tensor that broadcasts to it. Where
            it is false, the value is not perturbed. `network.masks.can_move` makes
            them.
        unroll: Whether to write the iterations one after the other into the graph, in
            place of a loop, because replicas cannot exchange values in a loop.
        inspect: Function that is called with the `Ball` before the first step, to check
            the data.

    Returns:
        Perturbed features in the structure, shapes and dtypes of `features`. They are
        `x + d`, where `d` has no gradient.

    Raises:
        ValueError: No feature has a gradient, or a mask or range does not fit the
            features.
    """
    ball = Ball(
        features,
        [gradient is not None for gradient in gradients],
        settings.adv_grad_norm,
        settings.pgd_epsilon,
        feature_mask=settings.feature_mask,
        clip_value_min=settings.clip_value_min,
        clip_value_max=settings.clip_value_max,
        can_move=can_move,
    )
    if inspect is not None:
        inspect(ball)

    def ascend(displacement: Tensor, gradients: Gradients) -> Tensor:
        gradient = ball.gradient(gradients)
        return ball.ascend(displacement, gradient, settings.adv_step_size)

    def iterate(displacement: Tensor) -> Tensor:
        return ascend(displacement, gradient_at(ball.perturbed(displacement)))

    def turn(displacement: Tensor) -> Tensor:
        # A power iteration keeps the direction of the gradient alone, and its length:
        # so the step starts at the input, not at `displacement`.
        gradient = ball.gradient(gradient_at(ball.perturbed(displacement)))
        return ball.ascend(ball.zero(), gradient, settings.init_radius)

    repeat = functools.partial(backend.repeat, unroll=unroll)
    if settings.random_init:
        # `gradients` are those at the input itself, and of no use after this start.
        radii = (settings.init_radius, settings.pgd_epsilon, settings.adv_step_size)
        displacement = ball.random(seed, next(r for r in radii if r is not None))
        displacement = repeat(turn, settings.power_iterations, displacement)
        remaining = settings.pgd_iterations
    else:
        displacement = ascend(ball.zero(), gradients)
        remaining = settings.pgd_iterations - 1
    # The weights are trained with the perturbation as a constant: no gradient goes back
    # through the iterations.
    displacement = repeat(iterate, remaining, ops.stop_gradient(displacement))
    return ball.perturbed(ops.stop_gradient(displacement))
