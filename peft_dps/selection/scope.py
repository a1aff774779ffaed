"""Scopes: among which units the best are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from peft_dps.selection.granularity import layer_of
from peft_dps.tensors.registry import Registry


class Scope:
    """The best are chosen within each weight.

    Attributes:
        across: Whether weights are ranked together.
        spans_model: Whether all of them are.
        divides_layers: Whether weights of one layer of the model may be ranked apart.
    """

    across: ClassVar[bool] = False
    spans_model: ClassVar[bool] = False
    divides_layers: ClassVar[bool] = True

    def problems(self, owners: Sequence[str]) -> list[list[int]]:
        """Return what is ranked together.

        Args:
            owners: Paths of the weights, or of the layers of the model whose weights share their units.

        Returns:
            Their indices, one list for each choice.
        """
        return [[index] for index in range(len(owners))]


SCOPES: Registry[type[Scope]] = Registry("scope")
SCOPES.register("tensor")(Scope)


@SCOPES.register("category")
class CategoryScope(Scope):
    """The best are chosen among the weights of attention of each layer of the model, and among its others.

    That is how HFT (arXiv:2404.18466) selects. `attn` or `attention` in the path behind the number of the layer means
    attention. Weights outside of the numbered layers are a category by themselves.
    """

    across = True

    def problems(self, owners: Sequence[str]) -> list[list[int]]:
        """Return the categories of each layer; see `Scope.problems`."""
        found: dict[tuple[str, bool], list[int]] = {}
        for index, owner in enumerate(owners):
            layer = layer_of(owner) or ""
            inside = owner[len(layer) :].lower() if layer else ""
            found.setdefault((layer, "attn" in inside or "attention" in inside), []).append(index)
        return list(found.values())


@SCOPES.register("model")
class ModelScope(Scope):
    """The best are chosen over all weights together."""

    across = True
    spans_model = True
    divides_layers = False

    def problems(self, owners: Sequence[str]) -> list[list[int]]:
        """Return all of them as one problem."""
        return [list(range(len(owners)))] if owners else []
