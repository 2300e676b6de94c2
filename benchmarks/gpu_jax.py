"""What `gpu.py` needs from JAX: sides written by hand, and facts about the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def name():
    """Returns the name of the device."""
    return jax.devices()[0].device_kind


def wait(network):
    """Waits until the weights of a network are computed."""
    jax.block_until_ready([variable.value for variable in network.variables])


def begin_peak():
    """Returns the bytes in use, and the peak up to now; `None` on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats and (stats["bytes_in_use"], stats["peak_bytes_in_use"])


def peak(before):
    """Returns the peak of the memory beyond what was in use before.

    JAX forgets no peak. If it did not grow, this is the most that it can have been.
    """
    if not before:
        return None
    used, highest = before
    found = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return {"bytes": found - used, "at most": found == highest}


def is_out_of_memory(error):
    """Returns whether an error says that the memory of the device is short."""
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error)
    )


def training(model, optimizer, epsilon, step_size, iterations):
    """Makes a step of training on clean and perturbed images.

    Returns:
        The step, a function of images and labels, and a function that returns the
        trainable weights.
    """
    optimizer.build(model.trainable_variables)
    state = [
        [jnp.copy(variable.value) for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]

    def loss_at(weights, x, others, y):
        logits, others = model.stateless_call(weights, others, x, training=True)
        return cross_entropy(logits, y), others

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        weights, others, moments = state
        both = jax.value_and_grad(loss_at, (0, 1), has_aux=True)
        (loss, others), (gradients, slope) = both(weights, x, others, y)

        def ascend(_, x_adv):
            slope = jax.grad(lambda x: loss_at(weights, x, others, y)[0])(x_adv)
            return moved(x, x_adv, slope, epsilon, step_size)

        x_adv = moved(x, x, slope, epsilon, step_size)
        x_adv = jax.lax.fori_loop(1, iterations, ascend, x_adv)
        of_weights = jax.value_and_grad(loss_at, has_aux=True)
        (loss_adv, others), more = of_weights(weights, x_adv, others, y)
        gradients = jax.tree.map(jnp.add, gradients, more)
        weights, moments = optimizer.stateless_apply(moments, gradients, weights)
        return [weights, others, moments], loss + loss_adv

    def run(x, y):
        nonlocal state
        state, loss = step(state, x, y)
        return loss

    return run, lambda: state[0]


def pgd(model, epsilon, step_size, iterations):
    """Makes PGD from random starts, a function of images and labels."""
    weights, others = (
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    key = jax.random.key(0)

    @jax.jit
    def attack(weights, others, x, y, key):
        def loss_at(x):
            logits, _ = model.stateless_call(weights, others, x, training=False)
            return cross_entropy(logits, y)

        def ascend(_, x_adv):
            return moved(x, x_adv, jax.grad(loss_at)(x_adv), epsilon, step_size)

        start = x + jax.random.uniform(key, x.shape, x.dtype, -epsilon, epsilon)
        return jax.lax.fori_loop(0, iterations, ascend, jnp.clip(start, 0.0, 1.0))

    def run(x, y):
        nonlocal key
        key, now = jax.random.split(key)
        return np.asarray(attack(weights, others, x, y, now))

    return run


def moved(x, x_adv, gradient, epsilon, step_size):
    """Takes a step up the gradient, and back into the ball and the range."""
    there = x_adv + step_size * jnp.sign(gradient)
    return jnp.clip(x + jnp.clip(there - x, -epsilon, epsilon), 0.0, 1.0)


def cross_entropy(logits, y):
    log = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log, y[:, None], axis=1))


ATTACKS = {"by hand": pgd}
