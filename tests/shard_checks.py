"""What ``test_shards.py`` runs in several processes (``processes.py``): its checks, in all of them and in order."""

import copy
import itertools
import re
import sys

import processes
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from trtkern import nn as snn
from trtkern.backends.base import RegularizerSpec
from trtkern.models import ConvSNN, SpikeDrivenTransformer, Spikformer, from_topology
from trtkern.nn import SpikeLinear
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.parallel.parts import full, like
from trtkern.parallel.sharding import _Averaged, shard

SPEC = RegularizerSpec(4, 1e-2, 0.25, 1e-5)
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.float32: {"rtol": 1e-5, "atol": 1e-7}}


def same(got, want, dtype=None, msg=None):
    """A tensor, put together where it lies in parts, is the one that one process has."""
    tolerance = TOLERANCE[dtype or want.dtype]
    torch.testing.assert_close(full(got).detach(), want.detach(), **tolerance, msg=msg)


def weights(dtype, *shapes):
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def placements(rank, world):
    """Sharded on any axis, unevenly, with nothing left for some, replicated, ordinary: value and gradient."""
    mesh = init_device_mesh("cpu", (world,))
    laid = [(Shard(0),), (Shard(1),), (Shard(2),), (Shard(0),), (Replicate(),), None]
    for dtype in (torch.float64, torch.float32):
        whole = weights(dtype, (5, 3), (4, 5, 2), (2, 3, 7), (1, 6), (3, 4), (2, 2))
        for picked in (range(6), [0], [3], [4], [3, 4]):
            value, grads = one_process([whole[i] for i in picked])
            leaves = [leaf(whole[i], mesh, laid[i]) for i in picked]
            got = regularizer(leaves, SPEC)
            assert type(got) is torch.Tensor
            same(got, value)
            (3 * got).backward(retain_graph=True)
            for w, g in zip(leaves, grads, strict=True):
                same(w.grad, 3 * g)
            got.backward()  # a second one makes the gradients again
            for w, g in zip(leaves, grads, strict=True):
                same(w.grad, 4 * g)


def two_dimensions(rank, world):
    """A mesh of two dimensions: what is replicated along one of them counts once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    laid = [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Replicate()), (Replicate(), Replicate()), None]
    for dtype in (torch.float64, torch.float32):
        whole = weights(dtype, (5, 3), (4, 5, 2), (2, 3, 7), (3, 4), (2, 2))
        value, grads = one_process(whole)
        leaves = [leaf(w, mesh, placed) for w, placed in zip(whole, laid, strict=True)]
        got = regularizer(leaves, SPEC)
        same(got, value)
        got.backward()
        added = add_regularizer_grad_(leaves, SPEC, scale=2.0)
        same(added, value)
        for w, g in zip(leaves, grads, strict=True):
            same(w.grad, 3 * g)
        pairs = [(leaves[:1], 1), (leaves[1:2], 2), (leaves[3:], 0)]
        for some, count in pairs:
            with Counted() as counted:
                regularizer(some, SPEC)
            assert counted.seen == [("all_reduce", 1)] * count


class Counted:
    """What is asked of ``torch.distributed``: each collective, with the numbers that this process gives to it."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")

    def __enter__(self):
        self.seen, self.before = [], {name: getattr(distributed, name) for name in self.NAMES}
        for name, function in self.before.items():
            setattr(distributed, name, self.counting(function, name.startswith(("all_gather", "reduce_scatter"))))
        return self

    def counting(self, function, second):
        def counted(*arguments, **named):
            self.seen.append((function.__name__, arguments[1 if second else 0].numel()))
            return function(*arguments, **named)

        return counted

    def __exit__(self, *_):
        for name, function in self.before.items():
            setattr(distributed, name, function)


def leaf(whole, mesh, placed):
    return (whole.clone() if placed is None else distribute_tensor(whole, mesh, placed)).requires_grad_()


def one_process(whole):
    leaves = [w.clone().requires_grad_() for w in whole]
    value = regularizer(leaves, SPEC)
    return value.detach(), torch.autograd.grad(value, leaves)


def added_in_place(rank, world):
    """``add_regularizer_grad_``: where there is no gradient, one like the weight, and ones laid out otherwise."""
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (torch.float64, torch.float32):
        whole = weights(dtype, (5, 3), (4, 6), (3, 4))
        value, grads = one_process(whole)
        w, v, plain = leaf(whole[0], mesh, (Shard(0),)), leaf(whole[1], mesh, (Shard(1),)), leaf(whole[2], mesh, None)
        for want in ((Shard(0),), (Replicate(),), (Partial(),)):
            plain.grad, ones = None, torch.ones_like(whole[0])
            if want[0].is_partial():
                w.grad = DTensor.from_local(ones / world, mesh, want)
            else:
                w.grad = distribute_tensor(ones, mesh, want)
            # Laid out otherwise in memory.
            other = torch.ones(whole[1].shape[::-1], dtype=dtype).t()
            v.grad = DTensor.from_local(other.chunk(world, 1)[rank], mesh, (Shard(1),))
            with Counted() as counted:
                same(add_regularizer_grad_([w, v, plain], SPEC, scale=2.0), value)
            assert counted.seen == [("all_reduce", 1)]
            same(w.grad, 1 + 2 * grads[0])
            same(v.grad, 1 + 2 * grads[1])
            same(plain.grad, 2 * grads[2])
            assert w.grad.placements == w.placements


def refused(rank, world):
    """What is a sum still to be made, and DTensors where no op takes them apart."""
    mesh = init_device_mesh("cpu", (world,))
    partial = DTensor.from_local(torch.ones(3), mesh, (Partial(),))
    refuses("Partial", ValueError, regularizer, [partial], SPEC)
    y = distribute_tensor(torch.randn(4, 2, 6), mesh, (Shard(2),))
    refuses(r"full_tensor\(\).*to_local\(\)", TypeError, snn.BatchNormLIF(6), y)
    refuses(r"to_local\(\)", TypeError, snn.TETLoss(), y, torch.zeros(2, dtype=torch.int64))


def refuses(text, error, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except error as raised:
        assert re.search(text, str(raised)), str(raised)
    else:
        raise AssertionError(f"expected {error.__name__}, got none")


def losses(rank, world):
    """``TRTLoss`` behind FSDP2 and DDP: a step of two processes is one of one, the penalty counted once."""
    for dtype, in_place, ddp in itertools.product((torch.float64, torch.float32), (False, True), (False, True)):
        alone, model = network(dtype), network(dtype)
        if ddp:
            model = nn.parallel.DistributedDataParallel(model)
        else:
            fully_shard(model[0])
            fully_shard(model)
        x, target = batch(dtype)
        penalties = []
        for net, mine in ((alone, slice(None)), (model, part_of(rank, world))):
            loss = snn.TRTLoss(net, lam=1e-2)
            parts = loss.parts(net(x[:, mine]), target[mine], regularize=not in_place)
            parts.total.backward()
            penalties.append(loss.add_grad_(2.0) if in_place else parts.regularizer)
        same(*reversed(penalties))
        for got, want in zip(model.parameters(), alone.parameters(), strict=True):
            same(got.grad, want.grad)


def network(dtype):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), snn.LIF(), nn.Linear(5, 3)).to(dtype)


def batch(dtype):
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(4, 8, 7, generator=generator, dtype=dtype)
    return x, torch.randint(3, (8,), generator=generator)


def part_of(number, count):
    return slice(number * 8 // count, (number + 1) * 8 // count)


NETWORKS = {
    "vgg": lambda **style: ConvSNN((2, 8, 8), [4, "pool", 6], 3, neuron="PLIF", **style),
    "sew": lambda **style: from_topology(SEW, shape=(2, 8, 8), neuron="ALIF", **style),
    "resnet": lambda **style: from_topology(RESNET, shape=(2, 8, 8), **style),
    "spikformer": lambda **style: Spikformer(3, shape=(2, 8, 8), dim=16, depth=2, heads=2, patch=4, **style),
    "sdt": lambda **style: SpikeDrivenTransformer(3, shape=(2, 8, 8), dim=16, depth=1, patch=4, **style),
    "linear": lambda **style: from_topology("FC-9_FC-7_L-3", shape=(2, 4, 4), neuron="PLIF", **style),
    "recurrent": lambda **style: from_topology(
        "FC-9_FCBN-7_L-3", shape=(2, 4, 4), recurrent=True, max_delay=3, decay=snn.Bounded(0.7), **style
    ),
}
RESNET = "CONVAP-4-3-1-1_RES-6-3=3-2=1-1=1_FCBN-8_L-3"
SEW = "CONVAP-4-3-1-1_SEWRES~ADD-4-3=3-1=1-1=1_SEWRES~ADD-6-3=3-2=1-1=1_FC-8_L-3"


def made(name, dtype, sync=True, **style):
    torch.manual_seed(1)
    return NETWORKS[name](timesteps=4, sync=sync, **style).to(dtype)


def trained(model, x, target, accumulate=1, steps=3, optimiser=torch.optim.SGD, clip=None, **settings):
    """Three steps on a TRT loss; the gradients of the first one."""
    loss, first = snn.TRTLoss(model, lam=1e-3), None
    optimiser = optimiser(model.parameters(), lr=0.05, **settings)
    for _ in range(steps):
        optimiser.zero_grad()
        for i in range(accumulate):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == accumulate - 1)
            each = slice(i * x.shape[1] // accumulate, (i + 1) * x.shape[1] // accumulate)
            (loss(model(x[:, each]), target[each]) / accumulate).backward()
        if first is None:
            first = [full(p.grad).clone() for p in model.parameters()]
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
    return first


def trains_as_one(rank, world, name, dtype, mesh=None, accumulate=1, blocks=None, reshard=True, **style):
    alone, model = made(name, dtype, False, **style), made(name, dtype, **style)
    for p in model.parameters() if rank else ():
        p.detach().add_(1)  # the first process has the values
    chosen = None if blocks is None else blocks(model)
    assert shard(model, mesh, blocks=chosen, reshard=reshard) is model
    shape = (4, 8, 2, 4, 4) if name in ("linear", "recurrent") else (4, 8, 2, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    target = torch.randint(3, (8,), generator=torch.Generator().manual_seed(4))
    mine = part_of(rank, world)
    got = trained(model, x[:, mine], target[mine], accumulate)
    want = trained(alone, x, target, 1)
    for (key, p), g, w in zip(alone.named_parameters(), got, want, strict=True):
        same(g, w, msg=lambda text, key=key: f"{name}, gradient of {key}: {text}")
        same(full(model.get_parameter(key)), p, msg=lambda text, key=key: f"{name}, {key}: {text}")
    for (key, b), w in zip(model.named_buffers(), alone.buffers(), strict=True):
        same(b, w, torch.float32, msg=lambda text, key=key: f"{name}, {key}: {text}")
    return model


def networks(rank, world):
    """Networks of ours under ``shard``: gradients, weights and running statistics of three steps."""
    for name in NETWORKS:
        trains_as_one(rank, world, name, torch.float64)
    trains_as_one(rank, world, "vgg", torch.float32)
    trains_as_one(rank, world, "vgg", torch.float32, checkpoint=True)
    trains_as_one(rank, world, "sew", torch.float32, packed=False)
    trains_as_one(rank, world, "linear", torch.float64, accumulate=2)


def half(rank, world):
    """Computed in bfloat16, the shards and their penalty stay in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("vgg", "spikformer"):
        alone, model = made(name, torch.float32), shard(made(name, torch.float32), policy=policy)
        out = model(torch.randn(4, 2, 2, 8, 8))
        assert out.dtype == torch.bfloat16
        losses = snn.TRTLoss(alone, lam=1e-2), snn.TRTLoss(model, lam=1e-2)
        target = torch.zeros(2, dtype=torch.int64)
        parts = losses[1].parts(out, target)
        want = losses[0].parts(torch.zeros(4, 2, 3), target).regularizer
        same(parts.regularizer, want)
        parts.total.backward()
        same(losses[1].add_grad_(), want)
        for p in model.parameters():
            assert p.dtype == p.grad.dtype == torch.float32 and full(p.grad).isfinite().all()


def hybrid(rank, world):
    """Two groups that each hold the model in two parts; and the same without letting go of the weights in between."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    trains_as_one(rank, world, "vgg", torch.float64, mesh)
    trains_as_one(rank, world, "vgg", torch.float64, blocks=lambda model: model.layers[:1], reshard=False)


def scalars(rank, world):
    """All learned numbers of the neurons go over the links in one all-reduce of as many numbers."""
    model = shard(made("vgg", torch.float32))
    learned = [p for p in model.parameters() if p.dim() == 0]
    assert len(learned) == 2 and not any(isinstance(p, DTensor) for p in learned)
    assert all(isinstance(p, DTensor) for p in model.parameters() if p.dim())
    model.eval()  # without statistics to share
    with Counted() as counted:
        model(torch.randn(4, 2, 2, 8, 8)).sum().backward()
    reduced = [size for name, size in counted.seen if name == "all_reduce"]
    assert reduced == [len(learned)], counted.seen
    # A backward pass that breaks off has none behind it, and the next one has.
    learnt = nn.Parameter(torch.ones(()))
    _Averaged([learnt], init_device_mesh("cpu", (world,)))
    broken = learnt.register_post_accumulate_grad_hook(lambda _: 1 / 0)
    refuses("division", ZeroDivisionError, (learnt * rank).backward)
    broken.remove()
    learnt.grad = None
    for times in (1, 2):  # the second one adds to an average
        (learnt * (rank + 1)).backward()
        assert learnt.grad == times * 1.5


def whole_again(rank, world):
    """``full`` and ``like``: there and back, cut unevenly, with nothing for some; ordinary tensors as they are."""
    mesh = init_device_mesh("cpu", (world,))
    for shape, placed in (((5, 3), (Shard(0),)), ((3, 7), (Shard(1),)), ((1, 2), (Shard(0),)), ((4,), (Replicate(),))):
        (whole,) = weights(torch.float32, shape)
        parameter = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placed))
        laid = like(whole, parameter)
        assert laid.placements == parameter.placements and laid.shape == parameter.shape
        assert laid.to_local().shape == parameter.to_local().shape
        assert torch.equal(full(laid), whole)
        refuses("shape", ValueError, like, torch.ones(9), parameter)
    assert like(whole, nn.Parameter(torch.zeros(4))) is whole and full(whole) is whole


def misused(rank, world):
    """What ``shard`` says of a mesh or a model that it cannot take, in every process."""
    small = DeviceMesh("cpu", [0])
    refuses(f"all {world} processes, got one of 1 ", RuntimeError, shard, network(torch.float32), small)
    refuses("DeviceMesh", TypeError, shard, network(torch.float32), "cpu")
    refuses(
        "'0.weight' on meta", ValueError, shard, network(torch.float32).to("meta"), init_device_mesh("cpu", (world,))
    )
    model = shard(network(torch.float32))
    refuses("not parallel yet", ValueError, shard, model)
    ddp = nn.parallel.DistributedDataParallel(network(torch.float32))
    refuses("not parallel yet", ValueError, shard, ddp)
    refuses("modules of the model", ValueError, shard, network(torch.float32), blocks=[nn.Linear(1, 1)])
    refuses("parameters", ValueError, shard, nn.ReLU())
    net = made("vgg", torch.float32)
    refuses("SpikeConv2d inside of a ConvBatchNormLIF", ValueError, shard, net, blocks=[net.layers[0].conv])
    before, distributed.is_initialized = distributed.is_initialized, lambda: False
    refuses("torchrun", RuntimeError, shard, network(torch.float32))
    distributed.is_initialized = before


NEURONS = {
    "LIF": lambda: snn.LIF(0.7, channel_dim=-1),
    "PLIF": lambda: snn.PLIF(v_reset=None, channel_dim=-1),
    "channels": lambda: snn.LIF(snn.Bounded(torch.linspace(0.3, 0.9, 7)), v_threshold=nn.Parameter(torch.tensor(0.8)),
        gain=torch.linspace(0.8, 1.2, 7), channel_dim=-1),
    "ALIF": lambda: snn.ALIF(beta=nn.Parameter(torch.tensor(0.1)), channel_dim=-1),
    "late": lambda: snn.LIF(nn.Parameter(torch.tensor(0.6)), time_dim=1, channel_dim=-1),
}  # fmt: skip
PLAN = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}


def tensor_parallel(rank, world):
    """Linear + neurons + Linear, cut along the neurons: their spikes stay cut, and nobody is asked for anything."""
    mesh = init_device_mesh("cpu", (world,))
    for name, make in NEURONS.items():
        for dtype, linear in ((torch.float64, nn.Linear), (torch.float32, SpikeLinear)):
            torch.manual_seed(6)
            alone = nn.Sequential(linear(6, 7), make(), nn.Linear(7, 3)).to(dtype)
            model = copy.deepcopy(alone)
            parallelize_module(model, mesh, PLAN)
            x = 12 * torch.randn(5, 4, 6, dtype=dtype)
            current, plain = model[0](x), alone[0](x)
            state = "return_h" if name == "late" else "return_v"
            want, want_v = alone[1](plain, **{state: True})
            with CommDebugMode() as counted:
                got, got_v = model[1](current, **{state: True})
            assert counted.get_total_counts() == 0
            assert got.placements == got_v.placements == current.placements == (Shard(2),)
            assert got.shape == current.shape and 0 < full(got).mean() < 1
            same(got, want)
            same(got_v, want_v)
            (model[2](got).square().sum() + got_v.sum().full_tensor()).backward()
            (alone[2](want).square().sum() + want_v.sum()).backward()
            for (key, p), w in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert p.grad is not None, key
                same(p.grad, w.grad, msg=lambda text, key=key, name=name: f"{name}, {key}: {text}")


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def carried(rank, world):
    """States go on from call to call, cut as they are, with lengths, of one step, and of neurons with several."""
    mesh = init_device_mesh("cpu", (world,))
    whole = 3 * torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(7))
    lengths = torch.tensor([6, 2, 0, 4])
    for placed in (Shard(1), Shard(2), Replicate()):
        x = distribute_tensor(whole, mesh, [placed])
        for layer in (snn.PLIF(), snn.ALIF(), snn.LI()):
            first, state = layer(whole[:3], return_state=True)
            got, carried = layer(x[:3], return_state=True)
            same(got, first)
            for part, want in zip(parts(carried), parts(state), strict=True):
                assert isinstance(part, DTensor)
                same(part, want)
            same(layer(x[3:], carried), layer(whole[3:], state))
            same(layer(x[3:], state), layer(whole[3:], state))
            same(layer(x, lengths=lengths), layer(whole, lengths=lengths))
            same(layer.step(x[3], carried)[0], layer.step(whole[3], state)[0])
    refuses("packed=False", ValueError, snn.LIF(packed=True), x)
    refuses("axis of its neurons", ValueError, snn.LIF(), distribute_tensor(whole, mesh, [Shard(0)]))
    partial = DTensor.from_local(whole, mesh, [Partial()])
    refuses("all of its input", ValueError, snn.LIF(), partial)
    refuses(r"3 values|1 or 5 values", ValueError, snn.LIF(torch.full((3,), 0.5)), x)
    for layer in (snn.Recurrent(snn.LIF(), nn.Linear(5, 5)), snn.Delay(5, 3, learnable=True), snn.BatchNormLIF(5)):
        refuses(r"to_local\(\)", TypeError, layer, x)


def local_output(rank, world):
    """ColwiseParallel as it is by default gives ordinary tensors: neurons whose numbers are numbers run on these."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(8)
    alone = nn.Sequential(nn.Linear(6, 8), snn.LIF(0.7), nn.Linear(8, 3))
    model = copy.deepcopy(alone)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = 3 * torch.randn(5, 4, 6)
    for net in (model, alone):
        net.out = net(x)
        net.out.square().sum().backward()
    same(model.out, alone.out)
    for p, w in zip(model.parameters(), alone.parameters(), strict=True):
        same(p.grad, w.grad)


class Waits(TorchDispatchMode):
    """Counts how often a number was asked for, for which a GPU's host would wait."""

    asked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.asked += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def shared_norm(rank, world):
    """One all-reduce of 2 C + 1 numbers a direction, nobody waits, and the numbers are those of one process, also where
    the processes have unequal parts, with a residual, and where the mean is 10,000 standard deviations."""
    cut = slice(0, 2) if rank == 0 else slice(2, 5)
    for offset, backend, with_residual in itertools.product((0.5, 1e4), ("auto", "reference"), (False, True)):
        y, g, r = (torch.randn(4, 5, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
        y = y + offset
        whole, shared = snn.BatchNormLIF(3, backend=backend), snn.BatchNormLIF(3, sync=True, backend=backend)
        full_y, part_y = y.clone().requires_grad_(), y[:, cut].clone().requires_grad_()
        want = whole(full_y, r if with_residual else None)
        with Waits() as waits, Counted() as counted:
            got = shared(part_y, r[:, cut] if with_residual else None)
        assert counted.seen == [("all_reduce", 7)] and waits.asked == 0, (counted.seen, waits.asked)
        with Counted() as counted:
            got.backward(g[:, cut])
        assert counted.seen == [("all_reduce", 7)], counted.seen
        want.backward(g)
        assert torch.equal(got, want[:, cut]) and 0 < got.mean() < 1
        torch.testing.assert_close(part_y.grad, full_y.grad[:, cut], rtol=1e-4, atol=1e-6)
        same(shared.running_mean, whole.running_mean)
        same(shared.running_var, whole.running_var)
        assert shared.num_batches_tracked == 1
        distributed.all_reduce(shared.weight.grad)
        torch.testing.assert_close(shared.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-4)
    refuses("give each process a sample", ValueError, shared, y[:, :0])
    # One value in each process is enough: there are two in all.
    layer = snn.BatchNormLIF(3, sync=True)
    layer(torch.full((1, 1, 3), float(rank)))
    torch.testing.assert_close(layer.running_var, torch.full((3,), 0.95))


def optimised(rank, world):
    """Shards and whole numbers of neurons in one optimiser, step by step and tensor by tensor or all at once."""
    for settings in ({"optimiser": torch.optim.Adam, "foreach": foreach} for foreach in (True, False)):
        alone, model = made("linear", torch.float64), shard(made("linear", torch.float64))
        x = torch.randn(4, 8, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        target, mine = torch.arange(8) % 3, part_of(rank, world)
        trained(model, x[:, mine], target[mine], clip=0.1, **settings)
        trained(alone, x, target, clip=0.1, **settings)
        for got, want in zip(model.parameters(), alone.parameters(), strict=True):
            same(got, want)


if __name__ == "__main__":
    processes.main(globals(), *sys.argv[1:])
