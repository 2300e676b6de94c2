"""Records what a model is made of, to notice that it has changed.

A compiled function holds the layers as they were when it was traced (see `functions`).
There is no event when a user sets `layer.activation = ...` or appends to a list of
layers. So `Parts` records all layers of a model and all their attributes, and two
recordings are compared:

- `same_objects` is the fast check, made before every use of a compiled function: is
  each attribute still the very same object? Lists and dictionaries may change in place,
  so their items are compared, too.
- `differences` compares two recordings by value. It is asked only if an object differs,
  and forgives equal numbers and strings.

Two kinds of attributes would make every call look like a change, and are left out: what
Keras writes on layers in passing (`_IN_PASSING`), and what the model's own `call`
writes, which `attributes_written` finds out while a function is traced.

A trap: whatever is recorded must not keep the model alive, or no model would ever be
freed. So references to the model itself, and functions that hold it, are weak.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Collection, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import keras

from advreg.backend import keras_private

# Attributes that Keras writes on layers and models as it runs, and on which the result
# of a call does not depend.
_IN_PASSING = {
    *("history", "train_function", "test_function", "predict_function"),
    *("stop_training", "stop_evaluating", "stop_predicting", "_initial_epoch"),
    *("_epoch_iterator", "_eval_epoch_iterator", "_predict_epoch_iterator"),
    *("_called", "_losses", "_loss_ids", "_losses_override", "_loss_tracker"),
    *(
        "_inbound_nodes",
        "_outbound_nodes",
        "_metrics",
        "_compile_metrics",
        "_trainable",
    ),
    *("_path", "_parent_path", "_lock", "_tracker", "_tracked", "_build_shapes_dict"),
    *("_saved_model_inputs_spec", "_saved_model_arg_spec"),
    *("call_signature_parameters", "_call_has_context_arg", "_call_context_args"),
    *("_dropout_mask", "_recurrent_dropout_mask"),  # On cells, by each tracing.
    *("_jit_compile", "is_awq_calibrated", "is_gptq_calibrated"),  # By saving.
    "preprocess_samples",  # Replaced for a while by `network.preprocessing`.
}
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple)
_DEPTH = 4  # How deep lists in lists, or dictionaries, are compared.
# Of a longer list, such as a vocabulary, only the list object and its length are
# compared, because this is done before every use of a compiled function.
_LONG = 1000


class Parts:
    """A record of what a call of a model depends on, beside the values of variables.

    It holds the layers and all their attributes, including the items of lists and
    dictionaries. Changes inside other objects, or of global variables, are not noticed.

    Nothing here keeps the model itself alive.

    Args:
        model: The model.
        written: Attributes that calls write, as pairs of a layer's `id` and a name.
            They are left out.
    """

    def __init__(
        self, model: keras.Model, written: Collection[tuple[int, str]] = ()
    ) -> None:
        self._written, self._model = written, weakref.ref(model)
        self._layers = [_Attributes(each, model) for each in _layers_below(model)]
        self._own = _Attributes(model, model)

    def same_objects(self, model: keras.Model) -> bool:
        """Returns whether a model has the same layers and attribute objects as before.

        It is fast. If it is false, `differences` says whether that matters.
        """
        layers = _layers_below(model)
        return (
            self._model() is model
            and len(layers) == len(self._layers)
            and all(
                known.layer is layer and known.same_objects(vars(layer))
                for layer, known in zip(layers, self._layers, strict=True)
            )
            and self._own.same_objects(vars(model))
        )

    def differences(self, other: Parts) -> list[tuple[int, str]]:
        """Lists the attributes in which two records differ, by layer and name."""
        one, another = self._by_name(), other._by_name()
        names = [*one, *(name for name in another if name not in one)]
        return [
            name
            for name in names
            if name not in self._written
            and not _same(one.get(name, _ABSENT), another.get(name, _ABSENT))
        ]

    def _by_name(self) -> dict[tuple[int, str], list[Any]]:
        """Returns the contents of all attributes, by the layer's `id` and the name."""
        found: dict[tuple[int, str], list[Any]] = {}
        for each in (self._own, *self._layers):
            found[each.number, ""] = [each.layer or self._model]
            for name, content in each.contents.items():
                if content:
                    found[each.number, name] = content
        return found


class _Attributes:
    """A record of the attributes of one layer.

    Args:
        layer: The layer, or the model itself.
        model: The model that it belongs to, which must not be kept alive.
    """

    def __init__(self, layer: Any, model: keras.Model) -> None:
        attributes = vars(layer)
        self.number = id(layer)
        self.layer = None if layer is model else layer
        # What is compared of each attribute. A container may change in place, so its
        # items are.
        self.contents = {
            name: _content(value, model)
            for name, value in attributes.items()
            if _counts(name)
        }
        self._names = tuple(attributes)
        self._containers = [
            name for name in self.contents if isinstance(attributes[name], _CONTAINERS)
        ]
        self._model = weakref.ref(model)
        self._values = tuple(
            value if layer is not model else _weakly(name, value, model)
            for name, value in attributes.items()
        )

    def same_objects(self, attributes: dict[str, Any]) -> bool:
        """Returns whether each attribute is the same object as before.

        Args:
            attributes: The attributes of the layer now.
        """
        if len(attributes) != len(self._values):
            return False
        # `map(operator.is_, ...)` runs in C. Only the model itself has weak references.
        if self.layer is not None:
            same = all(map(operator.is_, attributes.values(), self._values))
        else:
            same = all(map(_is, attributes.values(), self._values))
        model = self._model()
        return same and all(
            _same(_content(attributes[name], model), self.contents[name])
            for name in self._containers
        )


def _layers_below(model: keras.Model) -> list[Any]:
    return [each for each in keras_private.layers_of(model) if each is not model]


def _weakly(name: str, value: Any, model: keras.Model) -> Any:
    """Returns a record of a model's attribute that does not keep the model alive."""
    if not _counts(name) or isinstance(value, _CONTAINERS):
        return _ANYTHING  # Not compared at all, or compared by its items.
    return _normal(value, model)


def _is(value: Any, held: Any) -> bool:
    if value is held or held is _ANYTHING:
        return True
    return isinstance(held, weakref.ref) and held() is value


def _normal(value: Any, model: Any) -> Any:
    """Returns a value, or a record of it if the value would keep the model alive."""
    if value is model:
        return _MODEL
    functions = (FunctionType, MethodType, functools.partial)
    if isinstance(value, functions) and _refers(value, model):
        # Python returns the same reference for the same function, so `is` works on it.
        return weakref.ref(value)
    return value


def _refers(value: Any, model: Any, depth: int = 4) -> bool:
    """Returns whether a function holds a model, in its closure or in what it wraps."""
    if value is model:
        return True
    holders = (FunctionType, MethodType, CellType, functools.partial, tuple, dict)
    if not depth or not isinstance(value, holders):
        return False
    if isinstance(value, FunctionType):
        inner: Any = (*(value.__closure__ or ()), *vars(value).values())
    elif isinstance(value, MethodType):
        inner = (value.__self__, value.__func__)
    elif isinstance(value, CellType):
        try:
            inner = (value.cell_contents,)
        except ValueError:  # The cell is empty.
            return False
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    else:
        inner = value.values() if isinstance(value, dict) else value
    return any(_refers(each, model, depth - 1) for each in inner)


_ANYTHING, _MODEL = object(), object()  # Equal to any value; a reference to the model.
_ABSENT: list[Any] = [object()]  # The contents of an attribute that is missing.


@contextlib.contextmanager
def attributes_written(
    model: keras.Model, written: set[tuple[int, str]]
) -> Iterator[None]:
    """Records which attributes the layers' own code writes, as a context manager.

    A layer may write, say, `self.last_shape` in its `call`. That is no change of the
    model. Only tracing runs this code, so the record is taken around a tracing.

    Args:
        model: The model. Nothing is recorded if it is not built yet, because building
            writes attributes that do matter.
        written: The set to which the attributes are added.
    """
    if not all(layer.built for layer in keras_private.layers_of(model)):
        yield
        return
    before = Parts(model)
    yield
    written.update(before.differences(Parts(model)))


class Temporary:
    """Base class of objects that advreg sets on a layer only while the model runs.

    `Parts` ignores them, and records what they replace, because another thread may look
    at the model at this moment.

    Args:
        replaces: The attribute of the layer object that it replaces, `None` where there
            was none.
    """

    def __init__(self, replaces: Any) -> None:
        self.replaces = replaces


def _counts(name: str) -> bool:
    """Returns whether a call may depend on an attribute of this name."""
    return name not in _IN_PASSING and not name.startswith("_self_")


def _same(one: list[Any], other: list[Any]) -> bool:
    """Returns whether two lists hold the same objects, or equal scalars and strings."""
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and isinstance(a, _SCALARS) and a == b)
        for a, b in zip(one, other, strict=True)
    )


def _content(value: Any, model: Any) -> list[Any]:
    """Returns the list of objects that are compared of the value of an attribute."""
    parts: list[Any] = []
    _collect(value, parts, _DEPTH, model)
    return parts


def _collect(value: Any, parts: list[Any], depth: int, model: Any) -> None:
    if isinstance(value, _CONTAINERS) and (not depth or len(value) > _LONG):
        parts.extend((value, len(value)))
    elif isinstance(value, dict):
        for key in value:
            parts.append(_normal(key, model))
            _collect(value[key], parts, depth - 1, model)
    elif isinstance(value, (list, tuple)):
        parts.append(len(value))
        for item in value:
            _collect(item, parts, depth - 1, model)
    elif isinstance(value, MethodType):  # Each access makes a new object of the same.
        parts.extend((value.__func__, _normal(value.__self__, model)))
    elif not isinstance(value, Temporary):
        parts.append(_normal(value, model))
    elif value.replaces is not None:
        parts.append(_normal(value.replaces, model))
