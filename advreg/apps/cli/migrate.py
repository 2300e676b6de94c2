"""`advreg migrate`: moves files, and prints what needs a person."""

from __future__ import annotations

import argparse
import os
import sys

from advreg.nsl import migrate


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Moves files to advreg, or prints how they would change.

    Args:
        parser: The parser of the sub-command, which ends it where a path is wrong.
        args: The arguments.

    Returns:
        The exit status: 1 if a file could not be moved, otherwise 0.
    """
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
        except (OSError, ValueError) as error:
            failures.append(f"{file}: {getattr(error, 'strerror', None) or error}")
        else:
            changed += migration.after != text
            if not args.write:
                _print(migrate.diff(migration, file), end="")
            elif migration.after != text:
                _print(f"changed {file}")
    for line in places:
        _print(line)
    for line in failures:
        _print(f"not done: {line}")
    _print(
        f"{_counted(len(files), 'file')} looked at, {changed} "
        f"{'' if args.write else 'would be '}changed, "
        f"{_counted(len(places), 'place')} for a person, {len(failures)} not done"
    )
    return 1 if failures else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _print(text: str, end: str = "\n") -> None:
    """Prints a text, with escapes for characters that the terminal lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end)
