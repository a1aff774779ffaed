"""Selective fine-tuning methods by name: each a function, in a file of its name, that returns its `DPSConfig`."""

from peft_dps.recipes.badam import badam
from peft_dps.recipes.child_tuning_d import child_tuning_d
from peft_dps.recipes.child_tuning_f import child_tuning_f
from peft_dps.recipes.dps_dense import dps_dense
from peft_dps.recipes.dps_mix import dps_mix
from peft_dps.recipes.dsee import dsee
from peft_dps.recipes.fish import fish
from peft_dps.recipes.greentrainer import greentrainer
from peft_dps.recipes.hft import hft
from peft_dps.recipes.lisa import lisa
from peft_dps.recipes.lt_sft import lt_sft
from peft_dps.recipes.magnitude import magnitude
from peft_dps.recipes.mixout import mixout
from peft_dps.recipes.paca import paca
from peft_dps.recipes.random_mask import random_mask
from peft_dps.recipes.s2ft import s2ft
from peft_dps.recipes.sift import sift
from peft_dps.recipes.smt import smt

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
