"""Samples of a torch Dataset, read a batch at a time: by this process, or by those of torch's DataLoader."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trtkern.data.folder import DataError
from trtkern.data.samples import Batch, Samples
from trtkern.training.workers import AHEAD, PATIENCE, WorkerError


class Reader(Dataset):
    """reader[step]: the batch of that step; one seed gives one batch, whoever reads it.

    Args:
        samples: of the split.
        order: the places of each step.
        seeds: of each step, [steps].
    """

    def __init__(self, samples: Samples, order: Sequence[Tensor], seeds: Tensor) -> None:
        self._samples, self._order, self._seeds = samples, order, seeds.tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> Batch | DataError:
        """The batch, or why there is none: an exception would come out of a worker as the text of its traceback."""
        try:
            return self._samples.read(self._order[step].tolist(), self._seeds[step])
        except DataError as error:
            return error


def read(reader: Reader, workers: int, pinned: bool, stopped: Callable[[], bool]) -> Iterator[Batch]:
    """All batches of the reader, in order; they end early if ``stopped`` says so.

    Args:
        reader: of an epoch.
        workers: processes that read ahead; 0 reads here.
        pinned: whether they go to a GPU.
        stopped: asked before each batch.

    Raises:
        WorkerError: a worker ended, or does not answer.
        DataError: as ``Samples.read``.
    """
    if not workers:
        for step in range(len(reader)):
            if stopped():
                return
            yield _whole(reader[step])
        return
    batches = iter(
        DataLoader(
            reader, batch_size=None, num_workers=min(workers, len(reader)), pin_memory=pinned, timeout=PATIENCE,
            prefetch_factor=AHEAD, worker_init_fn=_deaf, generator=torch.Generator(),
        )
    )  # fmt: skip
    for _ in range(len(reader)):
        if stopped():
            return
        try:
            batch = next(batches)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise WorkerError(
                f"loader: expected {workers} workers to read samples to the end, got: {error}; use fewer --workers (0 "
                f"reads in the main process) or a smaller --batch-size"
            ) from None
        yield _whole(batch)


def _whole(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch[0], batch[1]


def _deaf(number: int) -> None:
    """In a worker: Ctrl-C, which comes to all processes of a run, is for the main one to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
