"""Neurons and surrogates that ``trtkern._cpu`` was not built with: compiled for the CPU at first use.

One neuron with its surrogates, all that are built in or one of the user's, is one translation unit over the headers of
csrc/, for the instruction set that is in use. Its shared library is kept in the cache folder, under a name that has a
hash of all that it was made of, so that it is made once on a machine. ``TRTKERN_JIT=0`` forbids it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from trtkern import compiler, dialect, surrogates
from trtkern.neurons import Neuron
from trtkern.output.files import cache_folder
from trtkern.output.text import say
from trtkern.spec import LIFSpec

WAIT = 300.0
"""Seconds after which a process compiles for itself what another one has begun and not ended."""
FOLDERS = ("cpu", "lif", "norm", "recurrent", "spikes", "spike_conv")
"""Of csrc: where the headers are."""
ELSE = 'use backend="reference", or triton on a GPU'
_Key = tuple[str, str | None, str]
_known: dict[_Key, int | str] = {}
"""By neuron, surrogate of the user's and instruction set: its number in the extension, or why it has none."""
_one_at_a_time = threading.Lock()


class _CannotCompile(Exception):
    """Why, and what to do."""


def objection(extension: ModuleType, spec: LIFSpec) -> str | None:
    """Why the CPU cannot run a spec that holds something of the user's, or None. The first call compiles it."""
    found = _found(extension, spec)
    return found if isinstance(found, str) else None


def numbers(extension: ModuleType, spec: LIFSpec) -> tuple[int, int]:
    """How the extension calls neuron and surrogate of such a spec.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    found = _found(extension, spec)
    if isinstance(found, str):
        raise RuntimeError(f"backend 'cpu': {found}")
    surrogate = str(spec.surrogate)
    return found, surrogates.BUILTIN.index(surrogate) if surrogate in surrogates.BUILTIN else 0


def available() -> tuple[str | None, str]:
    """Why nothing can be compiled here, or None; and what does it and where it is kept, in words."""
    try:
        cxx = _cxx()
        _sources()
    except _CannotCompile as error:
        return str(error), ""
    return None, f"{_version(tuple(cxx))}; kept in {_folder()}"


def _found(extension: ModuleType, spec: LIFSpec) -> int | str:
    surrogate = surrogates.lookup(str(spec.surrogate))
    key = (spec.neuron, None if surrogate.builtin else surrogate.name, extension.isa())
    if key not in _known:
        with _one_at_a_time:
            if key not in _known:
                what = f"the neuron {_short(spec.row)}" if not spec.row.builtin else f"the surrogate {surrogate.name}"
                try:
                    _known[key] = _loaded(extension, spec.row, surrogate, what, key[2])
                except _CannotCompile as error:
                    return f"it compiles {what} at first use, and {error}"
                except (compiler.CompilerError, OSError, TypeError, ValueError, RuntimeError) as error:
                    # This will not go better the next time.
                    _known[key] = f"it compiles {what} at first use, and {error}; {ELSE}"
    return _known[key]


def _short(row: Neuron) -> str:
    return row.name.partition("@")[0]


def _cxx() -> list[str]:
    if os.environ.get("TRTKERN_JIT") == "0":
        raise _CannotCompile(f"TRTKERN_JIT=0 forbids it; unset that, or {ELSE}")
    try:
        return compiler.find_cxx()
    except compiler.CompilerError as error:
        raise _CannotCompile(f"{error}, or {ELSE}") from None


@cache
def _version(cxx: tuple[str, ...]) -> str:
    done = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or [" ".join(cxx)])[0]


@cache
def _headers() -> tuple[Path, str] | None:
    """The folder of the headers and a hash of them all; None where they were not installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu" / "own_rows.h").exists():
            files = sorted(path for name in FOLDERS for path in (folder / name).glob("*.h"))
            parts = (f"{path.relative_to(folder)}\0{path.read_text()}\0" for path in files)
            return folder, hashlib.sha256("".join(parts).encode()).hexdigest()
    return None


def _sources() -> tuple[Path, str]:
    found = _headers()
    if found is None:
        raise _CannotCompile(f"the headers of csrc were not installed; install trtkern again, or {ELSE}")
    return found


def _folder() -> Path:
    return cache_folder() / "neurons"


def _loaded(extension: ModuleType, row: Neuron, surrogate: surrogates.Surrogate, what: str, isa: str) -> int:
    """The number of the neuron in the extension, which has it from then on."""
    cxx, (csrc, headers) = _cxx(), _sources()
    target = compiler.TARGETS[isa]
    printed = dialect.own_headers(row, None if surrogate.builtin else surrogate.function)
    unit = f'#include "cpu/{target.header}"\n#include "cpu/own_rows.h"\n'
    flags = [*compiler.FLAGS, *target.flags]
    made_of = [*sorted(printed.items()), unit, flags, headers, _version(tuple(cxx)), isa]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
    own = "" if surrogate.builtin else f"-{surrogate.name.partition('@')[0]}"
    path = _folder() / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', (_short(row) + own)[:60])}-{isa}-{key}.so"
    files = {f"trtkern_{name}.h": text for name, text in printed.items()} | {"rows.cpp": unit}
    command = [*cxx, *flags, f"-I{csrc}"]
    if path.exists():
        try:
            if _is_whole(path):
                return extension.load_rows(str(path))
        except RuntimeError:
            pass
        path.unlink(missing_ok=True)  # damaged: made again
    _make(path, command, files, f"{what} for this CPU ({isa})")
    return extension.load_rows(str(path))


def _make(path: Path, command: list[str], files: dict[str, str], what: str) -> None:
    """Compile the files into the library at that path; where another process does, wait for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(path.with_suffix(".lock"), what):
            if path.exists():
                return
            say(f"compiling {what}, which is kept in {path.parent}")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as made:
                for name, text in files.items():
                    Path(made, name).write_text(text)
                library = Path(made, path.name)
                compiler.run([*command, f"-I{made}", "-shared", "-s", f"{made}/rows.cpp", "-o", str(library)])
                _seal(library)
                os.replace(library, path)
    except OSError as error:
        raise _CannotCompile(
            f"{path.parent} cannot be written ({error.strerror or error}); set TRTKERN_CACHE to a folder of yours, or "
            f"{ELSE}"
        ) from None


_SEAL = b"trtkern own rows"


def _seal(library: Path) -> None:
    """Write its hash behind a library, where nobody who loads it looks."""
    with library.open("ab") as file:
        file.write(_SEAL + hashlib.sha256(library.read_bytes()).digest())


def _is_whole(library: Path) -> bool:
    """Whether the hash is there and right: a library that was cut short would end the process that loads it."""
    content, end = library.read_bytes(), len(_SEAL) + 32
    return content[-end:] == _SEAL + hashlib.sha256(content[:-end]).digest()


@contextmanager
def _alone(lock: Path, what: str) -> Iterator[None]:
    """Within, no other process is within for the same lock; the lock of one that was killed is free."""
    with open(lock, "a") as file:
        until, waited = time.monotonic() + WAIT, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError) or time.monotonic() > until:
                    break  # a file system without locks, or one who never ends: both write the same
            if not waited:
                say(f"waiting for another process that compiles {what}")
            waited = True
            time.sleep(0.05)
        yield
        lock.unlink(missing_ok=True)


def forget() -> None:
    """What was compiled or refused in this process is looked for anew; for tests."""
    _known.clear()
    _headers.cache_clear()
