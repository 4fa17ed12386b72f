"""torch's own tools around spikes that a neuron leaves unwritten: transforms, hooks, compiled and recorded programs."""

import pytest
import torch
from lazily import both, fire, same, x_of
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from trtkern import nn
from trtkern.ops import spikes as spikes_ops
from trtkern.ops._lazy import Lazy
from trtkern.ops.spikes import Spikes, unwritten


def test_types_and_places_that_are_written_as_before():
    def kinds():
        x = x_of()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = nn.ConvBatchNormLIF(torch.nn.Identity(), nn.BatchNormLIF(4, packed=True))(x.bfloat16())
        made = [
            low,
            nn.LIF(packed=True)(x.half()),
            nn.LIF(packed=True)(x.double()),
            nn.LIF(packed=True, backend="reference")(x),
            nn.BatchNormLIF(4, packed=True, pool=2)(x[..., :5]),
        ]
        return [type(each.spikes) for each in made]

    with unwritten():
        assert set(kinds()) == {torch.Tensor}
        assert type(nn.LIF()(x_of())) is torch.Tensor
        with nn.packed_activations():
            assert type(fire()[1].spikes) is torch.Tensor
        assert type(fire()[1].spikes) is Lazy
    assert type(fire()[1].spikes) is torch.Tensor


def test_transforms():
    def run():
        leaf, x = fire()
        s, w, t = x.spikes, torch.randn(4), x_of(seed=9)

        def f(s):
            return (s * s * w[:, None, None]).sum()

        made = [
            torch.func.grad(f)(s),
            torch.func.vjp(f, s)[1](torch.tensor(2.0))[0],
            torch.func.jvp(f, (s,), (t,))[1],
            torch.vmap(lambda s: s * 2)(s),
            torch.vmap(torch.func.grad(f), in_dims=1)(s),
            torch.func.jacrev(lambda w: (s * w[:, None, None]).sum((0, 1, 3, 4)))(w),
            torch.func.functional_call(nn.SpikeConv2d(4, 3, 1), {"bias": torch.ones(3)}, (x,)),
        ]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(s, t)
            made.append(forward_ad.unpack_dual(f(dual)).tangent)
            weight = forward_ad.make_dual(torch.ones(3, 4, 1, 1), torch.ones(3, 4, 1, 1))
            out = torch.func.functional_call(nn.SpikeConv2d(4, 3, 1, bias=False), {"weight": weight}, (x,))
            made.append(forward_ad.unpack_dual(out).tangent)
        made += torch.autograd.grad(made[3].sin().sum(), leaf)
        hessian = torch.autograd.grad(f(s), s, create_graph=True)[0]
        return [*made, hessian, *torch.autograd.grad(hessian.sum(), s)]

    same(*both(run))


def test_neurons_within_transforms():
    def run():
        x, layer = x_of(), nn.LIF(packed=True)

        def f(x):
            made = layer(2 * x)
            return made.spikes.sin().sum(), made.words

        grads, words = torch.func.grad(f, has_aux=True)(x)
        mapped = torch.vmap(lambda x: layer(x).spikes, in_dims=1, out_dims=1)(x)
        return [grads, words, mapped, torch.func.jvp(lambda x: layer(x).spikes, (x,), (x,))[1]]

    same(*both(run))


def test_hooks():
    def run():
        heard, layer = [], nn.LIF(packed=True)
        layer.register_forward_hook(lambda module, given, out: heard.append(out.spikes.sum().item()))
        layer.register_full_backward_hook(lambda module, gx, gs: heard.append([g is not None for g in gs]))
        leaf, x = fire(layer)
        x.spikes.register_hook(lambda g: heard.append(g.sum()) or 2 * g)
        x.spikes.retain_grad()
        x.spikes.sin().sum().backward()
        return [*heard, x.spikes.grad, leaf.grad]

    same(*both(run))


SAVING = {
    "on the CPU": torch.autograd.graph.save_on_cpu,
    "as NumPy": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "as it is": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "packed": nn.packed_activations,
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("hooks", SAVING)
def test_hooks_for_saved_tensors(hooks, within):
    def run():
        conv, norm = torch.nn.Conv2d(4, 3, 3), nn.BatchNormLIF(4)
        leaf = x_of().requires_grad_()
        if within:
            with SAVING[hooks]():
                x = nn.BatchNormLIF(4, packed=True)(1 * leaf)
                out = conv(x.spikes.flatten(0, 1)).sin().sum() + (x.spikes * x.spikes).sum() + norm(x_of(), x).sum()
        else:
            x = nn.BatchNormLIF(4, packed=True)(1 * leaf)
            with SAVING[hooks]():
                out = conv(x.spikes.flatten(0, 1)).sin().sum() + (x.spikes * x.spikes).sum() + norm(x_of(), x).sum()
        return [out, *torch.autograd.grad(out, [leaf, *conv.parameters()])]

    same(*both(run))


def test_a_write_behind_what_saved_the_spikes_is_an_error_as_ever():
    for change in (lambda s: s.view(-1).mul_(2), lambda s: torch._foreach_mul_([s.detach()], 2.0)):
        for around in (torch.enable_grad, nn.packed_activations):
            with unwritten():
                x = fire()[1]
                with around():
                    out = (x.spikes * x.spikes).sum()
                change(x.spikes)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    def run():
        leaf, x = fire()
        conv, block = torch.nn.Conv2d(4, 4, 3), torch.nn.Sequential(nn.LIF(packed=True), nn.SpikeConv2d(4, 3, 1))
        out = checkpoint(lambda s: conv(s.flatten(0, 1)).unflatten(0, s.shape[:2]), x.spikes, use_reentrant=reentrant)
        out = checkpoint(block, out, use_reentrant=reentrant)
        out.sin().sum().backward()
        return [out, leaf.grad, *[p.grad for layer in (conv, block) for p in layer.parameters()]]

    same(*both(run))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_takes_unwritten_spikes(backend):
    torch.compiler.reset()

    def f(x, w):
        return (x.spikes * w[:, None, None]).relu() + 1, x.words.float().mean()

    def run():
        leaf, x = fire()
        w = torch.arange(1.0, 5.0, requires_grad=True)
        out, mean = torch.compile(f, backend=backend, fullgraph=True)(x, w)
        made = [out, mean, *torch.autograd.grad(out.sin().sum(), [leaf, w])]
        with torch.no_grad():
            y = fire()[1].spikes
            torch.compile(lambda s: s.mul_(3), backend=backend, fullgraph=True)(y)
        return [*made, y * 1]

    same(*both(run))


def test_compiled_layers():
    torch.compiler.reset()

    def run():
        net = torch.nn.Sequential(
            nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 8, 3, padding=1), nn.BatchNormLIF(8, packed=True)),
            nn.SpikeConv2d(8, 3, 1),
        )
        leaf, x = fire()
        out = torch.compile(net, backend="aot_eager")(x)
        return [out, *torch.autograd.grad(out.sin().sum(), [leaf, *net.parameters()])]

    same(*both(run))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_recorded_programs():
    class Twice(torch.nn.Module):
        def forward(self, s):
            return 2 * s.flatten(2) + 1

    def run():
        with torch.no_grad():
            x, other = fire()[1], x_of()
            traced = torch.jit.trace(Twice(), (x.spikes,))(other)
            exported = torch.export.export(Twice(), (x.spikes,)).module()(other)
            graph = torch.fx.symbolic_trace(torch.nn.Sequential(nn.LIF(packed=True), nn.SpikeConv2d(4, 3, 1)))
            return [traced, exported, graph(other)]

    same(*both(run))


def test_structures_of_tensors():
    def run():
        x = fire()[1]
        doubled = torch.utils._pytree.tree_map(lambda t: t.detach() * 2, [x, {"s": x.spikes}])
        assert isinstance(doubled[0], Spikes)
        return [doubled[0].spikes, doubled[0].words, doubled[1]["s"]]

    same(*both(run))


def test_a_mode_that_sees_all_operators_sees_dense_spikes():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def run():
        leaf, x = fire()
        with Seen():
            inside, y, z = 2 * x.spikes, nn.LIF(packed=True)(x_of()), nn.SpikeConv2d(4, 3, 1)(x)
        assert type(y.spikes) is torch.Tensor
        return [inside, y.spikes, z, *torch.autograd.grad(inside.sin().sum() + z.sin().sum(), leaf)]

    same(*both(run))


@pytest.mark.parametrize("pool", [1, 2])
def test_a_profile_sees_what_runs_without_one(pool):
    def run():
        leaf, norm = x_of().requires_grad_(), nn.BatchNormLIF(4, packed=True, pool=pool)
        with torch.profiler.profile():
            neuron, x = nn.LIF(packed=True)(1 * leaf), norm(1 * leaf)
            out, added = nn.SpikeConv2d(4, 3, 1)(x), nn.BatchNormLIF(4, packed=True)(x_of(), neuron)
            grads = torch.autograd.grad([out, added.spikes], leaf, [out.detach().sin(), x_of(seed=2)])
        for spikes in (neuron.spikes, x.spikes, added.spikes):
            assert type(spikes) is (Lazy if spikes_ops.lazily(leaf, "cpu") else torch.Tensor)
            assert type(spikes) is torch.Tensor or not spikes.is_made
        return [neuron.spikes, x.spikes, added.spikes, out, *grads]

    same(*both(run))


@pytest.mark.parametrize("axes", [(0, 3), (2, 4), (1, 0)])
def test_an_input_that_is_laid_out_anew(axes):
    def run():
        leaf = x_of().transpose(*axes).requires_grad_()
        x = nn.LIF(packed=True, channel_dim=1)(leaf)
        return [x.spikes * 1, x.words, *torch.autograd.grad(x.spikes.sin().sum(), leaf)]

    same(*both(run))
