"""The library, and what all cases share."""

try:
    from advreg import nsl
except ImportError:
    import neural_structured_learning as nsl

import keras
import numpy as np

__all__ = ["BATCH", "NORMS", "STEP", "Groups", "floats", "nsl", "rng", "use"]

NORMS = ("l1", "l2", "infinity")
BATCH = 8
# The length of a step. Largest movements of ten such steps stay near 1, so that 1e-6
# is about eight roundings of a float32.
STEP = 0.1


def rng(seed):
    return np.random.default_rng(seed)


def use(dtype):
    """Makes networks and data of a type of floats from here on."""
    keras.backend.set_floatx(dtype)
    keras.mixed_precision.set_global_policy(dtype)


def floats(values):
    return np.asarray(values, keras.backend.floatx())


class Groups(dict):
    """For each name the type of floats, and a generator of labels and functions.

    The functions compute arrays.
    """

    def add(self, name, dtype="float32"):
        """Registers a generator."""

        def register(cases):
            self[name] = (dtype, cases)
            return cases

        return register
