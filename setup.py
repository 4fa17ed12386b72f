"""Builds trtkern: prints surrogates and neurons as C++ headers, compiles csrc/ into trtkern._cpu and trtkern._cuda.

A missing compiler or nvcc leaves that extension out and says so in one line. Every Python that builds here shares the
compiled kernels; only the bindings are compiled for each.

    TRTKERN_CPU=1, TRTKERN_CUDA=1    that extension or an error; 0: do not build it
    TRTKERN_CPU_WIDE=1               also the 16-lane code on AVX2 (float32), for tests on machines without AVX-512
    TRTKERN_SANITIZE=1               the CPU extension with the sanitizers of addresses and undefined behaviour
    TRTKERN_CUDA_ARCHS="80;90"       GPU targets: a cubin for each, PTX of the lowest
    CXX, CUDA_HOME                   which compilers
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
JOBS = max(2, min(8, (os.cpu_count() or 2) // 2))  # translation units compiled at a time


@contextmanager
def without_torch() -> Iterator[None]:
    """Within, ``import trtkern.MODULE`` runs that file alone, not the package, whose import needs torch."""
    package = ModuleType("trtkern")
    package.__path__ = [str(ROOT / "trtkern")]
    sys.modules["trtkern"] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trtkern"]:
            del sys.modules[name]


with without_torch():
    compiler = importlib.import_module("trtkern.compiler")
X86, AVX2, AVX512 = compiler.X86, compiler.AVX2, compiler.AVX512
SANITIZE = []
if os.environ.get("TRTKERN_SANITIZE") == "1":
    SANITIZE = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
        "-O1",
        "-g1",
    ]
AMX = ["-mamx-tile", "-mamx-bf16"]
AMX_SOURCES = ("csrc/spike_conv/cpu_amx.cpp", "csrc/recurrent/cpu_amx.cpp")  # left out where a compiler has no AMX
LAUNCHERS = ("csrc/cpu/launch.cpp", "csrc/recurrent/cpu_launch.cpp")  # which know of every instruction set
HEADERS = (
    "cpu",
    "delay",
    "lif",
    "norm",
    "recurrent",
    "spikes",
    "spike_conv",
)  # of csrc; own neurons need them
BINDINGS = ["-O1"]  # nothing to optimise, and half a minute to do it
BOUND = "bindings.cpp"  # the end of the sources that read Python's headers, and are compiled for each Python
# The sources of trtkern._cpu and the flags that each adds. Each instruction set is a translation unit of its own.
CPU_SOURCES = {
    "csrc/cpu/bindings.cpp": BINDINGS, "csrc/cpu/launch.cpp": ["-fopenmp"], "csrc/cpu/own_rows.cpp": [],
    "csrc/norm/cpu_finish.cpp": [],
    "csrc/cpu/isa_baseline.cpp": [], "csrc/spike_conv/cpu_launch.cpp": ["-fopenmp"],
    "csrc/spike_conv/cpu_baseline.cpp": [], "csrc/recurrent/cpu_launch.cpp": ["-fopenmp"],
    "csrc/recurrent/cpu_baseline.cpp": [], "csrc/delay/cpu_baseline.cpp": [],
}  # fmt: skip
if X86:
    CPU_SOURCES["csrc/cpu/isa_baseline.cpp"] = compiler.BASELINE
    CPU_SOURCES["csrc/recurrent/cpu_baseline.cpp"] = ["-O1"]
    for unit_of in ("csrc/cpu/isa_", "csrc/spike_conv/cpu_", "csrc/recurrent/cpu_", "csrc/delay/cpu_"):
        CPU_SOURCES[f"{unit_of}avx512.cpp"], CPU_SOURCES[f"{unit_of}avx2.cpp"] = AVX512, AVX2
    if sys.platform == "linux":  # which lets a process ask for the tiles
        CPU_SOURCES |= {source: [*AVX512, *AMX] for source in AMX_SOURCES}
if X86 and os.environ.get("TRTKERN_CPU_WIDE") == "1":
    for folder in ("cpu/isa", "recurrent/cpu", "delay/cpu"):
        CPU_SOURCES[f"csrc/{folder}_wide.cpp"] = compiler.WIDE
    for launcher in LAUNCHERS:
        CPU_SOURCES[launcher].append("-DTRTKERN_CPU_WIDE")


class BuildError(Exception):
    """Why an extension cannot be built here, and how to get it."""


class Unit(NamedTuple):
    """One compiler call: the object file that it makes, and the command."""

    output: Path
    command: list[str]

    @property
    def reads(self) -> Path:
        """The file that lists what the compiler read."""
        return self.output.with_suffix(".d")

    @property
    def note(self) -> Path:
        """The file with the command that made the object."""
        return self.output.with_suffix(".command")

    @property
    def said(self) -> str:
        """The command as the note has it: where the headers of a temporary installation lie changes nothing."""
        return shlex.join(part for part in self.command if not part.startswith("-I"))

    def is_current(self) -> bool:
        """Whether the same command made the object after the last change of all that it read."""
        if not (self.output.exists() and self.reads.exists() and self.note.exists()):
            return False
        inputs = map(Path, self.reads.read_text().replace("\\\n", " ").partition(":")[2].split())
        newest = max(path.stat().st_mtime for path in inputs if path.exists())
        return self.note.read_text() == self.said and newest < self.output.stat().st_mtime


def write_headers(folder: Path) -> None:
    """The headers that are made of the tables of surrogates and neurons, in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with without_torch():
        headers = importlib.import_module("trtkern.dialect").headers()
    for name, header in headers.items():
        path = folder / f"trtkern_{name}.h"
        if not path.exists() or path.read_text() != header:  # its date decides what is compiled again
            path.write_text(header)


def find_cxx() -> list[str]:
    """The C++ compiler (``trtkern.compiler.find_cxx``); a BuildError where there is none."""
    try:
        return compiler.find_cxx()
    except compiler.CompilerError as error:
        raise BuildError(f"{error}, and install trtkern again") from None


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [str(Path(home) / "bin") for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise BuildError("no nvcc; install the CUDA toolkit (or set CUDA_HOME) and install trtkern again")
    return nvcc


def gencode() -> list[str]:
    """nvcc's targets: a cubin for each of TRTKERN_CUDA_ARCHS, made from the PTX of the lowest, which comes along."""
    text = os.environ.get("TRTKERN_CUDA_ARCHS", "80;90")
    archs = text.replace(",", ";").replace(" ", ";").split(";")
    archs = [a.strip().removeprefix("sm_").replace(".", "") for a in archs if a.strip()]
    if not archs or not all(a.rstrip("af").isdigit() for a in archs):
        raise SystemExit(f"TRTKERN_CUDA_ARCHS: expected numbers such as '80;90', got {text!r}")
    lowest = f"compute_{min(int(a.rstrip('af')) for a in archs)}"
    return [f"-gencode=arch={lowest},code=[{','.join(f'sm_{a}' for a in archs)},{lowest}]"]


def run(command: list[str]) -> None:
    """Run a compiler; a BuildError with its first error line when it fails."""
    try:
        compiler.run(command)
    except compiler.CompilerError as error:
        raise BuildError(f"{error}; mend that and install trtkern again") from None


class BuildExt(build_ext):
    """Compiles the units of all extensions, two at a time, and leaves out an extension that cannot be built."""

    def build_extensions(self) -> None:
        # Objects stay in the checkout, whatever temporary folder the installer works in: a second install is quick.
        # Paths are those within it, so that a copy of the checkout with its objects compiles nothing again.
        kind = "sanitized" if SANITIZE else "objects"
        temp = Path("build") / f"{kind}-{sysconfig.get_platform()}"
        plans = {}
        for extension in self.extensions:
            with self.or_left_out(extension):
                plans[extension.name] = plan(extension, temp)
        announce({name: [unit for unit in units if not unit.is_current()] for name, (units, _) in plans.items()})
        with ThreadPoolExecutor(JOBS) as pool:
            compiling = {
                name: [pool.submit(compile_unit, unit, bool(self.force)) for unit in units]
                for name, (units, _) in plans.items()
            }
        for extension in [e for e in self.extensions if e.name in plans]:
            units, link = plans[extension.name]
            with self.or_left_out(extension):
                for unit in compiling[extension.name]:
                    unit.result()
                output = Path(self.get_ext_fullpath(extension.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                run([*link, *(str(unit.output) for unit in units), "-o", str(output)])

    @contextmanager
    def or_left_out(self, extension: Extension) -> Iterator[None]:
        """A BuildError within leaves the extension out and says so in one line, or ends the build where it must be."""
        switch = f"TRTKERN{extension.name.rpartition('.')[2].upper()}"
        try:
            yield
        except BuildError as error:
            if os.environ.get(switch) == "1":
                raise SystemExit(f"trtkern: {switch}=1, but {extension.name} cannot be built: {error}") from None
            print(f"trtkern: left out {extension.name}: {error}", file=sys.stderr)
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # of an earlier build
            self.extensions = [other for other in self.extensions if other is not extension]


def announce(todo: dict[str, list[Unit]]) -> None:
    """Before a long wait: how much there is to compile, and how the kernels for GPUs are left out."""
    counts = {name: len(units) for name, units in todo.items() if units}
    if not counts:
        return
    files = " and ".join(f"{count} file{'s'[: count - 1]} of {name}" for name, count in counts.items())
    cuda = "; TRTKERN_CUDA=0 leaves trtkern._cuda out" if "trtkern._cuda" in counts else ""
    print(f"trtkern: compiling {files}, {JOBS} at a time, which takes minutes{cuda}", file=sys.stderr, flush=True)


def plan(extension: Extension, temp: Path) -> tuple[list[Unit], list[str]]:
    """The units of an extension and its link command. The bindings alone see the headers of Python."""
    import pybind11  # needed only where there is something to build

    generated, objects = temp / "generated", temp / extension.name
    bindings = objects / str(sys.implementation.cache_tag)
    bindings.mkdir(parents=True, exist_ok=True)
    write_headers(generated)
    includes = [f"-I{path}" for path in ("csrc", generated)]
    python = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    commands, link = (cuda_commands if extension.name.endswith("_cuda") else cpu_commands)(extension, includes)
    units = [
        unit([*command, *python], source, bindings) if source.endswith(BOUND) else unit(command, source, objects)
        for source, command in commands.items()
    ]
    return units, link


def compile_unit(unit: Unit, force: bool) -> None:
    """Run the compiler, unless there is nothing new to compile."""
    if unit.is_current() and not force:
        return
    unit.note.unlink(missing_ok=True)
    run([*unit.command, "-MMD", "-MF", str(unit.reads)])
    unit.note.write_text(unit.said)


def unit(command: list[str], source: str, objects: Path) -> Unit:
    """The compiler call of a source; csrc/lif/cuda.cu becomes lif-cuda.o."""
    output = objects / "-".join(Path(source).relative_to("csrc").with_suffix(".o").parts)
    return Unit(output, [*command, "-c", source, "-o", str(output)])


def cpu_commands(ext: Extension, includes: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The compiler calls of trtkern._cpu by source, and its link command; OpenMP is linked as the plain libgomp that
    torch has."""
    cxx, flags, sources = find_cxx(), dict(CPU_SOURCES), list(ext.sources)
    if AMX_SOURCES[0] in sources:
        if compiler.compiles(cxx, AMX):
            flags |= {launcher: [*flags[launcher], "-DTRTKERN_AMX"] for launcher in LAUNCHERS}
        else:
            sources = [source for source in sources if source not in AMX_SOURCES]
    common = [*cxx, *compiler.FLAGS, *includes]
    commands = {source: [*common, *flags[source], *SANITIZE] for source in sources}
    return commands, [*cxx, "-shared", "-fopenmp", "-ldl", *(SANITIZE or ["-s"])]


def cuda_commands(ext: Extension, includes: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The compiler calls of trtkern._cuda by source, and its link command; cudart is static: it imports without a
    GPU."""
    nvcc, cxx = find_nvcc(), find_cxx()
    toolkit = Path(nvcc).resolve().parent.parent
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    kernels = [nvcc, *flags, *gencode(), *includes]
    bindings = [*cxx, *compiler.FLAGS, *includes, *BINDINGS, "-isystem", str(toolkit / "include")]
    commands = {source: kernels if source.endswith(".cu") else bindings for source in ext.sources}
    found = [f"-L{toolkit / 'lib'}"] if (toolkit / "lib").is_dir() else []  # where PyPI's toolkit has its libraries
    return commands, [nvcc, "-shared", "-cudart", "static", *found, "-Xcompiler", "-fPIC", "-Xlinker", "-s"]


def extensions() -> list[Extension]:
    """The extensions whose sources are here and that are not switched off."""
    cpu = sorted(CPU_SOURCES, key=lambda source: not source.startswith("csrc/cpu/isa_"))  # half a minute each
    cuda = ["csrc/cuda/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("*/*.cu"))]
    found = []
    for name, sources in (("_cuda", cuda), ("_cpu", cpu)):  # the longest first
        present = len(sources) > 1 and all((ROOT / source).exists() for source in sources)
        if present and os.environ.get(f"TRTKERN{name.upper()}") != "0":
            found.append(Extension(f"trtkern.{name}", sources, language="c++"))
    return found


packages = find_namespace_packages(str(ROOT), include=["trtkern", "trtkern.*"], exclude=["*.__pycache__"])
setup(
    packages=[*packages, "trtkern.kernels", "trtkern.csrc"],
    package_dir={"trtkern.kernels": "kernels", "trtkern.csrc": "csrc"},
    package_data={
        "trtkern": ["data/*.gz", "data/*.txt", "recipes/*.toml", "recipes/controls/*.toml", "py.typed"],
        "trtkern.csrc": [f"{folder}/*.h" for folder in HEADERS],
    },
    exclude_package_data={"trtkern.csrc": ["*/*.cpp", "*/*.cu", "*/cuda*.h", "cuda/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
