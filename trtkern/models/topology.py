"""Networks of a topology string, "CONVAP-64-3-1-1_RES-128-3=3-2=1-1=1_L-10": its grammar, and what is built of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from trtkern.models._blocks import CONNECT, Convolution, LinearLIF, Pool, ResidualBlock, SEWBlock, Style, windows
from trtkern.models._network import SpikingNetwork
from trtkern.names import nearest
from trtkern.nn import SpikeLinear

_CONV = ("out", "k", "stride", "pad")
_RES = ("out", "k1=k2", "s1=s2", "p1=p2")
# What a token's fields are called, and those that may be left out together.
_GRAMMAR: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("CONV", "CONVAP", "CONVEN"), (_CONV, ("pk", "ps", "pp"))),
    "CONVNP": (_CONV, ()),
    **dict.fromkeys(("RES", *(f"SEWRES~{connect}" for connect in CONNECT)), (_RES, ())),
    **dict.fromkeys(("FC", "FCBN", "L"), (("n",), ())),
}
_LINEAR = ("FC", "FCBN", "L")
_POOL = (2, 2, 0)
_SHOWN = 40  # characters on either side of what is wrong


@dataclass(frozen=True)
class Token:
    """A layer of a topology: its name, and its numbers by the names of their fields, a pair for "k1=k2"."""

    head: str
    fields: dict[str, tuple[int, ...]]
    number: int = field(default=1, compare=False)
    """Which token of the string it is, from 1."""
    column: int = field(default=0, compare=False)
    """Where in the string it begins, from 0."""

    def __str__(self) -> str:
        return "-".join([self.head, *("=".join(map(str, numbers)) for numbers in self.fields.values())])


def parse_topology(topology: str) -> tuple[Token, ...]:
    """The tokens of a topology string; ``"_".join(map(str, tokens))`` is the string again.

    Layers are separated by "_", the fields of a layer by "-" (one at the end of a layer is passed over):

    - CONV-out-k-stride-pad[-pk-ps-pp]: convolution, BatchNorm, LIF, maximum pooling (2-2-0 unless given).
    - CONVAP: with average pooling; CONVNP: without pooling; CONVEN, first only: the same as CONV on an image.
    - RES-out-k1=k2-s1=s2-p1=p2: residual block, added before the neurons.
    - SEWRES~ADD-..., SEWRES~AND-..., SEWRES~IAND-...: SEW block.
    - FC-n: Linear and LIF. FCBN-n: Linear without bias, BatchNorm, LIF. L-n: the readout, Linear, at the end.

    Args:
        topology: tokens with ``_`` between them.

    Raises:
        TypeError: no string.
        ValueError: a token that is wrong, or where it must not be: which one, its column, what was expected.
    """
    if not isinstance(topology, str):
        raise TypeError(f"from_topology: expected a topology as a string, got {topology!r}")
    tokens: list[Token] = []
    column = 0
    for number, text in enumerate(topology.split("_"), 1):
        tokens.append(_token(topology, number, column, text))
        column += len(text) + 1
    for before, token in itertools.pairwise((None, *tokens)):
        if token is None:
            continue
        if before is not None and before.head in _LINEAR and token.head not in _LINEAR:
            _refuse(topology, token, f"FC-n or L-n behind {before}", str(token))
        if before is not None and token.head == "CONVEN":
            _refuse(topology, token, "CONVEN as the first token only; use CONV", str(token))
        if (token.head == "L") != (token is tokens[-1]):
            wanted = "L-n, the readout, as the last token" if token is tokens[-1] else "L-n as the last token only"
            _refuse(topology, token, wanted, str(token))
    return tuple(tokens)


def _token(topology: str, number: int, column: int, text: str) -> Token:
    head, *texts = text.split("-")
    place = Token(head, {}, number, column)
    if head not in _GRAMMAR:
        _refuse(topology, place, f"a layer from {', '.join(_GRAMMAR)}", head, nearest(head, _GRAMMAR))
    needed, optional = _GRAMMAR[head]
    if texts and not texts[-1]:
        texts = texts[:-1]
    if len(texts) not in (len(needed), len(needed) + len(optional)):
        form = "-".join([head, *needed]) + (f"[-{'-'.join(optional)}]" if optional else "")
        _refuse(topology, place, form, text)
    fields = {}
    column += len(head) + 1
    for name, value in zip((*needed, *optional), texts, strict=False):
        pair = "=" in name
        least = 0 if name in ("pad", "pp", "p1=p2") else 1
        parts = value.split("=")
        if len(parts) != 1 + pair or not all(p.isascii() and p.isdecimal() and int(p) >= least for p in parts):
            kind = f"two integers >= {least} with = between them" if pair else f"an integer >= {least}"
            _refuse(topology, Token(head, {}, number, column), f"{name} of {head} to be {kind}", value)
        fields[name] = tuple(map(int, parts))
        column += len(value) + 1
    return Token(head, fields, number, place.column)


def with_readout(layers: str, classes: int) -> str:
    """The topology with L-classes, its readout, behind it, unless it has one.

    Raises:
        TypeError: no string.
        ValueError: a readout of another number of classes.
    """
    if not isinstance(layers, str):
        raise TypeError(
            f'from_topology: expected layers as a string such as "CONVAP-64-3-1-1_FC-256", got {layers!r}; a list of '
            f'channels belongs to the model "conv"'
        )
    *before, last = layers.split("_")
    if last.split("-")[0] != "L":
        return f"{layers}_L-{classes}"
    token = _token(layers, len(before) + 1, len(layers) - len(last), last)
    if token.fields["n"] != (classes,):
        _refuse(layers, token, f"L-{classes}, a readout of the {classes} classes of the data, or none", str(token))
    return layers


def _refuse(topology: str, at: Token, expected: str, got: str, hint: str = "") -> NoReturn:
    """A ValueError with a caret below the place."""
    start, end = max(at.column - _SHOWN, 0), at.column + _SHOWN
    shown = f"{'...' if start else ''}{topology[start:end]}{'...' if end < len(topology) else ''}"
    caret = " " * (at.column - start + 3 * (start > 0)) + "^"
    raise ValueError(
        f"from_topology: token {at.number}, column {at.column + 1}: expected {expected}, got {got!r}{hint}\n"
        f"    {shown}\n    {caret}"
    )


def from_topology(
    topology: str,
    *,
    shape: tuple[int, int, int],
    timesteps: int = 4,
    checkpoint: bool = False,
    packed: bool = True,
    exact_convolutions: bool = False,
    **lif: Any,
) -> SpikingNetwork:
    """The network that a topology string says (``parse_topology``), of convolutions without bias.

    A residual block has a 1x1 convolution with BatchNorm as its shortcut where its two strides or the channels differ.
    Before the first FC, FCBN or L, what a residual block gives is averaged over the image, anything else flattened.

    Args:
        topology: such as "CONVAP-64-3-1-1_CONVAP-128-3-1-1_L-10".
        shape: (C, H, W) of an image or frame.
        timesteps: T; an image is shown T times, and the first convolution runs on it once.
        checkpoint: keep no convolution's output; the backward pass convolves once more (``ConvBatchNormLIF``).
        packed: keep bits instead of dense spikes.
        exact_convolutions: torch's own kernels compute also what packed spikes are convolved with (``SpikingNetwork``).
        lif: settings of the neurons: decay, surrogate, backend, ... (``LIF``); neuron: a class of spiking
            neurons (``LIF``, ``CUBALIF``, ...), or its name; sync: share the statistics of BatchNorm among processes.

    Raises:
        TypeError, ValueError: a token that is wrong or that the image does not fit, another kind of shape.
    """
    tokens = parse_topology(topology)
    sides = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"from_topology: expected shape as three integers (C, H, W) >= 1, got {shape!r}")
    building = _Building(topology, Style.of(checkpoint, packed, **lif), sides[0], (sides[1], sides[2]))
    for token, following in itertools.pairwise(tokens):
        building.add(token, following)
    (classes,) = tokens[-1].fields["n"]
    classifier = SpikeLinear(building.features(), classes)
    return SpikingNetwork(
        building.layers,
        classifier,
        timesteps=timesteps,
        topology="_".join(str(token) for token in tokens),
        flat=tokens[0].head in _LINEAR,
        exact_convolutions=exact_convolutions,
    )


class _Building:
    """A network of which some layers stand: these, and (C, H, W) behind them."""

    def __init__(self, topology: str, style: Style, channels: int, size: tuple[int, int]) -> None:
        self.topology, self.style = topology, style
        self.channels, self.size = channels, size
        self.layers: list[nn.Module] = []

    def features(self) -> int:
        return self.channels * self.size[0] * self.size[1]

    def add(self, token: Token, following: Token) -> None:
        if token.head in ("FC", "FCBN"):
            (out,) = token.fields["n"]
            features, normed = self.features(), token.head == "FCBN"
            self.layers.append(self.style.linear(features, out) if normed else LinearLIF(features, out, self.style))
            self.channels, self.size = out, (1, 1)
        elif token.head.startswith("CONV"):
            self._conv(token)
        else:
            average = following.head in _LINEAR
            self._residual(token, packed=not average)
            if average:
                self.layers.append(Pool(nn.AdaptiveAvgPool2d(1)))
                self.size = (1, 1)

    def _conv(self, token: Token) -> None:
        out, kernel, stride, padding = (token.fields[name][0] for name in _CONV)
        conv = Convolution(self.channels, out, kernel, stride, padding)
        size = self._fits(token, conv.size(self.size))
        pool = tuple(token.fields[name][0] for name in ("pk", "ps", "pp") if name in token.fields) or _POOL
        if token.head == "CONVNP":
            pool = (1, 1, 0)
        pk, ps, pp = pool
        if pp > pk // 2:
            _refuse(self.topology, token, f"pp of at most half of pk={pk}", str(token))
        behind = self._fits(token, windows(size, pk, ps, pp))
        # The kernels pool 2x2 averages themselves.
        fused = token.head == "CONVAP" and pool == _POOL
        plain = pool == (1, 1, 0)
        self.layers.append(self.style.block(conv, pool=2 if fused else 1, packed=fused or plain))
        if not (fused or plain):
            average = token.head == "CONVAP"
            pooling = nn.AvgPool2d(pk, ps, pp) if average else nn.MaxPool2d(pk, ps, pp)
            self.layers.append(Pool(pooling, packed=self.style.packed and not average))
        self.channels, self.size = out, behind

    def _residual(self, token: Token, *, packed: bool) -> None:
        (out,) = token.fields["out"]
        kernels, strides, paddings = (token.fields[name] for name in _RES[1:])
        first = Convolution(self.channels, out, kernels[0], strides[0], paddings[0])
        second = Convolution(out, out, kernels[1], strides[1], paddings[1])
        size = self._fits(token, second.size(self._fits(token, first.size(self.size))))
        shortcut, aside = None, self.size
        if strides[0] != strides[1] or self.channels != out:
            shortcut = Convolution(self.channels, out, 1, strides[0] * strides[1], 0)
            aside = shortcut.size(self.size)
        if size != aside:
            expected = f"convolutions that keep the {_pixels(aside)} pixels of the shortcut"
            _refuse(self.topology, token, expected, f"{token}, which makes {_pixels(size)}")
        head, _, connect = token.head.partition("~")
        if head == "RES":
            self.layers.append(ResidualBlock(first, second, shortcut, self.style, packed=packed))
        else:
            self.layers.append(SEWBlock(first, second, shortcut, self.style, connect))
        self.channels, self.size = out, size

    def _fits(self, token: Token, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            expected = f"a layer that fits {_pixels(self.size)} pixels"
            _refuse(self.topology, token, f"{expected}; use a larger image or fewer strides and poolings", str(token))
        return size


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
