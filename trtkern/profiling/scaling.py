"""The model of a step on several processes: what they send one another, and how long that keeps a step.

Of n ranks each computes the step of its own batch, which takes C seconds. Besides it sends what ``traffic`` lists, a
row for each kind of collective. Of a tensor of S bytes one rank sends, in so many messages that wait for one another::

    all-reduce       2 (n-1)/n S    2 (n-1), on a tree min(2 (n-1), 2 ceil(log2 n))
    all-gather         (n-1)/n S    n-1, S being the gathered tensor
    reduce-scatter     (n-1)/n S    n-1, S being the whole tensor
    broadcast                  S    ceil(log2 n)

A collective takes u seconds to start, whatever it carries. Over a link of latency a (seconds) and bandwidth b (bytes a
second, one direction, of one rank) a row of k collectives with m messages and s bytes takes k u + m a + s / b. Where
all ranks share the bandwidth, as those of one CPU do, it is k u + m a + n s / b.

The forward pass is C/3, the backward pass 2 C/3. A share o of each (``overlap``) can go on while a collective is under
way. With F the rows that are under way during the forward pass, B those during the backward pass, and E those for which
the step has to wait, all in seconds::

    step = C + E + max(0, F - o C/3) + max(0, B - 2 o C/3, G - 2 o C/(3 j))

G is what of B are gradients: of j batches that are accumulated they go out beside the last one's backward pass.

DDP all-reduces the gradients, in buckets of 25 MiB (the first of 1 MiB) that go out as the backward pass fills them;
the last one is waited for. FSDP2 all-gathers the weights of each block before its forward pass and again before its
backward pass, and reduce-scatters its gradients after it; the first all-gather of a pass and the last reduce-scatter
are waited for, and so are statistics that processes share.

``LINKS`` has published links: NVLink 4 of an H100, 900 GB/s both ways together; InfiniBand NDR, a port of 400 Gbit/s a
GPU; PCI Express 4.0 x16, 16 GT/s a lane with 128 bits in 130. Their latencies are those of NCCL's own model
(``baseLat`` and ``hwLat`` of its src/graph/tuning.cc, ring, Simple protocol). "gloo" was fitted by bench/scale.py on
one machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern.names import PARALLEL, unknown
from trtkern.nn import BatchNormLIF

__all__ = [
    "LINKS", "Link", "Predicted", "Row", "Traffic", "carried", "least_compute", "messages", "predict", "seconds",
    "sent", "traffic",
]  # fmt: skip

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
Pass = Literal["forward", "backward"]
PASSES: dict[Pass, float] = {"forward": 1 / 3, "backward": 2 / 3}
"""The share of the computing that each is: a backward pass has two products for each of the forward pass."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes from which on a bucket of DDP is full: the first, all others."""
CONTROL = 4 * 8
"""Bytes of what the processes tell one another about the run at each step: four numbers in float64."""
SCALAR = 4
"""Bytes of one number: the value of a penalty, the gradient of a scalar."""


class Link(NamedTuple):
    """What carries the messages of one rank."""

    name: str
    """What it is called."""
    latency: float
    """Seconds of a message without content."""
    bandwidth: float
    """Bytes a second in one direction."""
    start: float = 0.0
    """Seconds of a collective besides its messages."""
    shared: bool = False
    """Whether all ranks share the bandwidth, as where they are processes of one CPU."""
    tree: bool = True
    """Whether an all-reduce takes a tree where that has fewer hops than a ring, as NCCL's does."""
    scatters: bool = True
    """Whether it has a reduce-scatter; without one it is an all-reduce."""
    overlap: float = 1.0
    """The share of a pass that can go on while a collective is under way; less than 1 where that takes the cores that
    compute."""


LINKS = {
    "nvlink": Link("nvlink", 3.4e-6, 450e9, start=8.4e-6),
    "infiniband": Link("infiniband", 9.6e-6, 50e9, start=8.4e-6),
    "pcie": Link("pcie", 5.7e-6, 31.5e9, start=8.4e-6),
    "gloo": Link("gloo", 0.000247, 5.16e09, start=0.00184, shared=True, tree=False, scatters=False, overlap=0),
}
"""Links by name, with published numbers; ``gloo`` as measured between processes of one CPU."""


class Row(NamedTuple):
    """One kind of collective of a step."""

    what: str
    """What is sent: "gradients, bucket 1 of 3", "statistics, forward", ..."""
    collective: Collective
    """"all_reduce", "all_gather", "reduce_scatter" or "broadcast"."""
    bytes: int
    """Of the whole tensors of a step: of all ranks together where they are gathered or scattered."""
    sent: int
    """Bytes of a step that one rank sends for them."""
    times: int = 1
    """How often in a step."""
    during: Pass | None = None
    """The pass that it can be under way beside; None: the step waits for it."""


class Traffic(NamedTuple):
    """What one rank sends in a step."""

    ranks: int
    """How many processes."""
    rows: tuple[Row, ...]
    """What one of them sends, each kind a row."""
    batches: int = 1
    """j: how many are accumulated for an update."""

    @property
    def bytes(self) -> int:
        """Sent by one rank in a step."""
        return sum(row.sent for row in self.rows)

    @property
    def messages(self) -> int:
        """Of a step, those that wait for one another, on rings."""
        return sum(row.times * messages(row.collective, self.ranks) for row in self.rows)


class Predicted(NamedTuple):
    """A step on several processes."""

    step: float
    """Seconds."""
    efficiency: float
    """The seconds of the computing over those of the step: of n ranks, the share that trains."""
    communication: float
    """The share of the step in which a collective is under way, whether or not something is computed beside it."""


def sent(collective: Collective, size: int, ranks: int) -> int:
    """Bytes that one of so many ranks sends, for a whole tensor of ``size`` bytes.

    Args:
        collective: "all_reduce", "all_gather", ...
        size: bytes of the whole tensor.
        ranks: how many processes.
    """
    parts = {"all_reduce": 2 * (ranks - 1), "broadcast": ranks}.get(collective, ranks - 1)
    return 0 if ranks == 1 else math.ceil(size * parts / ranks)


def messages(collective: Collective, ranks: int, tree: bool = False) -> int:
    """How many messages wait for one another; ``tree``: an all-reduce may take one in place of the ring.

    Args:
        collective: "all_reduce", "all_gather", ...
        ranks: how many processes.
        tree: whether an all-reduce may go along a tree.
    """
    depth = math.ceil(math.log2(ranks))
    if collective == "broadcast":
        return depth
    if collective == "all_reduce":
        return min(2 * (ranks - 1), 2 * depth) if tree else 2 * (ranks - 1)
    return ranks - 1


def traffic(
    model: nn.Module,
    ranks: int,
    *,
    parallel: str = "ddp",
    accumulate: int = 1,
    sync_norm: bool = False,
    blocks: Sequence[nn.Module] | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_root: bool = True,
    broadcast_buffers: bool = False,
) -> Traffic:
    """What one rank sends in a step of a model.

    Args:
        model: a module, sharded or not; only its sizes are looked at.
        ranks: how many processes train, at least 1.
        parallel: "ddp", or "fsdp": FSDP2, whose shards are padded to equal rows. Parameters without an axis stay whole.
        accumulate: batches of an update; gradients are reduced once an update, weights are gathered at each batch.
        sync_norm: whether the statistics of every BatchNorm that trains are those of all processes.
        blocks: of "fsdp", the modules that are gathered one by one; what is in none of them is the root's.
            None: those on which ``fully_shard`` was called, else the model whole.
        param_dtype: of "fsdp", what is gathered; None: the weights as they are.
        reduce_dtype: of "fsdp", what is reduced; None: ``param_dtype``.
        reshard_root: of "fsdp", whether the root's weights are let go of behind its forward pass like those of a block,
            as ``trtkern.parallel.sharding.shard`` has it and torch's default has not.
        broadcast_buffers: of "ddp", whether rank 0 sends its buffers before the first forward pass of an update, as
            torch's has it and ``trtkern train`` has not.

    Raises:
        ValueError: an unknown ``parallel``; ``ranks`` or ``accumulate`` below 1.
    """
    if parallel not in PARALLEL:
        raise unknown("parallel", parallel, PARALLEL)
    for name, value in (("ranks", ranks), ("accumulate", accumulate)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"traffic: expected {name} to be an int of at least 1, got {value!r}")
    if ranks == 1:
        return Traffic(1, ())
    rows = list(_statistics(model, ranks, accumulate)) if sync_norm else []
    if parallel == "ddp":
        rows += _buffers(model, ranks) if broadcast_buffers else ()
        rows += _buckets(model, ranks)
    else:
        groups = _groups(model, blocks)
        dtypes = param_dtype, reduce_dtype or param_dtype
        rows += _shards(*groups, ranks, accumulate, *dtypes, reshard_root)
        rows += _scalars(model, ranks, accumulate)
        rows.append(_row("penalty", "all_reduce", SCALAR, ranks))
    return Traffic(ranks, (*rows, _row("control", "all_reduce", CONTROL, ranks)), accumulate)


def predict(compute: float, traffic: Traffic, ranks: int, link: Link, overlap: float | None = None) -> Predicted:
    """The step of one of n ranks, in seconds; the formula stands at the top of this file.

    Args:
        compute: C, the seconds of the same step of one process that sends nothing, beside as many others as there are.
        traffic: of these ranks.
        ranks: how many they are.
        link: what carries it.
        overlap: o, from 0 to 1; None: that of the link.

    Raises:
        ValueError: traffic of other ranks, ``compute`` not above 0, or ``overlap`` outside of 0 to 1.
    """
    share = link.overlap if overlap is None else overlap
    if traffic.ranks != ranks:
        raise ValueError(f"predict: expected the traffic of {ranks} ranks, got that of {traffic.ranks}; make it anew")
    if not compute > 0 or not math.isfinite(compute):
        raise ValueError(f"predict: expected compute to be seconds above 0, got {compute!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"predict: expected overlap to be a number from 0 to 1, got {overlap!r}")
    times = _times(traffic, link)
    hides = {name: share * part * compute for name, part in PASSES.items()}
    step = compute + times.waited + max(0.0, times.forward - hides["forward"])
    step += max(0.0, times.backward - hides["backward"], times.gradients - hides["backward"] / traffic.batches)
    return Predicted(step, compute / step, min(1.0, times.whole / step))


def least_compute(traffic: Traffic, link: Link, efficiency: float = 0.9, overlap: float | None = None) -> float:
    """The C from which on ``predict`` gives at least that efficiency, in seconds: a step that computes less is too
    small for so many ranks.

    Args:
        traffic: what one process sends in a step.
        link: what carries it.
        efficiency: the share of the time that should be computing, 0 to 1.
        overlap: the share of a pass during which something can be sent; None: that of the link.

    Raises:
        ValueError: ``efficiency`` that is not between 0 and 1.
    """
    if not 0 < efficiency < 1:
        raise ValueError(f"least_compute: expected efficiency between 0 and 1, got {efficiency!r}")
    if not traffic.rows:
        return 0.0
    low, high = 0.0, _times(traffic, link).whole * efficiency / (1 - efficiency)  # nothing hidden
    for _ in range(100):  # the efficiency grows with C
        middle = (low + high) / 2
        enough = predict(middle, traffic, traffic.ranks, link, overlap).efficiency >= efficiency
        low, high = (low, middle) if enough else (middle, high)
    return high


def carried(row: Row, ranks: int, link: Link) -> tuple[int, int]:
    """Of a row, the messages m that wait for one another and the bytes s that one rank sends, as a link carries it.

    Args:
        row: one kind of collective.
        ranks: how many processes.
        link: what carries it.
    """
    collective, size = row.collective, row.sent
    if collective == "reduce_scatter" and not link.scatters:
        collective, size = "all_reduce", sent("all_reduce", row.bytes, ranks)
    return row.times * messages(collective, ranks, link.tree), size


def seconds(row: Row, ranks: int, link: Link) -> float:
    """k u + m a + s / b of a row: how long its collectives of a step are under way.

    Args:
        row: one kind of collective.
        ranks: how many processes.
        link: what carries it.
    """
    waits, size = carried(row, ranks, link)
    return row.times * link.start + waits * link.latency + size * (ranks if link.shared else 1) / link.bandwidth


class _Times(NamedTuple):
    """E, F, B and G, in seconds."""

    waited: float
    forward: float
    backward: float
    gradients: float

    @property
    def whole(self) -> float:
        return self.waited + self.forward + self.backward


def _times(traffic: Traffic, link: Link) -> _Times:
    took = [(row, seconds(row, traffic.ranks, link)) for row in traffic.rows]
    waited, forward, backward = (sum(s for row, s in took if row.during == place) for place in (None, *PASSES))
    gradients = sum(s for row, s in took if row.during == "backward" and row.collective != "all_gather")
    return _Times(waited, forward, backward, gradients)


def _row(what: str, collective: Collective, size: int, ranks: int, times: int = 1, during: Pass | None = None) -> Row:
    return Row(what, collective, size, sent(collective, size, ranks), times, during)


def _statistics(model: nn.Module, ranks: int, batches: int) -> Iterable[Row]:
    """Of each BatchNorm, forward its sums and the number of values, backward two sums."""
    norms = [module for module in model.modules() if isinstance(module, (BatchNormLIF, _BatchNorm))]
    sums = [2 * norm.num_features + 1 for norm in norms if isinstance(norm, BatchNormLIF)]  # both ways, in float64
    others = [norm.num_features for norm in norms if isinstance(norm, _BatchNorm)]  # as nn.SyncBatchNorm has it on GPUs
    kinds: list[tuple[str, Collective, list[int]]] = [
        ("sums forward", "all_reduce", [8 * count for count in sums]),
        ("sums backward", "all_reduce", [8 * count for count in sums]),
        ("statistics forward", "all_gather", [4 * ranks * (2 * count + 1) for count in others]),
        ("statistics backward", "all_reduce", [4 * 2 * count for count in others]),
    ]
    for what, collective, sizes in kinds:
        if sizes:
            yield _row(what, collective, batches * sum(sizes), ranks, batches * len(sizes))


def _buffers(model: nn.Module, ranks: int) -> Iterable[Row]:
    """Those of one dtype go together."""
    sizes: dict[torch.dtype, int] = {}
    for buffer in model.buffers():
        sizes[buffer.dtype] = sizes.get(buffer.dtype, 0) + _size(buffer)
    for dtype, size in sizes.items():
        yield _row(f"buffers, {str(dtype).removeprefix('torch.')}", "broadcast", size, ranks)


def _buckets(model: nn.Module, ranks: int) -> Iterable[Row]:
    """Gradients of one dtype, filled from the last layer on, as its gradient is the first to be known."""
    full: list[int] = []
    filling: dict[torch.dtype, int] = {}
    for weight in reversed([weight for weight in model.parameters() if weight.requires_grad]):
        held = filling.pop(weight.dtype, 0) + _size(weight)
        if held >= (BUCKET if full else FIRST_BUCKET):
            full.append(held)
        else:
            filling[weight.dtype] = held
    full += filling.values()
    for place, size in enumerate(full, 1):
        during: Pass | None = "backward" if place < len(full) else None
        yield _row(f"gradients, bucket {place} of {len(full)}", "all_reduce", size, ranks, during=during)


def _groups(model: nn.Module, blocks: Sequence[nn.Module] | None) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The root's weights, and those of each block, which are gathered together."""
    if blocks is None:
        loaded = sys.modules.get("torch.distributed.fsdp")  # which takes seconds, and a sharded model has it
        blocks = [m for m in model.modules() if m is not model and loaded and isinstance(m, loaded.FSDPModule)]
    known: set[Tensor] = set()
    groups: list[list[Tensor]] = []
    for block in (*reversed(blocks), model):  # of blocks within blocks the inner one has its weights
        groups.append([weight for weight in block.parameters() if weight.dim() and weight not in known])
        known.update(groups[-1])
    return groups[-1], [group for group in reversed(groups[:-1]) if group]


def _shards(
    root: list[Tensor],
    blocks: list[list[Tensor]],
    ranks: int,
    batches: int,
    low: torch.dtype | None,
    reduced: torch.dtype | None,
    reshard_root: bool,
) -> Iterable[Row]:
    """Weights are gathered forward and, unless they have stayed, backward, at each batch; gradients scattered once."""
    groups = [root, *blocks] if root else blocks
    gathered = [sum(_padded(weight, ranks, low) for weight in group) for group in groups]
    scattered = [sum(_padded(w, ranks, reduced) for w in group if w.requires_grad) for group in groups]
    yield from _apart("weights forward", "all_gather", gathered, ranks, batches, "forward")
    again = gathered[1:] if root and not reshard_root else gathered
    yield from _apart("weights backward", "all_gather", again[::-1], ranks, batches, "backward")
    yield from _apart("gradients", "reduce_scatter", [size for size in scattered if size], ranks, 1, "backward")


def _scalars(model: nn.Module, ranks: int, batches: int) -> Iterable[Row]:
    """What has no axis to cut, as a neuron's learned decay: whole on every rank, its gradients averaged together."""
    if count := sum(1 for weight in model.parameters() if weight.requires_grad and not weight.dim()):
        yield _row("gradients, scalars", "all_reduce", batches * SCALAR * count, ranks, batches)


def _apart(
    what: str, collective: Collective, sizes: Sequence[int], ranks: int, batches: int, during: Pass
) -> Iterable[Row]:
    """The first, which nothing can go on beside, apart from the others."""
    waited, others = sizes[:1], sizes[1:]
    if waited:
        yield _row(f"{what}, waited for", collective, batches * sum(waited), ranks, batches)
    if others:
        yield _row(f"{what}, others", collective, batches * sum(others), ranks, batches * len(others), during)


def _padded(weight: Tensor, ranks: int, dtype: torch.dtype | None) -> int:
    """Bytes of the whole of a weight of which every rank has as many rows."""
    itemsize = weight.element_size() if dtype is None else dtype.itemsize
    return math.ceil(weight.shape[0] / ranks) * ranks * math.prod(weight.shape[1:]) * itemsize


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
