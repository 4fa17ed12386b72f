"""Gradients over time, against a plain loop over the steps whose every h[t] and v[t] retains its gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from trtkern import analysis, cli, nn
from trtkern.analysis._gradients import per_step
from trtkern.commands import _runs
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


class Handed(torch.nn.Module):
    """Two layers whose potentials take part in the output, over a sequence in two parts, or a step at a time."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
        self.lif = nn.LIF(0.7, 0.9, v_reset=None, reset_amount=0.6)

    def forward(self, x):
        x = self.first(x)
        if self.way == "h":
            s, h = self.lif(x, return_h=True)
            return self.second(s + 0.3 * h)
        if self.way == "v and state":
            s, state, v = self.lif(x, return_state=True, return_v=True)
            return self.second(s + 0.3 * v) + 0.2 * self.second(state.to(x.dtype))
        if self.way == "parts":
            s, state = self.lif(x[:2], return_state=True)
            more, end = self.lif(x[2:], state, return_state=True)
            return self.second(torch.cat((s, more))) + self.second(end.to(x.dtype)) * self.second(state.to(x.dtype))
        v, out = None, []
        for current in x.unbind(0):
            s, v = self.lif.step(current, v)
            out.append(self.second(s))
        return torch.stack(out)

    def plain(self, x):
        """The same by hand, in float64; h and v retain their gradients."""
        x = self.first(x)
        v, h_all, v_all, out = torch.zeros_like(x[0]), [], [], []
        for current in x.unbind(0):
            h = 0.7 * v + 0.9 * current
            s = Spike.apply(h - 1)
            v = h - 0.6 * s
            for each in (h, v):
                each.retain_grad()
            h_all.append(h)
            v_all.append(v)
            out.append(self.second(s + 0.3 * {"h": h, "v and state": v}.get(self.way, 0 * v)))
        logits = torch.stack(out)
        if self.way == "v and state":
            logits = logits + 0.2 * self.second(v)
        elif self.way == "parts":
            logits = logits + self.second(v) * self.second(v_all[1])
        return logits, h_all, v_all


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("way", ["h", "v and state", "parts", "steps"])
def test_potentials_that_are_handed_out(way, backend):
    torch.manual_seed(6)
    model = Handed(way)
    model.lif.backend = backend
    x, y = 2 * torch.randn(5, 4, 4), torch.tensor([0, 1, 2, 0])
    result = analysis.gradients(model, (x, y), batch_dim=1)
    oracle = copy.deepcopy(model).double()
    for name, loss in {"SDT": nn.SDTLoss(), "TRT": nn.TRTLoss(oracle)}.items():
        logits, *potentials = oracle.plain(x.double())
        torch.testing.assert_close(logits, model(x).double(), rtol=1e-5, atol=1e-5)
        loss(logits, y).backward()
        for i, each in enumerate(potentials):
            want = [torch.zeros(()).double() if t.grad is None else t.grad.norm() for t in each]
            torch.testing.assert_close(result.layers["lif"].norms[name][i], torch.stack(want), rtol=1e-5, atol=1e-12)
    assert len(result.layers["lif"].factors.product) == 4 and list(result.layers) == ["lif"]


class Foreign(torch.nn.Module):
    """Nothing of trtkern: a loop over the steps, whose neurons are called with one step or with all."""

    class Neuron(torch.nn.Module):
        def forward(self, x, v=0.0):
            h = 0.5 * v + x
            s = Spike.apply(h - 1)
            return s, (1 - s) * h

    class Multi(Neuron):
        def forward(self, x):
            v, out = 0.0, []
            for current in x.unbind(0):
                s, v = super().forward(current, v)
                out.append(s)
            return torch.stack(out)

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)
        self.third, self.fourth = torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)
        self.single, self.multi, self.ours = self.Neuron(), self.Multi(), nn.LIF(0.5)
        self.seen = []

    def forward(self, x):
        v, out = 0.0, []
        for current in x.unbind(0):
            s, v = self.single(self.first(current), v)
            out.append(s)
        multi = self.multi(self.second(torch.stack(out)))
        self.seen = [out, [multi]]
        return self.fourth(self.ours(self.third(multi)))


def test_modules_of_another_kind():
    torch.manual_seed(7)
    model = Foreign()
    x, y = 3 * torch.randn(4, 6, 4), torch.arange(6) % 3
    result = analysis.gradients(model, (x, y), layers=["single", "multi", "ours"], batch_dim=1)
    assert [(layer.kind, layer.ours, layer.neurons) for layer in result.layers.values()] == [
        ("Neuron", False, 6), ("Multi", False, 5), ("LIF", True, 5)
    ]  # fmt: skip
    loss = nn.TETLoss()(model(x), y)
    for name, tensors in zip(("single", "multi"), model.seen, strict=True):
        grads = torch.autograd.grad(loss, tensors, retain_graph=True)
        want = (torch.stack(grads) if len(grads) > 1 else grads[0]).flatten(1).double().norm(dim=1)
        layer = result.layers[name]
        torch.testing.assert_close(layer.norms["TET"].h, want, rtol=1e-5, atol=1e-12)
        assert layer.norms["TET"].v is layer.factors is layer.dead is layer.silent is None and layer.last.h[-1] > 0
    assert result.layers["ours"].factors is not None and "no neurons of trtkern" in str(result)
    with pytest.raises(ValueError, match=r"expected .*one of .*single.*got 'singel'; did you mean 'single'"):
        analysis.gradients(model, (x, y), layers=["singel"], batch_dim=1)
    del model.ours
    model.ours = model.Multi()
    with pytest.raises(ValueError, match=r"gradients: expected a model with neurons of trtkern, got none; .*layers="):
        analysis.gradients(model, (x, y), batch_dim=1)


def test_other_surrogates_and_kinds_of_firing():
    """The bound is of the leak alone: a steep surrogate passes it, and the result says so."""
    x, y = torch.full((4, 2, 3), 1.9), torch.tensor([0, 1])
    for surrogate, alpha, over in (("triangle", 1.0, False), ("sigmoid", 8.0, True), ("triangle", 0.25, True)):
        neurons = nn.LIF(0.5, 0.6, surrogate=surrogate, alpha=alpha, v_threshold=1.15, fire_on_equal=True)
        model = nn.TimeSequential(neurons, torch.nn.Linear(3, 2))
        result = analysis.gradients(model, (x, y), {}, batch_dim=1, max_k=2)
        assert result.layers["0"].factors.exceeded == over and len(result.layers["0"].factors.product) == 2
        assert ("decay^k is a bound only where" in str(result)) == over and result.losses == []


def small():
    torch.manual_seed(8)
    model = build("conv", (1, 4, 4), 3, timesteps=3, layers=[4, 4], checkpoint=True)
    return model, (2 * torch.rand(5, 1, 4, 4), torch.arange(5) % 3)


def test_the_model_stays_as_it_was():
    model, data = small()
    model.train()
    model(data[0]).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        analysis.gradients(model, data)
    assert model.training and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(grads[name], p.grad) for name, p in model.named_parameters())
    assert all(block.checkpoint for block in model.layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_refused():
    model, (x, y) = small()
    with pytest.raises(ValueError, match="gradients: expected max_k to be an int of at least 1, got 0"):
        analysis.gradients(model, (x, y), max_k=0)
    with pytest.raises(ValueError, match=r"losses\['all'\] to return a 0-dim tensor that depends on the logits"):
        analysis.gradients(model, (x, y), {"all": lambda logits, labels: logits})
    with pytest.raises(TypeError, match=r"gradients: expected layers as a list of names of modules, got 'classifier'"):
        analysis.gradients(model, (x, y), layers="classifier")
    with pytest.raises(ValueError, match="gradients: expected 0 to give a tensor that gradients flow through"):
        analysis.gradients(torch.nn.Sequential(torch.nn.Identity(), model), (x, y), layers=["0"])
    frames = [(torch.rand(t, 2, 1, 4, 4), y[:2]) for t in (3, 2)]
    with pytest.raises(ValueError, match="gradients: expected batches of T = 3 steps, got one of 2"):
        analysis.gradients(model, frames, batch_dim=1)
    idle = nn.TimeSequential(nn.LIF(0.5, torch.tensor([1.0, 0.0])), torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected neurons whose gain is not 0, got 0 with gain 0"):
        analysis.gradients(idle, (torch.rand(3, 5, 2), y), batch_dim=1)
    parts = (torch.nn.Flatten(1, 2), nn.LIF(0.5, channel_dim=-1), torch.nn.Unflatten(1, (5, 2)), torch.nn.Flatten(2))
    other = torch.nn.Sequential(*parts, torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"1 to run on \[T, B, ...\] with B = 5, got .*; name other modules"):
        analysis.gradients(other, (torch.rand(3, 5, 2, 2), y), batch_dim=1)


def test_what_is_saved_is_loaded_and_drawn(tmp_path):
    model, data = small()
    result = analysis.gradients(model, data)
    result.save(tmp_path / "gradients.json")
    found = analysis.Gradients.load(tmp_path / "gradients.json")
    assert str(found) == str(result) and found.to_json() == result.to_json()
    assert found.layers["layers.0.norm"].last.h.dtype == torch.float64
    single = analysis.Gradients.pictures({"": found})
    assert len(found.plot().axes) == len(single) == 3 + 1 + 2 + 2
    several = analysis.Gradients.pictures({"SDT": found, "TRT": result})
    assert len(several) == 1 + 2 + 2 * 2
    for picture in several.values():
        _drawn(picture)


def _drawn(picture):
    from matplotlib.figure import Figure

    axes = Figure(figsize=picture.size, layout="constrained").subplots()
    picture.draw(axes)
    axes.figure.canvas.draw()
    return axes


def test_pictures_of_many_layers_of_one_step_and_of_nothing():
    many = nn.TimeSequential(*[part for _ in range(9) for part in (torch.nn.Linear(3, 3), nn.LIF(0.9))])
    x, y = 3 * torch.rand(4, 2, 3), torch.tensor([0, 1])
    many.append(torch.nn.Linear(3, 2))
    pictures = list(analysis.Gradients.pictures({"": analysis.gradients(many, (x, y), batch_dim=1)}).values())
    assert len(_drawn(pictures[0]).get_yticklabels()) == 9
    one = analysis.gradients(many, (x[:1], y), {}, batch_dim=1)
    assert math.isnan(one.vanishing) and "With one time step there is no past" in str(one)
    for result in (one, analysis.gradients(many, (0 * x, y), {}, batch_dim=1)):
        for picture in [*analysis.Gradients.pictures({"": result}).values(), *pictures]:
            _drawn(picture)
        for picture in analysis.Gradients.pictures({"a": result, "b": result}).values():
            _drawn(picture)


@pytest.mark.usefixtures("no_pictures", "one_thread")
def test_the_command(tmp_path, monkeypatch, capsys):
    """The losses of a run: its own with its own settings. A checkpoint's numbers lie beside those of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    train = [
        "train",
        "--data",
        "digits",
        "--epochs",
        "1",
        "-T",
        "3",
        "--lam",
        "0.01",
        "--delta",
        "0.7",
        "--run-dir",
        "run",
    ]
    options = ["--set", "train_images=40", "--set", "model.layers=[4]", "--backend", "reference", "--device", "cpu"]
    assert cli.main([*train, *options, "--threads", "1"]) == 0
    monkeypatch.setattr(analysis.Gradients, "plot", lambda self, path: path.write_text("picture"))
    capsys.readouterr()
    assert cli.main(["analyze", "gradients", "run", "--samples", "20", "--batch-size", "8", "--max-k", "1"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.norm" in out and "run/analysis/gradients.json and gradients.png" in out
    found = analysis.Gradients.load("run/analysis/gradients.json")
    assert found.losses == ["SDT", "TET", "TRT"] and (found.samples, found.timesteps) == (20, 3)
    assert len(found.layers["layers.0.norm"].factors.product) == 1 and "20 of 40 train" in found.about["samples"]
    (file,) = tmp_path.glob("run/checkpoint-*")
    assert cli.main(["analyze", "gradients", str(file), "--samples", "20"]) == 0
    again = analysis.Gradients.load(f"run/analysis/gradients-{file.stem}.json")
    trainer = _runs.to_evaluate(*_settings(file))
    (module,) = (m for n, m in trainer.model.named_modules() if n == "layers.0.conv")
    w, slope = module.weight.detach().double(), [math.exp(0.7 * t) - 1 for t in range(3)]
    size = w.abs()
    grad = sum(w * (2 + c * (size + 2e-5)) / (1 + c * (size + 1e-5)) ** 2 for c in slope) * 0.01 / 3
    part = again.weights["TRT"]["layers.0.conv.weight"].parts["regulariser"]
    assert part == pytest.approx(float(grad.norm()), rel=1e-5)
    assert cli.main(["analyze", "gradients", "run", "--max-k", "0"]) == 2
    assert "--max-k: expected an integer of at least 1, got 0" in capsys.readouterr().err


def _settings(file):
    from trtkern.training import resuming

    saved = _runs.weights(file)
    return saved, resuming.settings_in(saved)
