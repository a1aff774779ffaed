"""Names for the objects of an axis: what a configuration says, and what it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from peft_dps.errors import ConfigError

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """The named choices of one axis.

    Args:
        field: Field of the configuration that takes the names, for the messages.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._choices: dict[str, T] = {}

    def register(self, name: Any) -> Callable[[T], T]:
        """Give a class or function a name.

        Args:
            name: The name, not taken yet. The same object may be registered again, as reloading its module does.

        Returns:
            A decorator that returns its object unchanged.

        Raises:
            ConfigError: If the name is empty or taken by another object, or the object cannot be called.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A name for `{self.field}` must be a non-empty string, got {name!r}.")

        def add(choice: T) -> T:
            if not callable(choice):
                raise ConfigError(f"`{self.field}={name!r}` must stand for a class or function, got {choice!r}.")
            taken = self._choices.get(name)
            if taken is not None and _path(taken) != _path(choice):
                raise ConfigError(f"`{self.field}={name!r}` is taken by {_path(taken)}; use another name.")
            self._choices[name] = choice
            return choice

        return add

    def find(self, name: Any) -> T:
        """Return what a name stands for."""
        if not isinstance(name, str) or name not in self._choices:
            raise ConfigError(f"`{self.field}` must be one of {', '.join(map(repr, self))}, got {name!r}.")
        return self._choices[name]

    def unregister(self, name: str) -> None:
        """Forget a name, if it is there."""
        self._choices.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)


def _path(choice: Any) -> str:
    return f"{choice.__module__}.{getattr(choice, '__qualname__', repr(choice))}"
