"""What tests need of the backend on which Keras runs, whichever that is.

Oracles are NumPy or a closed form. Gradients here are taken by the backend alone, so
that they are an oracle for those of advreg.
"""

import functools
import importlib

import keras
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

BACKEND = keras.backend.backend()

only_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="is about TensorFlow"
)
keras_has_float64 = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras computes float64 in float32 there"
)
runs_at_once = pytest.mark.skipif(
    BACKEND == "jax", reason="on JAX the layers of a step see no values"
)
# For tests of `only_tensorflow`. Elsewhere TensorFlow may not be installed.
tf = importlib.import_module("tensorflow") if BACKEND == "tensorflow" else None

tensor = ops.convert_to_tensor
array = ops.convert_to_numpy


def matrix_shapes(max_side):
    """Shapes of matrices to draw, few on JAX, which compiles for seconds for each."""
    if BACKEND == "jax":
        return st.sampled_from([(1, 1), (2, max_side), (max_side, 3)])
    return hnp.array_shapes(min_dims=2, max_dims=2, max_side=max_side)


def in_float64(test):
    """Wraps a test as the fixture `float64` does for all of a file."""
    if BACKEND != "jax":
        return test

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with importlib.import_module("jax").enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


def compiled(function, jit_compile=False):
    """Compiles a function of tensors, or skips the test where nothing is compiled."""
    if BACKEND == "tensorflow":
        return tf.function(function, jit_compile=jit_compile)
    if BACKEND == "jax":
        return importlib.import_module("jax").jit(function)
    return pytest.skip("PyTorch runs everything at once")


def gradient_of(function, x):
    """Returns the gradient of a sum over what a function of a tensor returns."""
    return gradients_of(lambda tensors: function(tensors[0]), [x])[0]


def gradients_of(function, tensors):
    """Returns the gradients of a sum over what a function of tensors returns.

    They are zeros where it does not depend on a tensor.
    """
    tensors = list(tensors)
    if BACKEND == "tensorflow":
        # Two places of one tensor have two gradients.
        tensors = [tf.identity(x) for x in tensors]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            values = function(tensors)
        return tape.gradient(values, tensors, unconnected_gradients="zero")
    if BACKEND == "jax":
        jax = importlib.import_module("jax")
        return jax.grad(lambda tensors: ops.sum(function(tensors)))(tensors)
    tensors = [x.detach().requires_grad_() for x in tensors]
    ops.sum(function(tensors)).backward()
    return [ops.zeros_like(x) if x.grad is None else x.grad for x in tensors]


def dtype_of(x):
    """Returns the name of the dtype of a tensor."""
    return keras.backend.standardize_dtype(x.dtype)
