"""What a training run is told: options as a user gives them, resolved and checked before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trtkern import backends
from trtkern.data import DATASETS
from trtkern.data.augment import Pipeline
from trtkern.training import recipes

# The options that each loss takes, with their defaults.
LOSSES: dict[str, dict[str, Any]] = {
    "trt": {"lam": 1e-5, "delta": 0.25, "eta": 0.05, "exclude": []},
    "tet": {"lam": 0.05},
    "sdt": {},
}


@dataclass(frozen=True)
class Settings:
    """A run, resolved: every value is the one in force. ``resolve`` makes it."""

    recipe: str
    data: str
    data_dir: str | None
    train_images: int | None
    """Of so many training images, stratified (``Dataset.fewer`` with seed 0); None is all."""
    model: dict[str, Any]
    """Its name and what its builder takes (``trtkern.models.build``)."""
    augment: list[dict[str, Any]]
    """``trtkern.data.augment.Pipeline.from_recipe``."""
    loss: str
    loss_options: dict[str, Any]
    timesteps: int
    backend: str
    device: str
    threads: int
    seed: int
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    """Share of all steps in which the learning rate rises linearly, before it falls as a cosine."""
    amp: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def resolve(
    *,
    recipe: str | None = None,
    changes: Iterable[str] = (),
    data: str | None = None,
    data_dir: str | None = None,
    loss: str | None = None,
    lam: float | None = None,
    delta: float | None = None,
    eta: float | None = None,
    timesteps: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    amp: bool = False,
) -> Settings:
    """A recipe with its ``changes`` (``recipes.load``) and options over it; None is what the recipe says.

    Args:
        recipe: its name; None is the one that is called as ``data`` is, the digits without.
        data: the data set of another recipe.

    Raises:
        ValueError: an option out of range or unknown; the message says what was expected.
        RuntimeError: a device or backend that this machine does not have.
    """
    if data is not None:
        one_of("data", data, tuple(DATASETS))
    name = recipe or data or "digits"
    plan = recipes.load(name, changes)
    data = plan["data"] if data is None else data
    one_of("data", data, tuple(DATASETS))
    augment = Pipeline.from_recipe(plan.get("augment", [])).to_recipe()
    said = dict(plan["loss"])
    own = said.pop("name", "trt")
    loss = one_of("loss", own if loss is None else loss, tuple(LOSSES))
    options = _loss_options(loss, said if loss == own else {}, {"lam": lam, "delta": delta, "eta": eta})
    one_of("backend", backend, backends.NAMES)
    where = resolve_device(device)
    data_dir = None if data_dir is None else str(Path(data_dir).resolve())
    timesteps = plan["timesteps"] if timesteps is None else timesteps
    threads = threads if threads is not None else plan.get("threads") or torch.get_num_threads()
    lr = float(plan["lr"]) if lr is None else lr
    warmup = float(plan.get("warmup", 0.0))
    epochs = plan["epochs"] if epochs is None else epochs
    batch_size = plan["batch_size"] if batch_size is None else batch_size
    counts = {"timesteps": timesteps, "threads": threads, "epochs": epochs, "batch-size": batch_size}
    for option, value in counts.items():
        if value < 1:
            raise ValueError(f"--{option}: expected an integer of at least 1, got {value}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr: expected a finite number above 0, got {lr}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"--set warmup: expected a number of 0 to 1, got {warmup}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected an integer of 0 to 2**63 - 1, got {seed}")
    return Settings(
        recipe=name, data=data, data_dir=data_dir, train_images=plan.get("train_images"), model=plan["model"],
        augment=augment, loss=loss, loss_options=options, timesteps=timesteps, backend=backend, device=where,
        threads=threads, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr, warmup=warmup,
        amp=amp or plan.get("amp", False),
    )  # fmt: skip


def one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of the choices; a ValueError that lists them otherwise."""
    if value not in choices:
        raise ValueError(f"--{option}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def resolve_device(name: str) -> str:
    """A device of this machine; "auto" is the first GPU, or the CPU without one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if gpus else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device: expected one of auto, cpu, cuda, cuda:N, got {name!r}")
    if kind == "cpu":
        return "cpu"
    if int(index or 0) >= gpus:
        have = f"{gpus} GPU(s)" if gpus else "no GPU that torch can use (`trtkern doctor` says more)"
        raise RuntimeError(f"--device: {name} was asked for, but this machine has {have}; use --device cpu")
    return f"cuda:{int(index or 0)}"


def _loss_options(loss: str, said: dict[str, Any], given: dict[str, float | None]) -> dict[str, Any]:
    """What the loss takes: its defaults, over them the recipe's, over them the command line's."""
    defaults = LOSSES[loss]
    if unknown := sorted(set(said) - set(defaults)):
        raise ValueError(f"--recipe: loss {loss}: expected of {', '.join(defaults) or 'no options'}, got {unknown[0]}")
    options = {**defaults, **said}
    for name, value in given.items():
        if value is None:
            continue
        if name not in defaults:
            takers = ", ".join(other for other, others in LOSSES.items() if name in others)
            raise ValueError(f"--{name}: expected with --loss {takers} only, got it with --loss {loss}")
        options[name] = value
    for name, value in options.items():
        if name == "exclude":
            continue
        share = (loss, name) in (("trt", "eta"), ("tet", "lam"))
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (share and value > 1):
            wanted = "a number of 0 to 1" if share else "a finite number of at least 0"
            raise ValueError(f"--{name}: expected {wanted}, got {value}")
    return options
