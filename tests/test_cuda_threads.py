"""The CUDA kernels without a GPU: their threads run one by one on the CPU, against the float64 reference.

``cuda_threads.cpp`` compiles what a thread does (csrc/lif_cuda_body.h) with g++ and checks every access; here it stands
in for ``trtkern._cuda`` behind the real ``trtkern.backends.cuda``. What only a GPU can show is the launch itself, the
sums within a block, and speed.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import trtkern.backends
from trtkern import LIFSpec, dialect, lif, surrogates
from trtkern.backends import _args, cpu, cuda
from trtkern.backends.base import CHUNK, Backend
from trtkern.selftest import Cell, cells, compare

ROOT = Path(__file__).resolve().parent.parent
NAME = "cuda-threads"
SIZES = {"scalars": ctypes.c_float * 6, "alpha": ctypes.c_float}
INTS = ("dtype", "reset", "detach", "surrogate", "threads", "device")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def compiled(source, output, *flags):
    """Compile a file of tests/ with the headers of csrc/ and the printed surrogates."""
    functions = (surrogates.TABLE[name].function for name in surrogates.BUILTIN)
    (output.parent / "trtkern_surrogates.h").write_text(dialect.cpp_header(functions))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{output.parent}"]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-ffp-contract=off"]
    subprocess.run([*command, *flags, *includes, str(ROOT / "tests" / source), "-o", str(output)], check=True)
    return output


class Threads:
    """``trtkern._cuda`` in the shape that the backend expects."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.traffic.restype = self.library.layout.restype = ctypes.c_char_p
        self.library.run.restype = self.library.workspace_floats.restype = ctypes.c_int64
        self.library.flat_differences.restype = ctypes.c_int64
        self.layout = dict(field.split() for field in self.library.layout().decode().split(";"))
        names = [name for name in self.layout if name != "end"]
        kinds = {name: SIZES.get(name, ctypes.c_int if name in INTS else ctypes.c_int64) for name in names}
        struct = type("Struct", (ctypes.Structure,), {"_fields_": list(kinds.items())})
        offsets = {name: getattr(struct, name).offset for name in names} | {"end": ctypes.sizeof(struct)}
        assert offsets == {name: int(offset) for name, offset in self.layout.items()}
        self.LifArgs = lambda: struct(C=1, inner=1, alpha=1.0, threads=1)

    def lif_forward(self, args):
        assert self.library.run(ctypes.byref(args), 0) == 0, "an access out of bounds, or not aligned"

    def lif_backward(self, args, workspace=0):
        args.workspace = workspace
        assert self.library.run(ctypes.byref(args), 1) == 0, "an access out of bounds, or not aligned"

    def workspace_floats(self, args):
        return self.library.workspace_floats(ctypes.byref(args))

    def traffic(self):
        """Bytes read and written of each tensor in the last pass."""
        rows = [row.split() for row in self.library.traffic().decode().split(";") if row]
        return {name: (int(loaded), int(stored)) for name, loaded, stored in rows}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The threads, compiled."""
    return Threads(compiled("cuda_threads.cpp", tmp_path_factory.mktemp("cuda") / "threads.so", "-shared", "-fPIC"))


@pytest.fixture
def threads(library, monkeypatch):
    """The threads as a backend of their own, on CPU tensors."""
    ops = {"lif_forward": cuda.lif_forward, "lif_backward": cuda.lif_backward}
    backend = Backend(NAME, lambda: None, lambda case: _args.refuses(case, "cpu"), ops)
    monkeypatch.setattr(trtkern.backends, "BACKENDS", (*trtkern.backends.BACKENDS, backend))
    monkeypatch.setattr(cuda, "_extension", lambda: library)
    monkeypatch.setattr(cuda, "_place", lambda x: (0, 0))
    return library


def check(cell):
    errors = compare(NAME, cell)
    assert errors.within(cell.dtype), f"{cell}: {errors}"


def test_every_neuron_is_owned_once(tmp_path):
    program = compiled("cuda_index.cpp", tmp_path / "index")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_forms_of_the_step_agree_bitwise(threads):
    assert threads.library.flat_differences() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grid(threads, dtype):
    for cell in cells(shape=(1, 3, 8)):
        if cell.dtype == dtype:
            check(cell)


@pytest.mark.parametrize("timesteps", [1, 4, 5, 8, 9, 16, 17, 40])
def test_chunks_layouts_and_alignment(threads, timesteps):
    sizes = ((1, 3, 8), "contiguous"), ((1, 1009), "contiguous"), ((2, 5, 4, 6), "channels_last")
    for dtype, (shape, layout), learnable in itertools.product(
        (torch.float32, torch.bfloat16), sizes, ("none", "channel")
    ):
        for reset, surrogate in (("soft", "sigmoid"), ("hard", "atan")):
            check(Cell(dtype, surrogate, reset, False, learnable, timesteps, shape, layout))


@pytest.mark.parametrize("learnable", ["scalar", "channel"])
def test_many_blocks(threads, learnable):
    """Per channel: several segments of the reduction, wide (runs of 128 and 611) and narrow (channels_last)."""
    sizes = ((3, 7, 611), "contiguous"), ((40, 2, 128), "contiguous"), ((2, 5, 16, 40), "channels_last")
    for shape, layout in sizes:
        check(Cell(torch.float32, timesteps=3, learnable=learnable, shape=shape, layout=layout))


def test_a_tensor_that_starts_off_a_vector(threads):
    """N is a multiple of the vector, the address is not of 16 bytes: one neuron a thread."""
    x = torch.randn(4 * 64 + 1)[1:].reshape(4, 1, 64)
    spikes, _, _ = lif(x, backend=NAME)
    assert torch.equal(spikes, lif(x, backend="reference").spikes)


def test_the_potential_equals_the_cpu_backend_bitwise(threads):
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    for dtype, reset, timesteps in itertools.product((torch.float32, torch.float16), ("hard", "soft"), (5, 33)):
        x = (torch.randn(timesteps, 2, 3, 24) + 0.5).to(dtype)
        neuron = {"decay": 0.7, "gain": 0.3, "bias": 0.1, "spec": LIFSpec(reset)}
        outputs = [lif(x, **neuron, backend=name, return_state=True, return_v=True) for name in (NAME, "cpu")]
        for ours, theirs in zip(*outputs, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("timesteps", [4, 7, 16, 40])
@pytest.mark.parametrize("neurons", [64, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(threads, dtype, timesteps, neurons):
    """Bytes of a training step: forward 2e, backward 3e, and v once every 16 steps; then learnable parameters."""
    x = torch.randn(timesteps, 1, neurons).to(dtype).requires_grad_()
    rows, row, edges = timesteps * neurons * x.element_size(), neurons * 4, (timesteps - 1) // CHUNK
    forward = {"x": (rows, 0), "s": (0, rows)}
    backward = {"x": (rows, 0), "gs": (rows, 0), "gx": (0, rows)}
    if edges:
        forward["edges"], backward["edges"] = (0, edges * row), (edges * row, 0)
    spikes = lif(x, backend=NAME).spikes
    assert threads.traffic() == forward
    spikes.backward(torch.ones_like(spikes))
    assert threads.traffic() == backward

    decay = torch.full((neurons,), 0.5, requires_grad=True)
    spikes = lif(x, decay=decay, backend=NAME).spikes
    spikes.backward(torch.ones_like(spikes))
    learning = threads.traffic()
    assert {name: learning[name] for name in backward} == backward
    assert learning["workspace"][1] >= 5 * row and learning["gparams"] == (0, 6 * row)


def test_a_neuron_that_is_not_finite_stays_alone(threads):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(20, 1, 40)
        x[3, 0, 17] = bad
        x.requires_grad_()
        flag = torch.zeros(1, dtype=torch.int32)
        spikes, state, _ = lif(x, backend=NAME, return_state=True, flag=flag)
        (spikes.sum() + state.sum()).backward()
        others = torch.arange(40) != 17
        assert flag.item() == 1
        assert torch.isfinite(state[0, others]).all() and torch.isfinite(x.grad[:, 0, others]).all()
        if bad != bad:
            assert torch.isnan(state[0, 17]) and torch.isnan(x.grad[3, 0, 17]) and spikes[3:, 0, 17].sum() == 0
    flag = torch.zeros(1, dtype=torch.int32)
    lif(torch.randn(20, 1, 40), backend=NAME, flag=flag)
    assert flag.item() == 0


def test_a_potential_beyond_float16_is_infinite_in_v_only(threads):
    """v in x's dtype rounds to inf, as torch would round it; the float32 state keeps the number."""
    x = torch.full((1, 1, 8), 6e4, dtype=torch.float16)
    spec = LIFSpec("none")
    _, state, v = lif(x, gain=2.0, spec=spec, backend=NAME, return_state=True, return_v=True)
    assert torch.equal(state, torch.full((1, 8), 2 * x[0, 0, 0].item())) and torch.isinf(v).all()
