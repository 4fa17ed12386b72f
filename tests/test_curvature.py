"""trtkern.analysis.curvature: known Hessians, the whole Hessian of small networks, curvlinops, and what is refused."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trtkern import nn
from trtkern.analysis import Curvature, Samples, curvature
from trtkern.analysis._directions import with_filters
from trtkern.analysis._krylov import lanczos, signs
from trtkern.analysis._network import on_reference
from trtkern.analysis._objective import opened
from trtkern.analysis._products import differences, exact


class Quadratic(torch.nn.Module):
    """Logits that are the weights; ``bowl`` makes them a quadratic of known curvature."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, size).view(2, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.flatten().expand(*x.shape[:2], -1)


def symmetric(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(values) @ basis.T


def bowl(matrix):
    def loss(logits, labels):
        w = logits.mean((0, 1))
        return w @ matrix.to(w) @ w / 2

    return loss


VALUES = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.1, -0.5, -3.0])


def toy_samples(count=16, inputs=6, classes=3, batch_size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, count, inputs, generator=generator).to(dtype) * 2
    return Samples.of("test", [(x, torch.arange(count) % classes)], batch_size=batch_size, batch_dim=1)


def spiking(backend="auto", detach_reset=False):
    torch.manual_seed(0)
    lif = {"backend": backend, "detach_reset": detach_reset, "surrogate": "atan"}
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5),
        nn.BatchNormLIF(5, channel_dim=-1, **lif),
        torch.nn.Linear(5, 4),
        nn.LIF(0.5, channel_dim=-1, **lif),
        torch.nn.Linear(4, 3),
    )
    model[1].running_var.fill_(0.1)
    with torch.no_grad():
        model[2].weight.mul_(4)
        model[4].weight.mul_(3)
    return model.eval()


def whole_hessian(model, samples):
    """All second derivatives of SDT's loss, by torch.autograd.functional, on the reference."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    x, y = torch.cat([x for x, _ in samples], 1), torch.cat([y for _, y in samples])

    def loss(w):
        parts = w.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, given, (x,)).mean(0), y)

    with on_reference(model):
        return torch.autograd.functional.hessian(loss, start)


@pytest.mark.parametrize("method", ["exact", "differences"])
def test_a_quadratic_has_its_own_curvature(method):
    found = curvature(
        Quadratic(8).double(), toy_samples(dtype=torch.float64), loss=bowl(symmetric(VALUES.double())), method=method,
        trace_vectors=400,
    )  # fmt: skip
    torch.testing.assert_close(found.eigenvalues, VALUES[:3].double(), rtol=1e-6, atol=0)
    assert found.lowest == pytest.approx(-3.0, rel=1e-6) and found.converged and found.asymmetry < 1e-9
    assert abs(found.trace - float(VALUES.sum())) < 4 * found.trace_spread < 4
    # The same loss in every batch: nothing depends on the samples.
    assert found.trace_error < 1e-9 and found.errors.max() < 1e-9 and found.spreads.max() < 1e-5


def test_eigenvalues_that_are_there_twice_and_none_at_all():
    generator = torch.Generator().manual_seed(0)
    for values in ([4.0, 4.0, 1.0, 0.0, 0.0, -2.0], [0.0] * 6):
        matrix = symmetric(values).double()
        start = torch.randn(6, generator=generator, dtype=torch.float64)
        found = lanczos(lambda v, m=matrix: m @ v, start, 3, iterations=20, tolerance=1e-9, generator=generator)
        torch.testing.assert_close(found.values, torch.tensor(values[:3], dtype=torch.float64), atol=1e-6, rtol=0)


def test_of_a_matrix_that_is_not_symmetric_the_symmetric_part():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    found = lanczos(lambda v: matrix @ v, start, 2, iterations=12, tolerance=0, generator=generator)
    part = (matrix + matrix.T) / 2
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(part).flip(0)[:2], rtol=1e-9, atol=0)
    wanted = (matrix - matrix.T).norm() / (matrix + matrix.T).norm()
    assert found.asymmetry == pytest.approx(float(wanted), rel=1e-6)
    torch.testing.assert_close(part @ found.vectors[0], found.values[0] * found.vectors[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("detach_reset", [False, True])
def test_exact_products_are_the_whole_hessian_and_it_is_symmetric(detach_reset):
    model, samples = spiking(detach_reset=detach_reset).double(), toy_samples(dtype=torch.float64)
    hessian = whole_hessian(model, samples)
    assert float(hessian.norm()) > 0.1
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    with opened("test", model, samples, "sdt") as objective, on_reference(model):
        rows = torch.stack([exact(objective, row).vector for row in torch.eye(objective.size, dtype=torch.float64)])
    torch.testing.assert_close(rows, hessian, rtol=1e-9, atol=1e-12)


def test_a_small_network_against_its_whole_hessian():
    model, samples = spiking(), toy_samples()
    hessian = whole_hessian(spiking().double(), toy_samples(dtype=torch.float64))
    values = torch.linalg.eigvalsh(hessian)
    found = curvature(model, samples, trace_vectors=30)
    assert found.method == "exact" and found.converged and found.asymmetry < 1e-4
    torch.testing.assert_close(found.eigenvalues, values.flip(0)[:3], rtol=1e-3, atol=0)
    assert abs(found.trace - float(hessian.trace())) < 4 * found.trace_spread
    assert 0 < found.trace_spread < 2 * float(hessian.norm()) and 0 < float(found.errors.min()) < 1
    wide = curvature(model, samples, dtype=torch.float64, trace_vectors=5, starts=1, balls={})
    torch.testing.assert_close(wide.eigenvalues, values.flip(0)[:3], rtol=1e-3, atol=0)
    assert wide.asymmetry < 1e-12


@pytest.mark.skipif(importlib.util.find_spec("curvlinops") is None, reason="the oracle curvlinops is not installed")
def test_curvlinops_agrees():
    from curvlinops import HessianLinearOperator

    model, samples = spiking("reference").double(), toy_samples(count=8, batch_size=8, dtype=torch.float64)

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.movedim(0, 1)).mean(0)

    wrapped = Mean().eval()
    data = [(x.movedim(1, 0), y) for x, y in samples]
    parameters = list(wrapped.parameters())
    try:
        operator = HessianLinearOperator(wrapped, torch.nn.CrossEntropyLoss(), parameters, data)
    except (TypeError, ValueError):  # newer versions take them by name
        named = dict(wrapped.named_parameters())
        operator = HessianLinearOperator(wrapped, torch.nn.CrossEntropyLoss(), named, data)
    whole = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    values = torch.linalg.eigvalsh(whole).flip(0)[:3]
    found = curvature(model, samples, trace_vectors=2, balls={})
    torch.testing.assert_close(found.eigenvalues, values, rtol=1e-3, atol=0)


def test_differences_on_a_smooth_network_are_the_exact_products():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    samples = toy_samples(dtype=torch.float64)
    with opened("test", model, samples, "tet") as objective:
        v = signs(objective.size, torch.Generator().manual_seed(0), objective.start[0])
        one, other = exact(objective, v), differences(objective, v, 1e-4)
    torch.testing.assert_close(one.vector, other.vector, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(one.quotients, other.quotients, rtol=1e-5, atol=1e-8)
    assert objective.mean(one.quotients) == pytest.approx(float(v @ one.vector))
    ours = curvature(model, samples, method="differences", step=1e-4, balls={})
    theirs = curvature(model, samples, method="exact", balls={})
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-3, atol=0)


def test_differences_run_on_the_fused_kernels_and_say_how_asymmetric_they_are():
    found = curvature(spiking(), toy_samples(), method="differences", step=0.05, iterations=20, trace_vectors=6)
    assert found.method == "differences" and found.step == 0.05
    assert math.isfinite(found.asymmetry) and found.asymmetry > 1e-3
    assert any("not symmetric" in said for said in found.remarks())


def test_the_rise_is_that_of_the_true_loss_inside_the_ball():
    matrix = symmetric([3.0, 2.0, 1.0, 0.5]).double()
    model = Quadratic(4).double()
    w = model.w.detach().flatten().clone()
    found = curvature(
        model, toy_samples(dtype=torch.float64), loss=bowl(matrix), eigenvalues=1, starts=4, ascent_steps=40,
        balls={"sphere": 0.1, "box": 0.01, "filters": 0.05},
    ).sharpness  # fmt: skip

    def rise(d):
        return ((w + d) @ matrix * (w + d)).sum(-1) / 2 - w @ matrix @ w / 2

    rows = w.view(2, 2).norm(dim=1)[:, None]
    d = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    best = {
        "sphere": rise(0.1 * F.normalize(d, dim=1)).max(),
        "box": rise(d.sign() * 0.01 * (w.abs() + 1)).max(),
        "filters": rise((F.normalize(d.view(-1, 2, 2), dim=2) * 0.05 * rows).flatten(1)).max(),
    }
    for ball, wanted in best.items():
        assert found[ball].increase == pytest.approx(float(wanted), rel=1e-3), ball
        assert found[ball].percent == pytest.approx(100 * float(wanted) / (1 + float(w @ matrix @ w / 2)), rel=1e-3)
        assert found[ball].spread < 0.01 and found[ball].error < 1e-9


def test_norms_and_neurons_have_no_filters():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.LayerNorm([2, 4, 4]), nn.PLIF(), torch.nn.Linear(32, 3)
    )
    names = [name for name, _ in model.named_parameters()]
    moved = [name for name, yes in zip(names, with_filters(model, names), strict=True) if yes]
    assert moved == ["0.weight", "3.weight"]


def test_the_model_and_the_random_numbers_stay_as_they_were():
    model = spiking().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = [(module, dict(vars(module))) for module in model.modules()]
    model(torch.rand(4, 3, 6)).sum().backward()
    model.load_state_dict(before)
    grads = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(7)
    wanted = torch.rand(2)
    torch.manual_seed(7)
    for method in ("exact", "differences"):
        found = curvature(model, toy_samples(), method=method, iterations=3, trace_vectors=2, ascent_steps=1)
        again = curvature(model, toy_samples(), method=method, iterations=3, trace_vectors=2, ascent_steps=1)
        assert torch.equal(found.eigenvalues, again.eigenvalues) and found.trace == again.trace
    assert torch.equal(torch.rand(2), wanted) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(vars(module).keys() == had.keys() and module.training for module, had in held)
    assert model[3].backend == "auto" and model[1].lif.backend == "auto"


def test_packed_spikes_and_checkpoints_are_differentiated_twice():
    from trtkern.nn.block import ConvBatchNormLIF

    torch.manual_seed(0)
    norm = nn.BatchNormLIF(4, packed=True, pool=2)
    model = torch.nn.Sequential(
        ConvBatchNormLIF(nn.SpikeConv2d(2, 4, 3, padding=1), norm, checkpoint=True),
        nn.SpikeLinear(4 * 2 * 2, 5), nn.LIF(0.5, channel_dim=-1, packed=True), nn.SpikeLinear(5, 3),
    )  # fmt: skip
    data = [(torch.rand(3, 4, 2, 4, 4) * 4, torch.tensor([0, 1, 2, 0]))]
    found = curvature(model, Samples.of("test", data, batch_dim=1), eigenvalues=1, trace_vectors=2, balls={})
    assert found.method == "exact" and float(found.eigenvalues[0]) > 0
    assert norm.packed and model[0].checkpoint and model[2].packed


def test_saved_shown_and_drawn(tmp_path):
    found = curvature(spiking(), toy_samples(), iterations=4, trace_vectors=2, ascent_steps=1)
    found.save(tmp_path / "curvature.json")
    loaded = Curvature.load(tmp_path / "curvature.json")
    assert torch.equal(loaded.eigenvalues, found.eigenvalues) and loaded.sharpness.keys() == found.sharpness.keys()
    assert loaded.sharpness["box"].increase == found.sharpness["box"].increase
    assert "eigenvalue 1" in str(found) and "step function of the weights" in str(found)
    assert len(found.plot(tmp_path / "curvature.png").axes) == 2
    both = Curvature.pictures({"one": found, "other": loaded})
    assert len(both) == 2


def test_progress_reaches_its_end():
    told = []
    curvature(
        spiking(), toy_samples(), iterations=4, trace_vectors=2, ascent_steps=1, progress=lambda *a: told.append(a)
    )
    done = [d for d, _ in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1


@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        ({"method": "exakt"}, ValueError, "curvature: method: expected one of auto, exact, differences.*did you mean"),
        ({"loss": "std"}, ValueError, "curvature: loss: expected one of sdt, tet, or a function.*did you mean 'sdt'"),
        ({"loss": 3}, TypeError, "expected loss to be 'sdt' or 'tet' or a function"),
        ({"loss": lambda o, y: o.mean((0, 1))}, TypeError, "expected loss to return a 0-dim tensor, the mean"),
        ({"eigenvalues": 0}, ValueError, "expected eigenvalues to be an int of at least 1, got 0"),
        ({"eigenvalues": 1000}, ValueError, "expected at most 84 eigenvalues, as there are weights, got 1000"),
        ({"starts": True}, ValueError, "expected starts to be an int of at least 1, got True"),
        ({"step": math.nan}, ValueError, "expected step to be a number above 0, got nan"),
        ({"balls": {"cube": 0.1}}, ValueError, "curvature: balls: expected one of filters, box, sphere"),
        ({"balls": {"box": -1.0}}, ValueError, "expected box to be a number above 0, got -1.0"),
        ({"dtype": torch.float16}, ValueError, "expected dtype to be torch.float32, torch.float64 or None"),
    ],
)
def test_what_is_refused(given, kind, why):
    with pytest.raises(kind, match=why):
        curvature(spiking(), toy_samples(), **given)


def test_what_is_not_finite_is_said():
    model = spiking()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    for method in ("exact", "differences"):
        with pytest.raises(RuntimeError, match="expected finite second derivatives, got a product that is not"):
            curvature(model, toy_samples(), method=method)


class Once(torch.autograd.Function):
    """A spike whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


def test_a_model_that_is_differentiable_once():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.last(Once.apply(self.first(x)))

    with pytest.raises(RuntimeError, match=r'that can be differentiated twice.*pass method="differences"'):
        curvature(Foreign(), toy_samples(), method="exact")
    assert curvature(Foreign(), toy_samples(), iterations=3, trace_vectors=2, balls={}).method == "differences"
