"""What the commands share: how they end, and the console."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from typer.core import TyperGroup

from trtkern.names import unknown
from trtkern.output.text import missing

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
        raise Quit(one_line(error), status) from error


def one_line(error: Exception) -> str:
    """The error's text in one line; a picture with a caret below what is wrong stays as it is, below that line."""
    text, picture = str(error), ""
    if found := re.search(r"\n.*\n *\^$", text):
        text, picture = text[: found.start()], found[0]
    return " ".join(text.split()) + picture


def user_errors() -> AbstractContextManager[None]:
    """For the part of a command before its work: whatever is refused there, the user can put right."""
    return quits(USER, ValueError, TypeError, OSError, RuntimeError, ImportError)


def need(extra: str, *modules: str) -> None:
    """Quit with the pip line if one of the modules is not installed."""
    if lacking := missing(extra, modules):
        raise Quit(lacking, USER)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A moving bar on a terminal, and nothing elsewhere: told how many are done, and of how many."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from trtkern.output.console import console

    out = console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.completed:,} of {task.total:,}"),
        TimeRemainingColumn(compact=True), console=out, transient=True, disable=not out.is_terminal,
    ) as shown:  # fmt: skip
        task = shown.add_task(what, total=1)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class Commands(TyperGroup):
    """Commands by name; what is none of them is refused with the list."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As its base."""
        if args and args[0] not in self.commands:
            raise Quit(str(unknown(ctx.command_path if ctx.parent else "command", args[0], self.commands)), USER)
        return super().resolve_command(ctx, args)
