import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, cross_entropy, regularized
from helpers.oracle import steepest
from keras import layers

from advreg import AdversarialRegularization, make_adv_reg_config
from advreg.attacks.engine.target import TargetModel
from advreg.network.images import as_float_input_model, as_floats

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 4, 1)).astype("uint8")
LABELS = RNG.integers(0, 3, 12)
CONFIG = make_adv_reg_config(
    multiplier=0.5, adv_step_size=9.0, clip_value_min=0.0, clip_value_max=255.0
)


def network(**declared):
    stack = [layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3)]
    return keras.Sequential([keras.Input((4, 4, 1), **declared), *stack])


def nested():
    inputs = keras.Input((4, 4, 1), dtype="uint8")
    return keras.Model(inputs, network(dtype="uint8")(inputs))


class Rescaled(keras.Model):
    def __init__(self):
        super().__init__()
        self.network = network()

    def call(self, inputs, training=False):
        return self.network(inputs)


BASES = {
    "declared as floats": network,
    "declared as bytes": lambda: network(dtype="uint8"),
    "nested": nested,
    "built by its data": lambda: keras.Sequential(network().layers),
    "subclassed": Rescaled,
}


def step(base, x, mode):
    keras.utils.set_random_seed(0)
    model = regularized(base(), CONFIG, metrics=["accuracy"], **mode)
    logs = model.train_on_batch(x, LABELS, return_dict=True)
    return model, logs


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, "eager") for kind in BASES),
        ("nested", "function"),
        *(
            pytest.param(kind, mode, marks=pytest.mark.slow)
            for mode, fast in (("function", "nested"), ("jit", None))
            for kind in BASES
            if kind != fast
        ),
    ],
    indirect=["mode"],
)
def test_bytes_train_as_floats_do(kind, mode):
    expected, logs = step(network, IMAGES.astype("float32"), mode)
    model, got = step(BASES[kind], IMAGES, mode)
    for name, value in logs.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", BASES)
def test_bytes_move_in_the_units_of_the_input(kind):
    model = regularized(BASES[kind](), CONFIG)
    x_adv = model.perturb_on_batch(IMAGES, LABELS)
    assert x_adv.dtype == "float32"
    x = tf.constant(IMAGES, "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        plain = as_float_input_model(model.base_model)
        loss = cross_entropy()(LABELS, plain(x))
    gradient = tape.gradient(loss, x).numpy().reshape(12, -1)
    moved = (9.0 * steepest(gradient, "l2")).reshape(IMAGES.shape)
    np.testing.assert_allclose(x_adv, np.clip(x + moved, 0, 255), atol=1e-2)
    assert np.abs(x_adv - IMAGES).max() > 1.0


def test_evaluating_bytes_is_the_base_s():
    model, _ = step(BASES["declared as bytes"], IMAGES, {})
    base = model.base_model
    base.compile("sgd", cross_entropy(), metrics=["accuracy"])
    arguments = {"verbose": 0, "return_dict": True}
    assert model.evaluate(IMAGES, LABELS, **arguments) == base.evaluate(
        IMAGES, LABELS, **arguments
    )
    np.testing.assert_array_equal(
        model.predict(IMAGES, verbose=0), base.predict(IMAGES, verbose=0)
    )


def test_exported_models_take_bytes(tmp_path):
    model, _ = step(BASES["declared as bytes"], IMAGES, {})
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(
        served.serve(IMAGES), model.predict(IMAGES, verbose=0), rtol=1e-5
    )


def test_only_bytes_that_form_images_become_floats():
    features = {
        "image": tf.zeros((2, 3, 3), "uint8"),
        "flags": tf.zeros((2, 3), "uint8"),
        "ids": tf.zeros((2, 3, 3), "int32"),
        "text": tf.constant([["a"], ["b"]]),
        "none": None,
    }
    got = as_floats(features)
    assert got["image"].dtype == "float32"
    for name in ("flags", "ids", "text", "none"):
        assert got[name] is features[name]


def test_masks_that_are_labels_too_stay_bytes():
    seen = set()

    class Base(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs, training=False):
            seen.add((inputs["x"].dtype, inputs["label"].dtype, training))
            return self.dense(layers.Flatten()(inputs["x"]))

    x = {"x": IMAGES, "label": np.zeros((12, 4, 4), "uint8")}
    model = AdversarialRegularization(Base(), base_with_labels_in_features=True)
    model.compile("sgd", lambda y, y_pred: keras.ops.mean(y_pred**2, -1))
    model.fit(x, verbose=0)
    model.evaluate(x, verbose=0)
    assert {label for _, label, _ in seen} == {tf.uint8}
    assert (tf.float32, tf.uint8, True) in seen


def test_masks_among_declared_inputs_stay_bytes():
    inputs = {
        name: keras.Input((4, 4, 1), dtype="uint8", name=name)
        for name in ("x", "label")
    }
    seen = []
    flat = layers.Flatten()(layers.Rescaling(1 / 255)(inputs["x"]))

    class Noting(layers.Layer):
        def call(self, x):
            seen.append(keras.backend.standardize_dtype(x.dtype))
            return x

    mask = layers.Flatten()(layers.Rescaling(0.1)(Noting()(inputs["label"])))
    base = keras.Model(inputs, layers.Dense(3)(layers.Concatenate()([flat, mask])))
    model = AdversarialRegularization(
        base, make_adv_reg_config(adv_step_size=9.0), base_with_labels_in_features=True
    )
    model.compile("sgd", lambda y, y_pred: keras.ops.mean(y_pred**2, -1))
    # In another order than that of the alphabet.
    x = collections.OrderedDict(x=IMAGES, label=IMAGES[::-1] // 99)
    del seen[:]
    model.fit(dict(x), verbose=0)
    x_adv = model.perturb_on_batch(x)
    assert set(seen) == {"uint8"}
    assert (x_adv["x"] != IMAGES).any()
    np.testing.assert_array_equal(x_adv["label"], x["label"])
    features, _ = TargetModel(model, None).unpack((dict(x), None))
    assert (features["x"].dtype, features["label"].dtype) == (tf.float32, tf.uint8)


def test_images_beside_other_features():
    image, flags = keras.Input((4, 4, 1), dtype="uint8"), keras.Input((2,))
    ids = keras.Input((2, 2), dtype="uint8")
    embedded = layers.Flatten()(layers.Embedding(5, 2)(ids))
    pixels = layers.Flatten()(layers.Rescaling(1 / 255)(image))
    both = layers.Concatenate()([pixels, flags, embedded])
    model = regularized(keras.Model([image, flags, ids], layers.Dense(3)(both)), CONFIG)
    x = [IMAGES, RNG.random((12, 2)).astype("float32"), IMAGES[:, :2, :2, 0] % 5]
    assert np.isfinite(model.train_on_batch(x, LABELS)).all()
    got = model.perturb_on_batch(x, LABELS)
    assert [leaf.dtype for leaf in got] == ["float32", "float32", "uint8"]
    assert (got[0] != x[0]).any()
    assert (got[1] != x[1]).any()
    np.testing.assert_array_equal(got[2], x[2])


class Optional(layers.Layer):
    def call(self, a, b=None):
        return a if b is None else a + b

    def compute_output_shape(self, a_shape, b_shape=None):
        return a_shape


def test_images_beside_an_input_that_is_not_there():
    image = keras.Input((4, 4, 1), dtype="uint8")
    other = keras.Input((3,), optional=True)
    logits = layers.Dense(3)(layers.Flatten()(layers.Rescaling(1 / 255)(image)))
    model = regularized(keras.Model([image, other], Optional()(logits, other)), CONFIG)
    assert np.isfinite(model.train_on_batch([IMAGES, None], LABELS)).all()


def test_a_multiplier_of_zero_leaves_bytes_to_the_base():
    seen = []

    class Base(Rescaled):
        def call(self, inputs, training=False):
            seen.append(inputs.dtype)
            return super().call(inputs)

    for multiplier in (0.0, 0.1):
        regularized(
            Base(), make_adv_reg_config(multiplier), run_eagerly=True
        ).train_on_batch(IMAGES, LABELS)
    assert seen[0] == "uint8"
    assert set(seen[-2:]) == {tf.float32}


# --- The twin


def test_a_model_without_bytes_is_its_own_twin():
    for model in (classifier(), network(), Rescaled(), keras.Sequential([])):
        assert as_float_input_model(model) is model


def test_a_twin_shares_layers_and_losses():
    inputs = keras.Input((4, 4, 1), dtype="uint8")
    hidden = layers.Rescaling(1 / 255)(inputs)
    hidden = layers.Conv2D(2, 3, activity_regularizer="l2")(hidden)
    hidden = layers.Flatten()(layers.BatchNormalization()(hidden))
    model = keras.Model(inputs, layers.Dense(3, kernel_regularizer="l2")(hidden))
    model.layers[2].trainable = False
    twin = as_float_input_model(model)
    assert all(v is w for v, w in zip(twin.variables, model.variables, strict=True))
    assert len(twin.trainable_variables) == len(model.trainable_variables)
    np.testing.assert_array_equal(twin(IMAGES.astype("float32")), model(IMAGES))
    assert len(model.losses) == 2


def test_a_model_whose_own_call_takes_bytes_has_no_twin():
    class Own(keras.Model):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training)

    inputs = keras.Input((4, 4, 1), dtype="uint8")
    outputs = layers.Dense(3)(layers.Flatten()(layers.Rescaling(1 / 255)(inputs)))
    own = Own(inputs, outputs)
    assert as_float_input_model(own) is own
    # Keras truncates floats before the gradient could reach them.
    with pytest.raises(ValueError, match=r"Nothing can be perturbed"):
        regularized(own).train_on_batch(IMAGES, LABELS)


def test_layers_added_after_wrapping_are_in_the_twin():
    base = network(dtype="uint8")
    model = AdversarialRegularization(base, CONFIG)
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    model.train_on_batch(IMAGES, LABELS)
    base.add(layers.Dense(3, use_bias=False))
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    before = base.layers[-1].get_weights()[0]
    model.train_on_batch(IMAGES, LABELS)
    assert (base.layers[-1].get_weights()[0] != before).any()
