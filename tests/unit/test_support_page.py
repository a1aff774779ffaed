"""docs/support.md says what the tests say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.matrix import PAGE, ROOT, Entry, entries_of, marked_files, page

WRITE = "import sys; from tests.matrix import collect, page; sys.stdout.write(page(collect()))"


def test_the_page_is_what_the_marks_of_the_tests_say(request):
    items, config = request.session.items, request.config
    is_part = config.option.keyword or any("::" in each for each in config.args)
    if not is_part and {item.path for item in items} >= set(marked_files()):
        written = page(entries_of(items))
    else:
        command = [sys.executable, "-c", WRITE]
        written = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    assert PAGE.read_text() == written, "docs/support.md is out of date: run `python -m tests.matrix`"


def test_rows_and_lists():
    text = page(
        [
            Entry("Models", "BERT", "saves", None, "a.py::one"),
            Entry("Models", "BERT", "merges", None, "a.py::two"),
            Entry("Models", "T5", "merges", "it is odd", "a.py::two"),
            Entry("Models", "T5", "floats", None, "a.py::two"),
            Entry("Models", "BART", "merges", "it is odd", "a.py::two"),
            Entry("Models", "BART", "floats", None, "a.py::two"),
            Entry("Models", None, "swims", None, "b.py::three"),
            Entry("Models", None, "flies", "it is heavy", "b.py::three"),
        ]
    )
    assert "|  | saves | merges | floats |" in text
    assert "| BERT | yes | yes | - |" in text
    assert "| T5; BART | - | refused | yes |" in text
    assert "- refused: it is odd\n" in text
    assert "| flies | it is heavy |" in text
    assert "- swims\n" in text
    assert "Tests: `a.py`, `b.py`\n" in text


def test_an_unknown_section_is_an_error():
    with pytest.raises(SystemExit, match=r"\['Modles'\]"):
        page([Entry("Modles", None, "saves", None, "a.py::one")])
