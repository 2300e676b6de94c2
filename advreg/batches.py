"""What in a batch is a feature, a label or a sample weight."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import keras
import tensorflow as tf
from keras import tree

from advreg.packing import Features, describe


@dataclasses.dataclass(frozen=True, eq=False)
class BatchForm:
    """Takes batches apart, and gives the base model its inputs.

    Args: as those of `AdversarialRegularization`, and
        strict: Whether labels find outputs by their names, and weights must not be
            missing. Neural Structured Learning goes by their places, and does without.

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
                f"{self.label_keys!r}"
            )
        object.__setattr__(self, "label_keys", tuple(self.label_keys))
        if not isinstance(self.sample_weight_key, (str, type(None))):
            raise TypeError(
                "`sample_weight_key` must be a string or `None`. Received: "
                f"{self.sample_weight_key!r}"
            )
        if self.sample_weight_key in self.label_keys:
            raise ValueError(
                "`sample_weight_key` must not be one of the `label_keys`. Received: "
                f"{self.sample_weight_key!r} and {self.label_keys!r}"
            )
        if not isinstance(self.base_with_labels_in_features, bool):
            raise TypeError(
                "`base_with_labels_in_features` must be a bool. Received: "
                f"{self.base_with_labels_in_features!r}"
            )

    @property
    def fixed_keys(self) -> Sequence[str]:
        """Keys of features that are not to move, because they are labels too."""
        return self.label_keys if self.base_with_labels_in_features else ()

    def unpack(self, data: Any) -> tuple[Features, Any, Any]:
        """Takes a batch apart into features, labels and sample weights.

        Args:
            data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            Features, and labels and weights or `None` where there are none.

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
        """Leaves labels and sample weights out of the inputs of a call."""
        return self.unpack((inputs,))[0]

    def base_inputs(self, features: Features) -> Any:
        """Gives the base model features in the structure that it declares."""
        if not isinstance(features, Mapping):
            return features
        declared = getattr(self.base_model, "_inputs_struct", None)
        single = isinstance(self.base_model, keras.Sequential) or (
            declared is not None and len(tree.flatten(declared)) == 1
        )
        if single and len(features) == 1 and not isinstance(declared, Mapping):
            return next(iter(features.values()))
        if isinstance(declared, Mapping) and set(declared) <= set(features):
            # Keras pairs them by their places: ordered dictionaries keep another order.
            kind = OrderedDict if isinstance(declared, OrderedDict) else dict
            return kind((key, features[key]) for key in declared)
        return features

    def check_labels(self, data: Any) -> None:
        """Checks that labels under several keys tell to which outputs they belong.

        Raises:
            ValueError: They do not.
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
        """Checks that a batch for training has the weights that it is to have.

        Raises:
            ValueError: Labels come in a dictionary, and sample weights do not come.
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
        """Takes labels out of the dictionaries that `fit` received, and passes as `y`.

        There alone Keras looks for the classes that `class_weight` weighs.

        Args:
            arguments: Those of `fit` or `train_on_batch`.

        Raises:
            ValueError: Labels are missing, or `x` is a `PyDataset` without them.
        """
        x = arguments.get("x")
        if arguments.get("y") is not None:
            return arguments
        if isinstance(x, tf.data.Dataset):
            return {**arguments, "x": x.map(self._labels_beside)}
        if isinstance(x, Mapping):
            names = ("x", "y", "sample_weight")
            data = self._labels_beside(*(arguments.get(name) for name in names))
            return {**arguments, **dict(zip(names, data, strict=False))}
        if isinstance(x, keras.utils.PyDataset):
            _, y, _ = keras.utils.unpack_x_y_sample_weight(x[0])
            if y is None:  # Keras would leave `class_weight` out without a word.
                raise ValueError(
                    "`class_weight` needs the labels beside the features: let the "
                    f"`PyDataset` return `(x, y)`. Received: {describe(x[0])}"
                )
        return arguments

    def raise_missing_labels(self, data: Any) -> NoReturn:
        """Says where labels are looked for, and what came."""
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
        """The names of the inputs that the base model declares, if it does."""
        declared = getattr(self.base_model, "_inputs_struct", None)
        if isinstance(declared, Mapping):
            return set(declared)
        if declared is None and isinstance(self.base_model, keras.Sequential):
            declared = self.base_model.inputs if self.base_model.built else None
        return {tensor.name for tensor in tree.flatten(declared) if tensor is not None}

    def _named_outputs(self) -> set[str]:
        """The keys of a dictionary of outputs, if the base model declares one."""
        declared = getattr(self.base_model, "_outputs_struct", None)
        return set(declared) if self.strict and isinstance(declared, Mapping) else set()

    def _take_labels(self, x: Features, inputs: set[str]) -> tuple[Any, Features]:
        """Splits a dictionary into labels, `None` if some are missing, and features."""
        keys = [key for key in self.label_keys if key in x]
        features = x
        if not self.base_with_labels_in_features:
            keys = [key for key in keys if key not in inputs]
            features = _without(x, keys)
        if not keys or len(keys) < len(self.label_keys):
            return None, features
        if len(keys) == 1:
            return x[keys[0]], features
        if set(keys) <= self._named_outputs():
            return {key: x[key] for key in keys}, features
        return [x[key] for key in keys], features


def on_copies(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Lets a step run on a copy of its batch.

    TensorFlow takes an array that a generator gives as it is, without a copy. Of a
    slice of it, as `rebatch` makes and as each replica gets, it forgets (from 2.19 to
    2.21 at least) that the memory is not its own, and lets an operation write its
    result there: input plus perturbation would become the user's data.

    Args:
        step: A step of training or evaluation that TensorFlow runs without XLA.
    """

    def copy(leaf: Any) -> Any:
        return tf.raw_ops.DeepCopy(x=leaf) if isinstance(leaf, tf.Tensor) else leaf

    def step_on_copies(data: Any) -> Any:
        return step(tf.nest.map_structure(copy, data, expand_composites=True))

    return step_on_copies


def _without(x: Mapping, keys: list) -> dict:
    return {key: value for key, value in x.items() if key not in keys}
