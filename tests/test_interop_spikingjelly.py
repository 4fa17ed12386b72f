"""SpikingJelly's neurons, layers and model zoo, before and after ``trtkern.interop.convert``."""

import copy
import importlib.util
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from trtkern import interop
from trtkern import nn as snn
from trtkern.interop import adapters
from trtkern.interop._spikingjelly_layers import SequenceDropout
from trtkern.interop._spikingjelly_surrogates import KNOWN, surrogate_of
from trtkern.interop.spikingjelly import ADAPTERS
from trtkern.interop.stepping import FoldedSequential, FromStart

pytest.importorskip("spikingjelly", reason="pip install spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron, surrogate

ROOT = Path(__file__).resolve().parent.parent
MIGRATE = runpy.run_path(str(ROOT / "bench" / "migrate.py"))
SETTINGS = {"surrogate_function": surrogate.ATan(), "detach_reset": True}


def loop(net, x):
    return torch.stack([net(step) for step in x])


def whole(net, x):
    return net(x)


def frames(*sizes, scale=3.0):
    return scale * torch.rand(sizes, dtype=torch.float64) - 0.1 * scale


def converted(net, **options):
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(net), report, strict=True, **options)
    assert report.converted and not report.left
    return after


def same(net, x, mode="m", gradients=1e-9, **options):
    """check of a network and what it becomes, a network of one step over time."""
    after = converted(net, **options)
    runs = {"run": loop, "run_after": whole} if mode == "s" else {}
    result = interop.check(net, interop.over_time(after) if mode == "s" else after, x, **runs)
    assert result.different == 0 and result.fired > 0.02, str(result)
    assert result.within(0.0, gradients) or not result.gradients, str(result)
    return result


NEURONS = {
    "IF": lambda **rest: neuron.IFNode(**rest),
    "LIF": lambda **rest: neuron.LIFNode(**rest),
    "LIF, input as it is": lambda **rest: neuron.LIFNode(tau=3.0, decay_input=False, v_threshold=0.7, **rest),
    "PLIF": lambda **rest: neuron.ParametricLIFNode(init_tau=1.7, **rest),
    "PLIF, input as it is": lambda **rest: neuron.ParametricLIFNode(decay_input=False, **rest),
    "QIF": lambda **rest: neuron.QIFNode(v_rest=0.1, **rest),
    "EIF": lambda **rest: neuron.EIFNode(delta_T=0.5, v_rest=0.1, **rest),
    "Izhikevich": lambda **rest: neuron.IzhikevichNode(tau_w=3.0, a=0.2, **rest),
    "simple IF": lambda **rest: neuron.SimpleIFNode(**rest),
}


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name, detach, v_reset, mode):
    node = NEURONS[name](v_reset=v_reset, detach_reset=detach, surrogate_function=surrogate.Sigmoid(3.0))
    node.step_mode = mode
    net = nn.Sequential(nn.Linear(4, 6), node, nn.Linear(6, 2)).double()
    after = converted(net)
    kind = interop.Stepping if mode == "s" else (FromStart if v_reset and "simple" not in name else type(after[1]))
    assert type(after[1]) is kind and type(after[1]).__module__.startswith("trtkern")
    result = same(net, frames(5, 3, 4), mode, 1e-9)
    if "PLIF" in name:
        twins = [copy.deepcopy(each) for each in (net, after)]
        for each in twins:
            run = loop if mode == "s" else whole
            run(each, frames(5, 3, 4).fill_(1.3)).sum().backward()
        assert torch.allclose(twins[0][1].w.grad, next(twins[1][1].parameters()).grad, 1e-9, 1e-12)
    assert {"0.weight", "2.weight", "input"} <= set(result.gradients)


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize(
    "node",
    [
        neuron.SimpleLIFNode(2.0, True, v_reset=-0.3),
        neuron.IzhikevichNode(a=0.2, b=0.4, tau_w=3.0),
        neuron.ComplementaryLIFNode(tau=1.8),
        neuron.CUBALIFNode(),
        neuron.CUBALIFNode(v_reset=None, surrogate_function=surrogate.Sigmoid()),
        neuron.HalfThresholdIFNode(v_threshold=0.8),
    ],
    ids=lambda node: type(node).__name__,
)
def test_neurons_with_settings_of_their_own(node, mode):
    node = copy.deepcopy(node)
    node.step_mode = mode
    same(nn.Sequential(nn.Linear(4, 6), node, nn.Linear(6, 2)).double(), frames(5, 3, 4), mode)


def test_learned_parameters_stay_the_same_objects():
    net = nn.Sequential(neuron.ParametricLIFNode(step_mode="m"), neuron.ParametricLIFNode())
    held, optimiser = [each.w for each in net], torch.optim.SGD(net.parameters(), 0.1)
    after = interop.convert(net, strict=True)
    assert after[0].w is held[0] and after[1].neuron.w is held[1]
    loop(after[1], after[0](2 * torch.rand(4, 3, 2))).sum().backward()
    optimiser.step()
    assert float(after[0].w.detach()) != 0 and torch.equal(after[0].decay, 1 - torch.sigmoid(held[0]))


@pytest.mark.parametrize(
    "function",
    [
        surrogate.Sigmoid(2.0), surrogate.ATan(3.0), surrogate.PiecewiseQuadratic(0.7), surrogate.Rect(0.4),
        surrogate.Erf(1.5), surrogate.SoftSign(), surrogate.SoftSign(3.0), surrogate.SuperSpike(),
        surrogate.SuperSpike(2.0), surrogate.QPseudoSpike(), surrogate.PiecewiseLeakyReLU(),
        surrogate.PiecewiseLeakyReLU(0.5, 0.0), surrogate.PiecewiseLeakyReLU(0.6), surrogate.PiecewiseExp(1.4),
        surrogate.NonzeroSignLogAbs(2.0), surrogate.S2NN(), surrogate.LeakyKReLU(0.0, 2.0),
        surrogate.FakeNumericalGradient(), surrogate.LogTailedReLU(), surrogate.LogTailedReLU(0.1),
        surrogate.DeterministicPass(),
    ],
    ids=repr,
)  # fmt: skip
def test_surrogates(function):
    node = neuron.LIFNode(surrogate_function=function, step_mode="m").double()
    x = frames(6, 30, 20)
    if not isinstance(function, surrogate.LogTailedReLU):  # it jumps right behind the threshold
        x[0, 0, 0] = 2.0  # the threshold itself
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(node), report, strict=True)
    result = interop.check(node, after, x)
    assert result.different == 0 and result.within(0.0, 1e-12), str(result)
    builtin = after.spec.surrogate in ("sigmoid", "atan", "triangle", "rectangle", "gaussian", "fast_sigmoid")
    assert builtin == ("none of the built-in ones" not in report.converted[""])
    assert torch.equal(pickle.loads(pickle.dumps(after))(x), after(x))


def test_every_surrogate_is_known_or_refused_by_name():
    kinds = [
        kind
        for kind in vars(surrogate).values()
        if isinstance(kind, type) and issubclass(kind, surrogate.SurrogateFunctionBase)
    ]
    refused = {"SurrogateFunctionBase", "SquarewaveFourierSeries", "MultiLevelSpikeCount", "PoissonPass"}
    assert {kind.__name__ for kind in kinds} == refused | set(KNOWN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surrogate_function": surrogate.SquarewaveFourierSeries()}, "got SquarewaveFourierSeries"),
        ({"surrogate_function": surrogate.ATan(spiking=False)}, "got spiking=False"),
        ({"surrogate_function": surrogate.S2NN(beta=2.0)}, "expected a S2NN with beta=1.0, got beta=2.0"),
        ({"surrogate_function": surrogate.LeakyKReLU(0.1)}, "with leak=0.0, got leak=0.1"),
        ({"surrogate_function": surrogate.QPseudoSpike(3.0)}, "with alpha=2.0, got alpha=3.0"),
        ({"surrogate_function": surrogate.PiecewiseLeakyReLU(1.0, 0.5)}, "with c=0.01, got c=0.5"),
        ({"surrogate_function": torch.sigmoid}, "expected a surrogate_function of SpikingJelly's"),
        ({"surrogate_function": surrogate.ATan(-1.0)}, "expected alpha"),
        ({"store_v_seq": True}, "expected a LIFNode with store_v_seq=False, got store_v_seq=True"),
        ({"v_threshold": -1.0}, "v_threshold"),
        ({"v_threshold": torch.ones(3)}, r"expected v_threshold to be one number, got a tensor \[3\]"),
        ({"tau": "two"}, "expected tau to be one number, got 'two'"),
        ({"_neuron_precision": (torch.bfloat16, "fp32", "fp32")}, "_neuron_precision=None"),
    ],
)
def test_settings_without_an_equal_are_named(change, message):
    node = neuron.LIFNode()
    for name, value in change.items():
        if name == "surrogate_function" and not isinstance(value, nn.Module):
            del node._modules[name]
        setattr(node, name, value)
    report = interop.ConvertReport()
    net = interop.convert(nn.Sequential(node, neuron.LIFNode()), report)
    assert net[0] is node and list(report.left) == ["0"] and list(report.converted) == ["1"]
    with pytest.raises(ValueError, match=message):
        interop.convert(nn.Sequential(node), strict=True)


def test_neurons_without_an_equal_are_named():
    class Mine(neuron.LIFNode):
        pass

    izhikevich = neuron.IzhikevichNode(b=0.5, detach_reset=True)
    for node, message in (
        (Mine(), r"expected LIFNode itself, got a class derived from it.*register\('Mine'"),
        (neuron.KLIFNode(), "KLIFNode: expected a layer with a state that has an equal here"),
        (neuron.PSN(4), "PSN: expected a layer with a state that has an equal here"),
        (layer.SynapseFilter(), "SynapseFilter: expected a layer with a state"),
        (izhikevich, "expected b=0 where detach_reset=True, got b=0.5"),
        (neuron.IzhikevichNode(w_rest=0.2), "expected an IzhikevichNode with w_rest=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.convert(nn.Sequential(nn.Linear(2, 2), node), strict=True)


def test_a_class_of_one_s_own_in_five_lines(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", [])

    class Doubled(neuron.IFNode):
        def forward(self, x):
            return super().forward(2 * x)

    def mine(node):
        options = surrogate_of(node)
        return snn.IF(2.0, v_threshold=node.v_threshold, fire_on_equal=True, **options)

    interop.register("Doubled", mine, fields=("v_threshold",))
    same(nn.Sequential(nn.Linear(4, 6), Doubled(step_mode="m"), nn.Linear(6, 2)).double(), frames(5, 3, 4))


def test_hooks_keep_a_neuron_as_it_is():
    node = neuron.LIFNode()
    node.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="LIFNode has hooks"):
        interop.convert(nn.Sequential(node), strict=True)


def test_mode_type_and_device_stay():
    net = nn.Sequential(neuron.ParametricLIFNode(step_mode="m"), layer.Dropout(step_mode="m")).bfloat16().eval()
    after = interop.convert(net, strict=True)
    assert not any(each.training for each in after.modules()) and after[0].w.dtype == torch.bfloat16
    assert after[0](torch.rand(3, 2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    empty = interop.convert(nn.Sequential(nn.Linear(2, 2, device="meta"), neuron.LIFNode(step_mode="m")))
    assert empty[1].nonfinite.is_meta


def test_reset_net_and_detach_net_work_on_what_takes_one_step():
    net = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(), layer.Dropout()).double()
    x = frames(4, 3, 4)
    functional.reset_net(net)  # SpikingJelly remembers what it found to reset
    before, after = net, interop.convert(copy.deepcopy(net), strict=True)
    kept = net[1]
    in_place = interop.convert(net, strict=True)
    for each in (after, in_place):
        torch.manual_seed(0)
        first = loop(each, x)
        functional.detach_net(each)
        assert each[1].state is not None and not each[1].state.requires_grad
        functional.reset_net(each)
        torch.manual_seed(0)
        assert torch.equal(loop(each, x), first)
    assert before is in_place and type(kept) is neuron.LIFNode


def test_nothing_is_carried_from_batch_to_batch():
    net = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(), nn.Linear(6, 6), neuron.IFNode(v_reset=-0.2)).double()
    over_time = interop.over_time(converted(net))
    functional.set_step_mode(net, "m")
    sequences = converted(net)
    x = frames(4, 3, 4)
    for each in (over_time, sequences):
        first = each(x)
        each(frames(7, 5, 4))
        assert torch.equal(each(x), first) and first.sum() > 0


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("kind", [layer.Dropout, layer.Dropout2d])
def test_dropout_has_one_mask_for_all_steps(kind, mode):
    net = nn.Sequential(nn.Conv2d(2, 6, 1), neuron.IFNode(**SETTINGS), kind(0.5), nn.Conv2d(6, 6, 1), neuron.IFNode())
    net = nn.Sequential(kind(0.3), neuron.IFNode(**SETTINGS), kind(0.5)).double()
    functional.set_step_mode(net, mode)
    x = frames(5, 3, 4, 2, 2) + 1
    result = same(net, x, mode)
    after = converted(net)
    run = interop.over_time(after) if mode == "s" else after
    ones = torch.ones_like(x) * 4
    masks = run(ones)
    assert result.count and torch.equal(masks[0] != 0, masks[1] != 0) and not torch.equal(run(ones), masks)
    run.eval()
    assert torch.equal(run(ones), torch.ones_like(ones))
    assert [isinstance(each, SequenceDropout) for each in after] == [True, False, True]


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"])
@pytest.mark.parametrize("kind", [neuron.NonSpikingIFNode, neuron.NonSpikingLIFNode])
def test_readouts(kind, decode):
    node = kind(decode=decode)
    result = interop.check(node, converted(node), torch.randn(5, 3, 4, dtype=torch.float64))
    assert result.within(1e-12, 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_containers_that_loop_run_all_steps_at_once(training):
    def inner():
        return nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), neuron.LIFNode(**SETTINGS), nn.AvgPool2d(2)

    for container in (layer.MultiStepContainer(*inner()), layer.StepModeContainer(True, "m", *inner())):
        net = nn.Sequential(container, nn.Flatten(2), nn.Linear(16, 3)).double().train(training)
        report = interop.ConvertReport()
        after = interop.convert(copy.deepcopy(net), report, strict=True)
        assert type(after[0]) is FoldedSequential and not report.stepping and list(report.converted) == ["0", "0.2"]
        assert list(after.state_dict()) == list(net.state_dict())
        x = frames(5, 3, 2, 4, 4)
        result = interop.check(net, after, x)
        assert result.different == 0 and result.within(0.0, 1e-9)
        assert torch.equal(after.eval()(x), after(x))


def test_containers_stay_where_something_in_them_does():
    report = interop.ConvertReport()
    net = nn.Sequential(layer.MultiStepContainer(nn.Linear(2, 2), neuron.LIFNode(), neuron.KLIFNode()))
    interop.convert(net, report)
    assert type(net[0]) is layer.MultiStepContainer and list(report.left) == ["0.2"]
    assert report.stepping == ["0.1"] and list(report.converted) == ["0.1"]
    still = nn.Sequential(
        layer.StepModeContainer(False, "m", nn.Linear(2, 2)), layer.SeqToANNContainer(nn.Linear(2, 2))
    )
    report = interop.ConvertReport()
    interop.convert(still, report, strict=True)
    assert not report.converted and type(still[0]) is layer.StepModeContainer
    recurrent = nn.Sequential(layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add))
    with pytest.raises(ValueError, match="ElementWiseRecurrentContainer: expected a layer with a state"):
        interop.convert(recurrent, strict=True)


def test_over_time_refuses_a_state_that_is_not_known():
    net = interop.convert(nn.Sequential(neuron.LIFNode(), neuron.KLIFNode()))
    with pytest.raises(ValueError, match=r"treat each row by itself, got '1' \(KLIFNode\)"):
        interop.over_time(net)


def zoo(name, mode):
    """A network of SpikingJelly's model zoo with weights at which it fires, and an input."""
    from_zoo = MIGRATE["spikingjelly_model"]
    rest = {"num_classes": 10, **SETTINGS}
    if name == "sew_resnet18":
        net = from_zoo("sew_resnet").sew_resnet18(spiking_neuron=neuron.IFNode, cnf="ADD", **rest)
    elif name == "spiking_resnet18":
        net = from_zoo("spiking_resnet").spiking_resnet18(spiking_neuron=neuron.LIFNode, **rest)
    elif name == "spiking_vgg":
        net = from_zoo("spiking_vgg").SpikingVGG([8, "M", 16, "M", 512], True, spiking_neuron=neuron.LIFNode, **rest)
        net.avgpool.output_size = (1, 1)
        net.classifier = nn.Sequential(
            layer.Linear(512, 32), neuron.LIFNode(**SETTINGS), layer.Dropout(), layer.Linear(32, 10)
        )
    elif name == "spikformer":
        net = from_zoo("spikformer").Spikformer(img_size_h=16, img_size_w=16, patch_size=4, embed_dims=48, depths=1)
    else:
        net = from_zoo("parametric_lif_net").MNISTNet(4, neuron.ParametricLIFNode, **SETTINGS)
    with torch.no_grad():
        for each in net.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.weight.fill_(2.0)
            if isinstance(each, nn.Linear):
                each.weight.mul_(4)
    functional.set_step_mode(net, mode)
    sizes = (1, 28, 28) if name == "parametric_lif" else (3, 16, 16)
    return net.double(), frames(3, 2, *sizes)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in ("sew_resnet18", "spiking_resnet18", "spiking_vgg", "spikformer", "parametric_lif")
        for mode in ("m", "s")
        if (name, mode) != ("spikformer", "s")
    ],
)
def test_the_model_zoo(name, mode):
    torch.manual_seed(0)
    net, x = zoo(name, mode)
    result = same(net, x, mode, 1e-9)
    assert len(result.gradients) > 10
    if name != "parametric_lif" or mode == "m":
        assert not result.unmatched


def test_fuse_makes_one_layer_of_spikingjelly_s_batch_norms_and_neurons():
    torch.manual_seed(0)
    net, x = zoo("spiking_vgg", "m")
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(net), report, fuse=True)
    assert report.norms.fused == ["features.1", "features.5", "features.9"]
    assert list(after.state_dict()) == list(net.state_dict())
    result = interop.check(net, after, x)
    assert result.different == 0 and result.within(0.0, 1e-9) and not result.unmatched
    for step in (net, after):
        step.train()(x)
    assert torch.allclose(net.features[1].running_var, after.features[1].running_var, 1e-9, 1e-12)


def test_fuse_reaches_into_the_containers_that_papers_use():
    def part(*neurons):
        return nn.Sequential(layer.SeqToANNContainer(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), *neurons)

    torch.manual_seed(0)
    net = nn.Sequential(
        part(neuron.ParametricLIFNode(step_mode="m", **SETTINGS)),
        part(neuron.LIFNode(step_mode="m", v_reset=-0.1)),
        part(neuron.IFNode(step_mode="m", **SETTINGS)),
        part(),
    ).double()
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(net), report, fuse=True)
    assert report.norms.fused == ["0.0.1", "2.0.1"]
    assert type(after[1][0]) is layer.SeqToANNContainer and isinstance(after[1][1], FromStart)
    result = interop.check(net, after, frames(4, 2, 3, 5, 5))
    assert result.different == 0 and result.within(0.0, 1e-9)
    assert set(net.state_dict()) - set(after.state_dict()) == {"0.1.w"}


def test_fuse_puts_back_what_it_cannot_fuse():
    shared = neuron.IFNode(step_mode="m")
    norm = layer.BatchNorm2d(3, step_mode="m")
    net = nn.Sequential(norm, neuron.IFNode(step_mode="m"))
    net[0].eps = torch.finfo(torch.float64).tiny * 0
    kept = nn.Sequential(
        layer.SeqToANNContainer(nn.BatchNorm2d(3)), shared, layer.Conv2d(3, 3, 1, step_mode="m"), shared
    )
    kept[0][0].eps = 0.0
    with pytest.warns(UserWarning, match="stay two layers"):
        after = interop.convert(nn.Sequential(net, kept), fuse=True)
    assert after[0][0] is norm and type(after[1][0]) is layer.SeqToANNContainer


def test_the_example_runs(capsys):
    path = ROOT / "examples" / "from_spikingjelly.py"
    assert len(path.read_text().splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert "converted 2" in out and "left 0" in out


def test_every_row_is_of_a_class_that_there_is():
    names = {*vars(neuron), *vars(layer)}
    assert {row.name for row in ADAPTERS if not row.name.startswith("MultiStep")} <= names
    assert importlib.util.find_spec("spikingjelly") is not None
