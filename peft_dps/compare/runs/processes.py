"""Work in a process of its own: its memory is its own, and if it crashes or is killed the others go on."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from peft_dps.compare.runs.machine import usable_cores

_MESSAGE_SECONDS = 0.3


@dataclass(frozen=True)
class Slot:
    """Where work runs.

    Attributes:
        device: Number of the GPU as CUDA_VISIBLE_DEVICES has it; None for the CPU.
        threads: Threads to compute with; None to leave that to torch.
    """

    device: str | None = None
    threads: int | None = None


class WorkError(RuntimeError):
    """The work ended in an error; the message is the last line of its traceback.

    Args:
        message: That line.
        details: The whole traceback, as far as there is one.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def slots(jobs: int) -> list[Slot]:
    """Return a slot for each of the jobs: GPUs in turn where there are any, else shares of the cores.

    Args:
        jobs: How many run at once.
    """
    threads = None if jobs == 1 or "OMP_NUM_THREADS" in os.environ else max(1, usable_cores() // jobs)
    count = torch.cuda.device_count()
    if count == 0:
        return [Slot(None, threads)] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return [Slot(devices[job % count], threads) for job in range(jobs)]


class Processes:
    """Runs functions in processes of their own, and ends those that are left when it is closed.

    Args:
        imports: Modules to import there first, as those that register the user's methods.

    Attributes:
        closed: Whether nothing is started any more.
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self.imports = tuple(imports)
        if "forkserver" in multiprocessing.get_all_start_methods() and torch.cuda.device_count() == 0:
            # A server imports the libraries once, and each process starts as a copy of it. Not with GPUs: a library
            # that looks for one while it is imported would leave the copies without.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["peft_dps.compare.runs.timing", "peft_dps.compare.runs.training"])
            self._context: Any = context
        else:
            self._context = multiprocessing.get_context("spawn")
        self._alive: set[BaseProcess] = set()
        self._starting = threading.Lock()  # multiprocessing starts one at a time
        self.closed = False

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], slot: Slot, report: Any = None) -> Any:
        """Run a function and wait for it.

        Args:
            function: A module's function; its last argument is a function that takes messages for `report`.
            arguments: Its other arguments.
            slot: Where to run it.
            report: Called with the positional arguments of each message.

        Returns:
            What the function returned.

        Raises:
            WorkError: It raised, or its process ended early.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(sender, function, arguments, slot, self.imports), daemon=True
        )
        with self._starting:
            if self.closed:
                raise WorkError("Stopped before it began.")
            process.start()
            self._alive.add(process)
        sender.close()  # ours: the end of the file comes when the process ends
        try:
            while True:
                kind, content = receiver.recv()
                if kind == "done":
                    return content
                if kind == "failed":
                    raise WorkError(*content)
                if report is not None:
                    report(*content)
        except EOFError:
            process.join()
            raise WorkError(_ended(process.exitcode)) from None
        finally:
            receiver.close()
            process.join()
            self._alive.discard(process)

    def close(self) -> None:
        """End what still runs, and start nothing more."""
        self.closed = True
        with self._starting:  # what is being started now is among them
            for process in list(self._alive):
                process.terminate()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " The system was probably out of memory." if name == "SIGKILL" else ""
        return f"The process was ended by {name}.{hint}"
    return f"The process ended early with exit code {code}."


def _work(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], slot: Slot, imports: Sequence[str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.device
    if slot.threads is not None:
        torch.set_num_threads(slot.threads)
    latest = 0.0

    def report(*content: Any) -> None:
        nonlocal latest
        if (now := time.monotonic()) - latest >= _MESSAGE_SECONDS:
            latest = now
            sender.send(("message", content))  # fails, and ends this process, when nobody is left to listen

    try:
        for module in imports:
            importlib.import_module(module)
        result = function(*arguments, report)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is named in the results
        line = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        sender.send(("failed", (line, traceback.format_exc())))
    else:
        sender.send(("done", result))
    finally:
        sender.close()
