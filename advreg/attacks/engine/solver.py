"""The interface of solvers: how an attack starts, and how it takes a step.

A solver is a frozen set of hyperparameters with two functions over batches, as in optax
or lineax. `init` makes the state of each row. `step` computes the next state from an
evaluation of the model at the present one. The solver itself has no state, so that one
compiled step serves all batches, iterations and radii.

Whatever changes from step to step must be in the state, with one row for each example,
because rows drop out. Whatever the graph depends on must be in `key`. Numbers that only
enter the arithmetic are `scalars`, which are arguments of the compiled function.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import keras

from advreg._types import Tensor
from advreg.attacks.engine.losses import LOSSES
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import Batch
from advreg.perturbation.ball import Ball

Scalars = dict[str, Tensor]


class Evaluation(NamedTuple):
    """An evaluation of the model at the displacements of a batch.

    Args:
        loss: The loss that the attack maximises, `[batch]`.
        gradient: Its gradient, in the layout of displacements, `[batch, values]`, or
            `None` if the solver uses none.
        ball: The `Ball` of the batch.
    """

    loss: Tensor
    gradient: Tensor | None
    ball: Ball


@dataclasses.dataclass(frozen=True)
class Solver:
    """Base class of solvers: one run of an attack from one start.

    Args:
        steps: Number of steps, with one evaluation before each. One more evaluation
            follows the last step.
        loss: Name of the loss that it maximises: a key of `LOSSES`, or `"model"`.
        targeted: Whether the labels are the classes to reach.
    """

    steps: int
    loss: str
    targeted: bool = False

    uses_gradient = True

    def key(self) -> tuple[Any, ...]:
        """Returns a key of what the compiled `step` depends on beside its arguments."""
        return (type(self), self.loss, self.targeted)

    def scalars(self, epsilon: float) -> dict[str, float]:
        """Returns the scalars that `step` gets beside `epsilon` and `index`.

        Args:
            epsilon: Radius of the ball.
        """
        return {}

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Makes the first state of each row.

        Args:
            problem: The model, and the threat model.
            batch: `features`, and `classes` or `labels`.
            seed: The generator of random starts.

        Returns:
            `displacement`, and whatever else `step` needs.
        """
        raise NotImplementedError

    def objective(self, logits: Tensor, batch: Batch) -> Tensor:
        """Computes the loss that the solver maximises, for each row.

        Args:
            logits: Logits at the present displacements.
            batch: `classes`, and the state.
        """
        return LOSSES[self.loss](logits, batch["classes"], self.targeted)

    def step(self, evaluation: Evaluation, batch: Batch, scalars: Scalars) -> Batch:
        """Computes the next state.

        Args:
            evaluation: The evaluation at `batch["displacement"]`.
            batch: The inputs and the state.
            scalars: `epsilon`, the number of the step as `index`, and those of the
                method `scalars`.

        Returns:
            The entries of the state that have changed.
        """
        raise NotImplementedError
