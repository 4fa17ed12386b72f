"""BatchNorm + LIF on every backend against float64, and the layer against torch's BatchNorm and the LIF layer."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import trtkern
from trtkern import nn as snn
from trtkern import surrogates
from trtkern.backends import named
from trtkern.selftest import NormCell, compare_norm, norm_cells

GRID = list(norm_cells(shape=(2, 3, 5)))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _holds(backend):
    if not named(backend).holds("batch_norm_lif"):
        pytest.fail(f"{backend} does not hold batch_norm_lif")


def check(backend, cell, device, seed=0):
    errors = compare_norm(backend, cell, device, seed)
    assert errors.within(cell.dtype), f"{cell}: {errors}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", surrogates.BUILTIN)
def test_grid(backend, device, share, dtype, surrogate):
    for cell in share((c for c in GRID if c.dtype == dtype and c.surrogate == surrogate), every=11):
        check(backend, cell, device)


def possible(cases, layout, timesteps):
    """Those with channels_last memory and with statistics of more than one number, where these are asked for."""
    for dtype, shape, residual, option in cases:
        count = timesteps * torch.Size(shape).numel() // shape[-1 if layout == "last" else 1]
        if (layout != "channels_last" or len(shape) >= 3) and (count > 1 or option is False):
            yield dtype, shape, residual, option


LAYOUTS = ["contiguous", "channels_last", "strided", "last"]
TIMESTEPS = [1, 5, 16, 17, 40]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_layouts_and_chunks(backend, device, share, layout, timesteps):
    many, several = (37, 5) if backend == "triton" and device == "cpu" else (1009, 33)  # channels
    shapes = ((2, 1, 3), (2, 3, 5, 7), (1, 4, 4, 4), (2, many), (1, several, 17))
    # Every third of them: 3 divides no axis, so every value of each stays in.
    grid = list(itertools.product((torch.float32, torch.bfloat16), shapes, ("none", "dense"), (True, False)))[::3]
    # In the interpreter one each, another one for each layout and number of steps.
    start = 3 * TIMESTEPS.index(timesteps) + 4 * LAYOUTS.index(layout)
    cases = list(possible(grid, layout, timesteps))
    for dtype, shape, residual, training in share(cases, every=len(cases), start=start):
        memory = "contiguous" if layout == "last" else layout
        options = {"training": training, "residual": residual, "last": layout == "last"}
        check(backend, NormCell(dtype, timesteps=timesteps, shape=shape, layout=memory, **options), device)


POOLED_TIMESTEPS = [1, 4, 7, 16, 19]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("timesteps", POOLED_TIMESTEPS)
def test_pooling(backend, device, share, layout, timesteps):
    shapes = ((2, 3, 4, 6), (1, 16, 2, 4), (1, 1, 2, 2), (2, 5, 7, 4), (1, 4, 5, 3))
    grid = list(itertools.product((torch.float32, torch.bfloat16), shapes, ("none", "dense"), ("none", "channel")))[::3]
    # In the interpreter one each, in which all shapes of even height and width come, at T > 7 these alone.
    start = 8 + 9 * POOLED_TIMESTEPS.index(timesteps) + 7 * LAYOUTS.index(layout)
    cases = list(possible(grid, layout, timesteps))
    for dtype, shape, residual, learnable in share(cases, every=len(cases), start=start):
        cell = NormCell(dtype, "triangle", "soft", False, learnable, timesteps, shape, layout, pool=True)
        check(backend, NormCell(**{**vars(cell), "residual": residual}), device)


def test_static_input_is_read_as_it_is(backend, device):
    for timesteps, layout, residual, pool in ((4, "contiguous", "none", True), (6, "channels_last", "dense", False)):
        cell = NormCell(timesteps=timesteps, shape=(2, 4, 4, 6), layout=layout, static=True)
        check(backend, NormCell(**{**vars(cell), "residual": residual, "pool": pool}), device)
    check(backend, NormCell(timesteps=18, shape=(2, 3, 5), static=True, learnable="channel"), device)


def test_larger_than_a_block(backend, device, two_threads):
    small = backend == "triton" and device == "cpu"
    sizes = ((1, 3, 311), (1, 101, 7)) if small else ((1, 7, 2011), (1, 4001, 7))
    for shape, last in zip(sizes, (False, True), strict=True):
        for learnable, timesteps in (("none", 4), ("channel", 18)):
            check(backend, NormCell(timesteps=timesteps, shape=shape, learnable=learnable, last=last), device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_survive_a_large_mean_and_an_outlier(backend, device, layout):
    """A variance as E[y^2] - mean^2 loses all digits here; so does one shifted by a first value far off."""
    y = torch.randn(4, 2, 3, 6, 8) * 1e-2 + torch.tensor([1e4, -3e3, 2.0]).view(3, 1, 1)
    y[0, 0, 2, 0, 0] = 3e4
    if layout == "channels_last":
        y = y.movedim(2, -1).contiguous().movedim(-1, 2)
    layer = snn.BatchNormLIF(3, momentum=1.0, backend=backend).to(device)
    layer(y.to(device))
    want_var, want_mean = torch.var_mean(y.double(), (0, 1, 3, 4))
    torch.testing.assert_close(layer.running_mean.double().cpu(), want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var.double().cpu(), want_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_are_torchs(backend, device, momentum):
    layer = snn.BatchNormLIF(5, momentum=momentum, backend=backend).to(device)
    twin = torch.nn.BatchNorm2d(5, momentum=momentum)
    for seed in range(4):
        y = torch.randn(3, 2, 5, 4, 4) * (1 + seed) + seed
        layer(y.to(device))
        twin(y.flatten(0, 1))
    state = {name: value.cpu() for name, value in layer.state_dict().items()}
    torch.testing.assert_close(state, dict(twin.state_dict()), rtol=1e-5, atol=1e-6)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(y.to(device))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_without_affine_or_running_statistics(backend, device):
    y = torch.randn(4, 2, 3, 5, 5)
    for options in ({"affine": False}, {"track_running_stats": False}):
        layer, twin = snn.BatchNormLIF(3, backend=backend, **options).to(device), torch.nn.BatchNorm2d(3, **options)
        for training in (True, False):
            layer.train(training), twin.train(training)
            mine, theirs = y.clone().to(device).requires_grad_(), y.double().requires_grad_()
            layer(mine).sum().backward()
            x = twin.double()(theirs.flatten(0, 1)).unflatten(0, (4, 2))
            trtkern.lif(x, backend="reference").spikes.sum().backward()
            torch.testing.assert_close(mine.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_nonfinite_statistics_raise_the_flag_and_change_nothing(backend, device):
    layer = snn.BatchNormLIF(3, backend=backend).to(device)
    y = torch.randn(4, 2, 3, 5, 5, device=device)
    clean = layer(y)
    before = copy.deepcopy(layer.state_dict())
    assert layer.nonfinite.item() == 0
    y[1, 0, 1, 2, 2] = torch.nan
    spikes = layer(y)
    assert layer.nonfinite.item() == 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert (spikes[:, :, 1] == 0).all() and torch.equal(spikes[:, :, [0, 2]], clean[:, :, [0, 2]])
    with trtkern.debug(), pytest.raises(RuntimeError, match="batch_norm_lif: expected finite"):
        layer(y)


def test_two_runs_are_bitwise_equal(backend, device):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        layer = snn.BatchNormLIF(7, backend=backend, pool=2, neuron=snn.PLIF, channels=7).to(device)
        y = torch.randn(18, 2, 7, 6, 10, device=device, requires_grad=True)
        s = layer(y)
        (s * torch.randn_like(s)).sum().backward()
        runs.append((s.detach(), y.grad, *(p.grad for p in layer.parameters()), layer.running_var))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_gradients_are_those_of_the_unfused_layers(backend, device):
    """BatchNorm, then LIF with learned decays, in training and in evaluation, as users have them."""
    torch.manual_seed(1)
    layer = snn.BatchNormLIF(4, neuron=snn.PLIF, channels=4, v_leak=0.2, backend=backend).to(device)
    norm, lif = torch.nn.BatchNorm2d(4).double(), snn.PLIF(channels=4, v_leak=0.2, backend="reference").double()
    for training in (True, False):
        layer.train(training), norm.train(training)
        y = torch.randn(5, 2, 4, 6, 6)
        mine, theirs = y.clone().to(device).requires_grad_(), y.double().requires_grad_()
        g = torch.randn(5, 2, 4, 6, 6)
        layer.zero_grad(), norm.zero_grad(), lif.zero_grad()
        layer(mine).backward(g.to(device))
        lif(norm(theirs.flatten(0, 1)).unflatten(0, (5, 2))).backward(g.double())
        pairs = [(mine, theirs), (layer.weight, norm.weight), (layer.bias, norm.bias), (layer.lif.w, lif.w)]
        for a, b in pairs:
            torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-4, atol=2e-5 * b.grad.abs().max().item())


def test_expanded_and_transposed_gradients(backend, device):
    y = torch.randn(4, 2, 4, 6, 6, device=device, requires_grad=True)
    for pool in (1, 2):
        layer = snn.BatchNormLIF(4, pool=pool, backend=backend).to(device)
        side = 6 // pool
        (got,) = torch.autograd.grad(layer(y).sum(), y)
        (want,) = torch.autograd.grad(layer(y), y, torch.ones(4, 2, 4, side, side, device=device))
        assert torch.equal(got, want)
        g = torch.randn(side, side, 4, 2, 4, device=device)
        (got,) = torch.autograd.grad(layer(y), y, g.permute(4, 3, 2, 1, 0))
        (want,) = torch.autograd.grad(layer(y), y, g.permute(4, 3, 2, 1, 0).contiguous())
        assert torch.equal(got, want)


def test_a_sequence_in_two_pieces_is_the_whole(backend, device):
    layer = snn.BatchNormLIF(3, backend=backend).to(device).eval()
    y = torch.randn(8, 2, 3, 5, device=device) * 2
    whole, state = layer(y, return_state=True)
    first, middle = layer(y[:3], return_state=True)
    second, last = layer(y[3:], None, middle, return_state=True)
    assert torch.equal(whole, torch.cat((first, second))) and torch.equal(state, last)


def test_half_precision_layers(backend, device):
    layer = snn.BatchNormLIF(3, backend=backend).to(device, torch.bfloat16)
    y = torch.randn(4, 2, 3, 5, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(y).sum().backward()
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.bfloat16 and y.grad.isfinite().all()


def test_second_derivatives_are_refused(backend, device):
    layer = snn.BatchNormLIF(3, backend=backend).to(device)
    y = torch.randn(4, 2, 3, 5, device=device, requires_grad=True)
    (gy,) = torch.autograd.grad(layer(y).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_lif: expected a first derivative"):
        gy.sum().backward()


def block(backend, device, checkpoint):
    torch.manual_seed(0)
    layers = [
        snn.ConvBatchNormLIF(
            snn.SpikeConv2d(cin, cout, 3, padding=1, bias=False),
            snn.BatchNormLIF(cout, pool=pool, packed=True, neuron=snn.PLIF, backend=backend),
            checkpoint=checkpoint,
        )
        for cin, cout, pool in ((2, 4, 1), (4, 4, 2), (4, 6, 1))
    ]
    return torch.nn.ModuleList(layers).to(device)


@pytest.mark.parametrize("static", [False, True])
def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(backend, device, static):
    found = []
    for checkpoint in (False, True):
        layers = block(backend, device, checkpoint)
        image = torch.rand(1 if static else 4, 2, 2, 8, 8, device=device).expand(4, -1, -1, -1, -1)
        kept: dict[int, int] = {}

        def keep(t, kept=kept, layers=layers):
            if not any(t.data_ptr() == p.data_ptr() for p in layers.parameters()):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = image
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = layers[0](x)
            residual = x
            x = layers[1](x)
            x = layers[2](x)
            del residual
        (x.spikes.sum(0) * torch.randn(2, 6, 4, 4, device=device)).sum().backward()
        state = {name: value for name, value in layers.state_dict().items() if "running" in name or "tracked" in name}
        found.append(([p.grad for p in layers.parameters()], state, sum(kept.values()), x.spikes.detach()))
    (grads, state, kept, spikes), (again, other_state, less, same) = found
    assert torch.equal(spikes, same)
    for a, b in zip(grads, again, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
    assert less < 0.75 * kept, (less, kept)


def test_fullgraph_and_no_recompiles(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter cannot be compiled")
    torch._dynamo.reset()
    layer = snn.BatchNormLIF(11, pool=2, backend=backend).to(device)
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for steps, batch in ((4, 2), (5, 3), (6, 4)):
        y = torch.randn(steps, batch, 11, 6, 6, device=device)
        mine, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
        compiled(mine).sum().backward()
        eager(theirs).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.running_var, eager.running_var)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["spikes", "packed", "any"])
def test_a_residual_in_float32_under_autocast(backend, device, kind):
    """y is in bfloat16 there; the residual is cast to it, and its gradient comes in its own dtype."""
    conv, x = torch.nn.Conv2d(3, 3, 3, padding=1).to(device), torch.randn(8, 3, 6, 6, device=device)
    layer = snn.BatchNormLIF(3, surrogate="atan", backend=backend).to(device)
    if kind == "any":
        residual = torch.randn(4, 2, 3, 6, 6, device=device, requires_grad=True)
        given, held = residual, residual.detach().bfloat16()
    else:
        made = snn.LIF(packed=True, backend=backend).to(device)(torch.randn(4, 2, 3, 6, 6, device=device) + 1)
        residual = made.spikes.clone().requires_grad_()
        given, held = residual if kind == "spikes" else snn.Spikes(residual, made.words), made.spikes
    with torch.autocast(device, torch.bfloat16):
        y = conv(x).unflatten(0, (4, 2))
        got = layer(y, given)
    assert y.dtype == got.dtype == torch.bfloat16
    g = torch.randn(got.shape, device=device).bfloat16()
    (grad,) = torch.autograd.grad(got, residual, g)
    assert grad.dtype == torch.float32
    exact = held.double().cpu().requires_grad_()
    want = snn.BatchNormLIF(3, surrogate="atan").double()(y.detach().double().cpu(), exact)
    assert torch.equal(got.double().cpu(), want)
    (expected,) = torch.autograd.grad(want, exact, g.double().cpu())
    torch.testing.assert_close(grad.double().cpu(), expected, rtol=2**-8, atol=1e-3)
    # BatchNorm, an addition and a neuron promote: the same but for what bfloat16 rounds of BatchNorm's output.
    with torch.autocast(device, torch.bfloat16):
        promoted = torch.nn.BatchNorm2d(3).to(device)(y.detach().flatten(0, 1)).unflatten(0, (4, 2)) + residual.detach()
    assert promoted.dtype == torch.float32
    assert (snn.LIF().to(device)(promoted) == got).float().mean() > 0.97


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.float16), (torch.float64, torch.float32)])
def test_a_narrower_residual_is_cast_exactly(wide, narrow):
    y, residual = torch.randn(4, 2, 3, 6, 6).to(wide), torch.randn(4, 2, 3, 6, 6).to(narrow)
    for make in (lambda: snn.BatchNormLIF(3), lambda: snn.unfuse(snn.BatchNormLIF(3))):
        layer = make().to(wide)
        assert torch.equal(layer(y, residual), layer(y, residual.to(wide)))


def test_what_batch_norm_lif_was_unfused_into_gives_the_same_dtype():
    y, residual = torch.randn(4, 2, 3, 6, 6).bfloat16(), torch.randn(4, 2, 3, 6, 6)
    assert snn.unfuse(snn.BatchNormLIF(3))(y, residual).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_weight_or_bias_alone(backend, device, absent, dtype, training):
    """One of the two is left: in its own type, and not dense in memory."""
    y, found = torch.randn(4, 2, 3, 4, 4, device=device), []
    wide = torch.tensor([0.5, 9.0, 1.5, 9.0, 1.0, 9.0], device=device).to(dtype)
    for name in (backend, "reference"):
        layer = snn.BatchNormLIF(3, backend=name).to(device).train(training)
        left = "bias" if absent == "weight" else "weight"
        setattr(layer, absent, None)
        setattr(layer, left, torch.nn.Parameter(wide[::2]))
        assert not getattr(layer, left).is_contiguous()
        x = y.clone().requires_grad_()
        s = layer(x)
        s.backward(torch.linspace(-1, 1, s.numel(), device=device).view_as(s))
        found.append((s, x.grad, getattr(layer, left).grad))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
