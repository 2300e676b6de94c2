"""Neural Structured Learning's own tests, run on advreg's `nsl`.

Takes the adversarial suites of NSL 1.4.0 from its wheel, which pip downloads, or from
`--source`, moves temporary copies to advreg as `advreg migrate` does, which changes no
more than their imports, and runs each by pytest. What they say in the words of Keras 2
fails on Keras 3 before it reaches advreg: such suites run once more with these words
rewritten, and nothing else. Prints how many tests passed, and each that failed with the
reason that is known for it. The exit status is 1 if another one fails, or if one of
those passes.

    python benchmarks/nsl_suites.py [--source DIR]

It needs pytest, and what `python -m pip install -e ".[migrate]"` brings.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from xml.etree import ElementTree

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from advreg.migrate import migrate_python
from advreg.tables import text_table

WHEEL = "neural-structured-learning==1.4.0"
PACKAGE = "neural_structured_learning"
SUITES = (
    "keras/adversarial_regularization_test.py",
    "keras/adversarial_regularization_multi_device_test.py",
    "lib/adversarial_neighbor_test.py",
    "lib/utils_test.py",
    "lib/regularizer_test.py",
    "lib/distances_test.py",
)
# What the suites say in Keras 2, and how Keras 3 has it.
REWRITINGS = (
    # A model takes no `dynamic`, which asked for eager code.
    ("__init__(name=name, dynamic=dynamic)", "__init__(name=name)"),
    # A saved model is a file.
    ("'saved_model')", "'saved_model.keras')"),
    # A name that `tf.keras.losses` has lost, but not `keras.losses`.
    ("tf.keras.losses.mean_squared_error(", "tf.keras.losses.MSE("),
)

DYNAMIC = "Keras 3: a model takes no `dynamic`"
FILES = "Keras 3: a saved model is a .keras file"
RENAMED = "Keras 3: tf.keras.losses has no mean_squared_error, only MSE"
# Reasons that the rewriting takes away.
WORDS = (DYNAMIC, FILES, RENAMED)
UNREGISTERED = "Keras 3: a .keras file of a class that is not registered does not load"
FEATURE_COLUMNS = "Keras 3: there is no layer for feature columns"
GRAPHS = "graph regularisation is no part of advreg"
PROJECTION = "it asserts that the L1 projection is missing; advreg has it"

REASONS = {
    DYNAMIC: {
        "AdversarialLossTest": (
            "test_given_labeled_loss_subclassed",
            "test_given_predictions_subclassed",
            "test_normal_case_subclassed",
        ),
        "AdversarialRegularizationTest": (
            "test_perturb_on_batch_pgd_subclassed",
            "test_perturb_on_batch_subclassed",
            "test_predict_by_adv_model_with_labels_subclassed",
            "test_predict_by_base_model_subclassed",
            "test_train_fgsm_subclassed",
            "test_train_fgsm_with_sample_weights_subclassed",
            "test_train_pgd_subclassed",
            "test_train_with_distribution_strategy_dynamic",
            "test_train_with_distribution_strategy_subclassed",
        ),
    },
    FILES: {
        "AdversarialRegularizationTest": (
            "test_adv_model_save_functional",
            "test_adv_model_save_sequential",
        ),
    },
    RENAMED: {"RegularizerTest": ("testAdvRegularizer",)},
    UNREGISTERED: {
        "AdversarialRegularizationTest": ("test_adv_model_save_subclassed",),
    },
    FEATURE_COLUMNS: {
        "AdversarialRegularizationTest": ("test_train_with_feature_column_input",),
    },
    PROJECTION: {"UtilsTest": ("testProjectToBallL1",)},
    GRAPHS: {
        "UtilsTest": (
            "testInvalidRepeatTimes",
            "testReplicateEmbeddingsWithConstant",
            "testReplicateEmbeddingsWithDynamicBatchSize",
            "testReplicateEmbeddingsWithIndexArray",
        ),
        "UnpackNeighborFeaturesTest": (
            "testBatchedSampleAndNeighborFeatureExtraction",
            "testDynamicBatchSizeAndFeatureShape",
            "testEmptyFeatures",
            "testExtraNeighborFeaturesIgnored",
            "testInvalidNeighborWeightRank",
            "testInvalidRank",
            "testMissingNeighborFeature",
            "testMissingNeighborWeight",
            "testNeighborFeatureShapeIncompatibility",
            "testNeighborWeightShapeIncompatibility",
            "testSampleAndNeighborFeatureShapeIncompatibility",
            "testSampleFeatureOnlyExtractionWithNeighbors",
            "testSampleFeatureOnlyExtractionWithNoNeighbors",
            "testSparseFeature",
        ),
        "StripNeighborFeaturesTest": (
            "testBatchedFeatures",
            "testEmptyFeatures",
            "testFeaturesWithDynamicBatchSizeAndFeatureShape",
            "testNoNeighborFeatures",
        ),
    },
}
EXPECTED = {
    f"{case}.{test}": reason
    for reason, cases in REASONS.items()
    for case, tests in cases.items()
    for test in tests
}


def read_wheel(folder):
    """The texts of the suites in NSL's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return {suite: file.read(f"{PACKAGE}/{suite}").decode() for suite in SUITES}


def read_source(source):
    """The texts of the suites in a checkout, or in a wheel that is unpacked."""
    package = source / PACKAGE if (source / PACKAGE).is_dir() else source
    missing = [suite for suite in SUITES if not (package / suite).is_file()]
    if missing:
        sys.exit(
            f"`--source` must be a folder with {PACKAGE} in it. Received: {source}, "
            f"which lacks {', '.join(missing)}"
        )
    return {suite: (package / suite).read_text("utf-8") for suite in SUITES}


def run(text, name, folder):
    """Runs a suite in a process of its own, and returns what became of each test."""
    folder.mkdir(parents=True)
    (folder / name).write_text(text, "utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n")
    results = folder / "results.xml"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider"),
            *("-c", str(folder / "pytest.ini"), f"--junitxml={results}"),
            str(folder / name),
        ],
        capture_output=True,
        text=True,
    )
    if not results.exists():
        sys.exit(f"{name} did not run:\n{process.stdout}{process.stderr}")
    return read_results(results)


def read_results(path):
    """For each test, `None` if it passed, and what was said where it did not."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname').split('.')[-1]}.{case.get('name')}"
        told = [child for child in case if child.tag in ("failure", "error", "skipped")]
        found[name] = (told[0].tag, told[0].get("message", "")) if told else None
    return found


def judge(found, expected):
    """Counts the results of a suite, and tells of each that is no success.

    Returns the numbers passed, failed and skipped; the failures with their known
    reasons; and what should not be.
    """
    counts, known, wrong = {"passed": 0, "failed": 0, "skipped": 0}, [], []
    for test, result in found.items():
        if result is None:
            counts["passed"] += 1
            if test in expected:
                wrong.append(f"{test} passes. Expected: {expected[test]}")
        elif result[0] == "skipped":
            counts["skipped"] += 1
        else:
            counts["failed"] += 1
            if test in expected:
                known.append(f"{test}: {expected[test]}")
            else:
                wrong.append(f"{test} fails: {result[1].strip()}")
    if not counts["passed"] and not known:
        wrong.append("no test has run")
    return counts, known, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=pathlib.Path, help="a checkout of NSL, or its unpacked wheel"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source = arguments.source
        suites = read_wheel(folder) if source is None else read_source(source)
        sys.exit(report(suites, folder))


def report(suites, folder):
    """Runs all suites, prints what became of them, and returns the exit status."""
    mended = {test: why for test, why in EXPECTED.items() if why not in WORDS}
    rows, known, wrong = [], [], []
    for suite, text in suites.items():
        name = pathlib.PurePath(suite).name
        swapped = migrate_python(text).after
        rewritten = swapped
        for of_keras_2, of_keras_3 in REWRITINGS:
            rewritten = rewritten.replace(of_keras_2, of_keras_3)
        runs = [(suite, swapped, EXPECTED)]
        if rewritten != swapped:
            runs.append(("  in the words of Keras 3", rewritten, mended))
        for label, words, expected in runs:
            found = run(words, name, folder / f"run{len(rows)}")
            counts, explained, unexplained = judge(found, expected)
            rows.append((label, *map(str, counts.values())))
            known += [line for line in explained if line not in known]
            wrong += unexplained
    print(text_table(("suites of NSL 1.4.0", "passed", "failed", "skipped"), rows))
    if known:
        print("\nFailed, as is known:")
    for line in known:
        print(f"  {line}")
    if wrong:
        print("\nNot as expected:")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
