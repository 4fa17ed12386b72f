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
from torch.nn.parallel import DistributedDataParallel

from trtkern.data import Split
from trtkern.data.samples import Loaded
from trtkern.names import is_own
from trtkern.ops.checks import is_distributed
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


def expect_whole(model: nn.Module, job: Job) -> None:
    """Raise a ValueError if a network of several processes, which has not run yet, lies on them already."""
    if job.alone:
        return
    ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if ddp or any(map(is_distributed, model.parameters())):
        raise ValueError(
            f"model: expected a network that lies on no processes yet, got {type(model).__name__} with "
            f"{'DDP' if ddp else 'FSDP'} in it; give the network itself: --parallel says how it is laid on them"
        )


def agree(
    job: Job, settings: Settings, files: dict[str, Any] | None, splits: Mapping[str, Split], model: nn.Module
) -> None:
    """Raise before the first step if these processes cannot train together.

    Args:
        job: of them.
        settings: of this one.
        files: the fingerprint of its data.
        splits: its data.
        model: its network.

    Raises:
        ValueError: other versions, options, data or another network than the first one has, by name; a split that does
            not divide among them; an option that several processes cannot have.
    """
    if job.alone:
        return
    about = {name if name in WORDS else f"version of {name}": found for name, found in run.versions().items()}
    options = flat(settings.to_json()).items()
    about |= {f"option {name}": json.dumps(value) for name, value in options if name not in OF_MACHINES}
    about["data (by its checksum)"] = _digest(json.dumps(files, sort_keys=True))
    about["order of the data (by the generators of its DataLoaders)"] = _digest(*map(_generators, splits.values()))
    shapes = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    about["network (by the shapes of its weights)"] = _digest(*map(str, shapes))
    job.same(about)
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


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _generators(split: Split) -> str:
    """The states of those that the order of a split's batches comes from."""
    found = split.images.generators() if isinstance(split.images, Loaded) else []
    return " ".join(generator.get_state().numpy().tobytes().hex() for generator in found)


def in_parts(job: Job, settings: Settings) -> bool:
    """Whether each process has a part of the weights alone."""
    return not job.alone and settings.parallel == "fsdp"


def laid(
    model: nn.Module, job: Job, settings: Settings
) -> tuple[Callable[..., Any], Callable[[], AbstractContextManager[None]]]:
    """The network as it is called in training, and the context for batches whose gradients others need not have yet."""
    trained = any(weight.requires_grad for weight in model.parameters())  # the optimiser refuses one without any
    if job.alone or not trained:
        return torch.compile(model) if settings.compile else model, nullcontext
    low = LOW[settings.amp] if settings.parallel == "fsdp" else None
    network, apart = lay(model, job, settings.parallel, low, is_own(settings.model["name"]))
    return torch.compile(network) if settings.compile else network, apart
