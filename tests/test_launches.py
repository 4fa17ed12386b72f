"""The launch contract (docs/traffic.md): kernels that a layer launches, and torch operations around them.

What is counted is the same on every machine: launches at the launchers, torch operations in a profile.
"""

from __future__ import annotations

import importlib.util
import shutil

import cuda_threads
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from trtkern.backends import named
from trtkern.nn import IF, LIF, PLIF, BatchNormLIF
from trtkern.ops._library import unseen
from trtkern.selftest import device_of

ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}
"""What takes memory and computes nothing."""
VIEWS = {
    f"aten::{name}" for name in ("reshape", "view", "as_strided", "detach", "narrow", "slice", "unsqueeze_", "select")
}
VIEWS |= {f"aten::{name}" for name in ("as_strided_", "squeeze_", "resolve_conj", "resolve_neg")}
LOOKS = {"aten::aminmax"}
"""At what a parameter holds, where it is in the host's memory."""
RSUB = {"aten::rsub", "aten::sub", "aten::to", "aten::_to_copy", "aten::copy_"}


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch):
    """Filling memory with NaN, as elsewhere in the tests, would be an operation each time. A profile that the layers
    know of sees their ops by name, which takes empty tensors for outputs that nobody wants."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with unseen():
        yield


@pytest.fixture(params=["cpu", "triton", "cuda"])
def backend(request, monkeypatch):
    """(name, device, launches): of the CPU backend a launch is not counted."""
    name = request.param
    if name == "cuda":
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed")
        return cuda_threads.NAME, "cpu", cuda_threads.as_backend(monkeypatch).launches
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if (reason := named(name).missing()) is not None:
        pytest.skip(reason)
    if name == "cpu":
        return name, "cpu", None
    from trtkern.kernels.launch import Launch

    made, run = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda launch: (made.append(launch), run(launch))[1])
    return name, device_of(named(name)), lambda: len(made)


def counted(run, launches):
    """What run() gives, the torch operations that it called, and how many kernels it launched."""
    before = launches() if launches else 0
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        made = run()
    names = [event.name for event in seen.events() if event.name.startswith("aten::")]
    return made, names, (launches() - before if launches else None)


def both(layer, x, launches):
    """(torch operations, launches) forward and backward, of the second call."""
    tensors = [x, *layer.parameters()]
    g = torch.randn_like(layer(x))
    torch.autograd.grad(layer(x), tensors, g)
    s, forward, first = counted(lambda: layer(x), launches)
    _, backward, second = counted(lambda: torch.autograd.grad(s, tensors, g), launches)
    return (forward, first), (backward, second)


def neuron(kind, backend, **options):
    return kind(backend=backend, **options)


@pytest.mark.parametrize("kind", [LIF, IF])
def test_a_neuron_of_numbers(backend, kind):
    name, device, launches = backend
    x = torch.randn(4, 2, 8, 4, 4, device=device, requires_grad=True)
    (forward, first), (backward, second) = both(neuron(kind, name), x, launches)
    assert first in (None, 1) and second in (None, 1)
    if name != "triton":  # whose interpreter calls torch itself
        assert set(forward) | set(backward) <= ALLOCATIONS
        assert 1 <= len(forward) <= 4 and 1 <= len(backward) <= 5


def test_a_learned_decay(backend):
    """The sums of the parameters are one launch more."""
    name, device, launches = backend
    x = torch.randn(4, 2, 8, 4, 4, device=device, requires_grad=True)
    (forward, first), (backward, second) = both(neuron(PLIF, name).to(device), x, launches)
    assert first in (None, 1) and second in (None, 2)
    if name != "triton":
        # The decay is 1 - sigmoid(w) (rsub makes a tensor of the 1), and one concatenation puts it to the numbers; in
        # the host's memory a native function does.
        joined = {"aten::cat"} if name != "cpu" else set()
        assert set(forward) - ALLOCATIONS - VIEWS - LOOKS == {*RSUB, "aten::sigmoid", *joined}
        assert forward.count("aten::cat") == len(joined)
        assert sorted(set(backward) - ALLOCATIONS - VIEWS) == ["aten::neg", "aten::sigmoid_backward"]


CASES = {
    "training": (True, {}, 3, 3),
    "training, learned threshold": (True, {"v_threshold": nn.Parameter(torch.tensor(1.0))}, 3, 3),
    "running statistics": (False, {}, 2, 2),
    "running statistics, no affine": (False, {"affine": False}, 2, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_norm_and_neuron(backend, case):
    """Statistics, finish, the fused pass; sums, finish, the input's gradient: nothing else computes on channels."""
    name, device, launches = backend
    training, options, ahead, back = CASES[case]
    layer = BatchNormLIF(8, backend=name, **options).to(device).train(training)
    x = torch.randn(4, 2, 8, 4, 4, device=device, requires_grad=True)
    (forward, first), (backward, second) = both(layer, x, launches)
    assert first in (None, ahead) and second in (None, back)
    if name != "triton" and "learned" not in case:
        assert set(forward) | set(backward) <= ALLOCATIONS
        assert len(forward) <= 6 and len(backward) <= 8


def test_the_count_sees_an_operation_and_a_launch(backend):
    """A layer that does a little more is over."""
    name, device, launches = backend
    x = torch.randn(4, 2, 8, 4, 4, device=device, requires_grad=True)
    twice = nn.Sequential(LIF(backend=name), LIF(backend=name))
    (forward, first), _ = both(twice, x * 1.0, launches)
    assert first in (None, 2)
    (more, _), _ = both(nn.Sequential(LIF(backend=name), nn.ReLU()), x * 1.0, launches)
    # An empty_like is counted with the empty_strided in it.
    assert name == "triton" or (len(forward) == 4 and not set(more) <= ALLOCATIONS)
