"""Keras's callbacks do with the wrapper what they do with a plain model.

With a multiplier of 0 the two train alike, bit for bit.
"""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import X, Y, classifier, cross_entropy, regularized, rows
from helpers.slow import slow

from advreg import make_adv_reg_config

EXTRA = {"labeled_loss", "scaled_adversarial_loss"}
# Labels of which nothing can be learnt: the validation loss soon rises.
VALIDATION = rows(12, 6, seed=2), np.arange(12) % 3


def plain(optimizer="sgd", **kwargs):
    model = classifier()
    model.compile(optimizer, cross_entropy(), metrics=["accuracy"], **kwargs)
    return model


def wrapped(optimizer="sgd", multiplier=0.0, **kwargs):
    return regularized(
        classifier(),
        make_adv_reg_config(multiplier, adv_step_size=0.1),
        optimizer=optimizer,
        metrics=["accuracy"],
        **kwargs,
    )


def fit(model, *callbacks, epochs=6, **kwargs):
    arguments = {"batch_size": 5, "validation_data": VALIDATION, "shuffle": False}
    return model.fit(
        X, Y, epochs=epochs, callbacks=list(callbacks), verbose=0, **arguments | kwargs
    ).history


def both(run):
    """What a function returns for the plain model and for the wrapper."""
    results = []
    for make in (plain, wrapped):
        keras.utils.set_random_seed(0)
        results.append(run(make))
    return results


def assert_equal(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


class Logs(keras.callbacks.Callback):
    """Keeps names and types of the logs of every call."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def keep(self, when, logs):
        types = {name: type(value) for name, value in logs.items()}
        self.seen.setdefault(when, []).append(types)

    def on_train_batch_end(self, batch, logs=None):
        self.keep("train_batch_end", logs)

    def on_test_batch_end(self, batch, logs=None):
        self.keep("test_batch_end", logs)

    def on_predict_batch_end(self, batch, logs=None):
        self.keep("predict_batch_end", logs)

    def on_epoch_end(self, epoch, logs=None):
        self.keep("epoch_end", logs)

    def on_train_end(self, logs=None):
        self.keep("train_end", logs)

    def on_test_end(self, logs=None):
        self.keep("test_end", logs)


@pytest.mark.parametrize(
    "mode", [*slow("eager"), "function", *slow("jit")], indirect=True
)
@pytest.mark.parametrize("steps", [*slow(1), 2])
def test_logs_are_those_of_a_plain_model_and_two_more(steps, mode):
    def run(make):
        model, logs = make(steps_per_execution=steps, **mode), Logs()
        fit(model, logs, epochs=2)
        model.predict(X, callbacks=[logs], verbose=0)
        return logs.seen

    expected, seen = both(run)
    for when in ("train_batch_end", "epoch_end", "train_end"):
        for types in expected[when]:
            types |= dict.fromkeys(EXTRA, float)
    assert seen == expected
    assert len(seen) == 6


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True])
def test_early_stopping(restore):
    def run(make):
        model = make(keras.optimizers.SGD(0.5))
        stopping = keras.callbacks.EarlyStopping(
            monitor="val_loss", patience=3, restore_best_weights=restore
        )
        history = fit(model, stopping, epochs=40)
        last = model.evaluate(*VALIDATION, verbose=0)[0]
        best = min(history["val_loss"])
        assert (last == pytest.approx(best, rel=1e-6)) == restore
        return [stopping.stopped_epoch, stopping.best_epoch, *model.get_weights()]

    expected, got = both(run)
    assert_equal(got, expected)
    assert 3 <= got[0] < 39


def test_early_stopping_on_the_adversarial_loss():
    model = wrapped(keras.optimizers.SGD(0.0), multiplier=0.5)
    stopping = keras.callbacks.EarlyStopping(
        monitor="scaled_adversarial_loss", mode="min", patience=2
    )
    fit(model, stopping)
    assert stopping.stopped_epoch == 2


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [False, *slow(True)])
def test_model_checkpoint(weights_only, tmp_path):
    suffix = ".weights.h5" if weights_only else ".keras"

    def run(make):
        model = make(keras.optimizers.SGD(0.5))
        directory = tmp_path / make.__name__
        each, best = (
            keras.callbacks.ModelCheckpoint(
                directory / (name + suffix),
                monitor="val_loss",
                save_best_only=name == "best",
                save_weights_only=weights_only,
            )
            for name in ("{epoch:02d}-{val_loss:.4f}", "best")
        )
        history = fit(model, each, best)
        if weights_only:
            model.load_weights(directory / ("best" + suffix))
        else:
            model = keras.models.load_model(directory / ("best" + suffix))
        loss = model.evaluate(*VALIDATION, verbose=0)[0]
        assert np.argmin(history["val_loss"]) < 5
        np.testing.assert_allclose(loss, min(history["val_loss"]), rtol=1e-6)
        return sorted(path.name for path in directory.iterdir()), model.get_weights()

    (expected_names, expected), (names, weights) = both(run)
    assert names == expected_names
    assert len(names) == 7
    assert_equal(weights, expected)


def test_checkpoints_may_be_named_after_the_adversarial_loss(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{scaled_adversarial_loss:.6f}.keras"
    )
    history = fit(wrapped(multiplier=0.5), checkpoint, epochs=2)
    names = {f"{loss:.6f}.keras" for loss in history["scaled_adversarial_loss"]}
    assert {path.name for path in tmp_path.iterdir()} == names


class Interruption(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.when = epoch
        self.epoch = None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.when and batch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [*slow(0.0), 0.5])
def test_backup_and_restore(multiplier, tmp_path):
    def make(seed):
        keras.utils.set_random_seed(seed)
        return wrapped("adam", multiplier)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    undisturbed = make(0)
    history = fit(undisturbed)
    with pytest.raises(KeyboardInterrupt):
        fit(make(0), backup(), Interruption(3))
    resumed = make(1)
    rest = fit(resumed, backup())
    assert rest == {name: values[3:] for name, values in history.items()}
    assert_equal(resumed.get_weights(), undisturbed.get_weights())
    assert not (tmp_path / "backup").exists()


@pytest.mark.slow
def test_reduce_lr_on_plateau():
    def run(make):
        reduce = keras.callbacks.ReduceLROnPlateau(
            monitor="val_loss", patience=1, factor=0.5
        )
        model = make(keras.optimizers.SGD(1.0))
        history = fit(model, reduce)
        return [history["learning_rate"], *model.get_weights()]

    expected, got = both(run)
    assert_equal(got, expected)
    assert got[0][0] > got[0][-1]


def test_learning_rate_scheduler():
    def run(make):
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
        model = make(keras.optimizers.SGD(0.5))
        history = fit(model, schedule, epochs=3)
        return [history["learning_rate"], *model.get_weights()]

    expected, got = both(run)
    assert_equal(got, expected)
    assert got[0] == [0.25, 0.125, 0.0625]


@pytest.mark.slow
def test_swapping_of_averaged_weights():
    def run(make):
        model = make(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9))
        history = fit(model, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
        return [history["val_loss"], *model.get_weights()]

    expected, got = both(run)
    assert_equal(got, expected)


@pytest.mark.parametrize("multiplier", [*slow(0.0), 0.5])
def test_terminate_on_nan(multiplier):
    def run(make, **kwargs):
        keras.utils.set_random_seed(0)
        batches = []
        tell = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: batches.append(batch)
        )
        model = make(keras.optimizers.SGD(1e38), **kwargs)
        fit(model, tell, keras.callbacks.TerminateOnNaN())
        return batches

    expected, got = run(plain), run(wrapped, multiplier=multiplier)
    assert got == expected
    assert 1 < len(got) < 4


def test_a_loss_that_only_the_attack_makes_infinite_terminates():
    class Logarithm(keras.layers.Layer):
        def call(self, x):
            return keras.ops.log(x)

    base = keras.Sequential([keras.Input((6,)), Logarithm(), keras.layers.Dense(3)])
    config = make_adv_reg_config(1.0, adv_step_size=9.0, adv_grad_norm="infinity")
    model = regularized(base, config)
    batches = []
    tell = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(logs["labeled_loss"])
    )
    stop = keras.callbacks.TerminateOnNaN()
    x = np.abs(X) + 1.0
    model.fit(x, Y, batch_size=4, epochs=2, callbacks=[tell, stop], verbose=0)
    assert len(batches) == 1
    assert np.isfinite(batches).all()


@pytest.mark.slow
def test_csv_logger(tmp_path):
    def run(make):
        path = tmp_path / f"{make.__name__}.csv"
        history = fit(make(), keras.callbacks.CSVLogger(path), epochs=3)
        with path.open() as file:
            table = list(csv.DictReader(file))
        assert [row.pop("epoch") for row in table] == ["0", "1", "2"]
        for name, values in history.items():
            assert [float(row[name]) for row in table] == values
        return set(table[0])

    expected, got = both(run)
    assert got == expected | EXTRA


def scalars(directory):
    """Every scalar that the event files of a directory hold, by tag."""
    found = {}
    for path in directory.glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append(number)
    return found


@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")

    def run(make):
        directory = tmp_path / make.__name__
        board = keras.callbacks.TensorBoard(directory, histogram_freq=1, update_freq=1)
        history = fit(make(), board, epochs=2)
        found = {name: scalars(directory / name) for name in ("train", "validation")}
        for name, values in history.items():
            tag = "epoch_" + name.removeprefix("val_")
            written = found["validation" if name.startswith("val_") else "train"][tag]
            np.testing.assert_allclose(written, values, rtol=1e-6)
        return {name: set(found[name]) for name in found}

    expected, got = both(run)
    expected["train"] |= {
        f"{when}_{name}" for when in ("batch", "epoch") for name in EXTRA
    }
    assert got == expected
