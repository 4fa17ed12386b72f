"""The memory report: honest about what it cannot know, and looking changes nothing."""

from __future__ import annotations

import csv
import gc
import io
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trtkern.nn import LIF, TRTLoss
from trtkern.profiling import memory
from trtkern.profiling.memory.ledger import ATTRIBUTES, OTHERS


def live_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def only(report):
    (row,) = report.rows
    return row


# What the report cannot know, it says


class Odd(nn.Module):
    """No formula: keeps its output twice as large."""

    def forward(self, x):
        return torch.cat((x, x)).exp()


def test_unknown_layers_are_named_and_their_bytes_are_not_in_the_agreement():
    x = torch.randn(3, 4, 8, 8)
    report = memory(nn.Sequential(nn.Conv2d(4, 4, 1), Odd(), nn.Conv2d(4, 4, 1)), x)
    first, odd, last = report.rows
    assert (odd.predicted, odd.measured, odd.kind) == (None, 2 * x.numel() * 4, "Odd")
    # What the last convolution keeps is what the odd layer kept before it.
    assert (last.predicted, last.measured) == (0, 0) and report.agreement == 1
    assert report.unknown == odd.measured and report.measured == odd.measured + first.measured
    assert "unknown" in str(report) and "Odd 6.0 KiB" in str(report)
    with torch.no_grad():  # of the caller: it asks what training would keep
        assert memory(Odd(), x.requires_grad_()).measured == odd.measured


def test_a_forward_that_computes_between_its_layers_is_unknown_itself():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y * y.sigmoid()

    x = torch.randn(3, 4, 8, 8)
    report = memory(Gated(), x)
    rows = {row.name: row for row in report.rows}
    assert rows["conv"].predicted == rows["conv"].measured == x.numel() * 4
    assert rows["(model)"].predicted is None and rows["(model)"].measured == 2 * x.numel() * 4


def test_subclasses_with_a_forward_of_their_own_have_no_formula():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Renamed(nn.Conv2d):
        pass

    x = torch.randn(3, 4, 8, 8)
    assert only(memory(Standardized(4, 4, 1), x)).predicted is None
    assert only(memory(Renamed(4, 4, 1), x)).predicted == x.numel() * 4
    assert memory(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), x).predicted == 0
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    assert all(row.predicted is None for row in memory(weighted, x).rows)


def test_the_reference_is_measured_and_not_predicted():
    report = memory(LIF(backend="reference"), torch.randn(4, 2, 4, 6, 6, requires_grad=True))
    assert only(report).predicted is None and report.bytes_per_neuron_step > 8


def test_tensors_that_a_function_keeps_as_attributes_are_found():
    model = nn.Linear(10, 10)
    loss = TRTLoss(model)
    report = memory(model, torch.randn(4, 6, 10), loss=lambda out: loss(out, torch.zeros(6, dtype=torch.int64)))
    row = report.rows[-1]
    assert (row.name, row.predicted, row.measured) == (ATTRIBUTES, None, model.weight.numel() * 4)


def test_what_a_checkpoint_drops_is_not_predicted():
    class Again(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.on, self.inner = on, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.on else self.inner(x)

    x = torch.randn(3, 4, 8, 8)
    dense, dropped = (memory(Again(on), x) for on in (False, True))
    assert dense.measured == dense.predicted == 3 * x.numel() * 4 + 32
    assert dropped.predicted == 0 and dropped.measured == dropped.unknown == x.numel() * 4 and OTHERS in str(dropped)


def test_branches_that_lead_nowhere_are_not_kept():
    class Fork(nn.Module):
        def forward(self, x):
            (x * 2).exp()
            return (x * 3).exp()

    x = torch.randn(5, 7, requires_grad=True)
    assert memory(Fork(), x).measured == x.numel() * 4


def test_views_slices_and_shared_modules_count_once():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            a, b = self.stem(x).chunk(2, 1)
            return self.conv(a) + self.conv(b)

    data = torch.randn(100, 4, 8, 8)
    report = memory(Halves(), data[3:6])  # of the whole data set only this part is the model's
    assert [row.measured for row in report.rows] == [row.predicted for row in report.rows] == [3 * 4 * 64 * 4] * 2


# What it leaves behind


class Everything(nn.Module):
    """A network with all that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))
        self.net[3].eval()
        self.register_buffer("seen", torch.zeros(2))
        self.last = None
        self.lif = LIF(backend="reference")

    def forward(self, x):
        self.last = self.net(x)
        self.seen = self.seen + 1
        self.seen += 1
        return self.lif(self.last.unflatten(0, (2, -1)) + torch.rand(()) * float("nan"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(training, fails):
    model = Everything()
    if not training:
        model.eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen, random, version = model.seen, torch.get_rng_state(), model.net[1].running_mean._version
    x = torch.randn(4, 2, 8, 8)
    torch.set_rng_state(random)
    if fails:
        with pytest.raises(RuntimeError, match="expected input"):
            memory(model, x[:, :1])
    else:
        assert memory(model, x).measured > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert model.last is None and model.seen is seen and not model.lif.nonfinite
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.net[1].running_mean._version == version and not x.requires_grad and x.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.nn.modules.module._has_any_global_hook()


def test_nothing_stays_in_memory():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Sigmoid(), LIF(backend="reference"))
    x = torch.randn(4, 2, 8, 8)
    memory(model, x)
    gc.collect()
    before = live_tensors()
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        report = memory(model, x)
        assert live_tensors() == before and report.measured > 0
    finally:
        gc.enable()


def test_a_graph_from_before_can_still_be_differentiated():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(4, 2, 8, 8)
    out = model(x)
    memory(model, x)
    out.sum().backward()
    assert model[0].weight.grad is not None


def test_autocast_has_the_weights_as_they_are_afterwards():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        memory(model, x)
        with torch.no_grad():
            model.weight.zero_()
        assert torch.equal(model(x), model.bias.bfloat16().expand(2, 3))


def test_layers_in_evaluation_stay_there():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = torch.randn(4, 2, 8, 8)
    kept = memory(model, x)
    model[2].eval()
    frozen = memory(model, x)
    assert kept.measured - frozen.measured == 4 * 4 * 4 * 36
    model.eval()  # all of it: this asks what training would keep
    assert memory(model, x).measured == kept.measured


def test_compiled_layers_are_looked_at_as_they_were():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(4, 2, 8, 8)
    plain = memory(model, x)
    compiled = memory(torch.compile(model, backend="eager"), x)
    assert compiled.measured == compiled.predicted == plain.measured
    torch._dynamo.reset()


# Forms


def test_report_as_table_rows_and_line():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    report = memory(model, torch.randn(8, 2, 12, 12))
    table = str(report).splitlines()
    assert table[0].split() == ["layer", "type", "output", "predicted", "measured", "kept"]
    assert table[1].split()[:3] == ["0", "Conv2d", "8x8x10x10"] and table[1].endswith("input e")
    assert "(input e)" in next(line for line in table if "AvgPool2d" in line)  # the ReLU's output
    assert report.summary(" a step") == (
        f"kept for backward: {report.measured / 1024:.1f} KiB a step (predicted {report.predicted / 1024:.1f} KiB)"
    )
    rows = report.as_rows()
    assert json.loads(json.dumps(rows)) == rows and len(rows) == len(report.rows)
    assert sum(row["measured_bytes"] for row in rows) == report.measured
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert "2,ReLU,8x8x10x10," in file.getvalue()


def test_bad_calls_are_refused():
    with pytest.raises(TypeError, match=r"memory: expected model to be a torch\.nn\.Module, got"):
        memory(lambda x: x, torch.zeros(1))
    with pytest.raises(TypeError, match="memory: expected input to be a tensor or a tuple with tensors, got"):
        memory(nn.ReLU(), (3,))
    with pytest.raises(ValueError, match="memory: expected a model with all its parameters, got a lazy one, weight"):
        memory(nn.LazyLinear(3), torch.zeros(2, 2))


def test_model_with_several_inputs():
    report = memory(nn.Bilinear(3, 4, 2), (torch.randn(5, 3), torch.randn(5, 4)))
    assert only(report).predicted is None and report.measured > 0
