"""Changes source code from Neural Structured Learning (NSL) to `advreg.nsl`.

How it works: the code is parsed by libcst, and names of NSL are followed through
imports, aliases and scopes (`renaming`). Changes are stretches of the text, given by
start and end, and a new text for each. They are spliced into the original, so that
everything else keeps its bytes. The cells of a notebook are read as one module, because
a cell uses names of earlier ones (`notebooks`). Code that no rule can change is listed
for the user (`Place`), and so is code of Keras 2 around it (`leftovers`).
"""

from __future__ import annotations

import ast
import bisect
import codecs
import dataclasses
import difflib
import io
import itertools
import os
import re
import stat
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from advreg.nsl.migrate import notebooks
from advreg.nsl.migrate.leftovers import Leftovers
from advreg.nsl.migrate.notebooks import Cell, lines_of, splice
from advreg.nsl.migrate.renaming import MENTION, Module

SUFFIXES = (".py", ".ipynb")
_REQUIREMENT = re.compile(
    rf"""(?P<quote>["'])\s*(?:{MENTION.pattern})(?![\w./-])[^"']*(?P=quote)
    | (?<!\S)(?:{MENTION.pattern})(?:\[[^\]\s]*\])?
      (?:[=~!<>]=[^\s;&|]+)?(?=[\s;&|<>]|$)  # A lone > sends output to a file.
    """,
    re.VERBOSE | re.IGNORECASE,
)
_INSTALLS = re.compile(r"\bpip[\d.]*\s(?:.*\s)?install\s", re.DOTALL)
_PINS = re.compile(
    r"""(?<![\w-])(?:tensorflow(?:-cpu|-gpu|-macos)?|keras)\s*(?:==|~=|<)[^\s"']*"""
)


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A place in a file that a user must change.

    Args:
        line: Its line in the file, or in its cell, counted from 1.
        what: The code at this place.
        why: Why it must change, and what to do.
        cell: Its cell, counted from 1 among all cells, if the file is a notebook.
    """

    line: int
    what: str
    why: str
    cell: int | None = None

    def at(self, path: object) -> str:
        """Returns the place, in a file of that name, as a line of text."""
        where = (
            f"{path}:{self.line}"
            if self.cell is None
            else f"{path}, cell {self.cell}, line {self.line}"
        )
        return f"{where}: {self.what}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Migration:
    """The result of `migrate_python` or `migrate_notebook`.

    Args:
        before: The text before.
        after: The text with advreg.
        places: Places that the user must change, in the order of the text.
        failures: Cells of a notebook that are not Python, and why.
    """

    before: str
    after: str
    places: tuple[Place, ...] = ()
    failures: tuple[str, ...] = ()


def find(paths: Iterable[Path]) -> tuple[list[Path], list[OSError]]:
    """Finds files of Python and notebooks.

    Args:
        paths: Files, which are always taken, and folders, which are searched. Hidden
            folders, virtual environments, `__pycache__`, `node_modules` and folders
            that are links are skipped.

    Returns:
        The files, each once, and the errors of those that cannot be read.
    """
    files: dict[str, Path] = {}
    errors: list[OSError] = []
    for path in paths:
        for file in _walk(path, errors) if os.path.isdir(path) else [path]:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values()), errors


def _walk(folder: Path, errors: list[OSError]) -> Iterator[Path]:
    for at, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in {"__pycache__", "node_modules"}
            and not os.path.exists(os.path.join(at, name, "pyvenv.cfg"))
        )
        for name in sorted(names):
            if not name.endswith(SUFFIXES):
                continue
            file = Path(at, name)
            try:
                if stat.S_ISREG(file.stat().st_mode):
                    yield file
            except OSError as error:  # A broken link, or one to itself.
                errors.append(error)


def read(path: Path) -> tuple[str, str]:
    """Reads a file of Python or a notebook in the encoding that it declares.

    Args:
        path: The file.

    Returns:
        Its text, with its own line endings, and its encoding.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not in the encoding that it declares, or the encoding is
            unknown.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".ipynb":
            has_mark = data.startswith(codecs.BOM_UTF8)
            encoding = "utf-8-sig" if has_mark else "utf-8"
        else:
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        text = data.decode(encoding)
    except (SyntaxError, UnicodeError) as error:
        raise ValueError(f"its encoding is wrong ({error})") from error
    if text.encode(encoding) != data:
        raise ValueError(f"it could not be written back in its encoding, {encoding}")
    return text, encoding


def write(path: Path, text: str, encoding: str) -> None:
    """Replaces a file as a whole, and keeps its mode.

    Args:
        path: The file. If it is a link, the file behind it is replaced.
        text: The new text.
        encoding: The encoding.

    Raises:
        OSError: It cannot be written, or is read-only.
    """
    target = Path(os.path.realpath(path))
    mode = stat.S_IMODE(target.stat().st_mode)
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError("it is read-only")
    handle, beside = tempfile.mkstemp(prefix=".advreg-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode(encoding))
        os.chmod(beside, mode)
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise


def migrate(path: Path, text: str) -> Migration:
    """Changes a file from NSL to advreg, by `migrate_python` or `migrate_notebook`."""
    return (migrate_notebook if path.suffix == ".ipynb" else migrate_python)(text)


def migrate_python(text: str) -> Migration:
    r"""Changes a file of Python from NSL to advreg.

    Args:
        text: The text of the file.

    Returns:
        A `Migration`. A text that does not mention NSL is not even parsed.

    Raises:
        ImportError: The extra `migrate` is not installed.
        ValueError: The text is not Python.

    Example:
    >>> migrate_python("import neural_structured_learning as nsl\n").after
    'from advreg import nsl\n'
    """
    if not MENTION.search(text):
        return Migration(text, text)
    block = _Block(text, "".join(f"{line}\n" for line in _bare(text)))
    _check(block.code)
    changes, places = _migrated([block])
    after = splice(text, [(start, end, new) for _, start, end, new in changes])
    return Migration(text, after, places)


def migrate_notebook(text: str) -> Migration:
    """Changes a notebook from NSL to advreg.

    Args:
        text: The text of the notebook's file.

    Returns:
        A `Migration`. Names of one cell are known in later cells.

    Raises:
        ImportError: The extra `migrate` is not installed.
        ValueError: The text is no notebook of nbformat 4.
    """
    cells = notebooks.cells_of(text)
    if not any(MENTION.search(cell.text) for cell in cells):
        return Migration(text, text)
    blocks, failures = [], []
    changes: list[tuple[Cell, int, int, str]] = []
    places: list[Place] = []
    for cell in cells:
        code, magics = notebooks.python_of(cell.text)
        for start, end in magics:
            found, more = _in_magic(cell, start, end)
            changes += found
            places += more
        try:
            _check(code)
        except ValueError as error:
            failures.append(f"cell {cell.number}, {error}")
        else:
            blocks.append(_Block(cell.text, code, cell))
    if changes:  # So far, these are changes of `pip install`.
        cell, start, *_ = changes[0]
        places.append(
            Place(
                len(lines_of(f"{cell.text[:start]}.")),
                "`pip install advreg`",
                "until advreg is published on the package index, install it from a "
                "checkout: `python -m pip install PATH_TO_CHECKOUT`",
                cell.number,
            )
        )
    found_in_code, more_places = _migrated(blocks)
    for block, start, end, new in found_in_code:
        assert block.cell is not None
        changes.append((block.cell, start, end, new))
    after = notebooks.replace(text, changes)
    ordered = sorted({*places, *more_places}, key=lambda p: (p.cell, p))
    return Migration(text, after, tuple(ordered), tuple(failures))


def _bare(text: str) -> list[str]:
    return [line.rstrip("\r\n") for line in lines_of(text)]


def _check(code: str) -> None:
    """Checks that code is Python, and not nested too deeply for a parser.

    Raises:
        ValueError: It is no Python, or nested too deeply.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Warnings of invalid escapes in strings.
            ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno or 1}: {error.msg}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError("line 1: what follows is nested too deeply") from error


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A file of Python or a cell: its text, and its Python code, line by line."""

    text: str
    code: str
    cell: Cell | None = None

    def offset(self, line: int, column: int) -> int:
        return sum(map(len, lines_of(self.text)[:line])) + column

    @property
    def newline(self) -> str:
        found = re.search(r"\r\n|\r|\n", self.text)
        return found[0] if found else "\n"


def _migrated(
    blocks: Sequence[_Block],
) -> tuple[list[tuple[_Block, int, int, str]], tuple[Place, ...]]:
    """Reads blocks as one module, and collects their changes and places.

    Args:
        blocks: A file, or the cells of a notebook.

    Returns:
        The changes, each with its block, start, end and new text, and the places.
    """
    heights = [block.code.count("\n") for block in blocks]
    tops = [0, *itertools.accumulate(heights)]

    def locate(line: int) -> tuple[_Block, int]:
        index = bisect.bisect_right(tops, line - 1) - 1
        return blocks[index], line - 1 - tops[index]

    try:
        module = Module("".join(block.code for block in blocks), tops)
        module.migrate()
        if module.uses_nsl:
            Leftovers(module).find()
    except RecursionError as error:
        raise ValueError("line 1: what follows is nested too deeply") from error
    changes = []
    for (first, left), (last, right), new in module.changes:
        block, line = locate(first)
        start = block.offset(line, left)
        end = block.offset(line + last - first, right)
        changes.append((block, start, end, new.replace("\n", block.newline)))
    for top, bottom in module.dropped:
        block, line = locate(top)
        # Removed together with the end of the line before. In a notebook each line is a
        # string of its own, and the next line so keeps its string.
        lines = lines_of(block.text)[: line + bottom - top + 1]
        above = "".join(lines[:line])
        within = above.removesuffix("\n").removesuffix("\r")
        text = "".join(lines).removesuffix("\n").removesuffix("\r")
        changes.append((block, len(within), len(text), ""))
    places = []
    for line, what, why in sorted(set(module.places)):
        block, at = locate(line)
        cell = None if block.cell is None else block.cell.number
        places.append(Place(at + 1, what, why, cell))
    return changes, tuple(places)


def _in_magic(
    cell: Cell, start: int, end: int
) -> tuple[list[tuple[Cell, int, int, str]], list[Place]]:
    """Changes the packages that a magic installs, and lists other mentions of NSL."""
    magic = cell.text[start:end]
    changes: list[tuple[Cell, int, int, str]] = []
    places: dict[int, Place] = {}  # One for each line is enough.

    def place(at: int, what: str, why: str) -> None:
        line = len(lines_of(f"{cell.text[: start + at]}."))
        places.setdefault(line, Place(line, f"`{what}`", why, cell.number))

    is_shell = not magic.lstrip().startswith("%%")
    for found in _REQUIREMENT.finditer(magic) if is_shell else ():
        command = re.split(r"&&|\|\||[;|]", magic[: found.start()])[-1]
        if _INSTALLS.search(command):
            quote = found["quote"] or ""
            left, right = start + found.start(), start + found.end()
            changes.append((cell, left, right, f"{quote}advreg{quote}"))
    for found in MENTION.finditer(magic):
        at = start + found.start()
        if not any(left <= at < right for _, left, right, _ in changes):
            place(
                found.start(),
                found[0],
                "commands are left alone, but for pip install, and so are other "
                "languages; if this installs or runs NSL, change it by hand",
            )
    for found in _PINS.finditer(magic) if changes else ():
        place(
            found.start(),
            found[0],
            "advreg needs tensorflow>=2.18 and keras>=3.8; let the pin take them",
        )
    return changes, list(places.values())


def diff(migration: Migration, path: Path) -> str:
    """Returns the changes as a unified diff.

    Args:
        migration: The result for a file.
        path: The file.

    Returns:
        The diff. For a notebook, it has a diff of each cell under the cell's number.
    """
    if migration.before == migration.after:
        return ""
    if path.suffix != ".ipynb":
        return _diff(migration.before, migration.after, str(path))
    cells = map(notebooks.cells_of, (migration.before, migration.after))
    return "".join(
        _diff(f"{before.text}\n", f"{after.text}\n", f"{path}, cell {before.number}")
        for before, after in zip(*cells, strict=True)
    )


def _diff(before: str, after: str, name: str) -> str:
    # After a lone carriage return, a terminal would overwrite the line.
    old, new = (re.sub(r"\r(?!\n)", "\n", text) for text in (before, after))
    lines = difflib.unified_diff(lines_of(old), lines_of(new), name, name)
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
        for line in lines
    )
