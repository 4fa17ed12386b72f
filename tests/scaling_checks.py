"""What ``test_scaling.py`` runs in two processes: what a step hands to torch.distributed, and what the sockets send."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial

import torch
from processes import main
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from trtkern import nn as snn
from trtkern.parallel.sharding import shard
from trtkern.profiling import scaling
from trtkern.profiling.collectives import Call, Counted, timed
from trtkern.profiling.scaling import traffic

WIDTH, STEPS, BATCH = 700, 4, 6
SENT = 200
"""Where ``tcpi_bytes_sent`` is in Linux's struct tcp_info; behind it are those that were sent again."""
HEADERS = 1024
"""Bytes that gloo adds to a collective, at the most."""


def network(sync: bool = False, learned: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    neuron = {"neuron": snn.PLIF} if learned else {}
    norm = partial(snn.BatchNormLIF, WIDTH, channel_dim=-1, sync=sync, **neuron)
    return nn.Sequential(
        nn.Linear(300, WIDTH), norm(), nn.Linear(WIDTH, WIDTH), norm(), nn.Linear(WIDTH, WIDTH), snn.LIF(),
        nn.Linear(WIDTH, 9),
    )  # fmt: skip


def step(model: nn.Module, accumulate: int, loss: nn.Module) -> None:
    """An update's forward and backward passes; gradients go out with the last of them."""
    x, target = torch.randn(STEPS, BATCH, 300), torch.arange(BATCH)
    for batch in range(accumulate):
        last = batch == accumulate - 1
        if not isinstance(model, DistributedDataParallel):
            model.set_requires_gradient_sync(last)
        whole = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if whole else nullcontext():
            loss(model(x), target).backward()


def wire() -> int:
    """Bytes that the sockets of this process have sent so far, as the system counts them."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # one that is closed by now, or no TCP
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as found:
                told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sent, again = struct.unpack_from("QQ", told, SENT)
            total += sent - again
    return total


def agree(rank: int, model: nn.Module, rows: tuple[scaling.Row, ...], accumulate: int = 1, loss=None) -> None:
    """Each kind of collective has the bytes and calls of the rows; what the sockets of rank 0 send is that too."""
    loss = snn.SDTLoss() if loss is None else loss
    for _ in range(2):  # DDP makes its buckets anew after the first
        step(model, accumulate, loss)
    with Counted() as found:
        step(model, accumulate, loss)
    whole, times = Counter(), Counter()
    for row in rows:
        whole[row.collective] += row.bytes
        times[row.collective] += row.times
    sent = {kind: (found.bytes(kind), found.times(kind)) for kind in whole}
    told = {kind: (whole[kind], times[kind]) for kind in whole}
    assert sent == told, f"sent {sent}, expected {told}"
    assert len(found.calls) == times.total()
    distributed.barrier()
    before = wire()
    step(model, accumulate, loss)
    by_wire = wire() - before
    # gloo has no reduce-scatter: it sends an all-reduce.
    kinds = {kind: "all_reduce" if kind == "reduce_scatter" else kind for kind in whole}
    wanted = sum(scaling.sent(kinds[kind], size, 2) for kind, size in whole.items())
    if rank == 0:
        assert wanted <= by_wire <= wanted + HEADERS * times.total(), (wanted, by_wire)


def of_a_step(rows: tuple[scaling.Row, ...], *others: str) -> tuple[scaling.Row, ...]:
    """Those of a bare step, which has no trainer around it."""
    return tuple(row for row in rows if row.what not in ("control", *others))


def ddp(rank: int, world: int) -> None:
    model = network()
    rows = of_a_step(traffic(model, 2, broadcast_buffers=True).rows)
    assert sum(row.what.startswith("gradients") for row in rows) > 1
    agree(rank, DistributedDataParallel(model), rows)


def ddp_accumulated(rank: int, world: int) -> None:
    model = network(sync=True)
    rows = of_a_step(traffic(model, 2, broadcast_buffers=True, accumulate=2, sync_norm=True).rows)
    agree(rank, DistributedDataParallel(model), rows, 2)


def fsdp(rank: int, world: int) -> None:
    model = shard(network(learned=True))
    rows = of_a_step(traffic(model, 2, parallel="fsdp").rows, "penalty")
    assert {row.what for row in rows} >= {"weights backward, others", "gradients, scalars"}
    agree(rank, model, rows)


def fsdp_accumulated(rank: int, world: int) -> None:
    model = shard(network(sync=True, learned=True))
    rows = of_a_step(traffic(model, 2, parallel="fsdp", accumulate=2, sync_norm=True).rows, "penalty")
    agree(rank, model, rows, 2)


def penalty(rank: int, world: int) -> None:
    """The TRT loss sends nothing more under DDP, and one number under FSDP2."""
    model = DistributedDataParallel(network())
    rows = traffic(model.module, 2, broadcast_buffers=True).rows
    agree(rank, model, of_a_step(rows), loss=snn.TRTLoss(model))
    model = shard(network())
    rows = traffic(model, 2, parallel="fsdp").rows
    agree(rank, model, of_a_step(rows), loss=snn.TRTLoss(model))


def control(rank: int, world: int) -> None:
    """What the processes say of the run; a barrier carries nothing; the time of a collective is seen."""
    from trtkern.parallel.job import Job

    job = Job(rank, world)
    with Counted() as found:
        distributed.barrier()
        job.summed(0, 0, 0, 0)
    assert found.calls == [Call("all_reduce", scaling.CONTROL)]
    with timed() as took:
        distributed.all_reduce(torch.ones(2**20))
    assert 0 < took.seconds <= took.wall and took.alone is None


if __name__ == "__main__":
    main(
        {check.__name__: check for check in (ddp, ddp_accumulated, fsdp, fsdp_accumulated, penalty, control)},
        *sys.argv[1:],
    )
