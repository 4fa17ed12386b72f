"""What a run needs to go on bitwise besides its weights and its data: the optimiser, the scaler, the generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtkern.training.checkpoint import Checkpoint

_OPTIMIZER = "optimizer."


def capture(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of them, and of the global generators."""
    values = optimizer.state_dict()
    tensors = {
        f"{_OPTIMIZER}{index}.{name}": torch.as_tensor(value)
        for index, state in values["state"].items()
        for name, value in state.items()
    }
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    groups = [{**group, "lr": float(group["lr"])} for group in values["param_groups"]]
    return tensors, {"groups": groups, "scaler": scaler.state_dict()}


def restore(saved: Checkpoint, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """The inverse of ``capture``, but for the global generators.

    Raises:
        ValueError: the checkpoint holds weights alone, or the state of another optimiser.
    """
    loop = saved.metadata.get("loop")
    if loop is None or "random" not in saved.state:
        raise ValueError("checkpoint: expected the state of a run, got weights alone; it cannot be resumed")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.state.items():
        if name.startswith(_OPTIMIZER):
            index, _, what = name.removeprefix(_OPTIMIZER).partition(".")
            states.setdefault(int(index), {})[what] = _laid_out(value, parameters[int(index)])
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        groups = [{**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in loop["groups"]]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (KeyError, ValueError) as error:
        raise ValueError(f"checkpoint: expected one of this optimiser and network; {error}") from None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):  # a tensor on the device stays that very tensor
            group["lr"] = rate.fill_(group["lr"])
    if scaler.is_enabled():
        scaler.load_state_dict(loop["scaler"])


def restore_random(state: dict[str, Tensor]) -> None:
    """The global generators of a saved ``state``."""
    torch.set_rng_state(state["random"])
    if "random_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"])


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """In the parameter's layout: a fused optimiser goes through memory, not through indices."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
