"""What all attacks share, by the example of the simplest."""

import copy
import dataclasses
import gc
import pickle
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import Subclassed, busy_base, classifier, rows
from helpers.slow import slow
from keras import layers

from advreg import AdversarialRegularization
from advreg.attacks import BIM, FGSM, PGD

X = rows(20, 6)
Y = np.random.default_rng(1).integers(0, 3, 20)
FAST = {"epsilon": 0.3, "iterations": 3, "seed": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": -1}, ValueError, "`epsilon`.*not negative.*-1"),
        ({"epsilon": np.nan}, ValueError, "`epsilon`.*finite.*nan"),
        ({"epsilon": np.inf}, ValueError, "`epsilon`.*finite.*inf"),
        ({"epsilon": "0.1"}, TypeError, "`epsilon`.*number.*'0.1'"),
        ({"epsilon": None}, TypeError, "`epsilon`.*number.*None"),
        (
            {"epsilon": keras.optimizers.schedules.CosineDecay(0.1, 5)},
            TypeError,
            "`epsilon` must be a number. Received: .*CosineDecay",
        ),
        ({"norm": "l3"}, ValueError, "`norm`.*'l1', 'l2' and 'infinity'.*'l3'"),
        ({"norm": None}, ValueError, "`norm`.*None"),
        ({"norm": [1]}, ValueError, r"`norm`.*\[1\]"),
        ({"targeted": 1}, TypeError, "`targeted`.*bool.*1"),
        ({"from_logits": "yes"}, TypeError, "`from_logits`.*bool.*'yes'"),
        ({"seed": 1.5}, TypeError, "`seed`.*integer or `None`.*1.5"),
        ({"seed": True}, TypeError, "`seed`.*True"),
        ({"seed": -1}, ValueError, r"`seed`.*0 and 2\*\*32 - 1.*-1"),
        ({"seed": 2**32}, ValueError, "`seed`.*4294967296"),
        ({"feature_mask": 2}, ValueError, r"`feature_mask`.*\[0, 1\].*2.0"),
        ({"clip_value_min": "a"}, TypeError, "`clip_value_min`.*number.*'a'"),
        (
            {"clip_value_min": 1, "clip_value_max": 0},
            ValueError,
            "`clip_value_min` must not be above.*1.0 and 0.0",
        ),
        (
            {"epsilon": 1.5, "clip_value_min": 0, "clip_value_max": 1},
            ValueError,
            "`epsilon` must not be larger than the range.*1 wide. Received: 1.5",
        ),
        ({"eps": 0.1}, TypeError, "eps"),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        FGSM(**{"epsilon": 0.1, **arguments})


def test_the_radius_may_be_as_large_as_the_range():
    FGSM(epsilon=1.0, clip_value_min=0.0, clip_value_max=1.0)
    FGSM(epsilon=0.3, clip_value_min=-0.1, clip_value_max=0.2)


def test_only_the_radius_goes_without_a_name():
    assert FGSM(0.1).epsilon == 0.1
    with pytest.raises(TypeError, match="positional"):
        FGSM(0.1, "l2")


def test_an_attack_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FGSM(0.1).epsilon = 0.2


def test_repr_shows_what_is_not_the_default():
    assert repr(FGSM(0.1)) == "FGSM(epsilon=0.1)"
    assert (
        repr(PGD(0.1, norm=2, restarts=3)) == "PGD(epsilon=0.1, norm='l2', restarts=3)"
    )
    assert eval(repr(PGD(0.1, momentum=0.5))).momentum == 0.5


def test_another_radius_scales_the_step():
    assert PGD(0.1, step_size=0.02).with_epsilon(0.3).step_size == pytest.approx(0.06)
    assert PGD(0.1).with_epsilon(0.3).step_size is None
    assert PGD(0.1, iterations=7).with_epsilon(0.3).iterations == 7
    with pytest.raises(ValueError, match=r"`epsilon=0`. Received: PGD\(epsilon=0.0"):
        PGD(0.0, step_size=0.1).with_epsilon(0.3)
    with pytest.raises(ValueError, match=r"`epsilon`.*-1"):
        PGD(0.1).with_epsilon(-1)


def test_an_attack_survives_copying_and_pickling():
    attack = PGD(0.1, norm="l1", clip_value_max=np.ones(3))
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert repr(other) == repr(attack)


class TestInputs:
    def test_structure_and_types_come_back(self):
        number = keras.Input((), dtype="int32", name="number")
        inputs = [keras.Input((6,), name="x"), number]
        both = [inputs[0], layers.Embedding(5, 2)(number)]
        outputs = layers.Dense(3)(layers.Concatenate()(both))
        x = [X.astype("float64"), np.arange(20) % 5]
        as_list = PGD(**FAST)(keras.Model(inputs, outputs), x, Y, batch_size=7)
        assert type(as_list) is list
        model = keras.Model(dict(zip(("x", "number"), inputs, strict=True)), outputs)
        named = dict(zip(("x", "number"), x, strict=True))
        as_dict = PGD(**FAST)(model, named, Y, batch_size=7)
        assert list(as_dict) == ["x", "number"]
        for moved, number in (as_list, as_dict.values()):
            assert (moved.dtype, number.dtype) == ("float64", x[1].dtype)
            assert (moved != x[0]).any()
            np.testing.assert_array_equal(number, x[1])
        np.testing.assert_array_equal(as_list[0], as_dict["x"])

    def test_tensors_and_variables_are_arrays(self):
        model = classifier()
        expected = PGD(**FAST)(model, X, Y)
        for make in (tf.constant, tf.Variable):
            got = PGD(**FAST)(model, make(X), make(Y))
            assert isinstance(got, np.ndarray)
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("declared", ["float32", "uint8"])
    def test_images_of_bytes_come_back_as_floats(self, declared):
        images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), "uint8")
        model = keras.Sequential(
            [
                keras.Input((4, 4, 1), dtype=declared),
                layers.Rescaling(1 / 255),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        y = model.predict(images, verbose=0).argmax(1)
        attack = FGSM(2.5, clip_value_min=0, clip_value_max=255)
        got = attack(model, images, y)
        assert got.dtype == "float32"
        assert np.abs(got - images).max() == 2.5
        assert got.min() >= 0
        assert got.max() <= 255

    def test_sequences_of_any_length_with_padding(self):
        model = keras.Sequential(
            [
                keras.Input((None, 2)),
                layers.Masking(),
                layers.SimpleRNN(4),
                layers.Dense(3),
            ]
        )
        for length in (4, 7):
            x = rows(6, length, 2)
            x[:, 3:] = 0
            got = PGD(**FAST, clip_value_max=3.0)(model, x, Y[:6])
            assert not got[:, 3:].any()
            assert (got != x).any()

    def test_nan_stays(self):
        x = X.copy()
        x[3, 2] = np.nan
        got = PGD(**FAST)(classifier(), x, Y)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(x))

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (
                X[:0],
                ValueError,
                r"`x` must hold examples. Received: array\(\[\], shape",
            ),
            (np.full((20, 6), "a"), ValueError, "Nothing can be perturbed.*string"),
            (((X, Y) for _ in ()), TypeError, "`x` must be an array.*generator"),
            (
                tf.data.Dataset.from_tensors((X, Y)),
                TypeError,
                r"`x` must be an array.*`for x, y in data: attack\(.*Dataset",
            ),
            (X.tolist(), ValueError, "`x` must be an array.*NumPy array"),
        ],
    )
    def test_what_cannot_be_attacked(self, x, error, message):
        y = Y[: len(x)] if isinstance(x, np.ndarray) else Y
        with pytest.raises(error, match=f"(?s){message}"):
            FGSM(0.1)(classifier(), x, y)

    @pytest.mark.parametrize(
        ("size", "error"),
        [(0, ValueError), (-1, ValueError), (2.5, TypeError), (None, TypeError)],
    )
    def test_batch_sizes(self, size, error):
        with pytest.raises(error, match=f"`batch_size`.*Received: {size}"):
            FGSM(0.1)(classifier(), X, Y, batch_size=size)


class TestRange:
    def test_data_outside_the_range(self):
        attack = FGSM(0.1, clip_value_min=0.0, clip_value_max=1.0)
        x = np.linspace(-3, 200, 120, dtype="float32").reshape(20, 6)
        with pytest.raises(ValueError, match=r"`x`.*from -3 to 200.*from 0 to 1"):
            attack(classifier(), x, Y)

    def test_only_one_end_counts_too(self):
        x = np.abs(X)
        FGSM(0.1, clip_value_min=0.0)(classifier(), x, Y)
        with pytest.raises(ValueError, match="`x` must lie in the clip range"):
            FGSM(0.1, clip_value_max=0.0)(classifier(), x, Y)

    def test_a_rounding_is_no_offence(self):
        x = np.full((20, 6), np.float32(1) + np.finfo("float32").eps)
        got = FGSM(0.1, clip_value_max=1.0)(classifier(), x, Y)
        assert got.max() <= 1 + 1e-6

    @pytest.mark.parametrize(
        ("norm", "widest"), [("l1", "6"), ("l2", "2.44949"), ("infinity", "1")]
    )
    def test_a_radius_beyond_the_range(self, norm, widest):
        limits = {"clip_value_min": np.zeros(6), "clip_value_max": 1.0, "norm": norm}
        x = np.clip(X, 0, 1)
        FGSM(float(widest), **limits)(classifier(), x, Y)
        match = f"`epsilon`.*than {widest} in the {norm}"
        if norm == "infinity":  # That is known before there is any data.
            match = "`epsilon` must not be larger than the range.*which is 1 wide"
        with pytest.raises(ValueError, match=match):
            FGSM(float(widest) * 1.1, **limits)(classifier(), x, Y)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"feature_mask": {"a": 1}}, "`feature_mask`.*is a dictionary"),
            ({"feature_mask": [1, 0]}, "`feature_mask`.*is a list.*NumPy array"),
            ({"feature_mask": np.ones(3)}, r"`feature_mask`.*shape: \(3,\)"),
            ({"clip_value_max": np.full(5, 9)}, r"`clip_value_max`.*shape: \(5,\)"),
        ],
    )
    def test_what_does_not_fit(self, arguments, message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            FGSM(0.1, **arguments)(classifier(), X, Y)


@pytest.mark.parametrize(
    ("classes", "targeted", "needed"), [(1, False, 3), (2, False, 3), (3, True, 4)]
)
def test_dlr_needs_classes(classes, targeted, needed):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(classes)])
    message = f"`loss='dlr'` needs {needed} classes.*'margin'`.*of {max(classes, 2)}"
    with pytest.raises(ValueError, match=message):
        FGSM(0.1, loss="dlr", targeted=targeted)(model, X, Y % 2)


class TestModels:
    def fooled(self, model):
        """The share of its predictions that an attack changes."""
        score = model.predict(X, verbose=0)
        y = score.argmax(1) if score.shape[1] > 1 else (score[:, 0] > 0.5).astype(int)
        got = PGD(epsilon=1.0, iterations=20, seed=1)(model, X, y)
        assert np.abs(got - X).max() <= 1 + 1e-6
        score = model.predict(got, verbose=0)
        after = score.argmax(1) if score.shape[1] > 1 else score[:, 0] > 0.5
        return np.mean(after != y)

    def test_labels_in_dictionaries_of_a_wrapped_model(self):
        base = classifier()
        expected = PGD(**FAST)(base, X, Y)
        wrapped = AdversarialRegularization(base, label_keys=["truth"])
        got = PGD(**FAST)(wrapped, {"x": X, "truth": Y})
        assert list(got) == ["x"]
        np.testing.assert_array_equal(got["x"], expected)
        np.testing.assert_array_equal(PGD(**FAST)(wrapped, X, Y), expected)

    @pytest.mark.parametrize(
        "model",
        [
            lambda: classifier(),
            lambda: Subclassed(),
            lambda: keras.Sequential([layers.Dense(8, "relu"), layers.Dense(3)]),
            lambda: keras.Sequential([keras.Input((6,)), classifier()]),
            lambda: keras.Sequential([Subclassed(), layers.Softmax()]),
            lambda: keras.Sequential([keras.Input((6,)), layers.Dense(1, "sigmoid")]),
        ],
        ids=["functional", "subclassed", "unbuilt", "nested", "in one", "binary"],
    )
    def test_of_all_kinds_are_fooled(self, model):
        assert self.fooled(model()) > 0.5

    @pytest.mark.parametrize("make", [classifier, Subclassed])
    def test_unbuilt_at_the_start(self, make):
        got = FGSM(0.1)(make(), X, Y)
        assert (got != X).any()

    @pytest.mark.parametrize("last", [None, "softmax"])
    def test_of_mixed_precision(self, last):
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            model = keras.Sequential(
                [keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3, last)]
            )
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert self.fooled(model) > 0.5

    @pytest.mark.parametrize("loss", [None, "margin", "model"])
    def test_compiled_in_each_way(self, mode, loss):
        model, plain = classifier(), classifier()
        plain.set_weights(model.get_weights())
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **mode
        )
        plain.compile("sgd", model.loss)
        bim = BIM(0.3, iterations=3, loss=loss)
        np.testing.assert_allclose(bim(model, X, Y), bim(plain, X, Y), atol=1e-5)

    @pytest.mark.parametrize("batch_size", [3, *slow(8, 32)])
    @pytest.mark.parametrize("count", [*slow(5), 20])
    def test_built_for_one_batch_size(self, batch_size, count):
        fixed = keras.Sequential(
            [
                keras.Input(batch_shape=(8, 6)),
                layers.Reshape((3, 2)),
                layers.LSTM(4, stateful=True),
                layers.Dense(3),
            ]
        )
        free = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Reshape((3, 2)),
                layers.LSTM(4),
                layers.Dense(3),
            ]
        )
        free.set_weights(fixed.get_weights())
        bim, x, y = BIM(0.3, iterations=3), X[:count], Y[:count]
        got = bim(fixed, x, y, batch_size=batch_size)
        np.testing.assert_allclose(got, bim(free, x, y), atol=1e-5)

    def test_nothing_of_them_changes(self, mode):
        model = busy_base()
        model.compile("sgd", "sparse_categorical_crossentropy", **mode)
        model.fit(X, Y, verbose=0)
        dropout = [layer for layer in model.layers if isinstance(layer, layers.Dropout)]
        seeds = [layer.seed_generator for layer in dropout]

        def state():
            variables = [*model.variables, *model.optimizer.variables]
            variables += [v for metric in model.metrics for v in metric.variables]
            variables += [seed.state for seed in seeds]
            return [np.array(variable) for variable in variables]

        assert seeds
        before = state()
        PGD(**FAST)(model, X, Y)
        for a, b in zip(before, state(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_they_can_go(self):
        for make in (
            classifier,
            Subclassed,
            lambda: AdversarialRegularization(classifier()),
        ):
            model = make()
            PGD(**FAST)(model, X, Y)
            reference = weakref.ref(model)
            del model
            gc.collect()
            assert reference() is None

    def test_they_are_saved_cloned_and_pickled_as_before(self, tmp_path):
        model = classifier()
        PGD(**FAST)(model, X, Y)
        expected = model.predict(X, verbose=0)
        model.save(tmp_path / "model.keras")
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        for other in (
            keras.models.load_model(tmp_path / "model.keras"),
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
            clone,
        ):
            np.testing.assert_array_equal(other.predict(X, verbose=0), expected)
            np.testing.assert_array_equal(
                PGD(**FAST)(other, X, Y), PGD(**FAST)(model, X, Y)
            )
