"""What is known of a model, until the model changes.

Attacks, reports and `perturb_on_batch` compile the functions that they run many times.
A compiled function holds what the layers were when it was traced: an activation, the
list of layers, the variables. If one of these is replaced later, the old function still
computes with the old one. There is no error, and the reported accuracy is wrong.

How it works: `functions_of` of each backend returns the cache of a model. Each time, it
compares what the model is made of now (`Parts`) with what it was made of when the
functions were traced, and drops all functions and facts if anything differs. Two things
are not compared: the values of variables, because compiled functions read them at each
call, and attributes that a call of the model itself writes, which are recorded while a
function is traced.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import keras
import numpy as np
from keras import ops, tree

from advreg.backend.parts import Parts


class ModelCache:
    """Facts that were found out about one model.

    Each backend adds compiled functions to it.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._reference = weakref.ref(model)
        self._written: set[tuple[int, str]] = set()
        self._parts = Parts(model, self._written)
        self._facts: dict[Hashable, Any] = {}
        self.said: set[str] = set()  # Messages of warnings that have been given.
        self.seconds = 0.0  # Time that all tracing took.

    @property
    def model(self) -> keras.Model:
        """The model."""
        model = self._reference()
        assert model is not None  # The caller has asked for it by this very model.
        return model

    def forget_if_changed(self) -> bool:
        """Drops all functions and facts if the model has changed.

        Returns:
            Whether it has.
        """
        # The usual case, and fast. Only if an object differs, its value is compared.
        if self._parts.same_objects(self.model):
            return False
        parts = Parts(self.model, self._written)
        changed = bool(self._parts.differences(parts))
        self._parts = parts
        if changed:
            self.forget()
        return changed

    def forget(self) -> None:
        """Drops all functions and facts."""
        self._facts.clear()

    def warn_once(self, message: str, stacklevel: int) -> None:
        """Warns, unless the same warning was given before for this model.

        Args:
            message: The warning.
            stacklevel: The `stacklevel` of `warnings.warn`, as the caller would pass
                it.
        """
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, stacklevel=stacklevel + 1)

    def fact(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Returns a fact about the model, which is found out once until it changes.

        Args:
            key: Name of the fact.
            find: Function that finds it out. It is called the first time only.
        """
        if key not in self._facts:
            self._facts[key] = find()
        return self._facts[key]


Cache = TypeVar("Cache", bound=ModelCache)


class Caches(Generic[Cache]):
    """The caches of all models, by model.

    Args:
        kind: The class of the caches.
    """

    def __init__(self, kind: Callable[[keras.Model], Cache]) -> None:
        self._kind = kind
        # Weakly: an entry goes when its model goes. Nothing in a cache may hold the
        # model, or it would never go.
        self._caches: weakref.WeakKeyDictionary[keras.Model, Cache] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, model: keras.Model) -> Cache:
        """Returns the cache of a model, emptied if the model has changed."""
        cache = self._caches.get(model)
        if cache is None:
            cache = self._caches[model] = self._kind(model)
        else:
            cache.forget_if_changed()
        return cache


def alike(one: Any, other: Any, rounding: float = 1e-5) -> bool:
    """Returns whether the outputs for the same examples are equal up to rounding.

    Args:
        one: An output, or a structure of them.
        other: Others, in the same structure.
        rounding: The share of an output's largest value by which values may differ. NaN
            is equal to NaN.
    """
    pairs = zip(tree.flatten(one), tree.flatten(other), strict=True)
    return all(_alike(a, b, rounding) for a, b in pairs)


def _alike(one: Any, other: Any, rounding: float) -> bool:
    if one.shape != other.shape:
        return False
    a, b = (
        ops.convert_to_numpy(ops.cast(each, "float32")).astype("float64")
        if _is_narrow(each)
        else ops.convert_to_numpy(each).astype("float64")
        for each in (one, other)
    )
    finite = a[np.isfinite(a)]
    slack = rounding * max(float(np.abs(finite).max(initial=0.0)), 1e-6)
    return bool(np.allclose(a, b, rtol=0.0, atol=slack, equal_nan=True))


def _is_narrow(tensor: Any) -> bool:
    """Returns whether NumPy may not know the dtype, as it does not know bfloat16."""
    return keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
