import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_step_cost_prints_a_row_for_each_attack():
    # That it runs; what it measures is nothing that a test could hold it to.
    script = str(BENCHMARKS / "step_cost.py")
    result = subprocess.run(
        [sys.executable, script, "--turns", "1", "--batch", "2"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split() == [
        *("attack", "batch", "plain", "ms", "loop", "ms", "advreg", "ms"),
        *("advreg/plain", "advreg/loop"),
    ]
    assert [row.split()[:2] for row in rows] == [["FGSM", "2"], ["PGD-10", "2"]]
    assert all(float(cell) > 0 for row in rows for cell in row.split()[2:])
