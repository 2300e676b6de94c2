"""Changes of one token: which are possible, which to try next, and what they gave.

A change replaces the token at one place by one candidate. `Changes` hands out those of
each example, best first. `Gains` remembers by how much each replacement of a token by
another has raised the margin, in whatever example. The gradient cannot see what a token
would do that is far from the one that is there; where it fooled others, it is tried.
"""

from __future__ import annotations

import numpy as np


class Gains:
    """Mean gain of the margin, by the token that went and the one that came."""

    def __init__(self) -> None:
        self._pairs = np.zeros(0, "int64")
        self._sums: np.ndarray = np.zeros(0)
        self._counts: np.ndarray = np.zeros(0)

    def add(self, old: np.ndarray, new: np.ndarray, gains: np.ndarray) -> None:
        """Adds what changes have given, except where it is not finite.

        Args:
            old: Tokens before, `[n]`.
            new: Tokens after, `[n]`.
            gains: Gains of the margin, `[n]`.
        """
        known = np.isfinite(gains)
        pairs = np.concatenate([self._pairs, _pair(old[known], new[known])])
        self._pairs, place = np.unique(pairs, return_inverse=True)
        sums = np.concatenate([self._sums, gains[known]])
        counts = np.concatenate([self._counts, np.ones(known.sum())])
        self._sums = np.bincount(place, sums, len(self._pairs))
        self._counts = np.bincount(place, counts, len(self._pairs))

    def of(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Returns the mean gain of changes, -inf where none has been tried.

        Args:
            old: Tokens before.
            new: Tokens after, of the same shape.
        """
        found = np.full(old.shape, -np.inf)
        if len(self._pairs):
            pairs = _pair(old, new)
            place = np.searchsorted(self._pairs, pairs)
            place = np.minimum(place, len(self._pairs) - 1)
            known = self._pairs[place] == pairs
            found[known] = (self._sums / self._counts)[place[known]]
        return found


def _pair(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns one number for two tokens, of which Keras has no more than 2^31."""
    return (old << 32) + new


class Changes:
    """All changes of the examples of a batch, each of which is handed out once.

    Args:
        tokens: The tokens, `[batch, length]`.
        candidates: What each may be replaced by, `[batch, length, candidates]`.
        possible: Which changes may be tried, in the same shape.
        scores: The higher, the sooner a change is tried, in the same shape.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        candidates: np.ndarray,
        possible: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        count, _, self._width = candidates.shape
        self._old = np.repeat(tokens, self._width, axis=1)
        self._new = candidates.reshape(count, -1)
        self._scores = np.where(possible, scores, -np.inf).reshape(count, -1)

    def next(
        self, rows: np.ndarray, gains: Gains | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hands out the best change of each row that has one left.

        Args:
            rows: Numbers of rows.
            gains: Judges by these, where they know a change that has raised the margin.

        Returns:
            Numbers of the rows that have a change left, its places and new tokens.
        """
        scores = self._scores[rows]
        if gains is not None:
            found = gains.of(self._old[rows], self._new[rows])
            found = np.where(np.isfinite(scores) & (found > 0), found, -np.inf)
            known = np.isfinite(found).any(1)
            scores[known] = found[known]
        best = scores.argmax(1)
        left = np.isfinite(scores[np.arange(len(rows)), best])
        rows, best = rows[left], best[left]
        self._scores[rows, best] = -np.inf
        return rows, best // self._width, self._new[rows, best]
