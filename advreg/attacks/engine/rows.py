"""Selects and joins rows of batches, because fooled examples leave their batch.

A `Batch` is a dictionary of tensors and arrays, each with one row for each example. The
engine never changes one. It makes a new one with fewer rows, or joins what is left of
several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from advreg import backend
from advreg.config.norms import NormType

# At most 16 different batch sizes while rows drop out, because oneDNN prepares its
# kernels again for each new size. That can cost more time than a few rows less save.
SIZES = 16
# Tensors and arrays, one row for each example: `features`, `classes` or `labels`, the
# state of a solver, and whatever else the caller has added.
Batch = dict[str, Any]
INPUTS = ("features", "classes", "labels")  # The entries that solvers need.


class Result(NamedTuple):
    """The result of a solver for each row of a batch, as NumPy arrays.

    Args:
        fooled: Whether the attack has succeeded, `[batch]`. For a model that draws
            random numbers: in most draws.
        displacement: The displacement at which it has succeeded, or else the last one,
            `[batch, values]`.
        closeness: The margin at the last displacement, or the loss without
            classification, `[batch]`. It is infinite where the attack stopped early.
        not_finite: Whether the outputs there are NaN or infinite, `[batch]`.
    """

    fooled: np.ndarray
    displacement: np.ndarray
    closeness: np.ndarray
    not_finite: np.ndarray

    def rows(self, places: np.ndarray) -> Result:
        """Returns some of the rows."""
        return Result(*(part[places] for part in self))

    def best_of(self, other: Result) -> Result:
        """Returns for each row the better of two results: the larger closeness."""
        kept = other.closeness > self.closeness
        return Result(
            self.fooled | other.fooled,
            np.where(kept[:, None], other.displacement, self.displacement),
            np.where(kept, other.closeness, self.closeness),
            np.where(kept, other.not_finite, self.not_finite),
        )


def rows_to_keep(fooled: np.ndarray, count: int) -> np.ndarray:
    """Chooses the rows that stay in a batch, so that batches have few different sizes.

    These are all rows that are not fooled, and as many fooled ones as fill up the next
    of the `SIZES`.

    Args:
        fooled: Which rows are fooled, `[rows]`.
        count: Number of rows that the batch began with.

    Returns:
        The places of the rows, in order.
    """
    share = -(-count // SIZES)  # Rounded up.
    remaining = len(fooled) - np.count_nonzero(fooled)
    number = min(-(-remaining // share) * share, len(fooled))
    return np.sort(np.argsort(fooled, kind="stable")[:number])


def gather_rows(batch: Batch, places: np.ndarray | None) -> Batch:
    """Returns a batch of some of the rows.

    Args:
        batch: A batch.
        places: The numbers of the rows, `None` for the batch itself.
    """
    if places is None:
        return batch
    return tree.map_structure(
        lambda leaf: (
            leaf[places]
            if isinstance(leaf, np.ndarray)
            else backend.gather(leaf, places)
        ),
        batch,
    )


def concat_rows(parts: Sequence[Batch]) -> Batch:
    """Joins batches, row after row."""
    return tree.map_structure(
        lambda *leaves: (
            np.concatenate(leaves)
            if isinstance(leaves[0], np.ndarray)
            else backend.concat(leaves)
        ),
        *parts,
    )


def same_signature(one: Batch, other: Batch) -> bool:
    """Returns whether two batches can be joined. Sequences may differ in length."""
    return repr(backend.signature_of(only(one, INPUTS))) == repr(
        backend.signature_of(only(other, INPUTS))
    )


def num_rows(batch: Batch) -> int:
    """Returns the number of rows."""
    return int(ops.shape(tree.flatten(batch)[0])[0])


def only(batch: Batch, names: Sequence[str]) -> Batch:
    """Returns the entries of a batch that have one of these names."""
    return {name: batch[name] for name in names if name in batch}


def row_lengths(displacement: np.ndarray) -> dict[NormType, np.ndarray]:
    """Computes each norm of each row of a matrix `[batch, values]`, in float64."""
    sizes = np.abs(displacement.astype("float64"))
    return {
        NormType.L1: sizes.sum(1),
        NormType.L2: np.sqrt(np.square(sizes).sum(1)),
        NormType.INFINITY: sizes.max(1, initial=0.0),
    }
