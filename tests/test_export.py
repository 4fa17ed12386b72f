"""``trtkern.interop.record`` and ``decompose``: programs of torch.export with opaque operators, and as plain torch."""

import subprocess
import sys

import pytest
import torch
from exported import Around, C, Every, drawn, network, same
from patience import PATIENCE
from torch.export import Dim, export

from trtkern import interop, models
from trtkern import nn as snn
from trtkern.interop.decomposition import operators


def frames(timesteps, batch, *shape):
    return 2 * torch.rand(timesteps, batch, *shape)


CASES = {"every neuron": (lambda: Every().eval(), (C,)), "around": (lambda: drawn(Around()), (2, 6, 6))}
CASES["network"] = (network, (2, 8, 8))


@pytest.mark.parametrize("name", CASES)
def test_a_program_and_its_plain_form_give_what_the_model_gives(name):
    """The operators are opaque nodes, then none; T and batch are any, as one operator that runs T times."""
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make()
    program = interop.record(model, frames(4, 1, *shape))
    opaque = [str(node.target) for node in operators(program)]
    assert any(each.startswith("trtkern.lif_forward") for each in opaque)
    plain = interop.decompose(program)
    assert not operators(plain) and "scan" in str(plain.graph) and len(operators(program)) == len(opaque)
    for x in (frames(4, 3, *shape), frames(19, C, *shape)):
        want = model(x)
        same(program.module()(x), want)
        same(plain.module()(x), want)
        same(interop.decompose(model)(x), want)


def test_copies_of_a_step_where_time_is_fixed():
    torch.manual_seed(0)
    model, shape = drawn(Around()), (2, 6, 6)
    plain = interop.decompose(interop.record(model, frames(3, 2, *shape), dynamic_time=False))
    assert not operators(plain) and "scan" not in str(plain.graph)
    x = frames(3, C, *shape)  # as many samples as channels
    same(plain.module()(x), model(x))
    layer = snn.LIF().eval()
    once = interop.decompose(interop.record(layer, x, dynamic_time=False), scan=True)
    assert "scan" in str(once.graph)
    same(once.module()(x), layer(x))


def test_images_and_half_precision():
    torch.manual_seed(0)
    model = models.ConvSNN((2, 6, 6), [4, "pool"], 3, timesteps=3).eval()
    plain = interop.decompose(interop.record(model, torch.rand(2, 2, 6, 6), time_dim=None, batch_dim=0))
    x = torch.rand(7, 2, 6, 6)
    same(plain.module()(x), model(x))
    layer = snn.LIF(decay=torch.rand(C))
    x = frames(4, 3, C).bfloat16()
    for each in (x, x.double()):
        # The reference, which float64 runs on, is a loop of a fixed length.
        fixed = each.dtype == torch.float64
        got = interop.decompose(interop.record(layer.eval(), each, dynamic_time=not fixed)).module()(each)
        assert got.dtype == each.dtype and torch.equal(got, layer(each))


def test_a_plain_program_runs_without_trtkern(tmp_path):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(C, 4), snn.AdLIF(), torch.nn.Linear(4, 2)).eval(), frames(9, 2, C)
    torch.export.save(interop.decompose(interop.record(model, frames(4, 3, C))), tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; net = torch.export.load('net.pt2').module(); torch.save(net(torch.load('x.pt')), 'y.pt');"
        "assert 'trtkern' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    same(torch.load(tmp_path / "y.pt"), model(x).detach())


def test_a_module_becomes_one_of_plain_torch_that_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(snn.BatchNormLIF(C), snn.SpikeLinear(C, 2))
    plain, x = interop.decompose(model), frames(4, 3, C)
    assert plain[0].lif.backend == "reference" and model[0].lif.backend == "auto"
    plain(x).sum().backward()
    assert plain[1].weight.grad is not None and model[1].weight.grad is None


def test_what_is_refused_is_named():
    x = frames(4, 3, C)
    with pytest.raises(ValueError, match=r"record: expected a model in evaluation, got one in training; call model"):
        interop.record(snn.BatchNormLIF(C), x)
    with pytest.raises(TypeError, match=r"record: expected a torch.nn.Module, got function"):
        interop.record(lambda x: x, x)
    with pytest.raises(TypeError, match=r"record: expected an example as a tensor, got \[1\]"):
        interop.record(snn.LIF().eval(), [1])
    with pytest.raises(ValueError, match=r"expected batch_dim to differ from time_dim, got 0 for both"):
        interop.record(snn.LIF().eval(), x, batch_dim=0)
    with pytest.raises(ValueError, match=r"record: expected time_dim to be an axis of x, got time_dim=3"):
        interop.record(snn.LIF().eval(), x, time_dim=3)
    with pytest.raises(TypeError, match=r"decompose: expected a torch.export.ExportedProgram or a module, got"):
        interop.decompose(x)
    with pytest.raises(TypeError, match=r"expected scan to be None, True or False, got 1.5"):
        interop.decompose(snn.LIF(), scan=1.5)
    program = interop.record(snn.LIF().eval(), x)
    with pytest.raises(ValueError, match=r"expected a fixed T with scan=False, got a program whose T is dynamic"):
        interop.decompose(program, scan=False)
    training = export(snn.BatchNormLIF(C), (x,), dynamic_shapes=({1: Dim("B")},), strict=False)
    with pytest.raises(ValueError, match=r"got one that moves its running statistics; record model\.eval\(\)"):
        interop.decompose(training)
