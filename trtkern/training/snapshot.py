"""What a run needs to go on bitwise besides its weights and its data: the optimiser, the scaler, the generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtkern.ops.checks import is_distributed
from trtkern.parallel.job import ALONE, Job
from trtkern.parallel.parts import full, like
from trtkern.training.checkpoint import Checkpoint

_OPTIMIZER = "optimizer."
_HOW = ("fused", "foreach", "capturable")
"""Of an optimiser's group how it computes, which depends on where its weights lie now."""


def capture(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, job: Job = ALONE
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of them, and of the global generators of every process."""
    values = optimizer.state_dict()
    held = {
        f"{_OPTIMIZER}{index}.{name}": value
        for index, state in values["state"].items()
        for name, value in state.items()
    }
    tensors = {name: full(value) for name, value in held.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
    for rank, states in enumerate(job.gathered(_random())):
        tensors |= {_of_rank(name, rank): state for name, state in states.items()}
    groups = [{**group, "lr": float(group["lr"])} for group in values["param_groups"]]
    loop = {"groups": groups, "scaler": scaler.state_dict()}
    return tensors, {**loop, "numbers": others} if others else loop


def _random() -> dict[str, Tensor]:
    """The states of the global generators of this process."""
    states = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random_cuda"] = torch.cuda.get_rng_state()
    return states


def _of_rank(name: str, rank: int) -> str:
    """The name of that state in a checkpoint; the first rank's has no number."""
    return f"{name}.{rank}" if rank else name


def restore(saved: Checkpoint, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """The inverse of ``capture``, but for the global generators.

    Raises:
        ValueError: the checkpoint holds weights alone, or the state of another optimiser.
    """
    loop = saved.metadata.get("loop")
    if loop is None or "random" not in saved.state:
        raise ValueError("checkpoint: expected the state of a run, got weights alone; it cannot be resumed")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for name, value in {**saved.state, **loop.get("numbers", {})}.items():
        if name.startswith(_OPTIMIZER):
            index, _, what = name.removeprefix(_OPTIMIZER).partition(".")
            held = _laid_out(value, parameters[int(index)]) if isinstance(value, Tensor) else value
            states.setdefault(int(index), {})[what] = held
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        pairs = zip(loop["groups"], optimizer.param_groups, strict=True)
        groups = [
            {name: now[name] if name in _HOW else _as(value, now.get(name)) for name, value in group.items()}
            for group, now in pairs
        ]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"checkpoint: expected one of this optimiser and network; {error}") from None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):  # a tensor on the device stays that very tensor
            group["lr"] = rate.fill_(group["lr"])
    if scaler.is_enabled():
        scaler.load_state_dict(loop["scaler"])


def restore_random(state: dict[str, Tensor], job: Job = ALONE) -> None:
    """The global generators of a saved ``state``: of this process, if there were as many of them.

    Where there were fewer or more, each goes on from another place that follows from the first one's.
    """
    ranks = sum(name == "random" or name.startswith("random.") for name in state)
    if ranks != job.world_size:
        torch.set_rng_state(state["random"])
        torch.manual_seed(int(torch.randint(2**62, ())) + job.rank)
        return
    torch.set_rng_state(state[_of_rank("random", job.rank)])
    if (cuda := _of_rank("random_cuda", job.rank)) in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[cuda])


def _as(value: Any, now: Any) -> Any:
    """A list of JSON as the tuple that it was."""
    return tuple(value) if isinstance(now, tuple) else value


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """In the parameter's layout: a fused optimiser goes through memory, not through indices."""
    if value.shape != parameter.shape:
        return value
    if is_distributed(parameter):
        return like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
