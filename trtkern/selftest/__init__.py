"""Every cell of every backend against float64: what ``doctor``, the tests and docs/backends.md run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trtkern import neurons
from trtkern.backends import BACKENDS
from trtkern.backends.base import Backend, Case, RegularizerSpec
from trtkern.selftest.delay import DelayCell, DelayErrors, compare_delay
from trtkern.selftest.lif import MARGIN, PARAMETER_TOLERANCE, TOLERANCE, Cell, Errors, cells, compare, worst
from trtkern.selftest.norm import NormCell, NormErrors, compare_norm, norm_cells
from trtkern.selftest.recurrent import RecurrentCell, RecurrentErrors, compare_recurrent
from trtkern.selftest.regularizer import REGULARIZER_TOLERANCE, compare_regularizer
from trtkern.selftest.spike_conv import compare_spike_conv, spike_kernels
from trtkern.spec import LIFSpec

__all__ = [
    "MARGIN", "PARAMETER_TOLERANCE", "REGULARIZER_TOLERANCE", "TOLERANCE", "Cell", "DelayCell", "DelayErrors", "Errors",
    "NormCell", "NormErrors", "RecurrentCell", "RecurrentErrors", "Row", "cells", "compare", "compare_delay",
    "compare_norm", "compare_recurrent", "compare_regularizer", "device_of", "norm_cells", "run", "worst",
]  # fmt: skip


class Row(NamedTuple):
    """One line of the doctor: ok is None for a backend that is not available here, with the reason as detail."""

    name: str
    """Of the backend, or of what else is tried."""
    ok: bool | None
    """Whether it is right; None where it is not available."""
    detail: str
    """What was tried, or what is missing."""


def device_of(backend: Backend) -> str:
    """The device on which a backend that is available can be tried.

    Args:
        backend: one that is available here.
    """
    for device in ("cuda", "cpu"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        if backend.objection(Case("lif", device, torch.float32, LIFSpec())) is None:
            return device
    raise RuntimeError(f"selftest: backend {backend.name} is available but takes no device")


def run() -> list[Row]:
    """Try every backend that is available here on a handful of cells; takes about a second, on a GPU half a minute for
    the first time, when Triton compiles."""
    return [_row(backend) for backend in BACKENDS]


def _row(backend: Backend) -> Row:
    try:
        reason = backend.missing()
    except ValueError as error:  # a setting, such as TRTKERN_CPU_ISA, that asks for what is not there
        return Row(backend.name, False, str(error))
    if reason is not None:
        return Row(backend.name, None, reason)
    device = device_of(backend)
    trial = [
        Cell(dtype, surrogate, reset, learnable="channel", timesteps=timesteps, shape=(2, 3, 11), returned=returned)
        for dtype, returned in ((torch.float32, "v"), (torch.bfloat16, "h"))
        for surrogate, reset, timesteps in (("triangle", "hard", 4), ("sigmoid", "soft", 17), ("atan", "none", 1))
    ]
    others = [
        Cell(surrogate="atan", reset="soft", learnable="channel", timesteps=9, shape=(2, 3, 11), neuron=name)
        for name in neurons.TABLE
        if name != "LIF"
    ]
    lengths = (17, 0, 5, 16)
    padded = [
        Cell(reset="soft", learnable="channel", timesteps=17, shape=(4, 3, 11), neuron=name, lengths=lengths)
        for name in ("LIF", "CUBALIF")
        if backend.refuses(Case("lif", device, torch.float32, LIFSpec(), lengths=True)) is None
    ]
    try:
        for cell in (*trial, *others, *padded):
            errors = compare(backend.name, cell, device)
            if not errors.within(cell.dtype):
                return Row(backend.name, False, f"{cell} on {device}: {errors}")
        tried = [f"{len(trial)} LIF cells", f"{len(others)} of other neurons"]
        if padded:
            tried.append(f"{len(padded)} with lengths")
        if backend.holds("batch_norm_lif"):
            normed = [
                NormCell(residual="packed", learnable="channel", shape=(2, 3, 11)),
                NormCell(torch.bfloat16, "sigmoid", "soft", timesteps=17, shape=(2, 3, 11)),
                NormCell(surrogate="atan", training=False, shape=(2, 3, 4, 6), pool=True),
            ]
            for cell in normed:
                found = compare_norm(backend.name, cell, device)
                if not found.within(cell.dtype):
                    return Row(backend.name, False, f"{cell} on {device}: {found}")
            tried.append(f"{len(normed)} of BatchNorm + LIF")
        if "recurrent_forward" in backend.ops:  # the reference is what the others are compared with
            fed = RecurrentCell("ALIF", timesteps=9, batch=2, size=5)
            seen = compare_recurrent(backend.name, fed, device)
            if not seen.within(fed.dtype):
                return Row(backend.name, False, f"{fed} on {device}: {seen}")
            tried.append("neurons that feed each other")
        if backend.holds("regularizer"):
            worst = compare_regularizer(backend.name, RegularizerSpec(6, 1e-5, 0.25, 1e-5), device)
            if not worst <= REGULARIZER_TOLERANCE:
                return Row(backend.name, False, f"regularizer on {device}: relative error {worst:.1e}")
            tried.append("the regulariser")
        if backend.holds("delay"):
            delayed = [DelayCell(), DelayCell(torch.bfloat16, shape=(2, 3, 4), rounded=True)]
            for each in delayed:
                off = compare_delay(backend.name, each, device)
                if not off.within(each.dtype):
                    return Row(backend.name, False, f"{each} on {device}: {off}")
            tried.append(f"{len(delayed)} of delays")
        if backend.name == "cpu":
            kernels, wrong = compare_spike_conv()
            if wrong:
                return Row(backend.name, False, f"convolutions of packed spikes: {wrong}")
            tried.append(f"convolutions of packed spikes ({', '.join(kernels)})")
    except Exception as error:  # a backend that cannot even run is what the doctor is for
        return Row(backend.name, False, f"{type(error).__name__} on {device}: {error}")
    detail = f"{', '.join(tried[:-1])} and {tried[-1]}"
    said = f"{detail} agree with float64 on {device}"
    return Row(backend.name, True, f"{said}; {spike_kernels()}" if backend.name == "cpu" else said)
