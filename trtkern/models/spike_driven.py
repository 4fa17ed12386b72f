"""The Spike-driven Transformer (Yao et al. 2023, arXiv 2307.01694): masks in place of products, residual currents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from trtkern.models._attention import firing_together, masked
from trtkern.models._blocks import Convolution, Style
from trtkern.models._network import SpikingNetwork
from trtkern.models._tokens import LinearNorm, TokenMean, as_tokens, check, draw, stages, style_of
from trtkern.models.spikformer import block_key, embedding_key
from trtkern.nn import SpikeLinear

for _name in ("as_tokens", "firing_together", "masked"):
    fx.wrap(_name)

THRESHOLD = 0.5
"""Of the neurons that make the mask, as in the published code."""


class CurrentPatchSplitting(nn.Module):
    """The patch embedding of the Spike-driven Transformer: [T, B, C, H, W] -> currents of tokens [T, B, L, dim].

    The ``stages`` of Spikformer but for the neurons of the last one: it gives currents, to which those of a fifth
    convolution with BatchNorm, over the spikes that neurons make of them, are added.

    State-dict prefixes: stages.conv0 to stages.conv3, position, each with conv and norm.
    """

    takes_time = True

    def __init__(self, channels: int, dim: int, patch: int, style: Style) -> None:
        super().__init__()
        self.stages = stages(channels, dim, patch, style, last_fires=False)
        self.neurons = style.neurons()
        self.position = style.shortcut(Convolution(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, L, dim]."""
        currents = self.stages(x)
        return as_tokens(self.position(self.neurons(currents)) + currents)


class SpikeDrivenSelfAttention(nn.Module):
    """SDSA: x + BN(W (Q masked by LIF(sum over tokens of K V))), Q, K, V = LIF(BN(W LIF(x))); currents [T, B, L, dim].

    K V is 1 where both fire. A channel in which they do so in enough tokens lets Q through, in all tokens alike; so
    nothing is multiplied, and heads would change nothing.

    State-dict prefixes: q, k, v, project, each with conv (the Linear) and norm.
    """

    takes_time = True

    def __init__(self, dim: int, style: Style, *, threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.neurons = style.neurons(channel_dim=-1)
        self.q, self.k, self.v = (style.tokens(dim, dim, bias=False) for _ in range(3))
        self.mask = style.neurons(v_threshold=threshold, channel_dim=-1)
        self.project = LinearNorm(dim, dim, style, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, L, dim]."""
        spikes = self.neurons(x)
        mask = self.mask(firing_together(self.k(spikes), self.v(spikes)))
        return x + self.project(masked(self.q(spikes), mask))


class SpikeDrivenBlock(nn.Module):
    """SDSA, then an MLP: x + BN(W LIF(BN(W LIF(x)))); currents [T, B, L, dim].

    State-dict prefixes: attention (``SpikeDrivenSelfAttention``), hidden and out, each with conv and norm.
    """

    takes_time = True

    def __init__(self, dim: int, style: Style, *, mlp_ratio: int = 4, threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.attention = SpikeDrivenSelfAttention(dim, style, threshold=threshold)
        self.neurons = style.neurons(channel_dim=-1)
        self.hidden = style.tokens(dim, mlp_ratio * dim, bias=True)
        self.out = LinearNorm(mlp_ratio * dim, dim, style, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, L, dim]."""
        x = self.attention(x)
        return x + self.out(self.hidden(self.neurons(x)))


class SpikeDrivenTransformer(SpikingNetwork):
    """Spike-driven Transformer of ``depth`` blocks: SDT-2-512 for CIFAR by default.

    ``CurrentPatchSplitting``, ``SpikeDrivenBlock`` times depth, the mean over the tokens, neurons, a Linear of every
    step. What goes along the residuals are currents; every Linear and convolution but the first takes spikes. The
    neurons are those of ``Spikformer``, and so is what the published code makes of T: its logits are the mean over T.

    The published networks for ImageNet are ``SpikeDrivenTransformer(1000, shape=(3, 224, 224), dim=..., depth=...,
    patch=16)`` with dim and depth 384 and 8, 512 and 6, 512 and 8, 512 and 10, 768 and 8.

    Args:
        num_classes, shape, timesteps, depth, patch: as in ``Spikformer``.
        dim: channels of a token, a multiple of 8.
        mlp_ratio: how much wider the MLP is within, 2 at the least: with 1 the published network has a residual more.
        attention_threshold: of the neurons that make the mask.
        exact_convolutions, lif: as in ``Spikformer``.

    Raises:
        TypeError, ValueError: a setting out of range, an image that the patches do not fill.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        shape: tuple[int, int, int] = (3, 32, 32),
        timesteps: int = 4,
        dim: int = 512,
        depth: int = 2,
        patch: int = 4,
        mlp_ratio: int = 4,
        attention_threshold: float = THRESHOLD,
        exact_convolutions: bool = False,
        **lif: Any,
    ) -> None:
        check("SpikeDrivenTransformer", shape, patch, dim=dim, depth=depth, mlp_ratio=mlp_ratio)
        if mlp_ratio < 2:
            raise ValueError(f"SpikeDrivenTransformer: expected mlp_ratio >= 2, got {mlp_ratio}")
        style = style_of(**lif)
        blocks = [
            SpikeDrivenBlock(dim, style, mlp_ratio=mlp_ratio, threshold=attention_threshold) for _ in range(depth)
        ]
        super().__init__(
            [CurrentPatchSplitting(shape[0], dim, patch, style), *blocks, TokenMean(), style.neurons()],
            SpikeLinear(dim, num_classes),
            timesteps=timesteps,
            exact_convolutions=exact_convolutions,
        )
        draw(self, convolutions=True)

    def published_keys(self) -> Iterator[tuple[str, str]]:
        """(key here, key of the published code)."""
        for key in self.state_dict():
            if key.startswith("classifier."):
                yield key, key.replace("classifier", "head")
                continue
            _, layer, rest = key.split(".", 2)
            theirs = f"patch_embed.{embedding_key(rest)}"
            yield key, theirs if layer == "0" else f"block.{int(layer) - 1}.{block_key(rest, 'conv')}"
