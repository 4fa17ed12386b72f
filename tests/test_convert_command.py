"""``trtkern convert``: what it says of a model, what --check finds, and what it refuses."""

import pytest
import torch
from safetensors.torch import save_file

from trtkern import cli, interop
from trtkern import nn as snn
from trtkern.interop import adapters

MODEL = """
import torch
from torch import nn
from test_interop import DerivedLIF, LoopLIF

def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 20), LoopLIF(), nn.Linear(20, 4), LoopLIF())
    with torch.no_grad():
        layers[0].weight.mul_(6), layers[2].weight.mul_(6)
    return layers

def partly():
    return nn.Sequential(*net(), DerivedLIF())

class Narrow(LoopLIF):
    # its spikes are float32 in every dtype

    def forward(self, x):
        return super().forward(x).float()

def narrow():
    layers = net()
    layers[1], layers[3] = Narrow(), Narrow()
    return layers

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        spikes = self.net(x)
        return spikes, 2 * spikes

def none():
    return nn.Linear(5, 4)

def no_model():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "older.py").write_text(MODEL)
    yield tmp_path
    import sys

    sys.modules.pop("older", None)


@pytest.fixture
def known(folder):
    from test_interop import loop_lif

    interop.register("LoopLIF", loop_lif, ("tau", "thresh"))
    return folder


def run(capsys, *words):
    status = cli.main(["convert", *words])
    return status, *capsys.readouterr()


def test_it_says_what_converts(known, capsys):
    status, said, wrong = run(capsys, "older:partly")
    assert status == 0 and not wrong
    assert "converted 2:" in said and "LoopLIF -> Stepping" in said and "DerivedLIF" in said and "left 1:" in said


@pytest.mark.parametrize("loop", [["--loop"], []])
def test_check_compares_and_times(known, capsys, loop):
    status, said, wrong = run(capsys, "older:net", "--check", "--input", "6,3,5", *loop)
    assert (status, wrong) == (0, "")
    assert "outputs: 0 of" in said and "gradients: 5 compared" in said and "a step:" in said


def test_check_of_a_step_that_returns_several_tensors(known, capsys):
    """As one of snnTorch returns spikes and potentials."""
    status, said, wrong = run(capsys, "older:Both", "--check", "--input", "6,3,5", "--loop")
    assert (status, wrong) == (0, "") and f"outputs: 0 of {2 * 6 * 3 * 4}" in said


def test_check_says_that_it_compares_in_float32_what_takes_nothing_else(folder, capsys):
    from test_interop import loop_lif

    interop.register("Narrow", loop_lif, ("tau", "thresh"))
    status, said, wrong = run(capsys, "older:narrow", "--check", "--input", "6,3,5", "--loop")
    assert status == 0 and "compared in float32" in wrong and "outputs: 0 of" in said


def test_check_fails_where_the_numbers_differ(folder, capsys):
    interop.register("LoopLIF", lambda node: interop.Stepping(snn.LIF(0.4)))
    status, _, wrong = run(capsys, "older:net", "--check", "--input", "6,3,5", "--loop")
    assert status == 1 and "expected outputs within" in wrong


def test_check_wants_spikes(known, capsys):
    status, _, wrong = run(capsys, "older:net", "--check", "--input", "6,3,5", "--loop", "--scale", "1e-6")
    assert status == 1 and "a larger --scale" in wrong


@pytest.mark.parametrize("kind", ["pt", "nested", "safetensors"])
def test_a_checkpoint_is_loaded_before(known, capsys, kind):
    from older import net

    held = {key: value + 1 for key, value in net().state_dict().items()}
    if kind == "safetensors":
        save_file(held, "w.safetensors")
    else:
        torch.save(held if kind == "pt" else {"state_dict": held, "epoch": 3}, "w.pt")
    file = "w.safetensors" if kind == "safetensors" else "w.pt"
    options = ("--check", "--input", "6,3,5", "--loop")
    without, of_file = run(capsys, "older:net", *options), run(capsys, "older:net", "--checkpoint", file, *options)
    assert without[0] == of_file[0] == 0
    assert without[1].split("not 0")[0] != of_file[1].split("not 0")[0]  # another share of neurons fires


def test_a_checkpoint_of_another_model(known, capsys):
    torch.save({"0.weight": torch.zeros(20, 5), "head": torch.zeros(2)}, "w.pt")
    status, _, wrong = run(capsys, "older:net", "--checkpoint", "w.pt")
    assert status == 2 and "lacks ['0.bias', '2.weight', '2.bias'] and has ['head']" in wrong
    from older import net

    torch.save({**net().state_dict(), "0.bias": torch.zeros(3)}, "w.pt")
    status, _, wrong = run(capsys, "older:net", "--checkpoint", "w.pt")
    assert status == 2 and "expected 0.bias of [20], got [3]" in wrong
    torch.save([1, 2], "w.pt")
    assert "expected a state dict of tensors in w.pt, got list" in run(capsys, "older:net", "--checkpoint", "w.pt")[2]
    (known / "w.pt").write_bytes(b"no zip")
    assert "expected a file of tensors, got w.pt" in run(capsys, "older:net", "--checkpoint", "w.pt")[2]
    assert "No such file" in run(capsys, "older:net", "--checkpoint", "gone.pt")[2]


@pytest.mark.parametrize(
    "words, message",
    [
        (["older:net", "--input", "6,3,5"], "--input: expected --check beside it"),
        (["older:net", "--loop"], "--loop: expected --check beside it"),
        (["older:net", "--check"], "--check: expected --input"),
        (["older:net", "--check", "--input", "6,x"], "--input: expected sizes of at least 1"),
        (["older:net", "--check", "--input", "6,3,5", "--scale", "0"], "--scale: expected a number above 0"),
        (["older"], "convert: expected module:function, got 'older'"),
        (["older:nett"], "did you mean 'net'"),
        (["older:none"], "expected a model with neurons that have an equal here, got none"),
        (["older:no_model"], "expected older:no_model to give a torch.nn.Module, got int"),
        (["older:partly", "--strict"], "got 1 without one, and changed nothing: '4': "),
        (["older:net", "--check", "--input", "6,3,4", "--loop"], "mat1 and mat2"),
    ],
)
def test_refusals(known, capsys, words, message):
    status, _, wrong = run(capsys, *words)
    assert status == 2 and message in wrong and wrong.count("\n") == 1
