"""The layers that keep words: torch's results and gradients to the last bit, and nothing dense kept."""

import copy
import itertools
import pickle

import pytest
import torch
from packing import folded, in_channels_last, spikes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from trtkern.nn import LIF
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops.spikes import Spikes, pack


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


def twins(kind, ours, *args, **options):
    """Ours and torch's layer with the same parameters."""
    dtype = options.pop("dtype", torch.float32)
    theirs = kind(*args, **options).to(dtype)
    layer = ours(*args, **options).to(dtype)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    return layer, theirs


def same(ours, theirs, x, run, g=None):
    """Both results, and all gradients that there are, are equal bit for bit."""
    got = ours(x)
    want = run(theirs, x.spikes)
    assert torch.equal(got, want) and got.dtype == want.dtype
    g = torch.randn_like(want) if g is None else g(want)
    inputs = [[t for t in (x.spikes, *m.parameters()) if t.requires_grad] for m in (ours, theirs)]
    grads = [torch.autograd.grad(y, i, g) for y, i in zip((got, want), inputs, strict=True)]
    for a, b, of in zip(*grads, inputs[1], strict=True):
        assert torch.equal(a, b) and a.dtype == of.dtype, (a - b).abs().max()
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads[0])


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"kernel_size": (4, 2), "padding": "same"},
    {"stride": 2, "padding": "valid", "bias": False},
    {"groups": 2, "dilation": (2, 1), "padding": (2, 1), "stride": (1, 2)},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution_is_torchs(options):
    options = {"kernel_size": 3, **options}
    for timesteps, channels_last, pooled in itertools.product((1, 10), (False, True), (False, True)):
        ours, theirs = twins(nn.Conv2d, SpikeConv2d, 4, 6, **options)
        if channels_last:
            ours, theirs = (m.to(memory_format=torch.channels_last) for m in (ours, theirs))
        same(ours, theirs, spikes(timesteps, 2, 4, 12, 8, channels_last=channels_last, pooled=pooled), folded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_convolution_in_another_dtype(dtype):
    ours, theirs = twins(nn.Conv2d, SpikeConv2d, 4, 6, 3, padding=1, dtype=dtype)
    same(ours, theirs, spikes(5, 2, 4, 8, 6, dtype=dtype), folded)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_torchs(bias, dtype):
    shapes = [(4, 2, 7), (1, 1, 5), (10, 3, 1), (9, 2, 4, 6, 8), (3, 1, 4, 2, 2)]
    for shape, channels_last, pooled in itertools.product(shapes, (False, True), (False, True)):
        if len(shape) == 5 or not (channels_last or pooled):
            x = spikes(*shape, channels_last=channels_last, pooled=pooled, dtype=dtype)
            if pooled and x.spikes.mean() == 0:
                continue
            features = x.spikes[0, 0].numel()
            ours, theirs = twins(nn.Linear, SpikeLinear, features, 5, bias=bias, dtype=dtype)
            same(ours, theirs, x, lambda layer, s: layer(s.flatten(2)))


def test_linear_over_the_last_axis():
    ours, theirs = twins(nn.Linear, SpikeLinear, 7, 5)
    x = spikes(4, 2, 3, 7)
    same(ours, theirs, x, lambda layer, s: layer(s))
    same(ours, theirs, Spikes(x.spikes.detach(), x.words), lambda layer, s: layer(s))


def expanded(y):
    return torch.ones(()).expand_as(y)


def transposed(y):
    return torch.randn_like(y).transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("gradient", [expanded, transposed])
def test_gradients_in_any_layout(gradient):
    same(*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), spikes(4, 2, 4, 8, 6), folded, gradient)
    same(*twins(nn.Linear, SpikeLinear, 12, 5), spikes(4, 2, 12), lambda layer, s: layer(s), gradient)


@pytest.mark.parametrize("frozen", ["spikes", "weight", "bias"])
def test_only_the_gradients_that_are_needed(frozen):
    for ours, theirs, x, run in (
        (*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), spikes(4, 2, 4, 8, 6), folded),
        (*twins(nn.Linear, SpikeLinear, 12, 5), spikes(4, 2, 12), lambda layer, s: layer(s)),
    ):
        for tensor in [x.spikes] if frozen == "spikes" else [getattr(m, frozen) for m in (ours, theirs)]:
            tensor.requires_grad_(False)
        same(ours, theirs, x, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    cases = [
        (*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), spikes(4, 2, 4, 8, 6, dtype=dtype), folded),
        (*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), spikes(4, 2, 4, 8, 6, pooled=True, dtype=dtype), folded),
        (*twins(nn.Linear, SpikeLinear, 12, 5), spikes(4, 2, 12, dtype=dtype), lambda layer, s: layer(s)),
    ]
    for ours, theirs, x, run in cases:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16
            same(ours, theirs, x, run)


def kept(run):
    """Bytes that run() keeps for its backward pass, parameters apart, and its result."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = run()
    saved = [t for t in saved if not isinstance(t if t._base is None else t._base, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(storages.values()), out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_words_are_all_that_is_kept(pooled, autocast):
    x = spikes(12, 2, 4, 8, 6, pooled=pooled)
    conv, linear = SpikeConv2d(4, 6, 3), SpikeLinear(x.spikes[0, 0].numel(), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for layer in (conv, linear):
            assert kept(lambda layer=layer: layer(x))[0] == 2 * 2 * 4 * 8 * 6
    dense = 4 * x.spikes.numel()
    assert kept(lambda: conv(x.spikes))[0] == dense and kept(lambda: linear(x.spikes))[0] == dense
    with torch.no_grad():
        assert not conv(x).requires_grad


def test_tensors_go_through_torchs_layer():
    ours, theirs = twins(nn.Conv2d, SpikeConv2d, 4, 6, 3)
    x = torch.randn(3, 2, 4, 8, 6)
    for t in (x, in_channels_last(x), x.transpose(0, 1)):
        assert torch.equal(ours(t), folded(theirs, t))
    assert torch.equal(ours(x[0]), theirs(x[0])) and torch.equal(ours(x[0, 0]), theirs(x[0, 0]))
    ours, theirs = twins(nn.Linear, SpikeLinear, 12, 5)
    for shape in ((12,), (3, 12), (4, 3, 12), (2, 4, 3, 12), (2, 3, 1, 12)):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    x = torch.randn(4, 2, 3, 2, 2)
    assert torch.equal(ours(x), theirs(x.flatten(2)))


def test_a_static_input_is_computed_once():
    calls = []
    image = torch.randn(2, 4, 8, 6)
    for ours, theirs, one in (
        (*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), image),
        (*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), image.contiguous(memory_format=torch.channels_last)),
        (*twins(nn.Linear, SpikeLinear, 192, 5), image),
        (*twins(nn.Linear, SpikeLinear, 6, 5), image[:, 0, 0].contiguous()),
    ):
        x = one.clone().requires_grad_()
        static = x.expand(7, *x.shape)
        size, y = kept(lambda ours=ours, static=static: ours(static))
        assert y.stride(0) == 0 and len(y) == 7 and size == 4 * one.numel()
        flat = x.flatten(1) if isinstance(ours, SpikeLinear) else x
        want = theirs(flat)
        assert all(torch.equal(step, want) for step in y)
        g = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, *ours.parameters()], g)
        want = torch.autograd.grad(want, [x, *theirs.parameters()], g.sum(0))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        calls.append(y)
    words = pack(static)
    assert ours(Spikes(static, words)).stride(0) == 0


class Net(nn.Module):
    """Spikes between layers, pooled ones too."""

    def __init__(self, conv=SpikeConv2d, linear=SpikeLinear, packed=True):
        super().__init__()
        self.first, self.second = LIF(packed=packed), LIF(packed=packed)
        self.conv, self.linear = conv(3, 4, 3, padding=1), linear(4 * 8 * 6, 5)

    def forward(self, x):
        return self.linear(self.second(3 * self.conv(self.first(x))))


def step(net, run, x):
    y = run(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("autocast", [False, True])
def test_fullgraph(autocast):
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = 2 * torch.randn(9, 2, 3, 8, 6)
    x = (x if autocast else in_channels_last(x)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        want = step(net, net, x)
        size, y = kept(lambda: compiled(x))
        for a, b in zip(step(net, lambda x: y, x), want, strict=True):
            assert torch.equal(a, b)
    # The inputs of both neurons, and two planes of words for the spikes of each; under autocast the weights as cast,
    # that of Linear up to torch 2.13: later ones cast it again.
    casts = (2 * net.conv.weight.numel(), 2 * net.linear.weight.numel()) if autocast else (0, 0)
    # Two numbers are left over of the states between chunks, of which there are none.
    own = (4 * 3 + (2 if autocast else 4) * 4) * 9 * 2 * 8 * 6 + 2 * 2 * (3 + 4) * 8 * 6 + 2 * 2 * 4
    assert size - own in (casts[0], sum(casts))


def test_inductor():
    conv, x = SpikeConv2d(3, 4, 3, padding=1), spikes(4, 5, 3, 8, 6)
    compiled = torch.compile(lambda s, words: conv(Spikes(s, words)), fullgraph=True)
    y, g = compiled(*x), torch.randn(4, 5, 4, 8, 6)
    torch.testing.assert_close(y, conv(x), rtol=1e-5, atol=1e-6)
    of = (x.spikes, *conv.parameters())
    for a, b in zip(torch.autograd.grad(y, of, g), torch.autograd.grad(conv(x), of, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_new_sizes_do_not_compile_again():
    conv, lif = SpikeConv2d(3, 4, 3, padding=1), LIF(packed=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: conv(lif(x)), fullgraph=True, backend=counter, dynamic=True)
    counts = []
    # 16 images and more: with fewer torch itself takes another convolution.
    for timesteps, batch in ((4, 5), (20, 7), (8, 4), (9, 3)):
        x = (2 * torch.randn(timesteps, batch, 3, 8, 6)).requires_grad_()
        want = step(conv, lambda x: conv(lif(x)), x)
        assert all(torch.equal(a, b) for a, b in zip(step(conv, compiled, x), want, strict=True))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_state_dicts_are_torchs():
    for ours, theirs in ((SpikeConv2d(4, 6, 3), nn.Conv2d(4, 6, 3)), (SpikeLinear(12, 5), nn.Linear(12, 5))):
        assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert ours.extra_repr() == theirs.extra_repr() and ours.takes_time
        x = spikes(4, 2, 4, 8, 6) if isinstance(ours, nn.Conv2d) else spikes(4, 2, 12)
        want = ours(x)
        want.sum().backward()
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x), want)


def test_a_training_step_is_torchs():
    """Spikes in, gradients through the neurons: the same as torch's layers on dense spikes."""
    net = Net()
    plain = Net(nn.Conv2d, nn.Linear, packed=False)
    plain.load_state_dict(net.state_dict(), strict=True)
    x = (2 * torch.randn(4, 2, 3, 8, 6)).requires_grad_()

    def run(x):
        return plain.linear(plain.second(3 * folded(plain.conv, plain.first(x))).flatten(2))

    assert all(torch.equal(a, b) for a, b in zip(step(net, net, x), step(plain, run, x), strict=True))


def test_layouts_with_no_name():
    """A storage order of its own, or holes: gradients are torch's all the same."""
    s = (torch.rand(4, 2, 4, 8, 6) < 0.3).float()
    for odd in (
        s.permute(0, 1, 2, 4, 3), s.permute(0, 2, 1, 3, 4), s[:, :, :, ::2], s.permute(0, 2, 1, 3, 4)[..., 1:],
        in_channels_last(s)[:, :, 1:],
    ):  # fmt: skip
        x = Spikes(odd.detach().requires_grad_(), pack(odd))
        same(*twins(nn.Conv2d, SpikeConv2d, odd.shape[2], 6, 3), x, lambda m, t: folded(m, t.contiguous()))
        features = odd[0, 0].numel()
        same(*twins(nn.Linear, SpikeLinear, features, 5), x, lambda m, t: m(t.contiguous().flatten(2)))
        # Words in another storage order than the spikes.
        x = Spikes(x.spikes.detach().contiguous().requires_grad_(), pack(in_channels_last(odd)))
        same(*twins(nn.Conv2d, SpikeConv2d, odd.shape[2], 6, 3), x, folded)


def test_pooled_images_of_odd_size():
    x = spikes(4, 2, 4, 9, 7, pooled=True)
    assert x.spikes.shape[-2:] == (4, 3) and F.relu(x.spikes).sum() > 0
    same(*twins(nn.Conv2d, SpikeConv2d, 4, 6, 3), x, folded)
