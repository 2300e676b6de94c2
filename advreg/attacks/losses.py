"""What an attack makes grow, for each example of a batch.

Each function takes logits of shape `[batch, classes]` and the true classes, or the
targets where `targeted`, of shape `[batch]`, and returns `[batch]`. It is positive, or
grows, as the example comes closer to being misclassified, or to the target.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from advreg.geometry import Tensor

Loss = Callable[[Tensor, Tensor, bool], Tensor]


def cross_entropy(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """The cross-entropy. Its gradient vanishes where the logits are far apart."""
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
    return -loss if targeted else loss


def margin(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """The best other class against the true one: positive if misclassified.

    [Carlini and Wagner, 2016](https://arxiv.org/abs/1608.04644). It cannot saturate.
    """
    own, other = _own_and_best_other(logits, classes)
    return own - other if targeted else other - own


def dlr(logits: Tensor, classes: Tensor, targeted: bool = False) -> Tensor:
    """The margin as a share of the spread of the logits, whatever their scale.

    The difference of logits ratio,
    [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690). It needs three classes,
    and four where `targeted`.
    """
    own, other = _own_and_best_other(logits, classes)
    if targeted:
        return (own - other) / _spread_below_two(logits)
    top = tf.math.top_k(logits, 3).values
    return (other - own) / _not_zero(top[:, 0] - top[:, 2])


def dlr_towards(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """The loss of AutoAttack's targeted APGD: a target's logit against the true one's.

    Args:
        logits: Float tensor of shape `[batch, classes]`, four classes or more.
        classes: True classes.
        targets: Classes to reach. Any misclassification counts, though.
    """
    own = tf.gather(logits, classes, batch_dims=1)
    target = tf.gather(logits, targets, batch_dims=1)
    return (target - own) / _spread_below_two(logits)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def classes_needed(name: str, targeted: bool) -> int:
    """The number of classes below which a loss is not defined."""
    return {"dlr": 4 if targeted else 3}.get(name, 2)


def _own_and_best_other(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    own = tf.gather(logits, classes, batch_dims=1)
    is_own = tf.one_hot(classes, tf.shape(logits)[1], on_value=True, off_value=False)
    other = tf.where(is_own, tf.constant(logits.dtype.min, logits.dtype), logits)
    return own, tf.reduce_max(other, axis=1)


def _spread_below_two(logits: Tensor) -> Tensor:
    top = tf.math.top_k(logits, 4).values
    return _not_zero(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _not_zero(spread: Tensor) -> Tensor:
    """Keeps a row of equal logits from becoming 0 / 0."""
    return tf.maximum(spread, tf.constant(1e-12, spread.dtype))
