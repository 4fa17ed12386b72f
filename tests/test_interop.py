"""``trtkern.interop``: what ``convert``, ``over_time`` and ``check`` do with any code; the neurons are this file's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from trtkern import interop
from trtkern import nn as snn
from trtkern.interop import adapters
from trtkern.interop.stepping import FromStart


class LoopLIF(nn.Module):
    """One step of LIF with a triangle, as the code of a paper has it: it keeps v until ``reset``."""

    def __init__(self, tau=2.0, thresh=1.0):
        super().__init__()
        self.tau, self.thresh, self.mem = tau, thresh, 0.0

    def forward(self, x):
        h = self.mem / self.tau + x
        spike = Fire.apply(h - self.thresh)
        self.mem = (1 - spike) * h
        return spike

    def reset(self):
        self.mem = 0.0


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * (1 - u.abs()).clamp(min=0)


class DerivedLIF(LoopLIF):
    """Another class: it may compute anything."""


class Gate(nn.Module):
    """No neuron."""

    def forward(self, x):
        return x


def loop_lif(node):
    if node.thresh <= 0:
        raise interop.CannotConvert(f"expected thresh above 0, got {node.thresh}")
    return interop.Stepping(snn.LIF(1 / node.tau, v_threshold=node.thresh))


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", [])
    return interop.register("LoopLIF", loop_lif, fields=("tau", "thresh"))


def network(*middle, norm=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        LoopLIF(),
        nn.AvgPool2d(2),
        *middle,
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
        LoopLIF(tau=4.0, thresh=0.5),
    )
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.mul_(5)
    return net.double()


def frames(steps=5, batch=3):
    return 3 * torch.rand(steps, batch, 2, 6, 6, dtype=torch.float64)


def loop(net, x):
    return torch.stack([net(step) for step in x])


@pytest.mark.parametrize("training", [True, False])
def test_over_time_gives_what_the_loop_gives(known, training):
    before = network().train(training)
    before[1].running_mean.normal_()
    after = interop.over_time(interop.convert(copy.deepcopy(before)))
    result = interop.check(before, after, frames(), run=loop, run_after=lambda net, x: net(x))
    assert result.outputs == 0 and result.different == 0 and result.count == 5 * 3 * 5
    assert result.fired > 0.05 and result.within(0.0, 1e-12)
    assert set(result.gradients) == {*dict(before.named_parameters()), "input"} and not result.unmatched
    x = frames()
    for net, run in ((before, loop), (after, lambda net, x: net(x))):
        run(net, x)
    for name, value in before.named_buffers():
        assert torch.allclose(value.double(), after.net.get_buffer(name).double(), 1e-12, 1e-12), name
    assert int(before[1].num_batches_tracked) == (5 if training else 0)


def test_one_step_a_call_keeps_its_state_until_reset(known):
    before, x = network(norm=False), frames()
    after = interop.convert(copy.deepcopy(before))
    first, second = loop(after, x), loop(after, x)
    assert torch.equal(first, loop(before, x)) and torch.equal(second, loop(before, x))
    assert not torch.equal(first, second)
    for each in after.modules():
        if hasattr(each, "reset"):
            each.reset()
    assert torch.equal(loop(after, x), first)


def test_over_time_begins_each_sequence_anew_and_leaves_the_state_of_a_loop(known):
    net, x = interop.convert(network(norm=False)), frames()
    first = net(x[0])
    whole = interop.over_time(net)
    assert torch.equal(whole(x), whole(x)) and torch.equal(whole(x)[0], first)
    assert torch.equal(net(x[1]), whole(x)[1])


def test_an_image_that_is_shown_t_times(known):
    net = interop.convert(network(norm=False))
    x = frames(1)[0]
    assert torch.equal(interop.over_time(net, 4)(x), interop.over_time(net)(x.expand(4, *x.shape)))


def test_a_state_is_neither_copied_nor_saved(known):
    net, x = interop.convert(network(norm=False)), frames(8)
    first = loop(net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(loop(twin, x), first)
    assert not torch.equal(loop(net, x), first)  # which the copies have left alone


def test_detach_cuts_the_gradient_of_the_steps_before(known):
    net = interop.convert(network(norm=False))
    x = frames().requires_grad_()
    net(x[0])
    for each in net.modules():
        if isinstance(each, interop.Stepping):
            each.detach()
    net(x[1]).sum().backward()
    assert x.grad[0].abs().sum() == 0 and x.grad[1].abs().sum() > 0


def test_the_report_names_what_stays(known):
    net = network(DerivedLIF(), Gate())
    net.add_module("odd", LoopLIF(thresh=-1.0))
    net.add_module("hooked", LoopLIF())
    net.hooked.register_forward_hook(lambda *_: None)
    report = interop.ConvertReport()
    interop.convert(net, report)
    assert list(report.converted) == ["2", "8"] and report.stepping == ["2", "8"]
    assert "LoopLIF -> Stepping" in report.converted["2"] and "decay=0.25" in report.converted["8"]
    assert list(report.left) == ["4", "odd", "hooked"]
    assert "register('DerivedLIF'" in report.left["4"]
    assert "expected thresh above 0, got -1.0" in report.left["odd"]
    assert "hook" in report.left["hooked"]
    assert type(net.odd) is LoopLIF and type(net[4]) is DerivedLIF
    assert "over_time(model)" in str(report) and set(report.summary()) == {"converted", "left", "stepping", "norms"}


def test_strict_changes_nothing(known):
    net = network(DerivedLIF())
    kinds = [type(each) for each in net.modules()]
    with pytest.raises(ValueError, match=r"changed nothing: '4': .*DerivedLIF: .*strict=False"):
        interop.convert(net, strict=True)
    assert [type(each) for each in net.modules()] == kinds


def test_a_shared_neuron_stays_shared_and_a_model_may_be_one(known):
    neuron = LoopLIF()
    net = nn.Sequential(neuron, nn.Identity(), neuron)
    report = interop.ConvertReport()
    interop.convert(net, report)
    assert net[0] is net[2] and isinstance(net[0], interop.Stepping)
    assert report.converted["2"] == "the same layer in another place"
    assert isinstance(interop.convert(LoopLIF().eval()), interop.Stepping)
    assert not interop.convert(LoopLIF().eval()).training


def test_fields_decide_whether_a_class_is_what_its_name_says(known):
    class LoopLIF(nn.Module):
        def __init__(self):
            super().__init__()
            self.tau = 2.0

    report = interop.ConvertReport()
    interop.convert(nn.Sequential(LoopLIF()), report)
    assert "expected a LoopLIF with tau, thresh, got none called 'thresh'" in report.left["0"]


def test_register_takes_precedence_and_refuses_what_is_no_row(known):
    interop.register("LoopLIF", lambda node: interop.Stepping(snn.LIF(0.125)))
    net = interop.convert(nn.Sequential(LoopLIF()))
    assert net[0].neuron.decay == 0.125
    with pytest.raises(TypeError, match="expected make to be a function"):
        interop.register("LoopLIF", "LIF")
    with pytest.raises(TypeError, match="expected the name of a class"):
        interop.register("a.LoopLIF", loop_lif)


def test_convert_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got list"):
        interop.convert([])


def test_over_time_refuses_what_it_would_get_wrong(known):
    net = interop.convert(network(norm=False))
    for change, message in (
        (lambda: net.add_module("whole", snn.LIF()), "got 'whole' \\(LIF\\), which takes sequences"),
        (lambda: net.add_module("whole", nn.BatchNorm1d(5, momentum=None)), "momentum, got 'whole' with momentum=None"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            interop.over_time(net)
    with pytest.raises(ValueError, match="neurons that take one step a call, got none"):
        interop.over_time(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        interop.over_time("net")
    with pytest.raises(ValueError, match="int >= 1, got 0"):
        interop.over_time(interop.convert(network()), 0)


def test_over_time_says_what_it_takes(known):
    whole = interop.over_time(interop.convert(network(norm=False)))
    with pytest.raises(TypeError, match="expected a tensor, got"):
        whole([1])
    with pytest.raises(ValueError, match=r"expected x \[T, B, ...\]"):
        whole(torch.zeros(3))
    mixing = interop.over_time(nn.Sequential(interop.Stepping(snn.LIF()), Mean(), interop.Stepping(snn.LIF())))
    with pytest.raises(ValueError, match="must keep the first axis"):
        mixing(torch.zeros(3, 2, 4))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(0, keepdim=True)


def test_over_time_keeps_the_form_of_a_result(known):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = interop.Stepping(snn.LIF())

        def forward(self, x):
            return {"spikes": self.neuron(x), "list": [x, 3]}

    x = frames(4, 2)
    made = interop.over_time(Both())(x)
    assert made["spikes"].shape == x.shape and torch.equal(made["list"][0], x) and made["list"][1] == 3


def test_a_potential_that_starts_elsewhere():
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    lif = snn.LIF(v_reset=-0.5)
    x[0] = 1.2
    wanted = lif(x, torch.full((2, 5), -0.5, dtype=torch.float64))
    assert torch.equal(FromStart(lif, -0.5)(x), wanted) and not torch.equal(lif(x), wanted)
    stepping = interop.Stepping(lif, -0.5)
    assert torch.equal(loop(stepping, x), wanted)
    assert torch.equal(interop.over_time(nn.Sequential(stepping))(x), wanted)
    two = snn.CUBALIF(v_reset=-0.5)
    state = two.State(i=torch.zeros(2, 5, dtype=torch.float64), v=torch.full((2, 5), -0.5, dtype=torch.float64))
    assert torch.equal(FromStart(two, -0.5)(x), two(x, state))


def test_fuse_makes_one_layer_of_batch_norm_and_neuron(known):
    interop.register("LoopLIF", lambda node: snn.LIF(1 / node.tau, v_threshold=node.thresh))
    net = snn.TimeSequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), LoopLIF())
    report = interop.ConvertReport()
    net = interop.convert(net, report, fuse=True)
    assert isinstance(net[1], snn.BatchNormLIF) and report.norms.fused == ["1"]


def test_check_draws_nothing_from_the_generators_of_others():
    net = nn.Linear(4, 3)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    interop.check(net, net, torch.rand(2, 4, generator=torch.Generator().manual_seed(0)), timed=True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_check_names_the_outputs_that_are_0_throughout():
    class Two(nn.Module):
        def forward(self, x):
            return x, 0 * x

    found = interop.check(Two(), Two(), torch.ones(2, 3))
    assert found.zeros == [1] and found.fired == 0.5 and "output 1 is 0 throughout" in str(found)


def test_check_sees_every_difference(known):
    before, x = network(), frames()
    options = {"run": loop, "run_after": lambda net, x: net(x)}

    def changed(change):
        after = copy.deepcopy(before)
        change(after)
        return interop.check(before, interop.over_time(interop.convert(after)), x, **options)

    assert changed(lambda net: None).within()
    assert not changed(lambda net: setattr(net[2], "thresh", 1.2)).within()
    assert not changed(lambda net: net[0].weight.data.mul_(1.1)).within()
    broken = changed(lambda net: net[5].weight.data[0].fill_(float("nan")))
    assert not broken.within() and broken.gradients["input"] == float("inf")
    silent = interop.check(before, interop.over_time(interop.convert(copy.deepcopy(before))), 0 * x, **options)
    assert silent.fired == 0 and not silent.within() and silent.zeros == [0]
    other = nn.Sequential(nn.Flatten(2), nn.Linear(72, 3))
    with pytest.raises(ValueError, match="outputs of the same shapes"):
        interop.check(before, other.double(), x, **options)


def test_check_leaves_both_models_as_they_are(known):
    before = network()
    after = interop.over_time(interop.convert(copy.deepcopy(before)))
    held = [copy.deepcopy(net.state_dict()) for net in (before, after)]
    result = interop.check(before, after, frames(), run=loop, run_after=lambda net, x: net(x), timed=True)
    for net, state in zip((before, after), held, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert min(result.seconds) > 0 and "a step:" in str(result)
