"""What a profile lets one say: on made-up times, so that nothing here depends on how fast a machine is."""

from __future__ import annotations

import csv
import json
import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

from trtkern import cli
from trtkern import nn as snn
from trtkern.interop import Stepping, adapters
from trtkern.profiling import StepProfile, compare
from trtkern.profiling.step import advice
from trtkern.profiling.step.conditions import Conditions, Watch
from trtkern.profiling.step.page import write
from trtkern.profiling.step.parts import Operator, Part, PartTime
from trtkern.profiling.step.rates import Rates
from trtkern.profiling.step.spread import interval, spread
from trtkern.profiling.step.trail import Trail, changes

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
RATES = Rates(100e9, 1000e9)


def row(name, times, group="neurons", kind="LIF", **more):
    forward = Part(tuple(times), more.get("bytes"), more.get("flops", 0), tuple(more.get("ran", ())))
    return PartTime(name, kind, group, forward, Part((0.0,) * len(times), None, 0), "", None, None)


def made(*rows, overhead=0.1, waited=0.0, rates=None, **more):
    """A profile of these rows, in which nothing is unattributed."""
    steps = len(rows[0].times)
    walls = tuple(sum(each.times[step] for each in rows) for step in range(steps))
    plains = tuple(wall / (1 + overhead) for wall in walls)
    measured = tuple(rates or [RATES] * steps)
    about = {"device": "cpu", "threads": "2"}
    conditions = (Conditions(waited, 0, 1.0),) * steps
    return StepProfile("net", rows, walls, plains, measured, False, about, "a CPU", conditions=conditions, **more)


def around(middle, seed, noise=0.02, steps=STEPS):
    """Times that scatter, the same on every machine."""
    draw = random.Random(seed)
    return [middle * draw.uniform(1 - noise, 1 + noise) for _ in range(steps)]


def kinds(found):
    return [doubt.kind for doubt in found.doubts()]


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_misses_the_median_as_rarely_as_it_says(count):
    """Counted over all 2^n ways in which n values can lie below and above the median, which are equally likely."""
    missed = 0
    for below in product((False, True), repeat=count):
        low, high = interval([-1.0 - at if side else 1.0 + at for at, side in enumerate(below)])
        missed += not low < 0 < high
    least = 2 if count > 1 else 2**count  # all on one side
    assert missed >= least
    assert missed <= 0.1 * 2**count or missed == least
    narrower = 2 * (1 + count)  # without one at either end
    assert narrower > 0.1 * 2**count or missed >= narrower


def test_spread_is_that_of_the_values():
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0, 100.0])
    assert found == (2.0, 3.5, 5.0)  # which one slow step does not move, as a mean would be


def test_two_parts_that_differ_are_told_apart():
    long, short = row("a", around(0.8, 1)), row("b", around(0.2, 2), "convolutions")
    found = made(long, short)
    assert found.doubts() == [] and found.verdict()[1].startswith("The step is bound by a,")


def test_two_parts_whose_difference_is_less_than_the_spread_get_no_verdict():
    found = made(row("a", around(0.50, 1, 0.2)), row("b", around(0.49, 2, 0.2), "convolutions"))
    said = found.verdict()[1]
    assert said.startswith("No verdict: the two longest parts, convolutions (5") and "cannot be told apart" in said
    assert "--threads 1 or more --steps" in said
    one = replace(found, about={"device": "cpu", "threads": "1"})
    assert "--threads 1" not in one.verdict()[1]


def test_layers_of_one_kind_that_cannot_be_told_apart_are_both_named():
    found = made(row("a", around(0.50, 1, 0.2)), row("b", around(0.49, 2, 0.2)))
    assert "(which cannot be told apart)" in found.verdict()[1]


def test_near_the_limit_or_not_is_said_with_its_margin():
    times = around(1.0, 3, 0.3)
    near = made(row("a", times, bytes=0.5 * median(times) * RATES.copy))
    assert "whether that bounds it cannot be told" in near.verdict()[1]
    at = made(row("a", times, bytes=0.9 * median(times) * RATES.copy))
    assert at.verdict()[1] == "The step is bound by the memory traffic of a."


@pytest.mark.parametrize("overhead, kind", [(-0.1, ["overhead"]), (-0.01, []), (0.29, []), (0.31, ["overhead"])])
def test_an_overhead_that_cannot_be_or_is_too_large_ends_the_verdict(overhead, kind):
    found = made(row("a", around(1.0, 1)), overhead=overhead)
    assert kinds(found) == kind
    assert found.verdict()[0].startswith("No verdict") == bool(kind)


def test_too_few_steps_have_no_verdict():
    assert kinds(made(row("a", [1.0, 1.0]))) == ["steps"]
    assert made(row("a", [1.0, 1.0])).verdict()[0].startswith("No verdict: 2 profiled steps")
    assert kinds(made(row("a", [1.0, 1.0, 1.0]))) == []


def test_a_busy_machine_and_rates_that_scatter_are_said():
    assert kinds(made(row("a", around(1.0, 1)), waited=0.3)) == ["busy"]
    apart = [Rates(100e9 * (1 + at % 2), 1e12) for at in range(STEPS)]
    assert kinds(made(row("a", around(1.0, 1)), rates=apart)) == ["rates"]
    silent = replace(made(row("a", around(1.0, 1))), conditions=(Conditions(None, 400, 1.0),) * STEPS)
    assert kinds(silent) == ["busy"]
    assert kinds(replace(silent, conditions=(Conditions(None, None, 1.0),) * STEPS)) == []


def test_watch_has_a_number_a_step():
    watch = Watch()
    for _ in range(2):
        with watch.step():
            sum(range(1000))
    assert len(watch.found) == 2
    assert all(each.waited is None or 0 <= each.waited <= 1 for each in watch.found)


def test_a_model_that_changes_between_steps_is_named():
    def trail(*calls):
        found = Trail()
        for name, shape in calls:
            found.leave(name, nn.Identity(), (), {}, torch.empty(shape))
        return found

    same = [trail(("a", (2, 3)), ("b", (2,))) for _ in range(3)]
    assert changes(same) == []
    assert changes([*same, trail(("a", (2, 3)))]) == ["b runs in 3 of 4"]
    assert changes([*same, trail(("a", (2, 3)), ("a", (2, 3)), ("b", (2,)))]) == ["a is called 1 to 2 times"]
    assert changes([*same, trail(("a", (5, 3)), ("b", (2,)))]) == ["a gives 2x3 and 5x3"]
    found = made(row("a", around(1.0, 1)), changes=("b runs in 3 of 4",))
    assert kinds(found) == ["changes"] and "the model changes between steps" in found.verdict()[0]
    other = made(row("a", around(1.0, 1)), operators=(5,) * 7 + (6,))
    assert kinds(other) == ["operators"] and not other.verdict()[0].startswith("No verdict")


def test_profiles_of_one_step_agree_within_their_intervals():
    """A hundred pairs of ten rows each: at most one in ten may find a difference, and far fewer do."""
    wrong = 0
    for pair in range(100):
        one, other = (
            made(*(row(f"l{at}", around(1 + at, 1000 * pair + 100 * side + at, 0.5)) for at in range(10)))
            for side in (0, 1)
        )
        wrong += any(each.said != "cannot be told" for each in compare(one, other).rows)
    assert wrong <= 10


def test_a_difference_that_is_there_is_told():
    before = made(row("a", around(1.0, 1)), row("b", around(1.0, 2)), row("gone", around(0.1, 3)))
    after = made(row("a", around(0.5, 4)), row("b", around(1.0, 5)), row("new", around(0.1, 6)))
    found = compare(before, after)
    said = {each.name: each.said for each in found.rows}
    assert (said["a"], said["b"], said["new"], said["gone"]) == ("faster", "cannot be told", "new", "gone")
    assert found.total.said == "faster" and found.verdict().startswith("The step is faster")
    assert compare(after, before).total.said == "slower"
    assert found.notes == ()


def test_a_loaded_machine_takes_the_difference_back():
    """The second profile takes twice as long, since a thread waited for half of it, or since all became slower."""
    quiet, twice = made(row("a", around(1.0, 1))), row("a", around(2.0, 2))
    assert compare(quiet, made(twice)).total.said == "slower"
    waited = compare(quiet, made(twice, waited=0.55))
    assert waited.total.said == "cannot be told" and any("the machine is busy" in note for note in waited.notes)
    slow = [Rates(RATES.copy / 2.2, RATES.product)] * STEPS
    assert compare(quiet, made(twice, rates=slow)).total.said == "cannot be told"
    elsewhere = compare(quiet, replace(made(twice, rates=slow), machine="another"))
    assert elsewhere.total.said == "slower" and "Another machine: a CPU before, another after" in elsewhere.notes[0]


def test_what_cannot_be_compared_is_said():
    good = made(row("a", around(1.0, 1)))
    few = made(row("a", [0.1, 0.1]))
    assert {each.said for each in compare(good, few).rows} == {"cannot be told"}
    dear = compare(good, made(row("a", around(0.5, 2)), overhead=0.5))
    assert [each.said for each in dear.rows] == ["cannot be told"] * 3 + ["faster"]  # the step itself was not profiled
    notes = compare(good, replace(good, title="other", about={"device": "cuda"})).notes
    assert [note.partition(":")[0] for note in notes] == ["Another model", "Another device", "Another threads"]


def whole():
    ran = [Operator("aten::mm", tuple(around(0.5, 5)), 3), Operator("aten::t", (1e-9,) * STEPS, 1)]
    tip = (advice.Advice("a is slow", "make it fast", 0.001),)
    return made(row("a", around(1.0, 1), ran=ran, bytes=1e9, flops=7), row("(loss)", around(0.1, 2), "the loss", ""),
                advice=tip, versions={"torch": "2"}, operators=(4,) * STEPS)  # fmt: skip


def test_a_profile_survives_json():
    found = whole()
    again = StepProfile.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and str(again) == str(found)
    for broken, wanted in (
        ({}, "got no schema in it"),
        ({**found.to_json(), "schema": "x"}, "got 'x' in it"),
        (
            {**found.to_json(), "schema": {"name": "trtkern profile", "version": 99}},
            "got version 99; profile again",
        ),
        ({**found.to_json(), "plains": [1.0]}, "not as many times"),
        ({**found.to_json(), "rows": [{}]}, "got one without what it needs"),
    ):
        with pytest.raises(ValueError, match=wanted):
            StepProfile.from_json(broken, "x.json")


def test_operators_stand_below_their_layer(tmp_path):
    found = whole()
    names = [line[0] for line in found.table(kernels=True)]
    assert names[:4] == ["a", "  aten::mm", "  other operators", "  outside of operators"]
    assert "aten::mm" not in str(found) and "aten::mm" in found.text(kernels=True)
    assert "What can be done:\n  - a is slow: make it fast" in str(found)
    write(tmp_path / "p.html", found, {}, compared=compare(found, found))
    page = (tmp_path / "p.html").read_text()
    assert "<details>" in page and "aten::mm" in page and "Before and after" in page and "make it fast" in page


def seen(model, rows, **more):
    given = {
        "model": model, "rows": rows, "wall": 1.0, "unattributed": 0.0, "rates": RATES, "outputs": {}, "calls": {},
        "optimizer": None, "device": torch.device("cpu"), "dtype": torch.float32, "backward": True, "kept": None,
        "free": None, "shorter": None,
    }  # fmt: skip
    return advice.Seen(**{**given, **more})


def tips(model, rows=(), **more):
    return [str(each) for each in advice.advice(seen(model, rows, **more))]


def test_batch_norms_before_neurons_are_found_with_what_fusing_saves():
    model = nn.Sequential(
        nn.Linear(2, 2), snn.OverTime(nn.BatchNorm2d(3)), snn.LIF(backend="reference"), snn.OverTime(nn.AvgPool2d(2)),
    )  # fmt: skip
    y = torch.empty(4, 2, 3, 8, 8, device="meta")
    parts = [row(name, [0.1] * 3, bytes=10.0 * y.numel() * 4) for name in ("1.module", "2", "3.module")]
    (found,) = advice.advice(seen(model, parts, outputs={"2": y}))
    assert found.what == "layers 1 to 3 are BatchNorm2d, LIF, AvgPool2d" and "convert_norm_lif(model)" in found.do
    fused = (2 + 1 / 4) + (2 * (1 + 1 / 4) + 1)  # e a neuron-step: y twice, s; y and gs twice, gy; s and gs are pooled
    assert found.saves == pytest.approx((30 - fused) * y.numel() * 4 / RATES.copy)
    snn.convert_norm_lif(model)
    assert tips(model, parts, outputs={"2": y}) == []


def test_neurons_of_other_libraries_are_found(monkeypatch):
    class LIFNode(nn.Module):
        pass

    LIFNode.__module__ = "spikingjelly.activation_based.neuron"
    assert tips(nn.Sequential(LIFNode())) == []  # of which nothing is known but its name: convert leaves it
    mine = type("NodeOfATest", (nn.Module,), {})
    monkeypatch.setattr(adapters, "_REGISTERED", list(adapters._REGISTERED))
    adapters.register("NodeOfATest", lambda node: snn.LIF(backend="reference"))
    model = nn.Sequential(mine(), nn.Flatten(), mine())
    (tip,) = tips(model)
    assert tip.startswith("0, 2 are neurons of another library: trtkern.interop.convert(model)")
    assert isinstance(model[0], mine)  # it was tried on a copy
    adapters.register("NodeOfATest", lambda node: Stepping(snn.LIF(backend="reference")))
    assert "interop.over_time(model)" in tips(model)[0]


def test_layers_on_spikes_are_found():
    model = nn.Sequential(snn.LIF(backend="reference"), nn.Linear(4, 4))
    (tip,) = tips(model, outputs={"0": torch.empty(2, 8, 4, device="meta")})
    assert tip.startswith("1 computes on spikes") and "convert_spike_layers" in tip and "248 B" in tip
    assert tips(snn.convert_spike_layers(model)) == []
    assert tips(nn.Sequential(snn.LIF(backend="reference"), nn.Linear(4, 4)), backward=False) == []


def test_the_rest_of_the_advice_needs_its_share_of_the_step():
    weight = nn.Linear(2, 2)
    adam, fused = (torch.optim.Adam(weight.parameters(), fused=flag) for flag in (None, True))
    loader, update = row("(loader)", [0.2] * 3, "", ""), row("(optimizer)", [0.1] * 3, "", "")
    assert "the loader takes 20%" in tips(weight, [loader])[0]
    assert "fused=True" in tips(weight, [update], optimizer=adam)[0]
    assert tips(weight, [update], optimizer=fused) == []
    product = row("0", [0.5] * 3, flops=10)
    assert "2.0 times" in tips(weight, [product], shorter=2.0)[0] and tips(weight, [product], shorter=1.2) == []
    assert "--memory 80%" in tips(weight, kept=2**30, free=2**30)[0] and tips(weight, kept=1, free=2**30) == []
    assert "16 times in a step" in tips(weight, [product], calls={"0": 16})[0]
    ran = row("0", [0.9] * 3, ran=[Operator("aten::add", (0.1,) * 3, 40)])
    assert "outside of operators" in tips(weight, [ran])[0]
    assert "without work for 50%" in tips(weight, device=torch.device("cuda"), unattributed=0.5)[0]


def test_the_command_compares_with_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_a_test.py").write_text("import torch\nmade = lambda: torch.nn.Linear(3, 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("trtkern.malloc.keep_pages", lambda: False)
    monkeypatch.setattr("trtkern.profiling.step.profiler.WARM_UP", 1)
    line = ["profile", "net_of_a_test:made", "--input", "4,3", "--steps", "1", "--device", "cpu"]
    assert cli.main([*line, "--json", "a.json"]) == 0
    capsys.readouterr()
    assert cli.main([*line, "--compare", "a.json", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["compared"]["verdict"].startswith("Whether the step became faster cannot be told")
    assert StepProfile.from_json(printed).title == "net_of_a_test:made"
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text("[")
    for name, wanted in (("b.json", "got no schema in it"), ("c.json", "expected a profile"), ("d.json", "be read")):
        assert cli.main([*line, "--compare", name]) == 2
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("page", ["profiling", "reading-a-profile"])
def test_the_pages_show_what_the_files_hold(page):
    """Every line of output there is one of the two profiles, of their comparison, or of what ran inside a layer."""
    before, after = (
        StepProfile.from_json(json.loads((ROOT / "bench" / f"{name}.json").read_text()))
        for name in ("profile_example", "profile_example_fused")
    )
    known = {line.rstrip() for text in (before.text(), before.text(kernels=True), compare(before, after))
             for line in str(text).splitlines()}  # fmt: skip
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = [line.rstrip() for block in blocks for line in block.splitlines()]
    shown += [re.sub("^- ", "  - ", line) for line in re.findall(r"^> (.*)$", text, re.MULTILINE)]
    assert len(shown) > 20 and [line for line in shown if line not in known] == []


def test_the_measured_pairs_bear_out_what_the_page_says():
    """docs/reading-a-profile.md: no profile of a step contradicts the other, and most warn of a busy machine."""
    with (ROOT / "bench" / "profile_trust.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    same = [pair for pair in pairs if not pair["case"].startswith("twice")]
    assert len(same) > 50 and all(int(pair["layers"]) > 0 for pair in same)
    assert {pair["said"] for pair in same} == {"cannot be told"} and {pair["told"] for pair in same} == {"0"}
    assert "contradict" not in {pair["verdicts"] for pair in same}
    assert sum("busy" in pair["warned"] for pair in pairs) > len(pairs) / 2
    twice = [pair["said"] for pair in pairs if pair["case"].startswith("twice")]
    assert 0 < twice.count("slower") < len(twice) / 2
