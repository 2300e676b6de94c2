"""What `test_config.py` does not reach through the configurations."""

import keras
import numpy as np
import pytest

from advreg import checks

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a", "'a' (of type str)"), (None, "None (of type NoneType)"), (2, "2 (of type")],
)
def test_show_says_value_and_type(value, shown):
    assert checks.show(value).startswith(shown)


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
        length = checks.length("epsilon", value)
        assert length == 2.0
        assert type(length) is float
    assert checks.length("epsilon", 0) == 0.0


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
        checks.length("epsilon", value)


def test_a_magnitude_may_be_a_schedule():
    assert checks.magnitude("step", SCHEDULE) is SCHEDULE
    assert checks.magnitude("step", 1) == 1.0
    with pytest.raises(TypeError, match=r"`step` must be a number or a `keras.*None"):
        checks.magnitude("step", None)


def test_counts():
    assert checks.count("restarts", np.int8(3)) == 3
    assert type(checks.count("restarts", np.int8(3))) is int
    assert checks.count("restarts", 2**31 - 1) == 2**31 - 1


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
        checks.count("restarts", value)


def test_flags():
    assert checks.flag("targeted", np.True_) is True
    for value in (1, 0, None, "yes"):
        with pytest.raises(TypeError, match=f"`targeted` must be a bool.*{value!r}"):
            checks.flag("targeted", value)


def test_constraints_are_floats():
    value = checks.constraint("mask", {"a": [1, None], "b": np.arange(3)})
    assert value["a"] == [1.0, None]
    assert type(value["a"][0]) is float
    assert value["b"].dtype == "float64"
    assert not value["b"].flags.writeable


def test_errors_of_constraints_name_the_place():
    with pytest.raises(ValueError, match=r"`mask\['a'\]\[1\]` must not hold NaN"):
        checks.constraint("mask", {"a": [1, np.nan]})
    with pytest.raises(TypeError, match=r"`mask\['a'\]\[1\]` must be a number.*'x'"):
        checks.constraint("mask", {"a": [1, "x"]})


def test_masks_lie_between_0_and_1():
    checks.check_mask({"a": 0.0, "b": [None, np.array([0.5, 1.0])]})
    with pytest.raises(ValueError, match=r"`feature_mask`.*\[0, 1\].*-1.0 to 0.5"):
        checks.check_mask([np.array([0.5, -1.0])])


def test_the_place_of_a_crossed_range_is_named():
    checks.check_order({"a": 0.0}, {"a": 0.0, "b": -1.0})
    with pytest.raises(ValueError, match=r"clip_value_min\['a'\]\[1\].*2.0 and 1.0"):
        checks.check_order({"a": [0.0, 2.0]}, {"a": [1.0, 1.0]})
