"""All features that are perturbed as one matrix, with masks and ranges in its layout.

A model may take one tensor, or any nested list, tuple or dictionary of tensors. Norms,
projections and random points are joint over all of them. So `Packing` flattens each
example into one row, `[batch, values]`, and nothing after it needs to know the
structure. `unpack` is the way back.

Only the leaves that are perturbed become columns. The others, such as integer codes or
strings, are kept aside and put back unchanged.

A constraint (a mask, or one end of a range) is a number, an array that broadcasts to
its feature, or a structure of these that names features. `spread` puts it into the same
columns, in no larger a tensor than needed: a number stays a scalar, and a constraint
that is the same for all examples gets a single row.

Shapes may be unknown while a graph is made. So a size may be a number or a scalar
tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Constraint, Features, Tensor
from advreg.checks import describe
from advreg.perturbation.geometry import wide_type


class NothingMovesError(ValueError):
    """Raised if no feature can be perturbed."""

    def advising(self, advice: str) -> NothingMovesError:
        """Returns the same error with a further sentence that says what to do.

        Args:
            advice: The sentence.
        """
        rule, received, values = str(self).rpartition(" Received: ")
        return NothingMovesError(f"{rule} {advice}{received}{values}")


class Packing:
    """The layout of the perturbed features of a batch as a `[batch, values]` matrix.

    Args:
        features: A nested structure of tensors.
        moving: For each leaf, in the order of `keras.tree.flatten`, whether it is
            perturbed. The others stay unchanged.

    Raises:
        NothingMovesError: No leaf is perturbed.
        ValueError: A leaf that is perturbed has no known rank, or is a scalar.
    """

    def __init__(self, features: Features, moving: Sequence[bool]) -> None:
        self.features = features
        self.leaves = tree.flatten(features)
        self.moving = list(moving)
        self.tensors = list(itertools.compress(self.leaves, self.moving))
        if not self.tensors:
            raise NothingMovesError(nothing_to_perturb_message(features))
        for tensor in self.tensors:
            if not backend.rank(tensor):
                raise ValueError(
                    "A perturbed feature needs a known rank and a batch axis first. "
                    f"Received: {describe(features)}"
                )
        self.dtype = wide_type(*self.tensors)
        self.shapes = [ops.shape(tensor) for tensor in self.tensors]
        self.widths = [_product(shape[1:]) for shape in self.shapes]

    def pack(self, leaves: Sequence[Tensor]) -> Tensor:
        """Casts and reshapes the perturbed leaves into one matrix `[batch, values]`.

        Args:
            leaves: A tensor for each leaf of the features. Those that are not perturbed
                are ignored.
        """
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
        """Makes features of a matrix, in their structure, shapes and dtypes.

        Leaves that are not perturbed are those of the features.
        """
        leaves, start = list(self.leaves), 0
        places = [place for place, move in enumerate(self.moving) if move]
        for place, tensor, shape, width in zip(
            places, self.tensors, self.shapes, self.widths, strict=True
        ):
            columns = matrix[:, start : start + width]
            # A single feature is the whole matrix, and needs no slice.
            columns = matrix if len(places) == 1 else columns
            leaves[place] = ops.cast(ops.reshape(columns, shape), tensor.dtype)
            start = start + width
        return tree.pack_sequence_as(self.features, leaves)

    def spread(
        self, name: str, constraint: Constraint, missing: float
    ) -> Tensor | None:
        """Puts a mask, or one end of a range, into the columns of the matrix.

        Args:
            name: Name of the argument, for errors.
            constraint: A number, an array, or a structure of these.
            missing: The value of features that a structure leaves out, or sets to
                `None`.

        Returns:
            A scalar or a matrix that broadcasts to `[batch, values]`, or `None` where
            nothing is constrained.

        Raises:
            ValueError: The structure is not that of the features, or an array does not
                broadcast to its feature.
        """
        _check_structure(name, constraint, self.features)
        values = []
        for (path, leaf), move in zip(
            tree.flatten_with_path(self.features), self.moving, strict=True
        ):
            value, named = lookup(constraint, path)
            # An array that is given for one feature by name must fit it, even if this
            # feature is not perturbed. One that is given for all need not.
            if move or (named and backend.is_tensor(leaf)):
                _check_shape(name, value, leaf, path)
            if move:
                values.append(value)
        if all(value is None for value in values):
            return None
        if not isinstance(constraint, (dict, list, tuple)) and not np.ndim(constraint):
            return ops.convert_to_tensor(constraint, self.dtype)
        # From here on some feature has an array, or features differ.
        values = [missing if value is None else value for value in values]
        values = [ops.convert_to_tensor(value, self.dtype) for value in values]
        ranks = [len(tensor.shape) for tensor in self.tensors]
        # Constraints that are the same for all examples need a single row.
        shared = all(
            len(value.shape) < rank or value.shape[0] == 1
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

    def spread_can_move(
        self, can_move: Sequence[Tensor | None] | None
    ) -> Tensor | None:
        """Puts booleans, one tensor for each leaf, into the columns of the matrix.

        Args:
            can_move: For each leaf a boolean tensor that broadcasts to it, or `None`
                where it is true everywhere.

        Returns:
            A boolean matrix `[batch, values]`, or `None` where all are true.
        """
        chosen = list(itertools.compress(can_move or (), self.moving))
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


def as_given(moved: Features, given: Features, moving: Sequence[bool]) -> Features:
    """Returns perturbed features as NumPy arrays, beside the given unperturbed ones.

    Args:
        moved: Perturbed features, as tensors.
        given: The features that the user passed, in the same structure.
        moving: For each leaf whether it is perturbed.

    Returns:
        The structure, with a NumPy array for each leaf. A leaf that is not perturbed is
        the given object itself, where it is no tensor or holds strings.
    """
    leaves, came = tree.flatten(moved), tree.flatten(given)
    # Strings stay as given: Keras takes them as tensors, but not as the arrays of bytes
    # objects that TensorFlow would make of them.
    return tree.pack_sequence_as(
        moved,
        [
            old if not moves and _stays(old) else ops.convert_to_numpy(new)
            for new, old, moves in zip(leaves, came, moving, strict=True)
        ],
    )


def _stays(leaf: Any) -> bool:
    return not backend.is_tensor(leaf) or backend.dtype_name(leaf) == "string"


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else ops.concatenate(rows, axis=1)


def nothing_to_perturb_message(features: Features) -> str:
    """Returns the message of `NothingMovesError`, with a reason for each leaf."""
    reasons = [
        f"{name_of(path)} ({reason_unperturbed(leaf)})"
        for path, leaf in tree.flatten_with_path(features)
    ]
    return (
        f"Nothing can be perturbed: {', '.join(reasons)}. Dense floats are perturbed, "
        "images of type uint8, and integers for which the model declares an input of "
        "floats, if the loss has a gradient with respect to them. Cast quantities that "
        "arrive as integers to float32. A layer that casts to integers, as `Embedding` "
        f"does, stops the gradient. Received: {describe(features)}"
    )


def reason_unperturbed(leaf: Any) -> str:
    """Returns in a few words why a leaf is not perturbed."""
    if backend.is_ragged(leaf) or backend.is_sparse(leaf):
        return "not dense"
    if getattr(leaf, "dtype", None) is None:
        return "no tensor"
    dtype = backend.dtype_name(leaf)
    if keras.backend.is_float_dtype(dtype):
        return f"no gradient reaches it, of type {dtype}"
    if keras.backend.is_int_dtype(dtype):
        return f"integers of type {dtype}"
    return f"of type {dtype}"


def name_of(path: Sequence[Any]) -> str:
    """Returns the name of a leaf in messages: its keys, or "the input" without any."""
    return ".".join(str(key) for key in path) or "the input"


def _check_structure(name: str, constraint: Constraint, features: Features) -> None:
    """Checks that a structure of constraints names only features that exist."""
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


def lookup(constraint: Constraint, path: Sequence[Any]) -> tuple[Constraint, bool]:
    """Finds the constraint of one leaf.

    Args:
        constraint: A number, an array, or a structure of these.
        path: The keys that lead to the leaf.

    Returns:
        The leaf's number or array, or `None`; and whether it was given for this leaf
        alone, by its keys, rather than for all leaves.
    """
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
    """Checks that an array broadcasts to the shape of its feature."""
    if value is None:
        return
    given, wanted = tuple(np.shape(value)), tuple(leaf.shape)
    aligned = zip(reversed(given), reversed(wanted), strict=False)
    # An unknown size (`None`) is fitted by size 1 only. So an array with one row for
    # each example is refused where the size of the batch is unknown.
    if len(given) > len(wanted) or not all(g in (1, w) for g, w in aligned):
        where = "".join(f" {key!r}" for key in path)
        raise ValueError(
            f"`{name}` must broadcast to the feature{where} that it constrains, which "
            f"has shape {wanted}. Received shape: {given}"
        )


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: a * b, sizes, 1)
