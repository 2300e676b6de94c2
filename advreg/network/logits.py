"""Reads the outputs of a classifier as logits.

Attacks and objectives compare logits, not probabilities. A probability that rounds to 1
has a gradient of 0, so an attack on it stops, and the model seems robust. This is one
form of gradient masking.

A model says by its loss, or the user by `from_logits`, what its outputs are. Logits are
used as they are. Behind probabilities the logits are looked up: the input of the last
softmax or sigmoid (`last_activation.logits_behind`). Only where that cannot be found,
as in a compiled function of the user's, the logarithm of the probabilities has to do.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.network.last_activation import logits_behind
from advreg.network.taps import intercepted
from advreg.perturbation.geometry import widen


def logits_of(outputs: Tensor, from_logits: bool, one_vs_rest: bool = False) -> Tensor:
    """Returns the logits of each class.

    Args:
        outputs: Scores with the classes as last axis. One score, with that axis or
            without, is for two classes, and gives two logits, of which the first is 0.
        from_logits: Whether the scores are logits, or probabilities. Of probabilities,
            the logits that a last softmax or sigmoid was applied to are used where they
            are known, and else their logarithm.
        one_vs_rest: Whether each of several scores is a probability of its own, as of a
            sigmoid for each class.

    Returns:
        Tensor `[..., classes]`, in float32 at least.
    """
    scores = outputs if from_logits else logits_behind(outputs)
    if scores is None:
        scores = _log(outputs, one_vs_rest)
    scores = widen(scores)
    if len(scores.shape) == 1:
        scores = scores[:, None]
    if scores.shape[-1] > 1:
        return scores
    return ops.concatenate([ops.zeros_like(scores), scores], axis=-1)


@contextlib.contextmanager
def inlined(model: keras.Model) -> Iterator[None]:
    """Runs layers whose `call` is a `tf.function` uncompiled, as a context manager.

    Their operations are then in the graph of the caller, where the logits behind a last
    activation can be found. A `tf.function` would hide them in a graph of its own.

    Args:
        model: The model, built or not.
    """
    with contextlib.ExitStack() as stack:
        for layer in keras_private.layers_of(model):
            compiled = inspect.getattr_static(type(layer), "call", None)
            if "call" not in vars(layer) and backend.is_compiled(compiled):
                plain = backend.without_compilation(compiled)
                stack.enter_context(
                    intercepted(layer, "call", _in_place_of_call(plain, layer))
                )
        yield


def _in_place_of_call(
    function: Callable[..., Any], layer: keras.Layer
) -> Callable[..., Any]:
    def handler(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(layer, *args, **kwargs)

    return handler


def _log(probabilities: Tensor, one_vs_rest: bool) -> Tensor:
    """Returns logits that give these probabilities.

    Of a softmax, the logarithm is one choice, because logits are known up to a constant
    only. Of a sigmoid it is `log(p) - log(1 - p)`.
    """
    probabilities = widen(probabilities)
    dtype = keras.backend.standardize_dtype(probabilities.dtype)
    tiny = np.finfo(dtype).tiny
    scores = ops.log(backend.maximum(probabilities, tiny))
    several = len(probabilities.shape) > 1 and probabilities.shape[-1] > 1
    if several and not one_vs_rest:
        return scores
    return scores - ops.log(backend.maximum(1 - probabilities, tiny))
