"""A data set is one row: whoever names data sets knows it from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trtkern import cli, data
from trtkern.backends import named
from trtkern.commands import _runs, train
from trtkern.data import Dataset, Source, Split
from trtkern.datasets import DATASETS, Row
from trtkern.training import plan, recipes, run

# Not "auto": in Triton's interpreter a step takes minutes.
FAST = ["--device", "cpu", "--threads", "1", "--backend", "cpu" if named("cpu").missing() is None else "reference"]
RECIPE = """
data = "stripes"
timesteps = 2
epochs = 1
batch_size = 8
lr = 1e-2
model = {name = "conv", layers = [2]}
loss = {name = "trt"}
"""


def stripes(name: str, source: Source) -> Dataset:
    """Images whose class is their bright row."""
    labels = torch.arange(24) % 2
    images = torch.zeros(24, 1, 4, 4, dtype=torch.uint8)
    images[torch.arange(24), 0, labels] = (200 + torch.arange(24, dtype=torch.uint8))[:, None]
    splits = Split(images[:16], labels[:16]), Split(images[16:], labels[16:])
    return Dataset(name, *splits, ("upper", "lower"), mean=40.0, std=80.0)


@pytest.fixture
def added(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "stripes", Row(stripes, 2, (1, 4, 4), 16))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    Path("stripes.toml").write_text(RECIPE)


def test_help_and_errors_know_a_new_data_set(added, capsys, monkeypatch):
    monkeypatch.setattr(train.train, "__signature__", train._signature())  # made when the command is imported
    assert cli.main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "shd, stripes. The digits come with the package. Or one of your own" in said
    assert cli.main(["train", "--data", "stripe"]) == 2
    assert (
        "shd, stripes, module:function, folder:DIR or tar:DIR, got 'stripe'; did you mean 'stripes'?"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"data: expected one of digits, .*, shd, stripes, got 'strips'"):
        data.load("strips")


def test_a_recipe_trains_on_it_and_a_dry_run_knows_its_shape(added, capsys, monkeypatch, no_pictures):
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    assert cli.main(["train", "--recipe", "stripes.toml", "--dry-run", *FAST]) == 0
    assert "2 classes and number of images are those of stripes as it is published" in capsys.readouterr().out
    assert cli.main(["train", "--recipe", "stripes.toml", "--set", "validation=0.25", *FAST]) == 0
    assert "stripes: 12 training, 4 validation and 8 test images" in capsys.readouterr().out
    assert run.settings_of(Path("runs/stripes-trt-seed0")).data == "stripes"


def test_a_data_set_may_have_no_recipe_and_a_recipe_another_name(added):
    with pytest.raises(ValueError, match="--data: expected --recipe beside stripes, which has no recipe of its own"):
        plan.make(data="stripes")
    assert plan.make(recipe="digits", data="stripes")["data"] == "stripes"
    assert plan.make(recipe="stripes.toml")["data"] == "stripes"


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_names_what_makes_it(name):
    assert callable(DATASETS[name].maker())


@pytest.mark.parametrize(
    ("option", "flag", "takers"),
    [("class_list", "--class-list", "imagenet100 or imagenet"), ("resize", "--dvs-resize", "dvs-cifar10")],
)
def test_what_only_some_take_is_refused_with_the_others(option, flag, takers):
    with pytest.raises(ValueError, match=f"^data: expected {flag} with {takers} only, got it with digits$"):
        data.load("digits", **{option: "paper"})


def test_a_new_recipe_is_a_file(added, capsys, monkeypatch, tmp_path):
    """Of any name: whoever lists recipes looks into the folder."""
    for path in recipes.FOLDER.rglob("*.toml"):
        there = tmp_path / "recipes" / path.relative_to(recipes.FOLDER)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(path.read_text())
    (tmp_path / "recipes" / "stripes-fast.toml").write_text(RECIPE)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    monkeypatch.setattr(train.train, "__signature__", train._signature())
    assert cli.main(["train", "--help"]) == 0
    assert "stripes-fast)" in " ".join(capsys.readouterr().out.replace("│", "").split())
    assert plan.make(recipe="stripes-fast+tet")["loss"] == "tet"
    with pytest.raises(ValueError, match="got 'stripes-fst'; did you mean 'stripes-fast'"):
        plan.make(recipe="stripes-fst")
