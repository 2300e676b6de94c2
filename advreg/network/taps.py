"""Intercepts a method of a layer while a model runs.

How it works: Keras calls `self.call`, and layers call `self.activation` or
`self.convolution_op`. Python looks for these on the layer object before it looks on the
class. `intercepted` sets a function on the object, and removes it afterwards. This
holds for sequential, functional, nested and subclassed models, and for each call of a
layer that is called several times.

A handler can record what goes in or comes out, add to an output, or compute it in
another way. It receives the method that it replaces, and its arguments.

A trap: several threads may run one model, as the replicas of a strategy do, and they
take turns in the middle of a pass. So there is one function on the layer for all
threads. It asks which thread is calling, and a thread that has intercepted nothing gets
the plain method. The function is removed when the last thread has left, also after an
exception, so that nothing stays on the layer.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from advreg.backend.parts import Temporary

Handler = Callable[..., Any]  # (method, *args, **kwargs) -> what the method returns

_lock = threading.RLock()


class _Interception(Temporary):
    """The function on a layer that replaces a method, for the threads that asked."""

    def __init__(self, layer: keras.Layer, name: str) -> None:
        super().__init__(vars(layer).get(name))
        self._method = getattr(layer, name)
        functools.update_wrapper(self, self._method, updated=())
        self._layer, self._name = layer, name
        self._handlers: dict[int, list[Handler]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._method
        for handler in self._handlers.get(threading.get_ident(), ()):
            function = functools.partial(handler, function)
        return function(*args, **kwargs)

    def add(self, handler: Handler) -> None:
        """Adds a handler for this thread, to be called before its earlier ones."""
        self._handlers.setdefault(threading.get_ident(), []).append(handler)

    def remove(self) -> None:
        """Removes the last handler of this thread, and with the last of all, itself."""
        thread = threading.get_ident()
        self._handlers[thread].pop()
        if not self._handlers[thread]:
            del self._handlers[thread]
        if self._handlers:
            return
        # Not by `setattr`: Keras would track it, as if it were state of the layer.
        if self.replaces is not None:
            vars(self._layer)[self._name] = self.replaces
        else:
            del vars(self._layer)[self._name]


@contextlib.contextmanager
def intercepted(layer: keras.Layer, name: str, handler: Handler) -> Iterator[None]:
    """Replaces a method of a layer by a handler, as a context manager.

    Args:
        layer: The layer, or a model.
        name: Name of the method, or of an attribute that the layer calls: `"call"`,
            `"activation"`, `"convolution_op"`.
        handler: Function of the method that it replaces and of its arguments, which
            returns what the method should return. Of several handlers, the one that was
            entered last is called first.

    Example:
    ```python
    def record(method, *args, **kwargs):
        outputs = method(*args, **kwargs)
        seen.append(outputs)
        return outputs

    with intercepted(layer, "call", record):
        model(x)
    ```
    """
    with _lock:
        found = vars(layer).get(name)
        if not isinstance(found, _Interception):
            found = vars(layer)[name] = _Interception(layer, name)
        found.add(handler)
    try:
        yield
    finally:
        with _lock:
            found.remove()
