"""What nvcc made of csrc/*.cu, read without a GPU: no spills, 16-byte accesses, the bytes of docs/design.md.

Reads the built extension, or compiles one element type with nvcc. The PTX says which tensor an access belongs to, the
machine code (SASS) that the assembler added none and split none.
"""

import collections
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from trtkern import LIFSpec, dialect, surrogates
from trtkern.backends import cuda, named, resolve
from trtkern.backends.base import Case

ROOT = Path(__file__).resolve().parent.parent
KERNEL = re.compile(r"lif_(forward|backward)I\w*?(Float32|BFloat16|Float16)E?Li(\d+)ELi(\d+)ELb(\d)E(?:Li(\d+)E)?")
BYTES = {"Float32": 4, "BFloat16": 2, "Float16": 2}
# What LifArgs begins with: addresses of 8 bytes each.
POINTERS: tuple[str, ...] = ("x", "v0", "params", "s", "v", "v_final", "edges", "flag")
POINTERS += ("gs", "gv", "gv_final", "gx", "gv0", "gparams", "workspace")


class Kernel(NamedTuple):
    """A kernel by its mangled name: neurons a thread, steps of a chunk, whether T may exceed it."""

    direction: str
    element: str
    vec: int
    steps: int
    loop: bool
    surrogate: int

    @property
    def row(self) -> int:
        """Bytes of a thread's part of all steps of a chunk."""
        return self.steps * self.vec * BYTES[self.element]


class Access(NamedTuple):
    """A global load or store: its bytes, and the tensors whose address it is made of."""

    kind: str
    bytes: int
    tensors: tuple[str, ...]


def kernel(name):
    """The Kernel of a mangled name; None for the reduction."""
    found = KERNEL.search(name)
    if found is None:
        return None
    direction, element, vec, steps, loop, surrogate = found.groups()
    return Kernel(direction, element, int(vec), int(steps), loop == "1", int(surrogate or 0))


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
    """The built extension, or float32's kernels and the reduction compiled for sm_90."""
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
    for unit in ("lif_cuda", "lif_float32_cuda"):
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


def accesses(body):
    """The global accesses in the PTX of a kernel, each with the tensors that its address comes from."""
    definitions = collections.defaultdict(list)
    found = []
    for line in body.splitlines():
        text = re.sub(r"^@!?%\w+\s+", "", line.split("//")[0].strip().rstrip(";"))
        operation, _, operands = text.partition(" ")
        if re.match(r"(ld|st)\.(volatile\.)?(global|[vbuf]\d)", operation):
            wide, bits = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", operation).groups()
            base = re.search(r"\[(%\w+)", operands)[1]
            found.append((operation[:2], int(wide or 1) * int(bits) // 8, base))
        elif not operation.startswith(("ld.shared", "st.", "bra", "setp")):
            registers = re.findall(r"%\w+", operands)
            if registers:
                definitions[registers[0]].append((operation, operands, registers[1:]))

    @cache
    def offset(register):
        """Bytes into LifArgs, for a register that points into it; None for another."""
        for operation, operands, sources in definitions[register]:
            if operation.startswith("mov") and "_param_0" in operands:
                return 0
            within = offset(sources[0]) if sources and operation.startswith(("mov", "add")) else None
            if within is not None:
                constant = re.search(r", (-?\d+)$", operands)
                return within + (int(constant[1]) if constant else 0)
        return None

    def roots(register):
        """The tensors whose address reaches a register."""
        tensors, reached, todo = set(), {register}, [register]
        while todo:
            for operation, operands, sources in definitions[todo.pop()]:
                if operation.startswith("ld."):
                    base, plus = re.search(r"\[(%?\w+)(?:\+(-?\d+))?\]", operands).groups()
                    at = int(plus or 0) + (0 if "_param_0" in base else offset(base))
                    tensors |= {POINTERS[at // 8]} if at < 8 * len(POINTERS) else set()
                else:
                    todo += set(sources) - reached
                    reached |= set(sources)
        return tensors

    return [Access(kind, size, tuple(sorted(roots(base)))) for kind, size, base in found]


@pytest.fixture(scope="module")
def traffic(ptx):
    """The accesses of each kernel."""
    return {k: accesses(body) for k, body in ptx.items()}


def test_every_class_is_built(ptx, binary):
    elements = {k.element for k in ptx}
    assert elements == (set(BYTES) if binary[0].suffix == ".so" else {"Float32"})
    for element in elements:
        wide = 16 // BYTES[element]
        classes = {(wide, 4, False), (wide, 8, False), (wide, 16, True), (1, 16, True)}
        assert {k[2:5] for k in ptx if k.element == element and k.direction == "forward"} == classes
        backward = {k[2:6] for k in ptx if k.element == element and k.direction == "backward"}
        assert backward == {(*c, s) for c in classes for s in range(len(surrogates.BUILTIN))}


def test_no_spills_and_no_stack(binary):
    usage = dump(binary, "--dump-resource-usage")
    rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len({name for name, *_ in rows}) >= 30
    for name, registers, stack, shared, local in rows:
        assert (int(stack), int(local)) == (0, 0), f"{name} spills"
        assert int(registers) <= 168 and int(shared) <= 2048, f"{name}: {registers} registers, {shared} bytes shared"


def test_bytes_are_those_of_the_traffic_contract(traffic):
    """Forward 2e a neuron-step (+ e for v when it is asked for), backward 3e (+ e for gv where it came), no more."""
    for k, found in traffic.items():
        total = collections.Counter()
        for access in found:
            assert len(access.tensors) == 1, f"{k}: an access of {access.tensors}"
            total[access.kind, access.tensors[0]] += access.bytes
        row, once = k.row, 4 * k.vec
        params = total.pop(("ld", "params"))
        assert params == 5 * 4 * (1 + k.vec if k.direction == "forward" else 1 + min(k.vec, 4 if k.steps <= 8 else 2))
        if k.direction == "forward":
            want = {("ld", "x"): row, ("st", "s"): row, ("st", "v"): row, ("ld", "v0"): once}
            want |= {("st", "v_final"): once, ("st", "flag"): 4} | ({("st", "edges"): once} if k.loop else {})
        else:
            rounds = max(1, k.vec // (4 if k.steps <= 8 else 2))  # of the loop over a thread's neurons, one in the code
            want = {("ld", "x"): row, ("ld", "gs"): row, ("st", "gx"): row, ("ld", "gv"): row // rounds}
            want |= {("ld", "v0"): once, ("ld", "gv_final"): once, ("st", "gv0"): once}
            want |= {("st", "workspace"): 5 * once + 4} | ({("ld", "edges"): once} if k.loop else {})
        assert total == want, k


def test_accesses_are_16_bytes_wide(traffic):
    for k, found in traffic.items():
        for access in found:
            if access.tensors[0] not in ("params", "gv", "flag", "workspace"):
                own = 4 if access.tensors[0] in ("v0", "v_final", "gv_final", "gv0", "edges") else BYTES[k.element]
                assert access.bytes == (16 if k.vec > 1 else own), f"{k}: {access}"


def test_the_assembler_kept_every_access(binary, traffic):
    """As many global loads and stores of each width in the machine code as in the PTX, and no local memory."""
    width = {"U16": 2, "64": 8, "128": 16}
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
        assert k.direction == "backward" or operations <= exact, k


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
    with pytest.raises(RuntimeError, match=r"lif_forward: CUDA error \d+ \(.*driver"):
        extension.lif_forward(args)


def test_what_it_refuses():
    refuses, spec = named("cuda").refuses, LIFSpec()
    assert refuses(Case("lif", "cuda", torch.bfloat16, spec)) is None
    assert "not on cpu" in refuses(Case("lif", "cpu", torch.float32, spec))
    assert "float64" in refuses(Case("lif", "cuda", torch.float64, spec))
    assert not named("cuda").holds("regularizer")
