import keras
import numpy as np
import pytest
from helpers.ascent import follow
from helpers.backends import array, dtype_of, tensor
from helpers.oracle import NORMS
from keras import ops
from keras.backend import is_float_dtype

from advreg import AdvNeighborConfig
from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Settings

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

RNG = np.random.default_rng(0)
FEATURES = {
    "image": RNG.normal(size=(3, 2, 2)).astype("float32"),
    "id": np.array([1, 2, 3]),
    "more": [RNG.normal(size=(3,)), RNG.normal(size=(3, 1)).astype("float16")],
}


def perturb_structure(config, slopes=None):
    features = keras.tree.map_structure(tensor, FEATURES)
    leaves = keras.tree.flatten(features)
    gradients = [
        ops.ones_like(leaf) if is_float_dtype(leaf.dtype) else None for leaf in leaves
    ]
    seed = keras.random.SeedGenerator(0)
    result = perturb(
        features, gradients, lambda _: gradients, Settings.of(config), seed
    )
    keras.tree.assert_same_structure(result, FEATURES)
    for before, after in zip(leaves, keras.tree.flatten(result), strict=True):
        assert dtype_of(before) == dtype_of(after)
    return keras.tree.map_structure(
        lambda after, before: array(after).astype("float64") - before,
        result,
        FEATURES,
    )


def test_the_norm_is_joint_over_all_features():
    d = perturb_structure(AdvNeighborConfig(adv_step_size=1.0, adv_grad_norm="l2"))
    # Four values of the image and two more: each is 1 / sqrt(6).
    np.testing.assert_allclose(d["image"], 6**-0.5, rtol=1e-6)
    np.testing.assert_allclose(d["more"][0], 6**-0.5, rtol=1e-12)
    np.testing.assert_allclose(d["more"][1], 6**-0.5, atol=2e-3)
    assert not d["id"].any()


def test_a_scalar_holds_for_every_feature():
    d = perturb_structure(
        AdvNeighborConfig(adv_step_size=9.0, adv_grad_norm="linf", clip_value_max=1.0)
    )
    np.testing.assert_allclose(FEATURES["image"] + d["image"], 1.0)
    np.testing.assert_allclose(FEATURES["more"][0] + d["more"][0], 1.0)
    np.testing.assert_allclose(FEATURES["more"][1] + d["more"][1], 1.0)


def test_structures_constrain_each_feature():
    d = perturb_structure(
        AdvNeighborConfig(
            adv_step_size=20.0,
            adv_grad_norm="linf",
            feature_mask={"image": np.array([[1, 0], [1, 1]]), "more": (None, 0)},
            clip_value_max={"image": np.array([5.0, 6.0]), "more": [7.0, None]},
        )
    )
    np.testing.assert_allclose(
        FEATURES["image"] + d["image"],
        [[[5.0, x[0, 1]], [5.0, 6.0]] for x in FEATURES["image"]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(FEATURES["more"][0] + d["more"][0], 7.0)
    assert not d["more"][1].any()


def test_an_array_constrains_a_feature_of_any_rank():
    config = AdvNeighborConfig(
        adv_step_size=20.0,
        adv_grad_norm="linf",
        feature_mask=np.array([[1, 0], [1, 1]]),
        clip_value_max=np.array([[5.0], [6.0]]),
    )
    d = follow(np.zeros((3, 2, 2)), np.ones((3, 2, 2)), config)
    np.testing.assert_allclose(d, [[[5, 0], [6, 6]]] * 3)


def test_arrays_may_differ_from_example_to_example():
    high = np.arange(3.0)[:, None, None] + 5
    d = perturb_structure(
        AdvNeighborConfig(
            adv_step_size=20.0, adv_grad_norm="linf", clip_value_max={"image": high}
        )
    )
    np.testing.assert_allclose(
        FEATURES["image"] + d["image"], np.broadcast_to(high, (3, 2, 2))
    )


@pytest.mark.parametrize(
    ("field", "sign"), [("clip_value_min", -1.0), ("clip_value_max", 1.0)]
)
def test_what_a_structure_leaves_out_has_no_bound(field, sign):
    config = AdvNeighborConfig(
        adv_step_size=1.0, adv_grad_norm="linf", **{field: {"a": 0.5 * sign, "b": None}}
    )
    x = {name: ops.zeros((2, 1)) for name in "abc"}
    slopes = [sign * ops.ones((2, 1))] * 3
    x_adv = perturb(x, slopes, lambda _: slopes, Settings.of(config))
    np.testing.assert_array_equal(x_adv["a"], [[0.5 * sign]] * 2)
    np.testing.assert_array_equal(x_adv["b"], [[sign]] * 2)
    np.testing.assert_array_equal(x_adv["c"], [[sign]] * 2)


def test_two_features_with_a_range_for_each_example():
    high = {
        "a": np.array([[1.0], [2.0]]),
        "b": np.array([[3.0, 4.0], [5.0, 6.0]]),
    }
    config = AdvNeighborConfig(
        adv_step_size=9.0, adv_grad_norm="linf", clip_value_max=high
    )
    x = {"a": ops.zeros((2, 1)), "b": ops.zeros((2, 2))}
    slopes = [ops.ones((2, 1)), ops.ones((2, 2))]
    x_adv = perturb(x, slopes, lambda _: slopes, Settings.of(config))
    np.testing.assert_array_equal(x_adv["a"], high["a"])
    np.testing.assert_array_equal(x_adv["b"], high["b"])


def test_what_is_said_of_a_feature_must_fit_even_if_it_does_not_move():
    for field in ("feature_mask", "clip_value_min"):
        with pytest.raises(ValueError, match=rf"`{field}`.*'id'.*\(3,\).*\(7,\)"):
            perturb_structure(AdvNeighborConfig(**{field: {"id": np.zeros(7)}}))
    # What is said of all features has to fit those that move.
    x = {"a": ops.ones((3, 4)), "id": tensor([[1], [2], [3]])}
    slopes = [ops.ones((3, 4)), None]
    config = AdvNeighborConfig(feature_mask=np.array([0, 0, 0, 1]), adv_step_size=1.0)
    x_adv = perturb(x, slopes, lambda _: slopes, Settings.of(config))
    np.testing.assert_allclose(x_adv["a"], [[1, 1, 1, 2]] * 3)


def test_fractions_in_a_mask_weigh_the_gradient():
    config = AdvNeighborConfig(feature_mask=np.array([1, 0.5]), adv_step_size=1.0)
    d = follow(np.zeros((1, 2)), [[1.0, 1.0]], config)
    np.testing.assert_allclose(d, [[1, 0.5] / np.sqrt(1.25)])


def test_a_masked_value_never_moves_even_outside_the_range():
    config = AdvNeighborConfig(
        feature_mask=np.array([0, 1]),
        clip_value_min=0.0,
        clip_value_max=1.0,
        random_init=True,
        adv_grad_norm="linf",
        adv_step_size=0.1,
    )
    d = follow(np.array([[7.0, 7.0]]), [[1.0, 1.0]], config)
    np.testing.assert_allclose(d, [[0.0, -6.0]])


@pytest.mark.parametrize("norm", NORMS)
def test_a_masked_value_takes_no_room_in_the_ball(norm):
    config = AdvNeighborConfig(
        feature_mask=np.array([0, 1]),
        clip_value_min=-5.0,
        clip_value_max=5.0,
        adv_grad_norm=norm,
        adv_step_size=0.2,
        pgd_iterations=4,
        pgd_epsilon=0.3,
    )
    d = follow(np.zeros((1, 2)), [[1.0, 1.0]], config)
    np.testing.assert_allclose(d, [[0.0, 0.3]])


def test_the_range_wins_over_the_ball():
    config = AdvNeighborConfig(adv_step_size=0.1, pgd_epsilon=0.1, clip_value_max=0.0)
    np.testing.assert_allclose(follow(np.array([[3.0]]), [[1.0]], config), [[-3.0]])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature_mask", {"imagee": 0}, r"keys \['imagee'\] that are no features"),
        ("feature_mask", [1, 0], "list, and the features are not.*NumPy array"),
        ("feature_mask", {"more": [1]}, r"\['more'\].*1 entries, and there are 2"),
        ("feature_mask", {"more": [1, 1, 1]}, r"\['more'\].*3 entries.*are 2"),
        ("feature_mask", {"more": {"a": 1}}, "dictionary, and the features are not"),
        ("feature_mask", {"image": {"a": 1}}, "dictionary, and the features are not"),
        ("clip_value_min", np.zeros(5), r"broadcast.*\(3, 2, 2\).*\(5,\)"),
        ("clip_value_max", {"image": np.zeros((1, 3, 2, 2))}, r"shape: \(1, 3, 2, 2\)"),
        ("clip_value_max", {"image": np.zeros((4, 1, 2))}, r"shape: \(4, 1, 2\)"),
    ],
)
def test_constraints_that_do_not_fit(field, value, message):
    with pytest.raises(ValueError, match=f"(?s)`{field}.*{message}"):
        perturb_structure(AdvNeighborConfig(**{field: value}))
