"""The preprocessing that a model does in its own `fit`, `evaluate` and `predict`.

A task of KerasHub (`keras_hub.models.Task`, a `PipelineModel`) has a method
`preprocess_samples`, which its own `fit` and `predict` apply to the data before the
network sees them. Calling the model does not apply it. The wrapper and attacks call the
model, so they must apply it themselves: perturbed is what comes out of it.

Nothing here imports KerasHub. A model counts as such a task by its methods.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg.checks import describe_value
from advreg.network.inputs import BatchForm

_METHOD = "preprocess_samples"
_HUBS = ("keras_hub", "keras_nlp", "keras_cv")


def preprocesses(base: keras.Model) -> bool:
    """Returns whether a model preprocesses in its own `fit`, `evaluate` and `predict`.

    Args:
        base: The model itself, not a wrapper of it.
    """
    root = _root(base)
    if root is None or root.fit is keras.Model.fit or _METHOD in vars(base):
        return False
    if getattr(base, "preprocessor", None) is not None:
        return True
    # Without a preprocessor, `preprocess_samples` of KerasHub's own classes returns its
    # arguments. A class of the user's own may do more.
    owner = next(cls for cls in type(base).__mro__ if _METHOD in vars(cls))
    return owner is not root and owner.__module__.split(".")[0] not in _HUBS


def describe_preprocessing(base: keras.Model) -> str | None:
    """Returns a sentence on what is perturbed, if a model preprocesses by itself.

    Args:
        base: The model itself, not a wrapper of it.

    Returns:
        The sentence, or `None` for a model that does not preprocess.
    """
    if not preprocesses(base):
        return None
    return (
        "Perturbed is what the network receives after the preprocessing of "
        f"{type(base).__name__}."
    )


def overridden_methods(base: keras.Model, names: Sequence[str]) -> list[str]:
    """Lists the methods of `keras.Model` that a model overrides.

    Methods that are overridden only in order to preprocess are left out, because advreg
    does the same preprocessing.

    Args:
        base: The model itself, not a wrapper of it.
        names: Names of methods of `keras.Model`, such as `"fit"`.
    """
    root = _root(base)
    found = []
    for name in names:
        known = [getattr(keras.Model, name)]
        if root is not None and root.fit is not keras.Model.fit:
            known.append(getattr(root, name))
        own = getattr(type(base), name)
        if name in vars(base) or not any(own is method for method in known):
            found.append(name)
    return found


def preprocess(form: BatchForm, data: Any) -> tuple[Any, Any, Any]:
    """Takes a batch apart, and applies the preprocessing of the base model, if any.

    Args:
        form: The `BatchForm` that takes the batch apart and holds the base model.
        data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

    Returns:
        The features that the network receives, and labels and weights or `None`.
    """
    x, y, sample_weight = form.unpack(data)
    if not preprocesses(form.base_model):
        return x, y, sample_weight
    given = keras.utils.unpack_x_y_sample_weight(data)[0]
    # A dictionary of one feature and its labels: without the labels, that feature alone
    # is the input of the task.
    if x is not given and isinstance(x, dict) and isinstance(given, dict):
        x = next(iter(x.values())) if len(x) == 1 < len(given) else x
    data = form.base_model.preprocess_samples(x, y, sample_weight)
    parts = keras.utils.unpack_x_y_sample_weight(data)
    x, y, sample_weight = (tree.map_structure(_as_tensor, part) for part in parts)
    return x, y, sample_weight


def preprocess_data(form: BatchForm, arguments: dict[str, Any]) -> dict[str, Any]:
    """Preprocesses all data of `evaluate` or `predict`.

    Args:
        form: The `BatchForm` that takes batches apart and holds the base model.
        arguments: The arguments of the method. Arrays become a dataset, as in KerasHub,
            which keeps their order.

    Raises:
        TypeError: The data come in a form that cannot be preprocessed.
        ValueError: Arrays have no batch axis.
    """
    x = arguments.get("x")
    if x is None or not preprocesses(form.base_model):
        return arguments

    def step(*data: Any) -> Any:
        return keras.utils.pack_x_y_sample_weight(*preprocess(form, data))

    def of_batch(batch: Any) -> Any:
        return step(*batch) if isinstance(batch, tuple) else step(batch)

    # Data that come in batches are preprocessed batch by batch, when they are read.
    if isinstance(x, keras.utils.PyDataset):
        return {**arguments, "x": _PreprocessedBatches(x, of_batch)}
    if isinstance(x, Iterator):
        return {**arguments, "x": (of_batch(batch) for batch in x)}
    if backend.is_dataset(x):
        return {**arguments, "x": backend.map_dataset(x, step)}
    taken = ("x", "y", "sample_weight", "batch_size")
    batches = batched(*(arguments.get(name) for name in taken))
    kept = {name: arguments[name] for name in arguments if name not in taken}
    return {"x": backend.map_dataset(batches, step), **kept}


def preprocess_fit(form: BatchForm, arguments: dict[str, Any]) -> dict[str, Any]:
    """Preprocesses the data of `fit`, including its validation data.

    Args:
        form: The `BatchForm` that takes batches apart and holds the base model.
        arguments: The arguments of `fit`.

    Raises:
        TypeError: The data come in a form that cannot be preprocessed.
        ValueError: Arrays have no batch axis, or cannot be split.
    """
    if not preprocesses(form.base_model):
        return arguments
    arguments = dict(arguments)
    # Keras splits arrays only, and after this there are none. So it is done here.
    share = arguments.pop("validation_split", None)
    if share and arguments.get("validation_data") is None:
        arguments = _split(arguments, share)
    size = arguments.pop("validation_batch_size", None) or arguments.get("batch_size")
    validation = arguments.get("validation_data")
    if validation is not None:
        parts = dict(
            zip(
                ("x", "y", "sample_weight"),
                keras.utils.unpack_x_y_sample_weight(validation),
                strict=True,
            )
        )
        prepared = preprocess_data(form, {**parts, "batch_size": size})
        arguments["validation_data"] = prepared["x"]
    return preprocess_data(form, arguments)


def batched(
    x: Any, y: Any = None, sample_weight: Any = None, batch_size: int | None = None
) -> Any:
    """Makes a dataset of batches of arrays, or of lists of strings, as KerasHub does.

    Args:
        x: Features: arrays, tensors, a list of strings, or a structure of these.
        y: Labels, or `None`.
        sample_weight: Weights, or `None`.
        batch_size: Number of examples in a batch, by default 32.

    Raises:
        TypeError: A part is neither an array nor strings or numbers.
        ValueError: A part has no batch axis, or the parts differ in length.
    """
    parts = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    if not all(map(_is_data, tree.flatten(parts))):
        raise TypeError(
            "`x` must be arrays, a list of strings, a `tf.data.Dataset`, a "
            "`keras.utils.PyDataset` or a generator, because the model preprocesses "
            "its data. Make a `tf.data.Dataset` of what it is. Received: "
            f"{describe_value(x)}"
        )
    try:
        arrays = tree.map_structure(_as_array, parts)
        return backend.dataset_of_arrays(arrays, batch_size or 32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have a batch axis, of the same length. "
            f"TensorFlow says: {str(error)[:200]}"
        ) from None


def readable(base: keras.Model, x: Any, y: Any, batch_size: int) -> tuple[Any, Any]:
    """Makes a dataset of data that Keras itself cannot read, such as strings.

    Args:
        base: The model itself, not a wrapper of it.
        x: Features, in any form that the model takes.
        y: Labels, or `None` where they are in `x`.
        batch_size: Number of examples in a batch.

    Returns:
        A dataset and `None` where the model preprocesses arrays, and else `x` and `y`.
        Nothing is preprocessed yet.
    """
    in_batches = isinstance(x, (keras.utils.PyDataset, Iterator))
    if not preprocesses(base) or in_batches or backend.is_dataset(x):
        return x, y
    return batched(x, y, batch_size=batch_size), None


@contextlib.contextmanager
def preprocessing_off(base: keras.Model) -> Iterator[None]:
    """Switches the preprocessing of a model off, as a context manager.

    Args:
        base: The model itself, not a wrapper of it.
    """
    if not preprocesses(base):
        yield
        return
    # Not by `setattr`, because that of Keras looks for layers and variables to track.
    object.__setattr__(base, _METHOD, keras.utils.pack_x_y_sample_weight)
    try:
        yield
    finally:
        object.__delattr__(base, _METHOD)


class _PreprocessedBatches(keras.utils.PyDataset):
    """A `PyDataset` with the batches of another one, preprocessed.

    It uses threads even where the other one uses processes, because each process would
    need a copy of the model.
    """

    def __init__(
        self, dataset: keras.utils.PyDataset, step: Callable[[Any], Any]
    ) -> None:
        super().__init__(workers=dataset.workers, max_queue_size=dataset.max_queue_size)
        self._dataset, self._step = dataset, step

    @property
    def num_batches(self) -> int | None:
        """Number of batches, `None` where they do not end."""
        return self._dataset.num_batches

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._step(self._dataset[index])

    def on_epoch_begin(self) -> None:
        """Passes on that an epoch begins."""
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Passes on that an epoch has ended."""
        self._dataset.on_epoch_end()


def _root(base: keras.Model) -> Any:
    """Returns the base class that introduced preprocessing, such as `PipelineModel`."""
    owners = [cls for cls in type(base).__mro__ if _METHOD in vars(cls)]
    return owners[-1] if owners and issubclass(owners[-1], keras.Model) else None


def _split(arguments: dict[str, Any], share: float) -> dict[str, Any]:
    """Splits the last rows of arrays off for validation, as Keras does."""
    names = ("x", "y", "sample_weight")
    parts = tuple(arguments.get(name) for name in names)
    leaves = [leaf for leaf in tree.flatten(parts) if leaf is not None]
    if not all(hasattr(leaf, "shape") and len(leaf.shape) for leaf in leaves):
        raise ValueError(
            "`validation_split` needs arrays. Make arrays of lists, or give "
            f"`validation_data`. Received: x={describe_value(arguments.get('x'))}"
        )
    total = int(leaves[0].shape[0])
    kept = math.floor(total * (1.0 - share))
    if not 0 < kept < total:
        raise ValueError(
            "`validation_split` must leave one example at least on both sides. "
            f"Received: {share:g} of {total} examples"
        )

    def rows(first: int, last: int) -> Any:
        return tree.map_structure(
            lambda leaf: None if leaf is None else _as_array(leaf)[first:last], parts
        )

    training, validation = rows(0, kept), rows(kept, total)
    return {
        **arguments,
        **dict(zip(names, training, strict=True)),
        "validation_data": keras.utils.pack_x_y_sample_weight(*validation),
    }


def _is_data(leaf: Any) -> bool:
    return hasattr(leaf, "shape") or isinstance(leaf, (str, bytes, numbers.Number))


def _as_array(leaf: Any) -> Any:
    is_array = hasattr(leaf, "__array__") and not backend.is_tensor(leaf)
    if not is_array or backend.is_ragged(leaf):
        return leaf
    return np.asarray(leaf)


def _as_tensor(leaf: Any) -> Any:
    if leaf is None or backend.is_ragged(leaf) or backend.is_sparse(leaf):
        return leaf
    return ops.convert_to_tensor(leaf)
