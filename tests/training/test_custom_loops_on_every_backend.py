"""Custom training loops, as they are written on each backend."""

import functools
import pathlib
import re

import keras
import numpy as np
import pytest
from helpers import oracle
from helpers.linear import LEARNING_RATE, LINEAR, linear_base
from helpers.models import busy_base, labelled, rows
from keras import layers, ops

import advreg
from advreg import AdvNeighborConfig, adversarial_loss, gen_adv_neighbor

pytestmark = pytest.mark.every_backend(tensorflow="slow")

BACKEND = keras.backend.backend()
TENSORFLOW = BACKEND == "tensorflow"
X, Y = rows(6, 4), rows(6, seed=1)
MSE = keras.losses.MeanSquaredError()


def compiled(function):
    """The function as the backend compiles it. PyTorch runs it as it is."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if TENSORFLOW:
        import tensorflow as tf

        return tf.function(function)
    return function


def array(tensor):
    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def with_variables(variables, function):
    """A function of values of variables, for `jax.grad`."""

    def stateless(values, *args):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(mapping):
            return function(*args)

    return stateless


def gradients_of(function, variables, *args, graph=False):
    """The gradients of a loss with respect to variables, as a user takes them."""
    if BACKEND == "jax":
        import jax

        gradient = jax.grad(with_variables(variables, function))
        gradient = jax.jit(gradient) if graph else gradient
        return gradient([variable.value for variable in variables], *args)
    if BACKEND == "torch":
        import torch

        return torch.autograd.grad(
            function(*args), [variable.value for variable in variables]
        )
    import tensorflow as tf

    def gradient(*args):
        with tf.GradientTape() as tape:
            loss = function(*args)
        return tape.gradient(loss, [variable.value for variable in variables])

    return (tf.function(gradient) if graph else gradient)(*args)


def config(norm="infinity", iterations=1, **kwargs):
    kwargs = {"pgd_epsilon": None if iterations == 1 else 0.35, **kwargs}
    return AdvNeighborConfig(
        adv_step_size=0.2, adv_grad_norm=norm, pgd_iterations=iterations, **kwargs
    )


def whole(neighbor_config):
    return advreg.AdvRegConfig(0.4, neighbor_config)


def linear_loss(x, y=Y):
    """The loss of the linear model, in operations of Keras."""
    outputs = ops.matmul(x, ops.convert_to_tensor(LINEAR.w, "float32")) + LINEAR.b
    return ops.mean(ops.square(outputs - ops.convert_to_tensor(y)))


def expected_neighbor(norm, iterations, x=X, model=LINEAR):
    return oracle.attack(
        x.astype("float64"),
        lambda x: model.input_gradient(x, Y, 1.0),
        norm,
        0.2,
        iterations,
        None if iterations == 1 else 0.35,
    )


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("norm", oracle.NORMS)
def test_neighbors_of_a_function(norm, iterations, graph):
    def neighbor(x):
        return gen_adv_neighbor(x, linear_loss, config(norm, iterations))

    run = compiled(neighbor) if graph else neighbor
    found, weights = run(ops.convert_to_tensor(X))
    np.testing.assert_allclose(
        array(found), expected_neighbor(norm, iterations), atol=1e-6
    )
    np.testing.assert_array_equal(array(weights), np.ones((6, 1)))


def test_features_that_are_arrays_integers_and_strings():
    features = {"x": X, "y": np.arange(6), "name": np.array(list("abcdef"))}
    found, _ = gen_adv_neighbor(features, lambda f: linear_loss(f["x"]), config("l2"))
    np.testing.assert_allclose(array(found["x"]), expected_neighbor("l2", 1), atol=1e-6)
    np.testing.assert_array_equal(array(found["y"]), np.arange(6))
    assert len(found["name"]) == 6
    with pytest.raises(ValueError, match=r"Cannot perturb the features .*'y'"):
        gen_adv_neighbor(features, lambda f: linear_loss(f["x"]), config(), True)


def test_losses_of_single_examples_are_a_loss():
    def losses(x):
        return ops.square(ops.sum(x, axis=1))

    found, _ = gen_adv_neighbor(ops.convert_to_tensor(X), losses, config())
    expected = X + 0.2 * np.sign(X.sum(1, keepdims=True))
    np.testing.assert_allclose(array(found), expected, atol=1e-6)


@pytest.mark.parametrize("graph", [False, True])
def test_the_perturbation_is_a_constant_to_gradients_around_it(graph):
    # The scale multiplies the features and the loss. Of both only `x + d` has one.
    scale = keras.Variable(1.0)

    def total():
        x = ops.convert_to_tensor(X) * scale
        neighbor, _ = gen_adv_neighbor(
            x, lambda x: linear_loss(x * scale), config(iterations=3)
        )
        return ops.sum(neighbor)

    (found,) = gradients_of(total, [scale], graph=graph)
    np.testing.assert_allclose(array(found), X.sum(), rtol=1e-5)


def test_what_the_attack_changes_in_layers_is_discarded():
    x, y = labelled()
    model, loss_fn = busy_base(), keras.losses.SparseCategoricalCrossentropy(True)
    before = [array(variable) for variable in model.variables]
    for iterations in (1, 3):
        gen_adv_neighbor(
            x, lambda x: loss_fn(y, model(x, training=True)), config("l2", iterations)
        )
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


def test_a_model_that_is_built_by_the_attack():
    x, y = labelled()
    model = keras.Sequential([layers.Dense(8, "tanh"), layers.Dense(3)])
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def neighbor():
        return gen_adv_neighbor(x, lambda x: loss_fn(y, model(x)), config("l2", 3))[0]

    first = array(neighbor())
    assert model.built
    np.testing.assert_array_equal(array(neighbor()), first)


@pytest.mark.parametrize("norm", oracle.NORMS)
def test_random_starts(norm):
    def neighbor():
        start = config(norm, 1, pgd_epsilon=0.35, random_init=True)
        return array(gen_adv_neighbor(X, linear_loss, start)[0])

    one, two = neighbor(), neighbor()
    assert np.abs(one - two).max() > 0.01
    assert oracle.norms(one - X, norm).max() <= 0.35 + 1e-6
    drawn = []
    for _ in range(2):
        keras.utils.clear_session()  # Older Keras keeps its generator for ever.
        keras.utils.set_random_seed(1)
        drawn.append(neighbor())
    np.testing.assert_array_equal(*drawn)


@pytest.mark.skipif(BACKEND != "jax", reason="a scope is around loops on JAX only")
def test_random_starts_differ_inside_a_scope():
    start = config("l2", 1, pgd_epsilon=0.35, random_init=True)
    drawn = []
    for _ in range(2):
        with keras.StatelessScope():
            drawn.append(array(gen_adv_neighbor(X, linear_loss, start)[0]))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    with pytest.raises(
        ValueError, match=r"`random_init` must be false inside `jax.jit"
    ):
        compiled(lambda x: gen_adv_neighbor(x, linear_loss, start))(X)


def test_half_precision_is_that_of_the_model():
    # The gradient of the plain loss is below what float16 can hold.
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, dtype="float16")])
    model.set_weights([LINEAR.w[:, None], np.array([LINEAR.b])])

    def loss(x):
        return 1e-7 * ops.mean(ops.cast(model(x), "float32"))

    found, _ = gen_adv_neighbor(X, loss, config(), pgd_model_fn=model)
    np.testing.assert_allclose(array(found), X + 0.2 * np.sign(LINEAR.w), atol=1e-6)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("norm", oracle.NORMS)
def test_the_gradient_of_the_adversarial_loss(norm, iterations, graph):
    model = linear_base()

    def loss(x, y):
        return adversarial_loss(
            x, y, model, MSE, adv_config=whole(config(norm, iterations))
        )

    x, y = ops.convert_to_tensor(X), ops.convert_to_tensor(Y[:, None])
    neighbor = expected_neighbor(norm, iterations)
    found = (compiled(loss) if graph else loss)(x, y)
    np.testing.assert_allclose(
        float(array(found)), LINEAR.loss(neighbor, Y, 1.0), rtol=1e-5
    )
    kernel, bias = gradients_of(loss, model.trainable_variables, x, y, graph=graph)
    expected = LINEAR.weight_gradient(neighbor, Y, 1.0)
    np.testing.assert_allclose(array(kernel)[:, 0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(bias), [expected[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="`stateless_call` is for JAX")
def test_a_model_that_is_called_without_state():
    import jax

    model = linear_base()

    @jax.jit
    @jax.grad
    def gradient(weights, x, y):
        def predict(x):
            return model.stateless_call(weights, [], x)[0]

        return adversarial_loss(x, y, predict, MSE, adv_config=whole(config("l2", 3)))

    # The values in the variables are others: those of the argument must count.
    weights = [variable.value for variable in model.trainable_variables]
    model.set_weights([np.zeros((4, 1)), np.zeros(1)])
    kernel, bias = gradient(weights, X, Y[:, None])
    expected = LINEAR.weight_gradient(expected_neighbor("l2", 3), Y, 1.0)
    np.testing.assert_allclose(array(kernel)[:, 0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(bias), [expected[1]], rtol=1e-4, atol=1e-5)


def tensorflow_loop(model, x, y, steps, iterations):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(LEARNING_RATE)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = MSE(y, model(x)) + 0.4 * adversarial_loss(
                x, y, model, MSE, adv_config=whole(config("l2", iterations))
            )
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )


def jax_loop(model, x, y, steps, iterations):
    import jax

    optimizer = keras.optimizers.SGD(LEARNING_RATE)
    optimizer.build(model.trainable_variables)

    def compute_loss(weights, state, x, y):
        mapping = [
            *zip(model.trainable_variables, weights, strict=True),
            *zip(model.non_trainable_variables, state, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss = MSE(y, model(x, training=True)) + 0.4 * adversarial_loss(
                x,
                y,
                model,
                MSE,
                adv_config=whole(config("l2", iterations)),
                model_kwargs={"training": True},
            )
        state = [scope.get_current_value(v) for v in model.non_trainable_variables]
        return loss, state

    @jax.jit
    def step(weights, state, slots, x, y):
        gradients, state = jax.grad(compute_loss, has_aux=True)(weights, state, x, y)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, state, slots

    weights = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]
    slots = [variable.value for variable in optimizer.variables]
    for _ in range(steps):
        weights, state, slots = step(weights, state, slots, x, y)
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)


def torch_loop(model, x, y, steps, iterations):
    import torch

    x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = MSE(y, model(x, training=True)) + 0.4 * adversarial_loss(
            x,
            y,
            model,
            MSE,
            adv_config=whole(config("l2", iterations)),
            model_kwargs={"training": True},
        )
        loss.backward()
        optimizer.step()


LOOPS = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_loop_takes_the_steps_of_the_formula(iterations):
    model, expected = linear_base(), oracle.LinearRegression(LINEAR.w, LINEAR.b)
    LOOPS[BACKEND](model, X, Y[:, None], 4, iterations)
    for _ in range(4):
        neighbor = expected_neighbor("l2", iterations, model=expected)
        clean = expected.weight_gradient(X.astype("float64"), Y, 1.0)
        adversarial = expected.weight_gradient(neighbor, Y, 1.0)
        expected.w = expected.w - LEARNING_RATE * (clean[0] + 0.4 * adversarial[0])
        expected.b = expected.b - LEARNING_RATE * (clean[1] + 0.4 * adversarial[1])
    kernel, bias = map(array, model.variables)
    np.testing.assert_allclose(kernel[:, 0], expected.w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, [expected.b], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(TENSORFLOW, reason="a clean pass under a tape updates state too")
def test_the_clean_and_the_final_pass_of_a_loop_update_averages():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)]
    )
    norm = model.layers[0]
    LOOPS[BACKEND](model, X, Y[:, None], 1, 3)
    mean = array(norm.moving_mean)
    # The clean pass moves the average once, and the last pass, which is near, again.
    clean = X.mean(0) * (1 - norm.momentum**2)
    assert np.abs(mean - clean).max() <= 0.2 * (1 - norm.momentum) + 1e-6
    assert np.abs(mean).max() > 0


def test_examples_of_weight_zero_stay_in_place():
    weights = np.array([1.0, 0.0, 2.0, 1.0, 0.0, 0.5], "float32")
    seen = []

    def predict(x):
        seen.append(array(x))
        return ops.matmul(x, ops.convert_to_tensor(LINEAR.w[:, None], "float32"))

    start = config("l2", random_init=True, pgd_epsilon=0.3)
    adversarial_loss(X, Y[:, None], predict, MSE, weights, whole(start))
    np.testing.assert_array_equal(np.abs(seen[-1] - X).max(1) > 0, weights > 0)


def saturated(activation):
    """A model whose probabilities round to 0 and 1."""
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, activation=activation, use_bias=False)]
    )
    model.set_weights([40 * rows(4, 3, seed=3)])
    return model


LABELS = np.arange(6) % 3
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
LOSSES = {
    "softmax": [
        (keras.losses.SparseCategoricalCrossentropy, LABELS),
        (keras.losses.CategoricalCrossentropy, ONE_HOT),
    ],
    "sigmoid": [(keras.losses.BinaryCrossentropy, ONE_HOT)],
}


@pytest.mark.parametrize(
    ("activation", "kind", "labels"),
    [(name, *case) for name, cases in LOSSES.items() for case in cases],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_taken_of_the_logits_behind_probabilities(
    activation, kind, labels, weighted
):
    weights = np.linspace(0.5, 1.5, 6).astype("float32") if weighted else None

    def found(activation, loss_fn):
        model = saturated(activation)
        loss = functools.partial(
            adversarial_loss,
            ops.convert_to_tensor(X),
            labels,
            model,
            loss_fn,
            weights,
            whole(config("l2", 3)),
        )
        gradients = gradients_of(loss, model.trainable_variables)
        return float(array(loss())), array(gradients[0])

    loss, gradient = found(activation, kind())
    expected, of_logits = found(None, kind(from_logits=True))
    assert expected > 30  # Keras clips at 16.
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, of_logits, rtol=1e-4, atol=1e-5)


def test_functions_of_keras_are_taken_of_logits_too():
    model = saturated("softmax")
    function = keras.losses.sparse_categorical_crossentropy
    found = adversarial_loss(X, LABELS, model, function, adv_config=whole(config()))
    expected = adversarial_loss(
        X,
        LABELS,
        saturated(None),
        keras.losses.SparseCategoricalCrossentropy(True, reduction="none"),
        adv_config=whole(config()),
    )
    np.testing.assert_allclose(array(found), array(expected), rtol=1e-5)


def test_probabilities_whose_logits_are_hidden():
    model, loss_fn = saturated("softmax"), keras.losses.SparseCategoricalCrossentropy()

    def own_loss(labels, predictions):
        return loss_fn(labels, predictions)

    def run(model, loss_fn):
        x = X / 100  # Not saturated.
        adversarial_loss(x, LABELS, model, loss_fn, adv_config=whole(config()))

    if TENSORFLOW:  # Keras finds the logits in the graph, and warnings are errors.
        run(lambda x: model(x), loss_fn)
        run(model, own_loss)
        return
    with pytest.warns(UserWarning, match=r"not found.*pass the `keras.Model` itself"):
        run(lambda x: model(x), loss_fn)
    with pytest.warns(UserWarning, match=r"own_loss.* is computed from the probab"):
        run(model, own_loss)


@pytest.mark.skipif(TENSORFLOW, reason="TensorFlow has tapes")
def test_what_belongs_to_tapes_is_refused():
    x = ops.convert_to_tensor(X)
    with pytest.raises(TypeError, match=r"must be a function from features.*lambda x"):
        gen_adv_neighbor(x, linear_loss(x), config())
    with pytest.raises(ValueError, match="`gradient_tape` must be left out"):
        gen_adv_neighbor(x, linear_loss, config(), gradient_tape=object())
    loss = functools.partial(adversarial_loss, x, Y[:, None], linear_base(), MSE)
    for name in ("predictions", "labeled_loss", "gradient_tape"):
        with pytest.raises(ValueError, match=rf"must be left out.*Received: {name}="):
            loss(**{name: x})


@pytest.mark.skipif(not TENSORFLOW, reason="only TensorFlow has tapes")
def test_a_function_needs_no_tape():
    import tensorflow as tf

    x, tape = tf.constant(X), tf.GradientTape()
    with pytest.raises(ValueError, match="`gradient_tape` must be left out"):
        gen_adv_neighbor(x, linear_loss, config(), gradient_tape=tape)
    with tape:
        tape.watch(x)
        loss = linear_loss(x)
    by_tape, _ = gen_adv_neighbor(x, loss, config("l2"), gradient_tape=tape)
    by_function, _ = gen_adv_neighbor(x, linear_loss, config("l2"))
    np.testing.assert_array_equal(by_tape, by_function)


def test_functions_that_give_no_gradient():
    with pytest.raises(ValueError, match=r"Nothing can be perturbed.*function uses"):
        gen_adv_neighbor(X, lambda x: ops.ones(()), config())
    with pytest.raises(ValueError, match=r"Nothing can be perturbed.*function uses"):
        gen_adv_neighbor(np.arange(6), lambda x: ops.ones(()), config())
    for wrong in (None, 1.0, np.ones(()), ops.ones((), "int32")):
        with pytest.raises(TypeError, match="must return a float tensor"):
            gen_adv_neighbor(X, lambda x, wrong=wrong: wrong, config())


PAGE = (pathlib.Path(__file__).parents[2] / "docs/reference/loops.md").read_text()
CODE = dict(re.findall(r"## (.+?)\n[^#]*?```python\n(.*?)```", PAGE, re.DOTALL))
HEADING = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[BACKEND]


@pytest.mark.parametrize("heading", [HEADING, "Neighbours alone"])
def test_the_code_of_the_page_runs(heading):
    model = busy_base()
    x, y = map(ops.convert_to_tensor, labelled())
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    before = [array(weight) for weight in model.trainable_variables]
    scope = {"advreg": advreg, "keras": keras, "model": model, "loss_fn": loss_fn}
    scope |= {"x": x, "y": y, "optimizer": keras.optimizers.Adam()}
    exec(CODE[heading], scope)
    if heading == HEADING:
        for weight, value in zip(model.trainable_variables, before, strict=True):
            assert np.abs(array(weight) - value).max() > 0
    else:
        assert np.abs(array(scope["neighbor"]) - array(x)).max() > 0
