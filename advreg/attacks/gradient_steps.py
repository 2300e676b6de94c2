"""Projected gradient steps: the solver of FGSM, BIM and PGD."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import Batch
from advreg.attacks.engine.solver import Evaluation, Scalars, Solver


@dataclasses.dataclass(frozen=True)
class GradientSteps(Solver):
    """Projected steepest ascent, with or without momentum.

    It starts from the clean input or from a random point of the ball. With momentum it
    is the method of [Dong et al., 2017](https://arxiv.org/abs/1710.06081).
    """

    step_size: float = 0.0
    random_init: bool = False
    momentum: float = 0.0

    def key(self) -> tuple[Any, ...]:
        """Returns the key. With momentum the graph is another one. See `Solver`."""
        return (*super().key(), self.momentum > 0)

    def scalars(self, epsilon: float) -> dict[str, float]:
        """Returns the step size and the momentum. See `Solver`."""
        return {"step_size": self.step_size, "momentum": self.momentum}

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Makes the first state of each row. See `Solver`."""
        ball = problem.ball(batch)
        start = (
            ball.random(seed, problem.threat_model.epsilon)
            if self.random_init
            else ball.zero()
        )
        state = {"displacement": start}
        if self.momentum:
            state["velocity"] = ball.zero()
        return state

    def step(self, evaluation: Evaluation, batch: Batch, scalars: Scalars) -> Batch:
        """Computes the next state. See `Solver`."""
        state: Batch = {}
        gradient = evaluation.ball.without_clipped(
            batch["displacement"], evaluation.gradient
        )
        if self.momentum:
            # As in the paper, each gradient is divided by its L1 norm, so that all
            # count the same, however flat the loss is.
            velocity = ops.cast(scalars["momentum"], gradient.dtype) * batch["velocity"]
            gradient = state["velocity"] = velocity + _normalised(gradient)
        state["displacement"] = evaluation.ball.ascend(
            batch["displacement"], gradient, scalars["step_size"]
        )
        return state


def _normalised(gradient: Tensor) -> Tensor:
    """Divides each row by its L1 norm, a row of zeros by 1.

    The largest value may stand for infinity, and others would round to 0 beside it.
    They are kept at 1e-30 at least, because an L∞ step needs their sign.
    """
    magnitude = ops.abs(gradient)
    largest = ops.max(magnitude, axis=1, keepdims=True)
    scaled = magnitude / ops.where(largest > 0, largest, 1.0)
    scaled = ops.sign(gradient) * backend.maximum(scaled, 1e-30)
    total = ops.sum(ops.abs(scaled), axis=1, keepdims=True)
    # A row that is not zero has a total of 1 at least.
    return scaled / backend.maximum(total, 1.0)
