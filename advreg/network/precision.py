"""Gradients with respect to the input, of models that compute in half precision.

The largest float16 is 65504, and the smallest above 0 is 6e-8. So the loss is
multiplied by a scale before its gradient is taken, and the gradient is divided by it
afterwards. For the weights, Keras's `LossScaleOptimizer` does this. Here the scale is a
constant of our own: the direction of a perturbation must not depend on that of the
optimizer, which may be much too large before its first steps.

No scale fits every layer and example. A gradient that overflows, or vanishes for an
example, is therefore taken again with all layers in float32:

1. `scale` is the factor of the loss.
2. `unscale` divides the gradient by it, checks whether float16 could hold it, and if
   not takes it again in float32. That costs one more pass, in steps where it happens.
3. If code of the model's own does not run in float32, smaller scales are tried.

Models in float32 and bfloat16, whose range is the same, skip all of this.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Gradients, Tensor
from advreg.backend import keras_private
from advreg.perturbation.geometry import widen

SCALE = 2.0**15  # That of Keras's `LossScaleOptimizer` before its first step.
_SMALLER = (2.0**7, 1.0)  # Scales to try where the model does not run in float32.
# Below this size a float16 has few digits left. If even the largest value of an example
# is smaller, its gradient is lost.
_LEAST = 2.0**-18


class Precision:
    """The precision in which a model computes, and how its gradients are taken in it.

    Args:
        model: The model. Of a `keras.Model` it is known which layers compute in
            float16; of any other callable it is not.
        features: Its input, a nested structure, whose tensors may be float16 too.
        retakes: Whether a gradient can be taken again where float16 did not hold it.
        in_step: Whether replicas exchange values while the model runs, as with
            synchronised batch normalisation. Then all replicas must run it equally
            often, and none may decide alone to take a gradient again. So all of them
            compute in float32 from the start.
    """

    def __init__(
        self,
        model: Any,
        features: Features = (),
        retakes: bool = True,
        in_step: bool = False,
    ) -> None:
        layers = (
            keras_private.layers_of(model) if isinstance(model, keras.Model) else ()
        )
        self._layers = [each for each in layers if each.compute_dtype == "float16"]
        self._retakes, self._in_step = retakes, in_step
        self.half = bool(self._layers) or any(
            backend.is_tensor(leaf) and backend.dtype_name(leaf) == "float16"
            for leaf in tree.flatten(features)
        )

    @property
    def scale(self) -> float | None:
        """The factor of a loss before its gradient is taken, `None` for 1."""
        return SCALE if self.half else None

    def gradients(self, take: Callable[[Any], Gradients]) -> Gradients:
        """Computes the gradient of a loss, in float32 at least for half precision.

        Args:
            take: Function of a scale that returns the gradient of the loss times that
                scale, or of the loss itself for `None`. The gradient is a list of
                tensors, whose first axis is that of examples, and of `None`.

        Returns:
            The gradient of the loss itself, a list like that of `take`.
        """
        if self.half and self._in_step:
            try:
                with self._in_float32():
                    return take(None)
            except Exception:  # Code of the model's own runs in float16 only.
                return _divided(take(self.scale), self.scale)
        return self.unscale(take(self.scale), self.scale, take)

    def unscale(
        self,
        gradients: Gradients,
        scale: Tensor | float | None,
        take: Callable[[Any], Gradients],
    ) -> Gradients:
        """Divides gradients by their scale, and takes those again that float16 lost.

        A gradient is lost if a value is not finite, or if all values of an example
        vanish.

        Args:
            gradients: The gradients that `take` returned for the scale.
            scale: The scale.
            take: A function as in `gradients`.

        Returns:
            The gradient of the loss itself, a list like that of `take`.
        """
        if not self.half:
            return gradients
        # These gradients are dropped: whether they are good enough is for no replica to
        # decide alone.
        if self._in_step:
            return self.gradients(take)
        known = [gradient is not None for gradient in gradients]
        found = [
            _unscaled(gradient, scale)
            for gradient in itertools.compress(gradients, known)
        ]
        if self._retakes:
            lost = _lost(found, scale)

            def again() -> list[Tensor]:
                with self._in_float32():
                    taken = list(itertools.compress(take(None), known))
                return list(map(_in_place_of, found, taken))

            try:
                # In a graph both branches are traced, so that a model that does not run
                # in float32 fails here, even if nothing is lost.
                found = backend.choose(lost, again, lambda: found)
            except Exception:  # Code of the model's own runs in float16 only.
                found = self._under_smaller_scales(found, known, take)
        rest = iter(found)
        return [next(rest) if there else None for there in known]

    def _under_smaller_scales(
        self,
        found: list[Tensor],
        known: Sequence[bool],
        take: Callable[[Any], Gradients],
    ) -> list[Tensor]:
        """Takes gradients that overflow again, in float16, with smaller scales."""
        for scale in _SMALLER:

            def again(
                scale: float = scale, found: list[Tensor] = found
            ) -> list[Tensor]:
                taken = itertools.compress(take(scale), known)
                return [
                    _in_place_of(old, _unscaled(new, scale))
                    for old, new in zip(found, taken, strict=True)
                ]

            fine = [ops.all(ops.isfinite(gradient)) for gradient in found]
            overflows = ops.logical_not(_all(fine))
            found = backend.choose(overflows, again, functools.partial(list, found))
        return found

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Switches the layers to float32, as a context manager.

        Under a mixed policy their weights are float32 anyway.
        """
        policies = [layer.dtype_policy for layer in self._layers]
        plain = keras.DTypePolicy("float32")
        try:
            for layer, policy in zip(self._layers, policies, strict=True):
                # Quantised weights were made for one dtype, and fit no other.
                if policy.quantization_mode is None:
                    layer.dtype_policy = plain
            yield
        finally:
            for layer, policy in zip(self._layers, policies, strict=True):
                if policy.quantization_mode is None:
                    layer.dtype_policy = policy


def _unscaled(gradient: Any, scale: Any) -> Tensor:
    """Divides a gradient, which may be sparse, by its scale, in float32 at least."""
    gradient = widen(backend.dense(gradient))
    return gradient / ops.cast(scale, gradient.dtype)


def _divided(gradients: Gradients, scale: Any) -> Gradients:
    """Divides gradients by their scale, and leaves `None`."""
    return [None if each is None else _unscaled(each, scale) for each in gradients]


def _lost(gradients: Sequence[Tensor], scale: Any) -> Tensor:
    """Returns whether a value is not finite, or all values of an example vanish.

    Args:
        gradients: Gradients, divided by their scale.
        scale: The scale, because float16 held the values times this scale.
    """
    fine = [ops.all(ops.isfinite(gradient)) for gradient in gradients]
    largest = [
        ops.max(ops.abs(gradient), axis=list(range(1, len(gradient.shape))))
        for gradient in gradients
    ]
    largest = [
        ops.cast(each * ops.cast(scale, each.dtype), "float32") for each in largest
    ]
    seen = functools.reduce(ops.maximum, largest) >= _LEAST
    return ops.logical_not(ops.logical_and(_all(fine), ops.all(seen)))


def _all(flags: Sequence[Tensor]) -> Tensor:
    return functools.reduce(ops.logical_and, flags)


def _in_place_of(old: Tensor, new: Any) -> Tensor:
    if new is None:
        return old
    return ops.reshape(ops.cast(backend.dense(new), old.dtype), ops.shape(old))
