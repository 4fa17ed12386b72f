"""Other people's tools on every layer: tracers, exporters, copies and functional calls give what the layer gives."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from trtkern import models
from trtkern import nn as snn
from trtkern._torch import nodes
from trtkern.nn import Spikes, TimeSequential

T, B, C, H = 4, 3, 2, 6


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


def block(**options):
    norm = snn.BatchNormLIF(4, pool=2, packed=True)
    return snn.ConvBatchNormLIF(snn.SpikeConv2d(C, 4, 3, padding=1), norm, **options)


def network():
    return TimeSequential(
        nn.Conv2d(C, 4, 3, padding=1), nn.BatchNorm2d(4), snn.PLIF(packed=True), snn.SpikeConv2d(4, 3, 3),
        snn.BatchNormLIF(3, decay=nn.Parameter(torch.rand(3))), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


LAYERS = {
    "LIF": lambda: snn.LIF(snn.Bounded(0.6), v_threshold=nn.Parameter(torch.rand(C))),
    "IF": lambda: snn.IF(nn.Parameter(torch.tensor(2.0)), v_reset=None),
    "PLIF": lambda: snn.PLIF(channels=C, surrogate="atan"),
    "packed": lambda: snn.PLIF(packed=True),
    "LI": lambda: snn.LI(decay=nn.Parameter(torch.tensor(0.5))),
    "BatchNormLIF": lambda: snn.BatchNormLIF(C, v_leak=0.5, neuron=snn.PLIF),
    "SpikeConv2d": lambda: snn.SpikeConv2d(C, 3, 3),
    "SpikeLinear": lambda: snn.SpikeLinear(C * H * H, 3),
    "ConvBatchNormLIF": block,
    "checkpoint": lambda: block(checkpoint=True),
    "OverTime": lambda: snn.OverTime(nn.Conv2d(C, 3, 3)),
    "UnfusedBatchNormLIF": lambda: snn.unfuse(snn.BatchNormLIF(C, decay=0.7)),
    "TimeSequential": network,
    "ConvSNN": lambda: models.ConvSNN((C, H, H), [4, "pool", 3], 3),
}


def made(name):
    layer = LAYERS[name]()
    for module in layer.modules():
        if isinstance(module, (nn.BatchNorm2d, snn.BatchNormLIF)):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight, 1, 2)
    return layer


def frames(timesteps=T, batch=B, side=H):
    return 2 * torch.rand(timesteps, batch, C, side, side)


def flat(y):
    if isinstance(y, Spikes):  # compiled code has planes to spare
        return [y.spikes, y.words[: (len(y.spikes) + 7) // 8]]
    return [t for part in y for t in flat(part)] if isinstance(y, (tuple, list)) else [y]


def same(got, want):
    assert [t.shape for t in flat(got)] == [t.shape for t in flat(want)]
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b)


def total(y):
    """What is differentiated; the words of spikes are not."""
    return sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in flat(y) if t.is_floating_point())


def loaded(save, load, thing):
    buffer = io.BytesIO()
    save(thing, buffer)
    buffer.seek(0)
    return load(buffer)


def functional(layer):
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return lambda x: torch.func.functional_call(layer, held, (x,))


def unsafe(buffer):
    return torch.load(buffer, weights_only=False)


TOOLS = {
    "fx": lambda layer: fx.symbolic_trace(layer),
    "fx inside": lambda layer: fx.symbolic_trace(nn.Sequential(layer)),
    "fx saved": lambda layer: loaded(torch.save, unsafe, fx.symbolic_trace(nn.Sequential(layer))),
    "compile": lambda layer: torch.compile(layer, backend="eager", fullgraph=True),
    "deepcopy": lambda layer: copy.deepcopy(layer),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": lambda layer: loaded(torch.save, unsafe, layer),
    "functional_call": functional,
}
COPIES = ("fx saved", "deepcopy", "pickle", "save")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_of_training(name, tool):
    """Outputs, gradients and buffers afterwards are those of the layer without the tool."""
    if tool == "compile" and name in ("LIF", "IF", "PLIF", "LI", "UnfusedBatchNormLIF", "checkpoint", "ConvSNN"):
        pytest.skip("test_compile.py has it, or it is made of what the others compile")
    layer = made(name)
    plain, x = copy.deepcopy(layer), frames().requires_grad_()
    tooled = TOOLS[tool](layer)
    got, want = tooled(x), plain(x)
    same(got, want)
    trained = tooled if tool in COPIES else layer
    same(
        torch.autograd.grad(total(got), [x, *trained.parameters()]),
        torch.autograd.grad(total(want), [x, *plain.parameters()]),
    )
    same(list(trained.buffers()), list(plain.buffers()))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "checkpoint"])
def test_func_grad(name):
    layer, x = made(name).eval(), frames().requires_grad_()
    held = dict(layer.named_parameters())

    def loss(held, x):
        return total(torch.func.functional_call(layer, held, (x,)))

    by_parameters, by_input = torch.func.grad(loss, argnums=(0, 1))(held, x)
    same([by_input, *by_parameters.values()], torch.autograd.grad(total(layer(x)), [x, *layer.parameters()]))


class Reused(nn.Module):
    """Arguments by name, several outputs, spikes made by hand, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.lif, self.conv = snn.PLIF(packed=True), snn.SpikeConv2d(C, C, 1)
        self.norm = snn.BatchNormLIF(C)

    def forward(self, x):
        spikes, v = self.lif(x, return_state=True)
        dense, words = spikes
        y, last = self.norm(self.conv(Spikes(dense, words)), residual=spikes, v0=v, return_state=True)
        again, v_of_all = self.lif(y, v0=last, return_v=True)
        return again, v_of_all, last


def test_fx_keeps_arguments_by_name_and_packed_spikes():
    model = Reused()
    plain, x = copy.deepcopy(model), frames().requires_grad_()
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["lif", "conv", "norm", "lif"]
    got, want = traced(x), plain(x)
    same(got, want)
    kept = [type(node).__name__ for node in nodes([torch.autograd.graph.get_gradient_edge(total(got))])]
    assert kept.count("_SpikeFunctionBackward") == 1
    same(
        torch.autograd.grad(total(got), [x, *model.parameters()]),
        torch.autograd.grad(total(want), [x, *plain.parameters()]),
    )


class Stepped(nn.Module):
    """A loop over time of one's own."""

    def __init__(self):
        super().__init__()
        self.lif, self.norm, self.li = snn.PLIF(packed=True), snn.BatchNormLIF(C, packed=True), snn.LI()

    def forward(self, x):
        u = v = w = None
        for t in range(T):
            s, u = self.lif.step(x[t], u)
            s, v = self.norm.step(x[t], s, v)
            y, w = self.li.step(s, w)
        return y, w


def test_fx_of_single_steps():
    model, x = Stepped().eval(), frames().requires_grad_()
    traced = fx.symbolic_trace(model)
    same(traced(x), model(x))
    same(torch.autograd.grad(total(traced(x)), x), torch.autograd.grad(total(model(x)), x))


def test_fx_runs_hooks_once():
    layer, x = snn.LIF(), frames()
    layer.register_forward_hook(lambda layer, args, y: 2 * y)
    for traced in (fx.symbolic_trace(layer), fx.symbolic_trace(nn.Sequential(layer))):
        same(traced(x), layer(x))


def test_fx_of_a_layer_alone_takes_all_arguments():
    layer, x = snn.LIF(), frames()
    traced = fx.symbolic_trace(layer)
    same(traced(x, torch.ones(x.shape[1:]), return_state=True), layer(x, torch.ones(x.shape[1:]), return_state=True))
    fixed = fx.symbolic_trace(layer, concrete_args={"v0": None, "return_state": True, "return_v": False})
    same(fixed(x, None, True, False), layer(x, return_state=True))
    loss, logits, target = snn.TETLoss(), torch.rand(T, B, 2), torch.tensor([0, 1, 1])
    same(fx.symbolic_trace(loss)(logits, target), loss(logits, target))


class Doubled(snn.LIF):
    def forward(self, x):
        return 2 * super().forward(x)


def test_fx_of_an_own_layer():
    layer, x = Doubled(), frames()
    same(fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))
    with pytest.raises(TypeError, match=r"Doubled: expected torch.fx .*trace torch.nn.Sequential\(layer\)"):
        fx.symbolic_trace(layer)


@pytest.mark.parametrize("training", [True, False])
def test_fx_of_containers_with_static_input(training):
    """Whether the input is static is seen when the program runs, not when it is traced; T too."""
    net = TimeSequential(nn.Sequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4)), snn.LIF(), nn.Conv2d(4, 2, 1)).train(
        training
    )
    plain = copy.deepcopy(net)
    traced = fx.symbolic_trace(net)
    for x in (frames(), frames(1).expand(T, -1, -1, -1, -1), frames(7, 2)):
        same(traced(x), plain(x))
        same(list(net.buffers()), list(plain.buffers()))


def test_fx_of_containers_with_timesteps():
    inner = TimeSequential(nn.Conv2d(C, 4, 3), snn.LIF(packed=True), nn.Identity(), nn.Flatten(), timesteps=T)
    x = frames()
    for net in (inner, TimeSequential(inner, nn.Linear(64, 2)), TimeSequential(nn.ReLU(), inner)):
        traced = fx.symbolic_trace(net)
        first = x if isinstance(net[0], nn.ReLU) else x[0]
        same(traced(first), net(first))
    traced = fx.symbolic_trace(inner)
    same(traced(x, sequence=True), inner(x, sequence=True))
    with pytest.raises(ValueError, match="timesteps=4 steps"):
        traced(frames(5), sequence=True)
    with pytest.raises(ValueError, match=r"layer '3' \(LIF\) expected to have time on axis 0, got time_dim=1"):
        fx.symbolic_trace(TimeSequential(*inner[:3], snn.LIF(time_dim=1)))(frames())
    mixing = TimeSequential(nn.Flatten(0))
    with pytest.raises(ValueError, match=r"layer '0' \(Flatten\) expected to keep the 12 rows"):
        fx.symbolic_trace(mixing)(frames())
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\) expected \[T, B, ...\] with 3 axes"):
        fx.symbolic_trace(TimeSequential(nn.Linear(3, 2)))(torch.rand(B, 3))


class PathTracer(fx.Tracer):
    """As torchvision's ``create_feature_extractor`` traces: it notes in which module each node was made."""

    def __init__(self):
        super().__init__()
        self.place, self.places = "", {}

    def call_module(self, m, forward, args, kwargs):
        before, self.place = self.place, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.place):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.place, args, kwargs)
        finally:
            self.place = before

    def create_proxy(self, kind, target, *args, **kwargs):
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.places[proxy.node] = self.place if kind == "call_module" else f"{self.place}.{proxy.node}".lstrip(".")
        return proxy


def features(model, names):
    """The model that returns what its modules of these names return."""
    tracer = PathTracer()
    graph = tracer.trace(model)
    found = {}
    for node, place in tracer.places.items():
        for name in names:
            if f"{place}.".startswith(f"{name}."):
                found[name] = node
    next(node for node in graph.nodes if node.op == "output").args = ([found[name] for name in names],)
    extractor = fx.GraphModule(tracer.root, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    return extractor


@pytest.mark.parametrize("make", ["topology", "TimeSequential"])
def test_features(make):
    if make == "topology":
        topology = "CONVAP-4-3-1-1_RES-4-3=3-1=1-1=1_SEWRES~ADD-8-3=3-2=1-1=1_FC-6_L-3"
        model = models.from_topology(topology, shape=(C, 8, 8), timesteps=T)
        names, x = (
            ["layers.0", "layers.1.first", "layers.2.shortcut", "layers.2", "layers.4.lif", "classifier"],
            frames(side=8)[0],
        )
    else:
        model = nn.Sequential(nn.Identity(), network())
        names, x = ["1.0", "1.2", "1.4", "1.6", "1"], frames()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, y))
    got = features(model.eval(), names)(x)
    seen.clear()
    model(x)
    same(got, [seen[name] for name in names])


EXPORTED = ("LIF", "packed", "LI", "BatchNormLIF", "SpikeConv2d", "ConvBatchNormLIF", "TimeSequential", "ConvSNN")


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in EXPORTED), ("packed", True)])
def test_export(name, strict):
    """Dynamic T and batch, under grad mode; saved, loaded, and run on other layouts and a static input."""
    layer = made(name).eval()
    program = exported(layer, frames(), strict)
    for x in (
        frames(),
        frames(20, 2),
        frames(2, 5).transpose(3, 4),
        channels_last(frames(5, 4)),
        frames(1).expand(T, -1, -1, -1, -1),
    ):
        got, want = program(x), layer(x)
        same(got, want.spikes if isinstance(want, Spikes) else want)


def exported(layer, x, strict):
    axes = ({0: Dim("T"), 1: Dim("B")},)
    program = export(layer, (x,), dynamic_shapes=axes, strict=strict)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of weights in channels_last
        return loaded(torch.export.save, torch.export.load, program).module()


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_flatten_and_linear(strict):
    layer, x = TimeSequential(nn.Flatten(), nn.Linear(C * H * H, 3), snn.BatchNormLIF(3)).eval(), frames()
    program = exported(layer, x, strict)
    for x in (frames(), frames(1, 1), channels_last(frames(20, 9))):
        same(program(x), layer(x))


def test_export_with_an_example_that_is_static():
    """The example's stride of 0 is not a promise: other inputs differ from step to step."""
    layer = TimeSequential(nn.Conv2d(C, 4, 3), snn.BatchNormLIF(4), nn.Flatten(), nn.Linear(64, 2)).eval()
    program, x = exported(layer, frames(1).expand(T, -1, -1, -1, -1), strict=False), frames()
    same(program(x), layer(x))


def compilations(model, inputs):
    counter = CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(model, backend=counter, fullgraph=True), []
    for x in inputs:
        compiled(*x).sum().backward()
        counts.append(counter.frame_count)
    return counts


def test_new_times_and_batches_do_not_compile_again_with_a_loss():
    net = TimeSequential(nn.Linear(6, 8), snn.LIF(), nn.Linear(8, 5))
    loss = snn.TRTLoss(net)
    inputs = [
        (torch.rand(t, b, 6), torch.randint(5, (b,))) for t, b in ((2, 7), (3, 7), (40, 7), (9, 7), (5, 9), (17, 8))
    ]
    assert compilations(lambda x, target: loss(net(x), target), inputs) == [1, 2, 2, 2, 3, 3]


def test_new_times_and_batches_do_not_compile_again():
    net = TimeSequential(nn.Linear(6, 8), snn.BatchNormLIF(8, packed=True), snn.SpikeLinear(8, 5))
    inputs = [(torch.rand(t, b, 6),) for t, b in ((2, 7), (3, 7), (40, 7), (9, 7), (5, 9), (17, 8))]
    assert compilations(net, inputs) == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["LIF", "packed", "LI", "BatchNormLIF", "checkpoint", "TimeSequential", "ConvSNN"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(name):
    """The tracer's own check passes, and the program runs on other sizes and layouts, also after loading."""
    layer = made(name).eval()
    program = torch.jit.trace(layer, (frames(),))
    program = loaded(torch.jit.save, torch.jit.load, program)
    side = H if name in ("TimeSequential", "ConvSNN") else 8
    for x in (frames(), frames(20, 2, side), channels_last(frames(2, 5, side))):
        got, want = program(x), layer(x)
        same(got, want.spikes if isinstance(want, Spikes) else want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_in_training_counts_as_batch_norm_does():
    layer, norm, x = snn.BatchNormLIF(C), nn.BatchNorm2d(C), frames()
    program, plain = torch.jit.trace(layer, (x,)), torch.jit.trace(norm, (x.flatten(0, 1),))
    for y in (x, frames(7, 2, 8)):
        same(program(y), snn.LIF()(plain(y.flatten(0, 1)).unflatten(0, y.shape[:2])))
    same([layer.running_mean, layer.running_var, layer.num_batches_tracked], list(norm.buffers()))


def channels_last(x):
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
