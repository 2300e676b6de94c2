import functools
import re

import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from helpers.models import (
    LEFT,
    RIGHT,
    Subclassed,
    X,
    Y,
    aligned,
    classifier,
    cross_entropy,
    labelled,
    regularized,
    rows,
)
from helpers.oracle import norms
from helpers.slow import slow
from keras import layers

from advreg import (
    AdversarialRegularization,
    evaluate_robustness,
    make_adv_reg_config,
    nsl,
)
from advreg.attacks import FGSM

SIZE, STEPS = 5, 3  # Of 12 examples, so that the last batch is a small one.


def batches(x, y, repeat=True):
    while True:
        for start in range(0, len(y), SIZE):
            yield x[start : start + SIZE], y[start : start + SIZE]
        if not repeat:
            return


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, as_dict=False):
        super().__init__()
        self.batches = list(batches(x, y, repeat=False))
        self.as_dict = as_dict

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        x, y = self.batches[index]
        return {"x": x, "label": y} if self.as_dict else (x, y)


def dataset(data):
    return tf.data.Dataset.from_tensor_slices(data).batch(SIZE)


def unknown_batch_size(x, y):
    spec = (tf.TensorSpec((None, 6)), tf.TensorSpec((None,), y.dtype))
    made = tf.data.Dataset.from_generator(
        lambda: batches(x, y, repeat=False), output_signature=spec
    )
    # Without a length, Keras would warn at the end of the data.
    return made.apply(tf.data.experimental.assert_cardinality(STEPS))


FORMS = {
    "arrays": lambda x, y: ((x, y), {}),
    "tensors": lambda x, y: ((tf.constant(x), tf.constant(y)), {}),
    "pandas": lambda x, y: ((pandas.DataFrame(x), pandas.Series(y)), {}),
    "dictionary": lambda x, y: (({"x": x, "label": y},), {}),
    "tf.data of tuples": lambda x, y: ((dataset((x, y)),), {}),
    "tf.data of dictionaries": lambda x, y: ((dataset({"x": x, "label": y}),), {}),
    "tf.data of features in a dictionary": lambda x, y: ((dataset(({"x": x}, y)),), {}),
    "tf.data without end": lambda x, y: (
        (dataset((x, y)).repeat(),),
        {"steps_per_epoch": STEPS},
    ),
    "tf.data of unknown shapes": lambda x, y: ((unknown_batch_size(x, y),), {}),
    "generator of tuples": lambda x, y: ((batches(x, y),), {"steps_per_epoch": STEPS}),
    "generator of dictionaries": lambda x, y: (
        ((({"x": a, "label": b},) for a, b in batches(x, y)),),
        {"steps_per_epoch": STEPS},
    ),
    "PyDataset": lambda x, y: ((Batches(x, y),), {}),
    "PyDataset of dictionaries": lambda x, y: ((Batches(x, y, as_dict=True),), {}),
}


USUAL = (
    "tensors",
    "dictionary",
    "tf.data of tuples",
    "generator of dictionaries",
    "PyDataset",
)


def dense(named):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x" if named else None)
    return regularized(keras.Model(inputs, layers.Dense(3)(inputs)))


@functools.cache
def trained_on_arrays(named):
    """What every form of the same data must give."""
    model, (x, y) = dense(named), labelled()
    history = model.fit(
        x, y, batch_size=SIZE, shuffle=False, verbose=0, validation_data=(x, y)
    ).history
    return history, model.get_weights()


@pytest.mark.parametrize(
    ("named", "form"),
    [
        *((False, form) for form in USUAL),
        (True, "tf.data of dictionaries"),
        *(
            pytest.param(named, form, marks=pytest.mark.slow)
            for named, usual in (
                (False, USUAL),
                (True, ["tf.data of dictionaries"]),
            )
            for form in FORMS
            if form not in usual
        ),
    ],
)
def test_every_form_of_data_trains_alike(form, named):
    x, y = labelled()
    history, weights = trained_on_arrays(named)
    model = dense(named)
    data, arguments = FORMS[form](x, y)
    validation = FORMS[form](x, y)[0]
    if "steps_per_epoch" in arguments:
        arguments["validation_steps"] = STEPS
    if len(data) == 2 or isinstance(data[0], dict):
        arguments["batch_size"] = SIZE
    got = model.fit(
        *data,
        shuffle=False,
        verbose=0,
        validation_data=validation if len(validation) > 1 else validation[0],
        **arguments,
    ).history
    for name, values in history.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-6)
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # Predictions need no labels in either form.
    clean = model.predict(x, verbose=0)
    for inputs in (x, {"x": x}, {"x": x, "label": y}):
        np.testing.assert_allclose(model.predict(inputs, verbose=0), clean, rtol=1e-5)
        np.testing.assert_allclose(model(inputs), clean, rtol=1e-5, atol=1e-6)


def slices_of_what_a_generator_gives(x, y):
    """In batches of 4, whose rows are memory of the arrays themselves."""
    spec = [tf.TensorSpec([None, *array.shape[1:]], array.dtype) for array in (x, y)]
    chunks = tf.data.Dataset.from_generator(
        lambda: ((x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16)),
        output_signature=tuple(spec),
    )
    slices = chunks.rebatch(4).prefetch(2)
    return slices.apply(tf.data.experimental.assert_cardinality(len(x) // 4))


@pytest.mark.parametrize("jit_compile", [False, *slow(True)])
@pytest.mark.parametrize("fields", [{}, {"pgd_iterations": 3, "pgd_epsilon": 0.2}])
def test_what_a_generator_gives_stays_as_it_is(jit_compile, fields):
    x = aligned(rows(64, 16))
    y = aligned(keras.utils.to_categorical(np.arange(64) % 4))
    given = x.copy(), y.copy()
    base = keras.Sequential(
        [keras.Input((16,)), layers.Rescaling(3.0), layers.Dense(4)]
    )
    model = AdversarialRegularization(base, make_adv_reg_config(**fields))
    # Smoothing would be written into labels, as rescaled features into features.
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile("sgd", loss, jit_compile=jit_compile)
    data = slices_of_what_a_generator_gives(x, y)
    model.fit(data, validation_data=data, shuffle=False, verbose=0)
    np.testing.assert_array_equal(x, given[0])
    np.testing.assert_array_equal(y, given[1])


@pytest.mark.skipif(
    tuple(map(int, tf.__version__.split(".")[:2])) < (2, 19),
    reason="TensorFlow began to do so in 2.19",
)
def test_tensorflow_still_writes_into_what_a_generator_gives():
    """If this fails, TensorFlow has mended it: delete `batches.on_copies`."""
    x, y = aligned(rows(64, 16)), aligned(rows(64, 4))
    given = x.copy()
    list(slices_of_what_a_generator_gives(x, y).map(lambda x, y: 2.0 * x))
    assert (x != given).any()


@pytest.mark.parametrize("form", [*slow("argument"), "tuple", "key"])
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


def split_validation(x, y, **kwargs):
    keras.utils.set_random_seed(0)
    model = regularized(classifier())
    return model.fit(x, y, batch_size=4, shuffle=False, verbose=0, **kwargs).history


@pytest.mark.slow
def test_validation_is_split_off():
    x, y = labelled()
    expected = split_validation(x[:8], y[:8], validation_data=(x[8:], y[8:]))
    for data in ((x, y), ({"x": x, "label": y}, None)):
        got = split_validation(*data, validation_split=1 / 3)
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-6)


# --- Class weights

CLASS_WEIGHT = {0: 0.5, 2: 3.0}
OF_CLASS = np.array([0.5, 1.0, 3.0], "float32")


def step_with(*data, wrap=regularized, **kwargs):
    keras.utils.set_random_seed(0)
    model = wrap(classifier())
    model.fit(*data, epochs=2, shuffle=False, verbose=0, **kwargs)
    return model.get_weights()


@pytest.mark.parametrize(
    "form", [*slow("arrays", "dictionary"), "tf.data of dictionaries"]
)
def test_class_weights_find_the_labels(form):
    x, y = labelled()
    data, _ = FORMS[form](x, y)
    batch = {} if "tf.data" in form else {"batch_size": SIZE}
    expected = step_with(x, y, sample_weight=OF_CLASS[y], batch_size=SIZE)
    got = step_with(*data, class_weight=CLASS_WEIGHT, **batch)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_class_weights_of_one_batch():
    x, y = labelled()
    results = []
    for data, weights in (
        ((x, y), {"sample_weight": OF_CLASS[y]}),
        ((x, y), {"class_weight": CLASS_WEIGHT}),
        (({"x": x, "label": y},), {"class_weight": CLASS_WEIGHT}),
    ):
        keras.utils.set_random_seed(0)
        results.append(regularized(classifier()).train_on_batch(*data, **weights))
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-6)


def test_class_weights_that_keras_would_drop():
    x, y = labelled()
    with pytest.raises(ValueError, match=r"`class_weight` needs the labels.*\(x, y\)"):
        step_with(Batches(x, y, as_dict=True), class_weight=CLASS_WEIGHT)
    with pytest.raises(ValueError, match=r"Labels are missing.*\['x'\]"):
        step_with({"x": x}, class_weight=CLASS_WEIGHT)


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


@pytest.mark.parametrize(
    ("kind", "structure"),
    [
        ("subclassed", "dict"),
        ("functional", "nested"),
        *(
            pytest.param(kind, structure, marks=pytest.mark.slow)
            for kind, structure in (
                ("subclassed", "tensor"),
                ("subclassed", "tuple"),
                ("subclassed", "list"),
                ("subclassed", "nested"),
                ("functional", "tensor"),
                ("functional", "list"),
                ("functional", "tuple"),
                ("functional", "dict"),
            )
        ),
    ],
)
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


def named_outputs(*names):
    inputs = keras.Input((6,), name="x")
    outputs = {name: layers.Dense(3, name=f"of_{name}")(inputs) for name in names}
    return keras.Model(inputs, outputs)


def test_several_label_keys_find_outputs_of_their_names():
    base = named_outputs("left", "right")
    model = AdversarialRegularization(base, label_keys=["right", "left"])
    model.compile("sgd", {name: cross_entropy() for name in ("left", "right")})
    other = (Y + 1) % 3
    x = {"x": X, "left": Y, "right": other}
    expected = model.evaluate(X, {"left": Y, "right": other}, verbose=0)
    assert model.evaluate(x, verbose=0) == expected
    assert model.evaluate({**x, "left": other}, verbose=0) != expected
    model.fit(x, verbose=0)
    np.testing.assert_array_equal(model.perturb_on_batch(x)["left"], Y)


def test_several_label_keys_must_tell_their_outputs():
    x = {"x": X, "a": Y, "b": Y}
    for method in ("evaluate", "fit"):
        model = AdversarialRegularization(
            named_outputs("left", "right"), label_keys=["a", "b"]
        )
        model.compile("sgd", {name: cross_entropy() for name in ("left", "right")})
        with pytest.raises(ValueError, match=r"\('a', 'b'\) .* \['left', 'right'\]"):
            getattr(model, method)(x, verbose=0)
    assert set(model.predict(x, verbose=0)) == {"left", "right"}
    # As with NSL they go by their places, in the order of the alphabet.
    old = nsl.keras.AdversarialRegularization(model.base_model, ["a", "b"])
    old.compile("sgd", [cross_entropy(), cross_entropy()])
    old.fit(x, verbose=0)


def test_outputs_may_be_without_labels():
    base = named_outputs("left", "right", "embedding")
    base.get_layer("of_embedding").trainable = False
    model = AdversarialRegularization(base, label_keys=["right", "left"])
    model.compile("sgd", {name: cross_entropy() for name in ("left", "right")})
    model.fit({"x": X, "left": Y, "right": Y}, verbose=0)
    assert not np.allclose(model.perturb_on_batch(X, {"left": Y, "right": Y}), X)


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


def test_keys_that_the_base_does_not_declare_stay_away_from_it():
    inputs = STRUCTURED_INPUTS["dict"]()
    hidden = layers.Concatenate()([inputs["a"], inputs["b"]])
    base = keras.Model(inputs, layers.Dense(3)(hidden))
    model = regularized(base, make_adv_reg_config(adv_step_size=0.3))
    x = {"a": LEFT, "b": RIGHT}
    more = {**x, "more": rows(12, 1)}
    model.fit(more, Y, verbose=0)
    np.testing.assert_array_equal(
        model.predict(more, verbose=0), model.predict(x, verbose=0)
    )
    perturbed = model.perturb_on_batch(more, Y)
    assert not np.allclose(perturbed["a"], LEFT)
    np.testing.assert_array_equal(perturbed["more"], more["more"])
    with pytest.raises(ValueError, match=r"['\"]b['\"]"):
        model.train_on_batch({"a": LEFT}, Y)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras expects that key alone.
def test_a_base_of_one_input_finds_it_by_its_name():
    inputs = keras.Input((6,), name="x")
    model = regularized(keras.Model(inputs, layers.Dense(3)(inputs)))
    np.testing.assert_array_equal(
        model.predict({"more": rows(12, 6, seed=2), "x": X}, verbose=0),
        model.predict(X, verbose=0),
    )


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
            with pytest.raises(
                ValueError, match=f"(?s)Labels are missing.*{message}"
            ) as caught:
                call(x)
            assert "base_with_labels_in_features" not in str(caught.value)
    several = AdversarialRegularization(classifier(), label_keys=["a", "b"])
    several.compile("sgd", cross_entropy(), **mode)
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*\['x', 'a'\]"):
        several.fit({"x": X, "a": Y}, verbose=0)


@pytest.mark.slow
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


def test_sample_weights_that_are_to_come_do():
    model = AdversarialRegularization(classifier(), sample_weight_key="weight")
    model.compile("sgd", cross_entropy())
    x = {"x": X, "label": Y}
    model.fit({**x, "weight": np.ones(12)}, validation_data=(x,), verbose=0)
    with pytest.raises(ValueError, match=r"'weight'.*\['x', 'label', 'weights'\]"):
        model.fit({**x, "weights": np.ones(12)}, verbose=0)
    with pytest.raises(ValueError, match="'weight'"):
        model.fit(x, class_weight={0: 2.0}, verbose=0)
    old = nsl.keras.AdversarialRegularization(classifier(), ["label"], "weight")
    old.compile("sgd", cross_entropy())
    old.fit(x, verbose=0)  # NSL does without.
    model.train_on_batch(x, sample_weight=np.ones(12))
    assert model.evaluate(x, verbose=0) > 0
    assert model.perturb_on_batch(x)["x"].shape == X.shape


def test_sample_weights_given_twice():
    model = AdversarialRegularization(classifier(), sample_weight_key="w")
    model.compile("sgd", cross_entropy())
    with pytest.raises(ValueError, match=r"must come once.*'w'"):
        model.train_on_batch({"x": X, "w": np.ones(12)}, Y, np.ones(12))


# Labels that are no classes of the model


@pytest.mark.slow
@pytest.mark.parametrize("label", [3, 10, -1])
@pytest.mark.parametrize("run", [{"run_eagerly": True}, {"jit_compile": False}])
def test_labels_that_the_model_does_not_know(label, run):
    x, y = labelled()
    y[5] = label
    model = regularized(classifier(), **run)
    message = (
        "`y` must hold classes from 0 to 2, because the model has 3 classes. Received: "
        f"{label}"
    )
    for call in (
        lambda: model.fit(x, y, verbose=0),
        lambda: model.fit({"x": x, "label": y}, verbose=0),
        lambda: model.fit(
            tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
            shuffle=False,
            verbose=0,
        ),
        lambda: model.fit(x[:5], y[:5], validation_data=(x, y), verbose=0),
        lambda: model.evaluate(x, y, verbose=0),
        lambda: model.train_on_batch(x, y),
        lambda: model.test_on_batch(x, y),
        lambda: model.perturb_on_batch(x, y),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}$") as raised:
            call()
        assert raised.value.__suppress_context__


def test_the_rule_is_that_of_a_report():
    x, y = labelled()
    y[5] = 10
    model = regularized(classifier())
    with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2") as fitted:
        model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2") as report:
        evaluate_robustness(model, x, y, attacks=FGSM(0.1), verbose=0)
    rule, received = str(fitted.value).split(", because ")
    assert str(report.value).startswith(rule)
    assert received in str(report.value)


@pytest.mark.slow
def test_other_errors_of_tensorflow_stay_what_they_are():
    base = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3), keras.layers.Lambda(_failing)]
    )
    model = regularized(base, jit_compile=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="something else"):
        model.fit(*labelled(), verbose=0)


def _failing(x):
    with tf.control_dependencies([tf.debugging.assert_less(x, -1e9, "something else")]):
        return tf.identity(x)
