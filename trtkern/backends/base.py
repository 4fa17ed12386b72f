"""What a backend is, and the shapes of what passes between the ops and every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.spec import CHUNK as CHUNK
from trtkern.spec import LIFSpec

__all__ = [
    "PARAMS", "Backend", "Case", "DelayGrads", "Delays", "Finish", "Finished", "LIFBackward", "LIFForward",
    "LIFGrads", "LIFInputs", "Norm", "NormGrads", "Pool", "RecurrentBackward", "RecurrentForward",
    "RecurrentInputs", "RegularizerSpec", "SpikeConvolution",
]  # fmt: skip

PARAMS = ("decay", "gain", "bias", "reset_amount", "v_threshold", "v_reset")
"""Rows of a parameter tensor of LIF, and of its gradient; ``spec.row.params`` has those of any neuron."""


class Norm(NamedTuple):
    """Makes the input current out of x: scale * (x - center) + shift (+ residual)."""

    affine: Tensor
    """[3, C] float32: center, scale, shift."""
    residual: Tensor | None
    """[T, ...] in x's dtype and layout."""


class Pool(NamedTuple):
    """How 2 x 2 neurons lie in memory; s and gs are then their averages, a quarter of the neurons."""

    row: int
    """Neurons of an image row; rows 2k and 2k + 1 are pooled."""
    side: int
    """Neurons side by side at each place of a row: 1, or the channels where they come last."""


class LIFInputs(NamedTuple):
    """What both directions read, checked: memory is [T, N] dense, time outermost, one storage order for all."""

    x: Tensor
    """[T, ...] in float32, bfloat16 or float16; a stride of 0 along time where it is the same at every step."""
    v0: Tensor | None
    """The state, [...] float32, of a neuron with several [S, ...]; None is zero."""
    params: Tensor | None
    """[P, C] float32, rows as in ``spec.row.params``; None when all are numbers."""
    scalars: tuple[float, ...]
    """The P numbers, used when ``params`` is None."""
    spec: LIFSpec
    """The choices of the neuron."""
    inner: int
    """The channel of neuron n, counted in storage order within a step, is ``(n // inner) % C``."""
    norm: Norm | None = None
    """None: x is the input current. Its C is that of params, where those are there."""
    pool: Pool | None = None
    """Where 2x2 averages of the spikes are made; None: they come out one by one."""
    before: bool = False
    """``LIFForward.v`` is h, the potential before the reset, and ``LIFGrads.v`` its gradient."""
    held: dict[str, Any] | None = None
    """What a backend keeps for the next launch that differs in addresses alone; None: there is none."""
    lengths: Tensor | None = None
    """int32 [B]: the steps of each sample, N / B neurons side by side; of later steps nothing is read, what is written
    for them is 0, and the state stays that after the last one. None: each has T."""


class LIFForward(NamedTuple):
    """What the forward pass writes; None is not wanted."""

    s: Tensor | None
    v: Tensor | None
    v_final: Tensor | None
    edges: Tensor | None
    """[edges * S, N] float32: the state after every ``chunk`` steps (what the backward pass restarts from)."""
    flag: Tensor | None
    """int32 [1], set to 1 if any h, or any v that is written in its dtype, is not finite; never cleared."""
    packed: Tensor | None = None
    """uint8 [ceil(T / 8), ...] in x's layout, never pooled: bit t % 8 of row t // 8 is the spike of step t."""


class LIFGrads(NamedTuple):
    """Gradients that come in; None is zero."""

    s: Tensor | None
    v: Tensor | None
    v_final: Tensor | None
    coef: Tensor | None = None
    """[3, C] float32: what is written for x is coef[0] * gx + coef[1] * (x - center) + coef[2]."""


class LIFBackward(NamedTuple):
    """What the backward pass writes; None is not wanted."""

    x: Tensor | None
    """[T, N] dense, also where x is the same at every step."""
    v0: Tensor | None
    params: Tensor | None
    sums: Tensor | None = None
    """float64 [2, C]: over steps and neurons, of gx and of gx * (x - center)."""


class RecurrentInputs(NamedTuple):
    """What both directions of neurons that feed each other read, checked: current[t] = x[t] + s[t-1] weight^T + bias,
    then the step of the neuron. Memory is contiguous."""

    x: Tensor
    """[T, B, N] in float32, bfloat16 or float16: forward what comes in, backward the current that forward wrote."""
    s0: Tensor | None
    """[B, N] in x's dtype: the spikes of the step before the first; None is zero."""
    v0: Tensor | None
    """The state, [B, N] float32, of a neuron with several [S, B, N]; None is zero."""
    weight: Tensor
    """[N, N] float32: weight[j, k] is from neuron k to neuron j."""
    bias: Tensor | None
    """[N] float32."""
    params: Tensor | None
    """[P, 1] or [P, N] float32, rows as in ``spec.row.params``; None when all are numbers."""
    scalars: tuple[float, ...]
    """The P numbers, used when ``params`` is None."""
    spec: LIFSpec
    """The choices of the neuron."""
    before: bool = False
    """``RecurrentForward.v`` is h, the potential before the reset, and ``LIFGrads.v`` its gradient."""


class RecurrentForward(NamedTuple):
    """What the forward pass writes; None is not wanted."""

    s: Tensor
    """[T, B, N] in x's dtype."""
    current: Tensor | None
    """[T, B, N] in x's dtype: the input current, which the neurons take as it is rounded here."""
    v: Tensor | None
    """[T, B, N] in x's dtype."""
    v_final: Tensor | None
    """[B, N] or [S, B, N] float32."""
    edges: Tensor | None
    """[edges * S, B * N] float32, as in ``LIFForward``."""
    flag: Tensor | None
    """int32 [1], as in ``LIFForward``."""
    packed: Tensor | None
    """uint8 [ceil(T / 8), B, N], as in ``LIFForward``."""


class RecurrentBackward(NamedTuple):
    """What the backward pass writes. The gradient that comes for s[t] is that of the caller plus gx[t+1] weight."""

    x: Tensor
    """[T, B, N] in x's dtype: the gradient of the current, which is that of x."""
    v0: Tensor | None
    """[B, N] or [S, B, N] float32; None is not wanted."""
    params: Tensor | None
    """[P, 1] or [P, N] float32; None is not wanted."""


class Finish(NamedTuple):
    """What statistics of a BatchNorm are finished with; tensors are [C], of any floating dtype."""

    weight: Tensor | None
    """The scale of the BatchNorm, [C]; None is 1."""
    bias: Tensor | None
    """Its shift, [C]; None is 0."""
    running_mean: Tensor | None
    """Moved in place, with what follows, unless a statistic is not finite; None: not moved."""
    running_var: Tensor | None
    """Moved as ``running_mean``."""
    batches: Tensor | None
    """int64 []: how many there were."""
    eps: float
    """Added to the variance."""
    momentum: float | None
    """None: the running statistics are plain averages over all batches."""
    samples: int
    """Numbers behind each mean; 0: it is a running one."""


class Finished(NamedTuple):
    """What finishing writes."""

    affine: Tensor
    """[3, C] float32: center, scale, shift."""
    moments: Tensor
    """[2, C] float64: the mean, and 1 / sqrt(variance + eps)."""
    coef: Tensor | None = None
    """[3, C] float32: scale, 0, 0: ``LIFGrads.coef`` with running statistics."""


class NormGrads(NamedTuple):
    """What the sums of a norm (``LIFBackward.sums``) are finished into."""

    affine: Tensor
    """As ``Finished`` has it."""
    moments: Tensor
    samples: int
    """Numbers behind each mean."""
    coef: Tensor | None
    """[3, C] float32, written: ``LIFGrads.coef`` with the statistics of a batch."""
    weight: Tensor | None
    """[C], written: the gradients of weight and bias, in their dtype."""
    bias: Tensor | None


class SpikeConvolution(NamedTuple):
    """A convolution over packed spikes: what is convolved, and how."""

    words: Tensor
    """[planes, B, C, H, W] uint8 with channels last: contiguous as [planes, B, H, W, C]; of a sum of spikes the words
    of each, [addends, planes, B, C, H, W]."""
    timesteps: int
    """T; image t * B + b of what is convolved is step t of sample b."""
    pooled: bool
    """The image is made of 2x2 averages of the words; an odd last row or column is dropped."""
    stride: tuple[int, int]
    """Rows and columns from one place of the window to the next."""
    padding: tuple[int, int]
    """Rows and columns of zeros around the image."""

    @property
    def image(self) -> tuple[int, int]:
        """(H, W) of what is convolved."""
        side = 2 if self.pooled else 1
        return self.words.shape[-2] // side, self.words.shape[-1] // side

    def output(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """(H, W) of what a kernel of that size makes of it."""
        sides = zip(self.image, kernel, self.stride, self.padding, strict=True)
        return tuple((side + 2 * pad - size) // step + 1 for side, size, step, pad in sides)


class Delays(NamedTuple):
    """How long each channel is delayed."""

    steps: Tensor
    """[C] float32: from 0 to ``most``. Others are held there, so that no other memory is read; NaN gives NaN."""
    inner: int
    """The channel of neuron n, counted in storage order within a step, is ``(n // inner) % C``."""
    most: int
    """The most steps that there may be."""
    rounded: bool
    """To whole steps."""


class DelayGrads(NamedTuple):
    """What the backward pass of a delay writes; None is not wanted."""

    x: Tensor | None
    """[T, N]."""
    v0: Tensor | None
    """[most, N]."""
    delays: Tensor | None
    """[C] float32."""


class RegularizerSpec(NamedTuple):
    """Hyper-parameters of ``R(w) = (lam / T) sum_t w^2 / (1 + (e^(delta t) - 1) (|w| + eps))``.

    Args:
        lam: strength of the penalty, >= 0.
        delta: how fast it fades over the steps, >= 0; 0 is plain L2.
        eps: >= 0, added to ``|w|``.
    """

    timesteps: int
    lam: float
    delta: float
    eps: float


class Case(NamedTuple):
    """What a backend is asked to run: an op family ("lif", "recurrent", ...) on a device, in a dtype."""

    op: str
    """The family of ops: "lif", "recurrent", "batch_norm_lif", "delay", "regularizer", ..."""
    device: str
    """"cpu", "cuda", ..."""
    dtype: torch.dtype
    """Of the input."""
    spec: LIFSpec | None = None
    """The choices of the neuron; None for an op without neurons."""
    T: int = 0
    """Steps; 0: not known, or not to be looked at."""
    N: int = 0
    """Neurons: the numbers of one step."""
    processors: int = 0
    """Multiprocessors of the GPU; 0: not known."""
    lengths: bool = False
    """Whether samples end before T, each at a step of its own."""


def _never(case: Case) -> None:
    """No case is better run here than where its turn comes."""


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    ``missing()`` says why it cannot be used on this machine and how to get it, or None; ``refuses(case)`` says why it
    does not take a case, or None; ``ops`` maps an op's name ("lif_forward", "lif_backward") to its function;
    ``prefers(case)`` says for what "auto" takes it before its turn, or None.
    """

    name: str
    """What ``backend=`` says."""
    missing: Callable[[], str | None]
    """Why it cannot be used on this machine and how to get it, or None."""
    refuses: Callable[[Case], str | None]
    """Why it does not take a case, or None."""
    ops: Mapping[str, Callable]
    """The function of each op that it holds."""
    prefers: Callable[[Case], str | None] = _never
    """For what "auto" takes it before its turn, or None."""

    def holds(self, family: str) -> bool:
        """Whether it has the ops of that family at all, on any machine."""
        return family in self.ops or f"{family}_forward" in self.ops or f"{family}_statistics" in self.ops

    def objection(self, case: Case) -> str | None:
        """Why this backend does not run the case here, or None when it does."""
        if not self.holds(case.op):
            return f"it does not hold {case.op}"
        return self.refuses(case) or self.missing()
