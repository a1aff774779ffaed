from __future__ import annotations

import pytest

from peft_dps import dps_adapter
from peft_dps.checkpoint.file import write
from peft_dps.checkpoint.parts import Save, drop_part, find_save, part_of, write_index, write_part
from peft_dps.errors import StateError
from tests.resuming import Plan, Training


@pytest.fixture
def training():
    training = Training(Plan(variant="mix"))
    training.run(4)
    return training


@pytest.fixture
def path(training, tmp_path):
    dps_adapter(training.model).save_state(tmp_path / "state")
    return tmp_path / "state"


def test_parts_belong_together_when_their_index_is_there(training, tmp_path):
    path, state = tmp_path / "state.x", training.model.dps_state_dict()
    first, second = "0" * 16, "f" * 16
    for rank in range(2):
        write_part(path, state, first, rank, 2)
    with pytest.raises(StateError, match="no training state at"):
        find_save(path)
    write_index(path, state["header"], first, 2)
    write_part(path, state, second, 0, 3)  # a save that is cut off
    (tmp_path / f".state.{second}-00001-of-00003.x.part").touch()
    (tmp_path / f"state.y.{first}-00000-of-00002.x").touch()  # of another name
    before = find_save(path)
    assert before.name == first
    assert [before.part(rank).read()["header"]["save"] for rank in range(2)] == [first] * 2

    third = "a" * 16
    write_part(path, state, third, 0, 1)
    write_index(path, state["header"], third, 1)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"state.x", f"state.{third}-00000-of-00001.x", f"state.y.{first}-00000-of-00002.x"}
    find_save(path).paths[0].write_bytes(path.read_bytes())
    assert find_save(path).part(0).header["size"] == 1
    with pytest.raises(StateError, match="is of another save"):
        Save(first, [path]).part(0)


@pytest.mark.parametrize(
    ("save", "size"),
    [("../../elsewhere", 1), ("0" * 15, 1), (None, 1), ("0" * 16, 0), ("0" * 16, 10**9), ("0" * 16, "2")],
)
def test_an_index_of_no_files_is_refused(training, path, save, size):
    header = {**training.model.dps_state_dict()["header"], "weights": {}, "save": save, "size": size}
    write(path, {"header": header, "tensors": {}})
    with pytest.raises(StateError, match="names no files"):
        find_save(path)


def test_a_part_is_dropped_unless_it_belongs_to_the_state(training, tmp_path):
    path, state, names = tmp_path / "state.x", training.model.dps_state_dict(), ("0" * 16, "f" * 16)
    for name in names:
        write_part(path, state, name, 0, 1)
    drop_part(path, names[1], 0, 1)  # no index is there yet
    drop_part(path, names[1], 0, 1)
    assert not part_of(path, names[1], 0, 1).exists()
    write_index(path, state["header"], names[0], 1)
    drop_part(path, names[0], 0, 1)
    assert part_of(path, names[0], 0, 1).exists()
    assert find_save(path).part(0).header["clock"]["step"] == 4
