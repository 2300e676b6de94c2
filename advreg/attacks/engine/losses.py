"""The losses that attacks maximise, one value for each example.

Each function takes logits of shape `[batch, classes]` and the true classes, or the
targets where `targeted`, of shape `[batch]`, and returns `[batch]`. The value grows as
the example comes closer to being misclassified, or to the target. They are computed on
logits, because a probability that rounds to 1 has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Tensor

Loss = Callable[[Tensor, Tensor, bool], Tensor]


def cross_entropy(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """Computes the cross-entropy, whose gradient vanishes if logits are far apart."""
    loss = ops.sparse_categorical_crossentropy(classes, logits, from_logits=True)
    return -loss if targeted else loss


def margin(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """Computes the largest other logit minus the true one, positive if misclassified.

    See [Carlini and Wagner, 2016](https://arxiv.org/abs/1608.04644). It cannot
    saturate.
    """
    own, other = _own_and_best_other(logits, classes)
    return own - other if targeted else other - own


def dlr(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """Computes the difference of logits ratio: the margin over the spread of logits.

    See [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). It does not change
    when all logits are scaled. It needs three classes, and four where `targeted`.
    """
    own, other = _own_and_best_other(logits, classes)
    if targeted:
        return (own - other) / _spread_below_two(logits)
    top = ops.top_k(logits, 3)[0]
    return (other - own) / _not_zero(top[:, 0] - top[:, 2])


def dlr_towards(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Computes the targeted loss of AutoAttack: the target's logit minus the true one.

    The difference is divided by the spread of the logits.

    Args:
        logits: Float tensor of shape `[batch, classes]`, four classes or more.
        classes: True classes.
        targets: Classes to reach.
    """
    return (of_class(logits, targets) - of_class(logits, classes)) / _spread_below_two(
        logits
    )


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    """Returns booleans of the shape of `logits`, true at the class of each row."""
    return ops.equal(ops.cast(classes, "int32")[:, None], ops.arange(logits.shape[1]))


def of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns the logit of one class of each row, `[batch]`."""
    # A sum of one value and zeros, because the gradient of a gather is a scatter, which
    # is slower.
    return ops.sum(ops.where(one_hot(classes, logits), logits, 0.0), axis=1)


def classes_needed(name: str, targeted: bool) -> int:
    """Returns the smallest number of classes for which a loss is defined."""
    return {"dlr": 4 if targeted else 3}.get(name, 2)


def _own_and_best_other(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    lowest = np.finfo(keras.backend.standardize_dtype(logits.dtype)).min
    other = ops.where(one_hot(classes, logits), lowest, logits)
    return of_class(logits, classes), ops.max(other, axis=1)


def _spread_below_two(logits: Tensor) -> Tensor:
    top = ops.top_k(logits, 4)[0]
    return _not_zero(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _not_zero(spread: Tensor) -> Tensor:
    """Returns a spread above 0, because a row of equal logits would give 0 / 0."""
    return backend.maximum(spread, 1e-12)
