import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import X, Y, classifier, cross_entropy, rows, two_outputs
from helpers.slow import slow, slow_but
from sklearn.datasets import load_digits

import advreg
from advreg import nsl

DATA = {"feature": X, "label": Y}


def config(**kwargs):
    kwargs = {"adv_step_size": 0.1, "adv_grad_norm": "infinity", **kwargs}
    return nsl.configs.make_adv_reg_config(**kwargs)


def wrapped(base=None, loss=None, metrics=("acc",), **kwargs):
    model = nsl.keras.AdversarialRegularization(
        base or classifier(), adv_config=config(), **kwargs
    )
    metrics = list(metrics) if isinstance(metrics, tuple) else metrics
    model.compile("sgd", loss or cross_entropy(), metrics=metrics)
    return model


def test_positions_of_arguments():
    given = config()
    model = nsl.keras.AdversarialRegularization(
        classifier(), ["y"], "weight", given, True
    )
    assert isinstance(model, advreg.AdversarialRegularization)
    assert model.label_keys == ("y",)
    assert model.sample_weight_key == "weight"
    assert model.adv_config is given
    assert model.base_with_labels_in_features


def test_a_configuration_may_come_second():
    given = config()
    model = nsl.keras.AdversarialRegularization(classifier(), given)
    assert model.adv_config is given
    assert model.label_keys == ("label",)
    with pytest.raises(TypeError, match="`adv_config` must come once"):
        nsl.keras.AdversarialRegularization(classifier(), given, adv_config=given)
    with pytest.raises(TypeError, match="pass that as `adv_config="):
        nsl.keras.AdversarialRegularization(classifier(), ["label"], given)


def test_it_trains_as_advreg_s_own_does():
    base = classifier()
    base.build((None, 6))
    other = classifier()
    other.build((None, 6))
    other.set_weights(base.get_weights())
    model = wrapped(base)
    model.fit(DATA, epochs=3, batch_size=4, shuffle=False, verbose=0)
    plain = advreg.AdversarialRegularization(other, config())
    plain.compile("sgd", cross_entropy())
    plain.fit(X, Y, epochs=3, batch_size=4, shuffle=False, verbose=0)
    for one, two in zip(base.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


LOSSES = {
    "sparse_categorical_crossentropy": ("sparse_categorical", Y),
    "categorical_crossentropy": ("categorical", np.eye(3)[Y]),
    "binary_crossentropy": ("binary", np.eye(3)[Y]),
    "squared_hinge": ("binary", np.eye(3)[Y]),
    "mse": ("categorical", np.eye(3)[Y]),
}


@pytest.mark.parametrize(
    "loss",
    slow_but(LOSSES, "sparse_categorical_crossentropy", "squared_hinge"),
)
def test_logs_carry_the_names_of_nsl(loss):
    task, labels = LOSSES[loss]
    base = keras.Sequential([classifier(), keras.layers.Softmax()])
    model = wrapped(base, loss, ("accuracy", "ce"))
    data = {"feature": X, "label": labels}
    history = model.fit(data, validation_data=data, verbose=0).history
    name = keras.losses.get(loss).__name__
    entropy = f"{task}_crossentropy" + ("_2" if f"{task}_crossentropy" == name else "")
    logged = {"loss", name, f"{task}_accuracy", entropy}
    assert set(history) == (
        logged | {f"val_{key}" for key in logged} | {"scaled_adversarial_loss"}
    )
    results = dict(
        zip(model.metrics_names, model.evaluate(data, verbose=0), strict=True)
    )
    assert set(results) == logged
    predicted = base.predict(X, verbose=0)
    accuracy = {
        "sparse_categorical": lambda: np.mean(predicted.argmax(1) == Y),
        "categorical": lambda: np.mean(predicted.argmax(1) == Y),
        "binary": lambda: np.mean((predicted > 0.5) == (labels > 0.5)),
    }[task]()
    assert results[f"{task}_accuracy"] == pytest.approx(accuracy)
    assert results[name] == pytest.approx(results["loss"])


def test_lists_of_results_come_in_the_order_of_nsl():
    model = wrapped(metrics=("acc", "ce"))
    names = [
        "loss",
        "sparse_categorical_crossentropy",
        "sparse_categorical_accuracy",
        "sparse_categorical_crossentropy_2",
    ]
    for values, logs in (
        (model.train_on_batch(DATA), model.train_on_batch),
        (model.test_on_batch(DATA), model.test_on_batch),
        (model.evaluate(DATA, verbose=0), model.evaluate),
    ):
        assert model.metrics_names == names
        # What training adds comes last, so that names and values go together.
        assert len(values) - len(names) == (logs == model.train_on_batch)
    expected = model.evaluate(DATA, return_dict=True, verbose=0)
    assert model.evaluate(DATA, verbose=0) == [expected[name] for name in names]
    model.fit(DATA, verbose=0)
    assert model.metrics_names == names
    several = wrapped(two_outputs(), label_keys=["first", "second"])
    several.evaluate(TWO, verbose=0)
    assert several.metrics_names == [
        "loss",
        "sparse_categorical_crossentropy_first",
        "sparse_categorical_accuracy_first",
        "sparse_categorical_crossentropy_second",
        "sparse_categorical_accuracy_second",
        "labeled_loss",
    ]


def test_callbacks_know_the_sense_of_metrics_under_nsl_s_names(tmp_path):
    model = wrapped(two_outputs(), label_keys=["first", "second"])
    best = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras",
        monitor="val_sparse_categorical_accuracy_first",
        save_best_only=True,
    )
    model.fit(TWO, validation_data=TWO, epochs=2, verbose=0, callbacks=[best])
    assert best.best > 0


def test_metrics_of_one_s_own_keep_their_names():
    error = keras.metrics.MeanAbsoluteError(name="error")

    def spread(y_true, y_pred):
        return keras.ops.abs(y_pred)

    data = {"feature": X, "label": rows(12, 3)}
    model = wrapped(loss="mse", metrics=[error, spread, "mse"])
    history = model.fit(data, verbose=0).history
    assert {"error", "spread", "mean_squared_error_2"} < set(history)
    assert history["mean_squared_error_2"] == pytest.approx(
        history["mean_squared_error"]
    )
    model.evaluate(data, verbose=0)
    assert error.result() > 0  # The very object that was passed counts.


TWO = {"x": X, "first": Y, "second": Y % 2}


@pytest.mark.parametrize(
    "metrics",
    [
        ["acc"],
        *slow([["acc"], ["acc"]]),
        {"a": ["acc"], "b": "acc"},
        *slow([keras.metrics.SparseCategoricalAccuracy()]),
    ],
    ids=["for all", "for each", "by name", "object"],
)
@pytest.mark.parametrize("loss", [*slow("one", "list"), "dict"])
def test_names_with_several_outputs_end_in_the_label_s(metrics, loss):
    losses = {
        "one": cross_entropy(),
        "list": [cross_entropy(), cross_entropy()],
        "dict": {"a": cross_entropy(), "b": cross_entropy()},
    }[loss]
    model = wrapped(two_outputs(), losses, metrics, label_keys=["first", "second"])
    logs = model.fit(TWO, verbose=0).history
    names = {
        f"sparse_categorical_{what}_{label}"
        for what in ("crossentropy", "accuracy")
        for label in ("first", "second")
    }
    assert set(logs) == {"loss", "labeled_loss", "scaled_adversarial_loss"} | names
    values = model.evaluate(TWO, verbose=0)
    results = dict(zip(model.metrics_names, values, strict=True))
    assert names < set(results)
    predicted = model.base_model.predict(X, verbose=0)
    for output, label in zip(predicted, ("first", "second"), strict=True):
        accuracy = np.mean(output.argmax(1) == TWO[label])
        assert results[f"sparse_categorical_accuracy_{label}"] == pytest.approx(
            accuracy
        )


@pytest.mark.parametrize(
    ("loss", "metrics", "message"),
    [
        (["mse"], None, r"`loss` must have an entry for each .*'first', 'second'"),
        ("mse", [["mae"]], "`metrics` must have an entry for each"),
        ("mse", {"c": "mae"}, r"`metrics` must have names of outputs.*\['c'\]"),
    ],
)
def test_what_does_not_fit_the_outputs_is_refused(loss, metrics, message):
    with pytest.raises(ValueError, match=message):
        wrapped(two_outputs(), loss, metrics, label_keys=["first", "second"])


def test_the_base_is_compiled_too():
    metric = keras.metrics.SparseCategoricalAccuracy(name="hits")
    model = wrapped(metrics=["acc", metric])
    model.fit(DATA, verbose=0)
    base = model.base_model
    assert base.optimizer is model.optimizer
    names = ["loss", "acc", "hits"]
    results = dict(zip(names, base.evaluate(X, Y, verbose=0), strict=True))
    assert list(base.metrics_names) == names
    evaluated = dict(
        zip(model.metrics_names, model.evaluate(DATA, verbose=0), strict=True)
    )
    assert results["acc"] == evaluated["sparse_categorical_accuracy"]
    assert results["hits"] == evaluated["hits"]
    base.fit(X, Y, verbose=0)


def test_metrics_names_of_any_model_name_what_evaluate_returns():
    model = two_outputs()
    spread = keras.metrics.MeanMetricWrapper(lambda y, p: keras.ops.abs(p), "spread")
    model.compile("sgd", [cross_entropy()] * 2, metrics=[["acc"], ["acc", spread]])
    assert model.metrics_names == ["loss", "compile_metrics"]  # Before it has run.
    labels = [Y, Y % 2]
    values = model.evaluate(X, labels, verbose=0)
    expected = model.evaluate(X, labels, return_dict=True, verbose=0)
    assert dict(zip(model.metrics_names, values, strict=True)) == expected
    alone = classifier()
    alone.compile("sgd", cross_entropy())
    alone.evaluate(X, Y, verbose=0)
    assert alone.metrics_names == ["loss"]


def test_perturb_on_batch_returns_arrays_and_tensors():
    model = wrapped(sample_weight_key="weight")
    batch = {**DATA, "weight": np.ones(12, "float32")}
    perturbed = model.perturb_on_batch(batch)
    assert list(perturbed) == list(batch)
    assert isinstance(perturbed["feature"], np.ndarray)
    for key in ("label", "weight"):
        assert isinstance(perturbed[key], tf.Tensor)
        np.testing.assert_array_equal(perturbed[key], batch[key])
    np.testing.assert_allclose(np.abs(perturbed["feature"] - X).max(), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(model.perturb_on_batch(X, Y), perturbed["feature"])


def test_perturb_on_batch_understands_none():
    model = wrapped()
    model.adv_config.adv_neighbor_config.pgd_epsilon = 0.02
    same = model.perturb_on_batch(DATA, adv_step_size=None, adv_grad_norm=None)
    assert np.abs(same["feature"] - X).max() == pytest.approx(0.02, rel=1e-4)
    free = model.perturb_on_batch(DATA, pgd_epsilon=None)
    assert np.abs(free["feature"] - X).max() == pytest.approx(0.1, rel=1e-4)


def test_ragged_features_come_back_as_arrays():
    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs["x"])

    model = wrapped(Ragged())
    batch = {"x": X, "words": tf.ragged.constant([[1]] * 6 + [[2, 3]] * 6), "label": Y}
    perturbed = model.perturb_on_batch(batch)
    assert isinstance(perturbed["words"], np.ndarray)
    assert [list(row) for row in perturbed["words"][5:7]] == [[1], [2, 3]]


def test_what_is_assigned_takes_effect_with_the_next_fit():
    model = wrapped()
    model.compile(keras.optimizers.SGD(0.0), cross_entropy())

    def scaled():
        history = model.fit(DATA, batch_size=12, verbose=0).history
        return history["scaled_adversarial_loss"][0]

    before = scaled()
    function = model.train_function
    assert scaled() == before
    assert model.train_function is function  # Nothing changed, nothing is traced anew.
    model.adv_config.multiplier = 0.4
    assert scaled() == pytest.approx(2 * before, rel=1e-5)
    model.adv_config.adv_neighbor_config.adv_step_size = 1.0
    assert scaled() > 2.1 * before


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_what_advreg_adds_can_be_assigned_too(run_eagerly):
    model = wrapped()
    metrics = ["accuracy"]
    model.compile("sgd", cross_entropy(), metrics, run_eagerly=run_eagerly)
    model.adv_config.clean_weight = 0.0
    accuracy = "sparse_categorical_accuracy"
    assert set(model.fit(DATA, verbose=0).history) == {
        "loss",
        "scaled_adversarial_loss",
        f"adversarial_{accuracy}",
    }
    model.adv_config.objective = "logit_pairing"
    assert set(model.fit(DATA, verbose=0).history) == {
        "loss",
        "scaled_adversarial_loss",
        "sparse_categorical_crossentropy",
        accuracy,
    }
    with pytest.raises(ValueError, match="`random_init` must be set for Trades"):
        model.adv_config.objective = "trades"


def test_save_keeps_the_base_alone(tmp_path):
    model = wrapped()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "last.keras")
    model.fit(DATA, verbose=0, callbacks=[checkpoint])
    model.save(tmp_path / "saved.keras")
    for name in ("last", "saved"):
        loaded = keras.models.load_model(tmp_path / f"{name}.keras")
        assert type(loaded) is keras.Sequential
        np.testing.assert_array_equal(
            loaded.predict(X, verbose=0), model.predict(DATA, verbose=0)
        )
        assert int(loaded.optimizer.iterations) == 1


def test_weights_and_optimizer_are_restored(tmp_path):
    model = wrapped()
    model.fit(DATA, verbose=0)
    model.save_weights(tmp_path / "all.weights.h5")
    again = wrapped()
    again.fit(DATA, verbose=0)
    again.load_weights(tmp_path / "all.weights.h5")
    for one, two in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_wrapper_itself_can_be_saved_and_loaded(tmp_path):
    model = wrapped()
    model.fit(DATA, verbose=0)
    keras.saving.save_model(model, tmp_path / "wrapper.keras")
    config = keras.saving.serialize_keras_object(model)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is nsl.keras.AdversarialRegularization
    assert again.adv_config == model.adv_config


def test_adversarial_loss_always_passes_weights():
    base = classifier()
    base.build((None, 6))
    seen = []

    def loss_fn(labels, predictions, sample_weight):
        seen.append(sample_weight)
        return cross_entropy()(labels, predictions, sample_weight)

    x = tf.constant(X)
    three = nsl.configs.make_adv_reg_config(pgd_iterations=3)
    loss = nsl.keras.adversarial_loss(x, Y, base, loss_fn, adv_config=three)
    assert len(seen) == 4
    assert all(weight is None for weight in seen)
    expected = advreg.adversarial_loss(x, Y, base, cross_entropy(), adv_config=three)
    assert float(loss) == float(expected)
    weights = tf.constant(np.arange(12.0, dtype="float32"))
    loss = nsl.keras.adversarial_loss(x, Y, base, loss_fn, weights, three)
    assert all(weight is weights for weight in seen[4:])
    expected = advreg.adversarial_loss(x, Y, base, cross_entropy(), weights, three)
    assert float(loss) == float(expected)


@pytest.mark.slow
def test_a_program_of_nsl_s_days_on_digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train = tf.data.Dataset.from_tensor_slices({"pixels": x[:1400], "label": y[:1400]})
    test = tf.data.Dataset.from_tensor_slices({"pixels": x[1400:], "label": y[1400:]})
    train, test = train.shuffle(1400, seed=0).batch(32), test.batch(32)

    def build():
        inputs = tf.keras.Input((64,), name="pixels")
        hidden = tf.keras.layers.Dense(64, "relu")(inputs)
        return tf.keras.Model(inputs, tf.keras.layers.Dense(10)(hidden))

    def compile_(model):
        model.compile("adam", cross_entropy(), metrics=["acc"])
        return model

    plain = compile_(build())
    plain.fit(x[:1400], y[:1400], epochs=20, verbose=0)
    adv_config = config(multiplier=1.0, adv_step_size=0.1)
    robust = compile_(
        nsl.keras.AdversarialRegularization(build(), ["label"], adv_config=adv_config)
    )
    robust.fit(train, epochs=20, shuffle=False, verbose=0)
    reference = compile_(
        nsl.keras.AdversarialRegularization(plain, ["label"], adv_config=adv_config)
    )
    metrics = [tf.keras.metrics.SparseCategoricalAccuracy() for _ in range(2)]
    for batch in test:
        perturbed = reference.perturb_on_batch(batch)
        labels = perturbed.pop("label")
        for metric, model in zip(metrics, (plain, robust.base_model), strict=True):
            metric(labels, model(perturbed["pixels"]))
    attacked = [float(metric.result()) for metric in metrics]
    assert attacked[0] + 0.2 < attacked[1]
    results = dict(
        zip(robust.metrics_names, robust.evaluate(test, verbose=0), strict=True)
    )
    clean = plain.evaluate(x[1400:], y[1400:], return_dict=True, verbose=0)["acc"]
    assert clean > 0.85
    assert results["sparse_categorical_accuracy"] > clean - 0.05
