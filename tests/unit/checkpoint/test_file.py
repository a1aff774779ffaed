from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_dps import dps_adapter
from peft_dps.checkpoint import file as statefile
from peft_dps.errors import StateError
from tests.resuming import Plan, Training, assert_same

ROOT = Path(__file__).parents[3]


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
    state, saved = training.model.dps_state_dict(), statefile.StateFile(path).read()
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
        assert [entry.name for entry in path.parent.iterdir()] == ["state"]
    dps_adapter(training.model).save_state(path)
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
    assert statefile.StateFile(tmp_path / "state").read()["header"]["clock"]["step"] >= done[-1]


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
        step = statefile.StateFile(folder / "dps.safetensors").read()["header"]["clock"]["step"]
        assert step == (5 if point == "before flushing the folder" else 4)
        if step == 4:  # the weights beside it are those of step 4 too
            resumed = Training.resumed(folder)
            resumed.run(14)
            assert_same(resumed.everything(), whole[variant].everything())


def test_pieces_are_read_and_checked_one_by_one(training, path):
    file, state = statefile.StateFile(path), training.model.dps_state_dict()
    for name, tensor in state["tensors"].items():
        assert torch.equal(file.rows(name, 0, None), tensor)
        assert torch.equal(file.rows(name, 1, 2), tensor[1:2])
    file.check()
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(StateError, match="is damaged"):
        file.check()


# ---- Damage and failures --------------------------------------------------------------------------------------------


def rewritten(path, header=None, metadata=None, tensors=None):
    """Write a file of a training state anew, with a digest that fits."""
    state = statefile.StateFile(path).read()
    header = json.dumps(state["header"]) if header is None else header
    tensors = state["tensors"] if tensors is None else tensors
    with safe_open(path, framework="pt") as file:
        labels = file.metadata()
    labels |= {"peft_dps": header, "sha256": statefile._digest(header, sorted(tensors.items()))}
    save_file(tensors, path, {**labels, **(metadata or {})})


@pytest.mark.parametrize(
    "header",
    [
        *("[" * 100_000 + "]" * 100_000, '{"weights":' * 50_000 + "1" + "}" * 50_000),
        *("", "{", "[]", "3", "null", '"x"', '{"clock": NaN}'),
        *('{"size": 1}', '{"size": true, "save": "0000000000000000"}'),
    ],
    ids=lambda header: header[:12],
)
def test_a_header_that_is_none_is_refused(training, path, header):
    before = training.everything()
    rewritten(path, header)
    with pytest.raises(StateError, match="training state"):
        dps_adapter(training.model).load_state(path)
    assert_same(training.everything(), before)


def test_no_file_is_unpickled(training, path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    dps_adapter(training.model).load_state(path)
    path.write_bytes(EVIL)
    with pytest.raises(StateError, match="cut off or damaged"):
        dps_adapter(training.model).load_state(path)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


EVIL = pickle.dumps(Evil())


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_no_file_to_save_to(training, tmp_path, name):
    (tmp_path / "folder").mkdir()
    before = {entry.name for entry in tmp_path.iterdir()}, {entry.name for entry in tmp_path.parent.iterdir()}
    with pytest.raises(StateError, match=r"`path` must be the name of a file, and .* is a folder"):
        training.model.save_dps_state(tmp_path / name)
    assert before == (
        {entry.name for entry in tmp_path.iterdir()},
        {entry.name for entry in tmp_path.parent.iterdir()},
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("point", ["half written", "before flushing", "before renaming"])
def test_a_save_that_fails_midway_leaves_the_earlier_file_and_no_part(training, path, monkeypatch, point, error):
    def fail(*_, **__):
        raise error

    def half(tensors, part, metadata, save=save_file):
        save(tensors, part, metadata)
        os.truncate(part, part.stat().st_size // 2)
        fail()

    before = path.read_bytes()
    training.run(5)
    target = {"half written": (statefile, "save_file", half), "before flushing": (statefile, "_flush", fail)}
    monkeypatch.setattr(*target.get(point, (Path, "replace", fail)))
    with pytest.raises(type(error)):
        training.model.save_dps_state(path)
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == ["state"]
    assert path.read_bytes() == before
    assert statefile.StateFile(path).read()["header"]["clock"]["step"] == 4
    training.model.save_dps_state(path)
    assert statefile.StateFile(path).read()["header"]["clock"]["step"] == 5


def test_a_file_that_may_grow_no_further_is_left_out(training, path):
    """As on a full disk: the system refuses to write."""
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    training.run(5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((OSError, SafetensorError)):
            training.model.save_dps_state(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in path.parent.iterdir()] == ["state"]
    assert path.read_bytes() == before
