import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import (
    LEFT,
    RIGHT,
    Subclassed,
    X,
    Y,
    classifier,
    cross_entropy,
    labelled,
    regularized,
    rows,
)
from oracle import norms

from advreg import AdversarialRegularization, make_adv_reg_config


def batches(x, y, size=4):
    while True:
        for start in range(0, len(y), size):
            yield x[start : start + size], y[start : start + size]


FORMS = {
    "arrays": lambda x, y: ((x, y), {}),
    "tensors": lambda x, y: ((tf.constant(x), tf.constant(y)), {}),
    "dictionary": lambda x, y: (({"x": x, "label": y},), {}),
    "tf.data of tuples": lambda x, y: (
        (tf.data.Dataset.from_tensor_slices((x, y)).batch(4),),
        {},
    ),
    "tf.data of dictionaries": lambda x, y: (
        (tf.data.Dataset.from_tensor_slices({"x": x, "label": y}).batch(4),),
        {},
    ),
    "tf.data of features in a dictionary": lambda x, y: (
        (tf.data.Dataset.from_tensor_slices(({"x": x}, y)).batch(4),),
        {},
    ),
    "generator of tuples": lambda x, y: ((batches(x, y),), {"steps_per_epoch": 3}),
    "generator of dictionaries": lambda x, y: (
        ((({"x": a, "label": b},) for a, b in batches(x, y)),),
        {"steps_per_epoch": 3},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", [False, True])
def test_every_form_of_data_trains_alike(form, named):
    def base():
        inputs = keras.Input((6,), name="x" if named else None)
        return keras.Model(inputs, layers.Dense(3)(inputs))

    x, y = labelled()
    keras.utils.set_random_seed(0)
    expected = regularized(base())
    history = expected.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, validation_data=(x, y)
    ).history

    keras.utils.set_random_seed(0)
    model = regularized(base())
    data, arguments = FORMS[form](x, y)
    validation = FORMS[form](x, y)[0]
    if "generator" in form:
        arguments["validation_steps"] = 3
    elif "data" not in form:
        arguments["batch_size"] = 4
    got = model.fit(
        *data,
        shuffle=False,
        verbose=0,
        validation_data=validation if len(validation) > 1 else validation[0],
        **arguments,
    ).history
    for name, values in history.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-6)
    for a, b in zip(expected.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # Predictions need no labels in either form.
    clean = model.predict(x, verbose=0)
    for inputs in (x, {"x": x}, {"x": x, "label": y}):
        np.testing.assert_allclose(model.predict(inputs, verbose=0), clean, rtol=1e-5)
        np.testing.assert_allclose(model(inputs), clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["argument", "tuple", "key"])
def test_sample_weights_come_three_ways(form):
    x, y = labelled()
    weights = np.linspace(0, 1, 12).astype("float32")
    keras.utils.set_random_seed(0)
    expected = regularized(classifier())
    expected.fit(x, y, sample_weight=weights, batch_size=12, verbose=0)

    keras.utils.set_random_seed(0)
    model = AdversarialRegularization(classifier(), sample_weight_key="weight")
    model.compile("sgd", cross_entropy())
    if form == "argument":
        model.fit({"x": x}, y, sample_weight=weights, batch_size=12, verbose=0)
    elif form == "tuple":
        data = tf.data.Dataset.from_tensors((x, y, weights))
        model.fit(data, shuffle=False, verbose=0)
    else:
        data = {"x": x, "label": y, "weight": weights}
        model.fit(data, batch_size=12, verbose=0)
    for a, b in zip(expected.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


STRUCTURES = {
    "tensor": X,
    "list": [LEFT, RIGHT],
    "tuple": (LEFT, RIGHT),
    "dict": {"a": LEFT, "b": RIGHT},
    "nested": {"a": [LEFT, {"c": RIGHT}]},
}


STRUCTURED_INPUTS = {
    "tensor": lambda: keras.Input((6,)),
    "list": lambda: [keras.Input((2,)), keras.Input((4,))],
    "tuple": lambda: (keras.Input((2,)), keras.Input((4,))),
    "dict": lambda: {
        "a": keras.Input((2,), name="a"),
        "b": keras.Input((4,), name="b"),
    },
    "nested": lambda: {"a": [keras.Input((2,)), {"c": keras.Input((4,), name="c")}]},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["subclassed", "functional"])
def test_every_structure_of_inputs(structure, kind):
    x = STRUCTURES[structure]
    if kind == "subclassed":
        base = Subclassed()
    else:
        inputs = STRUCTURED_INPUTS[structure]()
        leaves = keras.tree.flatten(inputs)
        hidden = leaves[0] if len(leaves) == 1 else layers.Concatenate()(leaves)
        base = keras.Model(inputs, layers.Dense(3)(hidden))
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="l2")
    model = regularized(base, config, metrics=["accuracy"])
    model.fit(x, Y, verbose=0, validation_data=(x, Y))
    perturbed = model.perturb_on_batch(x, Y)
    keras.tree.assert_same_structure(perturbed, x)
    moved = np.concatenate(keras.tree.flatten(perturbed), axis=1) - X
    np.testing.assert_allclose(norms(moved, "l2"), 0.1, rtol=1e-5)
    assert model.predict(x, verbose=0).shape == (12, 3)


def test_unbuilt_sequential_bases_are_built_by_the_data():
    base = keras.Sequential([layers.Dense(4), layers.Dense(3)])
    model = regularized(base)
    model.fit({"image": X, "label": Y}, verbose=0)
    assert base.built
    assert model.built


def test_perturbing_builds_what_is_not_built():
    model = regularized(keras.Sequential([layers.Dense(3)]))
    assert model.perturb_on_batch(X, Y).shape == X.shape


def test_several_label_keys_give_a_list_in_their_order():
    inputs = keras.Input((6,), name="x")
    base = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(2)(inputs)])
    model = AdversarialRegularization(base, label_keys=["second", "first"])
    model.compile("sgd", [cross_entropy(), "mse"])
    target = rows(12, 2)
    by_key = model.evaluate({"x": X, "first": target, "second": Y}, verbose=0)
    assert by_key == model.evaluate(X, [Y, target], verbose=0)


def test_keys_that_the_base_declares_are_features():
    inputs = {
        "x": keras.Input((4,), name="x"),
        "label": keras.Input((2,), name="label"),
    }
    hidden = layers.Concatenate()([inputs["x"], inputs["label"]])
    base = keras.Model(inputs, layers.Dense(3)(hidden))
    model = regularized(base, make_adv_reg_config(adv_step_size=0.3))
    x = {"x": RIGHT, "label": LEFT}
    model.fit(x, Y, verbose=0)
    assert not np.allclose(model.perturb_on_batch(x, Y)["label"], LEFT)
    with pytest.raises(ValueError, match="base_with_labels_in_features"):
        model.fit(x, verbose=0)


def test_keys_beside_labels_are_features_even_of_a_base_that_declares_nothing():
    base = Subclassed()
    model = regularized(base, make_adv_reg_config(adv_step_size=0.3))
    x = {"x": RIGHT, "label": LEFT}
    model.fit(x, Y, verbose=0)
    assert base.received == {"x": 0, "label": 0}
    model.evaluate(x, Y, verbose=0)
    assert not np.allclose(model.perturb_on_batch(x, Y)["label"], LEFT)


def test_labels_in_features_reach_the_base_and_do_not_move():
    base = Subclassed()
    model = AdversarialRegularization(
        base, make_adv_reg_config(adv_step_size=0.3), base_with_labels_in_features=True
    )
    model.compile("sgd", "mse")
    x = {"x": X, "label": rows(12, 3)}
    model.fit(x, verbose=0)
    assert base.received == {"x": 0, "label": 0}
    perturbed = model.perturb_on_batch(x)
    assert perturbed["label"] is x["label"]
    assert not np.allclose(perturbed["x"], X)


def test_labels_stay_away_from_a_base_that_declares_nothing():
    base = Subclassed()
    model = regularized(base)
    x = {"x": X, "label": Y}
    model.fit(x, verbose=0)
    assert base.received == {"x": 0}
    model.predict(x, verbose=0)
    model.evaluate(x, verbose=0)
    model(x)
    assert base.received == {"x": 0}


def test_missing_labels(mode):
    model = regularized(classifier(), **mode)
    for x, message in [
        (X, r"shape=\(12, 6\)"),
        ({"x": X, "labels": Y}, r"\['x', 'labels'\]"),
    ]:
        for call in (model.train_on_batch, model.test_on_batch, model.perturb_on_batch):
            with pytest.raises(ValueError, match=f"(?s)Labels are missing.*{message}"):
                call(x)
    several = AdversarialRegularization(classifier(), label_keys=["a", "b"])
    several.compile("sgd", cross_entropy(), **mode)
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*\['x', 'a'\]"):
        several.fit({"x": X, "a": Y}, verbose=0)


def test_a_weight_key_beside_labels():
    # A base that declares its inputs leaves no doubt; any other takes all features.
    weights = np.linspace(0, 1, 12).astype("float32")
    losses = []
    for x, sample_weight in [({"x": X, "w": weights}, None), (X, weights)]:
        keras.utils.set_random_seed(0)
        model = AdversarialRegularization(classifier(), sample_weight_key="w")
        model.compile("sgd", cross_entropy())
        losses.append(model.train_on_batch(x, Y, sample_weight)[0])
    assert losses[0] == pytest.approx(losses[1])
    base = Subclassed()
    model = AdversarialRegularization(base, sample_weight_key="w")
    model.compile("sgd", cross_entropy())
    model.fit({"x": X, "w": LEFT}, Y, verbose=0)
    assert base.received == {"x": 0, "w": 0}


def test_sample_weights_given_twice():
    model = AdversarialRegularization(classifier(), sample_weight_key="w")
    model.compile("sgd", cross_entropy())
    with pytest.raises(ValueError, match=r"must come once.*'w'"):
        model.train_on_batch({"x": X, "w": np.ones(12)}, Y, np.ones(12))
