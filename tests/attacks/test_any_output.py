"""Attacks on the compiled loss of models that give no class of each example."""

import keras
import numpy as np
import pytest
from helpers.backends import array, tensor
from keras import layers, ops

from advreg.attacks import APGD, FGSM, PGD, RandomNoise
from advreg.attacks.engine.target import TargetModel
from advreg.network.compiled_loss import CompiledLoss

pytestmark = pytest.mark.every_backend

RNG = np.random.default_rng(0)
EPSILON = 0.1
STEPS = [
    PGD(EPSILON, iterations=3, seed=0),
    PGD(EPSILON, iterations=2, restarts=2, norm="l2", seed=0),
    APGD(EPSILON, iterations=5, seed=0),
]


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def per_example(model, x, y):
    """By Keras, one example after the other."""
    rows = [
        keras.tree.map_structure(lambda a, i=i: a[i : i + 1], (x, y))
        for i in range(len(x))
    ]
    return np.array(
        [model.evaluate(*row, verbose=0, return_dict=True)["loss"] for row in rows]
    )


def pixels():
    """Three classes for each pixel, by a linear layer."""
    model = keras.Sequential([keras.Input((4, 5, 2)), layers.Dense(3)])
    model.set_weights([RNG.normal(size=(2, 3)), RNG.normal(size=3)])
    model.compile("sgd", cross_entropy(), metrics=["accuracy"])
    x = RNG.uniform(0, 1, (6, 4, 5, 2)).astype("float32")
    return model, x, RNG.integers(0, 3, (6, 4, 5))


def steps(mask=True):
    """Two classes for each step of a sequence, some of which are padding."""
    inputs = keras.Input((5, 2))
    hidden = layers.Masking()(inputs) if mask else inputs
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    model.set_weights([RNG.normal(size=(2, 2)), np.zeros(2)])
    model.compile("sgd", cross_entropy())
    x = RNG.uniform(0.5, 1, (6, 5, 2)).astype("float32")
    x[::2, 3:] = 0
    return model, x, RNG.integers(0, 2, (6, 5))


def fixed_batch():
    """As `steps`, for batches of 4 alone."""
    _, x, y = steps()
    inputs = keras.Input((5, 2), batch_size=4)
    model = keras.Model(inputs, layers.Dense(2)(layers.Masking()(inputs)))
    model.set_weights([RNG.normal(size=(2, 2)), np.zeros(2)])
    model.compile("sgd", cross_entropy())
    return model, x, y


def ignored_class(**kwargs):
    """Pixels, some of which have no class, and a second output."""
    inputs = keras.Input((4, 5, 2))
    outputs = [layers.Dense(3)(inputs), layers.Dense(1)(inputs)]
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)
    model.compile("sgd", [loss, "mse"])
    x = RNG.uniform(0, 1, (6, 4, 5, 2)).astype("float32")
    classes = RNG.integers(0, 3, (6, 4, 5))
    if "ignore_class" in kwargs:
        classes[:, 1:] = kwargs["ignore_class"]
    return model, x, [classes, RNG.normal(size=(6, 4, 5, 1))]


def one_loss_for_two_outputs():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(1)(inputs), layers.Dense(2)(inputs)])
    model.compile("sgd", "mse")
    x = RNG.normal(size=(6, 4)).astype("float32")
    return model, x, [RNG.normal(size=(6, 1)), RNG.normal(size=(6, 2))]


def two_outputs(named=True):
    inputs = keras.Input((4,))
    value = layers.Dense(1, name="value")(inputs)
    kind = layers.Dense(3, name="kind")(inputs)
    outputs = {"value": value, "kind": kind} if named else [value, kind]
    model = keras.Model(inputs, outputs)
    model.set_weights([RNG.normal(size=w.shape) for w in model.weights])
    losses, weights = (
        {"value": "mse", "kind": cross_entropy()},
        {"value": 0.5, "kind": 2.0},
    )
    y = {"value": RNG.normal(size=(6, 1)), "kind": RNG.integers(0, 3, 6)}
    if not named:
        losses, weights, y = (list(each.values()) for each in (losses, weights, y))
    model.compile("sgd", losses, loss_weights=weights)
    return model, RNG.normal(size=(6, 4)).astype("float32"), y


CASES = {
    "pixels": pixels,
    "steps": steps,
    "named outputs": two_outputs,
    "listed outputs": lambda: two_outputs(named=False),
    "an ignored class": lambda: ignored_class(ignore_class=255),
    "a sum": lambda: ignored_class(reduction="sum"),
    "one loss": one_loss_for_two_outputs,
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_each_example_is_that_of_keras(case):
    model, x, y = CASES[case]()
    target = TargetModel(model)
    features, labels = target.unpack((x, y))
    found = array(target.compiled_loss(labels, target.predictions(features)))
    np.testing.assert_allclose(found, per_example(model, x, y), rtol=1e-5)


def test_masks_of_a_fixed_batch_size_count():
    model, x, y = fixed_batch()
    free, _, _ = steps()
    free.set_weights(model.get_weights())
    for attack in (FGSM(EPSILON), *STEPS[:2]):
        np.testing.assert_allclose(
            attack(model, x, y, batch_size=4),
            attack(free, x, y, batch_size=4),
            atol=1e-6,
        )


def test_weights_of_parts_are_those_of_keras():
    model, x, y = steps()
    weights = RNG.integers(0, 3, (6, 5)).astype("float32")
    compiled = CompiledLoss(None, cross_entropy(), None, list)
    found = array(compiled.per_example(tensor(y), model(x), tensor(weights)))
    for row in range(6):
        part = slice(row, row + 1)
        expected = cross_entropy()(y[part], model(x[part]), weights[part])
        np.testing.assert_allclose(found[row], array(expected), rtol=1e-5)
    of_examples = weights.max(1)
    found = array(compiled.per_example(tensor(y), model(x), tensor(of_examples)))
    plain = array(compiled.per_example(tensor(y), model(x)))
    np.testing.assert_allclose(found, plain * of_examples, rtol=1e-5)


def test_each_pixel_moves_up_its_gradient():
    model, x, y = pixels()
    kernel, bias = model.get_weights()
    slopes = (softmax(x @ kernel + bias) - np.eye(3)[y]) @ kernel.T
    found = FGSM(EPSILON)(model, x, y)
    np.testing.assert_allclose(found, x + EPSILON * np.sign(slopes), atol=1e-6)
    found = FGSM(EPSILON, norm="l2")(model, x, y)
    lengths = np.sqrt((slopes**2).sum((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(found, x + EPSILON * slopes / lengths, atol=1e-6)


def test_padded_steps_stand_still():
    model, x, y = steps()
    for attack in (FGSM(EPSILON), *STEPS, RandomNoise(EPSILON, seed=0)):
        moved = attack(model, x, y)
        np.testing.assert_array_equal(moved[::2, 3:], 0)
        assert (np.abs(moved - x)[:, :3].max((1, 2)) > 0).all()
    # They are not counted either: the unpadded rest moves as it does alone.
    kernel, bias = model.get_weights()
    slopes = (softmax(x @ kernel + bias) - np.eye(2)[y]) @ kernel.T
    np.testing.assert_allclose(
        FGSM(EPSILON)(model, x, y)[::2, :3],
        (x + EPSILON * np.sign(slopes))[::2, :3],
        atol=1e-6,
    )


@pytest.mark.parametrize("case", ["named outputs", "listed outputs"])
def test_the_weighted_sum_of_all_outputs_is_climbed(case):
    model, x, y = CASES[case]()
    values, kinds = (y["value"], y["kind"]) if isinstance(y, dict) else y
    of_value, of_kind = (
        model.get_layer(name).get_weights() for name in ("value", "kind")
    )
    residual = x @ of_value[0] + of_value[1] - values
    slopes = 0.5 * 2 * residual @ of_value[0].T
    slopes += (
        2.0 * (softmax(x @ of_kind[0] + of_kind[1]) - np.eye(3)[kinds]) @ of_kind[0].T
    )
    found = FGSM(EPSILON)(model, x, y)
    np.testing.assert_allclose(found, x + EPSILON * np.sign(slopes), atol=1e-6)


def test_an_output_without_a_loss_does_not_count():
    model, x, y = two_outputs()
    model.compile("sgd", {"kind": cross_entropy()})
    alone = keras.Model(model.inputs, model.output["kind"])
    alone.compile("sgd", cross_entropy())
    found = FGSM(EPSILON)(model, x, {"kind": y["kind"]})
    expected = FGSM(EPSILON)(alone, x, y["kind"], early_stop=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("attack", STEPS, ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_grows(case, attack):
    model, x, y = CASES[case]()
    moved = attack(model, x, y)
    clean, found = per_example(model, x, y), per_example(model, moved, y)
    assert (found > clean).all()


class Wave(layers.Layer):
    def call(self, inputs):
        return ops.sin(25 * inputs)


@pytest.mark.parametrize(
    "attack", [FGSM(EPSILON), STEPS[0], RandomNoise(EPSILON, seed=0)]
)
def test_no_example_is_worse_for_the_attacker_than_the_clean_one(attack):
    """A step goes too far where the loss waves."""
    model = keras.Sequential([keras.Input((1,)), Wave()])
    model.compile("sgd", "mse")
    x = np.linspace(0, 1, 40, dtype="float32")[:, None]
    y = np.zeros((40, 1), "float32")
    moved = attack(model, x, y)
    clean, found = np.sin(25 * x) ** 2, np.sin(25 * moved) ** 2
    assert (found >= clean - 1e-6).all()
    stayed = (moved == x).ravel()
    assert 0 < stayed.sum() < 40
    assert (np.abs(moved - x)[~stayed] > 0).all()


def test_outputs_that_are_not_finite_are_the_worst():
    model = keras.Sequential([keras.Input((1,)), layers.Lambda(ops.log)])
    model.compile("sgd", "mse")
    x = np.float32([[0.05], [0.5]])
    moved = PGD(EPSILON, iterations=3, random_init=False)(
        model, x, np.float32([[9], [9]])
    )
    assert (moved[0] < 0).all()  # Where the logarithm is NaN.


class Noisy(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, inputs):
        noise = keras.random.normal(ops.shape(inputs), seed=self.seed_generator)
        return inputs + 0.3 * noise


def test_rows_of_a_random_model_are_not_compared():
    """Two of its losses differ by chance."""
    inputs = keras.Input((4,))
    hidden = Noisy()(inputs)
    model = keras.Model(inputs, [layers.Dense(1)(hidden), layers.Dense(1)(hidden)])
    model.compile("sgd", ["mse", "mse"])
    x = RNG.normal(size=(60, 4)).astype("float32")
    y = [RNG.normal(size=(60, 1)), RNG.normal(size=(60, 1))]
    moved = FGSM(0.02)(model, x, y)
    assert (np.abs(moved - x).max(1) > 0.01).all()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ({"kind": np.zeros(6, int), "vlue": np.zeros((6, 1))}, "the output value"),
        ({"kind": np.full(6, 3), "value": np.zeros((6, 1))}, "classes from 0 to 2"),
        ({"kind": np.zeros(6, int), "value": np.full((6, 1), np.nan)}, "finite"),
    ],
)
def test_labels_are_checked(y, message):
    model, x, _ = two_outputs()
    with pytest.raises(ValueError, match=message):
        FGSM(EPSILON)(model, x, y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([np.zeros((6, 1))], "labels for each of the 2 outputs"),
        (np.zeros((6, 1)), "labels for each of the 2 outputs"),
    ],
)
def test_labels_are_for_each_output(y, message):
    model, x, _ = two_outputs(named=False)
    with pytest.raises(ValueError, match=message):
        FGSM(EPSILON)(model, x, y)


@pytest.mark.parametrize("case", ["pixels", "listed outputs"])
def test_without_a_loss_there_is_nothing_to_climb(case):
    model, x, y = CASES[case]()
    plain = keras.Model(model.inputs, model.outputs)
    with pytest.raises(ValueError, match=r"no class scores.*`model.compile\(loss="):
        FGSM(EPSILON)(plain, x, y)
