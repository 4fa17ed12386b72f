"""Streaming: parts of a sequence, one after the other, are the whole of it, for every layer and network."""

import threading
from collections import OrderedDict

import pytest
import torch
from conftest import DEVICE, FUSED
from torch import nn

from trtkern import nn as snn
from trtkern.backends import named
from trtkern.models import ConvSNN, from_topology, resnet19, sew_resnet34, spiking_resnet34, vggsnn
from trtkern.nn._neuron import carrier

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
T, B, C = 9, 2, 3
CUTS = ((1,) * T, (3, 5, 1), (8, 1), (T,))
PLAIN = ("LIF", "IF", "PLIF", "CUBALIF", "ALIF", "AdLIF", "CLIF", "QIF", "EIF", "Izhikevich")
NEURONS = (*PLAIN, "LI", "CUBALI")


def lively(name):
    """Numbers with which the neuron fires."""
    return {"gain": 0.75} if name in ("ALIF", "AdLIF", "CUBALIF", "CUBALI") else {}


def neuron(name, **options):
    return getattr(snn, name)(**{"backend": BACKEND, **lively(name), **options})


def rounded(model, x=None):
    """In evaluation, with weights whose sums float32 holds exactly, in whatever order and number of rows they are
    computed: what differs between parts and the whole is then the fault of the states. x: what norms get used to."""
    norms = list(snn.batch_norms(model))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                steps = 16 if isinstance(module, nn.Linear) else 32
                module.weight.copy_(torch.randint(-8, 9, module.weight.shape) / steps)
                if module.bias is not None:
                    module.bias.copy_(torch.randint(0, 13, module.bias.shape) / 16)
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.8, 1.5)
            norm.bias.uniform_(0.2, 0.8)
        if x is not None and norms:
            model.train()(x)
    return model.eval()


def image(*shape):
    return torch.randint(0, 9, shape) / 8


def block(**options):
    norm = snn.BatchNormLIF(4, packed=True, backend=BACKEND)
    return snn.ConvBatchNormLIF(snn.SpikeConv2d(C, 4, 3, padding=1), norm, **options)


class Residual(nn.Module):
    """A layer that is used twice, and one with a residual."""

    takes_time = True

    def __init__(self):
        super().__init__()
        self.norm = snn.BatchNormLIF(C, neuron=snn.ALIF, gain=0.75, backend=BACKEND)
        self.lif = neuron("CUBALIF")

    def forward(self, x):
        once = self.lif(x)
        return self.lif(self.norm(x, residual=once) + once)


class Loop(nn.Module):
    """A loop over time of its own, and a call that goes on where another ended."""

    def __init__(self):
        super().__init__()
        self.lif, self.two = neuron("LIF"), neuron("CUBALIF")

    def forward(self, x):
        made, v = [], None
        for x_t in x:
            s, v = self.lif.step(x_t, v)
            made.append(s)
        s = torch.stack(made)
        half = (len(s) + 1) // 2
        first, state = self.two(s[:half], return_state=True)
        if half == len(s):
            return first
        rest, _ = self.two(s[half:], state, return_state=True)
        return torch.cat([first, rest])


LAYERS = {
    **{name: lambda name=name: neuron(name) for name in NEURONS},
    **{f"packed {name}": lambda name=name: neuron(name, packed=True) for name in ("LIF", "CUBALIF")},
    "LIF, soft": lambda: neuron("LIF", v_reset=None, decay=snn.Bounded(torch.rand(C))),
    **{f"BatchNorm {name}": lambda name=name: snn.BatchNormLIF(
        C, neuron=getattr(snn, name), backend=BACKEND, **lively(name))
       for name in PLAIN},
    "pooled": lambda: snn.BatchNormLIF(C, pool=2, packed=True, backend=BACKEND),
    "unfused": lambda: snn.UnfusedBatchNormLIF(nn.BatchNorm2d(C), neuron("LIF"), nn.AvgPool2d(2)),
    "block": block,
    "checkpointed block": lambda: block(checkpoint=True),
    "twice": Residual,
    "loop": Loop,
    "Sequential": lambda: nn.Sequential(
        snn.OverTime(nn.Conv2d(C, 5, 3)), neuron("PLIF"), nn.Flatten(2), nn.Linear(80, 4), neuron("LI")),
    "TimeSequential": lambda: snn.TimeSequential(
        nn.Conv2d(C, 4, 3, padding=1), nn.BatchNorm2d(4), neuron("LIF"), nn.MaxPool2d(2), nn.Dropout(),
        snn.TimeSequential(snn.SpikeConv2d(4, 4, 3), neuron("ALIF")), nn.Flatten(), snn.SpikeLinear(4, 5),
        neuron("CUBALI")),
    "converted": lambda: snn.convert_spike_layers(snn.convert_norm_lif(snn.TimeSequential(
        nn.Conv2d(C, 4, 3, padding=1), nn.BatchNorm2d(4), neuron("LIF"), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4), neuron("AdLIF")))),
}  # fmt: skip

MODELS = {
    "conv": lambda: ConvSNN((2, 8, 8), (8, "pool", 6), 3, backend=BACKEND),
    "conv, checkpoint": lambda: ConvSNN((2, 8, 8), (8, "pool", 6), 3, checkpoint=True, backend=BACKEND),
    "vggsnn": lambda: vggsnn(10, shape=(2, 16, 16), backend=BACKEND),
    "resnet19": lambda: resnet19(10, shape=(2, 8, 8), width=4, backend=BACKEND),
    "sew_resnet34": lambda: sew_resnet34(10, shape=(2, 32, 32), width=4, backend=BACKEND),
    "spiking_resnet34": lambda: spiking_resnet34(10, shape=(2, 32, 32), width=4, backend=BACKEND),
    **{
        f"topology, {name}": lambda name=name: from_topology(
            f"CONV-4-3-1-1_SEWRES~{'ADD' if name == 'LIF' else 'IAND'}-6-3=3-2=1-1=1_FC-8_L-5",
            shape=(2, 8, 8), neuron=name, backend=BACKEND, **lively(name),
        )
        for name in PLAIN
    },
    "flat": lambda: from_topology("FC-16_FCBN-8_L-5", shape=(2, 8, 8), neuron="ALIF", gain=0.75, backend=BACKEND),
}  # fmt: skip


def dense(y):
    return y.spikes if isinstance(y, snn.Spikes) else y


def in_parts(stream, x, cuts):
    """What a stream gives for the parts of x, put together."""
    return torch.cat([dense(stream.chunk(part)) for part in x.split(cuts)])


def same(a, b):
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 7e7), torch.nan_to_num(b, 7e7))


@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_parts_are_the_whole_bit_for_bit(name):
    make = LAYERS.get(name) or MODELS[name]
    x = image(T, B, C, 6, 6) * 2 if name in LAYERS else image(T, B, *{"vggsnn": (2, 16, 16)}.get(name, (2, 8, 8)))
    if name.endswith("resnet34"):
        x = image(T, B, 2, 32, 32)
    model = rounded(make(), x)
    with torch.no_grad():
        whole = dense(model(x))
        assert whole.std() > 0
        for cuts in CUTS:
            stream = snn.stream(model)
            assert same(in_parts(stream, x, cuts), whole), cuts
        stream.reset()
        assert stream.state == {}
        stepped = [stream.step(x_t) for x_t in x]
        assert same(torch.stack(stepped), whole)
        assert all(y.shape == whole.shape[1:] and type(y) is torch.Tensor for y in stepped)
        # Without the states it would be something else.
        assert not same(torch.stack([snn.stream(model).step(x_t) for x_t in x]), whole)


@pytest.mark.parametrize("name", [*LAYERS, "conv", "conv, checkpoint", "topology, LIF", "topology, ALIF", "flat"])
def test_gradients_go_through_the_parts_as_through_the_whole(name):
    make = LAYERS.get(name) or MODELS[name]
    start = image(T, B, C, 6, 6) * 2 if name in LAYERS else image(T, B, 2, 8, 8)
    model = rounded(make(), start)
    x, again = start.clone().requires_grad_(), start.clone().requires_grad_()
    whole = dense(model(x))
    weight = torch.randn(whole.shape)
    (whole * weight).sum().backward()
    want = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = in_parts(snn.stream(model), again, (1, 3, 5))
    (parts * weight).sum().backward()
    assert same(parts, whole) and x.grad.abs().max() > 0
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-4, atol=1e-5 * x.grad.abs().max().item())
    for key, p in model.named_parameters():
        if key in want:
            torch.testing.assert_close(p.grad, want[key], rtol=1e-4, atol=1e-5 * want[key].abs().max().item())


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_on_every_backend(name, backend):
    model = neuron(name, backend=backend)
    x = (torch.rand(5, 2, 3) * 3).to(DEVICE[backend]).requires_grad_()
    again = x.detach().clone().requires_grad_()
    model.to(x.device)
    whole, parts = model(x), in_parts(snn.stream(model), again, (2, 1, 2))
    assert same(parts, whole)
    weight = torch.randn_like(whole)
    (whole * weight).sum().backward(), (parts * weight).sum().backward()
    assert same(again.grad, x.grad) and x.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    model = snn.TimeSequential(neuron("CUBALIF"), neuron("LI"))
    x = (torch.rand(T, B, C) * 3).to(dtype)
    stream = model.stream()
    assert same(in_parts(stream, x, (4, 5)), model(x))
    assert {part.dtype for state in stream.state.values() for part in state} == {torch.float32}


def test_detach_truncates():
    model, x = neuron("LI"), torch.rand(4, 2, 3, requires_grad=True)
    stream = snn.stream(model)
    stream.chunk(x[:2])
    assert stream.state["itself"].requires_grad
    stream.detach()
    assert not stream.state["itself"].requires_grad
    stream.chunk(x[2:]).sum().backward()
    assert x.grad[:2].abs().max() == 0 and x.grad[2:].abs().min() > 0


def test_the_state_is_saved_and_restored(tmp_path):
    model = snn.TimeSequential(OrderedDict(a=neuron("LIF"), b=neuron("CUBALIF"), c=Residual())).eval()
    x = image(T, B, C, 6, 6) * 2
    whole = model(x)
    stream = model.stream()
    stream.chunk(x[:4])
    assert list(stream.state) == ["a", "b", "c.lif", "c.norm.lif", "c.lif#2"]
    assert stream.state["b"]._fields == ("i", "v") and stream.state["a"].shape == x.shape[1:]
    stream.detach()
    torch.save({key: tuple(v) if isinstance(v, tuple) else v for key, v in stream.state.items()}, tmp_path / "state.pt")
    held = stream.state
    first = stream.chunk(x[4:])
    stream.state = held
    assert same(stream.chunk(x[4:]), first) and same(first, whole[4:])
    other = model.stream()
    other.state = torch.load(tmp_path / "state.pt")
    assert same(other.chunk(x[4:]), first)
    del held["b"]
    other.state = held  # it starts at zero
    assert not same(other.chunk(x[4:]), first)


def test_two_streams_and_the_model_itself_do_not_meet():
    model = rounded(MODELS["conv"]())
    x, z = image(T, B, 2, 8, 8), image(T, 5, 2, 8, 8)
    want = model(x), model(z)
    one, two, made = model.stream(), model.stream(), ([], [])
    for x_t, z_t in zip(x, z, strict=True):
        made[0].append(one.step(x_t))
        assert same(model(x), want[0])
        made[1].append(two.step(z_t))
    assert same(torch.stack(made[0]), want[0]) and same(torch.stack(made[1]), want[1])
    assert carrier() is None


def test_threads():
    model = rounded(MODELS["conv"]())
    inputs = [image(T, B, 2, 8, 8) for _ in range(4)]
    want, made = [model(x) for x in inputs], {}

    def run(i):
        stream = model.stream()
        made[i] = torch.stack([stream.step(x_t) for x_t in inputs[i]])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(made[i], want[i]) for i in range(4))


@pytest.mark.parametrize("kind", ["network", "container", "nested"])
def test_an_image_is_shown_at_every_step(kind):
    if kind == "network":
        model = rounded(ConvSNN((2, 8, 8), (8, "pool", 6), 3, timesteps=4, backend=BACKEND))
    else:
        model = snn.TimeSequential(nn.Conv2d(2, 4, 3), neuron("LIF"), nn.Flatten(), nn.Linear(144, 3), timesteps=4)
        model = rounded(snn.TimeSequential(model, neuron("LI")) if kind == "nested" else model)
    x = image(B, 2, 8, 8)
    whole, stream = model(x), model.stream()
    assert same(torch.stack([stream.step(x) for _ in range(4)]), whole)
    stream.reset()
    made = [stream.chunk(x.expand(3, *x.shape)), stream.chunk(x.unsqueeze(0))]
    assert same(torch.cat(made), whole)


def test_a_layer_with_time_on_another_axis():
    model = neuron("LIF", time_dim=1)
    x = torch.rand(B, T, C) * 2
    stream = snn.stream(model)
    assert same(torch.stack([stream.step(x[:, t]) for t in range(T)], 1), model(x))


def test_other_outputs_of_a_layer_are_as_ever():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron("CUBALIF")

        def forward(self, x):
            return self.lif(x, return_v=True), self.lif(x, return_h=True, return_state=True)

    model, x = Outputs(), torch.rand(4, 2, 3)
    (s, v), (_, state, h) = snn.stream(model).chunk(x)
    want = model.lif(x, return_state=True, return_v=True)
    assert same(s, want[0]) and same(v, want[2]) and state._fields == ("i", "v") and same(state.v, want[1].v)
    assert h.shape == x.shape


def test_norms_that_need_all_steps_are_refused_before_anything_runs():
    model = MODELS["conv"]().train()
    stream = model.stream()
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    match = r"'layers.0.norm' \(BatchNormLIF\) in training \(and 1 more\).*model.eval\(\)"
    with pytest.raises(RuntimeError, match=match):
        stream.step(image(B, 2, 8, 8))
    assert not ran and stream.state == {}
    snn.freeze_norms(model)
    stream.step(image(B, 2, 8, 8))
    bare = snn.TimeSequential(nn.BatchNorm1d(3, track_running_stats=False), neuron("LIF")).eval()
    with pytest.raises(RuntimeError, match=r"'0' \(BatchNorm1d\) without running statistics.*track_running_stats=True"):
        bare.stream().step(torch.rand(4, 3))


def test_another_batch_is_refused_and_the_state_kept():
    model = rounded(MODELS["conv"]())
    stream = model.stream()
    stream.step(image(B, 2, 8, 8))
    before = stream.state
    with pytest.raises(ValueError, match=r"layer 'layers.0.norm.lif' \(LIF\): expected v0 of shape \(3, .*reset\(\)"):
        stream.step(image(3, 2, 8, 8))
    assert all(stream.state[key] is value for key, value in before.items())
    stream.reset()
    stream.step(image(3, 2, 8, 8))


def test_what_a_stream_does_not_take():
    lif = neuron("LIF")
    with pytest.raises(TypeError, match="expected a module, got"):
        snn.stream(torch.rand(3))
    with pytest.raises(ValueError, match=r"expected neurons of trtkern.nn in the model, got Linear without any"):
        snn.stream(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"'1' \(GRU\) expected to be no recurrent layer"):
        snn.stream(nn.Sequential(lif, nn.GRU(3, 3)))
    with pytest.raises(TypeError, match=r"'itself' \(OptimizedModule\) expected to be a module that is not compiled"):
        snn.stream(torch.compile(lif))
    in_place = nn.Sequential(neuron("LIF"), neuron("LI"))
    in_place[1].compile()
    with pytest.raises(TypeError, match=r"'1' \(LI\) expected to be a module that is not compiled"):
        snn.stream(in_place)
    stream = snn.stream(lif)
    with pytest.raises(TypeError, match="expected one step"):
        stream.step([1.0])
    with pytest.raises(RuntimeError, match=r"within torch.compile, torch.export or torch.jit.trace"):
        torch.jit.trace(stream.chunk, (torch.rand(2, 3, 4),))
    image_model = MODELS["conv"]().eval()
    with pytest.raises(ValueError, match=r"expected frames \[T, B, C, H, W\] in a stream"):
        image_model.stream().chunk(image(B, 2, 8, 8))


def test_a_compiled_call_is_refused():
    compiled = torch.compile(neuron("LIF"), backend="eager")
    model = nn.Sequential(neuron("LIF"))
    stream = snn.stream(model)
    model[0].forward = lambda x: compiled(x)
    with pytest.raises(RuntimeError, match=r"expected Sequential to run the neurons in it.*got none"):
        stream.chunk(torch.rand(2, 3, 4))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([], "expected state to be a dict"),
        ({"b": torch.zeros(2, 3)}, "expected the paths of neuron layers in state, got 'b'; the model has 0, 1"),
        ({"0": 1.0}, r"layer '0' \(LIF\) expected a state of tensors, got"),
        ({"0": (torch.zeros(2, 3),)}, r"layer '0' \(LIF\) expected one tensor, got 1 in a tuple"),
        ({"1": (torch.zeros(2, 3),)}, r"layer '1' \(CUBALIF\) expected the 2 states i, v, got 1 in a tuple"),
    ],
)
def test_states_that_are_none(state, match):
    stream = snn.stream(nn.Sequential(neuron("LIF"), neuron("CUBALIF")))
    stream.chunk(torch.rand(2, 2, 3))
    before = stream.state
    with pytest.raises((TypeError, ValueError), match=match):
        stream.state = state
    assert stream.state.keys() == before.keys()


def test_neurons_that_the_stream_does_not_know():
    class Given(nn.Module):
        def __init__(self, v0=None):
            super().__init__()
            self.lif, self.v0 = neuron("LIF"), v0

        def forward(self, x):
            return self.lif(x, self.v0)

    with pytest.raises(ValueError, match=r"layer 'lif' \(LIF\) expected no v0, since the stream holds the state"):
        snn.stream(Given(torch.zeros(2, 3))).chunk(torch.rand(4, 2, 3))
    model = Given()
    stream = snn.stream(model)
    model.lif = neuron("LIF")
    with pytest.raises(RuntimeError, match="in the model since the stream was made, got another LIF"):
        stream.chunk(torch.rand(4, 2, 3))


def test_a_model_that_gives_several_sequences_has_no_step():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron("LIF")

        def forward(self, x):
            return self.lif(x), x

    stream = snn.stream(Two())
    with pytest.raises(TypeError, match=r"expected the model to give a tensor or Spikes.*chunk\(x.unsqueeze\(0\)\)"):
        stream.step(torch.rand(2, 3))
    assert stream.state == {}
    stream.chunk(torch.rand(1, 2, 3))
