"""Every python block of README.md, the tutorial and docs/serving.md runs: in order, in one namespace.

The folder has tiny models under the names of real ones, and tables. A comment `# > text` after a print says what is
printed; the text has to appear in the output, in the same order.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.local_models import write_models, write_tables

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def _clean_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_clean_accelerate")
# What the Trainer's defaults bring about on a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
# TRL's.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "page", [README, DOCS / "tutorial.md", DOCS / "serving.md"], ids=lambda page: page.stem.lower()
)
def test_python_blocks_run_and_print_what_they_say(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_models(tmp_path)
    write_tables(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 3
    namespace = {"__name__": "readme"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # Empty lines before it give a traceback the line numbers of the file.
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)  # noqa: S102
    output = capsys.readouterr().out
    position = 0
    for promised in re.findall(r"^# > (.*)$", "".join(block.group(1) for block in blocks), re.MULTILINE):
        position = output.find(promised, position)
        assert position >= 0, f"{page.name} promises {promised!r}, printed was:\n{output}"


def test_the_two_commands_come_first():
    assert README.read_text(encoding="utf-8").split("```bash\n")[1].startswith("make demo")


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / link).exists(), link
