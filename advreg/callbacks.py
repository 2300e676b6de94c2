"""Callbacks that measure robust accuracy during training.

Both measure at the end of an epoch, with the same `AttackRun` and `EvaluationRun` that
reports use, but without their checks. Traps that they avoid:

- Other callbacks read the logs that these write, so these must come first in
  `callbacks`.
- A mistake in the data or the attack would show only at the end of the first epoch. So
  `on_train_begin` tries a few rows.
- Attacks draw random numbers. The state of Python's and NumPy's generators is restored
  afterwards, and attacks have a seed of their own. So a callback changes no training,
  and all epochs are measured with the same random starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from advreg import backend
from advreg.attacks.attack import Attack
from advreg.attacks.fgsm import FGSM
from advreg.attacks.foreign import AnyAttack, as_attack
from advreg.attacks.substitution import Substitution
from advreg.checks import brief, check_count, describe_value, is_number
from advreg.evaluation.attack_run import AttackRun
from advreg.evaluation.diagnostics import surroundings
from advreg.evaluation.evaluation_run import EvaluationRun, classifier

_ROWS = 8  # Number of examples that are tried before the first epoch.


class _AtEpochEnd(keras.callbacks.Callback):
    """Base class of callbacks that measure and log at the end of an epoch.

    They must come first in `callbacks`, because only later callbacks see their logs. A
    callback of Keras warns if the log that it monitors is missing.

    Args:
        validation_data: The data to measure on, in any form that `evaluate` takes.
        batch_size: Number of examples that go through the model at once.
        frequency: Number of epochs from one measurement to the next.
    """

    def __init__(self, validation_data: Any, batch_size: int, frequency: int) -> None:
        super().__init__()
        self._x, self._y = _unpacked(validation_data)
        self._batch_size = check_count("batch_size", batch_size)
        self._frequency = check_count("frequency", frequency)
        self._measured: Mapping[str, float] | None = None

    def measure(self) -> Mapping[str, float]:
        """Measures the current model.

        Returns:
            The logs, by their names without `val_`.
        """
        raise NotImplementedError

    def attacks(self) -> Sequence[Any]:
        """Returns the attacks under which it measures."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        """Resets the callback, and checks that the model can be measured."""
        backend.check_outside_of_scope(f"`fit` with a `{type(self).__name__}`")
        self._measured = None
        for attack in self.attacks():
            _check_measurable(self.model, attack, self._x, self._y)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures and logs in every epoch that `frequency` asks for."""
        self._measured = None
        if (epoch + 1) % self._frequency == 0:
            self._measured = self.measure()
            self._log(logs, new=True)

    def on_train_end(self, logs: Any = None) -> None:
        """Logs the measurement of the last epoch again, if there was one."""
        self._log(logs, new=False)

    def _log(self, logs: Any, new: bool) -> None:
        for name, value in (self._measured or {}).items():
            if logs is None:
                return
            if new and f"val_{name}" in logs:
                raise ValueError(
                    f"`callbacks` must not log two things under one name. Received: "
                    f"{type(self).__name__} logs 'val_{name}', which is there already"
                )
            logs[f"val_{name}"] = value

    def _accuracy(self, attack: AnyAttack) -> float:
        """Computes the accuracy under an attack."""
        run = AttackRun(attack, self.model, "attack", self._batch_size)
        target = classifier(self.model, attack.from_logits)
        if isinstance(self._x, np.ndarray) and isinstance(self._y, np.ndarray):
            size = min(self._batch_size, target.fixed_batch or self._batch_size)
            self._x, self._y = _dataset(self._x, self._y, size), None
        evaluation = EvaluationRun(target, [run], sample_size=0)
        with _randomness_kept():
            evaluation.read(self._x, self._y, self._batch_size, verbose=0)
        return run.mean_robust / evaluation.examples


class RobustAccuracy(_AtEpochEnd):
    """Logs the accuracy under an attack as `val_robust_accuracy` after every epoch.

    `EarlyStopping`, `ModelCheckpoint` and `TensorBoard` can use it like any metric;
    [Rice et al., 2020](https://arxiv.org/abs/2002.11569) choose the checkpoint by it.
    Put it first in `callbacks`, because only later callbacks see its log. Before the
    first batch it checks on the first rows of the data that it can measure the model.

    Args:
        attack: An attack of `advreg.attacks`, which has the same random starts in every
            epoch, or a callable `attack(model, x, y) -> x_adv`.
        validation_data: The data to attack: `(x, y)`, a dataset, or any other
            validation data of `fit` that can be read repeatedly. Sample weights are
            ignored.
        batch_size: Number of examples that go through the model at once. Small batches
            are slow.
        frequency: Number of epochs from one measurement to the next. Between them
            nothing is logged, as with the `validation_freq` of `fit`.
        name: Name in the logs, after `val_`. Each callback needs its own.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> model.fit(x, y, validation_data=(x_val, y_val), epochs=20, callbacks=[
    ...     RobustAccuracy(PGD(epsilon=0.1, iterations=10), (x_val, y_val)),
    ...     keras.callbacks.EarlyStopping("val_robust_accuracy", mode="max", patience=3,
    ...         restore_best_weights=True)])
    """

    def __init__(
        self,
        attack: Any,
        validation_data: Any,
        *,
        batch_size: int = 256,
        frequency: int = 1,
        name: str = "robust_accuracy",
    ) -> None:
        super().__init__(validation_data, batch_size, frequency)
        self._attack = _seeded("attack", attack)
        if not isinstance(name, str) or not name:
            raise TypeError(
                "`name` must be a string that is not empty. Received: "
                f"{describe_value(name)}"
            )
        self._name = name

    def attacks(self) -> Sequence[Any]:
        """Returns the attack."""
        return [self._attack]

    def measure(self) -> Mapping[str, float]:
        """Measures the accuracy under the attack."""
        return {self._name: self._accuracy(self._attack)}


class CatastrophicOverfitting(_AtEpochEnd):
    """Detects catastrophic overfitting in training with a single-step attack.

    In such training, the accuracy under iterative attacks may fall to 0 within an
    epoch, while that under a single step rises: the model learns to withstand the
    single step only ([Wong et al., 2020](https://arxiv.org/abs/2001.03994)). Both
    accuracies are logged, as `val_single_step_accuracy` and `val_iterative_accuracy`.
    If the gap between them is too large, the callback warns, and does what `action`
    says.

    Args:
        attack: The iterative attack, such as `PGD(epsilon=0.3, iterations=10)`.
        validation_data: The data to attack. See `RobustAccuracy`.
        single_step: The single-step attack. `None` is `FGSM` of the same radius, norm,
            range, mask and loss.
        max_gap: Share of the examples by which the single-step accuracy may exceed the
            iterative one.
        action: `"restore"` stops the training and restores the weights of the epoch
            with the best iterative accuracy, `"stop"` only stops it, `"warn"` only
            warns, each time that the gap becomes too large.
        batch_size: Number of examples that go through the model at once.
        frequency: Number of epochs from one measurement to the next.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> watch = CatastrophicOverfitting(PGD(epsilon=0.3, iterations=10), (x_val, y_val))
    >>> model.fit(x, y, epochs=20, callbacks=[watch])
    """

    def __init__(
        self,
        attack: Any,
        validation_data: Any,
        *,
        single_step: Any = None,
        max_gap: float = 0.5,
        action: str = "restore",
        batch_size: int = 256,
        frequency: int = 1,
    ) -> None:
        super().__init__(validation_data, batch_size, frequency)
        self._iterative = _seeded("attack", attack)
        if single_step is None:
            single_step = _single_step(self._iterative)
        self._single_step = _seeded("single_step", single_step)
        if not is_number(max_gap) or not 0 < max_gap <= 1:
            raise ValueError(
                "`max_gap` must be a number in (0, 1]. Received: "
                f"{describe_value(max_gap)}"
            )
        if action not in ("restore", "stop", "warn"):
            raise ValueError(
                "`action` must be 'restore', 'stop' or 'warn'. Received: "
                f"{describe_value(action)}"
            )
        self._max_gap, self._action = max_gap, action
        self._open = False
        self._best, self._best_epoch, self._best_weights = -1.0, 0, None

    def attacks(self) -> Sequence[Any]:
        """Returns both attacks."""
        return [self._single_step, self._iterative]

    def on_train_begin(self, logs: Any = None) -> None:
        """Resets the callback, and checks that the model can be measured."""
        super().on_train_begin(logs)
        self._open = False
        self._best, self._best_epoch, self._best_weights = -1.0, 0, None

    def measure(self) -> Mapping[str, float]:
        """Measures both accuracies."""
        return {
            "single_step_accuracy": self._accuracy(self._single_step),
            "iterative_accuracy": self._accuracy(self._iterative),
        }

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures and logs, and acts if the gap is too large."""
        super().on_epoch_end(epoch, logs)
        if self._measured is None:
            return
        single, iterative = self._measured.values()
        # Acts when the gap becomes too large, not again in each later epoch.
        opens = single - iterative > self._max_gap and not self._open
        self._open = single - iterative > self._max_gap
        if opens:
            self._act(epoch, single, iterative)
        elif not self._open and iterative > self._best:
            self._best, self._best_epoch = iterative, epoch
            if self._action == "restore":  # Else no copy of the weights is needed.
                self._best_weights = self.model.get_weights()

    def _act(self, epoch: int, single: float, iterative: float) -> None:
        """Warns, and does what the argument `action` says."""
        done = ""
        if self._action != "warn":
            self.model.stop_training = True
            done = " Training stops."
        if self._best_weights is not None:
            self.model.set_weights(self._best_weights)
            done += (
                f" The weights are again those of epoch {self._best_epoch + 1}, with "
                f"{100 * self._best:.1f} % under the iterative attack."
            )
        elif self._action == "restore":
            done += " No epoch before was better, and so the weights stay as they are."
        warnings.warn(
            f"Catastrophic overfitting in epoch {epoch + 1}: the accuracy is "
            f"{100 * single:.1f} % under a single step, but {100 * iterative:.1f} % "
            f"under an iterative attack.{done} Train with `random_init=True`, a "
            "smaller `adv_step_size`, or several `pgd_iterations`.",
            stacklevel=2,
        )


def _check_measurable(model: keras.Model, attack: AnyAttack, x: Any, y: Any) -> None:
    """Checks a model, an attack and the first rows of data before any training.

    Otherwise a mistake would show only at the end of the first epoch.

    Raises:
        ValueError: They do not fit together.
    """
    target = classifier(model, attack.from_logits)
    with _randomness_kept():
        data = _first_rows(x, y)
        if data is None:
            return
        features, labels = target.unpack(data)
    if not target.base.built:
        # This builds the model, with the random weights that the first batch would have
        # made. Here the random state is not restored: training goes on from it.
        with backend.creation_scope(model):
            target.output_form(features)
    with _randomness_kept():
        target.classes(labels, target.output_form(features))
        if attack.epsilon != 0:  # Radius 0 perturbs nothing, so the range is no matter.
            attack.bind(model, None, len(tree.flatten(features)[0])).check(features)


def _first_rows(x: Any, y: Any) -> Any:
    """Returns the first rows of validation data, `None` where there are none to see.

    A dataset gets a new iterator for this, so that measurements begin at its start.
    """
    if backend.is_dataset(x):
        batch = next(iter(x), None)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        batch = (x, y)
    leaves = tree.flatten(batch)
    if not leaves or not all(leaf is None or _is_rows(leaf) for leaf in leaves):
        return None

    def first(leaf: Any) -> Any:
        if leaf is None or backend.is_sparse(leaf):
            return leaf
        if backend.is_tensor(leaf) or backend.is_ragged(leaf):
            return leaf[:_ROWS]
        rows = np.asarray(leaf)[:_ROWS]
        # Keras also casts arrays of floats to the default dtype.
        return rows.astype(keras.backend.floatx()) if rows.dtype.kind == "f" else rows

    return tree.map_structure(first, batch)


def _is_rows(leaf: Any) -> bool:
    """Returns whether a part of a batch is an array with a batch axis."""
    return hasattr(leaf, "shape") and getattr(leaf, "ndim", 1) != 0


def _single_step(attack: AnyAttack) -> FGSM:
    """Makes the single-step attack with the threat model of an iterative one."""
    if not attack.is_native:
        raise ValueError(
            "`single_step` must be given where `attack` is none of `advreg.attacks`, "
            "whose radius and range are known. Received: "
            f"attack={describe_value(attack)}"
        )
    return FGSM(**surroundings(attack), loss=attack.loss)


def _seeded(name: str, attack: Any) -> AnyAttack:
    """Checks an attack, and gives it a seed if it has none.

    All epochs are then measured with the same random starts, and the random state of
    training does not change.
    """
    if isinstance(attack, type) or not callable(attack):
        raise TypeError(
            f"`{name}` must be an attack, such as `advreg.attacks.PGD(epsilon=0.1)`. "
            f"Received: {describe_value(attack)}"
        )
    attack = as_attack(attack)
    if attack.targeted:
        raise ValueError(f"`{name}` must not be targeted. Received: {brief(attack)}")
    if isinstance(attack, (Attack, Substitution)) and attack.seed is None:
        return dataclasses.replace(attack, seed=0)
    return attack


def _unpacked(data: Any) -> tuple[Any, Any]:
    """Checks validation data, and takes them apart as `fit` does.

    Returns:
        `x`, and `y` or `None`.
    """
    if isinstance(data, (tuple, list)):
        if not 1 <= len(data) <= 3:
            raise ValueError(
                "`validation_data` must be `(x, y)`, `(x, y, sample_weight)`, or a "
                f"dataset. Received: a {type(data).__name__} of {len(data)}"
            )
        x, y = (*data, None)[:2]
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            _check_lengths(x, y)
    else:
        x, y = data, None
    if x is None:
        raise ValueError(
            "`validation_data` must be what to attack: `(x, y)`, or a dataset. "
            f"Received: {brief(data)}"
        )
    if isinstance(x, Iterator):
        raise TypeError(
            "`validation_data` is read again and again, which an iterator or generator "
            "does not allow: pass arrays, a `tf.data.Dataset`, a `DataLoader` of "
            f"PyTorch or a `keras.utils.PyDataset`. Received: {describe_value(x)}"
        )
    if backend.is_dataset(x) and backend.is_infinite(x):
        raise ValueError(
            "`validation_data` must end, which a dataset that repeats for ever does "
            f"not: use its `take`. Received: {brief(x)}"
        )
    return x, y


def _check_lengths(x: np.ndarray, y: np.ndarray) -> None:
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise ValueError(
            "`validation_data` must hold as many examples as labels, one at least. "
            f"Received: arrays of shape {x.shape} and {y.shape}"
        )


def _dataset(x: np.ndarray, y: np.ndarray, batch_size: int) -> Any:
    """Makes a dataset of arrays, once, where Keras would do so in every epoch.

    Like Keras, it casts floats to the default dtype.
    """
    x, y = (
        part.astype(keras.backend.floatx()) if part.dtype.kind == "f" else part
        for part in (x, y)
    )
    return backend.dataset_of_arrays((x, y), batch_size)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Restores the random state of Python and NumPy, as a context manager.

    Keras takes the seed of a generator without one from Python, and attacks that are
    not of this library draw from NumPy.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
