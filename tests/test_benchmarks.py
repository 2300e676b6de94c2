import importlib.util
import pathlib
import subprocess
import sys

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
