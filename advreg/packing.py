"""All features that move as one matrix, and masks and ranges laid out beside it.

Here ends what is known of structures: joint norms, projection and sampling see rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from advreg.checks import Constraint
from advreg.geometry import Tensor

Features = Any  # a tensor, or a nested dict, list or tuple of tensors
Gradients = list  # one tensor, or `None`, for each leaf of the features


class NothingMovesError(ValueError):
    """No feature can be perturbed."""


class Packing:
    """All features that move, as one `[batch, values]` matrix, and back.

    Joint norms, masks, ranges, projection and sampling then know no structure.

    Args:
        features: A nested structure of tensors.
        moving: For each leaf whether it moves; the others stay what they are.
    """

    def __init__(self, features: Features, moving: Sequence[bool]) -> None:
        self.features = features
        self.leaves = tree.flatten(features)
        self.moving = list(moving)
        self.tensors = list(itertools.compress(self.leaves, self.moving))
        if not self.tensors:
            raise NothingMovesError(
                "Nothing can be perturbed: only dense float features, and images of "
                "type uint8, that the loss depends on can, and of the features "
                "received none is both. Cast quantities that arrive as integers to "
                "float32, and check that the gradient reaches the input: a layer or "
                "a nested model that casts to integers stops it. Received: "
                f"{describe(features)}"
            )
        for tensor in self.tensors:
            if not tensor.shape.rank:
                raise ValueError(
                    "A perturbed feature needs a known rank and a batch axis first. "
                    f"Received: {describe(features)}"
                )
        self.dtype = keras.backend.result_type(
            "float32", *(tensor.dtype for tensor in self.tensors)
        )
        self.shapes = [ops.shape(tensor) for tensor in self.tensors]
        self.widths = [_product(shape[1:]) for shape in self.shapes]

    def pack(self, leaves: Sequence[Tensor]) -> Tensor:
        """Casts and reshapes the leaves that move into one matrix."""
        rows = [
            ops.cast(ops.reshape(leaf, (shape[0], width)), self.dtype)
            for leaf, shape, width in zip(
                itertools.compress(leaves, self.moving),
                self.shapes,
                self.widths,
                strict=True,
            )
        ]
        return _side_by_side(rows)

    def unpack(self, matrix: Tensor) -> Features:
        """Puts the columns back in their leaves, beside those that do not move."""
        leaves, start = list(self.leaves), 0
        places = [place for place, move in enumerate(self.moving) if move]
        for place, tensor, shape, width in zip(
            places, self.tensors, self.shapes, self.widths, strict=True
        ):
            columns = matrix[:, start : start + width]
            columns = matrix if len(places) == 1 else columns
            leaves[place] = ops.cast(ops.reshape(columns, shape), tensor.dtype)
            start = start + width
        return tree.pack_sequence_as(self.features, leaves)

    def spread(
        self, name: str, constraint: Constraint, missing: float
    ) -> Tensor | None:
        """Lays a mask or a range out in the columns of the matrix.

        Args:
            name: The argument that errors name.
            constraint: A number, an array, or a structure of these.
            missing: What stands for `None`.

        Returns:
            A scalar or a matrix that broadcasts to `[batch, values]`, or `None` where
            nothing is constrained.
        """
        _check_structure(name, constraint, self.features)
        values = []
        for (path, leaf), move in zip(
            tree.flatten_with_path(self.features), self.moving, strict=True
        ):
            value, named = _lookup(constraint, path)
            # What is said of this very feature must fit, even if it does not move.
            if move or (named and isinstance(leaf, tf.Tensor)):
                _check_shape(name, value, leaf, path)
            if move:
                values.append(value)
        if all(value is None for value in values):
            return None
        if not isinstance(constraint, (dict, list, tuple)) and not np.ndim(constraint):
            return ops.convert_to_tensor(constraint, self.dtype)
        values = [missing if value is None else value for value in values]
        values = [ops.convert_to_tensor(value, self.dtype) for value in values]
        ranks = [tensor.shape.rank for tensor in self.tensors]
        # Ranges that are the same for all examples are laid out once.
        shared = all(
            value.shape.rank < rank or value.shape[0] == 1
            for value, rank in zip(values, ranks, strict=True)
        )
        rows = [
            ops.reshape(
                ops.broadcast_to(value, (1 if shared else shape[0], *shape[1:])),
                (1 if shared else shape[0], width),
            )
            for value, shape, width in zip(
                values, self.shapes, self.widths, strict=True
            )
        ]
        return _side_by_side(rows)

    def spread_flags(self, flags: Sequence[Tensor | None] | None) -> Tensor | None:
        """Lays booleans, one tensor for each leaf, out in the columns of the matrix.

        Args:
            flags: Boolean tensors that broadcast to their leaves; `None` is true.

        Returns:
            A boolean matrix `[batch, values]`, or `None` where all is true.
        """
        chosen = list(itertools.compress(flags or (), self.moving))
        if all(flag is None for flag in chosen):
            return None
        rows = [
            ops.reshape(
                ops.broadcast_to(True if flag is None else flag, shape),
                (shape[0], width),
            )
            for flag, shape, width in zip(chosen, self.shapes, self.widths, strict=True)
        ]
        return _side_by_side(rows)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else ops.concatenate(rows, axis=1)


def describe(features: Features) -> str:
    """Shapes and dtypes of features, for error messages."""
    described = str(
        tree.map_structure(
            lambda leaf: (
                f"{type(leaf).__name__}(shape={leaf.shape}, dtype={leaf.dtype})"
                if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
                else type(leaf).__name__
            ),
            features,
        )
    )
    described = described.replace('"', "")  # No quotes around what is no string.
    return described if len(described) <= 1000 else f"{described[:1000]}..."


def _check_structure(name: str, constraint: Constraint, features: Features) -> None:
    """Checks that a structure of constraints names only features that there are."""
    if not isinstance(constraint, (dict, list, tuple)):
        return
    problem = None
    if isinstance(constraint, dict):
        if not isinstance(features, Mapping):
            problem = "is a dictionary, and the features are not"
        elif unknown := sorted(set(constraint) - set(features)):
            problem = f"has keys {unknown} that are no features"
        else:
            for key, value in constraint.items():
                _check_structure(f"{name}[{key!r}]", value, features[key])
    elif not isinstance(features, (list, tuple)):
        problem = (
            f"is a {type(constraint).__name__}, and the features are not (numbers that "
            "belong to one feature are to be a NumPy array)"
        )
    elif len(constraint) != len(features):
        problem = (
            f"has {len(constraint)} entries, and there are {len(features)} features"
        )
    else:
        for index, (value, feature) in enumerate(
            zip(constraint, features, strict=True)
        ):
            _check_structure(f"{name}[{index}]", value, feature)
    if problem:
        raise ValueError(
            f"`{name}` must be a number, an array, or have the structure of the "
            f"features. It {problem}. Received the features: {describe(features)}"
        )


def _lookup(constraint: Constraint, path: Sequence[Any]) -> tuple[Constraint, bool]:
    """Finds what a constraint says of a leaf, and whether it says it of that alone."""
    for key in path:
        if isinstance(constraint, dict):
            constraint = constraint.get(key)
        elif isinstance(constraint, (list, tuple)):
            constraint = constraint[key]
        else:
            return constraint, False
    return constraint, bool(path)


def _check_shape(
    name: str, value: Constraint, leaf: Tensor, path: Sequence[Any]
) -> None:
    """Checks that an array broadcasts to its feature without making it larger."""
    if value is None:
        return
    given, wanted = tuple(np.shape(value)), tuple(leaf.shape)
    aligned = zip(reversed(given), reversed(wanted), strict=False)
    # A size that differs from example to example fits no batch of unknown size.
    if len(given) > len(wanted) or not all(g in (1, w) for g, w in aligned):
        where = "".join(f" {key!r}" for key in path)
        raise ValueError(
            f"`{name}` must broadcast to the feature{where} that it constrains, which "
            f"has shape {wanted}. Received shape: {given}"
        )


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: a * b, sizes, 1)
