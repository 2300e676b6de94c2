import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
from hypothesis import settings

# Compiling makes the first example of a test slow, which is no fault of the test.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(params=["eager", "function", "jit"])
def mode(request):
    """The arguments of `compile` for each way in which Keras runs a step."""
    return {
        "eager": {"run_eagerly": True},
        "function": {"jit_compile": False},
        "jit": {"jit_compile": True},
    }[request.param]
