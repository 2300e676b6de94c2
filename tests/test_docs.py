"""The tests that the documentation names are there; all cases of the grid are named."""

import ast
import dataclasses
import importlib
import json
import pathlib
import re

import keras
import numpy as np
import pytest
from helpers.cases import CASES
from helpers.models import classifier
from helpers.nsl_names import NAMES

import advreg
from advreg import attacks
from advreg.config.presets import Presets
from advreg.evaluation import diagnostics
from advreg.objectives import OBJECTIVES

TESTS = pathlib.Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "keras.md").read_text()
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")]


def functions_of(module):
    (path,) = TESTS.rglob(f"{module}.py")
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS[2:], ids=lambda row: row[1].strip()[:40])
def test_each_row_is_proved_by_tests_that_exist(row):
    *_, mark, proof = (cell.strip() for cell in row)
    assert mark in {"✓", "—"}
    names = re.findall(r"`((?:test_|#)[^`]+)`", proof)
    assert names
    for name in names:
        if name.startswith("#"):
            assert name[1:] in CASES
        else:
            module, function = name.split(".")
            assert function in functions_of(module)


BACKENDS = (TESTS.parent / "docs" / "backends.md").read_text()
PROMISES = [
    line.split("|")[1:-1]
    for line in BACKENDS.splitlines()
    if line.startswith("| ") and "`test_" in line
]


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0].strip()[:40])
def test_what_works_on_a_backend_is_proved_on_it(row):
    *_, proof = row
    for name in re.findall(r"`(test_[^`]+)`", proof):
        module, _, function = name.partition(".")
        (path,) = TESTS.rglob(f"{module}.py")
        assert not function or function in functions_of(module)
        if module != "test_distribution":  # Strategies are TensorFlow's.
            assert "every_backend" in path.read_text()


def test_backends_has_promises():
    assert len(PROMISES) > 9


def test_the_page_on_evaluation_names_all_attacks_and_checks():
    page = (TESTS.parent / "docs" / "evaluation.md").read_text()
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)", " ".join(first)))
    assert {*attacks.__all__, *diagnostics.CHECKS} <= named | {"Attack"}


def test_each_case_of_the_grid_is_in_a_row():
    named = set(re.findall(r"`#([^`]+)`", TABLE))
    assert named <= set(CASES)
    assert set(CASES) - named == {
        "dense",
        "reduction mean",
        "reduction sum_over_batch_size",
    }


def test_the_page_on_migration_names_all_that_nsl_has():
    page = (TESTS.parent / "docs" / "nsl.md").read_text()
    named = set(re.findall(r"`nsl\.([\w.]+)`", page))
    for space, names in NAMES.items():
        for name in names.replace("-", "").split():
            path = f"{space}.{name}".strip(".")
            if path not in {"configs", "keras", "lib", "__version__"}:
                assert path in named


def test_the_code_of_the_recipes_runs(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    page = (TESTS.parent / "docs" / "recipes.md").read_text()
    scope = {
        "advreg": advreg,
        "dataclasses": dataclasses,
        "keras": keras,
        "np": np,
        "base": classifier(),
        "steps": 1000,
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    # The figure in the repository is the one that the page draws.
    drawn, kept = (
        image.imread(folder / "schedules.png")
        for folder in (tmp_path, TESTS.parent / "docs")
    )
    assert drawn.shape == kept.shape
    # One line less is 0.2 % of the pixels; versions of Matplotlib may round otherwise.
    assert (np.abs(drawn - kept).max(-1) > 0.25).mean() < 0.001
    x = np.array([[0.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    assert scope["separation"](x, np.array([0, 0, 1])) == 4.0
    assert scope["separation"](x, np.array([0, 1, 1]), 2) == 3.0
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_breast_cancer(return_X_y=True)
    distance = scope["separation"]((x - x.mean(0)) / x.std(0), y)
    assert f"separated by {distance:.2f} in L∞" in " ".join(page.split())


@pytest.mark.slow
def test_the_code_of_the_page_on_text_runs():
    page = (TESTS.parent / "docs" / "text.md").read_text()
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    (found,) = scope["displacements"].values()
    assert [each.shape for each in found] == [(8, 12, 50)]


def test_the_recipes_name_all_presets():
    page = (TESTS.parent / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)
    assert sorted(rows) == sorted(n for n in vars(Presets) if n[0] != "_")


def test_the_recipes_show_the_rows_that_are_kept():
    page = (TESTS.parent / "docs" / "recipes.md").read_text()
    rows = json.loads(
        (TESTS.parent / "benchmarks" / "robustness_table.json").read_text()
    )
    measured = [
        f"| `{row['preset']}` | {row['epsilon']} | {row['seed']} | "
        + " | ".join(
            f"{100 * row[name]:.1f} %" for name in ("clean", "PGD-40 ×5", "AutoAttack")
        )
        + " |"
        for row in rows
    ]
    shown = re.findall(r"^\| `\w+` \| 0\..*$", page, re.MULTILINE)
    assert shown == measured


def entries_of_the_reference():
    pages = (TESTS.parent / "docs" / "reference").glob("*.md")
    text = "".join(page.read_text() for page in pages)
    return re.findall(r"^::: (\S+)", text, re.MULTILINE)


def test_the_reference_has_all_public_names():
    named = entries_of_the_reference()
    spaces = {"attacks", "callbacks"}
    public = {f"advreg.{n}" for n in advreg.__all__ if n[0] != "_" and n not in spaces}
    public |= {f"advreg.attacks.{name}" for name in attacks.__all__}
    public |= {f"advreg.objectives.{kind.__name__}" for kind in OBJECTIVES.values()}
    assert public <= set(named)
    assert len(named) == len(set(named))


def test_each_entry_of_the_reference_and_of_the_site_exists():
    for name in entries_of_the_reference():
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__
    nav = (TESTS.parent / "mkdocs.yml").read_text()
    listed = set(re.findall(r"notebooks/(\S+\.ipynb)", nav))
    assert listed == {p.name for p in (TESTS.parent / "notebooks").glob("*.ipynb")}
