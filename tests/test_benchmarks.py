import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


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
def test_step_cost_prints_a_row_for_each_attack():
    head, *rows = rows_of("step_cost.py", "--batch", "2")
    assert head == [
        *("attack", "batch", "plain", "ms", "loop", "ms", "advreg", "ms"),
        *("advreg/plain", "advreg/loop"),
    ]
    assert [row[:2] for row in rows] == [["FGSM", "2"], ["PGD-10", "2"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


@pytest.mark.slow
def test_inference_cost_prints_a_row_for_each_method():
    head, *rows = rows_of("inference_cost.py", "--batch", "8", "--images", "64")
    assert head == ["method", "batch", "base", "ms", "advreg", "ms", "ratio"]
    assert [row[:2] for row in rows] == [["evaluate", "8"], ["predict", "8"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


@pytest.mark.slow
def test_attack_speed_prints_a_row_for_each_peer(mnist_dir, monkeypatch):
    pytest.importorskip("foolbox")
    # Not ART, whose import warns: the benchmark imports it for itself.
    if importlib.util.find_spec("art") is None:
        pytest.skip("ART is not installed")
    monkeypatch.setenv("TFDS_DATA_DIR", str(mnist_dir))
    head, *rows = rows_of("attack_speed.py", "--images", "8", "--epochs", "0")
    assert head == [
        *("attack", "epsilon", "batch", "peer", "advreg", "s", "peer", "s"),
        *("advreg", "acc", "peer", "acc", "advreg/peer", "range"),
    ]
    assert [row[:4] for row in rows] == [
        ["PGD-20", "0.1", "250", "ART"],
        ["PGD-20", "0.1", "250", "Foolbox"],
        ["PGD-20", "0.3", "250", "ART"],
        ["PGD-20", "0.3", "250", "Foolbox"],
        ["PGD-20", "0.1", "32", "ART"],
    ]
    seconds_and_ratio = [(row[4], row[5], row[8]) for row in rows]
    assert all(float(cell) > 0 for cells in seconds_and_ratio for cell in cells)


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
