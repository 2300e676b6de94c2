import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import Y, classifier, cross_entropy, regularized, rows
from helpers.slow import slow
from keras import layers

from advreg import adversarial_loss, make_adv_reg_config
from advreg.network.masks import can_move

# Everything that could move what must not: noise, a step, and a range that holds
# nothing but what may move.
RESTLESS = make_adv_reg_config(
    adv_step_size=0.5,
    adv_grad_norm="linf",
    pgd_iterations=2,
    random_init=True,
    clip_value_min=5.0,
    clip_value_max=9.0,
)
WEIGHTS = np.array([0.0, 1.0, 0.3] * 4, "float32")
INSIDE = 7 + np.clip(rows(12, 6), -1, 1)
X = INSIDE - 7 * (WEIGHTS == 0)[:, None]


# --- Examples of weight 0


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, WEIGHTS[:, None], *slow(WEIGHTS.astype("float64")), WEIGHTS > 0],
)
def test_examples_of_weight_zero_do_not_move(weights, mode):
    model = regularized(classifier(), RESTLESS, **mode)
    moved = model.perturb_on_batch(X, Y, weights) - X
    assert not moved[WEIGHTS == 0].any()
    assert moved[WEIGHTS != 0].all()


def test_an_example_moves_if_it_counts_in_any_output():
    features = {"x": tf.zeros((3, 2, 2)), "ids": tf.constant(["a", "b", "c"])}
    weights = {"a": tf.constant([0.0, 1.0, 0.0]), "b": tf.constant([[0.0], [0.0], [2]])}
    flags = dict(zip(sorted(features), can_move(features, weights), strict=True))
    np.testing.assert_array_equal(flags["x"][:, 0, 0], [False, True, True])
    assert flags["x"].shape == (3, 1, 1)


def test_weights_of_time_steps():
    weights = tf.constant([[0.0, 0.0], [0.0, 1.0]])
    (flag,) = can_move(tf.zeros((2, 2, 4)), weights)
    np.testing.assert_array_equal(flag[:, 0, 0], [False, True])


@pytest.mark.parametrize(
    "weights", [None, [None, tf.zeros(3)], {"a": None}, tf.constant(0.0)]
)
def test_without_weights_for_all_outputs_everything_moves(weights):
    assert can_move([tf.zeros((3, 2)), tf.zeros(3)], weights) == [None, None]


def test_what_does_not_count_trains_nothing(mode):
    # Neither through its loss nor through what its features would do to the noise.
    kept, absent = np.arange(12) % 3 != 0, X.copy()
    absent[~kept] = 1e3
    config = make_adv_reg_config(
        adv_step_size=0.1, adv_grad_norm="l1", pgd_iterations=3, pgd_epsilon=0.2
    )
    results = []
    for x in (X, absent):
        keras.utils.set_random_seed(0)
        model = regularized(classifier(), config, **mode)
        logs = model.train_on_batch(x, Y, WEIGHTS, return_dict=True)
        results.append([*model.get_weights(), np.array(list(logs.values()))])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_count_at_all(mode):
    model = regularized(classifier(), RESTLESS, **mode)
    before = model.get_weights()
    logs = model.train_on_batch(X, Y, np.zeros(12, "float32"), return_dict=True)
    assert all(float(value) == 0.0 for value in logs.values())
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_adversarial_loss_leaves_them_in_place():
    seen = []

    def model(x):
        seen.append(np.array(x))
        return tf.reduce_sum(x, axis=1, keepdims=True)

    adversarial_loss(
        tf.constant(X),
        tf.zeros((12, 1)),
        model,
        lambda y, z, weight: keras.losses.MeanSquaredError()(y, z, weight),
        sample_weights=tf.constant(WEIGHTS),
        adv_config=RESTLESS,
    )
    np.testing.assert_array_equal(seen[-1][WEIGHTS == 0], X[WEIGHTS == 0])
    assert (seen[-1][WEIGHTS != 0] >= 5.0).all()


# --- Padding

SEQUENCES = 7 + np.clip(rows(12, 5, 2), -1, 1)
SEQUENCES[:, 3:] = SEQUENCES[4] = -1.0
PADDING = (SEQUENCES == -1.0).all(-1)


def sequence_model():
    stack = [layers.Masking(-1.0), layers.GRU(3), layers.Dense(3)]
    return keras.Sequential([keras.Input((5, 2), name="steps"), *stack])


def functional(inputs, steps):
    hidden = layers.GRU(3)(layers.Masking(-1.0)(steps))
    others = [t for t in keras.tree.flatten(inputs) if t is not steps]
    hidden = layers.Concatenate()([hidden, *others]) if others else hidden
    return keras.Model(inputs, layers.Dense(3)(hidden))


def two_inputs(as_dict):
    steps, x = keras.Input((5, 2), name="steps"), keras.Input((6,), name="x")
    inputs = {"steps": steps, "x": x} if as_dict else [x, steps]
    return functional(inputs, steps)


def one_input():
    steps = keras.Input((5, 2), name="steps")
    return functional(steps, steps)


def nested_in_functional():
    steps = keras.Input((5, 2))
    return keras.Model(steps, layers.Dense(3)(sequence_model()(steps)))


PADDED = {
    "nested": (lambda: keras.Sequential([keras.Input((5, 2)), one_input()]), SEQUENCES),
    "nested twice": (
        lambda: keras.Sequential([keras.Input((5, 2)), nested_in_functional()]),
        SEQUENCES,
    ),
    "sequential": (sequence_model, SEQUENCES),
    "built by its data": (
        lambda: keras.Sequential(sequence_model().layers),
        SEQUENCES,
    ),
    "functional": (one_input, SEQUENCES),
    "functional, in a dictionary": (one_input, {"any name": SEQUENCES}),
    "dictionary": (lambda: two_inputs(True), {"steps": SEQUENCES, "x": INSIDE}),
    "list": (lambda: two_inputs(False), [INSIDE, SEQUENCES]),
    "dictionary for a list": (
        lambda: two_inputs(False),
        {"steps": SEQUENCES, "x": INSIDE},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PADDED)
def test_padding_does_not_move(kind):
    base, x = PADDED[kind]
    model = regularized(base(), RESTLESS)
    assert np.isfinite(model.train_on_batch(x, Y)).all()
    perturbed = model.perturb_on_batch(x, Y, np.array([1.0] * 11 + [0.0]))
    for leaf, moved in zip(
        keras.tree.flatten(x), keras.tree.flatten(perturbed), strict=True
    ):
        still = PADDING.copy() if leaf is SEQUENCES else np.zeros(12, bool)
        still[11] = True
        assert not (moved != leaf)[still].any()
        assert (moved != leaf)[~still].all()


@pytest.mark.parametrize("weighted", [False, True])
def test_adversarial_loss_leaves_padding_in_place(weighted):
    seen = []

    class Spy(keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            seen.append(np.array(inputs))
            return super().call(inputs, training=training)

    model = Spy(sequence_model().layers)
    model(SEQUENCES)
    adversarial_loss(
        tf.constant(SEQUENCES),
        tf.constant(Y),
        model,
        cross_entropy(),
        sample_weights=tf.constant(WEIGHTS) if weighted else None,
        adv_config=RESTLESS,
    )
    still = PADDING | (weighted * (WEIGHTS == 0))[:, None]
    np.testing.assert_array_equal(seen[-1][still], SEQUENCES[still])
    assert (seen[-1][~still] >= 5.0).all()


def test_masks_of_later_layers_hold_nothing_in_place():
    inputs = keras.Input((5, 2))
    hidden = layers.Masking()(layers.Activation("relu")(inputs))
    model = keras.Model(inputs, layers.GRU(3)(hidden))
    assert can_move(tf.constant(SEQUENCES), None, model) == [None]
    assert can_move(tf.constant(SEQUENCES), None, keras.Sequential([])) == [None]


def test_padding_counts_for_nothing_in_the_loss():
    # The mask travels with the predictions to the loss, in the perturbed pass too.
    def labelled_alone(x):
        keras.utils.set_random_seed(0)
        stack = [layers.Masking(-1.0), layers.Dense(3)]
        model = regularized(
            keras.Sequential([keras.Input((5, 2)), *stack]),
            make_adv_reg_config(adv_step_size=0.1, random_init=True),
            loss=cross_entropy(),
        )
        labels = np.random.default_rng(0).integers(0, 3, (12, 5))
        return model.train_on_batch(x, labels), model.get_weights()

    other = SEQUENCES.copy()
    other[PADDING] = -1.0
    logs, weights = labelled_alone(SEQUENCES)
    again, same = labelled_alone(other)
    np.testing.assert_allclose(again, logs, rtol=1e-6)
    for a, b in zip(weights, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
