"""Networks by name, as a recipe names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from trtkern.models._network import SpikingNetwork
from trtkern.models.conv import ConvSNN, vggsnn
from trtkern.models.resnet import resnet19, sew_resnet34, spiking_resnet34
from trtkern.models.topology import from_topology


def _conv(classes: int, *, shape: tuple[int, int, int], layers: list[int | str], **options: Any) -> SpikingNetwork:
    return ConvSNN(shape, layers, classes, **options)


def _topology(classes: int, *, layers: str, **options: Any) -> SpikingNetwork:
    return from_topology(f"{layers}_L-{classes}", **options)


BUILDERS: dict[str, Callable[..., SpikingNetwork]] = {
    "conv": _conv,
    "topology": _topology,
    "vggsnn": vggsnn,
    "resnet19": resnet19,
    "sew_resnet34": sew_resnet34,
    "spiking_resnet34": spiking_resnet34,
}


def build(name: str, shape: tuple[int, int, int], classes: int, **options: Any) -> SpikingNetwork:
    """The network of that name for images (C, H, W).

    Args:
        name: a key of ``BUILDERS``: "conv" is ``ConvSNN`` (with ``layers``), "topology" is ``from_topology`` (with
            ``layers``, a string without its readout), the others the functions of that name.
        shape: (C, H, W) of an image or frame.
        classes: number of classes.
        options: what the network takes: timesteps, checkpoint, packed, and settings of the neurons.

    Raises:
        ValueError: an unknown name; TypeError, ValueError: an option that the network does not take.
    """
    if name not in BUILDERS:
        raise ValueError(f"model: expected one of {', '.join(BUILDERS)}, got {name!r}")
    wanted = inspect.signature(BUILDERS[name]).parameters.values()
    missing = [p.name for p in wanted if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "shape"]
    if lacking := [option for option in missing if option not in options]:
        raise ValueError(f"model: {name}: expected {', '.join(lacking)}, got {', '.join(options) or 'no options'}")
    try:
        return BUILDERS[name](classes, shape=shape, **options)
    except TypeError as error:
        raise TypeError(f"model: {name}: expected options that it takes, got {options}; {error}") from None
