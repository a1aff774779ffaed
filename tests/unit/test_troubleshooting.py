"""Every message that docs/troubleshooting.md quotes is one that the package has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"\*\*(`+) ?([^*]+?) ?\1\*\*")
OF_OTHERS = {
    "KeyError: 'DPS'",
    "`is_gradient_checkpointing` is deprecated",
    "those params were newly initialized",
}


def texts():
    """Go through the strings of the package; what is put into them is `...`."""
    for path in (ROOT / "peft_dps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[rsd]", "...", node.value)


def test_quoted_messages_exist():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = {message for _, message in QUOTED.findall(page)} - OF_OTHERS
    known = "\n".join(texts())
    assert len(quoted) > 30
    assert not sorted(message for message in quoted if message not in known)
