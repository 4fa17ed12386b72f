"""The CPU backend: ``trtkern._cpu``, C++ with OpenMP; AVX-512, AVX2 or plain vectors, chosen at run time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trtkern.backends import _args, _spike_kernels
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
    SpikeConvolution,
)


@cache
def _extension() -> ModuleType:
    """The extension, using the instruction set that TRTKERN_CPU_ISA names (default: the best).

    Raises:
        ImportError: it was not built.
        ValueError: TRTKERN_CPU_ISA names no set that this processor runs.
    """
    extension = import_module("trtkern._cpu")  # after torch, whose OpenMP threads it then shares
    extension.use_isa(os.environ.get("TRTKERN_CPU_ISA", ""))
    return extension


@cache
def missing() -> str | None:
    """Why the extension cannot be used, or None; a ValueError if TRTKERN_CPU_ISA asks for what is not there."""
    try:
        extension = _extension()
    except ImportError as error:
        return f"trtkern._cpu was not built or does not load ({error}); install g++ and install trtkern again"
    return _args.stale(extension)


def refuses(case: Case) -> str | None:
    """Why this backend does not take the case, or None."""
    if case.op in ("regularizer", "spike_conv") and case.device == "cpu":
        return None if case.dtype == torch.float32 else f"it takes float32 parameters, not {case.dtype}"
    refused = _args.refuses(case, "cpu")
    if refused is not None or case.spec is None or case.spec.builtin or missing() is not None:
        return refused
    return import_module("trtkern.backends._compiled").objection(_extension(), case.spec)


def lif_forward(inp: LIFInputs, out: LIFForward) -> None:
    """Fill what ``out`` asks for."""
    extension = _extension()
    args = _args.forward(extension, inp, out)
    args.threads = torch.get_num_threads()
    extension.lif_forward(args)


def lif_backward(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward, norm: NormGrads | None = None
) -> None:
    """Fill ``out``: the gradients of x and, where wanted, of v0 and of the parameters (repeatable bitwise); and
    ``norm``, from the sums of ``out``."""
    extension = _extension()
    args = _args.backward(extension, inp, edges, grads, out)
    args.threads = torch.get_num_threads()
    if norm is None or out.sums is None:
        extension.lif_backward(args)
    else:
        extension.lif_backward(args, _args.norm_grads(extension, norm, out.sums))


def lif_again(inp: LIFInputs) -> tuple[Callable[[tuple], None], Callable[[tuple], None]]:
    """What launches the forward and the backward pass again for other tensors, in the order of ``csrc/lif/fields.h``,
    of the same sizes and numbers; outputs that are v are h where ``inp.before``."""
    extension, threads = _extension(), torch.get_num_threads
    args, forward, backward = _args.fixed(extension, inp), extension.lif_forward_at, extension.lif_backward_at
    return (lambda tensors: forward(args, tensors, threads())), (lambda tensors: backward(args, tensors, threads()))


def lif_parameters(numbers: Sequence[float], learned: Sequence[tuple[int, int, str]], channels: int) -> Any:
    """What fills parameters [P, C] from float32 tensors, ``fill(params, tensors)``, and says whether these lie in their
    ranges.

    Args:
        numbers: one for each row.
        learned: of each row that a tensor has: which, how many numbers that has, their range (``checks.allowed``).
    """
    return _extension().ParamRows(list(numbers), list(learned), channels)


def batch_norm_lif_again(inp: LIFInputs, norm: Finish, channels: int) -> tuple[Callable, Callable, Callable]:
    """What makes the statistics of y and finishes them, or finishes running ones (``norm.samples`` 0), for tensors in
    the order of ``csrc/norm/fields.h``; and the two passes as ``lif_again``, the backward one with the tensors that its
    sums are finished into, or None."""
    extension, threads, x = _extension(), torch.get_num_threads, inp.x
    args, forward, backward = _args.fixed(extension, inp), extension.lif_forward_at, extension.lif_backward_at
    sequence, grads = _args_of(x, channels, inp.inner), _args.fixed_norm_grads(extension, norm, channels)
    affine, known = extension.batch_norm_lif_affine_at, extension.batch_norm_lif_finish
    if norm.samples:
        finish = _args.fixed_finish(extension, norm, channels, torch.float64)

        def first(y: Tensor, tensors: tuple) -> None:
            affine(sequence, (y,), threads(), finish, tensors)
    else:
        of_running = norm._replace(running_mean=None, running_var=None, batches=None)
        assert norm.running_mean is not None
        finish = _args.fixed_finish(extension, of_running, channels, norm.running_mean.dtype)

        def first(y: Tensor, tensors: tuple) -> None:
            known(finish.at(tensors))

    def back(tensors: tuple, finished: tuple | None) -> None:
        if finished is None:
            backward(args, tensors, threads())
        else:
            backward(args, tensors, threads(), grads, finished)

    return first, (lambda tensors: forward(args, tensors, threads())), back


def _args_of(x: Tensor, channels: int = 1, inner: int = 1) -> Any:
    """The sizes of x [T, N], and the threads to use."""
    args = _args.sequence(_extension(), x, channels, inner)
    args.threads = torch.get_num_threads()
    return args


def batch_norm_lif_statistics(x: Tensor, channels: int, inner: int, stats: Tensor) -> None:
    """Mean and sum of squared deviations of each channel of x [T, N] into ``stats``, float64 [2, C]."""
    _extension().batch_norm_lif_statistics(_args_of(x, channels, inner), stats.data_ptr())


def batch_norm_lif_affine(x: Tensor, inner: int, norm: Finish, out: Finished) -> None:
    """The statistics of each channel of x [T, N], finished: fill ``out``, and move the running ones."""
    args = _args.finish(_extension(), norm, out)
    _extension().batch_norm_lif_affine(_args_of(x, out.affine.shape[1], inner), args)


def batch_norm_lif_finish(mean: Tensor, var: Tensor, norm: Finish, out: Finished) -> None:
    """The same from a mean and a variance that are known, [C] each: running ones, or those of all processes."""
    _extension().batch_norm_lif_finish(_args.finish(_extension(), norm, out, mean, var))


def batch_norm_lif_coefficients(sums: Tensor, own: Tensor | None, norm: NormGrads) -> None:
    """Fill ``norm`` from sums, float64 [2, C]; ``own``: those of this process, where ``sums`` are those of all."""
    _extension().batch_norm_lif_coefficients(_args.norm_grads(_extension(), norm, sums, own))


def batch_norm_lif_input_grad(gx: Tensor, x: Tensor, affine: Tensor, coef: Tensor, inner: int, out: Tensor) -> None:
    """out = coef[0] * gx + coef[1] * (x - affine[0]) + coef[2], all [T, N]; x may be the same at every step."""
    args = _args_of(x, affine.shape[1], inner)
    args.gs, args.affine, args.coef, args.gx = (t.data_ptr() for t in (gx, affine, coef, out))
    _extension().batch_norm_lif_input_grad(args)


def spikes_pack(s: Tensor, words: Tensor) -> None:
    """Bit t % 8 of words [ceil(T / 8), N] plane t // 8 is 1 where s [T, N] is not 0 at step t."""
    args = _args_of(s)
    args.s, args.packed = s.data_ptr(), words.data_ptr()
    _extension().spikes_pack(args)


def all_spikes(x: Tensor) -> bool:
    """Whether a contiguous float32 x is 0 or 1 everywhere."""
    return _extension().all_spikes(x.data_ptr(), x.numel(), torch.get_num_threads())


def spikes_unpack(words: Tensor, start: int, pool: Pool | None, out: Tensor) -> None:
    """Steps ``start``, ... of the words into ``out`` [steps, N] as 0 and 1, or with a pool averages [steps, N / 4]."""
    args = _args_of(out)
    args.s, args.packed, args.N = out.data_ptr(), words.data_ptr(), words.numel() // words.shape[0]
    if pool is not None:
        args.pool_row, args.pool_side = pool
    _extension().spikes_unpack(args, start)


def _delays(x: Tensor, delay: Delays) -> Any:
    """The sizes of a launch over x [T, N], and its delays."""
    args = _extension().DelayArgs()
    args.T, args.N, args.dtype = x.shape[0], x.numel() // x.shape[0], _args.DTYPES[x.dtype]
    args.delays, args.C, args.inner = delay.steps.data_ptr(), delay.steps.numel(), delay.inner
    args.most, args.rounded, args.threads = delay.most, delay.rounded, torch.get_num_threads()
    return args


def delay_forward(x: Tensor, v0: Tensor | None, delay: Delays, out: Tensor) -> None:
    """out [T, N]: x delayed, v0 [most, N] being what came before."""
    args = _delays(x, delay)
    args.x, args.v0, args.out = x.data_ptr(), _address(v0), out.data_ptr()
    _extension().delay_forward(args)


def delay_backward(g: Tensor, x: Tensor | None, v0: Tensor | None, delay: Delays, out: DelayGrads) -> None:
    """Fill ``out`` from the gradient g [T, N]; x and v0 are those of the forward pass, for the delays' gradient."""
    args = _delays(g, delay)
    args.g, args.x, args.v0 = g.data_ptr(), _address(x), _address(v0)
    args.gx, args.gv0, args.gdelays = map(_address, out)
    _extension().delay_backward(args)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _spike_conv(conv: SpikeConvolution, weight: Tensor, out: Sequence[int], kernel: str | None = None) -> Any:
    """The sizes of a convolution over packed spikes, and the kernel that computes it."""
    args = _extension().SpikeConvArgs()
    _, args.B, args.C, args.words_h, args.words_w = conv.words.shape[-5:]
    args.words, args.T = conv.words.data_ptr(), conv.timesteps
    args.pool, args.addends = 2 if conv.pooled else 1, 1 if conv.words.dim() == 5 else conv.words.shape[0]
    args.H, args.W = conv.image
    args.out_h, args.out_w = out
    args.K, _, args.kernel_h, args.kernel_w = weight.shape
    args.stride_h, args.stride_w = conv.stride
    args.padding_h, args.padding_w = conv.padding
    args.weight_k, args.weight_c, args.weight_h, args.weight_w = weight.stride()
    args.threads = torch.get_num_threads()
    if kernel is not None:
        args.kernel = _extension().SPIKE_KERNELS.index(kernel)
    return args


def spike_conv_forward(conv: SpikeConvolution, weight: Tensor, bias: Tensor | None, y: Tensor, kernel: str) -> bool:
    """Fill y [T * B, K, out_h, out_w], channels last; False where a weight is not finite: y means nothing then."""
    args = _spike_conv(conv, weight, y.shape[2:], kernel)
    args.weight, args.y, args.bias = weight.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr()
    return _extension().spike_conv_forward(args)


def spike_conv_weight_grad(conv: SpikeConvolution, g: Tensor, gweight: Tensor, kernel: str) -> bool:
    """Fill gweight [K, C, kernel_h, kernel_w] from g [T * B, K, out_h, out_w], channels last; False where one of g is
    not finite."""
    args = _spike_conv(conv, gweight, g.shape[2:], kernel)
    args.g, args.gweight = g.data_ptr(), gweight.data_ptr()
    return _extension().spike_conv_weight_grad(args)


def spike_conv_input_grad(conv: SpikeConvolution, g: Tensor, weight: Tensor, gx: Tensor, kernel: str) -> bool:
    """Fill gx [T * B, C, H, W] from g [T * B, K, out_h, out_w], both channels last; False where one of g or of the
    weights is not finite. The words are not looked at."""
    args = _spike_conv(conv, weight, g.shape[2:], kernel)
    args.g, args.weight, args.gx = g.data_ptr(), weight.data_ptr(), gx.data_ptr()
    return _extension().spike_conv_input_grad(args)


def spike_conv_image_kernel(conv: SpikeConvolution, weight: Tensor) -> str | None:
    """Which kernel is to compute the gradient of the image, or None where torch is."""
    return _spike_kernels.of_image(_extension(), _spike_conv(conv, weight, conv.output(weight.shape[2:])))


def spike_conv_kernel(conv: SpikeConvolution, weight: Tensor, *, weight_grad: bool) -> tuple[str | None, str]:
    """Which kernel is to compute it, or None where torch is; and why."""
    args = _spike_conv(conv, weight, conv.output(weight.shape[2:]))
    return _spike_kernels.choose(_extension(), args, weight_grad=weight_grad)


def spike_conv_kernels(conv: SpikeConvolution, weight: Tensor) -> list[str]:
    """The kernels of the instruction set in use that take these sizes in both directions."""
    found = []
    for kernel in _extension().SPIKE_KERNELS:
        args = _spike_conv(conv, weight, conv.output(weight.shape[2:]), kernel)
        if all(_extension().spike_conv_takes(args, which) for which in range(2)):
            found.append(kernel)
    return found


def spike_conv_described() -> str:
    """Which kernels compute on packed spikes on this machine."""
    return _spike_kernels.described(_extension())


def recurrent_forward(inp: RecurrentInputs, out: RecurrentForward) -> None:
    """Fill what ``out`` asks for."""
    extension = _extension()
    made = LIFForward(out.s, out.v, out.v_final, out.edges, out.flag, out.packed)
    args = _args.recurrent(extension, inp, out.current, _args.forward, made)
    args.threads = torch.get_num_threads()
    extension.recurrent_forward(args, inp.x.shape[2], (inp.x, inp.s0, inp.weight, inp.bias))


def recurrent_backward(inp: RecurrentInputs, edges: Tensor | None, grads: LIFGrads, out: RecurrentBackward) -> None:
    """Fill ``out``; the same bits for any number of threads."""
    extension = _extension()
    args = _args.recurrent(extension, inp, inp.x, _args.backward, edges, grads, LIFBackward(*out))
    args.threads = torch.get_num_threads()
    extension.recurrent_backward(args, inp.x.shape[2], (None, None, inp.weight, None))


def recurrent_weight_grad(words: Tensor, gx: Tensor, gweight: Tensor) -> bool:
    """Fill gweight [N, N] float32 with the sum over steps and samples of gx[t] s[t]^T, from float32 gx [T, B, N] and
    the words of s [ceil(T / 8), B, N]; False where a kernel for it is not there, or one of gx is not finite."""
    conv = SpikeConvolution(words[..., None, None], gx.shape[0], False, (1, 1), (0, 0))
    weight = gweight[..., None, None]
    kernel, _ = spike_conv_kernel(conv, weight, weight_grad=True)
    kernels = [kernel] if kernel else spike_conv_kernels(conv, weight)[:1]
    g = gx.flatten(0, 1)[..., None, None]
    return bool(kernels) and spike_conv_weight_grad(conv, g, weight, kernels[0])


def regularizer(
    weights: list[Tensor],
    spec: RegularizerSpec,
    value: Tensor,
    grads: list[Tensor] | None,
    accumulate: bool,
    scale: float,
) -> None:
    """R(w) into ``value``; its gradient times ``scale`` written, or added, to ``grads`` in the same pass."""
    total = _extension().regularizer(
        weights=[weight.data_ptr() for weight in weights],
        sizes=[weight.numel() for weight in weights],
        grads=[] if grads is None else [grad.data_ptr() for grad in grads],
        timesteps=spec.timesteps,
        lam=spec.lam,
        delta=spec.delta,
        eps=spec.eps,
        accumulate=accumulate,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    # Not fill_, which raises where float32 cannot hold the total: that is inf here as on every backend.
    value.copy_(torch.tensor(total, dtype=torch.float64))


BACKEND = Backend(
    name="cpu",
    missing=missing,
    refuses=refuses,
    ops={
        "lif_forward": lif_forward,
        "lif_backward": lif_backward,
        "lif_again": lif_again,
        "lif_parameters": lif_parameters,
        "batch_norm_lif_again": batch_norm_lif_again,
        "batch_norm_lif_statistics": batch_norm_lif_statistics,
        "batch_norm_lif_affine": batch_norm_lif_affine,
        "batch_norm_lif_finish": batch_norm_lif_finish,
        "batch_norm_lif_coefficients": batch_norm_lif_coefficients,
        "batch_norm_lif_input_grad": batch_norm_lif_input_grad,
        "spikes_pack": spikes_pack,
        "spikes_unpack": spikes_unpack,
        "spike_conv_forward": spike_conv_forward,
        "spike_conv_weight_grad": spike_conv_weight_grad,
        "spike_conv_input_grad": spike_conv_input_grad,
        "recurrent_forward": recurrent_forward,
        "recurrent_backward": recurrent_backward,
        "recurrent_weight_grad": recurrent_weight_grad,
        "regularizer": regularizer,
        "delay_forward": delay_forward,
        "delay_backward": delay_backward,
    },
)
