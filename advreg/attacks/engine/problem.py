"""The problem that an attack solves: a model, and a threat model.

    maximise loss(model(x + d), y)  subject to  d in the ball, x + d in the clip range

`ThreatModel` says which displacements d are allowed. `Problem` joins it with the model,
and says when an example is fooled. How the problem is solved is the matter of a
`Solver`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Constraint, Features, Tensor
from advreg.attacks.engine.losses import margin
from advreg.attacks.engine.rows import Batch, only
from advreg.attacks.engine.target import TargetModel
from advreg.config.norms import NormType
from advreg.network.masks import can_move
from advreg.perturbation.ball import Ball


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The threat model: the perturbations that an attacker may choose.

    The term is that of [Carlini et al., 2019](https://arxiv.org/abs/1902.06705).

    Args:
        epsilon: Radius of the ball.
        norm: Norm of the ball.
        feature_mask: Weights in [0, 1] of the gradient. See `AdvNeighborConfig`, as for
            all that follow.
        clip_value_min: Smallest value of a perturbed feature.
        clip_value_max: Largest value of a perturbed feature.
    """

    epsilon: float
    norm: NormType
    feature_mask: Constraint = None
    clip_value_min: Constraint = None
    clip_value_max: Constraint = None

    def key(self) -> Hashable:
        """Returns a key of what compiled functions depend on, without the radius.

        The radius is an argument of compiled functions, so that all radii share one.
        """
        constraints = (self.feature_mask, self.clip_value_min, self.clip_value_max)
        return (self.norm, repr(tree.map_structure(_as_list, constraints)))

    def ball(
        self, target: TargetModel, features: Features, epsilon: Tensor | float
    ) -> Ball:
        """Makes the ball around the features of a batch.

        Args:
            target: The model, which says which features may be perturbed.
            features: The clean features.
            epsilon: The radius, a number or a scalar tensor.
        """
        return Ball(
            features,
            target.moving(features),
            self.norm,
            epsilon,
            feature_mask=self.feature_mask,
            clip_value_min=self.clip_value_min,
            clip_value_max=self.clip_value_max,
            can_move=can_move(features, None, target.base),
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, and a threat model.

    Args:
        target: The model under attack.
        threat_model: The perturbations that are allowed.
        classify: Whether examples are classified. If not, no example is ever fooled,
            and the attack only increases the loss.
        early_stop: Whether the attack stops for an example once it is fooled. If not,
            solvers take all their steps, and end as far beyond the decision boundary as
            possible.
    """

    target: TargetModel
    threat_model: ThreatModel
    classify: bool
    early_stop: bool = True

    @property
    def drops_out(self) -> bool:
        """Whether a row leaves the batch once it is fooled.

        It does not for a model that draws random numbers, because there a row may be
        fooled by one draw and not by the next.
        """
        return self.classify and self.early_stop and not self.target.random

    def outputs(self, features: Features) -> Any:
        """Runs the model: its one output for classification, or else all of them."""
        target = self.target
        return (target.outputs if self.classify else target.predictions)(features)

    def ball(self, batch: Batch) -> Ball:
        """Makes the ball around the features of a batch."""
        epsilon = self.threat_model.epsilon
        return self.threat_model.ball(self.target, batch["features"], epsilon)

    def range(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ends of the clip range for the first example of a batch.

        They are two arrays `[values]`, which are equal for a value that may not be
        perturbed.
        """
        first = tree.map_structure(lambda leaf: leaf[:1], features)
        ball = self.ball({"features": first})
        low, high = (ops.convert_to_numpy(end)[0] for end in ball.range)
        if ball.free is not None:
            free = np.broadcast_to(ops.convert_to_numpy(ball.free), (1, len(low)))[0]
            low, high = np.where(free, low, 0.0), np.where(free, high, 0.0)
        return low, high

    def logits(self, features: Features) -> Tensor:
        """Computes the logits of a clean batch."""
        form = self.target.output_form(features)

        def logits(features: Features) -> Tensor:
            return self.target.mean(
                lambda: (form.logits(self.target.outputs(features)),)
            )[0]

        return self.target.compile("logits", logits, features)(features)

    def correct_draws(
        self, batch: Batch, displacement: np.ndarray, draws: int
    ) -> np.ndarray:
        """Counts the draws in which the model classifies perturbed examples correctly.

        Args:
            batch: `features` and `classes`.
            displacement: The displacements, `[batch, values]`.
            draws: Number of times that the model is called.

        Returns:
            The counts, `[batch]`.
        """

        def once(batch: Batch) -> Tensor:
            moved = self.ball(batch).perturbed(batch["displacement"])
            predicted = self.target.known_form.predicted(self.target.outputs(moved))
            return ops.equal(predicted, batch["classes"])

        batch = only(batch, ("features", "classes"))
        batch["displacement"] = backend.to_tensor(displacement)
        # The radius is left out of the key: only `Ball.constrain` depends on it, which
        # is not called here.
        key = ("correct", self.threat_model.key())
        compiled = self.target.compile(key, once, batch, features=batch["features"])
        counts = [ops.convert_to_numpy(compiled(batch)) for _ in range(draws)]
        return np.sum(counts, axis=0)

    def fooled(
        self, outputs: Any, batch: Batch, targeted: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns which rows are fooled, and which have no finite output, `[batch]`.

        Args:
            outputs: Outputs of the model.
            batch: A batch with `classes`.
            targeted: Whether these are the classes to reach, not the true ones.
        """
        if not self.classify:
            never = ops.zeros(ops.shape(tree.flatten(outputs)[0])[:1], "bool")
            return never, never
        predicted = self.target.known_form.predicted(outputs)
        reached = ops.equal(predicted, batch["classes"])
        fooled = reached if targeted else ops.logical_not(reached)
        return fooled, ops.less(predicted, 0)

    def margin(self, outputs: Tensor, batch: Batch, targeted: bool) -> Tensor:
        """Computes the margin of each row: how far it is beyond the decision boundary.

        It is negative for a row that is not fooled.

        Args:
            outputs: Outputs of the model.
            batch: A batch with `classes`.
            targeted: Whether these are the classes to reach, not the true ones.
        """
        logits = self.target.known_form.logits(outputs)
        found = margin(logits, batch["classes"], targeted)
        # Outputs that are NaN are a wrong answer: the best result for an attacker who
        # wants any wrong answer, and the worst for one who wants a certain class.
        worst = -np.inf if targeted else np.inf
        _, not_finite = self.fooled(outputs, batch, targeted)
        return ops.where(not_finite, ops.convert_to_tensor(worst, found.dtype), found)


def _as_list(leaf: object) -> object:
    return leaf.tolist() if isinstance(leaf, np.ndarray) else leaf
