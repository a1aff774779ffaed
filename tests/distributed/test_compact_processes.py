"""Compact adapters in several processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import pytest

from tests.launching import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1"])
def test_compact_adapters_equal_one_process(engine):
    torchrun("compact_worker.py", engine)
