"""Executes the tutorials, in full or fast.

    python notebooks/execute.py [NAME ...] [--fast]

In full, outputs are stored in the notebooks, without what is of this machine: paths,
addresses, times of execution, TensorFlow's messages at its start. With `--fast` the
same code runs with small settings (it finds `NOTEBOOK_FAST` in its environment) and
nothing is stored. Either way an error, a logged warning, or anything that is written to
stderr fails the notebook, and with it the run; such a notebook stays as it was.

NAME is a notebook of this folder, `01_quickstart` or just `01`, or the path of a file;
by default all are executed. Needs the extra `notebooks`. They run on the code of this
checkout, in an empty folder, so that what a notebook saves is gone afterwards.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TEXTS = ("text/plain", "text/html", "text/markdown")
# What TensorFlow and its libraries log at their start, whatever level is asked for.
START_UP = re.compile(
    r"""^(
        \d{4}-\d\d-\d\d\ [\d:.]+:\ [IWE]\ .*
      | [IWE]0000\ 00:00:.*
      | [IWE]\d{4}\ [\d:.]+\ +\d+\ \w+\.cc:.*
      | WARNING:\ All\ log\ messages\ before\ absl::InitializeLog.*
      | To\ enable\ the\ following\ instructions:.*
    )(\n|$)""",
    re.MULTILINE | re.VERBOSE,
)
# In a notebook TensorFlow logs to stdout.
WARNING = re.compile(r"^WARNING:", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A notebook failed. The message says in which cell, and why."""


def main(arguments=None):
    """Executes notebooks; returns 1 if one of them failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--fast", action="store_true", help="small settings, no outputs"
    )
    options = parser.parse_args(arguments)
    try:
        paths = find(options.names)
    except FileNotFoundError as error:
        parser.error(str(error))
    failed = 0
    for path in paths:
        began = time.perf_counter()
        try:
            notebook = execute(path, fast=options.fast)
        except NotebookError as error:
            failed = 1
            print(f"{path.stem}: failed\n{error}", file=sys.stderr, flush=True)
            continue
        if not options.fast:
            write(notebook, path)
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
    return failed


def find(names, folder=FOLDER):
    """Returns the paths of notebooks, by default of all in the folder.

    Raises:
        FileNotFoundError: A name belongs to no notebook, or to several.
    """
    known = sorted(folder.glob("*.ipynb"))
    return [_find(name, known) for name in names] or known


def _find(name, known):
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    found = [path for path in known if name in (path.stem, path.name)]
    found = found or [path for path in known if path.stem.startswith(name)]
    if len(found) != 1:
        stems = ", ".join(path.stem for path in known)
        raise FileNotFoundError(
            f"NAME must be the path of a notebook, or belong to one of {stems}. "
            f"Received: {name}"
        )
    return found[0]


def execute(path, fast=False):
    """Executes a notebook, and returns it with clean outputs.

    Raises:
        NotebookError: A cell raised an exception, logged a warning or wrote to stderr.
    """
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile("w+") as log:
        client = NotebookClient(
            notebook,
            # The Python that runs this script, and no kernel that a user has installed.
            km=AsyncKernelManager(
                kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
            ),
            resources={"metadata": {"path": work}},
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            client.execute(env=environment(fast), stderr=log, cleanup_kc=True)
        except CellExecutionError as error:
            raise NotebookError(COLOUR.sub("", str(error))) from error
        except (DeadKernelError, RuntimeError) as error:
            log.seek(0)
            raise NotebookError(f"{error}\n{log.read()}") from error
        for cell in notebook.cells:
            clean(cell, work)
    complaints = [
        f"Cell {number} wrote to {output.name}:\n{output.text}"
        for number, cell in enumerate(notebook.cells, 1)
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr" or WARNING.search(output.get("text", ""))
    ]
    if complaints:
        raise NotebookError("\n".join(complaints))
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def environment(fast):
    """The environment of the kernel: this checkout's code, and few messages."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")])
        ),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    variables.pop("NOTEBOOK_FAST", None)
    return {**variables, "NOTEBOOK_FAST": "1"} if fast else variables


def read(path):
    """Reads a notebook. Cells without an id get one that depends on nothing else."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    content["nbformat_minor"] = max(content.get("nbformat_minor", 0), 5)
    for number, cell in enumerate(content["cells"]):
        source = "".join(cell["source"])
        digest = hashlib.sha256(f"{number}\n{source}".encode()).hexdigest()
        cell.setdefault("id", digest[:8])
    return nbformat.reads(json.dumps(content), as_version=4)


def write(notebook, path):
    """Stores a notebook."""
    nbformat.validate(notebook)
    Path(path).write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def clean(cell, work):
    """Takes what is of this machine out of the outputs of a cell."""
    if cell.cell_type != "code":
        return
    cell.metadata.pop("execution", None)
    for output in cell.outputs:
        if "text" in output:
            output.text = anonymous(output.text, work)
        for kind, value in output.get("data", {}).items():
            if kind in TEXTS:
                output.data[kind] = anonymous(value, work)
    cell.outputs = [output for output in cell.outputs if output.get("text") != ""]


def anonymous(text, work):
    """Takes start-up messages, addresses and folders of this machine out of a text.

    And colours, which a notebook shows but whoever reads its file does not.
    """
    text = COLOUR.sub("", START_UP.sub("", text))
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    for folder, name in (
        (os.path.realpath(work), "."),
        (work, "."),
        (str(FOLDER.parent), "advreg"),
        (sys.prefix, "python"),
        (sys.base_prefix, "python"),
        (tempfile.gettempdir(), "tmp"),
        (str(Path.home()), "~"),
    ):
        if len(folder) > 1:
            text = re.sub(re.escape(folder) + r"(?![\w.-])", name, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
