"""Functions that JAX has compiled for a model: see `backend.cache`.

`jax.jit` needs a function without state, and compiles it again for each shape. Two
things are done about that:

- Variables that the function reads are arguments of what is compiled, and those that it
  assigns are results. Which these are is found out by tracing the function once, with
  shapes alone. Without this, `jit` would keep the weights of the first call for ever.
- Rows drop out of batches while an attack runs, so that batches have all sizes. They
  are padded with copies of their last row to one of few sizes (`_padded_size`), and
  what the copies gave is cut off. Whether a result has a row for each example is found
  out by comparing its shape for batches of two sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import tree

from advreg._types import Tensor
from advreg.backend.cache import Caches, ModelCache
from advreg.backend.common import signature_of
from advreg.backend.jax.operations import gather
from advreg.backend.jax.scopes import RecordingScope, StatelessScope
from advreg.backend.parts import Parts, attributes_written


class CompiledFunctions(ModelCache):
    """The compiled functions of one model, and facts that were found out about it.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(model)
        self._functions: dict[tuple[Hashable, str], _Compiled] = {}

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the compiled functions, one for each size of a batch."""
        return [
            key for (key, _), one in self._functions.items() for _ in range(one.count)
        ]

    def forget(self) -> None:
        """Drops all functions and facts."""
        super().forget()
        self._functions.clear()

    def compiled(
        self,
        key: Hashable,
        function: Callable[..., Any],
        examples: Any,
        *,
        constants: Any = (),
        takes: Callable[[Any], bool] | None = None,
        keep: Any = None,
        jit_compile: bool | None = None,
        pads: bool = True,
    ) -> Callable[..., Any]:
        """Compiles a function once for batches of each of a few sizes.

        Args:
            key: What the function depends on, beside its arguments and the model.
            function: A function of structures of tensors with the batch axis first,
                or of scalars.
            examples: A tuple of arguments like those that it will be called with.
            constants: A tuple of further arguments, tensors that have no batch axis.
            takes: Has no effect. It is for backends that trace for any size.
            keep: An object whose `id` is in the key. It is kept alive, so that no other
                object gets this `id`.
            jit_compile: `False` for not compiling at all.
            pads: Whether a batch may be padded with copies of its last row. If not, the
                function is compiled for each size.

        Returns:
            The compiled function, of `examples` and `constants`.
        """
        if jit_compile is False:
            return function
        place = (key, repr((signature_of(examples), signature_of(constants))))
        if place not in self._functions:
            self._functions[place] = _Compiled(
                self, function, len(examples), keep, pads
            )
        return self._functions[place]

    def traced(self, trace: Callable[[], Any]) -> Any:
        """Runs something that traces the model, and records what calls write.

        Args:
            trace: Function without arguments.
        """
        began = time.perf_counter()
        with attributes_written(self.model, self._written):
            found = trace()
        # Tracing may have built the model, or changed what calls write.
        self._parts = Parts(self.model, self._written)
        self.seconds += time.perf_counter() - began
        return found


class _Compiled:
    """A function that is compiled for batches of a few sizes.

    Args:
        cache: The cache of the model.
        function: The function.
        batches: The number of its first arguments that are batches.
        keep: An object that is kept alive.
        pads: Whether batches may be padded.
    """

    def __init__(
        self,
        cache: CompiledFunctions,
        function: Callable[..., Any],
        batches: int,
        keep: Any,
        pads: bool,
    ) -> None:
        self._cache, self._function, self._keep = cache, function, keep
        self._batches, self._pads = batches, pads
        self._sizes: list[int] = []
        self._read: list[keras.Variable] = []
        self._assigned: list[keras.Variable] = []
        self._shapes: Any = None  # Those of the results, for a batch of another size.
        self._jitted = jax.jit(self._run)

    @property
    def count(self) -> int:
        """The number of sizes that it was compiled for."""
        return len(self._sizes)

    def __call__(self, *arguments: Any) -> Any:
        rows = _num_rows(arguments[: self._batches])
        if self._shapes is None:
            self._cache.traced(lambda: self._find_out(arguments, rows))
        size = _padded_size(rows, self._sizes) if self._pads else rows
        try:
            results, changes = self._of_size(size, arguments, rows)
        except Exception:
            if size == rows:
                raise
            size = rows  # The network may take none as large as the padded batch.
            results, changes = self._of_size(size, arguments, rows)
        for variable, change in zip(self._assigned, changes, strict=True):
            variable.assign(change)
        if size == rows:
            return results
        return tree.map_structure(
            lambda result, other: _cut(result, other, size, rows),
            results,
            self._shapes,
        )

    def _of_size(self, size: int, arguments: Any, rows: int) -> Any:
        """Runs what was compiled for a size, or compiles it."""
        padded = self._resized(arguments, rows, size)
        values = [variable.value for variable in self._read]
        if size in self._sizes:
            return self._jitted(values, *padded)
        found = self._cache.traced(lambda: self._jitted(values, *padded))
        self._sizes.append(size)
        return found

    def _run(self, values: list[Tensor], *arguments: Any) -> tuple[Any, list[Tensor]]:
        mapping = zip(self._read, values, strict=True)
        with StatelessScope(list(mapping)) as scope:
            results = self._function(*arguments)
        self._assigned = scope.updated
        return results, [scope.get_current_value(each) for each in scope.updated]

    def _find_out(self, arguments: Any, rows: int) -> None:
        """Finds out which variables are read, and the results of another batch size."""

        def run(*arguments: Any) -> Any:
            with RecordingScope() as scope:
                results = self._function(*arguments)
            self._read = scope.read
            return results

        if self._pads:
            # Many networks take batches of any size. Some take one, or no larger one.
            # The size of the padded batch itself would tell nothing.
            padded = _padded_size(rows, [])
            for other in (rows + 1, rows - 1):
                if other and other != padded:
                    try:
                        few = self._resized(arguments, rows, other)
                        self._shapes = jax.eval_shape(run, *few)
                        return
                    except Exception:
                        continue
            self._pads = False
        self._shapes = jax.eval_shape(run, *arguments)

    def _resized(self, arguments: Any, rows: int, size: int) -> Any:
        """Returns the arguments with batches of another size."""
        if size == rows:
            return arguments
        places = np.minimum(np.arange(size), rows - 1)
        batches = tree.map_structure(
            lambda leaf: gather(leaf, places) if jnp.ndim(leaf) else leaf,
            arguments[: self._batches],
        )
        return (*batches, *arguments[self._batches :])


functions_of = Caches(CompiledFunctions)


def _num_rows(arguments: Any) -> int:
    """Returns the batch size of arguments."""
    for leaf in tree.flatten(arguments):
        if jnp.ndim(leaf):
            return int(leaf.shape[0])
    return 1


def _padded_size(rows: int, known: list[int]) -> int:
    """Returns the size to which a batch is padded.

    It is one for which the function has been compiled, if that is at most four times as
    large. Otherwise it is the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... So there are
    few sizes, and a full batch is at most half as large again.

    Args:
        rows: The number of rows.
        known: The sizes for which the function has been compiled.
    """
    fitting = [size for size in known if rows <= size <= 4 * rows]
    if fitting:
        return min(fitting)
    power = 1 << max(rows.bit_length() - 1, 0)
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= rows)


def _cut(result: Tensor, other: Any, size: int, rows: int) -> Tensor:
    """Cuts off the rows of padding from a result that has a row for each example.

    Args:
        result: The result, for a padded batch.
        other: The shape of the result for a batch of another size.
        size: The size of the padded batch.
        rows: The number of rows that are no padding.
    """
    if result.ndim and result.shape[0] == size and other.shape[0] != size:
        return gather(result, np.arange(rows))
    return result
