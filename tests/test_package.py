"""The package as a user meets it: importing, building, and what it leaves untouched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

import trtkern
from trtkern.backends import _args
from trtkern.backends.base import CHUNK, PARAMS
from trtkern.backends.cuda import THREADS
from trtkern.profiling.inspect.cuda_code import POINTERS

ROOT = Path(__file__).resolve().parent.parent


def python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT.parent, env={**os.environ, **env}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_little_no_kernel_and_says_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); threads = torch.get_num_threads(); import trtkern;"
        "new = set(sys.modules) - before;"
        "print(sorted(m for m in new if not m.startswith('trtkern')"
        " or m.startswith(('trtkern._cpu', 'trtkern._cuda', 'trtkern.kernels'))), threads == torch.get_num_threads());"
        "print(len(new))"
    )
    said, count = python(code, TRITON_INTERPRET="0").splitlines()
    assert said == "[] True"  # beside torch, nothing but Python code of this package
    assert int(count) <= 56


def test_the_public_names():
    assert set(trtkern.__all__) <= set(dir(trtkern))
    for module in (trtkern, trtkern.nn):
        for name in module.__all__:
            assert getattr(module, name).__doc__ or name == "nn", name


def test_python_and_csrc_agree_on_the_constants():
    text = (ROOT / "csrc" / "lif" / "args.h").read_text()
    assert int(re.search(r"kChunk = (\d+)", text)[1]) == CHUNK
    assert int(re.search(r"kMostParams = (\d+)", text)[1]) == _args.MOST_PARAMS
    names = re.search(r"enum Param : int \{(.*?)\}", text)[1]
    rows = [re.sub(r"(?<!^)([A-Z])", r"_\1", n).lower() for n in re.findall(r"k(\w+) = \d", names)]
    assert rows[:6] == [name.replace("v_threshold", "threshold") for name in PARAMS]
    assert int(re.search(r"kThreads = (\d+)", (ROOT / "csrc" / "cuda" / "index.h").read_text())[1]) == THREADS


def test_python_fills_every_field_of_the_launch():
    fields, more, spikes, delays = (
        dict(re.findall(r"^TK_FIELDS?\(\w+, (\w+), (\S+)\)", (ROOT / "csrc" / of / "fields.h").read_text(), re.M))
        for of in ("lif", "norm", "spike_conv", "delay")
    )
    assert len(fields) >= 30 and len(more) >= 20 and len(spikes) >= 30 and len(delays) >= 5
    backends = ROOT / "trtkern" / "backends"
    filled = {name for path in backends.glob("*.py") for name in re.findall(r"(?<!/)\bargs\.(\w+)", path.read_text())}
    # Tensors in the order of the fields (LifArgs.at, NormArgs.at).
    filled.update(POINTERS[: POINTERS.index("workspace")], list(more)[: list(more).index("C")])
    by_launchers = {"workspace", "counters", "values"}
    assert filled == {*fields, *more, *spikes, *delays} - by_launchers
    assert list(fields)[: len(POINTERS)] == list(POINTERS)


@pytest.mark.parametrize("name", ["trtkern._cpu", "trtkern._cuda"])
def test_a_field_that_the_launch_does_not_have_is_an_error(name):
    args = pytest.importorskip(name, reason=f"{name} is not built", exc_type=ImportError).LifArgs()
    with pytest.raises(AttributeError, match="v_finale"):
        args.v_finale = 1
    with pytest.raises(TypeError, match="incompatible"):
        args.scalars = (0.0,) * (_args.MOST_PARAMS + 1)
    args.scalars = range(_args.MOST_PARAMS)
    assert list(args.scalars) == [float(i) for i in range(_args.MOST_PARAMS)]


def test_nothing_imports_kernels_by_its_folder():
    for path in [*ROOT.glob("trtkern/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")]:
        assert not re.search(r"^\s*(import|from) kernels\b", path.read_text(), re.M), path


@pytest.mark.parametrize(
    ("env", "says"),
    [({"CXX": "/nowhere/g++"}, "trtkern._cpu"), ({"TRTKERN_CPU": "0", "PATH": "/usr/bin:/bin", "CUDA_HOME": ""}, None)],
)
def test_a_missing_compiler_leaves_an_extension_out(tmp_path, env, says):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "tmp",
    ]
    settings = {**os.environ, "TRTKERN_CUDA": "0", **env}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("lib/**/*.so"))
    if says:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if says in line and "left out" in line]
        assert len(lines) == 1, done.stdout + done.stderr
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**settings, "TRTKERN_CPU": "1"}, timeout=PATIENCE
        )
        assert done.returncode != 0 and "TRTKERN_CPU" in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here; the wish for one is granted")
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match=r"GPU|built"):
        trtkern.backends.resolve("cuda", trtkern.backends.Case("lif", "cuda", torch.float32, trtkern.LIFSpec()))


def test_no_test_is_in_a_hurry():
    """What waits, waits for PATIENCE; nothing has to be done within seconds, for the machine may be busy."""
    waits = r"timeout=\d|timedelta\(seconds=\d|\.(join|wait|acquire|get)\(\d+(\.\d*)?\)|alarm\([1-9]"
    hurry = re.compile(waits + r"|(perf_counter|monotonic|time)\(\) - \w+\)?[ /\d]*<")
    for path in ROOT.glob("tests/*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not hurry.search(line), f"{path.name}:{number}: wait for patience.PATIENCE, count in place of timing"


def test_a_call_is_cheap():
    """In functions of Python: the first call, which looks at everything, and those that are like it."""
    layer, x = trtkern.nn.LIF(), torch.randn(4, 1, 8)
    layer(torch.randn(4, 2, 8))  # imports
    counts = []
    for _ in range(3):
        calls = []

        def see(frame, event, _, calls=calls):
            if event == "call":
                calls.append(frame.f_code.co_name)

        sys.setprofile(see)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
        counts.append((len(calls), "neuron" in calls))
    (first, _), (second, looked), (third, _) = counts
    assert counts[0][1] and not looked
    assert first < 400 and second == third < 40
