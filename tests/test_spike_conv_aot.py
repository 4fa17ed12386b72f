"""What the compiled code of spike convolutions does on GPUs that are not here: spills, widths, bytes, units."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

FORWARD, GRADIENT = "spike_conv_forward", "spike_conv_weight_gradient"
PART = {"ieee": 4, "half": 2, "bf16x3": 6, "int8x3": 3}
"""Bytes of a weight, in three parts where it is cut."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The report of ``aot_spike_conv.py``, which must not run in the interpreter as the tests here do."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_spike_conv.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    return [{**row, "loads": widths(row["loads"]), "stores": widths(row["stores"])} for row in found]


def widths(accesses: dict[str, int]) -> dict[int, int]:
    return {int(width): count for width, count in accesses.items()}


def loaded(row: dict[str, Any]) -> int:
    """Bytes that the threads of a program load, each instruction once."""
    return row["threads"] * sum(width * count for width, count in row["loads"].items())


def spike_bytes(row: dict[str, Any]) -> int:
    """Of a tile: a byte for all steps of a neuron."""
    return row["BLOCK_P"] * row["BLOCK_C"] * (4 if row["POOL"] else 1)


def other_bytes(row: dict[str, Any]) -> int:
    """The tile of the weight, or of the gradient, whose float32 is cut in registers."""
    if row["kernel"] == FORWARD:
        return row["BLOCK_C"] * row["BLOCK_K"] * PART[row["PRECISION"]]
    return row["BLOCK_P"] * row["STEPS"] * row["BLOCK_K"] * (2 if row["PRECISION"] == "half" else 4)


def test_everything_compiles_everywhere(rows):
    for target in ("sm_80", "sm_90", "gfx942"):
        here = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in here} == {FORWARD, GRADIENT, "split_weight", "add_ranges"}
        assert {row["PRECISION"] for row in here if row["kernel"] == FORWARD} == set(PART)
        assert {row["PRECISION"] for row in here if row["kernel"] == GRADIENT} == {"ieee", "half", "bf16x3"}


def test_no_spills_and_it_fits(rows):
    """Into the registers, and into the shared memory of a block: 99 KiB on the smallest GPU with these tensor cores."""
    assert not [row for row in rows if row["spilled"]]
    for row in rows:
        assert row["registers"] <= 255 or row["target"] == "gfx942"
        assert row["shared"] <= (64 << 10 if row["target"] == "gfx942" else 99 << 10), row


def test_what_multiplies(rows):
    kinds = {"half": ("bf16",), "bf16x3": ("bf16",), "int8x3": ("s8", "i8")}
    for row in rows:
        if row["kernel"] in (FORWARD, GRADIENT) and row["PRECISION"] in kinds:
            assert row["units"], row
            assert all(any(kind in unit for kind in kinds[row["PRECISION"]]) for unit in row["units"]), row
            assert all("wgmma" in unit for unit in row["units"]) or row["target"] != "sm_90"
        elif row["target"] != "gfx942":
            assert row["units"] == []


def test_a_bit_a_spike(rows):
    """A program loads a byte of spikes for all its steps of a neuron, each weight once, and nothing else."""
    counted = [row for row in rows if row["plain"] and row["PRECISION"] != "int8x3"]
    assert {row["STEPS"] for row in counted} == {4, 8} and {row["POOL"] for row in counted} == {False, True}
    for row in counted:
        assert loaded(row) == spike_bytes(row) + other_bytes(row), row


def test_a_bit_a_spike_of_digits(rows):
    """The same beside the scale of a column, which is loaded as the bias is: the difference that a bias makes."""
    plain, biased = (
        [
            row for row in rows
            if row["PRECISION"] == "int8x3" and row["plain"] and row["target"] == "sm_90" and row["bias"] is bias
        ]
        for bias in (False, True)
    )  # fmt: skip
    assert len(plain) == 2 and len(biased) == 1
    scale = loaded(biased[0]) - loaded(plain[0])
    assert scale > 0
    for row in plain:
        assert loaded(row) == spike_bytes(row) + other_bytes(row) + scale, row


def test_accesses_are_16_bytes_wide_in_the_aligned_class(rows):
    """Weights, gradients and outputs; the bytes of the spikes are so few that a thread has 1 to 8 of them."""
    for row in rows:
        if row["kernel"] in (FORWARD, GRADIENT) and row["ALIGNED"] and row["target"] != "gfx942":
            assert set(row["stores"]) == {16}, row
            if row["plain"]:
                assert row["loads"][16] * 16 * row["threads"] == other_bytes(row), row


def test_the_unaligned_class_moves_no_more(rows):
    unaligned = [row for row in rows if row["ALIGNED"] is False and row["kernel"] in (FORWARD, GRADIENT)]
    assert {row["PRECISION"] for row in unaligned} == set(PART)
    assert all(max(row["loads"]) <= 4 and max(row["stores"]) <= 4 for row in unaligned)
