"""What the settings name, made: network and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trtkern import own
from trtkern.models.build import BUILDERS, build, module
from trtkern.names import LOSSES, OBJECT, is_own
from trtkern.nn import convert_sync_norms, exact_convolutions
from trtkern.training import losses
from trtkern.training.losses import Loss
from trtkern.training.settings import Settings


def build_model(
    settings: Settings, shape: tuple[int, ...], classes: int | None, given: Any = None, device: Any = None
) -> nn.Module:
    """The network of the settings, initialised from their seed.

    A function of the user's gets what the settings say of it, and what it has a parameter for of ``timesteps``,
    ``classes``, ``shape``, ``backend`` and ``exact_convolutions``.

    Args:
        settings: of the run.
        shape: of a sample.
        classes: how many; None is not known.
        given: the network that a program gave, with the weights that it has, or its function that makes one.
        device: where it goes; None is theirs.

    Raises:
        OwnError, TypeError, ValueError: a network that cannot be made, or something that is none; the message says why.
    """
    names = ("timesteps", "backend", "exact_convolutions")
    known = {key: getattr(settings, key) for key in names}
    options = dict(settings.model)
    name = options.pop("name")
    where = settings.device if device is None else device
    if isinstance(given, nn.Module):
        return _finished(given, settings).to(where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if is_own(name):
            model = _own(name, options, {**known, "shape": shape, "classes": classes}, given)
        else:
            if name in BUILDERS and (len(shape) != 3 or classes is None):
                raise ValueError(
                    f"model: {name}: expected images [C, H, W] of classes whose number is known, got samples of "
                    f"{list(shape)} and {classes} classes; name a network of your own, or the classes of the data"
                )
            model = build(name, shape, classes or 0, **options, **known)  # type: ignore[arg-type]
    return _finished(model, settings).to(where)


def _finished(model: nn.Module, settings: Settings) -> nn.Module:
    """The model, whose layers are exact, or share their statistics, if the settings say so; else each is as it was."""
    if settings.exact_convolutions:
        exact_convolutions(model)
    return convert_sync_norms(model) if settings.sync_norm else model


def _own(name: str, options: dict[str, Any], known: dict[str, Any], given: Any) -> nn.Module:
    """What the user's function gives."""
    kind = options.pop("class", None) if name == OBJECT else None
    if name == OBJECT and given is None:
        raise own.OwnError(
            f"model: expected the network of {kind} that a program gave, which no settings can make; go on with that "
            f"program, or give it the function that makes the network, which can be named"
        )
    function = own.imported(name, "model") if given is None else given
    spelt = kind or name
    if isinstance(function, nn.Module) or not callable(function):
        raise own.OwnError(
            f"model: expected {spelt} to be a function or a class that makes a network, got {type(function).__name__}; "
            f"every seed begins with weights of its own"
        )
    return module(own.called(function, spelt, "model", **own.offered(function, options, known)), spelt)


def build_loss(settings: Settings, model: nn.Module, given: Any = None) -> Loss:
    """The loss of the settings."""
    return losses.build(settings.loss, settings.loss_options, settings.label_smoothing, model, given)


def build_losses(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """One loss of each kind for classes, by its name in capitals: the kind of the run with its options, the others with
    theirs."""
    options = {**LOSSES, settings.loss: settings.loss_options}
    return {
        name.upper(): losses.build(name, options[name], settings.label_smoothing, model)
        for name in reversed(losses.CLASSES)
    }
