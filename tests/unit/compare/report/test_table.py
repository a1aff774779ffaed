from __future__ import annotations

import io

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


def test_the_terminal_shows_text_as_it_is():
    console = Console(file=io.StringIO(), width=100)
    console.print(SHEET.to_rich())
    shown = console.file.getvalue()
    for text in ("scores [bold] | <b>", "a|b [red]x[/red]", "2.00", "Note [1] & more."):
        assert text in shown
