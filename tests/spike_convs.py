"""Convolutions over packed spikes for the tests of their kernels: a case, what float64 makes of it, a launch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

_cpu = __import__("pytest").importorskip("trtkern._cpu")
LAST = torch.channels_last


@dataclass
class Convolution:
    """Numbers of a convolution over packed spikes of a rate, and its tensors, drawn from a seed."""

    C: int = 64
    K: int = 64
    H: int = 6
    W: int = 6
    T: int = 4
    B: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    rate: float = 0.2
    pool: int = 1
    addends: int = 1
    odd: int = 0
    """Rows and columns of the words that pooling drops."""
    bias: bool = False
    last: bool = True
    """The weight lies with channels last."""
    words: Tensor = field(init=False)
    values: Tensor = field(init=False)
    """What is convolved, float64 [T * B, C, H, W]."""
    weight: Tensor = field(init=False)
    added: Tensor | None = field(init=False)
    g: Tensor = field(init=False)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(sum(map(int, (self.C, self.K, self.H, self.W, self.T, self.B))))
        high, wide = self.pool * self.H + self.odd, self.pool * self.W + self.odd
        shape = (self.addends, self.T, self.B, high, wide, self.C)
        spikes = torch.rand(shape, generator=made) < self.rate
        planes = (self.T + 7) // 8
        self.words = torch.zeros((self.addends, planes, *shape[2:]), dtype=torch.uint8)
        for t in range(self.T):
            self.words[:, t // 8] |= spikes[:, t].to(torch.uint8) << t % 8
        images = spikes.double().sum(0).flatten(0, 1).permute(0, 3, 1, 2)
        self.values = F.avg_pool2d(images, 2) if self.pool == 2 else images
        weight = torch.randn(self.K, self.C, *self.kernel, generator=made)
        self.weight = weight.contiguous(memory_format=LAST) if self.last else weight
        self.added = torch.randn(self.K, generator=made) if self.bias else None
        self.g = torch.randn(self.expected().shape, generator=made).contiguous(memory_format=LAST)

    def expected(self) -> Tensor:
        """y, in float64."""
        bias = None if self.added is None else self.added.double()
        return F.conv2d(self.values, self.weight.double(), bias, self.stride, self.padding)

    def expected_weight_grad(self) -> Tensor:
        """The gradient of the weight, in float64."""
        return torch.nn.grad.conv2d_weight(self.values, self.weight.shape, self.g.double(), self.stride, self.padding)

    def arguments(self, kernel: str, threads: int = 1):
        """The arguments of a launch, without what it writes."""
        a = _cpu.SpikeConvArgs()
        a.words, a.weight, a.g = self.words.data_ptr(), self.weight.data_ptr(), self.g.data_ptr()
        a.bias = 0 if self.added is None else self.added.data_ptr()
        for name in ("T", "B", "C", "K", "H", "W", "addends", "pool"):
            setattr(a, name, getattr(self, name))
        a.words_h, a.words_w = self.words.shape[3:5]
        a.out_h, a.out_w = self.g.shape[-2:]
        for name in ("kernel", "stride", "padding"):
            for side, value in zip("hw", getattr(self, name), strict=True):
                setattr(a, f"{name}_{side}", value)
        a.weight_k, a.weight_c, a.weight_h, a.weight_w = self.weight.stride()
        a.kernel, a.threads = _cpu.SPIKE_KERNELS.index(kernel), threads
        return a

    def forward(self, kernel: str, threads: int = 1) -> Tensor | None:
        """y by the kernel; None where a weight is not finite."""
        y = torch.full_like(self.g, float("nan"))
        a = self.arguments(kernel, threads)
        a.y = y.data_ptr()
        return y if _cpu.spike_conv_forward(a) else None

    def weight_grad(self, kernel: str, threads: int = 1) -> Tensor | None:
        """The gradient of the weight by the kernel; None where a gradient is not finite."""
        gweight = torch.full_like(self.weight, float("nan"))
        a = self.arguments(kernel, threads)
        a.gweight = gweight.data_ptr()
        return gweight if _cpu.spike_conv_weight_grad(a) else None

    def expected_input_grad(self) -> Tensor:
        """The gradient of what is convolved, in float64."""
        weight, g = self.weight.double(), self.g.double()
        return torch.nn.grad.conv2d_input(self.values.shape, weight, g, self.stride, self.padding)

    def input_grad(self, kernel: str, threads: int = 1) -> Tensor | None:
        """The gradient of what is convolved by the kernel; None where a number is not finite."""
        gx = torch.full(self.values.shape, float("nan")).contiguous(memory_format=LAST)
        a = self.arguments(kernel, threads)
        a.words, a.gx = 0, gx.data_ptr()
        return gx if _cpu.spike_conv_input_grad(a) else None

    def takes(self, kernel: str, which: int) -> bool:
        """Whether the kernel, with the instruction set in use, takes these sizes in a pass of SPIKE_PASSES."""
        return _cpu.spike_conv_takes(self.arguments(kernel), which)
