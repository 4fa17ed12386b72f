"""What a training run is told, resolved for this machine: every value is the one in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trtkern.data.augment import Pipeline
from trtkern.names import unknown
from trtkern.training import plan as plans


@dataclass(frozen=True)
class Settings:
    """A run, resolved; ``resolve`` makes it."""

    recipe: str
    data: str
    data_dir: str | None
    cache_dir: str | None
    """Where frames of events are kept; None is ``trtkern.data.cache.default_folder``."""
    class_list: str | None
    """The file that names the classes of ImageNet-100."""
    dvs_resize: str
    train_images: int | None
    """Of so many training images, stratified (``Dataset.fewer`` with seed 0); None is all."""
    select: str
    """Which epoch's weights are reported: a name of ``trtkern.names.SELECT``."""
    validation: float
    """Share of the training images that is held out, with ``select`` "validation"."""
    model: dict[str, Any]
    """Its name and what its builder takes (``trtkern.models.build``)."""
    augment: list[dict[str, Any]]
    """``trtkern.data.augment.Pipeline.from_recipe``."""
    loss: str
    loss_options: dict[str, Any]
    label_smoothing: float
    timesteps: int
    backend: str
    device: str
    threads: int
    workers: int
    """Processes that decode image files."""
    seed: int
    epochs: int
    batch_size: int
    optimizer: dict[str, Any]
    lr: float
    warmup: float
    """Share of all steps in which the learning rate rises linearly, before it falls as a cosine."""
    clip: float | None
    """The largest norm of all gradients together; None leaves them."""
    amp: str
    compile: bool
    cuda_graphs: bool
    keep_every: int | None
    """Of every so many epochs the weights stay (``trtkern analyze``); None is of none."""
    observe: str | None
    """What is looked at after an epoch: a name of ``trtkern.names.OBSERVE``; None is nothing."""
    observe_every: int | None
    """After every so many epochs; None is after each."""
    tensorboard: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``, checked as a command line is.

        Raises:
            ValueError: a value is missing, unknown, of another type or out of range; the message names it.
        """
        values = plans.checked(values)
        if values["threads"] is None:
            raise ValueError("--threads: expected an integer of at least 1, got None")
        return cls(**values)

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
    return Settings(**{**plan, "device": where, "augment": augment, "threads": threads})


def fits_device(plan: dict[str, Any], where: str) -> None:
    """Raise a ValueError if that device cannot do what is wished."""
    if plan["cuda_graphs"] and not where.startswith("cuda"):
        raise ValueError(f"--cuda-graphs: expected a GPU, got --device {where}")
    if plan["cuda_graphs"] and plan["optimizer"]["name"] == "sgd":
        raise ValueError(
            "--cuda-graphs: expected the optimiser adam or adamw, which keep their step and their rate on the GPU, "
            "got sgd"
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
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if gpus else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise unknown("--device", name, ("auto", "cpu", "cuda", "cuda:N"))
    if kind == "cpu":
        return "cpu"
    if int(index or 0) >= gpus:
        have = f"{gpus} GPU(s)" if gpus else "no GPU that torch can use (`trtkern doctor` says more)"
        raise RuntimeError(f"--device: {name} was asked for, but this machine has {have}; use --device cpu")
    return f"cuda:{int(index or 0)}"
