"""Jobs of several processes of which one is killed: does each end with the weights of the one that nobody disturbed?

    python bench/job_kills.py --kills 20 --processes 2

A row each in ``bench/job_kills.csv``: which process was killed and when, how often the job was started anew, and by how
much a weight differs (0 is the same bits). ``tests/test_jobs.py`` does it once.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CSV = Path(__file__).with_suffix(".csv")
EPOCHS = 4


def started(folder: Path, processes: int, restarts: int, *more: str) -> subprocess.Popen:
    """A job on the digits."""
    command = [sys.executable, "-m", "trtkern.cli", "train", "--run-dir", str(folder), "--epochs", str(EPOCHS)]
    command += ["--threads", "1", "--processes", str(processes), "--restarts", str(restarts), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(job: subprocess.Popen) -> list[int]:
    """The numbers of those that train."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(number) for number in children.read_text().split()] if children.exists() else []


def kill_one(job: subprocess.Popen, folder: Path, processes: int, draw: random.Random) -> str:
    """Kill one of its processes at a random moment; which, and after how many checkpoints. Empty: it had ended."""
    before, wanted = _checkpoints(folder), draw.randrange(EPOCHS)
    while job.poll() is None and (len(processes_of(job)) < processes or _checkpoints(folder) < max(before, wanted)):
        time.sleep(0.01)
    until = time.monotonic() + draw.uniform(0.0, 0.5 if wanted else 4.0)  # also while torch is imported
    while job.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    there = processes_of(job)
    if job.poll() is not None or not there:
        return ""
    rank = draw.randrange(len(there))
    os.kill(there[rank], signal.SIGKILL)
    return f"process {rank} after {_checkpoints(folder)} epochs"


def _checkpoints(folder: Path) -> int:
    """How many epochs have one: three files are kept, whose names count steps."""
    steps = [int(path.stem.rpartition("-")[2]) for path in folder.glob("checkpoint-*.safetensors")]
    return max(steps, default=0) // 20


def difference(first: Path, second: Path) -> float:
    """The largest difference of a number between the last checkpoints of two runs; NaN where they hold other ones."""
    one, two = (load_file(max(folder.glob("checkpoint-*.safetensors"))) for folder in (first, second))
    if one.keys() != two.keys() or max(first.glob("checkpoint-*")).name != max(second.glob("checkpoint-*")).name:
        return float("nan")
    apart = [abs(one[name].astype(float) - two[name].astype(float)).max(initial=0) for name in one]
    return float(np.max(apart))  # NaN where one is


def main() -> int:
    """Kill and compare; 1 if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, rows = random.Random(asked.seed), []
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        job = started(whole, asked.processes, 0)
        print(job.communicate()[0][-400:] if job.wait() else "undisturbed: done", flush=True)
        while len(rows) < asked.kills:
            folder = Path(place, str(len(rows)))
            job = started(folder, asked.processes, 3)
            killed = kill_one(job, folder, asked.processes, draw)
            said, status = job.communicate()[0], job.wait()
            if not killed:
                print("it had ended before it was killed; once more", flush=True)
                subprocess.run(["rm", "-r", str(folder)], check=True)
                continue
            anew = said.count("resume: ")
            rows.append(
                {
                    "command": " ".join(["bench/job_kills.py", *sys.argv[1:]]), "kill": len(rows) + 1, "killed": killed,
                    "taken up": anew, "status": status, "largest difference": difference(whole, folder),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return int(any(row["status"] or row["largest difference"] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
