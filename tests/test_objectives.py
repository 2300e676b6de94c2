"""What the adversarial term measures, against the formulas of `formulas.py`."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.backends import (
    array,
    gradient_of,
    gradients_of,
    keras_has_float64,
    only_tensorflow,
    runs_at_once,
    tensor,
)
from helpers.formulas import (
    BATCH,
    CLASSES,
    INPUT,
    LABELS,
    ROUNDING,
    START,
    TERMS,
    WEIGHTS,
    WIDTH,
    Recipe,
    assert_same,
    base_of,
    exact_cross_entropy,
    network,
    step,
)
from helpers.models import X, Y, classifier, regularized, rows, two_outputs
from helpers.slow import slow, slow_but, slow_on_jax
from keras import layers, losses, ops

import advreg
from advreg import AdvRegConfig, make_adv_reg_config
from advreg.objectives import OBJECTIVES, Batch, Mart, Output, Trades

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

# --- The losses themselves


def evaluate(name, weights, x, x_adv, labels):
    """The objective as advreg has it, on a network that is known."""
    clean, moved = network(weights, x), network(weights, x_adv)
    output = Output(labels, clean, moved, None, moved)
    cross = losses.SparseCategoricalCrossentropy(True, dtype="float64")
    batch = Batch(lambda: [output], lambda: ops.cast(cross(labels, moved), "float64"))
    return OBJECTIVES[name]().loss(batch)


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(WIDTH, 5), (5,), (5, CLASSES), (CLASSES,)]
    return [rng.normal(size=shape) for shape in shapes]


@pytest.fixture
def floatx():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@keras_has_float64
@pytest.mark.parametrize("name", TERMS)
def test_loss_and_gradient_equal_the_formula_and_finite_differences(name, floatx):
    weights = [tensor(w) for w in matrices()]
    x_adv = INPUT + 0.3 * START

    def objective(weights):
        return evaluate(name, weights, INPUT, x_adv, tensor(LABELS))

    loss = objective(weights)
    gradients = [array(slope) for slope in gradients_of(objective, weights)]
    clean, truth = network(weights, INPUT), tensor(np.eye(CLASSES)[LABELS])

    def formula(moved):
        # What is constant to the paper stays where it is.
        constant = name == "virtual_adversarial"
        compared = clean if constant else network(moved, INPUT)
        return float(ops.mean(TERMS[name](compared, network(moved, x_adv), truth)))

    np.testing.assert_allclose(float(loss), formula(weights), rtol=1e-12)
    for place, gradient in enumerate(gradients):
        values = array(weights[place])
        for index in np.ndindex(values.shape):
            ends = []
            for sign in (1, -1):
                moved = values.copy()
                moved[index] += sign * 1e-5
                ends.append(
                    formula([*weights[:place], tensor(moved), *weights[place + 1 :]])
                )
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TERMS)
def test_half_the_classes_are_ruled_out_and_nothing_overflows(name):
    """Scores of 1e4, right and wrong ones: losses and gradients stay finite."""
    clean = tensor([[1e4, 0, -1e4], [1e4, 0, 0], [0, 0, 0]], "float32")
    moved = tensor([[-1e4, 0, 1e4], [1e4, 0, 0], [0, 1e4, 1e4]], "float32")
    cross = losses.SparseCategoricalCrossentropy(from_logits=True)
    for label in range(3):
        labels = tensor(np.full(3, label))

        def loss(both, labels=labels):
            clean, moved = both
            output = Output(labels, clean, moved, None, moved)
            return OBJECTIVES[name]().loss(
                Batch(lambda: [output], lambda: cross(labels, moved))
            )

        assert np.isfinite(float(loss([clean, moved])))
        for gradient in gradients_of(loss, [clean, moved]):
            assert np.isfinite(array(gradient)).all()


@keras_has_float64
@pytest.mark.parametrize("gap", [5.0, 15.0, 40.0])
def test_the_margin_of_mart_does_not_round_away(gap, floatx):
    """In float32 a wrong class of probability 1 - e^-15 is 1."""
    found = {}
    for dtype in ("float32", "float64"):
        logits = tensor([[0.0, gap, -1.0]], dtype)

        def objective(logits):
            output = Output(tensor([0]), logits, logits, None, logits)
            return Mart(0.0).loss(Batch(lambda: [output], lambda: None))

        slope = array(gradient_of(objective, logits))
        found[dtype] = float(objective(logits)), slope
    (loss, gradient), (wanted, slope) = found.values()
    # -log p - log(1 - q) for two classes that share all but e^-1 of the rest.
    rest = 1 + np.exp(-1.0)
    exact = 2 * np.log(rest + np.exp(gap)) - np.log(rest)
    np.testing.assert_allclose(wanted, exact, rtol=1e-12)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


# --- One step of training against one that is written out


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in TERMS),
        ("mart", "function"),
        ("trades", "jit"),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for mode, fast in (("function", "mart"), ("jit", "trades"))
            for name in TERMS
            if name != fast
        ),
    ],
    indirect=["mode"],
)
def test_a_step_equals_one_by_hand(name, mode, fixed_start):
    base, recipe = base_of(), Recipe(name, START)
    truth = np.eye(CLASSES)[LABELS]
    expected = recipe.gradients(base.get_weights(), INPUT, truth)
    assert_same(step(base, recipe, LABELS, exact_cross_entropy(), **mode), expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", ["trades", "mart"])
def test_other_norms(name, norm, fixed_start):
    base, recipe = base_of(), Recipe(name, START, norm=norm)
    truth = np.eye(CLASSES)[LABELS]
    expected = recipe.gradients(base.get_weights(), INPUT, truth)
    got = step(base, recipe, LABELS, exact_cross_entropy(), run_eagerly=True)
    assert_same(got, expected)


@pytest.mark.parametrize(
    "name", ["virtual_adversarial", *slow("labeled_loss", "trades")]
)
def test_power_iterations(name, mode, fixed_start):
    fields = {"norm": "l2", "init_radius": 1e-3, "power_iterations": 3}
    base, recipe = base_of(), Recipe(name, START, iterations=1, **fields)
    truth = np.eye(CLASSES)[LABELS]
    expected = recipe.gradients(base.get_weights(), INPUT, truth, WEIGHTS)
    loss = exact_cross_entropy()
    assert_same(step(base, recipe, LABELS, loss, WEIGHTS, **mode), expected)


FORMS = {
    "a column of labels": (None, exact_cross_entropy, LABELS[:, None]),
    "one-hot labels": (
        None,
        lambda: losses.CategoricalCrossentropy(from_logits=True, dtype="float64"),
        np.eye(CLASSES)[LABELS],
    ),
    "probabilities": (
        "softmax",
        lambda: exact_cross_entropy(from_logits=False),
        LABELS,
    ),
    "one-hot probabilities": (
        "softmax",
        lambda: losses.CategoricalCrossentropy(dtype="float64"),
        np.eye(CLASSES)[LABELS],
    ),
    "the name of a loss": (
        "softmax",
        lambda: "sparse_categorical_crossentropy",
        LABELS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", slow_but(TERMS, "trades", "mart"))
def test_every_form_of_labels_and_scores(name, form, fixed_start):
    activation, loss, y = FORMS[form]
    base, recipe = base_of(activation), Recipe(name, START)
    truth = np.eye(CLASSES)[LABELS]
    expected = recipe.gradients(base.get_weights(), INPUT, truth)
    got = step(base, recipe, y, loss(), run_eagerly=True)
    # Losses that are given by name compute in float32.
    assert_same(got, expected, max(ROUNDING, 1e-5 if isinstance(loss(), str) else 0))


@pytest.mark.parametrize("activation", [*slow(None), "sigmoid"])
@pytest.mark.parametrize("shape", [*slow((BATCH,)), (BATCH, 1)])
@pytest.mark.parametrize("name", TERMS)
def test_a_single_score_tells_two_classes_apart(name, activation, shape, fixed_start):
    labels = LABELS % 2
    base, recipe = base_of(activation, 1), Recipe(name, START)
    loss = losses.BinaryCrossentropy(from_logits=activation is None, dtype="float64")
    # The distance of the logits is over both, of which one is 0.
    expected = recipe.gradients(base.get_weights(), INPUT, np.eye(2)[labels])
    got = step(base, recipe, labels.reshape(shape), loss, run_eagerly=True)
    assert_same(got, expected)


@only_tensorflow
@pytest.mark.parametrize(
    "mode", [{"jit_compile": False}, *slow({"jit_compile": True})], ids=str
)
@pytest.mark.parametrize("activation", ["softmax", *slow("sigmoid")])
def test_compiled_functions_find_the_logits_behind_probabilities(
    activation, mode, fixed_start
):
    units = {"softmax": CLASSES, "sigmoid": 1}[activation]
    truth = np.eye(max(units, 2))[LABELS % max(units, 2)]
    base, recipe = base_of(activation, units), Recipe("trades", START)
    # So large that no probability tells them apart, in float64 either.
    base.get_layer("last").kernel.assign(100 * base.get_layer("last").kernel)
    loss = (
        losses.BinaryCrossentropy(dtype="float64")
        if units == 1
        else exact_cross_entropy(from_logits=False)
    )

    def scaled(weights, x):
        return ops.clip(network(weights, x), -700, 700)

    expected = recipe.gradients(base.get_weights(), INPUT, truth, logits=scaled)
    got = step(base, recipe, np.argmax(truth, 1), loss, **mode)
    assert_same(got, expected, max(ROUNDING, 1e-6))


@pytest.mark.parametrize("shape", [*slow((BATCH,)), (BATCH, 1)])
@pytest.mark.parametrize("name", TERMS)
def test_sample_weights(name, shape, fixed_start):
    """Examples of weight 0 neither move nor count, but in virtual training."""
    base, recipe = base_of(), Recipe(name, START)
    truth, weights = np.eye(CLASSES)[LABELS], WEIGHTS.reshape(shape)
    before = base.get_weights()
    expected = recipe.gradients(before, INPUT, truth, WEIGHTS)
    # Examples of weight 0 may have any label.
    for labels in (LABELS, np.where(WEIGHTS == 0, (LABELS + 1) % CLASSES, LABELS)):
        base.set_weights(before)
        got = step(
            base, recipe, labels, exact_cross_entropy(), weights, run_eagerly=True
        )
        assert_same(got, expected)


class Spy(layers.Layer):
    """Keeps what it received."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def call(self, inputs):
        self.seen.append(array(inputs))
        return inputs

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@runs_at_once
@pytest.mark.parametrize("name", TERMS)
def test_examples_of_weight_0_move_only_where_they_count(name):
    spy = Spy(dtype="float64")
    inputs = keras.Input((WIDTH,), dtype="float64")
    base = keras.Sequential([inputs, spy, layers.Dense(3, dtype="float64")])
    config = Recipe(name, START).config()
    model = regularized(
        base, make_adv_reg_config(**config), exact_cross_entropy(), run_eagerly=True
    )
    model.train_on_batch(INPUT, LABELS, WEIGHTS)
    inside = np.clip(INPUT, -1.5, 1.5) == INPUT
    moved = ((spy.seen[-1] != INPUT) & inside).any(axis=1)
    np.testing.assert_array_equal(
        moved, True if name == "virtual_adversarial" else WEIGHTS != 0
    )


@pytest.mark.slow
def test_class_weights_are_sample_weights():
    by_class = {0: 0.5, 1: 2.0, 2: 0.0}
    given = np.array([by_class[label] for label in Y])
    found = []
    for weights in ({"class_weight": by_class}, {"sample_weight": given}):
        keras.utils.set_random_seed(0)
        model = regularized(classifier(), AdvRegConfig.trades(0.1, iterations=1))
        history = model.fit(X, Y, verbose=0, shuffle=False, **weights).history
        found.append([history, *model.get_weights()])
    np.testing.assert_equal(*found)


# --- Several outputs, sequences, images


def named_heads(dictionary=False):
    """Two outputs, whose names come in another order than that of the alphabet."""
    inputs = keras.Input((6,))
    heads = [layers.Dense(3, name="z")(inputs), layers.Dense(2, name="a")(inputs)]
    outputs = {"one": heads[0], "two": heads[1]} if dictionary else heads
    return keras.Model(inputs, outputs)


def from_logits():
    return losses.SparseCategoricalCrossentropy(from_logits=True)


def softmax_rows(logits):
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def record(base, monkeypatch):
    """Lists what a base receives, step by step, in eager mode."""
    received, call = [], base.call

    def recording(inputs, **kwargs):
        received.append(array(inputs))
        return call(inputs, **kwargs)

    monkeypatch.setattr(base, "call", recording)
    return received


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        ("crossentropy", "sparse_categorical_crossentropy"),
        pytest.param("CE", "sparse_categorical_crossentropy", marks=pytest.mark.slow),
    ],
)
def test_the_cross_entropy_that_fits_the_labels_is_one_of_probabilities(loss, same):
    logs = []
    for name in (loss, same):
        keras.utils.set_random_seed(0)
        base = keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax")])
        model = regularized(
            base, AdvRegConfig.trades(0.1, iterations=1), name, run_eagerly=True
        )
        logs.append(model.train_on_batch(X, Y))
    assert logs[0] == logs[1]


def test_an_output_without_a_loss_weight_has_weight_one():
    logs = []
    for weights in ([2.0, None], [2.0, 1.0]):
        keras.utils.set_random_seed(0)
        base = named_heads(dictionary=False)
        config = AdvRegConfig.trades(0.1, iterations=1)
        losses = [from_logits(), from_logits()]
        model = regularized(
            base, config, losses, loss_weights=weights, run_eagerly=True
        )
        logs.append(model.train_on_batch(X, [Y, Y % 2]))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("by", ["place", "name", "key"])
def test_labels_are_classes_of_their_own_output(by):
    base = named_heads(dictionary=by == "key")
    names = {"place": None, "name": "za", "key": ["one", "two"]}[by]

    def named(values):
        return values if names is None else dict(zip(names, values, strict=True))

    loss = named([from_logits(), from_logits()])
    model = regularized(base, AdvRegConfig.fgsm(0.1), loss)
    model.train_on_batch(X, named([Y, Y % 2]))
    assert Y.max() == 2
    with pytest.raises(ValueError, match=r"`y` must hold classes from 0 to 1.*: 2"):
        model.train_on_batch(X, named([Y, Y]))


@runs_at_once
@pytest.mark.parametrize("loss_weights", [None, [1.0, 0.25]])
@pytest.mark.parametrize("by", ["place", "name", "key"])
def test_the_divergence_of_several_outputs_is_their_sum(by, loss_weights, monkeypatch):
    base = named_heads(dictionary=by == "key")
    kernels = base.get_weights()
    weights = [np.linspace(0, 1, 12), np.linspace(2, 0, 12)]
    y, loss, given = [Y, Y % 2], [from_logits(), from_logits()], weights
    of_outputs = loss_weights
    if by == "name":
        y, loss = (dict(zip("za", v, strict=True)) for v in (y, loss))
        if loss_weights:
            of_outputs = dict(zip("za", loss_weights, strict=True))
    if by == "key":
        keys = ("one", "two")
        y, loss, given = (dict(zip(keys, v, strict=True)) for v in (y, loss, weights))
        if loss_weights:
            of_outputs = dict(zip(keys, loss_weights, strict=True))
    config = AdvRegConfig.trades(0.3, 2.0, iterations=1, init_radius=0.2)
    model = regularized(base, config, loss, run_eagerly=True, loss_weights=of_outputs)
    received = record(base, monkeypatch)
    logs = model.train_on_batch(X, y, given, return_dict=True)
    x_adv = received[-1]
    assert (np.abs(x_adv - X).max(axis=1) > 0.1).all()
    total = 0.0
    parts = (kernels[::2], kernels[1::2], weights, loss_weights or [1.0, 1.0])
    for kernel, bias, w, loss_weight in zip(*parts, strict=True):
        p, q = (softmax_rows(at @ kernel + bias) for at in (X, x_adv))
        total += loss_weight * np.mean(w * np.sum(p * np.log(p / q), -1))
    np.testing.assert_allclose(logs["scaled_adversarial_loss"], 2 * total, rtol=1e-4)


PLACES = np.array([[True, True, True, False], [True] * 4, [False] * 4])


def in_sequences(values):
    """Puts what belongs to rows into steps of sequences, of which some are padding."""
    values = np.asarray(values)
    padded = np.zeros((*PLACES.shape, *values.shape[1:]), values.dtype)
    padded[PLACES] = values
    return padded


@pytest.mark.parametrize("weighted", [*slow(False), True])
@pytest.mark.parametrize("name", TERMS)
def test_padding_of_sequences_neither_moves_nor_counts(name, weighted, monkeypatch):
    base = keras.Sequential(
        [
            keras.Input((4, WIDTH), dtype="float64"),
            layers.Masking(dtype="float64"),
            *base_of().layers,
        ]
    )
    start = tensor(in_sequences(START).reshape(3, -1))
    monkeypatch.setattr(
        "advreg.perturbation.ball.sample_unit_ball", lambda *args: start
    )
    recipe, truth = Recipe(name, START), np.eye(CLASSES)[LABELS]
    weights = WEIGHTS if weighted else None
    expected = recipe.gradients(base.get_weights(), INPUT, truth, weights)
    got = step(
        base,
        recipe,
        in_sequences(LABELS),
        exact_cross_entropy(),
        in_sequences(weights) if weighted else None,
        in_sequences(INPUT),
        run_eagerly=True,
    )
    assert_same(got, expected)


@runs_at_once
@pytest.mark.parametrize("name", TERMS)
def test_images_of_bytes(name):
    spy = Spy()
    stack = [layers.Rescaling(1 / 255), spy, layers.Flatten(), layers.Dense(3)]
    base = keras.Sequential([keras.Input((4, 4, 1), dtype="uint8"), *stack])
    config = make_adv_reg_config(
        1.0,
        objective=name,
        adv_step_size=0.3,
        adv_grad_norm="linf",
        random_init=True,
        weight_perturbation=0.1,
    )
    model = regularized(base, config, run_eagerly=True)
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), "uint8")
    model.train_on_batch(images, Y)
    moved = 255 * spy.seen[-1] - images
    # A byte would have lost it.
    assert 0.1 < np.abs(moved).max() < 0.7


# --- Half precision, and scores that saturate


@slow_on_jax
@pytest.mark.parametrize("activation", [*slow(None), "softmax"])
@pytest.mark.parametrize("name", slow_but(TERMS, "labeled_loss", "mart"))
def test_half_precision(name, activation):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        base = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, "relu"),
                layers.BatchNormalization(),
                layers.Dense(3, activation),
            ]
        )
    finally:
        keras.config.set_dtype_policy("float32")
    config = make_adv_reg_config(
        1.0, objective=name, adv_step_size=0.2, random_init=True, pgd_iterations=2
    )
    config = dataclasses.replace(config, weight_perturbation=0.01)
    loss = losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    model = regularized(base, config, loss, "adam", run_eagerly=True)
    history = [model.train_on_batch(X, Y, return_dict=True) for _ in range(4)]
    assert all(np.isfinite(list(logs.values())).all() for logs in history)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    # Probabilities in half precision make the first scale of the loss too large.
    assert int(model.optimizer.iterations) >= 3


@runs_at_once
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_attacks_take_the_gradient_of_the_scaled_loss(clean_weight, monkeypatch):
    """In half precision the gradient of this loss underflows unless it is scaled."""
    moved = []
    for weight in (1.0, 1e-7):
        keras.utils.set_random_seed(0)
        last = layers.Dense(3, dtype="mixed_float16")
        base = keras.Sequential([keras.Input((6,)), layers.Dense(4, "tanh"), last])
        config = make_adv_reg_config(
            1.0, clean_weight=clean_weight, adv_step_size=0.2, pgd_iterations=2
        )
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        scaled = {"loss_weights": [weight], "run_eagerly": True}
        model = regularized(base, config, optimizer=optimizer, **scaled)
        received = record(base, monkeypatch)
        model.train_on_batch(X, Y)
        moved.append(received[-1] - X)
    assert np.linalg.norm(moved[0], axis=1).min() > 0.3
    np.testing.assert_allclose(moved[1], moved[0], atol=0.05)


@pytest.mark.parametrize(
    "mode", [{"run_eagerly": True}, *slow({"jit_compile": False})], ids=str
)
@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("name", TERMS)
def test_saturated_scores(name, activation, mode):
    """Probabilities that are 0 and 1, from logits of 1e4 and more."""
    units = 1 if activation == "sigmoid" else 3
    base = keras.Sequential([keras.Input((6,)), layers.Dense(units, activation)])
    base.layers[0].kernel.assign(1e4 * base.layers[0].kernel)
    loss = (
        "binary_crossentropy"
        if units == 1
        else losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    )
    config = make_adv_reg_config(
        1.0, objective=name, adv_step_size=0.5, random_init=True, adv_grad_norm="linf"
    )
    model = regularized(base, config, loss, **mode)
    # So many examples that a random start changes the class of some.
    x, y = np.tile(X, (20, 1)), np.tile(Y % (2 if units == 1 else 3), 20)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    # A divergence sees the scores that probabilities of 0 and 1 do not show.
    assert units == 1 or logs["scaled_adversarial_loss"] > 10
    assert all(np.isfinite(w).all() for w in model.get_weights())


# --- Objectives of one's own, and errors


@dataclasses.dataclass(frozen=True)
class Backwards(advreg.Objective):
    """The labelled loss where it is smallest."""

    uses_clean = False

    def attack(self, batch):
        return -batch.labeled_loss

    def loss(self, batch):
        (output,) = batch.outputs
        assert output.clean_logits is None
        return output.mean(-ops.log_softmax(output.adversarial_logits)[:, 0])


@runs_at_once
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_an_attack_of_one_s_own_is_followed_from_the_first_step(
    clean_weight, monkeypatch
):
    base = classifier()
    config = make_adv_reg_config(
        1.0,
        objective=Backwards(),
        clean_weight=clean_weight,
        adv_step_size=0.2,
        adv_grad_norm="linf",
    )
    model = regularized(base, config, run_eagerly=True)
    expected = 2 * X - model.perturb_on_batch(X, Y)  # The other way.
    received = record(base, monkeypatch)
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(received[-1], expected, atol=1e-6)


class Looking(advreg.Objective):
    """Keeps what it may look at, in eager mode."""

    seen = None

    def attack(self, batch):
        self.seen["attack"] = batch.outputs
        return batch.labeled_loss

    def loss(self, batch):
        self.seen["loss"] = batch.outputs
        return batch.labeled_loss


@runs_at_once
def test_what_an_objective_may_look_at():
    """Logits behind saturated probabilities, for the attack as well; labels by name."""
    inputs = keras.Input((6,))
    heads = [
        layers.Dense(3, "softmax", name="z")(inputs),
        layers.Dense(1, "sigmoid", name="a")(inputs),
    ]
    base = keras.Model(inputs, heads)
    kernels = [200 * w for w in base.get_weights()]
    base.set_weights(kernels)
    objective = Looking()
    objective.seen = {}
    loss = {"z": "sparse_categorical_crossentropy", "a": "binary_crossentropy"}
    y = {"z": Y, "a": Y % 2}
    config = make_adv_reg_config(objective=objective)
    model = regularized(base, config, loss, run_eagerly=True)
    model.train_on_batch(X, y)
    for outputs in objective.seen.values():
        first, second = outputs
        np.testing.assert_array_equal(first.labels, Y)
        np.testing.assert_array_equal(np.ravel(second.labels), Y % 2)
        np.testing.assert_allclose(array(first.clean_logits), X @ kernels[0], rtol=1e-3)
        np.testing.assert_allclose(
            array(second.clean_logits)[:, 1:], X @ kernels[2], rtol=1e-3, atol=1e-3
        )
        assert first.clean_logits.shape == first.adversarial_logits.shape
        assert first.sample_weight is None
        assert np.abs(array(first.clean_logits)).max() > 200
        np.testing.assert_allclose(array(first.predictions).sum(-1), 1, rtol=1e-5)


def test_an_objective_without_a_loss():
    config = make_adv_reg_config(objective=advreg.Objective())
    model = regularized(classifier(), config, run_eagerly=True)
    with pytest.raises(NotImplementedError, match="Objective must define `loss`"):
        model.train_on_batch(X, Y)


class WithArguments(advreg.Objective):
    def __init__(self, scale):
        self.scale = scale

    def loss(self, batch):
        return self.scale * batch.labeled_loss


class Described(WithArguments):
    def get_config(self):
        return {"scale": self.scale}


def test_arguments_of_an_objective_are_not_lost():
    config = make_adv_reg_config(objective=WithArguments(3.0))
    with pytest.raises(NotImplementedError, match=r"WithArguments must .*get_config"):
        config.get_config()
    described = make_adv_reg_config(objective=Described(3.0))
    assert described == make_adv_reg_config(objective=Described(3.0))
    assert described != make_adv_reg_config(objective=Described(2.0))


@pytest.mark.parametrize("objective", sorted(set(TERMS) - {"labeled_loss"}))
@pytest.mark.parametrize(
    ("loss", "received"), [("mse", "mse"), (lambda y, p: ops.mean(p, -1), "lambda")]
)
def test_losses_that_do_not_tell_what_scores_are(objective, loss, received):
    config = make_adv_reg_config(objective=objective, random_init=True)
    model = regularized(classifier(), config, loss, run_eagerly=True)
    name = type(OBJECTIVES[objective]()).__name__
    match = rf"objective {name} compares.*every output needs.*Received: .*{received}"
    with pytest.raises(ValueError, match=match):
        model.train_on_batch(X, rows(12, 3))


@pytest.mark.parametrize(
    "loss", [["mse", from_logits()], {"z": "mse", "a": from_logits()}]
)
def test_every_output_needs_a_loss_that_tells(loss):
    config = AdvRegConfig.trades(0.1, iterations=1)
    model = regularized(named_heads(), config, loss, run_eagerly=True)
    y = [rows(12, 3), Y % 2]
    y = y if isinstance(loss, list) else dict(zip("za", y, strict=True))
    with pytest.raises(ValueError, match=r"every output needs a cross-entropy"):
        model.train_on_batch(X, y)


@pytest.mark.filterwarnings(
    "ignore:The loss `binary_crossentropy` is computed from prob"
)
def test_several_labels_at_once_are_no_classes():
    config = AdvRegConfig.trades(0.1, iterations=1)
    model = regularized(classifier(), config, "binary_crossentropy", run_eagerly=True)
    with pytest.raises(ValueError, match=r"single score.*output of shape \(12, 3\)"):
        model.train_on_batch(X, np.eye(3)[Y])


def test_mart_is_for_one_output():
    config = AdvRegConfig.mart(0.1, iterations=1)
    loss = [from_logits(), from_logits()]
    model = regularized(two_outputs(), config, loss, run_eagerly=True)
    with pytest.raises(ValueError, match=r"Mart .* one output.*Received: 2 outputs"):
        model.train_on_batch(X, [Y, Y % 2])


def test_values_of_the_fields_are_checked():
    for make, name in (
        (lambda v: Mart(v), "beta"),
        (OBJECTIVES["logit_pairing"], "weight"),
    ):
        with pytest.raises(
            ValueError, match=f"`{name}` must be finite and not negative"
        ):
            make(-1.0)
        with pytest.raises(TypeError, match=f"`{name}` must be a number"):
            make("5")
    assert Trades() == Trades() != Mart()
    assert Mart(2).get_config() == {"beta": 2.0}
