"""Cheaper gradients to the input of a network's first convolution, on a CPU.

An attack takes the gradient to the input at each step, and TensorFlow's CPU kernel for
that of a convolution is slow where the input has one channel, as grey images have.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from advreg.geometry import Tensor

Convolution = Callable[[Tensor, Any], Tensor]


@contextlib.contextmanager
def cheap_input_gradients(model: keras.Model) -> Iterator[None]:
    """While it is entered, convolutions of a model get cheap gradients to their input.

    This concerns plain `Conv2D` layers that gain by it, where TensorFlow sees only
    CPUs. Outputs are what they were, gradients too but for rounding, and nothing stays
    on the layers.

    Args:
        model: The model, built or not.

    Example:
    ```python
    with cheap_input_gradients(model):
        outputs = model(features, training=False)
    ```
    """
    changed: list[keras.Layer] = []
    try:
        if _has_only_cpus():
            for layer in model._flatten_layers():
                if _is_plain(layer):
                    # Past Keras's tracking of attributes, for this is no state.
                    vars(layer)["convolution_op"] = _cheap(layer)
                    changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("convolution_op", None)


def _has_only_cpus() -> bool:
    return {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}


def _is_plain(layer: keras.Layer) -> bool:
    """Whether a layer convolves in float32 as Keras does, with no gaps or groups."""
    return (
        type(layer) is keras.layers.Conv2D
        and "convolution_op" not in vars(layer)  # The user's own, or ours further out.
        and layer.dtype_policy.name == "float32"  # Neither mixed nor quantised.
        and not layer.lora_enabled
        and layer.data_format == "channels_last"
        and layer.groups == 1
        and tuple(layer.strides) == tuple(layer.dilation_rate) == (1, 1)
    )


def _cheap(layer: keras.layers.Conv2D) -> Convolution:
    """What stands in for a layer's `convolution_op`."""
    otherwise = layer.convolution_op

    def convolution_op(inputs: Tensor, kernel: Any) -> Tensor:
        if not _gains(inputs, kernel.shape):
            return otherwise(inputs, kernel)
        image, shape = tuple(inputs.shape[1:]), tuple(kernel.shape)
        convolve = _convolution(image, shape, layer.padding)
        return convolve(inputs, tf.convert_to_tensor(kernel))

    return convolution_op


def _gains(inputs: Any, kernel_shape: Any) -> bool:
    """Whether the gradient is cheaper here than TensorFlow's.

    Measured on two cores with TensorFlow 2.21, batches of 1 to 250, images from 8×8 to
    32×32, kernels from 1×1 to 11×11: with one channel and at least as many filters as
    the kernel has entries, it takes 0.3 to 0.9 of the time. With fewer filters that can
    be 1.9; with three channels, as colour images have, 0.8 to 1.6. Filters enough also
    mean that what is kept in between is no larger than the gradient that comes in.
    """
    height, width, channels, filters = kernel_shape
    return (
        isinstance(inputs, tf.Tensor)
        and inputs.dtype == tf.float32
        and inputs.shape.rank == 4
        and inputs.shape[-1] == channels == 1
        and height * width <= filters
        # An image smaller than the kernel has no output: that is left to Keras.
        and all(
            size is None or size >= entries
            for size, entries in zip(inputs.shape[1:3], kernel_shape[:2], strict=True)
        )
    )


@functools.cache
def _convolution(
    image: tuple[int | None, ...], kernel: tuple[int, ...], padding: str
) -> Convolution:
    """A convolution as Keras does it, with a gradient of ours, for batches of any size.

    TensorFlow keeps a custom gradient for ever, and with it the graph that it was used
    in. As a function of its own it has its own graph, which holds nothing of the model.
    """
    specs = [tf.TensorSpec([None, *image]), tf.TensorSpec(kernel)]

    @tf.custom_gradient
    def convolution(inputs: Tensor, kernel: Tensor) -> tuple[Tensor, Callable]:
        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor]:
            to_kernel = tf.raw_ops.Conv2DBackpropFilter(
                input=inputs,
                filter_sizes=tf.shape(kernel),
                out_backprop=upstream,
                strides=[1, 1, 1, 1],
                padding=padding.upper(),
            )
            return input_gradient(upstream, inputs, kernel, padding), to_kernel

        outputs = keras.ops.conv(
            inputs, kernel, padding=padding, data_format="channels_last"
        )
        return outputs, gradient

    return tf.function(convolution, autograph=False).get_concrete_function(*specs)


def input_gradient(
    upstream: Tensor, inputs: Tensor, kernel: Tensor, padding: str
) -> Tensor:
    """The gradient of a convolution of one channel to its input.

    One matrix product gives what each place of the output sends back through each entry
    of the kernel. Shifted to where the entry took from, that adds up to the gradient.

    Args:
        upstream: The gradient to the output, `[batch, rows, columns, filters]`.
        inputs: The input, `[batch, height, width, 1]`.
        kernel: The kernel, `[high, wide, 1, filters]`.
        padding: "valid" or "same".
    """
    high, wide, _, filters = kernel.shape
    batch, rows, columns, _ = keras.ops.shape(upstream)
    sent = tf.matmul(
        tf.reshape(kernel, [-1, filters]),
        tf.reshape(upstream, [-1, filters]),
        transpose_b=True,
    )
    # Slices of one axis, the first, are no copies.
    sent = tf.reshape(sent, [high * wide, batch, rows, columns])
    whole = tf.add_n(
        [
            tf.pad(sent[i * wide + j], [[0, 0], [i, high - 1 - i], [j, wide - 1 - j]])
            for i in range(high)
            for j in range(wide)
        ]
    )
    if (
        padding == "same"
    ):  # Without what went to the padding, less of which is in front.
        _, height, width, _ = keras.ops.shape(inputs)
        top, left = (high - 1) // 2, (wide - 1) // 2
        whole = whole[:, top : top + height, left : left + width]
    return whole[..., None]
