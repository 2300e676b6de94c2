"""Compares what advreg's `nsl` computes to what Neural Structured Learning 1.4.0 does.

Runs the cases of `nsl_cases.py` on both sides: perturbations, losses, and steps of
training with their logs. Prints for each group of cases the largest difference of any
value, which may be 1e-6. The exit status is 1 if one is larger. NSL runs in an
environment of its own, which `uv` makes.

    python benchmarks/nsl_parity.py [--quick]
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from compare import FOLDER, PeerError, command
from turns import table

TOLERANCE = 1e-6
SCRIPT = "nsl_cases.py"


def arrays(words, variables, options):
    """Runs the cases, and returns the arrays by group, case and part."""
    # On the CPU: a GPU's own ways of rounding are no difference of the libraries.
    variables |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "cases.npz")
        subprocess.run([*words, str(path), *options], env=variables, check=True)
        with np.load(path) as file:
            return {tuple(key.split("\t")): file[key] for key in file.files}


def distance(theirs, ours):
    """Returns the largest difference, infinite if arrays are not of one kind."""
    if ours is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        return np.inf
    return np.max(np.abs(theirs.astype("f8") - ours.astype("f8")), initial=0.0)


def report(theirs, ours):
    """Prints the table, and returns whether all is equal.

    Logs that advreg has besides are no difference.
    """
    cases, largest, wrong = {}, {}, []
    for (group, case, part), value in theirs.items():
        difference = distance(value, ours.get((group, case, part)))
        cases.setdefault(group, set()).add(case)
        largest[group] = np.maximum(largest.get(group, 0.0), difference)
        if not difference <= TOLERANCE:  # NaN is not.
            wrong.append(f"{group}: {case}: {part} differs by {difference:.1e}")
    rows = [[group, len(cases[group]), f"{largest[group]:.1e}"] for group in cases]
    rows.append(["all", sum(map(len, cases.values())), ""])
    print(table(["cases on both", "number", "largest difference"], rows))
    print(*wrong[:20], sep="\n")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the cases")
    options = ["--quick"] if parser.parse_args().quick else []
    here = [sys.executable, str(FOLDER / SCRIPT)]
    ours = arrays(here, dict(os.environ), options)
    try:
        theirs = arrays(*command(SCRIPT), options)
    except PeerError as error:
        print(f"NSL is left out: {error}")
        sys.exit(0 if options else 1)
    sys.exit(0 if report(theirs, ours) else 1)


if __name__ == "__main__":
    main()
