"""One pass over the data, for all attacks of a report.

A generator can be read only once. So all attacks run side by side: Keras reads the data
batch by batch, the model is evaluated on each clean batch, and every `AttackRun` gets
the examples that the model classifies correctly. Statistics of the data and the model
are kept for the diagnostics, and a random sample of the examples.

Keras has no public way to read data of any form. So `_Reader` is a Keras model whose
`evaluate` is called, and whose `test_step` passes each batch on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Features, Tensor
from advreg.attacks.engine.losses import cross_entropy
from advreg.attacks.engine.rows import (
    Batch,
    concat_rows,
    gather_rows,
    num_rows,
    same_signature,
)
from advreg.attacks.engine.target import TargetModel
from advreg.checks import brief
from advreg.evaluation.attack_run import AttackRun
from advreg.evaluation.byte_array import UNKNOWN, ByteArray
from advreg.evaluation.features import features_of
from advreg.evaluation.report import Feature
from advreg.evaluation.values import Values, side_by_side
from advreg.network.gradients import select, value_and_gradients
from advreg.network.precision import Precision
from advreg.network.preprocessing import overridden_methods, readable

# Methods that a model may override, but that are not called here.
METHODS = ("evaluate", "predict", "test_step", "predict_step")


class EvaluationRun:
    """Reads data once, and gives every run the correctly classified examples.

    Args:
        target: The model.
        runs: The attacks.
        sample_size: Number of examples to keep, drawn at random from all that the model
            classifies correctly. With 0 there is no sample, and no gradient is
            computed.
        draws: Number of draws to average over if the model draws random numbers.
    """

    def __init__(
        self,
        target: TargetModel,
        runs: Sequence[AttackRun],
        sample_size: int,
        draws: int | None = None,
    ) -> None:
        self.target, self._runs, self._sample_size = target, runs, sample_size
        self._draws = draws
        self.seconds = 0.0
        # Numbers of examples. The last two are of the correctly classified ones.
        self.examples = self.right = self.not_finite = 0
        self.zero_gradient = self.saturated = 0
        self.disconnected = False
        self.compiled_differs: str | None = None
        self.features: tuple[Feature, ...] = ()
        self.unperturbed: list[str] = []  # Integers that have a gradient as floats.
        self.bypassed = overridden_methods(target.base, METHODS)
        self.values = Values()
        # Number of draws in which each example is right, counted twice: see `Ended`.
        self._chosen, self._right = ByteArray(), ByteArray()
        self._random = np.random.default_rng(0)
        self.sample: Batch | None = None
        self._keys = np.zeros(0)

    def read(self, x: Any, y: Any, batch_size: int, verbose: int | str) -> None:
        """Reads all data, in any form that Keras accepts, and finishes the runs.

        Args:
            x: The data.
            y: Labels, or `None` where they are in `x`.
            batch_size: Number of examples in a batch.
            verbose: The `verbose` of `keras.Model.evaluate`.

        Raises:
            ValueError: There is no example.
        """
        batch_size = min(batch_size, self.target.fixed_batch or batch_size)
        with warnings.catch_warnings():
            # A finite generator is expected, so Keras's warning is silenced.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            x, y = readable(self.target.base, x, y, batch_size)
            _Reader(self._evaluate_batch).evaluate(
                x, y, batch_size=batch_size, verbose=verbose
            )
        if not self.examples:
            raise ValueError(f"`x` must hold examples. Received: {brief(x)}")
        for run in self._runs:
            run.flush()

    @property
    def random(self) -> bool:
        """Whether the model draws random numbers when it predicts."""
        return self.target.random

    @property
    def draws(self) -> int:
        """Number of draws: how often the model is called on each example."""
        return self.target.draws

    def correct(self, index: np.ndarray) -> np.ndarray:
        """Returns which clean examples the model classifies correctly in most draws."""
        return 2 * self.right_draws(index)[0] > self.draws

    def right_draws(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns two counts of the draws in which clean examples are right.

        Args:
            index: The numbers of the examples.
        """
        return (
            self._chosen.get(index).astype("int64"),
            self._right.get(index).astype("int64"),
        )

    def decided(self) -> int:
        """Returns the number of examples before the first that a run has not done."""
        index = np.arange(self.examples)
        decided = np.full(self.examples, True)
        for run in self._runs:
            decided &= run.status.get(index) != UNKNOWN
        if not self.random:
            decided |= ~self.correct(index)
        return self.examples if decided.all() else int(np.argmin(decided))

    def _evaluate_batch(self, data: Any) -> dict[str, float]:
        """Evaluates a clean batch, and gives it to the runs.

        Returns:
            The accuracies so far.
        """
        began = time.perf_counter()
        features, y = self.target.unpack(data)
        if not num_rows(features):
            return self._progress() if self.examples else {"clean": 0.0}
        if not self.examples:
            self._begin(features)
        form = self.target.output_form(features)
        classes = self.target.classes(y, form)
        seen = num_rows(features)
        if self._sample_size:
            moving = self.target.moving(features)
            self.values.note(features, [f.name for f in self.features], moving)
        correct = self._clean(features, classes)
        index = np.arange(self.examples, self.examples + seen)
        chosen = right = correct.astype("uint8")
        if self.random:
            chosen, right = (self._count_right(features, classes) for _ in range(2))
        self._chosen.set(index, chosen)
        self._right.set(index, right)
        correct = self.correct(index)
        rows = {"features": features, "classes": classes, "labels": y, "index": index}
        places = np.flatnonzero(correct)
        self.examples += seen
        self.right += len(places)
        self.seconds += time.perf_counter() - began
        if len(places):
            self._keep(rows if len(places) == seen else gather_rows(rows, places))
        # With a random model, an example that is wrong in most draws may be right in
        # others. So all are attacked.
        attacked = np.arange(seen) if self.random else places
        if len(attacked):
            rows = rows if len(attacked) == seen else gather_rows(rows, attacked)
            for run in self._runs:
                run.feed(rows)
        return self._progress()

    def _begin(self, features: Features) -> None:
        """Finds out facts about the model with the first batch."""
        self.target.settle(features, self._draws)
        self.target.restart_draws()
        masks = [run.attack.feature_mask for run in self._runs]
        known = list(features_of(self.target, features, masks))
        places = {run.replaces(features) for run in self._runs}
        for place in (each for each in places if each is not None):
            known[place] = Feature(known[place].name, known[place].dtype, True)
        self.features = tuple(known)
        if self._sample_size:  # Without a sample there are no checks that need these.
            self.compiled_differs = self.target.compiled_differently(features)
            self.unperturbed = self.target.unperturbed_integers(features)

    def _clean(self, features: Features, classes: Tensor) -> np.ndarray:
        """Evaluates a clean batch, and updates the statistics.

        One compiled function computes everything: the predictions, and the gradient of
        the cross-entropy with respect to the input.

        Returns:
            Which examples are classified correctly, `[batch]`.
        """
        target = self.target
        with_gradient = self._sample_size > 0

        def evaluate(features: Features, classes: Tensor) -> tuple[Tensor, ...]:
            form, moving = target.known_form, target.moving(features)

            def evaluated(features: Features) -> tuple[Tensor, Tensor]:
                outputs = target.outputs(features)
                return cross_entropy(form.logits(outputs), classes), outputs

            if with_gradient:
                precision = Precision(target.base, features)
                _, outputs, found = value_and_gradients(
                    evaluated, features, moving, precision, zeros=False
                )
                gradients = select(found, moving)
            else:
                _, outputs = evaluated(features)
                gradients = []
            predicted = form.predicted(outputs)
            zero = ops.full_like(classes, with_gradient, dtype="bool")
            slopes = []
            for leaf, gradient in zip(
                select(features, moving), gradients, strict=with_gradient
            ):
                if gradient is None:  # The outputs do not depend on this leaf.
                    slopes.append(ops.zeros_like(leaf))
                    continue
                slopes.append(backend.dense(gradient))
                axes = list(range(1, len(leaf.shape)))
                flat = ops.all(ops.equal(slopes[-1], 0), axis=axes)
                zero = ops.logical_and(zero, flat)
            return (
                ops.equal(predicted, classes),
                zero,
                ops.less(predicted, 0),
                form.saturated(outputs) if form.hidden else ops.zeros_like(zero),
                ops.convert_to_tensor(all(g is None for g in gradients)),
                ops.any(ops.not_equal(side_by_side(slopes), 0), axis=0)
                if slopes
                else ops.zeros((0,), "bool"),
            )

        key = ("clean", with_gradient)
        compiled = target.compile(key, evaluate, features, classes)
        correct, zero, not_finite, saturated, disconnected, slopes = map(
            ops.convert_to_numpy, compiled(features, classes)
        )
        self.disconnected = with_gradient and bool(disconnected)
        self.zero_gradient += int((zero & correct).sum())
        self.saturated += int((saturated & correct).sum())
        self.not_finite += int(not_finite.sum())
        self.values.note_slopes(slopes)
        return correct

    def _count_right(self, features: Features, classes: Tensor) -> np.ndarray:
        """Counts the draws in which a random model classifies examples correctly."""
        target = self.target

        def once(features: Features, classes: Tensor) -> Tensor:
            predicted = target.known_form.predicted(target.outputs(features))
            return ops.equal(predicted, classes)

        compiled = target.compile("right as it is", once, features, classes)
        draws = [
            ops.convert_to_numpy(compiled(features, classes)) for _ in range(self.draws)
        ]
        return np.sum(draws, axis=0).astype("uint8")

    def _keep(self, rows: Batch) -> None:
        """Updates the sample: a uniformly random subset of all rows so far.

        Each row gets a random key, and those with the smallest keys are kept.
        """
        if not self._sample_size:
            return
        keys = self._random.random(num_rows(rows))
        if self.sample is None:
            self.sample, self._keys = keep_smallest(rows, keys, self._sample_size)
            return
        if len(self._keys) == self._sample_size:
            better = np.flatnonzero(keys < self._keys.max())
            rows, keys = gather_rows(rows, better), keys[better]
        # Sequences of another length cannot be joined, and are left out.
        if len(keys) and same_signature(self.sample, rows):
            joined = concat_rows([self.sample, rows])
            keys = np.concatenate([self._keys, keys])
            self.sample, self._keys = keep_smallest(joined, keys, self._sample_size)

    def _progress(self) -> dict[str, float]:
        """Returns the accuracies so far, for the progress bar."""
        clean = self.right / self.examples
        shown = {"clean": clean}
        for run in self._runs:
            if run.robust + run.fooled:
                share = run.mean_robust / (run.robust + run.fooled)
                shown[run.label] = share if self.random else clean * share
        return shown


class _Reader(keras.Model):
    """A Keras model that only reads data of any form, with a progress bar."""

    def __init__(self, see: Callable[[Any], dict[str, float]]) -> None:
        super().__init__(name="evaluate_robustness")
        self._evaluate_batch = see
        self.built = True
        self.compile(run_eagerly=True)

    def test_step(self, *arguments: Any) -> Any:
        """Passes a batch on.

        Args:
            *arguments: The batch. On JAX a state comes before it, which Keras expects
                back after the results.
        """
        *state, data = arguments
        shown = self._evaluate_batch(data)
        return (shown, *state) if state else shown

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns nothing. On JAX, Keras's own fails where there was no batch."""
        return {}


def classifier(model: keras.Model, from_logits: bool | None) -> TargetModel:
    """Makes the target of a classifier.

    Args:
        model: The model.
        from_logits: Whether its outputs are logits, or `None`.

    Raises:
        ValueError: The model is compiled with a loss of regression.
    """
    target = TargetModel(model, from_logits)
    if target.fits_values:
        raise ValueError(
            "`model` must be a classifier: its loss is one of regression, which knows "
            "no accuracy. If the outputs are class scores even so, compile the model "
            f"with a loss of classification. Received: loss={brief(model.loss)}"
        )
    return target


def keep_smallest(
    batch: Batch, keys: np.ndarray, size: int
) -> tuple[Batch, np.ndarray]:
    """Returns the rows with the smallest keys, and their keys.

    Args:
        batch: A batch.
        keys: A number for each row.
        size: Largest number of rows to return.
    """
    kept = np.sort(np.argsort(keys, kind="stable")[:size])
    return gather_rows(batch, kept), keys[kept]
