"""What a run may be told: optimisers, clipping, smoothing, precision, compilation, and which epoch is reported."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from trtkern import data
from trtkern.backends import named
from trtkern.data import Dataset, Split
from trtkern.nn import SDTLoss, TETLoss, TRTLoss
from trtkern.training import checkpoint, run, selection, settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer, Observers

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few() -> Dataset:
    digits = data.load("digits")
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in (("train", 144), ("test", 60))}
    return dataclasses.replace(digits, **splits)


def resolve(*changes, **options) -> settings.Settings:
    options = {"backend": BACKEND, "threads": 1, "device": "cpu", "select": "last", "batch_size": 32, **options}
    return settings.resolve(changes=["model.layers=[8, 'pool']", *changes], **options)


def steps(trainer, count=3):
    """The weights after some steps on the first images."""
    trainer.model.train()
    images, labels = trainer.data.train
    for index in range(count):
        rows = slice(16 * index, 16 * index + 16)
        trainer._step(images[rows], labels[rows], trainer._tally)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


PLAIN = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.7, nesterov=True, foreach=False),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_the_plain_one(few, name, clip):
    """Against autograd of the whole loss, torch's clipping and its optimiser of one parameter at a time."""
    own = {"sgd": "momentum=0.7, nesterov=true"}.get(name, "betas=[0.8, 0.99]")
    changes = [f"optimizer={{name='{name}', weight_decay=0.1, {own}}}", "loss.lam=0.1"]
    plan = resolve(*changes, *([] if clip is None else [f"clip={clip}"]), lr=0.01)
    got = steps(Trainer.of(plan, few))
    other = Trainer.of(plan, few)
    optimizer = PLAIN[name](other.model.parameters())
    other.model.train()
    norms = []
    for index in range(3):
        rows = slice(16 * index, 16 * index + 16)
        optimizer.zero_grad()
        other.loss(other.logits(few.train.images[rows]), few.train.labels[rows]).backward()
        grads = torch.cat([p.grad.flatten() for p in other.model.parameters()])
        norms.append(float(grads.norm()))
        if clip is not None:
            for p in other.model.parameters():
                p.grad *= clip / grads.norm()
        optimizer.step()
    assert clip is None or min(norms) > 2 * clip
    for key, p in other.model.named_parameters():
        torch.testing.assert_close(got[key], p.detach(), rtol=2e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_of_the_cross_entropy_alone(smoothing):
    logits, target = torch.randn(3, 5, 7), torch.randint(7, (5,))
    wanted = (1 - smoothing) * F.one_hot(target, 7) + smoothing / 7
    steps = -(wanted * logits.log_softmax(-1)).sum(-1).mean()
    mean = -(wanted * logits.mean(0).log_softmax(-1)).sum(-1).mean()
    mse = (logits - F.one_hot(target, 7)).square().mean()
    weights = [("w", torch.randn(4))]
    for loss, total in (
        (SDTLoss(label_smoothing=smoothing), mean),
        (TETLoss(lam=0.2, label_smoothing=smoothing), 0.8 * steps + 0.2 * (logits - 1).square().mean()),
        (TRTLoss(weights, lam=0.0, eta=0.2, label_smoothing=smoothing), 0.8 * steps + 0.2 * mse),
    ):
        torch.testing.assert_close(loss(logits, target), total)
        assert ("label_smoothing" in repr(loss)) == (smoothing > 0)


def test_label_smoothing_reaches_the_loss(few):
    with pytest.raises(ValueError, match="expected label_smoothing to be a number in"):
        SDTLoss(label_smoothing=1.5)
    for loss in ("trt", "tet", "sdt"):
        assert Trainer.of(resolve("label_smoothing=0.1", loss=loss), few).loss.label_smoothing == 0.1


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_step_that_overflows_changes_nothing(few, name):
    """Not even by what torch leaves uninitialised in the first step."""
    trainer = Trainer.of(resolve(f"optimizer.name={name}", amp="fp16"), few)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    after = steps(trainer, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert moments and not any(value.any() for value in moments)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(few, tmp_path):
    trainer = Trainer.of(resolve(epochs=1, amp="fp16"), few)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.scaler.get_scale() == 2.0**16
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    after = steps(trainer, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler.update(2.0**10)
    got = steps(trainer, 2)
    exact = steps(Trainer.of(resolve(epochs=1), few), 2)
    assert all(not torch.equal(before[name], got[name]) for name in before)
    # Adam's first steps are of the size of the rate whatever the gradient's: the direction is what can be wrong.
    moved = [torch.cat([(w[n] - before[n]).flatten() for n in before]) for w in (got, exact)]
    assert F.cosine_similarity(*moved, dim=0) > 0.7
    (row,) = Trainer.of(resolve(epochs=1, amp="fp16"), few).run(tmp_path).rows
    assert math.isfinite(row["train"]["loss"]) and math.isfinite(row["test"]["loss"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_runs_are_resumed_bitwise(few, tmp_path, amp):
    plan = resolve(epochs=3, amp=amp)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()

    class Stop(Observer):
        def epoch(self, row):
            raise KeyboardInterrupt

    Trainer.of(plan, few).run(whole)
    with pytest.raises(KeyboardInterrupt):
        Trainer.of(plan, few).run(parts, Stop())
    again = Trainer.of(plan, few)
    saved = checkpoint.load(parts)
    again.resume(saved, parts)
    again.run(parts)
    one, two = checkpoint.load(whole), checkpoint.load(parts)
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)
    assert one.metadata["loop"] == two.metadata["loop"]
    assert ("scale" in one.metadata["loop"]["scaler"]) == (amp == "fp16")


def test_a_compiled_network_makes_the_same_steps(few, monkeypatch):
    """By aot_eager, which traces the same graphs and writes no C++."""
    compiled, original = [], torch.compile
    wanted = steps(Trainer.of(resolve(), few))
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or original(model, backend="aot_eager"))
    trainer = Trainer.of(resolve(compile=True), few)
    got = steps(trainer)
    assert compiled == [trainer.model] and "compile" in trainer.settings.to_json()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert set(trainer.model.state_dict()) == set(Trainer.of(resolve(), few).model.state_dict())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ((), {"cuda_graphs": True}, "--cuda-graphs: expected a GPU, got --device cpu"),
        (
            ("optimizer.name=lion",),
            {},
            "optimizer.name: expected one of adam, adamw, sgd, .*, RMSprop, .*, or module:function, got 'lion'",
        ),
        (
            ("optimizer={name='sgd', beta=1}",),
            {},
            "optimizer: sgd: expected one of momentum, dampening, .*, got 'beta'",
        ),
        (("optimizer={name='adam', betas=[0.9, 1.0]}",), {}, r"optimizer.betas: expected .*, got \[0.9, 1.0\]"),
        (("optimizer.weight_decay=-1",), {}, "optimizer.weight_decay: expected .*, got -1"),
        (("clip=0.0",), {}, "clip: expected a finite number above 0, got 0.0"),
        (("label_smoothing=1.0",), {}, "label_smoothing: expected a number of 0 to below 1, got 1.0"),
        (("validation=1.0",), {}, "validation: expected a share above 0 and below 1, got 1.0; .*--select last"),
        ((), {"select": "best"}, "--select: expected one of validation, test, last, got 'best'"),
        ((), {"amp": "fp8"}, "--amp: expected one of none, bf16, fp16, got 'fp8'"),
        ((), {"workers": -1}, "--workers: expected an integer of at least 0, got -1"),
        (("model.timesteps=3",), {}, "model.timesteps: expected --timesteps, .*, got model.timesteps"),
        (("loss.exclude=3",), {}, "loss.exclude: expected a list of names, got 3"),
        (("model=conv",), {}, "expected model as dict, got 'conv'; a table is set as model.name="),
        ((), {"dvs_resize": "nearest"}, "--dvs-resize: expected one of bilinear, paper, got 'nearest'"),
    ],
)
def test_what_is_wrong_is_named(changes, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(*changes, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("loss", ["trt", "tet", "sdt"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_captured_step_makes_the_same_steps(few, amp, loss):
    few = dataclasses.replace(few, mean=(4.0,), std=(6.0,))
    options = {"device": "cuda", "backend": "auto", "amp": amp, "loss": loss}
    wanted = steps(Trainer.of(resolve("clip=0.5", **options), few), 8)
    trainer = Trainer.of(resolve("clip=0.5", **options, cuda_graphs=True), few)
    got = steps(trainer, 8)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    assert trainer._tally.images == 8 * 16


# Which epoch is reported


@pytest.mark.parametrize("select", ["validation", "test"])
def test_the_best_epoch_is_reported(few, tmp_path, select, monkeypatch):
    plan = resolve("validation=0.25", select=select, epochs=6, lr=0.05)
    trainer = Trainer.of(plan, few)
    seen = []
    measure = trainer._measure
    monkeypatch.setattr(trainer, "_measure", lambda split, watch: seen.append(split) or measure(split, watch))
    result = trainer.run(tmp_path)
    accuracies = [(row[select]["accuracy"], -row[select]["loss"]) for row in result.rows]
    best = max(range(6), key=lambda i: accuracies[i])
    assert result.final.epoch == best + 1 and len(set(accuracies)) > 2
    assert result.final.splits[select] == result.rows[best][select]
    written = json.loads((tmp_path / run.RESULT).read_text())
    assert written["test"] == result.final.splits["test"] and written["epoch"] == best + 1
    assert [split is trainer.splits["test"] for split in seen].count(True) == (7 if select == "test" else 1)
    (path, *older) = checkpoint.found(tmp_path, selection.BEST)
    assert checkpoint.step_of(path) == result.rows[best]["step"] and len(older) <= checkpoint.KEPT
    for name, tensor in checkpoint.load(path).model.items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)
    assert result.final.confusion.sum() == 60
    assert int(result.final.confusion.diag().sum()) == round(60 * written["test"]["accuracy"])


def test_held_out_images_are_stratified_and_no_training_images(few):
    whole = data.load("digits")
    rest, held = whole.hold_out(0.2, seed=3)
    assert len(held.labels) == 287 and len(rest.train.labels) == 1150
    shares = torch.bincount(held.labels) / torch.bincount(whole.train.labels)
    assert ((shares - 0.2).abs() < 0.01).all()
    seen = {image.numpy().tobytes() for image in rest.train.images}
    assert not any(image.numpy().tobytes() in seen for image in held.images)
    again, other = whole.hold_out(0.2, seed=3)[1], whole.hold_out(0.2, seed=4)[1]
    assert torch.equal(again.images, held.images) and not torch.equal(other.images, held.images)
    with pytest.raises(ValueError, match=r"an image of each of 10 classes on both sides, got 0.001 of 1,437"):
        whole.hold_out(0.001)
    trainer = Trainer.of(resolve("train_images=50", select="validation"), few)
    assert [len(split.labels) for split in trainer.splits.values()] == [50, 60, 14]


# Frames


def test_sequences_of_frames_train(few, tmp_path):
    """[N, T, C, H, W] is shown as it is; the T of the settings belongs to images."""
    frames = [Split(s.images.unsqueeze(1).expand(-1, 3, -1, -1, -1), s.labels) for s in (few.train, few.test)]
    still = Trainer.of(resolve(timesteps=3, epochs=1), few).run(tmp_path).rows[0]
    (tmp_path / "b").mkdir()
    moving = dataclasses.replace(few, train=frames[0], test=frames[1])
    assert moving.timesteps == 3 and moving.shape == (1, 8, 8)
    row = Trainer.of(resolve(timesteps=3, epochs=1), moving).run(tmp_path / "b").rows[0]
    assert row["train"]["loss"] == pytest.approx(still["train"]["loss"], rel=1e-4)
    assert row["test"]["loss"] == pytest.approx(still["test"]["loss"], rel=1e-3)


# What is told


def test_a_layer_that_never_fires_is_named(few, tmp_path):
    said = []

    class Listener(Observer):
        def note(self, line):
            said.append(line)

    rows = Trainer.of(resolve("model.v_threshold=50.0", epochs=1), few).run(tmp_path, Observers([Listener()])).rows
    assert rows[0]["firing"] == {"layers.0.norm": 0.0}
    assert len(said) == 1 and said[0].startswith("epoch 1: layer layers.0.norm never fires: expected some spikes")
