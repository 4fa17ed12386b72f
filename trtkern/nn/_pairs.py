"""Which BatchNorms and neurons of a model are pairs, and whether one layer can stand for the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.nn.neurons import Spiking
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.unfused import UnfusedBatchNormLIF, bare

NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
"""The BatchNorms that are fused, with their axes of space where there is but one number of them."""

LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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
            yield place, f"expected LIF, IF or PLIF directly behind it, got {_kind(layers[at + 1 : at + 2])}"
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
        return f"expected one of {', '.join(known.__name__ for known in NORMS)}, got {kind}"
    missing = [norm._buffers[name] is None for name in LEAVES[2:]]
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
    if pair.neuron.packed or pair.axis != 2 or type(pair.norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return False
    over_time = pool is not layer or isinstance(pair.parent, TimeSequential)
    halves = all(size in (2, (2, 2)) for size in (pool.kernel_size, pool.stride)) and pool.padding in (0, (0, 0))
    return over_time and halves and not pool.ceil_mode and pool.divisor_override is None


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
