"""``trtkern bench --op step``: whole training steps, their gate, and their rows."""

from __future__ import annotations

import math

import pytest
import torch
import typer
from torch import nn

from trtkern import malloc
from trtkern.bench import by_layer, cases, networks, page, peers, plain, rounds, rows, runner, steps
from trtkern.bench.cases import Case
from trtkern.bench.layers import OWN, Layer
from trtkern.bench.networks import Entry, Network
from trtkern.commands import bench as command
from trtkern.commands._common import Quit
from trtkern.nn import SpikeConv2d, SpikeLinear, Spikes, TRTLoss
from trtkern.ops.spikes import pack

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
    other = networks.plain_network(SMALL, CPU, lambda threshold: plain.Neurons(0.6, threshold))
    monkeypatch.setattr(steps, "DRAWS", 1)
    assert "cosine" in steps.differs(Entry("off", "", other, None), SMALL, CPU)


def test_rows_are_those_of_the_other_ops(monkeypatch):
    """With a wrong network among them, which is named and not timed."""

    def tiny(features):
        return plain.Plain(plain.Conv(2, 4, pool=nn.AvgPool2d(4)), plain.Flat(), plain.Step(nn.Linear(64, 10)))

    def few(network, device, backends, found, candidates):
        relu, model = (networks.plain_network(network, device, run) for run in (lambda _: torch.relu, None))
        yield Entry("trtkern auto", "trtkern", model, TRTLoss(model))
        yield Entry("BatchNorm + ReLU", "torch", relu, TRTLoss(relu), judged=False)
        yield Entry("off", "", networks.plain_network(network, device, lambda _: torch.sigmoid), None)
        yield networks.LeftOut("gone", "", "skipped", "not installed")

    monkeypatch.setattr(plain, "vggsnn", tiny)
    monkeypatch.setattr(steps, "entries", few)
    monkeypatch.setattr(steps, "DRAWS", 1)
    call("--op", "step", "--shape", "2,1,2,16,16", "--direction", "each", *FAST)
    measured = rows.read(command.Path(command.ROWS))
    ways = [row.direction for row in measured if row.candidate == "trtkern auto" and row.status == "ok"]
    assert ways == ["train-fwd", "bwd", "both"]
    made = {row.candidate: row for row in measured if row.direction == "both"}
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

    monkeypatch.setattr(networks, "_own", lambda network, backend, checkpoint, plainly: plain.Plain(plain.Conv(2, 2)))
    monkeypatch.setattr(plain, "vggsnn", tiny)
    monkeypatch.setattr(plain, "resnet19", tiny)
    found = [Peer("spikingjelly", "1", ""), Peer("norse", "2", "")]
    network = Network(name, 2, 2, (2, 16, 16))
    entries = list(networks.entries(network, CPU, ["cpu", "reference"], found))
    assert [entry.name for entry in entries] == [
        "trtkern cpu", "trtkern reference", "trtkern cpu, exact", "BatchNorm + ReLU, channels_last",
        "theirs LIFNode m, channels_last",
        "plain torch, channels_last", "trtkern cpu, the captured step without a graph", "BatchNorm + ReLU, contiguous",
        "theirs LIFNode m, contiguous", "plain torch, contiguous", "trtkern cpu, checkpoint",
    ]  # fmt: skip
    few = [entry.name for entry in networks.entries(network, CPU, ["cpu"], found, cases.candidates("relu,own", "step"))]
    assert few == ["trtkern cpu", "BatchNorm + ReLU, channels_last", "BatchNorm + ReLU, contiguous"]
    missing = [peers.Peer("spikingjelly", "", "not installed")]
    (gone,) = (each for each in networks.entries(network, CPU, ["cpu"], missing) if not isinstance(each, Entry))
    assert gone == ("spikingjelly", "", "skipped", "not installed")


@pytest.mark.parametrize("name", ["mlp", "spikformer", "spikformer_4_384", "sdt_2_512"])
def test_the_other_networks_are_those_of_plain_torch(name):
    """In float64, without what a spike does that falls on the other side."""
    network = networks.small(networks.of(Case("step", cases.NETWORKS[name].shape, network=name)))
    mine, plainly = (
        networks.own(network, CPU, "reference").model.double(),
        networks.plain_network(network, CPU).double(),
    )
    x, y = networks.inputs(network, CPU)
    found = []
    for model in (mine, plainly):
        logits = model(x.double())
        TRTLoss(model)(logits, y).backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert len(found[0]) == len(found[1]) and found[0][0].shape == (2, 2, 10) and found[0][0].std() > 0
    largest = max(t.abs().max() for t in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * largest.item())


def test_the_neurons_of_another_library_have_the_threshold_of_their_place():
    """Those behind the attention fire at 1/2: with 1 in their place a count of one spike lies on the threshold."""
    pytest.importorskip("spikingjelly")
    network = networks.small(networks.of(Case("step", cases.NETWORKS["sdt_2_512"].shape, network="sdt_2_512")))
    for entry in networks.entries(network, CPU, ["cpu"], peers.choose("spikingjelly"), ("peers",)):
        if isinstance(entry, Entry) and entry.judged:
            assert steps.differs(entry, network, CPU) == "", entry.name
            return
    raise AssertionError("SpikingJelly's neurons are in no network")


def test_relu_is_in_place_of_all_neurons():
    for name, trained in cases.NETWORKS.items():
        network = networks.small(networks.of(Case("step", trained.shape, network=name)))
        model = networks.plain_network(network, CPU, lambda _: torch.relu)
        assert not any(isinstance(module, plain.Neurons) for module in model.modules())
        assert sum(isinstance(module, networks.Swapped) for module in model.modules()) == {
            "resnet19": 10, "vggsnn": 8, "sew_resnet34": 20, "mlp": 2, "spikformer": 8, "spikformer_4_384": 12,
            "sdt_2_512": 12,
        }[name]  # fmt: skip


@pytest.mark.parametrize("layer", [SpikeConv2d(32, 16, 3, padding=1), SpikeLinear(32, 16)])
def test_a_layer_is_judged_on_what_it_was_given(layer, monkeypatch):
    """A right one passes, one with a wrong sum or a wrong gradient does not."""
    shape = (4, 2, 32, 6, 6) if isinstance(layer, SpikeConv2d) else (4, 16, 32)
    spikes = (torch.rand(shape) < 0.3).float()
    monkeypatch.setattr(type(layer), "kernels", lambda self, x: [("one", ""), (None, "few")])

    def run(off=0.0):
        with torch.no_grad():  # as a checkpointed block does
            layer(Spikes(spikes, pack(spikes)))
        layer(Spikes(spikes, pack(spikes))).square().sum().backward()
        layer.weight.grad[0, 0] += off * layer.weight.grad.abs().max()

    model = nn.Sequential(layer)
    right = by_layer.judged(model, run)
    assert right.wrong == "" and (right.kernels, right.layers) == (1, 1) and 0 < right.error < by_layer.TOLERANCE
    assert "0 is off by" in by_layer.judged(model, lambda: run(1e-4)).wrong
    handle = layer.register_forward_hook(lambda module, given, y: y * 1.001)
    assert "0 is off by" in by_layer.judged(model, run).wrong
    handle.remove()
    monkeypatch.setattr(type(layer), "kernels", lambda self, x: [(None, "few"), (None, "few")])
    assert by_layer.judged(model, run) == by_layer.Verdict("", 0, 1, 0.0)
    layer.exact = True
    assert by_layer.judged(model, run) == by_layer.Verdict("", 0, 0, 0.0)


def test_the_network_and_its_shape():
    resnet = Case("step", (4, 8, 3, 32, 32), network="resnet19")
    vgg = Case("step", (10, 32, 2, 48, 48), network="vggsnn")
    assert cases.select("step", ["4,8,3,32,32", "10,32,2,48,48"], "float32", "default") == [resnet, vgg]
    sew = cases.select("step", ["4,8,3,64,64"], "bfloat16", "default", networks=["sew_resnet34"])
    assert sew == [Case("step", (4, 8, 3, 64, 64), "bfloat16", network="sew_resnet34")]
    assert [c.shape for c in cases.select("step", [], "float32", "default", networks=["mlp"])] == [(100, 64, 784)]
    assert networks.of(resnet) == Network("resnet19", 4, 8, (3, 32, 32)) and networks.of(vgg).name == "vggsnn"
    assert networks.of(vgg).features == 512 * 9 and networks.small(networks.of(vgg)).shape == (2, 16, 16)
    assert [case.network for case in cases.select("step", [], "float32", "default")] == list(cases.NETWORKS)
    assert "step" not in {case.op for case in cases.select("all", [], "float32", "default")}
    assert cases.least_bytes(resnet, "both") == 0 and cases.memory_needed(vgg, CPU) > 2 * 10**9


def test_the_page_has_a_table_of_steps_by_threads(tmp_path):
    """With this project's time over that of the faster ReLU."""
    given = dict.fromkeys(("date", "commit", "machine", "versions", "malloc", "suite", "note", "command"), "x")
    same = {**given, "op": "step", "shape": "1", "dtype": "float32", "direction": "both", "rounds": 9, "status": "ok"}
    made = [
        rows.Row(
            **same, case="vggsnn step", threads=threads, candidate=name, library=library, p20_ms=ms, p50_ms=ms,
            p80_ms=ms, times_ours=ratio, times_ours_low=ratio / 1.25, times_ours_high=ratio * 1.25,
        )
        for threads in (2, 1)
        for name, library, ms, ratio in (
            ("trtkern cpu", "trtkern", 50.0 * threads, 1.0), ("trtkern cpu, exact", "trtkern", 90.0, 1.8),
            ("BatchNorm + ReLU, contiguous", "torch", 120.0, 2.4),
            ("BatchNorm + ReLU, channels_last", "torch", 100.0, 2.0),
        )
    ]  # fmt: skip
    written = page.write(made, tmp_path / "page.md", tmp_path / "rows.csv", "command")
    text = (tmp_path / "page-x.md").read_text()
    assert written == [tmp_path / name for name in ("page.md", "page-x.md", "page-x.svg")]
    assert "- x, 1 threads, malloc: x\n- x, 2 threads, malloc: x" in text
    assert "| whole steps |  |  |  | 0.50, 1 network | x |" in (tmp_path / "page.md").read_text()
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| vggsnn step")]
    assert [(line[2], line[3], line[5]) for line in table[:2]] == [
        ("1", "trtkern cpu", "50 (50 to 50)"), ("1", "trtkern cpu, exact", "90 (90 to 90)")
    ]  # fmt: skip
    assert [line[7] for line in table] == ["**0.50** (0.40 to 0.62)", *[""] * 4, "**0.50** (0.40 to 0.62)", "", ""]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--shape", "4,8"],
            "--shape: expected resnet19: T,B,3,H,W, H and W at least 8; vggsnn: T,B,2,H,W, H and W at",
        ),
        (
            ["--shape", "4,8,1,32,32"],
            "spikformer: T,B,tokens,D, the last a multiple of 32; spikformer_4_384: T,B,3,H",
        ),
        (["--shape", "4,8,9,48", "--network", "spikformer"], "--shape: expected spikformer: T,B,tokens,D, the last a"),
        (["--network", "vgg"], "--network: expected one of resnet19, vggsnn, sew_resnet34, mlp, spikformer, spikf"),
        (["--candidates", "own,rely"], "--candidates: expected one of own, relu, exact, peers, plain, captured, check"),
        (["--shape", "4,8,2,8,48"], "got '4,8,2,8,48'"),
        (["--dtype", "float16"], "--dtype: expected float32 or bfloat16 with --op step, got float16"),
        (["--suite", "long"], "it has no shapes of step; name one with --shape T,B,3,H,W (resnet19)"),
    ],
)
def test_what_is_no_step_is_refused(arguments, said, monkeypatch):
    monkeypatch.setattr(rounds, "measured", lambda *rest: pytest.fail("measured"))
    monkeypatch.setattr(runner, "_one", lambda *rest: pytest.fail("measured"))
    with pytest.raises(Quit) as stop:
        call("--op", "step", *arguments)
    assert stop.value.status == 2 and said in str(stop.value)
