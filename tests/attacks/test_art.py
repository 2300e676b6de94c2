import importlib
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from helpers.models import Subclassed, regularized, rows, two_outputs
from helpers.slow import slow_rows
from keras import layers, ops

from advreg import AdversarialRegularization, NormType, datasets
from advreg.attacks import ART
from advreg.attacks.art import bridge, estimators

pytest.importorskip("art")

RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
PGD = {"eps": 0.2, "eps_step": 0.05, "max_iter": 8}
APGD = {"eps": 0.2, "eps_step": 0.1, "max_iter": 8, "nb_random_init": 1}


def loss(from_logits=True):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)


def network(classes=10):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(classes),
        ]
    )


@pytest.fixture(scope="module")
def digits():
    """Sixteen digits that the model of the same name tells apart."""
    return datasets.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    keras.utils.set_random_seed(0)
    model = network()
    model.compile("adam", loss())
    model.fit(digits.x_train, digits.y_train, epochs=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def right(model, digits):
    """Sixteen test images that the model classifies correctly, and their labels."""
    return some(model, digits, True, 16)


def some(model, digits, right, count):
    chosen = predicted(model, digits.x_test) == digits.y_test
    places = np.flatnonzero(chosen == right)[:count]
    return digits.x_test[places], digits.y_test[places]


def predicted(model, x):
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    if outputs.shape[1] == 1:
        return (outputs[:, 0] > 0).astype("int64")
    return np.argmax(outputs, axis=1)


def accuracy(model, x, y):
    return np.mean(predicted(model, x) == y)


# Each attack, and the accuracy that it leaves at most of 1. What ART attacks well it
# leaves nothing of; the others have settings that keep the test short.
ATTACKS = [
    ("FastGradientMethod", {"eps": 0.3}, 0.1),
    ("FastGradientMethod", {"eps": 0.3, "eps_step": 0.05, "minimal": True}, 0.1),
    ("BasicIterativeMethod", PGD, 0.1),
    ("ProjectedGradientDescent", {**PGD, "num_random_init": 1}, 0.1),
    ("ProjectedGradientDescent", {**PGD, "eps": 1.5, "norm": "l2"}, 0.7),
    ("ProjectedGradientDescent", {**PGD, "decay": 0.5}, 0.1),
    ("ProjectedGradientDescentNumpy", PGD, 0.1),
    ("ProjectedGradientDescentTensorFlowV2", PGD, 0.1),
    ("MomentumIterativeMethod", PGD, 0.2),
    ("AutoProjectedGradientDescent", APGD, 0.1),
    ("AutoProjectedGradientDescent", {**APGD, "loss_type": "cross_entropy"}, 0.1),
    (
        "AutoProjectedGradientDescent",
        {**APGD, "loss_type": "difference_logits_ratio"},
        0.2,
    ),
    ("AutoConjugateGradient", {**APGD, "max_iter": 20}, 0.3),
    ("RescalingAutoConjugateGradient", {**APGD, "max_iter": 20}, 0.3),
    ("AutoAttack", {"eps": 0.2, "eps_step": 0.1}, 0.1),
    ("CarliniL2Method", {"max_iter": 5, "initial_const": 1.0}, 0.1),
    (
        "CarliniLInfMethod",
        {"learning_rate": 0.05, "initial_const": 0.1, "largest_const": 1.0},
        0.5,
    ),
    (
        "CarliniL0Method",
        {"max_iter": 3, "binary_search_steps": 2, "initial_const": 1.0},
        0.1,
    ),
    ("ElasticNet", {"max_iter": 10, "initial_const": 1.0, "learning_rate": 0.1}, 0.1),
    ("DeepFool", {"max_iter": 30, "epsilon": 0.02}, 0.1),
    ("NewtonFool", {"max_iter": 20, "eta": 0.1}, 0.1),
    ("SaliencyMapMethod", {"theta": 0.5}, 0.1),
    (
        "VirtualAdversarialMethod",
        {"eps": 2.0, "max_iter": 1, "finite_diff": 0.01},
        0.6,
    ),
    ("Wasserstein", {"max_iter": 4, "regularization": 100.0}, 0.5),
    ("ShadowAttack", {"nb_steps": 10, "batch_size": 8, "sigma": 0.1}, 0.3),
    ("UniversalPerturbation", {"eps": 0.5, "max_iter": 1, "attacker": "fgsm"}, 0.5),
    (
        "TargetedUniversalPerturbation",
        {"eps": 0.9, "attacker_params": {"eps": 0.5, "targeted": True}},
        0.8,
    ),
    (
        "SpatialTransformation",
        {
            "max_translation": 20.0,
            "num_translations": 3,
            "max_rotation": 30.0,
            "num_rotations": 3,
        },
        0.3,
    ),
    ("SquareAttack", {"eps": 0.3, "max_iter": 40}, 0.5),
    ("SimBA", {"max_iter": 60, "epsilon": 0.5, "attack": "px"}, 0.1),
    ("SimBA", {"max_iter": 60, "epsilon": 0.5}, 0.1),
    (
        "ZooAttack",
        {
            "use_resize": False,
            "use_importance": False,
            "nb_parallel": 16,
            "learning_rate": 0.3,
            "initial_const": 1.0,
        },
        0.9,
    ),
    ("HopSkipJump", {"max_iter": 1, "max_eval": 50, "init_eval": 10}, 0.1),
    ("BoundaryAttack", {"max_iter": 2}, 0.1),
    ("SignOPTAttack", {"max_iter": 1, "num_trial": 5, "k": 5}, 0.5),
    ("PixelAttack", {"th": 5, "max_iter": 5}, 0.3),
    ("ThresholdAttack", {"th": 80, "max_iter": 5, "es": 1}, 0.3),
    ("FrameSaliencyAttack", {"attacker": ART("FastGradientMethod", eps=0.3)}, 0.3),
]


USUAL = (
    "BasicIterativeMethod",
    "ProjectedGradientDescent",
    "SaliencyMapMethod",
    "DeepFool",
    "UniversalPerturbation",
    "SquareAttack",
    "HopSkipJump",
    "FrameSaliencyAttack",
)


@pytest.mark.parametrize(
    ("name", "kwargs", "left"),
    slow_rows(ATTACKS, *(i for i, (name, *_) in enumerate(ATTACKS) if name in USUAL)),
)
def test_an_attack_fools_the_model_in_range(
    model, right, name, kwargs, left, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    x, y = (part[:10] for part in right)
    attack = ART(name, **RANGE, **kwargs)
    given = x.copy()
    perturbed = attack(model, x, y, batch_size=7)
    assert accuracy(model, perturbed, y) <= left
    assert perturbed.shape == x.shape
    assert perturbed.dtype == x.dtype
    assert perturbed.min() >= 0.0
    assert perturbed.max() <= 1.0
    np.testing.assert_array_equal(x, given)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "norm", "order"),
    [
        ("FastGradientMethod", "l1", 1),
        ("FastGradientMethod", NormType.L2, 2),
        ("ProjectedGradientDescent", "inf", np.inf),
        ("AutoProjectedGradientDescent", 2, 2),
        ("BasicIterativeMethod", None, np.inf),
    ],
)
def test_radius_and_norm_hold(model, right, name, norm, order):
    x, y = right
    given = {} if norm is None else {"norm": norm}
    if name.startswith("Auto"):
        given.update(max_iter=10, nb_random_init=1)
    attack = ART(name, eps=0.25, eps_step=0.1, **given, **RANGE)
    moved = (attack(model, x, y) - x).reshape(len(x), -1)
    lengths = np.linalg.norm(moved.astype("float64"), order, axis=1)
    assert lengths.max() <= 0.25 * (1 + 1e-5)
    assert lengths.max() > 0.2
    orders = {NormType.L1: 1, NormType.L2: 2, NormType.INFINITY: np.inf}
    assert orders[attack.norm] == order


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ProjectedGradientDescent", {**PGD, "num_random_init": 1}),
        ("CarliniL2Method", {"max_iter": 5, "binary_search_steps": 2}),
        ("DeepFool", {"max_iter": 10}),
        ("SquareAttack", {"eps": 0.2, "max_iter": 10}),
    ],
)
def test_what_art_finds_by_itself_is_found(model, right, name, kwargs):
    x, y = right
    found = ART(name, **kwargs, **RANGE)
    classification = importlib.import_module("art.estimators.classification")
    classifier = classification.TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=(8, 8, 1),
        loss_object=loss(),
        clip_values=(0.0, 1.0),
    )
    attack = getattr(estimators.evasion(), name)(
        classifier, batch_size=32, verbose=False, **kwargs
    )
    keras.utils.set_random_seed(0)
    expected = attack.generate(x, y)
    keras.utils.set_random_seed(0)
    np.testing.assert_allclose(found(model, x, y), expected, atol=1e-4)


def test_what_is_misclassified_already_stays(model, digits):
    x, y = some(model, digits, False, 4)
    assert len(x)
    for name in ("DeepFool", "ProjectedGradientDescent", "CarliniL2Method"):
        np.testing.assert_array_equal(ART(name, **RANGE)(model, x, y), x)


def test_targeted_attacks_reach_their_targets(model, right):
    x, y = right
    targets = (y + 1) % 10
    for name, kwargs in [
        ("ProjectedGradientDescent", {**PGD, "eps": 0.5, "max_iter": 20}),
        ("SaliencyMapMethod", {"theta": 0.5}),
        ("CarliniL2Method", {"initial_const": 10.0}),
    ]:
        attack = ART(name, targeted=True, **kwargs, **RANGE)
        assert attack.targeted
        reached = accuracy(model, attack(model, x, targets), targets)
        assert reached > 0.7, name
        # What is there already stays.
        np.testing.assert_array_equal(attack(model, x, y), x)


def test_targeted_of_auto_attack_adds_targets_and_y_is_true(model, right):
    x, y = right
    few = ART("BasicIterativeMethod", eps=0.2, eps_step=0.05, max_iter=5)
    attack = ART(
        "AutoAttack", eps=0.2, eps_step=0.05, attacks=[few], targeted=True, **RANGE
    )
    assert not attack.targeted
    assert accuracy(model, attack(model, x, y), y) < 0.3


def test_labels_in_all_forms(model, right):
    x, y = right
    attack = ART("BasicIterativeMethod", **PGD, **RANGE)
    expected = attack(model, x, y)
    for labels in (y[:, None], keras.utils.to_categorical(y, 10), y.astype("float32")):
        np.testing.assert_array_equal(attack(model, x, labels), expected)


@pytest.mark.parametrize("name", ["ProjectedGradientDescent", "SquareAttack"])
def test_wrapper_and_plain_model_alike(model, right, name):
    x, y = right
    wrapped = AdversarialRegularization(model)
    kwargs = {"num_random_init": 1} if name == "ProjectedGradientDescent" else {}
    attack = ART(name, eps=0.1, max_iter=5, **kwargs, **RANGE)
    found = []
    for target, data in [
        (model, (x, y)),
        (wrapped, (x, y)),
        (wrapped, ({"image": x, "label": y},)),
    ]:
        keras.utils.set_random_seed(3)
        found.append(attack(target, *data))
    np.testing.assert_array_equal(found[0], found[1])
    assert list(found[2]) == ["image"]
    np.testing.assert_array_equal(found[0], found[2]["image"])
    assert np.any(found[0] != x)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ProjectedGradientDescent", PGD),
        ("AutoProjectedGradientDescent", {**APGD, "loss_type": "cross_entropy"}),
        ("DeepFool", {"max_iter": 20, "epsilon": 0.02}),
        ("NewtonFool", {"max_iter": 5}),
    ],
)
def test_probabilities_and_logits_alike(model, digits, right, name, kwargs):
    probable = keras.Sequential([model, layers.Softmax()])
    x, y = right
    results = []
    for target in (model, probable):
        keras.utils.set_random_seed(0)
        results.append(ART(name, **kwargs, **RANGE)(target, x, y))
    found = [accuracy(model, result, y) for result in results]
    assert abs(found[0] - found[1]) <= 1 / 16
    assert np.mean(np.abs(results[0] - results[1])) < 0.01


def test_functional_subclassed_and_unbuilt_models():
    x, y = rows(12, 6), np.arange(12) % 3
    inputs = keras.Input((6,), name="x")
    outputs = layers.Dense(3)(layers.Dense(8, "tanh")(inputs))
    attack = ART("FastGradientMethod", eps=3.0)
    for target, given in [
        (keras.Model(inputs, outputs), x),
        (keras.Model({"x": inputs}, outputs), {"x": x}),
        (Subclassed(), x),
        (Subclassed(), [x]),
        (keras.Sequential([layers.Dense(8, "tanh"), layers.Dense(3)]), x),
    ]:
        perturbed = attack(target, given, y)
        keras.tree.assert_same_structure(perturbed, given)
        (perturbed,) = keras.tree.flatten(perturbed)
        moved = np.any(perturbed != x, axis=1)
        assert moved.any()
        np.testing.assert_array_equal(
            moved, np.argmax(np.asarray(target(given)), axis=1) == y
        )


def test_rows_with_known_importance():
    x = rows(12, 6)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    y = predicted(model, x)
    attack = ART("LowProFool", importance=np.ones(6) / 6, n_steps=50, eta=1.0)
    assert accuracy(model, attack(model, x, y), y) < 0.3
    refused(model, x, y, "No feature importance vector", name="LowProFool")


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize(
    "name", ["ProjectedGradientDescent", "DeepFool", "SaliencyMapMethod", "HopSkipJump"]
)
def test_binary_models_with_a_single_score(activation, name):
    x = rows(16, 6)
    y = (x[:, 0] > x[:, 1]).astype("int32")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1, activation)])
    kernel = np.array([[3.0], [-3.0], [0.0], [0.0], [0.0], [0.0]])
    model.layers[0].set_weights([kernel, np.zeros(1)])
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=activation is None))
    threshold = 0.5 if activation else 0.0

    def correct(x):
        return np.mean((np.asarray(model(x))[:, 0] > threshold) == y)

    assert correct(x) == 1.0
    small = {"max_iter": 1, "max_eval": 50, "init_eval": 10}
    kwargs = {
        "ProjectedGradientDescent": {"eps": 2.0, "eps_step": 0.5, "max_iter": 10},
        "DeepFool": {"epsilon": 0.1},
        "SaliencyMapMethod": {"theta": 1.0},
        "HopSkipJump": small,
    }[name]
    reach = {"clip_value_min": -5.0, "clip_value_max": 5.0}
    perturbed = ART(name, **kwargs, **reach)(model, x, y[:, None])
    assert correct(perturbed) < 0.3


def test_images_of_bytes_are_perturbed_as_floats(model, digits):
    x = np.round(digits.x_test[:16] * 255).astype("uint8")
    y = digits.y_test[:16]
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    scaled = layers.Rescaling(1 / 255)(inputs)
    target = keras.Model(inputs, model(scaled))
    attack = ART(
        "ProjectedGradientDescent",
        eps=50.5,
        eps_step=12.5,
        max_iter=8,
        clip_value_min=0.0,
        clip_value_max=255.0,
    )
    perturbed = attack(target, x, y)
    assert perturbed.dtype == "float32"
    assert accuracy(model, perturbed / 255, y) < 0.1
    assert np.any(perturbed != np.round(perturbed))


def test_gradients_that_are_missing_are_zero_and_others_go_on(model, right):
    inputs = keras.Input((8, 8, 1))
    x, y = right
    rounded = layers.Lambda(lambda x: ops.cast(ops.cast(x * 16, "int32"), "float32"))
    target = keras.Model(inputs, model(layers.Rescaling(1 / 16)(rounded(inputs))))
    np.testing.assert_array_equal(
        ART("BasicIterativeMethod", **PGD, **RANGE)(target, x, y), x
    )
    hop = ART("HopSkipJump", max_iter=1, max_eval=50, init_eval=10, **RANGE)
    assert accuracy(target, hop(target, x, y), y) < 0.3


def test_what_is_not_finite_and_padding_stay():
    model = keras.Sequential(
        [
            keras.Input((5, 2)),
            layers.Masking(),
            layers.SimpleRNN(4),
            layers.Dense(3),
        ]
    )
    x = rows(8, 5, 2)
    x[:, 3:] = 0.0
    y = np.argmax(np.asarray(model(x)), axis=1)
    attack = ART("ProjectedGradientDescent", num_random_init=1, max_iter=3)
    perturbed = attack(model, x, y)
    np.testing.assert_array_equal(perturbed[:, 3:], 0.0)
    assert np.all(perturbed[:, :3] != x[:, :3])


def test_ranges_of_arrays(model, right):
    low, high = np.zeros((8, 8, 1)), np.ones((1, 8, 8, 1))
    high[:, :, :4] = 0.25
    x = np.minimum(right[0], high).astype("float32")
    y = predicted(model, x)
    attack = ART(
        "ProjectedGradientDescent", eps=0.3, clip_value_min=low, clip_value_max=high
    )
    moved = attack(model, x, y)
    assert moved[:, :, :4].max() == 0.25
    assert moved[:, :, 4:].max() == 1.0
    assert moved.min() == 0.0
    high = np.ones((len(x), 8, 8, 1))
    attack = ART("DeepFool", clip_value_min=low, clip_value_max=high)
    with pytest.raises(ValueError, match="`clip_value_max` must be the same for all"):
        attack(model, x, y)


def test_memory_stays_that_of_a_batch(model, right, monkeypatch):
    x, y = right
    sizes = []
    classifier = estimators.estimator_class()

    def predict(self, x, *args, _predict=classifier.predict, **kwargs):
        sizes.append(len(x))
        return _predict(self, x, *args, **kwargs)

    monkeypatch.setattr(classifier, "predict", predict)
    ART("SquareAttack", eps=0.1, max_iter=3, **RANGE)(model, x, y, batch_size=4)
    assert max(sizes) == 4
    sizes.clear()
    # These see all at once, and the model still does not.
    seen = []
    outputs = bridge.TargetModel.outputs

    def watched(self, features):
        seen.append(features.shape[0])
        return outputs(self, features)

    monkeypatch.setattr(bridge.TargetModel, "outputs", watched)
    fresh = keras.Sequential([model])
    fresh.compile(loss=loss(), run_eagerly=True)
    ART("SpatialTransformation", max_rotation=20.0, num_rotations=3, **RANGE)(
        fresh, x, y, batch_size=4
    )
    assert max(sizes) == 16
    assert max(seen[1:]) == 4  # The first look is at up to 32, at the form of outputs.


def test_batch_size_is_passed_on_unless_given(model, right, monkeypatch):
    x, y = right
    deepfool = estimators.evasion().DeepFool
    made = []

    def generate(self, x, y=None):
        made.append((self.batch_size, len(x), self.verbose))
        return x

    monkeypatch.setattr(deepfool, "generate", generate)
    ART("DeepFool", **RANGE)(model, x, y, batch_size=6)
    assert made == [(6, 6, False), (6, 6, False), (6, 4, False)]
    made.clear()
    ART("DeepFool", batch_size=2, **RANGE)(model, x, y)
    assert made == [(2, 16, False)]


def test_same_seed_same_result(model, right):
    attack = ART("ProjectedGradientDescent", **PGD, num_random_init=1, **RANGE)
    found = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        found.append(attack(model, *right))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


def test_nothing_of_the_model_changes(model, right):
    x, y = right
    before = [np.array(weight) for weight in model.weights]
    ART("CarliniL2Method", max_iter=2, **RANGE)(model, x, y)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_a_class_of_art_is_taken_as_well_as_its_name(model, right):
    evasion = importlib.import_module("art.attacks.evasion")
    by_class = ART(evasion.FastGradientMethod, eps=0.1, **RANGE)
    by_name = ART("FastGradientMethod", eps=0.1, **RANGE)
    np.testing.assert_array_equal(by_class(model, *right), by_name(model, *right))
    assert by_class.name == by_name.name == "ART FastGradientMethod"


@pytest.mark.parametrize(
    ("name", "epsilon", "norm", "iterations"),
    [
        ("ProjectedGradientDescent", 0.3, NormType.INFINITY, 100),
        ("FastGradientMethod", 0.3, NormType.INFINITY, None),
        ("BasicIterativeMethod", 0.3, NormType.INFINITY, 100),
        ("VirtualAdversarialMethod", 0.1, NormType.L2, 10),
        ("Wasserstein", 0.3, None, 400),
        ("CarliniL2Method", None, None, 10),
        ("DeepFool", None, None, 100),
        ("HopSkipJump", None, NormType.L2, 50),
    ],
)
def test_what_evaluation_reads(name, epsilon, norm, iterations):
    attack = ART(name, **RANGE)
    assert attack.name == f"ART {name}"
    assert attack.epsilon == epsilon
    assert attack.norm is norm
    assert attack.iterations_per_start == iterations
    assert attack.targeted is False
    assert (attack.clip_value_min, attack.clip_value_max) == (0.0, 1.0)
    assert attack.from_logits is None


def test_targeted_is_false_unless_given(model, right):
    # Where ART's default is `True`, true labels would be targets that are reached.
    assert not ART("BoundaryAttack", **RANGE).targeted
    assert ART("BoundaryAttack", targeted=True, **RANGE).targeted
    made = ART("BoundaryAttack", **RANGE)
    assert "targeted=True" not in repr(made)


def test_with_epsilon_scales_the_step_along():
    attack = ART("ProjectedGradientDescent", eps=0.2, eps_step=0.05, **RANGE)
    other = attack.with_epsilon(0.4)
    assert other.epsilon == 0.4
    assert "eps_step=0.1" in repr(other)
    assert (attack.epsilon, other.clip_value_max) == (0.2, 1.0)
    # ART's default step of 0.1 belongs to its default radius of 0.3.
    default = ART("ProjectedGradientDescent").with_epsilon(0.03)
    assert default._value("eps_step") == pytest.approx(0.01)
    assert "eps_step" not in repr(ART("SquareAttack", **RANGE).with_epsilon(0.1))
    numpy = ART("ProjectedGradientDescent").with_epsilon(np.float32(0.5))
    assert numpy.epsilon == 0.5


def test_with_epsilon_of_zero_moves_nothing(model, right):
    attack = ART("ProjectedGradientDescent", **PGD, **RANGE).with_epsilon(0.0)
    np.testing.assert_array_equal(attack(model, *right), right[0])
    with pytest.raises(ValueError, match="cannot be scaled to another radius"):
        attack.with_epsilon(0.1)


def test_with_epsilon_refuses():
    with pytest.raises(
        ValueError, match=r"has no radius `eps`.*Received: epsilon=0\.1"
    ):
        ART("DeepFool").with_epsilon(0.1)
    with pytest.raises(ValueError, match="`epsilon` must be finite and not negative"):
        ART("FastGradientMethod").with_epsilon(-1.0)


@pytest.mark.parametrize(
    ("attack", "kwargs", "error", "message"),
    [
        ("NoSuch", {}, ValueError, "`attack` must be the name of a class.*'NoSuch'"),
        ("DeepFol", {}, ValueError, "Did you mean 'DeepFool'"),
        (3, {}, TypeError, "`attack` must be a class.*Received: 3"),
        (keras.Model, {}, TypeError, "`attack` must be a class.*Model"),
        ("DeepFool", {"steps": 3}, TypeError, "`steps`.*ART's DeepFool.*nb_grads"),
        ("DeepFool", {"maxiter": 3}, TypeError, "Did you mean 'max_iter'"),
        ("LaserAttack", {}, TypeError, "must be given `iterations`"),
        ("DecisionTreeAttack", {}, ValueError, "needs a ScikitlearnDecisionTree"),
        ("HighConfidenceLowUncertainty", {}, ValueError, "needs a GPyGaussian"),
        ("AdversarialPatch", {}, ValueError, "must perturb each example"),
        ("AdversarialPatchTensorFlowV2", {}, ValueError, "must perturb each example"),
        ("DPatch", {}, ValueError, "needs a ObjectDetectorMixin"),
        ("FeatureAdversariesTensorFlowV2", {}, ValueError, "imitates other images"),
        ("GeoDA", {}, ValueError, "must run with NumPy 2.*Use HopSkipJump.*: GeoDA"),
        ("ProjectedGradientDescentPyTorch", {}, ValueError, "for PyTorch"),
        ("SquareAttack", {}, ValueError, "needs the range of the data"),
        ("FastGradientMethod", {"eps": -1}, ValueError, "`eps` must be finite and not"),
        ("DeepFool", {"clip_value_min": 0.0}, ValueError, "must be given together"),
        (
            "DeepFool",
            {"clip_value_min": 1.0, "clip_value_max": 0.0},
            ValueError,
            "must not be above",
        ),
        (
            "FastGradientMethod",
            {"eps": 2.0, **RANGE},
            ValueError,
            "`eps` must not be larger than the range.*Received: 2",
        ),
        ("CarliniL2Method", {"targeted": 1}, TypeError, "`targeted` must be a bool"),
        ("CarliniL2Method", {"from_logits": 1}, TypeError, "`from_logits` must be"),
        (
            "AutoAttack",
            {"parallel_pool_size": 2, **RANGE},
            ValueError,
            "`parallel_pool_size` must be 0",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(attack, kwargs, error, message):
    with pytest.raises(error, match=message):
        ART(attack, **kwargs)


def test_attacks_that_give_no_examples_are_refused():
    poisoning = importlib.import_module("art.attacks.poisoning")
    extraction = importlib.import_module("art.attacks.extraction")
    for attack in (poisoning.PoisoningAttackBackdoor, extraction.CopycatCNN):
        with pytest.raises(TypeError, match="other attacks of ART give no adversarial"):
            ART(attack)


def refused(
    model, x, y, message, error=ValueError, name="FastGradientMethod", **kwargs
):
    with pytest.raises(error, match=message):
        ART(name, **kwargs)(model, x, y)


def test_models_that_do_not_fit(model, right):
    x, y = right
    inputs = [keras.Input((2,), name="a"), keras.Input((4,), name="b")]
    joined = layers.Dense(3)(layers.Concatenate()(inputs))
    two = keras.Model(dict(zip("ab", inputs, strict=True)), joined)
    features = {"a": rows(4, 2), "b": rows(4, 4)}
    labels = np.arange(4) % 3
    refused(two, features, labels, "must have one input.*Received 2 inputs")
    refused(regularized(two), features, labels, "must have one input")
    refused(two_outputs(), rows(4, 6), labels, "must have one output")
    refused(lambda x: x, x, y, "must be a Keras 3 model", TypeError)
    regression = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    regression.compile("sgd", "mse")
    refused(regression, rows(4, 6), rows(4, 1), "must be a classifier.*'mse'")
    fixed = keras.Sequential([keras.Input((6,), batch_size=4), layers.Dense(3)])
    refused(fixed, rows(4, 6), labels, "batches of any size.*batches of 4")
    embedding = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(5, 3), layers.Flatten()]
    )
    embedding.add(layers.Dense(3))
    refused(embedding, np.ones((4, 6), "int32"), labels, "`x` must be floats")


def test_data_that_do_not_fit(model, right):
    x, y = right
    refused(model, x, None, "Labels are missing")
    refused(model, x, y[:3], "same number of examples. Received: 16 and 3")
    refused(model, x[:0], y[:0], "`x` must hold examples")
    refused(model, x, y + 10, "`y` must hold classes from 0 to 9")
    refused(model, 2 * x, y, "`x` must lie in the clip range", **RANGE)
    refused(
        model, x, y, "`epsilon` must not be larger than", eps=100.0, norm="l2", **RANGE
    )
    with pytest.raises(TypeError, match="`batch_size` must be an integer"):
        ART("DeepFool")(model, x, y, batch_size=1.5)


def test_what_art_refuses_is_said_with_the_attack(model, right):
    x, y = right
    refused(
        model,
        x,
        y,
        "ART ProjectedGradientDescent does not run.*ART says: ValueError.*max_iter=-1",
        name="ProjectedGradientDescent",
        max_iter=-1,
    )
    flat = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    labels = np.argmax(np.asarray(flat(rows(4, 6))), axis=1)
    wide = {"clip_value_min": -9.0, "clip_value_max": 9.0}
    refused(
        flat,
        rows(4, 6),
        labels,
        "only be applied to image",
        name="SquareAttack",
        **wide,
    )


def test_the_difference_of_logits_needs_three_classes():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x, y = rows(4, 6), np.zeros(4, int)
    apgd = {"loss_type": "difference_logits_ratio"}
    name = "AutoProjectedGradientDescent"
    refused(model, x, y, "needs 3 classes at least", name=name, **apgd)


def test_outputs_of_another_shape_are_refused(model, right, monkeypatch):
    x, y = right
    method = estimators.evasion().FastGradientMethod
    monkeypatch.setattr(method, "generate", lambda self, x, y=None: x[:, :3])
    refused(model, x, y, "must give a perturbed input for each example")


def test_values_that_are_not_finite_do_not_come_back(model, right, monkeypatch):
    x, y = right
    method = estimators.evasion().FastGradientMethod
    monkeypatch.setattr(method, "generate", lambda self, x, y=None: x * np.nan + x / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(ART("FastGradientMethod")(model, x, y), x)


def test_from_logits_is_heeded(model, right):
    x, y = right
    refused(model, x, y, "`from_logits=False` says", from_logits=False)
    perturbed = ART("FastGradientMethod", eps=0.3, from_logits=True)(model, x, y)
    assert accuracy(model, perturbed, y) < 0.3


def test_bars_only_where_asked_for(model, right, capfd):
    x, y = right
    for name, kwargs in [
        ("ProjectedGradientDescent", PGD),
        ("AutoAttack", {"eps": 0.3, "eps_step": 0.1}),
    ]:
        ART(name, **kwargs, **RANGE)(model, x, y)
    assert "it/s" not in "".join(capfd.readouterr())
    ART("ProjectedGradientDescent", verbose=True, **PGD, **RANGE)(model, x, y)
    assert "PGD" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("missing", "name", "kwargs"),
    [
        ("art", "DeepFool", {}),
        ("multiprocess", "AutoAttack", {}),
        ("cma", "ThresholdAttack", {"th": 80}),
    ],
)
def test_the_extra_is_named_where_it_is_missing(
    model, right, missing, name, kwargs, monkeypatch
):
    estimators.evasion.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.attacks.evasion", None)
    try:
        with pytest.raises(ImportError, match=r"belongs to the extra 'attacks'"):
            ART(name, **kwargs, **RANGE)(model, *right)
    finally:
        estimators.evasion.cache_clear()


@pytest.mark.slow
def test_art_is_imported_where_it_is_needed_and_without_a_warning():
    code = (
        "import sys; from advreg.attacks import ART\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('art', 'cma')])\n"
        "print(ART('DeepFool'), 'art' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error:PyTorch", "-c", code],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "[]\nART(DeepFool) True\n"
