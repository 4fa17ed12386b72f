"""``trtkern bench --op step``: whole training steps, their gate, and their rows."""

from __future__ import annotations

import math

import pytest
import torch
import typer
from torch import nn

from trtkern import malloc
from trtkern.bench import cases, networks, peers, plain, rounds, rows, runner, steps
from trtkern.bench.cases import Case
from trtkern.bench.layers import OWN, Layer
from trtkern.bench.networks import Entry, Network
from trtkern.commands import bench as command
from trtkern.commands._common import Quit
from trtkern.nn import TRTLoss

CPU = torch.device("cpu")
SMALL = Network("vggsnn", 2, 2, (2, 16, 16))
FAST = ["--peers", "none", "--rounds", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(malloc, "keep_pages", lambda: False)


def call(*arguments: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.bench)
    app(args=list(arguments), standalone_mode=False)


def test_the_gate_lets_the_right_networks_through_and_no_other(monkeypatch):
    assert steps.differs(networks.own(SMALL, CPU, "auto", captured=True), SMALL, CPU) == ""
    other = networks.plain_network(SMALL, CPU, plain.Neurons(0.6))
    monkeypatch.setattr(steps, "DRAWS", 1)
    assert "cosine" in steps.differs(Entry("off", "", other, None), SMALL, CPU)


def test_rows_are_those_of_the_other_ops(monkeypatch):
    """With a wrong network among them, which is named and not timed."""

    def tiny(features):
        return plain.Plain(plain.Conv(2, 4, pool=nn.AvgPool2d(4)), plain.Flat(), plain.Step(nn.Linear(64, 10)))

    def few(network, device, backends, found):
        relu, model = (networks.plain_network(network, device, run) for run in (torch.relu, None))
        yield Entry("trtkern auto", "trtkern", model, TRTLoss(model))
        yield Entry("BatchNorm + ReLU", "torch", relu, TRTLoss(relu), judged=False)
        yield Entry("off", "", networks.plain_network(network, device, torch.sigmoid), None)
        yield networks.LeftOut("gone", "", "skipped", "not installed")

    monkeypatch.setattr(plain, "vggsnn", tiny)
    monkeypatch.setattr(steps, "entries", few)
    monkeypatch.setattr(steps, "DRAWS", 1)
    call("--op", "step", "--shape", "2,1,2,16,16", *FAST)
    made = {row.candidate: row for row in rows.read(command.Path(command.ROWS))}
    assert set(made) == {"trtkern auto", "BatchNorm + ReLU", "off", "gone"}
    ours, relu = made["trtkern auto"], made["BatchNorm + ReLU"]
    assert (ours.case, ours.op, ours.shape) == ("vggsnn step 2x1x2x16x16 float32", "step", "2,1,2,16,16")
    assert ours.times_ours == 1 and ours.rounds == 2 and 0 < ours.p20_ms <= ours.p50_ms and ours.peak_bytes > 0
    assert math.isnan(ours.gb_per_s) and "MiB for its backward pass" in ours.note
    assert relu.status == "ok" and relu.note.startswith("no neuron; keeps ") and relu.peak_bytes > 0
    assert made["off"].status == "WRONG" and math.isnan(made["off"].p50_ms) and made["gone"].status == "skipped"


@pytest.mark.parametrize("name", ["resnet19", "vggsnn"])
def test_what_is_compared(name, monkeypatch):
    """Every network of a case, of the same weights; of other libraries SpikingJelly's neurons."""

    class Peer(peers.Peer):
        def layers(self, where):
            return [layer("theirs LIFNode m"), layer("theirs LIFNode s")]

    def layer(name):
        return Layer(name, plain.Neurons(0.5), OWN)

    def tiny(*features):
        return plain.Plain(plain.Conv(2, 2))

    monkeypatch.setattr(networks, "vggsnn", lambda shape, backend, checkpoint: nn.Linear(1, 1))
    monkeypatch.setattr(networks, "resnet19", lambda timesteps, shape, backend, checkpoint: nn.Linear(1, 1))
    monkeypatch.setattr(networks, "load_reference_weights", lambda model, state: None)
    monkeypatch.setattr(plain, "vggsnn", tiny)
    monkeypatch.setattr(plain, "resnet19", tiny)
    found = [Peer("spikingjelly", "1", ""), Peer("norse", "2", "")]
    network = Network(name, 2, 2, (2, 16, 16))
    entries = list(networks.entries(network, CPU, ["cpu", "reference"], found))
    assert [entry.name for entry in entries] == [
        "trtkern cpu", "trtkern reference", "BatchNorm + ReLU, channels_last", "theirs LIFNode m, channels_last",
        "plain torch, channels_last", "trtkern cpu, the captured step without a graph", "BatchNorm + ReLU, contiguous",
        "theirs LIFNode m, contiguous", "plain torch, contiguous", "trtkern cpu, checkpoint",
    ]  # fmt: skip
    missing = [peers.Peer("spikingjelly", "", "not installed")]
    (gone,) = (each for each in networks.entries(network, CPU, ["cpu"], missing) if not isinstance(each, Entry))
    assert gone == ("spikingjelly", "", "skipped", "not installed")


def test_the_shape_names_the_network():
    resnet, vgg = Case("step", (4, 8, 3, 32, 32)), Case("step", (10, 32, 2, 48, 48))
    assert networks.of(resnet) == Network("resnet19", 4, 8, (3, 32, 32)) and networks.of(vgg).name == "vggsnn"
    assert networks.of(vgg).features == 512 * 9 and networks.small(networks.of(vgg)).shape == (2, 16, 16)
    assert [case.network for case in cases.select("step", [], "float32", "default")] == ["resnet19", "vggsnn"]
    assert "step" not in {case.op for case in cases.select("all", [], "float32", "default")}
    assert cases.least_bytes(resnet, "both") == 0 and cases.memory_needed(vgg, CPU) > 2 * 10**9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "4,8"], "--shape: expected step: T,B,3,H,W (resnet19) or T,B,2,H,W (vggsnn); got '4,8'"),
        (["--shape", "4,8,1,32,32"], "--shape: expected T,B,3,H,W (resnet19) or T,B,2,H,W (vggsnn) with H and W of at"),
        (["--shape", "4,8,2,8,48"], "got '4,8,2,8,48'"),
        (["--dtype", "float16"], "--dtype: expected float32 or bfloat16 with --op step, got float16"),
        (["--direction", "fwd"], "--direction: expected both with --op step, got fwd"),
        (["--suite", "long"], "it has no shapes of step; name one with --shape T,B,3,H,W"),
    ],
)
def test_what_is_no_step_is_refused(arguments, said, monkeypatch):
    monkeypatch.setattr(rounds, "measured", lambda *rest: pytest.fail("measured"))
    monkeypatch.setattr(runner, "_one", lambda *rest: pytest.fail("measured"))
    with pytest.raises(Quit) as stop:
        call("--op", "step", *arguments)
    assert stop.value.status == 2 and said in str(stop.value)
