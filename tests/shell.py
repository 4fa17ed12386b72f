"""A line of a ``sh`` block: whether what it calls exists. Nothing is executed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer
from pages import PROJECT, ROOT

from trtkern.commands import app
from trtkern.commands._common import Quit

TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
OTHERS = {
    "cd",
    "git",
    "mkdir",
    "export",
    "source",
    "scp",
    "ssh",
    "rsync",
    "tar",
    "sbatch",
    "srun",
    "sudo",
    "apt-get",
    "ls",
    "pytest",
    "rm",
    ".",
}
"""Commands of others, that are taken as they stand."""


def lines(text: str) -> Iterator[str]:
    """The command lines of a block: without comments, continued ones as one."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and not line.strip().startswith("#"):
            yield line.strip()


@cache
def _program() -> Any:
    return typer.main.get_command(app)


def _of_trtkern(words: list[str]) -> str | None:
    """What the command line says of these words."""
    try:
        command, context = _program(), None
        name, rest = "trtkern", words
        while True:
            context = command.make_context(name, list(rest), parent=context)
            if not hasattr(command, "commands"):
                break
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            if not rest:
                return None if len(words) else "no command"
            name, command, rest = command.resolve_command(context, rest)
        if context.args:  # `trtkern sweep` hands the options of a training on
            _program().commands["train"].make_context("train", list(context.args))
    except Quit as error:
        return str(error)
    except typer.Exit:
        return None
    except SystemExit as ended:  # of --install-completion, which asks for no command
        return None if not ended.code else str(ended.code)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return error.format_message()
    return None


def _of_pip(words: list[str]) -> str | None:
    for word in words:
        for extras in re.findall(r"^(?:trtkern|\.)\[([\w,]+)\]", word):
            if unknown := set(extras.split(",")) - set(PROJECT["optional-dependencies"]):
                return f"no extra {', '.join(sorted(unknown))}"
    return None


def _of_python(words: list[str], page: str) -> str | None:
    if words[:2] == ["-m", "pip"]:
        return _of_pip(words[2:])
    if words[:1] == ["-m"]:
        module = words[1].split(".")
        there = module[0] != "trtkern" or any(
            (ROOT / Path(*module)).with_suffix(suffix).exists() for suffix in (".py", "")
        )
        return None if there else f"no module {words[1]}"
    if words and not words[0].startswith("-") and not (ROOT / words[0]).exists() and f"`{words[0]}`" not in page:
        return f"no file {words[0]}, and the page does not write one"
    return None


def problem(line: str, page: str) -> str | None:
    """What is wrong with a command line of a page with that text; None where nothing is."""
    words = shlex.split(line, comments=True)
    for end in ("|", ">", ">>", "&&", ";", "&"):  # what follows is a line of its own
        if end in words:
            at = words.index(end)
            rest = words[at + 1 :]
            first = problem(shlex.join(words[:at]), page)
            return first or (problem(shlex.join(rest), page) if end in ("|", "&&", ";") and rest else None)
    while words and re.match(r"[A-Z_][A-Z0-9_]*=", words[0]):
        words = words[1:]
    if not words:
        return None
    name = Path(words[0]).name if "/" in words[0] else words[0]
    if name == "trtkern":
        return _of_trtkern(words[1:])
    if name == "torchrun":
        at = words.index("trtkern") if "trtkern" in words else None
        return _of_trtkern(words[at + 1 :]) if at else None
    if name == "make":
        wanted = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        gone = [word for word in wanted if word not in TARGETS]
        return f"no target {', '.join(gone)} in the Makefile" if gone else None
    if re.fullmatch(r"pip3?", name):
        return _of_pip(words[1:])
    if re.fullmatch(r"python3?(\.\d+)?", name):
        return _of_python(words[1:], page)
    return None if name in OTHERS else f"{words[0]} is not a command that the tests know (OTHERS in tests/shell.py)"
