"""Tells features, labels and sample weights of a batch apart.

Data come as Keras takes them, `(x, y, sample_weight)`, or as Neural Structured Learning
did: a dictionary `x` with the labels and weights among the features. `BatchForm` has
the rules, and every other module asks it:

1. Labels come from `y`. If there is no `y`, and `x` is a dictionary with all
   `label_keys`, they come from there, and these keys are no features.
2. Weights come from `sample_weight`, or from the `sample_weight_key` in `x`, not both.
3. A key that the base model declares as an input is a feature, never a label. The
   exception is `base_with_labels_in_features=True`: then it is both, and not perturbed.
4. A base model that declares no inputs, as a subclassed one, takes all keys as features
   if `y` is given.

The same rules hold in `fit`, `evaluate`, `predict`, `perturb_on_batch` and in attacks.
What goes on to the base model is put into the structure that it declares
(`base_inputs`), because Keras matches dictionaries and inputs by their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features
from advreg.backend import keras_private
from advreg.checks import brief, classes_rule, describe, unknown_class
from advreg.network.losses import loss_name

_SPARSE = "sparse_categorical_crossentropy"


@dataclasses.dataclass(frozen=True, eq=False)
class BatchForm:
    """The rules by which a batch is taken apart, and given to the base model.

    Args:
        base_model: The base model. See `AdversarialRegularization` for this and the
            next three arguments.
        label_keys: Keys of the labels in dictionary inputs.
        sample_weight_key: Key of the sample weights in dictionary inputs, or `None`.
        base_with_labels_in_features: Whether labels in a dictionary are inputs of the
            base model too.
        strict: Whether labels are matched to outputs by their names, and missing
            weights are an error. Neural Structured Learning matches them by their
            order, and trains without missing weights.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `sample_weight_key` is a label key.
    """

    base_model: keras.Model
    label_keys: Sequence[str]
    sample_weight_key: str | None
    base_with_labels_in_features: bool
    strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.label_keys, (list, tuple)) or not all(
            isinstance(key, str) for key in self.label_keys
        ):
            raise TypeError(
                "`label_keys` must be a list or tuple of strings. Received: "
                f"{brief(self.label_keys)}"
            )
        object.__setattr__(self, "label_keys", tuple(self.label_keys))
        if not isinstance(self.sample_weight_key, (str, type(None))):
            raise TypeError(
                "`sample_weight_key` must be a string or `None`. Received: "
                f"{brief(self.sample_weight_key)}"
            )
        if self.sample_weight_key in self.label_keys:
            raise ValueError(
                "`sample_weight_key` must not be one of the `label_keys`. Received: "
                f"{brief(self.sample_weight_key)} and {brief(self.label_keys)}"
            )
        if not isinstance(self.base_with_labels_in_features, bool):
            raise TypeError(
                "`base_with_labels_in_features` must be a bool. Received: "
                f"{brief(self.base_with_labels_in_features)}"
            )

    @property
    def fixed_keys(self) -> Sequence[str]:
        """Keys of features that are not perturbed, because they are labels too."""
        return self.label_keys if self.base_with_labels_in_features else ()

    def unpack(self, data: Any) -> tuple[Features, Any, Any]:
        """Takes a batch apart into features, labels and sample weights.

        Args:
            data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            Features, labels and sample weights. Labels and weights are `None` where
            there are none.

        Raises:
            ValueError: Sample weights come twice.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not isinstance(x, Mapping):
            return x, y, sample_weight
        inputs = self._declared_names()
        key = self.sample_weight_key
        # Beside a `y`, a base that declares no inputs takes all keys as features.
        if key in x and key not in inputs and (inputs or y is None):
            if sample_weight is not None:
                raise ValueError(
                    "Sample weights must come once. Received: `sample_weight`, and "
                    f"the key {key!r} (the `sample_weight_key`) in `x`"
                )
            sample_weight = x[key]
            x = _without(x, [key])
        if y is None:
            y, x = self._take_labels(x, inputs)
        return x, y, sample_weight

    def features(self, inputs: Any) -> Features:
        """Returns the inputs of a call without labels and sample weights."""
        return self.unpack((inputs,))[0]

    def base_inputs(self, features: Features) -> Any:
        """Returns features in the structure that the base model declares.

        One feature in a dictionary becomes a tensor for a base model with a single
        input, and keys that the base model does not declare are dropped.
        """
        if not isinstance(features, Mapping):
            return features
        declared = keras_private.declared_inputs_of(self.base_model)
        single = isinstance(self.base_model, keras.Sequential) or (
            declared is not None and len(tree.flatten(declared)) == 1
        )
        if single and len(features) == 1 and not isinstance(declared, Mapping):
            return next(iter(features.values()))
        if isinstance(declared, Mapping) and set(declared) <= set(features):
            # Keras matches features and inputs by their order. It sorts the keys of a
            # `dict`, but not those of an `OrderedDict`. So the type must be the same.
            kind = OrderedDict if isinstance(declared, OrderedDict) else dict
            return kind((key, features[key]) for key in declared)
        return features

    def check_labels(self, data: Any) -> None:
        """Checks that labels under several keys say to which outputs they belong.

        Raises:
            ValueError: The base model names its outputs, and a key is no such name.
        """
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        named = self._named_outputs()
        several = isinstance(x, Mapping) and y is None and len(self.label_keys) > 1
        if several and named and not set(self.label_keys) <= named:
            raise ValueError(
                "Several `label_keys` must be keys of the base model's outputs, where "
                f"those are a dictionary. Received: {self.label_keys} for the outputs "
                f"{sorted(named)}"
            )

    def check_weights(self, data: Any) -> None:
        """Checks that a batch for training has the weights under `sample_weight_key`.

        Raises:
            ValueError: Labels come in a dictionary, and sample weights are missing.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        key = self.sample_weight_key
        if not self.strict or key is None:
            return
        if y is not None or sample_weight is not None or key in x:
            return
        raise ValueError(
            f"Sample weights are missing: a dictionary `x` with labels must hold the "
            f"`sample_weight_key` {key!r} in training. Received: x with the keys "
            f"{list(x)}"
        )

    def put_labels_beside(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Moves labels from the dictionaries that `fit` received to `y`.

        It is needed for `class_weight`, because Keras looks for classes in `y` alone.

        Args:
            arguments: The arguments of `fit` or `train_on_batch`.

        Returns:
            The arguments, changed where they need to be.

        Raises:
            ValueError: Labels are missing, or `x` is a `PyDataset` without them.
        """
        x = arguments.get("x")
        if arguments.get("y") is not None:
            return arguments
        # Keras refuses `class_weight` for a `DataLoader`, which has no `map`.
        if backend.is_dataset(x) and hasattr(x, "map"):
            mapped = x.map(self._labels_beside)  # type: ignore[union-attr]
            return {**arguments, "x": mapped}
        if isinstance(x, Mapping):
            names = ("x", "y", "sample_weight")
            data = self._labels_beside(*(arguments.get(name) for name in names))
            return {**arguments, **dict(zip(names, data, strict=False))}
        if isinstance(x, keras.utils.PyDataset):
            _, y, _ = keras.utils.unpack_x_y_sample_weight(x[0])
            if y is None:  # Keras would silently ignore `class_weight`.
                raise ValueError(
                    "`class_weight` needs the labels beside the features: let the "
                    f"`PyDataset` return `(x, y)`. Received: {describe(x[0])}"
                )
        return arguments

    def raise_missing_labels(self, data: Any) -> NoReturn:
        """Raises an error that says where labels are looked for, and what was received.

        Raises:
            ValueError: Always.
        """
        x, *_ = keras.utils.unpack_x_y_sample_weight(data)
        message = (
            "Labels are missing: pass them as `y`, or in a dictionary `x` under the "
            f"`label_keys` {self.label_keys}."
        )
        if not isinstance(x, Mapping):
            raise ValueError(f"{message} Received: x={describe(x)} and y=None")
        if set(self.label_keys) & self._declared_names() & set(x):
            message += (
                " A key that the base model declares as an input holds labels only "
                "with `base_with_labels_in_features=True`."
            )
        raise ValueError(f"{message} Received: x with the keys {list(x)} and y=None")

    def _labels_beside(self, *data: Any) -> tuple:
        x, y, sample_weight = self.unpack(data)
        if y is None:
            self.raise_missing_labels(data)
        self.check_weights(data)
        return (x, y) if sample_weight is None else (x, y, sample_weight)

    def _declared_names(self) -> set[str]:
        """Returns the names of the inputs that the base model declares, or none."""
        declared = keras_private.declared_inputs_of(self.base_model)
        if isinstance(declared, Mapping):
            return set(declared)
        # A `Sequential` that is not built raises an error if asked for `inputs`.
        if declared is None and isinstance(self.base_model, keras.Sequential):
            declared = self.base_model.inputs if self.base_model.built else None
        return {tensor.name for tensor in tree.flatten(declared) if tensor is not None}

    def _named_outputs(self) -> set[str]:
        """Returns the keys of the outputs, if they are declared as a dictionary."""
        declared = keras_private.declared_outputs_of(self.base_model)
        return set(declared) if self.strict and isinstance(declared, Mapping) else set()

    def _take_labels(self, x: Features, inputs: set[str]) -> tuple[Any, Features]:
        """Splits a dictionary into labels and features.

        Labels are `None` if a key is missing. They are a dictionary if the outputs of
        the base model are one, and else a list in the order of `label_keys`.
        """
        keys = [key for key in self.label_keys if key in x]
        features = x
        if not self.base_with_labels_in_features:
            keys = [key for key in keys if key not in inputs]
            features = _without(x, keys)
        # With a label missing there are none, as in the data of `predict`. Those that
        # are there are no features all the same.
        if not keys or len(keys) < len(self.label_keys):
            return None, features
        if len(keys) == 1:
            return x[keys[0]], features
        if set(keys) <= self._named_outputs():
            return {key: x[key] for key in keys}, features
        return [x[key] for key in keys], features


@contextlib.contextmanager
def explain_unknown_class() -> Iterator[None]:
    """Replaces TensorFlow's error about a label that is no class by a short one.

    TensorFlow's error has more than a thousand characters, most of them the labels of
    the batch. It comes on a CPU without XLA only: elsewhere the loss is NaN.

    Raises:
        ValueError: A label is out of range.
    """
    try:
        yield
    except backend.ERRORS as error:
        found = re.search(
            r"label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)",
            str(error),
        )
        if found is None:
            raise
        classes = int(found[2])
        message = unknown_class(classes_rule(classes), classes, found[1])
        raise ValueError(message) from None


def check_classes(labels: Any, losses: Sequence[Any], model: keras.Model) -> None:
    """Checks that labels are classes of a model.

    On JAX a label that is no class would count as an example without a loss, and errors
    of TensorFlow and PyTorch do not say which label it is.

    Args:
        labels: Labels of a batch, a structure of arrays with values.
        losses: A loss for each output, as `compile` received them.
        model: The model, whose outputs say how many classes there are.

    Raises:
        ValueError: A label is out of range.
    """
    if not model.built:
        return
    # A subclassed model does not say how many classes it has.
    outputs = getattr(model, "outputs", None) or ()
    given = tree.flatten(labels)
    if not len(outputs) == len(given) == len(losses):
        return
    for label, loss, output in zip(given, losses, outputs, strict=True):
        config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
        if label is None or loss_name(loss) != _SPARSE:
            continue
        if config.get("ignore_class") is not None:
            continue
        classes, values = int(output.shape[-1]), ops.convert_to_numpy(label)
        wrong = values[~((values >= 0) & (values < classes))]
        if wrong.size:
            message = unknown_class(classes_rule(classes), classes, f"{wrong.flat[0]}")
            raise ValueError(message)


def _without(x: Mapping, keys: list) -> dict:
    return {key: value for key, value in x.items() if key not in keys}
