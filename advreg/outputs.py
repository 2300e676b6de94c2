"""What a wrapped model was compiled with for each of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import tree

from advreg.scores import loss_name, takes_logits

if TYPE_CHECKING:
    from advreg.model import AdversarialRegularization


def outputs_are_logits(
    model: AdversarialRegularization, predictions: Any
) -> list[bool]:
    """Tells whether each output holds logits, for objectives that compare scores.

    Args:
        model: The wrapped model, compiled.
        predictions: Its outputs.

    Raises:
        ValueError: A loss does not say so, or does not compare classes.
    """
    objective = type(model.adv_config.objective).__name__
    losses = _of_outputs(model, model.loss, predictions)
    outputs = tree.flatten(predictions)
    found = [takes_logits(loss) for loss in losses]
    if len(found) != len(outputs) or None in found:
        raise ValueError(
            f"The objective {objective} compares scores of classes: every output "
            "needs a cross-entropy of Keras as loss, which says whether they are "
            f"logits. Received: loss={model.loss!r}"
        )
    for loss, output in zip(losses, outputs, strict=True):
        several = len(output.shape) > 1 and output.shape[-1] != 1
        if several and str(loss_name(loss)).startswith("binary"):
            raise ValueError(
                f"The objective {objective} compares classes of which one is "
                "right: a binary cross-entropy needs a single score, several need "
                f"a categorical one. Received: loss={model.loss!r} and an output "
                f"of shape {tuple(output.shape)}"
            )
    return [bool(form) for form in found]


def loss_weights(model: AdversarialRegularization, predictions: Any) -> list[float]:
    """The weight of each output in the loss, as `compile` received them."""
    given = model._compile_loss._user_loss_weights
    listed = _of_outputs(model, 1.0 if given is None else given, predictions)
    return [1.0 if weight is None else weight for weight in listed]


def _of_outputs(
    model: AdversarialRegularization, values: Any, predictions: Any
) -> list[Any]:
    """Lists losses or their weights in the order of the outputs."""
    if isinstance(values, Mapping):
        paths = tree.flatten_with_path(predictions)
        names = [path[0] for path, _ in paths if path]
        if not set(values) <= set(names):
            names = model.output_names
        return [values.get(name) for name in names]
    listed = tree.flatten(values)
    return listed * len(tree.flatten(predictions)) if len(listed) == 1 else listed
