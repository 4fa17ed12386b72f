"""What the processes of a training do together: agree before they begin, lay the network on them, and say in each step
what the run is to do next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from trtkern.data import Split
from trtkern.parallel.job import Job
from trtkern.parallel.network import lay
from trtkern.training import run
from trtkern.training.settings import Settings, flat

WORDS = ("instruction set", "platform")
"""What ``run.versions`` has besides versions."""
OF_MACHINES = ("data_dir", "cache_dir", "class_list", "threads", "workers")
"""Options that may be others on another machine."""
LOW = {"none": None, "bf16": torch.bfloat16}
"""What FSDP computes in."""


class Wishes(NamedTuple):
    """What a step is to end with: each process wishes, and where one does all of them do it."""

    fails: bool = False
    """A number was not finite."""
    stops: bool = False
    """The run ends after this step."""
    saves: bool = False
    """A checkpoint is written."""
    shows: bool = False
    """The averages so far are shown."""

    def of_all(self, job: Job) -> Wishes:
        """Those of all processes."""
        return Wishes(*(count > 0 for count in job.summed(*map(float, self))))


def agree(job: Job, settings: Settings, files: dict[str, Any] | None, splits: Mapping[str, Split]) -> None:
    """Raise before the first step if these processes cannot train together.

    Args:
        job: of them.
        settings: of this one.
        files: the fingerprint of its data.
        splits: its data.

    Raises:
        ValueError: other versions, options or data than the first one has, by name; a batch or a split that does not
            divide among them; an option that several processes cannot have.
    """
    if job.alone:
        return
    about = {name if name in WORDS else f"version of {name}": found for name, found in run.versions().items()}
    options = flat(settings.to_json()).items()
    about |= {f"option {name}": json.dumps(value) for name, value in options if name not in OF_MACHINES}
    found = json.dumps(files, sort_keys=True).encode()
    job.same(about | {"data (by its checksum)": hashlib.sha256(found).hexdigest()[:12]})
    if settings.cuda_graphs:
        raise ValueError("--cuda-graphs: expected one process, got several; leave it out, or train with one")
    if settings.parallel == "fsdp":
        for option, wrong in (("--amp fp16", settings.amp == "fp16"), ("--observe", settings.observe is not None)):
            if wrong:
                raise ValueError(f"{option}: expected it with --parallel ddp, got --parallel fsdp")
    for name, split in splits.items():
        if len(split.images) < job.world_size:
            raise ValueError(
                f"data: expected as many {name} images as processes, {job.world_size}, got {len(split.images)}"
            )


def in_parts(job: Job, settings: Settings) -> bool:
    """Whether each process has a part of the weights alone."""
    return not job.alone and settings.parallel == "fsdp"


def laid(
    model: nn.Module, job: Job, settings: Settings
) -> tuple[Callable[..., Any], Callable[[], AbstractContextManager[None]]]:
    """The network as it is called in training, and the context for batches whose gradients others need not have yet."""
    if job.alone:
        return torch.compile(model) if settings.compile else model, nullcontext
    kept = model.state_dict().keys()
    job.copy_([value.detach() for value in model.parameters()])
    job.copy_([value for name, value in model.named_buffers() if name in kept])
    low = LOW[settings.amp] if settings.parallel == "fsdp" else None
    network, apart = lay(model, job, settings.parallel, low)
    return torch.compile(network) if settings.compile else network, apart
