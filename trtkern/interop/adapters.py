"""The table of foreign classes: by the name of a class, how its objects become layers of this project.

A library's rows stand in a file of their own and are loaded when a model has a class of that library; a user adds rows
with ``register``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

LIBRARIES = ("spikingjelly", "snntorch", "norse", "sinabs", "rockpool")
"""The packages whose classes have rows, each in the file of its name beside this one."""
PAPERS = "papers"
"""The file with the classes of papers' code, which are known by their names and fields alone."""
LIKE_NEURONS = ("v_threshold", "threshold", "thresh", "vth", "v_th", "spike_threshold")
"""Attributes that neurons of other code have: a class that has one and no row is named in the report."""


class CannotConvert(ValueError):
    """Why an object has no equal here; the message says what was expected of it and what it has."""


@dataclass(frozen=True)
class Adapter:
    """A row: how objects of one class become a layer of this project with the same call and the same outputs.

    Args:
        name: of the class, as in "LIFNode". A subclass is another class, since it may compute something else.
        make: (object) -> the layer in its place; raises ``CannotConvert`` where nothing computes the same.
        package: the package whose class that is, as in "spikingjelly"; "" takes a class of this name from anywhere, as
            papers' code has it.
        fields: attributes that the object must have to be taken for one of that class.
        neuron: whether it is a neuron. A container is none: ``make`` gives one whose ``_modules`` has the same names,
            and ``convert`` fills it with what has become of the layers inside; it stays as it was where one of them
            is no layer of this project that takes one step a call.
    """

    name: str
    make: Callable[[Any], nn.Module]
    package: str = ""
    fields: tuple[str, ...] = ()
    neuron: bool = True

    def fits(self, module: nn.Module) -> bool:
        """Whether the object is of that class, by the names of its class and package."""
        kind = type(module)
        package = package_of(module)
        # A name without a package is that of anybody's class, but not of this project's own LIF.
        return kind.__name__ == self.name and self.package in ("" if package != "trtkern" else package, package)

    def lacking(self, module: nn.Module) -> list[str]:
        """The fields that an object has not."""
        return [name for name in self.fields if not hasattr(module, name)]


_REGISTERED: list[Adapter] = []


def register(name: str, make: Callable[[Any], nn.Module], fields: tuple[str, ...] = (), package: str = "") -> Adapter:
    """Teach ``convert`` a class: five lines for the neuron of a paper's code::

        def mine(node):
            return trtkern.nn.LIF(1 - 1 / node.tau, 1 / node.tau, surrogate="sigmoid")

        trtkern.interop.register("MyLIFNode", mine, fields=("tau",))

    A later row of the same class goes before an earlier one, and before those that come with this package.

    Args:
        name: of the class.
        make: (object) -> layer; raise ``CannotConvert`` with the reason where an object has no equal.
        fields: attributes that an object must have; one that lacks them is left alone, and named.
        package: the first part of the module that defines it; "" is any.

    Raises:
        TypeError: make cannot be called, or the name is no identifier.
    """
    if not callable(make):
        raise TypeError(f"register: expected make to be a function of the object, got {make!r}")
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"register: expected the name of a class, as in 'LIFNode', got {name!r}")
    row = Adapter(name, make, package, tuple(fields))
    _REGISTERED.insert(0, row)
    return row


def adapters(package: str | None = None) -> tuple[Adapter, ...]:
    """The rows there are: the user's, then those of the libraries, then those of papers' code.

    Args:
        package: those alone that take a class of this package; None is all.
    """
    libraries = [each for each in LIBRARIES if package in (None, each)]
    rows = [*_REGISTERED]
    for each in (*libraries, PAPERS):
        rows += library(each).ADAPTERS
    return tuple(rows)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The row of an object's class, of several the first whose fields it has; None if there is none."""
    rows = [row for row in adapters(package_of(module)) if row.fits(module)]
    return next((row for row in rows if not row.lacking(module)), rows[0] if rows else None)


def objection_to(layer: nn.Module) -> str | None:
    """Why a layer without a row stays, if it is a neuron or looks like one, or keeps a state from step to step."""
    if package_of(layer) in ("trtkern", "torch"):
        return None
    for name in LIBRARIES:
        derived = any(kind.__module__.partition(".")[0] == name for kind in type(layer).__mro__)
        if derived and library(name).is_neuron(layer):
            known = {row.name for row in library(name).ADAPTERS}
            parent = next((base for base in base_names(layer) if base in known), None)
            if parent is not None:
                return (
                    f"expected {parent} itself, got a class derived from it, which may compute something else; "
                    f"trtkern.interop.register({type(layer).__name__!r}, ...) says what it is"
                )
            return "expected a layer with a state that has an equal here, got one that has none"
    if _like_neuron(layer) and not any(_is_neuron(inner) for inner in layer.modules() if inner is not layer):
        return (
            "it has a threshold as a neuron has, but is of no class that is known; "
            f"trtkern.interop.register({type(layer).__name__!r}, ...) says what it is"
        )
    return None


def _like_neuron(layer: nn.Module) -> bool:
    held = (vars(layer), layer._parameters, layer._buffers)
    return any(name in each for name in LIKE_NEURONS for each in held)


def _is_neuron(layer: nn.Module) -> bool:
    """Whether a layer inside of another is a neuron: the other then only hands its threshold on."""
    package = package_of(layer)
    return package == "trtkern" or (package != "torch" and (adapter_for(layer) is not None or _like_neuron(layer)))


def library(name: str) -> Any:
    """The file of that library: its ``ADAPTERS``, and ``is_neuron(module)``, which knows neurons that have no row."""
    return import_module(f"trtkern.interop.{name}")


def package_of(module: nn.Module) -> str:
    """The first part of the name of the module that defines an object's class."""
    return type(module).__module__.partition(".")[0]


def base_names(module: nn.Module) -> Iterator[str]:
    """The names of an object's class and of all classes that it is derived from."""
    return (kind.__name__ for kind in type(module).__mro__)


def unlike(module: Any, what: str, **expected: Any) -> None:
    """``CannotConvert`` for the first attribute of an object that is not as expected; for settings that must be off.

    Args:
        what: the class, for the message.
        expected: attribute = value. A missing attribute is as expected.
    """
    for name, value in expected.items():
        found = getattr(module, name, value)
        if found is not value and found != value:
            raise CannotConvert(f"expected {what} with {name}={value!r}, got {name}={found!r}")
