"""What `test_config.py` does not reach through the configurations."""

import pathlib
import re

import keras
import numpy as np
import pandas as pd
import pytest
from keras import ops

import advreg
from advreg import attacks, callbacks, checks

pytestmark = pytest.mark.every_backend

TENSOR = type(ops.zeros(())).__name__  # EagerTensor, ArrayImpl or Tensor.
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a", "'a' (of type str)"), (None, "None (of type NoneType)"), (2, "2 (of type")],
)
def test_show_says_value_and_type(value, shown):
    assert checks.describe_value(value).startswith(shown)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        (1, True),
        (0.5, True),
        (np.float32(0.5), True),
        (np.int64(3), True),
        (True, False),
        (np.True_, False),
        ("1", False),
        (1j, False),
        (None, False),
        (np.array(1.0), False),
    ],
)
def test_numbers(value, is_one):
    assert checks.is_number(value) is is_one


def test_a_length_is_a_float():
    for value in (2, np.float32(2), np.array(2.0)):
        length = checks.check_nonnegative("epsilon", value)
        assert length == 2.0
        assert type(length) is float
    assert checks.check_nonnegative("epsilon", 0) == 0.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.5, ValueError, "not negative. Received: -0.5"),
        (np.nan, ValueError, "not negative. Received: nan"),
        (np.inf, ValueError, "not negative. Received: inf"),
        (10**400, ValueError, "not negative. Received: 1000"),
        ("0.1", TypeError, r"a number. Received: '0.1' \(of type str\)"),
        (True, TypeError, "a number. Received: True"),
        ([0.1], TypeError, r"a number. Received: \[0.1\]"),
        (np.ones(1), TypeError, "a number. Received: array"),
        (SCHEDULE, TypeError, "a number. Received: .*ExponentialDecay"),
    ],
)
def test_what_is_no_length(value, error, message):
    with pytest.raises(error, match=f"`epsilon` must be.*{message}"):
        checks.check_nonnegative("epsilon", value)


def test_a_magnitude_may_be_a_schedule():
    assert checks.check_nonnegative_or_schedule("step", SCHEDULE) is SCHEDULE
    assert checks.check_nonnegative_or_schedule("step", 1) == 1.0
    with pytest.raises(TypeError, match=r"`step` must be a number or a `keras.*None"):
        checks.check_nonnegative_or_schedule("step", None)


def test_counts():
    assert checks.check_count("restarts", np.int8(3)) == 3
    assert type(checks.check_count("restarts", np.int8(3))) is int
    assert checks.check_count("restarts", 2**31 - 1) == 2**31 - 1


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**31, ValueError),
        (1.0, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_count(value, error):
    with pytest.raises(error, match=f"`restarts` must be .*Received: {value!r}"):
        checks.check_count("restarts", value)


def test_flags():
    assert checks.check_bool("targeted", np.True_) is True
    for value in (1, 0, None, "yes"):
        with pytest.raises(TypeError, match=f"`targeted` must be a bool.*{value!r}"):
            checks.check_bool("targeted", value)


def test_constraints_are_floats():
    value = checks.check_constraint("mask", {"a": [1, None], "b": np.arange(3)})
    assert value["a"] == [1.0, None]
    assert type(value["a"][0]) is float
    assert value["b"].dtype == "float64"
    assert not value["b"].flags.writeable


def test_errors_of_constraints_name_the_place():
    with pytest.raises(ValueError, match=r"`mask\['a'\]\[1\]` must not hold NaN"):
        checks.check_constraint("mask", {"a": [1, np.nan]})
    with pytest.raises(TypeError, match=r"`mask\['a'\]\[1\]` must be a number.*'x'"):
        checks.check_constraint("mask", {"a": [1, "x"]})


def test_masks_lie_between_0_and_1():
    checks.check_mask({"a": 0.0, "b": [None, np.array([0.5, 1.0])]})
    with pytest.raises(ValueError, match=r"`feature_mask`.*\[0, 1\].*-1.0 to 0.5"):
        checks.check_mask([np.array([0.5, -1.0])])


def test_the_place_of_a_crossed_range_is_named():
    checks.check_order({"a": 0.0}, {"a": 0.0, "b": -1.0})
    with pytest.raises(ValueError, match=r"clip_value_min\['a'\]\[1\].*2.0 and 1.0"):
        checks.check_order({"a": [0.0, 2.0]}, {"a": [1.0, 1.0]})


# What errors show


class Far(keras.Model):
    """A model that shows itself in many lines, as some do."""

    def __repr__(self):
        return "Far(\n" + 100 * "  with a line,\n" + ")"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.zeros((2, 3)), "ndarray(shape=(2, 3), dtype=float64)"),
        (ops.zeros((2, 3)), f"{TENSOR}(shape=(2, 3), dtype=float32)"),
        (ops.zeros(7), f"{TENSOR}(shape=(7,), dtype=float32)"),
        (keras.Input((2,)), "KerasTensor(shape=(None, 2), dtype=float32)"),
        (np.array([1.0, np.nan]), "array([ 1., nan])"),
        (np.float32(0.5), repr(np.float32(0.5))),
        ([np.zeros((9, 9)), 1], "[ndarray(shape=(9, 9), dtype=float64), 1]"),
        ((np.zeros((9, 9)),), "(ndarray(shape=(9, 9), dtype=float64),)"),
        ({"a": np.zeros((9, 9))}, "{'a': ndarray(shape=(9, 9), dtype=float64)}"),
        (list(range(100)), str(list(range(20)))[:-1] + ", ... (100 in all)]"),
        ("x" * 1000, "'" + "x" * 299 + "..."),
        ({1: "a"}, "{1: 'a'}"),
        ((), "()"),
        (np.ndarray, "<class 'numpy.ndarray'>"),
    ],
)
def test_brief_is_one_short_line(value, shown):
    assert checks.brief(value) == shown


def test_long_representations_are_cut_and_have_one_line():
    shown = checks.brief(Far())
    assert shown.startswith("Far( with a line, with a line,")
    assert len(shown) == 303
    frame = pd.DataFrame({"a": range(50), "b": range(50)})
    assert checks.describe_value(frame) == "DataFrame(shape=(50, 2))"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("model.keras", r"Load a saved model first: `keras.models.load_model\('mod"),
        (pathlib.Path("m.keras"), r"`keras\.models\.load_model\('m.keras'\)`"),
        (np.zeros((8, 6)), r"The model comes first.*Received: ndarray\(shape=\(8, 6\)"),
        (keras.Sequential, "Pass an object of the class"),
        (None, r"`keras\.Model`\. Received: None \(of type builtins\.NoneType\)"),
    ],
)
def test_what_is_no_model(value, hint):
    x, y = np.zeros((8, 6), "float32"), np.zeros(8, "int64")
    for call in (
        lambda: advreg.AdversarialRegularization(value),
        lambda: advreg.evaluate_robustness(value, x, y, attacks=attacks.FGSM(0.1)),
        lambda: attacks.PGD(0.1)(value, x, y),
        lambda: attacks.Transfer(attacks.PGD(0.1), value),
    ):
        with pytest.raises(TypeError, match=rf"model` must be a Keras 3 model.*{hint}"):
            call()


X, Y = np.random.default_rng(0).random((200, 30)), np.zeros(200, "int64")
MODEL = keras.Sequential([keras.Input((30,)), keras.layers.Dense(3)])
FGSM, PGD = attacks.FGSM(0.1), attacks.PGD(0.1)
CLASS = advreg.AdversarialRegularization


@pytest.mark.parametrize(
    "call",
    [
        lambda: CLASS(X, MODEL),
        lambda: CLASS(MODEL, X),
        lambda: CLASS(MODEL, label_keys=X),
        lambda: CLASS(MODEL, sample_weight_key=X),
        lambda: CLASS(MODEL, base_with_labels_in_features=X),
        lambda: CLASS(MODEL, trainable=X),
        lambda: setattr(CLASS(MODEL), "base_model", X),
        lambda: advreg.evaluate_robustness(X, Y, MODEL, attacks=FGSM),
        lambda: advreg.evaluate_robustness(MODEL, X, Y, attacks=X),
        lambda: advreg.evaluate_robustness(MODEL, X, Y, attacks=[FGSM, [X]]),
        lambda: advreg.evaluate_robustness(MODEL, X, Y, attacks=FGSM, batch_size=X),
        lambda: advreg.evaluate_robustness(MODEL, X[:0], Y[:0], attacks=FGSM),
        lambda: advreg.evaluate_robustness(MODEL, X, Y, attacks=FGSM, from_logits=X),
        lambda: PGD(X, Y, MODEL),
        lambda: PGD(MODEL, X[:0], Y[:0]),
        lambda: PGD(MODEL, iter([X]), Y),
        lambda: PGD(MODEL, X, Y, batch_size=X),
        lambda: attacks.PGD(X),
        lambda: attacks.PGD(MODEL),
        lambda: attacks.PGD(0.1, norm=X),
        lambda: attacks.PGD(0.1, loss=X),
        lambda: attacks.PGD(0.1, seed=X),
        lambda: attacks.PGD(0.1, iterations=X),
        lambda: attacks.Transfer(X, MODEL),
        lambda: attacks.Transfer(PGD, X),
        lambda: callbacks.RobustAccuracy((X, Y), PGD),
        lambda: callbacks.RobustAccuracy(PGD, (None, X)),
        lambda: callbacks.RobustAccuracy(PGD, (X, Y), name=X),
        lambda: callbacks.CatastrophicOverfitting((X, Y), PGD),
        lambda: callbacks.CatastrophicOverfitting(PGD, (X, Y), single_step=X),
        lambda: callbacks.CatastrophicOverfitting(PGD, (X, Y), max_gap=X),
        lambda: advreg.AdvNeighborConfig(adv_step_size=X),
        lambda: advreg.AdvNeighborConfig(adv_grad_norm=X),
        lambda: advreg.AdvRegConfig(multiplier=X),
        lambda: advreg.AdvRegConfig(adv_neighbor_config=X),
        lambda: advreg.AdvRegConfig(objective=X),
        lambda: advreg.gen_adv_neighbor(X, Y, X),
        lambda: advreg.adversarial_loss(X, Y, MODEL, X),
        lambda: advreg.adversarial_loss(X, Y, MODEL, len, adv_config=X),
    ],
)
def test_errors_show_no_arrays(call):
    """Whatever is passed at the wrong place, the error fits on the screen."""
    with pytest.raises((TypeError, ValueError, AttributeError)) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    assert re.search(r"Received|given", message)
    assert not re.search(r"\d\.\d{6}", message), "It shows values of the array."
