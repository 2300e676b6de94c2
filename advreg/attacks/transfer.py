"""Attacks on one model with what was made to fool another."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from advreg.attacks.base import Attack
from advreg.attacks.victim import Victim
from advreg.checks import Constraint, show
from advreg.config import NormType


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """A black-box attack: examples made to fool one model, used against any other.

    The attacked model is not looked at: only its data are taken apart as it would.

    Args:
        attack: What makes the examples: an `Attack`, or anything that is called like
            one.
        source_model: The Keras 3 model that they are made to fool.

    Raises:
        TypeError: An argument has the wrong type.

    Example:
    >>> attack = Transfer(PGD(epsilon=0.3), source_model=other_model)
    >>> x_adv = attack(model, x, y)
    """

    attack: Any
    source_model: keras.Model

    uses_gradient = False  # Of the model that it is used against.

    def __post_init__(self) -> None:
        if not callable(self.attack) or isinstance(self.attack, type):
            raise TypeError(
                "`attack` must be an attack, such as `PGD(epsilon=0.3)`. Received: "
                f"{show(self.attack)}"
            )
        if not isinstance(self.source_model, keras.Model):
            raise TypeError(
                "`source_model` must be a Keras 3 model, an instance of `keras.Model`. "
                f"Received: {show(self.source_model)}"
            )

    @property
    def name(self) -> str:
        """What reports call it."""
        name = getattr(self.attack, "name", type(self.attack).__name__)
        return f"{name} on {self.source_model.name}"

    @property
    def epsilon(self) -> float | None:
        """Radius of the ball, `None` where the attack has none."""
        return getattr(self.attack, "epsilon", None)

    @property
    def norm(self) -> NormType | None:
        """Norm of the ball, `None` where the attack has none."""
        return getattr(self.attack, "norm", None)

    @property
    def clip_value_min(self) -> Constraint:
        """Smallest value of a perturbed feature."""
        return getattr(self.attack, "clip_value_min", None)

    @property
    def clip_value_max(self) -> Constraint:
        """Largest value of a perturbed feature."""
        return getattr(self.attack, "clip_value_max", None)

    @property
    def targeted(self) -> bool:
        """Whether labels are the classes to reach."""
        return getattr(self.attack, "targeted", False)

    @property
    def iterations_per_round(self) -> int:
        """How many steps the attack takes from one start."""
        return getattr(self.attack, "iterations_per_round", 1)

    def with_epsilon(self, epsilon: float) -> Transfer:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius.

        Raises:
            TypeError: The attack has no radius.
        """
        if not hasattr(self.attack, "with_epsilon"):
            raise TypeError(
                "`epsilon` cannot be set for an attack without `with_epsilon`. "
                f"Received: attack={show(self.attack)}"
            )
        return dataclasses.replace(self, attack=self.attack.with_epsilon(epsilon))

    def __call__(
        self, model: keras.Model, x: Any, y: Any = None, *, batch_size: int = 32
    ) -> Any:
        """Returns examples that were made to fool the source model.

        Args:
            model: The model that they are used against, wrapped or not.
            x: Features, as of any attack.
            y: Labels, as of any attack.
            batch_size: Number of examples that go through the source model at once.

        Returns:
            The perturbed features as NumPy arrays, as of the attack.

        Raises:
            TypeError: `model` is not a Keras 3 model.
            ValueError: What `attack` raises.
        """
        features, y = Victim(model).unpack((x, y))
        options: dict[str, Any] = {"batch_size": batch_size}
        if isinstance(self.attack, Attack):
            # What has barely fooled its own model seldom fools another.
            options["early_stop"] = False
        return self.attack(self.source_model, features, y, **options)
