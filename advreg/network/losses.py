"""Reads what a compiled loss says of outputs: whether it takes logits, and its name."""

from __future__ import annotations

import re
from typing import Any

import keras
from keras import tree

from advreg._types import Tensor

# Names of losses of Keras whose default is `from_logits=False`, or that take nothing
# but probabilities.
_OF_PROBABILITIES = (
    "(sparse_)?categorical_crossentropy|binary_crossentropy|"
    "(categorical|binary)_focal_crossentropy|kl_?divergence"
)
# The cross-entropies that take probabilities or logits, and the activation that makes
# probabilities of logits.
ACTIVATION_OF: dict[type, str] = {
    keras.losses.SparseCategoricalCrossentropy: "softmax",
    keras.losses.CategoricalCrossentropy: "softmax",
    keras.losses.CategoricalFocalCrossentropy: "softmax",
    keras.losses.BinaryCrossentropy: "sigmoid",
    keras.losses.BinaryFocalCrossentropy: "sigmoid",
}
_CLASS_OF = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower(): kind
    for kind in ACTIVATION_OF
}


def takes_logits(loss: Any) -> bool | None:
    """Returns whether a loss takes logits.

    Args:
        loss: One loss, as `compile` takes it.

    Returns:
        True for logits, false for probabilities, and `None` where neither the loss nor
        its name says so.
    """
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    config = config.get("fn_kwargs") or config
    if config.get("from_logits") is not None:
        return bool(config["from_logits"])
    name = loss_name(loss)
    return False if name and re.fullmatch(_OF_PROBABILITIES, name) else None


def loss_name(loss: Any) -> str | None:
    """Returns the name of a loss in snake case, `None` unless there is exactly one."""
    losses = [item for item in tree.flatten(loss) if item is not None]
    if len(losses) != 1:
        return None
    if fits_labels(losses[0]):
        return "categorical_crossentropy"
    loss = keras.losses.get(losses[0])
    name = getattr(loss, "__name__", type(loss).__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def get_loss(loss: Any, labels: Tensor, outputs: Tensor) -> Any:
    """Returns the function or object that `compile` makes of a loss.

    "crossentropy" becomes the cross-entropy that fits labels and outputs, as in Keras.

    Args:
        loss: One loss, as `compile` takes it.
        labels: Labels of a batch.
        outputs: Outputs for it.
    """
    if not fits_labels(loss):
        return keras.losses.get(loss)
    if outputs.shape[-1] == 1:
        return keras.losses.binary_crossentropy
    if len(labels.shape) < len(outputs.shape) or labels.shape[-1] == 1:
        return keras.losses.sparse_categorical_crossentropy
    return keras.losses.categorical_crossentropy


def fits_labels(loss: Any) -> bool:
    """Returns whether a loss is "crossentropy", which Keras replaces by what fits."""
    return isinstance(loss, str) and loss.lower() in ("ce", "crossentropy")


def cross_entropy_of_probabilities(loss: Any) -> keras.losses.Loss | None:
    """Returns a cross-entropy of Keras as an object, if it takes probabilities.

    Args:
        loss: One loss, as `compile` takes it, or as `get_loss` returns it.

    Returns:
        An object of a class in `ACTIVATION_OF`, or `None` for any other loss.
    """
    if loss is None:
        return None
    found = loss if isinstance(loss, keras.losses.Loss) else keras.losses.get(loss)
    if not isinstance(found, keras.losses.Loss):
        name = getattr(found, "__name__", "")
        # Not a function of the user's own that has the same name.
        if getattr(keras.losses, name, None) is not found or name not in _CLASS_OF:
            return None
        return _CLASS_OF[name]()
    is_known = type(found) in ACTIVATION_OF and takes_logits(found) is False
    return found if is_known else None


def is_own(loss: Any) -> bool:
    """Returns whether a loss is of the user's own, and not one of Keras."""
    if loss is None or fits_labels(loss):
        return False
    found = keras.losses.get(loss)
    module = (type(found) if isinstance(found, keras.losses.Loss) else found).__module__
    return not module.startswith("keras.")
