"""Reads the outputs of a classifier as classes, and as logits."""

from __future__ import annotations

import dataclasses

from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.network.logits import logits_of


@dataclasses.dataclass(frozen=True)
class OutputForm:
    """The form of the outputs of a classifier.

    Args:
        from_logits: Whether they are logits, or probabilities.
        columns: Number of scores for each example. One score is for two classes.
        one_vs_rest: Whether each of several scores is a probability of its own, as of a
            sigmoid for each class, so that they need not sum to 1.
        hidden: Whether they are probabilities whose logits are not found, so that
            attacks must use the logarithm.
    """

    from_logits: bool
    columns: int
    one_vs_rest: bool = False
    hidden: bool = False

    @property
    def classes(self) -> int:
        """Number of classes."""
        return max(self.columns, 2)

    def predicted(self, outputs: Tensor) -> Tensor:
        """Returns the predicted class of each example, int32 `[batch]`.

        It is -1, which is no class and so always wrong, where the outputs are NaN or
        infinite. A score of -inf beside a finite one is allowed: it is the logarithm of
        a probability of 0.
        """
        if self.columns > 1:
            best = ops.max(outputs, axis=1)
            known = ops.logical_not(ops.any(ops.isnan(outputs), axis=1))
            known = ops.logical_and(known, ops.isfinite(best))
            found = backend.argmax(outputs)
        else:
            best = ops.reshape(outputs, (-1,))
            known = ops.isfinite(best)
            threshold = 0.0 if self.from_logits else 0.5
            found = ops.cast(best > threshold, "int32")
        return ops.where(known, found, -1)

    def logits(self, outputs: Tensor) -> Tensor:
        """Returns the logits, `[batch, classes]`, in float32 at least."""
        logits = logits_of(outputs, self.from_logits, self.one_vs_rest)
        return ops.reshape(logits, (-1, self.classes))

    def saturated(self, outputs: Tensor) -> Tensor:
        """Returns for each example whether a probability rounds to 1, `[batch]`."""
        scores = ops.reshape(outputs, (-1, self.columns))
        if self.columns == 1:
            scores = ops.concatenate([scores, 1 - scores], axis=1)
        return ops.max(scores, axis=1) >= 1
