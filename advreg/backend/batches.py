"""Datasets on JAX and PyTorch, which have no kind of their own that Keras reads.

Keras reads `tf.data.Dataset` and PyTorch's `DataLoader` on any backend, if the library
is installed. Neither is imported here: an object of one can only exist if the library
was imported before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree


def is_dataset(value: Any) -> bool:
    """Returns whether a value is a `tf.data.Dataset` or a `DataLoader` of PyTorch."""
    return _is_of_tensorflow(value) or _is_of_torch(value)


def is_infinite(dataset: Any) -> bool:
    """Returns whether a dataset is known never to end."""
    if not _is_of_tensorflow(dataset):
        return False
    return bool(
        dataset.cardinality() == sys.modules["tensorflow"].data.INFINITE_CARDINALITY
    )


def dataset_of_arrays(arrays: Any, batch_size: int) -> keras.utils.PyDataset:
    """Makes a dataset of batches of a structure of arrays.

    Args:
        arrays: Arrays with the batch as first axis, in a nested structure.
        batch_size: Number of rows in a batch. The last one may have fewer.

    Raises:
        ValueError: Leaves differ in length, or have no first axis.
    """
    lengths = {
        leaf.shape[0] if getattr(leaf, "shape", ()) else None
        for leaf in tree.flatten(arrays)
    }
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"Arrays of these lengths make no dataset: {lengths}.")
    return _Batches(arrays, int(lengths.pop() or 0), batch_size)


def map_dataset(dataset: Any, step: Callable[..., Any]) -> Any:
    """Applies a function to each batch, when it is read."""
    if _is_of_tensorflow(dataset):
        return dataset.map(step)
    if isinstance(dataset, _Batches):
        return _Mapped(dataset, step)
    return _mapped_loader(dataset, step)


class _Batches(keras.utils.PyDataset):
    """Batches of arrays."""

    def __init__(self, arrays: Any, length: int, batch_size: int) -> None:
        super().__init__()
        self._arrays, self._length, self._batch_size = arrays, length, batch_size

    def __len__(self) -> int:
        return math.ceil(self._length / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        return tree.map_structure(lambda leaf: leaf[rows], self._arrays)


class _Mapped(keras.utils.PyDataset):
    """Batches to each of which a function is applied."""

    def __init__(self, batches: keras.utils.PyDataset, step: Any) -> None:
        super().__init__()
        self._batches, self._step = batches, step

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return _apply(self._step, self._batches[index])


def _mapped_loader(loader: Any, step: Callable[..., Any]) -> Any:
    """Returns a `DataLoader` to whose batches a function is applied.

    It can be read repeatedly, once in each epoch, as a generator cannot. Workers of the
    loader do not run the function, because it may run a model.

    Args:
        loader: The `DataLoader`.
        step: The function.
    """
    torch: Any = sys.modules["torch"]
    base: type = torch.utils.data.DataLoader

    def as_tensor(leaf: Any) -> Any:
        # Keras asks each leaf of a batch for its copy on the CPU.
        if leaf is None or isinstance(leaf, torch.Tensor):
            return leaf
        return torch.as_tensor(keras.ops.convert_to_numpy(leaf))

    class Mapped(base):
        def __iter__(self) -> Iterator[Any]:
            for batch in loader:
                yield tree.map_structure(as_tensor, _apply(step, batch))

        def __len__(self) -> int:
            return len(loader)

    return Mapped(loader.dataset, batch_size=loader.batch_size)


def _apply(step: Callable[..., Any], batch: Any) -> Any:
    """Applies a function to a batch, whose parts are its arguments."""
    return step(*batch) if isinstance(batch, (tuple, list)) else step(batch)


def _is_of_tensorflow(value: Any) -> bool:
    module = sys.modules.get("tensorflow")
    return module is not None and isinstance(value, module.data.Dataset)


def _is_of_torch(value: Any) -> bool:
    module = sys.modules.get("torch.utils.data")
    return module is not None and isinstance(value, module.DataLoader)
