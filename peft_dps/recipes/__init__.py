"""Selective fine-tuning methods by name: each a function that returns its `DPSConfig`."""

from peft_dps.recipes.blocks import badam, lisa
from peft_dps.recipes.dps import dps_dense, dps_mix
from peft_dps.recipes.fixed import dsee, magnitude, paca, random_mask, s2ft
from peft_dps.recipes.once import child_tuning_d, fish, sift, smt
from peft_dps.recipes.tensors import greentrainer, hft

__all__ = [
    "badam",
    "child_tuning_d",
    "dps_dense",
    "dps_mix",
    "dsee",
    "fish",
    "greentrainer",
    "hft",
    "lisa",
    "magnitude",
    "paca",
    "random_mask",
    "s2ft",
    "sift",
    "smt",
]
