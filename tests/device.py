"""The device that tests compute on: the CPU, or what `PEFT_DPS_TEST_DEVICE` names (`make test-device`)."""

from __future__ import annotations

import os

import torch

_ASKED = torch.device(os.environ.get("PEFT_DPS_TEST_DEVICE", "cpu"))
ON_CPU = _ASKED.type == "cpu"
DEVICE = _ASKED if ON_CPU or _ASKED.index is not None else torch.device(_ASKED.type, 0)

# The tolerances of the tests are those of fp32; by default a GPU convolves in TF32, with a mantissa of 10 bits.
torch.backends.cudnn.allow_tf32 = ON_CPU
