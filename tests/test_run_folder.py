"""Checkpoints and run folders: written whole or not at all, and what is wrong with one is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from trtkern.training import checkpoint, run, settings


def resolve(**options) -> settings.Settings:
    return settings.resolve(**{"device": "cpu", **options})


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, checkpoint.Checkpoint({"w": torch.arange(3.0)}, {"epoch": 1}))
    before = path.read_bytes()

    def interrupted(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        checkpoint.save(path, checkpoint.Checkpoint({"w": torch.zeros(3)}, {"epoch": 2}))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert checkpoint.load(path).metadata == {"epoch": 1}
    assert torch.equal(checkpoint.load(tmp_path).model["w"], torch.arange(3.0))


class Payload:
    """What a hostile checkpoint would hold."""

    def __reduce__(self):
        return (open, (str(Path(__file__).with_name("payload-ran")), "w"))


def test_checkpoint_runs_nothing_and_bad_files_are_named(tmp_path):
    path = tmp_path / "bad.pt"
    torch.save({"metadata": "{}", "model": Payload()}, path)
    with pytest.raises(ValueError, match=r"damaged or different file .*bad\.pt"):
        checkpoint.load(path)
    assert not Path(__file__).with_name("payload-ran").exists()
    good = tmp_path / "good.pt"
    checkpoint.save(good, checkpoint.Checkpoint({"w": torch.zeros(300)}, {}))
    for content in (good.read_bytes()[:-200], b"", b"nothing", pickle.dumps({"model": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or different file .*bad\.pt"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"expected a run folder with checkpoint\.pt"):
        checkpoint.load(tmp_path)
    torch.save({"metadata": json.dumps({"format": 99}), "model": {}}, path)
    with pytest.raises(ValueError, match="expected format 1, got 99"):
        checkpoint.load(path)


def test_run_folders_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = resolve(loss="tet", seed=7)
    names = [str(run.create(plan, None)) for _ in range(3)]
    assert names == ["runs/digits-tet-seed7", "runs/digits-tet-seed7-2", "runs/digits-tet-seed7-3"]
    assert run.create(plan, "runs/digits-tet-seed7-2") == Path("runs/digits-tet-seed7-2")  # empty: taken
    (Path(names[0]) / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="expected an empty or new folder, got runs/digits-tet-seed7,"):
        run.create(plan, names[0])


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere/run"])
def test_run_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match=f"--run-dir: expected a folder that can be written, got {where}"):
        run.create(resolve(), where)
