"""An array of one byte for each example, for data of unknown length."""

from __future__ import annotations

from typing import Any

import numpy as np

UNKNOWN = 0
ROBUST = 1
FOOLED = 2


class ByteArray:
    """An array of bytes that grows when larger numbers of examples are written."""

    def __init__(self) -> None:
        self._values = np.zeros(1024, "uint8")

    def set(self, index: np.ndarray, value: Any) -> None:
        """Writes values.

        Args:
            index: The numbers of the examples.
            value: A value for each, or one for all.
        """
        if not len(index):
            return
        needed = int(index.max()) + 1
        if needed > len(self._values):
            grown = np.zeros(max(needed, 2 * len(self._values)), "uint8")
            grown[: len(self._values)] = self._values
            self._values = grown
        self._values[index] = value

    def get(self, index: np.ndarray) -> np.ndarray:
        """Reads values, 0 where none was written.

        Args:
            index: The numbers of the examples.
        """
        found = np.zeros(len(index), "uint8")
        known = index < len(self._values)
        found[known] = self._values[index[known]]
        return found
