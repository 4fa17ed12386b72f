"""What is done to every BatchNorm of a model, torch's or fused: the same, and nothing is passed by."""

import copy

import pytest
import torch
from pairs import C, equal, made, same
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern import nn as snn
from trtkern.models import SpikeDrivenTransformer
from trtkern.nn.norms import SyncBatchNorm


def both(name):
    """A model of pairs, and the same fused; in the state dict of the first."""
    plain, x = made(name)
    return plain, snn.convert_norm_lif(copy.deepcopy(plain)), x


def state_of(fused, like):
    return snn.convert_state_dict(fused.state_dict(), like)


def test_every_norm_is_found():
    plain, fused, _ = both("module")
    want = [module for module in plain.modules() if isinstance(module, _BatchNorm)]
    assert list(snn.batch_norms(plain)) == want and len(want) == 3
    assert [type(norm) for norm in snn.batch_norms(fused)] == [snn.BatchNormLIF, snn.BatchNormLIF, nn.BatchNorm2d]
    assert not list(snn.batch_norms(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2), snn.LIF())))


@pytest.mark.parametrize("name", ["convolutional", "module", "wrapped"])
def test_update_norms_is_update_bn(name):
    plain, fused, x = both(name)
    with torch.no_grad():
        for norm in (*snn.batch_norms(plain), *snn.batch_norms(fused)):
            norm.running_mean.fill_(7)
    batches = [(x + shift, "label") for shift in range(3)]
    torch.optim.swa_utils.update_bn(batches, plain)
    snn.update_norms(batches, fused, "cpu")
    got, want = state_of(fused, plain), plain.state_dict()
    assert list(got) == list(want)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)
    assert all(norm.num_batches_tracked == 3 for norm in snn.batch_norms(fused))
    moments = [norm.momentum for norm in snn.batch_norms(plain)]
    assert [norm.momentum for norm in snn.batch_norms(fused)] == moments


def test_update_norms_restores_momentum_and_modes():
    _, fused, x = both("module")
    fused.eval()
    fused.blocks.train()
    modes = [module.training for module in fused.modules()]

    def broken():
        yield x
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        snn.update_norms(broken(), fused)
    assert [norm.momentum for norm in snn.batch_norms(fused)] == [0.1] * 3
    assert [module.training for module in fused.modules()] == modes
    statistics = {key: value.clone() for key, value in fused.state_dict().items() if "running" in key}
    snn.update_norms([], nn.Sequential(snn.BatchNormLIF(3, track_running_stats=False)))
    assert all(torch.equal(fused.state_dict()[key], value) for key, value in statistics.items())


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_norms_leave_their_statistics(affine):
    plain, fused, x = both("convolutional")
    for model in (plain, fused):
        assert snn.freeze_norms(model.train(), affine=affine) is model
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    trained = [parameter for parameter in fused.parameters() if parameter.requires_grad]
    assert len(trained) == len(list(fused.parameters())) - 4 * affine
    got, want = fused(x), plain(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert equal(fused.state_dict(), before)
    assert fused.training and fused[1].weight.requires_grad != affine


@pytest.mark.parametrize("name", ["convolutional", "wrapped"])
def test_synchronised_norms(name):
    plain, fused, x = both(name)
    want, text = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)), repr(plain)
    assert snn.convert_sync_norms(fused) is fused
    norms = list(snn.batch_norms(fused))
    assert norms and all(type(norm) is snn.BatchNormLIF and norm.sync for norm in norms)
    same(fused, want, x)
    assert repr(snn.unfuse(fused)) == repr(want) != text
    mixed = snn.convert_sync_norms(nn.Sequential(nn.BatchNorm2d(C), snn.BatchNormLIF(C)))
    assert type(mixed[0]) is SyncBatchNorm and type(mixed[1]) is snn.BatchNormLIF and mixed[1].sync


def test_norms_of_tokens_share_their_statistics_as_norms_of_tokens():
    model = SpikeDrivenTransformer(3, shape=(2, 8, 8), dim=16, depth=1, patch=4)
    synchronised, x = snn.convert_sync_norms(copy.deepcopy(model)), torch.randn(4, 2, 2, 8, 8)
    assert torch.equal(synchronised(x), model(x))
    assert equal(synchronised.state_dict(), model.state_dict())
    built = SpikeDrivenTransformer(3, shape=(2, 8, 8), dim=16, depth=1, patch=4, sync=True)
    assert [type(layer) for layer in synchronised.modules()] == [type(layer) for layer in built.modules()]


def test_torch_passes_fused_norms_by_unharmed():
    """Which is why they are not of its class: convert_sync_batchnorm would drop the neurons of one that is."""
    layer = snn.BatchNormLIF(C)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0] is layer
    assert not isinstance(layer, _BatchNorm)
