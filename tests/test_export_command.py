"""``trtkern export``: what is written, what is said, and what is refused before torch is loaded."""

import sys

import pytest
import torch

from trtkern import cli

MINE = """
import torch
from trtkern import nn as snn


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 6), snn.ALIF(), torch.nn.Linear(6, 3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "exportable.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("exportable", None)


def test_a_function_of_yours_as_onnx_and_as_a_program(folder, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    words = ["export", "exportable:network", "--input", "4,2,5", "--scan", "--onnx", "a.onnx", "--program", "a.pt2"]
    assert cli.main([*words, "--plain"]) == 0
    said = capsys.readouterr().out
    assert "a.onnx: " in said and "input [time, batch, 5]" in said and "operators of torch alone" in said
    assert "ONNX Runtime on 2 random numbers between 0 and 1: outputs differ by at most" in said
    x = torch.rand(7, 3, 5)
    from trtkern import interop

    model = sys.modules["exportable"].network().eval()
    torch.testing.assert_close(interop.run_onnx("a.onnx", x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.load("a.pt2").module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_run(folder, capsys, one_thread, no_pictures):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    train = ["train", "--epochs", "1", "--set", "train_images=64", "--run-dir", "run"]
    assert cli.main(train) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["export", "run", "--onnx", "run.onnx"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "input [batch, 1, 8, 8]" in said and "ONNX Runtime on 16 test samples" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope", "--onnx", "a.onnx"], "expected a run folder, a checkpoint file, or module:function"),
        (["a:b"], "expected a file to write, got none; say --onnx FILE.onnx or --program FILE.pt2"),
        (["a:b", "--onnx", "no/a.onnx"], "--onnx: expected a file in a folder that exists, got no/a.onnx"),
        (["a:b", "--program", "no/a.pt2"], "--program: expected a file in a folder that exists"),
        (["a:b", "--onnx", "a.onnx"], "--input: expected the sizes of an input of your network, such as 4,8,2,48,48"),
        (["a:b", "--onnx", "a.onnx", "--input", "4,x"], "--input: expected sizes of at least 1 with commas between"),
        (["a:b", "--onnx", "a.onnx", "--input", "4"], "--input: expected T,B,... or with --images B,..., got 4"),
        (["a:b", "--onnx", "a.onnx", "--plain", "--input", "4,2"], "--plain: expected --program beside it, got none"),
        ([".", "--onnx", "a.onnx", "--images"], "--images: expected it with a function of yours, got the run ."),
    ],
)
def test_a_wrong_command_line_is_answered(folder, capsys, words, says):
    assert cli.main(["export", *words]) == 2
    assert says in capsys.readouterr().err and not list(folder.glob("a.*"))


def test_a_name_that_the_module_has_not(folder, capsys):
    assert cli.main(["export", "exportable:net", "--onnx", "a.onnx", "--input", "4,2,5"]) == 2
    assert "expected a name of the module exportable, got 'net'" in capsys.readouterr().err
