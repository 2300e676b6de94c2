"""Robust accuracy while a model trains, and what to do when it collapses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras

from advreg.attacks import FGSM, Attack
from advreg.attacks.victim import Victim
from advreg.checks import count, is_number, show
from advreg.evaluation import Survey
from advreg.trials import Trial


class _AtEpochEnd(keras.callbacks.Callback):
    """Measures at the end of an epoch, and logs before other callbacks read the logs.

    Where `fit` has validation data, what is measured goes into the results of Keras's
    own evaluation, which all callbacks receive. Otherwise only callbacks that come
    later in the list see it.

    Args:
        validation_data: What to measure on, in any form that `evaluate` takes.
        batch_size: Number of examples that go through the model at once.
        frequency: Number of epochs from one measurement to the next.
    """

    def __init__(self, validation_data: Any, batch_size: int, frequency: int) -> None:
        super().__init__()
        if validation_data is None:
            raise ValueError(
                "`validation_data` must be what to attack: `(x, y)`, or anything that "
                "`evaluate` takes. Received: None"
            )
        self._data = validation_data
        self._batch_size = count("batch_size", batch_size)
        self._frequency = count("frequency", frequency)
        self._epoch = 0
        self._measured: Mapping[str, float] | None = None
        self._warned = False

    def measure(self) -> Mapping[str, float]:
        """Measures the model as it is; the names are to be without `val_`."""
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Waits for Keras's evaluation of the epoch, if there is to be one."""
        self._epoch, self._measured = epoch, None
        if self._due():
            # Another callback of this kind may have been here before.
            before = self.model.evaluate
            self.model.__dict__["evaluate"] = functools.partial(self._evaluate, before)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures, if Keras has not evaluated, and logs."""
        self.model.__dict__.pop("evaluate", None)
        if not self._due():
            return
        if self._measured is None:
            self._measured = self.measure()
            self._warn_of_order()
        if logs is not None:
            logs.update({f"val_{key}": self._measured[key] for key in self._measured})

    def _due(self) -> bool:
        return (self._epoch + 1) % self._frequency == 0

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Adds what is measured to the results of Keras's evaluation, once.

        `fit` calls it with its own list of callbacks; whoever else does gets what he
        asked for.
        """
        self.model.__dict__.pop("evaluate", None)
        logs = evaluate(*args, **kwargs)
        callbacks = getattr(kwargs.get("callbacks"), "callbacks", ())
        if isinstance(logs, dict) and any(callback is self for callback in callbacks):
            self._measured = self.measure()
            logs = {**logs, **self._measured}
        return logs

    def _warn_of_order(self) -> None:
        """Warns once if callbacks have read the logs before."""
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, keras.callbacks.CallbackList):
                break
            frame = frame.f_back
        else:
            return
        before = []
        for callback in owner.callbacks:
            if callback is self:
                break
            before.append(callback)
        if not before or self._warned:
            return
        self._warned = True
        names = sorted(f"val_{name}" for name in self._measured or ())
        warnings.warn(
            f"{', '.join(type(one).__name__ for one in before)} came before "
            f"{type(self).__name__} and did not see {', '.join(names)}: `fit` has no "
            f"validation data this epoch. Put {type(self).__name__} first in "
            "`callbacks`, or give `fit` its `validation_data`.",
            stacklevel=2,
        )

    def _accuracy(self, attack: Any) -> float:
        return accuracy_under(attack, self.model, self._data, self._batch_size)


class RobustAccuracy(_AtEpochEnd):
    """Logs the accuracy under an attack as `val_robust_accuracy` after every epoch.

    `EarlyStopping`, `ModelCheckpoint` and `TensorBoard` can use it like any metric;
    [Rice et al., 2020](https://arxiv.org/abs/2002.11569) choose the checkpoint by it.
    Where `fit` has validation data, its place among the callbacks does not matter;
    without, it has to come first.

    Args:
        attack: An attack of `advreg.attacks`, or a callable
            `attack(model, x, y) -> x_adv`. Without a seed of its own it starts every
            epoch from the same random points.
        validation_data: What to attack: `(x, y)`, a dataset, or anything else that
            `evaluate` takes and that can be read again and again.
        batch_size: Number of examples that go through the model at once.
        frequency: Number of epochs from one measurement to the next.
        name: What follows `val_` in the logs.

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
        batch_size: int = 32,
        frequency: int = 1,
        name: str = "robust_accuracy",
    ) -> None:
        super().__init__(validation_data, batch_size, frequency)
        self._attack = _seeded("attack", attack)
        if not isinstance(name, str) or not name:
            raise TypeError(f"`name` must be a string. Received: {show(name)}")
        self._name = name

    def measure(self) -> Mapping[str, float]:
        """Measures the accuracy under the attack."""
        return {self._name: self._accuracy(self._attack)}


class CatastrophicOverfitting(_AtEpochEnd):
    """Notices when a model learns to fool the single-step attack it trains with.

    In single-step training, accuracy under iterative attacks may fall to nothing within
    an epoch, while that under a single step rises
    ([Wong et al., 2020](https://arxiv.org/abs/2001.03994)). Both are logged, as
    `val_single_step_accuracy` and `val_iterative_accuracy`.

    Args:
        attack: The iterative attack, such as `PGD(epsilon=0.3, iterations=10)`.
        validation_data: What to attack, as of `RobustAccuracy`.
        single_step: The single-step attack. `None` is `FGSM` of the same radius, norm,
            range and mask.
        max_gap: Share of the examples by which the single-step accuracy may exceed the
            iterative one.
        action: `"restore"` stops the training and goes back to the weights of the epoch
            with the best iterative accuracy, `"stop"` stops, `"warn"` only warns.
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
        batch_size: int = 32,
        frequency: int = 1,
    ) -> None:
        super().__init__(validation_data, batch_size, frequency)
        self._iterative = _seeded("attack", attack)
        if single_step is None:
            if not isinstance(attack, Attack):
                raise ValueError(
                    "`single_step` must be given where `attack` is none of "
                    f"`advreg.attacks`. Received: attack={attack!r}"
                )
            single_step = FGSM(**attack.surroundings())
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
        self._best = -1.0
        self._best_epoch: int | None = None
        self._best_weights: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets what was best in another training."""
        self._best, self._best_epoch, self._best_weights = -1.0, None, None

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
        single, many = self._measured.values()
        if single - many <= self._max_gap:
            if many > self._best:
                self._best, self._best_epoch = many, epoch
                if self._action == "restore":
                    self._best_weights = self.model.get_weights()
            return
        message = (
            f"Catastrophic overfitting in epoch {epoch + 1}: accuracy is "
            f"{100 * single:.1f} % under a single step, and {100 * many:.1f} % under "
            "an iterative attack."
        )
        if self._action == "warn":
            message += " Use random_init, a smaller step, or several iterations."
        else:
            self.model.stop_training = True
            message += " Training stops."
        if self._best_weights is not None:
            self.model.set_weights(self._best_weights)
            message += f" The weights are those of epoch {(self._best_epoch or 0) + 1}."
        elif self._action == "restore":
            message += " No epoch before it was better: the weights stay."
        warnings.warn(message, stacklevel=2)


def accuracy_under(
    attack: Any, model: keras.Model, data: Any, batch_size: int = 32
) -> float:
    """The share of examples that a model gets right whatever an attack tries.

    Args:
        attack: An attack, as of `evaluate_robustness`.
        model: The model.
        data: `(x, y)`, or anything else that `evaluate` takes.
        batch_size: Number of examples that go through the model at once.
    """
    x, y, *_ = data if isinstance(data, tuple) else (data, None)
    trial = Trial(attack, model, "attack", batch_size)
    survey = Survey(Victim(model, getattr(attack, "from_logits", None)), [trial], 0)
    survey.read(x, y, batch_size, verbose=0)
    return trial.stands / survey.examples


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
