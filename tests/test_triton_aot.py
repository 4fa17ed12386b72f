"""What Triton's compiled code does on GPUs that are not here: spills, width of accesses, bytes moved, compiles.

The counts are those of ``trtkern inspect``; what is expected of them stands here once more, without the traffic model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from trtkern.surrogates import BUILTIN

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
TENSORS = {"forward": 2, "backward": 3}  # x, s; x, gs, gx: the contract of docs/traffic.md
# The same behind a norm, tensors of x's size and of s's size: the two differ with pooling. A residual adds one each.
NORM = {"norm_forward": (1, 1), "norm_sums": (1, 1), "norm_input": (2, 1)}
RESIDUAL = {"norm_forward": 1, "norm_sums": 2, "norm_input": 0}  # it is read, and its gradient written
ELEMENTWISE = ("norm_statistics", "norm_input_grad", "spikes_packed", "spikes_unpacked")
DELAYS = ("delay_forward", "delay_backward")


@pytest.fixture(scope="module")
def aot() -> dict[str, Any]:
    """The report of ``aot_triton.py``, which must not run in the interpreter as the tests here do."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_triton.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def some_rows(aot: dict[str, Any], directions: Any, **wanted: Any) -> list[dict[str, Any]]:
    rows = [row for row in aot["rows"] if row["direction"] in directions]
    rows = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    assert rows
    return rows


def lif_rows(aot: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return some_rows(aot, TENSORS, **{"neuron": None, **wanted})


def nvidia(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["target"] != "gfx942"]


def test_everything_compiles_everywhere(aot):
    families = {*TENSORS, *NORM, *ELEMENTWISE, *DELAYS, "regularizer"}
    for target in ("sm_80", "sm_90", "gfx942"):
        assert {row["direction"] for row in aot["rows"] if row["target"] == target} == families
    classes = {(row["direction"], row["T"]) for row in lif_rows(aot, target="sm_90", dtype="float32", aligned=True)}
    assert classes == {(direction, T) for direction in TENSORS for T in (4, 8, 16, 40)}
    surrogates = {row.get("surrogate", BUILTIN[0]) for row in lif_rows(aot, direction="backward")}
    assert surrogates == {*BUILTIN, "own"}


def test_no_spills_and_no_other_problem(aot):
    assert not [(row["target"], row["direction"], row["problems"]) for row in aot["rows"] if row["problems"]]
    assert not [row for row in aot["rows"] if row["spilled"]]
    assert all(0 < row["registers"] <= 255 for row in nvidia(aot["rows"]))


def test_what_runs_between_the_passes_of_a_norm(aot):
    """It compiles for every type of the parameters (elsewhere than on sm_90 one kernel for each), without spills; roots
    and quotients are rounded correctly, nothing is contracted, and what the last program reads comes behind what the
    others wrote."""
    rows = aot["finishes"]
    for target in ("sm_80", "sm_90", "gfx942"):
        here = [row["kernel"] for row in rows if row["target"] == target]
        assert len(here) in ((4 * 7,) if target == "sm_90" else (7, 4 * 7))
        assert set(here) == {"merge_columns", "finish_known", "coefficients", "add_up"}
    assert not [row for row in rows if row["spilled"]]
    found = {operation for row in nvidia(rows) for operation in row["operations"]}
    assert found == {"div.rn.f64", "sqrt.rn.f64", "atom.global.gpu.acq_rel.add.u32"}


def test_what_takes_lengths_compiles(aot):
    """Half precision spills some beyond one chunk, where the end of each neuron is one number more to keep."""
    rows = aot["lengths"]
    assert len(rows) == 10 and not [row for row in rows if row["spilled"] > (48 if "bfloat16" in row["name"] else 0)]


def test_accesses_are_16_bytes_wide_in_the_aligned_class(aot):
    for row in lif_rows(aot, aligned=True):
        channels = row.get("channels", 0)
        # Besides x, s, gs, gx: the flag; the five parameters that are used (each lane's own if there are several
        # channels), and the six partial sums of a program if there is one channel (each lane's, 16 bytes, if several).
        loads = {0: {}, 1: {"4": 5}, 8: {"4": 5 * row["lanes"]}}[channels]
        stores = {"4": 1} if row["direction"] == "forward" else {"4": 6} if channels == 1 else {}
        assert {width: n for width, n in row["loads"].items() if width != "16"} == loads, row
        assert {width: n for width, n in row["stores"].items() if width != "16"} == stores, row


def test_bytes_per_neuron_step(aot):
    for row in lif_rows(aot):
        edges = 4 / 16 if row["T"] > 16 else 0
        expected = TENSORS[row["direction"]] * ELEMENT[row["dtype"]] + edges
        assert row["counted"] == row["contract"] == expected, row


@pytest.mark.parametrize("neuron", ["ALIF", "EIF", "CUBALIF"])
def test_bytes_of_other_neurons(aot, neuron):
    """The same; of two states there are edges of 8 bytes every 8 steps."""
    for row in some_rows(aot, TENSORS, neuron=neuron):
        edges = 8 / 8 if row["T"] > 8 else 0
        assert row["counted"] == row["contract"] == TENSORS[row["direction"]] * ELEMENT[row["dtype"]] + edges, row


def streams(row: dict[str, Any]) -> tuple[int, int]:
    """Tensors of x's size and of s's size that a kernel behind a norm moves; they differ with pooling."""
    dense, pooled = NORM[row["direction"]]
    if row.get("residual"):
        dense += RESIDUAL[row["direction"]]
    return (dense, pooled) if row["positions"] > 1 else (dense + pooled, 0)


def test_bytes_behind_a_norm(aot):
    for row in some_rows(aot, NORM):
        dense, pooled = streams(row)
        words = -(-row["T"] // 8) / row["steps"] if row.get("packed") else 0
        assert row["counted"] == row["contract"] == ELEMENT[row["dtype"]] * (dense + pooled / 4) + words, row


def test_bytes_of_a_thread_behind_a_norm(aot):
    """Tensors of x's size are moved in a loop over the positions that are pooled, those of s's size before or after."""
    for row in some_rows(aot, NORM):
        dense, pooled = streams(row)
        element = ELEMENT[row["dtype"]] * row["lanes"] * row["steps"]
        words = row["lanes"] * -(-row["T"] // 8) if row.get("packed") else 0
        # What does not grow with T: center, scale, shift (and coef) once a thread, or for each of its lanes where the
        # channels lie side by side; two sums likewise; the flag.
        each = row["lanes"] if row.get("pool") == "places" else 1
        fixed = 4 * {"norm_forward": 3 * each + 1, "norm_sums": 5 * each, "norm_input": 6 * each}[row["direction"]]
        expected = element * dense + element * pooled * row["positions"] / 4 + words + fixed
        assert moved(row, "loads") + moved(row, "stores") == expected, row


def moved(row: dict[str, Any], kind: str) -> int:
    """Bytes that the code of a thread loads or stores."""
    return sum(int(width) * count for width, count in row[kind].items())


def test_widths_behind_a_norm(aot):
    """16 bytes, but half of it in the backward pass where that many neurons do not fit: half precision with 16 steps,
    or pooled with channels last; float32 with both of these. With all three a quarter, and half in the forward pass."""
    for row in some_rows(aot, NORM):
        width = ELEMENT[row["dtype"]] * row["lanes"]
        reasons = (row["dtype"] == "bfloat16") + (row["T"] == 16) + (row.get("pool") == "places")
        assert width == 16 >> max(0, reasons - (2 if row["direction"] == "norm_forward" else 1)), row
        assert row["loads"][str(width)] + row["stores"].get(str(width), 0) >= streams(row)[0] * row["steps"], row


def test_bytes_elementwise(aot):
    for row in some_rows(aot, ELEMENTWISE):
        unit = ELEMENT[row["dtype"]] * row["lanes"]
        assert unit == 16
        unpacked = 1 if row["positions"] == 1 else 1 / 4
        per_step = {"norm_statistics": 1, "norm_input_grad": 3, "spikes_packed": 1}.get(row["direction"], unpacked)
        words = 1 / 8 if row["direction"].startswith("spikes") else 0
        assert row["counted"] == row["contract"] == ELEMENT[row["dtype"]] * per_step + words, row
        loads, stores = {
            # Eight rows at a time, then one that may be short; three numbers, and the counter of who comes last.
            "norm_statistics": (8 * unit + unit, 12 + 4),
            "norm_input_grad": (2 * 4 * unit + 16, 4 * unit),  # four steps at a time; center and coef
            "spikes_packed": (8 * unit, row["lanes"]),
            "spikes_unpacked": (row["lanes"] * row["positions"], 8 * unit * {1: 1, 2: 0.5, 4: 1}[row["positions"]]),
        }[row["direction"]]
        assert (moved(row, "loads"), moved(row, "stores")) == (loads, stores), row


def test_unaligned_class_moves_no_more(aot):
    for row in lif_rows(aot, aligned=False):
        words = row["loads"]["4"] + row["stores"]["4"] - (row["direction"] == "forward")
        assert words == TENSORS[row["direction"]] * row["lanes"] * row["steps"]


def test_regularizer_reads_and_writes_once(aot):
    rows = [row for row in aot["rows"] if row["direction"] == "regularizer"]
    for row in rows:
        assert row["counted"] == row["contract"] == 4 * (3 if row["accumulate"] else 2), row
        loads, stores = row["loads"]["16"], row["stores"]["16"]
        assert loads == stores * (2 if row["accumulate"] else 1), row
    assert {row["accumulate"] for row in rows} == {False, True}


def test_delays_read_each_row_once(aot):
    rows = some_rows(aot, DELAYS)
    for row in rows:
        learned = bool(row.get("channels"))
        assert row["counted"] == row["contract"] == ELEMENT[row["dtype"]] * (2 + learned), row
        assert row["target"] == "gfx942" or row["int32_products"] == 0, row
    assert {(row["direction"], bool(row.get("channels"))) for row in rows} == {
        ("delay_forward", False), ("delay_backward", False), ("delay_backward", True)
    }  # fmt: skip


def test_addresses_are_64_bits_wide(aot):
    for row in nvidia(lif_rows(aot)):
        assert row.get("channels", 0) or row["int32_products"] == 0, row


def test_nothing_is_contracted(aot):
    """h must round alike in the forward pass, in its recomputation and on every backend: fma only where we wrote it."""
    assert [row for row in nvidia(aot["rows"]) if row["contractable"]] == []


@pytest.mark.parametrize("direction", TENSORS)
def test_one_compile_for_each_class(aot, direction):
    shapes, keys, classes = aot["compiles"][direction]
    assert shapes == 20
    assert keys == classes == 8


@pytest.mark.parametrize("direction", NORM)
def test_one_compile_for_each_class_behind_a_norm(aot, direction):
    shapes, keys, classes = aot["compiles"][direction]
    assert shapes == 10
    assert keys == classes == 4


def test_occupancy_is_what_the_amd_compiler_prints(aot):
    rows = [row for row in aot["rows"] if row["target"] == "gfx942"]
    assert len({row["occupancy"] for row in rows}) > 2
    assert all(row["occupancy"] == row["compilers_occupancy"] for row in rows)


def test_a_copy_of_the_potential_is_found(aot):
    """The forward kernel with a float32 copy of every h stored: trtkern inspect names it, and ends with status 1."""
    planted = aot["planted"]
    assert planted["status"] == 1
    assert planted["message"] == "triton sm_90 forward moves 12 bytes a neuron-step, the contract has 8"
    assert re.search(r"triton forward .* 12 .* 8 ", planted["printed"])
    assert re.search(r"triton backward .* 12 .* 12 ", planted["printed"])
