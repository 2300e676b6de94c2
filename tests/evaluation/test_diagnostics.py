"""Each check finds what was built for it to find, and nothing on honest networks."""

import re

import keras
import numpy as np
import pytest
from helpers.slow import slow, slow_but, slow_rows
from keras import layers, ops

from advreg import AdversarialRegularization, evaluate_robustness, make_adv_reg_config
from advreg.apps.recipes import digits_network
from advreg.attacks import (
    APGD,
    BIM,
    FGSM,
    PGD,
    AutoAttack,
    RandomNoise,
    Square,
    Transfer,
)
from advreg.datasets import load
from advreg.evaluation import diagnostics as diagnostics
from advreg.evaluation.diagnostics import CHECKS, SAMPLE

RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
ALL = set(CHECKS)


def train(data, seed=0, epsilon=0.0):
    keras.utils.set_random_seed(seed)
    network = digits_network((8, 8, 1), 10)
    model = network
    if epsilon:
        model = AdversarialRegularization(
            network,
            make_adv_reg_config(
                multiplier=1.0,
                adv_step_size=epsilon / 2,
                adv_grad_norm="infinity",
                pgd_iterations=3,
                pgd_epsilon=epsilon,
                random_init=True,
                **RANGE,
            ),
        )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(data.x_train, data.y_train, epochs=6, batch_size=32, verbose=0)
    return network


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch):
    """Lets the checks have the whole sample, however busy the machine is."""
    monkeypatch.setattr(diagnostics, "_SECONDS", 1e6)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def network(digits):
    return train(digits)


def report(model, digits, attacks, epsilons=None):
    return evaluate_robustness(
        model,
        digits.x_test,
        digits.y_test,
        attacks=attacks,
        epsilons=epsilons,
        batch_size=250,
        verbose=0,
    )


def names(found, passed):
    return {check.name for check in found.checks if check.passed is passed}


def message(found, name):
    return next(check.message for check in found.checks if check.name == name)


@keras.saving.register_keras_serializable("tests")
class Quantised(layers.Layer):
    def call(self, x):
        return ops.round(4 * x) / 4


class Turned(layers.Layer):
    """Changes nothing but the sign of the gradient."""

    def call(self, x):
        return 2 * ops.stop_gradient(x) - x


class Rippled(layers.Layer):
    """Adds ripples, whose slope hides that of what they lie on."""

    def call(self, x):
        return x + ops.sin(3000.0 * x) / 300


def behind(layer, network):
    return keras.Sequential([keras.Input((8, 8, 1)), layer, network])


def in_front(network, layer):
    return keras.Sequential([keras.Input((8, 8, 1)), network, layer])


# What was built


@pytest.mark.slow
def test_saturated_logits_and_the_accuracy_under_a_margin_loss(network, digits):
    model = in_front(network, layers.Rescaling(10_000.0))
    attacks = [PGD(0.3, seed=0, **RANGE), PGD(0.3, loss="margin", seed=0, **RANGE)]
    weak = report(model, digits, attacks[0])
    assert weak.robust_accuracy > 0.8
    assert "zero_gradients" in names(weak, False)
    text = message(weak, "zero_gradients")
    share, left = map(float, re.findall(r"(\d+\.\d+) %", text))
    assert share > 80
    assert left < 1
    assert "at ε 0.3" in text
    assert "Attack with loss='margin', or add AutoAttack." in text
    strong = report(model, digits, attacks)
    assert strong.robust_accuracy < 0.01
    assert "zero_gradients" in names(strong, False)  # Of the model, not the attack.


@pytest.mark.slow
def test_quantised_input_leaves_no_gradient_and_other_attacks_go_on(network, digits):
    model = behind(Quantised(), network)
    attacks = [PGD(0.2, iterations=5, seed=0, **RANGE)]
    masked = report(model, digits, attacks)
    assert masked.robust_accuracy > 0.8 * masked.clean_accuracy
    assert "zero_gradients" in names(masked, False)
    assert "robust_at_huge_radius" in names(masked, False)
    assert message(masked, "zero_gradients").startswith("100.0 % of the correctly")
    assert "Square" in message(masked, "zero_gradients")
    found = report(model, digits, [*attacks, Square(0.2, queries=300, seed=0, **RANGE)])
    assert found.robust_accuracy < masked.robust_accuracy - 0.2
    assert "black_box_beats_white_box" in names(found, False)
    assert "Square" in message(found, "black_box_beats_white_box")


def test_a_gradient_that_points_the_wrong_way(network, digits):
    model = behind(Turned(), network)
    masked = report(model, digits, PGD(0.2, seed=0, **RANGE))
    assert masked.robust_accuracy > 0.8
    assert "robust_at_huge_radius" in names(masked, False)
    assert "zero_gradients" in names(masked, True)
    transfer = Transfer(PGD(0.2, seed=0, **RANGE), network)
    both = report(model, digits, [PGD(0.2, seed=0, **RANGE), transfer])
    assert both.robust_accuracy < 0.2
    text = message(both, "black_box_beats_white_box")
    assert text.startswith("Without following the model's gradient, PGD-40 on sequ")


@pytest.mark.slow
def test_noise_beats_an_attack_that_follows_ripples(network, digits):
    model = behind(Rippled(), network)
    attack = PGD(0.3, step_size=1e-5, random_init=False, seed=0, **RANGE)
    found = report(model, digits, attack)
    assert found.robust_accuracy > 0.8
    assert "black_box_beats_white_box" in names(found, False)
    assert "random noise" in message(found, "black_box_beats_white_box")


@pytest.mark.slow
def test_steps_that_are_too_small(network, digits):
    found = report(network, digits, PGD(0.2, step_size=1e-4, seed=0, **RANGE))
    failed = names(found, False)
    assert "single_step_beats_iterative" in failed
    assert "robust_at_huge_radius" in failed
    assert "step_size=None" in message(found, "single_step_beats_iterative")
    assert "FGSM" in message(found, "single_step_beats_iterative")
    listed = report(
        network,
        digits,
        [PGD(0.2, step_size=1e-4, seed=0, **RANGE), FGSM(0.2, **RANGE)],
    )
    assert "single_step_beats_iterative" in names(listed, False)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(0.1, **RANGE),
        *slow(
            PGD(4.0, norm="l1", iterations=4, seed=0, **RANGE),
            RandomNoise(0.1, seed=0, **RANGE),
        ),
        Square(0.1, queries=10, seed=0, **RANGE),
    ],
    ids=repr,
)
def test_an_attack_that_does_not_do_what_it_could(network, digits, attack):
    found = report(network, digits, attack)
    assert names(found, False) == {"more_effort_lowers_accuracy"}
    text = message(found, "more_effort_lowers_accuracy")
    assert attack.name in text
    assert "Raise iterations" in text


@pytest.mark.slow
def test_a_foreign_attack_is_compared_too(network, digits):
    attack = FGSM(0.1, **RANGE)

    def foreign(model, x, y):
        return x + (attack(model, x, y) - x) / 10

    foreign.epsilon, foreign.norm = 0.1, "infinity"
    foreign.clip_value_min, foreign.clip_value_max = 0.0, 1.0
    found = report(network, digits, foreign)
    assert "more_effort_lowers_accuracy" in names(found, False)
    assert "foreign" in message(found, "more_effort_lowers_accuracy")
    strong = report(network, digits, [foreign, PGD(0.1, seed=0, **RANGE)])
    assert not strong.warnings


def test_an_attack_that_leaves_ball_and_range(network, digits):
    def foreign(model, x, y):
        return x + np.float32(0.2)

    foreign.epsilon, foreign.norm = 0.1, "infinity"
    foreign.clip_value_min, foreign.clip_value_max = 0.0, 1.0
    found = report(network, digits, [foreign, PGD(0.1, seed=0, **RANGE)])
    assert names(found, False) == {"left_ball", "left_range"}
    count = found.clean.correct
    assert message(found, "left_ball").startswith(f"{count} perturbations of foreign")
    assert message(found, "left_range").startswith(f"{count} inputs that foreign")


# What cannot be checked


def test_without_a_radius_there_is_no_ball_to_check(network, digits):
    found = report(network, digits, lambda model, x, y: x)
    assert names(found, True) == ALL - {
        "single_step_beats_iterative",
        "black_box_beats_white_box",
        "more_effort_lowers_accuracy",
        "robust_at_huge_radius",
    }


@pytest.mark.slow
def test_checks_that_cannot_be_made_say_why(network, digits):
    found = report(network, digits, RandomNoise(0.1, **RANGE))
    assert names(found, None) == {
        "single_step_beats_iterative",
        "black_box_beats_white_box",
    }
    found = report(network, digits, AutoAttack(0.1, iterations=10, queries=20, **RANGE))
    assert names(found, None) == {"more_effort_lowers_accuracy"}
    assert "authors" in message(found, "more_effort_lowers_accuracy")


@pytest.mark.slow
def test_each_norm_is_checked_once_where_attacks_win_and_lose(
    network, digits, monkeypatch
):
    checked = []
    monkeypatch.setattr(
        diagnostics,
        "_check_ball",
        lambda seen, probes, runs, *ball: checked.append(ball) or (),
    )
    l2 = PGD(0.5, norm="l2", iterations=5, seed=0, **RANGE)
    report(network, digits, [BIM(0.1, iterations=5), l2], [0.01, 0.1, 0.5])
    infinity = report(network, digits, BIM(0.1, iterations=5), [0.01, 0.1, 0.5])
    best = min(
        infinity.results,
        key=lambda line: abs(line.correct / infinity.clean.correct - 0.5),
    )
    assert [(norm.value, epsilon) for norm, epsilon in checked] == [
        ("l2", 0.5),
        ("infinity", best.epsilon),
        ("infinity", best.epsilon),
    ]


def test_probes_see_a_sample_of_the_whole_data(network, digits, monkeypatch):
    seen = []
    before = diagnostics._Probes.__init__

    def init(self, *args):
        before(self, *args)
        seen.append(self.index)

    monkeypatch.setattr(diagnostics._Probes, "__init__", init)
    evaluate_robustness(
        network,
        digits.x_test,
        digits.y_test,
        attacks=lambda model, x, y: x,
        verbose=0,
    )
    (index,) = seen
    right = network.predict(digits.x_test, verbose=0).argmax(1) == digits.y_test
    assert len(set(index)) == SAMPLE
    assert right[index].all()
    assert index.max() > 0.9 * len(right)
    assert index.min() < 0.1 * len(right)


@pytest.mark.parametrize(
    ("attack", "huge"),
    [
        (PGD(0.2, step_size=0.02, seed=3, **RANGE), 1.0),
        (PGD(2.0), 2.0),  # The data are no wider than 1, but the ball was to be.
        (FGSM(0.1, clip_value_min=-1.0, clip_value_max=np.full((8, 8, 1), 3.0)), 4.0),
        *slow_rows(
            [
                (PGD(6.0, norm="l1", step_size=1.0, **RANGE), 1.0),
                (PGD(0.5, norm="l2"), 1.0),
                (AutoAttack(0.1, iterations=3, queries=3, **RANGE), 1.0),
            ]
        ),
    ],
    ids=repr,
)
def test_the_huge_radius_is_the_width_of_range_or_data(
    network, digits, monkeypatch, attack, huge
):
    ran = []
    run = diagnostics._Probes.run

    def noted(self, attack, places=None):
        ran.append(attack)
        return run(self, attack, places)

    monkeypatch.setattr(diagnostics._Probes, "run", noted)
    found = report(network, digits, attack)
    assert "robust_at_huge_radius" in names(found, True)
    assert ran[-1].norm.value == "infinity"
    assert ran[-1].epsilon == pytest.approx(huge)
    if attack.norm.value == "infinity" and getattr(attack, "step_size", None):
        assert ran[-1].step_size == pytest.approx(0.1)
    else:
        assert getattr(ran[-1], "step_size", None) is None


# Honest networks


HONEST = {
    "PGD": (PGD(0.1, seed=1, **RANGE), [0.02, 0.05, 0.1, 0.2]),
    "PGD-20": (PGD(0.1, iterations=20, seed=1, **RANGE), None),
    "FGSM and PGD": ([FGSM(0.1, **RANGE), PGD(0.1, seed=1, **RANGE)], None),
    "APGD": (APGD(0.1, iterations=20, seed=1, **RANGE), None),
    "AutoAttack": (
        AutoAttack(0.1, iterations=20, queries=100, seed=1, **RANGE),
        None,
    ),
    "no range": (PGD(0.1, seed=1), [0.05, 0.1]),
    "L2": (PGD(1.0, norm="l2", seed=1, **RANGE), [0.3, 0.6]),
    "L2, no range": (PGD(0.6, norm="l2", seed=1), None),
    "L1": (PGD(1.0, norm="l1", seed=1, **RANGE), [0.5, 1.0]),
    "L1, no range": (PGD(1.0, norm="l1", seed=1), None),
}


@pytest.mark.parametrize("case", slow_but(HONEST, "PGD"))
def test_an_honest_network_draws_no_warning(network, digits, case):
    found = report(network, digits, *HONEST[case])
    assert not found.warnings
    assert names(found, True) | names(found, None) == ALL
    assert 0.01 < found.worst_cases[-1].accuracy < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "epsilon"), [(1, 0.0), (0, 0.1)])
def test_honest_networks_draw_no_warning(digits, seed, epsilon):
    network = train(digits, seed, epsilon)
    for attacks, epsilons in HONEST.values():
        assert not report(network, digits, attacks, epsilons).warnings
