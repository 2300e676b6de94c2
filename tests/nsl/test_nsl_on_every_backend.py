"""NSL's names on each backend, without TensorFlow where that is not the backend."""

import math
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import oracle
from helpers.linear import LINEAR, linear_base
from helpers.models import X, Y, classifier, cross_entropy, rows, two_outputs
from keras import ops
from scipy import special

import advreg
from advreg import nsl

pytestmark = pytest.mark.every_backend(tensorflow="slow")

BACKEND = keras.backend.backend()
TENSORFLOW = BACKEND == "tensorflow"


def array(tensor):
    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def config(**kwargs):
    kwargs = {"adv_step_size": 0.1, "adv_grad_norm": "infinity", **kwargs}
    return nsl.configs.make_adv_reg_config(**kwargs)


def wrapped(base=None, metrics=("accuracy",), **kwargs):
    model = nsl.keras.AdversarialRegularization(
        base or classifier(), adv_config=config(), **kwargs
    )
    model.compile("sgd", cross_entropy(), metrics=list(metrics))
    return model


@pytest.mark.skipif(TENSORFLOW, reason="about the others")
def test_no_name_needs_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from advreg import nsl\n"
        "import advreg.nsl.migrate\n"
        "print(sorted(nsl.lib.__all__ + nsl.configs.__all__ + nsl.keras.__all__))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wrapper_trains_as_advreg_s_own_does_under_nsl_s_names():
    base, other = classifier(), classifier()
    other.set_weights(base.get_weights())
    model = wrapped(base)
    data = {"feature": X, "label": Y}
    logs = model.fit(data, epochs=2, batch_size=4, shuffle=False, verbose=0).history
    assert set(logs) == {
        "loss",
        "sparse_categorical_crossentropy",
        "sparse_categorical_accuracy",
        "scaled_adversarial_loss",
    }
    plain = advreg.AdversarialRegularization(other, config())
    plain.compile("sgd", cross_entropy(), metrics=["accuracy"])
    expected = plain.fit(X, Y, epochs=2, batch_size=4, shuffle=False, verbose=0).history
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-6)
    for one, two in zip(base.weights, other.weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two))
    results = dict(
        zip(model.metrics_names, model.evaluate(data, verbose=0), strict=True)
    )
    assert set(results) == set(logs) - {"scaled_adversarial_loss"}
    accuracy = (model.predict(X, verbose=0).argmax(1) == Y).mean()
    assert results["sparse_categorical_accuracy"] == pytest.approx(accuracy)


def test_several_outputs_have_the_names_of_their_labels():
    model = wrapped(two_outputs(), label_keys=["p", "q"])
    data = {"feature": X, "p": Y % 3, "q": Y % 2}
    logs = model.fit(data, verbose=0).history
    assert {"sparse_categorical_crossentropy_p", "sparse_categorical_accuracy_q"} <= {
        *logs
    }


def test_perturbed_batches_have_labels_as_tensors(tmp_path):
    model = wrapped()
    data = {"feature": X, "label": Y}
    found = model.perturb_on_batch(data, pgd_iterations=None)
    assert isinstance(found["feature"], np.ndarray)
    np.testing.assert_allclose(np.abs(found["feature"] - X).max(), 0.1, rtol=1e-5)
    assert not isinstance(found["label"], np.ndarray)
    np.testing.assert_array_equal(array(found["label"]), Y)
    model.save(tmp_path / "base.keras")
    loaded = keras.models.load_model(tmp_path / "base.keras")
    assert not isinstance(loaded, advreg.AdversarialRegularization)
    np.testing.assert_array_equal(
        loaded.predict(X, verbose=0), model.predict(X, verbose=0)
    )


def test_fields_that_are_assigned_take_effect_with_the_next_fit():
    model = wrapped()
    data = {"feature": X, "label": Y}
    model.fit(data, verbose=0)
    model.adv_config.multiplier = 0.0
    logs = model.fit(data, verbose=0).history
    assert logs["scaled_adversarial_loss"] == [0.0]


@pytest.mark.parametrize("weights", [None, np.linspace(0.0, 2.0, 6, dtype="float32")])
def test_the_adversarial_loss_always_passes_three_arguments(weights):
    x, y = rows(6, 4), rows(6, seed=1)
    model, given = linear_base(), []

    def loss_fn(labels, predictions, sample_weight):
        given.append(sample_weight)
        return keras.losses.MeanSquaredError()(labels, predictions, sample_weight)

    found = nsl.keras.adversarial_loss(
        x, y[:, None], model, loss_fn, weights, config(adv_step_size=0.2)
    )
    assert all(each is weights for each in given)
    counts = np.ones(6) if weights is None else weights
    moved = x + 0.2 * oracle.steepest(LINEAR.input_gradient(x, y, counts), "infinity")
    np.testing.assert_allclose(
        float(array(found)), LINEAR.loss(moved, y, counts), rtol=1e-5
    )


def test_losses_of_keras_are_taken_of_logits_in_it():
    def found(activation, loss_fn):
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(3, activation, use_bias=False)]
        )
        model.set_weights([40 * rows(6, 3, seed=3)])
        loss = nsl.keras.adversarial_loss(X, Y, model, loss_fn, adv_config=config())
        return array(loss)

    kind = keras.losses.SparseCategoricalCrossentropy
    expected = found(None, kind(from_logits=True))
    np.testing.assert_allclose(found("softmax", kind()), expected, rtol=1e-5)
    function = keras.losses.sparse_categorical_crossentropy
    expected = found(None, kind(from_logits=True, reduction="none"))
    np.testing.assert_allclose(found("softmax", function), expected, rtol=1e-5)


def test_neighbors_of_a_function_and_of_nothing():
    x = rows(6, 4)
    given = nsl.configs.AdvNeighborConfig(adv_step_size=0.2)
    found, weights = nsl.lib.gen_adv_neighbor(x, lambda x: ops.sum(x), given)
    np.testing.assert_allclose(array(found), x + 0.1, rtol=1e-6)
    assert array(weights).shape == (6, 1)
    features = {"a": x}
    with pytest.warns(UserWarning, match="Nothing can be perturbed"):
        found, weights = nsl.lib.gen_adv_neighbor(
            features, lambda x: ops.ones(()), given
        )
    assert found is features
    np.testing.assert_array_equal(array(weights), np.ones((6, 1)))
    with pytest.raises(ValueError, match="Nothing can be perturbed"):
        nsl.lib.gen_adv_neighbor(features, lambda x: ops.ones(()), given, True)
    if not TENSORFLOW:
        with pytest.raises(TypeError, match="must be a function from features"):
            nsl.lib.gen_adv_neighbor(x, ops.ones(()), given)


@pytest.mark.parametrize("norm", oracle.NORMS)
def test_geometry(norm):
    a, b = rows(4, 3), rows(4, 2, 2, seed=1)
    matrix = np.hstack([a, b.reshape(4, 4)]).astype("float64")

    def flat(found):
        return np.hstack([array(found[key]).reshape(4, -1) for key in "ab"])

    tensors = {"a": ops.convert_to_tensor(a), "b": b}
    found = flat(nsl.lib.maximize_within_unit_norm(tensors, norm))
    np.testing.assert_allclose(found, oracle.steepest(matrix, norm), atol=1e-6)
    found = flat(nsl.lib.project_to_ball(tensors, 0.5, norm))
    np.testing.assert_allclose(found, oracle.project(matrix, 0.5, norm), atol=1e-6)
    found = flat(nsl.lib.random_in_norm_ball(tensors, 0.5, norm))
    assert 0 < oracle.norms(found, norm).max() <= 0.5 + 1e-6
    expected = a / oracle.norms(a.astype("float64"), norm)[:, None]
    np.testing.assert_allclose(array(nsl.lib.normalize(a, norm)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"floats. Received: \['int32'\]"):
        nsl.lib.project_to_ball(ops.ones((1, 2), "int32"), 1.0, norm)


def test_masks():
    features = ops.convert_to_tensor([[1.0, 2.0]])
    assert nsl.lib.apply_feature_mask(features) is features
    masked = nsl.lib.apply_feature_mask(features, [0.5, 0.0])
    np.testing.assert_array_equal(array(masked), [[0.5, 0.0]])
    if not TENSORFLOW:
        for mask in (-0.1, 1.1):
            with pytest.raises(ValueError, match="`feature_mask` must lie in"):
                nsl.lib.apply_feature_mask(features, mask)


def test_targets():
    logits = ops.convert_to_tensor([[0.1, 0.2, 0.7], [0.3, 0.5, 0.2]])
    labels = ops.convert_to_tensor([0, 0])

    def targets(method, logits=logits):
        given = nsl.configs.AdvTargetConfig(method, random_seed=1)
        return array(nsl.lib.get_target_indices(logits, labels, given))

    assert targets("second").tolist() == [1, 0]
    assert targets("least").tolist() == [0, 2]
    assert targets("ground_truth").tolist() == [0, 0]
    drawn = targets("random", ops.zeros((3000, 3)))
    assert drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=3)
    assert counts.min() > 900


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("exponential", 0.9**0.5),
        ("inverse_time", 1 / (1 + 0.9 * 0.5)),
        ("natural_exp", math.exp(-0.9 * 0.5)),
    ],
)
def test_decay(kind, factor):
    given = nsl.configs.DecayConfig(10, 0.9, 0.05, f"{kind}_decay")
    found = nsl.lib.decay_over_time(5, given, 0.3)
    assert float(found) == pytest.approx(0.3 * factor, rel=1e-6)
    late = nsl.lib.decay_over_time(ops.convert_to_tensor(1000), given)
    assert float(late) == pytest.approx(0.05)


P = special.softmax(rows(5, 4), axis=1)
Q = special.softmax(rows(5, 4, seed=1), axis=1)
WEIGHTS = np.array([[0.0], [1.0], [2.0], [0.5], [1.0]], "float32")


def divergence(p, q):
    return special.rel_entr(p, q).sum(1)


DISTANCES = {
    "l1": np.abs(P - Q).sum(1),
    "l2": np.square(P - Q).sum(1),
    "cosine": 1
    - (P * Q).sum(1) / np.linalg.norm(P, axis=1) / np.linalg.norm(Q, axis=1),
    "kl_divergence": divergence(P, Q),
    "jensen_shannon_divergence": (
        divergence(P, (P + Q) / 2) + divergence(Q, (P + Q) / 2)
    )
    / 2,
}
REDUCED = {
    "weighted_sum": lambda each, w: (each * w).sum(),
    "weighted_mean": lambda each, w: (each * w).sum() / w.sum(),
    "weighted_sum_over_batch_size": lambda each, w: (each * w).mean(),
    "weighted_sum_by_nonzero_weights": lambda each, w: (each * w).sum() / (w > 0).sum(),
}


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("transform", ["none", "softmax"])
def test_distances_of_vectors(kind, reduction, transform):
    given = nsl.configs.DistanceConfig(kind, reduction, -1, transform)
    sides = (P, Q) if transform == "none" else (np.log(P) + 3, np.log(Q))
    found = nsl.lib.pairwise_distance_wrapper(*sides, WEIGHTS, given)
    expected = REDUCED[reduction](DISTANCES[kind], WEIGHTS[:, 0])
    assert float(found) == pytest.approx(expected, rel=1e-4)
    nothing = nsl.lib.pairwise_distance_wrapper(*sides, 0.0, given)
    assert float(nothing) == 0.0


def test_distances_of_single_values():
    given = nsl.configs.DistanceConfig("l1", "none")
    found = nsl.lib.pairwise_distance_wrapper(P, Q, distance_config=given)
    np.testing.assert_allclose(array(found), np.abs(P - Q), rtol=1e-5)
    found = nsl.lib.pairwise_distance_wrapper(P, Q)
    assert float(found) == pytest.approx(np.square(P - Q).mean(), rel=1e-5)


@pytest.mark.skipif(TENSORFLOW, reason="TensorFlow has errors of its own")
def test_distances_say_what_does_not_fit():
    for function in (nsl.lib.kl_divergence, nsl.lib.jensen_shannon_divergence):
        with pytest.raises(ValueError, match="`predictions` must be probabilities"):
            function(P, 2 * Q, axis=-1)
        with pytest.raises(ValueError, match="`labels` must be probabilities"):
            function(P - 0.25, Q, axis=-1)
        with pytest.raises(ValueError, match="the same shape"):
            function(P[1:], Q, axis=-1)
    cosine = nsl.configs.DistanceConfig("cosine")
    with pytest.raises(ValueError, match="`sum_over_axis`"):
        nsl.lib.pairwise_distance_wrapper(P, Q, distance_config=cosine)
    for weights in (np.ones(5), np.ones((5, 3))):
        with pytest.raises(ValueError, match=r"`weights` must be a scalar, or broad"):
            nsl.lib.pairwise_distance_wrapper(P, Q, weights)


@pytest.mark.skipif(BACKEND != "jax", reason="about `jax.jit`")
def test_distances_are_compiled():
    import jax

    found = jax.jit(lambda p: nsl.lib.kl_divergence(p, Q, axis=-1))(P)
    assert float(found) == pytest.approx(divergence(P, Q).mean(), rel=1e-4)


def test_the_regularizer_hands_the_neighbors_to_model_and_loss():
    def model(x, is_train, reuse):
        assert not is_train
        assert reuse
        return 2 * x

    loss = nsl.lib.adv_regularizer(
        ops.convert_to_tensor([1.0, 2.0]),
        ops.convert_to_tensor([1.0, 3.0]),
        model,
        lambda targets, predictions: ops.sum(predictions - targets),
    )
    assert float(loss) == 2.0


@pytest.mark.parametrize("norm", ["l2", "infinity"])
def test_power_iteration_finds_the_direction_that_moves_most(norm):
    x, weights = rows(1, 4), rows(4, 4, seed=1)
    given = nsl.configs.VirtualAdvConfig(
        nsl.configs.AdvNeighborConfig(adv_step_size=0.1, adv_grad_norm=norm),
        nsl.configs.DistanceConfig(sum_over_axis=-1),
        num_approx_steps=60,
        approx_difference=1e-2,
    )
    kernel = ops.convert_to_tensor(weights)
    loss = nsl.lib.virtual_adv_regularizer(x, lambda x: ops.matmul(x, kernel), given)
    wide = weights.astype("float64")
    vector = np.linalg.eigh(wide @ wide.T).eigenvectors[:, -1]
    moved = 0.1 * vector / np.linalg.norm(vector, oracle.ORDERS[norm]) @ wide
    assert float(loss) == pytest.approx(moved @ moved, rel=1e-3)
    with pytest.raises(ValueError, match="`embedding_fn` must return a tensor that"):
        nsl.lib.virtual_adv_regularizer(x, ops.zeros_like, given)
    with pytest.raises(TypeError, match="`input_layer` must be a dense float tensor"):
        nsl.lib.virtual_adv_regularizer(np.array([[1]]), lambda x: x, given)


@pytest.mark.skipif(TENSORFLOW, reason="there each pass changes the state")
def test_the_search_for_a_direction_leaves_no_trace_in_layers():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    x = rows(6, 4)
    nsl.lib.virtual_adv_regularizer(
        x, lambda x: layer(x, training=True), nsl.configs.VirtualAdvConfig()
    )
    # The two passes of the loss itself, whose inputs differ by at most 1.
    mean = array(layer.moving_mean)
    expected = x.mean(0) * (1 - layer.momentum**2)
    assert np.abs(mean - expected).max() <= 1.0 * (1 - layer.momentum) + 1e-6
    assert np.abs(mean).max() > 0


def test_source_code_is_migrated():
    pytest.importorskip("libcst")
    from advreg.nsl.migrate import migrate_python

    before = "import neural_structured_learning as nsl\nnsl.keras.GraphRegularization\n"
    found = migrate_python(before)
    assert found.after.startswith("from advreg import nsl\n")
    assert [place.line for place in found.places] == [2]
