import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.slow import slow_rows
from helpers.targets import (
    UNIT,
    accuracy,
    assert_allowed,
    digits,
    left_by,
    predicted,
    quantised,
    saturated,
    tracings,
)
from keras import layers

from advreg.attacks import APGD, PGD, AutoAttack, Square
from advreg.attacks.apgd import ApgdSteps, TargetedApgdSteps
from advreg.attacks.square import SquareSearch

SMALL = {"iterations": 10, "queries": 100, "seed": 0, **UNIT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "epsilon"),
    [("infinity", 0.08), pytest.param("l2", 0.5, marks=pytest.mark.slow)],
)
def test_no_weaker_than_its_parts(norm, epsilon):
    network, x, y = digits()
    attack = AutoAttack(epsilon, norm=norm, **SMALL)
    x_adv = attack(network, x, y)
    assert_allowed(x_adv, x, epsilon, norm)
    left = accuracy(network, x_adv, y)
    steps = {"norm": norm, "iterations": 10, "seed": 0, **UNIT}
    parts = [
        APGD(epsilon, **steps),
        APGD(epsilon, loss="dlr", **steps),
        Square(epsilon, norm=norm, queries=100, seed=0, **UNIT),
    ]
    assert 0 < left <= min(left_by(part, network, x, y) for part in parts) < 0.9
    np.testing.assert_array_equal(x_adv, attack(network, x, y))


def test_large_logits_hide_nothing_from_it():
    network, x, y = digits()
    hidden = saturated(network)
    assert left_by(PGD(0.3, seed=0, **UNIT), hidden, x, y) > 0.8
    assert left_by(PGD(0.3, loss="margin", seed=0, **UNIT), hidden, x, y) < 0.01
    assert left_by(AutoAttack(0.3, **SMALL), hidden, x, y) < 0.01


def test_rounding_hides_nothing_from_it():
    network, x, y = digits()
    hidden = quantised(network)
    right = predicted(hidden, x) == y
    assert left_by(AutoAttack(0.3, **SMALL), hidden, x[right], y[right]) < 0.1


def rounds_against(network, x, y, **arguments):
    attack = AutoAttack(0.1, **arguments)
    problem = attack.problem(network)
    rows = attack.batch(problem, tf.constant(x), tf.constant(y))
    return attack.solvers(problem), problem, rows


def test_its_parts_in_order():
    solvers, _, _ = rounds_against(*digits(), iterations=20, queries=50)
    assert [type(solver) for solver in solvers] == [
        ApgdSteps,
        *[TargetedApgdSteps] * 9,
        SquareSearch,
    ]
    assert [solver.steps for solver in solvers] == [21] * 10 + [50]
    assert [solver.rank for solver in solvers[1:-1]] == list(range(9))
    assert not any(solver.targeted for solver in solvers)
    solvers, _, _ = rounds_against(*digits(), target_classes=3)
    assert len(solvers) == 5


def test_targets_are_the_most_likely_wrong_classes_at_the_input():
    network, x, y = digits()
    solvers, problem, rows = rounds_against(network, x, y)
    logits = network.predict(x, verbose=0)
    order = np.argsort(np.where(np.eye(10)[y] > 0, -np.inf, logits), axis=1)[:, ::-1]
    for rank in (0, 4, 8):
        state = solvers[1 + rank].init(problem, rows, keras.random.SeedGenerator(0))
        np.testing.assert_array_equal(state["targets"], order[:, rank])


def test_the_loss_towards_a_class():
    logits = tf.constant([[3.0, 1.0, -2.0, 0.5], [0.0, 4.0, 1.0, 1.0]])
    rows = {"classes": tf.constant([0, 1]), "targets": tf.constant([2, 3])}
    towards = TargetedApgdSteps(2, "towards")
    # -(z_y - z_t) / (z_π1 - (z_π3 + z_π4) / 2), equation 6 of the paper.
    np.testing.assert_allclose(
        towards.objective(logits, rows), [-5 / (3 + 0.75), -3 / (4 - 0.5)], rtol=1e-6
    )
    np.testing.assert_allclose(
        towards.objective(
            logits[:, :3],
            {"classes": tf.constant([0, 1]), "targets": tf.constant([2, 0])},
        ),
        [-5, -4],
    )


@pytest.mark.parametrize(
    ("classes", "single"), slow_rows([(2, False), (2, True), (3, False)], 1)
)
def test_few_classes(classes, single):
    network, x, y = digits()
    mapped = layers.Dense(1 if single else classes, use_bias=False)
    small = keras.Model(network.inputs[0], mapped(network.outputs[0]))
    weights = np.eye(classes)[np.arange(10) % classes]
    weights = weights[:, 1:] - weights[:, :1] if single else weights
    mapped.set_weights([weights])
    small.compile(
        loss=keras.losses.BinaryCrossentropy(from_logits=True) if single else None
    )
    outputs = small.predict(x, verbose=0)
    y = (outputs[:, 0] > 0).astype(int) if single else outputs.argmax(1)
    solvers, _, _ = rounds_against(small, x, y)
    assert len(solvers) == classes + 1
    x_adv = AutoAttack(0.3, **SMALL)(small, x, y)
    outputs = small.predict(x_adv, verbose=0)
    after = (outputs[:, 0] > 0).astype(int) if single else outputs.argmax(1)
    assert np.mean(after == y) < 0.05


@pytest.mark.slow
def test_probabilities():
    network, x, y = digits()
    softmax = keras.Model(network.inputs[0], layers.Softmax()(network.outputs[0]))
    left = left_by(AutoAttack(0.1, **SMALL), softmax, x, y)
    assert abs(left - left_by(AutoAttack(0.1, **SMALL), network, x, y)) < 0.03


def test_each_part_is_compiled_once():
    network, x, y = digits()
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    for epsilon, size in ((0.02, 120), (0.05, 17)):
        AutoAttack(epsilon, **{**SMALL, "iterations": 3, "queries": 3})(
            copy, x, y, batch_size=size
        )
    traced = tracings(copy)
    assert len([key for key in traced if key[0][0] == "step"]) == 3


def test_name():
    assert AutoAttack(0.1).name == "AutoAttack"
    assert AutoAttack(0.1, iterations=7).iterations_per_start == 7
    assert AutoAttack(0.1).with_epsilon(0.2).epsilon == 0.2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": "l1"}, ValueError, "`norm` must be one of.*`AutoAttack`.*'l1'"),
        ({"iterations": 0}, ValueError, "`iterations` must be at least 1.*: 0"),
        ({"queries": 0}, ValueError, "`queries` must be at least 1.*: 0"),
        ({"target_classes": 0}, ValueError, "`target_classes` must be at least 1.*: 0"),
        ({"targeted": True}, ValueError, "`targeted` must be False.*Received: True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AutoAttack(0.1, **arguments)
