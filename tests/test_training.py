"""The training loop: what it computes, what stops it, what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch
from torch import nn

from trtkern import data
from trtkern.backends import named
from trtkern.data import Dataset, Split
from trtkern.names import LOSSES
from trtkern.nn import LIF, BatchNormLIF
from trtkern.training import checkpoint, figures, run, settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer
from trtkern.training.schedules import Schedule
from trtkern.training.watch import NonFiniteError, Watch

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"


def resolve(**options) -> settings.Settings:
    return settings.resolve(**{"backend": BACKEND, "threads": 1, "device": "cpu", "select": "last", **options})


def part(dataset: Dataset, train: int, test: int) -> Dataset:
    """The first images of both splits."""
    splits = (Split(s.images[:n], s.labels[:n]) for s, n in ((dataset.train, train), (dataset.test, test)))
    return dataclasses.replace(dataset, **dict(zip(("train", "test"), splits, strict=True)))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    return part(digits, 128, 60)


pytestmark = pytest.mark.usefixtures("one_thread")


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("seconds", "samples_per_s", "loader_share")}


def test_it_learns_the_digits(digits, tmp_path):
    result = Trainer.of(resolve(epochs=3, batch_size=32), part(digits, 640, 360)).run(tmp_path)
    first, last = result.rows[0], result.rows[-1]
    assert result.stopped is None and len(result.rows) == 3
    assert last["test"]["accuracy"] > 0.9
    assert last["train"]["loss"] < 0.6 * first["train"]["loss"]
    assert last["step"] == 3 * 20 and last["samples_per_s"] > 0


def test_same_seed_same_run_and_another_seed_another(few, tmp_path):
    rows = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        rows.append([timeless(row) for row in Trainer.of(resolve(epochs=2, seed=seed), few).run(folder).rows])
    assert rows[0] == rows[1]  # bitwise: these are Python floats
    assert rows[0][1]["train"] != rows[2][1]["train"]


def test_step_has_the_gradient_of_the_whole_loss(few):
    """The loop adds the penalty's gradient outside autograd; the sum must be autograd's of everything."""
    trainer = Trainer.of(resolve(), few)
    trainer.loss.lam = 0.5  # so that the penalty weighs as much as the rest
    weights = dict(trainer.model.named_parameters())
    trainer.model.train()
    images, target = few.train.images[:16], few.train.labels[:16]
    total = trainer.loss(trainer.logits(images), target)
    wanted = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    class Tally:
        def add(self, parts, logits, target):
            self.parts = parts

    tally = Tally()
    reported = trainer._step(images, target, tally)
    torch.testing.assert_close(reported, total.detach())
    torch.testing.assert_close(tally.parts.total, total.detach())
    assert tally.parts.regularizer > 0.05 * total
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(weight.detach(), before[name]), name


@pytest.mark.parametrize("loss", ["trt", "tet", "sdt"])
def test_every_loss_trains_and_reports_its_parts(few, tmp_path, loss):
    (row,) = Trainer.of(resolve(loss=loss, epochs=1), few).run(tmp_path).rows
    options = LOSSES[loss]
    for split in ("train", "test"):
        parts = row[split]
        share = options.get("eta", options["lam"] if loss == "tet" else 0.0)
        expected = (1 - share) * parts["cross_entropy"] + share * parts["mse"] + parts["regularizer"]
        assert parts["loss"] == pytest.approx(expected, rel=1e-5)
        assert (parts["regularizer"] > 0) == (loss == "trt")


def test_bfloat16_reaches_the_kernels_and_the_losses_stay_float32(few, tmp_path):
    trainer = Trainer.of(resolve(epochs=1, amp="bf16"), few)
    seen = []
    for module in trainer.model.modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0].dtype, out.spikes.dtype)))
    (row,) = trainer.run(tmp_path).rows
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert trainer.logits(few.test.images[:2]).dtype == torch.float32
    assert row["test"]["loss"] < 5


def test_learning_rate_rises_and_falls():
    cosine = Schedule("cosine", {"eta_min": 0.0}, 0.25)
    factors = [cosine.rate(1.0, step, 8, 10) for step in range(80)]
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert factors[20] == 1 and factors[50] == pytest.approx(0.5) and 0 < factors[79] < 0.002
    assert factors[20:] == sorted(factors[20:], reverse=True)


def test_last_images_are_not_lost_in_a_set_smaller_than_a_batch(few, tmp_path):
    trainer = Trainer.of(resolve(epochs=1, batch_size=500), few)
    assert (trainer.batch_size, trainer.steps) == (128, 1)
    trainer.run(tmp_path)


# What stops a run


def poisoned(dataset: Dataset, image: int, value: float = torch.nan) -> Dataset:
    """One pixel of one training image is not a number."""
    images = dataset.train.images.float().clone()
    images[image, 0, 3, 4] = value
    return dataclasses.replace(dataset, train=Split(images, dataset.train.labels))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_one_pixel_stops_the_run_at_its_step(few, tmp_path, value):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    image, step = int(order[40]), 40 // 16 + 1
    trainer = Trainer.of(resolve(seed=5, batch_size=16, epochs=1), poisoned(few, image, value))
    with pytest.raises(NonFiniteError, match=f"in epoch 1, step {step}, first in .* of layer layers.0.norm"):
        trainer.run(tmp_path)
    assert not checkpoint.found(tmp_path)
    # Stopped before the update: the weights are still good.
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "weight, place",
    [
        ("layers.0.conv.weight", "layer layers.0.norm"),
        ("layers.1.conv.weight", "layer layers.1.norm"),
        ("classifier.weight", r"the loss \(every LIF layer stayed finite\)"),
    ],
)
def test_nan_in_one_weight_stops_the_run_and_names_the_layer(few, tmp_path, weight, place):
    trainer = Trainer.of(resolve(epochs=2, batch_size=64), few)

    class Plant(Observer):
        def epoch(self, row):
            with torch.no_grad():
                chosen = trainer.model.get_parameter(weight)
                chosen[(0,) * chosen.dim()] = torch.nan

    with pytest.raises(NonFiniteError, match=f"in epoch 2, step 1, first in .*{place}"):
        trainer.run(tmp_path, Plant())
    saved = checkpoint.load(tmp_path)
    assert saved.metadata["epoch"] == 1 and all(torch.isfinite(t).all() for t in saved.model.values())
    assert len((tmp_path / run.METRICS).read_text().splitlines()) == 1


@pytest.mark.parametrize("penalty", [torch.inf, torch.nan])
def test_a_penalty_that_is_not_finite_is_named(few, tmp_path, monkeypatch, penalty):
    """As where lam is beyond float32."""
    trainer = Trainer.of(resolve(epochs=1, batch_size=64), few)
    monkeypatch.setattr(trainer.loss, "add_grad_", lambda: torch.tensor(penalty))
    with pytest.raises(NonFiniteError, match=r"in epoch 1, step 1, first in the weight penalty of the loss \(every"):
        trainer.run(tmp_path)
    assert not checkpoint.found(tmp_path) and not (tmp_path / run.METRICS).exists()


@pytest.mark.parametrize(
    ("part", "value", "name"),
    [("cross_entropy", torch.nan, "the cross entropy"), ("mse", torch.inf, "the squared error")],
)
def test_a_batch_before_the_last_that_is_not_finite_is_seen(few, part, value, name):
    """Its average says so where the last batch alone is looked at: in an evaluation, and between two looks on a GPU."""
    trainer = Trainer.of(resolve(), few)
    averages = {"loss": value, "cross_entropy": 1.0, "mse": 1.0, "regularizer": 0.0, "accuracy": 0.5, part: value}
    with pytest.raises(
        NonFiniteError, match=rf"NaN or Inf at noon, first in {name} of the loss \(every LIF layer stayed finite\)"
    ):
        trainer.watch.check(torch.tensor(1.0), "at noon", averages)
    trainer.watch.check(torch.tensor(1.0), "at noon", dict.fromkeys(averages, 1.0))


def test_an_evaluation_looks_at_every_batch(few, monkeypatch):
    trainer = Trainer.of(resolve(batch_size=32), few)
    parts, seen = trainer.loss.parts, []

    def spoilt(logits, target):
        seen.append(len(target))
        made = parts(logits, target)
        return made._replace(cross_entropy=made.cross_entropy * torch.nan) if len(seen) == 1 else made

    monkeypatch.setattr(trainer.loss, "parts", spoilt)
    monkeypatch.setattr("trtkern.training.measure.LARGEST", 32)
    with pytest.raises(NonFiniteError, match="in an evaluation, first in the cross entropy of the loss"):
        trainer.evaluate(few.test)
    assert len(seen) == 2


def test_spikes_hide_a_nan_that_the_flag_shows(few):
    """Why the flags are needed: with one NaN pixel the loss is finite."""
    trainer = Trainer.of(resolve(), few)
    trainer.model.eval()
    images = poisoned(few, 0).train.images[:8]
    loss = trainer.loss(trainer.logits(images), few.train.labels[:8])
    assert torch.isfinite(loss)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.norm"):
        trainer.watch.check(loss, "here")


def test_weights_that_are_not_finite_are_not_saved(few, tmp_path):
    trainer = Trainer.of(resolve(epochs=1), few)
    trainer._save(tmp_path, 1, 2, None)
    (path,) = checkpoint.found(tmp_path)
    before = path.read_bytes()
    with torch.no_grad():
        trainer.model.layers[1].norm.running_var[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"in layers\.1\.norm\.running_var"):
        trainer._save(tmp_path, 2, 2, None)
    assert checkpoint.found(tmp_path) == [path] and path.read_bytes() == before


def test_watch_names_the_first_layer_of_the_forward_pass_not_of_the_constructor():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = LIF(backend="reference")
            self.first = LIF(backend="reference")

        def forward(self, x):
            return self.second(self.first(x))

    model = Swapped().train()
    watch = Watch(model, lambda: model(torch.full((2, 1, 3), torch.nan)))
    assert list(watch.flags) == ["first", "second"] and watch.used() == ["reference"] and model.training
    watch.check(torch.tensor(1.0), "clean")  # what the trial raised is lowered again
    watch.flags["first"].fill_(1)
    watch.flags["second"].fill_(1)
    with pytest.raises(NonFiniteError, match="NaN or Inf at noon, first in the membrane potential of layer first"):
        watch.check(torch.tensor(1.0), "at noon")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_after_its_step_with_a_checkpoint(few, tmp_path, number):
    handler = signal.getsignal(number)

    class Impatient(Observer):
        interval = 0.0

        def step(self, epoch, step, averages):
            if (epoch, step) == (2, 3):
                signal.raise_signal(number)

    trainer = Trainer.of(resolve(epochs=3, batch_size=32), few)
    result = trainer.run(tmp_path, Impatient())
    assert result.stopped == (2, 3) and len(result.rows) == 1
    saved = checkpoint.load(tmp_path)
    assert (saved.metadata["epoch"], saved.metadata["step"], saved.metadata["row"]) == (2, 3, None)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(saved.model[name], tensor)
    assert signal.getsignal(number) is handler


# What a run leaves behind


def test_run_folder_has_everything(few, tmp_path):
    plan = resolve(epochs=2, seed=3)
    trainer = Trainer.of(plan, few)
    result = trainer.run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / run.METRICS).read_text().splitlines()]
    assert rows == result.rows and [row["epoch"] for row in rows] == [1, 2]
    config = json.loads((tmp_path / run.CONFIG).read_text())
    assert settings.Settings.from_json(config["settings"]) == plan
    assert list(config["backends"]) == ["layers.0.norm", "layers.1.norm"]
    assert all(name.startswith(BACKEND) for name in config["backends"].values())
    assert config["versions"]["torch"] == torch.__version__
    figures.learning_curves(rows, "two epochs", tmp_path / run.CURVES)
    assert (tmp_path / run.CURVES).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_evaluation_of_the_checkpoint_repeats_the_last_row(few, tmp_path):
    last = Trainer.of(resolve(epochs=2), few).run(tmp_path).rows[-1]["test"]
    saved = checkpoint.load(tmp_path)
    again = Trainer.of(settings.Settings.from_json(saved.metadata["settings"]), few)
    assert again.evaluate(few.test) != last
    again.restore(saved)
    assert again.evaluate(few.test) == last == saved.metadata["row"]["test"]
    # Nothing was learned from the test images: neither weights nor BatchNorm's statistics moved.
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(saved.model[name], tensor), name


def test_checkpoint_of_another_network_is_refused(few, tmp_path):
    trainer = Trainer.of(resolve(), few)
    trainer._save(tmp_path, 1, 1, None)
    saved = checkpoint.load(tmp_path)
    other = Trainer.of(dataclasses.replace(resolve(), model={"name": "conv", "layers": [8, "pool"]}), few)
    with pytest.raises(ValueError, match="expected one for this network"):
        other.restore(saved)
    saved.metadata["shape"] = [1, 28, 28]
    with pytest.raises(ValueError, match=r"expected one for images \(1, 8, 8\), got \[1, 28, 28\]"):
        trainer.restore(saved)
