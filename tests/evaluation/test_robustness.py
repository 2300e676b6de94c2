"""`evaluate_robustness` against the model's own predictions."""

import math
import random
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, cross_entropy, rows
from helpers.slow import slow, slow_but
from keras import layers

from advreg import AdversarialRegularization, evaluate_robustness
from advreg.attacks import APGD, BIM, FGSM, PGD, AutoAttack, RandomNoise, Transfer
from advreg.attacks.engine.rows import num_rows
from advreg.attacks.engine.runner import run
from advreg.evaluation.evaluation_run import EvaluationRun
from advreg.evaluation.report import INTERRUPTED, RobustnessReport

X = rows(83, 6)
WRONG = np.arange(83) % 7 == 3


def make(model):
    """A model and labels of which it gets six in seven right."""
    right = predict(model, X)
    return model, np.where(WRONG, (right + 1) % 3, right)


def predict(model, x):
    return model.predict(x, verbose=0).argmax(1)


@pytest.fixture(scope="module")
def setting():
    keras.utils.set_random_seed(3)
    return make(classifier())


def evaluate(model, x, y=None, **kwargs):
    kwargs.setdefault("verbose", 0)
    return evaluate_robustness(model, x, y, **kwargs)


def numbers(report):
    """All that a report counts."""
    lines = (report.clean, *report.results, *report.worst_cases, report.overall)
    return [(line.name, line.epsilon, line.correct, line.examples) for line in lines]


def stands(model, attack, y):
    """Independently: what is right, and still is where the attack has put it."""
    right = predict(model, X) == y
    return right & (predict(model, attack(model, X, y)) == y)


class Counting:
    """An attack that notes what it is given, and moves nothing."""

    name = "counting"

    def __init__(self, stop=math.inf):
        self.stop, self.seen = stop, []

    def __call__(self, model, x, y):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append((x, y))
        return x


# Numbers


def test_clean_accuracy_is_that_of_predict(setting):
    model, y = setting
    report = evaluate(model, X, y, attacks=FGSM(0.1))
    assert report.clean.correct == (predict(model, X) == y).sum() == (~WRONG).sum()
    assert report.examples == 83
    assert report.complete


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(0.3),
        *slow(FGSM(0.8, norm="l2", loss="margin"), BIM(0.3, iterations=5)),
        BIM(1.0, norm="l1", iterations=5, clip_value_min=-4.0, clip_value_max=4.0),
    ],
)
def test_accuracy_under_attack_is_that_of_predict(setting, attack):
    model, y = setting
    (result,) = evaluate(model, X, y, attacks=attack).results
    expected = stands(model, attack, y).sum()
    assert result.correct == expected
    assert 0 < expected < (~WRONG).sum()


def test_the_worst_case_is_that_of_each_example(setting):
    model, y = setting
    attacks = [FGSM(0.3), BIM(0.3, iterations=4), BIM(0.3, iterations=4, loss="dlr")]
    # An attack that nobody knows fools some that the others do not.
    stubborn = np.flatnonzero(stands(model, attacks[1], y))[:3]

    def foreign(model, x, y):
        mine = (x[:, None] == X[stubborn]).all(2).any(1)
        return np.where(mine[:, None], -20 * x, x)

    report = evaluate(model, X, y, attacks=[*attacks, foreign])
    each = [stands(model, attack, y) for attack in attacks]
    both = np.logical_and.reduce(each)
    assert report.worst_cases[0].correct == report.overall.correct == both.sum()
    found = stands(model, foreign, y)
    assert report.results[-1].correct == found.sum() < (~WRONG).sum()

    foreign.epsilon, foreign.norm = 1e3, "infinity"
    report = evaluate(model, X, y, attacks=[*attacks, foreign])
    assert [line.epsilon for line in report.worst_cases] == [0.3, 1e3]
    assert report.worst_cases[0].correct == both.sum()
    assert report.worst_cases[1].correct == (both & found).sum()
    assert report.overall.correct == (both & found).sum() < both.sum()


def test_the_worst_case_in_a_ball_includes_smaller_ones(setting):
    model, y = setting
    attacks = [FGSM(0.4), BIM(0.2, iterations=5), FGSM(0.9, norm="l2")]
    report = evaluate(model, X, y, attacks=attacks)
    each = [stands(model, attack, y) for attack in attacks]
    balls = [(line.norm, line.epsilon) for line in report.worst_cases]
    assert balls == [("infinity", 0.2), ("infinity", 0.4), ("l2", 0.9)]
    moved = [attack(model, X, y) - X for attack in attacks]
    for line in report.worst_cases:
        order = np.inf if line.norm == "infinity" else 2
        left = predict(model, X) == y
        for stood, displacement in zip(each, moved, strict=True):
            inside = np.linalg.norm(displacement, order, axis=1) <= line.epsilon + 1e-5
            left &= stood | ~inside
        assert line.correct == left.sum()
    assert report.overall.correct == np.logical_and.reduce(each).sum()


def test_an_attack_without_a_radius_counts_in_the_balls_that_it_stayed_in(setting):
    model, y = setting
    best = BIM(0.4, iterations=20)

    def foreign(model, x, y):
        return best(model, x, y)

    report = evaluate(model, X, y, attacks=[FGSM(0.4), foreign])
    expected = (stands(model, FGSM(0.4), y) & stands(model, best, y)).sum()
    assert report.overall.correct == report.worst_cases[0].correct == expected
    alone = evaluate(model, X, y, attacks=foreign)
    assert alone.overall.correct == stands(model, best, y).sum()
    assert alone.worst_cases == ()


def test_what_left_its_ball_or_range_counts_in_no_worst_case(setting):
    model, y = setting

    def foreign(model, x, y):
        return -20 * x

    foreign.epsilon, foreign.norm = 0.1, "infinity"
    report = evaluate(model, X, y, attacks=foreign)
    assert report.results[0].correct < report.clean.correct
    assert report.overall.correct == report.clean.correct
    assert report.worst_cases[0].correct == report.clean.correct
    del foreign.epsilon
    foreign.clip_value_max = 5.0
    report = evaluate(model, X, y, attacks=foreign)
    assert report.results[0].correct < report.clean.correct
    assert any("lie outside its range" in text for text in report.warnings)


def test_radii_replace_those_of_attacks_and_scale_their_steps(setting):
    model, y = setting
    attacks = [
        BIM(0.1, step_size=0.025, iterations=3),
        FGSM(0.7, norm="l2"),
        Counting(),
    ]
    report = evaluate(model, X, y, attacks=attacks, epsilons=[0.5, 0.25, 0.5])
    assert [(line.name, line.epsilon) for line in report.results] == [
        ("BIM-3", 0.25),
        ("BIM-3", 0.5),
        ("FGSM", 0.25),
        ("FGSM", 0.5),
        ("counting", None),
    ]
    expected = [
        BIM(0.25, step_size=0.0625, iterations=3),
        BIM(0.5, step_size=0.125, iterations=3),
        FGSM(0.25, norm="l2"),
        FGSM(0.5, norm="l2"),
    ]
    for line, attack in zip(report.results, expected, strict=False):
        assert line.settings == repr(attack)
        assert line.correct == stands(model, attack, y).sum()
    single = evaluate(model, X, y, attacks=FGSM(0.7), epsilons=0.25)
    assert [line.epsilon for line in single.results] == [0.25]


def test_at_a_radius_of_zero_accuracy_is_clean(setting):
    model, y = setting
    report = evaluate(model, X, y, attacks=[PGD(0.1), FGSM(0.0)], epsilons=[0.0])
    assert {correct for _, _, correct, _ in numbers(report)} == {(~WRONG).sum()}


def test_attacks_that_differ_in_more_than_the_ball_have_names_that_differ(setting):
    model, y = setting
    other = keras.models.clone_model(model)
    attacks = {
        FGSM(0.1): "FGSM",
        FGSM(0.2): "FGSM",
        FGSM(0.2, norm="l2"): "FGSM",
        FGSM(0.1, loss="margin"): "FGSM (2)",
        BIM(0.1, iterations=2): "BIM-2",
        BIM(0.2, iterations=2, step_size=0.1): "BIM-2 (2)",
        BIM(0.1, iterations=2, step_size=0.05): "BIM-2 (2)",
        Transfer(FGSM(0.1), model): f"FGSM on {model.name}",
        Transfer(FGSM(0.2), model): f"FGSM on {model.name}",
        Transfer(FGSM(0.2), other): f"FGSM on {model.name} (2)",
        Counting(): "counting",
        Counting(): "counting (2)",
    }
    report = evaluate(model, X, y, attacks=list(attacks))
    assert [line.name for line in report.results] == list(attacks.values())


def test_the_threat_model_is_told(setting):
    model, y = setting
    attacks = [
        FGSM(0.1, clip_value_min=-5.0, clip_value_max=5.0),
        RandomNoise(0.2, norm="l2", clip_value_min=-5.0, clip_value_max=5.0),
    ]
    assert evaluate(model, X, y, attacks=attacks).threat_model == (
        "An input may move up to 0.1 in the L∞ norm or up to 0.2 in the L2 norm, "
        "inside the range from -5 to 5. The attacker knows the model and the labels "
        "(FGSM). Without the model's own gradient: RandomNoise ×10."
    )


# Data of any form


class Sequence(keras.utils.PyDataset):
    def __init__(self, y):
        super().__init__()
        self.y = y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(30 * index, 30 * index + 30)
        return X[part], self.y[part]


def stream(y):
    for start in range(0, 83, 30):
        yield X[start : start + 30], y[start : start + 30]


FORMS = {
    "lists": lambda y: (tf.constant(X), tf.constant(y)),
    "column": lambda y: (X, y[:, None]),
    "one-hot": lambda y: (X, np.eye(3, dtype="float32")[y]),
    "floats": lambda y: (X, y.astype("float32")),
    "dataset": lambda y: (tf.data.Dataset.from_tensor_slices((X, y)).batch(30), None),
    "weighted": lambda y: (
        tf.data.Dataset.from_tensor_slices((X, y, 0.0 * y)).batch(7),
        None,
    ),
    "of Keras": lambda y: (Sequence(y), None),
    "generator": lambda y: (stream(y), None),
}


@pytest.mark.parametrize(
    "form", slow_but(FORMS, "one-hot", "dataset", "weighted", "of Keras")
)
def test_every_form_of_data_gives_the_same_numbers(setting, form):
    model, y = setting
    attacks = [FGSM(0.3), BIM(0.3, iterations=3)]
    expected = numbers(evaluate(model, X, y, attacks=attacks))
    found = evaluate(model, *FORMS[form](y), attacks=attacks)
    assert numbers(found) == expected
    assert found.complete


@pytest.mark.parametrize("batch_size", [*slow(1, 83), 5, 1000])
def test_the_batch_size_does_not_matter(setting, batch_size):
    model, y = setting
    attacks = [BIM(0.3, iterations=3), FGSM(0.2)]
    expected = numbers(evaluate(model, X, y, attacks=attacks))
    got = evaluate(model, X, y, attacks=attacks, batch_size=batch_size)
    assert numbers(got) == expected


def test_a_wrapped_model_is_evaluated_like_a_plain_one(setting):
    model, y = setting
    expected = numbers(evaluate(model, X, y, attacks=BIM(0.3, iterations=3)))
    wrapped = AdversarialRegularization(model)
    for x, labels in (
        (X, y),
        ({"x": X, "label": y}, None),
        (tf.data.Dataset.from_tensor_slices({"x": X, "label": y}).batch(8), None),
    ):
        found = evaluate(wrapped, x, labels, attacks=BIM(0.3, iterations=3))
        assert numbers(found) == expected


def test_several_inputs_move_jointly():
    left, right = keras.Input((2,), name="left"), keras.Input((4,), name="right")
    joined = layers.Dense(3)(layers.Concatenate()([left, right]))
    model = keras.Model({"left": left, "right": right}, joined)
    flat = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    flat.set_weights(model.get_weights())
    _, y = make(flat)
    parts = {"left": X[:, :2], "right": X[:, 2:]}
    attack = BIM(0.7, norm="l2", iterations=3)
    assert numbers(evaluate(model, parts, y, attacks=attack)) == numbers(
        evaluate(flat, X, y, attacks=attack)
    )


def test_a_single_score_tells_two_classes_apart():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1, "sigmoid")])
    y = (model.predict(X, verbose=0) > 0.5).astype("int32")
    y[WRONG] = 1 - y[WRONG]
    attack = FGSM(0.2)
    report = evaluate(model, X, y, attacks=attack)
    after = (model.predict(attack(model, X, y), verbose=0) > 0.5) == y
    assert report.clean.correct == (~WRONG).sum()
    assert report.results[0].correct == (after[:, 0] & ~WRONG).sum()


# Who is attacked


def test_only_what_is_right_is_attacked_once_and_in_full_batches(setting):
    model, y = setting
    attack = Counting()
    evaluate(model, X, y, attacks=attack, batch_size=16)
    assert [len(x) for x, _ in attack.seen] == [16, 16, 16, 16, 7]
    np.testing.assert_array_equal(
        np.concatenate([x for x, _ in attack.seen]), X[~WRONG]
    )
    np.testing.assert_array_equal(
        np.concatenate([labels for _, labels in attack.seen]), y[~WRONG]
    )


def test_what_is_fooled_is_not_attacked_again(setting, monkeypatch):
    model, y = setting
    runs = []

    def counted(solver, problem, batch, seed, batch_size):
        result = run(solver, problem, batch, seed, batch_size)
        runs.append((num_rows(batch), int(result.fooled.sum())))
        return result

    monkeypatch.setattr("advreg.attacks.attack.run", counted)
    monkeypatch.setattr("advreg.evaluation.diagnostics.check", lambda *args: iter(()))
    attack = PGD(0.3, iterations=2, restarts=3, seed=0)
    evaluate(model, X, y, attacks=attack, batch_size=8)
    sizes, fooled = np.transpose(runs)
    standing = (~WRONG).sum()
    assert sum(sizes) < 3 * standing  # Those that fell sat out the other solvers.
    assert (sizes < 8).sum() <= 3  # One batch that is not full for each round.
    report = evaluate(model, X, y, attacks=attack, batch_size=8)
    assert report.results[0].correct == standing - fooled.sum()


def test_nothing_right_is_a_report_too(setting):
    model, y = setting
    report = evaluate(model, X[WRONG], y[WRONG], attacks=[FGSM(0.1), Counting()])
    assert {correct for _, _, correct, _ in numbers(report)} == {0}
    assert report.examples == WRONG.sum()
    assert "0.00 %" in str(report)


# Ctrl-C


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_an_interrupted_report_is_right_for_what_was_decided(setting, batches):
    model, y = setting
    report = evaluate(
        model, X, y, attacks=[BIM(0.3, iterations=3), Counting(batches)], batch_size=8
    )
    # All before the first example of the batch that was interrupted.
    examples = np.flatnonzero(~WRONG)[8 * batches]
    assert not report.complete
    assert report.examples == examples
    part = evaluate(
        model,
        X[:examples],
        y[:examples],
        attacks=[BIM(0.3, iterations=3), Counting()],
        batch_size=8,
    )
    assert numbers(report) == numbers(part)
    assert "interrupted" in str(report)
    assert report.checks[-1].name == INTERRUPTED
    assert RobustnessReport.from_json(report.to_json()) == report


def test_an_interruption_does_not_prefer_what_falls_early(setting):
    """Robust examples wait for later solvers: those after them do not count."""
    model, y = setting

    class Interrupting(PGD):
        def solvers(self, problem):
            before = super().solvers(problem)

            def advance(*args):
                raise KeyboardInterrupt

            last = type("Last", (type(before[0]),), {"init": advance})
            return [*before, last(before[0].steps, before[0].loss)]

    attack = Interrupting(0.3, iterations=3, seed=0)
    report = evaluate(model, X, y, attacks=attack, batch_size=8)
    first = np.argmax(stands(model, PGD(0.3, iterations=3, seed=0), y))
    assert report.examples <= first + 8
    assert not report.complete


@pytest.fixture
def ctrl_c():
    """Ctrl-C is heard, which a process that a shell started with `&` ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_data_comes(setting, monkeypatch):
    model, y = setting
    attacked, see = [], EvaluationRun._evaluate_batch
    monkeypatch.setattr(
        EvaluationRun,
        "_evaluate_batch",
        lambda *args: (attacked.append(0), see(*args))[1],
    )
    main, deadline = threading.main_thread().ident, time.monotonic() + 60

    def waiting():
        """Whether the main thread has used up two batches, and waits for the third.

        In the middle of its work Ctrl-C can meet a destructor, in which Python drops
        what is raised, or one of the places where TensorFlow catches whatever comes.
        """
        function = sys._current_frames()[main].f_code.co_name
        return len(attacked) == 2 and function == "iterator_get_next"

    class Slow(Sequence):
        def __getitem__(self, index):
            if index == 2:
                while not waiting():
                    assert time.monotonic() < deadline, "It never waited."
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    report = evaluate(model, Slow(y), attacks=FGSM(0.3), batch_size=1)
    assert not report.complete
    part = evaluate(model, X[:60], y[:60], attacks=FGSM(0.3))
    assert numbers(report) == numbers(part)


def test_before_anything_is_decided_there_is_no_report(setting):
    model, y = setting
    with pytest.raises(KeyboardInterrupt, match="there is no report") as raised:
        evaluate(model, X, y, attacks=Counting(0))
    # So that the traceback is short, from the call to the message.
    assert raised.value.__suppress_context__
    assert len(raised.traceback) < 5


def test_interrupted_checks_leave_all_results(setting, monkeypatch):
    model, y = setting
    expected = evaluate(model, X, y, attacks=FGSM(0.3))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("advreg.evaluation.diagnostics._more_effort", interrupt)
    report = evaluate(model, X, y, attacks=FGSM(0.3))
    assert report.complete
    assert numbers(report) == numbers(expected)
    names = [check.name for check in report.checks]
    assert names == [
        "left_ball",
        "left_range",
        "nan_in_data",
        "nan_outputs",
        "compiled_differs",
        "hidden_logits",
        "standing_integers",
        "code_columns",
        "bypassed_methods",
        "tiny_radius",
        "zero_gradients",
        "single_step_beats_iterative",
        "black_box_beats_white_box",
        INTERRUPTED,
    ]
    assert "interrupted before the others" in str(report)


# What stays as it is


def test_nothing_of_the_model_nor_of_random_state_changes():
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.GaussianNoise(0.1),
            layers.Dense(3),
        ]
    )
    model = AdversarialRegularization(base)
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    _, y = make(base)
    model.fit(X, y, verbose=0)

    def state():
        config = keras.saving.serialize_keras_object(model.get_compile_config())
        return [
            repr(config),
            random.getstate(),
            *np.random.get_state()[1:],
            keras.src.backend.common.global_state.get_global_attribute(
                "global_seed_generator"
            ),
            *(variable.numpy() for variable in model.variables),
            *(variable.numpy() for variable in model.optimizer.variables),
            *(variable.numpy() for variable in model.metrics_variables),
            *(variable.numpy() for variable in model.non_trainable_variables),
        ]

    before = state()
    attacks = [
        PGD(0.2, iterations=3, restarts=2, seed=1),
        APGD(0.2, iterations=3, seed=1),
        RandomNoise(0.2, seed=1),
    ]
    report = evaluate(model, X, y, attacks=attacks)
    for one, other in zip(before, state(), strict=True):
        np.testing.assert_equal(one, other)
    assert numbers(evaluate(model, X, y, attacks=attacks)) == numbers(report)


def test_a_second_evaluation_compiles_nothing(setting, monkeypatch):
    model, y = setting
    attacks = [PGD(0.2, iterations=3, seed=0), AutoAttack(0.2, iterations=4, queries=5)]
    evaluate(model, X, y, attacks=attacks)
    compiled = []
    function = tf.function

    def counting(*args, **kwargs):
        compiled.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(tf, "function", counting)
    # Other radii, other data of another length: nothing of these is compiled in.
    evaluate(model, X[:50], y[:50], attacks=attacks, epsilons=[0.1, 0.3], batch_size=7)
    assert not compiled


def test_an_eager_model_is_evaluated_eagerly(setting):
    model, y = setting
    eager = keras.models.clone_model(model)
    eager.set_weights(model.get_weights())
    eager.compile(loss=cross_entropy(), run_eagerly=True)
    attack = BIM(0.3, iterations=2)
    assert numbers(evaluate(eager, X, y, attacks=attack)) == numbers(
        evaluate(model, X, y, attacks=attack)
    )


# What is said meanwhile


def test_the_progress_bar_shows_accuracies_so_far(setting, capsys):
    model, y = setting
    report = evaluate(model, X, y, attacks=FGSM(0.3), verbose=2)
    shown = capsys.readouterr().out
    assert f"clean: {report.clean_accuracy:.4f}" in shown
    assert "FGSM L∞ 0.3: 0." in shown
    evaluate(model, X, y, attacks=FGSM(0.3), verbose=0)
    assert not capsys.readouterr().out


# Bad input


TWO = keras.Sequential([keras.Input((6, 1)), layers.Conv1D(2, 1)])


def compiled(loss):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.compile(loss=loss)
    return model


BAD = {
    "attack class": ({"attacks": FGSM}, TypeError, "`attacks` must be attacks"),
    "attack name": ({"attacks": "PGD"}, TypeError, "`attacks` must be attacks"),
    "attack of nothing": ({"attacks": None}, TypeError, "`attacks` must be attacks"),
    "no attack": ({"attacks": []}, ValueError, "`attacks` must name one"),
    "list of names": ({"attacks": [FGSM(0.1), "x"]}, TypeError, "`attacks` must be"),
    "targeted": (
        {"attacks": PGD(0.1, targeted=True)},
        ValueError,
        "`attacks` must n",
    ),
    "no radii": ({"epsilons": []}, ValueError, "`epsilons` must hold one"),
    "negative radius": ({"epsilons": [0.1, -1]}, ValueError, "`epsilons` must be fin"),
    "radius of NaN": ({"epsilons": [math.nan]}, ValueError, "`epsilons` must be fin"),
    "radii of text": ({"epsilons": "0.1"}, TypeError, "`epsilons` must be a number"),
    "text in radii": ({"epsilons": ["0.1"]}, TypeError, "`epsilons` must be a number"),
    "bool as radius": ({"epsilons": [True]}, TypeError, "`epsilons` must be a number"),
    "radii of an object": (
        {"epsilons": object()},
        TypeError,
        "`epsilons` must be a s",
    ),
    "radius beyond the range": (
        {
            "attacks": FGSM(0.1, clip_value_min=-9.0, clip_value_max=9.0),
            "epsilons": [19],
        },
        ValueError,
        "`epsilon` must not be larger than the range",
    ),
    "L2 radius beyond the range": (
        {"attacks": FGSM(99.0, norm=2, clip_value_min=-9.0, clip_value_max=9.0)},
        ValueError,
        "`epsilon` must not be larger than the clip range",
    ),
    "data outside the range": (
        {"attacks": FGSM(0.1, clip_value_min=0.0, clip_value_max=1.0)},
        ValueError,
        r"`x` must lie in the clip range.*Received: x from -\d.* to \d",
    ),
    "no labels": ({"y": None}, ValueError, "Labels are missing: pass them as `y`"),
    "labels of another length": ({"y": np.zeros(82)}, ValueError, "cardinality"),
    "label too large": (
        {"y": np.full(83, 3)},
        ValueError,
        "`y` must hold cl",
    ),
    "label below 0": ({"y": np.full(83, -1)}, ValueError, "`y` must hold cl"),
    "label of a half": ({"y": np.full(83, 0.5)}, ValueError, "`y` must hold cl"),
    "labels of NaN": ({"y": np.full(83, np.nan)}, ValueError, "`y` must hold cl"),
    "one-hot of four": (
        {"y": np.eye(4)[[0] * 83]},
        ValueError,
        "`y` must hold cl",
    ),
    "no model": ({"model": "net"}, TypeError, "`model` must be a Keras 3 model"),
    "a function as model": ({"model": np.argmax}, TypeError, "`model` must be a Keras"),
    "regression": ({"model": compiled("mse")}, ValueError, "`model` must be a class"),
    "regression by class": (
        {"model": compiled(keras.losses.MeanAbsoluteError())},
        ValueError,
        "`model` must be a classifier",
    ),
    "segmentation": (
        {"model": TWO, "x": X[:, :, None]},
        ValueError,
        "`model` must give cl",
    ),
    "empty": ({"x": X[:0], "y": np.zeros(0)}, ValueError, "[Ee]mpty|`x` must hold"),
    "no batch": ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    "half a batch": ({"batch_size": 1.5}, TypeError, "`batch_size` must be an integer"),
    "verbose text": ({"verbose": "yes"}, ValueError, "`verbose` must be 'auto', 0"),
    "verbose 3": ({"verbose": 3}, ValueError, "`verbose` must be 'auto', 0, 1 or 2"),
    "from_logits": ({"from_logits": "yes"}, TypeError, "`from_logits` must be a bool"),
    "probabilities": ({"from_logits": False}, ValueError, "`from_logits=False` says"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(setting, case):
    changes, error, message = BAD[case]
    model, y = setting
    arguments = {"model": model, "x": X, "y": y, "attacks": FGSM(0.1), "verbose": 0}
    with pytest.raises(error, match=message) as info:
        evaluate_robustness(**{**arguments, **changes})
    if case != "labels of another length":  # Which are Keras's words.
        assert "Received: " in str(info.value)


def test_a_dataset_without_examples_is_named(setting):
    model, y = setting
    data = tf.data.Dataset.from_tensor_slices((X, y)).batch(8).take(0)
    with pytest.raises(ValueError, match=r"`x` must hold examples|[Ee]mpty"):
        evaluate(model, data, attacks=FGSM(0.1))


def test_features_and_labels_of_a_batch_must_be_as_many(setting):
    model, y = setting

    def data():
        yield X[:8], y[:7]

    with pytest.raises(ValueError, match=r"same number of examples.*: 8 and 7"):
        evaluate(model, data(), attacks=FGSM(0.1))


def test_an_error_inside_the_loop_surfaces_as_it_is(setting):
    model, y = setting

    class MineError(Exception):
        pass

    def attack(model, x, y):
        raise MineError("as it is")

    with pytest.raises(MineError, match=r"^as it is$"):
        evaluate(model, X, y, attacks=attack)


# Size


MEASURED = """
import keras, tensorflow as tf
from keras import layers
from advreg import evaluate_robustness
from advreg.attacks import RandomNoise

def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])

def draw(index):
    x = tf.random.stateless_uniform([64, 128, 128, 3], [0, index])
    return x, tf.zeros([64], tf.int32)

def report(batches):
    data = tf.data.Dataset.range(batches).map(draw)
    attack = RandomNoise(0.1, draws=1, seed=0)
    return evaluate_robustness(model, data, attacks=attack, batch_size=64, verbose=0)

pooling, flatten, dense = layers.AveragePooling2D(16), layers.Flatten(), layers.Dense(3)
model = keras.Sequential([keras.Input((128, 128, 3)), pooling, flatten, dense])
dense.bias.assign([9.0, 0.0, 0.0])  # All is right, and stays so.
report(20)
before = resident()
assert report({batches}).examples == {batches} * 64
print(resident() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data():
    batches = 2 * 2**30 // (64 * 128 * 128 * 3 * 4)
    # In a process of its own: one that has run other tests has holes in its memory.
    process = subprocess.run(
        [sys.executable, "-c", MEASURED.replace("{batches}", str(batches))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(process.stdout) < 200 * 2**20
