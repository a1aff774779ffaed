from __future__ import annotations

import errno
import gc
import os

import pytest
import torch

from peft_dps.errors import EngineError
from peft_dps.selection.moments import MomentScores
from peft_dps.tensors.shelf import Shelf, shelf


def content(size: int, value: int) -> memoryview:
    return memoryview(bytes([value]) * size)


def test_pieces_come_back_and_their_room_is_used_again():
    own = Shelf()
    one, two = own.put(content(100, 1)), own.put(content(50, 2))
    assert (own.get(one), own.get(two)) == (content(100, 1), content(50, 2))
    own.free(one)
    three, four = own.put(content(50, 3)), own.put(content(100, 4))
    assert (four.place, three.place) == (one.place, 150)
    assert [own.get(piece) for piece in (two, three, four)] == [content(50, 2), content(50, 3), content(100, 4)]
    assert os.fstat(one.file).st_size == 200
    assert own.get(own.put(content(0, 0))) == b""


def test_all_weights_share_one_file_whose_name_is_gone():
    scores = [MomentScores(torch.full((10,), float(value)), 0.1) for value in range(20)]
    pieces = [each._piece for each in scores]
    assert len({piece.file for piece in pieces}) == 1
    assert os.fstat(pieces[0].file).st_nlink == 0
    assert [each.before().unique().item() for each in scores] == list(range(20))
    size = os.fstat(pieces[0].file).st_size
    del scores
    gc.collect()
    again = [MomentScores(torch.rand(10), 0.1) for _ in range(20)]
    assert os.fstat(again[0]._piece.file).st_size == size


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of forks beside threads
def test_a_forked_process_reads_and_writes_apart():
    own = Shelf()
    piece = own.put(content(10, 1))
    child = os.fork()
    if child == 0:
        mine = own.put(content(10, 2))
        own.free(piece)
        os._exit(0 if mine.file != piece.file and own.get(piece) == content(10, 1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert own.get(piece) == content(10, 1)
    assert own.put(content(10, 3)).place == 10


def test_a_full_disk_is_told_with_the_remedy(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EngineError, match=r"4 MiB cannot be written into .* Set TMPDIR to a folder on a larger disk"):
        shelf.put(content(4 * 2**20, 1))


def test_a_file_that_was_cut_is_told():
    own = Shelf()
    piece = own.put(content(10, 1))
    os.ftruncate(piece.file, 5)
    with pytest.raises(EngineError, match="cut short"):
        own.get(piece)
