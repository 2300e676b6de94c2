"""Robust accuracy while a model trains, and what to do when it collapses."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from advreg.attacks import FGSM, Attack
from advreg.checks import count, is_number, show
from advreg.distribution import check_outside_of_scope
from advreg.evaluation import Survey, classifier
from advreg.honesty import surroundings
from advreg.trials import Trial


class _AtEpochEnd(keras.callbacks.Callback):
    """Measures at the end of an epoch, and logs before other callbacks read the logs.

    Where `fit` has validation data, it measures at the end of Keras's own evaluation,
    which is before any callback hears of the end of the epoch, and goes to the front of
    the list. Otherwise only callbacks that come later in the list see what it logs.

    Args:
        validation_data: What to measure on, in any form that `evaluate` takes.
        batch_size: Number of examples that go through the model at once.
        frequency: Number of epochs from one measurement to the next.
    """

    def __init__(self, validation_data: Any, batch_size: int, frequency: int) -> None:
        super().__init__()
        self._x, self._y = _unpacked(validation_data)
        self._batch_size = count("batch_size", batch_size)
        self._frequency = count("frequency", frequency)
        self._epoch = 0
        self._list: Any = None
        self._measured: Mapping[str, float] | None = None
        self._warned = False

    def measure(self) -> Mapping[str, float]:
        """Measures the model as it is; the names are to be without `val_`."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets another training."""
        check_outside_of_scope(f"`fit` with a `{type(self).__name__}`")
        self._measured, self._warned = None, False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Waits for Keras's evaluation of the epoch, if there is to be one."""
        self._epoch, self._measured, self._list = epoch, None, _calling_list()

    def on_test_end(self, logs: Any = None) -> None:
        """Measures after Keras's evaluation of the epoch, not after any other."""
        callers = _calling_list()
        if callers is None or callers is not self._list or not self._due():
            return
        self._measured = self.measure()
        # A new list: Keras is going through the old one.
        others = [one for one in callers.callbacks if one is not self]
        callers.callbacks = [self, *others]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures, if Keras has not evaluated, and logs."""
        if self._due():
            if self._measured is None:
                self._measured = self.measure()
                self._warn_of_order()
            self._log(logs, new=True)
        self._list = None

    def on_train_end(self, logs: Any = None) -> None:
        """Logs the last measurement, if it is that of the last epoch."""
        self._log(logs, new=False)

    def _due(self) -> bool:
        return (self._epoch + 1) % self._frequency == 0

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

    def _warn_of_order(self) -> None:
        """Warns once if callbacks have read the logs before."""
        if self._list is None or self._warned:
            return
        before = []
        for callback in self._list.callbacks:
            if callback is self:
                break
            if not isinstance(callback, _AtEpochEnd) and _hears_epochs(callback):
                before.append(type(callback).__name__)
        if not before:
            return
        self._warned = True
        name, logged = type(self).__name__, self._measured or {}
        warnings.warn(
            f"{name} comes after {', '.join(before)} in `callbacks`, which did not see "
            f"{' and '.join(f'val_{key}' for key in logged)}, for Keras has not "
            f"evaluated in epoch {self._epoch + 1}. Put {name} first in `callbacks`, "
            "or give `fit` its `validation_data`, for each epoch that is measured.",
            stacklevel=2,
        )

    def _accuracy(self, attack: Any) -> float:
        """The share of examples that the model gets right whatever an attack tries."""
        if isinstance(self._x, np.ndarray) and isinstance(self._y, np.ndarray):
            self._x, self._y = _dataset(self._x, self._y, self._batch_size), None
        trial = Trial(attack, self.model, "attack", self._batch_size)
        victim = classifier(self.model, getattr(attack, "from_logits", None))
        survey = Survey(victim, [trial], sample_size=0)
        with _randomness_kept():
            survey.read(self._x, self._y, self._batch_size, verbose=0)
        return trial.stands / survey.examples


class RobustAccuracy(_AtEpochEnd):
    """Logs the accuracy under an attack as `val_robust_accuracy` after every epoch.

    `EarlyStopping`, `ModelCheckpoint` and `TensorBoard` can use it like any metric;
    [Rice et al., 2020](https://arxiv.org/abs/2002.11569) choose the checkpoint by it.
    Where `fit` has validation data, its place among the callbacks does not matter;
    without, it has to come first.

    Args:
        attack: An attack of `advreg.attacks`, which starts every epoch from the same
            random points, or a callable `attack(model, x, y) -> x_adv`.
        validation_data: What to attack: `(x, y)`, a dataset, or anything else that
            `fit` validates on and that can be read again and again. Weights count
            nothing.
        batch_size: Number of examples that go through the model at once. Small batches
            are slow.
        frequency: Number of epochs from one measurement to the next. Between them
            nothing is logged, as with the `validation_freq` of `fit`.
        name: What follows `val_` in the logs. Each callback needs its own.

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
                f"`name` must be a string that is not empty. Received: {show(name)}"
            )
        self._name = name

    def measure(self) -> Mapping[str, float]:
        """Measures the accuracy under the attack."""
        return {self._name: self._accuracy(self._attack)}


class CatastrophicOverfitting(_AtEpochEnd):
    """Notices when a model learns to fool the single-step attack it trains with.

    In single-step training, accuracy under iterative attacks may fall to nothing within
    an epoch, while that under a single step rises
    ([Wong et al., 2020](https://arxiv.org/abs/2001.03994)). Both are logged, as
    `val_single_step_accuracy` and `val_iterative_accuracy`. A gap between them draws a
    warning, and the action.

    Args:
        attack: The iterative attack, such as `PGD(epsilon=0.3, iterations=10)`.
        validation_data: What to attack, as of `RobustAccuracy`.
        single_step: The single-step attack. `None` is `FGSM` of the same radius, norm,
            range, mask and loss.
        max_gap: Share of the examples by which the single-step accuracy may exceed the
            iterative one.
        action: `"restore"` stops the training and goes back to the weights of the epoch
            with the best iterative accuracy, `"stop"` stops, `"warn"` only warns, once
            for each time that the gap opens.
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
                f"`max_gap` must be a number in (0, 1]. Received: {show(max_gap)}"
            )
        if action not in ("restore", "stop", "warn"):
            raise ValueError(
                "`action` must be 'restore', 'stop' or 'warn'. Received: "
                f"{show(action)}"
            )
        self._max_gap, self._action = max_gap, action
        self._open = False
        self._best, self._best_epoch, self._best_weights = -1.0, 0, None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets another training."""
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
        """Measures, logs, and acts where the gap is too wide."""
        super().on_epoch_end(epoch, logs)
        if self._measured is None:
            return
        single, iterative = self._measured.values()
        opens = single - iterative > self._max_gap and not self._open
        self._open = single - iterative > self._max_gap
        if opens:
            self._act(epoch, single, iterative)
        elif not self._open and iterative > self._best:
            self._best, self._best_epoch = iterative, epoch
            if self._action == "restore":
                self._best_weights = self.model.get_weights()

    def _act(self, epoch: int, single: float, iterative: float) -> None:
        """Warns, and does what `action` says."""
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


def _single_step(attack: Any) -> FGSM:
    """Makes the single-step attack that belongs to an iterative one."""
    if not isinstance(attack, Attack):
        raise ValueError(
            "`single_step` must be given where `attack` is none of `advreg.attacks`, "
            f"whose radius and range are known. Received: attack={show(attack)}"
        )
    return FGSM(**surroundings(attack), loss=getattr(attack, "loss", None))


def _seeded(name: str, attack: Any) -> Any:
    """Checks an attack, and gives it a seed if it has none.

    Epochs are then compared on the same random starts, and the random state that
    training draws from is left alone.
    """
    if isinstance(attack, type) or not callable(attack):
        raise TypeError(
            f"`{name}` must be an attack, such as `advreg.attacks.PGD(epsilon=0.1)`. "
            f"Received: {show(attack)}"
        )
    if getattr(attack, "targeted", False):
        raise ValueError(f"`{name}` must not be targeted. Received: {attack!r}")
    if isinstance(attack, Attack) and attack.seed is None:
        return dataclasses.replace(attack, seed=0)
    return attack


def _unpacked(data: Any) -> tuple[Any, Any]:
    """Checks validation data, and takes it apart as `fit` does."""
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
            f"Received: {data!r}"
        )
    if isinstance(x, Iterator):
        raise TypeError(
            "`validation_data` is read again and again, which an iterator or generator "
            "does not allow: pass arrays, a `tf.data.Dataset` or a "
            f"`keras.utils.PyDataset`. Received: {show(x)}"
        )
    if (
        isinstance(x, tf.data.Dataset)
        and x.cardinality() == tf.data.INFINITE_CARDINALITY
    ):
        raise ValueError(
            "`validation_data` must end, which a dataset that repeats for ever does "
            f"not: use its `take`. Received: {x!r}"
        )
    return x, y


def _check_lengths(x: np.ndarray, y: np.ndarray) -> None:
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise ValueError(
            "`validation_data` must hold as many examples as labels, one at least. "
            f"Received: arrays of shape {x.shape} and {y.shape}"
        )


def _dataset(x: np.ndarray, y: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Makes once what Keras would make of arrays anew in every epoch.

    Like Keras, it brings floats to the default type.
    """
    x, y = (
        part.astype(keras.backend.floatx()) if part.dtype.kind == "f" else part
        for part in (x, y)
    )
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Gives training back the random state that it had.

    Keras takes the seed of a generator that is given none from Python, and attacks that
    are not of this library draw from NumPy.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _calling_list() -> Any:
    """The `CallbackList` that calls the callback just now, `None` where none does.

    Keras tells a callback its model, but not which training calls it, nor who else is
    listening.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
        frame = frame.f_back
    return None


def _hears_epochs(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback does anything at the end of an epoch."""
    heard = getattr(callback.on_epoch_end, "__func__", callback.on_epoch_end)
    return heard is not keras.callbacks.Callback.on_epoch_end
