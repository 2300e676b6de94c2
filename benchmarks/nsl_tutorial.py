"""Runs NSL's tutorial on MNIST with nothing changed but the import.

The notebook comes from NSL's repository, goes through `advreg migrate`, and is run cell
by cell. Its own table is the last lines but those of the first batch.

    python benchmarks/nsl_tutorial.py [--notebook FILE] [--quick]

Needs the extras `demo` and `migrate`.
"""

import argparse
import json
import urllib.request
from pathlib import Path

import matplotlib

from advreg.nsl import migrate

FOLDER = (
    "https://raw.githubusercontent.com/tensorflow/neural-structured-learning/v1.4.0"
)
URL = f"{FOLDER}/g3doc/tutorials/adversarial_keras_cnn_mnist.ipynb"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebook", metavar="FILE", help="by default it is fetched")
    parser.add_argument("--quick", action="store_true", help="show the changes alone")
    options = parser.parse_args()
    url = Path(options.notebook).absolute().as_uri() if options.notebook else URL
    with urllib.request.urlopen(url) as answer:
        migration = migrate.migrate_notebook(answer.read().decode())
    print(migrate.diff(migration, Path("tutorial.ipynb")))
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(migration.after)["cells"], 1):
        source = "".join(cell["source"])
        is_code = cell["cell_type"] == "code" and not source.startswith("!pip")
        if is_code and not options.quick:
            exec(compile(source, f"cell {number}", "exec"), names)


if __name__ == "__main__":
    main()
