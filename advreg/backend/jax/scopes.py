"""State on JAX: variables that only seem to be assigned.

JAX compiles functions without side effects. Keras's answer is a `StatelessScope`, in
which a variable has the value that the scope gives it, and an assignment only changes
the scope. A training step runs inside one such scope, so that the step itself can be
written as if variables were assigned.

A scope of Keras hides the values of a scope around it: a model would then run with the
weights of long ago. A `StatelessScope` of this module does not. What it has no value of
its own for, it looks up in the scope around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import keras

from advreg._types import Tensor


class StatelessScope(keras.StatelessScope):
    """A scope that discards assignments, and sees the values of the scope around it.

    Args:
        state_mapping: Pairs of variables and the values that they have inside.
        **kwargs: Further arguments of `keras.StatelessScope`.
    """

    original_scope: keras.StatelessScope | None = None

    def __init__(
        self, state_mapping: Sequence[tuple[keras.Variable, Tensor]] = (), **kwargs: Any
    ) -> None:
        super().__init__(state_mapping=list(state_mapping), **kwargs)
        # The variables that were assigned inside, each once, in order.
        self.updated: list[keras.Variable] = []

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        """Returns the value of a variable inside this scope, or the one around it.

        Args:
            variable: The variable.

        Returns:
            The value, or `None` if no scope has one, so that the variable's own counts.
        """
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        """Keeps the value that a variable was assigned.

        Args:
            update: The variable and the value.
        """
        if not any(update[0] is known for known in self.updated):
            self.updated.append(update[0])
        super().add_update(update)


class RecordingScope(StatelessScope):
    """A scope that records which variables were read that it has no value for.

    Args:
        state_mapping: Pairs of variables and the values that they have inside.
    """

    def __init__(
        self, state_mapping: Sequence[tuple[keras.Variable, Tensor]] = ()
    ) -> None:
        super().__init__(state_mapping)
        self.read: list[keras.Variable] = []

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        """Returns the value of a variable, and records it if there is none.

        Args:
            variable: The variable.
        """
        value = super().get_current_value(variable)
        if value is None and not any(variable is known for known in self.read):
            self.read.append(variable)
        return value


class ConstantScope(StatelessScope):
    """A scope whose values are constants to every gradient.

    Assignments are those of the scope around it, or real ones where there is none.
    """

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        """Returns the value of a variable, without a gradient.

        Args:
            variable: The variable.
        """
        value = super().get_current_value(variable)
        return None if value is None else jax.lax.stop_gradient(value)

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        """Hands an assignment on to the scope around this one.

        Args:
            update: The variable and the value.
        """
        if self.original_scope is None:
            super().add_update(update)
        else:
            self.original_scope.add_update(update)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        assign_updates(self)


def assign_updates(scope: StatelessScope) -> None:
    """Assigns to the variables what they were assigned inside of a scope.

    Args:
        scope: The scope, which has been left.
    """
    for variable in scope.updated:
        variable.assign(scope.get_current_value(variable))
