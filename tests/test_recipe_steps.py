"""Every recipe makes real steps on files in its true format, with the network that it is meant for."""

from __future__ import annotations

import math

import data_files
import pytest
import torch

from trtkern import data
from trtkern.backends import named
from trtkern.commands import _runs
from trtkern.training import recipes, run, settings

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"

# Parameters; those of the paper's networks for the classes of the tiny files, of which imagenet100 has 2 instead of
# 100. Of two recipes for the same network one has the paper's, the other a quarter of its width (imagenet, cifar100).
PARAMETERS = {
    "digits": 9_978,
    "fashion-mnist": 54_778,
    "cifar10": 12_630_858,
    "cifar100": 798_132,
    "imagenet100": 21_335_972 - 98 * 513,
    "imagenet": 1_335_635,
    "dvs-cifar10": 9_268_746,
    "n-caltech101": 9_688_165,
    "n-mnist": 25_482,
    "dvs-gesture": 300_427,
    "shd": 250_388,
    "shd-adlif": 109_076,
    "shd-radlif": 109_076 + 2 * 128 * 128 + 700 + 128,
    "shd-cubalif": 109_076,
    "spikformer-cifar10": 9_324_730,
    "spikformer-cifar100": 155_458,
    "spikformer-imagenet100": 29_689_384 - 998 * 513,
    "sdt-cifar10": 10_233_418,
    "sdt-cifar100": 97_282,
}
SMALLER = {
    "cifar100": ["model.width=16"],
    "imagenet": ["model.width=16"],
    "imagenet100": ["augment=[{name='resized_crop', size=64}, {name='flip'}]"],
    "spikformer-cifar100": ["model.dim=48"],
    "spikformer-imagenet100": ["augment=[{name='resized_crop', size=64}, {name='flip'}]", "accumulate=1"],
    "sdt-cifar100": ["model.dim=48"],
}


def test_every_recipe_makes_steps_below_and_names_a_data_set():
    assert set(recipes.names()) == set(PARAMETERS)
    assert {recipes.load(name)["data"] for name in PARAMETERS} <= set(data.DATASETS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_two_steps(name, tmp_path, monkeypatch, one_thread):
    """Of one image, or of one sequence in two frames."""
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    source = recipes.load(name)["data"]
    folder = data_files.make(source, tmp_path / "files")
    plan = settings.resolve(
        recipe=name, data_dir=None if folder is None else str(folder), cache_dir=str(tmp_path / "cache"), epochs=1,
        batch_size=1, timesteps=2, backend=BACKEND, device="cpu", threads=1, select="last", workers=1,
        changes=SMALLER.get(name, []),
    )  # fmt: skip
    trainer = _runs.prepare(plan)
    assert sum(p.numel() for p in trainer.model.parameters()) == PARAMETERS[name]
    assert trainer.data.timesteps == (2 if data.DATASETS[source].frames else None)
    trainer.steps, trainer.splits["test"] = 2, data.Split(*(part[:2] for part in trainer.splits["test"]))
    monkeypatch.setattr(trainer, "memory", lambda: None)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    (row,) = trainer.run(tmp_path).rows
    assert row["step"] == 2 and all(map(math.isfinite, row["train"].values()))
    assert (row["train"]["regularizer"] > 0) == (plan.loss == "trt")
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    penalised = trainer.loss.regularized() if plan.loss == "trt" else ()
    assert {name for name, _ in penalised} | {"classifier.bias"} <= moved
    assert run.settings_of(tmp_path) == plan and plan.recipe == name
