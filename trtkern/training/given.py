"""What a program hands to the ``Trainer``: settings where there are names for it, objects where there are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from trtkern import own
from trtkern.data import DATASETS, Dataset
from trtkern.data import own as own_data
from trtkern.data.augment import OwnChange, Pipeline
from trtkern.models.build import module
from trtkern.names import OBJECT, is_object, short, unknown
from trtkern.training import plan as plans
from trtkern.training.gathering import gather, makes_data
from trtkern.training.optimizers import Maker
from trtkern.training.options import OPTIONS
from trtkern.training.schedules import Factor
from trtkern.training.settings import Settings, settle

_SAID = ("recipe", "model", "data", "loss", "loss_options", "optimizer", "schedule", "augment", "mix", "data_options")
"""Options that ``asked`` makes of other things."""


class Given(NamedTuple):
    """What there is as an object; None is what the settings name."""

    model: nn.Module | Callable[..., nn.Module] | None = None
    loss: Callable[..., torch.Tensor] | None = None
    optimizer: Maker | torch.optim.Optimizer | None = None
    schedule: Factor | None = None
    augment: Pipeline | None = None
    callbacks: Sequence[object] = ()


def asked(
    model: Any, data: Any, *, loss: Any, optimizer: Any, schedule: Any, augment: Any, mix: Any,
    callbacks: Sequence[object], classes: int | Sequence[str] | None, time_first: bool | None,
    collate: Callable[[list], Any] | None, name: str | None, model_options: dict[str, Any],
    data_options: dict[str, Any], **more: Any,
) -> tuple[Settings, Dataset, Given]:  # fmt: skip
    """What ``Trainer`` was given, as settings, data and objects.

    Raises:
        TypeError, ValueError, RuntimeError: as ``Trainer``.
    """
    if others := [key for key in more if key not in OPTIONS or key in _SAID]:
        known = ["model", "data", "loss", "optimizer", "schedule", "augment", "mix", "callbacks", "model_options"]
        known += ["data_options", "classes", "time_first", "collate", "name", *OPTIONS]
        raise TypeError(str(unknown("Trainer", others[0], [key for key in dict.fromkeys(known) if key != "recipe"])))
    if isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks: expected a list of objects, got {type(callbacks).__name__}")
    network, told = _model(model, model_options)
    loss_name, loss_options, own_loss = _named(loss, "loss")
    optimizer_name, optimizer_options, own_optimizer = _named(optimizer, "optimizer")
    schedule_name, schedule_options, own_schedule = _named(schedule, "schedule")
    changes, pipeline = _augment(augment)
    plan: dict[str, Any] = {key: option.default for key, option in OPTIONS.items() if option.default is not ...}
    plan |= {key: value for key, value in more.items() if value is not None or OPTIONS[key].default is None}
    plan |= {
        "recipe": plans.OWN_RECIPE, "data": _place(data, name, classes is not None or collate is not None),
        "data_options": data_options, "time_first": time_first, "model": told,
        "loss": loss_name, "loss_options": loss_options,
        "optimizer": {"name": optimizer_name, **optimizer_options},
        "schedule": {"name": schedule_name, **schedule_options}, "augment": changes,
        "mix": {"name": mix} if isinstance(mix, str) else dict(mix or {}),
    }  # fmt: skip
    plan |= {key: plans.absolute(key, value) for key, value in plan.items()}
    settings = settle(plans.checked(plan))
    dataset = _data(data, settings, classes, collate)
    if isinstance(dataset.train.images, own_data.Loaded) and settings.select == "validation":
        if more.get("select") is not None:
            raise ValueError(
                'select: expected "last" or "test" with a DataLoader, of which no samples can be held out, got '
                '"validation"'
            )
        settings = replace(settings, select="last")
    if isinstance(own_optimizer, torch.optim.Optimizer):
        settings = replace(settings, lr=float(own_optimizer.param_groups[0]["lr"]))
    return settings, dataset, Given(network, own_loss, own_optimizer, own_schedule, pipeline, callbacks)


def _model(model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The object, if it is one, and what the settings say."""
    if isinstance(model, str):
        return None, {**options, "name": model}
    if isinstance(model, Mapping):
        return None, {**model, **options}
    if isinstance(model, nn.Module):
        if options:
            raise TypeError(
                f"model_options: expected a function that makes the network with them, got {own.class_of(model)}"
            )
        return module(model, "model"), {"name": OBJECT, "class": own.class_of(model)}
    if not callable(model):
        raise TypeError(
            f"model: expected a torch.nn.Module, a function that makes one, or a name, got {type(model).__name__}"
        )
    name = own.name_of(model)
    about = {"class": getattr(model, "__qualname__", type(model).__qualname__)} if name == OBJECT else {}
    return model, {**options, **about, "name": name}


def _named(thing: Any, what: str) -> tuple[str, dict[str, Any], Any]:
    """A name, what it takes, and the object if there is one."""
    if isinstance(thing, str):
        return thing, {}, None
    if isinstance(thing, Mapping):
        if not isinstance(thing.get("name"), str):
            raise TypeError(f"{what}: expected a table with a name, got {dict(thing)!r}")
        return thing["name"], {key: value for key, value in thing.items() if key != "name"}, None
    if not callable(thing) and not isinstance(thing, torch.optim.Optimizer):
        raise TypeError(f"{what}: expected a name, a table with a name, or a function, got {type(thing).__name__}")
    return own.name_of(thing), {}, thing


def _augment(augment: Any) -> tuple[list[dict[str, Any]], Pipeline | None]:
    """The changes by name, and as an object where there are functions among them."""
    if isinstance(augment, Pipeline):
        return augment.to_recipe(), augment
    listed = augment or () if augment is None or isinstance(augment, (list, tuple)) else (augment,)
    for each in listed:
        if not callable(each) and not isinstance(each, (str, Mapping)):
            raise TypeError(
                f"augment: expected a list of changes, or a function of (batch, generator), got {type(each).__name__}"
            )
    pipeline = Pipeline(tuple(map(_change, listed)))
    return pipeline.to_recipe(), pipeline


def _change(step: Any) -> Any:
    if not callable(step):
        return Pipeline.from_recipe([{"name": step} if isinstance(step, str) else step]).transforms[0]
    name = own.name_of(step)
    spelt = getattr(step, "__qualname__", type(step).__qualname__)
    return OwnChange(f"{OBJECT}:{spelt}" if name == OBJECT else name, {}, step)


def _place(data: Any, name: str | None, said: bool) -> str:
    """The name of the data in the settings: one that leads to them only where the settings say all of them."""
    if isinstance(data, str):
        return data
    if isinstance(data, Dataset):
        return data.name if data.name in DATASETS and name is None else f"{OBJECT}:{name or data.name}"
    found = own.name_of(data) if makes_data(data) and not said else OBJECT
    if found != OBJECT:
        return found
    kind = data if makes_data(data) else type(data)
    spelt = "tensors" if isinstance(data, (tuple, list)) else getattr(kind, "__qualname__", "data")
    return f"{OBJECT}:{name or spelt}"


def _data(
    data: Any, settings: Settings, classes: int | Sequence[str] | None, collate: Callable[[list], Any] | None
) -> Dataset:
    """The data set."""
    told: dict[str, Any] = {"classes": classes, "collate": collate, "time_first": settings.time_first}
    if isinstance(data, (str, Dataset)):
        if classes is not None or collate is not None:
            raise TypeError(
                f"classes, collate: expected them with tensors, Datasets, or a function that gives them, got them with "
                f"{data if isinstance(data, str) else data.name}"
            )
        return gather(settings) if isinstance(data, str) else data
    if not makes_data(data):
        if settings.data_options:
            raise TypeError(
                f"data_options: expected a function that makes the data with them, got {type(data).__name__}"
            )
        return own_data.made(data, short(settings.data), **told)
    if not is_object(settings.data):
        return gather(settings, function=data)
    known = {"timesteps": settings.timesteps, "data_dir": settings.data_dir}
    spelt = getattr(data, "__qualname__", "data")
    made = own.called(data, spelt, "data", **own.offered(data, settings.data_options, known))
    return own_data.made(made, short(settings.data), **told)
