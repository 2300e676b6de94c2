"""Statistics of the values of the data that an evaluation reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.network.gradients import select


class Values:
    """Collects statistics of values, batch by batch, in memory that does not grow.

    "A value" is one entry of the perturbed features of an example, such as one pixel.
    """

    def __init__(self) -> None:
        # For each feature, the number of examples with NaN or infinite values.
        self.not_finite: dict[str, int] = {}
        # The smallest and the largest of each value.
        self.lowest: np.ndarray = np.zeros(0)
        self.highest: np.ndarray = np.zeros(0)
        # Which values are whole numbers in all examples, and which had a gradient.
        self._whole = self._slopes = np.zeros(0, bool)
        # Of each perturbed feature: name, number of values, whether it is a table.
        self._columns: list[tuple[str, int, bool]] = []

    def note(
        self, features: Features, names: Sequence[str], moving: Sequence[bool]
    ) -> None:
        """Adds the values of a batch.

        Args:
            features: A batch.
            names: The name of each leaf.
            moving: For each leaf whether it is perturbed.
        """
        leaves = tree.flatten(features)
        for name, leaf in zip(names, leaves, strict=True):
            if backend.is_tensor(leaf) and keras.backend.is_float_dtype(leaf.dtype):
                finite = np.isfinite(ops.convert_to_numpy(leaf).reshape(len(leaf), -1))
                count = int((~finite).any(axis=1).sum())
                if count:
                    self.not_finite[name] = self.not_finite.get(name, 0) + count
        if not any(moving):
            return
        values = ops.convert_to_numpy(side_by_side(select(features, moving)))
        values = np.where(np.isfinite(values), values, np.nan)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN")
            low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        whole = np.all(np.isnan(values) | (values == np.floor(values)), axis=0)
        # The first batch. Or images of another size, with which the statistics start
        # again.
        if self.lowest.shape != low.shape:
            self.lowest, self.highest, self._whole = low, high, whole
            self._slopes = np.zeros(len(low), bool)
            self._columns = [
                (name, math.prod(leaf.shape[1:]), len(leaf.shape) == 2)
                for name, leaf, moves in zip(names, leaves, moving, strict=True)
                if moves
            ]
        self.lowest = np.fmin(self.lowest, low)
        self.highest = np.fmax(self.highest, high)
        self._whole &= whole

    def note_slopes(self, slopes: np.ndarray) -> None:
        """Adds which values had a gradient in the last batch.

        Args:
            slopes: Booleans, one for each value.
        """
        if self._slopes.shape == slopes.shape:
            self._slopes |= slopes

    @property
    def code_columns(self) -> list[str]:
        """Perturbed columns of tables that look like codes of categories.

        Those are whole numbers in all examples, and the loss never had a gradient
        there.
        """
        found, start = [], 0
        codes = self._whole & ~self._slopes & (self.highest > self.lowest)
        if not self._slopes.any():
            return []
        for name, width, is_table in self._columns:
            places = np.flatnonzero(codes[start : start + width]) if is_table else ()
            found += [f"{name}[{place}]" for place in places]
            start += width
        return found


def side_by_side(leaves: Sequence[Tensor]) -> Tensor:
    """Joins features into one matrix `[batch, values]`, in float64."""
    rows = [ops.reshape(leaf, (ops.shape(leaf)[0], -1)) for leaf in leaves]
    return ops.concatenate(
        [ops.cast(row, backend.widest_float()) for row in rows], axis=1
    )
