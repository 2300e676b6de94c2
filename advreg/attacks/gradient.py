"""FGSM, BIM and PGD: steps up the gradient, projected back into the ball."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from advreg.attacks.base import Attack, check_loss
from advreg.attacks.engine import Look, Numbers, Round, Rows, Scene
from advreg.checks import count, flag, is_number, length, show
from advreg.geometry import Tensor


@dataclasses.dataclass(frozen=True)
class Ascent(Round):
    """Projected steepest ascent, with or without momentum, from `x` or at random."""

    step_size: float = 0.0
    random_init: bool = False
    momentum: float = 0.0

    def key(self) -> tuple[Any, ...]:
        """See `Round`: without momentum there is no velocity."""
        return (*super().key(), self.momentum > 0)

    def numbers(self, epsilon: float) -> dict[str, float]:
        """See `Round`."""
        return {"step_size": self.step_size, "momentum": self.momentum}

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """See `Round`."""
        ball = scene.ball(rows)
        start = (
            ball.random(seed, scene.threat.epsilon) if self.random_init else ball.zero()
        )
        state = {"displacement": start}
        if self.momentum:
            state["velocity"] = ball.zero()
        return state

    def advance(self, look: Look, rows: Rows, numbers: Numbers) -> Rows:
        """See `Round`."""
        state: Rows = {}
        gradient = look.ball.unblocked(rows["displacement"], look.gradient)
        if self.momentum:
            # Each gradient counts the same, however flat the loss is where it is taken.
            velocity = ops.cast(numbers["momentum"], gradient.dtype) * rows["velocity"]
            gradient = state["velocity"] = velocity + _normalised(gradient)
        state["displacement"] = look.ball.ascend(
            rows["displacement"], gradient, numbers["step_size"]
        )
        return state


def _normalised(gradient: Tensor) -> Tensor:
    """Divides each row by its L1 norm, a row of zeros by 1."""
    largest = ops.max(ops.abs(gradient), axis=1, keepdims=True)
    scaled = ops.where(
        largest > 0, gradient / ops.where(largest > 0, largest, 1.0), 0.0
    )
    total = ops.sum(ops.abs(scaled), axis=1, keepdims=True)
    return scaled / ops.maximum(total, 1.0)  # A row that is not zero has total >= 1.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FGSM(Attack):
    """The fast gradient (sign) method: one step of the radius up the gradient.

    [Goodfellow et al., 2014](https://arxiv.org/abs/1412.6572). It overstates
    robustness: trust an iterative attack.

    Args:
        epsilon: Radius of the ball and length of the step, in units of the input.
        norm: Norm of both, taken jointly over all perturbed features of an example:
            `"l1"`, `"l2"` or `"infinity"` (also `"linf"`, `"inf"`, `1`, `2`, `np.inf`).
        loss: What the step raises: `"cross_entropy"`, `"margin"` (best other class
            against the true one), `"dlr"` (the margin relative to the spread of the
            logits), or `"model"`, the compiled loss. `None` is the compiled loss for a
            model that was compiled with one of Keras's losses of regression, and else
            the cross-entropy.
        targeted: Whether `y` is the class to reach, rather than the true class.
        feature_mask: Weights in [0, 1] of the gradient; 0 does not move. A number, an
            array, or a structure of these like the input.
        clip_value_min: Smallest value of a perturbed feature, given like the mask.
        clip_value_max: Largest value of a perturbed feature.
        from_logits: Whether the outputs of the model are logits rather than
            probabilities. If `None`, they are probabilities if all lie in [0, 1], and
            each row of several sums to 1, in the first batch; for a single score the
            compiled loss, then the last activation decides.
        seed: Seed of what is drawn at random; `None` draws from Keras's.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> x_adv = FGSM(epsilon=0.1, clip_value_min=0.0, clip_value_max=1.0)(model, x, y)
    """

    _: dataclasses.KW_ONLY
    loss: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round of one look."""
        return [Ascent(1, loss_for(self, scene), self.targeted, step_size=self.epsilon)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Iterative(Attack):
    """What BIM and PGD share."""

    _: dataclasses.KW_ONLY
    step_size: float | None = None
    iterations: int = 40
    loss: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        self._set("iterations", count("iterations", self.iterations))
        if self.step_size is not None:
            self._set("step_size", length("step_size", self.step_size))

    @property
    def name(self) -> str:
        """What reports call it, the number of its iterations included."""
        return f"{type(self).__name__}-{self.iterations}"

    @property
    def iterations_per_round(self) -> int:
        """How many steps it takes from one start."""
        return self.iterations

    def _step_size(self) -> float:
        if self.step_size is None:
            return 2.5 * self.epsilon / self.iterations
        return self.step_size


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BIM(_Iterative):
    """The basic iterative method: PGD from the input itself.

    [Kurakin et al., 2016](https://arxiv.org/abs/1607.02533).

    Args:
        epsilon: Radius of the ball, in units of the input.
        step_size: Length of a step; `None` is `2.5 * epsilon / iterations`.
        iterations: Number of steps.
        norm: As of `FGSM`.
        loss: As of `FGSM`.
        targeted: As of `FGSM`.
        feature_mask: As of `FGSM`.
        clip_value_min: As of `FGSM`.
        clip_value_max: As of `FGSM`.
        from_logits: As of `FGSM`.
        seed: As of `FGSM`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> x_adv = BIM(epsilon=0.1, step_size=0.01, iterations=20)(model, x, y)
    """

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round from the input itself."""
        return [
            Ascent(
                self.iterations,
                loss_for(self, scene),
                self.targeted,
                step_size=self._step_size(),
            )
        ]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PGD(_Iterative):
    """Projected gradient descent: many small steps from random points of the ball.

    [Madry et al., 2017](https://arxiv.org/abs/1706.06083).

    Args:
        epsilon: Radius of the ball, in units of the input.
        step_size: Length of a step; `None` is `2.5 * epsilon / iterations`.
        iterations: Number of steps from each start.
        random_init: Whether to start from a uniformly random point of the ball, rather
            than from the input.
        restarts: Number of starts. What one has fooled, the next leaves alone.
        momentum: Share of the last direction that goes into the next, in [0, 1]
            ([Dong et al., 2017](https://arxiv.org/abs/1710.06081)).
        norm: As of `FGSM`.
        loss: As of `FGSM`.
        targeted: As of `FGSM`.
        feature_mask: As of `FGSM`.
        clip_value_min: As of `FGSM`.
        clip_value_max: As of `FGSM`.
        from_logits: As of `FGSM`.
        seed: As of `FGSM`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> attack = PGD(epsilon=0.3, iterations=100, restarts=5,
    ...     clip_value_min=0.0, clip_value_max=1.0)
    >>> x_adv = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    random_init: bool = True
    restarts: int = 1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("random_init", flag("random_init", self.random_init))
        self._set("restarts", count("restarts", self.restarts))
        check_restarts(self.restarts, self.random_init)
        if not is_number(self.momentum) or not 0 <= self.momentum <= 1:
            raise ValueError(
                "`momentum` must be a number in [0, 1]. Received: "
                f"{show(self.momentum)}"
            )

    @property
    def name(self) -> str:
        """What reports call it, iterations and restarts included."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"{super().name}{restarts}"

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round for each restart."""
        one = Ascent(
            self.iterations,
            loss_for(self, scene),
            self.targeted,
            step_size=self._step_size(),
            random_init=self.random_init,
            momentum=float(self.momentum),
        )
        return [one] * self.restarts


def loss_for(attack: Any, scene: Scene) -> str:
    """The name of the loss that an attack with a `loss` raises on a model."""
    if attack.loss is not None:
        return attack.loss
    return "cross_entropy" if scene.classify else "model"


def check_restarts(restarts: int, random_init: bool) -> None:
    """Checks that several starts are not all the same."""
    if restarts > 1 and not random_init:
        raise ValueError(
            "`restarts` above 1 need `random_init=True`: without it all starts are "
            f"the same. Received: restarts={restarts}, random_init=False"
        )
