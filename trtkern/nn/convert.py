"""Pairs of BatchNorm and LIF into ``BatchNormLIF`` and back, in a model that is there already, and its state dicts.

What changes a model comes first; below it, which BatchNorms and neurons are pairs, and what keeps two layers apart.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from trtkern.nn._neuron import Spiking
from trtkern.nn.batch_norm_lif import NORM_TENSORS, BatchNormLIF
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.norms import SyncBatchNorm
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.unfused import Absorbed, UnfusedBatchNormLIF, bare

NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None, SyncBatchNorm: None}
"""The BatchNorms that are fused, with their axes of space where there is but one number of them."""


@dataclass
class ConversionReport:
    """What ``convert_norm_lif`` fused, and what it left as it was, by its name in the model."""

    fused: list[str] = field(default_factory=list)
    """Where a ``BatchNormLIF`` stands now."""
    left: dict[str, str] = field(default_factory=dict)
    """BatchNorms and neurons that stay layers of their own, each with the reason."""

    def summary(self) -> dict[str, Any]:
        """The same by name, ready for JSON."""
        return {"fused": list(self.fused), "left": dict(self.left)}

    def __str__(self) -> str:
        left = "".join(f"\n  {name!r}: {reason}" for name, reason in self.left.items())
        return f"fused {len(self.fused)}: {', '.join(self.fused) or 'none'}\nleft {len(self.left)}:{left or ' none'}"


def convert_norm_lif(model: nn.Module, report: ConversionReport | None = None) -> nn.Module:
    """Fuse every BatchNorm that is directly followed by spiking neurons into one ``BatchNormLIF``, in place.

    The two are neighbours in an ``nn.Sequential`` or ``TimeSequential`` anywhere in the model, the BatchNorm bare or in
    ``OverTime``. Average pooling behind them (``nn.AvgPool2d(2)``) becomes ``pool=2``. The new layer stands in the
    BatchNorm's place and has the same Parameter objects in the same order, so that an optimiser goes on as it was, the
    same buffers, settings and mode; an ``Absorbed`` keeps the place of each layer that went into it. Only learned
    parameters of a neuron ("2.w" is now "1.lif.w") and of what was in ``OverTime`` ("1.module.weight" is now
    "1.weight") change their names: ``convert_state_dict`` takes checkpoints across.

    A pair that cannot be fused with the same result is left alone, with a warning that says why: it has hooks, is used
    in several places, has its time axis elsewhere, ... What is no pair is left without one: a ``report`` names it::

        report = trtkern.nn.ConversionReport()
        trtkern.nn.convert_norm_lif(model, report)
        print(report)  # what was fused; each BatchNorm and neuron that was not, and why

    Args:
        model: changed, and returned (a new module only where ``model`` itself is an ``UnfusedBatchNormLIF``).
        report: filled.
    """
    report = ConversionReport() if report is None else report
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for pair in list(pairs(model)):
        objection = objection_to(pair, uses)
        if objection is not None:
            _left(f"convert_norm_lif: {pair.place!r} and {pair.behind!r} stay two layers", objection)
            report.left.update({pair.place: objection, pair.behind: objection})
            continue
        report.fused.append(pair.place)
        pooled = pools(pair)
        made = [
            _fused(pair.norm, pair.neuron, pair.axis, 2 if pooled else 1),
            Absorbed(type(pair.norm), isinstance(pair.layers[0], OverTime)),
            *([Absorbed(pool=pair.layers[2])] if pooled else []),
        ]
        pair.parent._modules.update(zip(pair.names, made, strict=False))

    def whole(path: str, layer: Any, before: nn.Module | None, parent: nn.Module | None) -> nn.Module | None:
        if not isinstance(layer, UnfusedBatchNormLIF):
            return None
        objection = hooks_of(layer, *layer.children()) or unlike(layer.norm)
        if objection is not None:
            _left(f"convert_norm_lif: {path!r} stays as it is", objection)
            report.left[path] = objection
            return None
        report.fused.append(path)
        return _fused(layer.norm, layer.lif, layer.channel_dim, 2 if "pool" in layer._modules else 1)

    model = _replaced(model, whole)
    for name, reason in unpaired(model):
        report.left.setdefault(name, reason)
    return model


def unfuse(model: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Undo ``convert_norm_lif``: every ``BatchNormLIF`` becomes a BatchNorm, a neuron and its pooling, in place.

    The layers go back to the places that they came from. A ``BatchNormLIF`` that was never a pair becomes an
    ``UnfusedBatchNormLIF``, which also takes a residual and an initial state; the class of its BatchNorm follows from
    the convolution or Linear before it. Parameter objects, buffers and mode stay, as in the other direction.

    Args:
        model: changed, and returned (a new module only where ``model`` itself is a ``BatchNormLIF``).
        norm: the class of the BatchNorm where nothing tells how many axes of space its input has.
    """
    for parent in list(model.modules()):
        if isinstance(parent, nn.Sequential):
            _put_back(parent)

    def parts(path: str, layer: Any, before: nn.Module | None, parent: nn.Module | None) -> nn.Module | None:
        if not isinstance(layer, BatchNormLIF):
            return None
        objection = hooks_of(layer)
        if layer.channel_dim not in (2, -1):
            objection = f"expected its channels on axis 2 or -1, got channel_dim={layer.channel_dim}"
        elif isinstance(parent, ConvBatchNormLIF) and parent.checkpoint:
            objection = "ConvBatchNormLIF(checkpoint=True) needs the fused layer"
        elif type(layer) is not BatchNormLIF:
            objection = f"{type(layer).__name__} is a class of its own"
        if objection is not None:
            _left(f"unfuse: {path!r} stays one layer", objection)
            return None
        first, pool = _norm(layer, _norm_class(layer, before, norm)), nn.AvgPool2d(2) if layer.pool == 2 else None
        made = UnfusedBatchNormLIF(first, _neuron(layer), pool, channel_dim=layer.channel_dim)
        return made.train(layer.training)

    return _replaced(model, parts)


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """A checkpoint of the fused model with the keys of the unfused one, or the other way, whichever ``model`` is.

    Use: ``model.load_state_dict(convert_state_dict(checkpoint, model))``. Of a pair in places N and M of its container
    the BatchNorm's keys are "N.weight", in ``OverTime`` "N.module.weight", in an ``UnfusedBatchNormLIF``
    "N.norm.weight"; the neuron's are "M.w", in a ``BatchNormLIF`` "N.lif.w". All other keys stay as they are.

    Args:
        state_dict: of ``model``, or of what ``convert_norm_lif`` or ``unfuse`` made of it.
        model: what it is to be loaded into.

    Raises:
        ValueError: two keys for the same tensor, by name.
    """
    aliases = {}
    for place, behind in _sites(model):
        aliases.update({place + "module.": place, place + "norm.": place})
        if behind is not None:
            aliases[behind] = place + "lif."

    def fused(key: str) -> str:
        prefix = next((prefix for prefix in aliases if key.startswith(prefix)), "")
        return aliases.get(prefix, "") + key.removeprefix(prefix)

    own = {fused(key): key for key in model.state_dict()}
    result: OrderedDict[str, Any] = OrderedDict()
    came: dict[str, str] = {}
    for key, value in state_dict.items():
        name = own.get(fused(key), key)
        if name in result:
            raise ValueError(
                f"convert_state_dict: expected one key for {name!r}, got {came[name]!r} and {key!r}; remove one of them"
            )
        result[name], came[name] = value, key
    if hasattr(state_dict, "_metadata"):
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return result


def _sites(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Prefixes of the keys of every pair, fused or not: where its BatchNorm is, and where its neuron is or was."""
    for pair in pairs(model, remove_duplicate=False):
        yield f"{pair.place}.", f"{pair.behind}."
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BatchNormLIF, UnfusedBatchNormLIF)):
            yield join(path, ""), None
        elif isinstance(module, nn.Sequential):
            for (name, _), (behind, layer) in pairwise(module._modules.items()):
                if isinstance(layer, Absorbed) and layer.norm is not None:
                    yield join(path, name) + ".", join(path, behind) + "."


def _fused(norm: Any, neuron: Any, axis: int, pool: int) -> BatchNormLIF:
    sync = isinstance(norm, nn.SyncBatchNorm)
    settings = {"channel_dim": axis, "sync": sync, "pool": pool, "packed": neuron.packed}
    layer = BatchNormLIF(norm.num_features, norm.eps, norm.momentum, False, False, **settings)
    _share(norm, layer)
    layer.lif = neuron
    return layer


def _norm(layer: BatchNormLIF, kind: Any) -> nn.Module:
    norm = kind(layer.num_features, layer.eps, layer.momentum, False, False)
    _share(layer, norm)
    return norm


def _neuron(layer: BatchNormLIF) -> Any:
    layer.lif.packed = layer.packed
    return layer.lif


def _share(source: Any, target: Any) -> None:
    """The same Parameters and buffers, and the mode that belongs to them."""
    for name in NORM_TENSORS[:2]:
        target.register_parameter(name, source._parameters[name])
    for name in NORM_TENSORS[2:]:
        target.register_buffer(name, source._buffers[name])
    target.affine, target.track_running_stats = source.affine, source.track_running_stats
    target.training = source.training


def _norm_class(layer: BatchNormLIF, before: Any, default: type[nn.Module]) -> type[nn.Module]:
    """The BatchNorm for what comes out of the convolution or Linear before the layer."""
    if layer.sync:
        return nn.SyncBatchNorm
    if layer.channel_dim == -1 or isinstance(before, nn.Linear):
        return nn.BatchNorm1d
    if isinstance(before, _ConvNd):
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(before.kernel_size) - 1]
    return nn.BatchNorm2d if layer.pool == 2 else default


def _put_back(parent: nn.Sequential) -> None:
    """The layers of a Sequential that ``convert_norm_lif`` has fused, each in its place."""
    layers = list(parent._modules.items())
    for i, (name, layer) in enumerate(layers):
        if type(layer) is not BatchNormLIF or hooks_of(layer) is not None:
            continue
        # The neuron has kept one place, the pooling another.
        kept = {key: place for key, place in layers[i + 1 : i + 1 + layer.pool] if isinstance(place, Absorbed)}
        if [place.norm is None for place in kept.values()] != [False, True][: layer.pool]:
            continue
        first, *rest = kept.values()
        axis = 2 if first.wrapped or isinstance(parent, TimeSequential) else 1
        kind = nn.SyncBatchNorm if layer.sync else first.norm
        if layer.channel_dim != axis or (kind is nn.SyncBatchNorm and not layer.sync):
            continue
        norm = _norm(layer, kind)
        norm = OverTime(norm).train(layer.training) if first.wrapped else norm
        back = [norm, _neuron(layer), *(place.pool[0] for place in rest)]
        parent._modules.update(zip([name, *kept], back, strict=True))


def _replaced(model: nn.Module, make: Callable[..., nn.Module | None]) -> nn.Module:
    """The model, with make(path, layer, convolution or Linear before it, parent) in place of a layer where not None."""
    made: dict[nn.Module, nn.Module | None] = {model: make("", model, None, None)}
    for path, parent in list(model.named_modules()):
        before: nn.Module | None = None
        for name, layer in list(parent._modules.items()):
            if layer is None:
                continue
            if layer not in made:
                made[layer] = make(join(path, name), layer, before, parent)
            new = made[layer]
            if new is not None:
                parent._modules[name] = new
            before = next((m for m in reversed(list(layer.modules())) if isinstance(m, (_ConvNd, nn.Linear))), before)
    whole = made[model]
    return model if whole is None else whole


def _left(what: str, why: str) -> None:
    warnings.warn(f"{what}: {why}", stacklevel=3)


def fusable(model: nn.Module) -> Iterator[Pair]:
    """The pairs that ``convert_norm_lif`` would fuse."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    return (pair for pair in pairs(model) if objection_to(pair, uses) is None)


class Pair(NamedTuple):
    """A BatchNorm and the neuron behind it."""

    parent: nn.Sequential
    layers: list[nn.Module]
    """The two as they stand in the parent, and what follows them, if anything."""
    names: list[str]
    place: str
    """The whole name of the first in the model."""
    behind: str
    """That of the neuron."""

    @property
    def norm(self) -> Any:
        return bare(self.layers[0])

    @property
    def neuron(self) -> Any:
        return self.layers[1]

    @property
    def axis(self) -> int:
        """The channels of the sequence: a BatchNorm has them on axis 1 of what it gets."""
        return 2 if isinstance(self.layers[0], OverTime) or isinstance(self.parent, TimeSequential) else 1


def pairs(model: nn.Module, remove_duplicate: bool = True) -> Iterator[Pair]:
    for path, parent in model.named_modules(remove_duplicate=remove_duplicate):
        if not isinstance(parent, nn.Sequential) or isinstance(parent, UnfusedBatchNormLIF):
            continue
        names, layers = list(parent._modules), list(parent._modules.values())
        for i in range(len(names) - 1):
            if isinstance(bare(layers[i]), _BatchNorm) and isinstance(layers[i + 1], Spiking):
                whole = (join(path, names[i]), join(path, names[i + 1]))
                yield Pair(parent, layers[i : i + 3], names[i : i + 3], *whole)


def unpaired(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every BatchNorm and neuron of a model that stands alone, with the reason."""
    fused = [path for path, module in model.named_modules() if isinstance(module, (BatchNormLIF, UnfusedBatchNormLIF))]
    for path, module in model.named_modules():
        if not isinstance(module, (_BatchNorm, Spiking)) or any(path.startswith(join(whole, "")) for whole in fused):
            continue
        place, parent = path, _parent(model, path)
        if isinstance(parent, OverTime):
            place = path.rpartition(".")[0]
            parent = _parent(model, place)
        if not isinstance(parent, nn.Sequential):
            holder = "nothing" if parent is None else type(parent).__name__
            yield place, f"it stands in {holder}, not in an nn.Sequential: what runs before and behind it is not known"
            continue
        layers, at = list(parent._modules.values()), list(parent._modules).index(place.rpartition(".")[2])
        if isinstance(module, _BatchNorm):
            yield place, f"expected spiking neurons directly behind it, got {_kind(layers[at + 1 : at + 2])}"
        else:
            yield place, f"expected a BatchNorm directly before it, got {_kind(layers[:at][-1:])}"


def _parent(model: nn.Module, path: str) -> nn.Module | None:
    return model.get_submodule(path.rpartition(".")[0]) if path else None


def _kind(layer: list[nn.Module]) -> str:
    return type(bare(layer[0])).__name__ if layer else "nothing"


def objection_to(pair: Pair, uses: Counter[int]) -> str | None:
    """Why the two cannot be fused with the same result, or None."""
    norm, neuron, wrapper = pair.norm, pair.neuron, pair.layers[0]
    if type(pair.parent).forward not in (nn.Sequential.forward, TimeSequential.forward):
        return f"{type(pair.parent).__name__}, which holds them, has a forward of its own"
    if type(neuron).forward is not Spiking.forward:
        return f"{type(neuron).__name__} has a forward of its own"
    if uses[id(norm)] > 1 or uses[id(wrapper)] > 1:
        return f"this {type(norm).__name__} is used in several places"
    objection = unlike(norm) or hooks_of(norm, neuron, wrapper)
    if objection is not None:
        return objection
    # Axes counted from the end name one only where the number of axes is known.
    space = NORMS[type(norm)]
    axes = None if space is None else space + 1 + pair.axis
    if _axis(neuron.time_dim, axes) != 0:
        return f"expected time on axis 0, got time_dim={neuron.time_dim}"
    with torch.no_grad():
        channels = any(isinstance(value, Tensor) and value.numel() > 1 for value in neuron.values().values())
    if channels and _axis(neuron.channel_dim, axes) != pair.axis:
        return f"expected the neuron's channels on axis {pair.axis}, got channel_dim={neuron.channel_dim}"
    return None


def _axis(dim: int, axes: int | None) -> int | None:
    return dim if dim >= 0 or axes is None else dim + axes


def unlike(norm: Any) -> str | None:
    """What a BatchNorm has that ``BatchNormLIF`` does not have, or None."""
    kind = type(norm).__name__
    if type(norm) not in NORMS:
        return f"expected one of {', '.join(dict.fromkeys(known.__name__ for known in NORMS))}, got {kind}"
    missing = [norm._buffers[name] is None for name in NORM_TENSORS[2:]]
    if any(missing) != all(missing) or norm.track_running_stats == all(missing):
        return f"{kind} keeps running statistics without using them, or in part"
    if norm.weight is None and norm.bias is not None:
        return f"{kind} has a bias and no weight"
    group = getattr(norm, "process_group", None)
    if group is not None and group is not torch.distributed.group.WORLD:
        return f"{kind} has a process_group of its own"
    try:
        BatchNormLIF(1, norm.eps, norm.momentum)
    except ValueError as error:
        return str(error)
    return None


def hooks_of(*layers: nn.Module) -> str | None:
    """What would be lost with a layer that is no longer called, or None."""
    for layer in layers:
        held = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(held):
            return f"{type(layer).__name__} has hooks, which would be lost"
    return None


def pools(pair: Pair) -> bool:
    """Whether what follows the pair is the average pooling that ``BatchNormLIF`` can do."""
    layer = pair.layers[-1]
    pool: Any = bare(layer)
    if type(pool) is not nn.AvgPool2d or hooks_of(layer, pool) is not None:
        return False
    # Behind packed spikes pooling gives a plain tensor, where the fused layer would give packed spikes.
    if pair.neuron.packed or pair.axis != 2 or not isinstance(pair.norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return False
    over_time = pool is not layer or isinstance(pair.parent, TimeSequential)
    halves = all(size in (2, (2, 2)) for size in (pool.kernel_size, pool.stride)) and pool.padding in (0, (0, 0))
    return over_time and halves and not pool.ceil_mode and pool.divisor_override is None


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
