"""The plan of the package: who may import whom, and who may touch what."""

import ast
import pathlib

import keras
import pytest

import advreg

ROOT = pathlib.Path(advreg.__file__).parent
# Each room imports those above it only. CONTRIBUTING.md draws the plan.
FLOORS = [
    {"_types", "_extras", "_version"},
    {"checks", "datasets"},
    {"backend"},
    {"objectives"},
    {"config"},
    {"perturbation", "plots"},
    {"network"},
    {"training", "attacks"},
    {"evaluation"},
    {"nsl", "callbacks"},
    {"apps"},
    {"__init__", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITH_TENSORFLOW = ("backend/", "nsl/", "attacks/art/", "apps/", "datasets.py")
# What a NamedTuple has, and an enumeration asks for.
NO_SECRETS = {"_replace", "_fields", "_asdict", "_missing_"}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("advreg", *parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports_of(path):
    """Yields the modules of advreg that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("advreg"))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            if (node.module or "").split(".")[0] == "advreg":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


def room_of(module):
    _, _, inner = module.partition(".")
    return inner.split(".")[0] or "__init__"


def test_each_room_has_its_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for imported in imports_of(MODULES[module]):
        if room_of(imported) != room_of(module):
            assert FLOOR_OF[room_of(imported)] < FLOOR_OF[room_of(module)], imported


def test_no_files_import_each_other_in_a_circle():
    graph = {name: set(imports_of(path)) - {name} for name, path in MODULES.items()}
    # The face of a package hands names on, and its modules do not ask it for them.
    order = []
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"a circle among {sorted(graph)}"
        order += free
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_seam_imports_tensorflow(path):
    if path.relative_to(ROOT).as_posix().startswith(WITH_TENSORFLOW):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in {"tensorflow", "jax", "torch"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_touches_the_private_members_of_another(path):
    if name_of(path) == "advreg.backend.keras_private":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {
        name
        for node in ast.walk(tree)
        for name in [
            getattr(node, "name", None),
            getattr(node, "attr", None)
            if isinstance(getattr(node, "ctx", None), ast.Store)
            else None,
        ]
        if name
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in MODULES
                assert is_module or not is_private(alias.name), alias.name
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_NAME:
            for name in node.args[1:2]:
                assert not is_private(str(getattr(name, "value", ""))), name.value
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            is_self = isinstance(base, ast.Name) and base.id in {"self", "cls"}
            assert is_self or node.attr in own | NO_SECRETS, node.attr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_methods_of_keras_are_overridden_in_one_room(path):
    if name_of(path) == "advreg.backend.keras_private":
        return
    of_keras = {name for name in dir(keras.Model) if is_private(name)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                assert getattr(member, "name", "") not in of_keras


def is_private(name):
    return name.startswith("_") and not name.startswith("__")
