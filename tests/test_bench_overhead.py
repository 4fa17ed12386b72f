"""``trtkern bench --op overhead``: its rows, its checks, its child processes. No test looks at how fast anything is."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from trtkern import backends, malloc
from trtkern.bench import cells, overhead, page, rows, runner
from trtkern.bench.cases import Case
from trtkern.commands import bench as command
from trtkern.commands._common import Quit

CASE = Case("overhead", (4, 2, 8, 4, 4))


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(malloc, "keep_pages", lambda: False)
    monkeypatch.setattr(cells, "CALLS", 3)
    monkeypatch.setattr(cells, "SHAPES", ((4, 8),))


def measured(*arguments: str) -> list[rows.Row]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.bench)
    app(args=["--op", "overhead", "--csv", "rows.csv", *arguments], standalone_mode=False)
    return rows.read(Path("rows.csv"))


def test_every_layer_is_beside_its_pair_with_one_thread(tmp_path):
    torch.set_num_threads(2)
    made = measured("--backend", "auto", "--rounds", "3")
    steps = [row for row in made if " step " in row.case]
    made = [row for row in made if row not in steps]
    assert len(steps) == len(cells.KINDS) * len(cells.SHAPES) * len(cells.DIRECTIONS) * len(cells.NAMES)
    assert {row.candidate for row in steps} == {*cells.NAMES} and {row.status for row in steps} == {"ok"}
    assert [(row.case, row.candidate) for row in made] == [
        (f"{kind} overhead 4x2x8x4x4 float32", name)
        for kind, other in overhead.PAIRS.items()
        for name in ("trtkern cpu", other)
    ]
    for row in made:
        assert (
            row.status == "ok" and row.rounds == 3 and row.threads == 1 and 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        )
        assert re.fullmatch(r"aten ops: [1-9]\d* forward, [1-9]\d* backward", row.note)
        assert row.times_ours == 1 if row.library == "trtkern" else row.times_ours > 0
    page.write(made, tmp_path / "page.md", tmp_path / "rows.csv", "command")
    (machine,) = tmp_path.glob("page-*.md")
    text = machine.read_text()
    assert "## Host time" in text and not [*tmp_path.glob("*.png"), *tmp_path.glob("*.svg")]
    assert all(f"| {row.case} | {row.candidate} | {row.library} |" in text and row.note in text for row in made)


def test_aten_ops_are_counted():
    add = overhead.Subject(
        "", lambda x: x.exp().sin(), (), torch.ones(2, requires_grad=True), torch.ones(2), lambda: None
    )
    forward, backward = add.aten_ops()
    assert forward == 2 and backward >= 2


@pytest.mark.parametrize("kind", overhead.PAIRS)
def test_a_wrong_layer_is_reported_and_not_timed(kind, monkeypatch):
    own = overhead.own
    monkeypatch.setattr(
        overhead,
        "own",
        lambda name, case, backend: own(name, case, backend)._replace(
            **({"run": lambda x: own(name, case, backend).run(x.flip(0))} if name == kind else {})
        ),
    )
    made = measured("--backend", "cpu", "--rounds", "2")
    wrong = [row for row in made if row.status == "WRONG"]
    assert [(row.case.split()[0], row.candidate) for row in wrong] == [(kind, "trtkern cpu")]
    assert "of the neurons differ" in wrong[0].note and math.isnan(wrong[0].p50_ms)


def test_a_pair_is_judged_too():
    for name in overhead.PAIRS.values():
        subject = overhead.other(name, CASE)
        assert subject.verdict().right
        assert not subject._replace(run=lambda x: torch.relu(x - 1)).verdict().right
        assert not subject._replace(g=-subject.g).verdict().right


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", overhead.ON_GPU)
def test_a_gpu_backend_is_measured_in_a_process_of_its_own(name):
    before, stream = backends.named(name), torch.cuda.current_stream
    made = {row.case.split()[0]: row for row in measured("--backend", name, "--rounds", "1")}
    assert made.keys() == overhead.PAIRS.keys()
    if all(row.status == "skipped" and re.search("not installed|not here|no g", row.note) for row in made.values()):
        pytest.skip(made["LIF"].note)
    for row in made.values():
        assert row.status == "ok" and row.rounds == 1 and row.p50_ms > 0 and math.isnan(row.times_ours), row.note
        assert row.shape == "4,64,32,8,8" and row.candidate == f"trtkern {name}, no GPU"
        found = re.match(r"launches, which do nothing: ([1-9]) forward, ([1-9]) backward", row.note)
        assert found and ("not compared with float64" in row.note) == (name == "cuda")
        assert found.groups() == ("1", "1") or not row.case.startswith("LIF")
    assert backends.named(name) is before and torch.cuda.current_stream is stream
    assert "trtkern.bench.stand_ins" not in sys.modules


def test_what_a_stand_in_needs_is_named(tmp_path):
    """In a process of its own, as everything of theirs."""
    said = (
        "from pathlib import Path\nfrom trtkern.bench import stand_ins\nstand_ins.ROOT = Path('.')\n"
        "try: stand_ins.cuda()\nexcept stand_ins.Absent as why: print(why)"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "the objects of trtkern._cuda are not here; TRTKERN_CUDA=1" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_process_that_fails_or_finds_a_fault_is_told(monkeypatch):
    said = {"failed": "RuntimeError: no"}
    monkeypatch.setattr(overhead, "_child", lambda *given: said)
    made = measured("--backend", "triton")
    assert [(row.status, row.note) for row in made] == [("failed", "RuntimeError: no")] * 3
    found = {kind: {"seconds": [1.0], "launches": [1, 2]} for kind in overhead.PAIRS}
    monkeypatch.setattr(overhead, "_child", lambda what, *given: {"PLIF": "differs"} if what == "check" else found)
    made = measured("--backend", "triton", "--rounds", "1")[3:]
    assert [row.status for row in made] == ["ok", "WRONG", "ok"] and made[1].note == "differs"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--direction", "fwd"], "--direction: expected both with --op overhead, got fwd"),
        (["--backend", "reference"], "--backend: expected one of all, cpu, triton, cuda with --op overhead"),
        (["--shape", "4,8"], "expected overhead: T,B,C,H,W; got '4,8'"),
        (["--suite", "sizes"], "--suite sizes: expected no --op, --op lif or --op bn-lif, got 'overhead'"),
        (["--neuron", "ALIF"], "--neuron: expected --op lif"),
        (["--part", "3/2"], "--part: expected K/N"),
    ],
)
def test_bad_input_is_named(arguments, said, monkeypatch):
    monkeypatch.setattr(overhead, "tables", lambda *given: pytest.fail("measured"))
    with pytest.raises(Quit) as stop:
        measured(*arguments)
    assert stop.value.status == 2 and said in str(stop.value)
    with pytest.raises(ValueError, match="--device: expected cpu"):
        runner.overhead.backends("all", torch.device("cuda"))
