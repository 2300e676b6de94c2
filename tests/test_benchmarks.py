import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from advreg.attacks import PGD, AutoAttack
from advreg.demo import mnist_network
from advreg.presets import Presets

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PRESETS = {name for name in vars(Presets) if not name.startswith("_")}


def rows_of(script, *options):
    """Runs a benchmark, and returns the words of each line that it prints."""
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--turns", "1", *options],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


def script(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# That they run; what they measure is nothing that a test could hold them to.


@pytest.mark.slow
def test_mutation_counts_its_mutants():
    pytest.importorskip("cosmic_ray")
    module = BENCHMARKS.parent / "advreg" / "config.py"
    before = module.read_bytes()
    script = str(BENCHMARKS / "mutation.py")
    result = subprocess.run(
        [sys.executable, script, "config", "--sample", "2"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    name, mutants, killed, survived = result.stdout.splitlines()[-1].split()
    assert (name, mutants) == ("config", "2")
    assert int(killed) + int(survived) == 2
    assert module.read_bytes() == before


@pytest.mark.slow
def test_robust_accuracy_cost_prints_a_row_for_each_network(mnist_dir):
    options = ("--batch", "32", "--images", "64", "--training-images", "256")
    head, *rows = rows_of("robust_accuracy_cost.py", *options)
    assert head == [
        *("network", "batch", "standing", "passes", "ms", "advreg", "ms", "ratio")
    ]
    assert [row[:2] for row in rows] == [["plain", "32"], ["robust", "32"]]
    assert all(float(cell) > 0 for row in rows for cell in row[3:])
    assert all(0 <= float(row[2]) <= 1 for row in rows)


@pytest.mark.slow
def test_nsl_parity_worker_computes_its_cases(tmp_path):
    output = tmp_path / "cases.npz"
    worker = str(BENCHMARKS / "nsl_parity_worker.py")
    result = subprocess.run(
        [sys.executable, worker, str(output), "--only", "lib."],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = script("nsl_parity").load(output)
    assert ("library", "advreg.nsl", "", "") in found
    assert len({group for kind, group, _, _ in found if kind == "case"}) == 10
    assert not [(key, str(value)) for key, value in found.items() if "error" in key]


def case(part, value):
    return {("case", "group", "name", part): np.asarray(value)}


@pytest.mark.parametrize("ours", [[1.0, 2.0], [1.0, 2.0 + 5e-7]])
def test_nsl_parity_takes_equal_values_for_equal(ours):
    extra = case("more of advreg", 1.0)
    theirs = case("x", [1.0, 2.0])
    rows, found = script("nsl_parity").compare(theirs, {**case("x", ours), **extra})
    assert [(row[0], row[1], row[3]) for row in rows] == [("group", "1", "equal")]
    assert found == []


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (case("x", [1.0, 2.0]), case("x", [1.0, 2.0 + 2e-6]), "2.0e-06"),
        (case("x", [1.0]), case("x", [np.nan]), "nan"),
        (case("x", [1.0]), case("x", 1.0), "shape ()"),
        (case("x", [1.0]), case("x", np.float32([1.0])), "float32"),
        (case("x", [1.0]), {}, "nothing in advreg"),
        (case("x", "l1"), case("x", "l2"), "l1 in NSL, l2 in advreg"),
        (case("x", [1.0]), case("error", "TypeError: no"), "advreg: TypeError: no"),
        (case("error", "no"), case("error", "no"), "NSL: no"),
    ],
)
def test_nsl_parity_finds_differences(theirs, ours, told):
    rows, found = script("nsl_parity").compare(theirs, ours)
    assert rows[0][-1] == "DIFFERENT"
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [(5.0, 1.0, "mended"), (1.0, 1.0, "NOT MENDED"), (5.0, 5.0, "NOT MENDED")],
)
def test_nsl_parity_tells_what_is_mended(theirs, ours, told):
    def side(value):
        parts = {"": value, "expected": 1.0, "tolerance": 1e-6}
        return {("defect", "clip", "", name): np.array(v) for name, v in parts.items()}

    ((*_, verdict, _),) = script("nsl_parity").defects(side(theirs), side(ours))
    assert verdict == told


@pytest.mark.parametrize(
    ("power", "told"), [(1 / 7, "as it should be"), (1 / 6, "WRONG")]
)
def test_nsl_parity_knows_the_law_of_random_starts(power, told):
    radii = (np.arange(4000) + 0.5) / 4000
    side = {("start", "l2", "", ""): radii**power}
    ((*_, verdict),) = script("nsl_parity").laws(side, side)
    assert verdict == told


@pytest.mark.slow
def test_preset_cost_prints_a_row_for_each_preset(monkeypatch, capsys):
    cost = script("preset_cost")
    configs = cost.presets(2)
    assert {re.split("[-, ]", name)[0] for name in configs} == PRESETS
    some = {name: configs[name] for name in ("fgsm", "fgsm + awp")}
    monkeypatch.setattr(cost, "presets", lambda iterations: some)
    monkeypatch.setattr(sys, "argv", ["", "--turns", "1", "--batch", "2"])
    cost.main()
    head, _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["preset", "ms", "/", "plain", "Keras", "/", "without", "awp"]
    assert [row[0] for row in rows] == ["plain", "fgsm", "fgsm"]
    assert all(float(cell) > 0 for row in rows for cell in row[-2:])


@pytest.mark.slow
def test_the_profile_of_a_step_adds_up():
    options = ("--network", "tiny", "--batch", "4")
    lines = rows_of("step_profile.py", *options)
    assert lines[0] == [
        *("tiny/fgsm/4,", "ms", "plain", "loop", "advreg", "advreg", "−", "loop")
    ]
    cells = [[float(cell) for cell in line[-4:]] for line in lines[2:9]]
    for step, *parts in zip(*(row[:3] for row in cells), strict=True):
        assert step > 0
        assert sum(parts) == pytest.approx(step, abs=0.005)  # Roundings of six rows.
    update, backward, forward = cells[1:4]
    assert min(*update[:3], *backward[:3], *forward[:3]) > 0
    for *_, loop, advreg, difference in cells:
        assert advreg - loop == pytest.approx(difference, abs=0.0016)
    # The kinds of operations are those of the first table, put together otherwise.
    kinds = [[float(cell) for cell in line[-4:]] for line in lines[12:] if line]
    sums = zip(zip(*kinds, strict=True), zip(*cells[1:6], strict=True), strict=True)
    for kind, purpose in sums:
        assert sum(kind) == pytest.approx(sum(purpose), abs=0.006 + 0.0005 * len(kinds))


@pytest.mark.slow
def test_the_profile_of_an_attack_adds_up():
    options = ("--images", "32", "--batch", "16", "--epochs", "0")
    lines = rows_of("attack_profile.py", *options)
    assert " ".join(lines[0]) == "a look at 16 images, ms PGD APGD Square"
    cells = [[float(cell) for cell in line[-3:]] for line in lines[2:7]]
    for *parts, total in zip(*cells, strict=True):
        assert sum(parts) == pytest.approx(total, abs=0.03)
    # Each is a difference of two profiles, which a pause of the machine makes negative.
    first, rest, forward, _, _ = cells
    assert 0.0 not in (*first[:2], *rest[:2], *forward)
    assert first[2] == rest[2] == 0.0  # Square needs no gradient.
    for line in (lines[9], lines[12]):
        left = [float(cell) for cell in line]
        assert left[0] == 1.0
        assert len(left) == 20
        assert left == sorted(left, reverse=True)
    assert " ".join(lines[14]) == "AutoAttack, ε 0.1, 32 images batches s"
    name, batches, seconds = lines[16]
    assert (name, batches) == ("APGD", "1")
    assert float(seconds) > 0


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table of robustness, of networks that are hardly trained."""
    table = script("robustness_table")
    monkeypatch.setattr(table, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(table, "NETWORKS", tmp_path / "networks")
    monkeypatch.setattr(table, "TRAINING", 256)
    monkeypatch.setattr(table, "TESTED", 20)
    for name, recipe in table.RECIPES.items():
        short = dataclasses.replace(recipe, epochs=1)
        monkeypatch.setitem(table.RECIPES, name, short)
    return table


@pytest.fixture
def run(table, monkeypatch):
    """Runs the script on some rows, and returns the words of the table."""

    def run(*options):
        arguments = ["robustness_table.py", "--quiet", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        table.main()
        return [line.split() for line in table.table(table.read()).splitlines()]

    return run


def test_the_table_of_robustness_has_all_presets_radii_and_seeds(table):
    rows = table.rows_wanted(None, None)
    assert len(rows) == len(set(rows))
    counts = collections.Counter((row.preset, row.epsilon) for row in rows)
    names = {"plain", "nsl", "madry", *PRESETS}
    assert set(counts) == set(itertools.product(names, (0.1, 0.2, 0.3)))
    for (name, _), count in counts.items():
        assert count == (3 if name in ("fgsm", "fast", "n_fgsm") else 1)
    some = table.rows_wanted(["fast@0.3", "nsl"], [5])
    assert [(row.preset, row.epsilon, row.seed) for row in some] == [
        *(("nsl", 0.1, 5), ("nsl", 0.2, 5), ("nsl", 0.3, 5), ("fast", 0.3, 5))
    ]
    # NSL's recipe knows no radius: it is one network.
    assert len({row.network for row in some}) == 2


def test_radii_of_the_table_grow_over_half_of_the_training(table):
    for recipe in table.RECIPES.values():
        step = recipe.config(0.3, 1000).adv_neighbor_config.adv_step_size
        if not recipe.fixed:
            assert float(step(0)) == 0.0
            assert float(step(250)) == pytest.approx(float(step(1000)) / 2)
            assert float(step(499)) < float(step(500)) == float(step(1000))


def test_the_table_keeps_what_several_runs_find(table):
    rows = [
        {"preset": "fast", "epsilon": 0.3, "seed": 0, "clean": 0.5, "seconds": 60.0},
        {"preset": "nsl", "epsilon": 0.3, "seed": 0, "clean": 0.5, "seconds": 60.0},
        {"preset": "fast", "epsilon": 0.3, "seed": 0, "ART AutoAttack": 0.25},
    ]
    for row in rows:
        table.keep(row)
    assert table.read() == [rows[1], {**rows[0], **rows[2]}]
    assert [line.split() for line in table.table(table.read()).splitlines()[2:]] == [
        ["nsl", "0.3", "0", "50.0", "1.0"],
        ["fast", "0.3", "0", "50.0", "25.0", "1.0"],
    ]


@pytest.mark.slow
def test_the_table_goes_on_where_it_stopped(table, run, mnist_dir, monkeypatch):
    def attacks(radius):
        weak = AutoAttack(radius, iterations=1, queries=1, **table.RANGE)
        return [PGD(radius, iterations=40, restarts=5, **table.RANGE), weak]

    monkeypatch.setattr(table, "attacks_of_ours", attacks)
    head, _, *rows = run("--only", "fast@0.1", "--seeds", "0", "1")
    assert head == [
        *("preset", "epsilon", "seed", "clean", "PGD-40", "AutoAttack", "minutes")
    ]
    assert [row[:3] for row in rows] == [["fast", "0.1", str(i)] for i in range(2)]
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[3:6])
    # What is there is neither trained nor measured again.
    kept = table.ROWS.read_bytes()
    monkeypatch.setattr(table, "train", None)
    with monkeypatch.context() as patch:
        patch.setattr(table, "measure", None)
        assert run("--only", "fast@0.1", "--seeds", "0", "1")[2:] == rows
        assert run("--print")[2:] == rows
    assert table.ROWS.read_bytes() == kept
    # A network is kept, and the same when a lost row is measured again.
    table.ROWS.unlink()
    assert run("--only", "fast@0.1", "--seeds", "0", "1")[2:] == rows


@pytest.mark.slow
def test_the_table_is_judged_by_art(table, run, mnist_dir, monkeypatch):
    pytest.importorskip("art")
    ours, judges = table.attacks_of_ours(0.1), table.attacks_of_art(0.1)
    assert [attack.epsilon for attack in ours] == [0.1, 0.1]
    assert [attack._kwargs["eps"] for attack in judges] == [0.1, 0.1]
    monkeypatch.setattr(table, "TESTED", 5)
    monkeypatch.setattr(table, "attacks_of_ours", lambda radius: ours[:1])
    monkeypatch.setattr(table, "attacks_of_art", lambda radius: judges[:1])
    run("--only", "plain@0.1")
    head, _, row = run("--judge", "--only", "plain@0.1")
    assert head[3:] == ["clean", "PGD-40", "ART's", "PGD-40", "minutes"]
    assert row[4] == row[5]


# A suite that fails in the words of Keras 2 alone, and one with other results.
WORDS = """
def test_words():
    assert "__init__(name=name, dynamic=dynamic)" == "__init__(name=name)"
"""
RESULTS = """
def test_passes():
    pass

def test_fails():
    assert 1 == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expected", "status"),
    [
        (("test_words", "test_fails"), 0),
        (("test_words",), 1),
        (("test_words", "test_fails", "test_passes"), 1),
    ],
)
def test_nsl_suites_know_which_failures_to_expect(expected, status, tmp_path, capsys):
    suites = script("nsl_suites")
    reasons = {"test_words": suites.DYNAMIC, "test_fails": "it may"}
    suites.EXPECTED = {
        f"some_test.{test}": reasons.get(test, "it must") for test in expected
    }
    texts = {"keras/some_test.py": WORDS, "lib/some_test.py": RESULTS}
    assert suites.report(texts, tmp_path) == status
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["passed", "failed", "skipped"]
    assert [line.split()[-3:] for line in lines[:3]] == [
        ["0", "1", "0"],
        ["1", "0", "0"],
        ["1", "1", "0"],
    ]
    assert ("Not as expected:" in lines) == bool(status)


def test_the_cost_model_of_workers():
    step_time = script("multi_worker").step_time
    arguments = {"collectives": 5, "size": 8e6, "latency": 1e-3, "bandwidth": 1e9}
    assert step_time(0.1, 2, **arguments) == pytest.approx(0.1 + 0.005 + 0.008)
    assert step_time(0.1, 4, **arguments) == pytest.approx(0.1 + 0.005 + 0.012)


@pytest.mark.slow
def test_multi_worker_prints_a_row_for_each_attack(tmp_path):
    options = ("--batch", "4", "--attacks", "fgsm", "--markdown")
    lines = rows_of("multi_worker.py", *options, "--json", str(tmp_path / "found.json"))
    assert lines[2][1:4:2] == ["FGSM", "2"]
    [row] = json.loads((tmp_path / "found.json").read_text())
    weights = sum(w.size for w in mnist_network((28, 28, 1), 10).get_weights())
    assert row["bytes"] == 4 * weights
    assert row["collectives"] == 3  # Gradients, sizes, logs.
    assert min(row["one"][0], row["latency"], row["model"]) > 0


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_others_and_says_why():
    multi_worker = script("multi_worker")
    with contextlib.ExitStack() as stack:
        group = multi_worker.Group(2, stack)
        with pytest.raises(SystemExit, match="no attribute 'no_such_task'"):
            group.ask("no_such_task")
    assert all(process.poll() is not None for process, _ in group.members)
