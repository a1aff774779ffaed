"""What DPS leans on in PEFT: the names that it imports, and the methods in whose place it puts its own.

A PEFT that lacks one of them is refused at import, by its name; tests/contract/test_peft.py has a test of each.
"""

from __future__ import annotations

import peft
from packaging.version import Version

from peft_dps.errors import RegistrationError

MINIMUM = "0.21.0"
TESTED = "0.21.2"  # the newest one that the tests have run with

try:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from peft.config import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
        check_target_module_exists,
    )
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, ModulesToSaveWrapper, PeftType
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
except ImportError as error:
    raise RegistrationError(
        f"peft {peft.__version__} lacks what peft_dps uses ({error}). Run `pip install peft=={TESTED}`, with which it "
        "was tested, or upgrade peft_dps."
    ) from error

# Methods that PEFT calls and DPS replaces. One that PEFT has renamed would never be called, and nothing would say so.
REPLACED: dict[type, tuple[str, ...]] = {
    PeftConfig: ("save_pretrained", "from_pretrained"),
    BaseTuner: (
        "inject_adapter",
        "_prepare_model",
        "_check_new_adapter_config",
        "_check_tied_modules",
        "_check_target_module_exists",
        "_create_and_replace",
        "_replace_module",
        "_cast_adapter_dtype",
        "_get_adapter_state_dict",
        "_remap_adapter_state_dict_for_load",
        "merge_adapter",
        "_unload_and_optionally_merge",
        "_check_merge_allowed",
    ),
    BaseTunerLayer: (
        "merge",
        "unmerge",
        "weight",
        "bias",
        "supports_lora_conversion",
        "_move_adapter_to_device_of_base_layer",
    ),
}

__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "_maybe_include_all_linear_layers",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_peft_model_state_dict",
]


def require_peft() -> str:
    """Check that the installed PEFT is not too old, and calls what DPS replaces.

    Returns:
        Its version.

    Raises:
        RegistrationError: If it is or does not.
    """
    if Version(peft.__version__) < Version(MINIMUM):
        raise RegistrationError(
            f"peft_dps needs peft >= {MINIMUM}, found {peft.__version__}. Run `pip install -U peft`."
        )
    lost = [f"{base.__name__}.{name}" for base, names in REPLACED.items() for name in names if not hasattr(base, name)]
    if lost:
        raise RegistrationError(
            f"peft {peft.__version__} no longer calls {', '.join(lost)}, in whose place peft_dps puts its own. Run "
            f"`pip install peft=={TESTED}`, with which it was tested, or upgrade peft_dps."
        )
    return peft.__version__
