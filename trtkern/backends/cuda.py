"""The CUDA backend: ``trtkern._cuda``, hand-written kernels for NVIDIA GPUs: neurons, and BatchNorm + neuron."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trtkern.backends import _args
from trtkern.backends.base import (
    CHUNK,
    Backend,
    Case,
    Finish,
    Finished,
    LIFBackward,
    LIFForward,
    LIFGrads,
    LIFInputs,
    NormGrads,
)


@cache
def _extension() -> ModuleType:
    """The extension; an ImportError if it was not built. It loads without a GPU and without a driver."""
    return importlib.import_module("trtkern._cuda")


@cache
def missing() -> str | None:
    """Why the kernels cannot be used on this machine and how to get them; None when they can."""
    try:
        extension = _extension()
    except ImportError as error:
        return (
            f"trtkern._cuda was not built or does not load ({error}); install the CUDA toolkit (nvcc) and install "
            "trtkern again with TRTKERN_CUDA=1"
        )
    if (reason := _args.stale(extension)) is not None:
        return reason
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; use triton"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here; install a CUDA build of torch and the NVIDIA driver"
    return None


def refuses(case: Case) -> str | None:
    """Why this backend does not take the case, or None."""
    if case.lengths and case.device == "cuda":
        return "its kernels know no lengths; use triton"
    refused = _args.refuses(case, "cuda")
    if refused is not None or case.spec is None or case.spec.builtin:
        return refused
    if not case.spec.row.builtin:
        return f"it holds the built-in neurons, not {case.spec.neuron}; use triton or reference"
    return f"it holds the built-in surrogates, not {case.spec.surrogate}; use triton or reference"


THREADS = 64
"""Of a block; ``csrc/cuda/index.h`` has the same number (a test compares them)."""


SMALL = 4 << 20
"""Bytes of x up to which a launch is over before the host has prepared the next one: a GPU of 2 TB/s and more moves the
five tensors of a forward and a backward pass in 10 us."""


def prefers(case: Case) -> str | None:
    """For what "auto" takes this backend before triton, or None: long sequences of few neurons, and small tensors.

    On small tensors the time of a call is the host's, and both backends move the same bytes: the one whose launches
    cost the host less is taken (``trtkern bench --op overhead``).
    """
    if case.N == 0 or case.op not in ("lif", "batch_norm_lif") or refuses(case) is not None:
        return None
    if reads_ahead(case):
        wide = 16 // case.dtype.itemsize
        return (
            f"it reads ahead where few neurons run for many steps: T = {case.T}, and N = {case.N} makes "
            f"{-(-case.N // (wide * THREADS))} blocks for {case.processors} multiprocessors"
        )
    size = case.T * case.N * case.dtype.itemsize
    return None if size > SMALL else f"its launches cost the host less, and x has {max(1, size >> 10)} KiB"


def reads_ahead(case: Case) -> bool:
    """Whether ``ahead`` in ``csrc/lif/cuda_choice.h`` takes the kernels that read ahead: a plain LIF, more steps than a
    chunk, and fewer blocks of 16-byte packs than the GPU has multiprocessors."""
    if case.op != "lif" or case.T <= CHUNK or (case.spec is not None and case.spec.neuron != "LIF"):
        return False
    wide = 16 // case.dtype.itemsize
    return -(-case.N // (wide * THREADS)) < case.processors and case.N % (wide // 4) == 0


def lif_forward(inp: LIFInputs, out: LIFForward) -> None:
    """Fill what ``out`` asks for: one launch on the current stream of x's device.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    extension = _extension()
    args = _args.forward(extension, inp, out)
    args.device, args.stream, args.processors = _place(inp.x)
    extension.lif_forward(args)


def lif_backward(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward, norm: NormGrads | None = None
) -> None:
    """Fill ``out``: one launch, and a small one when it asks for sums or parameters (repeatable bitwise), which fills
    ``norm`` too, from the sums of ``out``.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    if edges is None and inp.x.shape[0] > (most := inp.spec.chunk):
        raise RuntimeError(
            f"lif: expected edges for T > {most}, got none for T = {inp.x.shape[0]}; run the forward pass with them"
        )
    extension = _extension()
    args = _args.backward(extension, inp, edges, grads, out)
    args.device, args.stream, args.processors = _place(inp.x)
    if out.params is None and out.sums is None:
        extension.lif_backward(args)
        return
    finish = None if norm is None or out.sums is None else _args.norm_grads(extension, norm, out.sums)
    workspace = _workspace(extension.workspace_floats(args), inp.x)
    extension.lif_backward(args, workspace.data_ptr(), finish)


def lif_again(inp: LIFInputs) -> tuple[Callable[[tuple], None], Callable[[tuple], None]]:
    """What launches the forward and the backward pass again for other tensors, in the order of ``csrc/lif/fields.h``,
    of the same sizes and numbers, without parameters; outputs that are v are h where ``inp.before``."""
    extension, stream = _extension(), _stream
    args, forward, backward = _args.fixed(extension, inp), extension.lif_forward_at, extension.lif_backward_at
    args.device, _, args.processors = _place(inp.x)
    device = args.device
    return (
        lambda tensors: forward(args, tensors, stream(device)),
        lambda tensors: backward(args, tensors, stream(device)),
    )


def batch_norm_lif_again(inp: LIFInputs, norm: Finish, channels: int) -> tuple[Callable, Callable, Callable]:
    """What makes the statistics of y and finishes them, or finishes running ones (``norm.samples`` 0), for tensors in
    the order of ``csrc/norm/fields.h``; and the two passes as ``lif_again``, the backward one with the tensors that its
    sums are finished into, or None."""
    extension, stream, x = _extension(), _stream, inp.x
    args, forward, backward = _args.fixed(extension, inp), extension.lif_forward_at, extension.lif_backward_at
    args.device, _, args.processors = _place(x)
    device, grads = args.device, _args.fixed_norm_grads(extension, norm, channels)
    room = partial(torch.empty, dtype=torch.float32, device=x.device)
    if norm.samples:
        finish = _args.fixed_finish(extension, norm, channels, torch.float64)
        sequence = _args.sequence(extension, x, channels, inp.inner)
        sequence.device, sequence.processors = args.device, args.processors

        def first(y: Tensor, tensors: tuple) -> None:
            extension.batch_norm_lif_affine_at(sequence, (y,), stream(device), room, finish, tensors)
    else:
        of_running = norm._replace(running_mean=None, running_var=None, batches=None)
        assert norm.running_mean is not None
        finish = _args.fixed_finish(extension, of_running, channels, norm.running_mean.dtype)

        def first(y: Tensor, tensors: tuple) -> None:
            made = finish.at(tensors)
            made.device, made.stream = device, stream(device)
            extension.batch_norm_lif_finish(made)

    def back(tensors: tuple, finished: tuple | None) -> None:
        if finished is None:
            backward(args, tensors, stream(device))
        else:
            backward(args, tensors, stream(device), room, grads, finished)

    return first, (lambda tensors: forward(args, tensors, stream(device))), back


def batch_norm_lif_statistics(x: Tensor, channels: int, inner: int, stats: Tensor) -> None:
    """Mean and sum of squared deviations of each channel of x [T, N] into ``stats``, float64 [2, C]: two launches.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    args, workspace = _statistics(x, channels, inner)
    _extension().batch_norm_lif_statistics(args, stats.data_ptr(), workspace.data_ptr())


def batch_norm_lif_affine(x: Tensor, inner: int, norm: Finish, out: Finished) -> None:
    """The statistics of each channel of x [T, N], finished: fill ``out``, and move the running ones: two launches.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    args, workspace = _statistics(x, out.affine.shape[1], inner)
    _extension().batch_norm_lif_affine(args, _args.finish(_extension(), norm, out), workspace.data_ptr())


def batch_norm_lif_finish(mean: Tensor, var: Tensor, norm: Finish, out: Finished) -> None:
    """The same from a mean and a variance that are known, [C] each: one launch.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    args = _args.finish(_extension(), norm, out, mean, var)
    args.device, args.stream, _ = _place(out.affine)
    _extension().batch_norm_lif_finish(args)


def batch_norm_lif_coefficients(sums: Tensor, own: Tensor | None, norm: NormGrads) -> None:
    """Fill ``norm`` from sums, float64 [2, C]; ``own``: those of this process, where ``sums`` are those of all: one
    launch.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    args = _args.norm_grads(_extension(), norm, sums, own)
    args.device, args.stream, _ = _place(sums)
    _extension().batch_norm_lif_coefficients(args)


def batch_norm_lif_input_grad(gx: Tensor, x: Tensor, affine: Tensor, coef: Tensor, inner: int, out: Tensor) -> None:
    """out = coef[0] * gx + coef[1] * (x - affine[0]) + coef[2], all [T, N]; x may be the same at every step.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    args = _args.sequence(_extension(), x, affine.shape[1], inner)
    args.gs, args.affine, args.coef, args.gx = (t.data_ptr() for t in (gx, affine, coef, out))
    args.device, args.stream, args.processors = _place(x)
    _extension().batch_norm_lif_input_grad(args)


def _statistics(x: Tensor, channels: int, inner: int) -> tuple[Any, Tensor]:
    """The arguments of the statistics of x, and their scratch."""
    extension = _extension()
    args = _args.sequence(extension, x, channels, inner)
    args.device, args.stream, args.processors = _place(x)
    return args, _workspace(extension.statistics_workspace_floats(args), x)


def _workspace(floats: int, x: Tensor) -> Tensor:
    """Scratch on x's device, to be held until the launch.

    Freed when the caller returns, which is safe: the caching allocator reuses it on this stream only, after the
    kernels.
    """
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def _place(x: Tensor) -> tuple[int, int, int]:
    """The tensor's device, that device's current stream, and how many multiprocessors it has."""
    device = x.get_device()
    return device, _stream(device), processors(device)


def _stream(device: int) -> int:
    """The device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


@cache
def processors(device: int) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


BACKEND = Backend(
    name="cuda",
    missing=missing,
    refuses=refuses,
    ops={
        "lif_forward": lif_forward,
        "lif_backward": lif_backward,
        "lif_again": lif_again,
        "batch_norm_lif_again": batch_norm_lif_again,
        "batch_norm_lif_statistics": batch_norm_lif_statistics,
        "batch_norm_lif_affine": batch_norm_lif_affine,
        "batch_norm_lif_finish": batch_norm_lif_finish,
        "batch_norm_lif_coefficients": batch_norm_lif_coefficients,
        "batch_norm_lif_input_grad": batch_norm_lif_input_grad,
    },
    prefers=prefers,
)
