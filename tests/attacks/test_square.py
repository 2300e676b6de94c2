import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, labelled
from helpers.slow import slow, slow_rows
from helpers.targets import (
    UNIT,
    accuracy,
    assert_sound,
    digits,
    left_by,
    predicted,
    quantised,
    tracings,
)
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from advreg.attacks import PGD, Square
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.runner import run
from advreg.attacks.square import ImageGrid, SquareSearch, _flip, _peaks
from advreg.config.norms import NormType

NORMS = ("infinity", "l2")


class Watched(keras.Model):
    """A classifier in which all classes are equal, that keeps the inputs it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, inputs):
        self.seen.append(inputs.numpy())
        flat = layers.Flatten()(inputs)
        return keras.ops.concatenate([flat[:, :1] * 0 + 1, flat[:, :2] * 0], axis=1)


class Summing(Watched):
    """The same, but the smaller the sum, the closer to being fooled."""

    def call(self, inputs):
        scores = super().call(inputs)
        total = keras.ops.sum(layers.Flatten()(inputs), axis=1, keepdims=True)
        return scores + keras.ops.concatenate([total, total * 0, total * 0], axis=1)


def watch(model, x, **arguments):
    model.compile(run_eagerly=True)
    attack = Square(**{"epsilon": 0.25, "seed": 0, **arguments})
    x_adv = attack(model, x, np.zeros(len(x), int), batch_size=len(x))
    moved = [seen - x for seen in model.seen if len(seen) == len(x)]
    # The inputs themselves are seen several times before the first query: once here.
    return [x * 0, *(move for move in moved if move.any())], x_adv - x


class TestTheSearch:
    def test_starts_with_vertical_stripes(self):
        x = np.full((3, 9, 12, 2), 0.5, "float32")
        # The model is first seen when its outputs are, and then in the first query.
        moved = watch(Watched(), x, queries=2)[0][1]
        np.testing.assert_allclose(np.abs(moved), 0.25, rtol=1e-6)
        assert np.all(moved == moved[:, :1])
        assert len(np.unique(moved[:, 0].reshape(3, -1), axis=0)) == 3
        assert (moved[0, 0, :, 0] != moved[0, 0, :, 1]).any()

    def test_changes_one_square_in_each_query(self):
        x = np.full((4, 16, 16, 2), 0.5, "float32")
        moved = watch(Watched(), x, queries=40)[0][1:-1]
        assert len(moved) == 40
        sides = set()
        for query, tried in enumerate(moved[1:], 1):
            assert np.isin(np.abs(tried), np.float32([0.25])).all()
            changed = (tried != moved[0]).any(axis=-1)  # Nothing beats the start.
            for picture, example in zip(changed, tried, strict=True):
                lines, columns = (np.flatnonzero(picture.any(axis=a)) for a in (1, 0))
                assert len(lines)  # No query is lost.
                # p = 0.8 · 2⁻ⁿ after 10, 50, 200 ... of 10,000 queries.
                halvings = np.sum(
                    query * 250
                    > np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
                )
                side = int(np.clip(np.round(16 * np.sqrt(0.8 / 2**halvings)), 1, 16))
                assert lines[-1] - lines[0] < side
                assert columns[-1] - columns[0] < side
                sides.add(side)
                window = example[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
                assert window.shape[2] == 2
        assert len(sides) > 3

    def test_keeps_what_raises_the_loss(self):
        x = np.full((2, 6, 6, 1), 0.5, "float32")
        queries, end = watch(Summing(), x, queries=60)
        # Those before and after the queries look at the input and at the end.
        totals = np.array([q.sum(axis=(1, 2, 3)) for q in queries[1:-1]])
        np.testing.assert_allclose(
            end.sum(axis=(1, 2, 3)), totals.min(axis=0), atol=1e-5
        )
        assert np.all(totals.min(axis=0) < totals[0])

    def test_windows_of_a_column_are_runs_of_neighbours(self):
        x = np.full((3, 40), 0.5, "float32")
        moved = watch(Watched(), x, queries=50, p_init=0.2)[0][1:-1]
        assert (np.diff(moved[0], axis=1) != 0).any()
        for tried in moved[10:]:
            changed = tried != moved[0]
            lengths = [np.ptp(np.flatnonzero(row)) + 1 for row in changed]
            assert max(lengths) <= 4  # At most 0.2 / 4 of 40, and the ends.

    @pytest.mark.parametrize("shape", [*slow((10, 10, 3)), (10, 7, 1), *slow((40,))])
    def test_l2_stays_on_the_sphere(self, shape):
        x = np.full((4, *shape), 0.5, "float32")
        moved = watch(Watched(), x, norm="l2", epsilon=1.5, queries=30)[0][1:-1]
        norms = [np.linalg.norm(m.reshape(4, -1), axis=1) for m in moved]
        np.testing.assert_allclose(norms[0], 1.5, rtol=1e-5)
        # Windows that overlap leave a little unused, never more than the ball has.
        assert np.max(norms) <= 1.5 * (1 + 1e-6)
        assert np.min(norms) > 1.2
        assert all((tried != moved[0]).any() for tried in moved[1:])


@pytest.mark.parametrize("draw", [0.0, 0.9])
def test_a_query_that_would_change_no_value_goes_to_the_other_ends(draw):
    """The flags of three values, which cannot move, are no change."""
    canvas, size = ImageGrid(2, 2, 1), (tf.constant(2), tf.constant(2))
    first = tf.constant([[True, False, False, False]])
    tried = _flip({"live": first}, first, canvas, size, tf.fill((1, 6), draw))
    assert not tried[0, 0]


def test_an_l2_bump_is_that_of_the_paper():
    """η of section 4.2, by its definition, in a window of 5 × 5."""
    n = 2

    def eta(height, width):
        table = np.zeros((height, width))
        for r in range(1, height + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
                table[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        return table

    expected = np.concatenate([eta(2, 5), -eta(3, 5)])
    line = tf.range(5)[None]
    size = (tf.constant(5), tf.constant(5))
    canvas = ImageGrid(5, 5, 1)
    upright = _peaks(line, line, size, tf.constant([[False]]), canvas)[0]
    lying = _peaks(line, line, size, tf.constant([[True]]), canvas)[0]
    np.testing.assert_allclose(upright, expected, rtol=1e-5)
    np.testing.assert_allclose(lying, expected.T, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@given(epsilon=st.floats(0, 0.6), seed=st.integers(0, 2**32 - 1))
def test_examples_are_allowed_and_fooled(norm, epsilon, seed):
    assert_sound(Square(epsilon, norm=norm, queries=5, **UNIT), seed)


def test_seeds_repeat():
    network, x, y = digits()
    moved = [
        Square(0.05, queries=5, seed=seed, **UNIT)(network, x, y) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limits", [*slow({}), UNIT])
def test_what_is_masked_does_not_move(norm, limits):
    network, x, y = digits()
    mask = np.random.default_rng(0).choice([0.0, 0.3, 1.0], x.shape[1:])
    attack = Square(0.4, norm=norm, queries=30, feature_mask=mask, seed=0, **limits)
    moved = attack(network, x, y) - x
    assert not moved[:, mask == 0].any()
    assert (moved[:, mask > 0] != 0).any(axis=0).all()


@pytest.mark.parametrize(
    ("norm", "epsilon"), slow_rows([("infinity", 0.1), ("l2", 0.6)], 1)
)
def test_about_as_strong_as_pgd_without_a_gradient(norm, epsilon):
    network, x, y = digits()
    left = left_by(Square(epsilon, norm=norm, queries=300, seed=0, **UNIT), *digits())
    first = left_by(Square(epsilon, norm=norm, queries=3, seed=0, **UNIT), *digits())
    pgd = left_by(PGD(epsilon, norm=norm, seed=0, **UNIT), network, x, y)
    assert pgd - 0.02 <= left < (pgd + first) / 2


def test_rounding_hides_nothing_from_it():
    network, x, y = digits()
    hidden = quantised(network)
    right = predicted(hidden, x) == y
    x, y = x[right], y[right]
    pgd = PGD(0.3, random_init=False, seed=0, **UNIT)
    assert left_by(pgd, hidden, x, y) == 1.0
    assert left_by(Square(0.3, queries=100, seed=0, **UNIT), hidden, x, y) < 0.1


def test_no_gradient_is_taken(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(tf.GradientTape, "gradient", refuse)
    x, y = labelled()
    for norm in NORMS:
        Square(0.1, norm=norm, queries=3)(classifier(), x, y)
    with pytest.raises(AssertionError, match="a gradient was taken"):
        PGD(0.1)(classifier(), x, y)
    assert not Square(0.1).uses_gradient


def test_compiled_once_for_all_batches_radii_and_budgets():
    x, y = labelled(20)
    network = classifier()
    for epsilon, size, queries in ((0.1, 20, 5), (0.5, 3, 7), (2.0, 1, 2)):
        Square(epsilon, queries=queries)(network, x, y, batch_size=size)
    traced = tracings(network)
    assert len([key for key in traced if key[0][0] == "step"]) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_several_inputs(norm):
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3, 2), name="b")}
    joined = layers.Concatenate()([inputs["a"], layers.Flatten()(inputs["b"])])
    network = keras.Model(inputs, layers.Dense(3)(joined))
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(30, 4)), "b": rng.normal(size=(30, 3, 2))}
    x = {name: value.astype("float32") for name, value in x.items()}
    y = predicted(network, x)
    x_adv = Square(1.0, norm=norm, queries=100, seed=0)(network, x, y)
    assert accuracy(network, x_adv, y) < 0.5
    joint = np.concatenate([(x_adv[k] - x[k]).reshape(30, -1) for k in x], axis=1)
    order = {"l2": 2, "infinity": np.inf}[norm]
    assert np.linalg.norm(joint, order, axis=1).max() <= 1 + 1e-6


def test_targeted_and_restarts():
    network, x, y = digits()
    target = (y + 1) % 10
    arguments = {"queries": 100, "targeted": True, "seed": 0, **UNIT}
    hits = [
        np.mean(
            predicted(network, Square(0.3, restarts=n, **arguments)(network, x, target))
            == target
        )
        for n in (1, 3)
    ]
    assert 0.3 < hits[0] <= hits[1]


def test_names():
    assert Square(0.1).name == "Square-5000"
    assert Square(0.1, queries=10, restarts=2).name == "Square-10 ×2"
    assert Square(0.1, queries=10).iterations_per_start == 10


def test_a_budget_is_spent_and_no_more():
    counted = []

    class Counting(SquareSearch):
        def step(self, evaluation, batch, scalars):
            counted.append(int(scalars["index"]))
            return super().step(evaluation, batch, scalars)

    network, x, y = Watched(), np.zeros((2, 4), "float32"), np.zeros(2, int)
    network.compile(run_eagerly=True)
    attack = Square(0.1)
    problem = attack.problem(network)
    assert isinstance(problem, Problem)
    rows = attack.batch(problem, tf.constant(x), tf.constant(y))
    solver = Counting(7, "margin", norm=NormType.L2)
    run(solver, problem, rows, keras.random.SeedGenerator(0))
    assert counted == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": 1}, ValueError, "`norm` must be one of.*`Square`.*'l1'"),
        ({"queries": 0}, ValueError, "`queries` must be at least 1.*Received: 0"),
        ({"restarts": 1.5}, TypeError, "`restarts` must be an integer.*1.5"),
        ({"p_init": 0.0}, ValueError, r"`p_init` must lie in \(0, 1\]. Received: 0.0"),
        ({"p_init": 1.1}, ValueError, r"`p_init` must lie in \(0, 1\].*1.1"),
        ({"p_init": float("nan")}, ValueError, "`p_init` must lie.*nan"),
        ({"p_init": "0.5"}, TypeError, "`p_init` must be a number.*'0.5'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Square(0.1, **arguments)
