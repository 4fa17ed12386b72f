"""``torch.vmap`` over the fused kernels, alone and with each reverse mode: as a plain loop over the samples is."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from trtkern import debug, nn
from trtkern.backends.base import RegularizerSpec
from trtkern.nn.bounded import Bounded
from trtkern.ops._norm import check as check_norm
from trtkern.ops.lif import lif
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.ops.spikes import pack, unpack
from trtkern.spec import LIFSpec

M, SHAPE = 3, (3, 2, 4, 2, 2)
SPEC = RegularizerSpec(3, 1e-2, 0.25, 1e-5)
SOFT = LIFSpec("soft", "atan", detach_reset=True)


def current(*shape, like=torch.contiguous_format):
    x = 1.5 * torch.randn(shape or (M, *SHAPE)) + 0.5
    if like == torch.channels_last:
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    return x


def numbers(*shape):
    return torch.rand(shape) * 0.5 + 0.25


def all_of(output):
    """The tensors among what an op or a layer returns."""
    if isinstance(output, torch.Tensor):
        return (output,)
    return tuple(t for made in output if made is not None for t in all_of(made))


def neurons(backend, spec=None, **fixed):
    """``lif`` of positional tensors, named by ``names``."""

    def call(*values, names=("x",)):
        return all_of(lif(**dict(zip(names, values, strict=True)), spec=spec, backend=backend, **fixed))

    return call


def norm(backend, names=("y",), training=False, buffers=None, **settings):
    """``BatchNormLIF`` of tensors: its input, what it takes besides, its parameters and its buffers."""
    layer = nn.BatchNormLIF(4, surrogate="atan", backend=backend, **settings).train(training)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    if layer.running_var is not None:
        torch.nn.init.uniform_(layer.running_mean, -0.5, 0.5)

    def call(*values):
        given = dict(zip(names, values, strict=True))
        inputs = {name: given.pop(name) for name in ("y", "residual", "v0") if name in given}
        return all_of(functional_call(layer, given, (), {**inputs, "return_state": True}))

    return call


def expanded(function):
    return lambda x: function(x.expand(3, *x.shape[1:]))


def named(function, *names):
    return lambda *values: function(*values, names=names)


WANT = {"return_state": True, "return_v": True, "return_packed": True}
ANY = ("x", "v0", "decay", "v_threshold", "bias")
C = SHAPE[2]
TRAINED = {"training": True, "track_running_stats": False}
AFFINE = ("y", "weight", "bias", "running_mean", "running_var")
# what is mapped -> (function of a backend, arguments, in_dims)
TABLE = {
    "lif": (lambda b: neurons(b, **WANT), lambda: (current(),), 0),
    "lif h": (lambda b: neurons(b, return_h=True, return_spikes=False), lambda: (current(),), 0),
    "lif soft": (lambda b: neurons(b, SOFT, **WANT), lambda: (current(),), 0),
    "lif in_dims=1": (lambda b: neurons(b, **WANT), lambda: (current().movedim(0, 1),), 1),
    "lif in_dims=-1": (lambda b: neurons(b), lambda: (current().movedim(0, -1).contiguous(),), -1),
    "lif v0": (lambda b: named(neurons(b, **WANT), "x", "v0"), lambda: (current(), numbers(M, *SHAPE[1:])), 0),
    "lif v0 alone": (
        lambda b: named(neurons(b, **WANT), "x", "v0"),
        lambda: (current(*SHAPE), numbers(*SHAPE[1:], M)),
        (None, -1),
    ),
    "lif x alone": (
        lambda b: named(neurons(b, **WANT), *ANY),
        lambda: (current(), numbers(*SHAPE[1:]), numbers(C), numbers(), numbers(C)),
        (0, None, None, None, None),
    ),
    "lif one decay": (lambda b: named(neurons(b), "x", "decay"), lambda: (current(), numbers()), (0, None)),
    "lif parameters": (
        lambda b: named(neurons(b, **WANT), *ANY),
        lambda: (current(), numbers(M, *SHAPE[1:]), numbers(C, M), numbers(M), numbers(C)),
        (0, 0, 1, 0, None),
    ),
    "lif one decay each": (lambda b: named(neurons(b), "x", "decay"), lambda: (current(), numbers(M)), 0),
    "lif decay alone": (
        lambda b: named(neurons(b, **WANT), "x", "decay"),
        lambda: (current(*SHAPE), numbers(M, C)),
        (None, 0),
    ),
    "lif channels last": (
        lambda b: named(neurons(b, SOFT), "x", "decay"),
        lambda: (current(like=torch.channels_last), numbers(M, C)),
        0,
    ),
    "lif last axis": (
        lambda b: named(neurons(b, SOFT, channel_dim=-1), "x", "decay"),
        lambda: (current(M, 3, 2, 5), numbers(M, 5)),
        0,
    ),
    "lif long": (
        lambda b: named(neurons(b, SOFT, **WANT), "x", "decay"),
        lambda: (current(M, 37, 2, 3, 2), numbers(M, 3)),
        0,
    ),
    "lif long, shared": (
        lambda b: named(neurons(b, SOFT), "x", "decay"),
        lambda: (current(37, M, 2, 3), numbers(3)),
        (1, None),
    ),
    "lif time alone": (lambda b: neurons(b), lambda: (current(4, M),), 1),
    "lif bfloat16": (lambda b: neurons(b, **WANT), lambda: (current().bfloat16(),), 0),
    "lif static": (lambda b: expanded(neurons(b)), lambda: (current(M, 1, 2, 4),), 0),
    "lif nothing": (lambda b: named(neurons(b, SOFT), "x", "decay"), lambda: (current(M, 3, 0, 4), numbers(M, 4)), 0),
    "norm": (norm, lambda: (current(),), 0),
    "norm shared": (
        lambda b: norm(b, ("y", "v0", "residual", *AFFINE[1:])),
        lambda: (current(), numbers(*SHAPE[1:]), current(), *(numbers(C) for _ in range(4))),
        (0, None, 0, None, None, None, None),
    ),
    "norm parameters": (
        lambda b: norm(b, (*AFFINE, "v0", "lif.w"), neuron=nn.PLIF),
        lambda: (current(), *(numbers(M, C) for _ in range(4)), numbers(M, *SHAPE[1:]), numbers(M)),
        0,
    ),
    "norm parameters alone": (
        lambda b: norm(b, AFFINE),
        lambda: (current(*SHAPE), *(numbers(M, C) for _ in range(4))),
        (None, 0, 0, 0, 0),
    ),
    "norm trained": (lambda b: norm(b, **TRAINED), lambda: (current(),), 0),
    "norm trained, parameters": (
        lambda b: norm(b, ("y", "residual", "weight", "bias"), **TRAINED),
        lambda: (current(like=torch.channels_last), current(), numbers(M, C), numbers(C)),
        (0, 0, 0, None),
    ),
    "norm trained, weights alone": (
        lambda b: norm(b, ("y", "weight", "bias"), **TRAINED),
        lambda: (current(*SHAPE), numbers(M, C), numbers(M, C)),
        (None, 0, 0),
    ),
    "norm trained, pooled": (
        lambda b: norm(b, ("y", "residual"), pool=2, **TRAINED),
        lambda: (current(M, 3, 2, 4, 4, 6), current(M, 3, 2, 4, 4, 6)),
        0,
    ),
    "norm pooled, channels last": (
        lambda b: norm(b, ("y", "weight"), pool=2, training=True, track_running_stats=False),
        lambda: (current(M, 2, 2, 4, 4, 2, like=torch.channels_last), numbers(M, C)),
        0,
    ),
    "norm pooled, shared": (
        lambda b: norm(b, pool=2),
        lambda: (current(M, 2, 2, 4, 4, 2, like=torch.channels_last),),
        0,
    ),
    "norm pooled, odd": (lambda b: norm(b, pool=2), lambda: (current(M, 2, 2, 4, 3, 5),), 0),
    "norm long": (lambda b: norm(b, channel_dim=-1, **TRAINED), lambda: (current(M, 18, 2, 4),), 0),
    "norm static": (
        lambda b: expanded(norm(b, **TRAINED)),
        lambda: (current(M, 1, 2, 4, 2, 2),),
        0,
    ),
    "norm packed": (lambda b: norm(b, packed=True), lambda: (current(),), 0),
    "regularizer": (
        lambda b: lambda *w: (regularizer(w, SPEC, backend="auto" if b == "cuda" else b),),
        lambda: (current(M, 3, 4), current(5), current(2, M)),
        (0, None, 1),
    ),
}


def of_one(arguments, dims, number):
    return [a if d is None else a.select(d, number) for a, d in zip(arguments, dims, strict=True)]


def scalar(function):
    """The sum of waves of all floating outputs: each has a gradient of its own."""

    def call(*values):
        made = [t for t in function(*values) if t.dtype.is_floating_point]
        return sum((i + 1) * t.float().sin().sum() for i, t in enumerate(made))

    return call


def every(arguments):
    return tuple(range(len(arguments)))


def set_up(case, backend):
    make, arguments, dims = TABLE[case]
    arguments = arguments()
    function = make(backend)
    return function, arguments, dims if isinstance(dims, tuple) else (dims,) * len(arguments)


def close(got, want, message=None):
    rough = {"rtol": 1.6e-2, "atol": 1e-2} if got.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **rough, msg=message and (lambda text: f"{message}: {text}"))


@pytest.fixture
def kernels(backend, device):
    """Each fused backend that takes tensors of the CPU here."""
    if device != "cpu":
        pytest.skip("the table is of tensors on the CPU, where this backend does not run")
    return backend


def test_the_forward_pass_is_that_of_each_sample(kernels, share):
    for case in share(TABLE, 7):
        function, arguments, dims = set_up(case, kernels)
        got = vmap(function, dims)(*arguments)
        want = [function(*of_one(arguments, dims, number)) for number in range(M)]
        for i, made in enumerate(got):
            assert made.dtype == want[0][i].dtype, case
            close(made, torch.stack([w[i] for w in want]), f"{case}, output {i}")


def test_gradients_of_each_sample(kernels, share):
    for case in share(TABLE, 7, 2):
        function, arguments, dims = set_up(case, kernels)
        got = vmap(grad(scalar(function), every(arguments)), dims)(*arguments)
        leaves = [[a.clone().requires_grad_() for a in of_one(arguments, dims, number)] for number in range(M)]
        want = [torch.autograd.grad(scalar(function)(*each), each, materialize_grads=True) for each in leaves]
        for i, made in enumerate(got):
            close(made, torch.stack([w[i] for w in want]), f"{case}, argument {i}")


def test_the_gradient_of_all_samples_together(kernels, share):
    for case in share(TABLE, 7, 4):
        function, arguments, dims = set_up(case, kernels)
        leaves = [a.clone().requires_grad_() for a in arguments]
        total = sum(scalar(function)(*of_one(leaves, dims, number)) for number in range(M))
        want = torch.autograd.grad(total, leaves, materialize_grads=True)
        mapped = vmap(scalar(function), dims)
        got = torch.autograd.grad(mapped(*leaves).sum(), leaves, materialize_grads=True)
        transformed = grad(lambda *a, mapped=mapped: mapped(*a).sum(), every(arguments))(*arguments)
        for i, (made, again, expected) in enumerate(zip(got, transformed, want, strict=True)):
            close(made, expected, f"{case}, argument {i}")
            close(again, expected, f"{case}, argument {i}, torch.func.grad")


def per_sample(model, x, rtol=1e-4):
    """vmap(grad) of all parameters equals a loop of backward passes, and so does its sum by grad(vmap)."""
    held = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given, x):
        return functional_call(model, given, (x,)).sin().sum()

    got = vmap(grad(loss), (None, 0))(held, x)
    total = grad(lambda given: vmap(loss, (None, 0))(given, x).sum())(held)
    want = []
    for one in x:
        model.zero_grad()
        model(one).sin().sum().backward()
        want.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in held:
        each = torch.stack([w[name] for w in want])
        torch.testing.assert_close(got[name], each, rtol=rtol, atol=1e-4)
        torch.testing.assert_close(total[name], each.sum(0), rtol=rtol, atol=1e-4)


def test_per_sample_gradients_of_models(kernels):
    per_sample(
        torch.nn.Sequential(torch.nn.Linear(5, 7), nn.LIF(decay=0.5, backend=kernels), torch.nn.Linear(7, 3)),
        3 * torch.randn(M, 4, 2, 5),
    )
    if kernels == "cpu":
        per_sample(torch.nn.Sequential(nn.PLIF(channels=5, decay_input=True), nn.LI()), current(M, 4, 2, 5))
        per_sample(nn.LIF(Bounded(numbers(5), "clamp"), time_dim=1), current(M, 2, 4, 5))
        for layer in (nn.SpikeConv2d(4, 3, 1), nn.SpikeLinear(16, 3)):
            per_sample(torch.nn.Sequential(nn.LIF(packed=True, surrogate="atan"), layer), current())
        for checkpoint in (False, True):
            norm = nn.BatchNormLIF(4, track_running_stats=False, surrogate="atan")
            per_sample(nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 4, 1), norm, checkpoint=checkpoint), current(), 1e-3)


def test_spikes_that_were_written_to_are_taken_as_they_are():
    linear, x = nn.SpikeLinear(4, 3), current(M, 3, 2, 4)

    def of(weight, x, packed):
        s = nn.LIF(packed=packed)(x)
        spikes = s.spikes if packed else s
        spikes.mul_(2.0)
        return functional_call(linear, {"weight": weight}, (s,)).sin().sum()

    got, want = (
        grad(lambda w, p=p: vmap(lambda x: of(w, x, p))(x).sum())(linear.weight.detach()) for p in (True, False)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_running_statistics_of_each_sample(which):
    layers, x = [nn.BatchNormLIF(4, backend=which) for _ in range(M)], current()
    parameters, buffers = stack_module_state(layers)
    base = nn.BatchNormLIF(4, backend=which)

    def call(p, b, x):
        return functional_call(base, (p, b), (x,)).sin().sum()

    got = vmap(grad(call))(parameters, buffers, x)
    for i, layer in enumerate(layers):
        layer(x[i]).sin().sum().backward()
        torch.testing.assert_close(got["weight"][i], layer.weight.grad)
        for name, held in layer.named_buffers():
            torch.testing.assert_close(buffers[name][i], held)
    with pytest.raises(RuntimeError, match="batch_norm_lif: expected running_mean to be mapped"):
        vmap(base)(x)
    assert base.num_batches_tracked == 0 and torch.equal(base.running_mean, torch.zeros(4))


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_running_statistics_beneath_a_gradient_are_those_of_a_plain_call(which):
    layer, plain, x = nn.BatchNormLIF(4, backend=which), nn.BatchNormLIF(4, backend=which), current()[0]
    passed = {name: b.clone() for name, b in layer.named_buffers()}
    plain(x)
    grad(lambda x: layer(x).sum())(x)
    grad(lambda x: functional_call(layer, passed, (x,)).sum())(x)
    for name, want in plain.named_buffers():
        assert torch.equal(passed[name], want) and torch.equal(layer.get_buffer(name), want)


def test_processes_that_share_statistics_are_refused():
    norm = nn.BatchNormLIF(4).norm()._replace(group=object())
    with pytest.raises(RuntimeError, match=r"batch_norm_lif: expected no torch\.vmap over statistics"):
        vmap(lambda y: check_norm(y, norm, None, None, False, 2))(current())


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_the_flag_rises(which):
    x = current()
    x[1, 1, 0, 0, 0, 0] = torch.nan
    for run in (vmap, lambda f: vmap(grad(lambda x: f(x).sum())), lambda f: grad(lambda x: vmap(f)(x).sum())):
        for layer in (nn.LIF(backend=which), nn.BatchNormLIF(4, track_running_stats=False, backend=which)):
            run(layer)(x[:1])
            assert layer.nonfinite.item() == 0
            run(layer)(x)
            assert layer.nonfinite.item() == 1
    flags = torch.zeros(M, 1, dtype=torch.int32)
    vmap(lambda flag, x: functional_call(layer, {"lif.nonfinite": flag}, (x,)))(flags, x)
    assert flags.min() == 1
    with debug(), pytest.raises(RuntimeError, match="expected finite potentials"):
        vmap(nn.LIF(backend=which))(x)


def test_nested_maps_and_chunks():
    x, decay = current(2, M, 3, 2, 4), numbers(2, 4)
    of = grad(lambda x, d: lif(x, decay=d, return_v=True).v.sin().sum(), (0, 1))
    for chunk_size in (None, 1):
        got = vmap(vmap(of, (0, None)), chunk_size=chunk_size)(x, decay)
        for i in range(2):
            for j in range(M):
                for made, want in zip(got, of(x[i, j], decay[i]), strict=True):
                    torch.testing.assert_close(made[i, j], want)


def test_jacobians_and_batched_gradients():
    x = current(3, 2, 2)
    layer = nn.BatchNormLIF(2, channel_dim=-1, surrogate="atan", track_running_stats=False)
    for of in (lambda x: lif(x, return_spikes=False, return_state=True).state, layer):
        leaf = x.clone().requires_grad_()
        y = of(leaf)
        each = torch.eye(y.numel()).view(-1, *y.shape)
        want = torch.stack([torch.autograd.grad(y, leaf, g, retain_graph=True)[0] for g in each])
        got = torch.autograd.grad(y, leaf, each, is_grads_batched=True)[0]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(jacrev(of)(x).view_as(want), want)


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_an_ensemble_and_its_loss(which):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 5)
            self.loss = nn.TRTLoss(self.model, lam=0.1, backend=which)

        def forward(self, x, target):
            return self.loss(self.model(x), target)

    members, x, target = [Both() for _ in range(M)], current(M, 3, 2, 4), torch.randint(5, (M, 2))
    parameters, _ = stack_module_state(members)

    def of(p, x, t):
        return functional_call(members[0], p, (x, t))

    got = vmap(grad(of))(parameters, x, target)["model.weight"]
    together = grad(lambda p: vmap(of)(p, x, target).sum())(parameters)["model.weight"]
    (plain,) = torch.autograd.grad(vmap(of)(parameters, x, target).sum(), parameters["model.weight"])
    for i, member in enumerate(members):
        member(x[i], target[i]).backward()
        for made in (got, together, plain):
            torch.testing.assert_close(made[i], member.model.weight.grad)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 5\)"):
        vmap(nn.SDTLoss())(torch.randn(M, 3, 2, 5), target + 7)


def test_batched_gradients_of_the_penalty_and_what_it_refuses():
    w = torch.randn(4, requires_grad=True)
    penalty = regularizer([w], SPEC)
    (got,) = torch.autograd.grad(penalty, w, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)
    (want,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(got, torch.stack((want, 2 * want)))
    with pytest.raises(RuntimeError, match=r"add_regularizer_grad_: expected no torch\.vmap over weights"):
        vmap(lambda w: add_regularizer_grad_([w], SPEC))(torch.randn(3, 4))


def test_words():
    s = (torch.rand(M, 11, 2, 4, 4, 4) < 0.5).float()
    words = vmap(pack)(s)
    assert torch.equal(words, torch.stack([pack(one) for one in s]))
    for pooled in (False, True):

        def of(words, pooled=pooled):
            return unpack(words, 7, start=2, pooled=pooled, dtype=torch.float32)

        assert torch.equal(vmap(of, -1)(words.movedim(0, -1).contiguous()), torch.stack([of(one) for one in words]))


def test_a_second_derivative_is_refused():
    table = {
        "lif": (lambda x: nn.LIF()(x).sin().sum(), current(M, 3, 2, 4)),
        "batch_norm_lif": (lambda x: nn.BatchNormLIF(4).eval()(x).sin().sum(), current(M, 3, 2, 4)),
        "regularizer": (lambda x: regularizer([x], SPEC), current(M, 3)),
    }
    for op, (of, x) in table.items():

        def twice(x, of=of):
            return grad(lambda x: grad(of)(x).sum())(x)

        for run in (lambda x, twice=twice: twice(x[0]), vmap(twice)):
            with pytest.raises(RuntimeError, match=f"{op}: expected a first derivative"):
                run(x)


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_values_of_every_sample_are_checked(which):
    x, decay = current(M, 3, 2, 4), numbers(M, 4)
    decay[2, 1] = 2.0
    with pytest.raises(ValueError, match=r"lif: expected decay to be in \[0, 1\]"):
        vmap(lambda d, x: lif(x, decay=d, backend=which).spikes)(decay, x)


def test_a_transform_inside_of_compiled_code_is_refused():
    layer, x = nn.LIF(), current(3, 2, 4)
    with pytest.raises(Exception, match=r"torch\.func|Observed exception"):
        torch.compile(grad(lambda x: layer(x).sum()), fullgraph=True, backend="eager")(x)
    want = grad(lambda x: layer(x).sin().sum())(x)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(grad(lambda x: compiled(x).sin().sum())(x), want)
