"""Selective fine-tuning methods by name: each a function that returns its `DPSConfig`."""

from peft_dps.recipes.dps import dps_dense, dps_mix
from peft_dps.recipes.fixed import random_mask

__all__ = ["dps_dense", "dps_mix", "random_mask"]
