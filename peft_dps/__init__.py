"""Dynamic Parameter Selection for PEFT: `get_peft_model(model, DPSConfig(...))`. Importing it registers the tuner."""

from peft_dps import recipes
from peft_dps.integrations import DPSTrainerCallback, register_for_checkpointing, trainer_callback
from peft_dps.selection.phase import Stage
from peft_dps.selection.scores import register_score
from peft_dps.training import hooks
from peft_dps.training.status import DPSStatus
from peft_dps.tuner import registration
from peft_dps.tuner.adapter import dps_adapter, unsharded_parameters
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.dropout import disable_dropout
from peft_dps.tuner.export import export_adapter
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.model import DPSModel

__version__ = "0.1.0"

registration.register()
hooks.install()
trainer_callback.install()

__all__ = [
    "DPSConfig",
    "DPSLayer",
    "DPSModel",
    "DPSStatus",
    "DPSTrainerCallback",
    "Stage",
    "disable_dropout",
    "dps_adapter",
    "export_adapter",
    "recipes",
    "register_for_checkpointing",
    "register_score",
    "unsharded_parameters",
]
