"""Norms whose running statistics change while an adapter is trained."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from peft_dps.tuner.peft_interface import ModulesToSaveWrapper

logger = logging.getLogger(__name__)


def warn_of_statistics(model: nn.Module) -> None:
    """Warn of norms whose running statistics training changes in the base model, unless they are saved in full."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    saved = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    norms = [
        key
        for key, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats and id(module) not in saved
    ]
    if norms:
        logger.warning(
            "Training will change the running statistics of %d norms (%s, ...), which are no part of the adapter: it "
            "is neither saved with them nor disabled without them. Add these modules to `modules_to_save`, or set "
            "`train_remaining=True`.",
            len(norms),
            norms[0],
        )
