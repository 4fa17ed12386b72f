"""Weights of published implementations, in the networks of this package: the TRT paper's, Spikformer's, SDT's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trtkern.models._blocks import LinearLIF, ResidualBlock, SEWBlock
from trtkern.models._network import SpikingNetwork
from trtkern.models.spike_driven import SpikeDrivenTransformer
from trtkern.models.spikformer import Spikformer
from trtkern.nn import ConvBatchNormLIF
from trtkern.ops import checks

_RESIDUAL = {"first": "conv2d_layer_1.module", "second": "conv2d_layer_2.module"}
# Where the reference keeps what a block keeps under these names.
_NAMES: dict[type[nn.Module], dict[str, str]] = {
    ConvBatchNormLIF: {"": "conv2d_layer.module"},
    ResidualBlock: {**_RESIDUAL, "shortcut": "downsample_layer.module"},
    SEWBlock: {**_RESIDUAL, "shortcut": "downsample_layer.0.module"},
    LinearLIF: {"linear": "fc.module"},
}
_PARTS = {"conv": "0", "norm": "1"}
_UNUSED: dict[type[SpikingNetwork], str] = {
    Spikformer: r"block\.\d+\.norm[12]\.(weight|bias)",
    SpikeDrivenTransformer: r"block\.\d+\.attn\.talking_heads\.weight",
}
"""Parameters that the published networks hold and never compute with; there are none here."""
_LISTED = 8


def reference_keys(model: SpikingNetwork) -> dict[str, str]:
    """Which key of the reference implementation's state dict holds what the model has under a key: {model's: theirs}.

    The reference of a ``Spikformer`` or a ``SpikeDrivenTransformer`` is the code of its paper; where that has 1x1
    convolutions in place of a Linear, its weights have axes of 1 behind those here. The reference of all others is the
    TRT paper's, which counts its layers, with the flattening before its first Linear as one of them. Learned parameters
    of the neurons (a PLIF's w) have no counterpart there, and are not in the result. To write a state dict for the
    reference: ``{theirs: model.state_dict()[ours] for ours, theirs in reference_keys(model).items()}``.

    Args:
        model: a network of this package.

    Raises:
        TypeError: no ``SpikingNetwork``, or one with a layer that the reference does not have.
    """
    if not isinstance(model, SpikingNetwork):
        raise TypeError(f"reference_keys: expected a network of trtkern.models, got {type(model).__name__}")
    if isinstance(model, (Spikformer, SpikeDrivenTransformer)):
        return dict(model.published_keys())
    keys: dict[str, str] = {}
    index, flattened = 0, False
    for name, block in model.layers.named_children():
        if not any(True for _ in block.parameters()):
            continue
        if type(block) not in _NAMES or isinstance(getattr(block, "conv", None), nn.Linear):  # FCBN
            raise TypeError(
                f"reference_keys: expected layers of convolution or residual blocks and Linear, got {name!r} "
                f"({type(block).__name__})"
            )
        if isinstance(block, LinearLIF) and not flattened:
            index, flattened = index + 1, True
        keys.update((f"layers.{name}.{ours}", f"layers.{index}.{theirs}") for ours, theirs in _of_block(block))
        index += 1
    index += not flattened
    keys.update((f"classifier.{name}", f"layers.{index}.module.{name}") for name in ("weight", "bias"))
    return keys


def _of_block(block: nn.Module) -> Iterator[tuple[str, str]]:
    for key in block.state_dict():
        for name, theirs in _NAMES[type(block)].items():
            prefix = f"{name}." if name else ""
            if not key.startswith(prefix):
                continue
            part, _, rest = key.removeprefix(prefix).partition(".")
            if isinstance(block, LinearLIF):
                yield key, f"{theirs}.{part}"
            elif "." not in rest:
                yield key, f"{theirs}.{_PARTS[part]}.{rest}"


def load_reference_weights(model: SpikingNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Give a network the weights and running statistics that a published implementation saved.

    The model is a ``Spikformer`` or a ``SpikeDrivenTransformer``, of its paper's code; or of the TRT paper's code, made
    by ``from_topology`` of the same topology, or by ``resnet19``, ``sew_resnet34``, ``spiking_resnet34``, ``vggsnn``.
    The wrapper's "module" in a key is passed over: a first layer CONVEN, which has none, and what ``DataParallel``
    saved load alike. Parameters that the published transformers hold and never compute with may be there or not.

    Args:
        model: what takes the weights, on its own device and in its own dtype.
        state_dict: tensors by the reference's keys (``reference_keys``).

    Raises:
        TypeError: no state dict of tensors, or no ``SpikingNetwork``.
        ValueError: keys that are missing, of no layer, or of another shape, all listed; the model is unchanged.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_reference_weights: expected a state dict, got {checks.describe(state_dict)}")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"load_reference_weights: expected a state dict of tensors, got {checks.describe(value)} under "
                f"{key!r}; pass the state dict inside a checkpoint"
            )
    unused = _UNUSED.get(type(model), "")
    given = {_bare(key): key for key in state_dict if not re.fullmatch(unused, _bare(key))}
    wanted = {_bare(theirs): (ours, theirs) for ours, theirs in reference_keys(model).items()}
    mine = model.state_dict()
    missing = [theirs for bare, (_, theirs) in wanted.items() if bare not in given]
    unexpected = [key for bare, key in given.items() if bare not in wanted]
    shapes = [
        f"{given[bare]} {tuple(state_dict[given[bare]].shape)} for {tuple(mine[ours].shape)}"
        for bare, (ours, _) in wanted.items()
        if bare in given and not _fits(state_dict[given[bare]], mine[ours])
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(wrong.values()):
        raise ValueError(
            "load_reference_weights: expected the keys of this network's layers, got "
            + "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in wrong.items() if keys)
            + "; build the network of their topology, image and number of classes"
        )
    with torch.no_grad():
        for bare, (ours, _) in wanted.items():
            mine[ours].copy_(state_dict[given[bare]].reshape(mine[ours].shape))


def _fits(theirs: Tensor, ours: Tensor) -> bool:
    """Whether it has that shape, or has it as the kernel of a 1x1 convolution, with axes of 1 behind."""
    rank = ours.dim()
    return theirs.shape[:rank] == ours.shape and all(side == 1 for side in theirs.shape[rank:])


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "module")


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
