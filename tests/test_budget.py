"""``--memory``: the predicted peak is the measured one, the choice is the best there is, and it stays with the run."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from trtkern import cli, data
from trtkern.backends import named
from trtkern.data import Split
from trtkern.models import ConvSNN, Spikformer, resnet19
from trtkern.models._blocks import Convolution, SEWBlock, Style
from trtkern.nn import LIF, BatchNormLIF, ConvBatchNormLIF, SpikeConv2d, SpikeLinear, TRTLoss
from trtkern.profiling import memory
from trtkern.profiling.memory import timeline
from trtkern.profiling.memory.budget import BudgetError, StepMemory
from trtkern.profiling.memory.held import held, state_bytes
from trtkern.profiling.memory.peak import peak
from trtkern.profiling.memory.timeline import Option, Segment
from trtkern.profiling.memory.ways import CHECKPOINT, DENSE, KEEP, PACK, blocks, run_as
from trtkern.training import loop, options, settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer

# The reference has no formula, and checkpoints nothing.
needs_cpu = pytest.mark.skipif(named("cpu").missing() is not None, reason="the cpu backend is not built")
pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
CPU = torch.device("cpu")


# Choosing


def segments(random_numbers: random.Random, count: int) -> list[Segment]:
    """With options whose order by bytes need not be that by cost, and that may need more than they keep, or less."""
    made = [Segment("", (Option(KEEP, random_numbers.randrange(5), random_numbers.randrange(9), 0.0),))]
    for place in range(count):
        ways = random_numbers.sample((KEEP, PACK, CHECKPOINT), random_numbers.randrange(1, 4))
        told = [
            Option(way, random_numbers.randrange(30), random_numbers.randrange(40), random_numbers.randrange(8) / 8)
            for way in ways
        ]
        made.append(Segment(str(place), tuple(told)))
    return made


def test_no_choice_is_cheaper_and_none_has_a_lower_peak():
    drawn = random.Random(0)
    fits = 0
    for _ in range(150):
        found = segments(drawn, drawn.randrange(1, 7))
        every = list(itertools.product(*(segment.options for segment in found)))
        peaks = [timeline.peak(each) for each in every]
        assert timeline.least(found) == min(peaks)
        for budget in (min(peaks) - 1, min(peaks), drawn.randrange(min(peaks), max(peaks) + 2)):
            costs = [sum(o.cost for o in each) for each, top in zip(every, peaks, strict=True) if top <= budget]
            chosen = timeline.cheapest(found, budget)
            if not costs:
                assert chosen is None
                continue
            fits += 1
            assert chosen is not None and chosen.peak == timeline.peak(chosen.options) <= budget
            assert chosen.cost == min(costs)
    assert fits >= 300


def test_a_cheap_start_is_given_up_for_one_that_leaves_room():
    wide = Segment("a", (Option(KEEP, 10, 10, 0.0), Option(CHECKPOINT, 1, 10, 1.0)))
    narrow = Segment("b", (Option(KEEP, 10, 12, 0.0), Option(CHECKPOINT, 1, 12, 5.0)))
    chosen = timeline.cheapest([wide, narrow], 13)
    assert chosen is not None and [option.way for option in chosen.options] == [CHECKPOINT, KEEP]


def test_so_many_beginnings_that_they_are_thinned_out():
    drawn = random.Random(1)
    found = []
    for place in range(24):
        keeps = drawn.randrange(10**6, 10**9)
        cheap = Option(KEEP, keeps, keeps, 0.0)
        found.append(Segment(str(place), (cheap, Option(CHECKPOINT, 0, keeps, drawn.random()))))
    whole = timeline.peak([segment.options[0] for segment in found])
    chosen = timeline.cheapest(found, whole // 2)
    assert chosen is not None and chosen.peak <= whole // 2
    greedy = sum(segment.options[1].cost for segment in found)
    assert 0 < chosen.cost < greedy


# Peaks


def conv(exact: bool = False) -> ConvSNN:
    return ConvSNN((2, 16, 16), (24, "pool", 32, 32, "pool"), 10, backend="cpu", exact_convolutions=exact)


class SEW(torch.nn.Sequential):
    """A block whose sums are of spikes."""

    def __init__(self) -> None:
        style = Style.of(False, True, backend="cpu")
        convolutions = [Convolution(16, 16) for _ in range(4)]
        super().__init__(
            style.block(Convolution(2, 16)), SEWBlock(*convolutions[:2], None, style),
            SEWBlock(*convolutions[2:], None, style), SpikeLinear(16 * 16 * 16, 10),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]))


NETS = {
    "conv": (conv, (4, 6, 2, 16, 16)),
    "exact": (lambda: conv(exact=True), (4, 6, 2, 16, 16)),
    "resnet19": (lambda: resnet19(10, width=16, timesteps=2, backend="cpu"), (6, 3, 16, 16)),
    "sew": (SEW, (4, 6, 2, 16, 16)),
    "spikformer": (
        lambda: Spikformer(10, shape=(3, 16, 16), dim=64, depth=1, heads=2, timesteps=4, backend="cpu"),
        (6, 3, 16, 16),
    ),
}


def made(name: str, ways=None):
    torch.manual_seed(0)
    model = NETS[name][0]()
    run_as(model, ways or {})
    return model


def frames(name: str) -> torch.Tensor:
    return torch.rand(NETS[name][1], generator=torch.Generator().manual_seed(0)).round()


def step(model, x):
    """The loss and the gradients; the optimiser takes a step."""
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), TRTLoss(model)
    total = loss.parts(model(x), torch.arange(6), regularize=False).total
    total.backward()
    loss.add_grad_()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return total.detach(), gradients


def of(name: str) -> StepMemory:
    x, model = frames(name), made(name)
    axis = x.dim() - 4
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def inputs(count: int) -> torch.Tensor:
        return x.narrow(axis, 0, count)

    return StepMemory(model, inputs, x.shape[axis], held(model, state_bytes(optimizer), x.nbytes))


@pytest.mark.parametrize("name", NETS)
def test_predicted_and_measured_peak_agree_and_the_step_is_the_same(name):
    found = of(name)
    plans = [found.plan(found.made), found.least()]
    plans.append(found.within((plans[0].peak + plans[1].peak) // 2))
    wanted = step(made(name), frames(name))
    for plan in plans:
        gc.collect()
        highest = peak(lambda plan=plan: _two_steps(name, plan.ways), CPU)
        assert plan.peak == pytest.approx(highest, rel=0.1), f"{plan}\n{highest}"
        total, gradients = step(made(name, plan.ways), frames(name))
        assert torch.equal(total, wanted[0])
        for mine, theirs in zip(gradients, wanted[1], strict=True):
            assert torch.equal(mine, theirs)
    assert plans[1].peak < plans[0].peak and plans[1].cost > 0


def _two_steps(name: str, ways) -> None:
    model, x = made(name, ways), frames(name)
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), TRTLoss(model)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss.parts(model(x), torch.arange(6), regularize=False).total.backward()
        loss.add_grad_()
        optimizer.step()


def test_dense_spikes_are_kept_where_they_cost_nothing_else():
    found = of("exact")
    inside = {segment.name: [option.way for option in segment.options] for segment in found.segments if segment.name}
    assert inside["layers.0"] == [KEEP, PACK, CHECKPOINT]
    fastest = found.plan({})
    assert set(fastest.ways.values()) == {KEEP} and fastest.cost == 0
    packed = found.plan(dict.fromkeys(inside, PACK))
    assert packed.kept < fastest.kept and packed.cost > 0
    highest = peak(lambda: _two_steps("exact", fastest.ways), CPU)
    assert fastest.peak == pytest.approx(highest, rel=0.1)
    for mine, theirs in zip(
        step(made("exact", fastest.ways), frames("exact"))[1], step(made("exact"), frames("exact"))[1], strict=True
    ):
        assert torch.equal(mine, theirs)
    # Where kernels compute on packed spikes, dense ones are larger and slower, and rounded otherwise.
    assert all(KEEP not in [o.way for o in s.options] for s in of("conv").segments if s.name)


def test_what_is_planned_is_what_memory_says_that_is_kept():
    for name in ("conv", "resnet19"):
        found = of(name)
        for plan in (found.plan(found.made), found.least()):
            assert plan.kept == pytest.approx(memory(made(name, plan.ways), frames(name)).predicted, rel=1e-3)


def test_the_graphs_of_the_two_batches_go():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), LIF(backend="cpu"), torch.nn.Linear(8, 4))
    kept = []

    def inputs(count: int) -> torch.Tensor:
        x = torch.rand(4, count, 8)
        kept.append(StorageWeakRef(x.untyped_storage()))
        return x

    StepMemory(model, inputs, 6, held(model))
    gc.collect()
    assert len(kept) == 2 and all(ref.expired() for ref in kept)


def test_no_way_fits():
    found = of("conv")
    least = found.least()
    assert found.within(least.peak).peak == least.peak
    with pytest.raises(BudgetError, match=r"expected at least .* got 1\.0 KiB"):
        found.within(1024)
    with pytest.raises(BudgetError):
        found.within(least.peak - 1)


@pytest.mark.parametrize("name", ["conv", "resnet19", "sew"])
def test_what_is_said_to_fit_fits(name):
    found = of(name)
    with pytest.raises(BudgetError) as refused:
        found.within(1024)
    said = options.limit(str(refused.value).partition(",")[0].removeprefix("expected at least "))
    assert said is not None and found.least().peak <= found.within(said.of(0)).peak <= said.of(0)


def test_a_table_of_blocks_and_their_ways():
    lines = str(of("conv").least()).splitlines()
    assert lines[0].split() == ["block", "way", "kept", "saved", "longer"]
    assert lines[1].startswith("layers.0") and "checkpoint" in lines[1] and "%" in lines[1]
    assert lines[-1].startswith("predicted peak of a step: ")


def test_ways_of_blocks():
    packs, dense = (
        ConvBatchNormLIF(SpikeConv2d(2, 4, 3), BatchNormLIF(4, backend="cpu", packed=packed))
        for packed in (True, False)
    )
    model = torch.nn.Sequential(packs, dense, BatchNormLIF(4, backend="cpu"))
    assert [(block.name, block.way) for block in blocks(model)] == [("0", PACK), ("1", KEEP), ("2", KEEP)]
    for ways in ({"0": KEEP, "1": DENSE}, {"0": CHECKPOINT, "1": KEEP}, {"0": PACK, "1": DENSE}):
        run_as(model, ways)
        assert {block.name: block.way for block in blocks(model)} == {**ways, "2": KEEP}
    with pytest.raises(ValueError, match="memory: block: expected one of 0, 1, 2, got '3'"):
        run_as(model, {"3": PACK})
    with pytest.raises(ValueError, match="memory: 0: expected one of keep, pack, "):
        run_as(model, {"0": "pakc"})


@pytest.mark.parametrize(
    "kind, arguments, factor",
    [
        (torch.optim.Adam, {"fused": True}, 2), (torch.optim.SGD, {"momentum": 0.9}, 1), (torch.optim.SGD, {}, 0),
        (torch.optim.AdamW, {"amsgrad": True}, 3), (torch.optim.Rprop, {}, 2),
    ],
)  # fmt: skip
def test_the_state_of_an_optimiser_before_its_first_step(kind, arguments, factor):
    weights = [torch.nn.Parameter(torch.zeros(16, 8)), torch.nn.Parameter(torch.zeros(64))]
    optimizer = kind(weights, lr=0.1, **arguments)
    predicted = state_bytes(optimizer)
    assert predicted == pytest.approx(factor * 4 * (128 + 64), abs=16)
    assert all(not state for state in optimizer.state.values()) and all(w.grad is None for w in weights)


# Training


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in (("train", 96), ("test", 32))}
    return dataclasses.replace(digits, **splits)


def plan(**more):
    told = {"backend": "cpu", "threads": 1, "device": "cpu", "epochs": 2, "batch_size": 32, "select": "last", **more}
    return settings.resolve(recipe="digits", **told)


def test_the_ways_are_chosen_once_and_stay_with_the_run(few, tmp_path, monkeypatch):
    class Impatient(Observer):
        interval = 0.0

        def step(self, epoch, step, averages):
            if (epoch, step) == (2, 1):
                raise KeyboardInterrupt

    free = Trainer.of(plan(), few)
    whole = Trainer.of(plan(memory="2550KiB"), few)
    ways = whole.settings.ways
    assert CHECKPOINT in ways.values() and whole.plan is not None and whole.plan.peak <= 2550 * 2**10
    for trainer, place in ((free, "free"), (whole, "whole")):
        (tmp_path / place).mkdir()
        trainer.run(tmp_path / place)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Trainer.of(plan(memory="2550KiB"), few).run(stopped, Impatient())
    kept = json.loads((stopped / "config.json").read_text())["settings"]
    assert kept["memory"] == "2550KiB" and kept["ways"] == ways

    def never(*_, **__):
        raise AssertionError("chosen again")

    monkeypatch.setattr("trtkern.training.budget.planned", never)
    saved = loop.checkpoint.load(stopped)
    resumed = Trainer.of(loop.run.config_of(stopped), few)
    assert {b.name: b.way for b in blocks(resumed.model)} == ways and resumed.plan is None
    resumed.resume(saved, stopped)
    resumed.run(stopped)
    for mine, theirs, without in zip(
        *(trainer.model.state_dict().values() for trainer in (resumed, whole, free)), strict=True
    ):
        assert torch.equal(mine, theirs) and torch.equal(mine, without)


def test_a_program_goes_on_with_the_ways_of_its_run(few, tmp_path):
    place = tmp_path / "run"
    Trainer.of(plan(memory="2550KiB", epochs=1), few).fit(place, show=False)
    path = place / "config.json"
    config = json.loads(path.read_text())
    assert CHECKPOINT in config["settings"]["ways"].values()
    again = Trainer.of(plan(memory="2550KiB", epochs=2), few)
    run_as(again.model, dict.fromkeys(again.settings.ways, PACK))
    again.settings = dataclasses.replace(again.settings, ways=dict.fromkeys(again.settings.ways, PACK))
    again.fit(place, show=False)
    assert again.settings.ways == config["settings"]["ways"]
    assert {b.name: b.way for b in blocks(again.model)} == config["settings"]["ways"]


@pytest.mark.parametrize(
    "said, found",
    [
        ("20GiB", (20 * 2**30, False)), ("1.5 MiB", (1.5 * 2**20, False)), ("80%", (0.8, True)), ("100%", (1, True)),
        ("2GB", (2e9, False)), ("101%", None), ("0MiB", None), ("12", None), ("-1GiB", None), ("1gib", None),
        ("nanGiB", None), ("", None),
    ],
)  # fmt: skip
def test_sizes(said, found):
    limit = options.limit(said)
    assert (limit is None) == (found is None)
    if limit is not None:
        assert (limit.amount, limit.is_share) == pytest.approx(found)
        assert limit.of(1000) == int(found[0] * (1000 if found[1] else 1))


@pytest.mark.parametrize(
    "given, words",
    [
        (["--memory", "lots"], "--memory: expected a size such as 20GiB or 512MiB, or a share such as 80%, got lots"),
        (["--memory", "1KiB"], "--memory: expected at least "),
        (["--memory", "1GiB", "--compile"], "--memory: expected it without --compile"),
        (["--ranks", "2"], "--ranks: expected --dry-run beside it"),
        (["--dry-run", "--ranks", "0"], "--ranks: expected an integer of at least 1, got 0"),
        (["--dry-run", "--ranks", "7"], "--batch-size: expected a multiple of 7"),
    ],
)
def test_refusals(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--device", "cpu", "--backend", "cpu", *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert ("use a smaller --batch-size" in said) == ("1KiB" in given)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_dry_run_of_several_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = ["train", "--device", "cpu", "--backend", "cpu", "--dry-run", "--memory", "3MiB"]
    assert cli.main([*told, "--ranks", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 processes, ddp, 16 of 64 images each" in out
    for row in ("weights ", "gradients ", "optimiser ", "kept for the backward pass", "predicted peak", "layers.0 "):
        assert row in out
    for link in ("nvlink", "infiniband", "pcie", "gloo"):
        assert f"\n{link} " in out
    assert "each sends " in out and not any(tmp_path.iterdir())
