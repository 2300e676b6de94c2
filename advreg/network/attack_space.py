"""What an attack perturbs: inputs, outputs of layers, or both.

An attack on inputs perturbs the features `x` of a batch. One on outputs of layers
perturbs `(x, displacements)`, where the displacements are added to these outputs while
the model runs (see `layer_outputs`). `AttackSpace` hides the difference: the step asks
it for the features to start from, and runs the model at perturbed ones by `at`.

The shapes of the displacements are known only after a pass whose outputs are recorded.
The step records its clean pass, `with space.recording(): ...`. Where it has none, it
runs one for this alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from advreg._types import Features, Gradients, Tensor, Watch
from advreg.config.configs import EMBEDDINGS, AdvNeighborConfig
from advreg.network.gradients import differentiable
from advreg.network.layer_outputs import Recorded, has_embeddings, layer_outputs
from advreg.network.masks import can_move
from advreg.perturbation.ball import Settings
from advreg.perturbation.geometry import widen
from advreg.perturbation.packing import NothingMovesError


class AttackSpace:
    """The features of a batch that an attack perturbs, beside or without the inputs.

    Args:
        base: The base model.
        config: The configuration of the attack.
        x: Features of the batch, as tensors.
        fixed: Keys of features that must not be perturbed.

    Raises:
        ValueError: The configuration names a layer that the model does not have.
    """

    def __init__(
        self,
        base: keras.Model,
        config: AdvNeighborConfig,
        x: Features,
        fixed: Sequence[str] = (),
    ) -> None:
        self._base, self._x = base, x
        self._relative = config.relative
        self._layers = layer_outputs(base, config.perturb, x)
        self._recorded: Recorded | None = None
        self._scales: Any = None
        self.inputs = differentiable(x, fixed)
        if not config.perturbs_inputs:
            self.inputs = [False] * len(self.inputs)

    @property
    def has_layers(self) -> bool:
        """Whether outputs of layers are perturbed."""
        return self._layers is not None

    @property
    def recorded(self) -> Recorded | None:
        """What the layers returned in the recorded pass, `None` before it.

        On JAX a pass that is differentiated must return it, and set it again to what
        came out.
        """
        return self._recorded

    @recorded.setter
    def recorded(self, value: Recorded | None) -> None:
        self._recorded, self._scales = value, None
        if value is not None and self._relative:
            self._scales = value.scales()

    @contextlib.contextmanager
    def recording(self, watch: Watch | None = None) -> Iterator[None]:
        """Records the outputs of layers while the model runs, as a context manager.

        Args:
            watch: See `backend.differentiate_step`.
        """
        if self._layers is None:
            yield
            return
        with self._layers.recorded(watch) as recorded:
            yield
        self.recorded = recorded

    def start(self) -> Any:
        """Returns the features to start from: nothing is perturbed yet."""
        if self._layers is None:
            return self._x
        return self._x, self._known().zeros()

    def wanted(self) -> list[bool]:
        """Returns for each leaf of `start()` whether it may be perturbed."""
        if self._layers is None:
            return self.inputs
        return [*self.inputs, *[True] * len(tree.flatten(self._known().outputs))]

    def can_move(self, sample_weight: Any) -> list[Tensor | None]:
        """Returns for each leaf of `start()` where it may be perturbed.

        Args:
            sample_weight: Weights of the examples: those of weight 0 stay unperturbed.
        """
        flags = can_move(self._x, sample_weight, self._base)
        if self._layers is None:
            return flags
        of_examples = can_move(self._known().outputs, sample_weight)
        of_padding = self._known().can_move()
        return [*flags, *map(_both, of_examples, of_padding)]

    def settings(self, settings: Settings) -> Settings:
        """Returns settings whose masks and clip values fit `start()`."""
        return settings if self._layers is None else settings.beside_layers()

    def gradients(self, of_inputs: Gradients, of_outputs: Sequence[Any]) -> Gradients:
        """Returns the gradients with respect to `start()`.

        Args:
            of_inputs: The gradient of each leaf of the inputs, or `None`.
            of_outputs: That of each output that was watched, in the order of the calls.
        """
        if self._layers is None:
            return of_inputs
        found = self._layers.by_leaf(of_outputs)
        if self._scales is not None:
            scales = tree.flatten(self._scales)
            found = [
                None if each is None else widen(each) * scale
                for each, scale in zip(found, scales, strict=True)
            ]
        return [*of_inputs, *found]

    @contextlib.contextmanager
    def at(self, features: Any) -> Iterator[Features]:
        """Adds displacements while the model runs, as a context manager.

        Args:
            features: Features like `start()`.

        Yields:
            The inputs with which to run the model.
        """
        if self._layers is None:
            yield features
            return
        x, displacements = features
        with self._layers.displaced(displacements, self._scales):
            yield x

    def displacements(self, features: Any) -> dict[str, list[Tensor]]:
        """Returns what `at` adds to the outputs of layers.

        Args:
            features: Features like `start()`.
        """
        found = features[1]
        if self._scales is not None:
            found = tree.map_structure(lambda d, s: widen(d) * s, found, self._scales)
        return found

    def _known(self) -> Recorded:
        if self._recorded is None:
            raise RuntimeError("The outputs of layers have not been recorded.")
        return self._recorded


@contextlib.contextmanager
def naming_embeddings(model: Any) -> Iterator[None]:
    """Says what to do if inputs cannot be perturbed, but what embeddings return can.

    Args:
        model: The base model.

    Raises:
        NothingMovesError: It was raised inside, here with the advice.
    """
    try:
        yield
    except NothingMovesError as error:
        if not has_embeddings(model):
            raise
        raise error.advising(
            "To train on token ids or categories, perturb what the embeddings of the "
            f'model return: set `perturb="{EMBEDDINGS}"` in the configuration.'
        ) from None


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Returns where two masks are true, each of which may be `None` for everywhere."""
    if one is None or other is None:
        return other if one is None else one
    return ops.logical_and(one, other)
