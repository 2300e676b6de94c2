import configparser
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest
from helpers.slow import slow

import advreg

ROOT = pathlib.Path(__file__).parent.parent
SUB_COMMANDS = ("demo", "evaluate", "explore", "migrate")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def run(code, **environment):
    return python("-c", code, **environment)


def test_public_names():
    assert advreg.__all__ == [
        "AdvNeighborConfig",
        "AdvRegConfig",
        "AdversarialRegularization",
        "NormType",
        "Objective",
        "RobustnessReport",
        "__version__",
        "adversarial_loss",
        "attacks",
        "callbacks",
        "displaced",
        "evaluate_robustness",
        "gen_adv_neighbor",
        "make_adv_reg_config",
        "perturbed_features",
    ]
    assert all(hasattr(advreg, name) for name in advreg.__all__)
    with pytest.raises(AttributeError, match="'advreg' has no attribute 'no_such'"):
        _ = advreg.no_such


def test_dir_shows_public_names_only():
    modules = {"attacks", "callbacks", "datasets", "nsl", "objectives", "plots"}
    assert set(dir(advreg)) == {*advreg.__all__, *modules}
    for name in modules:
        assert getattr(advreg, name).__name__ == f"advreg.{name}"


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("advreg") == advreg.__version__


def test_types_are_shipped():
    assert (pathlib.Path(advreg.__file__).parent / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["advreg", *slow(*(f"advreg.apps.cli.{name}" for name in SUB_COMMANDS))],
)
def test_importing_loads_no_extra(module):
    # Keras itself loads Matplotlib where it is installed: what advreg adds counts.
    extras = ("matplotlib", "sklearn", "tensorflow_datasets", "art", "gradio", "PIL")
    extras += ("libcst",)
    code = (
        "import sys, keras, tensorflow; before = set(sys.modules); "
        f"import {module}\n"
        f"new = set(sys.modules) - before; extras = {extras}\n"
        "print(sorted(m for m in new if m.split('.')[0] in extras))"
    )
    assert run(code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("code", "backend"),
    [
        pytest.param(
            "import keras; keras.backend.backend = lambda: 'openvino'; import advreg",
            None,
            marks=pytest.mark.slow,
        ),
        ("import advreg", "no_such"),
    ],
)
def test_a_backend_that_is_not_known_is_refused(code, backend):
    result = run(code, **({"KERAS_BACKEND": backend} if backend else {}))
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: advreg works on Keras's backends tensorflo")
    assert "KERAS_BACKEND" in message
    assert message.endswith(repr(backend or "openvino"))


@pytest.mark.parametrize("backend", ["tensorflow", *slow("jax", "torch")])
def test_a_backend_that_is_missing_is_named(backend):
    code = f"import sys; sys.modules['{backend}'] = None; import advreg"
    result = run(code, KERAS_BACKEND=backend)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith(
        f"ImportError: Keras needs a backend, and {backend} is not installed: "
        f'`pip install "advreg[{backend}]"`'
    )


def test_the_command_refuses_another_backend_in_one_line():
    result = python("-m", "advreg", "demo", KERAS_BACKEND="no_such")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith("advreg demo: error: advreg works on Keras's backends")


@pytest.fixture
def console_script(tmp_path):
    """The script that an installation makes of the entry point."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entries = setup["options.entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(
        r"(\w+) = (\S+):(\w+)", entries.strip()
    ).groups()
    script = tmp_path / name
    script.write_text(
        f"import sys\nfrom {module} import {function} as f\nsys.exit(f())"
    )
    return script


@pytest.mark.parametrize("way", ["script", "module"])
@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", *(f"{name} --help" for name in SUB_COMMANDS)],
)
def test_help_imports_neither_tensorflow_nor_keras(way, arguments, console_script):
    program = [console_script] if way == "script" else ["-m", "advreg"]
    result = python("-X", "importtime", *program, *arguments.split())
    assert result.returncode == 0
    assert "advreg" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "advreg.apps.cli.parsers" in imported
    assert not imported & {"tensorflow", "keras", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["advreg, keras", "keras, advreg"])
def test_importing_advreg_is_enough_to_load_a_wrapped_model(order, tmp_path):
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    config = advreg.AdvRegConfig.trades(schedule)  # It steps by a multiple of it.
    advreg.AdversarialRegularization(base, config).save(tmp_path / "wrapped.keras")
    code = (
        f"import {order}\n"
        f"model = keras.models.load_model({str(tmp_path / 'wrapped.keras')!r})\n"
        "print(type(model).__name__, model.adv_config.objective)\n"
        "print(model.adv_config.adv_neighbor_config.adv_step_size.factor)"
    )
    result = run(code)
    expected = "AdversarialRegularization Trades()\n0.25\n"
    assert result.stdout == expected, result.stderr


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    # What is for several machines has nothing to run on here.
    page = re.sub(r"## On several devices.*?(?=\n## )", "", README, flags=re.DOTALL)
    example = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    model, x, y, x_adv = (names[name] for name in ("model", "x", "y", "x_adv"))
    assert model.evaluate(x, y, verbose=0)[1] > 0.95
    # Plain training of this network leaves a third.
    assert model.evaluate(x_adv, y, verbose=0)[1] > 0.7
    out = capsys.readouterr().out
    assert "clean: [" in out
    assert "perturbed: [" in out
    # One step of this model, in the range of the report, is what that calls FGSM.
    report = names["report"]
    assert str(report) in out
    x_adv = model.perturb_on_batch(x, y, clip_value_min=0.0, clip_value_max=1.0)
    fgsm = model.evaluate(x_adv, y, verbose=0)[1]
    assert report.results[0].accuracy == pytest.approx(fgsm, abs=0.01)
    assert report.robust_accuracy > 0.5
    assert not report.warnings
