"""The layers are plain modules: Lightning and Accelerate train them as they are. And the example file runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import own_parts
import pytest
import torch
from own_parts import Net
from torch.utils.data import DataLoader, TensorDataset

from trtkern.nn import TRTLoss

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own.py"


def loader():
    return DataLoader(TensorDataset(*own_parts.stripes(64)), batch_size=16)


def networks():
    torch.manual_seed(0)
    one, two = Net(), Net()
    two.load_state_dict(one.state_dict())
    return one, two


def plain(model):
    """One epoch of the loop that everybody writes."""
    loss, optimizer = TRTLoss(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


def same(one, two):
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, two.get_parameter(name), msg=name)


def test_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("lightning")
    ours, theirs = networks()

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.loss = model, TRTLoss(model)

        def training_step(self, batch, index):
            x, y = batch
            return self.loss(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(ours), loader())
    same(ours, plain(theirs))


def test_a_loop_with_accelerate():
    accelerate = pytest.importorskip("accelerate")
    ours, theirs = networks()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(ours, optimizer, loader())
    loss = TRTLoss(model)
    for x, y in batches:
        optimizer.zero_grad()
        accelerator.backward(loss(model(x), y))
        optimizer.step()
    same(ours, plain(theirs))


def test_the_example(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    accuracy = float(said.rpartition("test accuracy ")[2].partition("%")[0])
    assert accuracy > 90 and Path("runs/own/report.html").exists()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert f"test accuracy {accuracy:.2f}%" in capsys.readouterr().out
