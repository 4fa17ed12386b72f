"""What the compiled code of neurons that feed each other does on GPUs that are not here: spills, bytes, compiles."""

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

FORWARD, BACKWARD = "recurrent_forward", "recurrent_backward"
ELEMENT = {"float32": 4, "bfloat16": 2}
ROWS, SAMPLES, LANES = 8, 4, 4


@pytest.fixture(scope="module")
def aot() -> dict[str, Any]:
    """The report of ``aot_recurrent.py``, which must not run in the interpreter as the tests here do."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_recurrent.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture
def rows(aot) -> list[dict[str, Any]]:
    return [{**row, **{way: {int(w): n for w, n in row[way].items()} for way in ("loads", "stores")}}
            for row in aot["rows"]]  # fmt: skip


def test_everything_compiles_everywhere(rows):
    for target in ("sm_80", "sm_90", "gfx942"):
        assert {row["kernel"] for row in rows if row["target"] == target} == {FORWARD, BACKWARD, "turn_weight"}


def test_no_spills(rows):
    """Up to 1024 neurons, with two states and gradients of a parameter a neuron."""
    assert {row["N"] for row in rows} == {512, 513, 1024}
    assert not [(row["kernel"], row["target"], row["N"], row["spilled"]) for row in rows if row["spilled"]]
    for row in rows:
        assert row["target"] == "gfx942" or row["registers"] * row["threads"] <= 1 << 16


def plain(rows: list[dict[str, Any]], kernel: str) -> list[dict[str, Any]]:
    """Of 512 neurons with numbers for parameters, as training runs them, on sm_90."""
    found = [
        row for row in rows
        if row["kernel"] == kernel and row["N"] == 512 and not row["params"] and row["target"] == "sm_90"
    ]  # fmt: skip
    assert {row["dtype"] for row in found} == set(ELEMENT)
    return found


def total(*accesses: tuple[int, int]) -> dict[int, int]:
    """(width, count) added up."""
    found: dict[int, int] = {}
    for width, count in accesses:
        found[width] = found.get(width, 0) + count
    return found


def test_bytes_of_a_step_forward(rows):
    """x is read once: the first step before the loop, the next one in it. current and s are written once. Of the weight
    a row for each spike is read once, ROWS in flight. Beside them the list, its numbers and their count, is written and
    read; the base of the sums, the edges and the flag belong to no step."""
    for row in plain(rows, FORWARD):
        wide = ELEMENT[row["dtype"]] * LANES
        assert row["loads"] == total((wide, 2), (16, 1 + ROWS), (4, 1 + ROWS)), row
        assert row["stores"] == total((wide, 2), (16, 1), (4, 2 * LANES + 1)), row


def test_bytes_of_a_step_backward(rows):
    """For each sample: current is read twice, once to compute the states again, gs once, gx is written once, a state
    and ``passed`` are written and the state is read; the weight's rows are read once for all samples, with a number of
    ``passed`` for each row and sample. The edges belong to no step."""
    for row in plain(rows, BACKWARD):
        wide = ELEMENT[row["dtype"]] * LANES
        edges = 16, SAMPLES
        loads = (wide, 3 * SAMPLES), (16, SAMPLES), (16, ROWS), (4, ROWS * SAMPLES), edges
        assert row["loads"] == total(*loads), row
        assert row["stores"] == total((wide, SAMPLES), (16, 2 * SAMPLES)), row


def test_one_block_of_threads_a_sample(rows):
    for row in rows:
        if row["kernel"] == FORWARD:
            assert row["grid"] == [6]
        if row["kernel"] == BACKWARD:
            # Of 6 samples 4 a program, then 2; where accesses are narrow and neurons many, 2 a program.
            assert row["grid"] in ([2], [3]), row
    assert [2] in [row["grid"] for row in rows if row["kernel"] == BACKWARD]


def test_what_is_handed_over(rows):
    """A list forward, the states again and gx backward. On NVIDIA GPUs the barrier of the block orders memory (the
    others are those of the running sum); on AMD's the stores are waited for in front of it, and no load stands
    between."""
    handed = {FORWARD: 1, BACKWARD: 2, "turn_weight": 0}
    for row in rows:
        if row["target"] == "gfx942":
            assert row["handed"] == handed[row["kernel"]], row
        else:
            assert row["barriers"] >= handed[row["kernel"]] and (row["kernel"] != BACKWARD or row["barriers"] == 2), row


def test_addresses_are_64_bits_wide_and_nothing_is_contracted(rows):
    for row in rows:
        assert row["int32_products"] == 0 and row["contractable"] == 0, row


def test_one_compile_for_each_class(aot):
    """128, 256, 512 or 1024 lanes, times N a multiple of 16 or not: T, B and N within a class are run-time numbers."""
    assert aot["compiles"] == {FORWARD: 8, BACKWARD: 8, "turn_weight": 1}
