"""The CUDA backend: ``trtkern._cuda``, hand-written kernels for NVIDIA GPUs; it holds LIF."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trtkern.backends import _args
from trtkern.backends.base import CHUNK, Backend, Case, LIFBackward, LIFForward, LIFGrads, LIFInputs


@cache
def _extension() -> ModuleType:
    """The extension; an ImportError if it was not built. It loads without a GPU and without a driver."""
    return importlib.import_module("trtkern._cuda")


@cache
def missing() -> str | None:
    """Why the kernels cannot be used on this machine and how to get them; None when they can."""
    try:
        _extension()
    except ImportError as error:
        return (
            f"trtkern._cuda was not built or does not load ({error}); install the CUDA toolkit (nvcc) and install "
            "trtkern again with TRTKERN_CUDA=1"
        )
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; use triton"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here; install a CUDA build of torch and the NVIDIA driver"
    return None


def refuses(case: Case) -> str | None:
    """Why this backend does not take the case, or None."""
    return _args.refuses(case, "cuda")


def lif_forward(inp: LIFInputs, out: LIFForward) -> None:
    """Fill what ``out`` asks for: one launch on the current stream of x's device.

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    extension = _extension()
    args = _args.forward(extension, inp, out)
    args.device, args.stream = _place(inp.x)
    extension.lif_forward(args)


def lif_backward(inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward) -> None:
    """Fill ``out``: one launch, and two small ones when the parameters want gradients (repeatable bitwise).

    Raises:
        RuntimeError: a CUDA error, with what to do.
    """
    if edges is None and inp.x.shape[0] > CHUNK:
        raise RuntimeError(
            f"lif: expected edges for T > {CHUNK}, got none for T = {inp.x.shape[0]}; run the forward pass with them"
        )
    extension = _extension()
    args = _args.backward(extension, inp, edges, grads, out)
    args.device, args.stream = _place(inp.x)
    if out.params is None:
        extension.lif_backward(args)
        return
    # Freed on return, which is safe: the caching allocator reuses it on this stream only, after the kernels.
    workspace = torch.empty(extension.workspace_floats(args), dtype=torch.float32, device=inp.x.device)
    extension.lif_backward(args, workspace.data_ptr())


def _place(x: Tensor) -> tuple[int, int]:
    """The tensor's device and that device's current stream."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


BACKEND = Backend(
    name="cuda", missing=missing, refuses=refuses, ops={"lif_forward": lif_forward, "lif_backward": lif_backward}
)
