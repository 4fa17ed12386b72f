"""Steps of one, two and four processes over gloo on this machine: what they take, and whether the model says so.

    python bench/scale.py           measures for about two minutes; rows go to bench/scale.csv, then as --page
    python bench/scale.py --page    docs/scale.md and docs/scale.png, from the rows

Each process has one thread. A job of n processes is timed, and n jobs of one process each beside one another: the same
program, which sends nothing. So the computing is that of n processes that share the cores of this machine. All of them
take turns, in random order, round after round.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import scale_page  # noqa: E402

from trtkern.bench import rows  # noqa: E402
from trtkern.bench.measure import append  # noqa: E402
from trtkern.malloc import keep_pages  # noqa: E402
from trtkern.models.build import build  # noqa: E402
from trtkern.nn import SDTLoss, exact_convolutions  # noqa: E402
from trtkern.parallel.sharding import blocks_of  # noqa: E402
from trtkern.profiling.scaling import CONTROL, LINKS, carried, traffic  # noqa: E402

RANKS, ROUNDS, STEPS = 4, 15, 3
"""Processes, how often each configuration has its turn, and the steps of a turn."""
CLASSES = 10
NETWORKS: dict[str, dict[str, Any]] = {
    "narrow": {"name": "topology", "shape": (1, 16, 16), "layers": "FC-64_FC-64", "timesteps": 4},
    "wide": {"name": "topology", "shape": (1, 16, 16), "layers": "FC-1024_FC-1024", "timesteps": 4},
    "wider": {"name": "topology", "shape": (1, 16, 16), "layers": "FC-2048_FC-2048", "timesteps": 4},
    "deep": {"name": "topology", "shape": (1, 16, 16), "layers": "FC-512_FC-512_FC-512_FC-512_FC-512", "timesteps": 6},
    "conv": {"name": "conv", "shape": (3, 16, 16), "layers": [64, "pool", 128, "pool", 256, "pool"], "timesteps": 4},
}


class Job(NamedTuple):
    """A step of n processes."""

    use: str
    """"fit": the link is fitted to it; "check": it is predicted."""
    network: str
    parallel: str
    ranks: int
    batch: int
    """Of each process."""
    sync_norm: bool = False
    accumulate: int = 1


JOBS = [
    *(Job("fit", name, "ddp", ranks, 32) for name in ("narrow", "wide", "wider") for ranks in (1, 2, 4)),
    *(Job("check", "wide", "fsdp", ranks, 32) for ranks in (2, 4)),
    Job("check", "conv", "ddp", 2, 4),
    *(Job("check", "conv", "ddp", ranks, 4, sync_norm=True) for ranks in (2, 4)),
    Job("check", "wide", "ddp", 4, 16, accumulate=2),
    # The form of the model was chosen before these were measured for the first time.
    *(Job("check", "deep", parallel, ranks, 24) for parallel in ("ddp", "fsdp") for ranks in (2, 4)),
]


class Groups(NamedTuple):
    """Who works together: all, the first so many, and each process alone."""

    first: dict[int, Any]
    alone: Any


def groups(rank: int) -> Groups:
    """Every process makes all of them, as torch wants it."""
    first = {count: dist.new_group(list(range(count))) for count in (1, 2, RANKS)}
    alone = [dist.new_group([other]) for other in range(RANKS)]
    return Groups(first, alone[rank])


def network(job: Job) -> nn.Module:
    torch.manual_seed(0)
    options = {**NETWORKS[job.network]}
    return build(options.pop("name"), options.pop("shape"), CLASSES, sync=job.sync_norm, **options)


def program(job: Job, group: Any) -> Callable[[], None]:
    """One step of a job in a group."""
    model = network(job)
    if job.parallel == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        for block in list(blocks_of(model)):
            fully_shard(block, mesh=mesh)
        trained: nn.Module = fully_shard(model, mesh=mesh)
    else:
        trained = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)  # as trtkern train
    loss, optimizer = SDTLoss(), torch.optim.SGD(trained.parameters(), 1e-3)
    images = torch.rand(job.batch, *NETWORKS[job.network]["shape"])
    target = torch.arange(job.batch) % CLASSES
    said = torch.zeros(CONTROL // 8, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in range(job.accumulate):
            if isinstance(trained, DistributedDataParallel):
                trained.require_backward_grad_sync = batch == job.accumulate - 1  # what no_sync() sets
            loss(trained(images), target).backward()
        optimizer.step()
        dist.all_reduce(said, group=group)

    return step


def ways(job: Job) -> list[bool]:
    """Whether a job sends: it is timed alone, and with the others where there are any."""
    return [False, True][: 1 + (job.ranks > 1)]


def turn(step: Callable[[], None], own: Any, group: Any) -> float:
    """The seconds of a step, after one that is not timed."""
    with world(own):
        step()
        dist.barrier(group=group)
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - begin) / STEPS


@contextmanager
def world(group: Any) -> Iterator[None]:
    """Inside, these processes are all that there are for a BatchNorm that shares its statistics."""
    before = dist.group.WORLD
    dist.group.WORLD = group
    try:
        yield
    finally:
        dist.group.WORLD = before


def measure(rank: int, folder: str) -> None:
    """One of the processes: the seconds of a step of each job and round, of the slowest process; the first keeps them.

    A job of more than one process is there twice: with the others, and alone beside them.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # else one core has three at times, and the others wait
    torch.set_num_threads(1)
    keep_pages()
    for told in (".*returned a view tensor", ".*broadcast_buffers"):  # nobody changes it in place; it is as it was
        warnings.filterwarnings("ignore", message=told)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(minutes=2)
    )
    made = groups(rank)

    def own(at: int, sends: bool) -> Any:
        return made.first[JOBS[at].ranks] if sends else made.alone

    turns = [
        {sends: program(job, own(at, sends)) for sends in ways(job)} if rank < job.ranks else None
        for at, job in enumerate(JOBS)
    ]
    found: dict[tuple[int, bool], list[float]] = {(at, sends): [] for at, job in enumerate(JOBS) for sends in ways(job)}
    shuffle = random.Random(0)
    for done in range(ROUNDS + 1):
        for at in shuffle.sample(range(len(JOBS)), len(JOBS)):
            for sends in shuffle.sample(ways(JOBS[at]), len(ways(JOBS[at]))):
                dist.barrier()
                step, seconds = turns[at], torch.zeros((), dtype=torch.float64)
                if step is not None:
                    seconds += turn(step[sends], own(at, sends), made.first[JOBS[at].ranks])
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if done:  # the first round warms up
                    found[at, sends].append(float(seconds))
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def measured(command: str) -> list[dict[str, Any]]:
    """A row a job: the step, and the computing beside as many others."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder,), RANKS)
        found = torch.load(f"{folder}/found", weights_only=False)
    table = []
    for place, job in enumerate(JOBS):
        compute = found[place, False]
        table.append(
            {**rows.origin(torch.device("cpu")), **job._asdict(), "timesteps": NETWORKS[job.network]["timesteps"]}
            | {"rounds": ROUNDS, **spread("compute", compute), **spread("step", found.get((place, True), compute))}
            | {**sent(job), "flops": "", "command": command}
        )
    return table


def sent(job: Job) -> dict[str, int]:
    """Collectives of a step, and the bytes that one rank sends for them over gloo: those that the step waits for, and
    those beside the backward pass.

    FSDP2 waits for all of them: what it gathers ahead of time it gathers on streams, and a CPU has none.
    """
    model = network(job)
    found = traffic(
        model, job.ranks, parallel=job.parallel, accumulate=job.accumulate, sync_norm=job.sync_norm,
        blocks=list(blocks_of(model)), reshard_root=False,
    )  # fmt: skip
    total = dict.fromkeys(scale_page.SENT, 0)
    for row in found.rows:
        if row.what != "penalty":
            place = "beside" if row.during and job.parallel == "ddp" else "waited"
            messages, size = carried(row, job.ranks, LINKS["gloo"])
            total[f"{place}_calls"] += row.times
            total[f"{place}_messages"] += messages
            total[f"{place}_bytes"] += size
    return total


def spread(what: str, seconds: list[float]) -> dict[str, float]:
    """Median and the middle three fifths, in milliseconds."""
    low, middle, high = 1e3 * np.quantile(seconds, (0.2, 0.5, 0.8))
    return {
        f"{what}_{name}_ms": round(float(value), 3) for name, value in (("p50", middle), ("p20", low), ("p80", high))
    }


def counted(name: str, command: str) -> dict[str, Any]:
    """A row of a large network: the floating-point operations of the training step of one image, all T of it."""
    what, images = scale_page.LARGE[name], 2  # a BatchNorm wants more than one value
    model = what.network()
    exact_convolutions(model)  # torch's kernels, whose operations have formulas
    with FlopCounterMode(display=False) as counter:
        SDTLoss()(model(torch.rand(images, *what.shape)), torch.arange(images)).backward()
    empty = dict.fromkeys((*Job._fields, *spread("compute", [0.0]), *spread("step", [0.0]), *scale_page.SENT), "")
    return {
        **rows.origin(torch.device("cpu")), **empty, "use": "count", "network": name, "timesteps": what.timesteps,
        "rounds": "", "flops": counter.get_total_flops() // images, "command": command,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing")
    if not parser.parse_args().page:
        torch.set_num_threads(1)
        command = "python bench/scale.py"
        had = {row["network"] for row in scale_page.read()} if scale_page.ROWS.exists() else set()
        table = [*measured(command), *(counted(name, command) for name in scale_page.LARGE if name not in had)]
        order = list(table[0])
        append([{name: row[name] for name in order} for row in table], scale_page.ROWS)
    scale_page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
