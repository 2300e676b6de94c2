"""Which parameters of a test the fast suite leaves to `-m slow`."""

import pytest

from helpers.backends import BACKEND


def slow(*values):
    """These values as parameters that only `-m slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_but(values, *fast):
    """All values as parameters, of which the fast suite runs these alone."""
    values = list(values)
    unknown = [name for name in fast if name not in values]
    if unknown:
        raise ValueError(f"Not among the parameters: {unknown}.")
    return [
        value if value in fast else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


def slow_rows(rows, *fast):
    """The same for tests of several parameters: fast are the rows at these places."""
    return [
        row if place in fast else pytest.param(*row, marks=pytest.mark.slow)
        for place, row in enumerate(rows)
    ]


def slow_on_jax(test):
    """Leaves a test to `-m slow` on JAX, where it compiles for seconds."""
    return pytest.mark.slow(test) if BACKEND == "jax" else test
