"""The base class of attacks: their common arguments, and how they are called.

An `Attack` is a frozen dataclass of hyperparameters. It does not know a model before it
is used, and then three objects are made:

1. `problem(model)` joins the model with the threat model (epsilon, norm, range, mask).
2. `solvers(problem)` makes the solvers, one for each restart, or for each part of
   AutoAttack. This is the only method that a new attack must define.
3. `BoundAttack` puts both into a `Pipeline`, which runs them batch by batch.

`__call__` does all of this for arrays, and puts the results back in order. Reports use
`bind` instead, because they feed batches as they read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import keras
import numpy as np
from keras import tree

from advreg import backend
from advreg._types import Constraint, Features
from advreg.attacks.arguments import (
    check_range,
    check_runs_eagerly,
    check_seed,
    make_seed,
)
from advreg.attacks.engine.losses import classes_needed
from advreg.attacks.engine.problem import Problem, ThreatModel
from advreg.attacks.engine.rows import Batch, Result, num_rows, row_lengths
from advreg.attacks.engine.runner import Pipeline, run
from advreg.attacks.engine.solver import Solver
from advreg.attacks.engine.target import TargetModel
from advreg.checks import (
    brief,
    check_bool,
    check_constraint,
    check_count,
    check_mask,
    check_nonnegative,
    check_order,
    check_width,
    describe_value,
)
from advreg.config.norms import NormType, check_norm
from advreg.network.images import unperturbed_integers_message
from advreg.perturbation.packing import as_given

_Attack = TypeVar("_Attack", bound="Attack")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Attack:
    """Base class of attacks: hyperparameters, checked when the object is made.

    Called with a model and examples, it returns perturbed examples.
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

    norms: ClassVar[Sequence[NormType]] = tuple(NormType)  # Norms that it supports.
    uses_gradient: ClassVar[bool] = True
    # Whether it can attack a model of regression, by its compiled loss.
    supports_regression: ClassVar[bool] = False
    is_native: ClassVar[bool] = True  # False of `ForeignAttack`.
    # Whether it keeps to other limits than a ball, as substitutions of tokens do.
    is_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._set("epsilon", check_nonnegative("epsilon", self.epsilon))
        norm = check_norm("norm", self.norm)
        if norm not in self.norms:
            raise ValueError(
                f"`norm` must be one of {[norm.value for norm in self.norms]} for "
                f"`{type(self).__name__}`, which is not defined for others. Received: "
                f"{norm.value!r}"
            )
        self._set("norm", norm)
        self._set("targeted", check_bool("targeted", self.targeted))
        for name in ("feature_mask", "clip_value_min", "clip_value_max"):
            self._set(name, check_constraint(name, getattr(self, name)))
        check_mask(self.feature_mask)
        check_order(self.clip_value_min, self.clip_value_max)
        check_width(
            "epsilon", self.epsilon, norm, self.clip_value_min, self.clip_value_max
        )
        if self.from_logits is not None:
            self._set("from_logits", check_bool("from_logits", self.from_logits))
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def name(self) -> str:
        """Name in reports."""
        return type(self).__name__

    @property
    def loss(self) -> str | None:
        """Name of the loss. Attacks whose users choose it have a field instead."""
        return None

    @property
    def step_size(self) -> float | None:
        """Length of a step. Attacks whose users choose it have a field instead."""
        return None

    @property
    def iterations(self) -> int:
        """Number of steps. Iterative attacks have a field instead."""
        return 1

    @property
    def has_radius(self) -> bool:
        """Whether `with_epsilon` can make the same attack at another radius."""
        return True

    @property
    def iterations_per_start(self) -> int:
        """Number of steps from one start; 1 for a single-step attack."""
        return self.iterations

    def with_epsilon(self: _Attack, epsilon: float) -> _Attack:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius. A `step_size` that is set is scaled by the same factor.

        Raises:
            ValueError: `step_size` is set, and the present radius is 0.
        """
        changes: dict[str, Any] = {"epsilon": epsilon}
        if self.step_size is not None:
            if not self.epsilon:
                raise ValueError(
                    "A `step_size` cannot be scaled to another radius from "
                    f"`epsilon=0`. Received: {brief(self)}"
                )
            changes["step_size"] = self.step_size * epsilon / self.epsilon
        return dataclasses.replace(self, **changes)

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes the solvers of which the attack consists, in the order of their runs.

        Args:
            problem: The problem. It may depend on the number of classes of the model.
        """
        raise NotImplementedError

    def problem(self, model: keras.Model, from_logits: bool | None = None) -> Problem:
        """Makes the problem that the attack solves on a model.

        Args:
            model: The model to attack.
            from_logits: Used where the attack's own `from_logits` is `None`.

        Raises:
            ValueError: The attack is not defined for such a model.
        """
        if self.from_logits is not None:
            from_logits = self.from_logits
        target = TargetModel(model, from_logits)
        if self.loss == "model":
            target.check_compiled_loss()
        if target.fits_values and not self.supports_regression:
            raise ValueError(
                f"`model` must be a classifier for `{type(self).__name__}`. Attack a "
                "model of regression with FGSM, BIM, PGD, APGD or RandomNoise. "
                f"Received: a model compiled with loss={brief(model.loss)}"
            )
        threat_model = ThreatModel(
            self.epsilon,
            NormType(self.norm),
            self.feature_mask,
            self.clip_value_min,
            self.clip_value_max,
        )
        values = target.fits_values and self.loss in (None, "model")
        return Problem(target, threat_model, classify=not values)

    def bind(
        self, model: keras.Model, from_logits: bool | None, batch_size: int
    ) -> BoundAttack:
        """Binds the attack to a classifier, for a report.

        Args:
            model: The model to attack.
            from_logits: Used where the attack's own `from_logits` is `None`.
            batch_size: Number of examples that go through the model at once.
        """
        return BoundAttack(self, self.problem(model, from_logits), batch_size)

    def batch(self, problem: Problem, features: Features, y: Any) -> Batch:
        """Checks a batch, and makes the dictionary of it that solvers take.

        Args:
            problem: The problem.
            features: Features, as `TargetModel.unpack` returns them.
            y: Labels.

        Returns:
            The entries `features`, and `classes` or `labels` or both.
        """
        self.check(problem, features)
        batch: Batch = {"features": features}
        if problem.classify:
            form = problem.target.output_form(features)
            batch["classes"] = problem.target.classes(y, form)
        else:
            problem.target.check_labels(y, features)
        if self.wants_labels(problem):
            batch["labels"] = y
        return batch

    def wants_labels(self, problem: Problem) -> bool:
        """Returns whether the solvers need labels as the compiled loss takes them."""
        return not problem.classify or self.loss == "model"

    def check(self, problem: Problem, features: Features) -> None:
        """Checks that a batch can be perturbed in the clip range.

        Args:
            problem: The problem.
            features: A batch.

        Raises:
            ValueError: Nothing can be perturbed, the data lie outside the range, or the
                model has too few classes for the loss.
        """
        if self.clip_value_min is None and self.clip_value_max is None:
            # Making the ball checks that something can be perturbed.
            problem.ball({"features": features})
        else:
            check_range(problem, features)
        if not problem.classify:
            return
        classes = problem.target.output_form(features).classes
        least = 2 if self.loss is None else classes_needed(self.loss, self.targeted)
        if classes < least:
            raise ValueError(
                f"`loss={self.loss!r}` needs {least} classes at least: use "
                f"`loss='margin'`. Received: a model of {classes} classes"
            )

    def __call__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = 32,
        early_stop: bool = True,
        draws: int | None = None,
    ) -> Any:
        """Returns perturbed examples.

        An example for which the attack succeeds is returned at the first point where it
        did. For any other example it is the end of the run that came closest. A model
        that gives no class of each example is not fooled: the compiled loss is
        increased, and an example whose loss has not grown is returned as it is.
        Features that are not perturbed (see `advreg.perturbed_features`) are returned
        as the same objects.

        Args:
            model: A Keras 3 model, wrapped or not. It runs in inference mode, and
                nothing of it changes.
            x: Features: an array or tensor, or a structure of them, the batch axis
                first. For a wrapped model labels may be in it if it is a dictionary.
            y: The true classes, or the classes to reach where `targeted`: numbers of
                shape `[n]` or `[n, 1]`, or one-hot rows. For other models what their
                compiled loss takes: values, classes of pixels, or a structure of labels
                for several outputs.
            batch_size: Number of examples that go through the model at once.
            early_stop: Whether the attack stops for an example as soon as it succeeds,
                which is faster. With `False` it takes all steps for all examples, which
                end as far beyond the decision boundary as possible. Use this for
                examples with which other models are trained or attacked.
            draws: Number of draws over which losses and gradients are averaged, for a
                model that draws random numbers when it predicts
                ([Athalye et al., 2018](https://arxiv.org/abs/1707.07397)). There is no
                early stop then. `None` is 10 for such a model. Others are called once.

        Returns:
            The perturbed features as NumPy arrays, in the structure and dtypes of `x`
            (perturbed integers as float32), without labels. For a model that
            preprocesses in its own `fit` and `predict`, as tasks of KerasHub do, it is
            the perturbed input of its network, after the preprocessing.

        Raises:
            RuntimeError: It is called inside a `tf.function`.
            TypeError: `model` is not a Keras 3 model, or `x` or `y` are no arrays.
            ValueError: The model gives no class scores, labels or features do not fit
                it, or features lie outside the clip range.
        """
        check_runs_eagerly(f"`{type(self).__name__}`")
        early_stop = check_bool("early_stop", early_stop)
        if draws is not None:
            check_count("draws", draws)
        problem = dataclasses.replace(self.problem(model), early_stop=early_stop)
        check_count("batch_size", batch_size)
        if backend.is_dataset(x) or isinstance(x, (keras.utils.PyDataset, Iterator)):
            raise TypeError(
                "`x` must be an array, or a structure of arrays. Of data that comes in "
                "batches attack one after another: `for x, y in data: attack(model, x, "
                f"y)`. Received: {describe_value(x)}"
            )
        features, y = problem.target.unpack((x, y))
        given, total = problem.target.given(x, features), num_rows(features)
        if total == 0:
            raise ValueError(f"`x` must hold examples. Received: {brief(x)}")
        problem.target.settle(features, draws)
        problem.target.restart_draws()
        if names := problem.target.unperturbed_integers(features):
            problem.target.functions.warn_once(
                unperturbed_integers_message(names), stacklevel=2
            )
        if self.loss in (None, "model") and problem.classify and not self.targeted:
            problem.ball({"features": features})  # Checks that something can move.
            target = problem.target
            needs = (
                target.scores_examples(features) or not self.supports_regression
                if self.loss is None
                else target.needs_classes(y, features)
            )
            if not needs:
                target.check_compiled_loss()
            problem = dataclasses.replace(problem, classify=needs)
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def done(batch: Batch, result: Result) -> None:
            found.append((batch["index"], result.displacement))

        batch = self.batch(problem, features, y)
        # Rows come out of the pipeline in the order in which they are finished.
        batch["index"] = np.arange(total)
        bound = BoundAttack(self, problem, batch_size)
        pipeline = bound.pipeline(done)
        for start in range(0, total, batch_size):
            part = slice(start, start + batch_size)
            pipeline.feed(tree.map_structure(lambda leaf, part=part: leaf[part], batch))
        pipeline.flush()
        order = np.argsort(np.concatenate([index for index, _ in found]))
        displacement = np.concatenate([rows for _, rows in found])[order]
        moved = problem.ball(batch).perturbed(backend.to_tensor(displacement))
        return as_given(moved, given, problem.target.moving(features))

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


class BoundAttack:
    """An attack bound to a model, as reports run it.

    `ForeignAttack.bind` returns an object of the same interface for attacks that are
    not advreg's own.

    Args:
        attack: The attack.
        problem: The problem that it solves.
        batch_size: Number of examples that go through the model at once.
    """

    def __init__(self, attack: Attack, problem: Problem, batch_size: int) -> None:
        self._attack, self.problem = attack, problem
        self._batch_size = min(batch_size, problem.target.fixed_batch or batch_size)

    @property
    def target(self) -> TargetModel:
        """The model under attack."""
        return self.problem.target

    def check(self, features: Features) -> None:
        """Checks that a batch can be perturbed in the clip range: see `Attack`."""
        self._attack.check(self.problem, features)

    def select(self, batch: Batch) -> Batch:
        """Returns a batch without its labels, if the attack does not need them."""
        if self._attack.wants_labels(self.problem):
            return batch
        return {name: batch[name] for name in batch if name != "labels"}

    def pipeline(self, done: Callable[[Batch, Result], None]) -> Pipeline:
        """Makes the `Pipeline` that runs the attack.

        `target.settle` must have been called on a first batch, and for classifiers
        `target.output_form`.

        Args:
            done: Function that is called with finished rows. See `Pipeline`.
        """
        seed = make_seed(self._attack.seed)
        return Pipeline(
            lambda solver, batch: run(
                solver, self.problem, batch, seed, self._batch_size
            ),
            self._attack.solvers(self.problem),
            self._batch_size,
            self.problem.drops_out,
            done,
        )

    def lengths(self, batch: Batch, result: Result) -> dict[NormType, np.ndarray]:
        """Measures the perturbation of each row in each norm."""
        return row_lengths(result.displacement)

    def in_range(self, batch: Batch, result: Result) -> np.ndarray:
        """Returns which rows are in the clip range: all, because `Ball` clips them."""
        return np.full(len(result.fooled), True)
