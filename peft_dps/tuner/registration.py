"""Makes PEFT know DPS. The only file that touches PEFT's tables."""

from __future__ import annotations

from peft_dps.errors import RegistrationError
from peft_dps.tuner.config import DPSConfig, DPSPeftType
from peft_dps.tuner.model import DPSModel
from peft_dps.tuner.peft_interface import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    require_peft,
)


def register() -> None:
    """Enter DPS into PEFT's tables of configs, tuners and prefixes.

    `peft.utils.register_peft_method` accepts members of PEFT's own enum only, so the tables are written under a
    one-member `str` enum of ours; it hashes and compares like the string "DPS" that checkpoints carry.

    Raises:
        RegistrationError: If PEFT is too old, calls no more what DPS replaces, or has another tuner of that name.
    """
    version = require_peft()
    name = DPSPeftType.DPS
    taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if name.value in PeftType.__members__ or (taken is not None and taken.__module__ != DPSConfig.__module__):
        raise RegistrationError(
            f"peft {version} already has a tuner named {name.value}, so peft_dps cannot add its own. Use "
            "that tuner without importing peft_dps, or install a peft version without it."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = DPSConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = DPSModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = DPSModel.prefix  # type: ignore[index]
