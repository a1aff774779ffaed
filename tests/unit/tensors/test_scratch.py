from __future__ import annotations

from threading import Thread

import torch

from peft_dps.tensors.scratch import Scratch


def test_memory_of_a_use_is_handed_out_again():
    scratch = Scratch()
    first = scratch.empty((3, 4), torch.float32, "one")
    assert first.shape == (3, 4)
    assert scratch.empty((2, 2), torch.float32, "one").data_ptr() == first.data_ptr()
    assert scratch.empty((3, 4), torch.float32, "other").data_ptr() != first.data_ptr()
    assert scratch.empty((3, 4), torch.float64, "one").dtype is torch.float64


def test_more_memory_is_made_when_it_is_asked_for():
    scratch = Scratch()
    scratch.empty((2,), torch.float32, "one")
    assert scratch.empty((100,), torch.float32, "one").fill_(1.0).sum() == 100


def test_threads_share_nothing():
    scratch, found = Scratch(), []
    mine = scratch.empty((4,), torch.float32, "one")
    thread = Thread(target=lambda: found.append(scratch.empty((4,), torch.float32, "one")))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != mine.data_ptr()


def test_memory_that_was_made_in_inference_mode_serves_training_too():
    scratch = Scratch()
    with torch.inference_mode():
        scratch.empty((4,), torch.float32, "one").fill_(1.0)
    row = torch.ones(4, requires_grad=True)
    product = row * scratch.empty((4,), torch.float32, "one").fill_(2.0)
    product.sum().backward()
    assert row.grad.tolist() == [2.0] * 4


def test_memory_like_a_tensor():
    scratch = Scratch()
    like = scratch.like(torch.ones(2, 3, dtype=torch.int16), "one")
    assert (like.shape, like.dtype) == ((2, 3), torch.int16)
