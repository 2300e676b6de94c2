"""Python in a process of its own, which finds advreg and these helpers."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]


def start(*arguments, environment=os.environ, **options):
    """Starts Python with these arguments. Options are those of `subprocess.Popen`."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**environment, "PYTHONPATH": path},
        **options,
    )
