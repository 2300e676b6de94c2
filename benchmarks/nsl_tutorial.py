"""Runs NSL's tutorial on MNIST with nothing changed but the import.

The notebook comes from NSL's repository, goes through `advreg migrate`, and is run cell
by cell. Its own table is the last lines but those of the first batch.

    python benchmarks/nsl_tutorial.py [--notebook FILE]

Needs the extras `demo` and `migrate`.
"""

import argparse
import json
import os
import urllib.request
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import matplotlib

from advreg import migrate

URL = (
    "https://raw.githubusercontent.com/tensorflow/neural-structured-learning/v1.4.0/"
    "g3doc/tutorials/adversarial_keras_cnn_mnist.ipynb"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--notebook",
        type=Path,
        metavar="FILE",
        help="the notebook, where it has been fetched already (default: fetch it)",
    )
    args = parser.parse_args()
    if args.notebook is None:
        with urllib.request.urlopen(URL) as answer:
            text = answer.read().decode()
    else:
        text = args.notebook.read_text()
    migration = migrate.migrate_notebook(text)
    print(migrate.diff(migration, Path("tutorial.ipynb")))
    for place in migration.places:
        print(place.at("tutorial.ipynb"))
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(migration.after)["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("!pip"):
            exec(compile(source, f"cell {number}", "exec"), names)


if __name__ == "__main__":
    main()
