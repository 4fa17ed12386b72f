"""What the commands share: how they end, and the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

from rich.console import Console

USER, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit statuses: the command line or the files are at fault; the run went wrong; the user stopped it."""


class Quit(Exception):
    """Ends a command with one line on stderr and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def quits(status: int, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors, which say all that a user needs, into ``Quit``."""
    try:
        yield
    except errors as error:
        raise Quit(" ".join(str(error).split()), status) from error


def user_errors() -> AbstractContextManager[None]:
    """For the part of a command before its work: whatever is refused there, the user can put right."""
    return quits(USER, ValueError, TypeError, OSError, RuntimeError, ImportError)


def need(extra: str, *modules: str) -> None:
    """Quit with the pip line if one of the modules is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise Quit(f"{', '.join(missing)} is not installed; type: pip install 'trtkern[{extra}]'", USER)


def console() -> Console:
    """Standard output. Where it is no terminal lines are not cut to a width of 80."""
    made = Console()
    return made if made.is_terminal else Console(width=140)
