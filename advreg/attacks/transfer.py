"""The transfer attack: examples made to fool one model, used against another."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from advreg._types import Constraint
from advreg.attacks.arguments import check_runs_eagerly
from advreg.attacks.attack import Attack
from advreg.attacks.engine.target import TargetModel
from advreg.attacks.foreign import AnyAttack, as_attack
from advreg.checks import check_model, describe_value
from advreg.config.norms import NormType
from advreg.network.preprocessing import preprocessing_off


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """A black-box attack: examples made to fool one model, used against any other.

    The attacked model is not evaluated. It only says how data are taken apart.

    Args:
        attack: The attack that makes the examples: an `Attack`, or a callable with the
            same arguments.
        source_model: The Keras 3 model that the examples are made to fool. Its network
            gets the same input as the network of the attacked model. Preprocessing that
            the source model does in its own `fit` is left out.

    Raises:
        TypeError: An argument has the wrong type.

    Example:
    >>> attack = Transfer(PGD(epsilon=0.3), source_model=other_model)
    >>> x_adv = attack(model, x, y)
    """

    attack: Any
    source_model: keras.Model

    uses_gradient = False  # That of the attacked model is not used.

    def __post_init__(self) -> None:
        if not callable(self.attack) or isinstance(self.attack, type):
            raise TypeError(
                "`attack` must be an attack, such as `PGD(epsilon=0.3)`. Received: "
                f"{describe_value(self.attack)}"
            )
        check_model("source_model", self.source_model)

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self._described.name} on {self.source_model.name}"

    @property
    def epsilon(self) -> float | None:
        """Radius of the ball, `None` where the attack has none."""
        return self._described.epsilon

    @property
    def norm(self) -> NormType | None:
        """Norm of the ball, `None` where the attack has none."""
        norm = self._described.norm
        return None if norm is None else NormType(norm)

    @property
    def clip_value_min(self) -> Constraint:
        """Smallest value of a perturbed feature."""
        return self._described.clip_value_min

    @property
    def clip_value_max(self) -> Constraint:
        """Largest value of a perturbed feature."""
        return self._described.clip_value_max

    @property
    def targeted(self) -> bool:
        """Whether labels are the classes to reach."""
        return self._described.targeted

    @property
    def iterations_per_start(self) -> int:
        """Number of steps of the attack from one start."""
        return self._described.iterations_per_start

    @property
    def _described(self) -> AnyAttack:
        return as_attack(self.attack)

    def with_epsilon(self, epsilon: float) -> Transfer:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius.

        Raises:
            TypeError: The attack has no radius.
        """
        if not self._described.has_radius:
            raise TypeError(
                "`epsilon` cannot be set for an attack without `with_epsilon`. "
                f"Received: attack={describe_value(self.attack)}"
            )
        return dataclasses.replace(self, attack=self.attack.with_epsilon(epsilon))

    def __call__(
        self, model: keras.Model, x: Any, y: Any = None, *, batch_size: int = 32
    ) -> Any:
        """Returns examples that were made to fool the source model.

        Args:
            model: The model that they are used against, wrapped or not.
            x: Features. See `Attack.__call__`.
            y: Labels. See `Attack.__call__`.
            batch_size: Number of examples that go through the source model at once.

        Returns:
            The perturbed features as NumPy arrays, as `attack` returns them.

        Raises:
            TypeError: `model` is not a Keras 3 model.
            ValueError: `attack` raises it.
        """
        check_runs_eagerly("`Transfer`")
        features, y = TargetModel(model).unpack((x, y))
        options: dict[str, Any] = {"batch_size": batch_size}
        if isinstance(self.attack, Attack):
            # An example that stopped just beyond the boundary of its own model seldom
            # fools another one.
            options["early_stop"] = False
        # Both networks get the same input, preprocessed by the attacked model.
        with preprocessing_off(TargetModel(self.source_model).base):
            return self.attack(self.source_model, features, y, **options)
