"""The triton backend: every op, on NVIDIA and AMD GPUs, and in Triton's interpreter on CPU tensors.

For the interpreter set ``TRITON_INTERPRET=1`` before Triton is first imported. It exists for tests and is slow.
Importing this file does not import Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trtkern import surrogates
from trtkern.backends.base import (
    Backend,
    Case,
    DelayGrads,
    Delays,
    Finish,
    Finished,
    LIFBackward,
    LIFForward,
    LIFGrads,
    LIFInputs,
    NormGrads,
    Pool,
    RecurrentBackward,
    RecurrentForward,
    RecurrentInputs,
    RegularizerSpec,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _gpu() -> bool:
    return torch.cuda.is_available()


def missing() -> str | None:
    """Why Triton cannot be used on this machine and how to get it; None when it can."""
    if not _installed():
        return "Triton is not installed; pip install 'trtkern[triton]'"
    if not _interpreted() and not _gpu():
        return (
            "torch sees no GPU here; install a torch build for your GPU and its driver "
            "(or set TRITON_INTERPRET=1 before starting Python, to run the kernels slowly on the CPU)"
        )
    return None


def refuses(case: Case) -> str | None:
    """Why this backend does not take a case; None when it does."""
    device = "cpu" if _interpreted() else "cuda"
    if case.device != device:
        hint = " in Triton's interpreter (TRITON_INTERPRET is set)" if _interpreted() else ""
        return f"it runs on {device} tensors{hint}, not on {case.device}"
    if case.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {case.dtype}"
    if case.op == "regularizer" and case.dtype != torch.float32:
        return f"its regularizer takes float32 parameters, not {case.dtype}"
    return None if case.spec is None else _refuses_surrogate(str(case.spec.surrogate))


@cache
def _refuses_surrogate(name: str) -> str | None:
    row = surrogates.lookup(name)
    if row.builtin:
        return None
    try:
        source = inspect.getsource(row.function)
    except (OSError, TypeError):
        return f"Triton compiles from source, and the surrogate {name!r} has no source file; define it in a file"
    if not source.lstrip().startswith(("def ", "@")):
        return f"Triton compiles functions, and the surrogate {name!r} is a lambda; define it with def"
    return None


@cache
def _kernels(name: str) -> ModuleType:
    """A file of ``trtkern.kernels``, whose import takes Triton's; an import statement in every call has its price."""
    return importlib.import_module(f"trtkern.kernels.{name}")


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's own device; Triton takes the current stream of that device."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    import numpy

    # The interpreter computes with numpy, which warns of what is silent on a GPU: NaN, overflow, division by zero.
    return numpy.errstate(all="ignore")


def lif_forward(inp: LIFInputs, out: LIFForward) -> None:
    """Fills ``out``: one launch."""
    if inp.x.numel():
        with _on(inp.x):
            _kernels("lif_launch").forward_launch(inp, out)()


def lif_backward(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward, norm: NormGrads | None = None
) -> None:
    """Fills ``out``: one launch, and one that adds up the parameters' gradients and the sums of the norm, and fills
    ``norm`` from the latter."""
    if out.sums is None:
        norm = None
    if not inp.x.numel():
        for total in (out.params, out.sums):
            if total is not None:
                total.zero_()
        if norm is not None and out.sums is not None:
            batch_norm_lif_coefficients(out.sums, None, norm)
        return
    with _on(inp.x):
        for launch in _kernels("lif_launch").backward_launches(inp, edges, grads, out, norm):
            launch()


def recurrent_forward(inp: RecurrentInputs, out: RecurrentForward) -> None:
    """Fills ``out``: one launch, and one that turns the weight; of many neurons a loop of steps."""
    launcher = _kernels("recurrent_launch")
    with _on(inp.x):
        if inp.x.shape[2] > launcher.LARGEST:
            what = ("forward", inp.scalars, inp.spec.token, inp.before)
            steps = _steps()
            steps.recorded(lambda: steps.forward(BACKEND.ops, inp, out), what, [*_tensors(inp), *out])
            return
        for launch in launcher.forward_launches(inp, out):
            launch()


def recurrent_backward(inp: RecurrentInputs, edges: Tensor | None, grads: LIFGrads, out: RecurrentBackward) -> None:
    """Fills ``out``: one launch, and one that adds up the parameters' gradients; of many neurons a loop of steps."""
    launcher = _kernels("recurrent_launch")
    with _on(inp.x):
        if inp.x.shape[2] > launcher.LARGEST:
            what, tensors = ("backward", inp.scalars, inp.spec.token, inp.before), [*_tensors(inp), edges, *grads, *out]
            steps = _steps()
            steps.recorded(lambda: steps.backward(BACKEND.ops, inp, edges, grads, out), what, tensors)
            return
        for launch in launcher.backward_launches(inp, edges, grads, out):
            launch()


@cache
def _steps() -> ModuleType:
    """What more neurons take than a program holds: few networks have so many."""
    return importlib.import_module("trtkern.backends._recurrent_steps")


def _tensors(inp: RecurrentInputs) -> tuple[Tensor | None, ...]:
    return inp.x, inp.s0, inp.v0, inp.weight, inp.bias, inp.params


def batch_norm_lif_statistics(x: Tensor, channels: int, inner: int, stats: Tensor) -> None:
    """stats [2, channels] float64: mean and sum of squared deviations of each channel of x [T, N]; two launches."""
    with _on(x):
        for launch in _kernels("batch_norm").statistics_launches(x, channels, inner, stats):
            launch()


def batch_norm_lif_affine(x: Tensor, inner: int, norm: Finish, out: Finished) -> None:
    """The statistics of each channel of x [T, N], finished: fills ``out``, moves the running ones; two launches."""
    with _on(x):
        for launch in _kernels("batch_norm").affine_launches(x, inner, norm, out):
            launch()


def batch_norm_lif_finish(mean: Tensor, var: Tensor, norm: Finish, out: Finished) -> None:
    """The same from a mean and a variance that are known, [C] each: one launch."""
    with _on(mean):
        _kernels("batch_norm_finish").known_launch(mean, var, norm, out)()


def batch_norm_lif_coefficients(sums: Tensor, own: Tensor | None, norm: NormGrads) -> None:
    """Fills ``norm`` from sums, float64 [2, C]; ``own``: those of this process, where ``sums`` are those of all: one
    launch."""
    with _on(sums):
        _kernels("batch_norm_finish").coefficients_launch(sums, own, norm)()


def batch_norm_lif_input_grad(gx: Tensor, x: Tensor, affine: Tensor, coef: Tensor, inner: int, out: Tensor) -> None:
    """out = coef[0] * gx + coef[1] * (x - center) + coef[2]: one launch."""
    if gx.numel():
        with _on(gx):
            _kernels("batch_norm").input_gradient_launch(gx, x, affine, coef, inner, out)()


def spikes_pack(s: Tensor, words: Tensor) -> None:
    """words [ceil(T / 8), N] uint8, bit t % 8 of plane t // 8 being s[t] != 0: one launch."""
    if s.numel():
        with _on(s):
            _kernels("spikes").pack_launch(s, words)()


def spikes_unpack(words: Tensor, start: int, pool: Pool | None, out: Tensor) -> None:
    """The spikes of the steps from ``start`` on, or their averages over 2 x 2 neurons: one launch."""
    if out.numel():
        with _on(out):
            _kernels("spikes").unpack_launch(words, start, pool, out)()


def regularizer(
    weights: list[Tensor],
    spec: RegularizerSpec,
    value: Tensor,
    grads: list[Tensor] | None,
    accumulate: bool,
    scale: float,
) -> None:
    """Fills ``value`` with R(weights); writes scale * dR/dw to ``grads``, or adds it: one launch and one sum."""
    if not any(w.numel() for w in weights):
        value.zero_()
        return
    with _on(weights[0]):
        launch, partial = _kernels("regularizer").regularizer_launch(weights, spec, grads, accumulate, scale)
        launch()
        torch.sum(partial, 0, out=value)


def delay_forward(x: Tensor, v0: Tensor | None, delay: Delays, out: Tensor) -> None:
    """out [T, N]: x delayed, v0 [most, N] being what came before: one launch."""
    if x.numel():
        with _on(x):
            _kernels("delay").forward_launch(x, v0, delay, out)()


def delay_backward(g: Tensor, x: Tensor | None, v0: Tensor | None, delay: Delays, out: DelayGrads) -> None:
    """Fills ``out``: one launch, and a sum where the delays have a gradient."""
    if not g.numel():
        if out.delays is not None:
            out.delays.zero_()
        return
    with _on(g):
        launch, sums = _kernels("delay").backward_launch(g, x, v0, delay, out)
        launch()
        if out.delays is not None and sums is not None:
            out.delays.copy_(sums.view(-1, delay.steps.numel(), delay.inner).sum((0, 2)))


BACKEND = Backend(
    name="triton",
    missing=missing,
    refuses=refuses,
    ops={
        "lif_forward": lif_forward,
        "lif_backward": lif_backward,
        "recurrent_forward": recurrent_forward,
        "recurrent_backward": recurrent_backward,
        "batch_norm_lif_statistics": batch_norm_lif_statistics,
        "batch_norm_lif_affine": batch_norm_lif_affine,
        "batch_norm_lif_finish": batch_norm_lif_finish,
        "batch_norm_lif_coefficients": batch_norm_lif_coefficients,
        "batch_norm_lif_input_grad": batch_norm_lif_input_grad,
        "spikes_pack": spikes_pack,
        "spikes_unpack": spikes_unpack,
        "regularizer": regularizer,
        "delay_forward": delay_forward,
        "delay_backward": delay_backward,
    },
)
