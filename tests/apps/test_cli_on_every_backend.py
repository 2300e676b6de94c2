"""The command, the demo and the explorer, on each backend of Keras."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from helpers.slow import slow_on_jax
from keras import layers

from advreg import AdversarialRegularization, datasets, evaluate_robustness
from advreg.apps import cli, demo, explorer
from advreg.apps.cli import models
from advreg.apps.settings import DemoSettings
from advreg.attacks import FGSM

pytestmark = pytest.mark.every_backend(tensorflow="slow")

BACKEND = keras.backend.backend()
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def digits():
    pytest.importorskip("sklearn")
    return datasets.load("digits")


def network(activation=None):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(10, activation=activation),
        ]
    )


@pytest.fixture(params=["plain", "wrapped"])
def saved(request, tmp_path, digits):
    """Returns a trained model, and the file that it is saved in."""
    model = network("softmax")
    if request.param == "wrapped":
        model = AdversarialRegularization(model)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(digits.x_train[:256], digits.y_train[:256], epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    return model, tmp_path / "model.keras"


@slow_on_jax
def test_evaluate_reports_what_python_does(saved, tmp_path, capsys, digits):
    pytest.importorskip("matplotlib")
    model, path = saved
    report, figure = tmp_path / "report.json", tmp_path / "report.png"
    arguments = ["--dataset", "digits", "--examples", "30", "--epsilons", "0.1"]
    files = ["--json", str(report), "--figure", str(figure)]
    chosen = ["--attacks", "fgsm", "noise"]
    status = cli.main(["evaluate", str(path), *arguments, *chosen, *files])
    assert status == 0
    assert "FGSM" in capsys.readouterr().out
    assert figure.read_bytes().startswith(PNG)
    found = json.loads(report.read_text())
    direct = evaluate_robustness(
        model,
        digits.x_test[:30],
        digits.y_test[:30],
        attacks=[FGSM(0.1, clip_value_min=0.0, clip_value_max=1.0, seed=0)],
        verbose=0,
    )
    assert found["results"][0]["accuracy"] == direct.results[0].accuracy
    assert found["clean"]["accuracy"] == direct.clean.accuracy


@pytest.mark.parametrize(
    "message",
    [
        "No module named 'OTHER'",
        "No module named 'OTHER.nn'",
        "The layer is only currently supported with the OTHER backend.",
    ],
)
def test_a_model_of_another_backend_says_which(message, monkeypatch, tmp_path, capsys):
    other = "torch" if BACKEND == "jax" else "jax"

    def load_model(path):
        raise ValueError(message.replace("OTHER", other))

    monkeypatch.setattr(keras.models, "load_model", load_model)
    path = tmp_path / "model.keras"
    path.touch()
    assert cli.main(["evaluate", str(path), "--dataset", "digits"]) == 1
    printed = capsys.readouterr().err
    assert f"set the environment variable KERAS_BACKEND={other}." in printed
    assert f"Received: the backend {BACKEND}." in printed


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="PyTorch is installed"
)
def test_a_file_with_a_layer_of_pytorch_says_so(tmp_path):
    path = tmp_path / "model.keras"
    network().save(path)
    with zipfile.ZipFile(path) as archive:
        files = {file: archive.read(file) for file in archive.namelist()}
    config = json.loads(files["config.json"])
    layer = next(
        each for each in config["config"]["layers"] if each["class_name"] == "Flatten"
    )
    layer["class_name"] = "TorchModuleWrapper"
    layer["config"] = {"name": "of_pytorch", "module": None}
    files["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    with pytest.raises(ValueError, match="KERAS_BACKEND=torch"):
        models.load(path)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow is there")
def test_a_dataset_of_tfds_says_that_it_needs_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", object())
    find_spec = datasets.importlib.util.find_spec
    monkeypatch.setattr(
        datasets.importlib.util,
        "find_spec",
        lambda name: None if name == "tensorflow" else find_spec(name),
    )
    with pytest.raises(ImportError, match=r"no TensorFlow$"):
        datasets.load("mnist")


def test_the_help_imports_no_backend():
    program = (
        "import sys; sys.argv[:] = ['advreg', '--help']\n"
        "from advreg.apps.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "names = {'keras', 'tensorflow', 'jax', 'torch', 'numpy'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout


@slow_on_jax
def test_the_demo_trains_attacks_and_draws(tmp_path, monkeypatch, digits):
    pytest.importorskip("matplotlib")
    few = dataclasses.replace(
        digits,
        x_train=digits.x_train[:64],
        y_train=digits.y_train[:64],
        x_test=digits.x_test[:20],
        y_test=digits.y_test[:20],
    )
    monkeypatch.setattr(datasets, "load", lambda name: few)
    monkeypatch.setattr(demo, "_PGD_ITERATIONS", 2)
    result = demo.run(
        DemoSettings(dataset="digits", epochs=1, output_dir=tmp_path), verbose=0
    )
    for measured in result.networks.values():
        assert 0 <= measured.pgd <= measured.clean <= 1
    assert result.figure.read_bytes().startswith(PNG)


@pytest.mark.parametrize("attack", list(explorer.ATTACKS))
def test_the_explorer_attacks_side_by_side(attack, digits):
    networks = {"scores": network(), "probabilities": network("softmax")}
    sides = explorer.SideBySide(networks, (8, 8, 1))
    found = sides.explore(digits.x_test[0], attack, "infinity", 0.1, label=3)
    for side in found.values():
        assert np.abs(side.perturbation).max() <= 0.1 + 1e-6
        assert np.abs(side.perturbation).max() > 0.01
        for shares in (side.clean_probabilities, side.perturbed_probabilities):
            assert shares.shape == (10,)
            assert shares.sum() == pytest.approx(1)
    assert not np.array_equal(found["scores"].perturbed, found["scores"].clean)
