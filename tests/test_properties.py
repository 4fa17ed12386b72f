"""Random shapes, strides and dtypes: whatever comes, a fused backend answers as the reference does."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkern import LIFSpec, lif, surrogates

SMOOTH = ("triangle", "sigmoid", "atan", "fast_sigmoid", "gaussian", "exponential")
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
ATOL = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@st.composite
def problems(draw):
    rank = draw(st.integers(0, 3))
    shape = [draw(st.integers(1, 6)), *(draw(st.sampled_from((1, 2, 3, 5, 7, 8, 13))) for _ in range(rank))]
    steps = draw(st.sampled_from((None, 2, 3)))  # of a slice through a larger tensor
    permutation = draw(st.permutations(range(len(shape))))
    return {
        "shape": shape,
        "permutation": permutation,
        "step": steps,
        "axis": draw(st.integers(0, len(shape) - 1)),
        "gradient": draw(st.sampled_from(("dense", "expanded", "transposed"))),
        "dtype": draw(st.sampled_from(tuple(ATOL))),
        "reset": draw(st.sampled_from(("hard", "soft", "none"))),
        "surrogate": draw(st.sampled_from(SMOOTH)),
        "detach": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def build(p):
    """x in the drawn layout: permuted memory, or every k-th element of an axis, surrounded by NaN."""
    generator = torch.Generator().manual_seed(p["seed"])
    # Currents in sixteenths, decay 1/2: all potentials are exact, so no rounding can move a spike.
    x = torch.randint(-12, 28, p["shape"], generator=generator).to(p["dtype"]) / 16
    order = p["permutation"]
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    if p["step"]:
        axis = p["axis"]
        size = list(x.shape)
        size[axis] *= p["step"]
        base = torch.full(size, torch.nan, dtype=x.dtype)
        view = base[tuple(slice(None, None, p["step"]) if i == axis else slice(None) for i in range(x.dim()))]
        view.copy_(x)
        x = view
    g = torch.randint(-8, 9, x.shape, generator=generator).to(x.dtype) / 8
    if p["gradient"] == "expanded":
        g = torch.full((), 0.5, dtype=x.dtype).expand(x.shape)
    elif p["gradient"] == "transposed":
        g = g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim())))
    return x, g


def test_any_layout_gives_what_the_reference_gives(backend, device):
    # Half of them in Triton's interpreter: the layouts are brought into order before a backend is asked.
    few = settings(SETTINGS, max_examples=20) if backend == "triton" and device == "cpu" else SETTINGS

    @few
    @given(problems())
    def check(p):
        compare(backend, device, p)

    check()


def compare(backend, device, p):
    """Spikes, potentials and the gradient of x, against the reference in float64."""
    x, g = build(p)
    spec = LIFSpec(p["reset"], p["surrogate"], None, p["detach"])
    # A threshold between two sixteenths of what a potential can be at T <= 6.
    options = {"v_threshold": 0.7001, "spec": spec, "return_v": True}
    # Moved as it lies in memory: to() alone would make a strided x contiguous.
    mine = x if device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
    mine = mine.detach().requires_grad_()
    out = lif(mine, backend=backend, **options)
    (gx,) = torch.autograd.grad(out.spikes, mine, g.to(device))
    exact = x.double().requires_grad_()
    want = lif(exact, backend="reference", **options)
    (gx_want,) = torch.autograd.grad(want.spikes, exact, g.double())
    assert torch.equal(out.spikes.detach().cpu().double(), want.spikes.detach())
    scale = max(1.0, gx_want.abs().max().item())
    torch.testing.assert_close(out.v.detach().cpu().double(), want.v.detach(), rtol=0, atol=ATOL[p["dtype"]] * 2)
    torch.testing.assert_close(gx.cpu().double(), gx_want, rtol=0, atol=ATOL[p["dtype"]] * scale)


def test_the_strategy_reaches_every_surrogate_but_the_discontinuous_one():
    assert set(surrogates.BUILTIN) == {*SMOOTH, "rectangle"}
