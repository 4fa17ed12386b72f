"""Trains and is killed again and again: ``python killed.py FOLDER KILLS SEED -- OPTIONS``, or ``... -- PROGRAM.py``;
behind a ++ there may be another run.

One process imports everything, without computing anything; children that it forks train, are killed with SIGKILL at
random moments, and go on with ``--resume``, or by running the program once more. Prints how many died.
"""

import os
import random
import runpy
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import trtkern.commands._runs
import trtkern.train  # noqa: F401  what the children need
from trtkern import cli
from trtkern.training import checkpoint
from trtkern.training.folder import PLAN

import_module("torch._dynamo")  # which an optimiser imports, in seconds in which a child would only be killed there


def child(arguments: list[str]) -> int:
    """Forks one that runs the command or the program; its process number."""
    number = os.fork()
    if number == 0:
        if arguments[-1].endswith(".py"):
            runpy.run_path(arguments[-1], run_name="__main__")
            os._exit(0)
        os._exit(cli.main(arguments))
    return number


def main(folder: Path, kills: int, seed: int, options: list[str]) -> None:
    """Kill, resume, kill, ...; then let it end."""
    draw, died, program = random.Random(seed), 0, options[-1].endswith(".py")
    while True:
        begin = options if program else ["train", "--run-dir", str(folder), *options]
        begun = (folder / PLAN).exists() and not program
        number = child(["train", "--resume", str(folder)] if begun else begin)
        if died < kills:
            # Up to where a checkpoint more is written, most of the time: some must come, or it never ends. Every fourth
            # one waits for it, on a machine however slow: so the run itself is killed, and not its beginning alone.
            files = checkpoint.found(folder) if folder.exists() else []
            deadline = time.monotonic() + (600.0 if died % 4 == 3 else draw.uniform(0.02, 1.0))
            while time.monotonic() < deadline and os.waitpid(number, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
                if draw.random() < 0.3 and folder.exists() and checkpoint.found(folder) != files:
                    break
            try:
                os.kill(number, signal.SIGKILL)
                _, status = os.waitpid(number, 0)
            except (ProcessLookupError, ChildProcessError):
                raise SystemExit(f"it ended by itself after {died} kills: more epochs are needed") from None
            died += os.WIFSIGNALED(status)
        else:
            _, status = os.waitpid(number, 0)
            # Not left in a buffer, which the next children would inherit, and print too.
            print(f"{died} killed, status {os.waitstatus_to_exitcode(status)}", flush=True)
            return


if __name__ == "__main__":
    words = [*sys.argv[1:], "++"]
    while words:
        end = words.index("++")
        place, kills, seed, _, *options = words[:end]
        main(Path(place), int(kills), int(seed), options)
        words = words[end + 1 :]
