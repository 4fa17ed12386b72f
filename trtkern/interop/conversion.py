"""``convert``: the neurons of other libraries become this project's, anywhere in a model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from trtkern import surrogates
from trtkern.interop.adapters import CannotConvert, adapter_for, objection_to, package_of
from trtkern.interop.fusing import fuse_norms
from trtkern.interop.stepping import FoldedSequential, Stepping, folds
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.convert import ConversionReport, hooks_of, join

OWN_SURROGATES = "reference and triton run it, and cpu where a C++ compiler is there"
"""What runs a surrogate that is none of the built-in ones."""


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
    step a call (``Stepping``) keeps its state, and has ``reset()``::

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
    places = list(_walk(model, "", None, "", set()))
    made: dict[int, nn.Module] = {}
    shared: list[nn.Module] = []
    for path, layer, parent, _ in places:
        if id(layer) in made:
            if _goes_on(layer, made[id(layer)]):
                shared.append(layer)
            report.converted[path] = "the same layer in another place"
        elif (other := _other(path, layer, model if parent is None else parent, report)) is not None:
            made[id(layer)] = other
    _leave_shared(places, shared, made, report)
    for path, layer, _, _ in places:
        if id(layer) in made and _is_container(layer) and not _all_step(layer, path, made, report):
            del made[id(layer)], report.converted[path]
    if strict and report.left:
        listed = "; ".join(f"{path!r}: {reason}" for path, reason in report.left.items())
        raise ValueError(
            f"convert: expected an equal here for every neuron, got {len(report.left)} without one, and changed "
            f"nothing: {listed}; strict=False leaves them as they are"
        )
    for _, layer, parent, name in places:
        if parent is not None and id(layer) in made:
            _place(made.get(id(parent), parent), name, made[id(layer)])
    model = made.get(id(model), model)
    report.stepping += list(_stepping(model, ""))
    if fuse:
        report.norms = ConversionReport()
        model = fuse_norms(model, report.norms)
    return model


def _walk(
    layer: nn.Module, path: str, parent: nn.Module | None, name: str, above: set[int]
) -> Iterator[tuple[str, nn.Module, nn.Module | None, str]]:
    """Every place of a model, outer ones first; what stands inside of a layer that has a row is that row's affair."""
    if id(layer) in above:
        return
    yield path, layer, parent, name
    row = adapter_for(layer)
    if isinstance(layer, (NeuronLayer, Stepping)) or (row is not None and row.neuron):
        return
    for inner, child in layer._modules.items():
        if child is not None:
            yield from _walk(child, join(path, inner), layer, inner, above | {id(layer)})


def _other(path: str, layer: nn.Module, holder: nn.Module, report: ConvertReport) -> nn.Module | None:
    """What takes a layer's place; None where it stays, with the reason in the report if it is a neuron."""
    row, kind = adapter_for(layer), type(layer)
    was = f"{kind.__module__}.{kind.__qualname__}"
    if row is None:
        if reason := objection_to(layer):
            report.left[path] = f"{was}: {reason}"
        return None
    try:
        if lacking := row.lacking(layer):
            raise CannotConvert(f"expected a {row.name} with {', '.join(row.fields)}, got none called {lacking[0]!r}")
        if objection := hooks_of(layer) or _own_method(layer):
            raise CannotConvert(objection)
        made = row.make(layer)
    except (ValueError, ArithmeticError) as error:  # CannotConvert, or a number that no layer here takes
        if row.neuron:  # a container may stay: what is in it is what counts
            report.left[path] = f"{was}: {error}"
        return None
    if not row.neuron:
        made.training = layer.training
        report.converted[path] = f"{was} -> {type(made).__name__}"
        return made
    made.train(layer.training)
    device = next((t.device for held in (layer, holder) for t in _tensors_of(held)), None)
    if device is not None:
        made.to(device)
    shown = " ".join(repr(made).split())
    own = [
        each.spec.surrogate for each in nn.Module.modules(made) if isinstance(each, NeuronLayer) and each.spec.surrogate
    ]
    apart = [name for name in own if not surrogates.lookup(str(name)).builtin]
    note = f" (its surrogate is none of the built-in ones: {OWN_SURROGATES})" if apart else ""
    report.converted[path] = f"{was} -> {shown}{note}"
    return made


def _place(parent: nn.Module, name: str, layer: nn.Module) -> None:
    """Makes a layer a child of that name; Rockpool's modules keep theirs a second time."""
    parent._modules[name] = layer
    children = vars(parent).get("_ModuleBase__modules", {})
    if name in children:
        children[name] = [layer, type(layer).__name__]


def _tensors_of(layer: nn.Module) -> Iterator[Tensor]:
    """Its Parameters and buffers; Rockpool's ``parameters()`` gives other things."""
    return chain(nn.Module.parameters(layer), nn.Module.buffers(layer))


def _own_method(layer: nn.Module) -> str | None:
    """What would be lost with a function that was put in the place of a method, in this object alone, or None."""
    for name, value in vars(layer).items():
        # What Rockpool's own to_torch() puts there goes along.
        rockpool = package_of(layer) == "rockpool" and getattr(value, "__module__", "").startswith("rockpool.")
        if callable(value) and callable(getattr(type(layer), name, None)) and not rockpool:
            return f"{type(layer).__name__} has a {name} of its own in this object, which would be lost"
    return None


RESETS = ("reset", "reset_states", "reset_state")
"""What SpikingJelly, sinabs and Rockpool call the method of a layer that keeps its state from call to call."""


def _goes_on(layer: Any, made: nn.Module) -> bool:
    """Whether a layer over sequences keeps its state from call to call, and what takes its place does not."""
    keeps = any(callable(getattr(layer, name, None)) for name in RESETS)
    return keeps and not folds(made) and not _is_container(layer)


def _leave_shared(
    places: list[Any], shared: list[nn.Module], made: dict[int, nn.Module], report: ConvertReport
) -> None:
    """Leave layers over sequences whose state would go on from one place to the next."""
    for path, layer, _, _ in places:
        if any(layer is each for each in shared):
            made.pop(id(layer), None)
            del report.converted[path]
            report.left[path] = (
                f"{type(layer).__name__}: expected a layer over sequences in one place, got the same in several: its "
                "state goes on from one to the next, where a layer here begins anew; make it several layers"
            )


def _is_container(layer: nn.Module) -> bool:
    row = adapter_for(layer)
    return row is not None and not row.neuron


def _all_step(container: nn.Module, path: str, made: dict[int, nn.Module], report: ConvertReport) -> bool:
    """Whether all steps can be run at once in a container: nothing in it stays, its neurons take one step."""
    if any(left.startswith(join(path, "")) for left in report.left):
        return False
    inner = [made[id(layer)] for layer in container.modules() if id(layer) in made and layer is not container]
    enough = bool(inner) or getattr(made[id(container)], "without_neurons", False)
    return enough and all(folds(layer) for layer in inner)


def _stepping(layer: nn.Module, path: str) -> Iterator[str]:
    """The neurons that take one step a call, but for those in containers that run all steps at once."""
    if isinstance(layer, Stepping):
        yield path
    elif not isinstance(layer, FoldedSequential):
        for name, child in layer._modules.items():
            if child is not None:
                yield from _stepping(child, join(path, name))
