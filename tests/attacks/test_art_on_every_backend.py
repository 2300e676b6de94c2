"""ART's attacks on each backend of Keras: they run, agree, and explain themselves."""

import importlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers.models import rows
from keras import layers, ops

from advreg import AdversarialRegularization
from advreg.attacks import ART, FGSM, PGD
from advreg.attacks.art import estimators

pytestmark = pytest.mark.every_backend(tensorflow="slow")
pytest.importorskip("art", reason="ART is not installed (extra 'attacks')")

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
STEPS = {"eps": 0.25, "eps_step": 0.05, "max_iter": 8}
CARLINI = {"initial_const": 1.0, "max_iter": 5, "binary_search_steps": 3}
HOP = {"max_iter": 1, "max_eval": 50, "init_eval": 10}


def drawn(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_weights(model, seed=0):
    """The model with weights that are the same on each backend."""
    model.set_weights(
        [
            drawn(*weight.shape, seed=seed + i) / np.sqrt(max(weight.shape[0], 2))
            for i, weight in enumerate(model.weights)
        ]
    )
    return model


def network(last=None, columns=4):
    """A small network for images."""
    return with_weights(
        keras.Sequential(
            [
                keras.Input((4, 4, 1)),
                layers.Rescaling(4.0, -2.0),
                layers.Flatten(),
                layers.Dense(24, "tanh"),
                layers.Dense(columns, last),
            ]
        )
    )


def images(count=16):
    return np.random.default_rng(1).uniform(size=(count, 4, 4, 1)).astype("float32")


def scores(model, x):
    return ops.convert_to_numpy(model(x, training=False))


def predicted(model, x):
    found = scores(model, x)
    return found.argmax(1) if found.shape[1] > 1 else (found[:, 0] > 0).astype(int)


def accuracy(model, x, y):
    return np.mean(predicted(model, x) == y)


@pytest.fixture(scope="module")
def model():
    return network()


# Each attack, and the accuracy that it leaves at most of 1.
ATTACKS = [
    ("FastGradientMethod", {"eps": 0.2}, 0.3),
    ("FastGradientMethod", {"eps": 0.3, "eps_step": 0.05, "minimal": True}, 0.1),
    ("BasicIterativeMethod", STEPS, 0.5),
    ("ProjectedGradientDescent", {**STEPS, "num_random_init": 1}, 0.5),
    ("ProjectedGradientDescent", {**STEPS, "eps": 1.0, "norm": "l2"}, 0.5),
    ("ProjectedGradientDescent", {**STEPS, "decay": 0.5}, 0.5),
    ("ProjectedGradientDescentNumpy", STEPS, 0.5),
    ("MomentumIterativeMethod", STEPS, 0.5),
    ("AutoProjectedGradientDescent", STEPS, 0.5),
    ("AutoProjectedGradientDescent", {**STEPS, "loss_type": "cross_entropy"}, 0.5),
    (
        "AutoProjectedGradientDescent",
        {**STEPS, "loss_type": "difference_logits_ratio"},
        0.5,
    ),
    ("AutoConjugateGradient", {**STEPS, "loss_type": "cross_entropy"}, 0.5),
    ("RescalingAutoConjugateGradient", STEPS, 0.5),
    ("AutoAttack", {"eps": 0.3, "eps_step": 0.1}, 0.3),
    ("CarliniL2Method", CARLINI, 0.5),
    (
        "CarliniLInfMethod",
        {
            "learning_rate": 0.05,
            "initial_const": 0.1,
            "largest_const": 1.0,
            "max_iter": 4,
        },
        0.9,
    ),
    (
        "CarliniL0Method",
        {"max_iter": 2, "binary_search_steps": 2, "initial_const": 1.0},
        0.5,
    ),
    (
        "ElasticNet",
        {"max_iter": 8, "initial_const": 1.0, "binary_search_steps": 3},
        0.5,
    ),
    ("DeepFool", {"max_iter": 10, "epsilon": 0.02, "nb_grads": 4}, 0.1),
    ("NewtonFool", {"max_iter": 10, "eta": 0.1}, 0.5),
    ("SaliencyMapMethod", {"theta": 0.5}, 0.5),
    ("VirtualAdversarialMethod", {"eps": 1.5, "max_iter": 1, "finite_diff": 0.01}, 0.8),
    ("Wasserstein", {"max_iter": 2, "regularization": 100.0}, 0.8),
    ("UniversalPerturbation", {"eps": 0.6, "max_iter": 5, "attacker": "fgsm"}, 0.8),
    (
        "TargetedUniversalPerturbation",
        {"eps": 0.9, "attacker_params": {"eps": 0.5, "targeted": True}},
        0.9,
    ),
    (
        "SpatialTransformation",
        {"max_translation": 30.0, "num_translations": 3, "num_rotations": 1},
        0.9,
    ),
    ("SquareAttack", {"eps": 0.3, "max_iter": 40, "p_init": 0.3}, 0.7),
    ("SimBA", {"max_iter": 30, "epsilon": 0.5, "attack": "px"}, 0.5),
    (
        "ZooAttack",
        {
            "use_resize": False,
            "use_importance": False,
            "nb_parallel": 8,
            "learning_rate": 0.3,
            "initial_const": 1.0,
            "binary_search_steps": 1,
        },
        1.0,
    ),
    ("HopSkipJump", HOP, 0.1),
    ("BoundaryAttack", {"max_iter": 2}, 0.1),
    ("SignOPTAttack", {"max_iter": 1, "num_trial": 5, "k": 5}, 0.8),
    ("PixelAttack", {"th": 5, "max_iter": 3}, 0.8),
    ("ThresholdAttack", {"th": 80, "max_iter": 3, "es": 1}, 0.8),
    ("FrameSaliencyAttack", {"attacker": ART("FastGradientMethod", eps=0.2)}, 0.7),
]


@pytest.mark.parametrize(("name", "kwargs", "left"), ATTACKS)
def test_an_attack_runs_and_fools(model, name, kwargs, left, capfd):
    x = images(8)
    y = predicted(model, x)
    given = x.copy()
    # Batches of 7 and 1: the padding that JAX needs must not come back.
    perturbed = ART(name, **RANGE, **kwargs)(model, x, y, batch_size=7)
    assert isinstance(perturbed, np.ndarray)
    assert (perturbed.shape, perturbed.dtype) == (x.shape, x.dtype)
    assert perturbed.min() >= 0.0
    assert perturbed.max() <= 1.0
    assert accuracy(model, perturbed, y) <= left
    np.testing.assert_array_equal(x, given)
    assert capfd.readouterr().out == ""


# Those whose results gradients and seeded random numbers decide.

GRADIENT_ATTACKS = [
    ("FastGradientMethod", {"eps": 0.1}),
    ("FastGradientMethod", {"eps": 0.5, "norm": "l2"}),
    ("BasicIterativeMethod", STEPS),
    ("ProjectedGradientDescent", STEPS),
    ("ProjectedGradientDescent", {**STEPS, "decay": 1.0}),
    ("ProjectedGradientDescent", {**STEPS, "num_random_init": 2}),
    ("AutoProjectedGradientDescent", STEPS),
    ("AutoProjectedGradientDescent", {**STEPS, "loss_type": "cross_entropy"}),
    ("CarliniL2Method", CARLINI),
    ("DeepFool", {"max_iter": 10, "epsilon": 0.02, "nb_grads": 4}),
    ("ElasticNet", {"max_iter": 8, "initial_const": 1.0, "binary_search_steps": 3}),
    ("NewtonFool", {"max_iter": 10, "eta": 0.1}),
]


def numpy_classifier(model):
    """A classifier of ART's own, of NumPy in float64, with the weights of `network`."""
    estimators.evasion()
    classification = importlib.import_module("art.estimators.classification.classifier")
    estimator = importlib.import_module("art.estimators")
    hidden, shift, kernel, bias = (
        ops.convert_to_numpy(weight).astype("float64") for weight in model.weights
    )

    class Judge(
        classification.ClassGradientsMixin,
        classification.ClassifierMixin,
        estimator.LossGradientsMixin,
        estimator.NeuralNetworkMixin,
        estimator.BaseEstimator,
    ):
        input_shape = (4, 4, 1)
        probabilities = False

        def units(self, x):
            return np.tanh((4.0 * x - 2.0).reshape(len(x), -1) @ hidden + shift)

        def logits(self, x):
            return self.units(x) @ kernel + bias

        def predict(self, x, *_, **__):
            found = self.logits(x)
            return (softmax(found) if self.probabilities else found).astype("float32")

        def pulled(self, x, upstream):
            """The gradient of `upstream` times the logits."""
            slope = ((upstream @ kernel.T) * (1 - self.units(x) ** 2)) @ hidden.T
            return 4.0 * slope.reshape(x.shape).astype("float32")

        def class_gradient(self, x, label=None, **_):
            count = kernel.shape[1]
            found = []
            for column in range(count) if label is None else [label]:
                upstream = np.eye(count)[np.broadcast_to(column, len(x))]
                if self.probabilities:
                    p = softmax(self.logits(x))
                    own = (p * upstream).sum(1, keepdims=True)
                    upstream = own * (upstream - p)
                found.append(self.pulled(x, upstream))
            return np.stack(found, axis=1)

        def loss_gradient(self, x, y, **_):
            return self.pulled(x, softmax(self.logits(x)) - y)

        def compute_loss(self, x, y, reduction="none", **_):
            assert reduction == "none"
            return -np.log((softmax(self.logits(x)) * y).sum(1)).astype("float32")

        def fit(self, x, y, **_):
            raise NotImplementedError

        def get_activations(self, x, *_, **__):
            raise NotImplementedError

    judge = Judge(model=None, clip_values=(0.0, 1.0), channels_first=False)
    judge.nb_classes = kernel.shape[1]
    return judge


def softmax(values):
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(("name", "kwargs"), GRADIENT_ATTACKS)
def test_art_on_numpy_finds_the_same(model, name, kwargs):
    """So all backends agree, because each agrees with this one."""
    x = images()
    y = predicted(model, x)
    judge = numpy_classifier(model)
    judge.probabilities = name == "NewtonFool"
    orders = {"l2": 2}
    given = {key: orders.get(value, value) for key, value in kwargs.items()}
    given.pop("loss_type", None)  # Its own loss is the cross-entropy.
    keras.utils.set_random_seed(0)
    evasion = estimators.evasion()
    if name != "FastGradientMethod":  # It has no bar.
        given["verbose"] = False
    attack = getattr(evasion, name)(judge, batch_size=32, **given)
    expected = attack.generate(x, np.eye(4, dtype="float32")[y])
    keras.utils.set_random_seed(0)
    found = ART(name, **RANGE, **kwargs)(model, x, y)
    np.testing.assert_array_equal(predicted(model, found), predicted(model, expected))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_art_is_no_weaker_than_our_attacks(model):
    x = images(48)
    y = predicted(model, x)
    step = {"clip_value_min": 0.0, "clip_value_max": 1.0}
    ours = FGSM(0.1, **step)(model, x, y)
    theirs = ART("FastGradientMethod", eps=0.1, **RANGE)(model, x, y)
    assert 0 < accuracy(model, theirs, y) == accuracy(model, ours, y) < 1
    pgd = PGD(0.25, step_size=0.05, iterations=8, random_init=False, **step)
    theirs = ART("ProjectedGradientDescent", **STEPS, **RANGE)(model, x, y)
    assert accuracy(model, theirs, y) <= accuracy(model, pgd(model, x, y), y) + 1 / 48


@pytest.mark.parametrize("last", [None, "softmax"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ProjectedGradientDescent", STEPS),
        ("AutoProjectedGradientDescent", {**STEPS, "loss_type": "cross_entropy"}),
        ("DeepFool", {"max_iter": 10, "epsilon": 0.02, "nb_grads": 4}),
        ("CarliniL2Method", CARLINI),
        ("NewtonFool", {"max_iter": 5}),
        ("HopSkipJump", HOP),
    ],
)
def test_logits_and_probabilities(name, kwargs, last):
    x = images(8)
    y = predicted(network(), x)
    found = ART(name, **RANGE, **kwargs)(network(last), x, y)
    if name == "HopSkipJump":  # It draws numbers of its own, without a seed.
        assert accuracy(network(), found, y) < 0.2
        return
    keras.utils.set_random_seed(0)
    expected = ART(name, **RANGE, **kwargs)(network(), x, y)
    keras.utils.set_random_seed(0)
    found = ART(name, **RANGE, **kwargs)(network(last), x, y)
    assert np.any(found != x)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ProjectedGradientDescent", {"eps": 2.0, "eps_step": 0.5, "max_iter": 10}),
        ("AutoProjectedGradientDescent", {"eps": 2.0, "eps_step": 0.5, "max_iter": 5}),
        ("DeepFool", {"epsilon": 0.1}),
        ("SaliencyMapMethod", {"theta": 1.0}),
        ("HopSkipJump", HOP),
    ],
)
def test_a_single_score(activation, name, kwargs):
    x = rows(12, 6)
    y = (x[:, 0] > x[:, 1]).astype("int32")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1, activation)])
    kernel = np.array([[3.0], [-3.0], [0.0], [0.0], [0.0], [0.0]])
    model.set_weights([kernel, np.zeros(1)])
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=activation is None))
    reach = {"clip_value_min": -5.0, "clip_value_max": 5.0}
    perturbed = ART(name, **kwargs, **reach)(model, x, y[:, None])
    fooled = (scores(model, perturbed)[:, 0] > (0.5 if activation else 0.0)) != y
    assert np.mean(fooled) > 0.7


def test_images_of_bytes():
    model = network()
    inputs = keras.Input((4, 4, 1), dtype="uint8")
    target = keras.Model(inputs, model(layers.Rescaling(1 / 255)(inputs)))
    x = np.round(images() * 255).astype("uint8")
    y = predicted(model, x / np.float32(255))
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
    assert np.any(perturbed != np.round(perturbed))
    assert (perturbed.min(), perturbed.max()) >= (0.0, 200.0)
    assert accuracy(model, perturbed / 255, y) < 0.2


def test_ranges_of_arrays(model):
    low, high = np.zeros((4, 4, 1)), np.ones((1, 4, 4, 1))
    high[:, :, :2] = 0.25
    x = np.minimum(images(), high).astype("float32")
    y = predicted(model, x)
    for name in ("ProjectedGradientDescent", "AutoProjectedGradientDescent"):
        attack = ART(name, eps=0.3, clip_value_min=low, clip_value_max=high, max_iter=5)
        moved = attack(model, x, y)
        assert moved[:, :, :2].max() == 0.25
        assert 0.25 < moved[:, :, 2:].max() <= 1.0
        assert moved.min() == 0.0


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ProjectedGradientDescent", {**STEPS, "eps": 0.5}),
        ("AutoProjectedGradientDescent", {**STEPS, "eps": 0.5}),
        (
            "AutoProjectedGradientDescent",
            {**STEPS, "eps": 0.5, "loss_type": "difference_logits_ratio"},
        ),
        ("CarliniL2Method", {"initial_const": 10.0, "max_iter": 5}),
        ("SaliencyMapMethod", {"theta": 0.5}),
        ("HopSkipJump", HOP),
    ],
)
def test_targets_are_reached(model, name, kwargs):
    x = images()
    y = predicted(model, x)
    targets = scores(model, x).argsort(1)[:, -2]
    attack = ART(name, targeted=True, **kwargs, **RANGE)
    assert accuracy(model, attack(model, x, targets), targets) > 0.6
    # What is there already stays.
    np.testing.assert_array_equal(attack(model, x, y), x)


def test_wrapped_models_and_structures(model):
    x = images()
    y = predicted(model, x)
    attack = ART("BasicIterativeMethod", **STEPS, **RANGE)
    expected = attack(model, x, y)
    wrapped = AdversarialRegularization(model)
    np.testing.assert_array_equal(attack(wrapped, x, y), expected)
    found = attack(wrapped, {"image": x, "label": y})
    assert list(found) == ["image"]
    np.testing.assert_array_equal(found["image"], expected)


def test_new_weights_are_seen():
    model, other = network(), with_weights(network(), seed=7)
    x = images()
    attack = ART("ProjectedGradientDescent", **STEPS, **RANGE)
    attack(model, x, predicted(model, x))
    model.set_weights(other.get_weights())
    y = predicted(model, x)
    np.testing.assert_array_equal(attack(model, x, y), attack(other, x, y))


def test_padding_stays():
    model = with_weights(
        keras.Sequential(
            [keras.Input((5, 2)), layers.Masking(), layers.LSTM(4), layers.Dense(3)]
        )
    )
    x = rows(6, 5, 2)
    x[:, 3:] = 0.0
    attack = ART("ProjectedGradientDescent", num_random_init=1, max_iter=3)
    perturbed = attack(model, x, predicted(model, x))
    np.testing.assert_array_equal(perturbed[:, 3:], 0.0)
    assert np.all(perturbed[:, :3] != x[:, :3])


class Constant(keras.Model):
    """Its scores do not depend on its inputs."""

    def __init__(self):
        super().__init__()
        self.bias = self.add_weight(shape=(4,), initializer="ones")

    def call(self, inputs):
        zeros = ops.zeros((ops.shape(inputs)[0], 4))
        return zeros + self.bias * np.float32([3, 2, 1, 0])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("FastGradientMethod", {"eps": 0.3}),
        ("BasicIterativeMethod", STEPS),
        ("ProjectedGradientDescent", {**STEPS, "decay": 1.0}),
        ("SaliencyMapMethod", {}),
        ("CarliniL2Method", {"max_iter": 2, "binary_search_steps": 2}),
        ("DeepFool", {"max_iter": 2, "nb_grads": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_outputs_that_do_not_depend_on_the_input(name, kwargs):
    x = images(4)
    found = ART(name, **kwargs, **RANGE)(Constant(), x, np.zeros(4, int))
    assert np.isfinite(found).all()
    if name not in ("SaliencyMapMethod", "DeepFool"):
        np.testing.assert_allclose(found, x, atol=1e-6)


def test_a_layer_that_rounds_has_no_gradient(model):
    inputs = keras.Input((4, 4, 1))
    rounded = layers.Lambda(lambda x: ops.cast(ops.cast(x * 16, "int32"), "float32"))
    target = keras.Model(inputs, model(layers.Rescaling(1 / 16)(rounded(inputs))))
    x = images(8)
    y = predicted(target, x)
    found = ART("BasicIterativeMethod", **STEPS, **RANGE)(target, x, y)
    np.testing.assert_array_equal(found, x)
    hop = ART("HopSkipJump", **HOP, **RANGE)
    assert accuracy(target, hop(target, x, y), y) < 0.3


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, IndexError, TypeError, ValueError]
)
def test_errors_of_art_are_explained(model, error, monkeypatch):
    def generate(self, x, y=None):
        raise error("no such thing.")

    method = estimators.evasion().FastGradientMethod
    monkeypatch.setattr(method, "generate", generate)
    x = images(4)
    with pytest.raises(
        ValueError,
        match=f"ART FastGradientMethod does not run.*{error.__name__}: no such thing",
    ):
        ART("FastGradientMethod", **RANGE)(model, x, predicted(model, x))


class Failing(keras.Model):
    """Breaks down once it is told to."""

    def __init__(self):
        super().__init__()
        self.dense, self.fails = layers.Dense(4), False

    def call(self, inputs):
        if self.fails:
            raise RuntimeError("Out of order.")
        return self.dense(ops.reshape(inputs, (-1, 16)))


def test_errors_of_the_model_are_its_own(monkeypatch):
    if keras.backend.backend() != "torch":
        pytest.skip("Only PyTorch raises errors of the types that ART raises")
    model, x = Failing(), images(4)
    y = predicted(model, x)

    def generate(self, x, y=None):
        model.fails = True
        return self.estimator.predict(x)

    method = estimators.evasion().FastGradientMethod
    monkeypatch.setattr(method, "generate", generate)
    with pytest.raises(RuntimeError, match="Out of order"):
        ART("FastGradientMethod", **RANGE)(model, x, y)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ShadowAttack", RANGE, "TensorFlow alone.*Use CarliniL2Method or ElasticNet"),
        (
            "ProjectedGradientDescentTensorFlowV2",
            {},
            r"TensorFlow alone\. Use ProjectedGradientDescent\. Received",
        ),
        (
            "MalwareGDTensorFlow",
            {"embedding_weights": np.zeros(1), "param_dic": {}},
            "TensorFlow alone.*no other attack on the bytes",
        ),
    ],
)
def test_what_needs_tensorflow_says_so(name, kwargs, message):
    if ON_TENSORFLOW:
        pytest.skip("It runs here")
    with pytest.raises(ValueError, match=message):
        ART(name, **kwargs)


def test_what_art_has_for_modules_of_pytorch_is_refused():
    with pytest.raises(ValueError, match=r"must work on Keras models.*for PyTorch"):
        ART("ProjectedGradientDescentPyTorch")


def test_the_difference_of_logits_needs_three_classes():
    model = network(columns=2)
    x = images(4)
    apgd = ART("AutoProjectedGradientDescent", loss_type="difference_logits_ratio")
    for attack in (apgd, ART("AutoAttack", **RANGE)):
        with pytest.raises(ValueError, match="needs 3 classes at least"):
            attack(model, x, predicted(model, x))


def test_art_is_imported_late_and_without_a_warning():
    code = (
        "import sys, advreg; from advreg.attacks import ART\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('art', 'cma')])\n"
        "print(ART('DeepFool'), 'art' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error:PyTorch", "-W", "error:TensorFlow", "-c", code],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "[]\nART(DeepFool) True\n", run.stderr
