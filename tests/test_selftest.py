"""The self-test with a fault planted: every output of every op in turn, half of it unwritten, must be seen."""

import itertools
from dataclasses import replace

import pytest
import torch

import trtkern.backends
from trtkern import selftest
from trtkern.backends import named
from trtkern.backends.base import PARAMS, RegularizerSpec
from trtkern.selftest import Cell, NormCell, compare, compare_norm, compare_regularizer, worst

NAME = "damaged"
SIZES = {"timesteps": 18, "shape": (2, 3, 6)}
SPEC = RegularizerSpec(6, 1e-5, 0.25, 1e-5)
UNWRITTEN = 0xA5  # of integers; of the others NaN

CELLS = {
    "lif": Cell(learnable="channel", **SIZES),
    "lif, h": Cell(torch.bfloat16, reset="soft", learnable="scalar", returned="h", **SIZES),
    "lif, lengths": Cell(learnable="channel", lengths=(4, 18), **SIZES),
    "norm": NormCell(learnable="channel", **SIZES),
    "norm, h": NormCell(reset="soft", learnable="scalar", returned="h", **SIZES),
    "norm, running": NormCell(training=False, **SIZES),
    "norm, residual": NormCell(residual="dense", **SIZES),
    "norm, words": NormCell(residual="packed", **SIZES),
    "norm, pooled": NormCell(timesteps=5, shape=(2, 3, 4, 6), pool=True),
}


def run(cell):
    """Whether the self-test is content with it."""
    return (compare_norm if isinstance(cell, NormCell) else compare)(NAME, cell).within(cell.dtype)


def spoil(t):
    """As if the second half of it had been left as it was."""
    t.view(-1)[t.numel() // 2 :] = torch.nan if t.dtype.is_floating_point else UNWRITTEN


@pytest.fixture
def damage(monkeypatch):
    """damage(op, find): the backend "damaged", which auto takes first, is the CPU's, but that what ``find(arguments)``
    hands out of each call of the op is spoilt; returns a list that grows with each thing that was."""
    real, spoilt = named("cpu"), []

    def plant(op=None, find=None):
        def damaged(*args):
            real.ops[op](*args)
            for t in find(args):
                if t is not None and t.numel():
                    spoil(t)
                    spoilt.append(op)

        ops = real.ops if op is None else {**real.ops, op: damaged}
        held = (replace(real, name=NAME, ops=ops), named("reference"))
        monkeypatch.setattr(trtkern.backends, "BACKENDS", held)
        return spoilt

    return plant


def faults():
    """(cell, op, what, find) for every output of the LIF and BatchNorm + LIF ops that a cell asks for."""
    for name, cell in CELLS.items():
        normed, learns = isinstance(cell, NormCell), cell.learnable != "none"
        forward = ["s", "v", "v_final", *["edges"] * (cell.timesteps > 16), *["packed"] * normed]
        for field in forward:
            yield name, "lif_forward", field, lambda args, field=field: [getattr(args[1], field)]
        for field in ("x", "v0"):
            yield name, "lif_backward", field, lambda args, field=field: [getattr(args[3], field)]
        for row, param in enumerate(PARAMS if learns else ()):
            yield name, "lif_backward", param, lambda args, row=row: [rows(args[3].params, row)]
        for field in ("weight", "bias", *["coef"] * cell.training) if normed else ():
            yield name, "lif_backward", f"norm {field}", lambda args, f=field: [args[4] and getattr(args[4], f)]
        for row in range(3) if normed else ():
            op = "batch_norm_lif_affine" if cell.training else "batch_norm_lif_finish"
            yield name, op, f"affine {row}", lambda args, row=row: [rows(args[3].affine, row)]
        for row in range(2) if normed and cell.training else ():
            yield name, "batch_norm_lif_affine", f"moments {row}", lambda args, row=row: [rows(args[3].moments, row)]
        for field in ("running_mean", "running_var") if normed and cell.training else ():
            yield name, "batch_norm_lif_affine", field, lambda args, field=field: [getattr(args[2], field)]
        if normed and not cell.training:
            yield name, "batch_norm_lif_finish", "coef", lambda args: [args[3].coef]
    yield "norm, residual", "batch_norm_lif_input_grad", "out", lambda args: [args[5]]
    yield "norm, words", "spikes_pack", "words", lambda args: [args[1]]
    yield "norm, words", "spikes_unpack", "out", lambda args: [args[3]]


def rows(t, row):
    return None if t is None else t[row]


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_without_a_fault_it_is_content(damage, cell):
    damage()
    assert run(cell)


FAULTS = list(faults())


@pytest.mark.parametrize(("cell", "op", "what", "find"), FAULTS, ids=[", ".join(fault[:3]) for fault in FAULTS])
def test_a_fault_in_an_output_is_seen(damage, cell, op, what, find):
    spoilt = damage(op, find)
    assert not run(CELLS[cell]) and spoilt


@pytest.mark.parametrize("what", ["value", "first", "last", "added"])
def test_a_fault_in_the_regularizer_is_seen(damage, what):
    def find(args):
        _, _, value, grads, accumulate, _ = args
        if what == "value":
            return [value]
        return [grads[0 if what == "first" else -1]] if accumulate == (what == "added") else []

    damage()
    assert compare_regularizer(NAME, SPEC) <= selftest.REGULARIZER_TOLERANCE
    spoilt = damage("regularizer", find)
    assert not compare_regularizer(NAME, SPEC) <= selftest.REGULARIZER_TOLERANCE and spoilt


def test_the_doctor_sees_a_fault(damage, monkeypatch):
    """Of an output that is the last number in a list of errors, where Python's max would drop a NaN."""
    spoilt = damage("lif_forward", lambda args: [args[1].v_final])
    monkeypatch.setattr(selftest, "BACKENDS", trtkern.backends.BACKENDS[:1])
    (row,) = selftest.run()
    assert row.ok is False and spoilt and "inf" in row.detail


def test_the_worst_of_several_errors():
    for errors in itertools.permutations((1e-7, torch.nan, 2.0)):
        assert worst(*errors) == torch.inf
    assert worst(1e-7, 2.0, 0.0) == 2.0
