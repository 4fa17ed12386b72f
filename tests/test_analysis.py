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
from trtkern.analysis._result import COLORS


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


SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "without red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "without blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as it is seen (Machado, Oliveira and Fernandes 2009, severity 1)."""


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_are_told_apart_and_read_on_white_and_on_black(sight):
    """The distance of every two in CIE L*a*b*, of which 2.3 is just noticed; contrast as WCAG has it."""
    parts = torch.tensor([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS]).double()
    linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = linear @ torch.tensor(SIGHT[sight]).double().T
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
    xyz = (seen @ to_xyz.T).clamp(min=0) / torch.tensor([0.95047, 1.0, 1.08883]).double()
    root = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    assert len(COLORS) == 8 and float(torch.pdist(lab).min()) > 15
    luminance = linear @ to_xyz[1]
    assert bool((1.05 / (luminance + 0.05) > 2.4).all()) and bool(((luminance + 0.05) / 0.0588 > 2.4).all())


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
