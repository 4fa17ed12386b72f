"""The threads of the CUDA kernels, compiled for the CPU, in the shape of ``trtkern._cuda`` (``test_cuda_threads``)."""

import ctypes
import subprocess
from pathlib import Path

from trtkern import dialect, surrogates

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"scalars": ctypes.c_float * 6, "alpha": ctypes.c_float}
INTS = ("dtype", "reset", "detach", "surrogate", "threads", "device")


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
        for name in ("run", "statistics", "input_grad", "workspace_floats", "statistics_workspace_floats"):
            getattr(self.library, name).restype = ctypes.c_int64
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

    def batch_norm_lif_statistics(self, args, stats, workspace):
        args.workspace = workspace
        assert self.library.statistics(ctypes.byref(args), ctypes.c_uint64(stats)) == 0, "an access out of bounds"

    def statistics_workspace_floats(self, args):
        return self.library.statistics_workspace_floats(ctypes.byref(args))

    def batch_norm_lif_input_grad(self, args):
        assert self.library.input_grad(ctypes.byref(args)) == 0, "an access out of bounds, or not aligned"

    def traffic(self):
        """Bytes read and written of each tensor in the last pass."""
        rows = [row.split() for row in self.library.traffic().decode().split(";") if row]
        return {name: (int(loaded), int(stored)) for name, loaded, stored in rows}


def build(folder):
    """The threads, compiled into that folder."""
    return Threads(compiled("cuda_threads.cpp", folder / "threads.so", "-shared", "-fPIC"))
