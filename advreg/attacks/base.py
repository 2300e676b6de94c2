"""What all attacks share: their arguments, and how they are called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.attacks.engine import Cascade, Outcome, Round, Rows, Scene, Threat, size
from advreg.attacks.losses import LOSSES, classes_needed
from advreg.attacks.victim import Victim
from advreg.checks import (
    Constraint,
    check_mask,
    check_order,
    constraint,
    count,
    flag,
    is_number,
    length,
    show,
)
from advreg.config import NormType
from advreg.packing import Features

_Attack = TypeVar("_Attack", bound="Attack")
_LOSSES = (*LOSSES, "model")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Attack:
    """An attack: hyperparameters, checked when it is made.

    Calling it with a model and examples returns their adversarial neighbours.
    """

    epsilon: float
    _: dataclasses.KW_ONLY
    norm: NormType | str | float = NormType.INFINITY
    targeted: bool = False
    feature_mask: Constraint = None
    clip_value_min: Constraint = None
    clip_value_max: Constraint = None
    from_logits: bool | None = None
    seed: int | None = None

    norms = tuple(NormType)
    uses_gradient = True

    def __post_init__(self) -> None:
        self._set("epsilon", length("epsilon", self.epsilon))
        norm = check_norm(self.norm)
        if norm not in self.norms:
            raise ValueError(
                f"`norm` must be one of {[norm.value for norm in self.norms]} for "
                f"`{type(self).__name__}`, which is not defined for others. Received: "
                f"{norm.value!r}"
            )
        self._set("norm", norm)
        self._set("targeted", flag("targeted", self.targeted))
        for name in ("feature_mask", "clip_value_min", "clip_value_max"):
            self._set(name, constraint(name, getattr(self, name)))
        check_mask(self.feature_mask)
        check_order(self.clip_value_min, self.clip_value_max)
        check_width(
            "epsilon", self.epsilon, norm, self.clip_value_min, self.clip_value_max
        )
        if self.from_logits is not None:
            self._set("from_logits", flag("from_logits", self.from_logits))
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @property
    def iterations_per_round(self) -> int:
        """How many steps it takes from one start; 1 for a single-step attack."""
        return 1

    def with_epsilon(self: _Attack, epsilon: float) -> _Attack:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius. A `step_size` that is set grows and shrinks along.
        """
        changes: dict[str, Any] = {"epsilon": epsilon}
        step_size = getattr(self, "step_size", None)
        if step_size is not None:
            if not self.epsilon:
                raise ValueError(
                    "A `step_size` cannot be scaled to another radius from "
                    f"`epsilon=0`. Received: {self!r}"
                )
            changes["step_size"] = step_size * epsilon / self.epsilon
        return dataclasses.replace(self, **changes)

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """The rounds that it consists of, against this model."""
        raise NotImplementedError

    def scene(self, model: keras.Model, from_logits: bool | None = None) -> Scene:
        """Sets the attack before a model.

        Args:
            model: The model to attack.
            from_logits: What holds where the attack's own `from_logits` is `None`.
        """
        if self.from_logits is not None:
            from_logits = self.from_logits
        victim = Victim(model, from_logits)
        loss = getattr(self, "loss", "cross_entropy")
        if loss == "model":
            victim.check_compiled_loss()
        threat = Threat(
            self.epsilon,
            NormType(self.norm),
            self.feature_mask,
            self.clip_value_min,
            self.clip_value_max,
        )
        values = victim.fits_values and loss in (None, "model")
        if victim.fits_values and not hasattr(self, "loss"):
            raise ValueError(
                f"`model` must be a classifier for `{type(self).__name__}`. Attack a "
                "model of regression with FGSM, BIM, PGD, APGD or RandomNoise. "
                f"Received: a model compiled with loss={model.loss!r}"
            )
        return Scene(victim, threat, classify=not values)

    def rows(self, scene: Scene, features: Features, y: Any) -> Rows:
        """Lays out what the rounds need of a batch, after checking it."""
        self.check(scene, features)
        rows: Rows = {"features": features}
        if scene.classify:
            rows["classes"] = scene.victim.classes(y, scene.victim.known_form)
        else:
            scene.victim.check_values(y, features)
        if self.wants_labels(scene):
            rows["labels"] = y
        return rows

    def wants_labels(self, scene: Scene) -> bool:
        """Whether the rounds need labels as the compiled loss takes them."""
        return not scene.classify or getattr(self, "loss", None) == "model"

    def check(self, scene: Scene, features: Features) -> None:
        """Checks that a batch can move in the clip range, and the loss is defined.

        Raises:
            ValueError: It cannot, or it is not.
        """
        if self.clip_value_min is None and self.clip_value_max is None:
            scene.ball({"features": features})
        else:
            check_range(scene, features)
        if not scene.classify:
            return
        loss = getattr(self, "loss", None)
        classes = scene.victim.output_form(features).classes
        least = 2 if loss is None else classes_needed(loss, self.targeted)
        if classes < least:
            raise ValueError(
                f"`loss={loss!r}` needs {least} classes at least: use `loss='margin'`. "
                f"Received: a model of {classes} classes"
            )

    def __call__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = 32,
        early_stop: bool = True,
    ) -> Any:
        """Returns the adversarial neighbours of examples.

        Examples that are fooled stay where they were fooled first. Of the others, each
        is where it came closest after a round.

        Args:
            model: A Keras 3 model, wrapped or not. It runs in inference mode, and
                nothing of it changes.
            x: Features: an array or tensor, or a structure of them, the batch axis
                first. For a wrapped model labels may be in it if it is a dictionary.
            y: The true classes, or the classes to reach where `targeted`: numbers of
                shape `[n]` or `[n, 1]`, or one-hot rows. For a model of regression the
                values that it was to predict.
            batch_size: Number of examples that go through the model at once.
            early_stop: Whether examples that are fooled are left alone, which is
                faster. With `False` every step is taken, and examples go as far beyond
                the boundary as they get: use it for examples that other models are to
                be trained or tried with.

        Returns:
            The perturbed features as NumPy arrays, in the structure and dtypes of `x`
            (images of type uint8 as float32), labels left out.

        Raises:
            TypeError: `model` is not a Keras 3 model, or `x` or `y` are no arrays.
            ValueError: The model gives no class scores, labels or features do not fit
                it, or features lie outside the clip range.
        """
        early_stop = flag("early_stop", early_stop)
        scene = dataclasses.replace(self.scene(model), early_stop=early_stop)
        count("batch_size", batch_size)
        if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset, Iterator)):
            raise TypeError(
                "`x` must be an array, or a structure of arrays. Of data that comes in "
                "batches attack one after another: `for x, y in data: attack(model, x, "
                f"y)`. Received: {show(x)}"
            )
        features, y = scene.victim.unpack((x, y))
        given, total = x, size(features)
        if total == 0:
            raise ValueError(f"`x` must hold examples. Received: {given!r}")
        if getattr(self, "loss", None) == "model" and _are_values(y):
            # A loss of one's own does not say whether it is one of regression.
            scene = dataclasses.replace(scene, classify=False)
        found: list[tuple[np.ndarray, Features]] = []

        def done(rows: Rows, outcome: Outcome) -> None:
            ball = scene.ball(rows)
            moved = ball.perturbed(tf.convert_to_tensor(outcome.displacement))
            found.append((rows["index"], moved))

        rows = self.rows(scene, features, y)
        rows["index"] = np.arange(total)
        cascade = Cascade(
            scene, self.rounds(scene), batch_size, make_seed(self.seed), done
        )
        for start in range(0, total, batch_size):
            part = slice(start, start + batch_size)
            cascade.feed(tree.map_structure(lambda leaf, part=part: leaf[part], rows))
        cascade.flush()
        order = np.argsort(np.concatenate([index for index, _ in found]))
        moved = tree.map_structure(
            lambda *leaves: tf.gather(tf.concat(leaves, 0), order),
            *(features for _, features in found),
        )
        return tree.map_structure(
            lambda leaf: leaf.numpy() if isinstance(leaf, tf.Tensor) else leaf, moved
        )

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "epsilon" or repr(value) != repr(field.default):
                value = value.value if isinstance(value, NormType) else value
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def check_norm(value: Any) -> NormType:
    """Checks a norm."""
    try:
        return NormType(value)
    except ValueError:
        raise ValueError(
            "`norm` must be one of 'l1', 'l2' and 'infinity' (or 'linf', 'inf', 1, 2, "
            f"np.inf). Received: {value!r}"
        ) from None


def check_width(
    name: str,
    epsilon: float | None,
    norm: NormType | None,
    low: Constraint,
    high: Constraint,
) -> None:
    """Checks a radius against the clip range, where both are numbers."""
    if (
        norm is NormType.INFINITY
        and epsilon is not None
        and is_number(low)
        and is_number(high)
        and epsilon > (high - low) * (1 + 1e-6)
    ):
        raise ValueError(
            f"`{name}` must not be larger than the range from `clip_value_min` to "
            f"`clip_value_max`, which is {high - low:g} wide. Received: {epsilon:g}"
        )


def check_loss(value: Any) -> str | None:
    """Checks the name of a loss."""
    if value is not None and not (isinstance(value, str) and value in _LOSSES):
        raise ValueError(f"`loss` must be one of {list(_LOSSES)}. Received: {value!r}")
    return value


def check_seed(value: Any) -> None:
    """Checks a seed."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"`seed` must be an integer or `None`. Received: {value!r}")
    if not 0 <= value < 2**32:
        raise ValueError(
            f"`seed` must lie between 0 and 2**32 - 1. Received: {value!r}"
        )


def check_range(scene: Scene, features: Features) -> None:
    """Checks that features lie in the clip range, to within one rounding.

    Args:
        scene: Whose threat has the range.
        features: A batch.

    Raises:
        ValueError: They do not, or an L1 or L2 radius reaches beyond the range.
    """
    ball = scene.ball({"features": features})
    low, high = (bound.numpy() for bound in ball.range)
    x = ball.x.numpy()
    x = np.where(np.isfinite(x), x, np.nan)
    slack = 1e-6 * max(1.0, float(np.nanmax(np.abs(x), initial=0.0)))
    outside = (x < low - slack) | (x > high + slack)
    if outside.any():
        raise ValueError(
            "`x` must lie in the clip range: scale it, or set `clip_value_min` and "
            f"`clip_value_max` to the range of the data. Received: x from "
            f"{np.nanmin(x):.6g} to {np.nanmax(x):.6g}, and a clip range from "
            f"{_span(low)} to {_span(high)}"
        )
    norm = scene.threat.norm
    order = {NormType.L1: 1, NormType.L2: 2, NormType.INFINITY: np.inf}
    widths = np.linalg.norm((high - low).astype("float64"), order[norm], axis=1)
    diameter = float(np.max(widths))
    if math.isfinite(diameter) and scene.threat.epsilon > diameter * (1 + 1e-6):
        raise ValueError(
            "`epsilon` must not be larger than the clip range: no two inputs in it are "
            f"further apart than {diameter:.6g} in the {norm.value} norm. "
            f"Received: {scene.threat.epsilon:g}"
        )


def make_seed(seed: int | None) -> keras.random.SeedGenerator:
    """Makes what random numbers are drawn from, by Keras's global seed if `None`."""
    return keras.random.SeedGenerator(None if seed is None else int(seed))


def _are_values(y: Any) -> bool:
    """Whether labels, one for each example, are no numbers of classes."""
    leaves = tree.flatten(y)
    if len(leaves) != 1 or not leaves[0].dtype.is_floating:
        return False
    values = leaves[0].numpy()
    return values.size == len(values) and bool(np.any(values != np.floor(values)))


def _span(bound: np.ndarray) -> str:
    low, high = float(np.min(bound)), float(np.max(bound))
    return f"{low:g}" if low == high else f"{low:g} ... {high:g}"
