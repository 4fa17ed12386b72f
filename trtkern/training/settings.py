"""What a training run is told: options as a user gives them, resolved and checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trtkern import backends


@dataclass(frozen=True)
class Recipe:
    """The defaults of a data set."""

    layers: tuple[int | str, ...]
    epochs: int
    batch_size: int
    lr: float
    warmup: float = 0.0
    """Share of all steps in which the learning rate rises linearly, before it falls as a cosine."""
    flip: bool = False
    """Mirror half of the images, drawn anew each epoch."""
    threads: int | None = None
    """CPU threads; None is what torch takes."""


RECIPES = {
    # One thread: the steps are so small that waiting for a second one costs as much as it brings on an idle machine,
    # and many times that on a busy or a large one.
    "digits": Recipe(layers=(16, 32, "pool"), epochs=15, batch_size=64, lr=3e-3, threads=1),
    "fashion-mnist": Recipe(
        layers=(16, "pool", 32, 64, "pool"), epochs=5, batch_size=128, lr=4e-3, warmup=0.2, flip=True
    ),
}

# The options that each loss takes, with their defaults.
LOSSES: dict[str, dict[str, float]] = {
    "trt": {"lam": 1e-5, "delta": 0.25, "eta": 0.05},
    "tet": {"lam": 0.05},
    "sdt": {},
}


@dataclass(frozen=True)
class Settings:
    """A run, resolved: every value is the one in force. ``resolve`` makes it."""

    data: str
    data_dir: str | None
    loss: str
    loss_options: dict[str, float]
    timesteps: int
    layers: tuple[int | str, ...]
    backend: str
    device: str
    threads: int
    seed: int
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    flip: bool
    amp: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``."""
        return cls(**{**values, "layers": tuple(values["layers"])})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "layers": list(self.layers)}


def resolve(
    *,
    data: str = "digits",
    data_dir: str | None = None,
    loss: str = "trt",
    lam: float | None = None,
    delta: float | None = None,
    eta: float | None = None,
    timesteps: int = 4,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    amp: bool = False,
) -> Settings:
    """Options as ``Settings``; None is the default of the data set or of the loss.

    Raises:
        ValueError: an option out of range or unknown; the message says what was expected.
        RuntimeError: a device or backend that this machine does not have.
    """
    recipe = RECIPES[one_of("data", data, tuple(RECIPES))]
    options = _loss_options(loss, {"lam": lam, "delta": delta, "eta": eta})
    one_of("backend", backend, backends.NAMES)
    where = resolve_device(device)
    data_dir = None if data_dir is None else str(Path(data_dir).resolve())
    threads = threads if threads is not None else recipe.threads or torch.get_num_threads()
    lr = recipe.lr if lr is None else lr
    epochs = recipe.epochs if epochs is None else epochs
    batch_size = recipe.batch_size if batch_size is None else batch_size
    counts = {"timesteps": timesteps, "threads": threads, "epochs": epochs, "batch-size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name}: expected an integer of at least 1, got {value}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr: expected a finite number above 0, got {lr}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected an integer of 0 to 2**63 - 1, got {seed}")
    return Settings(
        data=data, data_dir=data_dir, loss=loss, loss_options=options, timesteps=timesteps, layers=recipe.layers,
        backend=backend, device=where, threads=threads, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr,
        warmup=recipe.warmup, flip=recipe.flip, amp=amp,
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


def _loss_options(loss: str, given: dict[str, float | None]) -> dict[str, float]:
    defaults = LOSSES[one_of("loss", loss, tuple(LOSSES))]
    for name, value in given.items():
        if value is None:
            continue
        if name not in defaults:
            takers = ", ".join(other for other, options in LOSSES.items() if name in options)
            raise ValueError(f"--{name}: expected with --loss {takers} only, got it with --loss {loss}")
        share = (loss, name) in (("trt", "eta"), ("tet", "lam"))
        if not (math.isfinite(value) and value >= 0) or (share and value > 1):
            wanted = "a number of 0 to 1" if share else "a finite number of at least 0"
            raise ValueError(f"--{name}: expected {wanted}, got {value}")
    return {name: value if (value := given[name]) is not None else default for name, default in defaults.items()}
