"""Data in every form that `fit` takes, on each backend of Keras."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import advreg
from advreg import attacks
from advreg.backend.batches import map_dataset

pytestmark = pytest.mark.every_backend(tensorflow="slow")

BACKEND = keras.backend.backend()
RANDOM = np.random.default_rng(0)
X = RANDOM.random((24, 6)).astype("float32")
Y = (X.sum(axis=1) > 3).astype("int64")
WEIGHTS = RANDOM.random(24).astype("float32")
BATCHES = [slice(start, start + 8) for start in (0, 8, 16)]
# Keras shuffles arrays only, and says so of other data.
IN_ORDER = {"epochs": 2, "shuffle": False, "verbose": 0}


class Batches(keras.utils.PyDataset):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return keras.tree.map_structure(lambda part: part[BATCHES[index]], self.parts)


def wrapped(base=None, config=None, sample_weight_key=None, **arguments):
    keras.utils.set_random_seed(1)
    if base is None:
        base = keras.Sequential(
            [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(2)]
        )
    model = advreg.AdversarialRegularization(
        base,
        config or advreg.make_adv_reg_config(multiplier=0.5, adv_step_size=0.05),
        label_keys=["label"],
        sample_weight_key=sample_weight_key,
    )
    arguments = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        **arguments,
    }
    model.compile("sgd", **arguments)
    return model


def losses(data, model=None, **arguments):
    """Trains a model in order, and returns the losses of its epochs."""
    model = wrapped() if model is None else model
    history = model.fit(*data, **{**IN_ORDER, **arguments}).history
    assert np.isfinite(history["scaled_adversarial_loss"]).all()
    return history["loss"]


@pytest.fixture(scope="module")
def expected():
    return losses((X, Y), batch_size=8)


def generator(parts):
    while True:
        for rows in BATCHES:
            yield tuple(part[rows] for part in parts)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (lambda: (Batches((X, Y)),), {}),
        (lambda: (generator((X, Y)),), {"steps_per_epoch": 3}),
        (lambda: ({"feature": X, "label": Y},), {"batch_size": 8}),
        (lambda: (Batches({"feature": X, "label": Y}),), {}),
        (
            lambda: (ops.convert_to_tensor(X), ops.convert_to_tensor(Y)),
            {"batch_size": 8},
        ),
    ],
    ids=["PyDataset", "generator", "dictionary", "dictionaries", "tensors"],
)
def test_all_forms_of_data_train_alike(data, arguments, expected):
    np.testing.assert_allclose(losses(data(), **arguments), expected, rtol=1e-5)


@pytest.mark.parametrize("in_dictionary", [False, True])
def test_a_data_loader_trains_in_every_epoch(in_dictionary, expected):
    data = pytest.importorskip("torch.utils.data")
    rows = [
        {"feature": x, "label": y} if in_dictionary else (x, y)
        for x, y in zip(X, Y, strict=True)
    ]
    loader, model = data.DataLoader(rows, batch_size=8), wrapped()
    np.testing.assert_allclose(losses((loader,), model), expected, rtol=1e-5)
    found = model.evaluate(loader, verbose=0, return_dict=True)
    assert found == pytest.approx(
        model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    )


def test_a_data_loader_with_class_weights_is_refused_as_by_keras():
    data = pytest.importorskip("torch.utils.data")
    rows = [{"feature": x, "label": y} for x, y in zip(X, Y, strict=True)]
    with pytest.raises(ValueError, match="class_weight"):
        losses((data.DataLoader(rows, batch_size=8),), class_weight={0: 1.0, 1: 2.0})


def test_a_mapped_data_loader_can_be_read_again():
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(list(zip(X, Y, strict=True)), batch_size=8)
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow has datasets of its own kind")
    mapped = map_dataset(loader, lambda x, y: (2 * ops.convert_to_numpy(x), y, None))
    for _ in range(2):
        x, y, none = zip(*mapped, strict=True)
        np.testing.assert_array_equal(np.concatenate(x), 2 * X)
        np.testing.assert_array_equal(np.concatenate(y), Y)
        assert none == (None,) * 3 == (None,) * len(mapped)


@pytest.mark.parametrize(
    "data",
    [
        lambda: {"x": X, "y": Y, "sample_weight": WEIGHTS, "batch_size": 8},
        lambda: {"x": Batches((X, Y, WEIGHTS))},
        lambda: {"x": generator((X, Y, WEIGHTS)), "steps_per_epoch": 3},
    ],
    ids=["arrays", "PyDataset", "generator"],
)
def test_sample_weights_count_in_every_form(data, expected):
    keyed = {"feature": X, "label": Y, "weight": WEIGHTS}
    model = wrapped(sample_weight_key="weight")
    weighted = losses((keyed,), model, batch_size=8)
    assert not np.allclose(weighted, expected)
    np.testing.assert_allclose(losses((), **data()), weighted, rtol=1e-5)


@pytest.mark.parametrize(
    "data",
    [
        lambda: {"x": X, "y": Y, "batch_size": 8},
        lambda: {"x": {"feature": X, "label": Y}, "batch_size": 8},
        lambda: {"x": Batches((X, Y))},
    ],
    ids=["arrays", "dictionary", "PyDataset"],
)
def test_class_weights_are_weights_of_examples(data):
    as_weights = losses((X, Y, 8), sample_weight=np.where(Y, 2.0, 1.0))
    weighted = losses((), class_weight={0: 1.0, 1: 2.0}, **data())
    np.testing.assert_allclose(weighted, as_weights, rtol=1e-5)


def test_validation_split_is_the_end_of_the_data():
    split = wrapped().fit(X, Y, batch_size=6, validation_split=0.25, **IN_ORDER)
    data = wrapped().fit(
        X[:18], Y[:18], batch_size=6, validation_data=(X[18:], Y[18:]), **IN_ORDER
    )
    assert split.history == data.history
    assert len(data.history["val_accuracy"]) == 2


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": False}])
def test_uncompiled_training_is_the_same(how, expected):
    found = losses((X, Y), wrapped(**how), batch_size=8, validation_data=(X, Y))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has it not on PyTorch")
def test_several_steps_in_one_execution_are_the_same(expected):
    model = wrapped(steps_per_execution=2)  # The last execution has one step only.
    found = losses((X, Y), model, batch_size=8, validation_data=(X, Y))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert model.predict(X, batch_size=8, verbose=0).shape == (24, 2)


@pytest.mark.skipif(BACKEND != "torch", reason="the other compilers can do it")
def test_pytorch_does_not_compile_a_step():
    with pytest.raises(ValueError, match="`jit_compile` must be false"):
        losses((X, Y), wrapped(jit_compile=True))


@pytest.mark.parametrize("built", [False, True])
def test_single_batches_train_and_evaluate(built):
    base = keras.Sequential([*([keras.Input((6,))] if built else []), layers.Dense(2)])
    model = wrapped(base, metrics=["accuracy"])
    first = model.train_on_batch(X, Y, return_dict=True)
    for more in (
        {"sample_weight": WEIGHTS},
        {"class_weight": {0: 1.0, 1: 2.0}},
        {},
    ):
        last = model.train_on_batch(X, Y, return_dict=True, **more)
    assert last["loss"] < first["loss"]
    by_key = model.test_on_batch({"feature": X, "label": Y}, return_dict=True)
    beside = model.test_on_batch(X, Y, return_dict=True)
    assert set(beside) == {"loss", "accuracy"}
    assert float(by_key["accuracy"]) == float(beside["accuracy"])
    assert tuple(model.predict_on_batch(X).shape) == (24, 2)


def test_images_of_bytes_are_trained_on_and_perturbed():
    images = RANDOM.integers(0, 256, (24, 4, 4, 1)).astype("uint8")
    base = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    config = advreg.make_adv_reg_config(
        multiplier=0.5,
        adv_step_size=5.0,
        adv_grad_norm="infinity",
        clip_value_min=0.0,
        clip_value_max=255.0,
    )
    model = wrapped(base, config)
    losses((images, Y), model)
    perturbed = model.perturb_on_batch(images, Y)
    assert perturbed.dtype == "float32"
    moved = np.abs(perturbed - images)
    assert moved.max() == pytest.approx(5)
    assert perturbed.min() >= 0
    assert perturbed.max() <= 255


@pytest.mark.parametrize("keyed", [False, True])
def test_several_inputs_and_outputs(keyed):
    one, other = keras.Input((6,), name="one"), keras.Input((3,), name="other")
    joined = layers.Dense(8, activation="relu")(layers.concatenate([one, other]))
    scores = layers.Dense(2, name="scores")(joined)
    value = layers.Dense(1, name="value")(joined)
    x, y = [X, X[:, :3]], [Y, X[:, :1]]
    inputs, outputs = [one, other], [scores, value]
    loss = [keras.losses.SparseCategoricalCrossentropy(from_logits=True), "mse"]
    if keyed:
        x, inputs = ({"one": a, "other": b} for a, b in (x, inputs))
        y, outputs, loss = ({"scores": a, "value": b} for a, b in (y, outputs, loss))
    model = wrapped(keras.Model(inputs, outputs), loss=loss, metrics=None)
    losses((x, y), model, validation_data=(x, y))
    perturbed = keras.tree.flatten(model.perturb_on_batch(x, y))
    for moved, clean in zip(perturbed, keras.tree.flatten(x), strict=True):
        assert np.abs(moved - clean).max() > 1e-3


@pytest.mark.parametrize("attack", [False, True])
def test_padding_does_not_move(attack):
    sequences = RANDOM.random((12, 5, 3)).astype("float32")
    sequences[:, 3:] = 0
    base = keras.Sequential(
        [keras.Input((5, 3)), layers.Masking(), layers.LSTM(4), layers.Dense(2)]
    )
    model = wrapped(base)
    losses((sequences, Y[:12]), model)
    if attack:
        perturbed = attacks.PGD(0.1, iterations=2, seed=0)(model, sequences, Y[:12])
    else:
        perturbed = model.perturb_on_batch(sequences, Y[:12])
    np.testing.assert_array_equal(perturbed[:, 3:], 0)
    assert np.abs(perturbed - sequences)[:, :3].max() > 1e-3


def test_it_is_known_why_categories_are_not_perturbed():
    base = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(5, 3),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    (feature,) = advreg.perturbed_features(base, np.zeros((3, 6), "int32"))
    assert not feature.perturbed
    assert feature.reason == "the model declares an input of integers"
    (feature,) = advreg.perturbed_features(wrapped(), ops.convert_to_tensor(X))
    assert feature.perturbed
