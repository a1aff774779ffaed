from __future__ import annotations

import re
from pathlib import Path

import pytest

import peft_dps.compare as package
from peft_dps.compare.cli.specification import read_specification, to_comparison

PAGE = (Path(__file__).parents[3] / "docs" / "compare.md").read_text(encoding="utf-8")


def test_the_public_names_are_there():
    assert sorted(package._MODULES) == package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_what_the_page_shows_can_be_read(tmp_path):
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)):
        exec(compile(block, f"compare.md, block {number}", "exec"), {"__name__": "page"})  # noqa: S102
    (specification,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "page.toml").write_text(specification)
    to_comparison(read_specification(tmp_path / "page.toml")).check()


@pytest.fixture(autouse=True)
def _forget():
    yield
    from peft_dps.compare.methods.table import METHODS

    METHODS.pop("rslora", None)
