"""Selective fine-tuning methods by name: each a function that returns its `DPSConfig`."""

from peft_dps.recipes.child_tuning import child_tuning_f
from peft_dps.recipes.dps import dps_dense, dps_mix
from peft_dps.recipes.fixed import random_mask
from peft_dps.recipes.lt_sft import lt_sft
from peft_dps.recipes.mixout import mixout

__all__ = ["child_tuning_f", "dps_dense", "dps_mix", "lt_sft", "mixout", "random_mask"]
