from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_dps import dps_adapter, statefile
from peft_dps.errors import StateError
from tests.resuming import Plan, Training, assert_same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def training():
    training = Training(Plan(variant="mix"))
    training.run(4)
    return training


@pytest.fixture
def path(training, tmp_path):
    dps_adapter(training.model).save_state(tmp_path / "state")
    return tmp_path / "state"


def test_a_file_holds_the_state(training, path):
    state, saved = training.model.dps_state_dict(), statefile.read(path)
    assert saved["header"] == state["header"]
    assert_same(saved["tensors"], state["tensors"])
    assert [entry.name for entry in path.parent.iterdir()] == ["state"]


def test_files_are_told_apart_by_their_digests(training, path):
    again = statefile.write(path.with_name("again"), training.model.dps_state_dict())
    assert again == statefile.digest_of(path) == statefile.digest_of(path.with_name("again"))
    training.run(5)
    assert statefile.write(path, training.model.dps_state_dict()) != again


def test_file_names_are_safe_for_any_adapter(tmp_path):
    assert statefile.path_in(tmp_path, "default").name == "dps_state.default.safetensors"
    assert statefile.path_in(tmp_path, "../up").parent == tmp_path


def test_a_file_that_is_cut_is_refused(training, path):
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match=r"cut off or damaged .* Resume from an earlier checkpoint"):
            dps_adapter(training.model).load_state(path)
        assert statefile.digest_of(path) is None


def test_a_file_with_a_flipped_bit_is_refused(training, path):
    for place in (-3, -200):  # of a mask, of a snapshot
        whole = bytearray(path.read_bytes())
        whole[place] ^= 4
        path.write_bytes(whole)
        with pytest.raises(StateError, match=r"' is damaged\. Resume from an earlier checkpoint"):
            dps_adapter(training.model).load_state(path)


def test_other_files_are_refused(training, tmp_path):
    with pytest.raises(StateError, match="no training state at"):
        dps_adapter(training.model).load_state(tmp_path / "nowhere")
    assert statefile.digest_of(tmp_path / "nowhere") is None
    save_file({"weight": torch.zeros(2)}, tmp_path / "adapter")
    with pytest.raises(StateError, match="holds no training state"):
        dps_adapter(training.model).load_state(tmp_path / "adapter")
    with pytest.raises(StateError, match="cut off or damaged"):
        dps_adapter(training.model).load_state(tmp_path)


def test_a_failed_write_leaves_the_previous_file(training, path, monkeypatch):
    before = path.read_bytes()
    training.run(5)
    for name in ("save_file", "_flush"):
        with monkeypatch.context() as patch:
            patch.setattr(statefile, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                dps_adapter(training.model).save_state(path)
        assert path.read_bytes() == before
    dps_adapter(training.model).save_state(path)  # takes the place of what the failed ones left
    assert path.read_bytes() != before
    assert [entry.name for entry in path.parent.iterdir()] == ["state"]


def full_disk(*_):
    raise OSError(28, "No space left on device")


SAVES_FOREVER = """
import sys, itertools
from pathlib import Path
from tests.resuming import Plan, Training
training = Training(Plan(variant="mix", stage_steps=2))
for step in itertools.count(1):
    training.run(step)
    training.model.save_dps_state(Path(sys.argv[1]) / "state")
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", SAVES_FOREVER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        done = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()  # wherever it is by now
    assert process.returncode == -signal.SIGKILL
    assert statefile.read(tmp_path / "state")["header"]["progress"]["step"] >= done[-1]


# What a save does to the disk; the process dies before it, after half of it, or after it.
POINTS = ("before writing", "half written", "before flushing", "before renaming", "before flushing the folder")
DIES = """
import os, signal, sys
from pathlib import Path
from peft_dps.checkpoint import file as statefile
from tests.resuming import Training

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, metadata, save=statefile.save_file):
    save(tensors, path, metadata)
    os.truncate(path, path.stat().st_size // 2)
    die()

flush = statefile._flush
deaths = {
    "before writing": (statefile, "save_file", die),
    "half written": (statefile, "save_file", half),
    "before flushing": (statefile, "_flush", die),
    "before renaming": (Path, "replace", die),
    "before flushing the folder": (statefile, "_flush", lambda path: die() if path.is_dir() else flush(path)),
}
for folder in Path(sys.argv[1]).iterdir():
    if os.fork() == 0:
        training = Training.resumed(folder)
        training.run(training.step + 1)
        setattr(*deaths[folder.name.partition(", ")[2]])
        training.model.save_dps_state(folder / "dps.safetensors")
        os._exit(0)
    _, status = os.wait()
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, folder.name)
"""


@pytest.mark.slow
def test_a_save_killed_at_each_point_leaves_the_previous_state_or_the_new_one(tmp_path):
    whole = {}
    for variant in ("dense", "mix"):
        whole[variant] = Training(Plan(variant=variant))
        whole[variant].run(4)
        for point in POINTS:
            whole[variant].save(tmp_path / f"{variant}, {point}")
        whole[variant].run(14)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.count(f"{int(signal.SIGKILL)} ") == 2 * len(POINTS), run.stdout + run.stderr
    for folder in tmp_path.iterdir():
        variant, point = folder.name.split(", ")
        step = statefile.read(folder / "dps.safetensors")["header"]["progress"]["step"]
        assert step == (5 if point == "before flushing the folder" else 4)
        if step == 4:  # the weights beside it are those of step 4 too
            resumed = Training.resumed(folder)
            resumed.run(14)
            assert_same(resumed.everything(), whole[variant].everything())


def test_parts_belong_together_when_their_index_is_there(training, tmp_path):
    path, state = tmp_path / "state.x", training.model.dps_state_dict()
    first, second = "0" * 16, "f" * 16
    for rank in range(2):
        statefile.write_part(path, state, first, rank, 2)
    with pytest.raises(StateError, match="no training state at"):
        statefile.find_save(path)
    statefile.write_index(path, state["header"], first, 2)
    statefile.write_part(path, state, second, 0, 3)  # a save that is cut off
    (tmp_path / f".state.{second}-00001-of-00003.x.part").touch()
    (tmp_path / f"state.y.{first}-00000-of-00002.x").touch()  # of another name
    before = statefile.find_save(path)
    assert before.name == first
    assert [before.part(rank).read()["header"]["save"] for rank in range(2)] == [first] * 2

    third = "a" * 16
    statefile.write_part(path, state, third, 0, 1)
    statefile.write_index(path, state["header"], third, 1)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"state.x", f"state.{third}-00000-of-00001.x", f"state.y.{first}-00000-of-00002.x"}
    statefile.find_save(path).paths[0].write_bytes(path.read_bytes())
    assert statefile.find_save(path).part(0).header["size"] == 1
    with pytest.raises(StateError, match="is of another save"):
        statefile.Save(first, [path]).part(0)


@pytest.mark.parametrize(
    ("save", "size"),
    [("../../elsewhere", 1), ("0" * 15, 1), (None, 1), ("0" * 16, 0), ("0" * 16, 10**9), ("0" * 16, "2")],
)
def test_an_index_of_no_files_is_refused(training, path, save, size):
    header = {**training.model.dps_state_dict()["header"], "weights": {}, "save": save, "size": size}
    statefile.write(path, {"header": header, "tensors": {}})
    with pytest.raises(StateError, match="names no files"):
        statefile.find_save(path)


def test_pieces_are_read_and_checked_one_by_one(training, path):
    file, state = statefile.StateFile(path), training.model.dps_state_dict()
    name = next(name for name in state["tensors"] if name.endswith("mask"))
    assert torch.equal(file.rows(name, 1, 3), state["tensors"][name][1:3])
    assert torch.equal(file.rows(name), state["tensors"][name])
    file.check()
    with pytest.raises(StateError, match="cut off or damaged"):
        file.rows("nothing")
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(StateError, match="is damaged"):
        file.check()
