"""The memory of whole networks: what is predicted is what is kept, and training leaves it flat."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from trtkern import data
from trtkern.backends import named
from trtkern.data import Dataset, Split
from trtkern.nn import LIF, BatchNormLIF, ConvBatchNormLIF, SpikeConv2d, SpikeLinear, TRTLoss
from trtkern.nn.time import TimeSequential
from trtkern.profiling import MemoryReport, memory
from trtkern.profiling.memory.ledger import Ledger
from trtkern.profiling.memory.measured import _on_gpu
from trtkern.training import progress, run, settings
from trtkern.training.loop import Trainer

# Not "auto": the reference has no formula, and Triton's interpreter takes minutes.
needs_cpu = pytest.mark.skipif(named("cpu").missing() is not None, reason="the cpu backend is not built")
FLOATS = [torch.float32, torch.bfloat16]
E = {torch.float32: 4, torch.bfloat16: 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def normed(channels: int, **options) -> BatchNormLIF:
    return BatchNormLIF(channels, backend="cpu", **options)


def sequence(*shape: int, dtype=torch.float32, last=False, static=False) -> torch.Tensor:
    """[T, B, C, ...], contiguous or channels last after time; static: one step, expanded."""
    steps = torch.randn(*shape[1:]) if static else torch.randn(shape[0] * shape[1], *shape[2:])
    if last:
        steps = steps.contiguous(memory_format=torch.channels_last)
    x = steps.to(dtype)
    return x.expand(shape) if static else x.unflatten(0, shape[:2])


def words(steps: int) -> int:
    """Bytes that the spikes of a neuron are kept in."""
    return (steps + 7) // 8


# Whole networks


def spiking_vgg() -> nn.Module:
    return nn.Sequential(
        SpikeConv2d(2, 8, 3, padding=1, bias=False), normed(8, packed=True),
        SpikeConv2d(8, 8, 3, padding=1, bias=False), normed(8, pool=2, packed=True),
        SpikeConv2d(8, 16, 3, padding=1, bias=False), normed(16, pool=2, packed=True),
        SpikeLinear(16 * 3 * 3, 10),
    )  # fmt: skip


def with_neurons() -> nn.Module:
    return TimeSequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), LIF(backend="cpu"), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(200, 10)
    )


def with_relu() -> nn.Module:
    return TimeSequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1),
        nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """A block as in ResNet-19: its input is the residual of its second layer."""

    def __init__(self, packed: bool = True, checkpoint: bool = False) -> None:
        super().__init__()
        self.stem = SpikeConv2d(2, 8, 3, padding=1)
        self.first = normed(8, packed=packed)
        convs = (SpikeConv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.second, self.third = (
            ConvBatchNormLIF(conv, normed(8, packed=packed), checkpoint=checkpoint) for conv in convs
        )

    def forward(self, x):
        s = self.first(self.stem(x))
        return self.third(self.second(s), s)


NETS = {
    "spiking vgg": spiking_vgg,
    "neurons": with_neurons,
    "relu": with_relu,
    "residual": Residual,
    "dense residual": lambda: Residual(packed=False),
    "residual, checkpoint": lambda: Residual(checkpoint=True),
}


@needs_cpu
@pytest.mark.parametrize("static", [False, True], ids=["dense", "static"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", NETS)
def test_prediction_and_measurement_agree(name, steps, dtype, last, static):
    model = NETS[name]().to(dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)
    report = memory(model, sequence(steps, 2, 2, 12, 12, dtype=dtype, last=last, static=static))
    assert report.agreement == pytest.approx(1, abs=0.01), str(report)
    assert report.unknown == 0 and report.measured > 0
    for row in report.rows:
        assert row.predicted == pytest.approx(row.measured, rel=0.01, abs=16), str(report)


@needs_cpu
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_of_a_spiking_network_by_hand(steps, dtype):
    report = memory(spiking_vgg().to(dtype), sequence(steps, 2, 2, 12, 12, dtype=dtype))
    pixels = 2 * 144
    neurons = pixels * 8 + pixels * 8 + pixels // 4 * 16
    expected = steps * pixels * 2 * E[dtype]  # the input
    expected += steps * neurons * E[dtype]  # y
    expected += words(steps) * neurons  # never pooled
    expected += 4 * ((steps - 1) // 16) * neurons + 28 * (8 + 8 + 16)
    assert report.measured == report.predicted == expected
    assert report.neuron_steps == steps * neurons


@needs_cpu
def test_a_checkpointed_block_keeps_words_in_place_of_y():
    x = sequence(4, 2, 2, 12, 12)
    kept = [{row.name: row for row in memory(Residual(checkpoint=on), x).rows} for on in (False, True)]
    y, of_words = 4 * 4 * 8 * 288, 8 * 288
    assert kept[0]["second.norm"].measured == y + 28 * 8 and kept[0]["second.conv"].measured == of_words
    # The words are the convolution's, and are there for the block too.
    assert kept[1]["second"].measured == 28 * 8 and kept[1]["second.conv"].measured == of_words
    # Its residual is what the block before read: the words are in memory already.
    assert kept[1]["third"].measured == 28 * 8 and kept[1]["third.conv"].measured == of_words
    assert "(words 1/T)" in kept[1]["third"].kept
    steps = [memory(Residual(checkpoint=on), x).neuron_steps for on in (False, True)]
    assert steps[0] == steps[1] == 3 * 4 * 8 * 288


@needs_cpu
@pytest.mark.parametrize("name", ["neurons", "spiking vgg", "relu"])
def test_autocast_keeps_copies_of_inputs_and_weights(name):
    model, x = NETS[name](), sequence(4, 2, 2, 12, 12)
    full = memory(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        report = memory(model, x)
    assert report.agreement == pytest.approx(1, abs=0.01) and report.unknown == 0, str(report)
    for row in report.rows:
        assert row.predicted == pytest.approx(row.measured, rel=0.02, abs=16), str(report)
    if name == "neurons":
        row = report.rows[0]
        assert row.measured == x.numel() * 2 + model[0].weight.numel() * 2 and "weight e (copy)" in row.kept
        assert report.measured < 0.7 * full.measured


# Training leaves memory flat


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@needs_cpu
def test_200_steps_leave_memory_flat():
    model = nn.Sequential(
        SpikeConv2d(2, 8, 3, padding=1), normed(8, packed=True),
        SpikeConv2d(8, 8, 3, padding=1), normed(8, pool=2, packed=True), SpikeLinear(8 * 36, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = TRTLoss(model)
    x, target = sequence(4, 2, 2, 12, 12), torch.tensor([1, 2])

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss(model(x), target).backward()
            optimizer.step()

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    steps(20)
    gc.collect()
    live, pages = tensors(), [resident()]
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        for _ in range(3):
            steps(200)
            assert tensors() == live
            pages.append(resident())
    finally:
        gc.enable()
    # One graph a step kept would be 200 times this, in each of the rounds; in one of them the heap, which other tests
    # have used before, may still find its shape.
    grown = [after - before for before, after in itertools.pairwise(pages)]
    assert min(grown) < 20 * memory(model, x).measured, grown


# The line of trtkern train


@pytest.fixture(scope="module")
def few() -> Dataset:
    digits = data.load("digits")
    splits = (Split(s.images[:128], s.labels[:128]) for s in (digits.train, digits.test))
    return dataclasses.replace(digits, **dict(zip(("train", "test"), splits, strict=True)))


def trainer(few: Dataset, **options) -> Trainer:
    return Trainer.of(settings.resolve(backend="cpu", threads=1, device="cpu", epochs=2, select="last", **options), few)


@needs_cpu
def test_train_says_what_a_step_keeps_and_writes_it_down(few, tmp_path):
    out = io.StringIO()
    training = trainer(few)
    training.run(tmp_path, progress.observer(Console(file=out, width=200)))
    (line,) = (line for line in out.getvalue().splitlines() if "kept for backward" in line)
    kept = json.loads((tmp_path / run.CONFIG).read_text())["kept_for_backward"]
    assert kept["neuron_steps"] == training.batch_size * 4 * 64 * (16 + 32)  # T = 4, 8x8 pixels, 16 and 32 channels
    assert kept["predicted_bytes"] == pytest.approx(kept["bytes"] - kept["unknown_bytes"], rel=0.05)
    assert line.startswith(
        f"kept for backward: {kept['bytes'] / 2**20:.1f} MiB a step of {training.batch_size} images, "
        f"{kept['bytes'] / kept['neuron_steps']:.1f} bytes a neuron-step (predicted "
    )
    assert trainer(few, amp="bf16").memory().measured < 0.8 * kept["bytes"]


@needs_cpu
def test_looking_at_the_memory_changes_nothing_of_the_run(few, tmp_path, monkeypatch):
    rows = []
    for name in ("with", "without"):
        folder = tmp_path / name
        folder.mkdir()
        training = trainer(few)
        if name == "without":
            monkeypatch.setattr(training, "memory", lambda: MemoryReport((), 0, "cpu"))
        random = torch.get_rng_state()
        rows.append([{**row, "seconds": 0, "samples_per_s": 0, "loader_share": 0} for row in training.run(folder).rows])
        assert torch.equal(torch.get_rng_state(), random)
    assert rows[0] == rows[1]  # bitwise: these are Python floats


# On a GPU


def test_the_account_of_the_allocator_is_completed_by_what_was_there_before(monkeypatch):
    """The order of the calls on a GPU, with an allocator that is not there."""
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(3, 4, 8, 8)
    kept, input = memory(model, x).measured, x.numel() * 4
    calls = []

    def allocated(device):
        calls.append("allocated")
        return 1000 if calls.count("allocated") == 1 else 1000 + kept - input

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + 2 * kept)

    def forward():
        calls.append("forward")
        return [torch.autograd.graph.get_gradient_edge(model(x))]

    report = _on_gpu(Ledger(model, [x]), forward, torch.device("cuda", 0))
    assert calls == ["forward", "allocated", "reset", "forward", "allocated"]
    assert report.measured == report.predicted == kept and report.peak == 2 * kept
    assert "peak of the forward pass on cuda:0: 18.1 KiB" in str(report)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_allocator_agrees():
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2)).cuda()
    x = torch.randn(32, 8, 64, 64, device="cuda")
    report = memory(model, x)
    assert report.agreement == pytest.approx(1, abs=0.05) and report.peak >= report.grown - x.numel() * 4
