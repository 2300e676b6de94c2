"""What the packages of `advreg.backend` promise, on the backend that runs."""

import importlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import advreg
from advreg import attacks, backend
from advreg.backend import keras_private

pytestmark = pytest.mark.every_backend

PACKAGES = Path(backend.__file__).parent
ONLY_TENSORFLOW = {"new_tape", "recorded_gradient", "recording"}
X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")
Y = np.arange(12) % 3


def array(tensor):
    return ops.convert_to_numpy(tensor)


def names_of(name):
    text = (PACKAGES / name / "__init__.py").read_text(encoding="utf-8")
    return set(re.findall(r'^    "(\w+)",$', text, re.MULTILINE))


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_each_package_has_the_names_of_tensorflows(name):
    assert names_of(name) == names_of("tensorflow") - ONLY_TENSORFLOW


def test_the_package_is_that_of_keras():
    assert keras.backend.backend() == backend.BACKEND
    package = importlib.import_module(f"advreg.backend.{backend.BACKEND}")
    assert backend.differentiate is package.differentiate


class TestDifferentiate:
    @pytest.mark.parametrize("scale", [None, 4.0])
    def test_gradients_are_those_of_the_formula(self, scale):
        a, b = map(ops.convert_to_tensor, (X, X[::-1].copy()))

        def function(tensors):
            a, b = tensors
            return ops.sum(a * a * b), {"sum": ops.sum(a)}

        value, others, (of_a, of_b) = backend.differentiate(function, [a, b], scale)
        a, b = X, X[::-1]
        np.testing.assert_allclose(array(value), np.sum(a * a * b), rtol=1e-5)
        np.testing.assert_allclose(array(others["sum"]), a.sum(), rtol=1e-5)
        np.testing.assert_allclose(array(of_a), (scale or 1) * 2 * a * b, rtol=1e-5)
        np.testing.assert_allclose(array(of_b), (scale or 1) * a * a, rtol=1e-5)

    @pytest.mark.parametrize("zeros", [False, True])
    def test_what_a_value_does_not_depend_on_has_no_gradient(self, zeros):
        table = ops.convert_to_tensor(np.arange(10.0, dtype="float32"))

        def function(tensors):
            a, codes, stopped, _ = tensors
            looked_up = ops.take(table, ops.cast(codes, "int32"))
            stopped = ops.stop_gradient(stopped)
            return ops.sum(a) * ops.sum(stopped) + ops.sum(looked_up), None

        tensors = [ops.ones(3) for _ in range(4)]
        _, _, found = backend.differentiate(function, tensors, zeros=zeros)
        np.testing.assert_array_equal(array(found[0]), [3.0, 3.0, 3.0])
        for gradient in found[1:]:
            if zeros:
                np.testing.assert_array_equal(array(gradient), [0.0, 0.0, 0.0])
            else:
                assert gradient is None

    def test_a_gradient_of_zero_is_not_a_missing_one(self):
        def function(tensors):
            return ops.sum(tensors[0] * 0.0), None

        _, _, (gradient,) = backend.differentiate(function, [ops.ones(3)])
        np.testing.assert_array_equal(array(gradient), [0.0, 0.0, 0.0])


class TestDifferentiateStep:
    @pytest.mark.parametrize("apart", [False, True])
    def test_both_gradients_are_those_of_the_formula(self, apart):
        weight = keras.Variable(X[:3], dtype="float32")
        counter = keras.Variable(0.0, trainable=False)
        x, unused = ops.convert_to_tensor(X[3:6]), ops.convert_to_tensor(X[6:9])

        def function(tensors, _):
            x, other = tensors
            counter.assign(counter + 1.0)
            attacked = ops.sum(weight.value * x * x)
            total = 2.0 * attacked + ops.sum(other) if apart else attacked
            return total, attacked, (attacked, None)

        (value, nothing), (of_weight,), (of_x, of_unused) = backend.differentiate_step(
            function, lambda: [weight], [x, unused]
        )
        assert nothing is None
        assert of_unused is None
        factor = 2.0 if apart else 1.0
        np.testing.assert_allclose(array(value), np.sum(X[:3] * X[3:6] ** 2), rtol=1e-5)
        np.testing.assert_allclose(array(of_weight), factor * X[3:6] ** 2, rtol=1e-5)
        np.testing.assert_allclose(array(of_x), 2 * X[:3] * X[3:6], rtol=1e-5)
        np.testing.assert_array_equal(array(counter.value), 1.0)

    def test_constants_have_no_gradient(self):
        weight = keras.Variable([1.0, 2.0, 3.0])

        def function(*_):
            with backend.constants():
                fixed = ops.sum(weight.value * weight.value)
            return fixed * ops.sum(weight.value), None, None

        _, (gradient,), _ = backend.differentiate_step(function, lambda: [weight])
        np.testing.assert_allclose(array(gradient), [14.0] * 3, rtol=1e-6)

    def test_a_scope_inside_sees_what_was_assigned_around_it(self):
        weight = keras.Variable([1.0, 2.0])

        def function(*_):
            weight.assign(weight.value * 2.0)
            with backend.StatelessScope():
                seen = ops.sum(weight.value * 1.0)
                weight.assign([100.0, 100.0])
            return seen, None, seen

        seen, _, _ = backend.differentiate_step(function, lambda: [weight])
        np.testing.assert_array_equal(array(seen), 6.0)
        np.testing.assert_array_equal(array(weight.value), [2.0, 4.0])

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("given", [False, True])
    def test_gradients_of_what_is_computed_on_the_way(self, apart, given):
        weight = keras.Variable(X[:3], dtype="float32")
        x = ops.convert_to_tensor(X[3:6])

        def function(tensors, watch):
            first = watch(weight.value * (tensors[0] if given else x))
            second = watch(ops.square(first))
            attacked = ops.sum(second * first)
            total = 2.0 * attacked if apart else attacked
            return total, attacked, attacked

        value, (of_weight,), found = backend.differentiate_step(
            function, lambda: [weight], [x] if given else [], watches=True
        )
        *of_x, of_first, of_second = found
        product = X[:3] * X[3:6]
        np.testing.assert_allclose(array(value), np.sum(product**3), rtol=1e-4)
        np.testing.assert_allclose(array(of_first), 3 * product**2, rtol=1e-4)
        np.testing.assert_allclose(array(of_second), product, rtol=1e-5)
        expected = (2.0 if apart else 1.0) * 3 * product**2 * X[3:6]
        np.testing.assert_allclose(array(of_weight), expected, rtol=1e-4)
        assert len(of_x) == given


@pytest.mark.parametrize("times", [0, 1, 5])
def test_repeat_applies_a_function_to_its_last_result(times):
    def function(value):
        return 2.0 * value + 1.0

    found = backend.repeat(function, times, ops.convert_to_tensor(X), unroll=False)
    expected = X
    for _ in range(times):
        expected = 2.0 * expected + 1.0
    np.testing.assert_allclose(array(found), expected, rtol=1e-6)


class TestRandomNumbers:
    def test_the_same_seed_gives_the_same_numbers(self):
        seeds = [ops.convert_to_tensor([3, n], "int32") for n in (4, 4, 5)]
        for draw in (
            lambda seed: backend.uniform((50,), seed, "float32"),
            lambda seed: backend.random_integers((50,), seed),
        ):
            one, same, other = (array(draw(seed)) for seed in seeds)
            np.testing.assert_array_equal(one, same)
            assert (one != other).mean() > 0.9

    def test_numbers_are_spread_over_their_range(self):
        seed = ops.convert_to_tensor([1, 2], "int32")
        drawn = array(backend.uniform((2000,), seed, "float32"))
        assert drawn.dtype == "float32"
        assert drawn.min() >= 0.0
        assert drawn.max() < 1.0
        assert abs(drawn.mean() - 0.5) < 0.03
        whole = array(backend.random_integers((2000,), seed))
        assert whole.dtype == "int32"
        assert whole.min() >= 0
        assert abs(whole.mean() / 2**31 - 0.5) < 0.03


def network():
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)]
    )


class TestCompiledFunctions:
    def compiled(self, model, function, *examples):
        cache = backend.functions_of(model)
        return cache.compiled("a function", function, examples), cache

    def test_results_are_those_of_the_function_for_any_number_of_rows(self):
        model = network()

        def function(x):
            outputs = model(x)
            # A row for each example, one value, and one for each column.
            return outputs, ops.max(outputs), ops.any(outputs > 0, axis=0)

        compiled, _ = self.compiled(model, function, ops.convert_to_tensor(X))
        for rows in (12, 1, 7, 3, 12, 5):
            x = ops.convert_to_tensor(X[:rows])
            for found, expected in zip(compiled(x), function(x), strict=True):
                np.testing.assert_allclose(array(found), array(expected), atol=1e-6)

    def test_new_weights_are_read_at_each_call(self):
        model = network()
        x = ops.convert_to_tensor(X)
        compiled, _ = self.compiled(model, model, x)
        before = array(compiled(x))
        model.set_weights([2.0 * weight for weight in model.get_weights()])
        np.testing.assert_allclose(array(compiled(x)), 4.0 * before, rtol=1e-5)

    def test_what_the_function_assigns_is_assigned(self):
        model = network()
        seed = keras.random.SeedGenerator(3)

        def function(x):
            return x + keras.random.uniform(ops.shape(x), seed=seed)

        x = ops.convert_to_tensor(X)
        compiled, _ = self.compiled(model, function, x)
        one, other = array(compiled(x)), array(compiled(x))
        assert (one != other).all()
        seed.state.assign(keras.random.SeedGenerator(3).state)
        np.testing.assert_array_equal(array(compiled(x)), one)

    def test_few_sizes_are_compiled(self):
        model = network()
        compiled, cache = self.compiled(model, model, ops.convert_to_tensor(X))
        generator = np.random.default_rng(0)
        for rows in [64, *generator.integers(1, 65, 100)]:
            x = generator.normal(size=(rows, 6)).astype("float32")
            assert compiled(ops.convert_to_tensor(x)).shape == (rows, 3)
        assert len(cache.keys) <= 6

    def test_more_batches_of_an_attack_need_few_more(self):
        model = network()
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        generator = np.random.default_rng(0)
        x = generator.normal(size=(300, 6)).astype("float32")
        y = generator.integers(0, 3, 300)
        attack = attacks.PGD(0.5, iterations=4, seed=0)
        attack(model, x[:64], y[:64], batch_size=32)
        known = len(backend.functions_of(model).keys)
        for rows in (300, 77, 131, 5):
            attack(model, x[:rows], y[:rows], batch_size=32)
        # Sizes between a full batch and one row, each four times as large at most.
        assert len(backend.functions_of(model).keys) <= known + 4

    def test_a_changed_model_drops_them(self):
        model = network()
        x = ops.convert_to_tensor(X)
        compiled, cache = self.compiled(model, model, x)
        compiled(x)
        model.layers[0].activation = keras.activations.tanh
        assert backend.functions_of(model) is cache
        assert not cache.keys


class TestPadding:
    def test_a_batch_is_filled_up_with_its_last_row(self):
        found = backend.padding(3, 5)
        if found is not None:
            assert list(found) == [0, 1, 2, 2, 2]
        assert backend.padding(5, 5) is None


def wrapped(**run):
    model = advreg.AdversarialRegularization(
        network(),
        advreg.make_adv_reg_config(
            adv_step_size=0.1, clip_value_min=-9.0, clip_value_max=9.0
        ),
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **run)
    return model


class TestErrors:
    """A model keeps its weights when a step fails. On JAX they are out of it then."""

    @pytest.mark.parametrize("run", [{}, {"run_eagerly": True}], ids=["", "eager"])
    def test_data_in_other_units(self, run):
        model = wrapped(**run)
        with pytest.raises(ValueError, match="`x` must lie in the clip range"):
            model.fit(100 * X, Y, verbose=0)
        assert all(np.isfinite(w).all() for w in model.base_model.get_weights())
        model.fit(X, Y, verbose=0)
        model.predict(X, verbose=0)

    @pytest.mark.parametrize("label", [3, -1])
    def test_a_label_that_is_no_class(self, label):
        model = wrapped(jit_compile=False)
        y = Y.copy()
        y[5] = label
        message = "`y` must hold classes from 0 to 2, because the model has 3 classes"
        for call in (model.fit, model.evaluate):
            with pytest.raises(ValueError, match=message):
                call(X, y, verbose=0)
        for call in (model.train_on_batch, model.test_on_batch, model.perturb_on_batch):
            with pytest.raises(ValueError, match=message):
                call(X, y)
        model.fit(X, Y, verbose=0)

    def test_missing_labels(self):
        model = wrapped()
        before = model.base_model.get_weights()
        with pytest.raises(ValueError, match=r"[Ll]abels"):
            model.fit(X, verbose=0)
        after = model.base_model.get_weights()
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("rows", [5, 7, 11])
def test_a_batch_of_any_length_is_perturbed_as_it_is(rows):
    """Neither its loss nor the count of missing values knows of any padding."""
    x = X[:rows].copy()
    x[-1, 2] = np.nan
    model = wrapped()
    with pytest.warns(UserWarning, match=r"Received: 1 input values"):
        model.perturb_on_batch(x, Y[:rows])

    def distance_to_the_mean(y_true, y_pred):
        return ops.sum(ops.square(y_pred - ops.mean(y_pred, axis=0)), axis=-1)

    base = keras.Sequential([keras.Input((6,)), layers.Dense(3, use_bias=False)])
    model = advreg.AdversarialRegularization(
        base, advreg.make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="l2")
    )
    model.compile("sgd", distance_to_the_mean)
    moved = model.perturb_on_batch(X[:rows], np.zeros((rows, 3), "float32"))
    (kernel,) = base.get_weights()
    slope = (X[:rows] - X[:rows].mean(axis=0)) @ kernel @ kernel.T
    slope /= np.linalg.norm(slope, axis=1, keepdims=True)
    np.testing.assert_allclose(moved, X[:rows] + 0.1 * slope, atol=1e-5)


def test_values_that_are_missing_are_counted():
    x = X.copy()
    x[3, 2] = np.nan
    with pytest.warns(UserWarning, match="in epoch 1 1 input values"):
        wrapped().fit(x, Y, verbose=0)


def test_private_names_that_this_backend_needs():
    outputs = ops.convert_to_tensor(X)
    target = ops.convert_to_tensor(X + 1)
    keras_private.copy_mask(outputs, target)  # There is none, which is no error.
    assert isinstance(keras_private.layers_of(network()), list)
