"""The command line: `advreg demo`, `evaluate`, `explore` and `migrate`.

Each sub-command is a module with a function that adds its parser, and one that runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from advreg._version import __version__
from advreg.cli import demo, evaluate, explore, migrate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status: 0, or 1 where something that the command needs is not there,
        or its output is no longer read.

    Raises:
        SystemExit: An argument is wrong (status 2), or help or the version was asked
            for (status 0).

    Example:
    >>> main(["demo", "--epochs", "2"])
    """
    try:
        try:
            args = _parser().parse_args(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # Such as `advreg migrate ... | less` that was quit.
        # What is left to print goes nowhere, when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advreg", description="Adversarial regularisation for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"advreg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (demo.add, evaluate.add, explore.add, migrate.add):
        add(commands)
    return parser
