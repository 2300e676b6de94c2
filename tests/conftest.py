import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
from hypothesis import settings
from keras import ops

# Compiling makes the first example of a test slow, which is no fault of the test.
# By default the examples are the same in every run, so that a change is judged by what
# it changed; `-m nightly` looks for new ones.
# Fewer on JAX and PyTorch: the properties are the same, and JAX compiles each shape.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=50 if keras.backend.backend() == "tensorflow" else 15,
    derandomize=True,
    database=None,
)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

SHARED = Path(__file__).parents[2] / "shared" / "tensorflow_datasets"


# On JAX and PyTorch only files with such tests are read: others need TensorFlow.
EVERY_BACKEND = "every_backend"


def pytest_ignore_collect(collection_path):
    if keras.backend.backend() == "tensorflow" or collection_path.is_dir():
        return None
    is_test = collection_path.name.startswith("test_")
    if is_test and EVERY_BACKEND not in collection_path.read_text(encoding="utf-8"):
        return True
    return None


def pytest_configure(config):
    if "nightly" in config.option.markexpr:
        settings.load_profile("nightly")
    if keras.backend.backend() == "jax":
        keep_compiled(config.cache.mkdir("jax"))


def keep_compiled(directory):
    """Lets the workers, and the next run, take what JAX has compiled before."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker(EVERY_BACKEND)
        if keras.backend.backend() == "tensorflow":
            # Written for the other backends: the fast suite has others like them.
            if mark and mark.kwargs.get("tensorflow") == "slow":
                item.add_marker("slow")
        elif not mark:
            item.add_marker(pytest.mark.skip(reason="needs TensorFlow"))
        if getattr(item.obj, "is_hypothesis_test", False):
            item.add_marker("nightly")


@pytest.fixture
def mnist_dir(monkeypatch):
    """Lets TFDS find MNIST, where somebody has downloaded it."""
    directory = Path(os.environ.get("TFDS_DATA_DIR", SHARED))
    if not (directory / "mnist").is_dir():
        pytest.skip(f"MNIST is not in {directory}, and tests do not download")
    tfds = pytest.importorskip("tensorflow_datasets")
    # TFDS reads TFDS_DATA_DIR once, when it is imported.
    builder = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name: builder(name, data_dir=str(directory))
    )
    return directory


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Keeps Python from looking for garbage in what hundreds of tests have left."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(
    params=["eager", "function", pytest.param("jit", marks=pytest.mark.slow)]
)
def mode(request):
    """The arguments of `compile` for each way in which Keras runs a step."""
    if request.param == "jit" and keras.backend.backend() == "torch":
        pytest.skip("PyTorch warns of itself when it compiles")
    return {
        "eager": {"run_eagerly": True},
        "function": {"jit_compile": False},
        "jit": {"jit_compile": True},
    }[request.param]


@pytest.fixture
def fixed_start(monkeypatch):
    """Makes random starts those of `formulas.py`, but for what may not move."""
    from helpers.formulas import START

    def sample(shape, norm, seed, free, dtype):
        start = ops.convert_to_tensor(START, dtype)
        return start if free is None else ops.where(free, start, 0.0)

    monkeypatch.setattr("advreg.perturbation.ball.sample_unit_ball", sample)


@pytest.fixture(scope="module")
def float64():
    """Lets JAX compute in float64, which it makes float32 unless it is told not to."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
