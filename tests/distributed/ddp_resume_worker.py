"""Runs on every rank: trains under DDP and saves in the middle, or resumes from there; rank 0 writes the end down."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from tests.resuming import Plan, Training

STOP = 5


def main(mode: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for variant in ("dense", "mix"):
        place = folder / variant
        training = Training(Plan(variant=variant)) if mode == "train" else Training.resumed(place)
        training.forward = DistributedDataParallel(training.model)
        training.share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        if mode == "train":
            torch.manual_seed(100 + rank)  # ranks differ in their dropout
            training.run(STOP)
            if rank == 0:
                training.save(place)
            dist.barrier()
            torch.save(torch.get_rng_state(), place / f"random{rank}.pt")
        else:
            torch.set_rng_state(torch.load(place / f"random{rank}.pt", weights_only=True))
        training.run(training.plan.steps)
        end = training.everything()
        for name, tensor in end.items():
            gathered = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(gathered, tensor)
            if not all(torch.equal(gathered[0], other) for other in gathered):
                raise AssertionError(f"ranks differ in {name}")
        if rank == 0:
            save_file(end, place / f"{mode}.safetensors")
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
