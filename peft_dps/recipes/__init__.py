"""Selective fine-tuning methods by name: each a function that returns its `DPSConfig`."""

from peft_dps.recipes.blocks import badam, lisa
from peft_dps.recipes.child_tuning import child_tuning_f
from peft_dps.recipes.dps import dps_dense, dps_mix
from peft_dps.recipes.fixed import dsee, magnitude, paca, random_mask, s2ft
from peft_dps.recipes.lt_sft import lt_sft
from peft_dps.recipes.mixout import mixout
from peft_dps.recipes.once import child_tuning_d, fish, sift, smt
from peft_dps.recipes.tensors import greentrainer, hft

__all__ = [
    "badam",
    "child_tuning_d",
    "child_tuning_f",
    "dps_dense",
    "dps_mix",
    "dsee",
    "fish",
    "greentrainer",
    "hft",
    "lisa",
    "lt_sft",
    "magnitude",
    "mixout",
    "paca",
    "random_mask",
    "s2ft",
    "sift",
    "smt",
]
