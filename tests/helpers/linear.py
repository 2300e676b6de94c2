"""A linear model whose steps have a closed form."""

import keras
import numpy as np
from keras import layers

from advreg import make_adv_reg_config
from helpers.oracle import LinearRegression, attack

LINEAR = LinearRegression([1.0, -2.0, 0.5, 0.25], 0.1)
LEARNING_RATE = 0.1


def linear_base(names=("x",)):
    """The linear model, its four inputs shared out over inputs of these names."""
    width = 4 // len(names)
    inputs = {name: keras.Input((width,), name=name) for name in names}
    flat = list(inputs.values())
    hidden = flat[0] if len(flat) == 1 else layers.Concatenate()(flat)
    output = layers.Dense(1)(hidden)
    base = keras.Model(inputs if len(flat) > 1 else flat[0], output)
    base.set_weights([LINEAR.w[:, None], np.array([LINEAR.b])])
    return base


def linear_step(x, y, weights, norm, iterations, multiplier=0.4):
    """One SGD step on the linear model in closed form, with its losses."""
    x_adv = attack(
        x.astype("float64"),
        lambda x: LINEAR.input_gradient(x, y, weights),
        norm,
        0.2,
        iterations,
        None if iterations == 1 else 0.35,
    )
    clean = LINEAR.weight_gradient(x.astype("float64"), y, weights)
    adversarial = LINEAR.weight_gradient(x_adv, y, weights)
    kernel, bias = (
        value - LEARNING_RATE * (c + multiplier * a)
        for value, c, a in zip((LINEAR.w, LINEAR.b), clean, adversarial, strict=True)
    )
    labeled_loss = LINEAR.loss(x, y, weights)
    adversarial_loss = multiplier * LINEAR.loss(x_adv, y, weights)
    logs = {
        "loss": labeled_loss + adversarial_loss,
        "labeled_loss": labeled_loss,
        "scaled_adversarial_loss": adversarial_loss,
    }
    return x_adv, kernel, bias, logs


def linear_config(norm, iterations):
    return make_adv_reg_config(
        multiplier=0.4,
        adv_step_size=0.2,
        adv_grad_norm=norm,
        pgd_iterations=iterations,
        pgd_epsilon=None if iterations == 1 else 0.35,
    )
