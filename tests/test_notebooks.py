import json

import pytest
from helpers.notebooks import notebook

from advreg.nsl.migrate import notebooks
from advreg.nsl.migrate.notebooks import cells_of, lines_of, python_of, replace

SOURCES = [
    ["import os\n", "print('<a ä\t😀 \"quoted\"')"],
    "one = 1\ntwo = 2\n",
    [],
    "",
    ["alone"],
]


@pytest.mark.parametrize("indent", [None, 0, 1, 2, 4, "\t"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_cells_are_found_with_where_they_stand(indent, ensure_ascii):
    text = json.dumps(notebook(*SOURCES), indent=indent, ensure_ascii=ensure_ascii)
    text = text.replace("<", r"\u003C")  # As Colab has it.
    cells = cells_of(text)
    assert [cell.text for cell in cells] == ["".join(source) for source in SOURCES]
    assert [cell.number for cell in cells] == [1, 2, 3, 4, 5]
    for cell in cells:
        raw = "".join(text[start:end] for start, end in cell.spans)
        assert json.loads(f'"{raw}"') == cell.text
        assert len(cell.spans) == len(cell.text)


def test_only_code_is_a_cell_and_all_cells_count():
    book = notebook("a", "b", "c", "d", "e")
    book["cells"][0]["cell_type"] = "markdown"
    book["cells"][2]["source"] = ["a", 1]
    del book["cells"][3]["source"]
    assert [cell.number for cell in cells_of(json.dumps(book))] == [2, 5]


def test_changes_leave_the_rest_of_the_file_alone():
    text = json.dumps(notebook(*SOURCES), indent=3, ensure_ascii=False)
    # Spellings that no dump would give back.
    text = text.replace("<", r"\u003c").replace('"metadata"', '"metadata" ') + "\n\n"
    first, second, *_ = cells_of(text)
    after = replace(text, [(first, 7, 9, "re"), (second, 0, 3, "ün")])
    assert after == text.replace("import os", "import re").replace("one = 1", "ün = 1")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["a\n", "x, y\n", "b"], ["a\n", "x\n", "z\n", "b"]),
        (["x, y"], ["x\n", "z"]),
        ("a\nx, y", "a\nx\nz"),
    ],
)
def test_new_lines_are_strings_of_their_own_where_lines_are(source, expected):
    text = json.dumps(notebook(source, "untouched"), indent=1)
    cell = cells_of(text)[0]
    start = cell.text.index("x, y")
    after = replace(text, [(cell, start, start + 4, "x\nz")])
    assert after == json.dumps(notebook(expected, "untouched"), indent=1)


def test_a_change_over_several_lines_joins_them():
    text = json.dumps(notebook(["f(\n", "  1,\n", ")\n", "end"]), indent=1)
    cell = cells_of(text)[0]
    after = replace(text, [(cell, 0, cell.text.index(")") + 1, "g()")])
    assert after == json.dumps(notebook(["g()\n", "end"]), indent=1)


def test_ascii_stays_ascii():
    text = json.dumps(notebook(["abc"]))
    after = replace(text, [(cells_of(text)[0], 1, 2, "ü")])
    assert after.isascii()
    assert cells_of(after)[0].text == "aüc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ('{"cells": [', "no JSON"),
        ("[" * 100_000, "deeply"),
        ("[]", "no notebook of nbformat 4"),
        ('{"cells": {}, "nbformat": 4}', "no notebook of nbformat 4"),
        ('{"nbformat": "4", "cells": []}', "no notebook of nbformat 4"),
        ('{"nbformat": 3, "worksheets": []}', "nbformat 3.*jupyter nbconvert"),
    ],
)
def test_what_is_no_notebook_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        cells_of(text)


@pytest.mark.parametrize(
    "metadata",
    [{"kernelspec": {"language": "R"}}, {"language_info": {"name": "julia"}}],
)
def test_notebooks_in_other_languages_have_no_cells(metadata):
    assert cells_of(json.dumps(notebook("x <- 1", metadata=metadata))) == []


@pytest.mark.parametrize("metadata", [None, {"kernelspec": 1}, {"language_info": {}}])
def test_the_language_is_python_unless_it_is_said(metadata):
    assert cells_of(json.dumps(notebook("x", metadata=metadata)))[0].text == "x"


def test_lines_end_where_python_ends_them():
    text = "a\r\nb\rc\n\fd\v\u2028e\n\nf"
    assert lines_of(text) == ["a\r\n", "b\r", "c\n", "\fd\v\u2028e\n", "\n", "f"]
    assert lines_of("") == []


@pytest.mark.parametrize(
    ("line", "python"),
    [
        ("!ls", "pass"),
        ("  %matplotlib inline", "  pass"),
        ("?name", "pass"),
        ("name.other??", "pass"),
        ("files = !ls *.py", "pass"),
        ("a, b = %magic", "pass"),
        ("pip install numpy", "pass"),
        ("%time x = f(1)", "pass; x = f(1)"),
        ("%timeit -n 10 -r 2 f(1)", "pass;              f(1)"),
        ("%time f(", "pass"),
        ("%time", "pass"),
        ("x != y", "x != y"),
        ("x %= y", "x %= y"),
        ("pip = install", "pip = install"),
    ],
)
def test_magics_are_taken_out(line, python):
    code, magics = python_of(f"if a:\n  b\n{line}\nc\n")
    assert code == f"if a:\n  b\n{python}\nc\n"
    assert bool(magics) == (python.strip() == "pass")


@pytest.mark.parametrize(
    "code",
    ["x = (a\n% b)\n", "x = '''\n!ls\n%%bash\n'''\n", "x = a \\\n% b\n", "f(\n?)\n"],
)
def test_what_is_within_a_statement_is_no_magic(code):
    assert python_of(code) == (code, [])


def test_a_magic_behind_what_is_no_python():
    assert python_of("if a:\n    b\n  c\n!ls\n")[0] == "if a:\n    b\n  c\npass\n"


def test_a_magic_goes_on_behind_backslashes():
    text = "!python a.py \\\r\n   --b \\\r\n   --c\r\nx = 1"
    assert python_of(text) == ("pass\n\n\nx = 1\n", [(0, text.index("x"))])


def test_magics_of_cells():
    assert python_of("%%time\nx = 1\n") == ("pass\nx = 1\n", [(0, 7)])
    assert python_of("\n%%timeit -n 1\nx\n!ls\n")[0] == "\npass\nx\npass\n"
    text = "%%bash\nls (\n"
    assert python_of(text) == ("\n\n", [(0, len(text))])
    assert python_of("") == ("", [])


def test_splicing_takes_changes_in_any_order():
    assert notebooks.splice("abcdef", [(4, 5, "E"), (0, 2, "-")]) == "-cdEf"
