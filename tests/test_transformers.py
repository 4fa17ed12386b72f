"""Spikformer and the Spike-driven Transformer: those of plain torch, published weights, what they keep and take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn
from twins import compare, varied

from trtkern import nn as snn
from trtkern.backends import named
from trtkern.bench import transformers
from trtkern.models import SpikeDrivenTransformer, Spikformer, load_reference_weights, reference_keys, resnet19
from trtkern.models._attention import firing_together, masked, spiking_attention
from trtkern.models._tokens import _SyncTokenNorm, _TokenNorm
from trtkern.nn import Spikes
from trtkern.ops.spikes import pack, unwritten
from trtkern.profiling import memory
from trtkern.training import loop

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
SMALL = {"shape": (3, 8, 8), "dim": 32, "depth": 2, "patch": 2}
KINDS = {
    "spikformer": (Spikformer, {**SMALL, "heads": 2}, transformers.spikformer, {"dim": 32, "depth": 2, "heads": 2}),
    "sdt": (SpikeDrivenTransformer, SMALL, transformers.spike_driven, {"dim": 32, "depth": 2}),
}


class Sigmoid(torch.autograd.Function):
    """1 where u >= 0; the derivative is that of sigmoid(4 u)."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        s = torch.sigmoid(4 * u)
        return 4 * g * s * (1 - s)


class PublishedNeurons(nn.Module):
    """h_t = v_{t-1} + (x_t - v_{t-1}) / 2, a spike from the threshold on, v_t = (1 - s_t) h_t with s_t detached."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            h = v + (current - v) / 2
            spikes.append(Sigmoid.apply(h - self.threshold))
            v = (1 - spikes[-1].detach()) * h
        return torch.stack(spikes)


def made(name, **options):
    kind, small, _, _ = KINDS[name]
    return kind(**{**small, **options})


def plainly(name, **others):
    _, _, make, small = KINDS[name]
    return make(patch=2, neurons=PublishedNeurons, **{**small, **others})


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "parameters", "unused"),
    [
        # What the published code counts, and what of it no sum contains: two LayerNorms a block of Spikformer, heads
        # that talk to each other in SDT.
        (lambda: Spikformer(10), 9_330_874, 4 * 4 * 384),
        (lambda: Spikformer(100), 9_365_524, 4 * 4 * 384),
        (
            lambda: Spikformer(1000, shape=(3, 224, 224), dim=512, depth=8, heads=8, patch=16, qkv_bias=False),
            29_705_768,
            8 * 4 * 512,
        ),
        (lambda: SpikeDrivenTransformer(10), 10_233_546, 2 * 8**2),
        (lambda: SpikeDrivenTransformer(100), 10_279_716, 2 * 8**2),
        (
            lambda: SpikeDrivenTransformer(1000, shape=(3, 224, 224), dim=384, depth=8, patch=16),
            16_816_536,
            8 * 8**2,
        ),
    ],
)
def test_published_sizes(make, parameters, unused):
    with torch.device("meta"):
        assert count(make()) == parameters - unused


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frames", [False, True])
def test_it_is_that_of_plain_torch(name, frames):
    """Outputs, gradients and running statistics, with the neuron of the published code."""
    torch.manual_seed(2)
    shape = (3, 2, 3, 8, 8) if frames else (2, 3, 8, 8)
    compare(made(name, backend="reference").double(), varied(plainly(name)), torch.rand(shape, dtype=torch.float64), 10)


def test_imagenet_s_form_of_the_weights():
    """1x1 convolutions in the place of Linear layers, none of Q, K and V with a bias."""
    torch.manual_seed(2)
    net = varied(plainly("spikformer", qkv_bias=False))
    renamed = {
        key.replace("_linear", "_conv"): t[..., None, None] if "_linear.weight" in key else t
        for key, t in net.state_dict().items()
    }
    model = made("spikformer", qkv_bias=False, backend="reference").double()
    load_reference_weights(model, {f"module.{key}": t for key, t in renamed.items()})
    assert set(reference_keys(model).values()) == set(renamed)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), net(x), rtol=1e-9, atol=1e-9)


def test_what_is_not_computed_with_may_be_there():
    spikformer, sdt = made("spikformer"), made("sdt")
    state = {theirs: spikformer.state_dict()[ours] for ours, theirs in reference_keys(spikformer).items()}
    load_reference_weights(spikformer, {**state, "block.1.norm2.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"1 unexpected: block\.1\.norm3\.weight"):
        load_reference_weights(spikformer, {**state, "block.1.norm3.weight": torch.ones(32)})
    state = {theirs: sdt.state_dict()[ours] for ours, theirs in reference_keys(sdt).items()}
    assert state["block.0.attn.q_conv.weight"].shape == (32, 32)
    load_reference_weights(sdt, {**state, "block.0.attn.talking_heads.weight": torch.ones(8, 8, 1)})


@pytest.mark.parametrize(
    ("model", "other", "message"),
    [
        ("spikformer", "sdt", r"\d+ missing: block\.0\.attn\.q_linear\.weight, .*; \d+ unexpected: .*_conv\.weight"),
        ("sdt", "spikformer", r"\d+ missing: .*_conv\.weight.*; \d+ unexpected: block\.0\.attn\.q_linear\.weight"),
        ("spikformer", "deeper", r"\d+ unexpected: block\.2\.attn\.q_linear\.weight, .* and \d+ more; build the"),
        ("spikformer", "wider", r"of another shape: patch_embed\.proj_conv\.weight \(8, 3, 3, 3\) for \(4, 3, 3, 3\)"),
        ("spikformer", "resnet", r"missing: patch_embed\.proj_conv\.weight, .*; \d+ unexpected: layers\.0\.conv2d"),
    ],
)
def test_another_model_s_checkpoint_is_refused_whole(model, other, message):
    others = {
        "deeper": lambda: made("spikformer", depth=3), "wider": lambda: made("spikformer", dim=64),
        "resnet": lambda: resnet19(10, shape=(3, 8, 8), width=4),
    }  # fmt: skip
    net, theirs = made(model), others.get(other, lambda: made(other))()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    state = {key: theirs.state_dict()[ours] for ours, key in reference_keys(theirs).items()}
    with pytest.raises(ValueError, match=message):
        load_reference_weights(net, state)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def spikes(steps=4, tokens=5, channels=8, rate=0.4, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, 2, tokens, channels, generator=draw) < rate).to(dtype)


def both_ways(function, *given):
    """The function's result and the gradients of packed spikes, and of dense ones."""
    found = []
    for packed in (True, False):
        leaves = [x.clone().requires_grad_() for x in given]
        out = function(*[Spikes(x, pack(x)) for x in leaves] if packed else leaves)
        out = out.spikes if isinstance(out, Spikes) else out
        g = torch.arange(1.0, out.numel() + 1).view_as(out).to(out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    return found


@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_and_masks_of_words_are_those_of_spikes(steps, dtype):
    q, k, v = (spikes(steps, seed=seed, dtype=dtype) for seed in range(3))
    mask = spikes(steps, tokens=1, seed=3, dtype=dtype)
    for function, given in (
        (lambda q, k, v: spiking_attention(q, k, v, 2, 0.125), (q, k, v)),
        (firing_together, (k, v)),
        (masked, (q, mask)),
    ):
        for packed, dense in zip(*both_ways(function, *given), strict=True):
            assert packed.dtype == dtype
            torch.testing.assert_close(packed, dense, rtol=4 * torch.finfo(dtype).eps, atol=0)
    heads = [x.double().unflatten(-1, (2, 4)) for x in (q, k, v)]
    wanted = 0.125 * torch.einsum("tblhc,tbmhc,tbmhd->tblhd", *heads).flatten(3)
    got = spiking_attention(*(Spikes(x, pack(x)) for x in (q, k, v)), 2, 0.125)
    assert torch.equal(got.double(), wanted)  # whole numbers, below 256
    assert torch.equal(firing_together(k, v).double(), (k.double() * v.double()).sum(2, keepdim=True))
    both = masked(Spikes(q, pack(q)), Spikes(mask, pack(mask)))
    assert torch.equal(both.words, pack(both.spikes)) and torch.equal(both.spikes, q * mask)


@pytest.mark.parametrize("tokens", [300, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_tokens_than_half_precision_counts_move_no_spike(tokens, dtype):
    """Products whose counts the dtype does not hold: neurons with the threshold 1/2 fire as of the exact ones."""
    neurons = snn.LIF(0.5, 0.5, v_threshold=0.5, fire_on_equal=True, channel_dim=-1, backend="reference")
    half = (2 / tokens) ** (1 / 3)  # a rate at which about half of the products make a neuron fire
    for rate in (half, 0.9):
        q, k, v = (spikes(tokens=tokens, rate=rate, seed=seed, dtype=dtype) for seed in range(3))
        wanted = neurons(spiking_attention(*(x.double() for x in (q, k, v)), 2, 0.125))
        for given in ((q, k, v), [Spikes(x, pack(x)) for x in (q, k, v)]):
            assert torch.equal(neurons(spiking_attention(*given, 2, 0.125)).double(), wanted)
        assert 0.1 < wanted.mean() < 0.9 or rate > half


def test_autocast_leaves_the_counts_alone():
    q, k, v = (spikes(tokens=300, rate=0.9, seed=seed) for seed in range(3))
    wanted = spiking_attention(q, k, v, 2, 0.125)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spiking_attention(q, k, v, 2, 0.125), wanted)
        assert torch.equal(spiking_attention(*(Spikes(x, pack(x)) for x in (q, k, v)), 2, 0.125), wanted)


def test_the_second_derivative_of_words_is_refused():
    leaves = [spikes(seed=seed).requires_grad_() for seed in range(3)]
    (g,) = torch.autograd.grad(
        spiking_attention(*(Spikes(x, pack(x)) for x in leaves), 2, 0.125).square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="spiking attention: expected a first derivative, got a second one"):
        g.square().sum().backward()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_packed_unwritten_or_computed_again_is_the_same(name):
    """With torch's own products the same to the last bit."""
    results = []
    x = torch.rand(2, 3, 8, 8)
    for options in ({"packed": False}, {}, {"checkpoint": True}, {"written": False}):
        torch.manual_seed(1)
        lazy = not options.pop("written", True)
        net = made(name, backend=BACKEND, exact_convolutions=True, **options)
        with unwritten(lazy):
            out = net(x)
            out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters())])
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
            assert not mine.isnan().any()


@pytest.mark.parametrize("name", KINDS)
def test_little_but_currents_is_kept(name):
    """The spikes of Q, K, V, the attention and the MLP are kept as words alone."""
    x = torch.rand(8, 3, 16, 16)
    kept = {
        packed: memory(made(name, shape=(3, 16, 16), packed=packed, backend=BACKEND), x) for packed in (True, False)
    }
    assert kept[True].measured < 0.75 * kept[False].measured
    assert abs(kept[True].agreement - 1) <= 0.05


@pytest.mark.parametrize("name", KINDS)
def test_any_neuron_and_any_setting(name):
    x = torch.rand(2, 3, 8, 8)
    published = made(name)
    for layer in (m for m in published.modules() if isinstance(m, snn.LIF)):
        assert (layer.decay, layer.gain, layer.spec.surrogate, layer.spec.detach_reset) == (0.5, 0.5, "sigmoid", True)
        assert layer.fire_on_equal and layer.v_threshold in (0.5, 1.0)
    assert sum(layer.v_threshold == 0.5 for layer in published.modules() if isinstance(layer, snn.LIF)) == 2
    parametric = made(name, neuron="PLIF", backend="reference")
    assert all(m.decay_input for m in parametric.modules() if isinstance(m, snn.PLIF))
    other = made(name, neuron=snn.CUBALIF, surrogate="atan", backend="reference", timesteps=3)
    for net in (parametric, other):
        net(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert other(x).shape == (3, 2, 10)
    (decay,) = {m.decay for m in made(name, decay=0.7).modules() if isinstance(m, snn.LIF)}
    assert decay == 0.7


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 9, 8)}, "expected sides that patches of 2x2 fill, got 9x8"),
        ({"shape": (3, 8)}, r"expected shape as three integers \(C, H, W\) >= 1, got \(3, 8\)"),
        ({"patch": 3}, "expected patch from 1, 2, 4, 8, 16, got 3"),
        ({"dim": 20}, "expected dim to be a multiple of 8, the first stage has dim / 8, got 20"),
        ({"depth": 0}, "expected depth to be an int >= 1, got 0"),
        ({"mlp_ratio": 2.5}, "expected mlp_ratio to be an int >= 1, got 2.5"),
    ],
)
def test_what_is_no_transformer_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        made(name, **options)


def test_what_one_of_them_refuses():
    with pytest.raises(ValueError, match="SpikingSelfAttention: expected heads to divide dim=32, got 3"):
        made("spikformer", heads=3)
    with pytest.raises(ValueError, match="SpikeDrivenTransformer: expected mlp_ratio >= 2, got 1"):
        made("sdt", mlp_ratio=1)


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_real_images(name, tmp_path, one_thread):
    """The digits: all steps are finite, every weight moves, and the loss falls."""
    net = made(name, shape=(1, 8, 8), depth=1, backend=BACKEND, timesteps=2)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    trainer = loop.Trainer(net, "digits", loss="sdt", epochs=3, batch_size=32, lr=1e-2, device="cpu")
    losses = [row["train"]["loss"] for row in trainer.fit(tmp_path / "run").rows]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, before[key]) for key, p in net.named_parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_of_tokens_is_torchs_of_rows(training, rows):
    """Also of one row, whose strides say nothing of where its channels lie, and shared among processes as alone."""
    torch.manual_seed(0)
    found = []
    for make in (_TokenNorm, nn.BatchNorm1d, _SyncTokenNorm):
        norm = make(4).double().train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1.0, 5))
            norm.running_var.copy_(torch.arange(2.0, 6))
        x = torch.randn(rows, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = norm(x.flatten(0, 1)).view_as(x) if make is nn.BatchNorm1d else norm(x)
        y.mul(torch.arange(y.numel()).view_as(y)).square().sum().backward()
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
        assert y.is_contiguous()
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_torch_fx_traces_it(name):
    net = made(name, backend="reference").double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))
