"""The training that tests kill and start again."""

import keras

from advreg import make_adv_reg_config
from helpers.models import busy_base, regularized

EPOCHS, STEPS = 8, 4


def make():
    config = make_adv_reg_config(
        multiplier=keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.8),
        adv_step_size=keras.optimizers.schedules.PolynomialDecay(0.0, 15, 0.2),
        pgd_iterations=2,
        pgd_epsilon=0.2,
        random_init=True,
    )
    return regularized(busy_base(), config, optimizer="adam")
