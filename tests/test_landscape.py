"""trtkern.analysis.landscape: what a slice is, what runs share, what survives being cut off, what is refused."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from test_curvature import Quadratic, bowl, spiking, symmetric, toy_samples
from torch.nn import functional as F

from trtkern import nn
from trtkern.analysis import Directions, Landscape, Result, landscape
from trtkern.analysis._landscape import _levels, axis


def plain_loss(model, samples, view="sdt"):
    """The loss and the accuracy, written out."""
    total = correct = 0.0
    with torch.no_grad():
        for x, y in samples:
            out = model(x)
            if view == "sdt":
                total += float(F.cross_entropy(out.mean(0), y, reduction="sum"))
            else:
                total += float(sum(F.cross_entropy(o, y, reduction="sum") for o in out) / len(out))
            correct += int((out.mean(0).argmax(1) == y).sum())
    return total / len(samples), correct / len(samples)


@pytest.mark.parametrize("view", ["sdt", "tet"])
def test_the_slices_are_the_losses_of_moved_weights(view):
    model, samples = spiking(), toy_samples()
    found = landscape(model, samples, points=3, radius=0.5, seed=4, loss=view)
    assert found.plane.losses.shape == (3, 3) and found.line.losses.shape == (7,)
    centre = plain_loss(model, samples, view)
    assert found.loss == pytest.approx(centre[0], rel=1e-6) and found.accuracy == centre[1]
    assert float(found.plane.losses[1, 1]) == float(found.line.losses[3]) == found.loss
    assert float(found.plane.accuracies[1, 1]) == found.accuracy
    # Written out: Gaussian numbers of each direction, each row as long as that of the weights, vectors left alone.
    moved = []
    for index in range(2):
        generator = torch.Generator().manual_seed(2 * 4 + index)
        drawn = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        moved.append([
            torch.stack([d * w.norm() / (d.norm() + 1e-10) for d, w in zip(direction, p.detach(), strict=True)])
            if p.dim() > 1 else torch.zeros_like(p)
            for direction, p in zip(drawn, model.parameters(), strict=True)
        ])  # fmt: skip
    start = [p.detach().clone() for p in model.parameters()]
    different = set()
    for i, a in enumerate((-0.5, 0.0, 0.5)):
        for j, b in enumerate((-0.5, 0.0, 0.5)):
            with torch.no_grad():
                for p, w, d, e in zip(model.parameters(), start, *moved, strict=True):
                    p.copy_(w + a * d + b * e)
            loss, accuracy = plain_loss(model, samples, view)
            assert float(found.plane.losses[i, j]) == pytest.approx(loss, rel=1e-5), (a, b)
            assert float(found.plane.accuracies[i, j]) == accuracy
            different.add(round(loss, 6))
            if b == 0:
                assert float(found.line.losses[3 * i]) == pytest.approx(loss, rel=1e-5)
    assert len(different) == 9


def test_a_quadratic_has_its_own_curvature():
    matrix = symmetric([4.0, 2.0, 1.0, -1.0])
    model = Quadratic(4).double()
    found = landscape(model, toy_samples(dtype=torch.float64), dims=1, points=5, loss=bowl(matrix))
    (d,), w = Directions.of(model).of_filters(model, 1), model.w.detach().flatten()
    d = d[0].flatten()
    step = float(found.line.alphas[1] - found.line.alphas[0])
    second = (found.line.losses[2:] - 2 * found.line.losses[1:-1] + found.line.losses[:-2]) / step**2
    torch.testing.assert_close(second, (d @ matrix @ d).expand(3), rtol=1e-6, atol=1e-9)
    assert found.loss == pytest.approx(float(w @ matrix @ w / 2))


def test_scaling_weights_before_a_norm_changes_no_landscape():
    samples, losses = toy_samples(), []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 5, bias=False), nn.BatchNormLIF(5, eps=1e-30, channel_dim=-1), torch.nn.Linear(5, 3)
        )
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[1].running_mean.fill_(0.25 * scale)
            model[1].running_var.fill_(0.3 * scale**2)
        losses.append(landscape(model, samples, points=3).plane.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_runs_share_their_directions(tmp_path):
    one, other = spiking(), spiking()
    with torch.no_grad():
        other[0].weight.mul_(torch.linspace(0.5, 2, 5)[:, None]).neg_()
    shared = Directions.of(one, seed=3)
    shared.save(tmp_path / "directions.json")
    loaded = Directions.load(tmp_path / "directions.json")
    assert loaded == shared == Directions.of(other, seed=3)
    for d, e in zip(shared.of_filters(one, 2), loaded.of_filters(other, 2), strict=True):
        for name, a, b in zip(shared.shapes, d, e, strict=True):
            if a is None:
                assert b is None and len(shared.shapes[name]) == 1
                continue
            torch.testing.assert_close(F.normalize(a, dim=1), F.normalize(b, dim=1))
            weights = dict(other.named_parameters())[name].detach()
            torch.testing.assert_close(b.norm(dim=1), weights.norm(dim=1))
    samples = toy_samples()
    by_seed = landscape(other, samples, dims=1, points=5, seed=3)
    by_file = landscape(other, samples, dims=1, points=5, directions=tmp_path / "directions.json")
    assert torch.equal(by_seed.line.losses, by_file.line.losses) and by_file.seed == 3
    assert not torch.equal(by_seed.line.losses, landscape(other, samples, dims=1, points=5).line.losses)


def test_directions_of_another_architecture_are_refused(tmp_path):
    other = spiking()
    other[2] = torch.nn.Linear(5, 7)
    Directions.of(other).save(tmp_path / "directions.json")
    why = r"landscape: .*another architecture: 2\.weight is \[7, 5\] there and \[4, 5\] here; compare networks of one"
    with pytest.raises(ValueError, match=why):
        landscape(spiking(), toy_samples(), directions=tmp_path / "directions.json")
    with pytest.raises(ValueError, match=r"4\.weight is missing there"):
        landscape(spiking(), toy_samples(), directions=Directions.of(spiking()[:4]))
    changed = json.loads((tmp_path / "directions.json").read_text())
    changed["first"][1][0] += 0.1
    (tmp_path / "directions.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="draws them in another way"):
        Directions.load(tmp_path / "directions.json")
    (tmp_path / "directions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a file that Directions.save wrote, got .*directions.json"):
        Directions.load(tmp_path / "directions.json")


def test_an_interrupted_grid_keeps_its_points(tmp_path):
    file, samples = tmp_path / "points.jsonl", toy_samples()
    whole = landscape(spiking(), samples, points=3)

    def cut(done, total):
        assert total == 1 + 7 + 9
        if done == 6:
            raise KeyboardInterrupt

    model = spiking()
    with pytest.raises(KeyboardInterrupt):
        landscape(model, samples, points=3, file=file, progress=cut)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spiking().parameters(), strict=True))
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 6
    # Of a point that was being written when the power went, half a line is there.
    with file.open("a") as end:
        end.write('{"at": [6], "lo')
    # A point of the file is taken from it.
    changed = json.loads(lines[3])
    changed["loss"] = "nan"
    file.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + '\n{"at": [6], "lo')
    told = []
    again = landscape(spiking(), samples, points=3, file=file, progress=lambda *a: told.append(a))
    assert told[0] == (7, 17) and told[-1] == (17, 17)
    place = changed["at"][0]
    assert math.isnan(float(again.line.losses[place]))
    again.line.losses[place] = whole.line.losses[place]
    for ours, theirs in ((again.line, whole.line), (again.plane, whole.plane)):
        assert torch.equal(ours.losses, theirs.losses) and torch.equal(ours.accuracies, theirs.accuracies)
    assert len(file.read_text().splitlines()) == 18
    told.clear()
    landscape(spiking(), samples, points=3, file=file, progress=lambda *a: told.append(a))
    assert told == [(17, 17)]


def test_points_of_other_work_are_refused(tmp_path):
    file, samples = tmp_path / "points.jsonl", toy_samples()
    landscape(spiking(), samples, dims=1, points=3, file=file)
    other = spiking()
    other[1].running_mean.add_(0.1)
    for model, given, what in (
        (spiking(), {"seed": 1}, "seed is 0 there and 1 here"),
        (spiking(), {"radius": 0.5}, r"radius is 1\.0 there and 0\.5 here"),
        (spiking(), {"loss": "tet"}, 'loss is "sdt" there and "tet" here'),
        (spiking(), {"points": 5}, "points is 3 there and 5 here"),
        (other, {}, "weights is"),
    ):
        with pytest.raises(ValueError, match=f"landscape: .*points.jsonl.*{what}.*delete the file to begin anew"):
            landscape(model, samples, **{"dims": 1, "points": 3, "file": file, **given})
    with pytest.raises(ValueError, match="samples is"):
        landscape(spiking(), toy_samples(count=12), dims=1, points=3, file=file)
    file.write_text('{"x": 1}\n[3]\n')
    with pytest.raises(ValueError, match="which is none or is damaged; delete it"):
        landscape(spiking(), samples, dims=1, points=3, file=file)
    with pytest.raises(OSError, match="nowhere"):
        landscape(spiking(), samples, dims=1, points=3, file=tmp_path / "nowhere" / "x")


class Deadly:
    """SDT's loss, which ends its process at the third point."""

    def __init__(self, alive=False):
        self.calls = 5 if alive else 0

    def __call__(self, logits, labels):
        self.calls += 1
        if self.calls == 5:
            os._exit(9)
        return F.cross_entropy(logits.mean(0), labels)


def test_several_processes_and_one_of_them_dies(tmp_path):
    file, samples = tmp_path / "points.jsonl", toy_samples()
    with pytest.raises(RuntimeError, match=r"landscape: expected 2 processes.*one that ended.*run it again"):
        landscape(spiking(), samples, dims=1, points=7, processes=2, file=file, loss=Deadly())
    kept = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert 1 <= len(kept) <= 4
    one = landscape(spiking(), samples, dims=1, points=7)
    for point in kept:
        found = one.line.losses[point["at"][0]] if point["at"] else one.loss
        assert point["loss"] == pytest.approx(float(found), rel=1e-6)
    told = []
    again = landscape(
        spiking(), samples, dims=1, points=7, file=file, loss=Deadly(alive=True),
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    assert told[0] == (len(kept) + 1, 8)
    torch.testing.assert_close(again.line.losses, one.line.losses, rtol=1e-6, atol=0)


def test_what_cannot_be_sent_to_processes():
    model = spiking()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"landscape: expected a model and a loss that can be pickled.*processes=1"):
        landscape(model, toy_samples(), dims=1, points=5, processes=2)


def test_saved_and_drawn(tmp_path):
    found = landscape(spiking(), toy_samples(), points=5)
    found.save(tmp_path / "landscape.json")
    loaded = Result.load(tmp_path / "landscape.json")
    assert isinstance(loaded, Landscape) and torch.equal(loaded.plane.losses, found.plane.losses)
    assert loaded.shapes == found.shapes
    figure = found.plot(tmp_path / "landscape.png")
    assert [axes.name for axes in figure.axes] == ["rectilinear"] * 3 + ["3d"]
    line = landscape(spiking(), toy_samples(), dims=1, points=5)
    line.save(tmp_path / "line.json")
    assert Landscape.load(tmp_path / "line.json").plane is None and len(line.plot().axes) == 2
    assert len(Landscape.pictures({"one": found, "other": loaded})) == 6
    assert "step function" in str(found)


def test_levels_and_coordinates():
    assert axis(25, 0.7)[12] == 0 and torch.equal(axis(25, 0.7), -axis(25, 0.7).flip(0)) and axis(4, 1)[-1] == 1
    for low, high in ((1e-3, 4.0), (0.5, 0.6), (1.0, 1.0), (math.nan, 2.0), (0.0, 0.0)):
        plane = landscape_plane([[low, high], [high, low]])
        found = _levels([plane])
        assert len(found) >= 2 and found == sorted(set(found)) and all(level > 0 for level in found)


def landscape_plane(losses):
    from trtkern.analysis._landscape import Slice

    return Slice(torch.tensor([-1.0, 1.0]), torch.tensor(losses).double(), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        ({"dims": 3}, ValueError, "landscape: expected dims to be 1 or 2, got 3"),
        ({"points": 2}, ValueError, "expected points to be an int of at least 3, got 2"),
        ({"processes": 0}, ValueError, "expected processes to be an int of at least 1, got 0"),
        ({"radius": math.inf}, ValueError, "expected radius to be a number above 0, got inf"),
        ({"loss": "sgd"}, ValueError, "landscape: loss: expected one of sdt, tet"),
    ],
)
def test_what_is_refused(given, kind, why):
    with pytest.raises(kind, match=why):
        landscape(spiking(), toy_samples(), **given)
