"""docs/extending.md: its blocks run, and its walks are walked, in a copy of the package and in a process of its own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import FUSED
from patience import PATIENCE

from trtkern import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.skipif("cpu" not in FUSED, reason="in Triton's interpreter a step of training takes minutes")
def test_the_walks_that_need_a_file_alone(compiled, tmp_path, monkeypatch, capsys, no_pictures, one_thread):
    """Every block of them in a new folder, in its order: the file is written, lines are run, commands are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "adex", raising=False)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    own = [(kind, text) for kind, text in BLOCKS if not text.startswith("# trtkern/") and "--data bars" not in text]
    (_, file), *others = [block for block in own if block[0]]
    Path("adex.py").write_text(file)
    names = dict(vars(import_module("adex")))
    for kind, text in others:
        if kind == "python":
            exec(compile(text, "extending.md", "exec"), names)
        for line in text.splitlines() if kind == "sh" else ():
            assert cli.main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert names["spikes"].shape == (20, 8, 64) and [kind for kind, _ in others].count("sh") == 1
    sys.modules.pop("adex")


PLACES = {
    "above TABLE": ("# The position of a row is its number", 0),
    "in CENTERS": ("CENTERS: dict[str, float] = {\n", 1),
    "in NEURONS": ("NEURONS: dict[str, tuple[str, ...]] = {\n", 1),
    "in DATASETS": ("DATASETS: dict[str, Row] = {\n", 1),
    "above Surrogate": ("@dataclass(frozen=True)\nclass Surrogate:", 0),
}
"""Where a block goes: before (0) or behind (1) that text of the file."""


def put(copy, block):
    """A block into its file of the copy; its first line says where."""
    head, text = block.split("\n", 1)
    place, _, where = head.removeprefix("# ").partition(", ")
    path = copy / place
    if not where:
        path.write_text(text)
        return
    before = path.read_text()
    if where == "at the end":
        path.write_text(f"{before}\n\n{text}")
        return
    if where == "at the end of TABLE":
        end = before.index("    )\n}", before.index("TABLE"))
        path.write_text(before[:end] + text + before[end:])
        return
    if where == "in BACKENDS":
        end = before.index("\n\n", before.index("\nBACKENDS"))
        path.write_text(f"{before[:end]}\n{text}{before[end:]}")
        return
    found, behind = PLACES[where]
    at = before.index(found) + len(found) * behind
    path.write_text(before[:at] + text + ("" if behind else "\n\n") + before[at:])


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A copy of the package in which every walk was walked; the extensions are those of before."""
    copy = tmp_path_factory.mktemp("walked")
    leave = shutil.ignore_patterns("__pycache__", "csrc")
    shutil.copytree(ROOT / "trtkern", copy / "trtkern", ignore=leave)
    shutil.copytree(ROOT / "kernels", copy / "trtkern" / "kernels", ignore=leave)
    for _, text in BLOCKS:
        if text.startswith("# trtkern/"):
            put(copy, text)
    return copy


CHECKS = """
import sys
sys.path.insert(0, {copy!r})
sys.meta_path[:] = [each for each in sys.meta_path if "_Finder" not in repr(each) and "editable" not in repr(each)]
import torch, trtkern
assert trtkern.__file__.startswith({copy!r}), trtkern.__file__
from trtkern import backends, data, dialect, names, reference, selftest, surrogates
from trtkern import nn as snn
from trtkern.spec import LIFSpec

# The neuron: a layer, the loop, its struct, and extensions that are refused until they are built again.
x = torch.randn(6, 2, 3)
layer = snn.Resonator(omega=torch.nn.Parameter(torch.tensor(0.4)), backend="reference")
spikes, state = layer(x, return_state=True)
u, v, made = torch.zeros(2, 3), torch.zeros(2, 3), []
for step in x:
    u, h = 0.9 * u - 0.4 * v, 0.9 * v + 0.4 * u + step
    made.append((h > 1.0).float())
    v = h - made[-1]
assert torch.equal(spikes, torch.stack(made)) and spikes.any() and state._fields == ("u", "v")
torch.testing.assert_close(state.v, v)
spikes.sum().backward()
assert layer.omega.grad.abs() > 0
assert "struct Resonator" in dialect.headers()["neurons"] and "parabola" in dialect.headers()["surrogates"]
said = backends.cpu.missing()
assert said is None or "other neurons" in said or "not built" in said, said
assert said is not None

# The surrogate.
row = surrogates.lookup("parabola")
assert row.builtin and abs(row.function(0.5, 1.0) - 0.5625) < 1e-12
snn.LIF(surrogate="parabola", backend="reference")(x.requires_grad_()).sum().backward()

# The backend: cell by cell against float64, both walks together.
for cell in (
    selftest.Cell(timesteps=5, shape=(2, 3, 4), learnable="channel"),
    selftest.Cell(surrogate="parabola", reset="soft", timesteps=17, shape=(2, 3, 4), neuron="Resonator", returned="h"),
    selftest.Cell(surrogate="sigmoid", timesteps=5, shape=(2, 3, 4, 6), layout="channels_last", learnable="scalar"),
):
    errors = selftest.compare("loops", cell, "cpu")
    assert errors.within(cell.dtype), (cell, errors)
assert backends.resolve("auto", backends.Case("lif", "cpu", torch.float32, LIFSpec())).name == "loops"
assert "loops" in names.BACKENDS

# The data set and the recipe.
bars = data.load("bars")
assert len(bars.train.images) == 180 and bars.classes == ("rows", "columns")
from trtkern import cli
sys.exit(cli.main(["train", "--data", "bars", "--run-dir", sys.argv[1], "--threads", "1", "--device", "cpu"]))
"""


def test_the_walks_through_a_checkout(walked, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", CHECKS.format(copy=str(walked)), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=walked)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]
    assert (tmp_path / "run" / "result.json").exists()


def test_every_walk_has_its_blocks():
    heads = [text.partition("\n")[0] for _, text in BLOCKS if text.startswith("# trtkern/")]
    files = {head.removeprefix("# ").partition(",")[0] for head in heads}
    assert files == {
        "trtkern/neurons.py", "trtkern/nn/neurons.py", "trtkern/nn/__init__.py", "trtkern/names.py",
        "trtkern/surrogates.py", "trtkern/data/sets.py", "trtkern/datasets.py", "trtkern/recipes/bars.toml",
        "trtkern/backends/loops.py", "trtkern/backends/__init__.py",
    }  # fmt: skip
    assert {path for path in files if path.endswith(".py") and not (ROOT / path).exists()} == {
        "trtkern/backends/loops.py"
    }
