import inspect
import os
import random
import signal
import subprocess
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import X, classifier, regularized
from helpers.processes import start

from advreg import AdversarialRegularization

FILES = {"save": "model.keras", "save_weights": "model.weights.h5"}
SHARDS = pytest.mark.skipif(
    "max_shard_size" not in inspect.signature(keras.Model.save_weights).parameters,
    reason="this version of Keras saves weights in one file",
)

# Trains and saves after each epoch. In the middle of the third time its process dies.
DYING = """
import os, signal, sys
import keras
from helpers.models import X, Y, classifier, regularized

how, path = sys.argv[1:]
saved = 0
save = keras.layers.Dense.save_own_variables

def save_or_die(layer, store):
    global saved
    saved += 1
    if saved == 2 * 2 + 2:  # Of two layers.
        os.kill(os.getpid(), signal.SIGKILL)
    save(layer, store)

keras.layers.Dense.save_own_variables = save_or_die
callback = {
    "save": lambda: keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.save(path)),
    "save_weights": lambda: keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.save_weights(path)),
    "ModelCheckpoint": lambda: keras.callbacks.ModelCheckpoint(path),
    "BackupAndRestore": lambda: keras.callbacks.BackupAndRestore(
        os.path.dirname(path)),
}[how]()
model = regularized(classifier(), optimizer="adam")
model.fit(X, Y, batch_size=4, epochs=5, callbacks=[callback], verbose=0)
"""

# Saves over and over, so that whenever it dies it is probably saving.
SAVING = """
import sys
from helpers.models import X, Y, classifier, regularized

model = regularized(classifier(), optimizer="adam")
model.fit(X, Y, verbose=0)
for number in range(10**6):
    model.save(sys.argv[1])
    model.save_weights(sys.argv[2])
    if number == 3:
        print(flush=True)
"""


def saving(*arguments):
    pipe = subprocess.PIPE
    return start("-c", *arguments, stdout=pipe, stderr=pipe)


def built():
    model = regularized(classifier(), optimizer="adam")
    model.optimizer.build(model.trainable_weights)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *FILES.items(),
        ("ModelCheckpoint", "model.keras"),
        ("BackupAndRestore", "latest.weights.h5"),
    ],
)
def test_killed_in_the_middle_it_leaves_what_was_there(how, name, tmp_path):
    process = saving(DYING, how, tmp_path / name)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert list(tmp_path.glob(".saving-*"))
    if name == "model.keras":
        model = keras.models.load_model(tmp_path / name)
    else:
        model = built()
        model.load_weights(tmp_path / name)
    assert int(model.optimizer.iterations) == 2 * 3  # Two epochs of three batches.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_leaves_a_whole_file(seed, tmp_path):
    paths = tmp_path / "model.keras", tmp_path / "model.weights.h5"
    process = saving(SAVING, *paths)
    try:
        assert process.stdout.readline() == b"\n", process.communicate()[1].decode()
        time.sleep(random.Random(seed).uniform(0, 0.2))
    finally:
        process.kill()
        process.communicate()
    model = keras.models.load_model(paths[0])
    weights = [w.copy() for w in model.get_weights()]
    model.set_weights([np.zeros_like(w) for w in weights])
    model.load_weights(paths[1])
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", FILES)
def test_an_error_in_the_middle_leaves_what_was_there(method, tmp_path, monkeypatch):
    path = tmp_path / FILES[method]
    model = built()
    getattr(model, method)(path)
    before = path.read_bytes()
    monkeypatch.setattr(model.optimizer, "save_own_variables", lambda store: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(model, method)(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize("answers", [["y"], ["what?", "n"]])
def test_it_asks_before_it_overwrites(method, answers, tmp_path, monkeypatch):
    path = tmp_path / FILES[method]
    path.write_bytes(b"old")
    given, questions = iter(answers), []

    def answer(question):
        questions.append(question)
        return next(given)

    monkeypatch.setattr("builtins.input", answer)
    getattr(built(), method)(path, overwrite=False)
    # As often as Keras asks, until the answer is one.
    assert len(questions) == len(answers)
    assert all(str(path) in question for question in questions)
    assert (path.read_bytes() == b"old") == (answers[-1] == "n")


@pytest.mark.parametrize(
    ("method", "name", "arguments"),
    [
        ("save", "missing/model.keras", {}),
        ("save_weights", "missing/model.weights.h5", {}),
        ("save", "directory.keras", {}),
        ("save_weights", "directory.weights.h5", {}),
        ("save", "model", {}),
        ("save", "model.keras", {"zipped": False}),
        ("save", "model.keras", {"unknown": 1}),
        ("save", "model.keras", {"save_format": "tf", "unknown": 1}),
        ("save_weights", "model.keras", {}),
        pytest.param("save_weights", "model.h5", {"max_shard_size": 1}, marks=SHARDS),
    ],
)
def test_errors_are_those_of_keras(method, name, arguments, tmp_path):
    (tmp_path / "directory.keras").mkdir()
    (tmp_path / "directory.weights.h5").mkdir()

    def error(model):
        with pytest.raises((OSError, ValueError)) as caught:
            getattr(model, method)(tmp_path / name, **arguments)
        return type(caught.value), str(caught.value).splitlines()[0]

    assert error(built()) == error(classifier())


def test_a_model_that_is_not_built_is_refused_as_keras_refuses_it(tmp_path):
    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    for model in (regularized(unbuilt), unbuilt):
        with pytest.raises(ValueError, match="has not yet been built"):
            model.save_weights(tmp_path / "model.weights.h5")
        with pytest.warns(UserWarning, match="has not yet been built"):
            model.save(tmp_path / "model.keras")


@pytest.mark.parametrize("method", FILES)
def test_links_and_modes_stay(method, tmp_path):
    model = built()
    path, link = tmp_path / "kept", tmp_path / FILES[method]
    link.symlink_to(path)
    getattr(model, method)(link)
    plain = tmp_path / f"plain_{FILES[method]}"
    getattr(classifier(), method)(plain)
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    path.write_bytes(b"old")
    getattr(model, method)(str(link))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    model.load_weights(link)


@SHARDS
def test_directories_shards_and_remote_files_are_keras_s(tmp_path):
    model = built()
    model.save(tmp_path / "directory", zipped=False)
    model.save("ram://model.keras")
    model.save_weights("ram://model.weights.h5")
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1)
    assert len(os.listdir(tmp_path)) == 3
    for path in (tmp_path / "directory", "ram://model.keras"):
        loaded = keras.models.load_model(path)
        np.testing.assert_array_equal(loaded(X), model(X))
    for path in (tmp_path / "model.weights.json", "ram://model.weights.h5"):
        other = built()
        other.load_weights(path)
        np.testing.assert_array_equal(other(X), model(X))
    assert tf.io.gfile.exists("ram://model.keras")


def test_a_name_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built().save("model.keras")
    assert os.listdir() == ["model.keras"]


def test_a_directory_without_room_for_a_second_file(tmp_path, monkeypatch):
    model = built()
    path = tmp_path / "model.keras"
    path.touch()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: access(p, mode) and str(p) != str(tmp_path)
    )
    inode = path.stat().st_ino
    model.save(path)
    assert path.stat().st_ino == inode
    keras.models.load_model(path)


@pytest.mark.parametrize("method", FILES)
def test_arguments_are_those_of_keras(method):
    ours, keras_s = (
        list(inspect.signature(getattr(cls, method)).parameters)
        for cls in (AdversarialRegularization, keras.Model)
    )
    assert [name for name in ours if name != "max_shard_size"] == [
        name for name in keras_s if name != "max_shard_size"
    ]
