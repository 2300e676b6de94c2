"""The workers of a run, each in its environment, and the files that they share."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

import environments

from comparison import works
from comparison.protocol import Worker

BENCHMARKS = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass
class Sides:
    """The workers, and the files that they share.

    Args:
        pythons: The interpreter of each side that can run.
        folder: Where files and logs are written.
        settings: The options of the command line.
    """

    pythons: dict
    folder: pathlib.Path
    settings: argparse.Namespace
    running: dict = dataclasses.field(default_factory=dict)
    files: dict = dataclasses.field(default_factory=dict)
    versions: dict = dataclasses.field(default_factory=dict)
    started: int = 0

    def start(self, side):
        """Starts a worker."""
        command = [
            *(self.pythons[side], "-u", BENCHMARKS / "compare_worker.py"),
            *(side, self.settings.threads),
        ]
        self.started += 1
        return Worker(command, self.folder / f"{self.started}.log", variables(side))

    def worker(self, side):
        """The worker of a side, which is started unless it runs."""
        if side not in self.running:
            worker = self.running[side] = self.start(side)
            self.versions[side] = worker.ask("hello")["versions"]
        return self.running[side]

    def file(self, work):
        """The file that the sides of a work share: its path, and what it holds."""
        network, sizes = work.job["network"], work.job.get("sizes", {})
        if work.trained:
            examples = self.settings.images
        else:
            examples = max(1024, work.job["batch"], work.job.get("examples", 0))
        key = (network, json.dumps(sizes), work.trained, examples)
        if key not in self.files:
            wanted = {"network": network, "sizes": sizes, "examples": examples}
            if work.trained:
                kept = str(BENCHMARKS / "networks")
                trained = {"epochs": self.settings.epochs, "folder": kept}
                wanted["trained"] = trained
            path = str(self.folder / f"{len(self.files)}.npz")
            told = self.worker("plain").ask("make", path=path, **wanted)
            self.files[key] = path, told
        return self.files[key]

    def keep(self, needed):
        """Ends the workers that nothing needs any more."""
        for side in set(self.running) - set(needed):
            self.running.pop(side).close()

    def close(self):
        """Ends all workers."""
        self.keep(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def variables(side):
    """The environment variables of a side."""
    found = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = found.pop("PYTHONPATH", None)
    if works.SIDES[side] is None:  # The others must not find what is here.
        own = str(BENCHMARKS.parent)
        found["PYTHONPATH"] = os.pathsep.join([own, path]) if path else own
    return found


def prepare(names):
    """The interpreters of sides, and why others have none."""
    known, pythons, failures = environments.known(), {}, []
    for side in names:
        environment = works.SIDES[side]
        try:
            pythons[side] = (
                sys.executable
                if environment is None
                else environments.prepare(known[environment])
            )
        except environments.PreparationError as error:
            failures.append(f"{side}: {error}")
    return pythons, failures
