"""What the analyses share: results that are saved and loaded, samples, a model that stays as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch
from torch import Tensor

from trtkern import nn
from trtkern.analysis import Picture, Result, Samples, Table
from trtkern.analysis._network import logits_of, still


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    values: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Result):
    NAME = "toy"
    rates: Tensor
    parts: dict[str, Part]
    pairs: list[tuple[int, float]]
    epoch: int | None = None

    def table(self):
        return Table(("part", "first"), [(name, f"{part.values[0]:.2f}") for name, part in self.parts.items()])

    def remarks(self):
        return ["It is a toy."]

    @classmethod
    def pictures(cls, results):
        return {
            f"Rates of {name}.": Picture(lambda axes, toy=toy: axes.plot(toy.rates)) for name, toy in results.items()
        }


def toy():
    parts = {"a": Part("a", torch.tensor([1.0, 2.0], dtype=torch.float64)), "b": Part("b", torch.zeros(2).double())}
    rates = torch.tensor([[0.5, math.nan], [-math.inf, 1e-300]], dtype=torch.float64)
    return Toy(rates=rates, parts=parts, pairs=[(1, 0.5), (2, math.inf)], about={"run": "digits"})


def test_what_is_saved_is_loaded(tmp_path):
    made = toy()
    made.save(tmp_path / "toy.json")
    json.loads((tmp_path / "toy.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    for kind in (Toy, Result):
        found = kind.load(tmp_path / "toy.json")
        torch.testing.assert_close(found.rates, made.rates, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(found.parts["a"].values, made.parts["a"].values) and found.parts["b"].name == "b"
        assert (found.pairs, found.epoch, found.about) == (made.pairs, None, {"run": "digits"})
    assert str(made) == "part  first\na      1.00\nb      0.00\nIt is a toy."


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{}", "expected one of .*toy"),
        ('{"analysis": "toyy"}', "did you mean 'toy'"),
        ("[", "Expecting value"),
        ('{"analysis": "toy", "about": {}}', "epoch, pairs, parts, rates"),
        ('{"analysis": "toy", "about": {}, "rates": ["x"], "parts": {}, "pairs": [], "epoch": 1}', "could not convert"),
        ('{"analysis": "toy", "about": {}, "rates": [1], "parts": 3, "pairs": [], "epoch": 1}', "items"),
        ('{"analysis": "toy", "about": {}, "rates": [1], "parts": {}, "pairs": [], "epoch": "1"}', "int stands"),
    ],
)
def test_other_files_are_refused(tmp_path, content, why):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"analysis: expected a file that an analysis saved, got .*x.json.*{why}"):
        Toy.load(tmp_path / "x.json")


def test_the_plot(tmp_path, monkeypatch):
    assert len(toy().plot(tmp_path / "toy.svg").axes) == 1
    assert (tmp_path / "toy.svg").read_text().startswith("<?xml")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Toy.plot: expected the package matplotlib.*pip install 'trtkern\[train\]'"):
        toy().plot()


def test_samples():
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10)
    some = Samples.of("f", (images, labels), count=7, batch_size=3)
    assert [len(y) for _, y in some] == [3, 3, 1] and len(some) == 7
    assert all(torch.equal(x[:, 0], y.float()) for x, y in some)
    assert [len(y) for _, y in some.again(4)] == [4, 3] and len(Samples.of("f", some, count=4)) == 4
    frames = Samples.of("f", [(images.T, labels)], batch_dim=1, batch_size=4, count=5)
    assert [list(x.shape) for x, _ in frames] == [[1, 4], [1, 1]] and frames.again(5).batches[0][0].shape == (1, 5)
    with pytest.raises(ValueError, match="f: expected 11 samples, got 10; give more data, or ask for fewer"):
        Samples.of("f", (images, labels), count=11)
    with pytest.raises(ValueError, match="f: expected some samples, got 0"):
        Samples.of("f", [])
    with pytest.raises(ValueError, match="f: expected count to be an int of at least 1, got 0"):
        Samples.of("f", (images, labels), count=0)
    with pytest.raises(ValueError, match=r"inputs with 10 samples on axis 1.*batch_dim names the axis"):
        Samples.of("f", (images, labels), batch_dim=1)
    with pytest.raises(TypeError, match="f: expected int64 labels"):
        Samples.of("f", (images, images))
    with pytest.raises(TypeError, match=r"f: expected batches \(inputs, labels\)"):
        Samples.of("f", [images])


def test_other_models_are_refused():
    x, y = torch.rand(3, 2, 5), torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"f: expected logits \[T, B, C\] with B = 2, got .*not their mean"):
        logits_of("f", torch.nn.Flatten(), x, y)
    with pytest.raises(TypeError, match=r"f: expected a model that returns logits \[T, B, C\], got a tuple"):
        logits_of("f", torch.nn.LSTM(5, 7), x, y)
    with pytest.raises(ValueError, match=r"f: expected labels in \[0, 5\), got labels from 0 to 6"):
        logits_of("f", torch.nn.Linear(5, 5), x, y)


def test_the_model_stays_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.BatchNormLIF(4, channel_dim=-1), torch.nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    model.train()
    model(torch.rand(2, 3, 3)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(KeyError), still("f", model):
        assert not model.training and not model[2].training
        torch.rand(7)
        model.requires_grad_(True).zero_grad()
        model.train()
        model(torch.rand(2, 3, 3)).sum().backward()
        raise KeyError
    assert torch.equal(torch.rand(3), wanted) and model.training and not model[0].bias.requires_grad
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with (
        pytest.raises(ValueError, match="f: expected a model with trainable parameters, got none"),
        still("f", nn.LIF(0.5)),
    ):
        pass
    with pytest.raises(TypeError, match=r"f: expected model to be a torch.nn.Module"), still("f", torch.sin):
        pass
