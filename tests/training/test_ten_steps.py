"""Ten steps of training give the same weights, inputs and logs on every backend.

The numbers were recorded on TensorFlow by `helpers.ten_steps`.
"""

import contextlib

import keras
import numpy as np
import pytest
from helpers import ten_steps

from advreg import backend

pytestmark = pytest.mark.every_backend(tensorflow="slow")
RECORDED = np.load(ten_steps.FILE)


@contextlib.contextmanager
def floats(name):
    """Computes in float64 where rounding is amplified, as by batch normalisation."""
    if name != "BatchNorm":
        yield 2e-5
        return
    with contextlib.ExitStack() as stack:
        if backend.BACKEND == "jax":
            import jax

            stack.enter_context(jax.enable_x64())
        keras.config.set_floatx("float64")
        stack.callback(keras.config.set_floatx, "float32")
        yield 1e-6


@pytest.mark.parametrize("last", [None, "softmax"])
@pytest.mark.parametrize("name", ten_steps.CASES)
def test_ten_steps(name, last, monkeypatch):
    monkeypatch.setattr("advreg.perturbation.ball.sample_unit_ball", ten_steps.sample)
    with floats(name) as tolerance:
        found = ten_steps.run(name, last)
    np.testing.assert_allclose(
        found, RECORDED[f"{name}, {last}"], rtol=tolerance, atol=tolerance
    )
