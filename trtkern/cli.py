"""The console script ``trtkern``. What it needs beyond the standard library is imported when it is called."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

EXTRAS = {
    "train": "train", "evaluate": "train", "analyze": "train", "report": "train", "profile": "train", "sweep": "train",
    "convert": "interop", "export": "interop", "data": "data",
}  # fmt: skip
"""The extra that brings what a command needs. `trtkern doctor`, `trtkern bench` and `trtkern inspect` need none; an
option of theirs that does asks for it (``need``)."""
GROUPS = ("analyze", "data")
"""The commands that have commands of their own."""

AFTER = {
    "train": "a run that was begun goes on with `trtkern train --resume FOLDER`",
    "sweep": "the same `trtkern sweep` goes on where it was",
    "data shard": "the same `trtkern data shard` goes on where it was",
}
"""What is said beside when a command was stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (the run failed), 2 (the command line or a file is at fault), or
    130 (stopped by the user). Errors are one line on stderr.

    Args:
        argv: arguments without the program's name; None is those of the process.
    """
    from trtkern.output.text import say

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show, and names that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run([*words, "--help"] if words in ([], *([group] for group in GROUPS)) else words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        after = [line for name, line in AFTER.items() if name.split() == words[: name.count(" ") + 1]]
        return say("; ".join(["stopped, as asked", *after]), 130)
    except OSError as error:  # the commands answer for their files; what is left is standard output
        with suppress(OSError, AttributeError):  # so that Python does not try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return say(f"expected a standard output that can be written, got {error}", 1)
    return status


def _run(arguments: list[str]) -> int:
    from trtkern.output.text import missing, say

    if arguments == ["doctor"]:
        from trtkern import doctor

        return doctor.main()
    if lacking := missing("", ("typer", "rich")):
        return say(f"{lacking} (`trtkern doctor` runs as it is)", 2)
    from trtkern.commands import app
    from trtkern.commands._common import Quit

    try:
        status = int(app(args=arguments, prog_name="trtkern", standalone_mode=False, obj=arguments) or 0)
    except Quit as quit_:
        return say(str(quit_), quit_.status)
    except Exception as error:
        # A wrong command line: typer's own exceptions carry their text and status (their module has moved before).
        if hasattr(error, "format_message"):
            return say(_explained(error, arguments), error.exit_code)  # type: ignore[attr-defined]
        if type(error).__name__ == "Abort":  # what click makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    if status == 130:  # what typer makes of Ctrl-C; a command that answers to it itself raises Quit
        raise KeyboardInterrupt
    return status


def _explained(error: Any, arguments: Sequence[str]) -> str:
    """What typer says of a wrong command line; of an unknown option the list of those that there are."""
    spoken = [word for word in arguments[: 2 if arguments[0] in GROUPS else 1] if not word.startswith("-")]
    place = error.ctx.command_path if getattr(error, "ctx", None) else " ".join(["trtkern", *spoken])
    if hasattr(error, "possibilities") and error.ctx is not None:
        from trtkern.names import unknown

        options = [name for each in error.ctx.command.params for name in each.opts if name.startswith("-")]
        return f"{unknown(place, error.option_name, [*options, '--help'])} (`{place} --help` explains them)"
    return f"{error.format_message()} (try `{place} --help`)"


if __name__ == "__main__":
    sys.exit(main())
