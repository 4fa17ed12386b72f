"""Forward-mode derivatives: a fused op refuses them by name, the reference has them; nothing gives zero or None."""

import pytest
import torch
from conftest import FUSED
from torch.autograd import forward_ad

from trtkern import nn
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.lif import lif
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.ops.spikes import Spikes, pack

SHAPE = (3, 2, 4, 2, 2)
SPEC = RegularizerSpec(3, 1e-2, 0.25, 1e-5)


def current():
    return 1.5 * torch.randn(SHAPE) + 0.5


def channels():
    return torch.rand(4) * 0.5 + 0.25


def layer_of(backend, **norm):
    """A layer's sum over given weight, bias and whatever else, so that each of them can be dual."""

    def call(y, residual=None, v0=None, weight=None, bias=None, decay=None):
        made = nn.BatchNormLIF(4, decay=0.5 if decay is None else decay, surrogate="atan", backend=backend, **norm)
        made.train(norm.get("track_running_stats", True))
        given = {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
        outputs = torch.func.functional_call(made, given, (y, residual, v0), {"return_state": True})
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
        logits, target = torch.ones(3, 2, 4), torch.tensor([0, 1])
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
    "regularizer w": (lambda b: lambda w: regularizer([w, w + 1], SPEC, backend=b), lambda: (current(),), 0),
    "loss w": (loss_of, lambda: (current(),), 0),
}


def dual(function, arguments, which, tangent):
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(a, tangent) if i == which else a for i, a in enumerate(arguments)]
        return forward_ad.unpack_dual(function(*given)).tangent


def jvp(function, arguments, which, tangent):
    def of(value):
        return function(*[value if i == which else a for i, a in enumerate(arguments)])

    return torch.func.jvp(of, (arguments[which],), (tangent,))[1]


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("mode", [dual, jvp])
def test_the_reference_has_the_directional_derivative(case, mode):
    make, arguments, which = TABLE[case]
    function, arguments = make("reference"), list(arguments())
    tangent = torch.randn_like(arguments[which])
    got = mode(function, arguments, which, tangent)
    arguments[which] = arguments[which].requires_grad_()
    (gradient,) = torch.autograd.grad(function(*arguments), arguments[which])
    # torch makes a float64 tangent of the 0-dim float32 penalty.
    torch.testing.assert_close(got.to(gradient.dtype), (gradient * tangent).sum(), rtol=1e-4, atol=1e-5)
    assert abs(got.item()) > 0


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("mode", [dual, jvp])
def test_a_fused_op_refuses_by_name(case, mode, backend, device):
    if device != "cpu":
        pytest.skip("the inputs are on the CPU: the refusal comes before any kernel")
    if (backend, case.split()[0]) == ("cuda", "loss"):
        pytest.skip("the regulariser of the cuda backend takes tensors of a GPU only")
    make, arguments, which = TABLE[case]
    function, arguments = make(backend), list(arguments())
    op = {"li": "lif", "norm": "batch_norm_lif", "loss": "regularizer"}.get(case.split()[0], case.split()[0])
    with pytest.raises(RuntimeError, match=rf'^{op}: expected no forward-mode derivative.*backend="reference"'):
        mode(function, arguments, which, torch.ones_like(arguments[which]))


@pytest.mark.parametrize("case", TABLE)
def test_also_inside_a_reverse_mode_and_where_something_needs_a_gradient(case):
    make, arguments, which = TABLE[case]
    function, arguments = make("auto"), list(arguments())
    value = arguments[which]

    def of(value):
        return function(*[value if i == which else a for i, a in enumerate(arguments)])

    refusal = pytest.raises(RuntimeError, match="expected no forward-mode derivative")
    with refusal:
        torch.func.jvp(torch.func.grad(of), (value,), (torch.ones_like(value),))
    with refusal:
        torch.func.jacfwd(of)(value)
    with refusal, forward_ad.dual_level():
        of(forward_ad.make_dual(value.clone().requires_grad_(), torch.ones_like(value)))


def test_an_incoming_gradient_with_a_tangent_is_refused():
    x = current().requires_grad_()
    w = torch.ones(5, requires_grad=True)
    made = {"lif": nn.LIF()(x), "batch_norm_lif": nn.BatchNormLIF(4)(x), "regularizer": regularizer([w], SPEC)}
    for op, y in made.items():
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            with pytest.raises(RuntimeError, match=f"{op}: expected no forward-mode"):
                torch.autograd.grad(y, w if op == "regularizer" else x, g)


def test_nothing_has_changed_when_a_norm_refuses():
    layer = nn.BatchNormLIF(4)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(layer, (current(),), (current(),))
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros(4))


def test_buffers_take_over_no_tangent():
    layer, plain = (nn.BatchNormLIF(4, backend="reference") for _ in range(2))
    x = current()
    plain(x)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
        for name, held in layer.named_buffers():
            assert forward_ad.unpack_dual(held).tangent is None, name
    torch.func.jvp(plain, (x,), (x,))
    layer(x)
    for (name, a), (_, b) in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert layer.num_batches_tracked == 2


def test_a_potential_that_is_not_finite_raises_the_flag_in_forward_mode_and_stays_one_neurons():
    layer, x = nn.LIF(backend="reference"), current()
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
    blocks = nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 4, 1), nn.BatchNormLIF(4), checkpoint=True)
    mixed = torch.nn.Sequential(torch.nn.Linear(5, 7), nn.LIF(decay=0.5), torch.nn.Linear(7, 3))
    for model, x in ((blocks, current()), (mixed, torch.randn(4, 3, 5))):
        with pytest.raises(RuntimeError, match="expected no forward-mode derivative"):
            torch.func.jvp(model, (x,), (x,))
    names = dict(mixed.named_parameters())
    for backend in ("auto", "reference"):
        mixed[1].backend = backend

        def of(weight):
            return torch.func.functional_call(mixed, {"0.weight": weight}, (4 * torch.ones(4, 3, 5),)).sum()

        weight = names["0.weight"].detach()
        if backend == "auto":
            with pytest.raises(RuntimeError, match="expected no forward-mode derivative"):
                torch.func.jvp(of, (weight,), (torch.ones_like(weight),))
        else:
            _, got = torch.func.jvp(of, (weight,), (torch.ones_like(weight),))
            torch.testing.assert_close(got, torch.func.grad(of)(weight).sum(), rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_added_in_place_has_no_tangent():
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for backend in ("auto", "reference"):
            with pytest.raises(RuntimeError, match="add_regularizer_grad_: expected no forward-mode derivative"):
                add_regularizer_grad_([w], SPEC, backend=backend)


def test_compiled_code_refuses_too_and_costs_no_graph_break():
    layer, x = nn.LIF(), current()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    with pytest.raises(Exception, match=r"forward-mode|Observed exception"):
        torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,)), fullgraph=True, backend="eager")(x)


def test_every_backend_is_in_the_table():
    assert set(FUSED) <= {"cpu", "triton", "cuda"}
    with pytest.raises(RuntimeError, match="forward-mode"), forward_ad.dual_level():
        lif(forward_ad.make_dual(current(), current()))


def test_the_reference_compiles_whole():
    layer, x = nn.LIF(backend="reference"), current()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
