"""The versions that are promised are those that are tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from peft_dps.tuner.peft_interface import MINIMUM, TESTED
from tests.versions import FAST, ROWS, find_python

ROOT = Path(__file__).parents[2]


def pins(path: str) -> dict[str, str]:
    lines = (line.partition(";")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for, but for the tools of the quality gates and the documentation."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text[text.index("\ndependencies = [") : text.index("# The pages under docs/.")]
    found = [Requirement(each) for each in re.findall(r"""^    ["'](.+?)["'],""", text, re.MULTILINE)]
    return {each.name: each for each in found if each.specifier}


def test_the_lowest_versions_are_the_floors_of_the_package():
    lowest = pins("constraints-lowest.txt")
    # Where a package needs a Python above the lowest one, it is not among them.
    floors = {
        name: next(each.version for each in asked.specifier if each.operator == ">=")
        for name, asked in requirements().items()
        if asked.marker is None or asked.marker.evaluate({"python_version": "3.10"})
    }
    assert {name: Version(pin) for name, pin in lowest.items()} == {name: Version(at) for name, at in floors.items()}


@pytest.mark.parametrize("path", ["constraints.txt", "constraints-lowest.txt"])
def test_pinned_versions_are_within_the_ranges(path):
    pinned, asked = pins(path), requirements()
    assert [name for name in asked if name in pinned and pinned[name] not in asked[name].specifier] == []


def test_the_package_knows_its_oldest_and_its_newest_peft():
    assert (pins("constraints-lowest.txt")["peft"], pins("constraints.txt")["peft"]) == (MINIMUM, TESTED)


def test_every_python_is_tested_that_the_package_is_classified_for():
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert classified == [row.python for row in ROWS]


def test_what_is_named_is_there(tmp_path, monkeypatch):
    assert [path for path in FAST if not (ROOT / path).exists()] == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    python = tmp_path / "versions" / "3.9.1" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    assert find_python("3.9") == str(python)
