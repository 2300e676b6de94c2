"""`advreg migrate`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from advreg import migrate


def add(commands: Any) -> None:
    """Adds the parser to those of the other sub-commands."""
    parser = commands.add_parser(
        "migrate",
        help="move code from Neural Structured Learning to advreg",
        description="Move Python files and notebooks from Neural Structured Learning "
        "to advreg.nsl. Print what would change as a diff, and list what needs a "
        "person. Cells of notebooks are counted from 1, those of text included.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="files that end in .py or .ipynb, and folders to search for them",
    )
    parser.add_argument("--write", action="store_true", help="change the files")
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for path in args.paths:
        if not os.path.isdir(path) and not os.path.isfile(path):
            parser.error(
                f"FILE_OR_FOLDER must be a file or folder that exists. Received: {path}"
            )
        if os.path.isfile(path) and path.suffix not in migrate.SUFFIXES:
            parser.error(
                f"a file must end in {' or '.join(migrate.SUFFIXES)}. Received: {path}"
            )
    files, errors = migrate.find(args.paths)
    places: list[str] = []
    failures = [f"{error.filename}: {error.strerror}" for error in errors]
    changed = 0
    for file in files:
        try:
            text, encoding = migrate.read(file)
            migration = migrate.migrate(file, text)
            places += [place.at(file) for place in migration.places]
            failures += [f"{file}, {failure}" for failure in migration.failures]
            if args.write and migration.after != text:
                migrate.write(file, migration.after, encoding)
        except ImportError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        except (OSError, ValueError) as error:
            failures.append(f"{file}: {getattr(error, 'strerror', None) or error}")
        else:
            changed += migration.after != text
            if not args.write:
                _say(migrate.diff(migration, file), end="")
            elif migration.after != text:
                _say(f"changed {file}")
    for line in places:
        _say(line)
    for line in failures:
        _say(f"not done: {line}")
    _say(
        f"{_counted(len(files), 'file')} looked at, {changed} "
        f"{'' if args.write else 'would be '}changed, "
        f"{_counted(len(places), 'place')} for a person, {len(failures)} not done"
    )
    return 1 if failures else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _say(text: str, end: str = "\n") -> None:
    """Prints what may hold characters that the terminal does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end)
