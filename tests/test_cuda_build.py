"""What nvcc made of csrc/*.cu, read without a GPU: no spills, 16-byte accesses, the bytes of docs/design.md.

Reads the built extension, or compiles one element type with nvcc. The PTX says which tensor an access belongs to, the
machine code (SASS) that the assembler added none and split none.
"""

import collections
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_ptx import BYTES, accesses, kernel

from trtkern import LIFSpec, dialect, surrogates
from trtkern.backends import cuda, named, resolve
from trtkern.backends.base import Case

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    """A program of the CUDA toolkit, of PATH or of Triton's package."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"{name} is in no CUDA toolkit here, nor in Triton's package")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    if not Path(found).exists():
        pytest.skip(f"no {name}: neither on PATH nor in Triton's package")
    return found


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """The built extension, or float32's LIF kernels and the small ones compiled for sm_90."""
    built = sorted((ROOT / "trtkern").glob("_cuda*.so"))
    if built:
        return built[-1:]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("neither trtkern._cuda nor nvcc is here")
    folder = tmp_path_factory.mktemp("cuda")
    functions = (surrogates.TABLE[name].function for name in surrogates.BUILTIN)
    (folder / "trtkern_surrogates.h").write_text(dialect.cpp_header(functions))
    flags = ["-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    jobs = {}
    for unit in ("lif_cuda", "lif_float32_cuda", "batch_norm_lif_cuda"):
        command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", f"-I{folder}", "-c", str(ROOT / "csrc" / f"{unit}.cu")]
        jobs[folder / f"{unit}.o"] = subprocess.Popen([*command, "-o", str(folder / f"{unit}.o")])
    assert all(job.wait() == 0 for job in jobs.values())
    return list(jobs)


def dump(binary, *flags):
    return "".join(
        subprocess.run([tool("cuobjdump"), *flags, str(path)], capture_output=True, text=True, check=True).stdout
        for path in binary
    )


@pytest.fixture(scope="module")
def ptx(binary):
    """PTX text of each kernel."""
    entries = re.findall(r"\.entry (\w+)\((.*?)\n}\n", dump(binary, "-ptx"), re.S)
    return {kernel(name): body for name, body in entries if kernel(name)}


@pytest.fixture(scope="module")
def traffic(ptx):
    """The accesses of each kernel."""
    return {k: accesses(body) for k, body in ptx.items()}


def test_every_class_is_built(ptx, binary):
    def classes(direction, element, fused):
        same = (k for k in ptx if (k.direction, k.element, k.fused) == (direction, element, fused))
        return {k[2:6] for k in same}

    elements = {k.element for k in ptx if k.direction == "backward"}
    assert elements == (set(BYTES) if binary[0].suffix == ".so" else {"Float32"})
    for element in elements:
        wide = 16 // BYTES[element]
        plain = {(wide, 4, False), (wide, 8, False), (wide, 16, True), (1, 16, True)}
        assert classes("forward", element, False) == {(*c, 0) for c in plain}
        assert classes("backward", element, False) == {(*c, s) for c in plain for s in range(len(surrogates.BUILTIN))}
        for direction in ("forward", "backward"):
            assert classes(direction, element, True) == {(wide, 4, False, 0), (wide, 8, True, 0), (1, 8, True, 0)}
    for direction in ("statistics", "input_grad"):
        found = {(k.element, k.vec) for k in ptx if k.direction == direction}
        assert found == {(element, vec) for element, size in BYTES.items() for vec in (1, 16 // size)}


def test_no_spills_and_no_stack(binary):
    usage = dump(binary, "--dump-resource-usage")
    rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len({name for name, *_ in rows}) >= 30
    for name, registers, stack, shared, local in rows:
        assert (int(stack), int(local)) == (0, 0), f"{name} spills"
        most = 20000 if "statistics" in name else 2048
        assert int(registers) <= 168 and int(shared) <= most, f"{name}: {registers} registers, {shared} bytes shared"


def plain_contract(k):
    """Forward 2e a neuron-step (+ e for v when it is asked for), backward 3e (+ e for gv where it came), no more."""
    row, once = k.row, 4 * k.vec
    if k.direction == "forward":
        want = {("ld", "x"): row, ("st", "s"): row, ("st", "v"): row, ("ld", "v0"): once}
        return want | {("st", "v_final"): once, ("st", "flag"): 4} | ({("st", "edges"): once} if k.loop else {})
    rounds = max(1, k.vec // (4 if k.steps <= 8 else 2))  # of the loop over a thread's neurons, one in the code
    want = {("ld", "x"): row, ("ld", "gs"): row, ("st", "gx"): row, ("ld", "gv"): row // rounds}
    want |= {("ld", "v0"): once, ("ld", "gv_final"): once, ("st", "gv0"): once}
    return want | {("st", "workspace"): 5 * once + 4} | ({("ld", "edges"): once} if k.loop else {})


def fused_contract(k):
    """The same and e for the residual, a byte a neuron for packed spikes, 8 bytes a block for sums (7 numbers a neuron
    where packs change channel within), e for each pass that the normalisation adds. What is pooled stands beside what
    is not: one of the two runs."""
    row, once = k.row, 4 * k.vec
    if k.direction == "statistics":
        return {("ld", "x"): row, ("st", "workspace"): 2 * 2 * 8}
    if k.direction == "input_grad":
        small = {("ld", "affine"): once, ("ld", "coef"): 3 * once}
        return small | {("ld", "x"): row, ("ld", "gs"): row, ("st", "gx"): row}
    edges = {("st" if k.direction == "forward" else "ld", "edges"): once} if k.loop else {}
    if k.direction == "forward":
        want = {("ld", "x"): row, ("ld", "residual"): row, ("st", "s"): 2 * row, ("st", "v"): row, ("st", "flag"): 4}
        want |= {
            ("ld", "v0"): 2 * once,
            ("st", "v_final"): 2 * once,
            ("st", "packed"): k.vec,
            ("ld", "affine"): 3 * once,
        }
        return want | edges
    at_a_time = min(k.vec, 2)
    pooled = row + (row // 2 if k.vec > 1 else 0)  # each its own average, or two an average
    want = {("ld", "x"): row, ("ld", "residual"): row, ("ld", "gs"): row + pooled, ("st", "gx"): row}
    want |= {("ld", "gv"): row * at_a_time // k.vec, ("ld", "v0"): once, ("ld", "gv_final"): once, ("st", "gv0"): once}
    want |= {("ld", "affine"): 3 * 4 * at_a_time, ("ld", "coef"): 3 * 4 * at_a_time}
    return want | {("st", "workspace"): 7 * once + 4 + 4} | edges


def test_bytes_are_those_of_the_traffic_contract(traffic):
    for k, found in traffic.items():
        total = collections.Counter()
        for access in found:
            assert len(access.tensors) == 1, f"{k}: an access of {access.tensors}"
            total[access.kind, access.tensors[0]] += access.bytes
        params = total.pop(("ld", "params"), 0)
        at_a_time = {"forward": k.vec, "backward": min(k.vec, 4 if k.steps <= 8 and not k.fused else 2)}
        if k.direction in at_a_time:  # those that all neurons share, and each neuron's own
            assert params == 5 * 4 * (1 + at_a_time[k.direction]), k
        assert total == (fused_contract if k.fused else plain_contract)(k), k


def test_accesses_are_16_bytes_wide(traffic):
    small = ("params", "affine", "coef", "gv", "flag", "workspace")
    for k, found in traffic.items():
        for kind, size, (tensor,) in found:
            own = 4 if tensor in ("v0", "v_final", "gv_final", "gv0", "edges") else BYTES[k.element]
            widths = {16 if k.vec > 1 else own}
            if tensor == "packed":
                widths = {k.vec}
            if tensor == "gs" and k.fused and k.vec > 1:
                widths |= {8}  # of averages that stand for two neighbours each
            assert tensor in small or size in widths, f"{k}: {kind} {size} {tensor}"


def test_the_assembler_kept_every_access(binary, traffic):
    """As many global loads and stores of each width in the machine code as in the PTX, and no local memory."""
    width = {"U8": 1, "U16": 2, "64": 8, "128": 16}
    counts, current = collections.defaultdict(collections.Counter), None
    for line in dump(binary, "-sass", "-arch", "sm_90").splitlines():
        if "Function :" in line:
            current = kernel(line)
        elif current is not None and (found := re.search(r"\b(LDG?|STG?|LDL|STL)(\.E[\w.]*)", line)):
            assert found[1] not in ("LDL", "STL"), f"{current}: {line}"
            size = next((width[part] for part in found[2].split(".") if part in width), 4)
            counts[current][found[1][:2].lower(), size] += 1
    assert set(counts) == set(traffic)
    for k, found in traffic.items():
        assert counts[k] == collections.Counter((access.kind, access.bytes) for access in found), k


def test_arithmetic_is_not_contracted(ptx):
    """Each product and sum is rounded as written, or h would differ from the CPU's; only surrogates divide."""
    for k, body in ptx.items():
        operations = set(re.findall(r"\b((?:add|sub|mul|fma|mad|div)\.\S*f32)\b", body))
        exact = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32"}
        assert operations <= exact | {"div.full.f32", "fma.rm.f32"}, k  # the latter in exp
        assert k.direction in ("backward", "statistics") or operations <= exact, k


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = cuda.missing()
    assert reason is not None and ("not built" in reason or "no NVIDIA GPU" in reason)
    with pytest.raises(RuntimeError, match="lif: backend 'cuda' was asked for, but"):
        resolve("cuda", Case("lif", "cuda", torch.float32, LIFSpec()))


def test_a_launch_without_a_driver_raises():
    extension = pytest.importorskip("trtkern._cuda", reason="trtkern._cuda is not built", exc_type=ImportError)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args = extension.LifArgs()
    with pytest.raises(RuntimeError, match=r"lif_forward: CUDA error 1 \(cudaErrorInvalidValue"):
        extension.lif_forward(args)
    args.T, args.N, args.x = 4, 64, 16
    for args.x_stride in (64, 0):
        with pytest.raises(RuntimeError, match=r"lif_forward: CUDA error \d+ \(.*driver"):
            extension.lif_forward(args)
    with pytest.raises(RuntimeError, match=r"batch_norm_lif_input_grad: CUDA error 1 \(cudaErrorInvalidValue"):
        extension.batch_norm_lif_input_grad(args)
    with pytest.raises(RuntimeError, match=r"batch_norm_lif_statistics: CUDA error \d+ \(.*driver"):
        extension.batch_norm_lif_statistics(args, 16, 16)


def test_what_it_refuses():
    refuses, spec = named("cuda").refuses, LIFSpec()
    assert refuses(Case("lif", "cuda", torch.bfloat16, spec)) is None
    assert "not on cpu" in refuses(Case("lif", "cpu", torch.float32, spec))
    assert "float64" in refuses(Case("lif", "cuda", torch.float64, spec))
    assert named("cuda").holds("batch_norm_lif") and not named("cuda").holds("regularizer")
