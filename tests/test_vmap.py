"""``torch.vmap`` over the fused kernels, alone and with each reverse mode: as a plain loop over the samples is."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from trtkern import nn
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.lif import lif
from trtkern.ops.regularizer import regularizer
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


@pytest.fixture(autouse=True)
def _on_the_cpu(device):
    if device != "cpu":
        pytest.skip("these compare on the CPU; tests/test_gpu.py has the GPU's own")


def test_the_forward_pass_is_that_of_each_sample(backend, share):
    for case in share(TABLE, 7):
        function, arguments, dims = set_up(case, backend)
        got = vmap(function, dims)(*arguments)
        want = [function(*of_one(arguments, dims, number)) for number in range(M)]
        for i, made in enumerate(got):
            assert made.dtype == want[0][i].dtype, case
            close(made, torch.stack([w[i] for w in want]), f"{case}, output {i}")


def test_gradients_of_each_sample(backend, share):
    for case in share(TABLE, 7, 2):
        function, arguments, dims = set_up(case, backend)
        got = vmap(grad(scalar(function), every(arguments)), dims)(*arguments)
        leaves = [[a.clone().requires_grad_() for a in of_one(arguments, dims, number)] for number in range(M)]
        want = [torch.autograd.grad(scalar(function)(*each), each, materialize_grads=True) for each in leaves]
        for i, made in enumerate(got):
            close(made, torch.stack([w[i] for w in want]), f"{case}, argument {i}")


def test_the_gradient_of_all_samples_together(backend, share):
    for case in share(TABLE, 7, 4):
        function, arguments, dims = set_up(case, backend)
        leaves = [a.clone().requires_grad_() for a in arguments]
        total = sum(scalar(function)(*of_one(leaves, dims, number)) for number in range(M))
        want = torch.autograd.grad(total, leaves, materialize_grads=True)
        mapped = vmap(scalar(function), dims)
        got = torch.autograd.grad(mapped(*leaves).sum(), leaves, materialize_grads=True)
        transformed = grad(lambda *a, mapped=mapped: mapped(*a).sum(), every(arguments))(*arguments)
        for i, (made, again, expected) in enumerate(zip(got, transformed, want, strict=True)):
            close(made, expected, f"{case}, argument {i}")
            close(again, expected, f"{case}, argument {i}, torch.func.grad")
