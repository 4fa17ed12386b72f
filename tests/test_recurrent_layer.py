"""The layer of neurons that feed each other, and what stands around a layer: containers, streams, instruments."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import trtkern
from trtkern import nn as snn
from trtkern.analysis import Samples, energy, gradients
from trtkern.interop import decompose
from trtkern.models.build import build
from trtkern.profiling import memory

N, T, B = 12, 9, 4


def layer(kind=snn.ALIF, bias=True, seed=0, **options):
    torch.manual_seed(seed)
    numbers = {"decay": 0.7, "gain": 1.0} if kind is snn.ALIF else {}
    made = snn.Recurrent(kind(**numbers, **options), nn.Linear(N, N, bias=bias))
    with torch.no_grad():
        made.linear.weight.mul_(2.0)
    return made


def sequence(*shape, seed=1):
    return torch.randn(shape or (T, B, N), generator=torch.Generator().manual_seed(seed)) + 0.5


def test_chunks_are_one_call_and_so_are_steps():
    rec, x = layer(), sequence()
    whole, last = rec(x, return_state=True)
    assert 0.05 < whole.mean() < 0.9 and last._fields == ("s", "v", "a")
    first, state = rec(x[:4], return_state=True)
    then, end = rec(x[4:], state, return_state=True)
    assert torch.equal(torch.cat([first, then]), whole)
    assert all(torch.equal(a, b) for a, b in zip(last, end, strict=True))
    state = None
    for t in range(T):
        s, state = rec.step(x[t], state)
        assert torch.equal(s, whole[t])
    assert torch.equal(rec(x[4:], tuple(rec(x[:4], return_state=True)[1])), then)


def test_gradients_go_from_chunk_to_chunk():
    rec, x = layer(snn.LIF), sequence()

    def gradients(run):
        leaf = x.clone().requires_grad_()
        rec.zero_grad()
        run(leaf).square().sum().backward()
        return [leaf.grad, rec.linear.weight.grad.clone(), rec.linear.bias.grad.clone()]

    def parts(x):
        first, state = rec(x[:4], return_state=True)
        return torch.cat([first, rec(x[4:], state)])

    for a, b in zip(gradients(rec), gradients(parts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_potentials_of_every_step():
    rec, x = layer(snn.LIF), sequence()
    s, h = rec(x, return_h=True)
    assert torch.equal(h > 1.0, s > 0)
    s, last, v = rec(x, return_state=True, return_v=True)
    assert torch.equal(v[-1], last.v) and torch.equal(s[-1], last.s)


def test_time_on_another_axis():
    rec, x = layer(snn.LIF), sequence()
    turned = layer(snn.LIF, time_dim=1)
    y, last = turned(x.transpose(0, 1), return_state=True)
    assert torch.equal(y.transpose(0, 1), rec(x)) and last.v.shape == (B, N)
    assert torch.equal(turned.step(x[0])[0], rec.step(x[0])[0])
    with pytest.raises(ValueError, match="time"):
        snn.TimeSequential(nn.Linear(N, N), turned)(x)


def test_containers_and_a_norm_in_front():
    x = sequence()
    model = snn.TimeSequential(nn.Linear(N, N), nn.BatchNorm1d(N), layer(), nn.Linear(N, 3))
    model(x).sum().backward()
    assert model(x).shape == (T, B, 3) and all(p.grad is not None for p in model.parameters())
    packed = snn.TimeSequential(layer(snn.LIF, packed=True), snn.SpikeLinear(N, 3))
    dense = snn.TimeSequential(copy.deepcopy(packed[0]), packed[1])
    dense[0].packed = False
    torch.testing.assert_close(packed(x), dense(x))
    assert not dense[0].neuron.packed
    behind = snn.TimeSequential(layer(snn.LIF), nn.Linear(N, 3))
    dense_behind = behind(x)
    behind = snn.convert_spike_layers(behind)
    assert behind[0].packed and isinstance(behind[1], snn.SpikeLinear)
    torch.testing.assert_close(behind(x), dense_behind)


def test_streams_carry_the_spikes_and_the_state():
    model, x = snn.TimeSequential(nn.Linear(N, N), layer(), nn.Linear(N, N), snn.LIF()), sequence()
    model.eval()
    whole = model(x)
    stream = snn.stream(model)
    parts = [stream.chunk(x[:3]), *(stream.step(x[t]).unsqueeze(0) for t in range(3, T))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert stream.state.keys() == {"1", "3"} and stream.state["1"]._fields == ("s", "v", "a")
    other = snn.stream(model)
    other.chunk(x[:5])
    held = other.state
    later = snn.stream(model)
    later.state = {"1": tuple(held["1"]), "3": held["3"]}
    torch.testing.assert_close(later.chunk(x[5:]), whole[5:])
    with pytest.raises(ValueError, match="3 states s, v, a"):
        later.state = {"1": held["1"][1:]}
    with pytest.raises(ValueError, match="reset"):
        stream.chunk(x[:, :2])


def test_copies_pickles_and_state_dicts():
    rec, x = layer(), sequence()
    y, last = rec(x, return_state=True)
    for other in (copy.deepcopy(rec), pickle.loads(pickle.dumps(rec))):
        assert torch.equal(other(x), y)
    assert pickle.loads(pickle.dumps(last))._fields == last._fields
    kept = io.BytesIO()
    torch.save(rec.state_dict(), kept)
    kept.seek(0)
    fresh = layer(seed=5)
    fresh.load_state_dict(torch.load(kept))
    assert torch.equal(fresh(x), y) and list(rec.state_dict()) == ["linear.weight", "linear.bias"]


def test_a_tracer_records_it_whole():
    model, x = snn.TimeSequential(nn.Linear(N, N), layer()), sequence()
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(x), model(x))


def test_half_and_autocast():
    rec, x = layer(snn.LIF), sequence()
    with torch.autocast("cpu", torch.bfloat16):
        y = snn.TimeSequential(nn.Linear(N, N), rec)(x)
    assert y.dtype == torch.bfloat16
    half, given = copy.deepcopy(rec).bfloat16(), x.bfloat16().requires_grad_()
    s, last = half(given, return_state=True)
    s.sum().backward()
    assert s.dtype == given.grad.dtype == half.linear.weight.grad.dtype == torch.bfloat16
    assert last.v.dtype == torch.float32


def test_debug_names_a_potential_that_is_not_finite():
    rec, x = layer(snn.LIF), sequence()
    x[3, 1, 2] = float("inf")
    with trtkern.debug(), pytest.raises(RuntimeError, match="recurrent: expected finite potentials"):
        rec(x)
    assert rec.nonfinite.item() == 1


@pytest.mark.parametrize(
    "make, kind, said",
    (
        (lambda: snn.Recurrent(snn.LI(), nn.Linear(3, 3)), TypeError, "spiking neurons.*got LI"),
        (lambda: snn.Recurrent(nn.ReLU(), nn.Linear(3, 3)), TypeError, "spiking neurons.*got ReLU"),
        (lambda: snn.Recurrent(snn.LIF(), nn.Linear(3, 4)), ValueError, r"Linear\(N, N\).*got Linear\(3, 4\)"),
        (lambda: snn.Recurrent(snn.LIF(), nn.Conv2d(3, 3, 1)), TypeError, "got Conv2d"),
        (lambda: layer()(sequence(T, B, N + 1)), ValueError, "each of the 13 neurons"),
        (lambda: layer()(sequence(T, B, 2, N)), ValueError, "flatten"),
        (lambda: layer()(sequence(), lengths=torch.ones(B, dtype=torch.int32)), ValueError, "lengths=None"),
        (lambda: layer()(sequence(), torch.zeros(B, N)), TypeError, "states s, v, a as a tuple"),
        (lambda: layer()(sequence(), (torch.zeros(B, N),) * 2), ValueError, "s, v, a"),
        (lambda: layer()(sequence(), (torch.zeros(B + 1, N),) * 3), ValueError, "s"),
        (lambda: layer()(None), TypeError, "Recurrent"),
        (lambda: layer(backend="cuda")(sequence()), (ValueError, RuntimeError), "cuda"),
    ),
)
def test_what_does_not_fit_is_refused_by_name(make, kind, said):
    with pytest.raises(kind, match=said):
        make()


def test_lengths_are_refused_by_the_layer_within_a_container():
    model = snn.TimeSequential(nn.Linear(N, N), layer())
    with pytest.raises(ValueError, match="Recurrent: expected lengths=None"):
        model(sequence(), lengths=torch.full((B,), 3))


def network(neuron=snn.LIF):
    torch.manual_seed(0)
    return snn.TimeSequential(nn.Linear(N, N), snn.Recurrent(neuron(), nn.Linear(N, N)), nn.Linear(N, 3))


def test_instruments_see_the_layer_and_what_it_feeds_itself():
    model, x = network(), 2 * sequence()
    samples = Samples.of("test", (x, torch.zeros(B, dtype=torch.int64)), batch_dim=1)
    spikes = model[1](model[0](x))
    found = energy(model, samples, updates=True)
    # Each spike but those of the last step reaches all N neurons.
    assert float(found.layers["1.linear"].sums.sum()) == pytest.approx(float(spikes[:-1].sum()) * N / B)
    assert not found.left_out and found.updates["1"].macs == T * N
    assert found.activity["1"].mean == pytest.approx(float(spikes.mean()))
    report = memory(model, x)
    assert report.predicted == report.measured
    assert [name for name, _ in snn.TRTLoss(model).regularized()] == ["0.weight", "1.linear.weight", "2.weight"]
    assert "1" in gradients(model, samples).layers


def test_compiled_and_recorded_it_gives_the_same():
    model, x = network(snn.ALIF), 2 * sequence()
    model[1].neuron.gain = 1.0

    def gradient(run):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        run(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in model.parameters())]

    compiled = torch.compile(lambda x: model(x), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(model), gradient(compiled), strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(decompose(program).module()(x), model(x))
    torch.testing.assert_close(decompose(model)(x), model(x))


def test_networks_of_linear_layers_take_recurrent_neurons():
    options = {"neuron": "AdLIF", "recurrent": True, "timesteps": T}
    model = build("topology", (1, 1, 20), 5, layers="FCBN-16_FC-12", **options)
    model(torch.randn(T, B, 1, 1, 20)).sum().backward()
    found = [layer for layer in model.modules() if isinstance(layer, snn.Recurrent)]
    assert [layer.linear.in_features for layer in found] == [16, 12]
    for layer in found:
        W = layer.linear.weight
        assert W.grad is not None and layer.linear.bias is None
        torch.testing.assert_close(W @ W.T, torch.eye(len(W)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="expected recurrent=True with layers of neurons behind a Linear"):
        build("topology", (1, 8, 8), 5, layers="CONV-8-3-1-1", **options)


def test_layers_that_would_have_to_be_called_are_refused():
    """What is inside is read and not called: a forward of its own, or a weight that a hook makes, would be left out."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Noisy(snn.LIF):
        def forward(self, x, *more, **options):
            return super().forward(x + 1, *more, **options)

    for neuron, linear, name in ((snn.LIF(), Scaled(N, N), "Scaled"), (Noisy(), nn.Linear(N, N), "Noisy")):
        with pytest.raises(TypeError, match=f"got {name} with one of its own"):
            snn.Recurrent(neuron, linear)
    assert snn.Recurrent(snn.LIF(), snn.SpikeLinear(N, N))(sequence()).shape == (T, B, N)
    pruned = layer()
    prune.l1_unstructured(pruned.linear, "weight", 0.5)
    with pytest.raises(RuntimeError, match="got one that a hook makes"):
        pruned(sequence())
    prune.remove(pruned.linear, "weight")
    assert pruned(sequence()).shape == (T, B, N)
