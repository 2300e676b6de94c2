"""The model under attack: what comes in, and what its outputs say of classes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.batches import BatchForm
from advreg.convolution import cheap_input_gradients
from advreg.geometry import Tensor
from advreg.images import as_floats, float_twin
from advreg.packing import Features, describe
from advreg.perturbation import to_tensor
from advreg.scores import get_loss, logits_of, loss_name, takes_logits, widen

_CACHE = "_advreg_compiled"
_OF_VALUES = (
    "mean_squared_error|mean_absolute_error|mean_absolute_percentage_error|"
    "mean_squared_logarithmic_error|huber|log_cosh|poisson|cosine_similarity"
)


@dataclasses.dataclass(frozen=True)
class OutputForm:
    """How the outputs of a classifier are read.

    Args:
        from_logits: Whether they are logits, or probabilities.
        columns: Number of scores; one score tells two classes apart.
    """

    from_logits: bool
    columns: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return max(self.columns, 2)

    def predicted(self, outputs: Tensor) -> Tensor:
        """The class that the model takes each example for, int32 of shape `[batch]`."""
        if self.columns > 1:
            return tf.argmax(outputs, axis=1, output_type=tf.int32)
        threshold = 0.0 if self.from_logits else 0.5
        return tf.cast(tf.reshape(outputs, [-1]) > threshold, tf.int32)

    def logits(self, outputs: Tensor) -> Tensor:
        """The logits, float32 at least, one for each class."""
        logits = logits_of(outputs, self.from_logits)
        return tf.reshape(logits, [-1, self.classes])


class Victim:
    """A Keras model as attacks and evaluation see it, wrapped or not.

    Args:
        model: The model. It runs in inference mode, and nothing of it changes.
        from_logits: Whether its outputs are logits. If `None`, they are probabilities
            if all lie in [0, 1], and each row of several sums to 1, in the first batch;
            for a single score the compiled loss, then the last activation decides.

    Raises:
        TypeError: `model` is not a Keras 3 model, or `from_logits` is not a bool.
    """

    def __init__(self, model: keras.Model, from_logits: bool | None = None) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(
                "`model` must be a Keras 3 model, an instance of `keras.Model`. "
                f"Received: {model!r} (of type {type(model).__name__})"
            )
        if not isinstance(from_logits, (bool, type(None))):
            raise TypeError(
                f"`from_logits` must be a bool or `None`. Received: {from_logits!r}"
            )
        form = getattr(model, "batch_form", None)
        if not isinstance(form, BatchForm):
            form = BatchForm(model, (), None, False)
        self.model = model
        self.form = form
        self._from_logits = from_logits
        self._output_form: OutputForm | None = None
        self._output_shape: tuple[int | None, ...] | None = None
        self._twin: keras.Model | None = None

    @property
    def base(self) -> keras.Model:
        """The network itself."""
        return self.form.base_model

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the network was built for, where it takes no other."""
        for tensor in getattr(self.base, "inputs", None) or ():
            if tensor is not None and tensor.shape and tensor.shape[0] is not None:
                return int(tensor.shape[0])
        return None

    @property
    def fits_values(self) -> bool:
        """Whether the compiled loss is one of regression."""
        name = loss_name(getattr(self.model, "loss", None))
        return name is not None and re.fullmatch(_OF_VALUES, name) is not None

    def unpack(self, data: Any) -> tuple[Features, Any]:
        """Takes a batch apart into features and labels, tensors of both.

        Raises:
            TypeError: A part is nothing that a tensor can be made of.
            ValueError: Labels are missing, or a part is no batch like the others.
        """
        x, y, _ = self.form.unpack(data)
        if y is None:
            if self.form.label_keys:
                self.form.raise_missing_labels(data)
            raise ValueError(
                f"Labels are missing: pass them as `y`. Received: x={describe(x)} and "
                "y=None"
            )
        x, y = _tensors("x", x), _tensors("y", y)
        counts = [leaf.shape[0] for leaf in tree.flatten((x, y))]
        if len(set(counts)) > 1:
            raise ValueError(
                "`x` and `y` must have the same number of examples. Received: "
                f"{' and '.join(map(str, counts))}"
            )
        return as_floats(x, self.form.fixed_keys), y

    def outputs(self, features: Features) -> Tensor:
        """Runs the network in inference mode. It must have one output."""
        if self._twin is None:
            self._twin = float_twin(self.base, self.form.fixed_keys)
        fixed, count = self.fixed_batch, None
        if fixed is not None:  # The rows beyond the last one are copies of it.
            count = tf.shape(tree.flatten(features)[0])[0]
            tf.debugging.assert_less_equal(
                count, fixed, f"The network takes batches of {fixed}, and no larger."
            )
            places = tf.minimum(tf.range(fixed), count - 1)
            features = tree.map_structure(
                lambda leaf: tf.gather(leaf, places), features
            )
        # State that layers update even so is discarded, once it has been created.
        discarded = (
            keras.StatelessScope() if self.base.built else contextlib.nullcontext()
        )
        with discarded, cheap_input_gradients(self._twin):
            outputs = self._twin(self.form.base_inputs(features), training=False)
        leaves = tree.flatten(outputs)
        if len(leaves) != 1:
            raise ValueError(
                "`model` must have one output. Choose the one to attack, such as "
                f"`keras.Model(model.inputs, model.outputs[0])`. Received: "
                f"{describe(outputs)}"
            )
        return leaves[0] if count is None else leaves[0][:count]

    @property
    def known_form(self) -> OutputForm:
        """How the outputs are read, once `output_form` has seen some."""
        assert self._output_form is not None
        return self._output_form

    def output_form(self, features: Features) -> OutputForm:
        """Tells how the outputs are to be read, by those for a first batch.

        Raises:
            ValueError: They are no scores of classes, or not what `from_logits` says.
        """
        if self._output_form is None:
            self._output_form = self._find_output_form(self._sample(features))
        return self._output_form

    def classes(self, y: Any, form: OutputForm) -> Tensor:
        """Makes class numbers, int32 of shape `[batch]`, of labels of any usual form.

        Args:
            y: Class numbers of shape `[batch]` or `[batch, 1]`, or one-hot rows.
            form: How the outputs are read.

        Raises:
            ValueError: They are of another form, or no class has such a number.
        """
        leaves = tree.flatten(y)
        shape = leaves[0].shape if len(leaves) == 1 else None
        one_hot = shape is not None and shape.rank == 2 and shape[1] == form.columns > 1
        rule = (
            f"`y` must hold classes from 0 to {form.classes - 1}, in the shape [batch] "
            "or [batch, 1]"
        ) + (f", or one-hot rows [batch, {form.columns}]" if form.columns > 1 else "")
        if shape is None or not (
            one_hot or shape.rank == 1 or (shape.rank == 2 and shape[1] == 1)
        ):
            raise ValueError(f"{rule}. Received: {describe(y)}")
        dtype = leaves[0].dtype
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise ValueError(f"{rule}. Received: {describe(y)}")
        if one_hot:
            rows = leaves[0].numpy().astype("float64")
            # Smoothed labels have their class too; a row of zeros or NaN has none.
            largest = (rows == rows.max(axis=1, keepdims=True)).sum(axis=1)
            if (largest != 1).any():
                raise ValueError(
                    f"{rule}, each with one largest value. Received: "
                    f"{rows[largest != 1][0]} (and {int((largest != 1).sum()) - 1} "
                    "more)"
                )
            return tf.constant(rows.argmax(axis=1).astype("int32"))
        numbers = tf.reshape(leaves[0], [-1]).numpy().astype("float64")
        wrong = (numbers != np.floor(numbers)) | (numbers < 0)
        wrong |= ~(numbers < form.classes)
        if wrong.any():
            raise ValueError(
                f"{rule}, for the model has {form.classes} classes. Received: "
                f"{numbers[wrong][0]:g} (and {int(wrong.sum()) - 1} more)"
            )
        return tf.constant(numbers.astype("int32"))

    def compiled_loss(self, y: Any, outputs: Tensor) -> Tensor:
        """The loss that the model was compiled with, of each example, `[batch]`.

        Raises:
            ValueError: The labels are none for it, or it gives no value for each.
        """
        losses = [loss for loss in tree.flatten(self.model.loss) if loss is not None]
        labels = tree.flatten(y)
        if len(labels) != 1:
            raise ValueError(
                f"`y` must be one array of labels. Received: {describe(y)}"
            )
        # As Keras does: labels in the type of the outputs, and for functions the rank.
        outputs, target = widen(outputs), labels[0]
        loss = get_loss(losses[0], target, outputs)
        if target.dtype.is_floating or target.dtype.is_integer or target.dtype.is_bool:
            target = tf.cast(target, outputs.dtype)
        if isinstance(loss, keras.losses.Loss):
            function = loss.call
        else:
            function, target = loss, _of_rank(target, outputs)
        try:
            values = widen(tf.convert_to_tensor(function(target, outputs)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`y` must hold labels as the compiled loss, {loss_name(loss)}, takes "
                f"them: {error} Received: {describe(y)}"
            ) from error
        if not values.shape.rank:
            raise ValueError(
                "The compiled loss must give a value for each example. Received: "
                f"{loss_name(loss)}, which returns a scalar"
            )
        return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))

    def check_values(self, y: Any, features: Features) -> None:
        """Checks what a model of regression was to predict.

        Raises:
            ValueError: It has another shape than the outputs, or is not finite.
        """
        leaves = tree.flatten(y)
        if self._output_shape is None:
            self._output_shape = tuple(self.outputs(self._sample(features)).shape[1:])
        shape = self._output_shape
        fits = len(leaves) == 1 and _core(leaves[0].shape[1:]) == _core(shape)
        if not fits or not (leaves[0].dtype.is_floating or leaves[0].dtype.is_integer):
            raise ValueError(
                f"`y` must hold numbers in the shape of the outputs, {[None, *shape]}, "
                "for the model was compiled with a loss of regression. Received: "
                f"{describe(y)}"
            )
        if not np.isfinite(leaves[0].numpy()).all():
            raise ValueError(
                "`y` must be finite. Received: "
                f"{int((~np.isfinite(leaves[0].numpy())).sum())} values that are not"
            )

    def check_compiled_loss(self) -> None:
        """Checks that the model was compiled with one loss.

        Raises:
            ValueError: It was not.
        """
        losses = tree.flatten(getattr(self.model, "loss", None))
        if len([loss for loss in losses if loss is not None]) != 1:
            raise ValueError(
                "`loss='model'` attacks the loss that the model was compiled with: "
                "call `model.compile(loss=...)` with one loss first. Received: "
                f"{getattr(self.model, 'loss', None)!r}"
            )

    def compile(
        self, key: Hashable, function: Callable[..., Any], *examples: Any
    ) -> Callable[..., Any]:
        """Compiles a function of batches once, for batches of any size.

        What was compiled is kept with the model, and lives as long as it does.

        Args:
            key: What the function depends on, beside its arguments and the model.
            function: A function of structures of tensors with the batch axis first,
                or of scalars.
            *examples: Arguments like those that it will be called with.
        """
        if self.model.run_eagerly:
            return function
        cache = vars(self.model).setdefault(_CACHE, SimpleNamespace(functions={}))
        specs = signature_of(examples)
        loss = getattr(self.model, "loss", None)
        key = (key, self._output_form, id(loss), repr(specs))
        if key not in cache.functions:
            compiled = tf.function(function, autograph=False)
            # As a concrete function it is not suspected by TensorFlow of being traced
            # too often, when many models are attacked in a row. The loss is kept alive,
            # lest another takes its address.
            cache.functions[key] = (compiled.get_concrete_function(*specs), loss)
        return cache.functions[key][0]

    def _sample(self, features: Features) -> Features:
        """The first examples, no more than the network takes."""
        count = min(32, self.fixed_batch or 32)
        return tree.map_structure(lambda leaf: leaf[:count], features)

    def _find_output_form(self, features: Features) -> OutputForm:
        look = self.outputs
        if self.base.built:
            look = self.compile("outputs", look, features)
        outputs = look(features)
        shape = outputs.shape
        columns = 1 if shape.rank == 1 else shape[-1]
        if shape.rank not in (1, 2) or not columns or not outputs.dtype.is_floating:
            raise ValueError(
                "`model` must give class scores, floats of shape [batch, classes], or "
                "[batch, 1] for two classes. Received: an output of shape "
                f"{tuple(shape)} and type {outputs.dtype.name}"
            )
        values = tf.cast(outputs, "float32").numpy().reshape(-1, columns)
        values = values[~np.isnan(values).any(axis=1)]
        if not len(values):
            raise ValueError(
                "`model` must give numbers. Received: outputs that are NaN for all of "
                f"the first {len(outputs)} examples"
            )
        likely = bool(np.all((values >= 0) & (values <= 1)))
        if columns > 1:
            likely = likely and bool(np.all(np.abs(values.sum(axis=1) - 1) < 1e-2))
        elif likely and self._from_logits is None:
            likely = not self._says_logits()
        if self._from_logits is False and not likely:
            raise ValueError(
                "`from_logits=False` says that the model gives probabilities: values "
                "in [0, 1], each row summing to 1. Set `from_logits=True`, or leave it "
                f"out. Received: outputs from {values.min():.4g} to {values.max():.4g}"
            )
        logits = not likely if self._from_logits is None else self._from_logits
        return OutputForm(logits, columns)

    def _says_logits(self) -> bool:
        """Whether compiled loss or last layer say that a single score is a logit."""
        loss = getattr(self.model, "loss", None)
        says = takes_logits(loss)
        if says is not None:
            return says
        layers = getattr(self.base, "layers", None) or [None]
        return getattr(layers[-1], "activation", None) is keras.activations.linear


def signature_of(value: Any) -> Any:
    """The types of the tensors in a structure, for batches of any size."""
    return tree.map_structure(_spec, value)


def _spec(leaf: Any) -> Any:
    """The type of a tensor, whatever its number of rows."""
    spec = tf.type_spec_from_value(leaf)
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            [None, *spec.shape[1:]], spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return spec


def _of_rank(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels with or without a last axis of 1, as the outputs have it."""
    if labels.shape.rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1:
        return labels[..., None]
    if labels.shape.rank == outputs.shape.rank + 1 and labels.shape[-1] == 1:
        return labels[..., 0]
    return labels


def _core(shape: Any) -> list:
    """A shape without a last axis of 1."""
    sizes = list(shape)
    return sizes[:-1] if sizes[-1:] == [1] else sizes


def _tensors(name: str, part: Any) -> Any:
    """Makes tensors of a part of the data, checking that each is a batch."""
    for leaf in tree.flatten(part):
        if getattr(leaf, "shape", ()) == ():
            raise ValueError(
                f"`{name}` must be an array with a batch axis, or a structure of "
                "arrays; a list of numbers is a structure, so make it a NumPy array. "
                f"Received: {describe(part)}"
            )
        if isinstance(leaf, tf.SparseTensor):
            raise ValueError(
                f"`{name}` must not hold sparse tensors: `tf.sparse.to_dense` makes "
                f"them dense. Received: {describe(part)}"
            )
    try:
        return tree.map_structure(to_tensor, part)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must hold arrays that TensorFlow makes tensors of: {error} "
            f"Received: {describe(part)}"
        ) from error
