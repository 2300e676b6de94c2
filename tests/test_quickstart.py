"""The first tutorial runs on every backend."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.every_backend(tensorflow="slow")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_quickstart.ipynb"


def test_the_quickstart(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            # Lines that begin with % are for notebooks alone.
            lines = "".join(cell["source"]).splitlines()
            code = "\n".join(
                line.replace("%pip", "pass  # %pip")
                for line in lines
                if not line.startswith("%")
            )
            exec(compile(code, str(NOTEBOOK), "exec"), names)
    matplotlib.pyplot.close("all")
    assert 0.0 <= names["accuracy"] <= 1.0
    assert names["report"].results[-1].accuracy <= names["report"].results[0].accuracy
