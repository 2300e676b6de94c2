"""Computes the cases of `nsl_cases`, for `nsl_parity.py`, and writes the arrays."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import re

import keras
import numpy as np
import tensorflow as tf
from nsl_cases import arithmetic, defects, names, perturbing, training
from nsl_cases.common import nsl, use

GROUPS = names.GROUPS | perturbing.GROUPS | training.GROUPS | arithmetic.GROUPS


def first_line(error):
    """What an error says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An error from inside a `tf.function` begins with where it was.
    told = [line for line in lines if type(error).__name__ in line] or lines
    text = re.sub(r"{{.*?}} ", "", told[-1] if told else "")
    return f"{type(error).__name__}: {text.split('Error: ')[-1]}"


def measure(function):
    """Calls a function: its arrays by name, or its error under the name `error`."""
    try:
        found = function()
        if not isinstance(found, dict):
            found = {"": found}
        return {name: np.asarray(value) for name, value in leaves_of(found)}
    except Exception as error:
        return {"error": np.array(first_line(error))}


def leaves_of(value, prefix=""):
    """The leaves of nested dictionaries and lists, with the path to each."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, child in value.items():
        yield from leaves_of(child, f"{prefix}/{name}" if prefix else str(name))


def collect(only):
    """Runs the cases; keys are the kind, the group, the case and the part."""
    keras.utils.set_random_seed(0)
    found = {("library", nsl.__name__, "", ""): np.array(tf.__version__)}
    for name, (dtype, cases) in GROUPS.items():
        if only in name:
            use(dtype)
            for case, function in cases():
                for part, value in measure(function).items():
                    found["case", name, case, part] = value
    use("float32")
    if only in "random starts":
        for norm, radii in measure(arithmetic.random_starts).items():
            found["start", norm, "", ""] = radii
    for name, (expected, function) in defects.DEFECTS.items():
        if only in "defects":
            for part, value in measure(function).items():
                found["defect", name, "", part] = value
            found["defect", name, "", "expected"] = np.array(expected())
    return {"\t".join(key): value for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the .npz file to write")
    parser.add_argument("--only", default="", help="a part of the names of groups")
    arguments = parser.parse_args()
    with open(arguments.output, "wb") as file:
        np.savez(file, **collect(arguments.only))


if __name__ == "__main__":
    main()
