"""An adapter that was put into a model in vain: taken out again, with the layers that it alone needed."""

from __future__ import annotations

from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.peft_interface import BaseTuner, ModulesToSaveWrapper


def remove_adapter(tuner: BaseTuner, adapter: str) -> None:
    """Remove an adapter that could not be injected or loaded; the model is then what it was before."""
    tuner.delete_adapter(adapter)
    model = tuner.model
    for key, module in reversed(list(model.named_modules())):  # the inner ones first
        if isinstance(module, DPSLayer) and not (module.dps_weight or module.dps_delta):
            model.set_submodule(key, module.unload_and_optionally_merge_module(False, False, None))
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            model.set_submodule(key, module.original_module)
