"""Layers, networks and torch's own ways around spikes that a neuron leaves unwritten."""

import pytest
import torch
from lazily import SHAPE, both, fire, same, x_of
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from trtkern import nn
from trtkern.bench.measure import Candidate
from trtkern.bench.memory import peak
from trtkern.models import from_topology, resnet19, vggsnn
from trtkern.models._blocks import Convolution, ResidualBlock, SEWBlock, Style
from trtkern.ops import spikes as spikes_ops
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import unseen
from trtkern.ops.spikes import Spikes, Unwritten, unwritten


class Between(torch.nn.Module):
    """Spikes, a layer that takes them, and whether the spikes were made by then."""

    def __init__(self, make, user):
        super().__init__()
        self.make, self.user, self.made = make, user, None

    def forward(self, x):
        given = self.make(x)
        out = self.user(given)
        self.made = type(given.spikes) is Lazy and given.spikes.is_made
        return out, given


USERS = {
    "conv": (lambda: nn.SpikeConv2d(4, 3, 3, padding=1), 1),
    "strided": (lambda: nn.SpikeConv2d(4, 6, 3, stride=2, padding="valid", groups=2, bias=False), 1),
    "same": (lambda: nn.SpikeConv2d(4, 3, 2, padding="same"), 1),
    "pooled conv": (lambda: nn.SpikeConv2d(4, 3, 3, padding=1), 2),
    "linear": (lambda: nn.SpikeLinear(96, 5), 1),
    "pooled linear": (lambda: nn.SpikeLinear(24, 5), 2),
    "last axis": (lambda: nn.SpikeLinear(6, 5), 1),
    "block": (lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3)), 1),
    "checkpointed": (lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3), checkpoint=True), 1),
    "checkpointed, pooled": (
        lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3), checkpoint=True),
        2,
    ),
}


@pytest.mark.parametrize("mode", ["grad", "frozen", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("user", USERS)
def test_layers_that_take_words_make_no_spikes(user, channels_last, mode):
    build, pool = USERS[user]

    def run():
        net = Between(nn.BatchNormLIF(4, packed=True, pool=pool), build())
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        net.user.requires_grad_(mode != "frozen")
        leaf = x_of(channels_last=channels_last).requires_grad_()
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        modes["autocast"] = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        with modes.get(mode, torch.enable_grad)():
            out, given = net(1 * leaf)
        assert not net.made and type(given.spikes) is (Lazy if spikes_ops.lazily(leaf, "cpu") else torch.Tensor)
        if mode in ("no_grad", "inference"):
            return [out, given.spikes]
        wanted = [leaf, given.spikes, *(p for p in net.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(out.float().sin().sum(), wanted)
        assert type(given.spikes) is torch.Tensor or not given.spikes.is_made
        return [out, *grads, given.spikes]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[0].abs().sum() > 0


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_a_residual_is_made_into_memory_that_is_not_kept(words, pool):
    if words and pool == 2:
        pytest.skip("words of pooled spikes are no residual")

    def run():
        leaf, x = fire(nn.BatchNormLIF(4, packed=True, pool=pool))
        y = x_of(x.spikes.shape, seed=7).requires_grad_()
        layer = nn.BatchNormLIF(4)
        for _ in range(2):  # the second call is known
            out = layer(y, x if words else x.spikes)
            grads = torch.autograd.grad(out.sin().sum(), [leaf, y, *layer.parameters()], retain_graph=True)
        assert type(x.spikes) is torch.Tensor or not x.spikes.is_made
        return [out, *grads]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[1].abs().sum() > 0


def test_a_neuron_takes_unwritten_spikes_as_its_current():
    def run():
        leaf, x = fire()
        norm = nn.BatchNormLIF(4)
        made = [nn.LIF(v_threshold=0.5)(x.spikes), norm(x.spikes), nn.LIF()(x_of(), x.spikes[0].detach())]
        made.append(nn.LIF()(x_of((3, *SHAPE)), x.spikes.detach()))  # as a state
        grads = torch.autograd.grad(sum(s.sin().sum() for s in made), [leaf, *norm.parameters()])
        return [*made, *grads]

    same(*both(run))


def test_containers_and_time_axes():
    def run():
        torch.manual_seed(1)
        made = []
        for net in (
            nn.TimeSequential(
                nn.LIF(packed=True), torch.nn.Conv2d(4, 3, 3), nn.IF(packed=True), nn.SpikeConv2d(3, 2, 1)
            ),
            nn.TimeSequential(nn.LIF(packed=True), torch.nn.Identity(), nn.SpikeConv2d(4, 2, 1)),
            torch.nn.Sequential(nn.LIF(packed=True), nn.OverTime(torch.nn.AvgPool2d(2))),
            nn.TimeSequential(nn.LIF(packed=True), torch.nn.Flatten(), torch.nn.Linear(96, 2)),
            nn.TimeSequential(nn.BatchNormLIF(4, packed=True), torch.nn.BatchNorm2d(4), nn.LIF()),
        ):
            leaf = x_of().requires_grad_()
            out = net(1 * leaf)
            made += [out, *torch.autograd.grad(out.sin().sum(), [leaf, *net.parameters()])]
        leaf = x_of().movedim(0, 1).contiguous().requires_grad_()
        x = nn.LIF(packed=True, time_dim=1)(1 * leaf)
        made += [x.spikes * 1, x.words, *torch.autograd.grad(x.spikes.sin().sum(), leaf)]
        return made

    same(*both(run))


BLOCKS = {
    "residual": lambda: ResidualBlock(Convolution(4, 4), Convolution(4, 4), None, Style()),
    "checkpointed": lambda: ResidualBlock(Convolution(4, 4), Convolution(4, 4), None, Style(checkpoint=True)),
    "shortcut": lambda: ResidualBlock(Convolution(4, 6), Convolution(6, 6), Convolution(4, 6, 1, 1, 0), Style()),
    "sew": lambda: SEWBlock(Convolution(4, 4), Convolution(4, 4), None, Style()),
}


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_residual_blocks(block, pool):
    def run():
        leaf, x = fire(nn.BatchNormLIF(4, packed=True, pool=pool))
        layer = BLOCKS[block]()
        made = layer(x)
        out = made.spikes if isinstance(made, Spikes) else made
        if block != "sew" and block != "shortcut":
            assert type(x.spikes) is torch.Tensor or not x.spikes.is_made
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()])
        return [out * 1, *grads, *layer.buffers()]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[1].abs().sum() > 0


NETWORKS = {
    "vggsnn": lambda: vggsnn(5, shape=(2, 16, 16), timesteps=3),
    "checkpointed": lambda: vggsnn(5, shape=(2, 16, 16), timesteps=3, checkpoint=True),
    "resnet19": lambda: resnet19(5, shape=(2, 8, 8), timesteps=2, width=8),
    "topology": lambda: from_topology("CONV-8-3-1-1_CONVAP-8-3-1-1_FC-16_L-5", shape=(2, 8, 8), timesteps=3),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_a_network(network):
    def run():
        net = NETWORKS[network]()
        x = torch.randn(2, 2, 8, 8) if network != "vggsnn" and network != "checkpointed" else torch.randn(2, 2, 16, 16)
        out = net(x)
        out.sin().sum().backward()
        with torch.no_grad():
            shown = net.eval()(x)
        return [out, shown, *[p.grad for p in net.parameters()], *net.buffers()]

    dense, lazy = both(run)
    same(dense, lazy)
    assert all(g.abs().sum() > 0 for g in dense[2:4])


def test_the_layers_between_make_spikes_where_they_need_them_and_nowhere_else(monkeypatch):
    """Each convolution unpacks words once forward, into memory that goes with the call; no spikes are made to stay."""
    made, written = [], Unwritten.written
    monkeypatch.setattr(Unwritten, "written", lambda self, words: made.append(words) or written(self, words))
    net = torch.nn.Sequential(
        *(
            nn.ConvBatchNormLIF(nn.SpikeConv2d(n, 8, 3, padding=1), nn.BatchNormLIF(8, packed=True, pool=pool))
            for n, pool in ((4, 1), (8, 2), (8, 1))
        ),
        nn.SpikeLinear(8 * 2 * 3, 5),
    )
    with unwritten():
        net(fire()[1]).sin().sum().backward()
    assert not made and all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_neuron_takes_less_memory_by_its_dense_spikes():
    shape = (8, 4, 8, 16, 16)
    norm, x, held = nn.BatchNormLIF(8, packed=True), x_of(shape).requires_grad_(), []

    def bytes_at_the_peak():
        held[:] = [norm(x)]
        held.clear()
        with unseen():
            return peak(Candidate("neuron", lambda: held.append(norm(x)), 0), torch.device("cpu"))

    written, left = both(bytes_at_the_peak)
    assert written - left == 4 * x.numel()


def test_what_a_residual_block_holds_between_its_convolutions():
    """Its input stays alive until it is added: as words, where nobody computes with its spikes."""
    block = ResidualBlock(Convolution(8, 8), Convolution(8, 8), None, Style())
    leaf, x = x_of((8, 2, 8, 8, 8)).requires_grad_(), []

    def alive():
        """Bytes of spikes as floats that are there when the second convolution runs, counted by their storages."""
        seen = []

        def look(module, given):
            spikes = [x[0].spikes, given[0].spikes]
            seen.extend(4 * s.numel() for s in spikes if not isinstance(s, Lazy) or s.is_made)

        x[:] = [nn.BatchNormLIF(8, packed=True)(leaf)]
        handle = block.second.conv.register_forward_pre_hook(look)
        block(x[0])
        handle.remove()
        return sum(seen)

    assert both(alive) == [2 * 4 * leaf.numel(), 0]


# torch's own ways.


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
            out = nn.SpikeConv2d(4, 3, 1)(x)
            grads = torch.autograd.grad(out.sin().sum() + nn.BatchNormLIF(4)(x_of(), neuron).sum(), leaf)
        for spikes in (neuron.spikes, x.spikes):
            assert type(spikes) is (Lazy if spikes_ops.lazily(leaf, "cpu") else torch.Tensor)
            assert type(spikes) is torch.Tensor or not spikes.is_made
        return [neuron.spikes, x.spikes, out, *grads]

    same(*both(run))


@pytest.mark.parametrize("axes", [(0, 3), (2, 4), (1, 0)])
def test_an_input_that_is_laid_out_anew(axes):
    def run():
        leaf = x_of().transpose(*axes).requires_grad_()
        x = nn.LIF(packed=True, channel_dim=1)(leaf)
        return [x.spikes * 1, x.words, *torch.autograd.grad(x.spikes.sin().sum(), leaf)]

    same(*both(run))
