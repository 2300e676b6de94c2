"""Tables for a terminal and for a notebook."""

from html.parser import HTMLParser

import pytest

from advreg.evaluation.tables import html_table, text_table

pytestmark = pytest.mark.every_backend

HEAD = ["attack", "ε"]


def test_columns_are_aligned_and_lines_end_without_blanks():
    assert text_table(HEAD, [["PGD-40", "0.1"], ["a", ""]]).split("\n") == [
        "attack    ε",
        "------  ---",
        "PGD-40  0.1",
        "a",
    ]


def test_a_table_without_lines_is_its_head():
    assert text_table(HEAD, []) == "attack  ε\n------  -"


def test_a_line_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="argument"):
        text_table(HEAD, [["one cell"]])


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_html_holds_the_same_cells_and_escapes_them():
    text = html_table(HEAD, [["<script>alert('&')</script>", "0.1"]])
    reader = _Cells()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.cells == [*HEAD, "<script>alert('&')</script>", "0.1"]
    assert reader.tags.count("th") == 2
    assert reader.tags.count("td") == 2
