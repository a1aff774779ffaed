"""Dynamic Parameter Selection for PEFT: `get_peft_model(model, DPSConfig(...))`. Importing it registers the tuner."""

from peft_dps.training import hooks as bridge
from peft_dps.tuner import registration
from peft_dps.tuner.adapter import (
    check_ranks_agree,
    dps_state_dict,
    dps_status,
    load_dps_state,
    load_dps_state_dict,
    offloaded_parameters,
    save_dps_state,
)
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.dropout import disable_dropout
from peft_dps.errors import (
    AdapterFileError,
    ConfigError,
    DPSError,
    EngineError,
    RegistrationError,
    ScheduleError,
    ScoreError,
    StateError,
    TargetError,
)
from peft_dps.tuner.export import ExportReport, export_adapter
from peft_dps.integrations import DPSTrainerCallback, register_for_checkpointing, trainer
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.model import DPSModel
from peft_dps.selection.schedule import Stage, StageSchedule
from peft_dps.selection.scores import Evidence, register_score
from peft_dps.training.status import DPSStatus

__version__ = "0.1.0"

registration.register()
bridge.install()
trainer.install()

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "DPSConfig",
    "DPSError",
    "DPSLayer",
    "DPSModel",
    "DPSStatus",
    "DPSTrainerCallback",
    "EngineError",
    "Evidence",
    "ExportReport",
    "RegistrationError",
    "ScheduleError",
    "ScoreError",
    "Stage",
    "StageSchedule",
    "StateError",
    "TargetError",
    "check_ranks_agree",
    "disable_dropout",
    "dps_state_dict",
    "dps_status",
    "export_adapter",
    "load_dps_state",
    "load_dps_state_dict",
    "offloaded_parameters",
    "register_for_checkpointing",
    "register_score",
    "save_dps_state",
]
