"""Every neuron of the table, its derived backward pass and each backend, against float64 autograd of the plain loop."""

import itertools

import pytest
import torch

from trtkern import LIFSpec, adjoint, neurons, reference, surrogates
from trtkern.expressions import rebind
from trtkern.ops.lif import neuron as neuron_op
from trtkern.ops.lif import wanted
from trtkern.selftest.lif import MARGIN, PARAMETER_TOLERANCE, TOLERANCE

ROWS = [(name, reset) for name, row in neurons.TABLE.items() for reset in row.settle]

CENTERS = {
    "decay": 0.6, "gain": 0.5, "bias": 0.1, "reset_amount": 0.8, "v_threshold": 0.9, "v_reset": 0.1, "decay_syn": 0.4,
    "gain_syn": 0.9, "decay_a": 0.8, "gain_a": 0.7, "beta": 0.6, "decay_w": 0.7, "a": 0.2, "b": 0.5, "a0": 0.3,
    "v_rest": 0.1, "v_c": 0.4, "delta_t": 0.7, "theta_rh": 0.8, "rate_w": 0.4, "rate": 0.5,
}  # fmt: skip
"""What each parameter is near; numbers that keep every neuron finite and firing now and then."""


def problem(spec, steps, shape, channels, dtype=torch.float32, seed=0):
    """x, state and parameters whose potentials keep a margin from the threshold; values that ``dtype`` holds."""
    draw = torch.Generator().manual_seed(seed)
    row = spec.row
    x = (torch.randn(steps, *shape, generator=draw, dtype=torch.float64) + 0.4).to(dtype)
    state = 0.3 * torch.randn(*[len(row.states)] * (len(row.states) > 1), *shape, generator=draw)
    params = {name: CENTERS[name] + 0.1 * torch.rand(channels, generator=draw) for name in row.params}
    at = [p.double().reshape(-1, *[1] * (len(shape) - 2)) for p in params.values()]
    edge = 0.5 / spec.alpha if spec.surrogate == "rectangle" else None
    for _ in range(300):
        u = differences(x.double(), state.double(), at, spec)
        close = u.abs() < MARGIN
        if edge is not None:
            close |= (u.abs() - edge).abs() < MARGIN
        bad = close.any(0)
        if not bad.any():
            return x, state, params
        x = torch.where(bad, (torch.randn(x.shape, generator=draw, dtype=torch.float64) + 0.4).to(dtype), x)
    raise RuntimeError(f"no inputs for {spec} keep the margin")


def differences(x, state, params, spec):
    """potential - threshold of every step, in plain torch."""
    row, found = spec.row, []
    charge, fire, settle = reference._steps(spec.neuron, spec.reset)
    state = (state,) if len(row.states) == 1 else state.unbind(0)
    for current in x.unbind(0):
        trace = charge(current, state, params)
        potential, threshold = fire(trace, params)
        found.append(potential - threshold)
        state = settle(trace, found[-1] > 0, params)
    return torch.stack(found)


def oracle(spec, x, state, params, grads, shown="v"):
    """All outputs in float64, and all gradients for the incoming ones of s, the potential and the last state."""
    leaves = [t.double().requires_grad_() for t in (x, state, *params.values())]
    at = [p.reshape(-1, *[1] * (x.dim() - 3)) if p.numel() > 1 else p for p in leaves[2:]]
    trace = reference.lif(leaves[0], leaves[1], at, spec)
    outputs = [trace.s, getattr(trace, shown), trace.state]
    wanted = torch.autograd.grad(outputs, leaves, [g.double() for g in grads], materialize_grads=True)
    return [t.detach() for t in outputs], wanted


def close(got, want, bound, what):
    scale = max(want.abs().max().item(), 1e-3)
    error = (got.detach().double() - want).abs().max().item() / scale
    assert error <= bound, f"{what}: {error:.2e} of {bound:.0e}"  # a NaN is not


def compare(backend, spec, steps=5, shape=(2, 3, 4), learnable="channel", shown="v", dtype=torch.float32, seed=0):
    """Run the op on a backend, and compare with the oracle."""
    x, state, params = problem(spec, steps, shape, shape[1] if learnable == "channel" else 1, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    grads = [torch.randn(t.shape, generator=draw).to(dtype) for t in (x, x)]
    grads.append(torch.randn(state.shape, generator=draw))
    outputs, gradients = oracle(spec, x, state, params, grads, shown)
    leaves = [t.clone().requires_grad_() for t in (x, state)]
    held = {name: p.clone().squeeze().requires_grad_() for name, p in params.items()}
    values = {name: p.item() for name, p in params.items()} if learnable == "none" else held
    out = neuron_op(leaves[0], leaves[1], values, spec, wanted(True, shown == "v", True, False, shown == "h"), backend)
    made = [out.spikes, out.v if shown == "v" else out.h, out.state]
    leaves += [] if learnable == "none" else held.values()
    found = torch.autograd.grad(made, leaves, grads, materialize_grads=True)
    assert torch.equal(out.spikes.detach().double(), outputs[0]) and 0.02 < outputs[0].mean() < 0.98
    bound = TOLERANCE[dtype]
    close(made[1], outputs[1], bound, shown)
    close(made[2], outputs[2], TOLERANCE[torch.float32], "state")
    names = ("x", "state", *params)
    for name, got, want in zip(names, found, gradients, strict=False):
        close(got, want.reshape(got.shape), bound if name in names[:2] else PARAMETER_TOLERANCE, f"gradient of {name}")


BACKENDS = ["reference", "triton"]
LONG = ("LIF", "QIF", "CUBALIF", "Izhikevich")
"""With one state and with two; whose gradients depend on the state before (QIF, Izhikevich), and whose do not."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "reset"), ROWS)
def test_every_neuron_and_reset(backend, name, reset):
    """A number and a parameter of one value go through a kernel alike for every neuron: one of them, in turn."""
    for detach, learnable in ((False, "channel"), (True, ("none", "scalar")[ROWS.index((name, reset)) % 2])):
        compare(backend, LIFSpec(reset, "sigmoid", 2.0, detach, name), learnable=learnable)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LONG)
def test_long_sequences(backend, name):
    """Chunks of 16 steps, of a neuron with two states 8: on the edge of one, one more, several."""
    reset = next(iter(neurons.TABLE[name].settle))
    for steps in (1, 8, 9, 17):
        compare(backend, LIFSpec(reset, "atan", None, False, name), steps=steps, shape=(1, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("surrogate", surrogates.BUILTIN)
def test_surrogates(backend, surrogate):
    """At the distance from a threshold that moves; the edge of a rectangle too."""
    compare(backend, LIFSpec("hard", surrogate, None, False, "ALIF"), shape=(2, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_the_potential_before_the_reset(backend, dtype):
    """Of a neuron whose potential is the first number of its state, and of one where it is the second."""
    for name in ("AdLIF", "CUBALIF"):
        compare(backend, LIFSpec("soft", "atan", None, False, name), dtype=dtype)
        compare(backend, LIFSpec("soft", "atan", None, True, name), shown="h")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LIF", "ALIF"])
def test_what_is_no_number_has_no_gradient_that_is_one(backend, name):
    """Also where the surrogate is 0: from step 1 on the potential is NaN, or the adaptation of the threshold is."""
    spec = LIFSpec("soft", "rectangle", 1.0, False, name)
    x, state, params = problem(spec, 3, (2, 3, 4), 1)
    if name == "ALIF":
        state[1, 0, 0, 1] = torch.nan
    else:
        x[1, 0, 0, 1] = torch.nan
    x.requires_grad_()
    values = {name: p.item() for name, p in params.items()}
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
    row, steps = spec.row, 7
    x, state, params = problem(spec, steps, (2, 3), 3)
    draw = torch.Generator().manual_seed(1)
    gs, gv, gh = (torch.randn(x.shape, generator=draw).double() for _ in range(3))
    g_final = torch.randn(state.shape, generator=draw).double()
    leaves = [t.double().requires_grad_() for t in (x, state, *params.values())]
    trace = reference.lif(leaves[0], leaves[1], leaves[2:], spec)
    want = torch.autograd.grad(
        [trace.s, trace.v, trace.h, trace.state], leaves, [gs, gv, gh, g_final], materialize_grads=True
    )

    names = {
        **reference._NAMES,
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
    resets = itertools.chain.from_iterable(row.settle for row in neurons.TABLE.values())
    assert {*resets} == {"hard", "soft", "none"}
