"""The wheels that travel to a machine without a network, and the environment that is made of them there."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu-bundle"
"""Ignored by git, as all of build/."""
LIMIT = 60 << 20
"""Bytes."""
PEERS = (
    "spikingjelly", "snntorch", "norse", "sinabs", "sinabs-exodus", "rockpool",
    "nir==1.0.4", "nirtorch", "loguru", "scienceplots", "tqdm", "pbr", "requests", "urllib3", "idna", "certifi",
)  # fmt: skip
"""Other libraries and what they import, where there is no bench/peers.txt; later ones of it are small and pure."""
TOOLS = (
    "pytest", "iniconfig", "pluggy", "packaging", "pygments", "pytest-xdist", "execnet", "hypothesis",
    "sortedcontainers", "typer", "click", "annotated-doc", "shellingham", "rich", "markdown-it-py", "mdurl", "pybind11",
    "setuptools", "wheel",
)  # fmt: skip
"""What the tests and the build need beside torch, numpy, safetensors and matplotlib."""
LEAST = {"setuptools": 77, "pytest": 8, "rich": 13}
"""Major versions, as pyproject.toml has them; an older one makes way for the bundle's."""


def requirements() -> list[str]:
    """One a line as pip takes them; options such as index addresses are pip's own business and left out."""
    pinned = ROOT / "bench" / "peers.txt"
    lines = pinned.read_text().splitlines() if pinned.exists() else list(PEERS)
    named = [line.partition("#")[0].strip() for line in lines]
    return [line for line in named if line and not line.startswith("-")] + list(TOOLS)


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of this interpreter; its output is kept."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last error line of pip."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "pip said nothing")[:200]


def fetch() -> int:
    """Fill the folder with pure-Python wheels; what has none is named. Exit status 1 if they are over the limit."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for wanted in requirements():
        pure = ("--only-binary=:all:", "--implementation", "py", "--abi", "none", "--platform", "any")
        done = pip("download", "--quiet", "--no-deps", *pure, "--dest", str(FOLDER), wanted)
        if done.returncode:
            done = _built(wanted)
        print(f"{wanted}: {'ok' if done.returncode == 0 else 'left out: ' + reason(done)}", flush=True)
    wheels = sorted(FOLDER.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels, {size / 2**20:.1f} MiB, in {FOLDER.relative_to(ROOT)}/")
    if size > LIMIT:
        print(f"expected at most {LIMIT >> 20} MiB; take something out of bench/peers.txt", file=sys.stderr)
    return int(size > LIMIT)


def _built(wanted: str) -> subprocess.CompletedProcess[str]:
    """A wheel made of the source archive, kept if it holds nothing that was compiled."""
    with tempfile.TemporaryDirectory() as folder:
        done = pip("wheel", "--quiet", "--no-deps", "--prefer-binary", "-w", folder, wanted)
        for path in Path(folder).glob("*.whl"):
            if not path.name.endswith("-none-any.whl"):
                return subprocess.CompletedProcess([], 1, "", f"{path.name} is not pure Python")
            shutil.move(path, FOLDER / path.name)
    return done


def python_of(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / "bin" / "python"


def make_environment(environment: Path) -> None:
    """An environment in front of the packages of this interpreter: nothing is written among those."""
    venv.EnvBuilder(with_pip=False, clear=True, symlinks=True).create(environment)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    lines = [f"import site; site.addsitedir({place!r})" for place in places if Path(place).is_dir()]
    (environment / "lib" / version / "site-packages" / "machine.pth").write_text("\n".join([*lines, ""]))


def outdated(name: str, version: str) -> bool:
    """Whether a distribution of this interpreter is older than what the build or the tests take."""
    first = version.partition(".")[0]
    return name in LEAST and first.isdigit() and int(first) < LEAST[name]


def install_wheels(environment: Path) -> None:
    """Those of the bundle that this interpreter lacks, without a network; says what is left out."""
    wheels = sorted(FOLDER.glob("*.whl"))
    here = {
        name.lower().replace("-", "_")
        for dist in metadata.distributions()
        if (name := dist.metadata["Name"]) and not outdated(name.lower(), dist.version)
    }
    lacking = [path for path in wheels if path.name.partition("-")[0].lower() not in here]
    if not wheels:
        print("no bundle: peers that are not installed here are left out (make gpu-bundle, before)", flush=True)
    target = ("--python", str(python_of(environment)), "install", "--quiet", "--no-index", "--no-deps", "--no-compile")
    if not lacking or pip(*target, *map(str, lacking)).returncode == 0:
        print(f"{len(lacking)} wheels of the bundle installed, {len(wheels) - len(lacking)} were here", flush=True)
        return
    for path in lacking:  # one of them is broken
        done = pip(*target, str(path))
        print(f"{path.name}: {'ok' if done.returncode == 0 else 'left out: ' + reason(done)}", flush=True)


def build(environment: Path, archs: str, rehearse: bool) -> int:
    """Environment, wheels, extensions; the exit status. A rehearsal leaves the checkout's extensions as they are."""
    make_environment(environment)
    install_wheels(environment)
    if rehearse:
        command = [str(python_of(environment)), "setup.py", "--quiet", "build_ext",
                   "--build-lib", str(environment.parent / "lib")]  # fmt: skip
    else:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python_of(environment)),
                   "install", "-v", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]  # fmt: skip
    env = {**os.environ, "TRTKERN_CUDA_ARCHS": archs} if archs else dict(os.environ)
    status = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    if status or rehearse:
        print("extensions built" if not status else "the build failed", flush=True)
        return status
    code = (
        "from trtkern.backends import BACKENDS; found = {b.name: b.missing() for b in BACKENDS}\n"
        "print('backends:', ', '.join(n + (f' (missing: {w})' if w else '') for n, w in found.items()))"
    )
    return subprocess.run([str(python_of(environment)), "-c", code], cwd=ROOT / "build", check=False).returncode
