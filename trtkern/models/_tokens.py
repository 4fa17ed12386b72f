"""What the spiking transformers share: patches of an image as tokens, their mean, how weights are drawn."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, fx, nn

from trtkern.models._blocks import Convolution, Pool, Style
from trtkern.nn import SpikeLinear, Spikes, TimeSequential
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn.norms import SyncBatchNorm
from trtkern.ops import checks
from trtkern.ops.spikes import dense

fx.wrap("dense")

STAGES = 4
PATCHES = tuple(2**pooled for pooled in range(STAGES + 1))
"""The sides that a patch may have: each stage halves the image or leaves it as it is."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "LIF": {"decay": 0.5, "gain": 0.5, "surrogate": "sigmoid", "detach_reset": True, "fire_on_equal": True},
    "PLIF": {"decay_input": True, "surrogate": "sigmoid", "detach_reset": True, "fire_on_equal": True},
}
"""The neurons of the published code, ``MultiStepLIFNode(tau=2.0, detach_reset=True)`` and its parametric form of
SpikingJelly 0.0.0.0.12, by the names that they have here."""


def style_of(neuron: Any = "LIF", checkpoint: bool = False, packed: bool = True, **lif: Any) -> Style:
    """The style of a transformer: the published neuron where the options say nothing else; one that the published code
    does not have starts from its own settings."""
    style = Style.of(checkpoint, packed, neuron=neuron, **lif)
    settings = {**PUBLISHED.get(getattr(style.neuron, "__name__", ""), {}), **style.lif}
    return Style(style.checkpoint, style.packed, style.sync, style.neuron, settings)


def check(who: str, shape: tuple[int, int, int], patch: int, **counts: int) -> None:
    """A ValueError where no network of that kind takes such images, or a count is none."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{who}: expected {name} to be an int >= 1, got {checks.describe(value)}")
    if patch not in PATCHES:
        raise ValueError(f"{who}: expected patch from {', '.join(map(str, PATCHES))}, got {patch!r}")
    if counts["dim"] % 8:
        raise ValueError(f"{who}: expected dim to be a multiple of 8, the first stage has dim / 8, got {counts['dim']}")
    sides = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"{who}: expected shape as three integers (C, H, W) >= 1, got {shape!r}")
    if sides[1] % patch or sides[2] % patch:
        raise ValueError(f"{who}: expected sides that patches of {patch}x{patch} fill, got {sides[1]}x{sides[2]}")


def stages(channels: int, dim: int, patch: int, style: Style, *, last_fires: bool) -> nn.Sequential:
    """Four 3x3 convolutions of dim / 8, dim / 4, dim / 2 and dim channels with BatchNorm and neurons; behind the last
    log2(patch) of them maxima of 3x3 with stride 2.

    Args:
        last_fires: False leaves out the neurons of the last one, which then gives currents.
    """
    made: OrderedDict[str, nn.Module] = OrderedDict()
    pooled = PATCHES.index(patch)
    for stage, out in enumerate((dim // 8, dim // 4, dim // 2, dim)):
        conv, fires = Convolution(channels, out), last_fires or stage < STAGES - 1
        made[f"conv{stage}"] = style.block(conv, packed=stage < STAGES - pooled) if fires else style.shortcut(conv)
        if stage >= STAGES - pooled:
            made[f"pool{stage}"] = Pool(nn.MaxPool2d(3, 2, 1), packed=style.packed and fires)
        channels = out
    return nn.Sequential(made)


@fx.wrap
def as_tokens(x: Tensor) -> Tensor:
    """[T, B, C, H, W] -> [T, B, H W, C]: with channels last the same memory."""
    return x.movedim(2, -1).flatten(2, 3)


class TokenMean(nn.Module):
    """The mean over the tokens, [T, B, L, C] -> [T, B, C]."""

    takes_time = True

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, C]."""
        return dense(x).mean(2)


class LinearNorm(TimeSequential):
    """Linear and BatchNorm over tokens, without neurons: currents [T, B, L, out] of [T, B, L, features]."""

    def __init__(self, features: int, out: int, style: Style, *, bias: bool) -> None:
        norm = (_SyncTokenNorm if style.sync else _TokenNorm)(out)
        super().__init__(OrderedDict(conv=SpikeLinear(features, out, bias=bias), norm=norm))


class _TokensLast(Leaf):
    """A BatchNorm of tokens [N, L, C], whose channels come last."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C]: as images [N, C, L, 1] with channels last, which is the same memory."""
        if is_proxy(x):
            return self(x)
        return super().forward(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


class _TokenNorm(_TokensLast, nn.BatchNorm2d):
    def synchronised(self) -> nn.Module:
        """The same with its statistics shared among the processes (``trtkern.nn.convert_sync_norms``)."""
        made = _SyncTokenNorm(self.num_features, self.eps, self.momentum)
        for name, held in (*self.named_parameters(), *self.named_buffers()):
            setattr(made, name, held)
        return made.train(self.training)


class _SyncTokenNorm(_TokensLast, SyncBatchNorm):
    pass


def draw(model: nn.Module, *, convolutions: bool) -> None:
    """The first weights as in the published code: of a Linear, normal with standard deviation 0.02, cut off at 2, and
    biases 0; those of a convolution likewise, or as torch draws them."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not convolutions:
            layer.reset_parameters()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
