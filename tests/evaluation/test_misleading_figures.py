"""Where a figure would mislead: the right value, a warning, or an error."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, cross_entropy, labelled, rows
from helpers.slow import slow, slow_but
from keras import layers, ops

from advreg import AdversarialRegularization, evaluate_robustness
from advreg.attacks import (
    APGD,
    ART,
    FGSM,
    PGD,
    AutoAttack,
    RandomNoise,
    Square,
    Transfer,
)
from advreg.callbacks import RobustAccuracy
from advreg.evaluation import data_checks
from advreg.evaluation import diagnostics as diagnostics
from advreg.evaluation.report import RobustnessReport

X, Y = labelled(60)
UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}


def evaluate(model, x=X, y=Y, attacks=None, **kwargs):
    attacks = FGSM(0.1) if attacks is None else attacks
    return evaluate_robustness(model, x, y, attacks=attacks, verbose=0, **kwargs)


def message(report, name):
    found = [check for check in report.checks if check.name == name]
    assert [check.passed for check in found] == [False]
    return found[0].message


def passes(report, name):
    return all(check.passed for check in report.checks if check.name == name)


# Outputs and data that are no numbers


class Root(layers.Layer):
    def call(self, x):
        return ops.sqrt(x)


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("classes", [*slow(1), 3])
def test_outputs_that_are_nan_are_no_right_answer(activation, classes):
    activation = "sigmoid" if activation and classes == 1 else activation
    model = keras.Sequential([keras.Input((6,)), Root(), layers.Dense(classes)])
    model.add(layers.Activation(activation or "linear"))
    model.compile("sgd", "binary_crossentropy" if classes == 1 else cross_entropy())
    x = np.abs(X) + 0.001
    # All are of class 0, which a NaN was once taken for.
    bias = np.float32([50, 0, 0] if classes > 1 else [-50])
    model.layers[1].set_weights([model.layers[1].get_weights()[0], bias])
    y = np.zeros(len(x), int)
    noise = RandomNoise(5.0, draws=1, seed=0)
    report = evaluate(model, x, y, [noise])
    moved = noise(model, x, y)
    lost = np.isnan(model.predict(moved, verbose=0)).any(1)
    assert lost.mean() > 0.9
    assert report.clean_accuracy == 1.0
    assert report.results[0].correct <= (~lost).sum()
    text = message(report, "nan_outputs")
    assert f"{lost.sum():,} under RandomNoise" in text
    assert "clip_value_min" in text
    inside = evaluate(model, x, y, [RandomNoise(5.0, seed=0, clip_value_min=0.0)])
    assert passes(inside, "nan_outputs")


def test_clean_outputs_that_are_infinite_are_counted():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    x = X.copy()
    x[:4] = 3e38
    model.layers[-1].set_weights([np.float32(10 * np.eye(6)[:, :3]), np.zeros(3)])
    y = np.argmax(np.nan_to_num(model.predict(x, verbose=0)), axis=1)
    report = evaluate(model, x, y, [FGSM(0.0)])
    assert report.clean.correct == 56
    assert "4 of 60 examples as they are" in message(report, "nan_outputs")


def test_a_logarithm_of_zero_beside_a_number_is_an_answer():
    model = keras.Sequential([keras.Input((3,)), layers.Lambda(ops.log)])
    x = np.eye(3, dtype="float32")
    report = evaluate(model, x, np.arange(3), [RandomNoise(0.0)])
    assert report.clean_accuracy == 1.0


def test_nan_in_the_data_is_counted_and_named():
    inputs = {name: keras.Input((3,), name=name) for name in ("a", "b")}
    hidden = layers.Concatenate()(list(inputs.values()))
    model = keras.Model(inputs, layers.Dense(3)(hidden))
    x = {"a": X[:, :3].copy(), "b": X[:, 3:].copy()}
    assert passes(evaluate(model, x), "nan_in_data")
    x["b"][[1, 5, 40], 0] = np.nan, np.inf, np.nan
    report = evaluate(model, x)
    assert "b in 3 of 60 examples" in message(report, "nan_in_data")


def test_infinite_gradients_move_black_pixels():
    """Behind a root the slope at 0 is infinite, and its sign is known."""
    dense = layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((4,)), Root(), dense])
    dense.set_weights([np.float32([[1, -1], [1, -1], [-1, 1], [1, -1]])])
    x = np.float32([[0, 0, 0, 0.25]])
    found = FGSM(0.1, **UNIT)(model, x, np.array([0]))
    np.testing.assert_allclose(found, [[0, 0, 0.1, 0.15]], atol=1e-6)


# Models that are no classifiers of one label


def dense_outputs(units, loss, activation=None):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(units, activation)])
    model.compile("sgd", loss)
    return model


ONE_EACH = np.eye(3)[Y]
REFUSED = {
    "several labels": (
        dense_outputs(3, "binary_crossentropy", "sigmoid"),
        np.maximum(ONE_EACH, np.eye(3)[(Y + 1) % 3]),
        "multi-label classifier",
    ),
    "several labels, one in each row": (
        dense_outputs(3, "binary_crossentropy", "sigmoid"),
        ONE_EACH,
        "multi-label classifier",
    ),
    "one column of several": (
        dense_outputs(3, "binary_crossentropy", "sigmoid"),
        ONE_EACH[:, :1],
        "multi-label classifier",
    ),
    "an autoencoder": (
        dense_outputs(6, "binary_crossentropy", "sigmoid"),
        np.abs(X),
        "autoencoder",
    ),
    "values, a loss of one's own": (
        dense_outputs(6, lambda y, p: ops.mean(ops.abs(y - p) ** 1.5, -1)),
        X,
        "sums to 1",
    ),
    "several labels, not compiled": (
        keras.Sequential([keras.Input((6,)), layers.Dense(3)]),
        np.maximum(ONE_EACH, np.eye(3)[(Y + 1) % 3]),
        "sums to 1",
    ),
    "regression": (dense_outputs(1, "mse"), X[:, :1], "must be a classifier"),
}
ALL = [
    FGSM(0.1),
    PGD(0.1, iterations=2),
    APGD(0.1, iterations=2),
    Square(0.1, queries=2),
]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_classifier_is_refused_by_name(case):
    model, y, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        evaluate(model, X, y)
    if case != "regression":
        for attack in ALL:
            with pytest.raises(ValueError, match=words):
                attack(model, X, y)


@pytest.mark.parametrize(
    "case",
    slow_but(
        [c for c in REFUSED if "not compiled" not in c], "several labels", "regression"
    ),
)
def test_their_loss_can_be_attacked(case):
    model, y, _ = REFUSED[case]
    y = np.broadcast_to(y, (60, model.output_shape[1])).astype("float32")
    moved = PGD(0.1, iterations=3, loss="model", seed=0)(model, X, y)
    assert (np.abs(moved - X).max(1) > 0.09).all()
    before, after = (model.evaluate(x, y, verbose=0) for x in (X, moved))
    assert after > before


def test_segmentation_is_named_and_its_loss_can_be_attacked():
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(3, 3, padding="same")]
    )
    model.compile("sgd", cross_entropy())
    x = rows(10, 4, 4, 2)
    y = np.random.default_rng(0).integers(0, 3, (10, 4, 4))
    with pytest.raises(ValueError, match="segmentation and tagging"):
        evaluate(model, x, y)
    moved = PGD(0.1, iterations=3, loss="model", seed=0)(model, x, y)
    assert model.evaluate(moved, y, verbose=0) > model.evaluate(x, y, verbose=0)
    assert (np.abs(moved - x).reshape(10, -1).max(1) > 0.09).all()


def test_a_label_that_is_no_class_is_an_error_for_a_loss_of_classes_too():
    model = classifier()
    model.compile("sgd", cross_entropy())
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        PGD(0.1, loss="model")(model, X, Y + 1)


def test_one_vs_rest_takes_class_numbers():
    model = dense_outputs(3, "binary_crossentropy", "sigmoid")
    report = evaluate(model, X, Y)
    assert report.clean.correct == (model.predict(X, verbose=0).argmax(1) == Y).sum()


# Units


@pytest.mark.parametrize(
    ("epsilon", "limits", "warns"),
    [
        (8 / 255, {"clip_value_min": 0.0, "clip_value_max": 255.0}, True),
        (8.0, {"clip_value_min": 0.0, "clip_value_max": 255.0}, False),
        (8 / 255, {}, True),
        (8.0, {}, False),
        (0.0, {}, False),
    ],
)
def test_a_radius_of_another_unit_draws_a_warning(epsilon, limits, warns):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Rescaling(1 / 255), layers.Dense(3)]
    )
    x = np.random.default_rng(0).uniform(0, 255, (60, 6)).astype("float32")
    report = evaluate(model, x, Y, [FGSM(epsilon, **limits)])
    if not warns:
        assert passes(report, "tiny_radius")
        return
    text = message(report, "tiny_radius")
    assert "0.03137" in text
    wanted = (
        "the clip range, from 0 to 255" if limits else "the range of the data, from"
    )
    assert wanted in text


# Models that are not what they seem


def test_a_model_that_does_something_else_when_it_is_compiled():
    class Two(layers.Layer):
        def call(self, x):
            return x if tf.executing_eagerly() else -x

    model = keras.Sequential([keras.Input((6,)), Two(), layers.Dense(3)])
    model(X)
    assert "directly" in message(evaluate(model), "compiled_differs")
    model.compile(run_eagerly=True)
    assert passes(evaluate(model), "compiled_differs")


@pytest.mark.parametrize(
    "policy", ["mixed_float16", *slow("float32", "mixed_bfloat16")]
)
def test_rounding_is_no_difference(policy):
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(64, "relu", dtype=policy),
            layers.Dense(3, dtype=policy),
        ]
    )
    assert passes(evaluate(base), "compiled_differs")


def test_methods_of_the_model_that_are_not_called_are_named():
    class Own(keras.Sequential):
        def predict_step(self, data):
            return -super().predict_step(data)

    model = Own([keras.Input((6,)), layers.Dense(3)])
    assert "`predict_step`" in message(evaluate(model), "bypassed_methods")
    assert passes(evaluate(AdversarialRegularization(classifier())), "bypassed_methods")


# Reports that are kept


@pytest.mark.parametrize(
    "check",
    [
        "_zero_gradients",
        *slow("_single_step", "_without_gradient", "_more_effort", "_huge_radius"),
    ],
)
def test_a_check_that_fails_keeps_the_report(check, monkeypatch):
    def broken(*args):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory\nfor the check")

    whole = evaluate(classifier())
    monkeypatch.setattr(diagnostics, check, broken)
    report = evaluate(classifier())
    assert report.complete
    assert [c.name for c in report.checks] == [c.name for c in whole.checks]
    failed = [c for c in report.checks if c.message.startswith("Could not be made")]
    assert [c.passed for c in failed] == [None]
    assert (
        "Could not be made: ResourceExhaustedError: no memory for the check"
        in " ".join(str(report).split())
    )
    assert "no memory" in report._repr_html_()


def test_a_check_of_the_data_that_fails_keeps_the_report_too(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("no width")

    for name in ("_nan_in_data", "_hidden_logits", "_tiny_radius"):
        monkeypatch.setattr(data_checks, name, broken)
    report = evaluate(classifier())
    failed = [check.name for check in report.checks if check.passed is None]
    assert {"nan_in_data", "hidden_logits", "tiny_radius"} <= set(failed)
    assert "ZeroDivisionError: no width" in str(report)


@pytest.mark.slow
def test_zero_gradients_are_not_met_with_what_found_nothing():
    saturated = keras.Sequential(
        [keras.Input((6,)), layers.Dense(3), layers.Rescaling(1e5)]
    )
    y = saturated.predict(X, verbose=0).argmax(1)
    attacks = [FGSM(0.3), PGD(0.3, loss="margin", seed=0)]
    text = message(evaluate(saturated, X, y, attacks), "zero_gradients")
    assert "loss='margin'" not in text
    assert "Add AutoAttack" in text
    attacks.append(AutoAttack(0.3, iterations=5, queries=5))
    text = message(evaluate(saturated, X, y, attacks), "zero_gradients")
    assert "It finds no more than this report. Transfer" in text
    text = message(evaluate(saturated, X, y, FGSM(0.3)), "zero_gradients")
    assert "Attack with loss='margin'" in text


def test_json_has_what_a_machine_reads():
    report = evaluate(classifier(), attacks=[FGSM(0.3), PGD(0.3, seed=0)])
    data = json.loads(report.to_json())
    lines = [data["clean"], data["overall"], *data["results"], *data["worst_cases"]]
    for line in lines:
        assert line["accuracy"] == line["correct"] / line["examples"]
        low, high = line["interval"]
        assert low <= line["accuracy"] <= high
    assert data["features"] == [
        {"name": "the input", "dtype": "float32", "perturbed": True, "reason": ""}
    ]
    assert RobustnessReport.from_json(report.to_json()) == report


def test_reports_of_the_version_before_are_read():
    data = json.loads(evaluate(classifier()).to_json())
    data["version"] = 1
    del data["features"], data["notes"]
    for line in (data["clean"], data["overall"], *data["results"]):
        del line["draws"], line["accuracy"], line["interval"]
    del data["worst_cases"][:]
    report = RobustnessReport.from_json(json.dumps(data))
    assert report.features == ()
    assert report.clean.draws == 1


# Where attacks cannot be called


@pytest.mark.parametrize(
    "call",
    [
        FGSM(0.1),
        Square(0.1, queries=2),
        Transfer(FGSM(0.1), classifier()),
        lambda model, x, y: evaluate_robustness(model, x, y, attacks=FGSM(0.1)),
    ],
    ids=["FGSM", "Square", "Transfer", "evaluate_robustness"],
)
@pytest.mark.parametrize("where", ["Dataset.map", "tf.function"])
def test_attacks_say_that_they_cannot_run_in_a_graph(call, where):
    model = classifier()
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    use = data.map if where == "Dataset.map" else lambda f: tf.function(f)(X, Y)
    with pytest.raises(RuntimeError, match=r"inside a `tf.function`.*from_generator"):
        use(lambda x, y: call(model, x, y))


def test_the_checks_cost_little(monkeypatch):
    """At most a fifth of the evaluations of what they check, where that is slow."""
    monkeypatch.setattr(diagnostics, "_SECONDS", 0.0)
    counted = []
    run = diagnostics._Probes.run

    def counting(self, attack, places=None):
        counted.append(len(self.index) if places is None else len(places))
        return run(self, attack, places)

    monkeypatch.setattr(diagnostics._Probes, "run", counting)
    x, y = labelled(2000)
    model = classifier()
    y = model.predict(x, verbose=0).argmax(1)
    evaluate(model, x, y, PGD(1e-3, iterations=20, seed=0), batch_size=500)
    single, noise, effort, huge = counted
    cost = single * 2 + noise * 10 + effort * 41 + huge * 21
    assert cost <= 0.2 * 2000 * 21
    assert single > 32


# Several scales, and several meanings, in one input


def table(n=200):
    """Three columns of categories, and two of quantities, in one matrix."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 9, (n, 3)).astype("float32")
    return np.concatenate([codes, rng.normal(size=(n, 2)).astype("float32")], axis=1)


class Table(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.dense = layers.Embedding(10, 2), layers.Dense(3)

    def call(self, inputs):
        codes = ops.reshape(self.embedding(inputs[:, :3]), (-1, 6))
        return self.dense(ops.concatenate([codes, inputs[:, 3:]], axis=1))


def test_columns_of_codes_in_a_matrix_are_named():
    x, model = table(), Table()
    y = np.argmax(model(x), axis=1)
    text = message(evaluate(model, x, y, FGSM(0.1)), "code_columns")
    assert "the input[0], the input[1], the input[2]." in text
    assert "feature_mask" in text
    x[:, :3] += 0.25  # Which are no codes any more, as far as anybody can tell.
    assert passes(evaluate(model, x, y, FGSM(0.1)), "code_columns")


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"clip_value_min": 0.0, "clip_value_max": np.float32([1, 1, 1, 1, 1, 1e5])},
        {"feature_mask": np.float32([1, 1, 1, 1, 1, 0])},
    ],
    ids=["no range", "ranges", "masked"],
)
def test_one_wide_value_among_others_makes_no_radius_tiny(limits):
    x = np.random.default_rng(0).uniform(size=(60, 6)).astype("float32")
    x[:, 5] *= 1e5
    model = keras.Sequential(
        [keras.Input((6,)), layers.Rescaling([1] * 5 + [1e-5]), layers.Dense(3)]
    )
    assert passes(evaluate(model, x, Y, FGSM(0.05, **limits)), "tiny_radius")
    small = FGSM(1e-4, **limits)
    assert "ε 0.0001 is less than a thousandth of" in message(
        evaluate(model, x, Y, small), "tiny_radius"
    )


def test_masks_of_subclassed_models_are_right_to_stand():
    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            mask = ops.cast(inputs["mask"], "float32")
            return self.dense(inputs["x"] * mask)

    mask = np.random.default_rng(0).integers(0, 2, X.shape)
    report = evaluate(Masked(), {"x": X, "mask": mask})
    assert passes(report, "standing_integers")
    assert [feature.perturbed for feature in report.features] == [False, True]


def test_a_first_batch_without_examples_is_passed_over():
    model = classifier()
    data = [(X[:0], Y[:0]), (X, Y)]
    signature = (tf.TensorSpec((None, 6)), tf.TensorSpec((None,), tf.int64))
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(data), output_signature=signature
    )
    report = evaluate(model, dataset, None)
    assert report.clean.correct == evaluate(model).clean.correct


def test_nan_in_a_row_is_no_difference_of_the_compiled_model():
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3, "softmax")]
    )
    x = X.copy()
    x[0] = np.nan
    assert passes(evaluate(model, x), "compiled_differs")


def test_python_that_draws_is_no_model_that_is_compiled():
    import random

    class Either(keras.Model):
        def __init__(self):
            super().__init__()
            self.heads = [layers.Dense(3), layers.Dense(3)]

        def call(self, inputs):
            outputs = [head(inputs) for head in self.heads]
            return random.choice(outputs)

    random.seed(0)
    found = [message_or_none(evaluate(Either())) for _ in range(3)]
    assert any(found)


def message_or_none(report):
    failed = [c for c in report.checks if c.name == "compiled_differs"]
    return None if failed[0].passed else failed[0].message


# The same rules at the other entry points


def test_robust_accuracy_is_of_the_model_as_it_is_now():
    model = classifier()
    model.compile(keras.optimizers.SGD(0.0), cross_entropy())
    y = np.argmax(model(X), axis=1)

    class Turn(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[-1].activation = ops.negative

    callbacks = [RobustAccuracy(FGSM(1e-6), (X, y)), Turn()]
    history = model.fit(X, y, epochs=2, verbose=0, callbacks=callbacks).history
    after = np.mean(np.argmax(model(X, training=False), axis=1) == y)
    assert history["val_robust_accuracy"] == [1.0, pytest.approx(after)]
    assert after < 0.5


def test_arts_attacks_say_that_they_cannot_run_in_a_graph():
    attack = ART("FastGradientMethod", eps=0.1)
    call = tf.function(lambda x, y: attack(classifier(), x, y))
    with pytest.raises(RuntimeError, match="`ART` returns NumPy arrays"):
        call(X, Y)


def test_vectors_of_bytes_that_nobody_declares_are_refused_without_contradiction():
    class Bytes(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(ops.cast(inputs, "float32") / 255)

    x = np.random.default_rng(0).integers(0, 256, (60, 6)).astype("uint8")
    with (
        pytest.warns(UserWarning, match="cast them to float32"),
        pytest.raises(ValueError, match=r"the input \(integers of type uint8\)"),
    ):
        FGSM(1.0)(Bytes(), x, Y)
