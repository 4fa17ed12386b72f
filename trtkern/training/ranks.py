"""What each of several processes would have in memory and send in a step, told by one (``--dry-run --ranks``)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trtkern.names import PARALLEL
from trtkern.output.text import aligned, size
from trtkern.parallel.launch import divided
from trtkern.profiling.memory.budget import Plan
from trtkern.profiling.scaling import LINKS, Link, Traffic, least_compute, predict, traffic
from trtkern.profiling.step.spread import spread
from trtkern.training import budget
from trtkern.training.budget import Share
from trtkern.training.settings import Settings
from trtkern.training.step import Step
from trtkern.training.tally import Tally
from trtkern.training.together import LOW

if TYPE_CHECKING:
    from trtkern.training.loop import Trainer

PATIENCE = 3.0
"""Seconds of a first step beyond which no second one is timed, and of all together beyond which there is no further."""
STEPS = 8
"""How many are timed, behind the first."""
GOOD = 0.9
"""The efficiency for which the least computing is told."""


def table(trainer: Trainer, settings: Settings, batch: int, ranks: int) -> str:
    """The memory of one of so many processes, the bytes that it sends, and the predicted efficiency over each link.

    Args:
        trainer: of a network that is whole, with a few images.
        settings: of the run that is asked about.
        batch: samples that the processes share.
        ranks: how many they are.

    Raises:
        ValueError: a batch that does not divide among them; no way of running the blocks fits into ``memory``.
    """
    share = Share(ranks, divided(ranks, batch))
    plan = budget.planned(trainer, settings, trainer.loader, share)
    found = _traffic(trainer, settings, ranks)
    times = timed(trainer, share.batch)
    parts = [f"{ranks} processes, {settings.parallel}, {share.batch} of {batch} images each", _memory(plan)]
    if settings.memory is not None:
        parts.append(str(plan))
    parts.append(f"each sends {size(found.bytes)} a step, in {found.messages:,} messages one after the other on a ring")
    seconds = None
    if times is None:
        parts.append(
            f"how long a step of {share.batch} images takes was not measured, since that takes long here; an "
            f"efficiency of {GOOD:.0%} wants a step that computes at least so long"
        )
    else:
        low, seconds, high = (taken * settings.accumulate for taken in spread(times))
        parts.append(
            f"a step of {share.batch} images computes {seconds:.3g} s here, measured on one process (median of "
            f"{len(times)}; p20 to p80: {low:.3g} to {high:.3g} s); over each link"
        )
    return "\n\n".join((*parts, _links(found, seconds)))


def _memory(plan: Plan) -> str:
    h = plan.held
    rows = (
        ("weights", h.weights), ("weights gathered", h.gathered), ("gradients", h.gradients), ("optimiser", h.state),
        ("batch", h.batch), ("kept for the backward pass", plan.kept), ("predicted peak", plan.peak),
    )  # fmt: skip
    lines = [(name, size(count)) for name, count in rows if count]
    return "\n".join(aligned([("of each", "memory"), *lines], right=(1,)))


def _traffic(trainer: Trainer, settings: Settings, ranks: int) -> Traffic:
    """What one process sends, as ``trtkern.parallel`` lays the network on them."""
    blocks, low = None, None
    if settings.parallel == PARALLEL[1]:
        from trtkern.parallel.sharding import blocks_of

        blocks, low = list(blocks_of(trainer.model)), LOW[settings.amp]
    return traffic(
        trainer.model, ranks, parallel=settings.parallel, accumulate=settings.accumulate, sync_norm=settings.sync_norm,
        blocks=blocks, param_dtype=low, reduce_dtype=None if low is None else torch.float32, broadcast_buffers=False,
    )  # fmt: skip


def _links(found: Traffic, seconds: float | None) -> str:
    head = ("link", "step", "efficiency", "communication", f"{GOOD:.0%} from")
    lines: list[Sequence[str]] = [head, *(_link(link, found, seconds) for link in LINKS.values())]
    return "\n".join(line.rstrip() for line in aligned(lines, right=(1, 2, 3, 4)))


def _link(link: Link, found: Traffic, seconds: float | None) -> tuple[str, ...]:
    least = f"{least_compute(found, link, GOOD):.3g} s"
    if seconds is None:
        return link.name, "", "", "", least
    made = predict(seconds, found, found.ranks, link)
    return link.name, f"{made.step:.3g} s", f"{made.efficiency:.1%}", f"{made.communication:.1%}", least


def timed(trainer: Trainer, batch: int) -> list[float] | None:
    """Seconds of training steps of that many samples on one process, behind a first that does not count; None where a
    step takes long.

    On a CPU of the trainer's images alone, whose time is carried on: it grows with them. On a GPU, where it does not,
    of as many as there are asked for.
    """
    axis = int(trainer.loader.time_first)
    images, labels = next(trainer.loader.whole(batch))
    few = images.shape[axis]
    if trainer.device.type == "cuda" and few < batch:
        rows = torch.arange(batch, device=images.device) % few
        images, labels, few = images.index_select(axis, rows), labels.index_select(0, rows), batch
    step = Step(
        trainer.logits, trainer.loss, trainer.optimizer, trainer.scaler, trainer.settings.clip, lambda parts: None
    )
    tally = Tally(str(trainer.device), scored=trainer.scored)
    trainer.model.train()
    found: list[float] = []
    start = time.perf_counter()
    while len(found) <= STEPS and (len(found) < 2 or time.perf_counter() - start < PATIENCE):
        begin = time.perf_counter()
        step(images, labels, tally).item()
        found.append(time.perf_counter() - begin)
        if found[-1] > PATIENCE:
            return None
    return [taken * batch / few for taken in found[1:]]
