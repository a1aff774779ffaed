from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from peft_dps.compare.runs import processes as module
from peft_dps.compare.runs.processes import Processes, Slot, WorkError, slots

SLOT = Slot()


def double(number, report):
    report(1, 2, "half way")
    return 2 * number


def fail(report):
    raise RuntimeError("first line\nit is broken")


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(report):
    os._exit(3)


def wait(report):
    report(1, 1, "waiting")
    threading.Event().wait(60)


def where(report):
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


@pytest.mark.slow
def test_work_apart():
    workers, messages = Processes(), []
    assert workers.run(double, (21,), SLOT, lambda *content: messages.append(content)) == 42
    assert messages == [(1, 2, "half way")]
    identity, device, threads = workers.run(where, (), Slot("7", 3))
    assert identity != os.getpid()
    assert (device, threads) == ("7", 3)
    with pytest.raises(WorkError, match=r"^it is broken$") as caught:
        workers.run(fail, (), SLOT)
    assert "in fail" in caught.value.details
    with pytest.raises(WorkError, match=r"ended by SIGKILL\. The system was probably out of memory"):
        workers.run(die, (), SLOT)
    with pytest.raises(WorkError, match="ended early with exit code 3"):
        workers.run(leave, (), SLOT)
    thread = threading.Timer(0, lambda: None)

    def stop(*content):
        nonlocal thread
        thread = threading.Thread(target=workers.close)
        thread.start()

    with pytest.raises(WorkError, match="ended by SIGTERM"):
        workers.run(wait, (), SLOT, stop)
    thread.join()
    with pytest.raises(WorkError, match="Stopped before it began"):
        workers.run(double, (1,), SLOT)


def test_work_that_is_being_started_is_ended_too():
    class Process:
        exitcode, ended = -signal.SIGTERM, False

        def start(self):
            closing.start()
            closing.join(0.2)  # `close` comes while a process starts

        def terminate(self):
            self.ended = True

        def join(self):
            closing.join(5)

    workers, process = Processes(), Process()
    closing = threading.Thread(target=workers.close)
    workers._context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=lambda **given: process)
    with pytest.raises(WorkError, match="ended by SIGTERM"):
        workers.run(double, (1,), SLOT)
    closing.join()
    assert process.ended


def test_modules_of_the_user_are_imported_first(tmp_path, monkeypatch):
    (tmp_path / "registers.py").write_text("import os\nos.environ['REGISTERED'] = 'yes'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("REGISTERED", "no")
    received = []

    class Sender:
        send = staticmethod(received.append)
        close = staticmethod(lambda: None)

    before = signal.getsignal(signal.SIGINT)
    try:
        module._work(Sender(), lambda report: os.environ["REGISTERED"], (), SLOT, ["registers"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [("done", "yes")]


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [(0, None, [None] * 3), (2, None, ["0", "1", "0"]), (2, "4,5", ["4", "5", "4"])],
)
def test_gpus_are_taken_in_turn(devices, visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.device for slot in slots(3)] == expected


def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    assert slots(1)[0].threads is None
    assert {slot.threads for slot in slots(3)} == {2}
    assert {slot.threads for slot in slots(16)} == {1}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert {slot.threads for slot in slots(3)} == {None}
