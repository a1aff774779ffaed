"""Makes PEFT know DPS. The only file that touches PEFT's tables, and its classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import peft
from packaging.version import Version
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from peft_dps.errors import RegistrationError
from peft_dps.tuner.card import write_section
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
    _complete_cards()


def _complete_cards() -> None:
    """Give model cards the section on DPS back that the Trainer drops, when it lets PEFT add what it knows.

    `Trainer.create_model_card` and `Trainer.push_to_hub` write the card anew after the adapter was saved.
    """
    current = PeftModel.create_or_update_model_card
    write: Callable[[PeftModel, str], None] = getattr(current, "_without_dps", current)

    @functools.wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write(self, output_dir)
        config = self.peft_config.get("default")  # PEFT writes one card, and only that adapter lies beside it
        if isinstance(config, DPSConfig) and config.card is not None:
            write_section(config.card, Path(output_dir, "README.md"))

    create_or_update_model_card._without_dps = write  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
