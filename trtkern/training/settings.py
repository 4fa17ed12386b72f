"""What a training run is told, resolved for this machine: every value is the one in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trtkern.data.augment import Pipeline
from trtkern.names import device
from trtkern.training import optimizers
from trtkern.training import plan as plans
from trtkern.training.options import Options


@dataclass(frozen=True)
class Settings(Options):
    """A run, resolved; ``settle`` makes it."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``, checked as a command line is.

        Raises:
            ValueError: a value is missing, unknown, of another type or out of range; the message names it.
        """
        values = plans.checked(values)
        if values["threads"] is None:
            raise ValueError("--threads: expected an integer of at least 1, got None")
        return cls(**{**values, "optimizer": optimizers.checked(values["optimizer"])})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def settle(plan: dict[str, Any]) -> Settings:
    """What ``plan.make`` made, for this machine.

    Raises:
        ValueError: a transform, or a wish that this device cannot fulfil; the message says what was expected.
        RuntimeError: a device that this machine does not have.
    """
    where = resolve_device(plan["device"])
    fits_device(plan, where)
    augment = Pipeline.from_recipe(plan["augment"]).to_recipe()
    threads = plan["threads"] or torch.get_num_threads()
    optimizer = optimizers.checked(plan["optimizer"])
    return Settings(**{**plan, "device": where, "augment": augment, "optimizer": optimizer, "threads": threads})


def fits_device(plan: dict[str, Any], where: str) -> None:
    """Raise a ValueError if that device cannot do what is wished."""
    if plan["cuda_graphs"] and not where.startswith("cuda"):
        raise ValueError(f"--cuda-graphs: expected a GPU, got --device {where}")
    if plan["cuda_graphs"] and (name := plan["optimizer"]["name"]) not in ("adam", "adamw"):
        raise ValueError(
            f"--cuda-graphs: expected the optimiser adam or adamw, which keep their step and their rate on the GPU, "
            f"got {name}"
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def resolve(**options: Any) -> Settings:
    """``settle(plan.make(...))``.

    Raises:
        ValueError, RuntimeError: as there.
    """
    return settle(plans.make(**options))


def resolve_device(name: str) -> str:
    """A device of this machine; "auto" is the first GPU, or the CPU without one."""
    kind, index = device(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return "cuda:0" if gpus else "cpu"
    if kind == "cpu":
        return "cpu"
    if index >= gpus:
        have = f"{gpus} GPU(s)" if gpus else "no GPU that torch can use (`trtkern doctor` says more)"
        raise RuntimeError(f"--device: {name} was asked for, but this machine has {have}; use --device cpu")
    return f"cuda:{index}"
