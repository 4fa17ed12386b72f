"""``convert``: the neurons of other libraries become this project's, anywhere in a model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trtkern.interop.adapters import LIBRARIES, CannotConvert, adapter_for, base_names, library, package_of
from trtkern.interop.stepping import Stepping
from trtkern.nn._neuron import Neuron
from trtkern.nn.convert import ConversionReport, convert_norm_lif, hooks_of, join

LIKE_NEURONS = ("v_threshold", "threshold", "thresh", "vth", "v_th", "spike_threshold")
"""Attributes that neurons of other code have: a class that has one and no row is named in the report."""


@dataclass
class ConvertReport:
    """What ``convert`` changed, and what it left as it was, by its path in the model ("" is the model itself)."""

    converted: dict[str, str] = field(default_factory=dict)
    """Each with the class that it was, and what it is now with all its constants."""
    left: dict[str, str] = field(default_factory=dict)
    """Neurons that stay as they were: their class, and what was expected of it that it has not."""
    stepping: list[str] = field(default_factory=list)
    """Neurons that take one step a call, and keep their state between calls: ``over_time`` runs all steps at once."""
    norms: ConversionReport | None = None
    """What ``fuse=True`` made of BatchNorms before neurons."""

    def summary(self) -> dict[str, Any]:
        """The same by name, ready for JSON."""
        norms = None if self.norms is None else self.norms.summary()
        return {**{name: type(held)(held) for name, held in vars(self).items() if name != "norms"}, "norms": norms}

    def __str__(self) -> str:
        changed = "".join(f"\n  {path!r}: {what}" for path, what in self.converted.items())
        left = "".join(f"\n  {path!r}: {reason}" for path, reason in self.left.items())
        lines = [f"converted {len(self.converted)}:{changed or ' none'}", f"left {len(self.left)}:{left or ' none'}"]
        if self.stepping:
            lines.append(
                f"one step a call: {', '.join(map(repr, self.stepping))}; "
                "trtkern.interop.over_time(model) runs all steps of a sequence at once"
            )
        if self.norms is not None:
            lines.append(f"BatchNorms: {self.norms}")
        return "\n".join(lines)


def convert(
    model: nn.Module, report: ConvertReport | None = None, *, strict: bool = False, fuse: bool = False
) -> nn.Module:
    """Put this project's fused neurons in the place of those of another library, anywhere in a model, in place.

    A layer that takes the place of a neuron is called as that neuron was, with the same shapes, and computes the same:
    learned parameters keep their values and the range that their library holds them in. It returns what the neuron
    returned. Each call begins with fresh neurons, so that nothing has to be reset between batches; only what takes one
    step a call (``Stepping``) keeps its state, and has ``reset()``.

        report = trtkern.interop.ConvertReport()
        model = trtkern.interop.convert(model, report)
        print(report)  # what became what; what stays, and why

    Everything is looked at before anything is changed: where ``strict=True`` raises, the model is as it was.

    Args:
        model: changed, and returned (another module only where the model itself is a neuron).
        report: filled.
        strict: raise where a neuron stays as it was.
        fuse: also make one ``BatchNormLIF`` of each BatchNorm that is directly followed by neurons
            (``trtkern.nn.convert_norm_lif``, which says when it can).

    Raises:
        ValueError: with ``strict``, a neuron has no equal here; the message names each with its path, class and reason.
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected an nn.Module, got {type(model).__name__}")
    report = ConvertReport() if report is None else report
    made: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for path, layer, parent, name in _walk(model, "", None, "", set()):
        if id(layer) not in made:
            other = _other(path, layer, report)
            if other is None:
                continue
            made[id(layer)] = other
        else:
            report.converted[path] = "the same layer in another place"
        if parent is not None:
            places.append((parent, name, made[id(layer)]))
    if strict and report.left:
        listed = "; ".join(f"{path!r}: {reason}" for path, reason in report.left.items())
        raise ValueError(
            f"convert: expected an equal here for every neuron, got {len(report.left)} without one, and changed "
            f"nothing: {listed}; strict=False leaves them as they are"
        )
    for parent, name, layer in places:
        parent._modules[name] = layer
    model = made.get(id(model), model)
    report.stepping += [path for path, layer in model.named_modules() if isinstance(layer, Stepping)]
    if fuse:
        report.norms = ConversionReport()
        model = convert_norm_lif(model, report.norms)
    return model


def _walk(
    layer: nn.Module, path: str, parent: nn.Module | None, name: str, above: set[int]
) -> Iterator[tuple[str, nn.Module, nn.Module | None, str]]:
    """Every place of a model, outer ones first; what stands inside of a layer that has a row is that row's affair."""
    if id(layer) in above:
        return
    yield path, layer, parent, name
    if isinstance(layer, (Neuron, Stepping)) or adapter_for(layer) is not None:
        return
    for inner, child in layer._modules.items():
        if child is not None:
            yield from _walk(child, join(path, inner), layer, inner, above | {id(layer)})


def _other(path: str, layer: nn.Module, report: ConvertReport) -> nn.Module | None:
    """What takes a layer's place; None where it stays, with the reason in the report if it is a neuron."""
    row, kind = adapter_for(layer), type(layer)
    was = f"{kind.__module__}.{kind.__qualname__}"
    if row is None:
        if reason := _foreign(layer):
            report.left[path] = f"{was}: {reason}"
        return None
    try:
        if lacking := [name for name in row.fields if not hasattr(layer, name)]:
            raise CannotConvert(f"expected a {row.name} with {', '.join(row.fields)}, got none called {lacking[0]!r}")
        if objection := hooks_of(layer):
            raise CannotConvert(objection)
        made = row.make(layer)
    except CannotConvert as error:
        report.left[path] = f"{was}: {error}"
        return None
    made.train(layer.training)
    shown = " ".join(repr(made).split())
    report.converted[path] = f"{was} -> {shown}"
    return made


def _foreign(layer: nn.Module) -> str | None:
    """Why a layer without a row stays, if it is a neuron or looks like one."""
    if package_of(layer) == "trtkern":
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
            return "expected a neuron that has an equal here, got one that has none"
    if any(name in vars(layer) or name in layer._parameters or name in layer._buffers for name in LIKE_NEURONS):
        return (
            "it has a threshold as a neuron has, but is of no class that is known; "
            f"trtkern.interop.register({type(layer).__name__!r}, ...) says what it is"
        )
    return None
