"""The ops under PyTorch's own checks, and under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from trtkern import lif, models, nn
from trtkern.backends import named
from trtkern.ops._prepared import WANT_EDGES, WANT_H, WANT_PACKED, WANT_SPIKES, WANT_STATE, WANT_V
from trtkern.spec import LIFSpec


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


SCALARS = [0.5, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_opcheck_of_the_private_ops(backend, device):
    x = torch.randn(18, 2, 3, 5, device=device)
    v0 = torch.randn(2, 3, 5, device=device)
    params = torch.tensor(SCALARS, device=device).reshape(6, 1).expand(6, 3).contiguous()
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    token = LIFSpec("soft", "atan").token
    want = WANT_SPIKES + WANT_V + WANT_STATE + WANT_EDGES + WANT_PACKED
    call = (x, v0, params, None, None, None, SCALARS, token, 5, False)
    torch.library.opcheck(torch.ops.trtkern.lif_forward, (*call, flag, want, backend))
    plain = (x, None, None, None, None, None, SCALARS, token, 1, False)
    torch.library.opcheck(torch.ops.trtkern.lif_forward, (*plain, None, WANT_SPIKES, backend))
    torch.library.opcheck(torch.ops.trtkern.lif_forward, (*plain, None, WANT_SPIKES + WANT_H, backend))
    edges = torch.ops.trtkern.lif_forward(*call, flag, want, backend)[3]
    grads = (torch.randn_like(x), None, torch.randn_like(v0), None)
    torch.library.opcheck(torch.ops.trtkern.lif_backward, (*call, edges, *grads, None, 0, None, 7, backend))
    lengths = torch.tensor(
        [16, 3], dtype=torch.int32, device=device
    )  # T of one chunk: edges behind an end are nobody's
    ended, few = (x[:16], *call[1:5], lengths, *call[6:]), (grads[0][:16], *grads[1:])
    torch.library.opcheck(torch.ops.trtkern.lif_forward, (*ended, flag, want - WANT_EDGES, backend))
    torch.library.opcheck(torch.ops.trtkern.lif_backward, (*ended, None, *few, None, 0, None, 7, backend))


def test_opcheck_of_batch_norm_and_of_packing(backend, device):
    """All sums and no gx, then the other way round, on pooled images."""
    y = torch.randn(4, 2, 3, 4, 6, device=device)
    affine, coef = torch.rand(3, 3, device=device), torch.rand(3, 3, device=device)
    token = LIFSpec().token
    call = (y, None, None, affine, torch.randn_like(y), None, SCALARS, token, 24, True)
    ops, moments = torch.ops.trtkern, torch.rand(2, 3, device=device, dtype=torch.float64)
    weight, bias, mean, var, sums = (*torch.rand(4, 3, device=device), moments.clone())
    held = (weight, bias, mean, var, torch.tensor(1, device=device))
    torch.library.opcheck(ops.batch_norm_lif_statistics, (y, 3, 24, backend))
    forward = (y, None, None, None, *held, 1e-5, None, 3, SCALARS, token, 24, True, None, WANT_SPIKES, backend)
    torch.library.opcheck(ops.batch_norm_lif_forward, forward)
    torch.library.opcheck(ops.batch_norm_lif_finish, (mean + 1, var + 1, *held, 9, 1e-5, 0.1, False, backend))
    torch.library.opcheck(
        ops.batch_norm_lif_finish, (mean, var, weight, bias, None, None, None, 0, 1e-5, 0.1, True, backend)
    )
    numbers = (affine, moments, 9, torch.bfloat16, backend)
    torch.library.opcheck(ops.batch_norm_lif_coefficients, (sums, None, *numbers))
    torch.library.opcheck(torch.ops.trtkern.lif_forward, (*call, None, WANT_SPIKES + WANT_PACKED, backend))
    s, *_, edges, words = torch.ops.trtkern.lif_forward(*call, None, WANT_SPIKES + WANT_PACKED, backend)
    for coefficients, finish, needs in ((None, (moments, 9, torch.float32), 40), (coef, (None, 0, None), 4)):
        backward = (*call, edges, torch.randn_like(s), None, None, coefficients, *finish, needs, backend)
        torch.library.opcheck(torch.ops.trtkern.lif_backward, backward)
    torch.library.opcheck(torch.ops.trtkern.batch_norm_lif_input_grad, (y, y, affine, coef, 24, backend))
    if named(backend).holds("spikes_pack"):
        torch.library.opcheck(torch.ops.trtkern.spikes_pack, (y, backend))
        torch.library.opcheck(torch.ops.trtkern.spikes_unpack, (words, 1, 2, True, torch.bfloat16, backend))


def test_opcheck_of_the_regularizer(backend, device):
    weights = [torch.randn(5, 3, device=device), torch.randn(70, device=device)]
    spec = (4, [1e-5, 0.25, 1e-5])
    if backend == "cuda":
        pytest.skip("the cuda backend holds LIF only")
    torch.library.opcheck(torch.ops.trtkern.regularizer, (weights, *spec, True, backend))
    grads = [torch.randn_like(w) for w in weights]
    torch.library.opcheck(torch.ops.trtkern.regularizer_add_grad_, (weights, grads, *spec, 2.0, backend))


@pytest.mark.parametrize("make", [nn.LIF, nn.IF, nn.PLIF, lambda **k: nn.PLIF(channels=3, **k), nn.LI])
def test_fullgraph(backend, device, make):
    """Inductor has numbers of each kind: none that is learned, one, one a channel; the others' graphs are alike."""
    layer = make(backend=backend).to(device)
    kinds = {"cpu": (nn.LIF, nn.PLIF), "triton": (nn.LIF,)}.get(backend, (make,))
    alike = make in (nn.LIF, nn.IF, nn.PLIF, nn.LI) and make not in kinds
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if alike else "inductor")
    x = torch.randn(5, 2, 3, 4, device=device, requires_grad=True)
    g = torch.randn(5, 2, 3, 4, device=device)
    parameters = list(layer.parameters())
    for t in (x, x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()):
        want = layer(t)
        want_grads = torch.autograd.grad(want, [t, *parameters], g)
        got = compiled(t)
        got_grads = torch.autograd.grad(got, [t, *parameters], g)
        assert torch.equal(got, want)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_flag_is_set_by_compiled_code(backend, device):
    layer = nn.LIF(backend=backend).to(device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    compiled(x)
    assert layer.nonfinite.item() == 0
    with torch.no_grad():
        x[2, 0, 0] = torch.nan
    compiled(x)
    assert layer.nonfinite.item() == 1


@pytest.mark.parametrize("threshold", [0.7, torch.nn.Parameter(torch.tensor(0.7))], ids=["number", "learned"])
def test_what_fires_on_equal_and_hands_out_h_compiles(threshold):
    layers = [nn.LIF(v_threshold=threshold, fire_on_equal=True), nn.LIF(v_threshold=0.3, fire_on_equal=True)]
    at = torch.tensor([0.7, 0.3]).repeat(4, 1, 3).requires_grad_()

    def both(x):
        return [layer(x, return_h=True) for layer in layers]

    got, want = torch.compile(both, fullgraph=True, backend="aot_eager")(at), both(at)
    ours, eager = ([t for made in outputs for t in made] for outputs in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    grads = [torch.autograd.grad(sum(t.square().sum() for t in made), at)[0] for made in (ours, eager)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    assert got[0][0][0].tolist() == [[1, 0] * 3] and got[1][0][0].tolist() == [[1, 1] * 3]


def test_new_sizes_do_not_compile_again():
    layer = nn.LIF()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for timesteps, batch in ((4, 2), (4, 3), (5, 7), (9, 4), (16, 11)):
        x = torch.randn(timesteps, batch, 3, requires_grad=True)
        torch.testing.assert_close(compiled(x), lif(x).spikes)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_the_losses_compile():
    net = torch.nn.Linear(6, 3)
    loss = nn.TRTLoss(net)
    target = torch.tensor([0, 2])
    x = torch.randn(4, 2, 6)

    def step(x, target):
        return loss(net(x), target)

    step(x, target).backward()
    want = net.weight.grad.clone()
    net.zero_grad()
    torch.compile(step, fullgraph=True)(x, target).backward()
    torch.testing.assert_close(net.weight.grad, want)


def network(kind):
    torch.manual_seed(0)
    if kind == "dense":
        return torch.nn.Sequential(torch.nn.Linear(6, 8), nn.LIF(), torch.nn.Linear(8, 5)), (6,)
    if kind == "block":
        return models.ConvSNN((2, 4, 4), [3, "pool"], 5), (2, 4, 4)
    return models.from_topology("CONVAP-4-3-1-1_RES-4-3=3-1=1-1=1_L-5", shape=(2, 8, 8)), (2, 8, 8)


SIZES = [(3, 9), (20, 5), *((2 + 7 * i % 40, 8 + 5 * i % 23) for i in range(1, 19))]
"""20 lengths and batch sizes, above 16 steps and below, of 16 images at least: torch convolves fewer in another way."""


@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_a_whole_model_compiles_twice_for_twenty_lengths_and_batch_sizes(kind):
    """With its loss and its gradients, which are those of eager code. The second has a pooled block besides."""
    model, shape = network(kind)
    loss = nn.TRTLoss(model)

    def step(x, target):
        return loss(model(x), target)

    counter = CompileCounterWithBackend("aot_eager")
    compiled, parameters = torch.compile(step, fullgraph=True, backend=counter), list(model.parameters())
    assert len(set(SIZES)) == 20 and min(t * b for t, b in SIZES) >= 16
    for i, (timesteps, batch) in enumerate(SIZES):
        x, target = 2 * torch.rand(timesteps, batch, *shape), torch.randint(5, (batch,))
        if i % 5 == 1:
            nn.exact_convolutions(model)
            want = step(x, target)
            wanted = torch.autograd.grad(want, parameters)
            nn.exact_convolutions(model, False)
        got = compiled(x, target)
        found = torch.autograd.grad(got, parameters)
        if i % 5 == 1:
            torch.testing.assert_close(got, want)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_a_length_that_changes_alone_first_needs_dynamic_from_the_start():
    model, shape = network("dense")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for timesteps, batch in ((3, 9), (4, 9), (40, 9), (5, 7), (17, 30)):
        x = 2 * torch.rand(timesteps, batch, *shape)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 2


def test_reduce_overhead_gives_what_eager_gives():
    model, shape = network("block")
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    nn.exact_convolutions(model)
    for timesteps in (4, 4, 18):
        x = 2 * torch.rand(timesteps, 5, *shape)
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        parameters = list(model.parameters())
        g = torch.rand_like(want)
        for a, b in zip(torch.autograd.grad(got, parameters, g), torch.autograd.grad(want, parameters, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
