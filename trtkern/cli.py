"""The console script ``trtkern``. What it needs beyond torch and numpy is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (the run failed), 2 (the command line or a file is at fault), or
    130 (stopped by the user). Errors are one line on stderr.

    Args:
        argv: arguments without the program's name; None is those of the process.
    """
    missing = [module for module in ("typer", "rich", "safetensors") if find_spec(module) is None]
    if missing:
        return _say(f"{' and '.join(missing)} not installed; type: pip install 'trtkern[train]'", 2)
    from trtkern.commands import app
    from trtkern.commands._common import Quit

    try:
        status = app(
            args=list(sys.argv[1:] if argv is None else argv) or ["--help"], prog_name="trtkern", standalone_mode=False
        )
    except KeyboardInterrupt:
        return _say("stopped, as asked; a run that was begun goes on with `trtkern train --resume FOLDER`", 130)
    except Quit as quit_:
        return _say(str(quit_), quit_.status)
    except Exception as error:
        # A wrong command line: typer's own exceptions carry their text and status (their module has moved before).
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        return _say(f"{text()} (try `trtkern --help`)", error.exit_code)  # type: ignore[attr-defined]
    return int(status or 0)


def _say(message: str, status: int) -> int:
    print(f"trtkern: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
