"""Which names an adapter may have, and which one is meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_dps.errors import ConfigError


def require_adapter_name(name: Any) -> None:
    """Check that a name can be that of an adapter: a key of torch's containers, and a folder's name on saving."""
    if not isinstance(name, str) or not name or any(character in name for character in "./\\\0"):
        raise ConfigError(
            f"`adapter_name` must be a word without dots and slashes, got {name!r}. It is part of the names of "
            "parameters, and the folder that the adapter is saved to."
        )
    if any(hasattr(container, name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise ConfigError(
            f"`adapter_name` must not be {name!r}: torch's containers have an attribute of that name. Use another one."
        )


def one_adapter(name: str | None, active: Sequence[str]) -> str:
    """Return the name of an adapter, or else that of the only active one."""
    if name is None and len(active) != 1:
        raise ConfigError(f"`adapter_name` is needed, since the active adapters are {list(active)}.")
    return active[0] if name is None else name
