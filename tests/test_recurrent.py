"""Neurons that feed each other: every instruction set against a plain float64 loop, and what the layer takes."""

import pytest
import torch

from trtkern import neurons, reference
from trtkern.backends import cpu
from trtkern.ops._prepared import WANT_H, WANT_PACKED, WANT_SPIKES, WANT_STATE, WANT_V
from trtkern.ops.recurrent import recurrent
from trtkern.spec import LIFSpec

KINDS = ("LIF", "ALIF", "AdLIF", "CUBALIF")
extension = pytest.importorskip("trtkern._cpu")
ISAS = extension.isas()
ALL = WANT_SPIKES | WANT_STATE | WANT_H | WANT_PACKED


@pytest.fixture(autouse=True)
def _best():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu._extension().use_isa("")


def values_of(kind: str, N: int | None = None, learned: bool = False, seed: int = 1):
    """The parameters of a neuron by name; learned ones are tensors [N] in its ranges."""
    numbers = {"decay": 0.8, "gain": 1.0, "bias": 0.05, "reset_amount": 0.9, "v_threshold": 1.0, "v_reset": -0.1}
    own = {
        "decay_syn": 0.6, "gain_syn": 0.5, "decay_a": 0.9, "gain_a": 0.1, "beta": 0.5, "decay_w": 0.9, "a": 0.2,
        "b": 0.3,
    }  # fmt: skip
    found = {name: (numbers | own).get(name, 0.3) for name in neurons.lookup(kind).params}
    if not learned:
        return found
    drawn = torch.Generator().manual_seed(seed)
    return {name: v * (0.9 + 0.2 * torch.rand(N, generator=drawn)) for name, v in found.items()}


def case(kind, T, B, N, reset="soft", learned=False, dtype=torch.float32, seed=0, rate=1.0):
    g = torch.Generator().manual_seed(seed)
    spec = LIFSpec(reset=reset, neuron=kind)
    states = len(spec.row.states)
    shape = (B, N) if states == 1 else (states, B, N)
    tensors = {
        "x": (0.4 * rate + torch.randn((T, B, N), generator=g)).to(dtype),
        "s0": (torch.rand((B, N), generator=g) < 0.2).to(dtype),
        "state": 0.3 * torch.rand(shape, generator=g),
        "weight": torch.randn((N, N), generator=g) * 0.5 / N**0.5,
        "bias": 0.1 * torch.randn((N,), generator=g),
    }
    return tensors, values_of(kind, N, learned), spec


def run(tensors, values, spec, backend="cpu", want=ALL, grads=True):
    """What one call gives, and all gradients, by name."""
    leaves = {name: t.clone().requires_grad_(grads) for name, t in tensors.items() if t is not None}
    held = {n: v.clone().requires_grad_(grads) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    given = [leaves.get(name) for name in ("x", "s0", "state", "weight", "bias")]
    out = recurrent(*given, held, spec, want, backend)
    found = {name: t for name, t in out._asdict().items() if t is not None}
    if grads:
        loss = sum(
            (found[name].double() * weights(found[name], i)).sum() for i, name in enumerate(MADE) if name in found
        )
        loss.backward()
        leaves |= {name: v for name, v in held.items() if isinstance(v, torch.Tensor)}
        found |= {f"g {name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {name: t.detach() for name, t in found.items()}


MADE = ("spikes", "h", "v", "state")


def weights(t, seed):
    """What a loss weighs each number of an output with."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(tensors, values, spec, spikes):
    """The plain loop in float64, on the spikes that a kernel found."""
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items() if t is not None}
    held = {n: v.double().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    x, s0, state, weight, bias = (leaves.get(name) for name in ("x", "s0", "state", "weight", "bias"))
    rows = [held[name] for name in spec.row.params]
    trace = reference.recurrent(x, s0, state, weight, bias, rows, spec, known=spikes.double())
    found = {"spikes": trace.s, "h": trace.h, "state": trace.state}
    sum((found[name] * weights(found[name], i)).sum() for i, name in enumerate(MADE) if name in found).backward()
    leaves |= {name: v for name, v in held.items() if isinstance(v, torch.Tensor)}
    # What has no part in it, such as a reset amount without a soft reset, has no gradient.
    found |= {f"g {name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {name: t.detach() for name, t in found.items()}


@torch.no_grad()
def distances(tensors, values, spec, spikes):
    """potential - threshold of every step in float64, on the spikes that a kernel found."""
    charge, fire, settle = reference.steps(spec.neuron, spec.reset)
    rows = [v.double() if isinstance(v, torch.Tensor) else v for v in (values[name] for name in spec.row.params)]
    x, s, state, weight, bias = (tensors[name].double() for name in ("x", "s0", "state", "weight", "bias"))
    state = (state,) if len(spec.row.states) == 1 else state.unbind(0)
    found = []
    for given, fired in zip(x, spikes.double(), strict=True):
        trace = charge(given + s @ weight.T + bias, state, rows)
        potential, threshold = fire(trace, rows)
        state, s = settle(trace, fired, rows), fired
        found.append(potential - threshold)
    return torch.stack(found)


def compare(found, truth, tolerance=2e-5):
    for name, expected in truth.items():
        scale = expected.abs().max().clamp(min=1.0)
        error = ((found[name].double() - expected).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: off by {error:.1e} of {scale:.1e}"


def judge(tensors, values, spec, found, tolerance=2e-5):
    compare(found, oracle(tensors, values, spec, found["spikes"]), tolerance)
    u = distances(tensors, values, spec, found["spikes"])
    wrong = (u > 0) != (found["spikes"] > 0)
    assert not (u[wrong].abs() >= 1e-4).any()
    assert 0.01 < found["spikes"].mean() < 0.99  # else nothing is shown


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


SHAPES = ((1, 3, 7), (16, 1, 64), (17, 19, 64), (17, 3, 1), (250, 3, 7), (17, 3, 513))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_set_and_neuron_equals_a_plain_loop_in_float64(isa, kind):
    extension.use_isa(isa)
    for number, (T, B, N) in enumerate(SHAPES):
        given = case(kind, T, B, N, "hard" if number % 2 else "soft", learned=number % 3 == 0, seed=number)
        judge(*given, run(*given))


@pytest.mark.parametrize("isa", ISAS)
def test_resets_detached_and_parameters_of_each_neuron(isa):
    extension.use_isa(isa)
    for reset in ("hard", "soft", "none"):
        for detach in (False, True):
            tensors, values, spec = case("LIF", 17, 18, 37, reset, learned=True)
            spec = LIFSpec(reset=reset, detach_reset=detach)
            judge(tensors, values, spec, run(tensors, values, spec))


def test_a_long_sequence_of_a_whole_batch():
    tensors, values, spec = case("AdLIF", 250, 128, 7, learned=True)
    judge(tensors, values, spec, run(tensors, values, spec), 1e-4)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "wide"])  # whose weights have torch's gradient
def test_one_and_two_threads_and_a_second_run_are_the_same_bits(isa):
    extension.use_isa(isa)
    for learned, (T, B, N) in ((True, (33, 35, 64)), (False, (9, 33, 130))):
        given = case("ALIF", T, B, N, learned=learned)
        torch.set_num_threads(1)
        first = run(*given)
        same(first, run(*given))
        torch.set_num_threads(2)
        same(first, run(*given))


@pytest.mark.parametrize("isa", ISAS)
def test_few_spikes_and_many_are_the_same_sums(isa):
    """Lists of what fired, and products of all: a block with few spikes beside one with many."""
    extension.use_isa(isa)
    for rate in (-1.0, 4.0):
        given = case("LIF", 9, 20, 70, rate=rate)
        judge_rate = run(*given)
        compare(judge_rate, oracle(*given, judge_rate["spikes"]))
    few, many = case("LIF", 9, 16, 70, rate=-1.0), case("LIF", 9, 16, 70, rate=4.0)
    tensors = {
        n: few[0][n] if n in ("weight", "bias") else torch.cat([few[0][n], many[0][n]], t) for n, t in AXES.items()
    }
    both = run(tensors, *few[1:], grads=False)
    many[0].update({n: few[0][n] for n in ("weight", "bias")})
    assert torch.equal(both["spikes"][:, :16], run(*few, grads=False)["spikes"])
    assert torch.equal(both["spikes"][:, 16:], run(*many, grads=False)["spikes"])


AXES = {"x": 1, "s0": 0, "state": 0, "weight": 0, "bias": 0}
"""Where the samples of each are."""


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "wide"])
def test_half_types_equal_the_reference_on_the_same_rounded_current(isa, dtype):
    extension.use_isa(isa)
    for kind in ("LIF", "CUBALIF"):
        tensors, values, spec = case(kind, 18, 3, 37, learned=kind == "LIF", dtype=dtype)
        found = run(tensors, values, spec)
        assert found["spikes"].dtype == found["h"].dtype == found["g x"].dtype == dtype
        truth = oracle({n: t.float() for n, t in tensors.items()}, values, spec, found["spikes"].float())
        compare(found, truth, 0.03)


def test_what_is_wanted_is_made():
    given = case("ALIF", 18, 3, 37)
    whole = run(*given, grads=False)
    for want in (WANT_SPIKES, WANT_SPIKES | WANT_V, WANT_SPIKES | WANT_STATE, WANT_SPIKES | WANT_PACKED):
        part = run(*given, want=want, grads=False)
        assert torch.equal(part["spikes"], whole["spikes"])
        if want & WANT_STATE:
            assert torch.equal(part["state"], whole["state"])
        if want & WANT_PACKED:
            assert torch.equal(part["packed"], reference.spikes_pack(whole["spikes"]))


def broken(isa, kind="LIF", N=37):
    """Inputs where neuron 5 of sample 1 has a NaN from step 6 on."""
    extension.use_isa(isa)
    tensors, values, spec = case(kind, 20, 3, N)
    tensors["x"][6, 1, 5] = float("nan")
    return tensors, values, spec


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_one_neuron_reaches_those_that_it_feeds_and_no_others(isa):
    tensors, values, spec = broken(isa)
    flag = torch.zeros(1, dtype=torch.int32)
    given = [tensors[name] for name in ("x", "s0", "state", "weight", "bias")]
    out = recurrent(*given, values, spec, ALL, "cpu", flag=flag)
    assert flag.item() == 1
    lost = out.h.isnan()
    # A potential that is no number does not fire, and so feeds nothing; its own stays.
    assert lost[6:, 1, 5].all() and lost.sum() == 14
    assert not out.spikes.isnan().any() and not out.spikes[6:, 1, 5].any()


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_that_are_not_finite_are_those_of_the_reference(isa):
    tensors, values, spec = broken(isa, N=70)
    found, truth = (run(tensors, values, spec, backend) for backend in ("cpu", "reference"))
    for name in truth:
        assert torch.equal(found[name].isnan(), truth[name].isnan()), name
    assert found["g x"][:, 1].isnan().any() and not found["g x"][:, 0].isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_finite_are_multiplied_as_torch_does(isa, value):
    extension.use_isa(isa)
    tensors, values, spec = case("LIF", 6, 3, 70)
    tensors["weight"][4, 9] = value
    found, truth = (run(tensors, values, spec, backend, grads=False) for backend in ("cpu", "reference"))
    for name in ("h", "spikes"):
        torch.testing.assert_close(found[name], truth[name], equal_nan=True)
    assert found["h"][0, :, 4].isnan().any() or value > 0
    assert found["h"][1:, :, 4].isnan().any()


def test_a_potential_beyond_a_half_type_raises_the_flag():
    tensors, values, spec = case("LIF", 3, 2, 5, dtype=torch.float16)
    tensors["x"][1, 0, 2] = -6e4
    values |= {"gain": 4.0}
    flag = torch.zeros(1, dtype=torch.int32)
    given = [tensors[name] for name in ("x", "s0", "state", "weight", "bias")]
    recurrent(*given, values, spec, WANT_SPIKES, "cpu", flag=flag)
    assert flag.item() == 0
    recurrent(*given, values, spec, WANT_SPIKES | WANT_V, "cpu", flag=flag)
    assert flag.item() == 1


def test_no_samples_and_one_neuron():
    tensors, values, spec = case("ALIF", 4, 0, 5)
    out = run(tensors, values, spec)
    assert out["spikes"].shape == (4, 0, 5) and not out["g weight"].any()
    judge_one = case("LIF", 40, 2, 1)
    compare(run(*judge_one), oracle(*judge_one, run(*judge_one)["spikes"]))


def wrong(**changed):
    tensors, values, spec = case("LIF", 3, 2, 5)
    tensors |= changed
    return recurrent(*(tensors[n] for n in ("x", "s0", "state", "weight", "bias")), values, spec, WANT_SPIKES)


@pytest.mark.parametrize(
    "changed, said",
    (
        ({"weight": torch.zeros(5, 6)}, r"weight of shape \(5, 5\)"),
        ({"weight": torch.zeros(5, 5, dtype=torch.int64)}, "weight to be a floating tensor"),
        ({"bias": torch.zeros(6)}, r"bias of shape \(5,\)"),
        ({"s0": torch.zeros(3, 5)}, r"s0 of shape \(2, 5\)"),
        ({"state": torch.zeros(3, 5)}, "v0 of shape"),
        ({"x": torch.zeros(3, 5)}, r"x as \[T, B, N\]"),
        ({"x": torch.zeros(3, 2, 1, 5)}, "flatten the neurons"),
    ),
)
def test_what_does_not_fit_is_named(changed, said):
    with pytest.raises((ValueError, TypeError), match=said):
        wrong(**changed)


def test_derivatives_that_a_kernel_does_not_have_are_refused_by_name():
    (tensors, values, spec), names = case("LIF", 3, 2, 5), ("x", "s0", "state", "weight", "bias")
    x, *others = (tensors[name] for name in names)
    x.requires_grad_()
    (g,) = torch.autograd.grad(
        recurrent(x, *others, values, spec, WANT_SPIKES, "cpu").spikes.sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r'first derivative.*backend="reference"'):
        g.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.vmap"):
        torch.vmap(lambda x: recurrent(x, *others, values, spec, WANT_SPIKES, "cpu").spikes)(
            x.detach().expand(2, 3, 2, 5)
        )
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: recurrent(x, *others, values, spec, WANT_SPIKES, "cpu").spikes, (x.detach(),), (x.detach(),)
        )
