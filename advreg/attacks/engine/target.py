"""The model under attack: any Keras model, wrapped or not.

`TargetModel` takes batches apart, and runs the same `Network` that training runs, in
inference mode. Much depends on the model and is not known before a first batch.
`settle` and `output_form` find it out, on a few examples:

- Which features are perturbed: those that have a gradient (`moving`).
- Whether outputs are logits or probabilities, and of how many classes (`output_form`).
  A wrong guess would give wrong losses, so that several signs are used: the operation
  that made the outputs, the compiled loss, the values.
- Whether the model draws random numbers when it predicts (`settle`). If it does, losses
  and gradients are averaged over several draws (`mean`).

A trap: a forward pass changes variables of layers, among them the states of random
generators. `_discarded` discards these changes. But then each call would draw the same
random numbers, and a random defence would look deterministic. So where a model draws
any, each call gets random states of its own.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.attacks.engine.labels import (
    check_finite,
    check_values,
    class_numbers,
    is_bool,
)
from advreg.backend import keras_private
from advreg.checks import brief, check_model, describe
from advreg.network.compiled_loss import CompiledLoss
from advreg.network.gradients import differentiable, input_gradients, select
from advreg.network.images import as_floats, unperturbed_integers
from advreg.network.inputs import BatchForm
from advreg.network.last_activation import made_by
from advreg.network.logits import inlined
from advreg.network.losses import loss_name, takes_logits
from advreg.network.network import Network
from advreg.network.output_form import OutputForm
from advreg.network.preprocessing import preprocess, preprocesses
from advreg.network.states import RecordingScope
from advreg.perturbation.geometry import machine_epsilon

_OF_VALUES = (
    "mean_squared_error|mean_absolute_error|mean_absolute_percentage_error|"
    "mean_squared_logarithmic_error|huber|log_cosh|poisson|cosine_similarity"
)
DRAWS = 10  # Default number of draws, for a model that draws random numbers.
_ROWS = 32  # Number of examples with which facts about a model are found out.


class TargetModel:
    """A Keras model for attacks and evaluation, wrapped or not.

    Args:
        model: The model. It runs in inference mode, and nothing of it changes.
        from_logits: Whether its outputs are logits. If `None`, it is guessed from the
            operation that made them, the compiled loss, and the values of the first
            batch.

    Raises:
        TypeError: `model` is not a Keras 3 model, or `from_logits` is not a bool.
    """

    def __init__(self, model: keras.Model, from_logits: bool | None = None) -> None:
        check_model("model", model)
        if not isinstance(from_logits, (bool, type(None))):
            raise TypeError(
                "`from_logits` must be a bool or `None`. Received: "
                f"{brief(from_logits)}"
            )
        backend.sync_state(model)  # A callback may attack it in the midst of an epoch.
        form = getattr(model, "batch_form", None)
        if not isinstance(form, BatchForm):
            form = BatchForm(model, (), None, False)
        self.model = model
        self.form = form
        self.functions = backend.functions_of(model)
        # Number of forward passes of single examples. The engine counts them.
        self.evaluations = 0
        self.random = False  # Whether the model draws random numbers.
        self.draws = 1  # Number of draws to average over, if it does.
        self._from_logits = from_logits
        self._output_form: OutputForm | None = None
        self._output_shape: tuple[int | None, ...] | None = None
        self._moving: tuple[bool, ...] | None = None
        self._seed: keras.random.SeedGenerator | None = None
        self._network = Network(form)

    @property
    def base(self) -> keras.Model:
        """The base model itself."""
        return self.form.base_model

    @property
    def fixed_batch(self) -> int | None:
        """The batch size of a network that was built for a single one, else `None`."""
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
        """Takes a batch apart into features and labels, as tensors.

        Args:
            data: `(x, y)`, or another form that `fit` takes.

        Returns:
            Features, with images and declared quantities cast to floats, and labels.

        Raises:
            TypeError: TensorFlow cannot make a tensor of a part.
            ValueError: Labels are missing, or a part has no batch axis, or another
                number of examples.
        """
        x, y, _ = preprocess(self.form, data)
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
        return as_floats(x, self.form.fixed_keys, self.base), y

    def features(self, data: Any) -> Features:
        """Returns the features of a batch, with labels or without."""
        x, _, _ = preprocess(self.form, data)
        return as_floats(_tensors("x", x), self.form.fixed_keys, self.base)

    def given(self, x: Any, features: Features) -> Features:
        """Returns the features as the user passed them, or after preprocessing, if any.

        Args:
            x: The data that the user passed.
            features: The features that `unpack` made of them.
        """
        return features if preprocesses(self.base) else self.form.features(x)

    def moving(self, features: Features) -> Sequence[bool]:
        """Returns for each leaf of the features whether it is perturbed.

        As in training, only leaves are perturbed with respect to which the outputs have
        a gradient. If there are none, an attack without gradients may perturb all
        floats that are no categories. Whole numbers count as categories if the model
        has an `Embedding`, or if the leaf has two axes or fewer.

        Args:
            features: A batch, as `unpack` returns it.
        """
        # The answer for the first batch holds for all, and inside of compiled
        # functions, where values are unknown.
        wanted = differentiable(features, self.form.fixed_keys)
        if self._moving is not None and len(self._moving) == len(wanted):
            return self._moving
        leaves = tree.flatten(features)
        if any(map(backend.is_symbolic, select(features, wanted))):
            return wanted
        codes = [
            want and _are_whole(leaf) and (self._embeds or len(leaf.shape) <= 2)
            for want, leaf in zip(wanted, leaves, strict=True)
        ]
        if sum(wanted) > 1 or any(codes):
            connected = self._connected(features, wanted)
            if any(connected):
                wanted = connected
            else:
                wanted = [
                    want and not code for want, code in zip(wanted, codes, strict=True)
                ]
        self._moving = tuple(wanted)
        return self._moving

    def unperturbed_integers(self, features: Features) -> list[str]:
        """Names the integers that stay unperturbed, and have a gradient as floats."""

        def find() -> list[str]:
            return unperturbed_integers(
                features, self.form.fixed_keys, self.base, self.outputs
            )

        types = repr(backend.signature_of(features))
        return self.functions.fact(("unperturbed integers", types), find)

    def settle(self, features: Features, draws: int | None = None) -> None:
        """Finds out with a first batch what compiled functions will depend on.

        Args:
            features: The first batch.
            draws: Number of draws to average over if the model draws random numbers
                when it predicts; `None` for the default.
        """
        self.moving(features)
        self.random = self._draws_random_numbers(features)
        if self.random:
            self.draws = DRAWS if draws is None else draws

    def _draws_random_numbers(self, features: Features) -> bool:
        """Returns whether the model gives other outputs when it is called again."""
        sample = self._sample(features)

        def find() -> bool:
            predict = self._predict(sample)
            if not backend.may_draw(predict):
                return False
            # Run eagerly, the call itself shows the generators; compiled, its tracing.
            predict(sample)
            self._seed = self._draws_of_seeds()
            predict = self._predict(sample)
            return not backend.alike(predict(sample), predict(sample))

        found = self.functions.fact("draws random numbers", find)
        self._seed = self._draws_of_seeds() if found else None
        return found

    def restart_draws(self) -> None:
        """Resets the seed, so that a random model draws the same numbers again."""
        if self._seed is not None:
            self._seed.state.assign([0, 0])

    def mean(self, evaluate: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Averages an evaluation of the model over its draws of random numbers.

        This is the expectation over transformation of
        [Athalye et al., 2018](https://arxiv.org/abs/1707.07397). A model that draws
        nothing is evaluated once.

        Args:
            evaluate: Function that calls `outputs`, and returns tensors computed from
                the result.

        Returns:
            The means of these tensors. For booleans it is whether they are true in most
            draws.
        """
        first = evaluate()
        if self.draws == 1:
            return first

        def add(sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(sums, evaluate(), strict=True)
            return tuple(total + _number(part) for total, part in pairs)

        sums = tuple(_number(part) for part in first)
        sums = backend.accumulate(add, self.draws - 1, sums)
        means = [total / self.draws for total in sums]
        return tuple(
            mean > 0.5 if is_bool(part) else mean
            for mean, part in zip(means, first, strict=True)
        )

    def compiled_differently(self, features: Features) -> str | None:
        """Compares the outputs of the compiled model with those of a direct call.

        Args:
            features: A batch, of which the first rows are used that are finite.

        Returns:
            The largest difference in words, or `None` if they are equal up to rounding,
            or cannot be compared.
        """
        if self.model.run_eagerly or not self.base.built or self.random:
            return None
        rows = _finite_rows(self._sample(features))
        if rows is None:
            return None
        for _ in range(2):
            compiled = _only_output(self._predict(rows)(rows))
            # Three times, because random numbers from Python or NumPy may be equal once
            # by chance. Tracing has drawn them only once.
            direct = [self.outputs(rows) for _ in range(3)]
            if all(backend.alike(compiled, each, self._rounding) for each in direct):
                return None
            self.functions.forget()  # One more try, with a new tracing.
        found = [_float64(each) for each in (compiled, *direct)]
        worst = max(np.nanmax(np.abs(found[0] - each)) for each in found[1:])
        return f"{worst:.3g} on values up to {np.nanmax(np.abs(found[1])):.3g}"

    def predictions(self, features: Features) -> Any:
        """Runs the network in inference mode, with state changes discarded.

        Args:
            features: Features, as `unpack` returns them.

        Returns:
            All outputs, in the structure of the network's.
        """
        fixed, count = self.fixed_batch, None
        if fixed is not None:  # Copies of the last row fill up the batch.
            count = backend.num_rows(tree.flatten(features)[0])
            message = f"The network takes batches of {fixed}, and no larger."
            backend.assert_at_most(count, fixed, message)
            places = ops.minimum(ops.arange(fixed), count - 1)
            features = tree.map_structure(
                lambda leaf: backend.gather(leaf, places), features
            )
        with self._discarded(), inlined(self.base):
            outputs = self._network.forward(
                features, training=False, floats=True, for_input_gradient=True
            )
        if count is None:
            return outputs

        def first(output: Tensor) -> Tensor:
            rows = output[:count]
            keras_private.copy_mask(output, rows, count)
            return rows

        return tree.map_structure(first, outputs)

    def outputs(self, features: Features) -> Tensor:
        """Runs a network that has one output, as `predictions` does, and returns it.

        Raises:
            ValueError: The network has several outputs.
        """
        return _only_output(self.predictions(features))

    @property
    def known_form(self) -> OutputForm:
        """The form of the outputs, once `output_form` has been called."""
        assert self._output_form is not None
        return self._output_form

    def output_form(self, features: Features) -> OutputForm:
        """Returns the form of the outputs, found out with a first batch.

        Args:
            features: The first batch.

        Raises:
            ValueError: The outputs are no scores of classes, or not what `from_logits`
                says.
        """
        if self._output_form is None:
            self._output_form = self._find_output_form(self._sample(features))
        return self._output_form

    def classes(self, y: Any, form: OutputForm) -> Tensor:
        """Converts labels of any usual form to class numbers, int32 of shape `[batch]`.

        Args:
            y: Class numbers of shape `[batch]` or `[batch, 1]`, or one-hot rows.
            form: The form of the outputs.

        Raises:
            ValueError: They are of another form, or no class has such a number.
        """
        return class_numbers(y, form, self._is_multi_label)

    def scores_examples(self, features: Features) -> bool:
        """Returns whether the model has one output, with a row for each example.

        If it has several, or one with a row for each pixel or step, no example as a
        whole is misclassified.

        Args:
            features: Features of a batch.
        """
        sample = self._sample(features)
        outputs = tree.flatten(self._predict(sample)(sample))
        return len(outputs) == 1 and len(outputs[0].shape) <= 2

    def needs_classes(self, y: Any, features: Features) -> bool:
        """Returns whether each label is one class, so that examples can be fooled.

        If labels are values, or several classes are right, nothing is ever
        misclassified, and an attack only increases the compiled loss.

        Args:
            y: Labels of a batch.
            features: Features of the batch.

        Raises:
            ValueError: The compiled loss takes classes, but these labels are none.
        """
        if self.fits_values:
            return False
        if not self.scores_examples(features):
            return False
        name = loss_name(self.model.loss) or ""
        try:
            self.classes(y, self.output_form(features))
        except ValueError:
            if "categorical" in name:
                raise
            return False
        return True

    def compiled_loss(self, y: Any, predictions: Any) -> Tensor:
        """Computes the loss that the model was compiled with, for each example.

        See `CompiledLoss.per_example`.

        Raises:
            ValueError: The loss does not accept these labels, or returns a scalar.
        """
        return self._compiled_loss().per_example(y, predictions)

    def _compiled_loss(self) -> CompiledLoss:
        model = self.model
        return CompiledLoss(
            keras_private.compiled_losses_of(model),
            model.loss,
            keras_private.loss_weights_of(model),
            lambda: getattr(model, "output_names", None) or (),
        )

    def check_labels(self, y: Any, features: Features) -> None:
        """Checks labels that the compiled loss takes.

        Args:
            y: The labels: values, classes of pixels, or a structure of them.
            features: Features of the batch.

        Raises:
            ValueError: They are not finite, or no classes of the model, or values of
                another shape than the outputs.
        """
        if self.fits_values and self.scores_examples(features):
            if self._output_shape is None:
                outputs = self.outputs(self._sample(features))
                self._output_shape = tuple(outputs.shape[1:])
            check_values(y, self._output_shape)
        check_finite(y)
        self._compiled_loss().check_classes(y, self.base)

    def check_compiled_loss(self) -> None:
        """Checks that the model was compiled with a loss.

        Raises:
            ValueError: It was compiled with none.
        """
        loss = getattr(self.model, "loss", None)
        if all(one is None for one in tree.flatten(loss)):
            raise ValueError(
                "Attacks with `loss='model'`, and those on a model that gives no class "
                "scores of each example, increase the compiled loss: call "
                f"`model.compile(loss=...)` first. Received: loss={brief(loss)}"
            )

    def compile(
        self,
        key: Hashable,
        function: Callable[..., Any],
        *examples: Any,
        features: Features = None,
    ) -> Callable[..., Any]:
        """Compiles a function of batches once, for batches of any size.

        The compiled function is kept until the model changes or is freed.

        Args:
            key: What the function depends on, beside its arguments and the model.
            function: A function of structures of tensors with the batch axis first,
                or of scalars.
            *examples: Arguments like those that it will be called with.
            features: The features, where the first argument is a dictionary with an
                entry of that name. `None` where it is the features themselves.

        Returns:
            The compiled function, or the function itself if the model runs eagerly.
        """
        if self.model.run_eagerly:
            return function

        def takes(specs: Any) -> bool:
            if features is None:
                return self._takes_sizes(specs, examples[0])
            return self._takes_sizes(specs["features"], features)

        loss = getattr(self.model, "loss", None)
        state = (self._output_form, self._moving, self.draws, self._seed is not None)
        return self.functions.compiled(
            (key, *state, id(loss)), function, examples, takes=takes, keep=loss
        )

    def _takes_sizes(self, specs: Any, features: Features) -> bool:
        return self.functions.takes_sizes(self.predictions, specs, features)

    @property
    def _is_multi_label(self) -> bool:
        """Whether the compiled loss is a binary cross-entropy."""
        name = loss_name(getattr(self.model, "loss", None))
        return name is not None and name.startswith("binary")

    @property
    def _embeds(self) -> bool:
        return any(
            isinstance(layer, keras.layers.Embedding)
            for layer in keras_private.layers_of(self.base)
        )

    @property
    def _rounding(self) -> float:
        """The relative error by which compiled and direct outputs may differ."""
        layers = list(keras_private.layers_of(self.base))
        if any(layer.quantization_mode is not None for layer in layers):
            return 1e-2  # About one step of int8.
        dtypes = [layer.compute_dtype for layer in layers] or ["float32"]
        return max(map(machine_epsilon, dtypes)) ** 0.5

    def _sample(self, features: Features) -> Features:
        """Returns the first examples of a batch, at most `_ROWS`."""
        count = min(_ROWS, self.fixed_batch or _ROWS)
        return tree.map_structure(lambda leaf: leaf[:count], features)

    def _predict(self, features: Features) -> Callable[[Features], Any]:
        """Returns a function that runs the network, compiled if it can be."""
        if self.model.run_eagerly:
            return self.predictions
        if not self.base.built:
            self.predictions(features)
        key = ("outputs", self._seed is not None)
        return self.functions.compiled(
            key,
            self.predictions,
            (features,),
            takes=lambda specs: self._takes_sizes(specs, features),
        )

    def _connected(self, features: Features, wanted: Sequence[bool]) -> list[bool]:
        """Returns for each leaf whether the outputs have a gradient for it."""

        def find() -> list[bool]:
            few = tree.map_structure(lambda leaf: leaf[:2], features)

            def summed(features: Features) -> Tensor:
                outputs = tree.flatten(self.predictions(features))
                return functools.reduce(ops.add, map(_sum_of, outputs))

            return [g is not None for g in input_gradients(summed, few, wanted)]

        key = ("connected", tuple(wanted), repr(backend.signature_of(features)))
        return self.functions.fact(key, find)

    def _draws_of_seeds(self) -> keras.random.SeedGenerator:
        """Returns the generator of states for the model's own random generators."""
        # Compiled functions use its variable, so it must live as long as they do.
        return self.functions.fact(
            "draws of seeds", lambda: keras.random.SeedGenerator(0, name="draws")
        )

    @contextlib.contextmanager
    def _discarded(self) -> Iterator[None]:
        """Discards changes of the layers' state, as a context manager.

        The states of random generators would not change either, so that all calls would
        draw the same numbers. Where the model draws any, each call gets states of its
        own, drawn from `_seed`.
        """
        if not self.base.built:  # The first call creates its variables.
            yield
            return
        generators = self.functions.fact("generators", list)
        states = []
        if self._seed is not None:
            drawn = ops.cast(self._seed.next(), "int32")
            for index, variable in enumerate(generators):
                value = backend.random_integers(
                    variable.shape, drawn + ops.convert_to_tensor([index, 0], "int32")
                )
                states.append((variable, ops.cast(value, variable.dtype)))
        with RecordingScope(state_mapping=states) as scope:
            yield
        known = {id(variable) for variable in generators}
        generators.extend(v for v in scope.generators if id(v) not in known)

    def _find_output_form(self, features: Features) -> OutputForm:
        """Finds out the form of the outputs.

        Signs of probabilities are: all values lie in [0, 1]; rows sum to 1; a softmax
        or sigmoid made them; the compiled loss takes probabilities. Several scores are
        probabilities if their rows sum to 1, or if they lie in [0, 1] and one of the
        last two signs is there. For a single score see `_says_logits`.
        """
        predict = self._predict(features)
        outputs = _only_output(predict(features))
        shape, rank = outputs.shape, backend.rank(outputs)
        columns = 1 if rank == 1 else shape[-1]
        if rank is not None and rank > 2:
            raise ValueError(
                "`model` must give class scores of each example, [batch, classes], for "
                "reports, for targeted attacks and for losses of class scores. Of one "
                "that gives them for each pixel or each step of a sequence, as "
                "segmentation and tagging do, FGSM, BIM, PGD, APGD and RandomNoise "
                "increase the compiled loss. Received: an output of shape "
                f"{tuple(shape)}"
            )
        is_float = keras.backend.is_float_dtype(outputs.dtype)
        if rank not in (1, 2) or not columns or not is_float:
            raise ValueError(
                "`model` must give class scores, floats of shape [batch, classes], or "
                "[batch, 1] for two classes. Received: an output of shape "
                f"{tuple(shape)} and type {backend.dtype_name(outputs)}"
            )
        values = ops.convert_to_numpy(ops.cast(outputs, "float32")).reshape(-1, columns)
        values = values[~np.isnan(values).any(axis=1)]
        if not len(values):
            raise ValueError(
                "`model` must give numbers. Received: outputs that are NaN for all of "
                f"the first {len(outputs)} examples"
            )
        behind = self._made_by(predict, features)
        inside = bool(np.all((values >= 0) & (values <= 1)))
        sums = inside and bool(np.all(np.abs(values.sum(axis=1) - 1) < 1e-2))
        found = behind in ("softmax", "sigmoid")
        if columns == 1:
            likely = inside and (
                self._from_logits is False or not self._says_logits(behind)
            )
        else:
            loss_says = takes_logits(getattr(self.model, "loss", None)) is False
            likely = sums or (inside and (found or loss_says))
        if self._from_logits is False and not likely:
            raise ValueError(
                "`from_logits=False` says that the model gives probabilities: values "
                "in [0, 1], each row summing to 1. Set `from_logits=True`, or leave it "
                f"out. Received: outputs from {values.min():.4g} to {values.max():.4g}"
            )
        logits = not likely if self._from_logits is None else self._from_logits
        return OutputForm(
            logits,
            columns,
            one_vs_rest=not logits and columns > 1 and not sums,
            hidden=not logits and not found,
        )

    def _made_by(self, predict: Callable[..., Any], features: Features) -> str | None:
        """Returns which operation makes the outputs, `None` where it is unknown."""
        # It is known in the graph, or while the pass runs whose outputs they are.
        in_graph = backend.outputs_of(predict)
        if in_graph is not None:
            return made_by(in_graph)
        few = tree.map_structure(lambda leaf: leaf[:2], features)
        return made_by(self.outputs(few))

    def _says_logits(self, behind: str | None) -> bool:
        """Returns whether a single score between 0 and 1 is a logit.

        The compiled loss says so, or else the operation that made the score, or the
        activation of the last layer.
        """
        says = takes_logits(getattr(self.model, "loss", None))
        if says is not None:
            return says
        if behind is not None:
            return behind not in ("softmax", "sigmoid")
        layers = getattr(self.base, "layers", None) or [None]
        return getattr(layers[-1], "activation", None) is keras.activations.linear


def _only_output(outputs: Any) -> Tensor:
    leaves = tree.flatten(outputs)
    if len(leaves) != 1:
        raise ValueError(
            "`model` must have one output for reports, for targeted attacks and for "
            "losses of class scores. Choose the one to attack, such as "
            "`keras.Model(model.inputs, model.outputs[0])`. FGSM, BIM, PGD, APGD and "
            "RandomNoise increase the compiled loss of all of them. "
            f"Received: {describe(outputs)}"
        )
    return leaves[0]


def _sum_of(output: Tensor) -> Tensor:
    return ops.sum(ops.cast(output, keras.config.floatx()))


def _number(part: Tensor) -> Tensor:
    return ops.cast(part, "float32") if is_bool(part) else part


def _float64(part: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(part, backend.widest_float()))


def _finite_rows(features: Features) -> Features | None:
    """Returns the rows in which all values are finite, `None` where there are none."""
    finite = [
        np.isfinite(_float64(leaf)).reshape(len(leaf), -1).all(axis=1)
        for leaf in tree.flatten(features)
        if backend.is_tensor(leaf) and keras.backend.is_float_dtype(leaf.dtype)
    ]
    if not finite or np.all(finite):
        return features
    places = np.flatnonzero(np.all(finite, axis=0))
    if not len(places):
        return None
    return tree.map_structure(lambda leaf: backend.gather(leaf, places), features)


def _are_whole(leaf: Tensor) -> bool:
    """Returns whether all values are whole numbers, as codes of categories are."""
    values = ops.convert_to_numpy(leaf)
    return bool(np.all(values == np.floor(values)))


def _tensors(name: str, part: Any) -> Any:
    """Converts a part of the data to tensors, and checks that each is a batch."""
    for leaf in tree.flatten(part):
        if getattr(leaf, "shape", ()) == ():
            raise ValueError(
                f"`{name}` must be an array with a batch axis, or a structure of "
                "arrays; a list of numbers is a structure, so make it a NumPy array. "
                f"Received: {describe(part)}"
            )
        if backend.is_sparse(leaf):
            raise ValueError(
                f"`{name}` must not hold sparse tensors: `tf.sparse.to_dense` makes "
                f"them dense. Received: {describe(part)}"
            )
    try:
        return tree.map_structure(backend.to_tensor, part)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must hold arrays that Keras can make tensors of: {error} "
            f"Received: {describe(part)}"
        ) from error
