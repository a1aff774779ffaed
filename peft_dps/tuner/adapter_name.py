"""Which names an adapter may have."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_dps.errors import ConfigError


def require_adapter_name(name: Any) -> None:
    """Check that a name can be that of an adapter: a key of torch's containers, and a folder's name on saving.

    Args:
        name: The name.

    Raises:
        ConfigError: If it cannot.
    """
    if not isinstance(name, str) or not name or any(character in name for character in "./\\\0"):
        raise ConfigError(
            f"`adapter_name` must be a word without dots and slashes, got {name!r}. It is part of the names of "
            "parameters, and the folder that the adapter is saved to."
        )
    if any(hasattr(container, name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise ConfigError(
            f"`adapter_name` must not be {name!r}: torch's containers have an attribute of that name. Use another one."
        )
