"""The threads of the CUDA kernels, compiled for the CPU, in the shape of ``trtkern._cuda`` (``test_cuda_threads``)."""

import ctypes
import fcntl
import hashlib
import subprocess
from pathlib import Path

import trtkern.backends
from trtkern import dialect
from trtkern.backends import _args, cuda
from trtkern.backends.base import Backend

ROOT = Path(__file__).resolve().parent.parent
NAME = "cuda-threads"
TYPES = {
    **{"uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "int": ctypes.c_int},
    **{"float": ctypes.c_float, "double": ctypes.c_double},
}


def copy(self):
    """The same arguments once more."""
    return type(self).from_buffer_copy(self)


def compiled(source, output, *flags):
    """Compile a file of tests/ with the headers of csrc/ and the printed ones."""
    for name, text in dialect.headers().items():
        (output.parent / f"trtkern_{name}.h").write_text(text)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{output.parent}"]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-ffp-contract=off"]
    subprocess.run([*command, *flags, *includes, str(ROOT / "tests" / source), "-o", str(output)], check=True)
    return output


def at(args, tensors):
    """A copy for those tensors, in the order of the fields."""
    made = copy(args)
    for (name, *_), tensor in zip(args._fields_, tensors, strict=False):
        setattr(made, name, 0 if tensor is None else tensor.data_ptr())
    return made


class Threads:
    """``trtkern._cuda`` in the shape that the backend expects."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.traffic.restype = self.library.layout.restype = ctypes.c_char_p
        passes = "run", "statistics", "affine", "finish", "coefficients", "input_grad", "launches"
        for name in (*passes, "workspace_floats", "statistics_workspace_floats", "flat_differences"):
            getattr(self.library, name).restype = ctypes.c_int64
        self._lif, self._norm = self._struct(0), self._struct(1)

    def _struct(self, norm):
        """LifArgs or NormArgs, without any other attribute."""
        *rows, size = self.library.layout(norm).decode().split(";")
        layout = [row.split() for row in rows]
        kinds = [(name, TYPES[kind] * int(many) if many != "1" else TYPES[kind]) for name, kind, many, _ in layout]
        struct = type("Struct", (ctypes.Structure,), {"_fields_": kinds, "__slots__": (), "at": at})
        assert [getattr(struct, name).offset for name, *_ in layout] == [int(offset) for *_, offset in layout]
        assert ctypes.sizeof(struct) == int(size)
        return struct

    def LifArgs(self):
        args = self._lif()
        self.library.set_defaults(ctypes.byref(args), None)
        return args

    def NormArgs(self):
        args = self._norm()
        self.library.set_defaults(None, ctypes.byref(args))
        return args

    def launches(self):
        """Kernels that a GPU would have been given."""
        return self.library.launches()

    def neurons_a_thread(self):
        """Of the last LIF launch."""
        return self.library.neurons_a_thread(ctypes.byref(self.args))

    def lif_forward(self, args):
        self.args = args
        assert self.library.run(ctypes.byref(args), 0, None) == 0, "an access out of bounds, or not aligned"

    def lif_backward(self, args, workspace=0, norm=None):
        args.workspace, self.args = workspace, args
        finish = None if norm is None else ctypes.byref(norm)
        assert self.library.run(ctypes.byref(args), 1, finish) == 0, "an access out of bounds, or not aligned"

    def lif_forward_at(self, fixed, tensors, stream):
        self.lif_forward(fixed.at(tensors))

    def lif_backward_at(self, fixed, tensors, stream, room=None, norm=None, norm_tensors=None):
        args, workspace = fixed.at(tensors), None
        if args.gparams or args.norm_sums:
            workspace = room(self.workspace_floats(args))
        finish = None if norm is None else norm.at(norm_tensors)
        self.lif_backward(args, 0 if workspace is None else workspace.data_ptr(), finish)

    def batch_norm_lif_affine_at(self, fixed, tensors, stream, room, norm, norm_tensors):
        args = fixed.at(tensors)
        workspace = room(self.statistics_workspace_floats(args))
        self.batch_norm_lif_affine(args, norm.at(norm_tensors), workspace.data_ptr())

    def workspace_floats(self, args):
        return self.library.workspace_floats(ctypes.byref(args))

    def batch_norm_lif_statistics(self, args, stats, workspace):
        args.workspace = workspace
        assert self.library.statistics(ctypes.byref(args), ctypes.c_uint64(stats)) == 0, "an access out of bounds"

    def batch_norm_lif_affine(self, args, norm, workspace):
        args.workspace = workspace
        assert self.library.affine(ctypes.byref(args), ctypes.byref(norm)) == 0, "an access out of bounds"

    def batch_norm_lif_finish(self, norm):
        assert self.library.finish(ctypes.byref(norm)) == 0, "an access out of bounds"

    def batch_norm_lif_coefficients(self, norm):
        assert self.library.coefficients(ctypes.byref(norm)) == 0, "an access out of bounds"

    def statistics_workspace_floats(self, args):
        return self.library.statistics_workspace_floats(ctypes.byref(args))

    def batch_norm_lif_input_grad(self, args):
        assert self.library.input_grad(ctypes.byref(args)) == 0, "an access out of bounds, or not aligned"

    def traffic(self):
        """Bytes read and written of each tensor in the last pass."""
        rows = [row.split() for row in self.library.traffic().decode().split(";") if row]
        return {name: (int(loaded), int(stored)) for name, loaded, stored in rows}


def build():
    """The threads, compiled once for a state of the sources: by whoever comes first, the others wait."""
    sources = sorted([*(ROOT / "csrc").glob("*/*.h"), *(ROOT / "tests").glob("cuda_threads*")])
    printed = "".join(dialect.headers().values()).encode()
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + printed)
    folder = ROOT / "build" / "cuda-threads"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{state.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()  # who has it loaded keeps it
            made = compiled("cuda_threads.cpp", folder / "threads.tmp", "-shared", "-fPIC")
            made.rename(library)
    return Threads(library)


def as_backend(monkeypatch, processors=0):
    """The threads as a backend of their own, NAME, on CPU tensors.

    Args:
        processors: multiprocessors of the GPU that they seem to be on; 0: not known, which reads nothing ahead.
    """
    library = build()
    backend = Backend(NAME, lambda: None, lambda case: _args.refuses(case, "cpu"), cuda.BACKEND.ops)
    monkeypatch.setattr(trtkern.backends, "BACKENDS", (*trtkern.backends.BACKENDS, backend))
    monkeypatch.setattr(cuda, "_extension", lambda: library)
    monkeypatch.setattr(cuda, "_place", lambda x: (0, 0, processors))
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    return library
