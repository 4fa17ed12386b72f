"""Every fused backend against the float64 reference: the grid, the layouts and the corner cases."""

import itertools
import math

import pytest
import torch

from trtkern import LIFSpec, lif, nn, surrogates
from trtkern.selftest import Cell, cells, compare
from trtkern.surrogates import maximum

GRID = list(cells(shape=(1, 3, 6)))


def check(backend, cell, device, seed=0):
    errors = compare(backend, cell, device, seed)
    assert errors.within(cell.dtype), f"{cell}: {errors}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("surrogate", surrogates.BUILTIN)
def test_grid(backend, device, share, dtype, surrogate):
    for cell in share(c for c in GRID if c.dtype == dtype and c.surrogate == surrogate):
        check(backend, cell, device)


LAYOUTS = ["contiguous", "channels_last", "strided"]
TIMESTEPS = [1, 5, 16, 17, 40]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_layouts_and_chunks(backend, device, share, layout, timesteps):
    many = 101 if backend == "triton" and device == "cpu" else 1009  # channels, each of which has a program
    dtypes, shapes = (torch.float32, torch.bfloat16), ((1, 1, 1), (2, 3, 5, 7), (1, 4, 4, 4), (1, many))
    grid = itertools.product(dtypes, shapes, ("none", "channel"))
    # In the interpreter the layouts share each number of steps among them: all shapes, dtypes and ways to learn.
    start = TIMESTEPS.index(timesteps) + 2 * LAYOUTS.index(layout)
    for dtype, shape, learnable in share(grid, every=7, start=start):
        if layout == "channels_last" and len(shape) < 3:
            continue
        check(backend, Cell(dtype, "triangle", "soft", False, learnable, timesteps, shape, layout), device)
    check(backend, Cell(torch.float32, "atan", "hard", True, "none", timesteps, (16, 4, 4), layout), device)


def test_a_thousand_steps(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter takes minutes; T = 40 covers the chunks")
    check(backend, Cell(timesteps=1000, shape=(1, 2, 3), learnable="channel"), device)


@pytest.mark.parametrize("timesteps", [1, 7, 16, 17, 33])
def test_potentials_before_the_reset(backend, device, share, timesteps):
    """h, and its gradient into x, v0 and all six parameters, against float64 autograd through the loop."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    grid = itertools.product(dtypes, ("hard", "soft", "none"), (False, True), ("none", "channel"), (7, 16))
    for dtype, reset, detach, learnable, width in share(grid, every=11, start=timesteps):
        shape = (2, 3, width)
        check(backend, Cell(dtype, "atan", reset, detach, learnable, timesteps, shape, returned="h"), device)


def test_potentials_before_the_reset_of_one_neuron(backend, device):
    """By hand: decay 0.5, threshold 1, hard reset to 0; a threshold that is hit exactly does not fire."""
    x = torch.tensor([0.75, 1.0, 0.5, 1.0], device=device).reshape(4, 1, 1).requires_grad_()
    out = lif(x, spec=LIFSpec("hard", "rectangle", 4.0), backend=backend, return_h=True)
    assert out.h.flatten().tolist() == [0.75, 1.375, 0.5, 1.25] and out.spikes.flatten().tolist() == [0, 1, 0, 1]
    assert out.v is None and out.h.stride() == x.stride()
    out.h.sum().backward()
    # Step 3 gives 0.5 to step 2, which hands 0.75 on: not to step 1, which was reset and is 0.375 from the threshold.
    assert x.grad.flatten().tolist() == [1.5, 1.0, 1.5, 1.0]


def test_v_follows_from_h_with_the_same_gradients(backend, device):
    x = (torch.randn(6, 2, 3) + 0.5).to(device).requires_grad_()
    for reset in ("hard", "soft"):
        spec, values = LIFSpec(reset, "sigmoid"), {"v_reset": 0.1, "reset_amount": 0.8, "backend": backend}
        want = lif(x, spec=spec, return_v=True, **values)
        out = lif(x, spec=spec, return_h=True, **values)
        v = (1 - out.spikes) * out.h + out.spikes * 0.1 if reset == "hard" else out.h - 0.8 * out.spikes
        torch.testing.assert_close(v, want.v, rtol=0, atol=1e-6)
        g = torch.randn_like(x)
        got, expected = (torch.autograd.grad(potentials, x, g)[0] for potentials in (v, want.v))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_larger_than_a_block(backend, device, two_threads):
    shape = (1, 7, 147) if backend == "triton" and device == "cpu" else (3, 7, 2011)
    for learnable, timesteps in (("none", 4), ("channel", 18)):
        check(backend, Cell(timesteps=timesteps, shape=shape, learnable=learnable), device)


def test_double_is_taken_by_the_reference():
    for reset, detach in itertools.product(("hard", "soft", "none"), (False, True)):
        check("auto", Cell(torch.float64, "sigmoid", reset, detach, "channel"), "cpu")


def one_neuron(h_first, backend, device, **neuron):
    """Two steps of one neuron whose first potential is h_first exactly."""
    x = torch.tensor([h_first, 0.25], device=device).reshape(2, 1)
    return lif(x, decay=0.5, backend=backend, return_v=True, **neuron)


def test_fires_strictly_above_the_threshold(backend, device):
    threshold = 0.7
    at = torch.tensor(threshold).item()
    above = torch.nextafter(torch.tensor(at), torch.tensor(2.0)).item()
    below = torch.nextafter(torch.tensor(at), torch.tensor(0.0)).item()
    for h, fires in ((at, 0), (above, 1), (below, 0)):
        out = one_neuron(h, backend, device, v_threshold=threshold)
        assert out.spikes[0].item() == fires
        assert out.v[0].item() == (0.0 if fires else h)


@pytest.mark.parametrize("kind", ["number", "tensor", "bfloat16", "channel"])
def test_fires_on_equal_where_it_is_asked_to(backend, device, kind):
    """A potential at the threshold, and the float32 numbers beside it; each on its own channel."""
    at = torch.tensor(0.7) if kind != "bfloat16" else torch.tensor(0.7).bfloat16().float()
    ends = torch.tensor([2.0, 0.0])
    x = torch.stack((at, *torch.nextafter(at.expand(2), ends))).reshape(1, 1, 3).to(device)
    held = {"number": at.item(), "bfloat16": at.to(device, torch.bfloat16), "tensor": at.to(device)}
    threshold = held.get(kind, at.repeat(3).to(device))
    if kind != "number":
        threshold.requires_grad_()
    for name in ("reference", backend):
        for on_equal, fires in ((True, [1, 1, 0]), (False, [0, 1, 0])):
            values = {"v_threshold": threshold, "fire_on_equal": on_equal, "backend": name, "spec": LIFSpec("soft")}
            out = lif(x, **values, return_state=True)
            assert out.spikes.flatten().tolist() == fires
            # What a soft reset subtracts is the threshold itself.
            want = (x - at.to(device) * out.spikes).flatten()
            assert torch.equal(out.state.flatten(), want)
            if kind != "number":
                (got,) = torch.autograd.grad(out.spikes.sum(), threshold)
                assert got.dtype == threshold.dtype and got.float().sum().item() == pytest.approx(-3, rel=1e-2)


def test_fires_on_equal_in_double_and_behind_a_norm(backend, device):
    x = torch.tensor([0.7, math.nextafter(0.7, 0)], dtype=torch.float64).reshape(1, 1, 2)
    assert lif(x, v_threshold=0.7, fire_on_equal=True).spikes.flatten().tolist() == [1, 0]
    # y of mean 0 and variance 1, but for eps = 2**-20: what goes into the neuron is weight * y / sqrt(1 + eps).
    y = torch.tensor([1.0, -1.0]).repeat(2, 1).reshape(2, 2, 1, 1).to(device)
    for on_equal in (False, True):
        layer = nn.BatchNormLIF(1, backend=backend, fire_on_equal=on_equal, decay=0.0).to(device).eval()
        layer.running_var.fill_(1 - layer.eps)
        assert layer(y).flatten().tolist() == [1.0 * on_equal, 0.0] * 2
    assert "fire_on_equal=True" in repr(layer)


@pytest.mark.parametrize("reset", ["hard", "soft", "none"])
@pytest.mark.parametrize("surrogate", surrogates.BUILTIN)
def test_nan_stays_in_its_neuron(backend, device, reset, surrogate):
    clean = torch.randn(6, 1, 3, 5)
    x = clean.clone()
    x[2, 0, 1, 3] = torch.nan
    spec = LIFSpec(reset, surrogate)
    results = {}
    for name, current in (("clean", clean), ("nan", x)):
        current = current.to(device).requires_grad_()
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        out = lif(current, spec=spec, backend=backend, return_v=True, flag=flag)
        (out.spikes.sum() + out.v.sum()).backward()
        results[name] = [t.detach().cpu() for t in (out.spikes, out.v, current.grad)]
        assert flag.item() == (name == "nan")
    spikes, v, gx = results["nan"]
    assert (spikes[2:, 0, 1, 3] == 0).all()
    assert v[2:, 0, 1, 3].isnan().all()
    assert gx[:, 0, 1, 3].isnan().all()
    others = torch.ones(6, 1, 3, 5, dtype=torch.bool)
    others[:, 0, 1, 3] = False
    for got, want in zip(results["nan"], results["clean"], strict=True):
        assert torch.equal(got[others], want[others])


def test_infinity_fires_and_stays_in_its_neuron(backend, device):
    clean = torch.randn(4, 2, 3, 5)
    x = clean.clone()
    x[1, 0, 0, 0], x[1, 0, 0, 1] = torch.inf, -torch.inf
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    out = lif(x.to(device), backend=backend, return_v=True, flag=flag)
    want = lif(clean, backend="reference", return_v=True)
    assert flag.item() == 1
    assert out.spikes[1, 0, 0, 0] == 1 and out.v[1, 0, 0, 0] == 0
    assert (out.spikes[1:, 0, 0, 1] == 0).all() and out.v[1, 0, 0, 1] == -torch.inf
    assert torch.equal(out.spikes.cpu().flatten(1)[:, 2:], want.spikes.flatten(1)[:, 2:])


BEYOND = {torch.float16: (4e4, 2.0), torch.bfloat16: (torch.finfo(torch.bfloat16).max, 1.003)}
"""An input, and a gain that takes it beyond what the dtype holds, though not beyond float32."""


@pytest.mark.parametrize("returned", ["v", "h"])
@pytest.mark.parametrize("dtype", BEYOND, ids=str)
def test_a_returned_potential_that_overflows_raises_the_flag(backend, device, dtype, returned):
    """h is finite; as it is returned it is not. It is the last neuron's of an odd row, at the last step."""
    current, much = BEYOND[dtype]
    spec = LIFSpec("none" if returned == "v" else "hard")
    for name, steps, gain in itertools.product(("reference", backend), (1, 5, 18), (1.0, much)):
        x = torch.zeros(steps, 1, 19, dtype=dtype, device=device)
        x[-1, 0, -1] = current
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        out = lif(x, gain=gain, spec=spec, backend=name, flag=flag, **{f"return_{returned}": True})
        assert flag.item() == getattr(out, returned)[-1, 0, -1].isinf() == (gain == much)
        lif(x, gain=gain, spec=spec, backend=name, flag=flag.zero_(), return_state=True)
        assert flag.item() == 0  # nothing that was written has overflowed


def test_a_state_that_overflows_raises_the_flag(backend, device):
    """After a soft reset that adds: h is finite, v is not."""
    values = {"spec": LIFSpec("soft"), "reset_amount": -3e38}
    for name in ("reference", backend):
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        x = torch.zeros(2, 1, 19, device=device)
        x[-1, 0, -1] = 3e38
        lif(x, backend=name, flag=flag, **values)
        assert flag.item() == 0
        assert lif(x, backend=name, flag=flag, return_state=True, **values).state[0, -1].isinf() and flag.item() == 1


def test_two_runs_are_bitwise_equal(backend, device):
    cell = Cell(learnable="channel", shape=(4, 5, 33), timesteps=18)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        x = torch.randn(cell.timesteps, *cell.shape, device=device, requires_grad=True)
        decay = torch.full((5,), 0.6, device=device, requires_grad=True)
        out = lif(x, decay=decay, backend=backend, return_v=True)
        (out.spikes * torch.randn_like(x) + out.v).sum().backward()
        runs.append((out.spikes.detach(), out.v.detach(), x.grad, decay.grad))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_forward_and_recompute_see_the_same_spikes(backend, device):
    """With the rectangle and a detached reset gx is alpha * gs exactly where |u| < 0.5: a spike recomputed on the other
    side of the threshold would move the carried gradient."""
    x = (torch.randn(20, 1, 4, 50) * 0.3 + 0.5).to(device).requires_grad_()
    out = lif(x, decay=0.9, spec=LIFSpec("hard", "rectangle", None, True), backend=backend, return_v=True)
    out.v.backward(torch.ones_like(out.v))
    # gv[t] = 1 + decay * gv[t+1] * (1 - s[t+1]) and gx[t] = gv[t] * (1 - s[t])
    gv = torch.ones_like(out.v[0])
    for t in reversed(range(20)):
        gx = gv * (1 - out.spikes[t].detach())
        torch.testing.assert_close(x.grad[t], gx, rtol=1e-6, atol=0)
        gv = 1 + 0.9 * gx


def test_a_sequence_in_two_pieces_is_the_whole(backend, device):
    x = torch.randn(8, 2, 3, 5, device=device)
    whole = lif(x, backend=backend, return_state=True)
    first = lif(x[:3], backend=backend, return_state=True)
    second = lif(x[3:], first.state, backend=backend, return_state=True)
    assert torch.equal(whole.spikes, torch.cat((first.spikes, second.spikes)))
    assert torch.equal(whole.state, second.state)


def test_gradient_through_the_state_alone(backend, device):
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    want = torch.randn(5, 2, 3)
    want = x.detach().cpu().double().requires_grad_()
    lif(x, backend=backend, return_state=True).state.square().sum().backward()
    lif(want, backend="reference", return_state=True).state.square().sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), want.grad, rtol=1e-5, atol=1e-6)


def test_expanded_and_transposed_gradients(backend, device):
    x = torch.randn(4, 2, 3, 5, device=device, requires_grad=True)
    lif(x, backend=backend).spikes.sum().backward()
    want = torch.autograd.grad(lif(x, backend=backend).spikes, x, torch.ones(4, 2, 3, 5, device=device))[0]
    assert torch.equal(x.grad, want)
    g = torch.randn(5, 3, 2, 4, device=device)
    got = torch.autograd.grad(lif(x, backend=backend).spikes, x, g.permute(3, 2, 1, 0))[0]
    want = torch.autograd.grad(lif(x, backend=backend).spikes, x, g.permute(3, 2, 1, 0).contiguous())[0]
    assert torch.equal(got, want)


def test_outputs_keep_the_layout_of_the_input(backend, device):
    x = torch.randn(4, 2, 5, 5, 3, device=device).permute(0, 1, 4, 2, 3)
    out = lif(x, backend=backend, return_state=True, return_v=True)
    assert out.spikes.stride() == out.v.stride() == x.stride()
    assert out.state.stride() == x.stride()[1:]


def test_no_neurons_give_no_spikes(backend, device):
    x = torch.randn(4, 0, 3, device=device, requires_grad=True)
    out = lif(x, decay=torch.tensor(0.5, device=device, requires_grad=True), backend=backend, return_state=True)
    out.spikes.sum().backward()
    assert out.spikes.shape == (4, 0, 3) and out.state.shape == (0, 3) and x.grad.shape == x.shape


def steep(u, alpha):
    return maximum(alpha - abs(u), 0.0) * 2.0


def test_a_users_surrogate_runs_or_is_refused_by_name(backend, device):
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    spec = LIFSpec(surrogate=steep)
    if backend in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="steep"):
            lif(x, spec=spec, backend=backend)
        assert lif(x, spec=spec).spikes.shape == x.shape
        return
    lif(x, spec=spec, backend=backend).spikes.sum().backward()
    want = x.detach().cpu().double().requires_grad_()
    lif(want, spec=spec, backend="reference").spikes.sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), want.grad, rtol=1e-5, atol=1e-6)
