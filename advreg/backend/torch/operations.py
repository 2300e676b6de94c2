"""The operations that advreg needs from PyTorch itself.

They have the names and arguments of `backend.tensorflow.operations`. Operations that
`keras.ops` has are not here.

PyTorch runs everything at once, and records for gradients by itself. So a gradient is
taken with respect to copies of tensors that ask for one, inside `enable_grad`, because
a caller may have switched recording off. What leaves such a block is detached: without
this, it would keep the memory of the whole pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import torch
from keras import ops, tree

from advreg._types import Tensor, Watch

ERRORS = (RuntimeError, IndexError)  # The errors that operations of PyTorch raise.
NUM_SEEDS = 2**31  # The seeds that a `SeedGenerator` of Keras takes.
StatelessScope = keras.StatelessScope


def is_tensor(leaf: Any) -> bool:
    """Returns whether a value is a dense tensor."""
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided


def is_sparse(leaf: Any) -> bool:
    """Returns whether a value is a sparse tensor."""
    return isinstance(leaf, torch.Tensor) and not is_tensor(leaf)


def is_eager() -> bool:
    """Returns whether operations run at once: always."""
    return True


def current_trace() -> Any:
    """Returns `None`, because nothing is traced."""
    return None


def is_symbolic(tensor: Tensor) -> bool:
    """Returns whether a tensor has no value yet, as in Keras's dry runs."""
    return bool(getattr(tensor, "is_meta", False))


def widest_float() -> str:
    """Returns the widest float type."""
    return "float64"


def to_tensor(leaf: Any) -> Any:
    """Converts an array or variable to a tensor, and returns tensors and `None`."""
    if leaf is None or isinstance(leaf, torch.Tensor):
        return leaf
    return ops.convert_to_tensor(leaf)


def copy(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same values, because variables change in place."""
    return tensor.detach().clone()


def argmax(scores: Tensor) -> Tensor:
    """Returns the place of the largest score of each row, int32 `[batch]`."""
    return torch.argmax(scores, dim=1).to(torch.int32)


def maximum(one: Tensor, other: Any) -> Tensor:
    """Returns the larger of two values. Keras would make float32 of float64."""
    return torch.maximum(one, torch.as_tensor(other, dtype=one.dtype))


def minimum(one: Tensor, other: Any) -> Tensor:
    """Returns the smaller of two values. Keras would make float32 of float64."""
    return torch.minimum(one, torch.as_tensor(other, dtype=one.dtype))


def cumsum(tensor: Tensor, axis: int) -> Tensor:
    """Sums up along an axis. Keras would make float32 of float64."""
    return torch.cumsum(tensor, dim=axis)


def own_copy(data: Any) -> Any:
    """Returns the data, because nothing here writes into a tensor."""
    return data


def gather(tensor: Tensor, places: Any) -> Tensor:
    """Returns some of the rows of a tensor. `places` are not negative."""
    return tensor[torch.as_tensor(places, device=tensor.device).long()]


def padding(rows: int, batch_size: int) -> np.ndarray | None:
    """Returns `None`, because PyTorch compiles nothing for a number of rows."""
    return None


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """Joins tensors along their first axis."""
    return torch.cat(list(tensors))


def uniform(shape: Any, seed: Tensor, dtype: Any) -> Tensor:
    """Draws uniformly from [0, 1). The same seed, `[2]`, gives the same numbers."""
    generator, device = _generator(seed)
    return torch.rand(
        tuple(map(int, shape)),
        generator=generator,
        dtype=getattr(torch, keras.backend.standardize_dtype(dtype)),
        device=device,
    )


def random_integers(shape: Any, seed: Tensor) -> Tensor:
    """Draws int32 from [0, 2**31 - 1). The same seed, `[2]`, gives the same numbers."""
    generator, device = _generator(seed)
    return torch.randint(
        0,
        2**31 - 1,
        tuple(shape),
        generator=generator,
        dtype=torch.int32,
        device=device,
    )


def _generator(seed: Tensor) -> tuple[torch.Generator, torch.device]:
    """Returns a generator that begins with a seed, and its device."""
    high, low = (int(part) & 0xFFFFFFFF for part in seed)
    device = seed.device
    return torch.Generator(device).manual_seed(high << 32 | low), device


def choose(condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """Runs one of two functions."""
    return one() if condition else other()


def differentiate(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]],
    tensors: Sequence[Tensor],
    scale: Tensor | float | None = None,
    zeros: bool = False,
) -> tuple[Tensor, Any, list[Any]]:
    """Runs a function, and takes the gradient of the value that it returns.

    See `backend.tensorflow.operations.differentiate`.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        value, others = function(leaves)
    gradients = _gradients(value, leaves, scale)
    if zeros:
        gradients = _with_zeros(gradients, leaves)
    return value.detach(), _detached(others), gradients


def differentiate_step(
    function: Callable[[list[Tensor], Watch], tuple[Tensor, Tensor | None, Any]],
    variables: Callable[[], Sequence[keras.Variable]],
    tensors: Sequence[Tensor] = (),
    watches: bool = False,
) -> tuple[Any, list[Any], list[Any]]:
    """Runs a function, and takes two gradients of the values that it returns.

    See `backend.tensorflow.operations.differentiate_step`.
    """
    leaves: list[Tensor] = []

    def watch(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:  # No trained weight is before it.
            tensor = tensor.detach().requires_grad_()
        leaves.append(tensor)
        return tensor

    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in tensors]
        total, attacked, others = function(given, watch)
    leaves[:0] = given
    weights = [variable.value for variable in variables()]
    if leaves and attacked is not total:
        of_tensors = _gradients(attacked, leaves, keep=True)
        return _detached(others), _gradients(total, weights), of_tensors
    both = _gradients(total, [*weights, *leaves])
    return _detached(others), both[: len(weights)], both[len(weights) :]


def weight_gradients(
    function: Callable[[], Tensor],
    variables: Sequence[keras.Variable],
    scale: Tensor | float | None,
) -> list[Tensor]:
    """Takes the gradient of a loss with respect to variables, times a scale.

    See `backend.tensorflow.operations.weight_gradients`.
    """
    with torch.enable_grad(), StatelessScope():
        loss = function()
    weights = [variable.value for variable in variables]
    return _with_zeros(_gradients(loss, weights, scale), weights)


def _gradients(
    value: Tensor,
    tensors: Sequence[Tensor],
    scale: Tensor | float | None = None,
    keep: bool = False,
) -> list[Any]:
    """Takes a gradient, `None` for tensors that the value does not depend on."""
    asking = [tensor for tensor in tensors if tensor.requires_grad]
    if not value.requires_grad or not asking:
        return [None] * len(tensors)
    found = iter(
        torch.autograd.grad(
            value,
            asking,
            torch.full_like(value, 1.0 if scale is None else float(scale)),
            retain_graph=keep,
            allow_unused=True,
        )
    )
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def _with_zeros(gradients: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def _detached(structure: Any) -> Any:
    """Returns a structure whose tensors do not keep the memory of a pass.

    The mask that Keras has put on a tensor stays on it.
    """

    def detached(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        found = leaf.detach()
        found.__dict__.update(leaf.__dict__)
        return found

    return tree.map_structure(detached, structure)


def constants() -> contextlib.AbstractContextManager[Any]:
    """Switches the recording for gradients off, as a context manager."""
    return torch.no_grad()


def add_gradients(a: Any, b: Any) -> Any:
    """Adds two gradients, each of which may be `None` or sparse."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def dense(gradient: Any) -> Tensor:
    """Converts a gradient, which may be sparse, to a dense tensor."""
    return gradient.to_dense() if is_sparse(gradient) else gradient


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    weights: Sequence[keras.Variable],
) -> None:
    """Updates weights by an optimizer."""
    with torch.no_grad():
        optimizer.apply(list(gradients), list(weights))


def repeat(
    function: Callable[[Tensor], Tensor], times: int, value: Tensor, unroll: bool
) -> Tensor:
    """Applies a function repeatedly, each time to its last result.

    See `backend.tensorflow.operations.repeat`.
    """
    for _ in range(times):
        value = function(value)
    return value
