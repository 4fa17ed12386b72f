"""Forward-mode derivatives against float64 autograd of the plain loop; what has none refuses by its name."""

import importlib.util

import pytest
import torch
from conftest import DEVICE, FUSED
from test_neuron_table import ROWS
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, vmap

from trtkern import LIFSpec, neurons, nn
from trtkern.backends.base import RegularizerSpec
from trtkern.ops import _tangent
from trtkern.ops._norm import BatchNorm
from trtkern.ops.batch_norm_lif import Neuron, batch_norm_lif
from trtkern.ops.lif import neuron as neuron_op
from trtkern.ops.lif import wanted
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.ops.spikes import Spikes, pack, unpack
from trtkern.selftest.lif import Cell, _problem

SHAPE = (3, 2, 4, 2, 2)
SPEC = RegularizerSpec(3, 1e-2, 0.25, 1e-5)


def current():
    return 1.5 * torch.randn(SHAPE) + 0.5


def channels():
    return torch.rand(4) * 0.5 + 0.25


def layer_of(backend, **norm):
    """A layer's sum over given weight, bias and whatever else, so that each of them can be dual."""

    def call(y, residual=None, v0=None, weight=None, bias=None, decay=None):
        decay = 0.5 if decay is None else decay
        with torch.device(y.device):
            made = nn.BatchNormLIF(4, decay=decay, surrogate="atan", backend=backend, **norm)
        made.train(norm.get("momentum") != 0)
        given = {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
        outputs = functional_call(made, given, (y, residual, v0), {"return_state": True})
        return outputs[0].sum() + outputs[1].sum()

    return call


def neuron(backend, which):
    """The sum of what LIF, or LI, returns."""

    def call(x, v0=None, decay=None, threshold=None):
        decay = 0.5 if decay is None else decay
        if which == "LI":
            return nn.LI(decay, backend=backend)(x, v0).sin().sum()
        made = nn.LIF(decay, v_threshold=1.0 if threshold is None else threshold, surrogate="atan", backend=backend)
        return sum((i + 1) * made.sin().sum() for i, made in enumerate(made(x, v0, return_state=True, return_v=True)))

    return call


def loss_of(backend):
    def call(w):
        logits, target = torch.ones(3, 2, 4).to(w), torch.tensor([0, 1], device=w.device)
        return nn.TRTLoss([("w", w)], lam=0.1, backend=backend)(logits, target)

    return call


# op and input -> (function of a backend, arguments, which of them is dual)
TABLE = {
    "lif x": (lambda b: neuron(b, "LIF"), lambda: (current(),), 0),
    "lif v0": (lambda b: neuron(b, "LIF"), lambda: (current(), torch.rand(SHAPE[1:])), 1),
    "lif decay": (lambda b: neuron(b, "LIF"), lambda: (current(), None, channels()), 2),
    "lif one decay": (lambda b: neuron(b, "LIF"), lambda: (current(), None, torch.tensor(0.5)), 2),
    "lif threshold": (lambda b: neuron(b, "LIF"), lambda: (current(), None, None, channels()), 3),
    "li x": (lambda b: neuron(b, "LI"), lambda: (current(),), 0),
    "li decay": (lambda b: neuron(b, "LI"), lambda: (current(), None, channels()), 2),
    "norm y": (layer_of, lambda: (current(),), 0),
    "norm residual": (layer_of, lambda: (current(), current()), 1),
    "norm v0": (layer_of, lambda: (current(), None, torch.rand(SHAPE[1:])), 2),
    "norm weight": (layer_of, lambda: (current(), None, None, channels()), 3),
    "norm bias": (layer_of, lambda: (current(), None, None, None, channels()), 4),
    "norm decay": (layer_of, lambda: (current(), None, None, None, None, channels()), 5),
    "norm y, pooled": (lambda b: layer_of(b, pool=2), lambda: (current(),), 0),
    "norm y, in evaluation": (lambda b: layer_of(b, momentum=0), lambda: (current(),), 0),
    "norm weight, in evaluation": (lambda b: layer_of(b, momentum=0), lambda: (current(), None, None, channels()), 3),
    "regularizer w": (lambda b: lambda w: regularizer([w, w + 1], SPEC, backend=b), lambda: (current(),), 0),
    "loss w": (loss_of, lambda: (current(),), 0),
}


def dual(function, arguments, which, tangent):
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(a, tangent) if i == which else a for i, a in enumerate(arguments)]
        return forward_ad.unpack_dual(function(*given)).tangent


def at(function, arguments, which):
    """The function of one of its arguments."""
    return lambda value: function(*[value if i == which else a for i, a in enumerate(arguments)])


def jvp(function, arguments, which, tangent):
    return torch.func.jvp(at(function, arguments, which), (arguments[which],), (tangent,))[1]


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_it_is_the_gradient_along_the_tangent(case, backend):
    make, arguments, which = TABLE[case]
    arguments = list(arguments())
    tangent = torch.randn_like(arguments[which])
    wide = [a if a is None else a.double() for a in arguments]
    wide[which].requires_grad_()
    (gradient,) = torch.autograd.grad(make("reference")(*wide), wide[which])
    want = (gradient * tangent).sum()
    assert abs(want.item()) > 0
    given = [a if a is None else a.to(DEVICE[backend]) for a in arguments]
    # Triton's interpreter takes its time: there one way is enough.
    for mode in (dual,) if backend == "triton" else (dual, jvp):
        got = mode(make(backend), given, which, tangent.to(DEVICE[backend]))
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)


def problem(spec, steps=5, dtype=torch.float32):
    """x, state and parameters by channel, whose potentials keep a margin from the threshold."""
    settings = (dtype, spec.surrogate, spec.reset, spec.detach_reset, "channel", steps, (2, 3, 4))
    x, state, params, *_ = _problem(Cell(*settings, neuron=spec.neuron), 0)
    return x, state, [p.float() for p in params]


OUTPUTS = ("spikes", "v", "h", "state")


def run(spec, norm, backend, shown, x, state, weight, bias, *params):
    """The outputs of a neuron, with BatchNorm in front or not, that ``wanted`` asks for."""
    values = dict(zip(spec.row.params, params, strict=True))
    want = wanted("spikes" in shown, "v" in shown, "state" in shown, False, "h" in shown)
    if norm:
        held = BatchNorm(weight, bias, None, None, None, 1e-5, 0.1, True)
        out = batch_norm_lif(x, held, Neuron(values, spec, False, want, None, backend), None, state, 2)
    else:
        out = neuron_op(x, state, values, spec, want, backend)
    return [getattr(out, name) for name in OUTPUTS if name in shown]


def along(spec, norm, backend, shown=("spikes", "v", "state"), steps=5, dtype=torch.float32):
    """Tangents of every input at once: those of the outputs, in one weighted sum, against float64 gradients."""
    x, state, params = problem(spec, steps, dtype)
    wide = x.double().movedim(2, 0).flatten(1)
    # The normalisation undone, so that potentials keep their distance from the threshold.
    weight, bias = (wide.var(1, correction=0) + 1e-5).sqrt().float(), wide.mean(1).float()
    inputs = [x, state, weight, bias, *params]
    tangents = [torch.randn_like(each) for each in inputs]
    leaves = [each.double().requires_grad_() for each in inputs]
    oracle = run(spec, norm, "reference", shown, *leaves)
    weights = [torch.randn_like(each) for each in oracle]

    given = [each.to(DEVICE[backend]) for each in inputs]
    plain = run(spec, norm, backend, shown, *given)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(given, [t.to(x.device) for t in tangents], strict=True)]
        outputs = [forward_ad.unpack_dual(each) for each in run(spec, norm, backend, shown, *duals)]
    for out, same in zip(outputs, plain, strict=True):
        assert torch.equal(out.primal, same) and out.tangent.abs().sum() > 0
        assert out.tangent.dtype == same.dtype and out.tangent.shape == same.shape
    gradients = torch.autograd.grad(oracle, leaves, weights, materialize_grads=True)
    terms = [each * t for each, t in zip(gradients, tangents, strict=True)]
    scale, want = (sum(each.sum().item() for each in of) for of in (map(torch.abs, terms), terms))
    got = sum((out.tangent.double().cpu() * g).sum().item() for out, g in zip(outputs, weights, strict=True))
    assert abs(got - want) <= {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype] * scale, f"{got} of {want}"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("name", "reset"), ROWS)
def test_every_neuron_and_reset(name, reset, detach, norm):
    spec = LIFSpec(reset, "sigmoid", 2.0, detach, name)
    for backend in ["reference", *(b for b in FUSED if b != "triton")]:
        along(spec, norm, backend)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("name", "reset"), ROWS)
def test_the_derived_tangents(name, reset, detach):
    """Of all inputs, and of each where the others have none: what every fused backend returns."""
    spec, shown = LIFSpec(reset, "sigmoid", 2.0, detach, name), ("spikes", "v", "state")
    x, state, params = problem(spec)
    inputs = _tangent.Inputs(x, state, torch.stack(params))
    leaves = [each.double().requires_grad_() for each in inputs]
    oracle = run(spec, False, "reference", shown, leaves[0], leaves[1], None, None, *leaves[2].unbind(0))
    weights = [torch.randn_like(each) for each in oracle]
    gradients = torch.autograd.grad(oracle, leaves, weights)
    tangents = _tangent.Inputs(*map(torch.randn_like, inputs))
    none = _tangent.Inputs(None, None, None)
    for d in (tangents, *(none._replace(**{of: getattr(tangents, of)}) for of in none._fields)):
        found = _tangent.neuron(inputs, d, oracle[0].detach().float(), (), spec, 2, False)
        terms = [g * t for g, t in zip(gradients, d, strict=True) if t is not None]
        scale, want = (sum(each.sum().item() for each in of) for of in (map(torch.abs, terms), terms))
        got = sum((out.double() * g).sum().item() for out, g in zip(found, weights, strict=True))
        assert abs(got - want) <= 1e-5 * scale and scale > 0, f"{got} of {want}"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", neurons.TABLE)
def test_every_neuron_on_triton(name, norm):
    reset = [*neurons.TABLE[name].settle][-1]
    along(LIFSpec(reset, "atan", None, not norm, name), norm, "triton", ("spikes", "state") if norm else ("h",))


def test_other_outputs_dtypes_and_lengths():
    for shown in (("h", "state"), ("spikes",), ("v",)):
        along(LIFSpec("soft"), True, "cpu", shown)
    along(LIFSpec("hard", "rectangle"), False, "cpu", dtype=torch.bfloat16)
    along(LIFSpec("hard", "atan"), False, "cpu", steps=33)


def test_what_has_no_tangent_gives_none():
    layer, x = nn.BatchNormLIF(4), current()
    with forward_ad.dual_level():
        forward_ad.make_dual(x, x)
        out = layer(x)
        assert forward_ad.unpack_dual(out).tangent is None
        state = nn.LIF()(forward_ad.make_dual(x, torch.zeros_like(x)), return_state=True)[1]
        assert torch.equal(forward_ad.unpack_dual(state).tangent, torch.zeros_like(state))


LAYERS = {
    "lif": lambda backend: nn.LIF(surrogate="atan", backend=backend),
    "soft, detached": lambda backend: nn.LIF(v_reset=None, detach_reset=True, surrogate="atan", backend=backend),
    "plif": lambda backend: nn.PLIF(channels=4, surrogate="atan", backend=backend),
    "norm": lambda backend: nn.BatchNormLIF(4, surrogate="atan", backend=backend, track_running_stats=False),
    "pooled": lambda backend: nn.BatchNormLIF(4, surrogate="atan", backend=backend, pool=2, track_running_stats=False),
    "in evaluation": lambda backend: nn.BatchNormLIF(4, surrogate="atan", backend=backend).eval(),
}


def everywhere(layer, steps=3):
    """Forward mode by itself and within other transforms, by name."""
    torch.manual_seed(0)
    x, t, other = (torch.randn(steps, 2, 4, 2, 2) for _ in range(3))
    several, tangents = torch.stack((x, other, x + other), 1), torch.stack((t, x, other), 1)
    names = {name: p.detach() for name, p in layer.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in names.items()}

    def of(x, names=names):
        return functional_call(layer, names, (1.5 * x + 0.5,)).sin()

    def pushed(x, t=t):
        return torch.func.jvp(of, (x,), (t,))[1]

    found = {
        "jacfwd": jacfwd(lambda a: of(a * x).mean((0, 1)))(torch.ones(2, 1, 1, 1)),
        "jvp of vmap": torch.func.jvp(vmap(of, 1), (several,), (tangents,))[1],
        "vmap of jvp": vmap(pushed, 1)(several, tangents),
        "grad of jvp": grad(lambda x: pushed(x).sum())(x),
        "grad of jvp, by the tangent": grad(lambda t: pushed(x, t).sum())(t),
        "jvp of jvp": torch.func.jvp(pushed, (x,), (other,))[1],
    }
    with torch.no_grad():
        found["without gradients"] = torch.func.jvp(vmap(of, 1), (several,), (tangents,))[1]
        found["jvp of jvp, without gradients"] = torch.func.jvp(pushed, (x,), (other,))[1]
    if names:
        found["parameters"] = torch.func.jvp(lambda names: of(x, names), (names,), (ones,))[1]
        found |= jacfwd(lambda names: of(x, names).mean((0, 1)))(names)
        mixed = grad(lambda names: torch.func.jvp(lambda x: of(x, names), (x,), (t,))[1].sum())(names)
        found |= {f"{name}, mixed": each for name, each in mixed.items()}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_within_other_transforms(layer):
    got, want = (everywhere(LAYERS[layer](backend)) for backend in ("cpu", "reference"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert want[name].abs().sum() > 0, name


def test_long_sequences_beneath_vmap():
    x, t = torch.randn(2, 3, 33, 2, 4)
    for make in (LAYERS["lif"], LAYERS["norm"]):
        got, want = (torch.func.jvp(vmap(make(b), 0), (x,), (t,))[1] for b in ("cpu", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forward_over_forward_is_reverse_over_forward(backend):
    """torch switches forward mode off in the jvp of a Function: an outer one would lose its tangents."""
    x, t, other = (torch.randn(SHAPE).double() if backend == "reference" else torch.randn(SHAPE) for _ in range(3))
    layer = nn.LIF(surrogate="atan", backend=backend)

    def pushed(x):
        return torch.func.jvp(lambda x: layer(x).sin().sum(), (x,), (t,))[1]

    _, got = torch.func.jvp(pushed, (x,), (other,))
    want = (grad(pushed)(x) * other).sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"expected no torch\.vmap within two forward modes"):
        torch.func.jvp(vmap(pushed), (x[None],), (other[None],))


@pytest.mark.parametrize("case", [case for case in TABLE if case.split()[0] not in ("regularizer", "loss")])
def test_a_second_derivative_is_refused_by_name(case):
    make, arguments, which = TABLE[case]
    arguments = list(arguments())
    value = arguments[which]
    of = at(make("cpu"), arguments, which)
    op = {"norm": "batch_norm_lif"}.get(case.split()[0], "lif")
    refusal = rf'^{op}: expected no forward-mode derivative .* of a gradient, got one.*backend="reference"'
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jvp(grad(of), (value,), (torch.ones_like(value),))


def test_an_incoming_gradient_with_a_tangent_is_refused():
    x = current().requires_grad_()
    w = torch.ones(5, requires_grad=True)
    made = {"lif": nn.LIF()(x), "batch_norm_lif": nn.BatchNormLIF(4)(x), "regularizer": regularizer([w], SPEC)}
    for op, y in made.items():
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            with pytest.raises(RuntimeError, match=f"{op}: expected no forward-mode"):
                torch.autograd.grad(y, w if op == "regularizer" else x, g)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_penalty(backend):
    """Its value stays that of the kernel, an infinite one too; its second derivative is the reference's."""
    w, t = torch.randn(2, 7, 5)
    of = at(lambda w: regularizer([w], SPEC, backend=backend), (w,), 0)
    value, tangent = torch.func.jvp(of, (w,), (t,))
    assert torch.equal(value.float(), of(w))
    torch.testing.assert_close(tangent.float(), (grad(of)(w) * t).sum())
    _, got = torch.func.jvp(grad(of), (w,), (t,))
    wide = w.double().requires_grad_()
    _, want = torch.autograd.functional.hvp(lambda w: regularizer([w], SPEC), wide, t.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    many = torch.func.jvp(vmap(of), (w,), (t,))[1]
    torch.testing.assert_close(many.float(), (vmap(grad(of))(w) * t).sum(1))
    far = torch.full((2000,), 5e17)
    steep = RegularizerSpec(3, 1e3, 0.0, 1e-5)
    assert torch.func.jvp(lambda w: regularizer([w], steep, backend=backend), (far,), (far,))[0] == torch.inf


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_buffers_take_over_no_tangent(backend):
    layer, plain = nn.BatchNormLIF(4, backend=backend), nn.BatchNormLIF(4, backend=backend)
    x = current()
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
        for name, held in layer.named_buffers():
            assert forward_ad.unpack_dual(held).tangent is None, name
    torch.func.jvp(layer, (x,), (x,))
    plain(x)
    plain(x)
    for (name, a), (_, b) in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert layer.num_batches_tracked == 2


def test_running_statistics_with_tangents():
    x, statistics = current(), {"running_mean": torch.randn(4), "running_var": channels()}
    tangents = {name: torch.randn(4) for name in statistics}
    got, want = (
        torch.func.jvp(lambda held, layer=layer: functional_call(layer, held, (x,)), (statistics,), (tangents,))[1]
        for layer in (nn.BatchNormLIF(4, surrogate="atan", backend=b).eval() for b in ("cpu", "reference"))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.abs().sum() > 0


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("surrogate", ["triangle", "rectangle"])
def test_a_potential_that_is_not_finite_raises_the_flag_in_forward_mode_and_stays_one_neurons(backend, surrogate):
    layer, x = nn.LIF(backend=backend, surrogate=surrogate), current()
    x[1, 0, 0, 0, 0] = torch.nan
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    assert layer.nonfinite.item() == 1
    assert tangent[1:, 0, 0, 0, 0].isnan().all() and tangent.isnan().sum() == 2


def test_gradients_of_torch_func_are_those_of_autograd():
    x = current()
    for layer in (nn.LIF(), nn.BatchNormLIF(4).eval(), nn.LIF(backend="reference"), nn.PLIF()):
        got = torch.func.grad(lambda x, layer=layer: layer(x).sin().sum())(x)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf)
        assert torch.equal(got, want) and want.abs().sum() > 0


def test_spike_layers_leave_forward_mode_to_torch():
    s = (torch.rand(SHAPE) < 0.5).float()
    words = pack(s)
    for layer in (nn.SpikeConv2d(4, 3, 1), nn.SpikeLinear(16, 3)):
        for tangents in (torch.randn_like(s), None):
            weight, tangent = layer.weight.detach(), torch.randn_like(layer.weight)

            def of(weight, s, layer=layer):
                return torch.func.functional_call(layer, {"weight": weight}, (Spikes(s, words),)).sin().sum()

            given = (tangent, torch.zeros_like(s) if tangents is None else tangents)
            _, got = torch.func.jvp(of, (weight, s), given)
            gradients = torch.func.grad(of, (0, 1))(weight, s)
            want = sum((g * t).sum() for g, t in zip(gradients, given, strict=True))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_words_are_integers_and_have_no_tangent():
    s = (torch.rand(SHAPE) < 0.5).float()
    with forward_ad.dual_level():
        assert torch.equal(pack(forward_ad.make_dual(s, s)), pack(s))


def test_whole_models():
    blocks = nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 4, 1), nn.BatchNormLIF(4, surrogate="atan"), checkpoint=True)
    packed = torch.nn.Sequential(
        nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 5, 3, padding=1), nn.BatchNormLIF(5, surrogate="atan", packed=True)),
        nn.ConvBatchNormLIF(nn.SpikeConv2d(5, 4, 1), nn.BatchNormLIF(4, surrogate="atan")),
    )
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 7), nn.LIF(decay=0.5, surrogate="atan"), torch.nn.Linear(7, 3))
    for model in (blocks, packed, mixed):
        x = current()
        names = {name: p.detach() for name, p in model.named_parameters()}
        tangents = {name: torch.randn_like(p) for name, p in names.items()}

        def of(names, x, model=model):
            return functional_call(model, names, (x,)).sin().sum()

        _, got = torch.func.jvp(of, (names, x), (tangents, x))
        leaves = {name: p.clone().requires_grad_() for name, p in names.items()}
        leaf = x.clone().requires_grad_()
        gradients = torch.autograd.grad(of(leaves, leaf), [*leaves.values(), leaf])
        pairs = zip(gradients, [*tangents.values(), x], strict=True)
        torch.testing.assert_close(got, sum((g * t).sum() for g, t in pairs), rtol=1e-4, atol=1e-4)


def test_the_words_of_a_residual_stand_for_it():
    s = (torch.rand(SHAPE) < 0.5).float()
    words, x = pack(s), current()
    layer = nn.BatchNormLIF(4, surrogate="atan")
    got = torch.func.jvp(lambda x, s: layer(x, Spikes(s, words)), (x, s), (x, x))
    want = torch.func.jvp(layer, (x, s), (x, x))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_packed_spikes_come_along():
    layer, plain = nn.LIF(packed=True), nn.LIF()
    x = current()
    with forward_ad.dual_level():
        s, words = layer(forward_ad.make_dual(x, x))
        assert torch.equal(unpack(words, 3, dtype=s.dtype), plain(x))
        tangent = forward_ad.unpack_dual(s).tangent
    assert torch.equal(tangent, torch.func.jvp(plain, (x,), (x,))[1])


@pytest.mark.skipif(importlib.util.find_spec("curvlinops") is None, reason="the oracle curvlinops is not installed")
def test_curvlinops_jacobian():
    from curvlinops import JacobianLinearOperator

    class Last(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.inner = torch.nn.Sequential(
                torch.nn.Linear(4, 6), nn.BatchNormLIF(6, surrogate="atan", backend=backend), torch.nn.Linear(6, 2)
            )

        def forward(self, x):
            return self.inner(x.movedim(0, 1)).mean(0)

    model, data = Last("auto").eval(), [(torch.randn(5, 3, 4), torch.zeros(5, 2))]
    names = {name: p.detach() for name, p in model.named_parameters()}
    whole = torch.func.jacrev(lambda names: functional_call(model, names, (data[0][0],)))(names)
    want = torch.cat([each.flatten(2) for each in whole.values()], 2).flatten(0, 1)
    held = dict(model.named_parameters())
    try:
        operator = JacobianLinearOperator(model, [*held.values()], data)
    except (TypeError, ValueError):  # newer versions take them by name
        operator = JacobianLinearOperator(model, held, data)
    direction = torch.randn(want.shape[1])
    torch.testing.assert_close(operator @ direction, want @ direction, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_added_in_place_has_no_tangent():
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for backend in ("auto", "reference"):
            with pytest.raises(RuntimeError, match="add_regularizer_grad_: expected no forward-mode derivative"):
                add_regularizer_grad_([w], SPEC, backend=backend)


def test_compiled_code_refuses_and_costs_no_graph_break():
    layer, x = nn.LIF(), current()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    with pytest.raises(Exception, match=r"forward-mode|Observed exception"):
        torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,)), fullgraph=True, backend="eager")(x)


def test_the_reference_compiles_whole():
    layer, x = nn.LIF(backend="reference"), current()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
