"""Draws docs/images/masks.png: the first masks that DPS Dense and DPS Mix select in one layer of the same small net.

Run by hand from the root of a checkout, with the extra `compare`: PYTHONPATH=. python docs/figures/masks.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig

INPUTS, HIDDEN, CLASSES = 40, 20, 4
DENSITY, STAGE_STEPS, BATCH = 0.4, 20, 32
IMAGE = Path(__file__).parents[1] / "images" / "masks.png"
FROZEN, SELECTED, ONLY_DENSE, ONLY_MIX = "#eceff4", "#4c566a", "#bf5b17", "#386cb0"


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make one batch for each step of ACCUMULATE and for the first of SUBNETWORK.

    Inputs are standard normal; the label is the largest of a fixed random linear map of the input and of its square.
    """
    generator = torch.Generator().manual_seed(0)
    linear, square = torch.randn(2, INPUTS, CLASSES, generator=generator)
    inputs = torch.randn(STAGE_STEPS + 1, BATCH, INPUTS, generator=generator)
    return list(zip(inputs, (inputs @ linear + inputs.square() @ square).argmax(-1), strict=True))


def train(variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Train up to the first step of SUBNETWORK.

    Args:
        variant: `"dense"` or `"mix"`.

    Returns:
        The mask of the first layer `[out, in]`, and its rows of column noise `[steps, in]`, without rows in Dense.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    config = DPSConfig(target_modules=["0", "2"], variant=variant, density=DENSITY, stage_steps=STAGE_STEPS)
    model = get_peft_model(net, config)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    weight = net[0].dps_controllers["default"].weights[0]
    rows = []
    for inputs, labels in make_batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        if weight.noise.columns is not None:
            rows.append(weight.noise.columns.clone())
        optimizer.step()
    return weight.frozen.mask.keep.bool(), torch.stack(rows) if rows else torch.empty(0, INPUTS)


def draw(path: Path) -> None:
    """Draw both masks, the noise and the difference, and save them as PNG.

    Args:
        path: Where to save it.
    """
    dense, _ = train("dense")
    mix, noise = train("mix")
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    count, entries = int(dense.sum()), dense.numel()
    _show(top_left, dense, [FROZEN, SELECTED], "output row")
    top_left.set_title(f"Dense: mask (dark: selected), {count} of {entries} entries")
    _show(top_right, mix, [FROZEN, SELECTED], "output row")
    top_right.set_title(f"Mix: mask (dark: selected), {int(mix.sum())} of {entries} entries")
    _show(bottom_left, noise, [FROZEN, SELECTED], "step of ACCUMULATE", first=1)
    bottom_left.set_title(f"Mix: column noise b (dark: b = 1), P(b = 1) = {DENSITY}")
    _show(bottom_right, dense.int() + 2 * mix.int(), [FROZEN, ONLY_DENSE, ONLY_MIX, SELECTED], "output row")
    only = int((dense & ~mix).sum())
    bottom_right.set_title("Where the masks differ")
    labels = {
        SELECTED: f"both ({count - only})",
        ONLY_DENSE: f"Dense only ({only})",
        ONLY_MIX: f"Mix only ({int((mix & ~dense).sum())})",
        FROZEN: f"neither ({int((~mix & ~dense).sum())})",
    }
    for color, label in labels.items():
        bottom_right.plot([], [], "s", color=color, markeredgecolor="#999999", label=label)
    figure.legend(title="Where the masks differ: selected by", loc="outside lower right", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _show(axes: Axes, values: torch.Tensor, colors: list[str], rows: str, first: int = 0) -> None:
    height, width = values.shape
    extent = (-0.5, width - 0.5, first + height - 0.5, first - 0.5)
    limits = {"vmin": 0, "vmax": len(colors) - 1}
    axes.imshow(values.int().numpy(), cmap=ListedColormap(colors), extent=extent, interpolation="nearest", **limits)
    axes.set(xlabel="input column", ylabel=rows)


if __name__ == "__main__":
    IMAGE.parent.mkdir(exist_ok=True)
    draw(IMAGE)
