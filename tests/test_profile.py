"""The profiler of a step: what it attributes, counts and says, and that it leaves no trace in the model."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from trtkern import cli, commands
from trtkern import nn as snn
from trtkern.backends import named
from trtkern.commands import _runs
from trtkern.models import ConvSNN
from trtkern.models.build import BUILDERS
from trtkern.profiling import profile
from trtkern.profiling.step import profiler, rates, timeline
from trtkern.profiling.step.parts import Part, PartTime
from trtkern.profiling.step.ranges import LOSS, OPTIMIZER, PREFIX, STEP, Ranges
from trtkern.profiling.step.rates import Rates
from trtkern.profiling.step.report import StepProfile
from trtkern.profiling.step.subject import ModelStep
from trtkern.profiling.step.timeline import Share

BACKEND = "reference" if named("cpu").missing() is not None else "cpu"
needs_cpu = pytest.mark.skipif(named("cpu").missing() is not None, reason="the CPU kernels are not built")


@pytest.fixture(autouse=True)
def _small(monkeypatch, one_thread):
    """Limits on small tensors, one warm-up step, no change of this process's malloc."""
    monkeypatch.setitem(rates.COPIED, "cpu", 2**16)
    monkeypatch.setitem(rates.SIDE, "cpu", 32)
    monkeypatch.setattr(profiler, "WARM_UP", 1)
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    monkeypatch.setattr("trtkern.malloc.keep_pages", lambda: False)


class Sleepy(torch.autograd.Function):
    """The identity, whose backward pass takes its time."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class Slow(nn.Module):
    """Sleeps in its forward, its backward, or both."""

    def __init__(self, forward: float = 0.0, backward: float = 0.0) -> None:
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x):
        """x, later."""
        time.sleep(self.seconds[0])
        return Sleepy.apply(x, self.seconds[1])


def rows(found: StepProfile) -> dict[str, PartTime]:
    return {row.name: row for row in found.rows}


def test_slow_layers_are_named_with_their_time():
    model = nn.Sequential(nn.Linear(4, 4), Slow(0.04), nn.ReLU(), Slow(0.0, 0.08), nn.Linear(4, 2))
    found = profile(model, torch.rand(8, 4), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    parts = rows(found)
    early, late = parts["1"], parts["3"]
    assert early.forward.seconds >= 0.04 and late.backward.seconds >= 0.08
    for step in range(2):
        taken = sum(row.times[step] for row in found.rows)
        assert taken + found.lefts[step] == pytest.approx(found.walls[step])
    assert min(found.lefts) >= 0 and found.attributed >= 0.12 / found.wall
    assert min(found.wall, found.plain) >= 0.12
    assert {"0", "2", "4", "(model)", LOSS, OPTIMIZER} <= set(parts)
    assert (
        found.verdict() == [f"No verdict: {found.doubts()[0].what}."]
        and "2 profiled steps do not" in found.verdict()[0]
    )


def test_the_loader_is_timed():
    def load():
        time.sleep(0.02)
        return torch.rand(2, 4)

    found = profile(nn.Linear(4, 4), load, steps=1)
    assert rows(found)["(loader)"].seconds >= 0.02
    assert found.groups()["the loader"] == [rows(found)["(loader)"]]


def test_what_is_in_no_layer_is_unattributed(monkeypatch):
    inner = ModelStep.step

    def step(self, ranges):
        time.sleep(0.04)
        inner(self, ranges)

    monkeypatch.setattr(ModelStep, "step", step)
    found = profile(nn.Linear(4, 4), torch.rand(2, 4), steps=3)
    assert min(found.lefts) >= 0.04 and found.attributed <= 1 - 0.04 / max(found.walls)
    longer = replace(found, walls=tuple(10 * wall for wall in found.walls), plains=found.walls)
    quick = replace(longer, plains=longer.walls)  # no overhead
    assert "Most of the step is in no layer" in quick.verdict()[1]
    assert "No verdict: the profiler makes the step" in longer.verdict()[0]


@needs_cpu
def test_flop_and_bytes_are_those_computed_by_hand():
    batch, time_steps, side = 5, 4, 8
    model = nn.Sequential(
        snn.TimeSequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)), snn.BatchNormLIF(3, backend="cpu"),
        nn.Flatten(2), nn.Linear(3 * side * side, 7),
    )  # fmt: skip
    x = torch.rand(time_steps, batch, 2, side, side)
    parts = rows(profile(model, x, steps=1))
    images, pixels = time_steps * batch, side * side
    product = 2 * images * pixels * 3 * 2 * 9
    conv = next(row for row in parts.values() if row.kind == "Conv2d")
    assert conv.forward.flops == product
    assert conv.backward.flops == product  # of the weight; the images need no gradient
    assert parts["3"].forward.flops == 2 * images * 3 * pixels * 7
    assert parts["3"].backward.flops == 2 * parts["3"].forward.flops
    y = 4 * images * 3 * pixels
    assert (parts["1"].forward.bytes, parts["1"].backward.bytes) == (3 * y, 5 * y)
    read, weight = 4 * x.numel(), 4 * 3 * 2 * 9
    assert conv.forward.bytes == read + weight + y
    assert conv.backward.bytes == read + weight + y + weight
    assert conv.intensity == pytest.approx(2 * product / (2 * (read + weight + y) + weight))
    assert parts["2"].bytes == 0  # a view
    assert (parts["1"].how, conv.how) == ("traffic model", "sizes")
    assert parts["1"].kept >= y and 0 < parts["1"].rate < 1


@needs_cpu
@pytest.mark.parametrize("checkpoint", [False, True])
def test_flop_are_those_of_torch_s_counter(checkpoint):
    """Which has no layers and no directions: the sum of ours is its total."""
    from torch.utils.flop_counter import FlopCounterMode

    model = ConvSNN((1, 8, 8), (4, 6), 3, backend="cpu", checkpoint=checkpoint)
    x = torch.rand(2, 3, 1, 8, 8)
    parts = rows(profile(model, x, steps=1))
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    found = sum(part.forward.flops + part.backward.flops for name, part in parts.items() if not name.startswith("("))
    assert found == counter.get_total_flops() > 0


@needs_cpu
def test_a_checkpoint_convolves_again_in_the_backward_pass():
    model, x = ConvSNN((1, 8, 8), (4, 6), 3, backend="cpu", checkpoint=True), torch.rand(2, 3, 1, 8, 8)
    parts = rows(profile(model, x, steps=1))
    product = 2 * 6 * 64 * 6 * 4 * 9
    assert parts["layers.1.conv"].forward.flops == product
    assert parts["layers.1.conv"].backward.flops == 3 * product  # again, of the input, of the weight
    assert parts["layers.1.conv"].backward.seconds > 0
    assert parts["layers.1"].rate is not None and parts["layers.1"].backward.bytes == 5 * 4 * 6 * 64 * 6


def test_nothing_is_changed():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), snn.LIF(backend="reference", channel_dim=-1)
    )
    model[1].eval()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(6, 4)).sum().backward()
    optimizer.step()
    weight = model[0].weight.grad
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    state = {key: {k: v.clone() for k, v in held.items()} for key, held in optimizer.state.items()}
    x = torch.rand(6, 4)
    gradient, random, hooks = weight.clone(), torch.get_rng_state(), _hooks()
    profile(model, x, optimizer=optimizer, steps=1)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is weight and torch.equal(weight, gradient)
    assert all(torch.equal(v, state[key][k]) for key, held in optimizer.state.items() for k, v in held.items())
    assert model.training and not model[1].training and _hooks() == hooks


def _hooks() -> dict[str, int]:
    """How many hooks of all modules there are, of each kind."""
    kinds = vars(nn.modules.module).items()
    return {name: len(held) for name, held in kinds if name.startswith("_global_") and hasattr(held, "__len__")}


def test_without_backward_it_is_an_evaluation():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    found = profile(model, torch.rand(2, 4), backward=False, steps=1)
    assert set(seen) == {(False, False)} and model.training
    assert found.kept is None and all(row.backward.seconds == 0 for row in found.rows)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected an input that Linear takes, got 2x5: mat1 and mat2"):
        profile(nn.Linear(4, 4), torch.rand(2, 5))
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module"):
        profile(3, torch.rand(2, 5))
    with pytest.raises(ValueError, match=r"steps as an integer of at least 1, got 0"):
        profile(nn.Linear(4, 4), torch.rand(2, 4), steps=0)


def event(name, begin, length, kind="cpu_op", thread=1, **args):
    return {"ph": "X", "name": name, "ts": begin, "dur": length, "cat": kind, "tid": thread, "args": args}


def test_kernels_belong_to_who_launched_them():
    node = timeline.EVALUATE + "ConvolutionBackward0"
    trace = {
        "traceEvents": [
            event(PREFIX + STEP, 0, 100, "user_annotation"),
            event(PREFIX + "conv", 10, 10, "user_annotation"),
            event("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=1),
            event("forward_kernel", 40, 25, "kernel", thread=7, correlation=1),
            event(node, 30, 10, thread=2, **{"Sequence number": 5, "Fwd thread id": 1}),
            event(timeline.ACCUMULATE, 41, 4, thread=2),
            event("cuLaunchKernel", 33, 1, "cuda_driver", thread=2, correlation=2),
            event("backward_kernel", 66, 20, "kernel", thread=7, correlation=2),
            event("cudaMemcpyAsync", 42, 1, "cuda_runtime", thread=2, correlation=3),
            event("Memcpy DtoD", 87, 5, "gpu_memcpy", thread=7, correlation=3),
            event("kernel_of_nobody", 95, 3, "kernel", thread=7, correlation=9),
        ]
    }
    found = timeline.read(trace, lambda number: "conv" if number == 5 else None, gpu=True)
    assert found.seconds == {
        Share("conv", "forward"): pytest.approx(25e-6),
        Share("conv", "backward"): pytest.approx(25e-6),
    }
    assert found.unattributed == pytest.approx(50e-6)
    ran = {
        share.direction: {name: each.calls for name, each in held.items()} for share, held in found.operators.items()
    }
    assert ran == {"forward": {"forward_kernel": 1}, "backward": {"backward_kernel": 1, "Memcpy DtoD": 1}}
    with pytest.raises(ValueError, match=r"expected a range"):
        timeline.read({"traceEvents": []}, lambda number: None, gpu=False)


def test_operators_have_the_time_that_those_inside_them_have_not():
    node = timeline.EVALUATE + "MmBackward0"
    trace = {
        "traceEvents": [
            event(PREFIX + STEP, 0, 100, "user_annotation"),
            event(PREFIX + "a", 10, 40, "user_annotation"),
            event("aten::linear", 12, 30),
            event("aten::mm", 15, 10),
            event("aten::mm", 26, 8),
            event(PREFIX + "b", 35, 5, "user_annotation"),
            event("aten::add", 36, 3),
            event(node, 60, 20, **{"Sequence number": 5, "Fwd thread id": 1}),
            event("aten::mm", 62, 10),
            event("aten::mm", 63, 90, thread=9),
            event("aten::outside", 90, 5),
        ]
    }
    found = timeline.read(trace, lambda number: "a", gpu=False)
    ran = {share: {name: (each.seconds, each.calls) for name, each in held.items()}
           for share, held in found.operators.items()}  # fmt: skip
    assert ran == {
        Share("a", "forward"): {"aten::linear": (pytest.approx(7e-6), 1), "aten::mm": (pytest.approx(18e-6), 2)},
        Share("b", "forward"): {"aten::add": (pytest.approx(3e-6), 1)},
        Share("a", "backward"): {"aten::mm": (pytest.approx(10e-6), 1)},
    }


def test_a_profile_has_what_its_judgement_needs():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = profile(model, torch.rand(2, 4), steps=3)
    counts = [len(found.walls), len(found.plains), len(found.measured), len(found.conditions), len(found.operators)]
    assert counts == [3] * 5 and found.changes == () and len(set(found.operators)) == 1
    forward = rows(found)["0"].forward
    assert "aten::addmm" in [each.name for each in forward.operators]
    for step in range(3):
        assert sum(each.times[step] for each in forward.operators) <= forward.times[step]
    assert StepProfile.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_model_whose_layers_take_turns_is_seen():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.turn = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), [0]

        def forward(self, x):
            self.turn[0] += 1
            return self.layers[self.turn[0] // 2 % 2](x)  # as a plain and a profiled step take turns

    found = profile(Turns(), torch.rand(2, 4), steps=4)
    assert found.doubts()[0].kind == "changes" and "in 2 of 4" in found.verdict()[0]


def test_nvtx_ranges_are_opened_and_closed(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: said.append(name) or 0)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("end") or 0)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    ranges = Ranges(model, nvtx=True)
    with ranges.layers(), ranges.phase(STEP):
        total = model(torch.rand(1, 2)).sum()
    assert said[:4] == [PREFIX + STEP, PREFIX + "(model)", PREFIX + "0", "end"]
    said.clear()
    ranges.follow(total)
    total.backward()
    assert [name for name in dict.fromkeys(said) if name != "end"] == [f"{PREFIX}{i} backward" for i in (1, 0)]
    assert said[1::2] == ["end"] * (len(said) // 2) and "end" not in said[::2]


def test_the_verdict_says_what_bounds():
    def row(name, group, seconds, count, flops=0):
        return PartTime(name, "", group, Part((seconds,) * 3, count, flops), Part((0.0,) * 3, 0.0, 0), "", None, None)

    def found(*parts):
        return StepProfile("x", parts, (1.0,) * 3, (1.0,) * 3, (Rates(100.0, 1000.0),) * 3, False, {})

    near = found(row("a", "neurons", 0.8, 72.0), row("b", "convolutions", 0.15, 5.0, 90))
    assert near.verdict() == [
        "80.0% in neurons (at 90% of the copy rate); 15.0% in convolutions (at 60% of the matmul rate); "
        "5.0% unattributed.",
        "The step is bound by the memory traffic of a.",
    ]
    two = found(row("a", "neurons", 0.3, 1.0), row("b", "neurons", 0.5, 1.0))
    assert "neurons, most of all b" in two.verdict()[1]
    assert "far from what memory and arithmetic allow" in found(row("a", "neurons", 0.9, 1.0)).verdict()[1]
    assert "in no layer" in found(row("a", "neurons", 0.1, 1.0)).verdict()[1]


def test_the_command_writes_what_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "1", "--threads", "1", "--backend", BACKEND, "--device", "cpu", "--batch-size", "8"]
    files = ["--trace", "t.json", "--html", "p.html", "--plot", "r.png"]
    assert cli.main(["profile", "digits+l2", "-T", "2", *options, *files]) == 0
    out = capsys.readouterr().out
    wanted = "layers.0.conv", "(loader)", "(loss)", "(optimizer)", "unattributed", "TRTLoss"
    assert [word for word in wanted if word not in out] == []
    assert "No verdict: 1 profiled step does not say how times scatter" in out
    names = {entry["name"] for entry in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert {f"{PREFIX}layers.0.conv", "layers.0.conv backward", "classifier forward", f"{PREFIX}(loader)"} <= names
    page = (tmp_path / "p.html").read_text()
    assert "<svg" in page and "layers.0.conv" in page and "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_takes_a_factory(tmp_path, monkeypatch, capsys):
    (tmp_path / "factories_of_a_test.py").write_text(
        "import torch\nmade = lambda: torch.nn.Linear(3, 2)\nnone = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    place = "factories_of_a_test"
    assert cli.main(["profile", f"{place}:made", "--input", "4,3", "--steps", "1", "--device", "cpu"]) == 0
    assert "mean square of the output" in capsys.readouterr().out
    for arguments, wanted in {
        (f"{place}:none", "--input", "4,3"): "expected factories_of_a_test:none to give a torch.nn.Module, got int",
        (f"{place}:gone", "--input", "4,3"): "expected a name of the module factories_of_a_test, got 'gone', which",
        (f"{place}:made", "--input", "4,5"): "expected an input that factories_of_a_test:made takes, got 4x5",
        (f"{place}:made",): "expected the sizes of what",
        ("nonsense",): "profile: expected one of vggsnn, resnet19",
        ("vggsnn", "--input", "4,5"): "expected T,B,C,H,W of frames",
        ("vggsnn", "--input", "4,x"): "sizes of at least 1",
        ("vggsnn", "--steps", "0"): "--steps: expected an integer of at least 1",
        ("vggsnn", "--html", "none/p.html"): "--html: expected a file that can be written",
        ("digits", "--input", "4,5"): "got it with a recipe",
        ("vggsnn", "--set", "lr=1"): "expected with a recipe only",
    }.items():
        assert cli.main(["profile", *arguments, "--device", "cpu"]) == 2
        assert wanted in capsys.readouterr().err


def test_the_networks_by_name_are_those_there_are():
    assert set(commands.profile.NETWORKS) <= set(BUILDERS)
