from __future__ import annotations

import io

import pytest
from rich.console import Console

from peft_dps.compare.report.table import Table, markdown

SHEET = Table(
    "scores [bold] | <b>",
    ("method", "mean"),
    (("a|b [red]x[/red]", "1.00"), ("_c_\n*d*", "2.00")),
    notes=("Note [1] & more.",),
    best=frozenset({1}),
)


def test_markdown_shows_text_as_it_is():
    lines = SHEET.to_markdown().splitlines()
    assert lines[:2] == ["| method | mean |", "| :--- | ---: |"]
    assert lines[2] == r"| a\|b \[red\]x\[/red\] | 1.00 |"
    assert lines[3] == r"| **\_c\_ \*d\*** | 2.00 |"
    assert r"Note \[1\] \& more." in lines
    assert markdown("<script> `x` #1 ~y~") == r"\<script\> \`x\` \#1 \~y\~"


def shown(table, width):
    console = Console(file=io.StringIO(), width=width)
    for part in table.to_rich(width):
        console.print(part)
    return console.file.getvalue()


def test_the_terminal_shows_text_as_it_is():
    for text in ("scores [bold] | <b>", "a|b [red]x[/red]", "2.00", "Note [1] & more."):
        assert text in shown(SHEET, 100)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_cell_breaks_within_a_word(width):
    header = ("method", *(f"newspaper{index} (out of domain)" for index in range(6)), "peak memory")
    rows = [(name, *["81.25 \u00b1 10.35"] * 6, "1,024 MiB") for name in ("full FT, no dropout", "b" * 30)]
    lines = shown(Table("scores", header, tuple(rows)), width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert words.count("1,024") == 2
    assert words.count("81.25") == words.count("10.35") == 12
    assert words.count("newspaper3") == 1
    assert words.count("b" * 30) >= 1
    assert words.count("dropout") == words.count("full")
    assert words.count("method") == (1 if width == 200 else words.count("b" * 30))


def test_columns_without_any_value_are_left_out():
    columns = {"method": str, "nothing": lambda item: "-", "some": lambda item: "-" if item == "a" else "1"}
    assert Table.of("", columns, ["a", "b"]).header == ("method", "some")
