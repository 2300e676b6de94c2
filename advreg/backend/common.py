"""Operations that need no library of a backend: they are the same on JAX and PyTorch.

On these two, shapes are always known, and a structure holds dense tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import tree

from advreg._types import Tensor


class Signature(NamedTuple):
    """The shape and dtype of a tensor, whatever its batch size."""

    shape: tuple[int | None, ...]
    dtype: str


def is_ragged(leaf: Any) -> bool:
    """Returns false, because Keras has ragged tensors on TensorFlow only."""
    return False


def rank(tensor: Any) -> int:
    """Returns the number of axes of a tensor."""
    return len(tensor.shape)


def num_rows(tensor: Any) -> int:
    """Returns the length of the first axis."""
    return int(tensor.shape[0])


def dtype_name(tensor: Any) -> str:
    """Returns the name of the dtype of a tensor or array, such as "float32"."""
    dtype = tensor.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def signature_of(value: Any) -> Any:
    """Returns the shapes and dtypes of the tensors in a structure, for any batch."""
    return tree.map_structure(_signature, value)


def _signature(leaf: Any) -> Any:
    if leaf is None:
        return None
    return Signature((None, *leaf.shape[1:])[: len(leaf.shape)], dtype_name(leaf))


def assert_at_most(number: int, most: int, message: str) -> None:
    """Checks that a number is not larger than `most`.

    Raises:
        ValueError: It is. The error has this message.
    """
    if number > most:
        raise ValueError(message)


def accumulate(
    add: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    times: int,
    sums: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Applies a function of several tensors repeatedly.

    The function may draw random numbers from a variable, which a loop of JAX could not
    change. So the loop is Python's, and JAX traces it `times` times.
    """
    for _ in range(times):
        sums = add(sums)
    return sums
