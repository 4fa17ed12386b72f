"""TRT, TET and SDT against their formulas in float64, for every recipe's hyper-parameters."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from trtkern import nn
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.selftest import REGULARIZER_TOLERANCE, compare_regularizer

# T, lam, delta, eps, eta: CIFAR, ImageNet-100, DVS-CIFAR10, N-Caltech101 (docs/trt.md), and the code's defaults.
RECIPES = {
    "cifar": (6, 1e-5, 0.25, 1e-5, 0.05),
    "imagenet-100": (4, 5e-5, 0.5, 1e-5, 0.001),
    "dvs-cifar10": (10, 5e-5, 0.5, 1e-5, 0.001),
    "n-caltech101": (10, 5e-5, 0.5, 1e-5, 0.05),
    "defaults": (10, 1e-5, 0.5, 1e-5, 0.05),
    "strong": (6, 0.1, 0.25, 1e-5, 0.05),
}


def make(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 5, 3, padding=1), torch.nn.BatchNorm2d(5), torch.nn.Flatten(), torch.nn.Linear(80, 7)
    )
    return net


def formula(logits, target, named, timesteps, lam, delta, eps, eta):
    """The loss as the paper writes it, a loop over t, weights and all, in whatever dtype it is given."""
    total = 0
    onehot = torch.nn.functional.one_hot(target, logits.shape[2]).to(logits.dtype)
    for t in range(timesteps):
        ce = -(logits[t].log_softmax(1) * onehot).sum(1).mean()
        mse = ((logits[t] - onehot) ** 2).mean()
        r = sum((lam * w**2 / (1 + (math.exp(delta * t) - 1) * (w.abs() + eps))).sum() for w in named)
        total = total + (1 - eta) * ce + eta * mse + r
    return total / timesteps


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["cpu", "triton", "reference"])
def test_trt_is_the_formula(recipe, where):
    timesteps, lam, delta, eps, eta = RECIPES[recipe]
    net = make()
    loss = nn.TRTLoss(net, lam, delta, eps, eta, backend=where)
    logits = torch.randn(timesteps, 3, 7, requires_grad=True)
    target = torch.tensor([0, 3, 6])
    value = loss(logits, target)
    value.backward()
    named = [(n, p.detach().double().requires_grad_()) for n, p in net.named_parameters() if "bias" not in n]
    exact = logits.detach().double().requires_grad_()
    want = formula(exact, target, [p for _, p in named], timesteps, lam, delta, eps, eta)
    want.backward()
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-6, atol=1e-6 * exact.grad.abs().max().item())
    got = dict(net.named_parameters())
    for name, p in named:
        torch.testing.assert_close(got[name].grad.double(), p.grad, rtol=1e-6, atol=1e-12 * lam)
    assert got["0.bias"].grad is None and got["1.bias"].grad is None


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_regularizer_against_float64(backend):
    steps, recipes = (1, 2, 3, 5, 8, 13, 40), list(RECIPES.values())
    if backend == "triton":  # the interpreter takes half a second for one; test_trt_is_the_formula has every recipe
        steps, recipes = (1, 3, 13), recipes[:1]
    specs = itertools.chain(
        (RegularizerSpec(t, lam, delta, eps) for t, lam, delta, eps, _ in recipes),
        (RegularizerSpec(t, 1e-3, 0.3, 1e-5) for t in steps),
        [
            RegularizerSpec(6, 1e-3, 0.0, 1e-5),
            RegularizerSpec(6, 1e-3, 0.5, 0.0),
            RegularizerSpec(8, 1e-3, 200.0, 1e-5),
        ],
    )
    for spec in specs:
        assert compare_regularizer(backend, spec) <= REGULARIZER_TOLERANCE, spec


def test_add_grad_is_the_gradient_of_the_penalty():
    net, twin = make(), make()
    logits, target = torch.randn(6, 4, 7), torch.tensor([1, 2, 3, 4])
    whole, split = nn.TRTLoss(net, lam=1e-2), nn.TRTLoss(twin, lam=1e-2)
    want = whole.parts(logits, target)
    (3.0 * want.total).backward()
    got = split.parts(logits, target, regularize=False)
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    penalty = split.add_grad_(scale=3.0)
    assert penalty.item() == pytest.approx(want.regularizer.item(), rel=1e-6)
    assert (got.total + penalty).item() == pytest.approx(want.total.item(), rel=1e-6)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        grad = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(b.grad, grad + 1, rtol=1e-6, atol=1e-6)


def test_identities():
    net = make()
    logits, target = torch.randn(4, 3, 7), torch.tensor([0, 3, 6])
    tet = nn.TETLoss(lam=0.0)(logits, target)
    assert nn.TRTLoss(net, lam=0.0, eta=0.0)(logits, target).item() == pytest.approx(tet.item(), rel=1e-6)
    weights = [p for n, p in net.named_parameters() if "bias" not in n]
    plain = 1e-3 * sum(p.double().square().sum() for p in weights).item()
    for spec in (RegularizerSpec(5, 1e-3, 0.0, 1e-5), RegularizerSpec(1, 1e-3, 0.7, 1e-5)):
        assert regularizer(weights, spec).item() == pytest.approx(plain, rel=1e-6)


def test_tet_and_sdt_are_their_formulas():
    logits, target = torch.randn(4, 3, 7, dtype=torch.float64), torch.tensor([0, 3, 6])
    ce = torch.nn.functional.cross_entropy
    want = 0.95 * sum(ce(step, target) for step in logits) / 4 + 0.05 * (logits - 1).square().mean()
    assert nn.TETLoss()(logits, target).item() == pytest.approx(want.item(), rel=1e-12)
    assert nn.SDTLoss()(logits, target).item() == pytest.approx(ce(logits.mean(0), target).item(), rel=1e-12)
    assert nn.SDTLoss().add_grad_() == 0


def test_the_terms_add_up_to_the_loss_without_its_penalty():
    net = make().double()
    logits, target = torch.randn(3, 4, 7).double().requires_grad_(), torch.arange(4)
    for loss in (
        nn.TRTLoss(net, 0.1, eta=0.3),
        nn.TETLoss(lam=0.2),
        nn.TETLoss(lam=1),
        nn.SDTLoss(label_smoothing=0.1),
    ):
        terms, parts = loss.terms(logits, target), loss.parts(logits, target, regularize=False)
        torch.testing.assert_close(sum(terms.values()), parts.total, rtol=0, atol=0)
        assert ("squared error" in terms) == (loss.mse_weight > 0) and ("cross entropy" in terms) == (
            loss.mse_weight < 1
        )
        if "squared error" in terms:
            assert float(terms["squared error"].detach()) == loss.mse_weight * float(parts.mse)
    loss = nn.TRTLoss(net, 0.1, 0.5)
    grads = torch.autograd.grad(loss(logits, target), [w for _, w in loss.regularized()])
    for found, wanted in zip(loss.penalty_grads(3), grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())


def test_coverage_is_the_references_less_the_neurons():
    net = torch.nn.Sequential(*make(), nn.PLIF(), nn.LIF(v_threshold=torch.nn.Parameter(torch.tensor(1.0))))
    chosen = [n for n, _ in nn.TRTLoss(net).regularized()]
    assert chosen == ["0.weight", "1.weight", "3.weight"]
    assert [n for n, _ in nn.TRTLoss(net, exclude="norm").regularized()] == ["0.weight", "3.weight"]
    assert [n for n, _ in nn.TRTLoss(net, exclude=("norm", "classifier")).regularized()] == ["0.weight"]
    pairs = [(n, p) for n, p in net.named_parameters() if n.startswith("0")]
    assert [n for n, _ in nn.TRTLoss(pairs).regularized()] == ["0.weight"]
    net[0].weight.requires_grad_(False)
    assert [n for n, _ in nn.TRTLoss(net).regularized()] == ["1.weight", "3.weight"]


def test_the_loss_registers_nothing():
    loss = nn.TRTLoss(make())
    assert not list(loss.parameters()) and not loss.state_dict()
    copy.deepcopy(loss)
    assert "4,000" not in repr(loss) and "weights in 3 tensors" in repr(loss)


@pytest.mark.parametrize("retain", [False, True])
def test_two_backwards_add_up(retain):
    net = make()
    loss = nn.TRTLoss(net, lam=1e-2)
    value = loss(torch.randn(4, 3, 7), torch.tensor([0, 3, 6]))
    value.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    value.backward(retain_graph=retain)
    for name, p in net.named_parameters():
        if name in first:
            torch.testing.assert_close(p.grad, 2 * first[name])


def test_the_penalty_has_one_derivative_unless_asked_for_two():
    w = torch.randn(5, requires_grad=True)
    spec = RegularizerSpec(4, 1e-3, 0.25, 1e-5)
    (g,) = torch.autograd.grad(regularizer([w], spec), w, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        g.sum().backward()
    (g,) = torch.autograd.grad(regularizer([w], spec, backend="reference"), w, create_graph=True)
    g.sum().backward()
    assert w.grad.abs().min() > 0


def test_channels_last_and_transposed_weights():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    slanted = torch.randn(6, 5).t().requires_grad_()
    odd = torch.randn(4, 10)[:, ::2].requires_grad_()
    spec = RegularizerSpec(4, 1e-2, 0.25, 1e-5)
    for leaf in (weight, slanted, odd):
        (want,) = torch.autograd.grad(regularizer([leaf], spec, backend="reference"), leaf)
        regularizer([leaf], spec).backward()
        torch.testing.assert_close(leaf.grad, want)
        value = add_regularizer_grad_([leaf], spec)
        torch.testing.assert_close(leaf.grad, 2 * want)
        assert value.item() == pytest.approx(regularizer([leaf], spec).item())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n: nn.TRTLoss(n, eta=1.5), ValueError, r"eta to be a number in \[0, 1\]"),
        (lambda n: nn.TRTLoss(n, lam=-1.0), ValueError, "lam to be a finite number >= 0"),
        (lambda n: nn.TRTLoss(n, delta=math.nan), ValueError, "delta"),
        (lambda n: nn.TRTLoss(n, exclude=("bias",)), ValueError, "exclude from"),
        (lambda n: nn.TRTLoss([], lam=1.0), ValueError, "got none"),
        (lambda n: nn.TRTLoss([1, 2]), TypeError, "pairs"),
        (lambda n: nn.TRTLoss(n).add_grad_(), RuntimeError, "expected a call of the loss"),
        (lambda n: nn.TETLoss(lam=2), ValueError, "lam"),
        (lambda n: nn.SDTLoss()(torch.zeros(3, 7), torch.zeros(3).long()), ValueError, r"logits \[T, B, C\]"),
        (lambda n: nn.SDTLoss()(torch.zeros(0, 3, 7), torch.zeros(3).long()), ValueError, "no empty axis"),
        (lambda n: nn.SDTLoss()(torch.zeros(4, 3, 7).long(), torch.zeros(3).long()), TypeError, "floating-point"),
        (
            lambda n: nn.SDTLoss()(torch.zeros(4, 3, 7), torch.zeros(3).int()),
            TypeError,
            r"int64 labels \[B\], or float",
        ),
        (lambda n: nn.SDTLoss()(torch.zeros(4, 3, 7), [0, 1, 2]), TypeError, "int64 labels"),
        (lambda n: nn.SDTLoss()(torch.zeros(4, 3, 7), torch.zeros(3)), ValueError, r"probabilities of shape \(3, 7\)"),
        (
            lambda n: nn.TRTLoss(n)(torch.zeros(4, 3, 7), torch.zeros(3, 6)),
            ValueError,
            r"probabilities of shape \(3, 7\)",
        ),
        (lambda n: nn.TETLoss()(torch.zeros(4, 3, 7), torch.zeros(3, 7) - 0.1), ValueError, "finite and >= 0"),
        (lambda n: nn.TETLoss()(torch.zeros(4, 3, 7), torch.full((3, 7), math.nan)), ValueError, "finite and >= 0"),
        (lambda n: nn.TRTLoss(n)(torch.zeros(4, 3, 7), torch.full((3, 7), math.inf)), ValueError, "finite and >= 0"),
        (lambda n: nn.SDTLoss()(torch.zeros(4, 3, 7), torch.zeros(4).long()), ValueError, r"shape \(3,\)"),
        (lambda n: nn.TETLoss()(torch.zeros(4, 3, 7), torch.tensor([0, 1, 7])), ValueError, r"labels in \[0, 7\)"),
        (lambda n: nn.TRTLoss(n)(torch.zeros(4, 3, 7), torch.tensor([0, -1, 6])), ValueError, "from -1 to 6"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


LOSSES = {
    "sdt": lambda net, **more: nn.SDTLoss(**more),
    "tet": lambda net, **more: nn.TETLoss(lam=0.2, **more),
    "trt": lambda net, **more: nn.TRTLoss(net, lam=1e-3, eta=0.3, **more),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_soft_labels_are_mixed_losses(name, smoothing):
    loss = LOSSES[name](make(), label_smoothing=smoothing)
    logits, labels = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 6])
    onehot = torch.nn.functional.one_hot(labels, 7).double()
    assert loss(logits, onehot).item() == pytest.approx(loss(logits, labels).item(), rel=1e-12)
    # Mixup of B images with their neighbours: the cross entropy is linear in the target, the squared error is not.
    mixed = 0.7 * onehot + 0.3 * onehot.roll(1, 0)
    for target in (mixed, mixed.float(), mixed.bfloat16()):
        value = loss(logits, target)
        exact = target.double()
        smooth = (1 - smoothing) * exact + smoothing / 7
        steps = logits.mean(0, keepdim=True) if name == "sdt" else logits
        want = -(steps.log_softmax(2) * smooth).sum(2).mean()
        if name == "tet":
            want = 0.8 * want + 0.2 * (logits - 1).square().mean()
        if name == "trt":
            want = 0.7 * want + 0.3 * (logits - exact).square().mean() + loss.add_grad_(0.0)
        assert value.item() == pytest.approx(want.item(), rel=1e-7)
        (got,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(got, torch.autograd.grad(want, logits)[0], rtol=1e-7, atol=1e-9)


def test_soft_labels_may_want_a_gradient_and_run_in_half_precision():
    target = torch.full((3, 7), 1 / 7, requires_grad=True)
    value = nn.TRTLoss(make())(torch.randn(4, 3, 7).bfloat16(), target)
    value.backward()
    assert value.dtype == torch.float32 and target.grad.abs().sum() > 0


def penalised(loss, net):
    """The names in the net whose tensors get a gradient from the penalty."""
    net.zero_grad()
    loss.add_grad_()
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_the_penalty_is_of_the_parameters_that_are_in_the_model_now():
    logits, target, names = torch.randn(4, 3, 7), torch.tensor([0, 3, 6]), {"0.weight", "1.weight", "3.weight"}
    net = make()
    loss = nn.TRTLoss(net, lam=0.1)
    before = loss.parts(logits, target).regularizer
    net.load_state_dict({name: 2 * held for name, held in net.state_dict().items()}, assign=True)
    after = loss.parts(logits, target)
    assert after.regularizer > 2 * before and penalised(loss, net) == names
    twin = nn.TRTLoss(net, lam=0.1).parts(logits, target)
    assert after.regularizer == twin.regularizer
    torch.nn.utils.parametrizations.weight_norm(net[3])
    inside = {f"3.parametrizations.weight.original{i}" for i in (0, 1)}
    assert {name for name, _ in loss.regularized()} == {"0.weight", "1.weight"} | inside
    assert penalised(loss, net) == {"0.weight", "1.weight"} | inside
    net[0] = torch.nn.Conv2d(2, 5, 3)
    assert loss.regularized()[0][1] is net[0].weight
    net[0].weight.requires_grad_(False)
    assert "0.weight" not in penalised(loss, net)
    net[0].weight.requires_grad_(True)
    assert "0.weight" in penalised(loss, net)
    with torch.device("meta"):
        bare = make()
    late = nn.TRTLoss(bare)
    bare.to_empty(device="cpu").load_state_dict(make().state_dict())
    late(logits, target)
    assert penalised(late, bare) == names


def test_the_penalty_of_a_functional_call_is_of_its_parameters():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(5, 7)
            self.loss = nn.TRTLoss(self.net, lam=0.1, eta=0.0)

        def forward(self, x, target):
            return self.loss(self.net(x), target)

    both, x, target = Both(), torch.randn(4, 3, 5), torch.tensor([0, 3, 6])
    held = {name: 3 * p.detach() for name, p in both.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(both, p, (x, target)))(held)
    both.load_state_dict(held)
    both(x, target).backward()
    for name, p in both.named_parameters():
        assert torch.equal(got[name], p.grad), name
    _, tangent = torch.func.jvp(lambda p: torch.func.functional_call(both, p, (x, target)), (held,), (held,))
    torch.testing.assert_close(tangent.float(), sum((got[name] * held[name]).sum() for name in held))


def test_copies_and_pickles_hold_the_model_that_came_with_them():
    net = make()
    loss = nn.TRTLoss(net)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        for first in (True, False):
            pair = copied((net, loss) if first else (loss, net))
            model, other = pair if first else pair[::-1]
            ids = {id(p) for p in model.parameters()}
            assert {id(p) for _, p in other.regularized()} <= ids and len(other.regularized()) == 3
    alone = copy.deepcopy(loss)
    assert not {id(p) for _, p in alone.regularized()} & {id(p) for p in net.parameters()}


def test_pairs_stay_as_given():
    w = torch.nn.Parameter(torch.ones(3))
    loss = nn.TRTLoss(iter([("w", w)]))
    assert [p is w for _, p in loss.regularized()] == [True] and len(loss.regularized()) == 1


class Squashed(torch.nn.Module):
    def forward(self, value):
        return torch.sigmoid(value)


def test_layers_that_are_left_out_are_left_out_with_their_parametrizations():
    register = torch.nn.utils.parametrize.register_parametrization
    net = torch.nn.Sequential(
        *make(), nn.LIF(torch.nn.Parameter(torch.tensor(0.5))), nn.BatchNormLIF(5, neuron=nn.PLIF)
    )
    register(net[4], "decay", Squashed())
    register(net[5].lif, "w", Squashed())
    register(net[5], "weight", Squashed())
    register(net[1], "weight", Squashed())
    register(net[3], "bias", Squashed())
    torch.nn.utils.parametrizations.weight_norm(net[0], "bias", dim=None)
    names = [name for name, _ in nn.TRTLoss(net).regularized()]
    norms = ["1.parametrizations.weight.original", "5.parametrizations.weight.original"]
    assert sorted(names) == sorted(["0.weight", "3.weight", *norms])
    assert [name for name, _ in nn.TRTLoss(net, exclude="norm").regularized()] == ["0.weight", "3.weight"]
    assert [name for name, _ in nn.TRTLoss(net, exclude=("norm", "classifier")).regularized()] == ["0.weight"]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_a_value_beyond_float32_is_infinite(backend):
    w = torch.full((2000,), 5e17).requires_grad_()
    spec = RegularizerSpec(3, 1e3, 0.0, 1e-5)
    value = regularizer([w], spec, backend=backend)
    assert value.item() == math.inf
    (g,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(g, torch.full_like(g, 1e21), rtol=1e-5, atol=0)
    assert add_regularizer_grad_([w], spec, backend=backend).item() == math.inf
    torch.testing.assert_close(w.grad, g)
    with torch.no_grad():
        assert regularizer([w], spec, backend=backend).item() == math.inf


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sparse_gradient_becomes_the_dense_sum(backend):
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    assert table.weight.grad.is_sparse
    want = table.weight.grad.to_dense()
    spec = RegularizerSpec(3, 1e-2, 0.3, 1e-5)
    want += torch.autograd.grad(regularizer([table.weight], spec), table.weight)[0]
    add_regularizer_grad_([table.weight], spec, backend=backend)
    torch.testing.assert_close(table.weight.grad, want)
