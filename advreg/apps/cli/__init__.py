"""The command line: `advreg demo`, `evaluate`, `explore` and `migrate`.

The arguments of the process come in. Text for the terminal, files that the user asked
for, and an exit status go out. Read in this order:

- `main`, below: parses the arguments, runs a sub-command, and ends on Ctrl-C.
- `parsers`: all options and their help. It imports neither Keras nor TensorFlow, so
  that help and wrong usage are answered at once.
- `demo`, `evaluate`, `explore`, `migrate`: what each sub-command does, a function
  `run(parser, args)`. Such a module is imported when its sub-command runs.
- `models`: loads the models that a user saved.
- `errors`: prints errors in one line, and calls arguments by the names of options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from advreg.apps.cli.errors import report_errors
from advreg.apps.cli.parsers import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status: 0 after success; 1 if the sub-command failed, or nobody reads
        its output any more; 130 after Ctrl-C.

    Raises:
        SystemExit: An argument is wrong (status 2), or help or the version was asked
            for (status 0).

    Example:
    >>> main(["demo", "--epochs", "2"])
    """
    try:
        try:
            return report_errors(make_parser().parse_args(argv))
        except KeyboardInterrupt:
            print(flush=True)  # A progress bar ends in the middle of a line.
            print(f"{_program(argv)}: interrupted before its end", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # Such as `advreg migrate ... | less` after `q`.
        # Discards the rest of the output, which Python flushes at its exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1


def _program(argv: Sequence[str] | None) -> str:
    """Returns the command as it was called: `advreg`, and the sub-command."""
    given = list(sys.argv[1:] if argv is None else argv)
    return " ".join(["advreg", *given[:1]])
