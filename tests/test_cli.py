import dataclasses
import json
import subprocess
import sys

import pytest

from advreg import __version__, cli, datasets, demo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def untrained(monkeypatch):
    """Fails a test that gets as far as training."""
    monkeypatch.setattr(demo, "_train", lambda *_: pytest.fail("training began"))


@pytest.fixture
def received(monkeypatch):
    """Collects the settings that reach the demo, which does not run."""
    settings = []

    def run(value):
        settings.append(value)
        return "the table"

    monkeypatch.setattr(demo, "run", run)
    return settings


def test_demo(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    directory = tmp_path / "new" / "directory"
    status = cli.main(["demo", "--epochs", "2", "--output-dir", str(directory)])
    assert status == 0
    out = capsys.readouterr().out
    assert "Epoch 2/2" in out
    assert str(directory / "perturbations.png") in out
    assert (directory / "perturbations.png").read_bytes().startswith(PNG)

    result = json.loads((directory / "results.json").read_text())
    assert result["dataset"] == "digits"
    assert result["test_images"] == 500
    assert result["epochs"] == 2
    plain, regularised = (result["networks"][n] for n in ("plain", "regularised"))
    for network in (plain, regularised):
        assert 0.7 < network["clean"] <= 1.0
        assert 0.0 <= network["pgd"] <= network["fgsm"] < network["clean"]
        assert network["seconds_per_epoch"] > 0.0
    assert plain["fgsm"] == plain["fgsm_on_plain"]
    assert regularised["fgsm_on_plain"] > plain["fgsm_on_plain"]
    for network, name in ((plain, "plain"), (regularised, "regularised")):
        row = next(
            line.split()
            for line in out.splitlines()
            if line.startswith(f"{name} ") and "%" in line
        )
        for key, cell in zip(
            ("clean", "fgsm_on_plain", "fgsm", "pgd"), row[1::2], strict=False
        ):
            assert cell == f"{100 * network[key]:.2f}"


def test_defaults(received, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    (settings,) = received
    assert dataclasses.replace(settings, output_dir="advreg-demo") == (
        demo.DemoSettings()
    )
    assert (tmp_path / "advreg-demo").is_dir()
    assert capsys.readouterr().out == "the table\n"


def test_every_option_arrives(received, tmp_path):
    options = {
        "dataset": "mnist",
        "epochs": 3,
        "multiplier": 0.7,
        "adv_step_size": 0.4,
        "adv_grad_norm": "l2",
        "pgd_iterations": 4,
        "seed": 9,
        "output_dir": tmp_path,
    }
    argv = ["demo", "--random-init"]
    for name, value in options.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    assert cli.main(argv) == 0
    assert received == [demo.DemoSettings(**options, random_init=True)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--epochs", "many"),
        ("--multiplier", "-1"),
        ("--multiplier", "nan"),
        ("--adv-step-size", "-0.1"),
        ("--adv-step-size", "inf"),
        ("--adv-grad-norm", "l7"),
        ("--pgd-iterations", "0"),
        ("--pgd-iterations", "1.5"),
        ("--seed", "-1"),
    ],
)
def test_wrong_values(untrained, tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo", f"{option}={value}"])
    assert raised.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("advreg demo: error:")
    assert option in error
    assert value in error
    assert list(tmp_path.iterdir()) == []


def test_output_dir_is_a_file(untrained, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo", "--output-dir", str(tmp_path / "file")])
    assert raised.value.code == 2
    assert "--output-dir must be a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [datasets.DatasetError("no such data"), ImportError("no such extra")]
)
def test_missing_things(monkeypatch, tmp_path, capsys, error):
    def load(name):
        raise error

    monkeypatch.setattr(datasets, "load", load)
    assert cli.main(["demo", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"advreg demo: error: {error}\n"


def test_unknown_dataset(untrained, tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    argv = ["demo", "--dataset", "nosuchdata", "--output-dir", str(tmp_path)]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert "'nosuchdata'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["nosuchcommand"]])
def test_wrong_commands(argv, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2
    assert "command" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"advreg {__version__}\n"


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo", "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(demo.DemoSettings):
        assert "--" + field.name.replace("_", "-") in out


@pytest.mark.slow
def test_module_runs():
    process = subprocess.run(
        [sys.executable, "-m", "advreg", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == f"advreg {__version__}\n"


@pytest.mark.slow
def test_import_loads_no_extras():
    # Keras itself loads Matplotlib where it is installed.
    code = (
        "import keras, sys; before = set(sys.modules); import advreg, advreg.cli; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(process.stdout.split())
    assert "advreg" in loaded
    assert not loaded & {"matplotlib", "sklearn", "tensorflow_datasets"}
