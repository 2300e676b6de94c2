"""The tutorials as they are stored, and the runner that executes them."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
HOME = "https://colab.research.google.com/github/advreg/advreg/blob/main/notebooks"
INSTALL = re.compile(
    r'import sys\n\nif "google\.colab" in sys\.modules:\n'
    r'    %pip install -q "advreg\[[a-z,]+\]".*'
)
# A path that begins at the root of a file system, or a drive.
ABSOLUTE = re.compile(
    r"(?<![\w:/.<])/(?:home|root|tmp|usr|opt|var|work|Users)\b|\b[C-Z]:\\"
)


@pytest.fixture(scope="module")
def runner():
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path):
    def store(*sources):
        path = tmp_path / "tiny.ipynb"
        path.write_text(json.dumps(notebook(*sources)))
        return path

    return store


def notebook(*sources):
    cells = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        for source in sources
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def text_of(output):
    data = output.get("data", {})
    parts = [data[kind] for kind in data if kind.startswith("text/")]
    return "".join("".join(part) for part in [output.get("text", ""), *parts])


def test_there_are_tutorials_and_their_numbers_differ():
    numbers = [path.name[:2] for path in TUTORIALS]
    assert {"01", "05", "06", "07"} <= set(numbers)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
class TestStored:
    def test_opens_with_title_badge_and_what_it_teaches(self, path):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        text = "".join(first["source"])
        assert first["cell_type"] == "markdown"
        assert re.match(r"# \S", text)
        assert f"({HOME}/{path.name})" in text
        assert "you will" in text

    def test_installs_on_colab_only(self, path):
        first, *others = ("".join(cell["source"]) for cell in code_cells(path))
        assert INSTALL.fullmatch(first)
        assert not any("pip install" in source for source in others)

    def test_was_executed_in_order(self, path):
        counts = [cell["execution_count"] for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))

    def test_outputs_hold_no_error_and_no_warning(self, path):
        found = outputs(path)
        assert found
        for output in found:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            assert not re.search(r"Warning\b|WARNING|Traceback", text_of(output))

    def test_outputs_hold_nothing_of_the_machine(self, path):
        text = "\n".join(text_of(output) for output in outputs(path))
        assert not ABSOLUTE.search(text)
        assert not re.search(r" at 0x[0-9a-f]+", text)
        assert "\x1b" not in text

    def test_outputs_are_no_wall(self, path):
        assert all(text_of(output).count("\n") < 80 for output in outputs(path))

    def test_figures_are_shown(self, path):
        for output in outputs(path):
            if re.search(r"<Figure|Axes", text_of(output)):
                assert {"image/png", "image/jpeg"} & set(output["data"])

    def test_is_small(self, path):
        assert path.stat().st_size < 400_000

    def test_has_a_fast_form(self, path):
        source = "".join("".join(cell["source"]) for cell in code_cells(path))
        assert 'os.environ.get("NOTEBOOK_FAST")' in source


def test_formulas_need_no_tex():
    """The site has nothing that draws them."""
    for path in TUTORIALS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
        assert "$" not in "".join(itertools.chain(*texts)), path.name


def test_links_between_tutorials_lead_somewhere():
    for path in TUTORIALS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] != "code")
        for link in re.findall(r"\]\((\w+\.ipynb)\)", text):
            assert (FOLDER / link).is_file()
        for link in re.findall(r"/advreg/advreg/blob/main/([\w/.]+)\)", text):
            assert (ROOT / link).is_file()


@pytest.mark.slow
def test_runner_stores_outputs_without_what_is_of_the_machine(runner, store, capsys):
    path = store(
        "import os, sys, tempfile\nopen('left', 'w').close()",
        "print(os.getcwd(), sys.prefix, tempfile.gettempdir(), object())\n"
        "os.environ.get('NOTEBOOK_FAST')",
    )
    assert runner.main([str(path)]) == 0
    assert re.fullmatch(r"tiny: \d+ s\n", capsys.readouterr().out)
    stored = path.read_text()
    first, second = code_cells(path)
    assert first["outputs"] == []
    (output,) = second["outputs"]  # The value is None: it is not to be fast.
    assert text_of(output) == ". python tmp <object object>\n"
    assert [cell["execution_count"] for cell in (first, second)] == [1, 2]
    assert not ABSOLUTE.search(stored)
    assert list(path.parent.iterdir()) == [path]

    assert runner.main([str(path)]) == 0
    assert path.read_text() == stored


def test_runner_stores_nothing_when_fast(runner, store):
    path = store("import os\nassert os.environ['NOTEBOOK_FAST'] == '1'")
    before = path.read_text()
    assert runner.main([str(path), "--fast"]) == 0
    assert path.read_text() == before


@pytest.mark.slow
def test_runner_fails_on_an_error_and_goes_on(runner, store, tmp_path, capsys):
    good, bad = tmp_path / "good.ipynb", store("x = 1", "1 / 0")
    good.write_text(json.dumps(notebook("print(1)")))
    before = bad.read_text()
    assert runner.main([str(bad), str(good)]) == 1
    captured = capsys.readouterr()
    assert "tiny: failed" in captured.err
    assert "ZeroDivisionError" in captured.err
    assert re.fullmatch(r"good: \d+ s\n", captured.out)
    assert bad.read_text() == before
    assert text_of(*outputs(good)) == "1\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            "import warnings\nwarnings.warn('beware')",
            r"Cell 2 wrote to stderr:\n.*UserWarning: beware",
            id="warning",
        ),
        pytest.param(
            "print('WARNING:tensorflow:5 out of the last 15 calls')",
            "Cell 2 wrote to stdout",
            marks=pytest.mark.slow,
            id="log",
        ),
        pytest.param(
            "import os\nos._exit(1)", "Kernel died", marks=pytest.mark.slow, id="death"
        ),
    ],
)
def test_runner_fails_and_keeps_the_notebook(runner, store, capsys, source, message):
    path = store("x = 1", source)
    before = path.read_text()
    assert runner.main([str(path)]) == 1
    captured = capsys.readouterr()
    assert "tiny: failed" in captured.err
    assert re.search(message, captured.err)
    assert captured.out == ""
    assert path.read_text() == before


def test_runner_gives_cells_ids_that_stay(runner, store):
    path = store("1", "1")
    ids = [cell.id for cell in runner.read(path).cells]
    assert ids == [cell.id for cell in runner.read(path).cells]
    assert len(set(ids)) == 2


def test_runner_takes_out_start_up_messages_alone(runner):
    text = (
        "2026-01-02 03:04:05.678901: I tensorflow/core/x.cc:1] optimised\n"
        "WARNING: All log messages before absl::InitializeLog() is called are ...\n"
        "I0000 00:00:1795298320.022849   21046 port.cc:153] oneDNN is on.\n"
        "To enable the following instructions: AVX2, rebuild TensorFlow.\n"
        "\x1b[1mInformation\x1b[0m: 2026-01-02 was a Friday\n"
    )
    assert runner.anonymous(text, "work") == "Information: 2026-01-02 was a Friday\n"


@pytest.mark.parametrize("name", ["01", "01_quickstart", "01_quickstart.ipynb"])
def test_runner_finds_tutorials_by_name(runner, name):
    assert runner.find([name]) == [FOLDER / "01_quickstart.ipynb"]


def test_runner_takes_all_by_default(runner):
    assert runner.find([]) == TUTORIALS


@pytest.mark.parametrize("name", ["0", "missing", "missing.ipynb"])
def test_runner_refuses_names_of_none_or_many(runner, capsys, name):
    with pytest.raises(SystemExit):
        runner.main([name])
    assert f"Received: {name}" in capsys.readouterr().err
