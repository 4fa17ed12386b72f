"""``--json``: what a command shows as a table, for programs.

A command is decorated with ``as_json(NAME)`` and calls ``tell`` with its rows. ``--json FILE`` then writes them beside
what is shown; with ``--json -`` they are all of standard output, and what people read is left out. A document is an
object with "schema", which names the command and the version of its keys, and the keys that were told. What is not
finite, as a time that was not measured, is null.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkern.commands._common import FAILURE, quits, user_errors
from trtkern.output.files import write

VERSION = 1
"""Of the keys of every document: a key that goes, or means something else, makes it the next one."""
STDOUT = "-"

_told: ContextVar[dict[str, Any] | None] = ContextVar("told", default=None)

JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write what is shown into that file as JSON too; - prints the JSON alone.",
    ),
]


def tell(**held: Any) -> None:
    """Add to the document of the command that runs; lists grow. Without ``--json`` nothing happens."""
    document = _told.get()
    if document is None:
        return
    for name, value in held.items():
        document[name] = [*document[name], *value] if isinstance(document.get(name), list) else value


def plain(value: Any) -> Any:
    """As JSON has it: of a dataclass, a named tuple and a tensor what they hold; None where a number is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(held) for name, held in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def check(target: str) -> None:
    """Raise a ValueError if no document can be written there."""
    if target != STDOUT and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
        raise ValueError(f"--json: expected a file in a folder that exists, or -, got {target}")


@contextmanager
def telling(name: str, target: str | None) -> Iterator[None]:
    """Within, ``tell`` fills the document of ``trtkern NAME``; it is written at the end, also where the command fails
    on what it found.

    Raises:
        Quit: the file cannot be written.
    """
    if target is None:
        token = _told.set(None)
        try:
            yield
        finally:
            _told.reset(token)
        return
    with user_errors():
        check(target)
    document: dict[str, Any] = {}
    token, out = _told.set(document), sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8") as left, redirect_stdout(left if target == STDOUT else out):
            yield
    finally:
        _told.reset(token)
        if document:
            whole = {"schema": {"name": f"trtkern {name}", "version": VERSION}, **plain(document)}
            text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
            if target == STDOUT:
                out.write(text)
            else:
                with quits(FAILURE, OSError):
                    write(Path(target), text.encode())


def as_json(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Gives a command the option ``--json``.

    Args:
        name: of the command, as it is typed.
    """

    def decorated(command: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(command, eval_str=True)
        option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=JsonOption)

        @functools.wraps(command)
        def wrapped(*args: Any, as_json: str | None = None, **said: Any) -> int:
            with telling(name, as_json):
                return command(*args, **said)

        wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
        return wrapped

    return decorated
