"""Training frameworks: what they know and DPS would otherwise have to be told."""

from peft_dps.integrations.accelerate import register_for_checkpointing
from peft_dps.integrations.trainer_callback import DPSTrainerCallback

__all__ = ["DPSTrainerCallback", "register_for_checkpointing"]
