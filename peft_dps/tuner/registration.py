"""Makes PEFT know DPS. The only file that touches PEFT's tables."""

from __future__ import annotations

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from peft_dps.errors import RegistrationError
from peft_dps.tuner.config import DPSConfig, DPSPeftType
from peft_dps.tuner.model import DPSModel

MINIMUM_PEFT = "0.21.2"


def register() -> None:
    """Enter DPS into PEFT's tables of configs, tuners and prefixes.

    `peft.utils.register_peft_method` accepts members of PEFT's own enum only, so the tables are written under a
    one-member `str` enum of ours; it hashes and compares like the string "DPS" that checkpoints carry.

    Raises:
        RegistrationError: If PEFT is too old, or has another tuner of that name.
    """
    if Version(peft.__version__) < Version(MINIMUM_PEFT):
        raise RegistrationError(
            f"peft_dps needs peft >= {MINIMUM_PEFT}, found {peft.__version__}. Run `pip install -U peft`."
        )
    name = DPSPeftType.DPS
    taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if name.value in PeftType.__members__ or (taken is not None and taken.__module__ != DPSConfig.__module__):
        raise RegistrationError(
            f"peft {peft.__version__} already has a tuner named {name.value}, so peft_dps cannot add its own. Use "
            "that tuner without importing peft_dps, or install a peft version without it."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = DPSConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = DPSModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = DPSModel.prefix  # type: ignore[index]
