"""That the benchmarks run, with `--quick`, and that the pages show what they found."""

import importlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

from advreg.apps.recipes import mnist_network
from advreg.config.presets import Presets

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
KEPT = BENCHMARKS / "compare.json"
NSL = "import neural_structured_learning as nsl"


@pytest.fixture
def load(monkeypatch):
    """Imports modules of the benchmarks, whose folder no other test finds."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in (path.stem for path in BENCHMARKS.glob("*.py")):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.fixture
def run(load, monkeypatch, capsys):
    """Runs a benchmark in this process, and returns what it prints."""
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        monkeypatch.setenv(name, "1")  # What a script changes is changed back.

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, "--quick", *options])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def run_apart(script, *options):
    """Runs a benchmark in a process that finds no `uv`, and returns what it prints."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options]
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PATH": ""}}
    told = subprocess.run(command, **options)
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.mark.slow
def test_sides_that_are_here_are_compared(tmp_path):
    file = tmp_path / "found.json"
    options = ("--only", "step/tiny", "--json", str(file), "--sides")
    printed = run_apart("compare.py", *options, "loop", "nsl")  # NSL is not here.
    assert "| a step of training | advreg, ms | / minimal loop |\n" in printed
    (step,) = json.loads(file.read_text())["works"].values()
    # The loop does what advreg does.
    assert step["moved"]["advreg"] == pytest.approx(step["moved"]["loop"], rel=1e-3)


@pytest.mark.slow
def test_benchmarks_that_start_processes_run(tmp_path, load):
    for suite in load("nsl_suites").SUITES:
        (tmp_path / suite).parent.mkdir(exist_ok=True)
        (tmp_path / suite).write_text(f"{NSL}\n\ndef test_it():\n    nsl.lib\n")
    printed = run_apart("nsl_suites.py", "--source", str(tmp_path))
    assert printed.splitlines()[-1] == "| lib/distances_test.py | 1 | 0 | 0 |"
    assert "NSL is left out: nsl_cases.py needs" in run_apart("nsl_parity.py")
    size = 4 * mnist_network((28, 28, 1), 10).count_params()
    told = f"FGSM: {size} bytes of gradients, 3 all-reduces a step."
    assert run_apart("multi_worker.py").splitlines()[-1] == told


@pytest.mark.slow
def test_steps_are_timed(run):
    assert "\n| fgsm + awp | " in run("preset_cost.py")
    assert "\n| MatMul | " in run("step_profile.py")


@pytest.mark.every_backend(tensorflow="slow")
def test_sides_on_the_device_are_timed_and_do_the_same(run, load, tmp_path):
    file = tmp_path / "found.json"
    printed = run("gpu.py", "--json", str(file), "--dtype", "float32")
    backend = keras.backend.backend()
    assert printed.startswith(f"tiny on {load(f'gpu_{backend}').name()}, {backend}\n")
    assert "\n| FGSM, advreg | " in printed
    assert "\n| attack by PGD-2, advreg | " in printed
    moved = {}
    for row in json.loads(file.read_text())["rows"]:
        assert row["ms"]
        moved.setdefault(row["work"], {})[row["side"]] = row.get("moved")
    for work in ("FGSM", "PGD-2"):
        sides = {"advreg"} if backend == "tensorflow" else {"advreg", "by hand"}
        assert set(moved[work]) == sides
        assert min(moved[work].values()) == pytest.approx(max(moved[work].values()))


@pytest.mark.every_backend
def test_sides_for_which_there_is_no_time_are_left_out(run):
    printed = run("gpu.py", "--deadline", "0")
    assert "\nLeft out, no time: mixed_bfloat16, batch 8, PGD-2, advreg\n" in printed
    assert "| advreg" not in printed


@pytest.mark.every_backend
def test_a_side_that_is_out_of_memory_ends_alone(load, monkeypatch):
    gpu, row = load("gpu"), {}

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):  # This one is none of the device.
        gpu.unless_memory_is_short(row, fail)
    monkeypatch.setattr(gpu.device, "is_out_of_memory", lambda _: True)
    assert gpu.unless_memory_is_short(row, fail) is None
    assert row == {"left out": "out of memory"}
    assert gpu.unless_memory_is_short(row, lambda: 1) is None


@pytest.mark.slow
def test_texts_are_trained_on_and_attacked(run):
    assert "\n| virtual adversarial | " in run("text_cost.py")
    assert "\n| RandomSubstitution(max_changes=1, " in run("text_cost.py", "--attack")
    assert "\n| trec | cnn | fgsm | " in run("text_table.py")


@pytest.mark.slow
def test_networks_for_mnist_are_attacked(run, mnist_dir):
    assert "| a look at 16 images, ms | PGD | APGD | " in run("attack_profile.py")
    assert "\n| robust | 32 | " in run("robust_accuracy_cost.py")
    assert "\n| `fast` | 0.1 | 0 | " in run("robustness_table.py")


def test_the_tutorial_is_migrated(run, tmp_path):
    cell = {"cell_type": "code", "source": [NSL], "outputs": [], "metadata": {}}
    cells = [{**cell, "execution_count": None}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "file.ipynb").write_text(json.dumps(notebook))
    printed = run("nsl_tutorial.py", "--notebook", str(tmp_path / "file.ipynb"))
    assert "from advreg import nsl" in printed


@pytest.mark.slow
def test_figures_are_recorded_and_compared(load, tmp_path, capsys):
    same = load("same_figures")
    one, other = str(tmp_path / "one.npz"), str(tmp_path / "other.npz")
    same.record(one, quick=True)
    found = dict(np.load(one))
    assert same.compare(one, one) == 0
    assert f"\n0 of {len(found)} values differ" in capsys.readouterr().out
    found["fgsm: weight 0"] = found["fgsm: weight 0"] + 1e-3
    np.savez(other, **found)
    assert same.compare(one, other) == 1
    assert "fgsm: weight 0: differs by up to 0.001" in capsys.readouterr().out


def test_all_presets_are_timed_and_trained(load):
    presets = {name for name in vars(Presets) if not name.startswith("_")}
    timed = load("preset_cost").presets(2)
    assert {re.split("[-, ]", name)[0] for name in timed} == presets
    recipes = load("robustness_table").RECIPES
    assert set(recipes) == presets | {"plain", "nsl", "madry"}


def test_a_ratio_is_that_of_medians_and_its_spread_that_within_turns(load):
    # The machine slowed down tenfold, and both sides with it.
    own, other = [1.0, 2.0, 30.0], [1.0, 4.0, 10.0]
    assert load("turns").ratio(own, other) == (0.75, 0.5, 2.0)


def test_the_network_of_the_comparison_is_that_of_the_tutorial(load):
    def layers(model):
        for layer in model.layers:
            config = layer.get_config()
            yield type(layer), {k: v for k, v in config.items() if k != "name"}

    _, *own = layers(load("keras_side").build("mnist"))
    assert own == list(layers(mnist_network((28, 28, 1), 10)))


def test_the_pages_show_the_comparison_that_is_kept(run, load):
    works, kept = load("works"), json.loads(KEPT.read_text())
    labels = {work.name: set(work.jobs) for work in works.all_works(**works.FULL)}
    assert {name: set(r["values"]) for name, r in kept["works"].items()} == labels
    printed = run("compare.py", "--json", str(KEPT), "--print").strip()
    summary, *parts = printed.split("\n\n")
    assert f"\n{summary}\n" in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "costs.md").read_text()
    assert all(f"\n\n{part}\n\n" in page for part in parts)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert set(rows) <= set(printed.splitlines())  # And no others.
    assert "stronger attack" not in page  # Ratios are those of attacks as strong.
    profile = (BENCHMARKS / "PROFILE.md").read_text()
    missed = re.findall(r"^\| `(\S+/.*)` \| (.*) \| .* \| (.*) \|$", profile, re.M)
    for name, peer, told in missed:
        assert f"{kept['works'][name]['ratios'][peer][1]:.2f}" == told


def test_mutations_are_of_files_that_there_are():
    config = pytest.importorskip("cosmic_ray.config")
    found = config.load_config(str(BENCHMARKS / "mutation.toml"))
    names = [found["module-path"], *re.findall(r"tests/\S+", found["test-command"])]
    assert all((ROOT / name).is_file() for name in names)


@pytest.mark.slow
def test_a_network_is_measured_on_the_backend(run, tmp_path):
    path = tmp_path / "network.npz"
    assert f"wrote {path}" in run("backends.py", "train", str(path))
    told = run("backends.py", "attack", str(path))
    assert re.search(r"tensorflow +softmax +PGD-2 +[01]\.\d{4}", told)
