"""Errors of the user, in one line and in the words of the command line."""

from __future__ import annotations

import argparse
import importlib
import re
import sys

_WORDS = {
    "epsilon": "--epsilons",
    "clip_value_min": "LOW",
    "clip_value_max": "HIGH",
    "from_logits=True": "--from-logits",
    "from_logits=False": "--no-from-logits",
    "model": "The model",
    "x": "The images",
    "y": "The labels of the dataset",
}


def report_errors(args: argparse.Namespace) -> int:
    """Prints user errors in one line and returns exit status 1.

    Args:
        args: The arguments, with the sub-command and its parser.

    Returns:
        The exit status of the sub-command, or 1 after an error.
    """
    try:
        # First, because it refuses all Keras backends but TensorFlow.
        from advreg import backend
    except ImportError as error:
        return _fail(args, error)
    try:
        command = importlib.import_module(f"advreg.apps.cli.{args.command}")
        return command.run(args.parser, args) or 0
    except BrokenPipeError:
        raise  # It is no error of the sub-command: nobody reads the output any more.
    except (OSError, TypeError, ValueError, ImportError, *backend.ERRORS) as error:
        return _fail(args, error)


def to_cli_words(message: str) -> str:
    """Replaces the names of arguments in a message by those of options."""

    def option(match: re.Match[str]) -> str:
        return _WORDS.get(match[1], "--" + match[1].replace("_", "-"))

    return re.sub(r"`(\w+(?:=\w+)?)`", option, message)


def _fail(args: argparse.Namespace, error: Exception) -> int:
    print(f"{args.parser.prog}: error: {to_cli_words(str(error))}", file=sys.stderr)
    return 1
