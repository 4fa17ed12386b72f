"""What a run is to do: a recipe with the user's options over it, checked as far as that goes without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtkern.names import (
    FOLDER,
    LOSSES,
    MIXES,
    NEURONS,
    OPTIMIZERS,
    OVER,
    OWN,
    OWN_NEURON,
    TAR,
    is_own,
    one_of,
    unknown,
)  # fmt: skip
from trtkern.training import recipes, schedules
from trtkern.training.options import COMMAND, LOSS, OPTIONS, RECIPE, Option

OWN_RECIPE = "own"
"""The recipe of what has none: data of the user's own, with the defaults of the options."""
SAID = (*(name for name, option in OPTIONS.items() if COMMAND in option.where and name != "recipe"), *LOSS)
"""What may be said over a recipe."""


def make(*, recipe: str | None = None, changes: Iterable[str] = (), **given: Any) -> dict[str, Any]:
    """A recipe with its ``changes`` (``recipes.load``) and options over it, as plain JSON types.

    Its keys are the fields of ``options.Options``; what only the machine can answer is still open: ``device`` may be
    "auto" and ``threads`` None.

    Args:
        recipe: its name; None is the one that is called as ``data`` is, the digits without.
        given: options of ``SAID``; None is what the recipe says.

    Raises:
        ValueError: an option out of range or unknown; the message says what was expected.
        TypeError: no such option.
    """
    if others := sorted(set(given) - set(SAID)):
        raise TypeError(str(unknown("plan", others[0], SAID)))
    given = {key: value for key, value in given.items() if value is not None}
    if "data" in given:
        fitting(OPTIONS["data"], given["data"])
    name = given.get("data", "digits") if recipe is None else recipe
    own = {"data": name} if recipe is None and is_own(name) else None
    if own is not None:
        name = OWN_RECIPE
    elif recipe is None and name not in recipes.names():
        raise ValueError(f"--data: expected --recipe beside {name}, which has no recipe of its own, got none")
    said = recipes.load(name, changes, own)
    loss, loss_options = _loss(said.get("loss", {}), given)
    plan = {}
    for key, option in OPTIONS.items():
        plan[key] = said.get(key, option.default) if RECIPE in option.where else option.default
        plan[key] = given.get(key, plan[key])
    plan |= {"recipe": name, "loss": loss, "loss_options": loss_options}
    return checked(plan | {key: absolute(key, plan[key]) for key in plan})


def absolute(key: str, value: Any) -> Any:
    """The value of that option as a run keeps it: a path from the root."""
    for form in (FOLDER, TAR):
        if key == "data" and value.startswith(form):
            return f"{form}{Path(value.removeprefix(form)).resolve()}"
    return str(Path(value).resolve()) if OPTIONS[key].path and value is not None else value


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a plan, checked as those of the command line are, whatever file they come from.

    What is missing and has a default gets it, or what held before there was such an option.

    Raises:
        ValueError: one is missing, unknown, of another type or out of range; the message says what was expected.
    """
    if others := sorted(set(values) - set(OPTIONS)):
        raise unknown("settings", others[0], OPTIONS)
    unsaid = {key: option.default if option.before is ... else option.before for key, option in OPTIONS.items()}
    plan = {**{key: value for key, value in unsaid.items() if value is not ...}, **values}
    if missing := [key for key in OPTIONS if key not in plan]:
        raise ValueError(f"settings: expected a value of {', '.join(missing)}, got none")
    for key, option in OPTIONS.items():
        if plan[key] is not None or option.default is not None:
            plan[key] = fitting(option, plan[key])
    plan["model"] = _model(plan["model"])
    plan["mix"] = _mix(plan["mix"])
    plan["schedule"] = schedules.checked(plan["schedule"], plan["warmup"])
    plan["loss"], plan["loss_options"] = _loss({**plan["loss_options"], "name": plan["loss"]}, {})
    plan["optimizer"] = _optimizer(plan["optimizer"])
    if plan["data_options"] and not is_own(plan["data"]):
        raise ValueError(
            f"--set data_options: expected it with data of your own ({OWN}) only, got it with {plan['data']}"
        )
    if plan["cuda_graphs"] and plan["accumulate"] > 1:
        raise ValueError(f"--cuda-graphs: expected accumulate = 1, one batch a step, got {plan['accumulate']}")
    if plan["memory"] is not None and plan["compile"]:
        raise ValueError(
            "--memory: expected it without --compile, whose code keeps what it likes, got both; leave one out"
        )
    if plan["loss"] == "mse":
        for key in ("label_smoothing", "mix"):
            if plan[key]:
                raise ValueError(f"--set {key}: expected it with a loss of classes, got it with --loss mse")
    if plan["observe_every"] is not None and plan["observe"] is None:
        raise ValueError(f"--observe-every: expected --observe beside it, got {plan['observe_every']} without")
    return plan


def fitting(option: Option, value: Any) -> Any:
    """The value, if it is one of that option's.

    Raises:
        ValueError: it is of another type, none of the choices or out of range.
    """
    if not recipes.fits(value, option.kind):
        raise ValueError(f"{option.spoken}: expected {option.kind.__name__}, got {value!r}")
    if option.kind is float:
        value = _float(value)
    if option.choices is not None and not (option.own and is_own(value)):
        one_of(option.name.replace("_", "-"), value, option.choices, option.own)
    if option.range is not None and not option.range.holds(value):
        instead = f"; {option.range.instead}" if option.range.instead else ""
        raise ValueError(f"{option.spoken}: expected {option.range.words}, got {value}{instead}")
    return value


def _float(value: float) -> float:
    """As a float; what none can hold is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _model(said: dict[str, Any]) -> dict[str, Any]:
    """The model and what it takes, the neuron and its parameters among it; its builder checks the values."""
    if not isinstance(said.get("name"), str):
        raise ValueError(f"--set model.name: expected the name of a model, got {said.get('name')!r}")
    for key in ("timesteps", "backend", "exact_convolutions"):
        if key in said:
            flag = OPTIONS[key].flags[0]
            raise ValueError(f"--set model.{key}: expected {flag}, which is for the whole run, got model.{key}")
    if not is_own(said["name"]):
        neuron = said.get("neuron", "LIF")
        if not is_own(neuron):
            one_of("set model.neuron", neuron, NEURONS, f", or {OWN_NEURON}")
    return said


def _mix(said: dict[str, Any]) -> dict[str, Any]:
    """What mixes a batch, and what it takes; nothing stays nothing."""
    if not said:
        return said
    name = one_of("set mix.name", str(said.get("name")), MIXES)
    options = _table(f"--set mix: {name}", MIXES[name], said)
    for option, value in options.items():
        if not _number(value) or value == 0 or (option == "p" and value > 1):
            wanted = "a number above 0, of at most 1" if option == "p" else "a finite number above 0"
            raise ValueError(f"--set mix.{option}: expected {wanted}, got {value!r}")
    return {"name": name, **options}


def _loss(said: dict[str, Any], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The loss and what it takes: its defaults, over them the recipe's, over them the command line's."""
    own = said.get("name", "trt")
    loss = given.get("loss", own)
    if is_own(loss):
        for name in LOSS:
            if name in given:
                raise ValueError(f"--{name}: expected with a loss of trtkern only, got it with --loss {loss}")
        return loss, {name: value for name, value in said.items() if name != "name"} if loss == own else {}
    one_of("loss", loss, tuple(LOSSES), f", or {OWN}")
    options = _table(f"--recipe: loss {loss}", LOSSES[loss], said if loss == own else {})
    for name in LOSS:
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
        if name == "over":
            one_of("set loss.over", value, OVER)
            continue
        share = (loss, name) in (("trt", "eta"), ("tet", "lam"))
        if not _number(value) or (share and value > 1):
            wanted = "a number of 0 to 1" if share else "a finite number of at least 0"
            raise ValueError(f"--{name}: expected {wanted}, got {value}")
    return loss, options


def _optimizer(said: dict[str, Any]) -> dict[str, Any]:
    """The optimiser and what it takes, its name with it; of what is torch's, ``training.optimizers`` knows more."""
    name = said.get("name", "adam")
    if name not in OPTIMIZERS:
        if not isinstance(name, str):
            raise unknown("--set optimizer.name", name, OPTIMIZERS, ", or an optimiser of torch")
        return said
    options = {**OPTIMIZERS[name], **{key: value for key, value in said.items() if key != "name"}}
    for option, value in options.items():
        if option not in OPTIMIZERS[name]:
            continue
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
