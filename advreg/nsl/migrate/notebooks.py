"""Reads the code cells of Jupyter notebooks, and changes them in the notebook's text.

A notebook is not parsed and written again, because JSON has many spellings of the same
notebook, and the rest of the file must not change. Instead, the position of each
character of a cell in the file is recorded, and changes go into the strings of
`source`.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Sequence
from typing import Any

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SPACE = re.compile(r"[ \t\r\n]*")
_CHARACTER = re.compile(
    r"\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|\\u\w{4}|\\.|[^\"\\]", re.DOTALL
)
_DECODER = json.JSONDecoder(strict=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A cell of code.

    Args:
        number: Its number among all cells of the notebook, counted from 1.
        text: Its source.
        spans: Start and end of each character of the source in the file.
        between: The text between two lines of the source in the file, quotes included;
            `None` if the source is a single string.
    """

    number: int
    text: str
    spans: Sequence[tuple[int, int]]
    between: str | None


def lines_of(text: str) -> list[str]:
    r"""Splits a text at `\n`, `\r\n` and `\r` only, and keeps them."""
    return _LINE.findall(text)


def cells_of(text: str) -> list[Cell]:
    """Finds the cells of code of a notebook.

    Args:
        text: The text of the notebook's file.

    Returns:
        The cells. There are none if the notebook is in another language than Python.

    Raises:
        ValueError: The text is no JSON, or no notebook of nbformat 4.
    """
    try:
        notebook = json.loads(text, strict=False)
    except RecursionError as error:
        raise ValueError("it is nested too deeply for a notebook") from error
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if isinstance(version, int) and version < 4:
        raise ValueError(
            f"it is a notebook of nbformat {version}, and only 4 is read: convert it "
            "by `jupyter nbconvert --to notebook --inplace`"
        )
    if version != 4 or not isinstance(notebook.get("cells"), list):
        raise ValueError("it is JSON, but no notebook of nbformat 4")
    if not _language(notebook).startswith("python"):
        return []
    top = _values(text, _SPACE.match(text).end())  # type: ignore[union-attr]
    starts = _values(text, top["cells"]).values()
    return [
        _cell(text, start, number)
        for number, (cell, start) in enumerate(
            zip(notebook["cells"], starts, strict=True), 1
        )
        if isinstance(cell, dict)
        and cell.get("cell_type") == "code"
        and _is_source(cell.get("source"))
    ]


def _language(notebook: dict[str, Any]) -> str:
    metadata = notebook.get("metadata")
    for key, name in (("language_info", "name"), ("kernelspec", "language")):
        part = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(part, dict) and isinstance(part.get(name), str):
            return part[name].lower()
    return "python"


def _is_source(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(line, str) for line in value)
    return isinstance(value, str)


def _values(text: str, start: int) -> dict[Any, int]:
    """Returns the positions of the values of a JSON object or list, by key or index."""
    found: dict[Any, int] = {}
    at = _next(text, start + 1)
    while text[at] not in "]}":
        key: Any = len(found)
        if text[start] == "{":
            key, at = _DECODER.raw_decode(text, at)
            at = _next(text, _next(text, at) + 1)  # Behind the colon.
        found[key] = at
        at = _next(text, _DECODER.raw_decode(text, at)[1])
        if text[at] == ",":
            at = _next(text, at + 1)
    return found


def _next(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _cell(text: str, start: int, number: int) -> Cell:
    source = _values(text, start)["source"]
    is_list = text[source] == "["
    literals = list(_values(text, source).values()) if is_list else [source]
    spans: list[tuple[int, int]] = []
    ends = []
    for literal in literals:
        at = literal + 1
        while text[at] != '"':
            end = _CHARACTER.match(text, at).end()  # type: ignore[union-attr]
            spans.append((at, end))
            at = end
        ends.append(at)
    between = None
    if len(literals) > 1:
        between = text[ends[0] : literals[1] + 1]
    elif is_list and literals:
        between = f'",{text[source + 1 : literals[0] + 1]}'
    decoded = (_DECODER.raw_decode(text, literal)[0] for literal in literals)
    return Cell(number, "".join(decoded), spans, between)


def replace(text: str, changes: Sequence[tuple[Cell, int, int, str]]) -> str:
    """Changes cells within the text of their notebook.

    Args:
        text: The text of the notebook's file.
        changes: Cell, start and end in its source, and the new text. None is empty, and
            none overlap.

    Returns:
        The text with the changes, and otherwise unchanged.
    """
    is_ascii = text.isascii()  # A file of ASCII characters stays one.
    spliced = []
    for cell, start, end, new in changes:
        lines = [
            json.dumps(line, ensure_ascii=is_ascii)[1:-1] for line in lines_of(new)
        ]
        joined = (
            "".join(lines)
            if cell.between is None
            else cell.between.join(lines)  # One string for each line, as in Jupyter.
        )
        spliced.append((cell.spans[start][0], cell.spans[end - 1][1], joined))
    return splice(text, spliced)


def splice(text: str, changes: Sequence[tuple[int, int, str]]) -> str:
    """Replaces stretches of a text, given by start and end, that do not overlap."""
    parts = []
    done = 0
    for start, end, new in sorted(changes):
        parts += [text[done:start], new]
        done = end
    return "".join([*parts, text[done:]])


# Cell magics whose cell is Python, and runs in the notebook's own process.
_PYTHON_CELLS = {"capture", "memit", "mprun", "prun", "time", "timeit"}
_TIMED = re.compile(r"(\s*)(%(?:time|timeit|prun|memit)\s+(?:-\w+\s+(?:\d+\s+)?)*)(.*)")
_MAGIC = re.compile(
    r"""\s*(?:
        [!%?]                                           # !ls, %matplotlib, ?name
        | [^\W\d][\w.,\s]*=\s*(?:!|%(?=[^\W\d]))        # files = !ls
        | [\w.*]+\?{1,2}\s*$                            # name?
        | (?:pip|conda|mamba)\s+(?:install|uninstall|list|show|freeze)\b
    )""",
    re.VERBOSE,
)


def python_of(text: str) -> tuple[str, list[tuple[int, int]]]:
    r"""Separates the Python code of a cell from its magics.

    Args:
        text: A cell's source.

    Returns:
        The Python code, each character in its line and column of the cell, with `\n` at
        the ends of lines; and start and end of each magic.
    """
    lines = lines_of(text)
    code = [line.rstrip("\r\n") + "\n" for line in lines]
    starts = [0, *itertools.accumulate(map(len, lines))]
    magics = []
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    whole = re.match(r"%%(\w*)", lines[first]) if lines else None
    if whole and whole[1] not in _PYTHON_CELLS:
        return "\n" * len(lines), [(0, len(text))]
    if whole:
        code[first] = "pass\n"
        magics.append((starts[first], starts[first + 1]))
    at = first + 1 if whole else first
    while at < len(lines):
        end = at + 1
        if _MAGIC.match(code[at]) and _complete(code[:at]):
            timed = _timed(code[at])
            if timed is None:
                while end < len(lines) and code[end - 1].endswith("\\\n"):
                    end += 1
                indent = code[at][: len(code[at]) - len(code[at].lstrip())]
                code[at:end] = [f"{indent}pass\n", *["\n"] * (end - at - 1)]
                magics.append((starts[at], starts[end]))
            else:
                code[at] = timed
        at = end
    return "".join(code), magics


def _timed(line: str) -> str | None:
    """Returns the statement of `%time statement`, in its column, or `None`."""
    found = _TIMED.match(line)
    if found is None or not found[3].strip():
        return None
    indent, magic, statement = found.groups()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(statement)
    except (SyntaxError, ValueError):
        return None
    return f"{indent}{'pass;':{len(magic)}}{statement}\n"


def _complete(lines: Sequence[str]) -> bool:
    """Returns whether these lines are complete, so that a new statement may begin."""
    if lines and lines[-1].endswith("\\\n"):
        return False
    try:
        for _ in tokenize.generate_tokens(iter(lines).__next__):
            pass
    except tokenize.TokenError:  # An open bracket or string.
        return False
    except SyntaxError:
        pass
    return True
