"""Checks the data of training, from within the compiled step.

`fit` reads its data only once: a generator cannot be read before training to check it.
So the step itself computes a few numbers of each batch, and writes them into a variable
that is no part of the model. Code outside of the compiled step reads the variable after
the first batch, and after each epoch, and raises the error or the warning.

The state is one float64 vector: whether the first batch is still to come (1.0 or 0.0),
the number of values so far that are NaN or infinite, and the `DataSummary` of the first
batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.config.configs import AdvNeighborConfig
from advreg.config.norms import NormType
from advreg.network.states import as_array
from advreg.perturbation.ball import Ball
from advreg.perturbation.units import (
    DataSummary,
    check_units,
    summarize,
    warn_of_missing,
)


class Watch:
    """Collects statistics of training data from within the compiled step.

    The first batch is summarised. In the others only values that are NaN or infinite
    are counted.
    """

    def __init__(self) -> None:
        self._state: keras.Variable | None = None
        self._waits = False

    @property
    def variable(self) -> keras.Variable:
        """The variable with the statistics, made when it is first asked for."""
        if self._state is None:
            self._state = keras.Variable(
                _nothing_seen(),
                dtype=backend.widest_float(),
                trainable=False,
                name="watch",
            )
        return self._state

    def begin(self) -> None:
        """Starts again, so that the next batch is the first."""
        self._waits = True
        if self._state is not None:
            self._state.assign(_nothing_seen())

    def record(self, ball: Ball) -> None:
        """Collects the statistics of a batch. The step calls it.

        Args:
            ball: The `Ball` of the batch, before the first step of the attack.
        """
        # Replicas may not write into a variable that others read. So there is no check
        # under a strategy.
        if backend.has_strategy():
            return
        variable, state = self.variable, self.variable.value
        first = state[0] > 0

        def updated() -> Tensor:
            found = summarize(ball)
            missing = state[1] + found[DataSummary._fields.index("missing")]
            kept = ops.where(first, found, state[2:])
            counts = ops.stack([ops.zeros_like(missing), missing])
            return ops.concatenate([counts, kept])

        # A sum is finite only if each value is, and it costs less than the summary. If
        # the sum itself overflows, there is only one summary too many.
        finite = ops.isfinite(ops.sum(ball.x))
        wanted = ops.logical_or(first, ops.logical_not(finite))
        variable.assign(backend.choose(wanted, updated, lambda: state))

    def checking(
        self,
        function: Callable[..., Any],
        config: Callable[[], AdvNeighborConfig],
        state_after: Callable[[Any, keras.Variable], Any],
        keep_state: Callable[[Any], None],
    ) -> Callable[..., Any]:
        """Wraps a training function, so that the first batch is checked after its step.

        Args:
            function: The function, whose step calls `record`.
            config: Function that returns the current configuration.
            state_after: Function of what `function` has returned, and of the variable,
                that returns the value of the variable after the step.
            keep_state: Function of what `function` has returned. It is called before an
                error, so that the model keeps what the step has made of it.

        Returns:
            A function like it, which raises a `ValueError` on data in other units than
            the clip range.
        """
        self.begin()

        @functools.wraps(function)
        def checked(*arguments: Any) -> Any:
            outputs = function(*arguments)
            if self._waits:
                state = None
                if self._state is not None:
                    state = state_after(outputs, self._state)
                try:
                    _check(state, config())
                except ValueError:
                    keep_state(outputs)
                    self.begin()  # A user who trains on without a change gets it again.
                    raise
                self._waits = False
            return outputs

        return checked

    def missing(self) -> int:
        """Returns the number of values since `begin` that were NaN or infinite."""
        if self._state is None:
            return 0
        return int(as_array(self._state.value)[1])


class NamesMissingValues(keras.callbacks.Callback):
    """Warns, once in each `fit`, of inputs that are NaN or infinite.

    Args:
        watch: The `Watch` that counts them.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch, self._said = watch, False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Warns if there were any, unless it was done in an earlier epoch."""
        missing = self._watch.missing()
        if missing and not self._said:
            self._said = True
            warn_of_missing(f"in epoch {epoch + 1} {missing}", stacklevel=3)


def _check(state: Any, config: AdvNeighborConfig) -> None:
    """Checks the data of the first batch.

    Args:
        state: The statistics, `None` if there are none.
        config: The configuration of the attack.

    Raises:
        ValueError: The data lie outside of the clip range, or the radius is too large.
    """
    first, _, *summary = [1.0, 0.0] if state is None else as_array(state)
    if not first:
        name, radius = config.stated_radius
        norm = NormType(config.adv_grad_norm)
        check_units(DataSummary(*summary), norm, name, radius)


def _nothing_seen() -> np.ndarray:
    """Returns the state before the first batch: nothing missing, an empty summary."""
    return np.array([1.0, 0.0] + [0.0] * len(DataSummary._fields))
