"""What nvcc made of csrc/*/*.cu, read without a GPU: no spills, 16-byte accesses, the bytes of docs/design.md.

Reads the built extension, or compiles one element type with nvcc. The PTX says which tensor an access belongs to, the
machine code (SASS) that the assembler added none and split none.
"""

import collections
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from trtkern import LIFSpec, dialect, neurons, surrogates
from trtkern.backends import cuda, named, resolve
from trtkern.backends.base import Case
from trtkern.profiling.inspect import cuda as inspected
from trtkern.profiling.inspect import cuda_code, reading
from trtkern.profiling.inspect.cuda_code import BYTES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _tools():
    try:
        reading.tool("cuobjdump")
    except RuntimeError as error:
        pytest.skip(str(error))


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
    for name, text in dialect.headers().items():
        (folder / f"trtkern_{name}.h").write_text(text)
    flags = ["-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    jobs = {}
    for unit in ("lif/cuda", "lif/cuda_float32", "lif/cuda_neurons", "norm/cuda"):
        output = folder / f"{unit.replace('/', '-')}.o"
        command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", f"-I{folder}", "-c", str(ROOT / "csrc" / f"{unit}.cu")]
        jobs[output] = subprocess.Popen([*command, "-o", str(output)])
    assert all(job.wait() == 0 for job in jobs.values())
    return list(jobs)


@pytest.fixture(scope="module")
def ptx(binary):
    """PTX text of each kernel."""
    return {k: body for k, (_, body) in cuda_code.ptx(binary).items()}


@pytest.fixture(scope="module")
def traffic(ptx):
    """The accesses of each kernel."""
    return {k: cuda_code.accesses(body) for k, body in ptx.items()}


def test_every_class_is_built(ptx, binary):
    def classes(direction, element, fused, ahead=False):
        wanted = (direction, element, fused, ahead)
        same = (k for k in ptx if (k.direction, k.element, k.fused, k.ahead) == wanted)
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
            assert classes(direction, element, False, ahead=True) == {(wide // 4, 16, True, 0)}
    for direction in ("statistics", "input_grad"):
        found = {(k.element, k.vec) for k in ptx if k.direction == direction}
        assert found == {(element, vec) for element, size in BYTES.items() for vec in (1, 16 // size)}


def test_every_other_neuron_is_built(binary):
    """Forward, backward and learning; no product and sum of a step is contracted, as the CPU's are not."""
    entries = re.findall(r"\.entry (\w+)\((.*?)\n}\n", cuda_code.dump(binary, "-ptx"), re.S)
    bodies = {}
    for name, body in entries:
        if found := re.search(r"neuron_(forward|backward)INS0_7GeneralINS0_(\d+)(\w+)", name):
            direction, length, rest = found.groups()
            neuron, learns = rest[: int(length)], rest[int(length) :].startswith("EEELb1")
            bodies["learning" if learns else direction, neuron] = body
    others = [name for name in neurons.TABLE if name != "LIF"]
    assert set(bodies) == {*itertools.product(("forward", "backward", "learning"), others)}
    for body in bodies.values():
        operations = set(re.findall(r"\b((?:add|sub|mul|fma|mad|div)\.\S*f32)\b", body))
        assert operations <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.full.f32", "fma.rm.f32"}


def test_no_spills_and_no_stack(binary):
    usage = reading.usage(cuda_code.dump(binary, "--dump-resource-usage"))
    assert len(usage) >= 30
    for name, used in usage.items():
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{name} spills"
        most = 20000 if "statistics" in name else 2048
        assert used["REG"] <= 168 and used["SHARED"] <= most, f"{name}: {used}"


def test_bytes_are_those_of_the_traffic_contract(traffic):
    for k, found in traffic.items():
        assert all(len(access.tensors) == 1 for access in found), k
        assert inspected.by_tensor(found) == inspected.allowed(k), k


def test_accesses_are_16_bytes_wide(traffic):
    small = ("params", "affine", "coef", "gv", "flag", "workspace", "counters")
    for k, found in traffic.items():
        for kind, size, (tensor,) in found:
            own = 4 if tensor in ("v0", "v_final", "gv_final", "gv0", "edges") else BYTES[k.element]
            widths = {16 if k.vec > 1 else own}
            if k.ahead:  # a word a thread and step; of numbers in float32 all that it owns
                widths = {4, own * k.vec}
            if tensor == "packed":
                widths = {k.vec}
            if tensor == "gs" and k.fused and k.vec > 1:
                widths |= {8}  # of averages that stand for two neighbours each
            assert tensor in small or size in widths, f"{k}: {kind} {size} {tensor}"


def test_the_assembler_kept_every_access(binary, traffic):
    """As many global loads and stores of each width in the machine code as in the PTX, and no local memory."""
    kinds = {"ld": "load", "st": "store"}
    machine = {cuda_code.kernel(name): found for name, found in cuda_code.machine_code(binary, "sm_90").items()}
    assert set(machine) - {None} == set(traffic)
    for k, found in traffic.items():
        assert machine[k] == collections.Counter((kinds[access.kind], access.bytes) for access in found), k


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
    args.neuron, args.P = [*neurons.TABLE].index("ALIF"), 9
    with pytest.raises(RuntimeError, match=r"lif_forward: CUDA error \d+ \(.*driver"):
        extension.lif_forward(args)
    for number, count in ((args.neuron, 6), (len(neurons.TABLE), 6), (-1, 6)):
        args.neuron, args.P = number, count
        with pytest.raises(RuntimeError, match=r"lif_forward: CUDA error 1 \(cudaErrorInvalidValue"):
            extension.lif_forward(args)
    args.neuron = 0
    with pytest.raises(RuntimeError, match=r"batch_norm_lif_input_grad: CUDA error 1 \(cudaErrorInvalidValue"):
        extension.batch_norm_lif_input_grad(args)
    with pytest.raises(RuntimeError, match=r"batch_norm_lif_statistics: CUDA error \d+ \(.*driver"):
        extension.batch_norm_lif_statistics(args, 16, 16)


def test_what_it_refuses():
    refuses, spec = named("cuda").refuses, LIFSpec()
    assert refuses(Case("lif", "cuda", torch.bfloat16, spec)) is None
    others = [LIFSpec("soft", neuron=name) for name in neurons.TABLE]
    assert all(refuses(Case("batch_norm_lif", "cuda", torch.float16, other)) is None for other in others)
    assert "not on cpu" in refuses(Case("lif", "cpu", torch.float32, spec))
    assert "float64" in refuses(Case("lif", "cuda", torch.float64, spec))
    assert named("cuda").holds("batch_norm_lif") and not named("cuda").holds("regularizer")
