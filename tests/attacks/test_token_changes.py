import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advreg.attacks.engine.token_changes import Changes, Gains

pytestmark = pytest.mark.every_backend

TOKENS = st.integers(0, 5)
TRIED = st.lists(st.tuples(TOKENS, TOKENS, st.floats(-9, 9) | st.just(np.inf)))


@given(st.lists(TRIED, max_size=4))
def test_gains_are_means_of_what_was_tried(parts):
    gains, expected = Gains(), {}
    for part in parts:
        old, new, found = (np.array([each[i] for each in part]) for i in range(3))
        gains.add(old.astype("int64"), new.astype("int64"), found.astype(float))
        for *pair, gain in part:
            if np.isfinite(gain):
                expected.setdefault(tuple(pair), []).append(gain)
    old, new = np.divmod(np.arange(36), 6)
    means = [np.mean(expected.get(pair, -np.inf)) for pair in zip(old, new)]  # noqa: B905
    np.testing.assert_allclose(gains.of(old, new), means, atol=1e-12)


def test_tokens_may_be_large():
    gains = Gains()
    gains.add(np.array([2**31 - 1, 0]), np.array([0, 2**31 - 1]), np.array([1.0, 2.0]))
    old = np.array([2**31 - 1, 0, 0])
    found = gains.of(old, np.array([0, 2**31 - 1, 0]))
    np.testing.assert_array_equal(found, [1.0, 2.0, -np.inf])


def changes():
    tokens = np.array([[1, 2], [1, 3]])
    candidates = np.array([[[5, 6], [7, -1]], [[5, 6], [8, 9]]])
    scores = np.array([[[0.1, 0.4], [0.3, 9.0]], [[4.0, 1.0], [3.0, 2.0]]])
    return Changes(tokens, candidates, candidates >= 0, scores)


def test_each_change_is_handed_out_once_and_the_best_first():
    handed = changes()
    found = [[], []]
    for _ in range(5):
        for row, place, token in zip(*handed.next(np.arange(2)), strict=True):
            found[row].append((place, token))
    assert found[0] == [(0, 6), (1, 7), (0, 5)]
    assert found[1] == [(0, 5), (1, 8), (1, 9), (0, 6)]


def test_what_raised_the_margin_elsewhere_comes_first():
    gains = Gains()
    old, new = np.array([1, 1, 3]), np.array([5, 6, 9])
    gains.add(old, new, np.array([2.0, -1.0, 1.0]))
    handed = changes()
    handed.next(np.array([1]))  # Its change to 5 is gone.
    rows, places, tokens = handed.next(np.arange(2), gains)
    np.testing.assert_array_equal(rows, [0, 1])
    np.testing.assert_array_equal(places, [0, 1])
    np.testing.assert_array_equal(tokens, [5, 9])
    # What is known to lower the margin is no better than what is not known.
    rows, places, tokens = handed.next(np.array([0]), gains)
    np.testing.assert_array_equal([rows, places, tokens], [[0], [0], [6]])
