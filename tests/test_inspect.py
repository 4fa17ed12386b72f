"""``trtkern inspect``: what it counts, what it calls wrong, what it refuses. Triton's part: ``test_triton_aot.py``."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from trtkern.commands import inspect as command
from trtkern.commands._common import Quit
from trtkern.profiling import inspect as inspector
from trtkern.profiling.inspect import contract, cuda, cuda_code, reading, report
from trtkern.profiling.inspect.contract import Kernel
from trtkern.profiling.inspect.occupancy import LIMITS, occupancy
from trtkern.profiling.inspect.reading import Reading

BUILT = importlib.util.find_spec("trtkern._cuda") is not None
CUDA_HEADER = "cuda_occupancy.h"


@pytest.fixture(scope="module")
def built():
    if not BUILT:
        pytest.skip("trtkern._cuda is not built")
    try:
        reading.tool("cuobjdump")
    except RuntimeError as error:
        pytest.skip(str(error))
    binaries = cuda.extension()
    if missing := {"sm_80", "sm_90"} - set(cuda_code.targets(binaries)):
        pytest.skip(f"trtkern._cuda is not built for {', '.join(missing)}")
    return binaries


@pytest.fixture(scope="module")
def rows(built):
    return {target: inspector.inspect(target, backend="cuda") for target in ("sm_80", "sm_90")}


def test_cuda_kernels_keep_to_the_contract(rows):
    """Every kernel of both ops; the contract as docs/traffic.md has it, at e = 4 and T = 4."""
    expected = {
        "forward": 8, "backward": 12, "norm_statistics": 4, "norm_forward": 8, "norm_forward residual packed": 12.25,
        "norm_sums": 8, "norm_sums residual": 16, "norm_input": 12, "norm_input_grad": 12,
    }  # fmt: skip
    for target, found in rows.items():
        assert {row.kernel.label: row.counted for row in found} == expected
        for row in found:
            assert row.problems == [] and row.counted == row.contract and row.target == target
            assert row.reading.spilled == 0 and 0 < row.reading.registers <= 168 and row.reading.loads[16] >= 4
            assert 0 < row.occupancy.warps <= 64
            assert (row.shared == 0) == (row.kernel.name in ("forward", "norm_forward", "norm_input_grad"))
            assert row.threads == (256 if "statistics" in row.kernel.name else 64)


def test_other_chunks_and_elements(built):
    """Chunks of 16 steps with edges between them: eight neurons a thread, and two where they are few."""
    forward, backward, *ahead = cuda.rows(["lif"], "sm_90", 17, "bfloat16", built)
    assert forward.kernel == Kernel("forward", 2, 16, loop=True)
    assert [row.kernel.label for row in ahead] == ["forward reading ahead", "backward reading ahead"]
    for rows in ((forward, backward), ahead):
        assert [row.counted for row in rows] == [4.25, 6.25] and not any(row.problems for row in rows)
    assert [row.shared // row.threads for row in ahead] == [6 * 16 * 4, 4 * (2 * 2 + 2 * 16) * 4]


def test_a_second_store_in_the_ptx_is_found(built, monkeypatch):
    """Each 16-byte store twice: e bytes a neuron-step more of s, as a float32 copy of h would be."""
    original = cuda_code.ptx(built)
    for k, (name, body) in original.items():
        if k.direction == "forward":
            lines = [f"{line}\n{line}" if re.search(r"\bst\..*v4", line) else line for line in body.splitlines()]
            original[k] = name, "\n".join(lines)
    monkeypatch.setattr(cuda_code, "ptx", lambda binaries: original)
    monkeypatch.setattr(cuda_code, "machine_code", lambda binaries, target, names: {name: Counter() for name in names})
    forward, backward = cuda.rows(["lif"], "sm_90", 4, "float32", built)
    assert backward.problems == []
    (problem,) = forward.problems
    assert "the contract has 8" in problem and "64 bytes of st s" in problem and forward.counted >= 12


def test_what_the_assembler_adds_is_found(built):
    kernels = cuda_code.ptx(built)
    k = next(k for k in kernels if (k.direction, k.element, k.vec, k.steps) == ("forward", "Float32", 4, 4))
    accesses = cuda_code.accesses(kernels[k][1])
    machine = Counter({({"ld": "load", "st": "store"}[a.kind], a.bytes): 0 for a in accesses})
    machine.update(({"ld": "load", "st": "store"}[a.kind], a.bytes) for a in accesses)
    assert cuda.excess(k, accesses, machine) == ({}, 0)
    assert cuda.excess(k, accesses, machine + Counter({("store", 16): 2})) == ({}, 32)
    assert cuda.excess(k, accesses, machine + Counter({("local", 4): 2})) == ({}, 0)


def test_spills_are_problems_where_they_are_not_known():
    spilling = Reading(255, 16, 0, {16: 8}, {16: 4})
    row = report.row("triton", "sm_90", Kernel("backward", 4, 4), spilling, 128, 0, 0.0)
    assert row.problems == ["spills 16 bytes"]
    long_pool = Kernel("norm_sums", 4, 16, loop=True, pool="rows")
    assert report.row("triton", "sm_90", long_pool, spilling, 128, 0, 0.0).problems == []
    more = report.row("triton", "sm_90", Kernel("backward", 4, 4), spilling._replace(spilled=0), 128, 0, 4.0)
    assert more.problems == ["moves 16 bytes a neuron-step, the contract has 12"]


def test_machine_code_is_read():
    code = """
        /*0010*/  @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x0000 */
        /*0020*/       LDG.E R4, [R2.64] ;
        /*0030*/       LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0040*/       LD.E.64 R4, [R2.64] ;
        /*0050*/       STG.E.U8 [R2.64], R4 ;
        /*0060*/       ST.E.U16 [R2.64], R4 ;
        /*0070*/       LDS.128 R4, [R2] ;
        /*0080*/       STL [R1], R7 ;
        /*0090*/       LDL.LU.64 R7, [R1+0x8] ;
        /*00a0*/       LDC R1, c[0x0][0x28] ;
    """
    found = reading.sass_accesses(code)
    assert found == {
        ("load", 16): 2, ("load", 4): 1, ("load", 8): 1, ("store", 1): 1, ("store", 2): 1, ("local", 4): 1,
        ("local", 8): 1,
    }  # fmt: skip
    read = reading.of_sass({"REG": 9, "STACK": 0, "LOCAL": 0, "SHARED": 5}, found)
    assert (read.spilled, read.loaded, read.stored, read.shared) == (12, 44, 3, 5)


def test_amd_assembly_is_read():
    code = """
        global_load_dwordx4 v[2:5], v[0:1], off
        buffer_load_dword v1, v2, s[0:3], 0 offen
        global_load_ushort v1, v[0:1], off
        global_load_short_d16_hi v1, v[0:1], off
        global_store_byte v[0:1], v2, off
        buffer_store_short v1, v2, s[0:3], 0 offen
        .group_segment_fixed_size: 32
        .private_segment_fixed_size: 12
        .vgpr_count:     48
    """
    assert reading.of_amdgcn(code) == Reading(48, 12, 32, {16: 1, 4: 1, 2: 2}, {1: 1, 2: 1})
    with pytest.raises(RuntimeError, match="vgpr_count"):
        reading.of_amdgcn(code.replace(".vgpr_count", ".other"))


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps", "limit"),
    [
        ("sm_80", 32, 0, 128, 64, ""),
        ("sm_80", 33, 0, 128, 48, "registers"),
        ("sm_80", 255, 0, 128, 8, "registers"),
        ("sm_90", 168, 0, 64, 12, "registers"),
        ("sm_90", 32, 100 * 1024, 128, 8, "shared memory"),
        ("sm_80", 32, 100 * 1024, 128, 4, "shared memory"),
        ("sm_90", 16, 0, 32, 32, "blocks"),
        ("sm_90", 128, 0, 1024, 0, "registers"),
        ("gfx942", 64, 0, 256, 8, ""),
        ("gfx942", 65, 0, 256, 7, "registers"),
        ("gfx942", 129, 0, 256, 3, "registers"),
        ("gfx942", 512, 0, 128, 1, "registers"),
        ("gfx942", 32, 33 * 1024, 256, 1, "shared memory"),
    ],
)
def test_occupancy(target, registers, shared, threads, warps, limit):
    found = occupancy(target, registers, shared, threads)
    assert (found.warps, found.limit) == (warps, limit)
    assert found.most == (8 if target == "gfx942" else 64)


def test_occupancy_agrees_with_nvidias_header(tmp_path):
    """cuda_occupancy.h, compiled by g++: every register count, several blocks and amounts of shared memory."""
    homes = (Path(shutil.which("nvcc") or "/").resolve().parent.parent / "include", Path("/usr/local/cuda/include"))
    include = next((home for home in homes if (home / CUDA_HEADER).exists()), None)
    if include is None or shutil.which("g++") is None:
        pytest.skip(f"no {CUDA_HEADER} or no g++ here")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(
        """
#include <cstdio>
#include <initializer_list>
#include <cuda_occupancy.h>
int main() {
  for (int major = 8; major <= 9; ++major)
    for (int registers = 16; registers <= 255; ++registers)
      for (int threads : {32, 64, 96, 128, 256, 512, 1024})
        for (int shared : {0, 1000, 12345, 48000}) {
          cudaOccDeviceProp p = cudaOccDeviceProp();
          p.computeMajor = major; p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = 2048;
          p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32; p.numSms = 1;
          p.sharedMemPerBlock = 48 << 10; p.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) << 10;
          p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024; p.reservedSharedMemPerBlock = 1024;
          cudaOccFuncAttributes f = cudaOccFuncAttributes();
          f.maxThreadsPerBlock = 1024; f.numRegs = registers; f.sharedSizeBytes = shared;
          f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; f.maxDynamicSharedSizeBytes = 1 << 20;
          cudaOccDeviceState s; cudaOccResult r;
          if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, 0)) return 1;
          std::printf("%d %d %d %d %d\\n", major, registers, shared, threads, r.activeBlocksPerMultiprocessor);
        }
}
"""
    )
    subprocess.run(["g++", "-O0", "-w", f"-I{include}", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2 * 240 * 7 * 4
    for line in lines:
        major, registers, shared, threads, blocks = map(int, line.split())
        found = occupancy(f"sm_{major}0", registers, shared, threads)
        assert found.warps == blocks * threads // 32, line


def test_occupancy_knows_every_target():
    assert set(LIMITS) == set(inspector.TARGETS)
    with pytest.raises(ValueError, match="sm_70"):
        occupancy("sm_70", 32, 0, 128)


def test_every_op_has_kernels():
    assert {contract.op_of(name) for names in contract.OPS.values() for name in names} == set(contract.OPS)
    with pytest.raises(ValueError, match="nonsense"):
        contract.terms(Kernel("nonsense", 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ["sm_70"]}, "--target: expected one of sm_80, sm_90, gfx942, got 'sm_70'"),
        ({"op": "conv"}, "--op: expected one of lif, bn-lif, regularizer, pack, delay, all, got 'conv'"),
        ({"backend": "cpu"}, "--backend: expected one of triton, cuda, all"),
        ({"dtype": "float64"}, "--dtype: expected one of float32"),
        ({"timesteps": 0}, "--timesteps: expected at least 1, got 0"),
        ({"target": ["gfx942"], "backend": "cuda"}, "no kernels for gfx942; use --backend triton"),
        ({"op": "pack", "backend": "cuda"}, "no kernels of pack"),
        ({"op": "lif", "neuron": "ALF"}, "neuron: expected one of LIF, CUBALIF.*did you mean 'ALIF'"),
        ({"neuron": "ALIF"}, "--neuron: expected --op lif or bn-lif with ALIF, got all"),
        ({"op": "lif", "neuron": "ALIF", "backend": "cuda"}, "--neuron: expected LIF with --backend cuda, got ALIF"),
        ({"csv": Path("/nowhere/rows.csv")}, "--csv: expected a file in a folder that exists"),
        ({"backend": "triton", "op": "lif"}, "TRITON_INTERPRET is set"),
    ],
)
def test_what_it_refuses(options, message):
    if "TRITON" in message and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.raises(Quit, match=message) as error:
        command.inspect(**options)
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("module", "where", "backend", "message"),
    [
        ("triton", inspector, "triton", r"pip install 'trtkern\[inspect\]'"),
        ("trtkern._cuda", cuda, "cuda", "trtkern._cuda was not built; .*TRTKERN_CUDA=1"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, module, where, backend, message):
    monkeypatch.setattr(where, "find_spec", lambda name: None if name == module else importlib.util.find_spec(name))
    with pytest.raises(Quit, match=message) as error:
        command.inspect(backend=backend, op="lif")
    assert error.value.status == 2


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(reading.shutil, "which", lambda name, path=None: None)
    with pytest.raises(RuntimeError, match="no-such-program is neither on PATH nor in"):
        reading.tool("no-such-program")


def test_a_target_that_is_not_built_is_named(built, monkeypatch):
    monkeypatch.setattr(cuda_code, "usage", lambda binaries, target: {})
    with pytest.raises(RuntimeError, match=r"no machine code for sm_90, only for .*TRTKERN_CUDA_ARCHS"):
        list(cuda.rows(["lif"], "sm_90", 4, "float32", built))


def test_the_command_shows_writes_and_judges(rows, monkeypatch, tmp_path, capsys):
    fine = rows["sm_90"]
    found = list(fine)
    monkeypatch.setattr(inspector, "inspect", lambda target, **options: found)
    assert command.inspect(backend="cuda", csv=tmp_path / "rows.csv") == 0
    shown = capsys.readouterr().out
    assert "sm_90, T = 4, float32" in shown and "cuda norm_forward residual packed" in shown and "12.25" in shown
    written = list(csv.DictReader((tmp_path / "rows.csv").open(newline="")))
    assert [row["kernel"] for row in written] == [row.kernel.label for row in fine]
    assert [float(row["bytes_per_neuron_step"]) for row in written] == [row.counted for row in fine]
    found[1] = fine[1]._replace(counted=16.0, why="64 bytes of st h")
    with pytest.raises(
        Quit, match=r"^cuda sm_90 backward moves 16 bytes .* contract has 12 \(64 bytes of st h\)$"
    ) as e:
        command.inspect(backend="cuda")
    assert e.value.status == 1
