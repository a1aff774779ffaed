"""What can go wrong, as types. Every message names the field or the cause, the value, and the remedy."""


class DPSError(Exception):
    """Base class of every error that peft_dps raises on purpose."""


class ConfigError(DPSError, ValueError):
    """A field of `DPSConfig` has a value that cannot work."""


class RegistrationError(DPSError, ImportError):
    """The installed PEFT cannot take DPS as a tuner."""


class TargetError(DPSError, ValueError):
    """A module was targeted that DPS cannot train: its type, its dtype or its state is unsupported."""


class ScoreError(DPSError, ValueError):
    """Scores are NaN, negative, or missing, so that no subnetwork can be selected from them."""


class EngineError(DPSError, RuntimeError):
    """The training engine updates the weights in a way in which DPS cannot take part."""


class ScheduleError(DPSError, RuntimeError):
    """The stage length in steps cannot be told, because the total number of steps is unknown."""


class StateError(DPSError, ValueError):
    """A saved training state is missing, damaged, or that of another training."""


class AdapterFileError(DPSError, RuntimeError):
    """What is to be loaded does not fit: incomplete, altered, or made against another base model."""
