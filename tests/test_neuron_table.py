"""Every neuron of the table, its derived backward pass and each backend, against float64 autograd of the plain loop."""

import itertools
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import DEVICE, FUSED

from trtkern import LIFSpec, adjoint, neurons, reference, surrogates
from trtkern.expressions import rebind
from trtkern.neurons import CENTERS
from trtkern.ops.lif import neuron as neuron_op
from trtkern.ops.lif import wanted
from trtkern.selftest import Cell, NormCell, compare, compare_norm

ROWS = [(name, reset) for name, row in neurons.TABLE.items() for reset in row.settle]
BACKENDS = ["reference", *FUSED]
LONG = ("LIF", "QIF", "CUBALIF", "Izhikevich")
"""With one state and with two; whose gradients depend on the state before (QIF, Izhikevich), and whose do not."""
HALVES = (torch.bfloat16, torch.float16)
OTHERS = [name for name in neurons.TABLE if name != "LIF"]


def check(backend, device, *cells):
    """Each cell inside its bounds; of a backend whose interpreter is slow, small ones."""
    for cell in cells:
        normed = isinstance(cell, NormCell)
        errors = (compare_norm if normed else compare)(backend, cell, device)
        assert errors.within(cell.dtype), f"{cell}: {errors}"


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return DEVICE[backend]


@pytest.mark.parametrize(("name", "reset"), ROWS)
def test_every_neuron_and_reset(backend, device, name, reset):
    size = {"timesteps": 5, "shape": (2, 3, 4), "neuron": name, "reset": reset}
    check(
        backend, device,
        Cell(surrogate="sigmoid", learnable="channel", **size),
        Cell(surrogate="sigmoid", detach_reset=True, returned="h", **size),
        Cell(HALVES[len(reset) % 2], "atan", learnable="scalar", **size),
    )  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_sequences(backend, device, name):
    """Chunks of 16 steps, of a neuron with two states 8: on the edge of one, one more, several."""
    steps = (1, 9, 17) if backend == "triton" else (1, 7, 8, 9, 16, 17, 33)
    reset = next(iter(neurons.TABLE[name].settle))
    for t in steps:
        check(backend, device, Cell(surrogate="atan", reset=reset, timesteps=t, shape=(1, 2, 3), neuron=name))


@pytest.mark.parametrize("surrogate", surrogates.BUILTIN)
def test_surrogates(backend, device, surrogate):
    """At the distance from a threshold that moves."""
    check(backend, device, Cell(surrogate=surrogate, timesteps=4, shape=(2, 2, 3), neuron="ALIF"))


@pytest.mark.parametrize("name", OTHERS)
def test_behind_batch_norm(backend, device, name):
    """With a residual, packed, pooled, of a static image, with channels on the last axis, in half precision."""
    common = {"neuron": name, "reset": "soft", "surrogate": "atan"}
    cells = [
        NormCell(learnable="channel", timesteps=9, shape=(2, 3, 5), residual="packed", **common),
        NormCell(torch.bfloat16, timesteps=3, shape=(2, 3, 4, 6), pool=True, returned="h", **common),
        NormCell(torch.float16, timesteps=3, shape=(2, 3, 4, 6), training=False, residual="dense", **common),
        NormCell(learnable="scalar", timesteps=3, shape=(2, 3, 4, 6), pool=True, static=True, **common),
        NormCell(timesteps=3, shape=(7, 4, 5), last=True, **common),
    ]
    # Triton's interpreter takes half a second for each; what its kernels do with a norm does not depend on the neuron.
    check(backend, device, *(cells[len(name) % 5 :][:1] if backend == "triton" else cells))


def test_whole_vectors_and_odd_ends_on_the_cpu():
    """Rows that are longer than a block, that are no multiple of a vector, and that are streamed past the caches."""
    if "cpu" not in FUSED:
        pytest.skip("the cpu backend is not here")
    extension = import_module("trtkern._cpu")
    extension.stream_from(1)
    try:
        for name, dtype in zip(OTHERS, itertools.cycle((torch.float32, *HALVES))):
            for shape in ((2, 3, 1009), (1, 2, 5000)):
                for learnable, layout in (("channel", "contiguous"), ("none", "channels_last")):
                    cell = Cell(dtype, "atan", "soft", learnable=learnable, timesteps=3, shape=shape, neuron=name)
                    check("cpu", "cpu", replace(cell, layout=layout))
    finally:
        extension.stream_from(4 << 20)


@pytest.mark.parametrize("name", ["LIF", "ALIF"])
def test_what_is_no_number_has_no_gradient_that_is_one(backend, device, name):
    """Also where the surrogate is 0: from step 1 on the potential is NaN, or the adaptation of the threshold is."""
    spec = LIFSpec("soft", "rectangle", 1.0, False, name)
    x = torch.randn(3, 2, 3, 4, device=device)
    state = torch.zeros(*[2] * (name == "ALIF"), 2, 3, 4, device=device)
    (state[1] if name == "ALIF" else x[1])[0, 0, 1] = torch.nan
    x.requires_grad_()
    values = {name: CENTERS[name] for name in spec.row.params}
    out = neuron_op(x, state, values, spec, wanted(True, False, False, False), backend)
    (gx,) = torch.autograd.grad(out.spikes.sum(), x)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[:, 0, 0, 1] = True
    if name == "LIF":
        assert torch.isnan(gx[:2][bad[:2]]).all()
        bad[2] |= torch.isnan(gx[2])
    assert torch.equal(torch.isnan(gx), bad)


@pytest.mark.parametrize(("name", "reset"), ROWS)
@pytest.mark.parametrize("detach", [False, True])
def test_the_derived_backward_pass(name, reset, detach):
    """Step by step in float64, against autograd through the loop."""
    spec = LIFSpec(reset, "sigmoid", 2.0, detach, name)
    row, steps, draw = spec.row, 7, torch.Generator().manual_seed(1)
    x = torch.randn(steps, 2, 3, generator=draw) + 0.5
    state = 0.3 * torch.randn(*[len(row.states)] * (len(row.states) > 1), 2, 3, generator=draw)
    params = {each: CENTERS[each] + 0.1 * torch.rand(3, generator=draw) for each in row.params}
    gs, gv, gh = (torch.randn(x.shape, generator=draw).double() for _ in range(3))
    g_final = torch.randn(state.shape, generator=draw).double()
    leaves = [t.double().requires_grad_() for t in (x, state, *params.values())]
    trace = reference.lif(leaves[0], leaves[1], leaves[2:], spec)
    want = torch.autograd.grad(
        [trace.s, trace.v, trace.h, trace.state], leaves, [gs, gv, gh, g_final], materialize_grads=True
    )

    names = {
        **reference.NAMES,
        "where": lambda c, a, b: torch.where(c, *(torch.as_tensor(t).double() for t in (a, b))),
    }
    fired_back, charge_back = (rebind(f, names) for f in adjoint.functions(name, reset, detach))
    charge, fire, settle = (rebind(f, names) for f in (row.charge, row.fire, row.settle[reset]))
    p = [t.double() for t in params.values()]
    before = [tuple(state.double().unbind(0)) if len(row.states) > 1 else (state.double(),)]
    traces = []
    for current in x.double():
        traces.append(charge(current, before[-1], p))
        potential, threshold = fire(traces[-1], p)
        before.append(settle(traces[-1], potential > threshold, p))
    g = list(g_final.unbind(0)) if len(row.states) > 1 else [g_final]
    sums, gx = tuple(torch.zeros(x.shape[1:]).double() for _ in p), []
    for t in reversed(range(steps)):
        g[row.membrane] = g[row.membrane] + gv[t]
        potential, threshold = fire(traces[t], p)
        slope = reference.surrogate_derivative(potential - threshold, spec.surrogate, spec.alpha)
        g_trace, sums = fired_back(traces[t], p, g, gs[t], slope, sums)
        g_trace = [each + gh[t] if i == row.potential else each for i, each in enumerate(g_trace)]
        found, g, sums = charge_back(x[t].double(), before[t], p, g_trace, sums)
        g = list(g)
        gx.append(found)
    got = [torch.stack(gx[::-1]), torch.stack(g) if len(g) > 1 else g[0], *(each.sum(0) for each in sums)]
    for name, found, wanted_ in zip(("x", "state", *row.params), got, want, strict=True):
        assert (found - wanted_).abs().max() <= 1e-6 * (1e-3 + wanted_.abs().max()), name


def test_a_reset_that_a_neuron_does_not_have():
    with pytest.raises(
        ValueError, match="LIFSpec: expected the reset of CLIF to be soft, got 'hard', which this neuron"
    ):
        LIFSpec("hard", neuron="CLIF")


def test_an_unknown_neuron():
    with pytest.raises(ValueError, match="CUBALIF"):
        LIFSpec(neuron="CUBLIF")


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 3)])
def test_a_state_of_another_count(shape):
    spec = LIFSpec(neuron="ALIF")
    values = {name: CENTERS[name] for name in spec.row.params}
    with pytest.raises(ValueError, match=r"alif: expected v0 of shape \(2, 2, 3\).*after an axis for v, a"):
        neuron_op(torch.zeros(4, 2, 3), torch.zeros(shape), values, spec, wanted(True, False, False, False))


def test_every_row_has_v_h_and_a_threshold():
    for name, row in neurons.TABLE.items():
        assert row.name == name and "v" in row.states and "h" in row.trace and "v_threshold" in row.params
        assert len(row.trace) in (1, 2), "a chunk keeps 16 numbers of traces"
    assert {*CENTERS} == {*itertools.chain.from_iterable(row.params for row in neurons.TABLE.values())}
    resets = itertools.chain.from_iterable(row.settle for row in neurons.TABLE.values())
    assert {*resets} == {"hard", "soft", "none"}
