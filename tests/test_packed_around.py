"""packed_activations beside what else works on a model: autocast, checkpoints, compilers, other contexts, memory."""

import gc

import pytest
import torch
from packing import POOLED, SPIKES, WORDS, Case, Net, equal, flat, gradients, inputs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from trtkern.nn import LIF
from trtkern.nn.packed import packed_activations
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops.spikes import listen, listening


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


def test_autocast():
    net, x = Net(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(net, net(x))
        with packed_activations() as report:
            y = net(x)
    assert equal(gradients(net, y), want)
    # Neurons after bfloat16 convolutions spike in bfloat16: nothing is cast but the input and the parameters.
    assert report.dense_bytes == (2 * SPIKES + SPIKES // 4) // 2 and report.packed_bytes == 2 * WORDS
    weights = sum(p.numel() for name, p in net.named_parameters() if "weight" in name and "second" not in name)
    assert report.left_dense["cast copy"] == 2 * weights
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = case.check(flat)
    assert report.packed_tensors == 0
    assert report.left_dense["cast copy"] == 2 * (case.x.numel() + case.conv.weight.numel())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, inside):
    net, x = Net(checkpointed=reentrant), inputs()
    net.second.eval()
    want = gradients(net, net(x))
    with packed_activations() as report:
        y = net(x)
        assert (report.packed_tensors, report.dense_bytes, report.packed_bytes) == (1, SPIKES, WORDS)
        if inside:
            got = gradients(net, y)
    assert equal(got if inside else gradients(net, y), want)


def test_torch_compile():
    case = Case()
    want = case.gradients(case.forward(POOLED["layer"]))
    compiled = torch.compile(lambda: case.forward(POOLED["layer"]), fullgraph=True, backend="aot_eager")
    with packed_activations() as report:
        y = compiled()
        assert equal(case.gradients(compiled()), want)
    assert equal(case.gradients(y), want) and report.packed_tensors == 0
    assert equal(case.gradients(compiled()), want)


def test_around_the_layers_that_keep_words_themselves():
    lif, conv, linear = LIF(packed=True), SpikeConv2d(3, 4, 3, padding=1), SpikeLinear(4 * 4 * 6, 5)
    net = nn.Sequential(lif, conv, LIF(packed=True), linear)
    x = 2 * torch.randn(10, 2, 3, 4, 6)
    want = gradients(net, net(x))
    with packed_activations() as report:
        y = net(x)
    assert equal(gradients(net, y), want)
    assert report.packed_tensors == 2 and report.packed_bytes == 2 * 2 * (3 + 4) * 4 * 6
    assert report.dense_bytes == 4 * 10 * 2 * (3 + 4) * 4 * 6
    # What the second neuron keeps; the first needs no gradient.
    assert report.left_dense == {"not spikes": 4 * 10 * 2 * 4 * 4 * 6}


def test_the_inner_of_two_contexts_packs():
    case = Case()
    want = case.gradients(case.forward(flat))
    with packed_activations() as outer:
        with packed_activations() as inner:
            s = case.lif(case.x)
            first = case.conv(flat(s))
        second = case.conv(flat(s))
    assert inner.packed_tensors == outer.packed_tensors == 1 and outer.left_dense_bytes == 0
    assert equal(case.gradients(first), want)
    assert equal(torch.autograd.grad(second.sin().sum(), case.conv.weight), want[1:2])


def test_an_error_inside_ends_it():
    case = Case()
    with pytest.raises(KeyError), packed_activations() as report:
        raise KeyError
    assert not listening()
    case.forward(flat)
    assert report.kept_bytes == 0


def test_second_derivatives():
    def penalty(between):
        x = torch.linspace(-1, 2, 96, dtype=torch.float64).reshape(4, 2, 3, 4).requires_grad_()
        linear = nn.Linear(4, 5, dtype=torch.float64)
        for parameter in linear.parameters():
            nn.init.constant_(parameter, 0.3)
        with between():
            y = linear(LIF(surrogate="atan", backend="reference")(x)).sin().sum()
            (g,) = torch.autograd.grad(y, linear.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, linear.weight, linear.bias])

    want = penalty(torch.enable_grad)
    assert equal(penalty(packed_activations), want) and want[0].abs().sum() > 0


def test_outputs_that_are_saved_do_not_keep_themselves_alive():
    gc.disable()
    try:
        with packed_activations():
            out = torch.randn(4, requires_grad=True).exp()
        storage = StorageWeakRef(out.untyped_storage())
        del out
        assert storage.expired()
    finally:
        gc.enable()


def test_words_are_shared_by_all_that_is_saved_of_them():
    case = Case()
    with packed_activations() as report:
        s = case.lif(case.x)
        nodes = [
            case.conv(flat(s)).grad_fn,
            case.conv(flat(s[2:])).grad_fn,
            case.conv(F.avg_pool2d(flat(s), 2)).grad_fn,
        ]
    words = {node._raw_saved_input.data.source.words.tensor.data_ptr() for node in nodes}
    assert len(words) == 1 and report.packed_bytes == 2 * 2 * 3 * 4 * 6


def test_words_go_with_their_spikes():
    """Inside the context too: what nobody saved is not kept."""
    words = []
    lif, x = LIF(), torch.randn(4, 2, 3)
    with packed_activations():
        with listen(lambda _, w: words.append(StorageWeakRef(w.untyped_storage()))):
            for _ in range(3):
                lif(x)
        alive = lif(x)
        assert len(words) == 3 and all(word.expired() for word in words) and alive.dim() == 3
