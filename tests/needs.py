"""What some tests need beyond the lowest versions that the package runs with."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, at_least: str, why: str) -> pytest.MarkDecorator:
    """Skip a test below a version of a package, and say why."""
    is_older = Version(version(package)) < Version(at_least)
    return pytest.mark.skipif(is_older, reason=f"needs {package} {at_least}: {why}")


fsdp2 = needs("torch", "2.11", "FSDP2 of torch 2.6 cannot compute on a CPU, and that of 2.7 rounds otherwise")
one_graph = needs("torch", "2.7", "torch 2.6 cannot trace PEFT's forward into one graph")
resumed_epochs = needs(
    "transformers", "5", "transformers 4 draws other batches after a resume in a later epoch, with or without DPS"
)
gguf_tokenizers = needs("transformers", "5", "transformers 4 cannot load the tokenizer that it makes of a GGUF file")
