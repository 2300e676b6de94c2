"""Checks of arguments that several attacks share."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Features
from advreg.attacks.engine.losses import LOSSES
from advreg.attacks.engine.problem import Problem
from advreg.checks import brief
from advreg.perturbation.units import DataSummary, check_units, summarize

LOSS_NAMES = (*LOSSES, "model")


def check_loss(value: Any) -> str | None:
    """Checks the name of a loss.

    Raises:
        ValueError: There is no loss of that name.
    """
    if value is not None and not (isinstance(value, str) and value in LOSS_NAMES):
        raise ValueError(
            f"`loss` must be one of {list(LOSS_NAMES)}. Received: {brief(value)}"
        )
    return value


def check_seed(value: Any) -> None:
    """Checks a seed.

    Raises:
        TypeError: It is no integer.
        ValueError: It is negative, or does not fit into 32 bits.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(
            f"`seed` must be an integer or `None`. Received: {brief(value)}"
        )
    if not 0 <= value < 2**32:
        raise ValueError(
            f"`seed` must lie between 0 and 2**32 - 1. Received: {brief(value)}"
        )


def check_range(problem: Problem, features: Features) -> None:
    """Checks that features lie in the clip range, up to a rounding error.

    Args:
        problem: The problem, whose threat model has the range.
        features: A batch.

    Raises:
        ValueError: A value lies outside of the range, or epsilon is larger than any
            distance in the range.
    """
    summary = summarize(problem.ball({"features": features}))
    found = DataSummary(*ops.convert_to_numpy(summary))
    check_units(
        found, problem.threat_model.norm, "epsilon", problem.threat_model.epsilon
    )


def make_seed(seed: int | None) -> keras.random.SeedGenerator:
    """Makes a generator of random numbers, seeded by Keras's global one if `None`."""
    # The state of a generator is an int32 on PyTorch, and seeds go up to 2**32 - 1.
    return keras.random.SeedGenerator(
        None if seed is None else int(seed) % backend.NUM_SEEDS
    )


def check_runs_eagerly(who: str) -> None:
    """Checks that a call is not made while TensorFlow traces a function.

    Args:
        who: Name of the function that is called, for the error.

    Raises:
        RuntimeError: It is made inside a `tf.function`.
    """
    if not backend.is_eager():
        raise RuntimeError(
            f"{who} returns NumPy arrays, which do not exist inside a `tf.function` or "
            "`tf.data.Dataset.map`. Call it outside: on arrays, in a generator for "
            "`tf.data.Dataset.from_generator`, or in a `keras.utils.PyDataset`."
        )


def loss_for(attack: Any, problem: Problem) -> str:
    """Returns the name of the loss that an attack increases on a model.

    Where the attack's own `loss` is `None`, it is the cross-entropy for classifiers,
    and else the compiled loss.
    """
    if attack.loss is not None:
        return attack.loss
    return "cross_entropy" if problem.classify else "model"


def check_restarts(restarts: int, random_init: bool) -> None:
    """Checks that several starts are not all the same.

    Raises:
        ValueError: They are, because there is no random start.
    """
    if restarts > 1 and not random_init:
        raise ValueError(
            "`restarts` above 1 need `random_init=True`: without it all starts are "
            f"the same. Received: restarts={restarts}, random_init=False"
        )
