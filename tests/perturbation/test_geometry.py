import keras
import numpy as np
import pytest
from helpers.backends import (
    array,
    compiled,
    dtype_of,
    matrix_shapes,
    only_tensorflow,
    tensor,
    tf,
)
from helpers.oracle import NORMS, norms
from helpers.oracle import project as project_in_numpy
from helpers.oracle import steepest as steepest_in_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops
from scipy import stats

from advreg.config.norms import NormType
from advreg.perturbation.geometry import (
    l2_norm,
    make_finite,
    project,
    sample_unit_ball,
    steepest_direction,
)

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

DTYPES = ("float16", "bfloat16", "float32", "float64")
# One rounding of a result, relative to it.
ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-14}

# Processors may flush subnormal numbers to zero.
finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
matrices = hnp.arrays("float32", matrix_shapes(8), elements=finite)
radii = st.floats(0, 100, width=32, allow_subnormal=False)
all_norms = st.sampled_from(NORMS)


def run(function, *args):
    return array(function(*args)).astype("float64")


@given(matrices, all_norms)
def test_steepest_direction_is_the_oracle_s(gradient, norm):
    direction = run(steepest_direction, tensor(gradient), NormType(norm))
    expected = steepest_in_numpy(gradient.astype("float64"), norm)
    np.testing.assert_allclose(direction, expected, atol=1e-6)


@given(matrices, all_norms, st.integers(0, 2**32 - 1))
def test_no_point_of_the_ball_is_steeper(gradient, norm, seed):
    direction = run(steepest_direction, tensor(gradient), NormType(norm))
    others = np.random.default_rng(seed).normal(size=(50, *gradient.shape))
    others = np.stack([o / norms(o, norm)[:, None] for o in others])
    slope = (direction * gradient).sum(1)
    best = (others * gradient).sum(2).max(0)
    assert (slope >= best - 1e-5 * np.abs(gradient).sum(1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_steepest_direction_does_not_know_scale(dtype, norm, scale):
    gradient = ops.cast([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]], dtype)
    scaled = gradient * ops.cast(scale, dtype)
    direction = steepest_direction(scaled, NormType(norm))
    assert dtype_of(direction) == dtype
    # Float16 holds 3e-7 with one digit: what was received is what counts.
    expected = steepest_in_numpy(array(scaled).astype("float64"), norm)
    got = array(direction).astype("float64")
    np.testing.assert_allclose(got, expected, atol=ROUNDING[dtype])
    assert not got[1].any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e30])
def test_squares_neither_underflow_nor_overflow(norm, scale):
    gradient = tensor([[3.0, -4.0]], "float64") * scale
    for dtype in ("float32", "float64"):
        direction = run(steepest_direction, ops.cast(gradient, dtype), NormType(norm))
        assert np.isfinite(direction).all()
        # Numbers below the smallest normal one count as zero.
        if scale >= 1e-30 or dtype == "float64":
            expected = steepest_in_numpy(np.array([[3.0, -4.0]]), norm)
            np.testing.assert_allclose(direction, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_smallest_normal_number_still_counts(norm, dtype):
    gradient = tensor([[np.finfo(dtype).tiny, 0.0]], dtype)
    direction = run(steepest_direction, gradient, NormType(norm))
    np.testing.assert_array_equal(direction, [[1.0, 0.0]])


def test_ties_of_l1_are_shared():
    direction = steepest_direction(tensor([[2.0, -2.0, 1.0, 2.0]]), NormType.L1)
    np.testing.assert_allclose(direction, [[1 / 3, -1 / 3, 0, 1 / 3]])


# --- Gradients that are not finite

wild = hnp.arrays(
    "float32",
    matrix_shapes(6),
    elements=st.one_of(finite, st.sampled_from([np.nan, np.inf, -np.inf])),
)


def limit(gradient, norm):
    """The steepest direction in the limit of larger and larger finite values."""
    known = np.nan_to_num(gradient.astype("float64"), nan=0.0, posinf=1.0, neginf=-1.0)
    infinite = np.isinf(gradient)
    if norm != "infinity":  # Beside infinite values all others vanish.
        known[infinite.any(axis=1, keepdims=True) & ~infinite] = 0.0
    return steepest_in_numpy(known, norm)


@given(wild, all_norms)
def test_infinite_gradients_are_the_limit_of_large_ones(gradient, norm):
    kept = make_finite(tensor(gradient))
    assert np.isfinite(array(kept)).all()
    np.testing.assert_array_equal(np.isnan(gradient) & (array(kept) != 0), False)
    direction = run(steepest_direction, kept, NormType(norm))
    np.testing.assert_allclose(direction, limit(gradient, norm), atol=1e-6)


@given(matrices)
def test_finite_gradients_stay_what_they_are(gradient):
    np.testing.assert_array_equal(make_finite(tensor(gradient)), gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_every_float_type(dtype):
    gradient = ops.cast([[np.inf, -np.inf, np.nan, -2.0]], dtype)
    kept = make_finite(gradient)
    assert dtype_of(kept) == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(np.sign(array(kept)), [[1, -1, 0, -1]])
    assert kept[0, 0] == -kept[0, 1]
    # Nothing overflows that adds up a million of them.
    assert np.isfinite(array(kept)[0, 0] * 1e6)
    assert kept[0, 0] > 1e32


@pytest.mark.parametrize("jit", [False, True])
def test_infinite_gradients_compiled(jit):
    run = compiled(make_finite, jit)
    gradient = tensor([[np.inf, -np.inf, np.nan, -2.0]])
    np.testing.assert_array_equal(run(gradient), make_finite(gradient))


@given(matrices, radii, all_norms)
def test_projection_is_the_oracle_s(displacement, radius, norm):
    got = run(project, tensor(displacement), radius, NormType(norm))
    expected = project_in_numpy(displacement.astype("float64"), radius, norm)
    np.testing.assert_allclose(got, expected, atol=1e-5 * (1 + np.abs(expected).max()))


@given(matrices, radii, all_norms)
def test_projection_lands_in_the_ball_and_stays(displacement, radius, norm):
    once = project(tensor(displacement), radius, NormType(norm))
    size = norms(array(once).astype("float64"), norm)
    assert (size <= radius * (1 + 1e-6)).all()
    outside = norms(displacement.astype("float64"), norm) > radius * (1 + 1e-6)
    np.testing.assert_allclose(size[outside], radius, rtol=1e-5, atol=1e-30)
    twice = project(once, radius, NormType(norm))
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-30)


@given(matrices, all_norms)
def test_what_is_inside_comes_back_unchanged(displacement, norm):
    radius = norms(displacement.astype("float64"), norm).max() * 1.001
    got = project(tensor(displacement), radius, NormType(norm))
    np.testing.assert_array_equal(got, displacement)


def test_l1_projection_is_not_a_rescaling():
    got = project(tensor([[3.0, 1.0, -0.5]]), 2.0, NormType.L1)
    np.testing.assert_allclose(got, [[2.0, 0.0, 0.0]])


def test_l1_projection_of_what_is_much_larger_than_the_ball():
    rows = tensor([[3e6, -1.0, 3e6 - 0.25], [3e6, -3e6, 0.0]])
    got = project(rows, 1e-3, NormType.L1)
    np.testing.assert_allclose(got, [[1e-3, 0, 0], [5e-4, -5e-4, 0]], rtol=1e-6)


def test_l1_projection_adds_no_roundings_up():
    rows = np.random.default_rng(0).normal(size=(20, 5000)) * 0.01
    got = project(tensor(rows, "float32"), 2.0, NormType.L1)
    size = norms(array(got).astype("float64"), "l1")
    assert (size <= 2.0 * (1 + 5e-7)).all()
    np.testing.assert_allclose(size, 2.0, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_leaves_nothing(norm):
    got = project(tensor([[3.0, -1.0], [0.0, 0.0]]), 0.0, NormType(norm))
    np.testing.assert_array_equal(got, np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_the_float_type(dtype, norm):
    displacement = np.random.default_rng(0).normal(size=(4, 5000)) * 3
    got = project(ops.cast(displacement, dtype), 2.0, NormType(norm))
    assert dtype_of(got) == dtype
    size = norms(array(got).astype("float64"), norm)
    np.testing.assert_allclose(size, 2.0, rtol=5 * ROUNDING[dtype])


@only_tensorflow
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_with_unknown_batch(norm, jit):
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype("float32") * 3

    @tf.function(jit_compile=jit, input_signature=[tf.TensorSpec((None, 7))])
    def compiled(x):
        return (
            steepest_direction(x, NormType(norm)),
            project(x, 1.5, NormType(norm)),
            l2_norm(x),
        )

    direction, projected, size = compiled(rows)
    np.testing.assert_allclose(direction, steepest_in_numpy(rows, norm), atol=1e-6)
    np.testing.assert_allclose(
        projected, project_in_numpy(rows.astype("float64"), 1.5, norm), atol=1e-6
    )
    np.testing.assert_allclose(size[:, 0], norms(rows, "l2"), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_samples_are_uniform_in_the_ball(norm, dimension):
    # Uniform in a ball: (‖d‖ / r)^n is uniform on [0, 1], and so is the sign.
    seed = keras.random.SeedGenerator(1)
    sample = array(sample_unit_ball((4000, dimension), NormType(norm), seed))
    radius = norms(sample.astype("float64"), norm) ** dimension
    assert radius.max() <= 1 + 1e-6
    assert stats.kstest(radius, "uniform").pvalue > 1e-3
    assert stats.binomtest(int((sample[:, 0] > 0).sum()), 4000).pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_samples_are_uniform_in_every_direction(norm):
    # Against rejection from the cube, coordinate by coordinate.
    rng = np.random.default_rng(0)
    cube = rng.uniform(-1, 1, size=(30000, 3))
    expected = cube[norms(cube, norm) <= 1]
    seed = keras.random.SeedGenerator(2)
    sample = array(sample_unit_ball((4000, 3), NormType(norm), seed))
    for column in range(3):
        test = stats.ks_2samp(sample[:, column], expected[:, column])
        assert test.pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_samples_fill_the_ball_of_the_free_coordinates(norm):
    free = tensor([[True, False, True, False]])
    seed = keras.random.SeedGenerator(3)
    sample = array(sample_unit_ball((4000, 4), NormType(norm), seed, free))
    assert not sample[:, [1, 3]].any()
    radius = norms(sample.astype("float64"), norm) ** 2
    assert stats.kstest(radius, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_samples_with_nothing_free_are_zero(norm):
    seed = keras.random.SeedGenerator(3)
    free = ops.zeros((1, 3), "bool")
    sample = sample_unit_ball((5, 3), NormType(norm), seed, free, "float64")
    assert dtype_of(sample) == "float64"
    np.testing.assert_array_equal(sample, np.zeros((5, 3)))
