"""Outputs of layers that training perturbs, in place of the inputs or beside them.

Token ids and categories are integers, which cannot be perturbed. What an `Embedding`
makes of them can be, as [Miyato et al., 2017](https://arxiv.org/abs/1605.07725) do for
text.

How it works: `LayerOutputs` intercepts the calls of the chosen layers while the model
runs (see `taps`). `recorded` keeps what each call returns. `displaced` adds a
displacement to it, a tensor of the same shape. Displacements are further features of
the attack, which perturbs `(x, displacements)` in place of `x`. So the arithmetic of
`perturbation` knows nothing of layers, and the model is never cut in two. The gradient
of a displacement of zero is that of the output, so one clean pass gives it.

Displacements have the structure `{path: [one for each output of each call]}`, where
`path` leads to the layer, as in `"backbone/token_embedding"`.

Traps:

- Padding must stand still. Keras puts the mask on an output only after the call, and
  layers further down may take it away. So it is computed here, at the layer. Models of
  KerasHub have no such masks, but an input `padding_mask`.
- A layer may be called several times, or be part of a loop, in which tensors belong to
  another trace and cannot be used outside. The latter is an error.
- A table of positions returns no row for each example. `"embeddings"` leaves it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor, Watch
from advreg.backend import keras_private
from advreg.config.configs import EMBEDDINGS, INPUTS
from advreg.network.taps import intercepted
from advreg.perturbation.geometry import widen

Displacements = dict[str, list[Tensor]]


class Recorded(NamedTuple):
    """What the chosen layers returned in one pass.

    Args:
        outputs: The outputs, `{path: [one for each output of each call]}`.
        masks: The mask of each, a boolean tensor that broadcasts to the output, or
            `None` where it has none. Where it is false, the output is padding.
    """

    outputs: Displacements
    masks: dict[str, list[Tensor | None]]

    def zeros(self) -> Displacements:
        """Returns displacements that change nothing."""
        return tree.map_structure(ops.zeros_like, self.outputs)

    def can_move(self) -> list[Tensor | None]:
        """Returns for each leaf of the displacements where it may be perturbed."""
        return tree.flatten(self.masks)

    def scales(self) -> Displacements:
        """Returns the root mean square of each output, one number for each example.

        Padding does not count. The numbers are constants to every gradient.
        """
        return {
            path: [
                _root_mean_square(output, mask)
                for output, mask in zip(outputs, self.masks[path], strict=True)
            ]
            for path, outputs in self.outputs.items()
        }


class LayerOutputs:
    """The layers of a model whose outputs are perturbed.

    Args:
        layers: The layers, by their paths.
        batch: A tensor with a row for each example, or `None`, in which case all
            outputs are taken to have one.
        optional: Paths of layers that may return no row for each example, or not be
            called at all, because nobody named them one by one.
        padding_mask: A mask `[batch, length]` for outputs of that length that have none
            of their own, as models of KerasHub take it with their inputs.
    """

    def __init__(
        self,
        layers: Mapping[str, keras.Layer],
        batch: Tensor | None = None,
        optional: Sequence[str] = (),
        padding_mask: Tensor | None = None,
    ) -> None:
        self._layers, self._batch = dict(layers), batch
        self._optional, self._padding_mask = set(optional), padding_mask
        # The paths of the last recording, in the order of the calls.
        self._order: list[str] = []

    @contextlib.contextmanager
    def recorded(self, watch: Watch | None = None) -> Iterator[Recorded]:
        """Records what the layers return while a model runs, as a context manager.

        Args:
            watch: Function that is called with each output, and returns the tensor that
                the model goes on with. See `backend.differentiate_step`.

        Raises:
            ValueError: A layer is not called, or has no output that can be perturbed.
        """
        found = Recorded(
            {path: [] for path in self._layers}, {path: [] for path in self._layers}
        )
        order: list[str] = []

        def keep(path: str, output: Tensor, mask: Tensor | None) -> Tensor:
            output = output if watch is None else watch(output)
            found.outputs[path].append(output)
            mask = self._mask_of_inputs(output) if mask is None else mask
            found.masks[path].append(_broadcasting(mask, output))
            order.append(path)
            return output

        with self._intercepted(keep):
            yield found
        self._order = order
        self._check_called(found)
        for part in found:
            for path in [path for path, outputs in part.items() if not outputs]:
                del part[path]

    @contextlib.contextmanager
    def displaced(
        self, displacements: Displacements, scales: Displacements | None = None
    ) -> Iterator[None]:
        """Adds displacements to what the layers return, as a context manager.

        Args:
            displacements: What to add, `{path: [one for each output of each call]}`.
            scales: Factors of the displacements in the same structure, or `None`.

        Raises:
            ValueError: A layer is called more or less often than there are
                displacements.
        """
        left = {path: list(values) for path, values in displacements.items()}
        factors = {path: list(values) for path, values in (scales or {}).items()}

        def add(path: str, output: Tensor, mask: Tensor | None) -> Tensor:
            if not left.get(path):
                raise ValueError(
                    f"The layer {path!r} returns more outputs than there are "
                    f"displacements. Received: {len(displacements.get(path, ()))}"
                )
            displacement = left[path].pop(0)
            given, needed = tuple(displacement.shape), tuple(output.shape)
            if given != needed:
                raise ValueError(
                    f"A displacement must have the shape of the output of {path!r}, "
                    f"{needed}. Received: {given}"
                )
            if factors:
                displacement = displacement * factors[path].pop(0)
            return output + ops.cast(displacement, output.dtype)

        with self._intercepted(add):
            yield
        if unused := {path: len(values) for path, values in left.items() if values}:
            raise ValueError(
                "There must be one displacement for each output that a layer returns. "
                f"Received too many, by layer: {unused}"
            )

    def by_leaf(self, gradients: Sequence[Any]) -> list[Any]:
        """Sorts gradients of watched outputs as the displacements are flattened.

        Args:
            gradients: One for each call of `watch` in the last recording, in its order.
        """
        found: dict[str, list[Any]] = {path: [] for path in self._order}
        for path, gradient in zip(self._order, gradients, strict=True):
            found[path].append(gradient)
        return tree.flatten(found)

    @contextlib.contextmanager
    def _intercepted(
        self, function: Callable[[str, Tensor, Tensor | None], Tensor]
    ) -> Iterator[None]:
        """Lets a function replace outputs, as a context manager.

        Args:
            function: Function of a path, an output and its mask that returns the output
                to go on with.
        """
        trace = backend.current_trace()
        errors: list[ValueError] = []

        def handler(path: str, layer: keras.Layer) -> Callable[..., Any]:
            def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                # Inner layers, such as attention, may take the mask of the input away.
                inputs = args[0] if args else next(iter(kwargs.values()), None)
                before = tree.map_structure(keras_private.mask_of, inputs)
                outputs = method(*args, **kwargs)
                # A tied embedding is the last layer of a language model, too.
                if kwargs.get("reverse"):
                    return outputs
                masks = _masks(layer, inputs, kwargs, before, outputs)
                try:
                    if backend.current_trace() != trace:
                        raise ValueError(
                            f"The layer {path!r} is called in a loop or in a compiled "
                            "function of the model, where its output cannot be "
                            "perturbed. Name the layer around it in `perturb`."
                        )
                    replaced = [
                        function(path, output, mask)
                        if self._can_be_perturbed(path, output)
                        else output
                        for output, mask in zip(
                            tree.flatten(outputs), masks, strict=True
                        )
                    ]
                except ValueError as error:
                    errors.append(error)
                    raise
                for old, new in zip(tree.flatten(outputs), replaced, strict=True):
                    if new is not old:
                        keras_private.copy_mask(old, new)
                return tree.pack_sequence_as(outputs, replaced)

            return call

        with contextlib.ExitStack() as stack:
            for path, layer in self._layers.items():
                # A quantised layer computes elsewhere.
                quantized = getattr(layer, "quantization_mode", None) is not None
                name = "quantized_call" if quantized else "call"
                stack.enter_context(intercepted(layer, name, handler(path, layer)))
            try:
                yield
            except Exception:
                # Keras wraps errors of a call into text about the call.
                if errors:
                    raise errors[0] from None
                raise

    def _can_be_perturbed(self, path: str, output: Any) -> bool:
        """Returns whether an output is of floats, with a row for each example."""
        if not backend.is_tensor(output):
            return False
        if not keras.backend.is_float_dtype(backend.dtype_name(output)):
            return False
        shape = tuple(output.shape)
        if shape and self._batch is None:
            return True
        # `None` is a size that is unknown while a graph is made.
        examples = None if self._batch is None else self._batch.shape[0]
        if shape and shape[0] == examples:
            if examples is None:
                self._check_rows(path, output)
            return True
        if path in self._optional:
            return False
        raise ValueError(
            f"`perturb` must name layers that return a row for each example. Received: "
            f"{path!r}, which returns the shape {shape} for {examples} examples. Name "
            "the layer after it."
        )

    def _check_rows(self, path: str, output: Tensor) -> None:
        """Checks when a graph runs that an output has a row for each example."""
        difference = backend.num_rows(output) - backend.num_rows(self._batch)
        backend.assert_at_most(
            ops.abs(difference),
            0,
            f"`perturb` must name layers that return a row for each example, and "
            f"{path!r} returns another number of rows. Name the layers one by one, "
            "without it.",
        )

    def _mask_of_inputs(self, output: Tensor) -> Tensor | None:
        """Returns the mask among the inputs, if it fits an output."""
        mask = self._padding_mask
        if mask is None or len(mask.shape) != 2 or len(output.shape) < 3:
            return None
        return mask if mask.shape[1] == output.shape[1] else None

    def _check_called(self, found: Recorded) -> None:
        silent = [path for path, outputs in found.outputs.items() if not outputs]
        named = [path for path in silent if path not in self._optional]
        if named or len(silent) == len(self._layers):
            raise ValueError(
                "`perturb` must name layers that the model calls, and that return "
                "floats with a row for each example. Received, without such an "
                f"output: {named or silent}"
            )


def layer_outputs(
    model: keras.Model, perturb: str | Sequence[str], x: Features
) -> LayerOutputs | None:
    """Returns the layers that a configuration names, `None` where it names none.

    Args:
        model: The base model.
        perturb: The field `perturb` of an `AdvNeighborConfig`.
        x: The features of the batch.

    Raises:
        ValueError: A name is that of no layer, or of several.
    """
    names = [perturb] if isinstance(perturb, str) else perturb
    names = [name for name in names if name != INPUTS]
    if not names:
        return None
    batch = next((leaf for leaf in tree.flatten(x) if leaf is not None), None)
    layers = find_layers(model, names)
    one_by_one = find_layers(model, [name for name in names if name != EMBEDDINGS])
    optional = [path for path in layers if path not in one_by_one]
    padding_mask = x.get("padding_mask") if isinstance(x, Mapping) else None
    return LayerOutputs(layers, batch, optional, padding_mask)


def find_layers(model: keras.Model, names: Sequence[str]) -> dict[str, keras.Layer]:
    """Finds layers by their names, or by the end of their paths.

    Args:
        model: The model that has them, at any depth.
        names: The names. `"embeddings"` stands for all `Embedding` layers, unless a
            layer has that name.

    Returns:
        The layers by their paths, each once, in the order of the names.

    Raises:
        ValueError: A name is that of no layer, or of several.
    """
    paths = list(_paths(model))
    chosen: dict[str, keras.Layer] = {}
    for name in names:
        for path, layer in _named(name, paths):
            if not any(layer is known for known in chosen.values()):
                chosen[path] = layer
    return chosen


def has_embeddings(model: Any) -> bool:
    """Returns whether a model has an `Embedding`, whose outputs could be perturbed."""
    return isinstance(model, keras.Model) and any(
        isinstance(layer, keras.layers.Embedding)
        for layer in keras_private.layers_of(model)
    )


def _named(
    name: str, paths: Sequence[tuple[str, keras.Layer, Any]]
) -> list[tuple[str, keras.Layer]]:
    """Finds the layers that a name stands for."""
    found = [each for each in paths if f"/{each[0]}".endswith(f"/{name}")]
    if not found and name == EMBEDDINGS:
        found = [each for each in paths if isinstance(each[1], keras.layers.Embedding)]
        if not found:
            raise ValueError(
                '`perturb="embeddings"` needs a model with a `keras.layers.Embedding`. '
                f"Received a model with the layers: {_listed(paths)}"
            )
        return [(path, layer) for path, layer, _ in found]
    different = {id(layer) for _, layer, _ in found}
    if not found:
        raise ValueError(
            f"`perturb` must name layers of the model. Received: {name!r}. The layers "
            f"are: {_listed(paths)}"
        )
    if len(different) > 1:
        raise ValueError(
            f"`perturb` must name one layer at a time. Received: {name!r}, which is "
            f"the end of several paths: {[path for path, _, _ in found]}. Add the name "
            "of the layer around it, as in these."
        )
    path, layer, parent = found[0]
    if isinstance(parent, keras.layers.RNN) and layer is parent.cell:
        raise ValueError(
            f"`perturb` cannot name {path!r}, the cell of an RNN, which is called in a "
            f"loop. Name the RNN itself: {path.rpartition('/')[0]!r}."
        )
    return [(path, layer)]


def _paths(
    layer: Any, prefix: str = "", around: tuple[Any, ...] = ()
) -> Iterator[tuple[str, keras.Layer, Any]]:
    """Yields path, layer and parent of all layers inside a layer or model."""
    for inner in keras_private.layers_directly_in(layer):
        if any(inner is each for each in (layer, *around)):
            continue  # A layer that holds the one around it.
        path = f"{prefix}{inner.name}"
        yield path, inner, layer
        yield from _paths(inner, f"{path}/", (*around, layer))


def _listed(paths: Sequence[tuple[str, keras.Layer, Any]], most: int = 30) -> str:
    names = [repr(path) for path, *_ in paths]
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "none"


def _masks(
    layer: keras.Layer, inputs: Any, kwargs: dict[str, Any], before: Any, outputs: Any
) -> list[Tensor | None]:
    """Returns the masks that Keras will put on the outputs of a call.

    Args:
        layer: The layer.
        inputs: The first argument of the call.
        kwargs: Its keyword arguments.
        before: The masks of `inputs`, in their structure.
        outputs: What the call returned.
    """
    leaves = tree.flatten(outputs)
    own = [keras_private.mask_of(leaf) for leaf in leaves]
    if any(mask is not None for mask in own) or not layer.supports_masking:
        return own
    before = before if kwargs.get("mask") is None else kwargs["mask"]
    found = tree.flatten(layer.compute_mask(inputs, before))
    return [*found, *[None] * len(leaves)][: len(leaves)]


def _broadcasting(mask: Tensor | None, output: Tensor) -> Tensor | None:
    """Adds axes to a mask, so that it broadcasts to an output."""
    if mask is None:
        return None
    missing = len(output.shape) - len(mask.shape)
    shape = (*ops.shape(mask), *[1] * missing)
    return ops.reshape(ops.cast(mask, "bool"), shape)


def _root_mean_square(output: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the root mean square of the values of each example, `[batch, 1, ...]`."""
    values = ops.stop_gradient(widen(output))
    axes = tuple(range(1, len(values.shape)))
    counts = ops.ones_like(values)
    if mask is not None:
        counts = ops.cast(ops.broadcast_to(mask, ops.shape(values)), values.dtype)
    total = ops.sum(ops.square(values) * counts, axes, keepdims=True)
    number = ops.sum(counts, axes, keepdims=True)
    return ops.sqrt(total / ops.maximum(number, 1.0))
