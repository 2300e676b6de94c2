"""Runs Neural Structured Learning's own tests on advreg's `nsl`.

Takes the adversarial suites of NSL 1.4.0 from its wheel, which pip downloads, or from
`--source`. Moves copies to advreg as `advreg migrate` does, which changes their imports
alone, and runs each by pytest. What they say in the words of Keras 2 fails on Keras 3
before it reaches advreg: such suites run once more with these words rewritten. Prints
how many tests passed, and why the others failed. The exit status is 1 if a test fails
without a known reason, or passes in spite of one.

    python benchmarks/nsl_suites.py [--source DIR] [--quick]

It needs pytest, and what `python -m pip install -e ".[migrate]"` brings.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from xml.etree import ElementTree

from turns import table

from advreg.nsl.migrate import migrate_python

WHEEL, PACKAGE = "neural-structured-learning==1.4.0", "neural_structured_learning"
SUITES = (
    "keras/adversarial_regularization_test.py",
    "keras/adversarial_regularization_multi_device_test.py",
    "lib/adversarial_neighbor_test.py",
    "lib/utils_test.py",
    "lib/regularizer_test.py",
    "lib/distances_test.py",
)
# What the suites say in Keras 2, and how Keras 3 has it.
REWRITINGS = {
    "__init__(name=name, dynamic=dynamic)": "__init__(name=name)",
    "'saved_model')": "'saved_model.keras')",
    "tf.keras.losses.mean_squared_error(": "tf.keras.losses.MSE(",
}
# Why tests fail, by their names: the first that fits. The rewriting takes some away.
UNREGISTERED = "Keras 3 does not load a file of a class that is not registered"
GRAPHS = "graph regularisation is no part of advreg"
REASONS = {
    r".*save_subclassed": UNREGISTERED,
    r".*feature_column_input": "Keras 3 has no feature columns",
    r".*ProjectToBallL1": "it asserts that the L1 projection is missing",
    r"\w*NeighborFeaturesTest.*|.*testReplicate.*|.*testInvalidRepeatTimes": GRAPHS,
}
OF_WORDS = {
    r".*_(subclassed|dynamic)": "Keras 3: a model takes no `dynamic`",
    r".*save_(functional|sequential)": "Keras 3: a saved model is a .keras file",
    r".*testAdvRegularizer": "Keras 3: the loss mean_squared_error is called MSE",
}


def texts_of(source, folder):
    """Returns the texts of the suites, of a folder or of NSL's wheel."""
    if source is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        source = folder / PACKAGE
    return {suite: (source / suite).read_text("utf-8") for suite in SUITES}


def run(text, name, folder):
    """Runs a suite in a process of its own: what became of each test."""
    folder.mkdir()
    (folder / name).write_text(text, "utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "--quiet", "--junitxml=found.xml", name]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not (folder / "found.xml").exists():
        sys.exit(f"{name} did not run:\n{told.stdout}{told.stderr}")
    for case in ElementTree.parse(folder / "found.xml").iter("testcase"):
        tags = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname').split('.')[-1]}.{case.get('name')}"
        yield name, "skipped" if "skipped" in tags else "failed" if tags else "passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=pathlib.Path, help="NSL's unpacked package")
    parser.add_argument("--quick", action="store_true", help="the last suite alone")
    options = parser.parse_args()
    rows, told, wrong = [], {}, False
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = texts_of(options.source, folder)
        for suite in SUITES[-1:] if options.quick else SUITES:
            swapped = rewritten = migrate_python(texts[suite]).after
            for words, new in REWRITINGS.items():
                rewritten = rewritten.replace(words, new)
            runs = {suite: (swapped, {**REASONS, **OF_WORDS})}
            if rewritten != swapped:
                runs[f"{suite}, rewritten"] = rewritten, REASONS
            for label, (text, reasons) in runs.items():
                name = pathlib.Path(suite).name
                found = dict(run(text, name, folder / f"run{len(rows)}"))
                words = ("passed", "failed", "skipped")
                counts = [list(found.values()).count(word) for word in words]
                rows.append([label, *counts])
                for test, word in found.items():
                    why = [r for n, r in reasons.items() if re.fullmatch(n, test)]
                    if word == "failed" or (word == "passed" and why):
                        told[f"{test} {word}: {(why or ['not expected'])[0]}"] = None
                        wrong |= (word == "failed") != bool(why)
    print(table(["suite of NSL 1.4.0", *words], rows), *told, sep="\n")
    sys.exit(1 if wrong or not sum(row[1] for row in rows) else 0)


if __name__ == "__main__":
    main()
