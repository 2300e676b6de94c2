"""Which changes to the code no test notices.

Takes the mutants that cosmic-ray makes of a module, runs the tests on each, and prints
those that survive as diffs. A survivor is a gap in the tests, or a change that makes no
difference.

    python benchmarks/mutation.py [config geometry ...] [--sample 60] [--seed 0]

Mutants are written to a temporary copy. This process imports TensorFlow and runs
nothing in it; each mutant gets a fork, which saves the import. All mutants of all
modules take hours: `--sample` takes that many of each module at random.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
# The test files of a module, in the order that notices most mutants first.
TESTS = {
    "config": ["config", "perturbation"],
    "geometry": ["geometry"],
    "packing": ["packing", "perturbation"],
    "movable": ["movable"],
    "perturbation": ["perturbation", "packing", "movable"],
    "batches": ["batches"],
    "images": ["images"],
    "saving": ["saving"],
    "passes": ["passes", "model", "objectives"],
    "on_batch": ["perturb_on_batch", "batches", "images"],
    "outputs": ["objectives"],
    "model": ["model", "batches", "images", "saving", "parity"],
}
# Bit operations break arithmetic, an order of identities means nothing, `+1` is `1`,
# and the last two kinds need to be told which variables they are to replace.
SKIPPED = re.compile(
    r".*_(Add|Sub|Mul|Div|Pow)_(LShift|RShift|BitOr|BitAnd|BitXor)"
    r"|.*Comparison.*_(Is|IsNot)_(Eq|NotEq|LtE?|GtE?)"
    r"|.*Comparison.*_(Eq|NotEq|LtE?|GtE?)_(Is|IsNot)"
    r"|.*_USub_UAdd"
    r"|.*/Variable(Replacer|Inserter)"
)
_OPPOSITES = {ast.Is: ast.IsNot, ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
_OPPOSITES |= {opposite: kind for kind, opposite in _OPPOSITES.items()}


class _Normal(ast.NodeTransformer):
    """Takes out annotations, which never run, and `not` where it can go."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, None)
        return super().generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        match node.operand:
            case ast.UnaryOp(op=ast.Not()):
                return node.operand.operand
            case ast.Compare(ops=[kind]) if type(kind) in _OPPOSITES:
                node.operand.ops = [_OPPOSITES[type(kind)]()]
                return node.operand
        return node


def mutants_of(source: str) -> list[str]:
    """Returns the sources that differ from this one by one change that can run."""

    def meaning(code: str) -> str:
        return ast.dump(_Normal().visit(ast.parse(code)))

    found = {meaning(source): source}
    for name in operator_names():
        if SKIPPED.fullmatch(name):
            continue
        operator = get_operator(name)()
        nodes = ast_nodes(get_ast(source))
        places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        for place in range(places):
            mutant = mutate_code(source, operator, place)
            try:
                found.setdefault(meaning(mutant), mutant)
            except SyntaxError:
                continue
    return list(found.values())[1:]


class _Order:
    """Runs the tests first that failed lately: they often fail again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = path.read_text().splitlines() if path.exists() else []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ranks = {name: rank for rank, name in enumerate(self.failed)}
        items.sort(key=lambda item: ranks.get(item.nodeid, len(ranks)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            others = [name for name in self.failed if name != report.nodeid]
            self.path.write_text("\n".join([report.nodeid, *others]))


def _test(copy: Path, files: list[str]) -> None:
    """Runs tests in the copy and ends the process with pytest's exit code."""
    os.setsid()  # What the tests start themselves can then be ended with them.
    with open(copy / "output.txt", "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    # Two mutants of one second and size would share their bytecode.
    sys.dont_write_bytecode = True
    options = ["-qx", "--assert=plain", "-p", "no:cacheprovider"]
    options += ["-m", "not slow", "-k", "not jit"]
    options += [f"tests/test_{name}.py" for name in files]
    os._exit(pytest.main(options, [_Order(copy / "failed.txt")]))


def survives(copy: Path, files: list[str], timeout: float | None = None) -> bool:
    """Tells whether the tests pass in the copy.

    Args:
        copy: A copy of the checkout.
        files: Names of test files, without `test_` and `.py`.
        timeout: Seconds after which the tests count as failed.
    """
    child = multiprocessing.get_context("fork").Process(
        target=_test, args=(copy, files)
    )
    child.start()
    try:
        child.join(timeout)
    finally:
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
    return child.exitcode == 0


def survivors(
    module: str, copy: Path, sample: int | None, seed: int
) -> Iterator[str | None]:
    """Yields for each mutant of a module its diff if it survives, `None` otherwise.

    Args:
        module: Name of the module.
        copy: A copy of the checkout, whose module is changed and put back.
        sample: How many mutants to try; all if `None`.
        seed: Which ones.
    """
    path, files = copy / "advreg" / f"{module}.py", TESTS[module]
    source = path.read_text()
    start = time.monotonic()
    if not survives(copy, files):
        output = (copy / "output.txt").read_text()
        raise RuntimeError(f"The tests of `{module}` fail without a mutant:\n{output}")
    timeout = 3 * (time.monotonic() - start) + 30
    mutants = mutants_of(source)
    if sample is not None and sample < len(mutants):
        mutants = random.Random(seed).sample(mutants, sample)
    for mutant in mutants:
        path.write_text(mutant)
        lines = (text.splitlines(keepends=True) for text in (source, mutant))
        name = f"advreg/{module}.py"
        diff = "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}", n=1))
        yield diff if survives(copy, files, timeout) else None
    path.write_text(source)


def main() -> None:
    """Prints each survivor when it is found, and the numbers at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="module", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(f"no tests are known for: {', '.join(sorted(unknown))}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # An example that fails need not be made small. The tests load the named profile.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutation",
        deadline=None,
        max_examples=50,
        derandomize=True,
        database=None,
        phases=phases,
    )
    os.environ["HYPOTHESIS_PROFILE"] = "mutation"
    for name in ("keras", "tensorflow", "hypothesis.extra.numpy", "scipy.stats"):
        importlib.import_module(name)
    table = [f"{'module':14} {'mutants':>7} {'killed':>7} {'survived':>8}"]
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in ("advreg", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for module in arguments.modules or TESTS:
            tried = survived = 0
            for diff in survivors(module, copy, arguments.sample, arguments.seed):
                tried += 1
                print(f"\r{module}: {tried} ", end="", file=sys.stderr)
                if diff is not None:
                    survived += 1
                    print(diff, flush=True)
            killed = tried - survived
            table.append(f"{module:14} {tried:7} {killed:7} {survived:8}")
    print("\n".join(table))


if __name__ == "__main__":
    main()
