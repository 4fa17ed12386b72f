"""Gradients over time, against a plain loop over the steps whose every h[t] and v[t] retains its gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from trtkern import analysis, nn
from trtkern.analysis._gradients import per_step
from trtkern.models.build import build

LOSSES = ("SDT", "TET", "TRT")


class Spike(torch.autograd.Function):
    """1 where u > 0; the derivative is the triangle max(0, 1 - |u|)."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (u,) = ctx.saved_tensors
        return gradient * (1 - u.abs()).clamp(min=0)


class Loop(torch.nn.Module):
    """A neuron layer of trtkern as a loop in float64, of whatever is in ``layer.values()``."""

    takes_time = takes_spikes = True

    def __init__(self, layer):
        super().__init__()
        self.norm = layer if isinstance(layer, nn.BatchNormLIF) else None
        self.layer = layer.lif if self.norm is not None else layer

    def forward(self, x, residual=None, v0=None, return_state=False):
        assert v0 is None and not return_state
        if self.norm is not None:
            n = self.norm
            shape = [-1, *[1] * (x.dim() - 3)] if n.channel_dim == 2 else [-1]
            mean, var, weight, bias = (t.view(shape) for t in (n.running_mean, n.running_var, n.weight, n.bias))
            x = (x - mean) / (var + n.eps).sqrt() * weight + bias
            x = x if residual is None else x + residual
        values = {"v_threshold": 1.0, "v_reset": 0.0, **self.layer.values()}
        time = self.layer.time_dim
        shape = [-1, *[1] * (x.dim() - self.layer.channel_dim - 1)] if self.layer.channel_dim > 0 else [-1]
        p = {n: v.double().view(shape) if isinstance(v, torch.Tensor) and v.dim() else v for n, v in values.items()}
        spec, self.h, self.v, out = self.layer.spec, [], [], []
        x = x if x.requires_grad else x.requires_grad_()
        v = torch.zeros_like(x.select(time, 0))
        self.margin = math.inf
        for current in x.unbind(time):
            h = p["decay"] * v + p["gain"] * current + p["bias"]
            s = Spike.apply(h - p["v_threshold"])
            kept = s.detach() if spec.detach_reset else s
            if spec.reset == "hard":
                v = (1 - kept) * h + kept * p["v_reset"]
            else:
                v = h - p["reset_amount"] * kept if spec.reset == "soft" else h + 0
            for each in (h, v):
                each.retain_grad()
            self.h.append(h)
            self.v.append(v)
            out.append(v if spec.reset == "none" else s)
            self.margin = min(self.margin, float((h - p["v_threshold"]).detach().abs().min()))
        out = torch.stack(out, time)
        if self.norm is not None and self.norm.pool == 2:
            out = F.avg_pool2d(out.flatten(0, 1), 2).unflatten(0, out.shape[:2])
        return out

    def grads(self):
        """dL/dh and dL/dv, [T, B, ...]; what has no gradient has zeros."""
        return [
            torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in each]) for each in (self.h, self.v)
        ]


def plain(model):
    """The model in float64 with loops in place of its neurons, and those by name."""
    model = copy.deepcopy(model).eval().double()
    loops = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ConvBatchNormLIF):
            module.checkpoint = False
        if hasattr(module, "nonfinite") and name.rpartition(".")[0] not in loops:
            loops[name] = Loop(module)
            model.set_submodule(name, loops[name])
    return model, loops


def last(logits, labels):
    return F.cross_entropy(logits[-1], labels)


def check(model, x, y, result):
    """Norms under every loss, factors and their products, against the loop; all samples in one batch."""
    oracle, loops = plain(model)
    assert list(loops) == list(result.layers)
    losses = {"SDT": nn.SDTLoss(), "TET": nn.TETLoss(), "TRT": nn.TRTLoss(oracle), "last": last}
    for name, loss in losses.items():
        oracle.zero_grad()
        loss(oracle(x.double()), y).backward(retain_graph=True)
        for where, loop in loops.items():
            assert loop.margin > 1e-6, "a potential so close to the threshold may fire in one precision alone"
            layer = result.layers[where]
            got = layer.last if name == "last" else layer.norms[name]
            for i, g in enumerate(loop.grads()):
                g = g.flatten(2)
                torch.testing.assert_close(got[i], g.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-12)
                torch.testing.assert_close(got[i + 2], (len(y) * g.norm(dim=2)).mean(1), rtol=1e-5, atol=1e-12)
            assert got.h.max() > 0
    for where, loop in loops.items():
        factors = result.layers[where].factors
        steps = zip(loop.v, loop.v[1:], strict=False)
        j = torch.stack([torch.autograd.grad(now.sum(), before, retain_graph=True)[0] for before, now in steps])
        for k in range(1, len(j) + 1):
            product = torch.stack([j[t : t + k].prod(0) for t in range(len(j) - k + 1)])
            for got, want in (
                (factors.product, product.abs().mean()),
                (factors.zero, (product == 0).double().mean()),
                (factors.largest, product.abs().max()),
                (factors.bound, torch.tensor(factors.decay**k).double()),
            ):
                torch.testing.assert_close(got[k - 1], want.cpu(), rtol=1e-5, atol=1e-9)
        assert len(factors.product) == len(j) and factors.silent.sum() + factors.fired.sum() == j.numel()


NEURONS = {
    "hard": lambda o: nn.LIF(0.6, 0.8, v_reset=-0.2, v_leak=0.1, **o),
    "hard, detached": lambda o: nn.LIF(0.6, detach_reset=True, **o),
    "soft": lambda o: nn.LIF(0.7, v_reset=None, reset_amount=0.4, **o),
    "soft, detached": lambda o: nn.LIF(0.7, v_reset=None, detach_reset=True, **o),
    "none": lambda o: nn.LI(0.8, 0.5, v_leak=0.3, **o),
    "IF": lambda o: nn.IF(0.5, **o),
    "PLIF": lambda o: nn.PLIF(3.0, channels=6, decay_input=True, **o),
    "channels": lambda o: nn.LIF(
        torch.linspace(0.1, 0.9, 6), nn.Bounded(torch.linspace(0.5, 0.9, 6)), v_threshold=torch.linspace(0.5, 1, 6), **o
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name, backend):
    torch.manual_seed(0)
    make = NEURONS[name]
    model = nn.TimeSequential(
        torch.nn.Linear(5, 6), make({"backend": backend}), torch.nn.Linear(6, 6), make({"backend": backend}),
        torch.nn.Linear(6, 3),
    )  # fmt: skip
    x, y = 2 * torch.randn(5, 4, 5), torch.tensor([0, 1, 2, 1])
    check(model, x, y, analysis.gradients(model, (x, y), batch_dim=1))


class BatchFirst(torch.nn.Module):
    """[B, T, C], channels on the axis before the last, and back to [T, B, C]."""

    def __init__(self):
        super().__init__()
        self.lif = nn.LIF(torch.linspace(0.2, 0.8, 4), time_dim=1, channel_dim=2)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.lif(x)).movedim(1, 0)


def test_time_on_another_axis_and_an_input_without_gradient():
    model = BatchFirst()
    x, y = 2 * torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    check(model, x, y, analysis.gradients(model, (x, y)))


NETWORKS = {
    "pool": ("conv", {"layers": [4, "pool", 6], "checkpoint": True}, (2, 6, 6)),
    "residual": ("topology", {"layers": "CONVAP-4-3-1-1-2-2-0_RES-4-3=3-1=1-1=1_RES-6-3=3-2=1-1=1_FC-5"}, (2, 6, 6)),
    "SEW": ("topology", {"layers": "CONVNP-4-3-1-1_SEWRES~ADD-6-3=3-2=1-1=1", "packed": False}, (2, 5, 5)),
    "PLIF": ("conv", {"layers": [4, 4], "neuron": "PLIF", "v_reset": None, "detach_reset": True}, (2, 5, 5)),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, backend):
    """Of images that are shown at every step; BatchNorm with other numbers than 0 and 1."""
    torch.manual_seed(3)
    kind, options, shape = NETWORKS[name]
    model = build(kind, shape, 3, timesteps=4, backend=backend, **options)
    for module in model.modules():
        if isinstance(module, (nn.BatchNormLIF, torch.nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 0.6), (module.weight, 0.8, 1.2),
                (module.bias, 0.2, 0.8),
            ):  # fmt: skip
                tensor.data.uniform_(low, high)
    x, y = torch.rand(3, *shape), torch.tensor([2, 0, 1])
    check(model, x, y, analysis.gradients(model, (x, y)))


def test_batches_add_up():
    """The same samples in one batch and in three of other sizes; of an odd number."""
    torch.manual_seed(4)
    model = build("conv", (1, 4, 4), 3, timesteps=4, layers=[5, 6])
    x, y = 3 * torch.rand(7, 1, 4, 4), torch.arange(7) % 3
    whole = analysis.gradients(model, [(x, y)])
    told = []
    parts = analysis.gradients(
        model, analysis.Samples.of("", (x, y), batch_size=3), progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)] and parts.samples == whole.samples == 7 and parts.timesteps == 4
    assert parts.vanishing == pytest.approx(whole.vanishing, rel=1e-5)
    for name, layer in whole.layers.items():
        other = parts.layers[name]
        assert (layer.dead, layer.silent, layer.saturated) == (other.dead, other.silent, other.saturated)
        for a, b in (*zip(layer.factors, other.factors, strict=True), *zip(layer.last, other.last, strict=True)):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-12, equal_nan=True)
    for loss in LOSSES:
        for name, origin in whole.weights[loss].items():
            other = parts.weights[loss][name]
            assert origin.norm == pytest.approx(other.norm, rel=1e-4) and origin.parts.keys() == other.parts.keys()


def test_what_the_gradient_of_a_weight_is_made_of():
    """Against autograd of the formulas of the losses, each term by itself."""
    torch.manual_seed(5)
    model = nn.TimeSequential(torch.nn.Linear(4, 6), nn.LIF(0.8, v_threshold=0.4), torch.nn.Linear(6, 3)).double()
    model[0].bias.requires_grad_(False)
    x, y = 2 * torch.rand(4, 5, 4).double(), torch.arange(5) % 3
    lam, delta, eta = 0.02, 0.4, 0.3
    losses = {"TRT": nn.TRTLoss(model, lam, delta, eta=eta, label_smoothing=0.1), "own": last, "TET": nn.TETLoss(lam=1)}
    result = analysis.gradients(model, (x, y), losses, batch_dim=1)
    assert result.losses == ["TRT", "own", "TET"]
    logits = model(x)
    wanted = torch.stack([F.cross_entropy(o, y, label_smoothing=0.1) for o in logits]).mean()
    errors = torch.stack([F.mse_loss(o, F.one_hot(y, 3).double()) for o in logits]).mean()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    penalty = sum(
        lam / 4 * (w.square() / (1 + (math.exp(delta * t) - 1) * (w.abs() + 1e-5))).sum()
        for t in range(4)
        for name, w in named.items()
        if "bias" not in name
    )
    terms = {"cross entropy": (1 - eta) * wanted, "squared error": eta * errors, "regulariser": penalty}
    assert set(result.weights["TRT"]) == set(named) == {"0.weight", "2.weight", "2.bias"}
    for name, p in named.items():
        grads = {
            term: torch.autograd.grad(value, p, retain_graph=True, allow_unused=True)[0]
            for term, value in terms.items()
        }
        grads = {term: torch.zeros_like(p) if g is None else g for term, g in grads.items()}
        whole, origin = sum(grads.values()), result.weights["TRT"][name]
        assert list(origin.parts) == list(terms) and origin.numel == p.numel()
        assert origin.norm == pytest.approx(float(whole.norm()), rel=1e-9)
        for term, g in grads.items():
            assert origin.parts[term] == pytest.approx(float(g.norm()), rel=1e-9)
            share = g.norm() / sum(each.norm() for each in grads.values())
            assert origin.share(term) == pytest.approx(float(share), rel=1e-9)
            cosine = float(F.cosine_similarity(g.flatten(), (whole - g).flatten(), dim=0))
            assert origin.cosines[term] == pytest.approx(cosine, abs=1e-9) or (g == 0).all()
    assert math.isnan(result.weights["TRT"]["2.bias"].cosines["regulariser"])
    assert list(result.weights["own"]["2.bias"].parts) == ["loss"]
    assert list(result.weights["TET"]["2.bias"].parts) == ["squared error"]


@pytest.mark.parametrize(
    ("norms", "ratio", "first", "zeros"),
    [
        ([0.125, 0.25, 0.5, 1.0], 0.5, 0.125, 0),
        ([0.0, 0.0, 0.5, 1.0], 0.5, 0.0, 2),
        ([0.25, 0.0, 1.0], 0.5, 0.25, 1),
        ([0.0, 0.0, 1.0], 0.0, 0.0, 2),
        ([0.0, 0.0, 0.0], 0.0, 0.0, 3),
        ([3.0, 0.0, 0.0], 0.0, 0.0, 2),
        ([1e-200, 1e-100, 1.0], 1e-100, 1e-200, 0),
        ([2.0, 2.0], 1.0, 1.0, 0),
    ],
)
def test_what_is_left_per_step(norms, ratio, first, zeros):
    found = per_step(torch.tensor(norms, dtype=torch.float64))
    assert found.ratio == pytest.approx(ratio, rel=1e-9) and found.first == pytest.approx(first, rel=1e-9)
    assert found.zeros == zeros


def test_nothing_is_left_of_what_is_no_number():
    assert math.isnan(per_step(torch.tensor([math.nan, 1.0, 2.0])).ratio)
    assert math.isnan(per_step(torch.tensor([1.0])).ratio)


def test_a_gradient_that_is_zero():
    """Potentials far above the threshold: the triangle is 0, no factor but 0, no gradient."""
    model = nn.TimeSequential(nn.LIF(0.5), torch.nn.Linear(4, 3))
    x, y = torch.full((5, 2, 4), 9.0), torch.tensor([0, 1])
    layer = analysis.gradients(model, (x, y), batch_dim=1).layers["0"]
    assert layer.vanishing == (0.0, 0.0, 5) and (layer.saturated, layer.silent, layer.dead) == (1, 0, 1)
    assert layer.factors.fired_zero == 1 and torch.equal(layer.factors.zero, torch.ones(4).double())
    assert not layer.factors.exceeded and int(layer.factors.fired.argmax()) == 41
    x[:, 1] = 0.5
    result = analysis.gradients(model, (x, y), batch_dim=1)
    assert (result.layers["0"].saturated, result.layers["0"].dead) == (0, 0) and 0 < result.vanishing < 1
    assert result.vanishing == result.layers["0"].vanishing.ratio
