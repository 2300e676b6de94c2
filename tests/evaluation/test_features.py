"""Which features move: one rule for training, attacks and reports."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.slow import slow
from keras import layers, ops

from advreg import (
    AdversarialRegularization,
    AdvRegConfig,
    evaluate_robustness,
    make_adv_reg_config,
    perturbed_features,
)
from advreg.attacks import APGD, BIM, FGSM, PGD, AutoAttack, RandomNoise, Square
from advreg.perturbation.packing import NothingMovesError

RNG = np.random.default_rng(0)
N = 40
Y = RNG.integers(0, 2, N)
CODES, NUMBERS = RNG.integers(1, 20, (N, 1)), RNG.normal(size=(N, 3)).astype("float32")
ATTACKS = [
    FGSM(0.1),
    BIM(0.1, iterations=3),
    PGD(0.1, iterations=3, seed=0),
    APGD(0.1, iterations=5, seed=0),
    Square(0.1, queries=20, seed=0),
    RandomNoise(0.1, draws=2, seed=0),
    AutoAttack(0.1, iterations=5, queries=10, seed=0),
]


def tabular(code_dtype=None):
    """A category that goes into an `Embedding`, beside numbers."""
    code = keras.Input((1,), name="code", dtype=code_dtype)
    numbers = keras.Input((3,), name="numbers")
    embedded = layers.Flatten()(layers.Embedding(20, 4)(code))
    hidden = layers.Concatenate()([embedded, numbers])
    return keras.Model(
        {"code": code, "numbers": numbers}, layers.Dense(2)(hidden), name="tabular"
    )


def heart():
    """Quantities, one of which comes as an integer, for inputs declared as floats."""
    inputs = {name: keras.Input((1,), name=name) for name in ("age", "oldpeak")}
    hidden = layers.Concatenate()(
        [layers.Rescaling(1 / 50)(inputs["age"]), inputs["oldpeak"]]
    )
    return keras.Model(inputs, layers.Dense(2)(hidden))


def wrapped(base, config=None):
    model = AdversarialRegularization(base, config or AdvRegConfig.pgd(0.1))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def moved(after, before):
    return {
        name: float(np.abs(np.asarray(after[name], "float64") - before[name]).max())
        for name in before
    }


@pytest.mark.parametrize("dtype", ["float32", *slow("float64", "int32"), "int64"])
@pytest.mark.parametrize(
    "attack",
    [*ATTACKS[:1], *slow(*ATTACKS[1:4]), ATTACKS[4], *slow(*ATTACKS[5:])],
    ids=lambda attack: attack.name,
)
def test_categories_stand_still_whatever_their_type(attack, dtype):
    x = {"code": CODES.astype(dtype), "numbers": NUMBERS}
    model = tabular()
    y = model.predict(x, verbose=0).argmax(1)
    found = attack(model, x, y, early_stop=False)
    assert found["code"].dtype == dtype
    distances = moved(found, x)
    assert distances["code"] == 0
    assert distances["numbers"] == pytest.approx(0.1, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*slow("float32"), "int64"])
def test_training_and_reports_follow_the_same_rule(dtype):
    x = {"code": CODES.astype(dtype), "numbers": NUMBERS}
    model = wrapped(tabular())
    model.fit(x, Y, verbose=0)
    found = model.perturb_on_batch(x, Y)
    assert moved(found, x)["code"] == 0
    assert moved(found, x)["numbers"] > 0.09
    free = evaluate_robustness(model, x, Y, attacks=PGD(0.5, seed=0), verbose=0)
    held = evaluate_robustness(
        model,
        x,
        Y,
        attacks=PGD(0.5, seed=0, feature_mask={"code": 0.0}),
        verbose=0,
    )
    assert free.robust_accuracy == held.robust_accuracy
    assert [(f.name, f.perturbed) for f in free.features] == [
        ("code", False),
        ("numbers", True),
    ]
    assert "Perturbed: numbers. Not perturbed: code (no gradient" in str(free)
    assert "masked" not in str(free)
    assert "code (no gradient reaches it" in str(held)


def test_a_radius_above_1_leaves_codes_in_the_vocabulary():
    x = {"code": CODES.astype("float32"), "numbers": NUMBERS}
    for attack in (PGD(30.0, iterations=2), Square(30.0, queries=5)):
        attack(tabular(), x, Y)


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_codes_alone_cannot_move_in_training_nor_in_attacks(dtype):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Embedding(20, 8),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )
    x = RNG.integers(1, 20, (N, 6)).astype(dtype)
    with pytest.raises(NothingMovesError, match="`Embedding`"):
        wrapped(model).fit(x, Y, verbose=0)
    for attack in ATTACKS:
        with pytest.raises(NothingMovesError, match="`Embedding`"):
            attack(model, x, Y)
    with pytest.raises(NothingMovesError, match="`Embedding`"):
        evaluate_robustness(model, x, Y, attacks=FGSM(0.1), verbose=0)


def test_images_behind_a_layer_that_rounds_move_all_the_same():
    """What has no gradient may still be searched, where it is all that there is."""
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Lambda(lambda x: ops.round(x * 4) / 4),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    x = RNG.uniform(size=(N, 4, 4, 1)).astype("float32")
    y = model.predict(x, verbose=0).argmax(1)
    found = Square(0.3, queries=20, seed=0)(model, x, y)
    assert np.abs(found - x).max() > 0.2


@pytest.mark.parametrize("dtype", ["int64", *slow("int32", "uint8", "int16")])
def test_quantities_that_come_as_integers_move_like_the_floats_they_are(dtype):
    x = {
        "age": RNG.integers(18, 90, N).astype(dtype),
        "oldpeak": RNG.uniform(size=N).astype("float32"),
    }
    floats = {**x, "age": x["age"].astype("float32")}
    config = make_adv_reg_config(adv_step_size=0.5, adv_grad_norm="infinity")
    keras.utils.set_random_seed(0)
    model = wrapped(heart(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train_on_batch(x, Y)
    found, expected = (model.perturb_on_batch(each, Y) for each in (x, floats))
    for name in x:
        np.testing.assert_array_equal(found[name], expected[name])
        assert np.abs(found[name].reshape(N) - x[name]).max() == pytest.approx(0.5)
    assert found["age"].dtype == "float32"
    for attack in (FGSM(0.5), PGD(0.5, seed=0)):
        one, other = (attack(model, each, Y) for each in (x, floats))
        np.testing.assert_array_equal(one["age"], other["age"])
    keras.utils.set_random_seed(1)
    other = wrapped(keras.models.clone_model(model.base_model), config)
    other.base_model.set_weights(model.base_model.get_weights())
    model.reset_metrics()  # Which some versions of Keras add up.
    one, two = (
        each.train_on_batch(data, Y, return_dict=True)
        for each, data in ((model, x), (other, floats))
    )
    assert one["scaled_adversarial_loss"] == pytest.approx(
        two["scaled_adversarial_loss"], rel=1e-5
    )


def test_vectors_of_bytes_move_where_floats_are_declared():
    x = RNG.integers(0, 256, (N, 6)).astype("uint8")
    model = keras.Sequential([keras.Input((6,)), layers.Rescaling(1 / 255)])
    model.add(layers.Dense(2))
    found = FGSM(4.0, clip_value_min=0.0, clip_value_max=255.0)(model, x, Y)
    assert found.dtype == "float32"
    assert np.abs(found - x).max() == 4.0


class Undeclared(keras.Model):
    """Takes a category and a quantity, and declares neither."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dense = layers.Embedding(90, 2), layers.Dense(2)

    def call(self, inputs):
        age = ops.cast(inputs["age"], "float32") / 50
        code = ops.reshape(self.embedding(inputs["code"]), (-1, 2))
        return self.dense(ops.concatenate([age, code, inputs["v"]], axis=1))


def undeclared_data():
    return {
        "age": RNG.integers(18, 90, (N, 1)),
        "code": CODES,
        "v": RNG.uniform(size=(N, 2)).astype("float32"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        *slow(lambda model, x: model.perturb_on_batch(x, Y)),
        lambda model, x: model.fit(x, Y, verbose=0, epochs=2),
        lambda model, x: FGSM(0.1)(model, x, Y),
    ],
    ids=["perturb_on_batch", "fit", "attack"],
)
def test_quantities_that_nobody_declares_draw_one_warning(use):
    x = undeclared_data()
    model = Undeclared()
    model(x)
    model = wrapped(model)
    with pytest.warns(UserWarning, match=r"quantities: age\. .*float32"):
        use(model, x)
    use(model, x)  # A second warning would be an error.
    report = evaluate_robustness(model, x, Y, attacks=FGSM(0.1), verbose=0)
    assert any("quantities: age." in text for text in report.warnings)
    x["age"] = x["age"].astype("float32")
    model = wrapped(Undeclared())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model, x)
    assert moved(model.perturb_on_batch(x, Y), x)["age"] > 0


def test_the_public_call_says_what_moves_and_why_the_rest_does_not():
    x = {
        "code": CODES.astype("float32"),
        "numbers": NUMBERS,
        "label": Y,
    }
    model = AdversarialRegularization(tabular())
    found = {feature.name: feature for feature in perturbed_features(model, x)}
    assert set(found) == {"code", "numbers"}
    assert found["numbers"].perturbed
    assert found["numbers"].reason == ""
    assert not found["code"].perturbed
    assert "no gradient" in found["code"].reason
    masked = perturbed_features(
        tabular(), {"code": CODES, "numbers": NUMBERS}, feature_mask={"numbers": 0.0}
    )
    assert [feature.reason for feature in masked][1] == "masked by `feature_mask`"
    declared = perturbed_features(tabular("int64"), {"code": CODES, "numbers": NUMBERS})
    assert declared[0].reason == "the model declares an input of integers"
    assert declared[0].dtype == "int64"
    config = make_adv_reg_config(feature_mask={"numbers": np.zeros(3)})
    (_, numbers) = perturbed_features(AdversarialRegularization(tabular(), config), x)
    assert numbers.reason == "masked by `feature_mask`"


def test_labels_that_are_features_too_stand_still():
    inputs = {
        "x": keras.Input((3,), name="x"),
        "label": keras.Input((1,), name="label"),
    }
    hidden = layers.Concatenate()(list(inputs.values()))
    model = AdversarialRegularization(
        keras.Model(inputs, layers.Dense(2)(hidden)), base_with_labels_in_features=True
    )
    x = {"x": NUMBERS, "label": Y[:, None].astype("float32")}
    found = {feature.name: feature for feature in perturbed_features(model, x)}
    assert found["label"].reason == "a label"
    assert found["x"].perturbed


def test_strings_and_what_is_no_model():
    lookup = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    inputs = {
        "word": keras.Input((1,), name="word", dtype="string"),
        "v": keras.Input((3,), name="v"),
    }
    hidden = layers.Concatenate()([lookup(inputs["word"]), inputs["v"]])
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    words = tf.constant(RNG.choice(["a", "b"], (N, 1)))
    x = {"word": words, "v": NUMBERS}
    found = {feature.name: feature for feature in perturbed_features(model, x)}
    assert found["word"].reason == "of type string"
    with pytest.raises(TypeError, match="`model` must be a Keras 3 model"):
        perturbed_features("model", x)
    # What came back goes into the model again, as the features that came did.
    trained = wrapped(model)
    for moved_x in (trained.perturb_on_batch(x, Y), FGSM(0.1)(model, x, Y)):
        assert moved_x["word"] is words
        trained.evaluate(moved_x, Y, verbose=0)


def test_it_says_why_nothing_can_be_perturbed():
    x = {"ids": CODES, "words": tf.constant([["a"]] * N)}
    with pytest.raises(NothingMovesError) as info:
        class_of_nothing().perturb_on_batch(x, Y)
    text = str(info.value)
    assert "ids (integers of type int64)" in text
    assert "words (of type string)" in text


def class_of_nothing():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(ops.one_hot(inputs["ids"][:, 0], 20))

    return wrapped(Model())
