"""Spikes that a neuron leaves unwritten: all that can be done with them gives, bit for bit, what dense ones give."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from lazily import SHAPE, both, fire, same, x_of

from trtkern import nn
from trtkern.ops import spikes as spikes_ops
from trtkern.ops._lazy import Lazy
from trtkern.ops.spikes import Spikes, current, unwritten

NEURONS = {
    "LIF": lambda: nn.LIF(packed=True),
    "soft reset": lambda: nn.LIF(packed=True, v_reset=None, detach_reset=True, surrogate="sigmoid"),
    "PLIF": lambda: nn.PLIF(packed=True),
    "CUBALIF": lambda: nn.CUBALIF(packed=True),
    "BatchNormLIF": lambda: nn.BatchNormLIF(4, packed=True),
    "evaluation": lambda: nn.BatchNormLIF(4, packed=True).eval(),
    "pooled": lambda: nn.BatchNormLIF(4, packed=True, pool=2),
    "learned, pooled": lambda: nn.BatchNormLIF(4, packed=True, pool=2, neuron=nn.PLIF),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("neuron", NEURONS)
def test_spikes_words_state_and_gradients_of_every_neuron(neuron, channels_last):
    fired = 0.0
    for steps in (1, 5, 8, 17, 33):

        def run(steps=steps):
            layer = NEURONS[neuron]()
            leaf = x_of((steps, *SHAPE[1:]), channels_last).requires_grad_()
            spikes, state = layer(1 * leaf, return_state=True)
            states = list(state) if isinstance(state, tuple) else [state]
            found = [spikes.spikes, spikes.words, *states]
            assert type(spikes.spikes) is (Lazy if spikes_ops.lazily(leaf, "cpu") else torch.Tensor)
            loss = spikes.spikes.sin().sum() + sum(part.cos().sum() for part in states)
            return found + list(torch.autograd.grad(loss, [leaf, *layer.parameters()])) + list(layer.buffers())

        dense, lazy = both(run)
        same(dense, lazy)
        fired += dense[0].sum().item()
        assert dense[2].abs().sum() > 0
    assert fired > 0


def test_what_is_known_without_the_numbers_makes_none():
    def run():
        s = fire(nn.BatchNormLIF(4, packed=True))[1].spikes
        s.trtkern_mark = 1
        return s, [
            s.shape, s.size(0), s.stride(), s.dtype, s.device, s.dim(), s.ndim, s.numel(), s.nbytes, s.element_size(),
            s.requires_grad, s.is_leaf, type(s.grad_fn).__name__, s._version, s.is_contiguous(), s.layout,
            s.storage_offset(), len(s), s.is_floating_point(), s.is_inference(), s.trtkern_mark,
            torch.is_tensor(s), isinstance(s, torch.Tensor), s.contiguous() is s, s.float() is s, s.cpu() is s,
            s.to("cpu") is s, s.is_cuda, s.detach().shape, s.detach().requires_grad,
        ]  # fmt: skip

    (_, dense), (s, lazy) = both(run)
    same(dense, lazy)
    assert type(s) is type(s.detach()) is Lazy and not s.is_made and not s.detach().is_made
    assert s.sum() > 0 and s.is_made and s.detach().is_made


OPERATIONS = {
    "arithmetic": lambda s: 2 * s + s * s - s / 3,
    "product": lambda s: torch.einsum("tbchw,c->tbhw", s, torch.arange(4.0)),
    "functional": lambda s: torch.nn.functional.avg_pool2d(s.flatten(0, 1), 2),
    "maximum": lambda s: torch.nn.functional.max_pool2d(s.flatten(0, 1), 2),
    "reduction": lambda s: s.mean((0, 3, 4)),
    "view": lambda s: s.view(9, 2, -1),
    "flatten": lambda s: s.flatten(2),
    "permute": lambda s: s.permute(1, 0, 4, 2, 3),
    "expand": lambda s: s.expand(3, *s.shape),
    "slice": lambda s: s[::2, :, 1:3],
    "index": lambda s: s[torch.tensor([3, 0, 3])],
    "mask": lambda s: s[s > 0],
    "unbind": lambda s: list(s.unbind(0)),
    "iteration": lambda s: [step * 2 for step in s],
    "split": lambda s: list(s.split(4)),
    "where": lambda s: torch.where(s > 0, 3 * s, -1.0),
    "stack": lambda s: torch.stack([s, s]),
    "to double": lambda s: s.to(torch.float64),
    "clone": lambda s: s.clone(),
    "detach": lambda s: s.detach() * 1,
    "like": lambda s: [torch.zeros_like(s), s.new_ones(3), torch.ones_like(s)],
    "out": lambda s: torch.mul(s.detach(), 3, out=torch.empty_like(s)),
    "item": lambda s: s[0, 0, 0, 0, 0].item() + s.sum().item(),
    "tolist": lambda s: s.tolist(),
    "numpy": lambda s: s.detach().numpy().tolist(),
    "array": lambda s: np.asarray(s.detach()).sum().item(),
    "forced numpy": lambda s: s.numpy(force=True).tolist(),
    "dlpack": lambda s: torch.from_dlpack(s.detach()),
    "print": lambda s: [repr(s), str(s), f"{s.detach()}", repr(s.detach()[0].sum())],
    "storage": lambda s: [s.untyped_storage().tolist(), s.data_ptr() % 4, s.data_ptr() > 0],
    "data": lambda s: s.data * 2,
    "tensor": lambda s: torch.tensor(s.tolist()),
    "as_tensor": lambda s: torch.as_tensor(s) * 1,
    "parameter": lambda s: torch.nn.Parameter(s.detach()) * 2,
    "copy into": lambda s: torch.empty(s.shape).copy_(s),
    "foreach": lambda s: torch._foreach_add([s, s], 1.0),
    "equal": lambda s: [torch.equal(s, s.clone()), (s == s.clone()).all().item()],
    "shallow copy": lambda s: copy.copy(s.detach()) * 1,
    "is shared": lambda s: s.is_shared(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("pool", [1, 2])
def test_every_operation_gives_what_dense_spikes_give(operation, pool):
    def run():
        leaf, x = fire(nn.BatchNormLIF(4, packed=True, pool=pool))
        if pool == 2 and operation == "view":
            return None
        made = OPERATIONS[operation](x.spikes)
        parts = [part for part in (made if isinstance(made, list) else [made]) if isinstance(part, torch.Tensor)]
        assert not any(type(part) is Lazy for part in parts)
        if not any(part.requires_grad and part.grad_fn is not None for part in parts):
            return made
        loss = sum(part.double().sin().sum() for part in parts if part.requires_grad)
        grads = torch.autograd.grad(loss, leaf, allow_unused=True)
        return [made, *[g for g in grads if g is not None]]

    same(*both(run))


CHANGES = {
    "mul_": lambda s: s.mul_(2),
    "of a view": lambda s: s.view(-1)[3:50].add_(1),
    "of a slice": lambda s: s[1].zero_(),
    "item": lambda s: s.__setitem__((0, slice(None), 1), 0.25),
    "dropout": lambda s: torch.nn.functional.dropout(s, 0.5, inplace=True),
    "detached": lambda s: s.detach().mul_(3),
    "view of detached": lambda s: s.detach().flatten().mul_(3),
    "foreach": lambda s: torch._foreach_mul_([s], 2.0),
    "index_put_": lambda s: s.index_put_((torch.tensor([0, 1]),), torch.tensor(5.0)),
    "numpy": lambda s: np.multiply(s.detach().numpy(), 2, out=s.detach().numpy()),
    "data": lambda s: s.data.mul_(3),
    "view of data": lambda s: s.data.flatten().mul_(3),
    "new data": lambda s: setattr(s, "data", torch.arange(float(s.numel())).view(s.shape) / 100),
    "dlpack": lambda s: torch.from_dlpack(s.detach()).mul_(3),
}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("change", CHANGES)
def test_writes_are_seen_by_all_who_read_later_and_make_the_words_stale(change, mode):
    if (mode, change) == ("inference", "new data"):
        pytest.skip("torch sets no data in inference mode")

    def run():
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            leaf, x = fire()
            version = 0 if mode == "inference" else x.spikes._version
            CHANGES[change](x.spikes)
            counted = 0 if mode == "inference" else x.spikes._version - version
            read, conv = x.spikes * 1, nn.SpikeConv2d(4, 3, 3, padding=1)
            out = conv(x)
            assert not isinstance(current(x), Spikes) or not isinstance(x.spikes, Lazy)
            found = [read, out, nn.BatchNormLIF(4)(x_of(seed=5), x), counted]
            if mode == "grad" and change not in ("numpy", "data", "view of data", "new data", "dlpack"):
                found += torch.autograd.grad(out.sin().sum(), [leaf, conv.weight])
            return found

    dense, lazy = both(run)
    same(dense, lazy)
    assert torch.equal(dense[0].isfinite(), torch.ones(SHAPE, dtype=torch.bool))


def test_reading_leaves_the_words_what_they_are():
    with unwritten():
        x = fire()[1]
        assert current(x) is x
        assert x.spikes.sum() > 0 and x.spikes[0].flatten().tolist() and (2 * x.spikes).sum() > 0
        assert current(x) is x and current(Spikes(x.spikes.detach(), x.words)).words is x.words


SHAPES_IN_PLACE = {
    "unsqueeze_": lambda s: s.unsqueeze_(1),
    "transpose_": lambda s: s.transpose_(0, 2),
    "squeeze_": lambda s: s[:, :1].squeeze_(1),
    "resize_": lambda s: s.resize_(3, 5),
    "larger": lambda s: s.resize_(12, 8, 24).zero_(),
    "as_strided_": lambda s: s.as_strided_((4, 3), (1, 4), 5),
    "out": lambda s: torch.add(torch.ones(7, 3), 1, out=s.resize_(0)),
}


@pytest.mark.parametrize("change", SHAPES_IN_PLACE)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_shape_that_is_changed_in_place(change):
    @torch.no_grad()
    def run():
        s = fire()[1].spikes
        made = SHAPES_IN_PLACE[change](s)
        return [made * 1, s * 1, list(s.shape), s.stride(), s.storage_offset(), s.sum()]

    same(*both(run))


def test_copies_are_plain_tensors():
    def through_a_file(value):
        file = io.BytesIO()
        torch.save(value, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    def run():
        x = fire()[1]
        with torch.no_grad():
            y = fire()[1]
        y.spikes.requires_grad_()
        y.spikes.sum().backward()
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy.deepcopy(x.spikes)
        copied = copy.deepcopy(y)
        copies = [
            pickle.loads(pickle.dumps(y)),
            through_a_file(y),
            through_a_file({"s": x.spikes.detach()})["s"],
            copied,
            copied.spikes.grad,
            copy.deepcopy([y.spikes, y.spikes])[1],
        ]
        assert not any(type(t) is Lazy for t in torch.utils._pytree.tree_leaves(copies))
        return copies

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[0].spikes.sum() > 0


def test_words_that_were_written_to_are_not_taken_for_the_spikes():
    with unwritten():
        x, y = fire()[1], fire()[1]
        want = y.spikes.clone()
        for each in (x, y):
            each.words.zero_()
        with pytest.raises(RuntimeError, match="expected words as the neuron made them"):
            x.spikes.sum()
        assert torch.equal(y.spikes, want)  # made before


@pytest.mark.parametrize("made", [False, True])
def test_what_comes_past_the_dispatcher_is_refused_and_gets_no_address(made):
    with unwritten():
        s = fire()[1].spikes.detach()
    assert not made or s.sum() > 0
    for look in (torch.Tensor.data_ptr, torch.utils.dlpack.to_dlpack):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            look(s)
    assert look(s.clone()) is not None


def test_two_threads_get_the_same_memory():
    with unwritten():
        s, found, ready = fire()[1].spikes, [], threading.Barrier(4)

    def ask():
        ready.wait()
        found.append(s.data_ptr())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 4 and len(set(found)) == 1
