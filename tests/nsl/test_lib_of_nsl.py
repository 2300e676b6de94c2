import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import oracle
from helpers.models import rows
from scipy import special, stats

import advreg
from advreg import nsl

DistanceType = nsl.configs.DistanceType
Reduction = tf.compat.v1.losses.Reduction


def structure(scale=1.0):
    """Two features of different ranks, and the rows that they make together."""
    a, b = scale * rows(4, 3), scale * rows(4, 2, 2, seed=1)
    return {"a": tf.constant(a), "b": tf.constant(b)}, np.hstack([a, b.reshape(4, 4)])


def flat(tensors):
    return np.hstack([np.reshape(tensors[key], (4, -1)) for key in "ab"])


@pytest.mark.parametrize("norm", oracle.NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_steepest_direction_whatever_the_scale(norm, scale):
    tensors, matrix = structure(scale)
    found = nsl.lib.maximize_within_unit_norm(tensors, norm)
    expected = oracle.steepest(matrix.astype("float64"), norm)
    np.testing.assert_allclose(flat(found), expected, atol=1e-6)
    alone = nsl.lib.maximize_within_unit_norm(tensors["a"], nsl.configs.NormType(norm))
    expected = oracle.steepest(tensors["a"].numpy().astype("float64"), norm)
    np.testing.assert_allclose(alone, expected, atol=1e-6)
    assert nsl.lib.maximize_within_unit_norm({}, norm) == {}


@pytest.mark.parametrize("norm", oracle.NORMS)
@pytest.mark.parametrize("radius", [0.5, 100.0])
def test_projections_in_every_norm(norm, radius):
    tensors, matrix = structure()
    found = nsl.lib.project_to_ball(tensors, radius, norm)
    expected = oracle.project(matrix.astype("float64"), radius, norm)
    np.testing.assert_allclose(flat(found), expected, atol=1e-6)


@pytest.mark.parametrize("norm", oracle.NORMS)
def test_normalize_divides_by_the_norm_of_each_example(norm):
    tensor = rows(4, 3, 2)
    found = nsl.lib.normalize(tf.constant(tensor), norm).numpy().reshape(4, 6)
    matrix = tensor.reshape(4, 6).astype("float64")
    norms = oracle.norms(matrix, norm)
    np.testing.assert_allclose(found, matrix / norms[:, None], rtol=1e-5)
    tiny = nsl.lib.normalize(tf.constant([[1e-9, 0.0]]), norm)
    np.testing.assert_allclose(tiny, [[1e-3, 0.0]], rtol=1e-5)
    zero = nsl.lib.normalize(tf.zeros([2, 3], "float16"), norm)
    assert zero.dtype == tf.float16
    np.testing.assert_array_equal(zero, np.zeros((2, 3)))


@pytest.mark.parametrize("norm", oracle.NORMS)
def test_random_points_fill_the_ball(norm):
    tensors = [tf.zeros([2000, 2]), tf.zeros([2000, 1, 1], "float64")]
    found = nsl.lib.random_in_norm_ball(tensors, 2.0, norm)
    assert [leaf.dtype for leaf in found] == [tf.float32, tf.float64]
    matrix = np.hstack([np.reshape(leaf, (2000, -1)) for leaf in found])
    radii = oracle.norms(matrix, norm) / 2.0
    assert radii.max() <= 1 + 1e-6
    # In a ball of three dimensions the cube of the radius is uniform.
    assert stats.kstest(radii**3, "uniform").pvalue > 1e-3
    drawn = []
    for _ in range(2):
        keras.utils.clear_session()  # Older Keras keeps its generator for ever.
        keras.utils.set_random_seed(1)
        drawn.append(nsl.lib.random_in_norm_ball(tensors, 2.0, norm)[0])
    np.testing.assert_array_equal(*drawn)


def test_tensors_that_make_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"floats. Received: \['int32'\]"):
        nsl.lib.project_to_ball(tf.constant([[1, 2]]), 1.0, "l2")
    with pytest.raises(ValueError, match=r"the same for all.*\(2, 1\), \(3, 1\)"):
        nsl.lib.random_in_norm_ball([tf.zeros([2, 1]), tf.zeros([3, 1])], 1.0, "l2")
    with pytest.raises(ValueError, match="must be one of 'l1', 'l2'"):
        nsl.lib.normalize(tf.zeros([2, 1]), "l3")


def test_masks():
    features = tf.constant([[1.0, 2.0]])
    assert nsl.lib.apply_feature_mask(features) is features
    masked = nsl.lib.apply_feature_mask(features, [0.5, 0.0])
    np.testing.assert_array_equal(masked, [[0.5, 0.0]])
    for mask in (-0.1, 1.1):
        with pytest.raises(tf.errors.InvalidArgumentError):
            nsl.lib.apply_feature_mask(features, mask)


def test_targets():
    logits = tf.constant([[0.1, 0.2, 0.7], [0.3, 0.5, 0.2]])
    labels = tf.constant([0, 0])

    def targets(method):
        config = nsl.configs.AdvTargetConfig(method, random_seed=1)
        return nsl.lib.get_target_indices(logits, labels, config).numpy().tolist()

    assert targets("second") == [1, 0]
    assert targets("least") == [0, 2]
    assert targets("ground_truth") == [0, 0]
    many = tf.zeros([3000, 3])
    config = nsl.configs.AdvTargetConfig("random")
    drawn = nsl.lib.get_target_indices(many, tf.zeros([3000], "int32"), config)
    counts = np.bincount(drawn, minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["exponential", "inverse_time", "natural_exp"])
def test_decay(kind):
    config = nsl.configs.DecayConfig(10, 0.9, 0.05, f"{kind}_decay")

    @tf.function
    def decayed(step, value):
        return nsl.lib.decay_over_time(step, config, value)

    factor = {
        "exponential": 0.9**0.5,
        "inverse_time": 1 / (1 + 0.9 * 0.5),
        "natural_exp": math.exp(-0.9 * 0.5),
    }[kind]
    assert float(decayed(5, 0.3)) == pytest.approx(0.3 * factor, rel=1e-6)
    assert float(decayed(1000, 0.3)) == pytest.approx(0.05)
    assert float(nsl.lib.decay_over_time(0, config)) == 1.0


P = special.softmax(rows(5, 4), axis=1)
Q = special.softmax(rows(5, 4, seed=1), axis=1)


def divergence(p, q):
    return special.rel_entr(p, q).sum(1)


DISTANCES = {
    DistanceType.L1: np.abs(P - Q).sum(1),
    DistanceType.L2: np.square(P - Q).sum(1),
    DistanceType.COSINE: 1
    - (P * Q).sum(1) / np.linalg.norm(P, axis=1) / np.linalg.norm(Q, axis=1),
    DistanceType.KL_DIVERGENCE: divergence(P, Q),
    DistanceType.JENSEN_SHANNON_DIVERGENCE: (
        divergence(P, (P + Q) / 2) + divergence(Q, (P + Q) / 2)
    )
    / 2,
}


@pytest.mark.parametrize("kind", DISTANCES, ids=lambda kind: kind.value)
def test_distances_of_vectors(kind):
    config = nsl.configs.DistanceConfig(kind, sum_over_axis=-1)
    found = nsl.lib.pairwise_distance_wrapper(P, Q, distance_config=config)
    assert float(found) == pytest.approx(DISTANCES[kind].mean(), rel=1e-4)
    weights = np.array([[0.0], [1.0], [2.0], [0.5], [1.0]], "float32")
    found = nsl.lib.pairwise_distance_wrapper(P, Q, weights, config)
    weighted = (DISTANCES[kind] * weights[:, 0]).sum()
    assert float(found) == pytest.approx(weighted / 4, rel=1e-4)  # Four are not 0.
    config = nsl.configs.DistanceConfig(kind, Reduction.SUM, -1, "softmax")
    logits = [np.log(side) + 3.0 for side in (P, Q)]
    found = nsl.lib.pairwise_distance_wrapper(*logits, distance_config=config)
    assert float(found) == pytest.approx(DISTANCES[kind].sum(), rel=1e-4)


def test_distances_of_single_values():
    found = nsl.lib.pairwise_distance_wrapper(P, Q)
    assert float(found) == pytest.approx(np.square(P - Q).mean(), rel=1e-5)
    config = nsl.configs.DistanceConfig("l1", Reduction.NONE)
    found = nsl.lib.pairwise_distance_wrapper(P, Q, distance_config=config)
    np.testing.assert_allclose(found, np.abs(P - Q), rtol=1e-5)


def test_divergences_are_refused_what_is_no_distribution():
    for function in (nsl.lib.kl_divergence, nsl.lib.jensen_shannon_divergence):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`predictions` must"):
            function(P, 2 * Q, axis=-1)
        with pytest.raises(ValueError, match="`axis` must say"):
            function(P, Q)
        with pytest.raises(ValueError, match=r"lie in \[-2, 2\).*Received: 2"):
            function(P, Q, axis=2)
    config = nsl.configs.DistanceConfig("l2", sum_over_axis=-1)
    with pytest.raises(ValueError, match=r"`weights` must be of size 1.*\(5, 4\)"):
        nsl.lib.pairwise_distance_wrapper(P, Q, np.ones((5, 4), "float32"), config)


def test_the_regularizer_hands_the_neighbors_to_model_and_loss():
    def model(x, is_train, reuse):
        assert not is_train
        assert reuse
        return 2 * x

    loss = nsl.lib.adv_regularizer(
        tf.constant([1.0, 2.0]),
        tf.constant([1.0, 3.0]),
        model,
        lambda targets, predictions: tf.reduce_sum(predictions - targets),
    )
    assert float(loss) == 2.0


@pytest.mark.parametrize("norm", ["l2", "infinity"])
def test_power_iteration_finds_the_direction_that_moves_most(norm):
    x, weights = rows(1, 4).astype("float64"), rows(4, 4, seed=1).astype("float64")
    config = nsl.configs.VirtualAdvConfig(
        nsl.configs.AdvNeighborConfig(adv_step_size=0.1, adv_grad_norm=norm),
        nsl.configs.DistanceConfig(sum_over_axis=-1),
        num_approx_steps=60,
        approx_difference=1e-3,
    )
    bias = tf.Variable(weights[0])
    with tf.GradientTape() as tape:
        loss = nsl.lib.virtual_adv_regularizer(
            tf.constant(x), lambda x: x @ weights + bias, config
        )
    vector = np.linalg.eigh(weights @ weights.T).eigenvectors[:, -1]
    moved = 0.1 * vector / np.linalg.norm(vector, oracle.ORDERS[norm]) @ weights
    assert float(loss) == pytest.approx(moved @ moved, rel=1e-4)
    # Through both embeddings together, the gradient would be zero.
    gradient = tape.gradient(loss, bias)
    np.testing.assert_allclose(np.abs(gradient), np.abs(2 * moved), rtol=1e-3)


def test_virtual_adversarial_loss_says_what_it_cannot_do():
    config = nsl.configs.VirtualAdvConfig()
    x = tf.ones([2, 3])
    with pytest.raises(TypeError, match="`input_layer` must be one tensor"):
        nsl.lib.virtual_adv_regularizer({"x": x}, lambda x: x, config)
    with pytest.raises(TypeError, match="`input_layer` must be a dense float tensor"):
        nsl.lib.virtual_adv_regularizer(tf.constant([[1]]), lambda x: x, config)
    with pytest.raises(ValueError, match="`embedding_fn` must return a tensor that"):
        nsl.lib.virtual_adv_regularizer(x, tf.zeros_like, config)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    config.adv_neighbor_config.adv_step_size = schedule
    with pytest.raises(TypeError, match="`adv_step_size` must be a number here"):
        nsl.lib.virtual_adv_regularizer(x, lambda x: x, config)


def test_virtual_adversarial_directions_obey_the_mask():
    config = nsl.configs.VirtualAdvConfig(
        nsl.configs.AdvNeighborConfig(
            feature_mask=np.array([0.0, 1.0]), adv_step_size=0.5
        ),
        nsl.configs.DistanceConfig(reduction=Reduction.NONE),
        num_approx_steps=0,
    )
    x = tf.constant(rows(3, 2))
    distance = nsl.lib.virtual_adv_regularizer(x, lambda x: x, config, embedding=x)
    np.testing.assert_allclose(distance, [[0.0, 0.25]] * 3, rtol=1e-4)


def test_neighbors_are_those_of_advreg():
    x = tf.constant(rows(3, 2))
    config = nsl.configs.AdvNeighborConfig(adv_step_size=0.1)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        loss = tf.reduce_sum(x**3)
    found, weights = nsl.lib.gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    expected, _ = advreg.gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(weights, np.ones((3, 1)))


def test_what_cannot_be_perturbed_comes_back_with_a_warning():
    x = {"count": tf.constant([[1], [2]])}
    config = nsl.configs.AdvNeighborConfig()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(x["count"], "float32"))
    with pytest.warns(UserWarning, match="Nothing can be perturbed"):
        found, weights = nsl.lib.gen_adv_neighbor(x, loss, config, gradient_tape=tape)
    assert found is x
    assert weights.shape == (2, 1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(x["count"], "float32"))
    with pytest.raises(ValueError, match="Nothing can be perturbed"):
        nsl.lib.gen_adv_neighbor(x, loss, config, True, tape)


def test_a_random_start_alone():
    x = tf.constant(rows(50, 3))
    config = nsl.configs.AdvNeighborConfig(
        pgd_iterations=0, pgd_epsilon=0.5, random_init=True
    )
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(x)
    found, _ = nsl.lib.gen_adv_neighbor(
        x,
        loss,
        config,
        gradient_tape=tape,
        pgd_model_fn=lambda x: x,
        pgd_loss_fn=lambda _, y: tf.reduce_sum(y),
    )
    moved = np.linalg.norm(found - x, axis=1)
    assert 0 < moved.min() < moved.max() <= 0.5 * (1 + 1e-6)
    assert abs((found - x).numpy().mean()) < 0.1  # No step along the gradient.
