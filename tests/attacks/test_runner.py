import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import rows
from keras import layers

from advreg.attacks import BIM, FGSM, PGD
from advreg.attacks.arguments import make_seed
from advreg.attacks.engine import runner
from advreg.attacks.engine.rows import Result, gather_rows, num_rows
from advreg.attacks.engine.runner import Pipeline, run

X = rows(20, 6)
Y = np.random.default_rng(1).integers(0, 3, 20)


def network(*first):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((6,)), *first, layers.Dense(8, "tanh"), layers.Dense(3)]
    )


def counted():
    traced = []

    class Counting(layers.Layer):
        def call(self, x):
            if not tf.executing_eagerly():
                traced.append(x.shape[0])
            return x

    model = network(Counting())
    traced.clear()  # Keras's own, to build it.
    return model, traced


class TestTracing:
    def test_once_for_all_batches_radii_and_steps(self):
        model, traced = counted()
        PGD(0.3, iterations=3)(model, X, Y, batch_size=8)
        # For the form of the outputs, to look, and to judge at the end.
        assert traced == [None, None, None]
        for epsilon in (0.1, 0.2):
            pgd = PGD(epsilon, step_size=epsilon / 2, iterations=5, restarts=2)
            pgd(model, X, Y, batch_size=7)
            BIM(epsilon, iterations=2)(model, X[:3], Y[:3])
            FGSM(epsilon)(model, X, Y)
        assert len(traced) == 3

    @pytest.mark.parametrize(
        "arguments",
        [
            {"loss": "margin"},
            {"norm": "l2"},
            {"clip_value_max": 9.0},
            {"feature_mask": np.array([1, 0, 1, 1, 1, 1])},
            {"targeted": True},
            {"momentum": 0.5},
        ],
        ids=lambda arguments: next(iter(arguments)),
    )
    def test_again_for_what_changes_the_arithmetic(self, arguments):
        model, traced = counted()
        PGD(0.3, iterations=3)(model, X, Y)
        once = len(traced)
        PGD(0.3, iterations=3, **arguments)(model, X, Y)
        assert len(traced) > once
        twice = len(traced)
        PGD(0.3, iterations=3, **arguments)(model, X, Y)
        assert len(traced) == twice

    def test_new_weights_need_no_tracing(self):
        model, traced = counted()
        y = model.predict(X, verbose=0).argmax(1)
        first = FGSM(0.1)(model, X, y)
        traced.clear()
        last = model.layers[-1]
        last.set_weights([-w for w in last.get_weights()])
        y = model.predict(X, verbose=0).argmax(1)
        traced.clear()
        assert (FGSM(0.1)(model, X, y) != first).any()
        assert not traced


class TestPlay:
    def steps(self, attack, monkeypatch, model=None, y=Y, x=X):
        """The sizes of the batches that are looked at, and the outcome."""
        model = network() if model is None else model
        problem = attack.problem(model)
        given = attack.batch(problem, tf.constant(x), tf.constant(y))
        compiled, sizes = runner._compiled_step, []

        def spy(*args):
            step = compiled(*args)

            def counted(state, scalars):
                sizes.append(num_rows(state))
                return step(state, scalars)

            return counted

        monkeypatch.setattr(runner, "_compiled_step", spy)
        outcome = run(attack.solvers(problem)[0], problem, given, make_seed(1))
        return sizes, outcome, model

    def test_rows_that_are_fooled_drop_out(self, monkeypatch):
        attack = BIM(0.4, step_size=0.1, iterations=6)
        sizes, outcome, model = self.steps(attack, monkeypatch)
        right = model.predict(X, verbose=0).argmax(1) == Y
        assert sizes[0] == 20
        assert 0 <= sizes[1] - right.sum() < 2  # Of twenty, an even number goes on.
        assert sizes[1] < 20
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) <= 6
        x_adv = X + outcome.displacement
        predicted = model.predict(x_adv, verbose=0).argmax(1)
        np.testing.assert_array_equal(outcome.fooled, predicted != Y)
        assert not outcome.displacement[~right].any()

    @pytest.mark.slow
    def test_it_shrinks_in_few_sizes_and_each_row_ends_where_it_fell(self, monkeypatch):
        x = rows(200, 6)
        model = network()
        y = model.predict(x, verbose=0).argmax(1)
        expected, fell = np.zeros_like(x), np.zeros(200, bool)
        for count in range(1, 31):  # The path, a step further each time.
            there = BIM(0.3, step_size=0.01, iterations=count)(
                model, x, y, early_stop=False
            )
            new = ~fell & (model.predict(there, verbose=0).argmax(1) != y)
            fell |= new
            expected[new] = there[new]
        expected[~fell] = there[~fell]
        assert 30 < fell.sum() < 170
        attack = BIM(0.3, step_size=0.01, iterations=30)
        sizes, outcome, _ = self.steps(attack, monkeypatch, model, y, x)
        # Sixteenths of 200, rounded up, and the whole.
        assert set(sizes) <= {*range(13, 200, 13), 200}
        assert 3 < len(set(sizes)) < len(sizes) == 30
        np.testing.assert_array_equal(outcome.fooled, fell)
        np.testing.assert_allclose(x + outcome.displacement, expected, atol=1e-6)
        assert (outcome.closeness[fell] > 0).all()
        assert (outcome.closeness[~fell] <= 0).all()

    def test_it_ends_when_all_are_fooled(self, monkeypatch):
        model = network()
        model.layers[-1].set_weights([np.zeros((8, 3)), np.array([0, 0, 1.0])])
        attack, y = PGD(0.1, iterations=9), np.zeros(20, int)
        sizes, outcome, _ = self.steps(attack, monkeypatch, model, y)
        assert sizes == [20]
        assert outcome.fooled.all()
        assert np.isposinf(outcome.closeness).all()

    def test_closeness_is_the_margin_at_the_end(self, monkeypatch):
        attack = BIM(0.01, iterations=2)
        _, outcome, model = self.steps(attack, monkeypatch)
        z = model.predict(X + outcome.displacement, verbose=0)
        own = z[np.arange(20), Y]
        z[np.arange(20), Y] = -np.inf
        stands = ~outcome.fooled
        assert stands.any()
        np.testing.assert_allclose(
            outcome.closeness[stands], (z.max(1) - own)[stands], atol=1e-5
        )
        assert (outcome.closeness[stands] <= 0).all()

    def test_of_two_runs_the_closer_end_is_kept(self):
        model = network()
        y = model.predict(X, verbose=0).argmax(1)

        def margin(restarts):
            pgd = PGD(0.02, step_size=1e-9, iterations=1, restarts=restarts, seed=2)
            z = model.predict(pgd(model, X, y, batch_size=20), verbose=0)
            own = z[np.arange(20), y]
            z[np.arange(20), y] = -np.inf
            return z.max(1) - own

        once, often = margin(1), margin(5)
        assert (often >= once - 1e-6).all()
        assert (often > once + 1e-6).any()


class TestPipeline:
    def run(self, batches, attack, batch_size, model=None):
        """Feeds batches, and returns what came out: index, outcomes, played sizes."""
        model = network() if model is None else model
        problem = attack.problem(model)
        played, ended = [], []
        seed = make_seed(1)

        def spy(solver, batch):
            played.append(num_rows(batch))
            return run(solver, problem, batch, seed)

        def done(given, outcome):
            assert isinstance(outcome, Result)
            ended.append((given["index"], outcome.fooled))

        solvers = attack.solvers(problem)
        pipeline = Pipeline(spy, solvers, batch_size, problem.drops_out, done)
        for index in batches:
            given = attack.batch(problem, tf.constant(X[index]), tf.constant(Y[index]))
            pipeline.feed({**given, "index": index})
        before = list(played)
        pipeline.flush()
        index, fooled = (np.concatenate(part) for part in zip(*ended, strict=True))
        return index, fooled, before, played

    @pytest.mark.parametrize("batch_size", [3, 8, 20, 50])
    def test_each_row_comes_out_once(self, batch_size):
        batches = np.split(np.arange(20), [2, 9, 10, 17])
        attack = PGD(0.02, iterations=2, restarts=3)
        index, _, before, played = self.run(batches, attack, batch_size)
        assert sorted(index) == list(range(20))
        # What is incomplete waits for company until the end.
        assert set(before) <= {batch_size}
        assert max(played) <= batch_size

    def test_the_next_run_is_for_what_withstood(self):
        attack = PGD(0.02, iterations=2, restarts=3)
        model = network()
        right = (model.predict(X, verbose=0).argmax(1) == Y).sum()
        _, fooled, _, played = self.run([np.arange(20)], attack, 20, model)
        assert played[0] == 20
        assert all(count <= right for count in played[1:])
        assert fooled.sum() >= 20 - right

    def test_sequences_of_other_lengths_make_other_batches(self):
        model = keras.Sequential(
            [keras.Input((None, 2)), layers.SimpleRNN(4), layers.Dense(3)]
        )
        attack = BIM(0.02, iterations=2)
        problem = attack.problem(model)
        found = []
        seed = make_seed(1)
        pipeline = Pipeline(
            lambda solver, batch: run(solver, problem, batch, seed),
            attack.solvers(problem),
            8,
            problem.drops_out,
            lambda given, _: found.append(given["features"].shape),
        )
        for length in (3, 3, 5, 3):
            x = tf.constant(rows(2, length, 2))
            pipeline.feed(attack.batch(problem, x, tf.constant(Y[:2])))
        pipeline.flush()
        assert found == [(4, 3, 2), (2, 5, 2), (2, 3, 2)]


def test_taking_rows_keeps_arrays_and_tensors():
    given = {"a": np.arange(4), "b": {"c": tf.range(4)}}
    taken = gather_rows(given, np.array([2, 0]))
    assert isinstance(taken["a"], np.ndarray)
    assert isinstance(taken["b"]["c"], tf.Tensor)
    np.testing.assert_array_equal(taken["a"], [2, 0])
    np.testing.assert_array_equal(taken["b"]["c"], [2, 0])
    assert num_rows(taken) == 2
