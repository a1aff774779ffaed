"""Bottleneck adapters for encoders like BERT: small networks between frozen layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peft_dps.compare.methods.head import head_parameters, train_only

HOULSBY_STD = 1e-3  # close to the identity at the start: Houlsby et al., section 2.1
PFEIFFER_STD = 0.02  # that of BERT's own layers, as AdapterHub draws them
_PARTS = ("dense", "dropout", "LayerNorm")


class Bottleneck(nn.Module):
    """A bottleneck: U a(D h + d) + u + r, with a nonlinearity a and a residual r.

    Args:
        width: Size of h.
        size: Size of the bottleneck; D is `[size, width]`, U is `[width, size]`.
        activation: "gelu" or "relu".
        std: Standard deviation of D and U at the start, before what lies beyond two of it is drawn again.
    """

    def __init__(self, width: int, size: int, activation: str, std: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = F.gelu if activation == "gelu" else F.relu
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return U a(D h + d) + u + r; r is h if not given."""
        result: torch.Tensor = self.up(self.activation(self.down(hidden)))
        return result + (hidden if residual is None else residual)


class PfeifferOutput(nn.Module):
    """The output of a feed-forward layer, with an adapter after it: LN(U a(D h) + r + x).

    r is the projection's output and h = LN(r + x), x being the layer's input.

    Args:
        output: A module with `dense`, `dropout` and `LayerNorm`.
        size: Size of the bottleneck.
    """

    def __init__(self, output: Any, size: int) -> None:
        super().__init__()
        self.output: Any = output
        self.adapter = Bottleneck(_width(output), size, "relu", PFEIFFER_STD)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Project, adapt, add, normalize."""
        residual = self.output.dropout(self.output.dense(hidden_states))
        hidden = self.output.LayerNorm(residual + input_tensor)
        result: torch.Tensor = self.output.LayerNorm(self.adapter(hidden, residual) + input_tensor)
        return result


def add_houlsby(model: PreTrainedModel, size: int = 64) -> PreTrainedModel:
    """Insert the adapters of Houlsby et al. (ICML 2019, arXiv:1902.00751).

    Two in each layer, after the output projection of attention and after that of the feed-forward part, before the
    residual is added: h + U gelu(D h + d) + u. Adapters, layer normalizations and the head are trained.

    Args:
        model: An encoder like BERT, with a head; changed in place.
        size: Size of the bottleneck.

    Returns:
        The same model.

    Raises:
        ValueError: It is not like BERT, or the size is no positive int.
    """
    outputs = _outputs(model, "houlsby", size)
    trained = head_parameters(model)
    for path, module in outputs.items():
        # Its forward is LayerNorm(dropout(dense(h)) + x): after dropout is where the adapter belongs.
        adapter = _like(module, Bottleneck(_width(module), size, "gelu", HOULSBY_STD))
        module.dropout = nn.Sequential(module.dropout, adapter)
        trained |= {f"{path}.dropout.1.{name}" for name, _ in adapter.named_parameters()}
    trained |= {name for name, _ in model.named_parameters() if ".LayerNorm." in name}
    train_only(model, trained)
    return model


def add_pfeiffer(model: PreTrainedModel, size: int | None = None) -> PreTrainedModel:
    """Insert the adapters of Pfeiffer et al. (MAD-X, EMNLP 2020, arXiv:2005.00052, equation 1).

    One in each layer, after the feed-forward part: U relu(D h + d) + u + r, where r is the output of the part's
    projection and h is that after residual and layer normalization, which is then applied once more. Adapters and
    the head are trained.

    Args:
        model: An encoder like BERT, with a head; changed in place.
        size: Size of the bottleneck; by default a sixteenth of the hidden size, but at least 1.

    Returns:
        The same model.

    Raises:
        ValueError: It is not like BERT, or the size is no positive int.
    """
    outputs = _outputs(model, "pfeiffer", 1 if size is None else size)
    trained = head_parameters(model)
    for path, module in outputs.items():
        if path.endswith("attention.output"):
            continue
        parent, _, name = path.rpartition(".")
        wrapped = PfeifferOutput(module, max(1, _width(module) // 16) if size is None else size)
        _like(module, wrapped)
        setattr(model.get_submodule(parent), name, wrapped)
        trained |= {f"{path}.adapter.{name}" for name, _ in wrapped.adapter.named_parameters()}
    train_only(model, trained)
    return model


def _outputs(model: PreTrainedModel, method: str, size: Any) -> dict[str, Any]:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"`size` of {method} must be a positive integer, got {size!r}.")
    found = {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "output" and all(hasattr(module, part) for part in _PARTS)
    }
    if not any(path.endswith("attention.output") for path in found):
        raise ValueError(
            f"{method} adapters go into encoders like BERT (RoBERTa, XLM-R, ELECTRA, DeBERTa), whose layers have "
            f"`attention.output` and `output` with {', '.join(_PARTS)}, and {type(model).__name__} has none. Use "
            "`lora` or another of PEFT's methods."
        )
    return found


def _width(output: Any) -> int:
    width: int = output.dense.out_features
    return width


def _like(output: Any, new: nn.Module) -> nn.Module:
    return new.to(device=output.dense.weight.device, dtype=output.dense.weight.dtype)
