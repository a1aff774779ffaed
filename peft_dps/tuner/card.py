"""A section of a model card: marked, so that it is found and replaced when the card is written again."""

from __future__ import annotations

import re
from pathlib import Path

_BEGIN, _END = "<!-- peft_dps: written on saving, replaced on saving again -->", "<!-- end of peft_dps -->"


def write_section(section: str, path: Path) -> None:
    """Put the section into a model card, in place of an earlier one.

    Args:
        section: Markdown.
        path: The card; if there is none, nothing is written.
    """
    if not path.is_file():
        return
    section = f"{_BEGIN}\n{section.strip()}\n{_END}"
    text = path.read_text(encoding="utf-8")
    earlier = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    replaced, found = earlier.subn(lambda _: section, text, count=1)
    path.write_text(replaced if found else f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")
