"""README as a reader types it: its quick command lines and its Python, in an environment that has the wheel alone."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from try_wheel import Failed, alone, call

QUICK: dict[str, list[str]] = {
    "--version": [],
    "doctor": [],
    "train": ["--epochs", "2"],
    "evaluate": [],
    "report": ["--no-compute"],
    "bench": ["--op", "lif", "--shape", "4,4096", "--rounds", "2", "--peers", "none", "--no-compile"],
    "inspect": ["--op", "lif", "--backend", "triton"],
}
"""The commands that are run, each with what makes it quick."""
ELSEWHERE = re.compile(r"--(recipe|data|data-dir|model|processes|seeds|resume|amp|op|suite|plot)\b|\b[A-Z]{3,}\b")
"""In a line that needs files of the user's, or hours."""


def fenced(page: Path, *languages: str) -> Iterator[str]:
    """The text of each block of a page in one of these languages."""
    for language, text in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield text


def commands(page: Path) -> list[list[str]]:
    """Each `trtkern ...` line of a page, without its comment."""
    lines = [line.strip().removeprefix("$ ") for text in fenced(page, "sh", "") for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("trtkern ")]


def quick(words: list[str]) -> list[str] | None:
    """The command line as it is run, or None where it is left out."""
    more = QUICK.get(words[1])
    if more is None or ELSEWHERE.search(" ".join(words[2:])):
        return None
    given = {word.partition("=")[0] for word in words}
    pairs = [more[at : at + (1 if more[at].startswith("--no-") else 2)] for at in _starts(more)]
    return [*words[1:], *(word for pair in pairs if pair[0] not in given for word in pair)]


def _starts(words: list[str]) -> list[int]:
    """Where the options begin in a list of options and values."""
    return [at for at, word in enumerate(words) if word.startswith("--")]


def lines(page: Path, command: Path) -> str:
    """Run those that are quick, in their order and in one empty folder.

    Raises:
        Failed: one ends with an error, or there is hardly any.
    """
    every = commands(page)
    wanted = {" ".join(words): words for words in (quick(each) for each in every) if words is not None}
    with tempfile.TemporaryDirectory() as folder:
        for words in wanted.values():
            call(command, *words, cwd=Path(folder), env=alone())
    if not {"train", "doctor"} <= {words[0] for words in wanted.values()}:
        raise Failed(f"{page.name}: expected at least the lines trtkern train and trtkern doctor, got {list(wanted)}")
    return f"{len(wanted)} of {len(every)}: {'; '.join(wanted)}"


def blocks(page: Path, python: Path) -> str:
    """Run its Python blocks, one after the other in one process and an empty folder.

    Raises:
        Failed: one raises.
    """
    found = list(fenced(page, "python"))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "blocks.py"
        script.write_text("\n".join(found))
        call(python, script, cwd=Path(folder), env=alone())
    return f"{len(found)} blocks"
