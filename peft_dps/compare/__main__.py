"""Starts the command line, or says what it lacks: `python -m peft_dps.compare`, and the program `peft-dps`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; see `peft_dps.compare.cli.command.main`.

    Args:
        arguments: Command-line arguments; None for the process's own.

    Returns:
        The exit status: 1 if the libraries of the extra are not installed.
    """
    try:
        from peft_dps.compare.cli.command import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"Error: peft-dps needs the extra `compare`, and {error.name!r} is not installed. Install it: "
            "pip install 'peft-dps[compare]', or in a checkout pip install '.[compare]'.\n"
        )
        return 1
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
