"""What is compiled at first use: once on a machine, by whom it may be, and what it says where it cannot be."""

import os
import re
import stat
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FUSED
from own_neurons import ADEX, EXAMPLES
from patience import PATIENCE

from trtkern import LIFSpec, cli, compiler, data, dialect, neurons
from trtkern import nn as snn
from trtkern.backends import _compiled, cpu
from trtkern.surrogates import exp, where
from trtkern.training import checkpoint, run
from trtkern.training.loop import Trainer

pytestmark = pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not here")


@pytest.fixture
def anew():
    """As a process that has compiled nothing yet; call it to forget once more."""
    _compiled.forget()
    yield _compiled.forget
    _compiled.forget()


@pytest.fixture
def library(compiled, anew):
    """AdEx, compiled: the one that all tests share."""
    assert _compiled.objection(cpu._extension(), LIFSpec(neuron=ADEX)) is None
    (found,) = (compiled / "neurons").glob(f"AdEx-{cpu._extension().isa()}-*.so")
    anew()
    return found


def script(folder, name, text):
    """A compiler that is a program of the shell."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo {name} 1.0; exit 0; fi\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def copying(folder, library, before="", name="copying"):
    """A compiler that gives what was compiled before, and counts."""
    last = 'for each in "$@"; do last=$each; done'
    return script(folder, name, f'echo once >> {folder}/count\n{before}\n{last}\ncp {library} "$last"')


def counted(folder):
    return len((folder / "count").read_text().split())


def objection(spec=None):
    return _compiled.objection(cpu._extension(), spec or LIFSpec(neuron=ADEX))


def test_it_is_found_again_and_made_again_where_anything_changed(library, anew, tmp_path, monkeypatch, capsys):
    assert objection() is None and capsys.readouterr().err == ""
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying(tmp_path, library))

    def made():
        anew()
        assert objection() is None
        return counted(tmp_path)

    assert made() == 1
    said = capsys.readouterr().err
    assert said.startswith("trtkern: compiling the neuron AdEx for this CPU (") and str(tmp_path / "cache") in said
    assert made() == 1 and capsys.readouterr().err == ""
    monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DANOTHER"])
    assert made() == 2
    folder = _compiled._headers()[0]
    monkeypatch.setattr(_compiled, "_sources", lambda: (folder, "of other headers"))
    assert made() == 3
    printed = dialect.own_headers
    monkeypatch.setattr(dialect, "own_headers", lambda *told: {**printed(*told), "neurons": "// of another neuron"})
    assert made() == 4
    monkeypatch.setenv("CXX", copying(tmp_path, library, name="newer"))
    assert made() == 5
    left = [path.name for path in (tmp_path / "cache" / "neurons").iterdir()]
    assert len(left) == 5 and all(re.fullmatch(r"AdEx-\w+-[0-9a-f]{20}\.so", name) for name in left), left


def test_a_damaged_library_is_made_again(library, anew, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying(tmp_path, library))
    assert objection() is None
    (kept,) = (tmp_path / "cache" / "neurons").glob("*.so")
    half = tmp_path / "other" / "neurons" / kept.name  # of another path: this process has that one open
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a file")
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "other"))
    anew()
    assert objection() is None and counted(tmp_path) == 2 and half.read_bytes() == kept.read_bytes()


def test_of_two_at_once_one_compiles_and_the_other_waits(library, anew, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import adex, torch\nfrom trtkern import nn as snn\n"
        "print(snn.Neuron(adex.ADEX, backend='cpu')(torch.ones(4, 1, 3)).sum().item())"
    )
    slow = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    environment = {
        **os.environ, "TRTKERN_CACHE": str(tmp_path / "cache"), "CXX": copying(tmp_path, library, slow)
    }  # fmt: skip
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True) for _ in "ab"
    ]
    first_words = []
    for each in both:
        first_words.append(each.stderr.readline())
    (tmp_path / "go").touch()
    made = [each.communicate(timeout=PATIENCE) for each in both]
    assert [each.returncode for each in both] == [0, 0], made
    assert made[0][0] == made[1][0] != "" and counted(tmp_path) == 1
    assert sorted(word.split()[1] for word in first_words) == ["compiling", "waiting"], first_words


def test_a_lock_that_nobody_gives_back(library, anew, tmp_path, monkeypatch, capsys):
    """Left by a process that was killed it is free; held by one that never ends it is not waited for without end."""
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying(tmp_path, library))
    assert objection() is None
    (kept,) = (tmp_path / "cache" / "neurons").glob("*.so")
    kept.unlink()
    kept.with_suffix(".lock").write_text("of a process that was killed")
    anew()
    assert objection() is None and counted(tmp_path) == 2
    kept.unlink()
    anew()
    monkeypatch.setattr(_compiled, "WAIT", 0.2)
    capsys.readouterr()
    with _compiled._alone(kept.with_suffix(".lock"), "it"):
        assert objection() is None and counted(tmp_path) == 3
    assert "waiting for another process" in capsys.readouterr().err


def test_it_may_be_forbidden(library, anew, monkeypatch):
    monkeypatch.setenv("TRTKERN_JIT", "0")
    x = torch.ones(3, 1, 6)
    layer = snn.Neuron(ADEX)
    chosen = layer.backend_for(x)
    assert chosen.startswith(("triton", "reference")) and "not cpu: it compiles the neuron AdEx at first use" in chosen
    assert "TRTKERN_JIT=0 forbids it; unset that, or use backend" in chosen
    assert layer(x).shape == x.shape
    with pytest.raises(
        ValueError, match=r"lif: backend 'cpu' was asked for, but it compiles the neuron AdEx .* forbids"
    ):
        snn.Neuron(ADEX, backend="cpu")(x)
    monkeypatch.delenv("TRTKERN_JIT")
    assert layer.backend_for(x) == "cpu"


def test_where_there_is_no_compiler(library, anew, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert re.search(r"CXX=/nowhere/g\+\+ is not there; unset it .*, or use backend=\"reference\"", objection())
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiler.shutil, "which", lambda command: None)
    assert "and no C++ compiler was found; install one (Debian: apt install g++), or use" in objection()
    problem, _ = _compiled.available()
    assert problem is not None and "no C++ compiler" in problem


def test_where_it_cannot_be_compiled_or_kept(library, anew, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    failing = "echo rows.cpp:1:2: error: no such word >&2; echo x >> count; exit 1"
    monkeypatch.setenv("CXX", script(tmp_path, "failing", failing.replace("count", f"{tmp_path}/count")))
    said = objection()
    assert said == objection() and counted(tmp_path) == 1, "what failed is not tried again in this process"
    assert 'failing failed: rows.cpp:1:2: error: no such word; use backend="reference", or triton on a GPU' in said
    assert not list((tmp_path / "cache" / "neurons").glob("*.so"))
    anew()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "file"))
    assert "cannot be written (" in objection() and "set TRTKERN_CACHE to a folder of yours" in objection()
    monkeypatch.setattr(_compiled, "_headers", cache(lambda: None))
    assert "the headers of csrc were not installed; install trtkern again" in objection()


def test_what_is_no_library_is_not_loaded(anew, tmp_path):
    extension = cpu._extension()
    with pytest.raises(RuntimeError, match=r"cannot open shared object file"):
        extension.load_rows(str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match=r"trtkern_own_rows"):
        extension.load_rows(extension.__file__)


WIDTH = 0.8


def bell(u, alpha):
    return where(abs(u) < 2.0, WIDTH * alpha * exp(-alpha * abs(u)), 0.0)


def branching(u, alpha):
    return alpha if u > 0 else 0.0


def test_a_surrogate_of_ones_own_on_the_cpu(compiled, anew):
    """LIF with it, compiled: the reference's spikes and gradients, bit for bit the same in parts and for any width."""
    x = torch.randn(19, 2, 37)
    for settings in ({"v_reset": None}, {"detach_reset": True}):
        layers = [snn.LIF(surrogate=bell, alpha=1.5, backend=each, **settings) for each in ("cpu", "reference")]
        found = []
        for layer in layers:
            own = x.clone().requires_grad_()
            out = layer(own)
            found.append((out, *torch.autograd.grad((out * x).sum(), own)))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-5, atol=1e-5)
    assert snn.LIF(surrogate=bell).backend_for(x) == "cpu"
    with pytest.raises(ValueError, match=r"it compiles the surrogate .*branching.* at first use, and surrogate .*line"):
        snn.LIF(surrogate=branching, backend="cpu")(x)


def test_threads_of_one_process_compile_once(library, anew, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying(tmp_path, library))
    threads = [threading.Thread(target=objection) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(PATIENCE)
    assert counted(tmp_path) == 1


def test_the_doctor_tells(compiled, capsys, monkeypatch):
    from trtkern import doctor

    assert re.search(r"compiled for the CPU at first use by \S.*; kept in .*neurons", doctor._own_neurons())
    monkeypatch.setenv("TRTKERN_JIT", "0")
    assert doctor._own_neurons().startswith("not compiled for the CPU: TRTKERN_JIT=0 forbids it")


def test_an_installed_package_carries_the_headers(tmp_path):
    """What setup.py puts into a wheel, and that it is all that a neuron is compiled from."""
    setup = Path(__file__).resolve().parent.parent / "setup.py"
    command = [sys.executable, str(setup), "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=setup.parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "trtkern" / "csrc"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert there and not [name for name in there if not name.endswith(".h")]
    for name, text in dialect.own_headers(neurons.lookup(ADEX), None).items():
        (tmp_path / f"trtkern_{name}.h").write_text(text)
    (tmp_path / "rows.cpp").write_text('#include "cpu/baseline.h"\n#include "cpu/own_rows.h"\n')
    seen = subprocess.run(
        [*compiler.find_cxx(), "-std=c++17", f"-I{folder}", f"-I{tmp_path}", "-MM", str(tmp_path / "rows.cpp")],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert seen.returncode == 0 and str(folder / "lif" / "cpu_backward.h") in seen.stdout, seen.stderr


# Recipes.

TRAIN = [
    "--recipe", "digits", "--set", "model.neuron=adex:ADEX", "--set", "model.tau=3", "--set", "model.layers=[4]",
    "--timesteps", "2", "--batch-size", "256", "--backend", "cpu", "--device", "cpu", "--threads", "1",
]  # fmt: skip


def test_a_recipe_trains_it_and_what_was_killed_ends_in_the_same_bits(
    library, tmp_path, monkeypatch, no_pictures, capsys
):
    monkeypatch.chdir(EXAMPLES)
    options = [*TRAIN, "--epochs", "8"]
    assert cli.main(["train", "--run-dir", str(tmp_path / "whole"), *options]) == 0, capsys.readouterr().err
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path / "killed"), "4", "1", "--", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=EXAMPLES)
    assert done.stdout.splitlines()[-1] == "4 killed, status 0", done.stderr
    made, again = (checkpoint.load(tmp_path / name) for name in ("whole", "killed"))
    assert (
        made.metadata["settings"]["model"]["neuron"] == "adex:ADEX" and made.metadata["settings"]["model"]["tau"] == 3
    )
    for one, two in ((made.model, again.model), (made.state, again.state)):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert cli.main(["evaluate", str(tmp_path / "whole")]) == 0 and made.metadata["neurons"] == [ADEX]
    trainer = Trainer.of(run.settings_of(tmp_path / "whole"), data.load("digits"))
    changed = made._replace(metadata={**made.metadata, "neurons": ["AdEx@before"]})
    with pytest.warns(UserWarning, match=f"not changed since the training, got {ADEX} in place of AdEx@before"):
        trainer.restore(changed)


def test_names_that_a_recipe_does_not_find(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    for named, message in (
        ("adex:ADEKS", "expected a name of the module adex, got 'ADEKS', which it has not; did you mean 'ADEX'"),
        ("nowhere:ADEX", "expected module:function in a module that can be imported from"),
        ("AdEx", "--set model.neuron: expected one of LIF, .*, or module:NAME of what trtkern.neurons.register"),
    ):
        assert cli.main(["train", "--recipe", "digits", "--set", f"model.neuron={named}", "--dry-run"]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert cli.main(["train", *TRAIN[:4], "--set", "model.taw=3", "--dry-run"]) == 2
    assert "got 'taw'; did you mean 'tau_w'" in capsys.readouterr().err
