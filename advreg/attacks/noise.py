"""Random noise: what any attack must beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras

from advreg.attacks.base import Attack
from advreg.attacks.engine import Round, Rows, Scene
from advreg.checks import count


@dataclasses.dataclass(frozen=True)
class Draw(Round):
    """One random point of the ball: no more than the look that ends every round."""

    uses_gradient = False

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """See `Round`."""
        return {"displacement": scene.ball(rows).random(seed, scene.threat.epsilon)}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomNoise(Attack):
    """Points drawn uniformly from the ball. It uses no gradient.

    It says how much a model minds noise, and it is a check of other attacks: one that
    noise beats is broken, or the model hides its gradient.

    Args:
        epsilon: Radius of the ball, in units of the input.
        draws: Number of points. What one has fooled, the next leaves alone. For a
            model of regression, the point of the largest compiled loss counts.
        norm: As of `FGSM`.
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
    >>> attack = RandomNoise(epsilon=0.3, clip_value_min=0.0, clip_value_max=1.0)
    >>> x_noisy = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    draws: int = 10

    uses_gradient = False
    loss = None  # Not chosen: the compiled one for regression.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("draws", count("draws", self.draws))

    @property
    def name(self) -> str:
        """What reports call it, the number of its draws included."""
        return f"RandomNoise ×{self.draws}"

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round for each draw."""
        loss = "margin" if scene.classify else "model"
        return [Draw(0, loss, self.targeted)] * self.draws
