"""What stands in the place of a GPU's driver in the process ``stubbed``: kernels are launched as ever, none runs.

A stand-in is put in its place for good, and is called by no other process. It returns a function that says how many
launches there were so far.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from os import environ
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trtkern import backends
from trtkern.bench.measure import ROOT

Launches = Callable[[], int]
TARGET = "sm_90"
"""What Triton compiles for."""
PROCESSORS = 132
"""Its multiprocessors."""


class Absent(Exception):
    """Why a stand-in cannot be had here."""


def _ready(backend: str) -> None:
    """From now on the backend takes every case."""
    backends.BACKENDS = tuple(
        replace(each, missing=lambda: None, refuses=lambda case: None) if each.name == backend else each
        for each in backends.BACKENDS
    )


def triton() -> Launches:
    """Triton compiles its kernels for a GPU, and what it launches them with only counts."""
    import triton

    from trtkern.profiling.inspect.triton import Driver

    count = 0

    class Utils:
        def load_binary(self, *given: Any) -> tuple[int, int, int, int, int]:
            return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, device: Any) -> dict[str, int]:
            return {
                "max_shared_mem": 232448, "multiprocessor_count": PROCESSORS, "warpSize": 32, "max_num_regs": 65536
            }  # fmt: skip

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *given: Any, **named: Any) -> None:
            nonlocal count
            count += 1

    class StandIn(Driver):
        utils, launcher_cls = Utils(), Launcher

    triton.runtime.driver.set_active(StandIn(TARGET))
    _ready("triton")
    return lambda: count


def cuda() -> Launches:
    """The extension of the CUDA backend, linked with ``bench/no_cudart.cpp`` in place of CUDA's runtime.

    Raises:
        Absent: its objects are not here, which a build in a checkout leaves behind, or no C++ compiler is.
    """
    from trtkern.backends import _args
    from trtkern.backends import cuda as backend

    built = ROOT / "build" / f"objects-{sysconfig.get_platform()}" / "trtkern._cuda"
    bindings = sorted((built / str(sys.implementation.cache_tag)).glob("*.o"))  # those of this Python
    objects = [str(path) for path in (*sorted(built.glob("*.o")), *bindings)]
    if not bindings:
        raise Absent("the objects of trtkern._cuda are not here; TRTKERN_CUDA=1 python setup.py build_ext --inplace")
    compiler = shlex.split(environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        raise Absent(f"there is no {compiler[0]}, which links the objects of trtkern._cuda with a stand-in")
    library = Path(tempfile.mkdtemp()) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        # The library's own functions come first, even where torch has loaded a CUDA runtime.
        made = [*compiler, "-shared", "-fPIC", "-O1", "-Wl,-Bsymbolic", str(ROOT / "bench" / "no_cudart.cpp"), *objects]
        subprocess.run([*made, "-o", str(library)], check=True, capture_output=True, text=True)
        spec = importlib.util.spec_from_file_location("trtkern._cuda", library)
        assert spec is not None and spec.loader is not None
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
        launches: Launches = ctypes.CDLL(str(library)).trtkern_launches
    finally:
        shutil.rmtree(library.parent)
    if (reason := _args.stale(extension)) is not None:
        raise Absent(reason)
    sys.modules["trtkern._cuda"] = extension
    stream, properties = SimpleNamespace(cuda_stream=0), SimpleNamespace(multi_processor_count=PROCESSORS)
    vars(torch.cuda).update(
        current_stream=lambda device=None: stream, get_device_properties=lambda device=None: properties
    )
    backend._stream = lambda device: 0
    backend.processors.cache_clear()
    _ready("cuda")
    return launches


STAND_INS: dict[str, Callable[[], Launches]] = {"triton": triton, "cuda": cuda}
"""By backend."""
