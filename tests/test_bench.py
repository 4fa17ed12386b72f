"""``trtkern bench``: the gate, the rounds, the rows, and what is refused. No test looks at how fast anything is."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import typer

from trtkern import malloc, nn, reference
from trtkern.bench import cases, contest, gate, layers, measure, peers, plot, rounds, rows, runner
from trtkern.bench.cases import Case
from trtkern.commands import bench as command
from trtkern.commands._common import Quit
from trtkern.profiling.memory.peak import peak

CPU = torch.device("cpu")
OPTIONS = rounds.Options(CPU, backend="auto", rounds=3, peers="none", compiled=False)
FAST = ["--backend", "auto", "--peers", "none", "--no-compile", "--rounds", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """Each test in a folder of its own, inputs in one set, without changing this process's malloc or threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(malloc, "keep_pages", lambda: False)
    monkeypatch.setattr(contest, "rotations", lambda case, device: 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(*arguments: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.bench)
    app(args=list(arguments), standalone_mode=False)


def measured(case: Case, options: rounds.Options = OPTIONS) -> dict[str, rows.Row]:
    found: list[rows.Row] = []
    runner.run([case], options, found.extend)
    return {row.candidate: row for row in found}


@pytest.mark.parametrize(
    "op, shape, names",
    [
        ("lif", "5,40", ["copy_", "eager loop, unbind", "eager loop, x[t]", "reference.py"]),
        ("bn-lif", "3,2,4,2,2", ["BatchNorm + ReLU", "BatchNorm alone", "BatchNorm, then eager loop, unbind"]),
        ("regularizer", "3,50", ["reference.py"]),
        ("pack", "9,40", ["reference.py"]),
        ("delay", "9,2,5", ["reference.py", "channel by channel", "trtkern cpu, learned"]),
    ],
)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both"])
def test_every_op_and_direction_gives_rows(op, shape, names, direction, capsys):
    call("--op", op, "--shape", shape, "--direction", direction, *FAST)
    assert "x trtkern" in capsys.readouterr().out
    made = {row.candidate: row for row in rows.read(_file())}
    assert set(names) <= set(made)
    ours = next(row for row in made.values() if row.library == "trtkern")
    assert ours.times_ours == 1 and ours.bytes == cases.least_bytes(Case(op, cases.parse_shape(shape)), direction)
    for row in made.values():
        assert row.status == "ok" and row.rounds == 3 and 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.gb_per_s >= 0 and row.copy_share > 0 and row.peak_bytes >= 0 and row.direction == direction


def _file():
    from pathlib import Path

    return Path(command.ROWS)


def test_open_neuromorphic_has_forward_backward_and_peak_memory(capsys):
    call("--suite", "open-neuromorphic", "--shape", "6,2,8", *FAST)
    made = rows.read(_file())
    assert {row.direction for row in made} == {"train-fwd", "bwd"}
    assert all(row.status == "ok" and row.peak_bytes >= 0 for row in made)
    assert {"Linear alone", "eager loop, x[t]"} <= {row.candidate for row in made}
    assert [case.shape for case in cases.SUITES["open-neuromorphic"]] == [(500, 16, n) for n in (512, 1024, 2048, 4096)]


def test_a_timed_forward_pass_lets_go_of_its_graph():
    """Or every candidate would hold one while the others run."""
    case = Case("linear-lif", (6, 2, 8))
    for who in contest.behind_linear(case, CPU, [layers.Layer("ours", nn.LIF(), layers.OWN)]):
        candidate = rounds._candidate(rounds.Ready(who, "", 0.0, 0.0), "train-fwd", 0)
        candidate.run()
        who.backward()  # there is a graph
        candidate.call(measure.on_cpu)
        with pytest.raises(AssertionError):
            who.backward()


def test_a_settled_call_follows_one_that_is_not_timed():
    calls, timed = [], []
    one = measure.Candidate("", lambda: calls.append("run"), 0, prepare=lambda: calls.append("prepare"), settle=True)
    assert one.call(lambda run: timed.append(run()) or 7.0) == 7.0
    assert calls == ["prepare", "run", "prepare", "run"] and len(timed) == 1


def test_the_page_and_the_pictures_are_made_of_the_rows(tmp_path):
    call("--op", "lif", "--shape", "3,20", "--plot", "one.png", *FAST)
    (tmp_path / "results").mkdir()
    made = rows.read(_file())
    ours = next(row for row in made if row.library == "trtkern")
    made = [row if row is ours else replace(row, times_ours=3.0, times_ours_low=2.0) for row in made]
    faster = replace(
        ours,
        candidate="somebody LIF",
        library="somebody 1",
        times_ours=0.5,
        times_ours_low=0.4,
        times_ours_high=0.6,
        p50_ms=2.0,
        compile_s=3.0,
    )
    wrong = replace(ours, candidate="nobody LIF", library="nobody 1", status="WRONG", note="1.0 of the spikes differ")
    rows.append([*made, faster, wrong], tmp_path / "results" / "here.csv")
    call("--page", "performance.md", "--csv", "results")
    (machine,) = tmp_path.glob("performance-*.md")
    overview, text = (tmp_path / "performance.md").read_text(), machine.read_text()
    (line,) = [line for line in overview.splitlines() if f"]({machine.name}) |" in line and line.startswith("|")]
    assert line.split(" | ")[1] == "single layers" and line.split(" | ")[3] == "1", "one is behind"
    assert "[here.csv](results/here.csv)" in overview
    told = ("is behind in 1", "somebody LIF, 0.50 of our time", "its 3.0 s of compiling take 1,500 calls to make up")
    assert all(words in text for words in (*told, "| nobody LIF | nobody 1 | WRONG: 1.0 of the spikes differ |"))
    (picture,) = tmp_path.glob("performance-*.svg")
    assert picture.stem == machine.stem and len(picture.name) < 64
    assert f"]({picture.name})" in text and f"]({picture.name})" in overview
    drawn = picture.read_text()
    assert "<svg" in drawn and "currentColor" in drawn and "prefers-color-scheme: dark" in drawn
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_a_case_measured_again_replaces_its_rows_on_the_page():
    old = rows.Row(*["x"] * 4, 1, *["x"] * 9, "ok", "", command="old")
    new = replace(old, command="new")
    assert plot.groups([old, replace(old, candidate="gone"), new]) == {("x", "x"): [new]}


def test_wrong_results_are_reported_and_not_timed(monkeypatch):
    layer = layers.Layer("wrong", nn.LIF(decay=0.6), layers.OWN)
    monkeypatch.setattr(layers, "eager", lambda where: [layer])
    row = measured(Case("lif", (8, 100)))["wrong"]
    assert row.status == "WRONG" and "of the neurons differ" in row.note and row.rounds == 0 and math.isnan(row.p50_ms)


def test_a_peer_that_fails_or_is_missing_is_named_and_the_others_are_measured(monkeypatch):
    class Broken(peers.Peer):
        def layers(self, where):
            if self.name == "import":
                raise ImportError("no such symbol")
            return [layers.Layer("raises", lambda x: x.no_such_method(), layers.OWN)]

    found = [
        Broken("import", "1", ""),
        Broken("call", "2", ""),
        peers.Peer("gone", "", "not installed; pip install gone"),
    ]
    monkeypatch.setattr(peers, "choose", lambda names: found)
    made = measured(Case("lif", (3, 10)))
    assert (made["import"].status, made["import"].note) == ("failed", "ImportError: no such symbol")
    assert made["raises"].status == "failed" and "no_such_method" in made["raises"].note
    assert (made["gone"].status, made["gone"].note) == ("skipped", "not installed; pip install gone")
    assert made["eager loop, unbind"].status == "ok"


@pytest.mark.parametrize("name", peers.NAMES)
def test_the_neuron_that_a_peer_is_judged_by_is_its_own(name):
    (peer,) = peers.choose(name)
    if peer.missing or name == "exodus":
        pytest.skip(f"{name} is not installed, or needs a GPU")
    module = import_module(f"trtkern.bench.peers.{name}")
    for neuron in ("LIF", *getattr(module, "OTHERS", ())):
        where = layers.Where(CPU, torch.float32, 12, 300, compiled=False, neuron=neuron)
        theirs = peer.layers(where)
        assert theirs and {layer.neuron.spec.neuron for layer in theirs} == {neuron}
        for who in contest.neurons(Case("lif", (12, 3, 300), neuron=neuron), CPU, theirs):
            verdict = who.check()
            assert verdict.right, (who.name, verdict.words)
            who.inference()
            assert who.probe is None or who.probe() > 0


def test_another_neuron_is_measured_beside_lif():
    made = measured(Case("lif", (9, 2, 40), neuron="ALIF"))
    assert {name for name, row in made.items() if row.status == "ok"} >= {
        "trtkern cpu",
        "trtkern cpu, LIF",
        "reference.py",
    }
    assert made["reference.py"].case == "ALIF lif 9x2x40 float32"


def test_the_gate():
    x, g = torch.randn(8, 500) + 0.5, torch.randn(8, 500)
    want = gate.truth(x, g, layers.OWN)
    leaf = x.clone().requires_grad_()
    s = reference.lif(leaf, None, *layers.OWN).s
    s.backward(g)
    s, gx = s.detach(), leaf.grad
    assert gate.judge(s, gx, want).right
    changed = gx.clone()
    changed[3, 7] = torch.nan
    double = s.clone()
    double[s.nonzero().unbind(1)[0][0], s.nonzero().unbind(1)[1][0]] = 2.0
    for wrong in ((s, 1.01 * gx), (s, changed), (double, gx), (1 - s, gx), (s, torch.zeros_like(gx))):
        assert not gate.judge(*wrong, want).right
    # A library that keeps its state in half precision may lose a few spikes, and it is said how many.
    half = gate.judge(s.half(), gx.half(), want, exact_state=False)
    assert half.right and half.words == "keeps its potential in float16: 0.0% of the spikes differ"
    assert not gate.judge((1 - s).half(), gx.half(), want, exact_state=False).right


def test_an_interrupted_bench_keeps_its_rows(monkeypatch, capsys):
    calls, interleave = [], measure.interleave

    def stopping(run):
        calls.append(run)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return measure.on_cpu(run)

    monkeypatch.setattr(measure, "interleave", lambda *a, **k: interleave(*a, **{**k, "timer": stopping}))
    with pytest.raises(Quit) as stop:
        call("--op", "lif", "--shape", "3,10", *FAST[:-6], "--rounds", "100", "--device", "cpu")
    made = rows.read(_file())
    assert stop.value.status == 130 and f"the {len(made)} rows that were measured" in str(stop.value)
    assert {row.rounds for row in made} == {4}


def test_a_budget_gives_slow_candidates_fewer_rounds_and_leaves_out_what_cannot_end(monkeypatch):
    assert rounds.planned([0.001, 0.01, 1.0, 50.0], 10.0, 25) == [25, 25, 4, 1]
    assert rounds.planned([0.01, 1.0], 0.0, 25) == [5, 1]
    assert rounds.planned([1.0, 1.0], math.inf, 7) == [7, 7]
    monkeypatch.setattr(rounds, "SETTLED", math.inf)  # on a busy machine, too
    made = measured(Case("lif", (3, 10)), replace(OPTIONS, budget=1e-9))
    assert made["eager loop, unbind"].status == "skipped" and "budget" in made["eager loop, unbind"].note
    assert next(row for row in made.values() if row.library == "trtkern").rounds == 3


def test_rounds_are_interleaved_and_leave_out_evenly():
    seen: list[str] = []
    candidates = [
        measure.Candidate("a", lambda: seen.append("a"), 0),
        measure.Candidate("b", lambda: seen.append("b"), 0, prepare=lambda: seen.append("p")),
    ]
    times = measure.interleave(candidates, [6, 2], "")
    assert seen.count("a") == 6 and "".join(seen).count("pb") == 2
    assert [value == value for value in times["b"]] == [False, False, True, False, False, True]
    assert measure.median_ratio([2.0, 4.0, 6.0], [1.0, math.nan, 2.0]) == (2.5, 2.0, 3.0)


def test_least_bytes_are_those_of_the_traffic_contract():
    n = 4 * 1000
    assert cases.least_bytes(Case("lif", (4, 1000)), "both") == 5 * 4 * n
    assert cases.least_bytes(Case("lif", (4, 1000), "bfloat16"), "fwd") == 2 * 2 * n
    assert cases.least_bytes(Case("bn-lif", (4, 10, 100)), "both") == 8 * 4 * n
    assert cases.least_bytes(Case("regularizer", (6, 1000)), "both") == 8 * 1000
    assert cases.least_bytes(Case("pack", (8, 500)), "fwd") == 4 * n + 500
    assert cases.least_bytes(Case("delay", (4, 10, 100)), "both") == 4 * 4 * n


def test_inputs_larger_than_the_cache_or_in_turns():
    cache = cases.cache_bytes(CPU)
    assert cases.rotations(Case("lif", (2, 2 * cache)), CPU) == 1
    many = cases.rotations(Case("lif", (4, cache // 64)), CPU)
    assert many * 4 * 4 * (cache // 64) >= 2 * cache or many == 16


def test_peak_memory_is_what_one_call_allocates():
    x, kept = torch.ones(1 << 18), []
    assert peak(lambda: x + (x + 1), CPU) == 2 << 20
    # Each call frees what the last one kept.
    assert [peak(lambda: (kept.clear(), kept.append(x + x)), CPU) for _ in range(4)] == [1 << 20] * 4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--op", "lfi"],
            "--op: expected one of all, lif, bn-lif, regularizer, pack, delay, recurrent, step, overhead, got 'lfi'",
        ),
        (["--op", "lif", "--neuron", "ALF"], "--neuron: expected one of LIF, CUBALIF"),
        (["--op", "bn-lif", "--neuron", "ALIF"], "--neuron: expected --op lif with ALIF"),
        (["--op", "lif", "--shape", "0,8"], "expected T, N and all others to be at least 1, got '0,8'"),
        (["--op", "lif", "--shape", "4,0"], "expected T, N and all others to be at least 1, got '4,0'"),
        (["--op", "lif", "--shape", "4,x"], "expected whole numbers"),
        (["--op", "bn-lif", "--shape", "4,8"], "expected bn-lif: T,B,C or T,B,C,H,W; got '4,8'"),
        (["--op", "lif", "--shape", "500,1000000000000"], "take a smaller --shape"),
        (["--peers", "brian"], "expected one of all, none, spikingjelly"),
        (["--suite", "short"], "--suite: expected one of default, long, open-neuromorphic"),
        (["--suite", "long", "--op", "pack"], "it has no shapes of pack"),
        (["--suite", "open-neuromorphic", "--op", "pack"], "it is Linear + LIF"),
        (["--dtype", "int8"], "--dtype: expected one of float32"),
        (["--direction", "up"], "--direction: expected one of fwd, bwd, both"),
        (["--backend", "gpu"], "--backend: expected one of all, auto, cpu"),
        (["--device", "tpu"], "--device: expected one of auto, cpu, cuda, cuda:N, got 'tpu'"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
        (["--budget", "0"], "--budget: expected more than 0 seconds"),
        (["--threads", "0"], "--threads: expected an integer of at least 1"),
        (["--csv", "file/rows.csv"], "--csv: expected a file that can be written, got file/rows.csv"),
        (["--csv", "file"], "or to hold rows of `trtkern bench`"),
        (["--plot", "nowhere/a.png"], "expected a folder that can be written, got nowhere"),
        (["--page", "a.md", "--csv", "nowhere.csv"], "nowhere.csv"),
        (["--page", "a.md", "--csv", "."], "expected a file of rows or a folder with some"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(arguments, said, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a,b\n1,2\n")
    monkeypatch.setattr(runner, "run", lambda *rest: pytest.fail("measured"))
    with pytest.raises(Quit) as stop:
        call(*arguments)
    assert stop.value.status == 2 and said in str(stop.value)
    assert not (tmp_path / command.ROWS).exists()


def test_rows_survive_the_file(tmp_path):
    row = rows.Row(*["x, y"] * 4, 1, *["z"] * 9, "ok", "", p50_ms=0.25, command='a "b"')
    rows.append([row], tmp_path / "rows.csv")
    (back,) = rows.read(tmp_path / "rows.csv")
    assert repr(back) == repr(row)
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.reader(file))) == 2
