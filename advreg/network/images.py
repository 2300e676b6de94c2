"""Integers that stand for quantities, and are perturbed as floats in the same units.

Nothing has a gradient with respect to an integer. Yet many images are uint8, and a
pixel is a quantity. Other integers may be categories, such as word numbers, to which
nothing may be added. So integers are cast to floats only where it is known that they
are quantities: images of type uint8, and whatever a model takes into an input that it
declares as floats. `unperturbed_integers` finds those of the rest that a model seems to
take as quantities, for a warning.

A trap: Keras casts features to the dtype of a declared input. Floats for an input that
is declared as uint8 would be truncated, and a small perturbation lost.
`as_float_input_model` is for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.network.declared import declared_inputs
from advreg.perturbation.packing import name_of


def as_floats(
    features: Features, fixed: Sequence[str] = (), model: keras.Model | None = None
) -> Features:
    """Casts integers that stand for quantities to floats, and nothing else.

    These are images of type uint8, and integers of any type for which the model
    declares an input of floats, to which Keras casts them too. Other integers may be
    categories, so they stay unchanged.

    Args:
        features: A tensor, or a structure of tensors.
        fixed: Keys of a dictionary of features that stay unchanged.
        model: The model that they go into.

    Returns:
        The same structure.
    """
    leaves = []
    for path, leaf in tree.flatten_with_path(features):
        dtype = None
        if not (path and path[0] in fixed):
            dtype = _declared_float(model, features, path, leaf)
            dtype = "float32" if dtype is None and _is_image(leaf) else dtype
        leaves.append(leaf if dtype is None else ops.cast(leaf, dtype))
    return tree.pack_sequence_as(features, leaves)


def unperturbed_integers(
    features: Features,
    fixed: Sequence[str],
    model: keras.Model,
    outputs_of: Callable[[Features], Any],
) -> list[str]:
    """Names the integers that are not perturbed, and would have a gradient as floats.

    These are integers for which the model declares no input, as a subclassed model does
    not. Integers that the model takes as categories have no gradient as floats either,
    and are not named.

    Args:
        features: Features, cast by `as_floats` or not.
        fixed: Keys of a dictionary of features that stay unchanged.
        model: The model that they go into.
        outputs_of: Function that runs the model on features. Two examples are enough.

    Returns:
        Names of leaves, as `name_of` gives them.
    """
    found = []
    leaves = tree.flatten(features)
    for index, (path, leaf) in enumerate(tree.flatten_with_path(features)):
        if not _is_integer(leaf) or _is_image(leaf) or (path and path[0] in fixed):
            continue  # Images are perturbed in any case.
        if declared_inputs(model, features, path):
            continue
        if not backend.is_symbolic(leaf) and np.isin(leaf, (0, 1)).all():
            continue  # Only zeros and ones: a mask or a flag, not a quantity.
        few = [part[:2] if backend.is_tensor(part) else part for part in leaves]

        def summed(
            tensors: list[Tensor], few: list[Any] = few, index: int = index
        ) -> tuple[Tensor, None]:
            moved = [*few[:index], *tensors, *few[index + 1 :]]
            outputs = tree.flatten(outputs_of(tree.pack_sequence_as(features, moved)))
            return sum(ops.sum(output) for output in outputs), None

        try:
            as_float = ops.cast(few[index], "float32")
            _, _, (gradient,) = backend.differentiate(summed, [as_float])
        except Exception:  # The model takes nothing but integers here.
            continue
        if gradient is not None:
            found.append(name_of(path))
    return found


def unperturbed_integers_message(names: Sequence[str]) -> str:
    """Returns the warning about the names that `unperturbed_integers` returned."""
    return (
        "Integers stand still, although the model takes them as quantities: "
        f"{', '.join(names)}. It declares no inputs, so that they keep their type. If "
        "they are to be perturbed, cast them to float32; masks and flags are not."
    )


def as_float_input_model(model: keras.Model, fixed: Sequence[str] = ()) -> keras.Model:
    """Returns the model, or a second one that takes floats where it declares uint8.

    Keras truncates floats for an input that is declared as uint8. The second model has
    float32 inputs there, in nested models as well. It shares all layers, and so all
    weights, with the model.

    Args:
        model: The model.
        fixed: Names of inputs that keep their type.
    """

    def as_float(tensor: keras.KerasTensor) -> keras.KerasTensor:
        if tensor.name in fixed or not _is_image(tensor):
            return tensor
        return keras.Input(batch_shape=tensor.shape, dtype="float32", name=tensor.name)

    if not _declares_bytes(model):
        return model
    if isinstance(model, keras.Sequential):
        return keras.Sequential(
            [as_float(model.inputs[0]), *map(_with_float_inputs, model.layers)]
        )
    return keras.models.clone_model(
        model,
        input_tensors=tree.map_structure(as_float, model.input),
        clone_function=_with_float_inputs,
    )


def _is_image(tensor: Any) -> bool:
    """Returns whether a tensor is uint8 with three axes or more, the batch included."""
    if not (backend.is_tensor(tensor) or isinstance(tensor, keras.KerasTensor)):
        return False
    return backend.dtype_name(tensor) == "uint8" and (backend.rank(tensor) or 0) >= 3


def _is_integer(tensor: Any) -> bool:
    return backend.is_tensor(tensor) and keras.backend.is_int_dtype(tensor.dtype)


def _declared_float(
    model: keras.Model | None, features: Features, path: Sequence[Any], leaf: Any
) -> str | None:
    """Returns the float dtype that a model declares for a leaf of integers, if any."""
    if not _is_integer(leaf):
        return None
    dtypes = {
        str(tensor.dtype)
        for tensor in declared_inputs(model, features, path)
        if "float" in str(tensor.dtype)
    }
    return dtypes.pop() if len(dtypes) == 1 else None


def _declares_bytes(model: keras.Model) -> bool:
    """Returns whether Keras casts an input of this model to uint8 images."""
    call = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    # A `call` of the user's own may do more than the graph between inputs and outputs,
    # and a second model would leave that out.
    if not call.__module__.startswith("keras."):
        return False
    return any(_is_image(tensor) for tensor in getattr(model, "inputs", ()))


def _with_float_inputs(layer: keras.Layer) -> keras.Layer:
    return as_float_input_model(layer) if isinstance(layer, keras.Model) else layer
