"""Checks that run in several processes of torch.distributed: in all of them, in order, after one import of torch.

A file of checks, ``python FILE FOLDER 2:name,name 4:name``, calls ``main``, which forks what is asked for: two
processes that go through the first checks, and four beside them. ``said`` starts such a file from a test, and gives
what each process says of each check.
"""

import datetime
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from torch import distributed

from trtkern.backends.base import RegularizerSpec
from trtkern.ops.regularizer import regularizer


def said(file, folder, checks):
    """What each process says of a check, by "world-check-rank": nothing where all was right.

    Args:
        file: of the checks.
        folder: a new one.
        checks: {number of processes: names of checks}.
    """
    asked = [f"{world}:{','.join(names)}" for world, names in checks.items()]
    command = [sys.executable, str(file), str(folder), *asked]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in Path(folder).glob("*-*-*.said")}


def went_right(said, world, name):
    """Fail with what the processes say of a check."""
    wrong = [said.get(f"{world}-{name}-{rank}.said", "did not come to it") for rank in range(world)]
    if wrong != [""] * world:
        pytest.fail("\n".join(wrong))


def main(checks, folder, *asked):
    """Run checks.

    Args:
        checks: {name: function of (rank, world)}.
        folder: for what they say.
        asked: "world:name,name" each.
    """
    torch.set_num_threads(1)
    # What each process would load for itself: the kernels, and what a DTensor's first operation imports.
    regularizer([torch.ones(1)], RegularizerSpec(4, 1e-2, 0.25, 1e-5))
    import_module("torch._dynamo")
    fork, ranks = multiprocessing.get_context("fork"), []
    for world, names in (each.split(":") for each in asked):
        told = [
            ({name: checks[name] for name in names.split(",")}, rank, int(world), folder) for rank in range(int(world))
        ]
        ranks += [fork.Process(target=_run, args=each) for each in told]
    for process in ranks:
        process.start()
    last = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in ranks) and time.monotonic() < last:
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in ranks):
            last = min(last, time.monotonic() + 10)  # the others, for what they have to say
    for process in ranks:
        process.kill()
        process.join()


def _run(checks, rank, world, folder):
    """One of the processes: a file for each check that it went through, with what was wrong, and none behind that."""
    meet, patience = f"file://{folder}/meet{world}", datetime.timedelta(seconds=PATIENCE)
    distributed.init_process_group("gloo", init_method=meet, timeout=patience, rank=rank, world_size=world)
    for name, check in checks.items():
        wrong = ""
        try:
            check(rank, world)
            distributed.barrier()
        except BaseException:
            wrong = traceback.format_exc()
        Path(folder, f"{world}-{name}-{rank}.said").write_text(wrong)
        if wrong:
            sys.exit(1)  # the others wait for this process, and learn that it is gone
    distributed.destroy_process_group()
