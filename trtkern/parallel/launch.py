"""The processes of a job on this machine: torchrun's own launcher starts them, watches them and starts them anew."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts."""
OUTCOME = "TRTKERN_OUTCOME"
"""In the environment of the processes: the file that says how the job has ended where starting anew would not help."""


def launch(processes: int, restarts: int, arguments: Sequence[str]) -> int:
    """Run ``trtkern`` with these arguments in several processes that train together; the exit status.

    Args:
        processes: how many, on this machine.
        restarts: how often all of them are started anew after one has been killed, or could not reach the others. What
            the user can put right, numbers that are not finite, and a wish to stop end the job at once.
        arguments: of the command line.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=restarts, monitor_interval=0.1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        os.environ[OUTCOME] = os.path.join(place, "outcome.json")
        logging.disable()  # what the processes have to say they say themselves
        try:
            elastic_launch(config, sys.executable)("-m", "trtkern.cli", *arguments)
        except SignalException as error:
            return ended() or 128 + int(error.sigval)
        except ChildFailedError as error:
            return ended() or _status(error.get_first_failure()[1].exitcode)
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[OUTCOME]
    return 0


def started() -> bool:
    """Whether torchrun has started this process, or something that tells it the same."""
    return all(name in os.environ for name in _TOLD)


def divided(processes: int, batch: int) -> int:
    """The images of a batch that each process takes.

    Raises:
        ValueError: it does not divide.
    """
    if batch % processes:
        near = batch - batch % processes or processes
        raise ValueError(
            f"--batch-size: expected a multiple of {processes}, the processes that share a batch, got {batch}; take "
            f"{near}"
        )
    return batch // processes


def world_size() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _status(code: int) -> int:
    """The exit status of a process that ended with that code, of which a signal is negative."""
    return 128 - code if code < 0 else code


def end(status: int) -> None:
    """Have the processes of this job not started anew, where ``launch`` has started them: they end with this status."""
    if (place := os.environ.get(OUTCOME)) is not None:
        with suppress(OSError):
            Path(place).write_text(json.dumps(status))


def ended() -> int | None:
    """The status with which ``end`` has ended this job; None while it goes on."""
    place = os.environ.get(OUTCOME)
    if place is None:
        return None
    try:
        return int(json.loads(Path(place).read_text()))
    except (OSError, ValueError):
        return None


def restarts_left() -> int:
    """How often torchrun will still start the processes of this job anew."""
    most, made = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return most - made


def bound() -> None:
    """In a process of torchrun: SIGTERM comes when torchrun itself is gone, so that nobody trains on without it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        bind()


def bind() -> None:
    """SIGTERM comes to this process when the one that started it is gone."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
