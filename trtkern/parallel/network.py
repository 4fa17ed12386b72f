"""How a network lies on the processes of a job: whole on each of them (DDP), or in parts (FSDP2)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trtkern.parallel.job import Job


class Laid(NamedTuple):
    """A network on the processes of a job."""

    network: nn.Module
    """What is called in training: its gradients are averages over the processes."""
    apart: Callable[[], AbstractContextManager[None]]
    """A context for a batch whose gradients other processes need not have yet."""


def lay(model: nn.Module, job: Job, parallel: str, low: torch.dtype | None, idle: bool) -> Laid:
    """Lay a network on processes: all of them start with that of the first one.

    Args:
        model: on the device of this process; with "fsdp" its parameters become DTensors, in place.
        job: of several processes.
        parallel: "ddp" or "fsdp".
        low: with "fsdp" what the network computes in, by FSDP's own policy; None is as it is.
        idle: whether there may be weights without a gradient in a step. DDP waits for all of them, but where it is told
            to look for those in each step, which takes a message more.
    """
    if parallel == "ddp":
        # Running statistics are made alike where they are read, not in each step.
        named = inspect.signature(DistributedDataParallel).parameters
        quiet = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # before torch 2.13
        options: dict[str, Any] = {quiet: False, "gradient_as_bucket_view": True, "find_unused_parameters": idle}
        job.copy_([*model.parameters(), *model.buffers()])
        whole = DistributedDataParallel(model, init_sync=False, **options)
        return Laid(whole, whole.no_sync)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from trtkern.parallel.sharding import shard

    # Nobody changes the outputs of a network in place here, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy: dict[str, Any] = {}
    if low is not None:
        policy = {"policy": MixedPrecisionPolicy(low, reduce_dtype=torch.float32, output_dtype=torch.float32)}
    parts: Any = shard(model, **policy)

    @contextmanager
    def apart() -> Iterator[None]:
        parts.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            parts.set_requires_gradient_sync(True)

    return Laid(parts, apart)
