"""Worker processes that make batches before they are asked for, in memory that they share with the one that asks.

The memory is an anonymous mapping, taken before the workers are forked and inherited by them. It is no file of
/dev/shm, so the size of that (64 MB in a container of Docker) does not matter, and no worker fails to get its part.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from trtkern.output import signals

AHEAD = 2
"""Batches that each worker makes before they are asked for."""
LOOK = 0.5
"""Seconds after which one that waits for a batch looks whether it should still wait."""
PATIENCE = 600.0
"""Seconds that a batch may take."""


class WorkerError(OSError):
    """A worker process ended, or stopped answering; the message says what to do."""


def ahead(
    make: Callable[[int], Tensor], steps: int, workers: int, size: int, stopped: Callable[[], bool] = lambda: False
) -> Generator[Tensor, None, None]:
    """``make(0)`` to ``make(steps - 1)``, each made by a worker and valid until the next one is asked for.

    Closing the iterator ends the workers. Each is forked at the first batch, with all that ``make`` holds.

    Args:
        make: a batch as a tensor of uint8, on the CPU; its exceptions are raised here.
        steps: how many.
        workers: processes, 1 or more.
        size: bytes of a batch at most.
        stopped: asked now and then while a batch is waited for; the iterator ends early if it says so.

    Raises:
        WorkerError: no memory for the batches, a worker that was killed or ended, or one that does not answer.
    """
    workers = min(workers, steps)
    slots = _slots(workers, size)
    context = get_context("fork")  # others import torch anew in each worker
    pairs: list[tuple[BaseProcess, connection.Connection]] = []
    try:
        with signals.waiting():  # workers are born with them blocked, and take them up when they are ready
            for index in range(workers):
                ours, theirs = context.Pipe()
                args = (make, range(index, steps, workers), slots[index], theirs, os.getpid())
                process = context.Process(target=_work, args=args, daemon=True)
                pairs.append((process, ours))
                process.start()
                theirs.close()  # so that the end of the worker is the end of the pipe
        for step in range(steps):
            turn, index = divmod(step, workers)
            shape = _answer(*pairs[index], f"worker {index + 1} of {workers}", stopped)
            if shape is None:
                return
            yield slots[index, turn % AHEAD, : shape.numel()].view(shape)
            _allow(pairs[index][1])
    finally:
        _end(pairs)


def _slots(workers: int, size: int) -> Tensor:
    """Shared memory [workers, AHEAD, size] of bytes."""
    count = workers * AHEAD * size
    try:
        memory = mmap.mmap(-1, count)
    except (OSError, OverflowError, ValueError) as error:
        raise WorkerError(
            f"loader: expected {count / 2**20:,.0f} MiB of memory for {workers} workers x {AHEAD} batches of "
            f"{size / 2**20:,.1f} MiB, got none ({error}); use fewer --workers, or a smaller --batch-size"
        ) from None
    return torch.frombuffer(memory, dtype=torch.uint8).view(workers, AHEAD, size)


def _answer(
    process: BaseProcess, answers: connection.Connection, name: str, stopped: Callable[[], bool]
) -> torch.Size | None:
    """The shape of the worker's next batch; None if the wait was ended."""
    patience = time.monotonic() + PATIENCE
    while not stopped():
        ready = connection.wait([answers, process.sentinel], LOOK)
        if answers in ready:
            try:
                answer = answers.recv()
            except (EOFError, ConnectionError):
                raise _dead(process, name) from None
            if isinstance(answer, Exception):
                raise answer
            return answer
        if ready:
            raise _dead(process, name)
        if time.monotonic() > patience:
            raise WorkerError(
                f"loader: expected a batch within {PATIENCE:.0f} s, got none from {name}; can the files of the images "
                f"still be read? --workers 0 decodes them in the main process"
            )
    return None


def _dead(process: BaseProcess, name: str) -> WorkerError:
    process.join()
    code = process.exitcode or 0
    how = f"ended with status {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", as the kernel does where memory runs out"
    return WorkerError(
        f"loader: expected {name} to decode images to the end, got it {how}; use fewer --workers (0 decodes in the "
        f"main process) or a smaller --batch-size"
    )


def _allow(answers: connection.Connection) -> None:
    """Let the worker use the slot of the batch that was asked for last."""
    with suppress(ConnectionError):  # it is at its end, or dead, which the next answer tells
        answers.send_bytes(b"")


def _end(pairs: list[tuple[BaseProcess, connection.Connection]]) -> None:
    started = [process for process, _ in pairs if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join()
    for _, answers in pairs:
        answers.close()


def _work(
    make: Callable[[int], Tensor], steps: range, slots: Tensor, answers: connection.Connection, parent: int
) -> None:
    """A worker: its steps, each into the next of its slots, and their shapes, or an exception, to the parent."""
    torch.set_num_threads(1)  # those of the parent are not here
    _take_signals()
    try:
        for turn, step in enumerate(steps):
            if turn >= AHEAD:
                _allowed(answers, parent)
            answer: Any
            try:
                made = make(step)
                slots[turn % AHEAD, : made.numel()] = made.reshape(-1)
                answer = made.shape
            except Exception as error:
                answer = error
            answers.send(answer)
            if isinstance(answer, Exception):
                return
    except (EOFError, ConnectionError):  # the parent is no longer there
        return


def _allowed(answers: connection.Connection, parent: int) -> None:
    """Wait until a slot is free. Another worker may hold the parent's end of the pipe, so its end tells nothing."""
    while not answers.poll(5.0):
        if os.getppid() != parent:
            raise EOFError
    answers.recv_bytes()


def _take_signals() -> None:
    """In a worker: Ctrl-C and SIGTERM, which may come to all processes of a run, are for the main one to answer.

    SIGTERM from the main one itself, which sends it when Python ends with the worker still there, ends the worker.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()  # SIGTERM stays blocked: nothing but this takes it
