"""Every python block of README.md, the tutorial and docs/serving.md runs: in order, in one namespace.

So does each block of the how-to pages, by itself, beside what its reader has already.

The folder has tiny models under the names of real ones, and tables. A comment `# > text` after a print says what is
printed; the text has to appear in the output, in the same order.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import peft_dps
from peft_dps import DPSConfig
from tests.local_models import write_models, write_tables

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(block, page, namespace):
    """Run one block of a page."""
    # Empty lines before it give a traceback the line numbers of the file.
    line = block.string.count("\n", 0, block.start(1))
    exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)  # noqa: S102


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
    assert len(blocks) == text.count("```python") > 1
    if find_spec("trl") is None:  # as on Python 3.10: then what comes before it runs
        blocks = list(takewhile(lambda block: "from trl" not in block.group(1), blocks))
    namespace = {"__name__": "readme"}
    for block in blocks:
        run(block, page, namespace)
    output = capsys.readouterr().out
    position = 0
    for promised in re.findall(r"^# > (.*)$", "".join(block.group(1) for block in blocks), re.MULTILINE):
        position = output.find(promised, position)
        assert position >= 0, f"{page.name} promises {promised!r}, printed was:\n{output}"


def make_base(of=LlamaForCausalLM):
    """Make what a reader of a how-to page has: a model in a folder."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    of(LlamaConfig(vocab_size=32, pad_token_id=0, num_labels=2, **size)).save_pretrained("base")
    return of.from_pretrained("base")


def what_the_reader_has(page):
    """Make the names that the blocks of how-to pages take as given."""
    ids = torch.randint(1, 32, (2, 8))
    of, task, labels = LlamaForCausalLM, "CAUSAL_LM", ids
    if page == "files":
        of, task, labels = LlamaForSequenceClassification, "SEQ_CLS", torch.tensor([0, 1])
    batches = [{"input_ids": ids, "labels": labels}] * 2
    model = get_peft_model(make_base(of), DPSConfig(stage_steps=1, task_type=task))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("dps-adapter")
    for other in ("math", "code") if page == "files" else ():
        model.add_adapter(other, DPSConfig(stage_steps=1, task_type=task))
    return {
        "base": make_base(of),
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "loader": DataLoader(batches),
        "accelerator": Accelerator(cpu=True),
        **{each.__name__: each for each in (torch, peft_dps, DPSConfig, PeftModel, get_peft_model)},
        **{each.__name__: each for each in (get_model_state_dict, get_optimizer_state_dict)},
        **{each.__name__: each for each in (set_model_state_dict, set_optimizer_state_dict)},
    }


HOW_TO = [
    pytest.param(name, block, id=f"{name}-{number}")
    for name in ("compact", "memory", "files", "resuming")
    for number, block in enumerate(BLOCK.finditer((DOCS / f"{name}.md").read_text(encoding="utf-8")))
    if "trainer.train(" not in block.group(1)  # the tests of the examples resume a Trainer
]


@pytest.mark.usefixtures("_clean_accelerate")
# torch's, where one process saves as several do.
@pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # which torch 2.6 itself uses
@pytest.mark.parametrize(("name", "block"), HOW_TO)
def test_a_block_of_a_how_to_page_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(block, DOCS / f"{name}.md", what_the_reader_has(name))


def test_the_two_commands_come_first():
    assert README.read_text(encoding="utf-8").split("```bash\n")[1].startswith("make demo")


def anchors_of(page):
    """Return what headings of a page are linked by."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


PAGES = [README, README.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem.lower())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), link
        if anchor and not anchor.startswith("peft_dps."):  # mkdocstrings makes these
            assert anchor in anchors_of(found), link
