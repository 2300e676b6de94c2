"""Tables for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = Sequence[str]


def text_table(head: Row, rows: Sequence[Row]) -> str:
    """Formats a table with the first column left-aligned, and the others right-aligned.

    Args:
        head: Names of the columns.
        rows: The cells of each line.

    Returns:
        Lines of text.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(head: Row, rows: Sequence[Row]) -> str:
    """Formats the same table as HTML, with escaped cells.

    Args:
        head: Names of the columns.
        rows: The cells of each line.
    """

    def line(cells: Row, tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align:{"right" if column else "left"}">'
            f"{html.escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody>"
        "</table>"
    )
