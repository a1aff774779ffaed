"""A crew: objects that each live in a process of their own and do what they are asked, one at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

Make = Callable[[str, Any], Any]
START = "spawn"
"""How processes start: each from nothing, with the environment of that moment, which says how memory is allocated."""


class Crew:
    """The processes of some variants, while they live.

    Args:
        connections: Per name, the connection to its process.
    """

    def __init__(self, connections: dict[str, Connection]) -> None:
        self._connections = connections

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """Call a method of an object and wait for what it returns.

        Args:
            name: Name of the object.
            method: Name of its method.
            *arguments: What to call it with.

        Raises:
            RuntimeError: If its process has died; its own message is on the error stream.
        """
        try:
            self._connections[name].send((method, arguments))
            return self._connections[name].recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(
                f"The process of variant {name!r} died while it was asked for {method!r}. If no error stands above, "
                "the machine may have run out of memory: use a smaller model or batch."
            ) from error


@contextmanager
def crew_of(make: Make, names: Sequence[str], settings: Any) -> Iterator[Crew]:
    """Start a process for each name, and end them all afterwards.

    Args:
        make: Called in each process, makes its object; a class or function at the top of a module.
        names: Names, the first argument of `make`.
        settings: The second; what can be pickled.
    """
    context = multiprocessing.get_context(START)
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make, name, settings), name=name, daemon=True)
            process.start()
            there.close()  # so that a process that dies ends the connection
            stack.callback(process.join)
            stack.callback(here.close)
            connections[name] = here
        yield Crew(connections)


def _serve(connection: Connection, make: Make, name: str, settings: Any) -> None:
    one = make(name, settings)
    with suppress(EOFError, BrokenPipeError):  # the other end is gone
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(one, method)(*arguments))
