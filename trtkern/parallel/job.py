"""The processes of a training, as torchrun starts them: who each of them is, and what they tell one another.

What they tell one another about the run itself (who wants to stop, which folder it is) is a few bytes, and goes over
gloo from CPU to CPU: nothing of it waits for a GPU. Whoever is alone is a job of one process, and says nothing.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from trtkern.parallel import launch

__all__ = ["Job", "JobError", "join", "leave"]

Value = TypeVar("Value")
TIMEOUT = 1800.0
"""Seconds that a process waits for the others, as torch's for gloo."""
FOUND_OUT = 10.0
"""Seconds in which the processes that are left say so, after one of them has gone."""


class JobError(RuntimeError):
    """Another process of the job is gone, or does not answer; the message names it."""


class Job:
    """One process of a job, or the only one.

    Args:
        rank: which of them, from 0.
        world_size: how many.
        local_rank: which of those on this machine.
        store: where they leave words for one another, outside of all collectives; None: there is no such place.
        timeout: seconds that each waits for the others.
        kept: such a place that stays when all of them are started anew.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, store: Any = None, timeout: float = TIMEOUT,
        kept: Any = None,
    ) -> None:  # fmt: skip
        self.rank, self.world_size, self.local_rank, self.timeout = rank, world_size, local_rank, timeout
        self._store, self._kept = store, kept
        self._group: Any = None
        self._spoken = False
        if world_size == 1:
            return
        if "gloo" not in str(dist.get_backend()):
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        if store is not None:
            store.set(f"process/{rank}", json.dumps([platform.node(), os.getpid()]))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def keep(self, name: str, word: str) -> None:
        """Leave a word for when all of them are started anew."""
        if self._kept is not None:
            self._kept.set(f"kept/{name}", word)

    def kept(self, name: str) -> str | None:
        """The word that was left before they were started anew; None where there is none."""
        if self._kept is None or not self._kept.check([f"kept/{name}"]):
            return None
        return self._kept.get(f"kept/{name}").decode()

    def part(self, count: int, rank: int | None = None) -> slice:
        """The rows of ``count`` that are this process's (or those of ``rank``): equal parts where it divides."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.world_size, (rank + 1) * count // self.world_size)

    def summed(self, *numbers: float) -> list[float]:
        """Each number, added up over all processes, in the order of their ranks."""
        if self.alone:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def gathered(self, value: Value) -> list[Value]:
        """What each process gives, by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def told(self, value: Value) -> Value:
        """What the first process gives."""
        if self.alone:
            return value
        found = [value if self.first else None]
        dist.broadcast_object_list(found, group=self._group)
        return found[0]  # type: ignore[return-value]

    def spread(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, on the CPU; those of the others are passed over."""
        if self.alone:
            return tensors
        shapes = self.told({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        made = {}
        for name, (shape, dtype) in shapes.items():
            held = tensors[name].cpu().contiguous() if self.first else torch.empty(shape, dtype=dtype)
            _broadcast(held, self._group)
            made[name] = held
        return made

    def add_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, on its device."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors those of the first process, in place, on their device."""
        if not self.alone:
            for tensor in tensors:
                _broadcast(tensor)

    @contextmanager
    def first_alone(self, name: str) -> Iterator[None]:
        """What is inside is done by one process a machine first, then by its others: they find what that one made.

        Args:
            name: of it, among all that a job does in this way.

        Raises:
            JobError: the one that went first failed.
        """
        if self.alone or self._store is None:
            yield
            return
        key = f"done/{name}/{platform.node()}"
        if self.local_rank:
            while not self._store.check([key]):
                if self._store.check(["failed"]):
                    raise JobError("another process of the job failed")
                time.sleep(0.1)
        yield
        if not self.local_rank:
            self._store.set(key, "1")

    def speaks(self) -> bool:
        """Whether what this process has to say of a failure is said by no other one: the first to ask says it."""
        if self.alone or self._store is None:
            return True
        if self._spoken:
            return False
        self._spoken = True
        if not self.first:
            time.sleep(0.5)  # what befalls all of them at once is said by the first
        try:
            return self._store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store has gone with the process that held it
            return self.first

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the error that torch raises because another process is gone or late becomes one that names it.

        Raises:
            JobError: that.
        """
        try:
            yield
        except RuntimeError as error:
            if self.alone or not _of_others(error):
                raise
            raise JobError(self._missed("Timed out" in str(error) or "timeout" in str(error).lower())) from error

    def _missed(self, late: bool) -> str:
        """Which process the others miss, in words. Each that is left says so first."""
        ranks = self._missing()
        if not ranks:
            return f"job: expected all {self.world_size} processes to answer, got a connection that broke"
        named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if late:
            return f"job: expected {named} of {self.world_size} to answer within {self.timeout:g} s, got nothing"
        return f"job: expected {named} of {self.world_size} to go on, got {'them' if len(ranks) > 1 else 'it'} ended"

    def _missing(self) -> list[int]:
        """The ranks that do not say that they are there."""
        if self._store is None:
            return []
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + FOUND_OUT
        with suppress(RuntimeError):
            self._store.set(f"here/{self.rank}", "1")
            while time.monotonic() < until:
                others = [rank for rank in others if not self._store.check([f"here/{rank}"])]
                if not others or all(self._ended(rank) for rank in others):
                    break
                time.sleep(0.05)
        return others

    def _ended(self, rank: int) -> bool:
        """Whether that process was on this machine and is no longer there."""
        machine, number = json.loads(self._store.get(f"process/{rank}"))
        if machine != platform.node():
            return False
        try:
            with open(f"/proc/{number}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return not os.path.exists(f"/proc/{number}")

    def same(self, about: dict[str, str]) -> None:
        """Raise if the processes do not agree.

        Args:
            about: {what it is in words: what it is here}, of each process.

        Raises:
            ValueError: one has another value than the first; the message names it and both.
        """
        everybody = self.gathered(about)
        for rank, other in enumerate(everybody):
            for name in {**everybody[0], **other}:
                here, there = everybody[0].get(name), other.get(name)
                if here != there:
                    raise ValueError(
                        f"job: expected the same {name} in every process, got {here!r} in rank 0 and {there!r} in rank "
                        f"{rank}; start all of them with the same installation, options and data"
                    )


def _broadcast(tensor: Tensor, group: Any = None) -> None:
    """Make a tensor that of the first process, in place: its bytes, since gloo does not know every dtype."""
    if tensor.numel():
        values = tensor.detach().contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), 0, group=group)
        if values.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(values)


def _of_others(error: RuntimeError) -> bool:
    """Whether torch raised it because of another process: what has a class of its own is from somewhere else."""
    text, torchs = str(error), type(error) is RuntimeError
    return isinstance(error, dist.DistError) or (
        torchs and any(part in text for part in ("gloo", "NCCL", "Connection "))
    )


ALONE = Job()
"""The job of a process that nobody started beside others."""
_job: Job | None = None


def join(timeout: float = TIMEOUT) -> Job:
    """The job of this process, which it joins when this is called first; alone where nobody started it beside others.

    What lies on a GPU goes from process to process over NCCL, what lies on a CPU over gloo.

    Args:
        timeout: seconds that each process waits for the others.

    Raises:
        JobError: the others do not come, or a job whose environment is damaged.
    """
    global _job
    if _job is not None:
        return _job
    if not dist.is_available() or not (dist.is_initialized() or launch.started()):
        return ALONE
    store = kept = None
    if not dist.is_initialized():
        patience = timedelta(seconds=timeout)
        try:
            held, rank, world_size = next(iter(dist.rendezvous("env://", timeout=patience)))
            if world_size == 1:
                _job = Job(kept=dist.PrefixStore("trtkern", held))
                return _job
            kept = dist.PrefixStore("trtkern", held)
            word = _met(kept, rank, world_size, timeout)
            held = dist.PrefixStore(word, held)
            store = dist.PrefixStore("trtkern", held)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience,
                store=dist.PrefixStore("torch", held), rank=rank, world_size=world_size,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise JobError(
                f"job: expected all {os.environ.get('WORLD_SIZE')} processes to meet at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, got {_line(error)}"
            ) from error
    local = int(os.environ.get("LOCAL_RANK", "0"))
    several = dist.get_world_size() > 1
    _job = Job(dist.get_rank(), dist.get_world_size(), local, store, timeout, kept) if several else ALONE
    return _job


def _met(store: Any, rank: int, world_size: int, timeout: float) -> str:
    """A word of those processes that are started together: torchrun keeps one store for all starts of a job, and what
    the processes of an earlier one have left there must not be taken for an answer.

    The first process answers whoever greets it, until all others have said that they have heard it. On several machines
    nothing else tells the starts apart: each counts those that it has seen.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout
    if rank:
        store.set(f"greeting/{rank}", mine)
        store.wait([f"answer/{mine}"], timedelta(seconds=timeout))
        word = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{word}/{rank}", "1")
        return word
    others = set(range(1, world_size))
    while others:
        for other in sorted(others):
            if store.check([f"heard/{mine}/{other}"]):
                others.remove(other)
            elif store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", mine)
        if time.monotonic() > until:
            raise RuntimeError(f"no word from rank {', '.join(map(str, sorted(others)))} within {timeout:g} s")
        time.sleep(0.01)
    return mine


def leave() -> None:
    """Leave the job that ``join`` joined: every process of it does."""
    global _job
    if _job is not None and not _job.alone:
        dist.destroy_process_group()
    _job = None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
