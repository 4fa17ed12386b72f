"""``trtkern.interop.to_onnx``: ONNX Runtime on the CPU gives what the models give, at other batch sizes and lengths."""

import logging
import re
from pathlib import Path

import pytest
import torch
from exported import Around, C, Every, drawn, network, same

from trtkern import interop
from trtkern import nn as snn


@pytest.fixture(scope="module", autouse=True)
def _installed():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def frames(timesteps, batch, *shape):
    return 2 * torch.rand(timesteps, batch, *shape)


@pytest.mark.parametrize(
    ("make", "shape", "scan"),
    [
        (lambda: Every().eval(), (C,), True),
        (lambda: drawn(Around()), (2, 6, 6), True),
        (network, (2, 8, 8), True),
    ],
    ids=["every neuron", "around", "network"],
)
def test_onnx_runtime_gives_what_the_model_gives(tmp_path, make, shape, scan):
    torch.manual_seed(0)
    model = make()
    path = interop.to_onnx(model, frames(3, 1, *shape), tmp_path / "net.onnx", scan=scan)
    for x in (frames(3, 4, *shape), frames(3, 1, *shape), *([frames(11, 2, *shape)] * scan)):
        same(interop.run_onnx(path, x), model(x), rtol=1e-4, atol=1e-5)


def test_the_file_is_of_the_standard_and_names_its_sizes(tmp_path):
    import onnx

    torch.manual_seed(0)
    model = torch.nn.Sequential(snn.SpikeConv2d(2, 3, 3), drawn(snn.BatchNormLIF(3))).eval()
    for scan in (True, False):
        path = interop.to_onnx(model, frames(3, 2, 2, 8, 8), tmp_path / f"{scan}.onnx", scan=scan)
        held = onnx.load(path)
        onnx.checker.check_model(held, full_check=True)
        assert {each.domain for each in held.opset_import} <= {""} and not held.functions
        assert ("Scan" in {node.op_type for node in held.graph.node}) == scan
        sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in held.graph.input]
        assert sizes == [["time" if scan else 3, "batch", 2, 8, 8]]
        assert [v.name for v in held.graph.input] == ["input"] and [v.name for v in held.graph.output] == ["output"]
        assert __file__.rpartition("/tests/")[0].encode() not in path.read_bytes()


def test_an_image_that_is_shown_at_every_step(tmp_path):
    torch.manual_seed(0)
    model = snn.TimeSequential(
        torch.nn.Conv2d(2, 3, 3), snn.LIF(), torch.nn.Flatten(), torch.nn.Linear(48, 2), timesteps=3
    )
    path = interop.to_onnx(model.eval(), torch.rand(2, 2, 6, 6), tmp_path / "net.onnx", time_dim=None, batch_dim=0)
    x = torch.rand(5, 2, 6, 6)
    same(interop.run_onnx(path, x), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_refused_is_named(tmp_path, monkeypatch):
    layer, x, path = snn.LIF().eval(), torch.rand(3, 2, C), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="to_onnx: expected a file in a folder that exists, got"):
        interop.to_onnx(layer, x, tmp_path / "no" / "net.onnx")
    with pytest.raises(ValueError, match=r"expected a model in evaluation, got one in training; call model\.eval\(\)"):
        interop.to_onnx(snn.LIF(), x, path)

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x @ x.mT).real

    with pytest.raises(ValueError, match=r"to_onnx: expected operators that torch.onnx translates, got .*eig"):
        interop.to_onnx(Odd().eval(), x, path)
    assert not path.exists()
    monkeypatch.setattr("trtkern.output.text.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"to_onnx: onnx and onnxscript not installed; type: pip install 'trtkern\[in"
    ):
        interop.to_onnx(layer, x, path)
    with pytest.raises(ImportError, match=r"run_onnx: onnxruntime not installed; type: pip install 'trtkern\[interop"):
        interop.run_onnx(path, x)


def test_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).resolve().parent.parent / "docs" / "export.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/export.md", "exec"), names)
    assert len(blocks) == 3 and {each.name for each in tmp_path.iterdir()} == {"net.onnx", "net.pt2", "plain.pt2"}
