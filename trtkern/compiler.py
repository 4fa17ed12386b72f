"""The C++ compiler: where it is, the flags of the CPU kernels, and a call of it with its first error in one line.

The build (setup.py) and what compiles a neuron at first use (``trtkern.backends._compiled``) share it: what both make
computes the same to the last bit. The standard library only: the build uses it before torch exists.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

X86 = platform.machine().lower() in ("x86_64", "amd64")
# No -ffast-math (it loses NaN) and no contraction (every fma is written out, so that all targets agree bitwise).
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),  # the last: GCC's own AVX-512 intrinsics
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
BASELINE = ["-O1", "-DTK_GENERAL_ROWS"] if X86 else []  # few machines of that kind are left that run it
WIDE = [*AVX2, "-O1", "-DTK_FLOAT32_ONLY"]  # slow to compile: GCC takes its vectors apart


class Target(NamedTuple):
    """An instruction set: the header of ``csrc/cpu`` that describes it, and its flags."""

    header: str
    flags: list[str]


TARGETS = {
    "baseline": Target("baseline.h", BASELINE),
    "avx2": Target("avx2.h", AVX2),
    "avx512": Target("avx512.h", AVX512),
    "amx": Target("avx512.h", AVX512),  # whose tiles no neuron uses
    "wide": Target("wide.h", WIDE),
}
"""By the name that ``trtkern._cpu.isa()`` gives it."""


class CompilerError(Exception):
    """Why something cannot be compiled here."""


def find_cxx() -> list[str]:
    """The C++ compiler: CXX, else g++ (its OpenMP runtime is torch's), else what Python was built with.

    Raises:
        CompilerError: there is none; the message says how to get one.
    """
    asked = os.environ.get("CXX")
    if asked and not shutil.which(shlex.split(asked)[0]):
        raise CompilerError(f"CXX={asked} is not there; unset it or name a C++ compiler")
    candidates = [asked, "g++", sysconfig.get_config_var("CXX"), "c++", "clang++"]
    for command in map(shlex.split, filter(None, candidates)):
        if shutil.which(command[0]):
            return command
    raise CompilerError("no C++ compiler was found; install one (Debian: apt install g++)")


def compiles(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler takes the flags."""
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(command: list[str]) -> None:
    """Run a compiler.

    Raises:
        CompilerError: it failed; the message is its first error line.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line.lower()), lines[-1])
        if os.environ.get("TRTKERN_VERBOSE"):
            sys.stderr.write("\n".join([shlex.join(command), *lines, ""]))
        raise CompilerError(f"{Path(command[0]).name} failed: {first.strip()}")
