"""What a run is to do: a recipe with the user's options over it, checked as far as that goes without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtkern.names import AMP, BACKENDS, DATASETS, DVS_RESIZE, LOSSES, OPTIMIZERS, SELECT, one_of
from trtkern.training import recipes

HELD_OUT = 0.1
"""Share of the training images that chooses the epoch, unless a recipe says otherwise."""


def make(
    *,
    recipe: str | None = None,
    changes: Iterable[str] = (),
    data: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    class_list: str | None = None,
    dvs_resize: str | None = None,
    loss: str | None = None,
    lam: float | None = None,
    delta: float | None = None,
    eta: float | None = None,
    timesteps: int | None = None,
    select: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    amp: str | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """A recipe with its ``changes`` (``recipes.load``) and options over it, as plain JSON types; None is the recipe's.

    Its keys are the fields of ``settings.Settings``; what only the machine can answer is still open: ``device`` may be
    "auto" and ``threads`` None.

    Args:
        recipe: its name; None is the one that is called as ``data`` is, the digits without.
        data: the data set of another recipe.

    Raises:
        ValueError: an option out of range or unknown; the message says what was expected.
    """
    if data is not None:
        one_of("data", data, DATASETS)
    name = recipe or data or "digits"
    said = recipes.load(name, changes)

    def over(key: str, value: Any, default: Any = None) -> Any:
        return said.get(key, default) if value is None else value

    loss_name, loss_options = _loss(said["loss"], loss, {"lam": lam, "delta": delta, "eta": eta})
    plan = {
        "recipe": name,
        "data": one_of("data", over("data", data), DATASETS),
        "data_dir": _path(data_dir),
        "cache_dir": _path(cache_dir),
        "class_list": _path(class_list),
        "dvs_resize": one_of("dvs-resize", over("dvs_resize", dvs_resize, "bilinear"), DVS_RESIZE),
        "train_images": said.get("train_images"),
        "select": one_of("select", over("select", select, "validation"), SELECT),
        "validation": float(said.get("validation", HELD_OUT)),
        "model": said["model"],
        "augment": said.get("augment", []),
        "loss": loss_name,
        "loss_options": loss_options,
        "label_smoothing": float(said.get("label_smoothing", 0.0)),
        "timesteps": over("timesteps", timesteps),
        "backend": one_of("backend", backend, BACKENDS),
        "device": device,
        "threads": over("threads", threads),
        "workers": over("workers", workers, 0),
        "seed": seed,
        "epochs": over("epochs", epochs),
        "batch_size": over("batch_size", batch_size),
        "optimizer": _optimizer(said.get("optimizer", {})),
        "lr": float(over("lr", lr)),
        "warmup": float(said.get("warmup", 0.0)),
        "clip": None if "clip" not in said else float(said["clip"]),
        "amp": one_of("amp", over("amp", amp, "none"), AMP),
        "compile": compile or said.get("compile", False),
        "cuda_graphs": cuda_graphs or said.get("cuda_graphs", False),
        "tensorboard": tensorboard,
    }
    _check(plan)
    return plan


def _path(name: str | None) -> str | None:
    return None if name is None else str(Path(name).resolve())


def _check(plan: dict[str, Any]) -> None:
    """The ranges of its numbers."""
    for key in ("timesteps", "threads", "epochs", "batch_size", "workers"):
        least = 0 if key == "workers" else 1
        if plan[key] is not None and plan[key] < least:
            raise ValueError(f"--{key.replace('_', '-')}: expected an integer of at least {least}, got {plan[key]}")
    if not (math.isfinite(plan["lr"]) and plan["lr"] > 0):
        raise ValueError(f"--lr: expected a finite number above 0, got {plan['lr']}")
    if plan["clip"] is not None and not (math.isfinite(plan["clip"]) and plan["clip"] > 0):
        raise ValueError(f"--set clip: expected a finite number above 0, got {plan['clip']}")
    if not 0 <= plan["warmup"] <= 1:
        raise ValueError(f"--set warmup: expected a number of 0 to 1, got {plan['warmup']}")
    if not 0 <= plan["label_smoothing"] < 1:
        raise ValueError(f"--set label_smoothing: expected a number of 0 to below 1, got {plan['label_smoothing']}")
    if not 0 < plan["validation"] < 1:
        raise ValueError(
            f"--set validation: expected a share above 0 and below 1, got {plan['validation']}; without held-out "
            f"images use --select last"
        )
    if not 0 <= plan["seed"] < 2**63:
        raise ValueError(f"--seed: expected an integer of 0 to 2**63 - 1, got {plan['seed']}")


def _loss(said: dict[str, Any], wanted: str | None, given: dict[str, float | None]) -> tuple[str, dict[str, Any]]:
    """The loss and what it takes: its defaults, over them the recipe's, over them the command line's."""
    own = said.get("name", "trt")
    loss = one_of("loss", own if wanted is None else wanted, tuple(LOSSES))
    options = _table(f"--recipe: loss {loss}", LOSSES[loss], said if loss == own else {})
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            takers = ", ".join(other for other, others in LOSSES.items() if name in others)
            raise ValueError(f"--{name}: expected with --loss {takers} only, got it with --loss {loss}")
        options[name] = value
    for name, value in options.items():
        if name == "exclude":
            continue
        share = (loss, name) in (("trt", "eta"), ("tet", "lam"))
        if not _number(value) or (share and value > 1):
            wanted = "a number of 0 to 1" if share else "a finite number of at least 0"
            raise ValueError(f"--{name}: expected {wanted}, got {value}")
    return loss, options


def _optimizer(said: dict[str, Any]) -> dict[str, Any]:
    """The optimiser and what it takes, its name with it."""
    name = one_of("set optimizer.name", said.get("name", "adam"), tuple(OPTIMIZERS))
    options = _table(f"--set optimizer: {name}", OPTIMIZERS[name], said)
    for option, value in options.items():
        if option == "nesterov":
            right = isinstance(value, bool)
        elif option == "betas":
            right = isinstance(value, list) and len(value) == 2 and all(_number(part) and part < 1 for part in value)
        else:
            right = _number(value) and (option == "weight_decay" or value < 1)
        if not right:
            raise ValueError(f"--set optimizer.{option}: expected it as in {OPTIMIZERS[name]}, got {value!r}")
    return {"name": name, **options}


def _table(where: str, known: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """The known options with what was said of them; an unknown one is an error."""
    given = {name: value for name, value in said.items() if name != "name"}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where}: expected of {', '.join(known) or 'no options'}, got {unknown[0]}")
    return {**known, **given}


def _number(value: Any) -> bool:
    """A finite number of at least 0."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= 0
