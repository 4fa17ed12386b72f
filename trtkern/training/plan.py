"""What a run is to do: a recipe with the user's options over it, checked as far as that goes without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtkern.names import (
    AMP,
    BACKENDS,
    DATASETS,
    DVS_RESIZE,
    LOSSES,
    NEURONS,
    OBSERVE,
    OPTIMIZERS,
    SELECT,
    one_of,
    unknown,
)
from trtkern.training import recipes

HELD_OUT = 0.1
"""Share of the training images that chooses the epoch, unless a recipe says otherwise."""


# What a recipe and an option may both say, what only a recipe says, and what only an option does, with their defaults;
# a recipe without a value for ... is refused.
BOTH: dict[str, Any] = {
    "data": ..., "dvs_resize": "bilinear", "select": "validation", "timesteps": ..., "threads": None, "workers": 0,
    "epochs": ..., "batch_size": ..., "lr": ..., "amp": "none", "compile": False, "cuda_graphs": False,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "train_images": None, "validation": HELD_OUT, "model": ..., "augment": [], "label_smoothing": 0.0, "warmup": 0.0,
    "clip": None,
}  # fmt: skip
OPTION: dict[str, Any] = {
    "data_dir": None, "cache_dir": None, "class_list": None, "backend": "auto", "device": "auto", "seed": 0,
    "keep_every": None, "observe": None, "observe_every": None, "tensorboard": False,
}  # fmt: skip
LOSS = ("loss", "lam", "delta", "eta")
TYPES: dict[str, type] = {
    **recipes.KEYS, "recipe": str, "loss": str, "loss_options": dict, "seed": int, "keep_every": int,
    "observe": str, "observe_every": int, "tensorboard": bool,
    **dict.fromkeys(("data_dir", "cache_dir", "class_list", "backend", "device"), str),
}  # fmt: skip
PATHS = ("data_dir", "cache_dir", "class_list")
CHOICES = {
    "data": DATASETS, "dvs_resize": DVS_RESIZE, "select": SELECT, "backend": BACKENDS, "amp": AMP,
}  # fmt: skip


def make(*, recipe: str | None = None, changes: Iterable[str] = (), **given: Any) -> dict[str, Any]:
    """A recipe with its ``changes`` (``recipes.load``) and options over it, as plain JSON types.

    Its keys are the fields of ``settings.Settings``; what only the machine can answer is still open: ``device`` may be
    "auto" and ``threads`` None.

    Args:
        recipe: its name; None is the one that is called as ``data`` is, the digits without.
        given: the keys of ``BOTH`` and ``OPTION``, ``loss`` and its numbers; None is what the recipe says.

    Raises:
        ValueError: an option out of range or unknown; the message says what was expected.
        TypeError: no such option.
    """
    if others := sorted(set(given) - {*BOTH, *OPTION, *LOSS}):
        raise TypeError(str(unknown("plan", others[0], (*BOTH, *OPTION, *LOSS))))
    given = {key: value for key, value in given.items() if value is not None}
    if "data" in given:
        one_of("data", given["data"], DATASETS)
    name = given.get("data", "digits") if recipe is None else recipe
    said = recipes.load(name, changes)
    loss, loss_options = _loss(said["loss"], given)
    plan: dict[str, Any] = {
        "recipe": name,
        "loss": loss,
        "loss_options": loss_options,
        "optimizer": _optimizer(said.get("optimizer", {})),
    }
    plan |= {key: given.get(key, said.get(key, default)) for key, default in BOTH.items()}
    plan |= {key: said.get(key, default) for key, default in RECIPE.items()}
    plan |= {key: given.get(key, default) for key, default in OPTION.items()}
    for key in PATHS:
        plan[key] = None if plan[key] is None else str(Path(plan[key]).resolve())
    return checked(plan)


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a plan, checked as those of the command line are, whatever file they come from.

    What is missing and has a default gets it.

    Raises:
        ValueError: one is missing, unknown, of another type or out of range; the message says what was expected.
    """
    defaults = {**BOTH, **RECIPE, **OPTION}
    if others := sorted(set(values) - set(TYPES)):
        raise unknown("settings", others[0], TYPES)
    plan = {**{key: value for key, value in defaults.items() if value is not ...}, **values}
    if missing := [key for key in TYPES if key not in plan]:
        raise ValueError(f"settings: expected a value of {', '.join(missing)}, got none")
    for key, kind in TYPES.items():
        if plan[key] is None and defaults.get(key, ...) is None:
            continue
        if not recipes.fits(plan[key], kind):
            raise ValueError(f"{_option(key)}: expected {kind.__name__}, got {plan[key]!r}")
        if kind is float:
            plan[key] = _float(plan[key])
    for key, choices in CHOICES.items():
        one_of(key.replace("_", "-"), plan[key], choices)
    if not isinstance(plan["model"].get("name"), str):
        raise ValueError(f"--set model.name: expected the name of a model, got {plan['model'].get('name')!r}")
    plan["loss"], plan["loss_options"] = _loss({**plan["loss_options"], "name": plan["loss"]}, {})
    plan["optimizer"] = _optimizer(plan["optimizer"])
    _check(plan)
    return plan


def _option(key: str) -> str:
    """How a user says that key."""
    return f"--set {key}" if key in RECIPE or key == "optimizer" else f"--{key.replace('_', '-')}"


def _float(value: float) -> float:
    """As a float; what none can hold is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check(plan: dict[str, Any]) -> None:
    """The ranges of its numbers."""
    for key in ("timesteps", "backend"):
        if key in plan["model"]:
            raise ValueError(f"--set model.{key}: expected --{key}, which is for the whole run, got model.{key}")
    one_of("set model.neuron", plan["model"].get("neuron", "LIF"), NEURONS)
    for key in ("timesteps", "threads", "epochs", "batch_size", "workers", "keep_every", "observe_every"):
        least = 0 if key == "workers" else 1
        if plan[key] is not None and plan[key] < least:
            raise ValueError(f"--{key.replace('_', '-')}: expected an integer of at least {least}, got {plan[key]}")
    if plan["observe"] is not None:
        one_of("observe", plan["observe"], OBSERVE)
    elif plan["observe_every"] is not None:
        raise ValueError(f"--observe-every: expected --observe beside it, got {plan['observe_every']} without")
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


def _loss(said: dict[str, Any], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The loss and what it takes: its defaults, over them the recipe's, over them the command line's."""
    own = said.get("name", "trt")
    loss = one_of("loss", given.get("loss", own), tuple(LOSSES))
    options = _table(f"--recipe: loss {loss}", LOSSES[loss], said if loss == own else {})
    for name in LOSS[1:]:
        if name not in given:
            continue
        if name not in options:
            takers = ", ".join(other for other, others in LOSSES.items() if name in others)
            raise ValueError(f"--{name}: expected with --loss {takers} only, got it with --loss {loss}")
        options[name] = given[name]
    for name, value in options.items():
        if name == "exclude":
            if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
                raise ValueError(f"--set loss.exclude: expected a list of names, got {value!r}")
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
    if others := sorted(set(given) - set(known)):
        raise unknown(where, others[0], known)
    return {**known, **given}


def _number(value: Any) -> bool:
    """A finite number of at least 0."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(_float(value)) and value >= 0
