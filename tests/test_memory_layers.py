"""What one layer keeps for its backward pass: the formula of its kind, and the traffic model behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trtkern import nn as spiking
from trtkern.backends import named
from trtkern.nn import LI, LIF, BatchNormLIF, SpikeConv2d, SpikeLinear, Spikes, TRTLoss
from trtkern.ops.spikes import pack
from trtkern.profiling import memory, traffic

# Not "auto": the reference has no formula, and Triton's interpreter takes minutes.
needs_cpu = pytest.mark.skipif(named("cpu").missing() is not None, reason="the cpu backend is not built")
FLOATS = [torch.float32, torch.bfloat16]
E = {torch.float32: 4, torch.bfloat16: 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def normed(channels: int, **options) -> BatchNormLIF:
    return BatchNormLIF(channels, backend="cpu", **options)


def lif(kind: type = LIF, *args, **options) -> nn.Module:
    return kind(*args, backend="cpu", **options)


def sequence(*shape: int, dtype=torch.float32, last=False, static=False, grad=True) -> torch.Tensor:
    """[T, B, C, ...], contiguous or channels last after time; static: one step, expanded."""
    steps = torch.randn(*shape[1:]) if static else torch.randn(shape[0] * shape[1], *shape[2:])
    if last:
        steps = steps.contiguous(memory_format=torch.channels_last)
    x = steps.to(dtype).requires_grad_(grad)
    return x.expand(shape) if static else x.unflatten(0, shape[:2])


def only(report):
    (row,) = report.rows
    return row


def words(steps: int) -> int:
    """Bytes that the spikes of a neuron are kept in."""
    return (steps + 7) // 8


# One layer at a time: [6, 4, 8, 8] in float32, a share of its bytes and some more.
IMAGES = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), 1, 0),
    "conv strided, grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), 1, 0),
    "conv transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), 1, 0),
    "linear": (lambda: nn.Linear(8, 3), 1, 0),
    "batch norm": (lambda: nn.BatchNorm2d(4), 1, 2 * 4 * 4),
    "batch norm without affine": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), 1, 2 * 4 * 4),
    "group norm": (lambda: nn.GroupNorm(2, 4), 1, 2 * 4 * 6 * 2),
    "layer norm": (lambda: nn.LayerNorm((4, 8, 8)), 1, 2 * 4 * 6),
    "relu": (nn.ReLU, 1, 0),
    "sigmoid": (nn.Sigmoid, 1, 0),
    "softmax": (lambda: nn.Softmax(1), 1, 0),
    "gelu": (nn.GELU, 1, 0),
    "leaky relu": (nn.LeakyReLU, 1, 0),
    "average pool": (lambda: nn.AvgPool2d(2), 1, 0),
    "global average": (lambda: nn.AdaptiveAvgPool2d(1), 0, 0),
    "average to 2x2": (lambda: nn.AdaptiveAvgPool2d(2), 1, 0),
    "max pool": (lambda: nn.MaxPool2d(2), 1, 8 * 6 * 4 * 16),
    "max to 2x2": (lambda: nn.AdaptiveMaxPool2d(2), 1, 8 * 6 * 4 * 4),
    "dropout": (lambda: nn.Dropout(0.3), 1, 0),
    "dropout of channels": (lambda: nn.Dropout2d(0.3), 0, 4 * 6 * 4),
    "no dropout": (lambda: nn.Dropout(0.0), 0, 0),
    "flatten": (nn.Flatten, 0, 0),
    "upsample": (lambda: nn.UpsamplingNearest2d(scale_factor=2), 0, 0),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_layers_of_torch_keep_what_their_formula_says(name, last):
    make, share, more = IMAGES[name]
    x = sequence(3, 2, 4, 8, 8, last=last and name != "linear").flatten(0, 1)
    row = only(memory(make().to(memory_format=torch.channels_last) if last else make(), x))
    assert row.predicted == row.measured == share * x.numel() * 4 + more


@pytest.mark.parametrize("layer", ["batch norm", "group norm", "layer norm", "batch norm without affine"])
def test_statistics_of_layers_in_bfloat16_and_in_evaluation(layer):
    make, _, more = IMAGES[layer]
    x = sequence(3, 2, 4, 8, 8, dtype=torch.bfloat16).flatten(0, 1)
    row = only(memory(make().bfloat16(), x))
    assert row.predicted == row.measured == x.numel() * 2 + more // 2
    model = nn.Sequential(nn.Identity(), make())
    model[1].eval()
    report = memory(model, x.float().detach().requires_grad_())
    still = 0 if layer == "batch norm" else more
    assert report.predicted == report.measured == x.numel() * 4 + still


@needs_cpu
def test_a_frozen_batch_norm_lif_keeps_its_input_all_the_same():
    model = nn.Sequential(nn.Identity(), normed(4))
    model[1].eval()
    y = sequence(4, 2, 4, 6, 6)
    report = memory(model, y)
    assert report.predicted == report.measured == y.numel() * 4 + 40 * 4


def test_linear_keeps_each_factor_for_the_gradient_of_the_other_and_copies_what_is_no_matrix():
    x, layer = torch.randn(3, 5, 8), nn.Linear(8, 4)
    assert only(memory(layer, x)).measured == only(memory(layer, x)).predicted == x.numel() * 4
    turned = torch.randn(3, 8, 5, requires_grad=True).transpose(1, 2)
    row = only(memory(layer, turned))
    assert row.predicted == row.measured == x.numel() * 4 and row.kept == "input e (copy)"
    frozen = nn.Linear(8, 4).requires_grad_(False)
    row = only(memory(frozen, x.requires_grad_()))
    assert row.predicted == row.measured == 0


SEQUENCES = {
    "LIF": (lambda: lif(), 0),
    "PLIF": (lambda: lif(spiking.PLIF), 24 + 4),
    "PLIF a channel": (lambda: lif(spiking.PLIF, channels=4, decay_input=True), (24 + 2 * 4) * 4),
    "IF with soft reset": (lambda: lif(spiking.IF, v_reset=None), 0),
    "LI": (lambda: lif(LI), 0),
    "learned decay a channel": (lambda: lif(LIF, nn.Parameter(torch.full((4,), 0.5))), 24 * 4),
    "threshold in a buffer": (lambda: lif(v_threshold=torch.tensor(1.0)), 24),
    "BatchNormLIF": (lambda: normed(4), 28 * 4),
    "BatchNormLIF, packed": (lambda: normed(4, packed=True), 28 * 4),
    "BatchNormLIF, learned threshold": (lambda: normed(4, v_threshold=nn.Parameter(torch.tensor(1.0))), 52 * 4),
}


@needs_cpu
@pytest.mark.parametrize("static", [False, True], ids=["dense", "static"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, 4, 16, 20, 40])
@pytest.mark.parametrize("name", SEQUENCES)
def test_neurons_keep_what_the_traffic_model_says(name, steps, dtype, static):
    make, more = SEQUENCES[name]
    x = sequence(steps, 2, 4, 6, 6, dtype=dtype, static=static, last=steps % 8 == 0)
    report = memory(make(), x)
    neurons = x[0].numel()
    input = neurons * E[dtype] * (1 if static else steps)
    edges = 4 * ((steps - 1) // 16) * neurons
    assert only(report).predicted == only(report).measured == input + edges + more
    assert report.neuron_steps == steps * neurons
    assert report.bytes_per_neuron_step == (input + edges + more) / (steps * neurons)


@needs_cpu
def test_what_comes_with_the_input_is_kept_too():
    y, v0 = sequence(4, 2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    whole, state, vectors = y.numel() * 4, v0.numel() * 4, 28 * 4
    assert only(memory(lif(), (y, v0))).predicted == only(memory(lif(), (y, v0))).measured == whole + state
    layer, dense = normed(4), (torch.rand_like(y) < 0.3).float()
    packed = Spikes(dense, pack(dense))
    for residual, size in ((dense, whole), (packed, whole // 16), (dense[:1].expand_as(dense), whole // 4)):
        row = only(memory(layer, (y, residual, v0)))
        assert row.predicted == row.measured == whole + size + state + vectors
    # The very tensor that is normalised, added to it: in memory once.
    row = only(memory(layer, (y, y)))
    assert row.predicted == row.measured == whole + vectors and "(residual e)" in row.kept


@needs_cpu
@pytest.mark.parametrize("pool, size", [(1, 6), (2, 6), (2, 5)])
def test_a_layout_that_no_kernel_takes_is_copied_and_odd_images_are_pooled_afterwards(pool, size):
    y = sequence(4, 2, size, 4, size).transpose(2, 3)  # neither contiguous nor channels last
    row = only(memory(normed(4, pool=pool), y))
    after = pool == 2 and size % 2 == 1
    assert row.predicted == row.measured == y.numel() * 4 * (1 + after) + 28 * 4
    late = lif(time_dim=1)
    assert only(memory(late, y)).predicted == only(memory(late, y)).measured == y.numel() * 4


@pytest.mark.parametrize("static", [False, True], ids=["dense", "static"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("make", [lambda: SpikeConv2d(4, 6, 3), lambda: SpikeLinear(4 * 36, 5)], ids=["conv", "linear"])
def test_spike_layers_keep_words_where_there_are_words(make, steps, static):
    s = (sequence(steps, 2, 4, 6, 6, static=static, grad=False) > 0.5).float()
    s = s[:1].expand_as(s) if static else s
    layer, neurons = make(), s[0].numel()
    dense = neurons * 4 * (1 if static else steps)
    whole = s.repeat_interleave(2, -1).repeat_interleave(2, -2)  # of which s are the averages
    for input, packed in ((s, dense), (Spikes(s, pack(s)), words(steps) * neurons),
                          (Spikes(s, pack(whole)), words(steps) * neurons * 4)):  # fmt: skip
        row = only(memory(layer, (input,)))
        assert row.predicted == row.measured == (dense if static else packed)  # one step is less than its words


def test_spike_linear_over_the_last_axis_and_copies_of_what_is_not_flat():
    x = torch.randn(4, 2, 3, 6)
    assert only(memory(SpikeLinear(6, 5), x)).predicted == only(memory(SpikeLinear(6, 5), x)).measured == x.numel() * 4
    row = only(memory(SpikeLinear(18, 5), x.transpose(2, 3)))
    assert row.predicted == row.measured == x.numel() * 4 and row.kept == "input e (copy)"


def test_losses_have_a_row():
    logits, target = torch.randn(4, 6, 10), torch.randint(0, 10, (6,))
    model = nn.Linear(10, 10)
    for criterion, size in (
        (spiking.SDTLoss(), 60 * 4 + 6 * 8 + 4),
        (spiking.TETLoss(), 2 * 240 * 4 + 24 * 8 + 4),
        (TRTLoss(model), 2 * 240 * 4 + 24 * 8 + 4),
        (nn.CrossEntropyLoss(), 60 * 4 + 6 * 8 + 4),
    ):
        head = (lambda out: out.mean(0)) if isinstance(criterion, nn.CrossEntropyLoss) else (lambda out: out)
        report = memory(model, logits, loss=lambda out, c=criterion, h=head: c(h(out), target))
        row = next(row for row in report.rows if row.kind == type(criterion).__name__)
        assert row.predicted == row.measured == size, str(report)
    report = memory(model, logits, loss=lambda out: out.square().mean())
    assert report.rows[-1].kind == "loss" and report.rows[-1].predicted is None
    assert report.rows[-1].measured == report.unknown == 240 * 4


# The traffic model


@pytest.mark.parametrize("e", [2, 4])
def test_traffic_is_that_of_the_contract(e):
    w = traffic.word_bytes(4)
    assert (w, traffic.word_bytes(8), traffic.word_bytes(20)) == (1 / 4, 1 / 8, 3 / 20)
    assert (traffic.edge_bytes(16), traffic.edge_bytes(17), traffic.edge_bytes(64)) == (0, 4 / 17, 12 / 64)
    moved, kept = traffic.moved, traffic.kept
    assert moved(traffic.lif_forward(e, 4)) == 2 * e and moved(traffic.lif_forward(e, 4, packed=True)) == 2 * e + w
    assert (
        moved(traffic.lif_forward(e, 64)) == 2 * e + 12 / 64 == moved(traffic.lif_forward(e, 64, grad=False)) + 12 / 64
    )
    assert moved(traffic.lif_forward(e, 4, packed=True, unwritten=True)) == e + w
    assert moved(traffic.lif_backward(e, 4)) == 3 * e and moved(traffic.lif_backward(e, 4, returns_v=True)) == 4 * e
    forward, backward = traffic.batch_norm_lif_forward, traffic.batch_norm_lif_backward
    assert moved(forward(e, 4)) == 3 * e and moved(forward(e, 4, training=False)) == 2 * e
    assert moved(forward(e, 4, residual="dense", packed=True)) == 4 * e + w
    assert moved(forward(e, 4, packed=True, unwritten=True)) == moved(forward(e, 4, packed=True)) - e == 2 * e + w
    assert moved(forward(e, 4, residual="unwritten")) == 5 * e + w
    assert moved(backward(e, 4, residual="unwritten")) == moved(backward(e, 4, residual="packed"))
    assert moved(forward(e, 4, pool=True)) == 2.25 * e and moved(forward(e, 4, static=True)) == 1.5 * e
    assert moved(backward(e, 4)) == 5 * e and moved(backward(e, 4, training=False)) == 3 * e
    assert moved(backward(e, 4, residual="dense")) == 7 * e and moved(backward(e, 4, residual="packed")) == 8 * e + w
    assert moved(backward(e, 4, pool=True)) == 3.5 * e and moved(backward(e, 64)) == 5 * e + 2 * 12 / 64
    assert kept(traffic.batch_norm_lif_kept(e, 4)) == e and kept(traffic.lif_kept(e, 4, static=True)) == e / 4
    assert kept(traffic.batch_norm_lif_kept(e, 4, residual="packed")) == e + w
    assert kept(traffic.batch_norm_lif_kept(e, 4, residual="unwritten")) == e + w
    assert kept(traffic.batch_norm_lif_kept(e, 4, residual="packed", checkpoint=True)) == w
    assert kept(traffic.spike_input_kept(e, 4)) == w and moved(traffic.spike_input_kept(e, 4)) == 0
    assert moved(traffic.spikes_pack(e, 4)) == e + w and moved(traffic.spikes_unpack(e, 4, pool=True)) == w + e / 4
    assert moved(traffic.regularizer()) == 12
