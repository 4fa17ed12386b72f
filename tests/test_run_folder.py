"""Checkpoints and run folders: written whole or not at all, and what is wrong with one is named."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from trtkern.training import checkpoint, folder, plan, run


def made(value, epoch=1):
    return checkpoint.Checkpoint({"w": value}, {"epoch": epoch, "text": "ü"}, {"sums": torch.zeros(0)})


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, made(torch.arange(3.0)), 7)
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        checkpoint.save(tmp_path, made(torch.zeros(3), 2), 8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    for place in (path, tmp_path):
        read = checkpoint.load(place)
        assert read.metadata == {"epoch": 1, "text": "ü"} and torch.equal(read.model["w"], torch.arange(3.0))
        assert read.state["sums"].shape == (0,)


def test_the_last_few_checkpoints_stay(tmp_path):
    for step in (1, 20, 300, 4000, 50000):
        checkpoint.save(tmp_path, made(torch.tensor(step), step), step)
    steps = [int(path.stem.split("-")[1]) for path in checkpoint.found(tmp_path)]
    assert steps == [50000, 4000, 300] and checkpoint.load(tmp_path).metadata["epoch"] == 50000


def test_every_dtype_and_layout_comes_back(tmp_path):
    tensors = {
        str(dtype): torch.arange(24).to(dtype).view(2, 3, 2, 2)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    }
    tensors |= {"last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "scalar": torch.tensor(1.5)}
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(tensors, {}, {}), 1)
    read = checkpoint.load(path).model
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path):
    good = checkpoint.save(tmp_path, made(torch.arange(300.0), 1), 1)
    path = checkpoint.save(tmp_path, made(torch.zeros(300), 2), 2)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content, why in (
        (whole[:-200], "damaged or different file"), (b"", "damaged or different file"), (b"nothing", "damaged or dif"),
        (pickle.dumps({"model": 1}), "damaged or different file"), (bytes(flipped), "expected the checksum"),
    ):  # fmt: skip
        path.write_bytes(content)
        for place in (path, tmp_path):
            with pytest.raises(ValueError, match=rf"{why}.*{path.name}"):
                checkpoint.load(place)
        said = []
        assert checkpoint.load(tmp_path, said.append).metadata["epoch"] == 1
        assert len(said) == 1 and path.name in said[0] and good.name in said[0]
    good.unlink()
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(tmp_path, said.append)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a run folder with checkpoint-\*\.safetensors"):
        checkpoint.load(tmp_path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = checkpoint.save(tmp_path, made(torch.zeros(3)), 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected format 2, got 99"):
        checkpoint.load(path)


def test_metrics_are_cut_where_the_checkpoint_is(tmp_path):
    rows = [{"epoch": epoch, "loss": 1.0 / epoch} for epoch in range(1, 5)]
    for row in rows:
        run.append_metrics(tmp_path, row)
    with open(tmp_path / run.METRICS, "a") as file:
        file.write('{"epoch": 5, "lo')
    assert run.read_metrics(tmp_path) == rows
    for epoch, last, left in ((3, rows[2], 3), (3, None, 2), (1, None, 0), (1, rows[0], 1)):
        run.cut_metrics(tmp_path, epoch, last)
        assert run.read_metrics(tmp_path) == rows[:left]


def test_run_folders_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan.make(loss="tet", seed=7)
    names = [str(folder.create(made, None)) for _ in range(3)]
    assert names == ["runs/digits-tet-seed7", "runs/digits-tet-seed7-2", "runs/digits-tet-seed7-3"]
    assert all(folder.read_plan(Path(name)) == made for name in names)
    Path("empty").mkdir()
    assert folder.create(made, "empty") == Path("empty")
    with pytest.raises(ValueError, match="expected an empty or new folder, got runs/digits-tet-seed7,"):
        folder.create(made, names[0])
    folder.discard(Path(names[2]))
    (Path(names[1]) / "metrics.jsonl").touch()
    folder.discard(Path(names[1]))
    assert not Path(names[2]).exists() and [path.name for path in Path(names[1]).iterdir()] == ["metrics.jsonl"]


def test_a_run_is_of_one_process(tmp_path):
    made = plan.make()
    place = folder.create(made, str(tmp_path / "a"))
    folder.hold(place)  # this one has it already
    code = f"from pathlib import Path; from trtkern.training import folder; folder.hold(Path({str(place)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert "expected a run that no other process is at" in done.stderr and done.returncode == 1
    folder.discard(place)
    assert not place.exists()
    place.mkdir()
    assert subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).returncode == 0


def test_a_plan_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a run folder with plan.json, got .*; start the run anew"):
        folder.read_plan(tmp_path)
    for text in ("", "[]", '{"seed": '):
        (tmp_path / folder.PLAN).write_text(text)
        with pytest.raises(ValueError, match=r"expected the plan.json of a run, got "):
            folder.read_plan(tmp_path)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere/run"])
def test_run_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match=f"--run-dir: expected a folder that can be written, got {where}"):
        folder.create(plan.make(), where)
