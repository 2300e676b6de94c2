"""Cheaper input gradients of a network's first convolution, on a CPU.

An attack needs the gradient with respect to the input at each step. TensorFlow's CPU
kernel for that gradient of a convolution is slow where the input has one channel, as
grey images have. `backend.convolution` has a faster one. Here it is put in the place of
the layer's own, only while the model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from advreg import backend
from advreg._types import Tensor
from advreg.backend import keras_private
from advreg.network.taps import intercepted

Convolution = Callable[[Tensor, Any], Tensor]


@contextlib.contextmanager
def cheap_input_gradients(model: keras.Model) -> Iterator[None]:
    """Gives convolutions of a model cheaper input gradients, as a context manager.

    This concerns plain `Conv2D` layers that become faster by it, where TensorFlow sees
    only CPUs. Outputs are the same, and gradients too, up to rounding. Nothing stays on
    the layers afterwards.

    Args:
        model: The model, built or not.

    Example:
    ```python
    with cheap_input_gradients(model):
        outputs = model(features, training=False)
    ```
    """
    with contextlib.ExitStack() as stack:
        if backend.has_only_cpus():
            for layer in keras_private.layers_of(model):
                if _is_plain(layer):
                    stack.enter_context(
                        intercepted(layer, "convolution_op", _cheap(layer.padding))
                    )
        yield


def _is_plain(layer: keras.Layer) -> bool:
    """Returns whether a layer is a plain float32 `Conv2D`, without strides or gaps."""
    return (
        type(layer) is keras.layers.Conv2D
        # Set on the object itself, it is the user's own, or this one, entered already.
        and "convolution_op" not in vars(layer)
        and layer.dtype_policy.name == "float32"  # Neither mixed nor quantised.
        and not layer.lora_enabled
        and layer.data_format == "channels_last"
        and layer.groups == 1
        and tuple(layer.strides) == tuple(layer.dilation_rate) == (1, 1)
    )


def _cheap(padding: str) -> Callable[..., Tensor]:
    """Returns a handler that takes the place of the `convolution_op` of a layer."""

    def handler(otherwise: Convolution, inputs: Tensor, kernel: Any) -> Tensor:
        if backend.gains(inputs, kernel.shape):
            return backend.convolve(inputs, kernel, padding)
        return otherwise(inputs, kernel)

    return handler
