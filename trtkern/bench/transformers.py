"""The spiking transformers in plain torch, with the state-dict keys of the published code.

Spikformer (arXiv 2209.15425), the Spike-driven Transformer (arXiv 2307.01694), and a block of Spikformer by itself, the
last also of ``trtkern.models``. What tests and ``trtkern bench --op step`` compare with: there is nothing of trtkern in
the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trtkern.bench import plain
from trtkern.models._blocks import Style
from trtkern.models.spikformer import SpikformerBlock, block_key

HEAD = 32
"""Channels of a head of Spikformer."""
Neurons = Callable[[float], nn.Module]
"""Neurons with that threshold."""


def triangles(threshold: float) -> nn.Module:
    """The neurons of the other plain networks."""
    return plain.Neurons(0.5, threshold)


class _Named(nn.Module):
    """Layers by the published names: NAME_linear (or NAME_conv), NAME_bn and, where they fire, NAME_lif."""

    def __init__(self, neurons: Neurons, kind: str = "linear") -> None:
        super().__init__()
        self.neurons, self.kind = neurons, kind

    def key(self, name: str, part: str) -> str:
        return f"{name}_{part}"

    def add(self, name: str, layer: nn.Module, norm: nn.Module, fires: bool = True) -> None:
        self.add_module(self.key(name, self.kind), layer)
        self.add_module(self.key(name, "bn"), norm)
        if fires:
            self.add_module(self.key(name, "lif"), self.neurons(1.0))

    def linear(self, name: str, features: int, out: int, *, bias: bool = True, fires: bool = True) -> None:
        self.add(name, nn.Linear(features, out, bias=bias), nn.BatchNorm1d(out), fires)

    def current(self, name: str, x: Tensor) -> Tensor:
        """Layer and BatchNorm of images [T, B, C, H, W] or tokens [T, B, L, C]."""
        axes = x.shape[: 2 if x.dim() == 5 else 3]
        y = self.get_submodule(self.key(name, self.kind))(x.flatten(0, len(axes) - 1))
        return self.get_submodule(self.key(name, "bn"))(y).unflatten(0, axes)

    def fired(self, name: str, x: Tensor) -> Tensor:
        """The neurons behind them."""
        return self.get_submodule(self.key(name, "lif"))(self.current(name, x))


class Patches(_Named):
    """Four convolutions, the last log2(patch) of them pooled, and one over them: images -> tokens [T, B, L, dim].

    With ``currents`` the neurons of the fourth come behind its pooling, and the fifth has none: what is added are not
    spikes but what makes them.
    """

    STAGES = ("proj", "proj1", "proj2", "proj3")

    def __init__(self, channels: int, dim: int, patch: int, neurons: Neurons, *, currents: bool) -> None:
        super().__init__(neurons, "conv")
        self.currents, self.first_pooled = currents, len(self.STAGES) - (patch.bit_length() - 1)
        for name, out in zip(self.STAGES, (dim // 8, dim // 4, dim // 2, dim), strict=True):
            self.add(name, nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
            channels = out
        self.add("rpe", nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), not currents)
        self.pool = plain.Step(nn.MaxPool2d(3, 2, 1))

    def key(self, name: str, part: str) -> str:
        return f"{name.rstrip('123')}_{part}{name.removeprefix(name.rstrip('123'))}"

    def forward(self, x: Tensor) -> Tensor:
        for stage, name in enumerate(self.STAGES):
            last = self.currents and stage == len(self.STAGES) - 1
            x = self.current(name, x) if last else self.fired(name, x)
            x = self.pool(x) if stage >= self.first_pooled else x
        if self.currents:
            x = x + self.current("rpe", self.get_submodule("proj_lif3")(x))
        else:
            x = x + self.fired("rpe", x)
        return x.flatten(3).transpose(2, 3)


class Attention(_Named):
    """Spiking self-attention: Q, K, V, s Q K^T V from the right, neurons of threshold 1/2, projection."""

    def __init__(self, dim: int, heads: int, neurons: Neurons, qkv_bias: bool) -> None:
        super().__init__(neurons)
        self.heads = heads
        for name in "qkv":
            self.linear(name, dim, dim, bias=qkv_bias)
        self.attn_lif = neurons(0.5)
        self.linear("proj", dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.fired(name, x).unflatten(-1, (self.heads, -1)).transpose(2, 3) for name in "qkv")
        product = 0.125 * q @ (k.transpose(-1, -2) @ v)
        return self.fired("proj", self.attn_lif(product.transpose(2, 3).flatten(3)))


class MLP(_Named):
    """Two Linear layers with BatchNorm and neurons, four times as wide within."""

    def __init__(self, dim: int, neurons: Neurons) -> None:
        super().__init__(neurons)
        self.linear("fc1", dim, 4 * dim)
        self.linear("fc2", 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fired("fc2", self.fired("fc1", x))


class Block(nn.Module):
    """x + attention, then + MLP."""

    def __init__(self, dim: int, heads: int, neurons: Neurons, qkv_bias: bool = True) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads, neurons, qkv_bias), MLP(dim, neurons)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Masks(_Named):
    """Spike-driven self-attention: Q where neurons of threshold 1/2 fire on the sum over the tokens of K V."""

    def __init__(self, dim: int, neurons: Neurons) -> None:
        super().__init__(neurons, "conv")
        self.shortcut_lif = neurons(1.0)
        for name in "qkv":
            self.linear(name, dim, dim, bias=False)
        self.talking_heads_lif = neurons(0.5)
        self.linear("proj", dim, dim, fires=False)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.shortcut_lif(x)
        q, k, v = (self.fired(name, spikes) for name in "qkv")
        return x + self.current("proj", q * self.talking_heads_lif((k * v).sum(2, keepdim=True)))


class CurrentMLP(_Named):
    """The MLP with the neurons in front of each Linear layer, and its input's currents added."""

    def __init__(self, dim: int, neurons: Neurons) -> None:
        super().__init__(neurons, "conv")
        self.first_lif = neurons(1.0)
        self.linear("fc1", dim, 4 * dim)
        self.linear("fc2", 4 * dim, dim, fires=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.current("fc2", self.fired("fc1", self.first_lif(x)))


class CurrentBlock(nn.Module):
    """Of the Spike-driven Transformer."""

    def __init__(self, dim: int, neurons: Neurons) -> None:
        super().__init__()
        self.attn, self.mlp = Masks(dim, neurons), CurrentMLP(dim, neurons)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Transformer(nn.Module):
    """Images [B, C, H, W] or frames [T, B, C, H, W] -> logits [T, B, classes].

    Args:
        patch_embed, block, head: by their published names.
        head_lif: neurons in front of the head, or none.
    """

    def __init__(
        self, patch_embed: nn.Module, block: list[nn.Module], head: nn.Linear, head_lif: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.timesteps = 4
        self.patch_embed, self.block, self.head = patch_embed, nn.ModuleList(block), head
        self.head_lif = nn.Identity() if head_lif is None else head_lif

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x.unsqueeze(0).repeat(self.timesteps, 1, 1, 1, 1) if x.dim() == 4 else x)
        for block in self.block:
            x = block(x)
        return self.head(self.head_lif(x.mean(2)))


def spikformer(
    classes: int = 10, channels: int = 3, dim: int = 384, depth: int = 4, heads: int = 12, patch: int = 4,
    qkv_bias: bool = True, neurons: Neurons = triangles,
) -> Transformer:  # fmt: skip
    """Spikformer-4-384 for CIFAR."""
    blocks: list[nn.Module] = [Block(dim, heads, neurons, qkv_bias) for _ in range(depth)]
    patches = Patches(channels, dim, patch, neurons, currents=False)
    return Transformer(patches, blocks, nn.Linear(dim, classes))


def spike_driven(
    classes: int = 10, channels: int = 3, dim: int = 512, depth: int = 2, patch: int = 4, neurons: Neurons = triangles
) -> Transformer:
    """SDT-2-512 for CIFAR."""
    blocks: list[nn.Module] = [CurrentBlock(dim, neurons) for _ in range(depth)]
    patches = Patches(channels, dim, patch, neurons, currents=True)
    return Transformer(patches, blocks, nn.Linear(dim, classes), neurons(1.0))


class Alone(nn.Module):
    """A block by itself: currents of tokens [T, B, L, dim] -> logits [T, B, 10].

    The currents are those behind the patch embedding; its last BatchNorm and neurons make spikes of them.
    """

    def __init__(self, dim: int, embedding: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.embedding, self.block, self.classifier = embedding, block, nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block(self.embedding(x)).mean(2))


class _Norm(nn.BatchNorm1d):
    """BatchNorm over tokens [T, B, L, C], then neurons; the keys of its state dict are those of ``BatchNormLIF``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.neurons = triangles(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(super().forward(x.flatten(0, 2)).view_as(x))


def plain_block(dim: int) -> Alone:
    """The block of Spikformer for ImageNet in plain torch."""
    return Alone(dim, _Norm(dim), Block(dim, dim // HEAD, triangles, qkv_bias=False))


def own_block(dim: int, plainly: Alone, **style: Any) -> Alone:
    """The same block of ``trtkern.models``, with the weights of the plain one.

    Args:
        style: what ``Style.of`` takes.
    """
    made = Style.of(style.pop("checkpoint", False), True, **style)
    own = Alone(dim, made.token_norm(dim), SpikformerBlock(dim, dim // HEAD, made, qkv_bias=False))
    weights = plainly.state_dict()
    named = {key: f"block.{block_key(key.removeprefix('block.'), 'linear')}" for key in own.state_dict()
             if key.startswith("block.")}  # fmt: skip
    own.load_state_dict({key: weights[named.get(key, key)] for key in own.state_dict()})
    return own
