"""Checkpoints of the HF Trainer: where in them the training state lies."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_dps.checkpoint import file as statefile
from peft_dps.checkpoint import parts, saving
from peft_dps.checkpoint.state import state_of
from peft_dps.errors import EngineError, StateError
from peft_dps.training.controller import Controller

logger = logging.getLogger(__name__)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where the Trainer keeps the checkpoint of its current step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def saved_digests(state: TrainerState, callback: str) -> dict[str, str]:
    """Return what the checkpoint that a Trainer resumes from tells of its training states."""
    entries: Any = state.stateful_callbacks
    entry = entries.get(callback, {})
    if isinstance(entry, list):  # the callback was passed once more by hand
        entry = entry[-1] if entry else {}
    saved: dict[str, str] = entry.get("attributes", {}).get("saved", {})
    return saved


def find_state(adapter: str, saved: Mapping[str, str], args: TrainingArguments, state: TrainerState) -> Path:
    """Find the training state that belongs to the checkpoint from which a Trainer resumes.

    A callback is not told the folder that `Trainer.train(resume_from_checkpoint=...)` was given.
    """
    if adapter not in saved:
        raise StateError(
            f"The Trainer resumes at step {state.global_step}, but its checkpoint holds no training state of the DPS "
            f"adapter {adapter!r}: it was saved with `save_only_model=True`, in a hyperparameter search, or without "
            "this version of peft_dps. To begin new stages with its weights, load them with "
            "`PeftModel.from_pretrained(..., is_trainable=True)` and train without `resume_from_checkpoint`."
        )
    folders = [checkpoint_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, (str, os.PathLike)):
        folders.insert(0, Path(args.resume_from_checkpoint))
    paths = [statefile.path_in(folder, adapter) for folder in folders]
    for path in paths:
        if statefile.digest_of(path) == saved[adapter]:
            return path
    places = " or ".join(f"'{path}'" + (" (a file of another training)" if path.exists() else "") for path in paths)
    raise StateError(
        f"The Trainer resumes at step {state.global_step}, but the training state of the DPS adapter {adapter!r} that "
        f"belongs to its checkpoint is not at {places}. If the checkpoint lies elsewhere than in `output_dir`, name "
        "its folder in the arguments too: `TrainingArguments(..., resume_from_checkpoint='<the folder>')`."
    )


class PartsSaver:
    """Saves the training states of sharded weights into a Trainer's checkpoints, each process that of its rows.

    A Trainer asks only one process for the state of a callback. But all processes take part in collecting the
    optimizer's state, when the checkpoint's folder is there and before `trainer_state.json` is: each writes its part
    then. Collecting it makes them wait for each other, so that all parts are there before that file.
    """

    def __init__(
        self, controllers: list[Controller], optimizer: Any, args: TrainingArguments, state: TrainerState
    ) -> None:
        self._sharded = {each.adapter: each for each in controllers if saving.processes_of(each)}
        self._args, self._state = args, state
        self._hook: Any = None
        if self._sharded:
            self._ranks = saving.processes_of(next(iter(self._sharded.values())))[0]
            self._training = saving.common_number(self._ranks) >> 31  # 32 bits, and 32 for the step
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper passes it on
            self._hook = inner.register_state_dict_pre_hook(self._write_parts)

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._sharded

    def finish(self, adapter: str) -> str:
        """Make the parts that the processes have written one training state."""
        path, part = self._paths(adapter)
        size = self._ranks.size
        missing = [rank for rank in range(size) if not parts.part_of(path, self._save, rank, size).exists()]
        if missing:
            raise EngineError(
                f"The training state of the sharded adapter {adapter!r} is not complete: in '{path.parent}' there is "
                f"none of the processes {missing}. They need a folder that all share, and an optimizer whose state "
                "the Trainer saves. Or save with Accelerate or in a loop of your own, and train with "
                "`save_only_model=True`."
            )
        return parts.write_index(path, statefile.StateFile(part).header, self._save, size)

    def close(self) -> None:
        """Write no more."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def _save(self) -> str:
        return f"{self._training:08x}{self._state.global_step:08x}"

    def _paths(self, adapter: str) -> tuple[Path, Path]:
        path = statefile.path_in(checkpoint_folder(self._args, self._state), adapter)
        return path, parts.part_of(path, self._save, self._ranks.rank, self._ranks.size)

    def _write_parts(self, optimizer: Any) -> None:
        # It communicates nothing: who else asks for the optimizer's state may do so on one process.
        for adapter, controller in self._sharded.items():
            path, part = self._paths(adapter)
            if path.parent.is_dir() and not part.exists() and not self._args.save_only_model:
                parts.write_part(path, state_of(controller), self._save, self._ranks.rank, self._ranks.size)


def warn_of_incomplete_checkpoint(output_dir: Path) -> None:
    """Warn if the newest checkpoint was not written to its end, and name the newest one that was."""
    checkpoints = sorted(
        (folder for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(folder) >= 0), key=_step_of
    )
    if not checkpoints or _is_complete(checkpoints[-1]):
        return
    complete = [folder for folder in checkpoints if _is_complete(folder)]
    remedy = f"resume from '{complete[-1]}'" if complete else "there is no earlier one to resume from"
    logger.warning(
        "The checkpoint '%s' was not written to its end, and `resume_from_checkpoint=True` would take it: %s, or "
        "delete it first.",
        checkpoints[-1],
        remedy,
    )


def _step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and folder.is_dir() else -1


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # what the Trainer writes last
    except (OSError, ValueError):
        return False
    return True
