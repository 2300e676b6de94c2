import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from helpers.slow import slow

from advreg import AdversarialRegularization, __version__, datasets, evaluate_robustness
from advreg.apps import cli, demo, explorer
from advreg.apps.cli import evaluate as evaluate_command
from advreg.apps.cli import explore as explore_command
from advreg.attacks import FGSM, PGD
from advreg.attacks.engine.target import DRAWS
from advreg.evaluation.report import RobustnessReport
from advreg.nsl import migrate

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def untrained(monkeypatch):
    """Fails a test that gets as far as training."""
    monkeypatch.setattr(demo, "train_network", lambda *_: pytest.fail("training began"))


@pytest.fixture
def received(monkeypatch):
    """Collects the settings that reach the demo, which does not run."""
    settings = []

    def run(value):
        settings.append(value)
        return "the table"

    monkeypatch.setattr(demo, "run", run)
    return settings


@pytest.mark.slow
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


def test_help_tells_the_defaults_of_the_library(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert f"called on each image (default: {DRAWS})\n" in capsys.readouterr().out


def test_module_runs():
    process = subprocess.run(
        [sys.executable, "-m", "advreg", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == f"advreg {__version__}\n"


# advreg evaluate


def save(path, *layers, shape=(8, 8, 1), width=10, wrap=False):
    """Saves a linear model of the digits, whose weights tell them apart a little."""
    base = keras.Sequential(
        [
            keras.Input(shape),
            *layers,
            keras.layers.Flatten(),
            keras.layers.Dense(width, name="scores"),
        ]
    )
    if width == 10:
        data = datasets.load("digits")
        means = np.stack([data.x_train[data.y_train == k].mean(0) for k in range(10)])
        means = means.reshape(10, -1)
        # The nearest mean, as a linear function.
        kernel, bias = 8 * means.T, -4 * (means**2).sum(1)
        base.get_layer("scores").set_weights([kernel, bias])
    model = AdversarialRegularization(base) if wrap else base
    if wrap:
        model.compile(loss="sparse_categorical_crossentropy")
        model.build((None, *shape))
    model.save(path)
    return base


@pytest.fixture
def model_file(tmp_path):
    pytest.importorskip("sklearn")
    save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def evaluate(*argv):
    return cli.main(["evaluate", *map(str, argv)])


def refused(capsys, *argv, status):
    """The last line of what a command says that cannot do its work."""
    if status == 2:
        with pytest.raises(SystemExit) as raised:
            evaluate(*argv)
        assert raised.value.code == 2
    else:
        assert evaluate(*argv) == status
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("advreg evaluate: error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return line.removeprefix("advreg evaluate: error: ")


def report_of(path, *argv):
    assert evaluate(*argv, "--json", path) == 0
    return RobustnessReport.from_json(path.read_text())


def test_evaluate(model_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "report.png"
    report = report_of(
        tmp_path / "r.json", model_file, "--examples", 60, "--figure", figure
    )
    assert str(report) in capsys.readouterr().out
    assert figure.read_bytes().startswith(PNG)
    data = datasets.load("digits")
    model = keras.models.load_model(model_file)
    span = {"clip_value_min": 0.0, "clip_value_max": 1.0, "seed": 0}
    expected = evaluate_robustness(
        model,
        data.x_test[:60],
        data.y_test[:60],
        attacks=[FGSM(0.15, **span), PGD(0.15, **span)],
        batch_size=250,
        verbose=0,
    )
    assert 0.5 < report.clean_accuracy < 1
    assert (report.clean.correct, report.overall.correct) == (
        expected.clean.correct,
        expected.overall.correct,
    )
    found = [(line.name, line.correct, line.settings) for line in report.results]
    assert found == [(r.name, r.correct, r.settings) for r in expected.results]


def test_every_option_of_evaluate_arrives(model_file, tmp_path, monkeypatch):
    calls = []

    def run(model, x, y, **kwargs):
        calls.append((x, y, kwargs))
        return evaluate_robustness(model, x, y, **{**kwargs, "verbose": 0})

    monkeypatch.setattr(evaluate_command, "evaluate_robustness", run)
    options = "--attacks pgd noise --epsilons 2 4 --norm l2 --iterations 3 --restarts 2"
    rest = "--pixel-range 0 255 --examples 20 --batch-size 8 --from-logits --seed 5"
    rest += " --draws 7"
    assert evaluate(model_file, *options.split(), *rest.split()) == 0
    ((x, y, kwargs),) = calls
    assert (len(x), len(y), kwargs["batch_size"]) == (20, 20, 8)
    assert x.max() == 255
    assert x.dtype == "float32"
    assert kwargs["from_logits"] is True
    assert kwargs["draws"] == 7
    assert kwargs["epsilons"] == [2.0, 4.0]
    assert [repr(attack) for attack in kwargs["attacks"]] == [
        "PGD(epsilon=4.0, norm='l2', clip_value_min=0.0, clip_value_max=255.0, seed=5, "
        "iterations=3, restarts=2)",
        "RandomNoise(epsilon=4.0, norm='l2', clip_value_min=0.0, clip_value_max=255.0, "
        "seed=5)",
    ]


@pytest.mark.parametrize("kind", ["wrapped", *slow("softmax", "rescaling")])
def test_the_same_network_in_another_form(kind, model_file, tmp_path):
    plain = report_of(
        tmp_path / "a.json", model_file, "--examples", 40, "--attacks", "fgsm"
    )
    other, options = tmp_path / "other.keras", []
    if kind == "wrapped":
        save(other, wrap=True)
    elif kind == "softmax":
        base = save(tmp_path / "base.keras")
        keras.Sequential([base, keras.layers.Softmax()]).save(other)
        options = ["--no-from-logits"]
    else:
        save(other, keras.layers.Rescaling(1 / 255))
        options = ["--pixel-range", "0", "255"]
    report = report_of(
        tmp_path / "b.json", other, "--examples", 40, "--attacks", "fgsm", *options
    )
    assert report.clean.correct == plain.clean.correct
    assert report.results[0].correct == plain.results[0].correct
    scale = 255 if kind == "rescaling" else 1
    assert report.results[0].epsilon == pytest.approx(scale * 0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--norm l7", "--norm must be one of 'l1', 'l2' and 'infinity'"),
        ("--norm l1 --attacks square", "--norm must be one of"),
        ("--epsilons -0.1", "--epsilons must be finite and not negative. Received: -"),
        ("--epsilons 0.1 nan", "--epsilons must be finite and not negative. Received"),
        (
            "--epsilons 0.1 2",
            "--epsilons must not be larger than the range from LOW to HIGH, which is 1 "
            "wide. Received: 2",
        ),
        ("--epsilons many", "argument --epsilons: invalid float value: 'many'"),
        ("--iterations 0", "--iterations must be at least 1 and fit 32 bits. Received"),
        (
            "--attacks fgsm --iterations 5",
            "--iterations is for apgd, autoattack, bim, pgd, and means nothing "
            "to the attacks that are asked for. Received: fgsm",
        ),
        ("--restarts 0", "--restarts must be at least 1 and fit 32 bits. Received: 0"),
        ("--attacks fgsm bim --restarts 2", "--restarts is for apgd"),
        ("--examples 0", "--examples must be at least 1 and fit 32 bits. Received: 0"),
        ("--draws 256", "--draws must be at most 255. Received: 256"),
        ("--batch-size 0", "--batch-size must be at least 1 and fit 32 bits. Received"),
        ("--seed -1", "--seed must lie between 0 and 2**32 - 1. Received: -1"),
        (
            "--pixel-range 1 0",
            "--pixel-range must be two finite numbers, the lower one first. Received: ",
        ),
        ("--pixel-range 0 inf", "--pixel-range must be two finite numbers, the lower "),
        ("--attacks nosuch", "argument --attacks: invalid choice: 'nosuch'"),
        ("--json no/such.json", "--json must be a file in a directory that exists. Re"),
        ("--figure no/such.png", "--figure must be a file in a directory that exists"),
        ("--json .", "--json must be a file in a directory that exists. Received: ."),
    ],
)
def test_wrong_options_of_evaluate(options, message, tmp_path, capsys):
    # Before the model is even looked for.
    error = refused(capsys, tmp_path / "none.keras", *options.split(), status=2)
    assert error.startswith(message)


def test_a_figure_of_an_unknown_format(model_file, capsys):
    pytest.importorskip("matplotlib")
    error = refused(capsys, model_file, "--figure", "x.docx", status=1)
    assert error.startswith("--figure must end in one of ")
    assert error.endswith("Received: x.docx")


def test_files_that_hold_no_model(tmp_path, capsys):
    absent = refused(capsys, tmp_path / "none.keras", status=1)
    assert absent.endswith("none.keras', which is absent")
    directory = refused(capsys, tmp_path, status=1)
    assert directory.endswith("which is a directory")
    corrupt = tmp_path / "corrupt.keras"
    corrupt.write_bytes(b"PK no model")
    assert "is no model that Keras can load. Keras says: " in refused(
        capsys, corrupt, status=1
    )


def test_a_model_of_unknown_classes(tmp_path, capsys):
    pytest.importorskip("sklearn")

    class Own(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    save(tmp_path / "own.keras", Own())
    error = refused(capsys, tmp_path / "own.keras", status=1)
    assert "call advreg.evaluate_robustness in Python" in error
    assert "'Own'" in error


def test_a_dataset_that_does_not_fit(tmp_path, capsys):
    pytest.importorskip("sklearn")
    save(tmp_path / "large.keras", shape=(28, 28, 1), width=9)
    assert refused(capsys, tmp_path / "large.keras", status=1) == (
        "The model does not take the images of 'digits': its inputs are of shape (28, "
        "28, 1). Choose another --dataset. Received: images of shape (8, 8, 1)"
    )
    save(tmp_path / "few.keras", width=3)
    assert refused(capsys, tmp_path / "few.keras", status=1).startswith(
        "The labels of the dataset must hold classes from 0 to 2"
    )
    save(tmp_path / "values.keras", width=1)
    assert "The labels of the dataset must hold classes from 0 to 1" in refused(
        capsys, tmp_path / "values.keras", status=1
    )
    keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3)]).save(
        tmp_path / "maps.keras"
    )
    assert refused(capsys, tmp_path / "maps.keras", status=1).startswith(
        "The model must give class scores of each example, [batch, classes]"
    )


def test_outputs_that_are_no_probabilities(model_file, capsys):
    error = refused(capsys, model_file, "--no-from-logits", status=1)
    assert error.startswith("--no-from-logits says that the model gives probabilities")
    assert "Set --from-logits, or leave it out" in error


def test_a_dataset_that_evaluate_does_not_know(model_file, capsys):
    pytest.importorskip("tensorflow_datasets")
    error = refused(capsys, model_file, "--dataset", "nosuchdata", status=1)
    assert "'nosuchdata'" in error


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["advreg", "advreg.nsl.keras"])
def test_evaluate_loads_wrapped_models_in_a_process_of_its_own(wrapper, tmp_path):
    pytest.importorskip("sklearn")
    base = save(tmp_path / "base.keras")
    cls = importlib.import_module(wrapper).AdversarialRegularization
    model = cls(base)
    model.compile(loss="sparse_categorical_crossentropy")
    model.build((None, 8, 8, 1))
    model.save(tmp_path / "wrapped.keras")
    arguments = "evaluate wrapped.keras --attacks fgsm --examples 20"
    process = subprocess.run(
        [sys.executable, "-m", "advreg", *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "FGSM" in process.stdout


# advreg explore


@pytest.fixture
def opened(monkeypatch):
    """Collects what reaches the page, which is not opened."""
    pages = []

    @contextlib.contextmanager
    def serve(sides, examples, **address):
        pages.append((sides, examples, address))
        yield "http://there/"

    monkeypatch.setattr(explorer, "check_installed", lambda: None)
    monkeypatch.setattr(explorer, "serve", serve)
    monkeypatch.setattr(explore_command, "wait_for_the_end", lambda: None)
    return pages


def explore(*arguments):
    return cli.main(["explore", *map(str, arguments)])


def test_explore_opens_saved_models(opened, model_file, tmp_path, capsys):
    pytest.importorskip("sklearn")
    wrapped = tmp_path / "wrapped.keras"
    save(wrapped, wrap=True)
    assert explore(model_file, wrapped, "--dataset", "digits") == 0
    ((sides, examples, address),) = opened
    assert sides.names == (model_file.stem, "wrapped")
    assert (sides.shape, sides.classes) == ((8, 8, 1), 10)
    assert [one.label for one in examples.pictures[:10]] == list(range(10))
    assert address == {"host": "127.0.0.1", "port": None}
    out = capsys.readouterr().out
    assert out == "The explorer is at http://there/ (Ctrl-C ends it)\n"

    options = "--host 0.0.0.0 --port 81 --pixel-range 0 255 --from-logits"
    assert explore(model_file, *options.split()) == 0
    sides, examples, address = opened[1]
    assert sides.radius("infinity") == pytest.approx(0.15 * 255)
    assert {one.label for one in examples.pictures} == {None}
    assert address == {"host": "0.0.0.0", "port": 81}
    assert "Whoever reaches this machine can use it" in capsys.readouterr().out


def test_explore_trains_the_pair_of_the_demo(opened, monkeypatch):
    pytest.importorskip("sklearn")
    trained = []

    def train(model, data, recipe, settings, verbose):
        trained.append((model, data.name, settings, verbose))
        return 1.0

    monkeypatch.setattr(demo, "train_network", train)
    assert explore("--seed", 3) == 0
    ((sides, examples, _),) = opened
    assert sides.names == ("plain", "regularised")
    assert examples.pictures[0].label == 0
    assert isinstance(trained[1][0], AdversarialRegularization)
    for _, name, settings, verbose in trained:
        assert (name, settings) == ("digits", demo.DemoSettings(seed=3))
        assert verbose == "auto"  # With Keras's progress bar.


def test_models_of_one_name_are_told_apart(opened, tmp_path):
    pytest.importorskip("sklearn")
    paths = [tmp_path / folder / "model.keras" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        save(path)
    assert explore(*paths) == 0
    assert opened[0][0].names == tuple(map(str, paths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("a b c", "two models at most. Received: 3"),
        ("--port 0", "--port must lie between 1 and 65535. Received: 0"),
        ("--port 70000", "--port must lie between 1 and 65535. Received: 70000"),
        ("a --pixel-range 1 0", "--pixel-range must be two finite numbers"),
        ("--pixel-range 0 255", "--pixel-range is for a MODEL.keras"),
        ("--seed -1", "--seed must lie between 0 and 2**32 - 1. Received: -1"),
    ],
)
def test_wrong_options_of_explore(options, message, opened, untrained, capsys):
    with pytest.raises(SystemExit) as raised:
        explore(*options.split())
    assert raised.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not opened


def test_models_that_explore_refuses(opened, tmp_path, capsys):
    pytest.importorskip("sklearn")

    def error(*arguments):
        assert explore(*arguments) == 1
        assert not opened
        return capsys.readouterr().err.partition("error: ")[2]

    assert "which is absent" in error(tmp_path / "none.keras")
    flat = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    flat.save(tmp_path / "flat.keras")
    assert error(tmp_path / "flat.keras").startswith("The model must classify images")
    save(tmp_path / "small.keras", width=9)
    save(tmp_path / "large.keras", shape=(28, 28, 1), width=9)
    assert error(tmp_path / "small.keras", tmp_path / "large.keras") == (
        "The models must take pictures of the same shape. Received: "
        "small takes (8, 8, 1), large takes (28, 28, 1)\n"
    )
    save(tmp_path / "few.keras", width=3)
    assert "10 classes of 'digits'" in error(
        tmp_path / "few.keras", "--dataset", "digits"
    )


def test_explore_names_its_extra(untrained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert explore() == 1
    assert "advreg[app]" in capsys.readouterr().err


def test_explore_waits_for_a_signal(capsys):
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    explore_command.wait_for_the_end()
    assert signal.getsignal(signal.SIGTERM) == before
    timer.join()


# Ctrl-C


@pytest.mark.parametrize("command", ["demo", "evaluate", "explore", "migrate"])
def test_ctrl_c_is_one_line(command, model_file, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    monkeypatch.setattr(evaluate_command, "evaluate_robustness", interrupted)
    monkeypatch.setattr(explorer, "check_installed", interrupted)
    monkeypatch.setattr(migrate, "find", interrupted)
    arguments = {
        "demo": ["--output-dir", str(tmp_path)],
        "evaluate": [str(model_file), "--json", str(tmp_path / "report.json")],
        "migrate": [str(tmp_path)],
    }
    assert cli.main([command, *arguments.get(command, [])]) == 130
    assert capsys.readouterr().err == f"advreg {command}: interrupted before its end\n"
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_the_demo(tmp_path):
    """The signal itself, while the first network trains."""
    pytest.importorskip("sklearn")
    process = subprocess.Popen(
        [sys.executable, "-m", "advreg", "demo", "--epochs", "10000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that a shell started with `&` ignores Ctrl-C, and so do its own.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        while "Epoch 1/" not in process.stdout.readline():
            assert process.poll() is None
        for _ in range(4):
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            # TensorFlow drops what is raised at some of its places: then once more.
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, error = process.communicate(timeout=20)
                break
    assert process.returncode == 130
    assert error.splitlines()[-1] == "advreg demo: interrupted before its end"
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("results.json"))


# advreg migrate


NSL = "neural_structured_learning"


def test_migrate_shows_and_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libcst")
    monkeypatch.chdir(tmp_path)
    old = f"import {NSL} as nsl\r\nx = 'é'\r\nnsl.tools.y\r\n".encode("latin-1")
    new = b"from advreg import nsl\r\nx = '\xe9'\r\nnsl.tools.y\r\n"
    cookie = b"# coding: latin-1\r\n"
    (tmp_path / "a b.py").write_bytes(cookie + old)
    (tmp_path / "a b.py").chmod(0o640)
    (tmp_path / "same.py").write_bytes(b"import os")
    before = (tmp_path / "same.py").stat().st_mtime_ns
    assert cli.main(["migrate", "."]) == 0
    diff, _, rest = capsys.readouterr().out.partition("a b.py:4: `nsl.tools.y`: ")
    assert diff == (
        "--- a b.py\n+++ a b.py\n@@ -1,4 +1,4 @@\n # coding: latin-1\r\n"
        f"-import {NSL} as nsl\r\n+from advreg import nsl\r\n x = 'é'\r\n"
        " nsl.tools.y\r\n"
    )
    summary = "2 files looked at, 1 {}changed, {} for a person, 0 not done\n"
    assert rest.splitlines()[1] + "\n" == summary.format("would be ", "1 place")
    assert (tmp_path / "a b.py").read_bytes() == cookie + old

    assert cli.main(["migrate", "--write", "a b.py", "."]) == 0
    out = capsys.readouterr().out
    assert out.startswith("changed a b.py\na b.py:4: ")
    assert out.endswith(summary.format("", "1 place"))
    assert (tmp_path / "a b.py").read_bytes() == cookie + new
    assert (tmp_path / "a b.py").stat().st_mode & 0o777 == 0o640

    assert cli.main(["migrate", ".", "--write"]) == 0
    assert capsys.readouterr().out == summary.format("", "0 places").replace(
        "1 c", "0 c"
    )
    assert (tmp_path / "a b.py").read_bytes() == cookie + new
    assert (tmp_path / "same.py").stat().st_mtime_ns == before


def test_migrate_says_what_it_could_not_do(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libcst")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.ipynb").write_text("{")
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "old.py").write_text(f"print 'x'\nimport {NSL}\n")
    (tmp_path / "read.py").write_text(f"import {NSL} as nsl\n")
    (tmp_path / "read.py").chmod(0o444)
    (tmp_path / "wrong.py").write_bytes(b"\xff")
    assert cli.main(["migrate", "--write", "."]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [
        ["not done", name]
        for name in ("loop.py", "broken.ipynb", "old.py", "read.py", "wrong.py")
    ]
    assert lines[2].startswith("not done: old.py: line 1: Missing parentheses")
    assert lines[3] == "not done: read.py: it is read-only"
    assert lines[-1] == (
        "4 files looked at, 0 changed, 0 places for a person, 5 not done"
    )


def test_migrate_prints_on_terminals_that_know_fewer_characters(tmp_path, monkeypatch):
    pytest.importorskip("libcst")
    path = tmp_path / "ä.py"
    path.write_text(f"import {NSL} as nsl  # €\n", encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["migrate", str(path)]) == 0
    out.flush()
    assert rb"from advreg import nsl  # \u20ac" in out.buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.txt", "must end in .py or .ipynb"), ("absent.py", "that exists")],
)
def test_migrate_refuses_other_files(name, message, tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    with pytest.raises(SystemExit) as raised:
        cli.main(["migrate", str(tmp_path / name)])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"Received: {tmp_path / name}" in error


@pytest.mark.parametrize(
    "arguments", [["--help"], ["evaluate", "a.keras"], ["migrate", "old.py"]]
)
def test_output_that_is_no_longer_read(arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("libcst")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_command, "load", lambda path: print("x" * 100_000))
    (tmp_path / "old.py").write_text(f"import {NSL}\n" * 2_000)  # More than a buffer.
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(arguments) == 1
    assert capsys.readouterr().err == ""


def test_migrate_names_its_extra(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text(f"import {NSL}\n")
    monkeypatch.setitem(sys.modules, "libcst", None)
    assert cli.main(["migrate", str(tmp_path)]) == 1
    assert "advreg[migrate]" in capsys.readouterr().err
