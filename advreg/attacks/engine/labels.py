"""Reads labels, in any form that users give them in.

An attack compares predicted classes with class numbers, and climbs a loss of regression
with values. Labels that fit neither are refused, because accuracy would be computed
from them without a word.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Tensor
from advreg.checks import classes_rule, describe, unknown_class
from advreg.network.output_form import OutputForm


def class_numbers(y: Any, form: OutputForm, multi_label: bool) -> Tensor:
    """Converts labels of any usual form to class numbers, int32 of shape `[batch]`.

    Args:
        y: Class numbers of shape `[batch]` or `[batch, 1]`, or one-hot rows.
        form: The form of the outputs.
        multi_label: Whether the compiled loss is that of several labels.

    Raises:
        ValueError: They are of another form, or no class has such a number.
    """
    leaves = tree.flatten(y)
    shape = tuple(leaves[0].shape) if len(leaves) == 1 else ()
    rank = len(shape)
    one_hot = rank == 2 and shape[1] == form.columns > 1
    rule = f"{classes_rule(form.classes)}, in the shape [batch] or [batch, 1]" + (
        f", or one-hot rows [batch, {form.columns}]" if form.columns > 1 else ""
    )
    if form.columns > 1 and multi_label and (rank != 1):
        raise ValueError(
            "`model` must tell classes apart of which one is right. It is compiled "
            f"with a binary cross-entropy over {form.columns} columns, which is "
            "that of a multi-label classifier, or of an autoencoder: accuracy is "
            "not defined for it, and only attacks with loss='model' can climb its "
            "loss. If exactly one class of each example is right, pass its number "
            "in the shape [batch], such as `y.argmax(axis=1)`. Received: "
            f"{describe(y)}"
        )
    if not (one_hot or rank == 1 or (rank == 2 and shape[1] == 1)):
        raise ValueError(f"{rule}. Received: {describe(y)}")
    if not _are_numbers(leaves[0]):
        raise ValueError(f"{rule}. Received: {describe(y)}")
    if one_hot:
        return ops.convert_to_tensor(
            _classes_of_rows(ops.convert_to_numpy(leaves[0]), rule)
        )
    numbers = ops.convert_to_numpy(leaves[0]).reshape(-1).astype("float64")
    wrong = (numbers != np.floor(numbers)) | (numbers < 0)
    wrong |= ~(numbers < form.classes)
    if wrong.any():
        received = f"{numbers[wrong][0]:g} (and {int(wrong.sum()) - 1} more)"
        raise ValueError(unknown_class(rule, form.classes, received))
    return ops.convert_to_tensor(numbers.astype("int32"))


def check_values(y: Any, shape: tuple[int | None, ...]) -> None:
    """Checks the labels of a model of regression.

    Args:
        y: The values that it should predict.
        shape: The shape of an output, without the batch axis.

    Raises:
        ValueError: They have another shape than the outputs, or are not finite.
    """
    leaves = tree.flatten(y)
    fits = len(leaves) == 1 and _core(leaves[0].shape[1:]) == _core(shape)
    if not fits or not _are_numbers(leaves[0]) or is_bool(leaves[0]):
        raise ValueError(
            f"`y` must hold numbers in the shape of the outputs, {[None, *shape]}, "
            "because the model was compiled with a loss of regression. Received: "
            f"{describe(y)}"
        )
    check_finite(y)


def check_finite(y: Any) -> None:
    """Checks that labels are no NaN and not infinite.

    Raises:
        ValueError: Some are.
    """
    wrong = sum(
        int((~np.isfinite(_values(leaf))).sum())
        for leaf in tree.flatten(y)
        if keras.backend.is_float_dtype(backend.dtype_name(leaf))
    )
    if wrong:
        raise ValueError(f"`y` must be finite. Received: {wrong} values that are not")


def _values(tensor: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(tensor, backend.widest_float()))


def is_bool(tensor: Tensor) -> bool:
    """Returns whether a tensor holds booleans."""
    return backend.dtype_name(tensor) == "bool"


def _are_numbers(tensor: Tensor) -> bool:
    """Returns whether a tensor holds real numbers or booleans."""
    name = backend.dtype_name(tensor)
    is_number = keras.backend.is_float_dtype(name) or keras.backend.is_int_dtype(name)
    return is_number or name == "bool"


def _classes_of_rows(rows: np.ndarray, rule: str) -> np.ndarray:
    """Returns the classes of one-hot rows, which may have label smoothing.

    Raises:
        ValueError: A row does not sum to 1, or has several largest values, or none.
    """
    rows = rows.astype("float64")
    largest = (rows == rows.max(axis=1, keepdims=True)).sum(axis=1)
    wrong = (largest != 1) | ~(np.abs(rows.sum(axis=1) - 1) < 1e-3)
    wrong |= rows.min(axis=1) < 0
    if wrong.any():
        shown = np.array2string(rows[wrong][0], precision=3, threshold=12)
        raise ValueError(
            f"{rule}, each of which sums to 1 and has one largest value. Rows that do "
            "not are those of several labels, or values and no classes: accuracy is "
            f"not defined for them. Received: {shown} (and {int(wrong.sum()) - 1} more)"
        )
    return rows.argmax(axis=1).astype("int32")


def _core(shape: Any) -> list:
    """Returns a shape without a last axis of 1."""
    sizes = list(shape)
    return sizes[:-1] if sizes[-1:] == [1] else sizes
