"""The memory that a training step may take (``--memory``): how the blocks of the network run is chosen once, and is
then a setting of the run."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.profiling.memory.budget import BudgetError, Plan, StepMemory
from trtkern.profiling.memory.held import Held, held, in_parts
from trtkern.profiling.memory.tape import SMALL
from trtkern.profiling.memory.ways import run_as
from trtkern.training import optimizers
from trtkern.training.loader import Loader
from trtkern.training.options import limit
from trtkern.training.settings import Settings
from trtkern.training.step import DTYPES

if TYPE_CHECKING:
    from trtkern.training.loop import Trainer

Given = optimizers.Maker | torch.optim.Optimizer | None


class Share(NamedTuple):
    """What one of several processes that train together has of a step."""

    ranks: int
    batch: int
    """Its samples of a batch."""

    @classmethod
    def of(cls, trainer: Trainer) -> Share:
        """That of the process that the trainer is in."""
        return cls(trainer.job.world_size, trainer.part_size)


def settled(trainer: Trainer, loader: Loader, given: Given) -> tuple[Settings, Plan | None]:
    """Run the blocks as the settings say, or as ``memory`` wants it.

    Returns the settings with the ways in them, and the plan if there was one to make. All processes take the ways of
    the first one.

    Args:
        trainer: whose network is whole and has not run yet.
        loader: of some of its images.
        given: the optimiser, if it is an object.

    Raises:
        ValueError: no way fits into ``memory``; the message says what the least is. Or ways of another network.
    """
    settings, plan = trainer.settings, None
    if settings.memory is None:
        return settings, None
    if not settings.ways:
        plan = planned(trainer, settings, loader, Share.of(trainer), given)
        settings = replace(settings, ways=trainer.job.told(plan.ways))
    run_as(trainer.model, settings.ways)
    return settings, plan


def as_before(trainer: Trainer, before: Settings) -> Settings:
    """The settings of the trainer with the ways that its run had, in which its blocks run from now on."""
    settings = trainer.settings
    if not before.ways or before.memory != settings.memory:
        return settings
    run_as(trainer.model, before.ways)
    return replace(settings, ways=before.ways)


def planned(trainer: Trainer, settings: Settings, loader: Loader, share: Share, given: Given = None) -> Plan:
    """How the blocks are to run on a process with that share: the fastest ways within ``settings.memory``, or without
    such a limit as the network is made.

    Args:
        trainer: whose network it is, whole.
        settings: of the run.
        loader: of some of its images.
        share: what that process has.
        given: the optimiser, if it is an object.

    Raises:
        ValueError: no way fits; the message says what the least is.
    """
    step = step_memory(trainer, settings, loader, share, given)
    if settings.memory is None:
        return step.plan(step.made)
    said = limit(settings.memory)
    assert said is not None
    try:
        return step.within(said.of(_total(trainer.device)))
    except BudgetError as error:
        raise ValueError(
            f"--memory: {error}; use a smaller --batch-size (and as many times more --accumulate for the same updates)"
        ) from None


def _total(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_memory(trainer: Trainer, settings: Settings, loader: Loader, share: Share, given: Given = None) -> StepMemory:
    """The memory of a step of one process, for every way of running the blocks.

    Args:
        trainer: whose network it is, whole.
        settings: of the run.
        loader: of some of its images.
        share: what that process has.
        given: the optimiser, if it is an object.
    """
    axis = int(loader.time_first)
    images, _ = next(loader.whole(SMALL[0]))
    count = images.shape[axis]

    def inputs(wanted: int) -> Tensor:
        rows = torch.arange(wanted, device=images.device) % count
        return trainer.data.normalise(images.index_select(axis, rows))

    each = images.nbytes // count
    low = settings.amp != "none"
    with torch.autocast(trainer.device.type, DTYPES[settings.amp], enabled=low):
        return StepMemory(trainer.model, inputs, share.batch, _held(trainer, settings, each, share, given))


def _held(trainer: Trainer, settings: Settings, image: int, share: Share, given: Given) -> Held:
    """What is in memory of one process beside what the layers keep; of a batch, ``image`` bytes a sample."""
    model = trainer.model
    state = optimizers.state_bytes(settings, model, given)
    batches = share.batch * settings.accumulate * image + _resident(trainer)
    several = share.ranks > 1
    whole = held(model, state, batches, stay=settings.accumulate > 1 or several)
    if not several or settings.parallel != "fsdp":
        return whole
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return in_parts(whole, share.ranks, gathered(model), buffers)


def _resident(trainer: Trainer) -> int:
    """Bytes of images that lie on a GPU throughout."""
    found: list[Any] = [split.images for split in trainer.splits.values()]
    return sum(images.nbytes for images in found if isinstance(images, Tensor) and images.is_cuda)


def gathered(model: nn.Module) -> int:
    """Bytes of the weights that FSDP has whole at a time: those of no block, the largest block, and the next one, which
    comes while it runs."""
    from trtkern.parallel.sharding import blocks_of

    sizes = sorted(sum(p.nbytes for p in block.parameters()) for block in blocks_of(model))
    whole = sum(p.nbytes for p in model.parameters())
    return whole - sum(sizes) + 2 * (sizes[-1] if sizes else 0)
