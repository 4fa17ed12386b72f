"""Hooks for saved tensors that return another memory layout: gradients stay bit for bit what they are without."""

import pytest
import torch
from packing import equal, in_channels_last, spikes

from trtkern import nn
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.regularizer import regularizer
from trtkern.ops.spikes import Spikes, pack

SHAPE = (3, 2, 4, 6, 6)


def contiguous(x):
    return x.detach().clone(memory_format=torch.contiguous_format)


def channels_last(x):
    if x.dim() == 5:
        return in_channels_last(x.detach().clone())
    return contiguous(x).contiguous(memory_format=torch.channels_last) if x.dim() == 4 else contiguous(x)


def reversed_axes(x):
    order = list(range(x.dim()))[::-1]
    return x.detach().permute(order).contiguous().permute(order)


def elsewhere(x):
    """The same layout, another place."""
    made = torch.empty(x.numel() + 7, dtype=x.dtype)[7:]
    return made.as_strided(x.size(), x.contiguous().stride()).copy_(x)


def wider(x):
    """In another dtype, which holds the same numbers."""
    return x.detach().to(torch.float64) if x.dtype == torch.float32 else x.detach().clone()


HOOKS = [contiguous, channels_last, reversed_axes, elsewhere, wider]


def laid(x, layout):
    if layout == "channels_last":
        return in_channels_last(x)
    if layout == "static":
        return x[0].expand(x.shape)
    return x


def lif(layout, **settings):
    def build():
        shape = settings.get("shape", SHAPE)
        x = (1.5 * torch.randn(shape) + 0.3).requires_grad_()
        layer = nn.LIF(
            torch.nn.Parameter(torch.rand(shape[2]) * 0.5 + 0.3) if settings.get("channels") else 0.5,
            v_threshold=torch.nn.Parameter(torch.tensor(0.9)),
            backend=settings.get("backend", "auto"),
        )
        v0 = torch.rand(shape[1:]).requires_grad_()
        return layer, lambda: layer(laid(x, layout), laid(v0[None], layout)[0], return_v=True), [x, v0]

    return build


def norm(layout, shape=SHAPE, residual=None, **settings):
    def build():
        y = (1.5 * torch.randn(shape) + 0.3).requires_grad_()
        more = torch.randn(shape).requires_grad_()
        layer = nn.BatchNormLIF(shape[2], decay=0.6, **settings)
        v0 = torch.rand(shape[1:]).requires_grad_()
        given = {None: None, "dense": more, "other": laid(more, "channels_last")}.get(residual)
        if residual == "words":
            given = spikes(*shape, channels_last=layout != "channels_last")
        wanted = [y, v0, *([more] if residual in ("dense", "other") else [])]
        return layer, lambda: (layer(laid(y, layout), given, v0),), wanted

    return build


def packed(kind, layout, checkpoint=False):
    def build():
        x = spikes(*SHAPE, channels_last=layout == "channels_last", pooled=kind == "pooled")
        if layout == "mixed":
            x = Spikes(in_channels_last(x.spikes.detach()).requires_grad_(), x.words)
        conv = nn.SpikeLinear(144, 5) if kind == "linear" else nn.SpikeConv2d(4, 6, 3, padding=1)
        if not checkpoint:
            return conv, lambda: (conv(x),), [x.spikes]
        layer = nn.ConvBatchNormLIF(conv, nn.BatchNormLIF(6, pool=2), checkpoint=checkpoint == "yes")
        return layer, lambda: (layer(x),), [x.spikes]

    return build


def penalty():
    w = torch.nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    layer = torch.nn.Module()
    return layer, lambda: (regularizer([w], RegularizerSpec(3, 1e-2, 0.3, 1e-5)),), [w]


CASES = {
    "lif": lif("contiguous"),
    "lif channels_last": lif("channels_last"),
    "lif per channel": lif("channels_last", channels=True),
    "lif of 18 steps": lif("channels_last", shape=(18, 2, 3, 2, 2), channels=True),
    "lif static": lif("static", channels=True),
    "norm": norm("contiguous"),
    "norm channels_last": norm("channels_last"),
    "norm static": norm("static"),
    "norm of 18 steps": norm("channels_last", shape=(18, 2, 3, 2, 2)),
    "norm pooled": norm("channels_last", pool=2),
    "norm pooled, odd": norm("channels_last", shape=(3, 2, 4, 5, 5), pool=2),
    "norm residual": norm("channels_last", residual="dense"),
    "norm residual in another layout": norm("contiguous", residual="other"),
    "norm words": norm("channels_last", residual="words"),
    "conv": packed("conv", "channels_last"),
    "conv mixed": packed("conv", "mixed"),
    "conv pooled": packed("pooled", "channels_last"),
    "linear": packed("linear", "channels_last"),
    "block": packed("conv", "channels_last", "yes"),
    "block contiguous": packed("conv", "contiguous", "yes"),
    "penalty": penalty,
}


def gradients(case, pack_hook=None, unpack_hook=None):
    torch.manual_seed(1)
    layer, call, inputs = CASES[case]()
    if pack_hook is None:
        outputs = call()
    else:
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, unpack_hook):
            outputs = call()
    loss = sum((i + 1) * output.sin().sum() for i, output in enumerate(outputs))
    return torch.autograd.grad(loss, [*inputs, *layer.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_layout_that_a_hook_returns(case):
    want = gradients(case)
    assert sum(g.abs().sum() for g in want) > 0
    for hook in HOOKS:
        if hook is wider and case == "norm pooled, odd":
            continue  # torch pools these, and takes no other dtype
        # Before it is kept, as save_on_cpu does, and when it comes back.
        assert equal(gradients(case, hook, lambda x: x), want), hook.__name__
        assert equal(gradients(case, lambda x: x, hook), want), hook.__name__


def test_save_on_cpu():
    for case in ("norm channels_last", "block"):
        torch.manual_seed(1)
        want = gradients(case)
        torch.manual_seed(1)
        layer, call, inputs = CASES[case]()
        with torch.autograd.graph.save_on_cpu():
            outputs = call()
        got = torch.autograd.grad(outputs[0].sin().sum(), [*inputs, *layer.parameters()])
        assert equal(got, want)


def test_another_shape_or_device_is_refused():
    for hook in (lambda x: x[:1], lambda x: x.to("meta")):
        x = torch.randn(SHAPE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, hook):
            s = nn.LIF()(x)
        with pytest.raises(RuntimeError, match="hook for saved tensors to return a tensor of shape"):
            s.sum().backward()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_a_checkpointed_block_whose_spikes_and_words_lie_differently(layouts, pooled):
    dense, words = layouts
    x = spikes(*SHAPE, channels_last=words == "channels_last", pooled=pooled)
    given = x.spikes.detach()
    given = (in_channels_last(given) if dense == "channels_last" else given.contiguous()).requires_grad_()
    x = Spikes(given, x.words)
    conv, made = nn.SpikeConv2d(4, 6, 3, padding=1), []
    for checkpoint in (False, True):
        layer = nn.ConvBatchNormLIF(conv, nn.BatchNormLIF(6), checkpoint=checkpoint)
        made.append(torch.autograd.grad(layer(x).sin().sum(), [x.spikes, *conv.parameters(), *layer.norm.parameters()]))
    assert equal(*made) and made[0][1].abs().sum() > 0


def test_words_made_by_hand_lie_as_the_spikes_do():
    s = in_channels_last((torch.rand(SHAPE) < 0.3).float())
    assert pack(s).stride()[1:] == s.stride()[1:]
