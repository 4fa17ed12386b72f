"""Other libraries' neurons, one file each: ``layers(where)`` with the settings that the float64 gate can check.

Each file has ``DISTRIBUTION`` (what pip calls it), ``MODULE`` (what Python imports), ``INSTALL`` (what to
type to have it beside the torch that is there: some libraries ask for another one) and ``layers``, which are LIF.
``OTHERS`` has a function like it for each other neuron that the library computes as ``trtkern.neurons`` does.
``network(name, timesteps, shape)`` is the library's own network of that name of ``cases.NETWORKS``, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from trtkern.names import unknown

if TYPE_CHECKING:
    from torch import nn

    from trtkern.bench.layers import Layer, Where

NAMES = ("spikingjelly", "snntorch", "norse", "sinabs", "exodus", "rockpool")


class Whole(NamedTuple):
    """A library's own network, as it is there."""

    name: str
    make: Callable[[], nn.Module]
    """Images [B, C, H, W] -> logits [T, B, classes], or of fewer steps where it gives their mean."""
    note: str
    """In what it differs from this project's."""


class Peer(NamedTuple):
    """A library, and whether it can be measured."""

    name: str
    version: str
    missing: str
    """Why it is skipped; empty when it is installed."""

    def layers(self, where: Where) -> list[Layer]:
        """Its layers for that place: of a neuron that it does not have, none."""
        module = import_module(f"{__name__}.{self.name}")
        if where.neuron == "LIF":
            return module.layers(where)
        make = getattr(module, "OTHERS", {}).get(where.neuron)
        return [] if make is None else make(where)

    def recurrent(self, where: Where, weight: nn.Parameter) -> list[Layer]:
        """Its layers whose neurons feed each other by these weights, if it has any."""
        make = getattr(import_module(f"{__name__}.{self.name}"), "recurrent", None)
        return [] if make is None else make(where, weight)

    def network(self, name: str, timesteps: int, shape: tuple[int, ...]) -> Whole | None:
        """Its own network of that name for images of that shape, where it has one."""
        make = getattr(import_module(f"{__name__}.{self.name}"), "network", None)
        return None if make is None else make(name, timesteps, shape)


def choose(names: str) -> list[Peer]:
    """The peers of "all", "none" or "snntorch,norse", those that are not installed among them.

    Raises:
        ValueError: an unknown name.
    """
    return [_peer(name) for name in named(names)]


def named(names: str) -> tuple[str, ...]:
    """The names that those words stand for, as ``choose``; without a look at what is installed."""
    wanted = {"all": NAMES, "none": ()}.get(names) if names in ("all", "none") else tuple(names.split(","))
    assert wanted is not None
    for name in wanted:
        if name not in NAMES:
            raise unknown("--peers", name, ("all", "none", *NAMES))
    return wanted


def _peer(name: str) -> Peer:
    module = import_module(f"{__name__}.{name}")
    try:
        found = find_spec(module.MODULE) is not None
    except ModuleNotFoundError:  # the package around it
        found = False
    if not found:
        return Peer(name, "", f"not installed; {module.INSTALL}")
    try:
        return Peer(name, metadata.version(module.DISTRIBUTION), "")
    except metadata.PackageNotFoundError:
        return Peer(name, "of unknown version", "")
