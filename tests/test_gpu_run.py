"""``make gpu``: what becomes of stages that fail, hang or lack their tool; no real work, and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from patience import PATIENCE

from trtkern.bench import rows

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import gpu  # noqa: E402
import gpu_bundle  # noqa: E402
import gpu_only  # noqa: E402
import gpu_stages  # noqa: E402
from gpu_stages import CUT, CUT_MARK, FAILED, OK, SKIPPED, Stage  # noqa: E402


def says(words, status=0):
    return (sys.executable, "-S", "-c", f"print({words!r}); raise SystemExit({status})")


def sleeps(before=""):
    """For as long as no test waits; what it says before, it has said when it says "begun"."""
    return (
        sys.executable,
        "-S",
        "-c",
        f"import time; {before}\nprint('begun', flush=True)\ntime.sleep({2 * PATIENCE})",
    )


@pytest.fixture
def used_up(monkeypatch, tmp_path):
    """The time of a stage is used up when its process says "begun", however long that takes."""
    wait = subprocess.Popen.wait

    def begun(process, timeout=None):
        if timeout == PATIENCE:  # what the whole stage is allowed
            while process.poll() is None and not any("begun" in log.read_text() for log in tmp_path.glob("logs/*.log")):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", begun)
    monkeypatch.setattr(gpu_stages, "time", SimpleNamespace(monotonic=lambda: 0.0, time=time.time))


def run(tmp_path, *stages, seconds=60.0, grace=0.3):
    told = []
    outcomes = gpu_stages.run(stages, seconds, tmp_path / "logs", told.append, grace)
    assert told == outcomes
    return outcomes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gpu.main() == 2
    assert "there is no CUDA GPU" in capsys.readouterr().err


def test_a_stage_that_fails_is_reported_and_the_others_run(tmp_path):
    stages = Stage("one", says("3 failed", 1), 1), Stage("two", says("== 5 passed in 1 s =="), 1)
    failed, ok = run(tmp_path, *stages)
    assert (failed.status, failed.words) == (FAILED, "exit status 1: 3 failed")
    assert (ok.status, ok.words) == (OK, "5 passed in 1 s")
    assert gpu_stages.exit_status([failed, ok]) == 1 and gpu_stages.exit_status([ok]) == 0
    assert (tmp_path / "logs" / "one.log").read_text() == "3 failed\n"


@pytest.mark.parametrize(
    ("tests", "before", "status"),
    [
        (False, "", CUT), (True, "", CUT), (False, "print('FAILED t.py::one')", CUT),
        (True, "print('FAILED t.py::one')", FAILED),
    ],
)  # fmt: skip
def test_a_stage_that_runs_out_is_cut_unless_one_of_its_tests_has_failed(tmp_path, used_up, tests, before, status):
    (late,) = run(tmp_path, Stage("late", sleeps(before), 1, tests=tests), seconds=PATIENCE, grace=PATIENCE / 2)
    assert late.status == status and "its time was used up" in late.words
    assert late.words.endswith("KeyboardInterrupt" if status == CUT else "before that FAILED t.py::one")
    assert gpu_stages.exit_status([late]) == int(status == FAILED)


def test_tests_that_ignore_the_interrupt_hang_and_are_ended_with_their_children(tmp_path, used_up):
    deaf = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep({2 * PATIENCE})']).pid)"
    )
    (late,) = run(tmp_path, Stage("deaf", sleeps(deaf), 1, tests=True), seconds=PATIENCE)
    assert late.status == FAILED and late.words.startswith("it hangs")
    child = Path("/proc", (tmp_path / "logs" / "deaf.log").read_text().split()[0], "stat")
    for _ in range(100 * PATIENCE):  # killed, it ends when it has its turn; then it is gone, or waits for its parent
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] in "ZX":
            break
        time.sleep(0.01)
    else:
        pytest.fail("a child of a stage is still there")


def test_what_is_missing_is_named(tmp_path):
    tool = Stage("tool", says("never"), 1, programs=("no-such-sanitizer",))
    package = Stage("package", says("never"), 1, modules=("no_such_package",))
    behind = Stage("behind", says("never"), 1, after=("package",))
    broken = Stage("broken", ("/no/such/python",), 1)
    outcomes = run(tmp_path, tool, package, behind, broken)
    assert [outcome.status for outcome in outcomes] == [SKIPPED, SKIPPED, SKIPPED, FAILED]
    assert [outcome.words for outcome in outcomes[:3]] == [
        "no no-such-sanitizer on PATH", "the Python package no_such_package is not installed", "needs package",
    ]  # fmt: skip
    assert gpu_stages.exit_status(outcomes[:3]) == 0


def test_how_a_stage_ended_is_named(tmp_path):
    died = Stage("died", (sys.executable, "-S", "-c", "import os; os.abort()"), 1)
    words = "Error: Device not supported"
    refused = Stage("refused", says(words, 1), 1, refusals=("Device not",))
    works = Stage("works", says(words, 0), 1, refusals=("Device not",))
    outcomes = run(tmp_path, died, refused, works)
    assert [outcome.status for outcome in outcomes] == [FAILED, SKIPPED, OK]
    assert outcomes[0].words.startswith("ended by SIGABRT") and outcomes[1].words.endswith(words)


@pytest.mark.parametrize(("library", "status"), [("norse 1.1", OK), ("trtkern", FAILED)])
def test_rows_are_counted_and_a_wrong_one_of_ours_is_a_failure(tmp_path, library, status):
    path = tmp_path / "rows.csv"
    path.write_text("candidate,library,case,status,note\nold,trtkern,lif,WRONG,an earlier run's, over budget\n")
    add = f"open({str(path)!r}, 'a').write('a,trtkern,lif,ok,\\nb,{library},lif,WRONG,off by 1\\n')"
    (outcome,) = run(tmp_path, Stage("bench", (sys.executable, "-S", "-c", add), 1, rows=path))
    assert outcome.status == status and outcome.words.startswith("rows: 1 ok, 1 WRONG")
    assert ("b, lif: WRONG: off by 1" in outcome.words) is (status == FAILED)


def test_a_stage_may_say_what_it_left_out(tmp_path):
    (partly,) = run(tmp_path, Stage("partly", says("out of time: 7 tests\n12 passed"), 1))
    assert (partly.status, partly.words) == (CUT, "out of time: 7 tests; 12 passed")


def test_time_that_is_left_goes_to_the_others(tmp_path, monkeypatch):
    clock = iter(range(1000))  # a second passes from one look at it to the next
    monkeypatch.setattr(gpu_stages, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 5000.0))
    show = "import os, sys; print(sys.argv[1], os.environ['TRTKERN_UNTIL'])"
    stages = [Stage(name, (sys.executable, "-S", "-c", show, "{seconds}"), 1) for name in ("one", "two")]
    one, two = run(tmp_path, *stages, seconds=101.0)
    assert one.allowed == 50 and two.allowed == 97
    assert one.words == "34 5040.0"
    (none,) = run(tmp_path, stages[0], seconds=0.0)
    assert none.status == CUT and "GPU_MINUTES" in none.words


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_plan_has_every_part(tmp_path, rehearse):
    stages = {stage.name: stage for stage in gpu.plan(tmp_path / "rows.csv", rehearse)}
    right = ["build", "self-test", "cells", "tests of the GPU", "tests", "memcheck", "racecheck"]
    assert (
        [*stages][: len(right)] == right
        and set(gpu.SUITES) < set(stages)
        and sum(name.startswith("step ") for name in stages) == (2 if rehearse else 4)
    )
    for stage in stages.values():
        for part in stage.command:
            path = part.removeprefix("--ignore=")
            assert not path.endswith(".py") or (ROOT / path).exists(), part
    assert stages["memcheck"].programs == ("compute-sanitizer",) and stages["tests"].tests
    assert all(stage.after == ("build",) for stage in stages.values() if stage.name != "build")
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" in stages["memcheck"].env and stages["bench grid"].rows is not None
    assert ("1000,16384" in stages["bench grid"].command) is not rehearse
    assert ("--small" in stages["layers on packed spikes"].command) is rehearse


def test_the_summary_has_the_stages_without_rows(tmp_path):
    outcome = gpu_stages.Outcome("memcheck", SKIPPED, 0.0, 30.0, "no compute-sanitizer | here")
    path = tmp_path / "card.md"
    gpu.summary(path, "# Card", [outcome], gpu.page_of(tmp_path / "none.csv", path))
    assert "| memcheck | skipped | 0 | 30 | no compute-sanitizer \\| here |" in path.read_text()
    assert path.read_text().endswith("No rows were measured.\n")


def test_only_names_what_is_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--only", "tset"])
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gpu.main() == 2 and "got 'tset'" in capsys.readouterr().err


def test_the_tests_of_a_gpu_are_chosen():
    def item(*reasons, **params):
        marks = [SimpleNamespace(kwargs={"reason": reason}) for reason in reasons]
        callspec = {"callspec": SimpleNamespace(params=params)} if params else {}
        return SimpleNamespace(iter_markers=lambda name: marks, **callspec)

    assert gpu_only.wants(item(backend="triton")) and gpu_only.wants(item(device="cuda", n=3))
    assert gpu_only.wants(item("no GPU"))
    assert not gpu_only.wants(item(backend="cpu")) and not gpu_only.wants(item("no network"))


def test_tests_stop_when_the_time_is_up(tmp_path):
    """Also that what is skipped for time is counted, as a stage reads it."""
    (tmp_path / "test_late.py").write_text(
        "import pytest\n@pytest.mark.parametrize('backend', ['cpu', 'triton'])\ndef test_a(backend): assert False\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), gpu_stages.UNTIL: "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_only", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 skipped, 1 deselected" in done.stdout
    assert any(line.startswith(f"{gpu_stages.CUT_MARK}1 tests") for line in done.stdout.splitlines())


def test_a_bundle_holds_names_and_no_options(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "peers.txt").write_text("--extra-index-url X\n# words\nsnntorch==1.0.0  # why\n\n")
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    assert gpu_bundle.requirements() == ["snntorch==1.0.0", *gpu_bundle.TOOLS]


@pytest.mark.parametrize(
    ("name", "version", "old"), [("setuptools", "70.2.0", True), ("setuptools", "80.1", False), ("numpy", "1.0", False)]
)
def test_what_is_too_old_for_the_build_makes_way(name, version, old):
    assert gpu_bundle.outdated(name, version) is old


def test_rows_that_were_left_out_for_want_of_time_are_counted(tmp_path):
    path = tmp_path / "rows.csv"
    add = f"open({str(path)!r}, 'a').write('library,status,note\\nx,ok,\\ny,skipped,over the budget\\nz,skipped,\\n')"
    (outcome,) = run(tmp_path, Stage("bench", (sys.executable, "-S", "-c", add), 1, rows=path))
    assert outcome.status == CUT and outcome.words.startswith("rows: 1 ok, 2 skipped, 1 of them for want of time")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_layers_on_packed_spikes_leave_rows(tmp_path, monkeypatch, capsys):
    """Forward and the weight's gradient, each way beside torch's; what ran out of time is named."""
    gpu_spike_conv = pytest.importorskip("gpu_spike_conv", reason="Triton is not installed")
    monkeypatch.setattr(gpu_spike_conv, "SMALL", gpu_spike_conv.SMALL[-1:])
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["gpu_spike_conv.py", "--small", "--csv", str(path), "--seconds", "4"])
    assert gpu_spike_conv.main() == 0
    made = rows.read(path)
    assert {row.status for row in made} == {"ok"} and all(row.p50_ms > 0 for row in made)
    names = {direction: [row.candidate for row in made if row.direction == direction] for direction in ("fwd", "bwd")}
    torchs = ["trtkern bfloat16", "torch float32", "torch bfloat16"]
    assert names["fwd"] == ["trtkern int8x3", "trtkern ieee", "trtkern bf16x3", *torchs]
    assert names["bwd"] == ["trtkern ieee", "trtkern bf16x3", *torchs]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "0"])
    assert gpu_spike_conv.main() == 0 and f"{CUT_MARK}2 layers" in capsys.readouterr().out


def test_a_result_that_is_not_a_number_is_wrong():
    gpu_spike_conv = pytest.importorskip("gpu_spike_conv", reason="Triton is not installed")
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert gpu_spike_conv.wrong(lambda: want.float(), want, 1e-6) == ""
    assert "1.0e-01" in gpu_spike_conv.wrong(lambda: torch.tensor([1.2, 2.0]), want, 1e-2)
    assert "inf" in gpu_spike_conv.wrong(lambda: torch.tensor([torch.nan, 2.0]), want, 1e-2)
