"""Spikformer (Zhou et al. 2022, arXiv 2209.15425): spiking patch splitting, spiking self-attention, a spiking MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from trtkern.models._attention import spiking_attention
from trtkern.models._blocks import Convolution, Style
from trtkern.models._network import SpikingNetwork
from trtkern.models._tokens import TokenMean, as_tokens, check, draw, stages, style_of
from trtkern.nn import SpikeLinear, Spikes
from trtkern.ops.spikes import dense

for _name in ("as_tokens", "dense", "spiking_attention"):
    fx.wrap(_name)

SCALE, THRESHOLD = 0.125, 0.5
"""What Q K^T V is multiplied with, and the threshold of the neurons behind it, as in the published code."""


class SpikingPatchSplitting(nn.Module):
    """SPS: images or frames [T, B, C, H, W] -> tokens [T, B, L, dim], L = H W / patch^2.

    Four convolutions with BatchNorm and neurons (``stages``); to their spikes are added those of a fifth one over them,
    which tells the tokens where they are. So a token is 0, 1 or 2.

    State-dict prefixes: stages.conv0 to stages.conv3, position, each with conv and norm.
    """

    takes_time = True

    def __init__(self, channels: int, dim: int, patch: int, style: Style) -> None:
        super().__init__()
        self.stages = stages(channels, dim, patch, style, last_fires=True)
        self.position = style.block(Convolution(dim, dim), packed=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, L, dim]."""
        spikes = self.stages(x)
        return as_tokens(dense(spikes) + dense(self.position(spikes)))


class SpikingSelfAttention(nn.Module):
    """SSA: LIF(BN(W LIF(s Q K^T V))) with Q, K, V = LIF(BN(W x)), [T, B, L, dim] -> spikes of that shape.

    Args:
        dim: C.
        heads: a divisor of dim.
        style: how the layers are made.
        qkv_bias: whether the three Linear layers of Q, K and V have a bias, which the BatchNorm behind takes off again.
        scale: s.
        threshold: of the neurons behind the product.

    State-dict prefixes: q, k, v, project, each with conv (the Linear) and norm.
    """

    takes_time = True
    takes_spikes = True

    def __init__(
        self,
        dim: int,
        heads: int,
        style: Style,
        *,
        qkv_bias: bool = True,
        scale: float = SCALE,
        threshold: float = THRESHOLD,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"SpikingSelfAttention: expected heads to divide dim={dim}, got {heads}")
        self.heads, self.scale = heads, scale
        self.q, self.k, self.v = (style.tokens(dim, dim, bias=qkv_bias) for _ in range(3))
        self.attention = style.neurons(v_threshold=threshold, channel_dim=-1)
        self.project = style.tokens(dim, dim, bias=True)

    def forward(self, x: Tensor | Spikes) -> Tensor | Spikes:
        """Spikes [T, B, L, dim]."""
        product = spiking_attention(self.q(x), self.k(x), self.v(x), self.heads, self.scale)
        return self.project(self.attention(product))

    def extra_repr(self) -> str:
        """The settings that no layer shows."""
        return f"heads={self.heads}, scale={self.scale}"


class SpikformerBlock(nn.Module):
    """x + SSA(x), then + MLP of that: tokens [T, B, L, dim], spikes or sums of spikes, -> sums.

    The MLP is two of Linear, BatchNorm and neurons, ``mlp_ratio`` times as wide within. What is added up are whole
    numbers, one more at each block's two ends, and stays dense.

    State-dict prefixes: attention (``SpikingSelfAttention``), hidden and out, each with conv and norm.
    """

    takes_time = True
    takes_spikes = True

    def __init__(self, dim: int, heads: int, style: Style, *, mlp_ratio: int = 4, **attention: Any) -> None:
        super().__init__()
        self.attention = SpikingSelfAttention(dim, heads, style, **attention)
        self.hidden = style.tokens(dim, mlp_ratio * dim, bias=True)
        self.out = style.tokens(mlp_ratio * dim, dim, bias=True)

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, L, dim]."""
        x = dense(x) + dense(self.attention(x))
        return x + dense(self.out(self.hidden(x)))


class Spikformer(SpikingNetwork):
    """Spikformer of ``depth`` blocks on patches of an image; by default Spikformer-4-384 for CIFAR.

    ``SpikingPatchSplitting``, ``SpikformerBlock`` times depth, the mean over the tokens, a Linear of every step. The
    neurons are those of the published code unless told otherwise: h = v / 2 + x / 2, a spike where h >= 1, hard reset
    whose gradient is cut, the sigmoid surrogate. Its logits are the mean over T of those here.

    The published code for ImageNet is ``Spikformer(1000, shape=(3, 224, 224), dim=512, depth=8, heads=8, patch=16,
    qkv_bias=False)``.

    Args:
        num_classes: classes.
        shape: (C, H, W) of an image or frame, whose sides the patches fill.
        timesteps: T; an image is shown T times, and the first convolution runs on it once.
        dim: channels of a token, a multiple of 8 and of heads.
        depth: blocks.
        heads: of the attention.
        patch: side of a patch: 1, 2, 4, 8 or 16; log2 of it stages are pooled, the last ones.
        mlp_ratio: how much wider the MLP is within.
        qkv_bias: as in ``SpikingSelfAttention``.
        scale, attention_threshold: likewise, its scale and threshold.
        checkpoint: keep no convolution's and no Linear's output; the backward pass computes it once more.
        packed: keep bits instead of dense spikes.
        exact_convolutions: as in ``SpikingNetwork``.
        lif: settings of the neurons: decay, surrogate, backend, ...; neuron: their class or its name; sync: share the
            statistics of BatchNorm among processes.

    Raises:
        TypeError, ValueError: a setting out of range, an image that the patches do not fill.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        shape: tuple[int, int, int] = (3, 32, 32),
        timesteps: int = 4,
        dim: int = 384,
        depth: int = 4,
        heads: int = 12,
        patch: int = 4,
        mlp_ratio: int = 4,
        qkv_bias: bool = True,
        scale: float = SCALE,
        attention_threshold: float = THRESHOLD,
        exact_convolutions: bool = False,
        **lif: Any,
    ) -> None:
        check("Spikformer", shape, patch, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        style = style_of(**lif)
        attention = {"qkv_bias": qkv_bias, "scale": scale, "threshold": attention_threshold}
        blocks = [SpikformerBlock(dim, heads, style, mlp_ratio=mlp_ratio, **attention) for _ in range(depth)]
        super().__init__(
            [SpikingPatchSplitting(shape[0], dim, patch, style), *blocks, TokenMean()],
            SpikeLinear(dim, num_classes),
            timesteps=timesteps,
            exact_convolutions=exact_convolutions,
        )
        self.qkv_bias = qkv_bias
        draw(self, convolutions=False)

    def published_keys(self) -> Iterator[tuple[str, str]]:
        """(key here, key of the published code): of its CIFAR code with ``qkv_bias``, else of its ImageNet code."""
        for key in self.state_dict():
            if key.startswith("classifier."):
                yield key, key.replace("classifier", "head")
                continue
            _, layer, rest = key.split(".", 2)
            if layer == "0":
                yield key, f"patch_embed.{embedding_key(rest)}"
            else:
                yield key, f"block.{int(layer) - 1}.{block_key(rest, 'linear' if self.qkv_bias else 'conv')}"


_PLACES = {
    "q": ("attn", "q"), "k": ("attn", "k"), "v": ("attn", "v"), "project": ("attn", "proj"),
    "hidden": ("mlp", "fc1"), "out": ("mlp", "fc2"),
}  # fmt: skip


def block_key(key: str, layer: str) -> str:
    """The published name of a tensor of a block: "attn.proj_bn.bias" of "attention.project.norm.bias".

    Args:
        layer: what a Linear is there, "linear" or "conv".
    """
    name, kind, tensor = key.removeprefix("attention.").rsplit(".", 2)
    group, own = _PLACES[name]
    return f"{group}.{own}_{'bn' if kind == 'norm' else layer}.{tensor}"


def embedding_key(key: str) -> str:
    """The published name of a tensor of the patch embedding, in both codes: "proj_conv1.weight" of
    "stages.conv1.conv.weight", "rpe_bn.bias" of "position.norm.bias"."""
    place, kind, tensor = key.removeprefix("stages.").rsplit(".", 2)
    kind = "bn" if kind == "norm" else kind
    if place == "position":
        return f"rpe_{kind}.{tensor}"
    number = place.removeprefix("conv")
    return f"proj_{kind}{'' if number == '0' else number}.{tensor}"
