"""Environments of their own for the libraries that advreg is compared with.

Each is a virtual environment under `benchmarks/environments/`, made by pip from the
package index where it is missing, with the versions that stand here, and kept. Peers on
TensorFlow get the TensorFlow, Keras and NumPy of this very environment, so that the
libraries differ and nothing else; NSL runs on the last TensorFlow that it imports on.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(__file__).with_name("environments")
# What an environment says of itself: its Python, and the packages that are asked for.
QUESTION = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps([list(sys.version_info[:2]), found]))
"""


class PreparationError(Exception):
    """An environment cannot be made. Its message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """What an environment has.

    Args:
        name: Name of its folder.
        packages: The version of each package that it must have.
        pythons: Versions of Python to make it with, the first one found; by default
            that of this process.
        options: What else pip is told.
    """

    name: str
    packages: dict
    pythons: tuple = ()
    options: tuple = ()

    @property
    def requirements(self):
        """The packages, as pip has them."""
        return [f"{name}=={version}" for name, version in self.packages.items()]


def here(*packages):
    """The versions of packages in the environment of this process."""
    return {name: importlib.metadata.version(name) for name in packages}


def known():
    """The environments that the benchmarks use, by name."""
    same = here("tensorflow", "keras", "numpy")
    environments = (
        Environment(
            "nsl",
            {
                "tensorflow": "2.15.1",
                "numpy": "1.26.4",
                "neural-structured-learning": "1.4.0",
            },
            pythons=("3.11", "3.10", "3.9"),
        ),
        Environment(
            "art",
            # ART's AutoAttack imports multiprocess without bringing it along.
            {
                **same,
                "adversarial-robustness-toolbox": "1.20.1",
                "multiprocess": "0.70.19",
            },
        ),
        Environment("foolbox", {**same, "foolbox": "3.3.4"}),
        Environment("cleverhans", {**same, "cleverhans": "4.0.0"}),
        Environment(
            "torch",
            {"torch": "2.13.0", "numpy": same["numpy"]},
            # The index of PyTorch has builds for the CPU alone.
            options=("--extra-index-url", "https://download.pytorch.org/whl/cpu"),
        ),
    )
    return {environment.name: environment for environment in environments}


def python_in(folder):
    """The interpreter of a virtual environment."""
    where, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return folder / where / name


def ask(python, packages):
    """The version of an interpreter and those of packages, or `None` if it fails."""
    if shutil.which(str(python)) is None:
        return None
    command = [str(python), "-I", "-c", QUESTION, *packages]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:  # A launcher may be there whose Python is not.
        return None
    version, found = json.loads(answer.stdout)
    return tuple(version), found


def is_complete(environment, python):
    """Whether an interpreter has what the environment must have."""
    answer = ask(python, environment.packages)
    if answer is None:
        return False
    version, found = answer
    allowed = [tuple(map(int, text.split("."))) for text in environment.pythons]
    if version not in (allowed or [sys.version_info[:2]]):
        return False
    # A build for the CPU may say so: 2.13.0+cpu.
    public = {name: (value or "").split("+")[0] for name, value in found.items()}
    return public == environment.packages


def find_python(environment, python=None):
    """An interpreter to make an environment with.

    Raises:
        PreparationError: There is none.
    """
    if not environment.pythons:
        return sys.executable
    wanted = {tuple(map(int, text.split("."))) for text in environment.pythons}
    names = [sys.executable, *(f"python{text}" for text in environment.pythons)]
    for name in [python] if python else names:
        answer = ask(name, ())
        if answer is not None and answer[0] in wanted:
            return name
    received = python or f"none of {', '.join(names[1:])} on the PATH"
    raise PreparationError(
        f"The environment {environment.name!r} needs Python "
        f"{' or '.join(environment.pythons)}: install one, and have it on the PATH. "
        f"Received: {received}"
    )


def prepare(environment, folder=None, python=None):
    """Makes an environment unless it is there, and returns its interpreter.

    Args:
        environment: The `Environment`.
        folder: Where it is, by default under its name in `FOLDER`.
        python: The interpreter to make it with, by default one that is found.

    Raises:
        PreparationError: There is no fitting Python, pip fails, or the folder is
            something else.
    """
    folder = (folder or FOLDER / environment.name).absolute()
    found = python_in(folder)
    if is_complete(environment, found):
        return found
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise PreparationError(
            "An environment must be a virtual environment or a folder that does not "
            f"exist yet. Received: {folder}"
        )
    maker = find_python(environment, python)
    print(
        f"Installing {', '.join(environment.requirements)} into {folder}",
        file=sys.stderr,
    )
    install = [str(found), "-m", "pip", "install", "--quiet", *environment.options]
    for command in (
        [maker, "-m", "venv", str(folder)],
        [*install, *environment.requirements],
    ):
        told = subprocess.run(command, capture_output=True, text=True)
        if told.returncode:
            raise PreparationError(
                f"{' '.join(command)} failed:\n{told.stderr or told.stdout}"
            )
    if not is_complete(environment, found):
        raise PreparationError(
            f"The environment must have {', '.join(environment.requirements)}. "
            f"Received: {folder}; remove it, or name another one"
        )
    return found


def main():
    """Makes all environments."""
    for name, environment in known().items():
        print(f"{name}: {prepare(environment)}", flush=True)


if __name__ == "__main__":
    main()
