"""Networks by name, as a recipe names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from trtkern.models._blocks import Style, neuron_of
from trtkern.models._network import SpikingNetwork
from trtkern.models.conv import ConvSNN, vggsnn
from trtkern.models.resnet import resnet19, sew_resnet34, spiking_resnet34
from trtkern.models.spike_driven import SpikeDrivenTransformer
from trtkern.models.spikformer import Spikformer
from trtkern.models.topology import from_topology, with_readout
from trtkern.names import unknown
from trtkern.nn import LIF
from trtkern.nn._neuron import Spiking
from trtkern.nn.own import registered
from trtkern.own import OwnError


def _conv(classes: int, *, shape: tuple[int, int, int], layers: list[int | str], **options: Any) -> SpikingNetwork:
    return ConvSNN(shape, layers, classes, **options)


def _topology(classes: int, *, layers: str, **options: Any) -> SpikingNetwork:
    whole = with_readout(layers, classes)
    try:
        return from_topology(whole, **options)
    except ValueError as error:
        if whole == layers:
            raise
        said, _, picture = str(error).partition("\n")
        added = f"; _L-{classes} is the readout, which is added to layers for the {classes} classes of the data"
        raise ValueError(f"{said}{added}\n{picture}".rstrip()) from None


_LISTS = ("conv", "vggsnn")
"""The networks that are made of a list of channels, not of a topology."""
BUILDERS: dict[str, Callable[..., SpikingNetwork]] = {
    "conv": _conv,
    "topology": _topology,
    "vggsnn": vggsnn,
    "resnet19": resnet19,
    "sew_resnet34": sew_resnet34,
    "spiking_resnet34": spiking_resnet34,
    "spikformer": Spikformer,
    "spike_driven_transformer": SpikeDrivenTransformer,
}


def build(name: str, shape: tuple[int, int, int], classes: int, **options: Any) -> SpikingNetwork:
    """The network of that name for images (C, H, W).

    Args:
        name: a key of ``BUILDERS``: "conv" is ``ConvSNN`` (with ``layers``), "topology" is ``from_topology`` (with
            ``layers``, a string, to which the readout L-classes is added where it has none), the others the functions
            of that name.
        shape: (C, H, W) of an image or frame.
        classes: number of classes.
        options: what the network takes: timesteps, checkpoint, packed, and settings of the neurons.

    Raises:
        ValueError: an unknown name; TypeError, ValueError: an option that the network does not take.
    """
    if name not in BUILDERS:
        raise unknown("model", name, BUILDERS)
    wanted = inspect.signature(BUILDERS[name]).parameters
    missing = [option for option in _named(BUILDERS[name]) if wanted[option].default is inspect.Parameter.empty]
    if lacking := [option for option in missing if option not in (*options, "shape")]:
        raise ValueError(f"model: {name}: expected {', '.join(lacking)}, got {', '.join(options) or 'no options'}")
    taken = _options(name, neuron_of(options.get("neuron", LIF)))
    if others := [option for option in options if option not in taken]:
        raise TypeError(str(unknown(f"model: {name}", others[0], taken)))
    return BUILDERS[name](classes, shape=shape, **options)


def _options(name: str, neuron: Callable[..., Spiking]) -> list[str]:
    """What may be said of a network of that name: its own, that of every network, and that of its neurons."""
    found = [*_named(BUILDERS[name]), *_named(ConvSNN if name in _LISTS else from_topology), *_named(Style.of)]
    own = isinstance(neuron, partial)  # of the user's own
    found += [*registered(neuron.args[0]).params, *_named(neuron.func)] if isinstance(neuron, partial) else []
    for kind in () if own else inspect.getmro(neuron):  # type: ignore[arg-type]  # up to the one that does not hand on what it is given
        parameters = inspect.signature(kind).parameters.values()
        found += [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [option for option in dict.fromkeys(found) if option not in ("shape", "time_dim", "channel_dim")]


def _named(maker: Callable[..., Any]) -> list[str]:
    """The parameters that it takes by name only."""
    return [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]


def module(made: Any, name: str) -> nn.Module:
    """Itself, if it is a network whose state can be kept.

    Raises:
        TypeError, OwnError: it is none, or its state holds other things than tensors.
    """
    if not isinstance(made, nn.Module):
        raise TypeError(f"model: expected {name} to give a torch.nn.Module, got {type(made).__name__}")
    for key, value in made.state_dict().items():
        if not isinstance(value, Tensor):
            raise OwnError(
                f"model: expected a state_dict of tensors, which a checkpoint can hold, got {type(value).__name__} for "
                f"{key}"
            )
    return made
