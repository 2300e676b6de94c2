"""`advreg demo`: runs the demo, and prints its table."""

from __future__ import annotations

import argparse
import dataclasses

from advreg.apps import demo
from advreg.apps.cli.errors import to_cli_words
from advreg.apps.settings import DemoSettings


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Runs the demo.

    Args:
        parser: The parser of the sub-command, which ends it where an option is wrong.
        args: The arguments.
    """
    names = [field.name for field in dataclasses.fields(DemoSettings)]
    try:
        settings = DemoSettings(**{name: getattr(args, name) for name in names})
    except (TypeError, ValueError) as error:
        parser.error(to_cli_words(str(error)))
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir must be a directory. Received: {error}")
    print(demo.run(settings))
