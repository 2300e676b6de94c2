"""`displaced`: runs a model with something added to the outputs of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from advreg import backend
from advreg.checks import check_model, describe_value
from advreg.network.layer_outputs import LayerOutputs, find_layers
from advreg.network.taps import intercepted
from advreg.training.trainer import Trainer

_COMPILED = (
    "Inside `displaced` the model must be called itself, `model(x)`: `predict`, "
    "`evaluate` and other compiled functions would keep the displacements, or leave "
    "them out. Received: no such call, or one while a function is compiled."
)


@contextlib.contextmanager
def displaced(
    model: keras.Model, displacements: Mapping[str, Sequence[Any]]
) -> Iterator[None]:
    """Adds displacements to the outputs of layers while a model is called.

    It is a context manager. Inside, each call of the model, `model(x)`, has the
    displacements. `predict`, `evaluate` and other compiled functions are refused,
    because they would keep them.

    Args:
        model: The model, wrapped or not.
        displacements: A dictionary from the names or paths of layers to a list of
            arrays, one for each output of each call of the layer, of its shape, as
            `AdversarialRegularization.displace_on_batch` returns it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A layer is unknown, is called more or less often than there are
            displacements, or its output has another shape; or the model is called by a
            compiled function, or not at all.

    Example:
    >>> displacements = model.displace_on_batch(ids, y)
    >>> with advreg.displaced(model, displacements):
    ...     y_pred = model(ids, training=False)
    """
    check_model("model", model)
    if not isinstance(displacements, Mapping) or not all(
        isinstance(values, (list, tuple)) for values in displacements.values()
    ):
        raise TypeError(
            "`displacements` must be a dictionary from names of layers to lists of "
            f"arrays. Received: {describe_value(displacements)}"
        )
    base = model.base_model if isinstance(model, Trainer) else model
    layers: dict[str, keras.Layer] = {}
    values: dict[str, list[Any]] = {}
    for name, given in displacements.items():
        found = find_layers(base, [name])
        if len(found) > 1 or found.keys() & values.keys():
            raise ValueError(
                "`displacements` must have one key for each layer, its name or path. "
                f"Received: {name!r}, which stands for {list(found)}, among the keys "
                f"{list(displacements)}"
            )
        layers.update(found)
        values |= {path: [ops.convert_to_tensor(v) for v in given] for path in found}
    outputs = LayerOutputs(layers)
    trace, calls = backend.current_trace(), 0
    errors: list[ValueError] = []

    def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            if backend.current_trace() != trace:
                raise ValueError(_COMPILED)
            with outputs.displaced(values):
                return method(*args, **kwargs)
        except ValueError as error:
            errors.append(error)
            raise

    with intercepted(base, "call", call):
        try:
            yield
        except Exception:
            # Keras wraps errors of a call into text about the call.
            if errors:
                raise errors[0] from None
            raise
    if not calls:
        raise ValueError(_COMPILED)
