"""packed_activations: the same gradients for any model, with words in place of the spikes that it would have kept."""

import pytest
import torch
from packing import POOLED, SPIKES, WORDS, Case, Net, equal, flat, gradients, in_channels_last, inputs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from trtkern.nn import LIF, BatchNormLIF
from trtkern.nn.packed import packed_activations
from trtkern.ops.spikes import announce, pack


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def layout(request):
    return request.param


def test_a_model_of_plain_torch(layout):
    net, x = Net().to(memory_format=layout), inputs(layout)
    want = gradients(net, net(x))
    with packed_activations() as report:
        y = net(x)
        inside = gradients(net, net(x))
    assert equal(inside, want) and equal(gradients(net, y), want)
    assert sum(grad.abs().sum() > 0 for grad in want) == len(want)
    # The spikes of two neurons, and what was pooled, as the words that it came from; in channels last also what the
    # Linear sees, which otherwise is a copy of its own. Two steps of that.
    copied = layout == torch.contiguous_format
    assert report.dense_bytes == 2 * (2 * SPIKES + SPIKES // 4 + (0 if copied else SPIKES // 4))
    assert report.packed_bytes == 2 * (2 * WORDS + (0 if copied else WORDS // 4))
    assert report.packed_tensors == 2 * (3 if copied else 4)
    # The input, alive all the time, counts once; so do the outputs. What neurons keep, and some bytes a channel.
    left = 4 * x.numel() + 2 * (2 * SPIKES + SPIKES // 4 + (SPIKES // 4 if copied else 0)) + 4 * y.numel()
    assert list(report.left_dense) == ["not spikes"]
    assert 0 < report.left_dense_bytes - left < 2 * 8 * 64
    assert report.kept_bytes == report.left_dense_bytes + report.packed_bytes


def test_the_dense_spikes_are_gone(layout):
    net, x = Net().to(memory_format=layout), inputs(layout)
    made = []
    for layer in (net.first, net.second, net.pool):
        layer.register_forward_hook(lambda _, __, out: made.append(StorageWeakRef(out.untyped_storage())))
    dense = net(x)
    assert dense.requires_grad and len(made) == 3 and not any(storage.expired() for storage in made)
    made.clear()
    with packed_activations():
        packed = net(x)
        assert packed.requires_grad and len(made) == 3 and all(storage.expired() for storage in made)


def test_the_report_reads_well():
    case = Case()
    with packed_activations() as report:
        case.conv(case.lif(case.x)[4])
        case.conv(case.lif(case.x)[4, :, :, 1:].exp())
    assert str(report).splitlines() == [
        "packed 1 spike tensors: 5.6 KiB as 288 B",
        "left dense: 6.0 KiB",
        "     6.0 KiB  not spikes",
    ]
    summary = report.summary()
    assert summary == {
        "packed_tensors": 1,
        "dense_bytes": 5760,
        "packed_bytes": 288,
        "left_dense_bytes": 5760 + 432,
        "kept_bytes": 288 + 5760 + 432,
        "left_dense": {"not spikes": 5760 + 432},
    }
    assert summary["left_dense"] is not report.left_dense


@pytest.mark.parametrize(
    "view",
    [
        flat,
        lambda s: flat(s.view(5, 4, 3, 4, 6)),
        lambda s: flat(s.mT),
        lambda s: flat(s[3:9]),
        lambda s: s[9],
        lambda s: flat(s[8:]),
    ],
)
def test_whole_steps_are_packed_in_any_view(view):
    case = Case()
    report = case.check(view)
    assert (report.packed_tensors, report.dense_bytes, report.packed_bytes) == (1, case.dense, 2 * 2 * 3 * 4 * 6)


def views(s):
    return [
        s, s[2:5], s[::3], s[1:8:2], s[4], s[:, 0], s.permute(4, 2, 0, 1, 3), s.flatten(), s.view(5, 2, -1)[1:, 1],
        s[None].expand(3, *s.shape), s[3:4].expand(4, -1, -1, -1, -1), s.view(2, 5, -1)[:, 1:3], s.detach(),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_view_comes_back_as_it_was(dtype):
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    with packed_activations() as report:
        s = LIF()(2 * torch.randn(10, 1, 3, 4, 6, dtype=dtype))
        nodes = [(view * weight).grad_fn for view in views(s)]
    assert report.packed_tensors == 1 and report.left_dense_bytes == 0
    for node, view in zip(nodes, views(s), strict=True):
        back = node._saved_self
        assert torch.equal(back, view) and back.stride() == view.stride() and back.dtype == view.dtype
        assert back.untyped_storage().data_ptr() != s.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda s: s[..., 1:3],
        lambda s: s[:, 1:],
        lambda s: s.flatten()[5:149],
        lambda s: s.view(torch.int32).view(torch.float32)[0, :, :1],
        lambda s: s.as_strided((2, 144), (72, 1)),
    ],
)
def test_a_part_of_the_steps_stays_dense(view):
    weight = torch.ones((), requires_grad=True)
    with packed_activations() as report:
        s = LIF()(2 * torch.randn(10, 2, 3, 4, 6))
        y = view(s) * weight
        kept = y.grad_fn._saved_self
    assert report.left_dense == {"partial view": 4 * s.numel()} and report.packed_bytes == 0
    assert torch.equal(kept, view(s)) and kept.untyped_storage().data_ptr() == s.untyped_storage().data_ptr()


def test_memory_that_is_kept_anyhow_is_not_called_saved():
    weight = torch.ones((), requires_grad=True)
    with packed_activations() as report:
        s = LIF()(2 * torch.randn(10, 2, 3, 4, 6))
        kept = [s * weight]
        assert report.packed_tensors == 1 and report.dense_bytes == 4 * s.numel()
        kept.append(s[..., 1:3] * weight)
    assert report.packed_tensors == 0 and report.dense_bytes == 0
    assert report.left_dense["partial view"] == 4 * s.numel() and report.packed_bytes == s.numel() // 5


def test_an_address_is_no_identity():
    """A tensor where spikes were a moment ago, as often written to as they were, is not those spikes."""
    conv, memory = nn.Conv2d(3, 4, 1), bytearray(4 * 4 * 2 * 3 * 4 * 6)

    def at_that_address(values):
        return torch.frombuffer(memory, dtype=torch.float32).view(values.shape).copy_(values)

    with packed_activations() as report:
        s = at_that_address(LIF()(2 * torch.randn(4, 2, 3, 4, 6)))
        address = s.data_ptr()
        announce(s, pack(s))
        conv(flat(s))
        assert report.packed_tensors == 1
        del s
        other = at_that_address(torch.rand(4, 2, 3, 4, 6))
        assert other.data_ptr() == address
        y = conv(flat(other))
    assert report.packed_tensors == 1 and report.left_dense == {"not spikes": len(memory)}
    (got,) = torch.autograd.grad(y.sum(), conv.weight)
    (want,) = torch.autograd.grad(conv(flat(other)).sum(), conv.weight)
    assert torch.equal(got, want)


def in_place(s):
    s.mul_(0.5)
    return flat(s)


def in_place_through_a_view(s):
    with torch.no_grad():
        s[3, 0].fill_(0.75)
    return flat(s)


def in_place_through_a_detached_view(s):
    s.detach()[2:4].zero_()
    return flat(s)


@pytest.mark.parametrize("change", [in_place, in_place_through_a_view, in_place_through_a_detached_view])
def test_spikes_that_were_changed_in_place_stay_dense(change):
    case = Case()
    report = case.check(change)
    assert report.left_dense["changed in place"] == case.dense and report.packed_tensors == 0


@pytest.mark.parametrize("change", [in_place, in_place_through_a_view, in_place_through_a_detached_view])
def test_a_change_after_the_forward_pass(change):
    case = Case()
    want = case.gradients(case.forward(flat))
    kept = []

    def keep(s):
        kept.append(s)
        return flat(s)

    y = case.forward(keep)
    with torch.no_grad():
        change(kept[-1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradients(y)
    # The words still are what the forward pass saw.
    with packed_activations():
        y = case.forward(keep)
    with torch.no_grad():
        change(kept[-1])
    assert equal(case.gradients(y), want)


def test_a_change_of_what_stays_dense_is_an_error_as_ever():
    conv, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 4, 6)
    with packed_activations():
        y = conv(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* version 1; expected version 0"):
        y.sum().backward()


@pytest.mark.parametrize("pool", POOLED)
def test_pooled_spikes_are_kept_as_the_words_that_they_came_from(pool):
    case = Case()
    if pool == "channels last":
        case.x = in_channels_last(case.x.detach()).requires_grad_()
    report = case.check(POOLED[pool])
    with torch.no_grad():
        steps = F.avg_pool2d(flat(case.x), 2) if "slice" not in pool else F.avg_pool2d(flat(case.x[3:9]), 2)
    size = 4 * steps.numel() if pool != "step" else 4 * steps.numel() // 10
    assert (report.packed_tensors, report.dense_bytes) == (2, case.dense + size)
    assert report.packed_bytes == case.x.numel() // 5
    assert report.left_dense == {"not spikes": case.dense}


def test_pooled_images_of_odd_size_are_packed():
    case = Case(size=(5, 7))
    report = case.check(POOLED["layer"])
    assert report.packed_tensors == 2 and report.packed_bytes == case.x.numel() // 5


def doubled(s):
    p = F.avg_pool2d(flat(s), 2)
    with torch.no_grad():
        p.mul_(2)
    return p


NOT_POOLED = {
    "kernel": lambda s: F.avg_pool2d(flat(s), 3, 2, 1),
    "stride": lambda s: F.avg_pool2d(flat(s), 2, 1),
    "padding": lambda s: F.avg_pool2d(flat(s), 2, padding=1),
    "ceil_mode": lambda s: F.avg_pool2d(flat(s), 2, ceil_mode=True),
    "divisor": lambda s: F.avg_pool2d(flat(s), 2, divisor_override=3),
    "oblong": lambda s: F.avg_pool2d(flat(s), (2, 1)),
    "turned": lambda s: F.avg_pool2d(flat(s.mT), 2),
    "time as space": lambda s: F.avg_pool2d(s.permute(1, 2, 0, 3, 4).flatten(3), 2),
    "twice": lambda s: F.avg_pool2d(F.avg_pool2d(flat(s), 2), 2),
    "maximum": lambda s: F.max_pool2d(flat(s), 2),
    "changed": doubled,
    "other images": lambda s: F.avg_pool2d(s.view(20, 3, 2, 8), 2),
}


@pytest.mark.parametrize("pool", NOT_POOLED)
def test_other_pooling_stays_dense(pool):
    case = Case(size=(4, 4))
    report = case.check(NOT_POOLED[pool])
    assert report.packed_tensors == (2 if pool == "twice" else 1)
    # Beside the neuron's input, at least what came out of the pooling.
    assert list(report.left_dense) == ["not spikes"] and report.left_dense_bytes > case.dense + 200


def test_pooling_behind_the_neuron():
    norm, conv = BatchNormLIF(3, pool=2), nn.Conv2d(3, 4, 1)
    x = torch.randn(4, 2, 3, 8, 6)
    norm.eval()
    want = torch.autograd.grad(conv(flat(norm(x))).sin().sum(), conv.weight)
    with packed_activations() as report:
        y = conv(flat(norm(x)))
    assert equal(torch.autograd.grad(y.sin().sum(), conv.weight), want)
    assert (report.packed_tensors, report.dense_bytes) == (1, x.numel()) and report.packed_bytes == x.numel() // 4


def test_spikes_that_need_no_gradient_are_packed():
    case = Case()
    case.x.requires_grad_(False)
    with packed_activations() as report:
        y = case.forward(flat)
    assert report.packed_tensors == 1 and report.left_dense_bytes == 0
    want = torch.autograd.grad(case.forward(flat).sum(), case.conv.weight)
    assert equal(torch.autograd.grad(y.sum(), case.conv.weight), want)
