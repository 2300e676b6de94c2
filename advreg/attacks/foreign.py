"""Attacks that are not advreg's own: any callable `attack(model, x, y) -> x_adv`.

It may be a function, an attack of ART or Foolbox behind a small wrapper, `Transfer`, or
`ART`. `as_attack` reads its attributes (name, radius, norm, range) once, into a
`ForeignAttack`, which has the attributes of advreg's attacks. Other modules need not
look for them.

Nothing guarantees that such an attack keeps to its radius and range. So
`BoundForeignAttack` measures what it returns: the structure, the distance, the range.
It allows for rounding errors of foreign arithmetic.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Constraint, Features, Tensor
from advreg.attacks.arguments import check_range
from advreg.attacks.attack import Attack
from advreg.attacks.engine.problem import Problem, ThreatModel
from advreg.attacks.engine.rows import (
    Batch,
    Result,
    gather_rows,
    num_rows,
    row_lengths,
)
from advreg.attacks.engine.runner import Pipeline
from advreg.attacks.engine.solver import Solver
from advreg.attacks.engine.target import TargetModel
from advreg.attacks.substitution import Substitution
from advreg.checks import check_nonnegative, describe, describe_value
from advreg.config.norms import NormType, check_norm
from advreg.network.preprocessing import preprocessing_off

# Relative tolerance of the range, for rounding errors in foreign arithmetic.
_RANGE_TOLERANCE = 1e-4


def as_attack(value: Any) -> AnyAttack:
    """Returns an attack, or the description of any callable as one.

    Args:
        value: An attack of `advreg.attacks`, which is returned unchanged, or any
            callable `attack(model, x, y) -> x_adv`. Its attributes `name`, `epsilon`,
            `norm`, `targeted`, `clip_value_min`, `clip_value_max`, `feature_mask`,
            `from_logits`, `seed`, `uses_gradient`, `iterations_per_start` and
            `with_epsilon` are used where it has them.

    Raises:
        TypeError: `value` is not callable, or a class, or its `epsilon` is no number.
        ValueError: Its `norm` is no norm.
    """
    if isinstance(value, (Attack, ForeignAttack, Substitution)):
        return value
    if isinstance(value, type) or not callable(value):
        raise TypeError(
            "An attack must be an object such as `advreg.attacks.PGD(epsilon=0.1)`, or "
            "a callable `attack(model, x, y) -> x_adv`; not a class or a name. "
            f"Received: {describe_value(value)}"
        )
    epsilon = getattr(value, "epsilon", None)
    norm = getattr(value, "norm", None)
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return ForeignAttack(
        value,
        name=str(name or type(value).__name__),
        epsilon=None if epsilon is None else check_nonnegative("epsilon", epsilon),
        norm=None if norm is None else check_norm("norm", norm),
        targeted=bool(getattr(value, "targeted", False)),
        feature_mask=getattr(value, "feature_mask", None),
        clip_value_min=getattr(value, "clip_value_min", None),
        clip_value_max=getattr(value, "clip_value_max", None),
        from_logits=getattr(value, "from_logits", None),
        seed=getattr(value, "seed", None),
        uses_gradient=getattr(value, "uses_gradient", None),
        iterations_per_start=getattr(value, "iterations_per_start", None) or 1,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ForeignAttack:
    """A callable that attacks, and its description.

    Args:
        attack: The callable.
        name: Name in reports.
        epsilon: Radius of the ball, `None` where the attack has none.
        norm: Norm of the ball, `None` where the attack has none.
        targeted: Whether labels are the classes to reach.
        feature_mask: Weights of the gradient, or `None`.
        clip_value_min: Smallest value of a perturbed feature.
        clip_value_max: Largest value of a perturbed feature.
        from_logits: Whether the outputs of the model are logits.
        seed: Seed of random numbers.
        uses_gradient: Whether it uses the model's gradient, `None` where it is unknown.
        iterations_per_start: Number of steps from one start.
    """

    attack: Callable[..., Any]
    name: str
    epsilon: float | None
    norm: NormType | None
    targeted: bool
    feature_mask: Constraint
    clip_value_min: Constraint
    clip_value_max: Constraint
    from_logits: bool | None
    seed: int | None
    uses_gradient: bool | None
    iterations_per_start: int

    is_native: ClassVar[bool] = False
    is_bounded: ClassVar[bool] = False  # Beside its radius, if it has one.
    loss: ClassVar[str | None] = None

    @property
    def has_radius(self) -> bool:
        """Whether `with_epsilon` can make the same attack at another radius."""
        return self.epsilon is not None and hasattr(self.attack, "with_epsilon")

    def with_epsilon(self, epsilon: float) -> ForeignAttack:
        """Returns the same attack at another radius."""
        described = as_attack(self.attack.with_epsilon(epsilon))  # type: ignore[attr-defined]
        assert isinstance(described, ForeignAttack)
        return described

    def bind(
        self, model: keras.Model, from_logits: bool | None, batch_size: int
    ) -> BoundForeignAttack:
        """Binds the attack to a classifier, for a report. See `Attack.bind`."""
        return BoundForeignAttack(self, model, from_logits, batch_size)

    def __repr__(self) -> str:
        return repr(self.attack)


# What reports run: each has `bind`, and says what kind of attack it is.
AnyAttack: TypeAlias = Attack | ForeignAttack | Substitution


class BoundForeignAttack:
    """A foreign attack bound to a model. See `BoundAttack`.

    Its results are checked: their structure, distance and range.

    Args:
        attack: The attack.
        model: The model to attack.
        from_logits: Used where the attack's own `from_logits` is `None`.
        batch_size: Number of examples that go through the model at once.
    """

    def __init__(
        self,
        attack: ForeignAttack,
        model: keras.Model,
        from_logits: bool | None,
        batch_size: int,
    ) -> None:
        if attack.from_logits is not None:
            from_logits = attack.from_logits
        self._attack, self._model = attack, model
        # It serves for the range only. The radius and the norm are the attack's matter.
        threat_model = ThreatModel(
            0.0,
            NormType.INFINITY,
            None,
            attack.clip_value_min,
            attack.clip_value_max,
        )
        target = TargetModel(model, from_logits)
        self.problem = Problem(target, threat_model, classify=True)
        self._batch_size = min(batch_size, target.fixed_batch or batch_size)
        self._options = {}
        if _takes(attack.attack, "batch_size"):
            self._options["batch_size"] = batch_size

    @property
    def target(self) -> TargetModel:
        """The model under attack."""
        return self.problem.target

    def check(self, features: Features) -> None:
        """Checks that a batch lies in the stated range."""
        threat_model = self.problem.threat_model
        ends = (threat_model.clip_value_min, threat_model.clip_value_max)
        if any(end is not None for end in ends):
            check_range(self.problem, features)

    def select(self, batch: Batch) -> Batch:
        """Returns the whole batch, because it is unknown what the attack needs."""
        return batch

    def pipeline(self, done: Callable[[Batch, Result], None]) -> Pipeline:
        """Makes a `Pipeline` that calls the attack. See `BoundAttack`."""
        solvers = [Solver(1, "")]  # One place in the pipeline. `_run` ignores it.
        return Pipeline(self._run, solvers, self._batch_size, True, done)

    def lengths(self, batch: Batch, result: Result) -> dict[NormType, np.ndarray]:
        """Measures the perturbation of each row in each norm.

        The largest possible rounding error of `x_adv - x` is subtracted, so that an
        attack that keeps to its radius is not accused.
        """
        x = ops.convert_to_numpy(self.problem.ball(batch).x)
        x = np.where(np.isfinite(x), x, 0.0)
        found = row_lengths(result.displacement)
        rounding = row_lengths(np.spacing(np.abs(x) + np.abs(result.displacement)))
        return {norm: np.maximum(found[norm] - rounding[norm], 0) for norm in found}

    def in_range(self, batch: Batch, result: Result) -> np.ndarray:
        """Returns which rows are finite and in the stated range."""
        ball = self.problem.ball(batch)
        x, low, high = map(ops.convert_to_numpy, (ball.x, *ball.range))
        moved = x + result.displacement
        slack = _RANGE_TOLERANCE * np.maximum(1.0, np.abs(moved))
        inside = (moved >= low - slack) & (moved <= high + slack)
        inside &= np.isfinite(result.displacement)
        return (inside | ~np.isfinite(x)).all(axis=1)

    def _run(self, solver: Solver, batch: Batch) -> Result:
        """Calls the attack on a batch, and evaluates its result."""
        target, count = self.target, num_rows(batch)
        fixed = target.fixed_batch
        if fixed is not None:  # Copies of the last row fill up the batch.
            places = np.minimum(np.arange(max(fixed, count)), count - 1)
            batch = gather_rows(batch, places)
        features = batch["features"]
        x, y = (
            tree.map_structure(
                lambda leaf: (
                    ops.convert_to_numpy(leaf) if backend.is_tensor(leaf) else leaf
                ),
                part,
            )
            for part in (features, batch["labels"])
        )
        with preprocessing_off(target.base):  # `x` has been preprocessed already.
            moved = self._attack.attack(self._model, x, y, **self._options)
        moved = self._checked(moved, features)
        before = ops.convert_to_numpy(self.problem.ball(batch).x)
        after = ops.convert_to_numpy(self.problem.ball({"features": moved}).x)
        # inf - inf would be NaN. A value that was not finite counts as unchanged.
        displacement = np.where(np.isfinite(before), after - before, 0.0)
        form = target.output_form(features)

        def predict(features: Features) -> Tensor:
            return form.predicted(target.outputs(features))

        predicted = target.compile("predict", predict, moved)(moved)
        predicted = ops.convert_to_numpy(predicted)
        fooled = predicted != ops.convert_to_numpy(batch["classes"])
        return Result(
            fooled[:count],
            displacement[:count],
            np.zeros(count),
            predicted[:count] < 0,
        )

    def _checked(self, moved: Any, features: Features) -> Features:
        """Converts the result of an attack to tensors, and checks its form.

        Raises:
            ValueError: It has another structure or shape than the features.
        """
        try:
            moved = tree.map_structure(
                lambda new, old: (
                    ops.cast(backend.to_tensor(_detached(new, old)), old.dtype)
                    if backend.is_tensor(old)
                    else new
                ),
                moved,
                features,
            )
            alike = all(
                tuple(new.shape) == tuple(old.shape)
                for new, old in zip(
                    tree.flatten(moved), tree.flatten(features), strict=True
                )
            )
        except (TypeError, ValueError, AttributeError, *backend.ERRORS):
            alike = False
        if not alike:
            raise ValueError(
                "`attacks` must return features like those that they are given: for "
                f"x={describe(features)} {describe_value(self._attack.attack)} must "
                "return the same structure and shapes. Received: "
                f"{describe(moved)}"
            )
        return moved


def _detached(leaf: Any, like: Tensor) -> Any:
    """Returns a tensor of PyTorch without its gradient, and any other leaf unchanged.

    An attack may return a tensor that still asks for a gradient, or lies on another
    device. NumPy and other backends accept neither.

    Args:
        leaf: What an attack returned.
        like: The tensor of the model's own backend that it replaces.
    """
    if not hasattr(leaf, "detach"):
        return leaf
    device = like.device if backend.BACKEND == "torch" else "cpu"
    return leaf.detach().to(device)


def _takes(attack: Any, argument: str) -> bool:
    """Returns whether an attack has an argument of this name, if Python knows it."""
    try:
        return argument in inspect.signature(attack).parameters
    except (TypeError, ValueError):  # Functions written in C may have no signature.
        return False
