"""Selective fine-tuning methods by name: each a function that returns its `DPSConfig`."""

from peft_dps.recipes.blocks import badam, lisa
from peft_dps.recipes.dps import dps_dense, dps_mix
from peft_dps.recipes.fixed import random_mask
from peft_dps.recipes.tensors import greentrainer, hft

__all__ = ["badam", "dps_dense", "dps_mix", "greentrainer", "hft", "lisa", "random_mask"]
