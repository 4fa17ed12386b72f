"""Checkpoints and run folders: written whole or not at all, and what is wrong with one is named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from safetensors.torch import save as serialise

from trtkern.training import checkpoint, folder, plan, run, selection


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


def row(number, **changes):
    """A row of metrics.jsonl."""
    averages = {"loss": 1.0 / number, "cross_entropy": 1.0, "mse": 0.5, "regularizer": 0.0, "accuracy": 0.5}
    made = {"epoch": number, "step": 9 * number, "lr": 0.1, "train": averages, "test": averages, "seconds": 1.0}
    return {**made, "samples_per_s": 10.0, "loader_share": 0.1, "firing": {"a": 0.25}, **changes}


def test_metrics_are_cut_where_the_checkpoint_is(tmp_path):
    rows = [row(epoch) for epoch in range(1, 5)]
    for one in rows:
        run.append_metrics(tmp_path, one)
    with open(tmp_path / run.METRICS, "a") as file:
        file.write('{"epoch": 5, "lo')
    said = []
    assert run.read_metrics(tmp_path, said.append) == rows and not said
    for epoch, last, left in ((3, rows[2], 3), (3, None, 2), (1, None, 0), (1, rows[0], 1)):
        run.cut_metrics(tmp_path, epoch, last)
        assert run.read_metrics(tmp_path) == rows[:left]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\x00\x80", "decode"),
        (b"[1, 2]", "a list where an object should stand"),
        (b"{" + b'"a":[' * 100_000, "nested too deeply|Expecting"),
        (json.dumps({"epoch": 2}).encode(), "step: expected an integer of at least 1, got None"),
        (json.dumps(row(2, epoch="2")).encode(), "epoch: expected an integer of at least 1, got '2'"),
        (json.dumps(row(2, epoch=True)).encode(), "epoch: expected an integer of at least 1, got True"),
        (json.dumps(row(2, lr=float("nan"))).encode(), "lr: expected a finite number, got nan"),
        (json.dumps(row(2, seconds=10**400)).encode(), "seconds: expected a finite number, got 1000"),
        (json.dumps(row(2, train={"loss": 1.0})).encode(), "train: expected finite numbers of loss, cross_entropy"),
        (json.dumps(row(2, test=3)).encode(), "test: expected finite numbers of"),
        (json.dumps({k: v for k, v in row(2).items() if k != "test"}).encode(), "expected validation or test"),
        (json.dumps(row(1, lr=7.0)).encode(), "epoch 1 has a row already"),
    ],
)
def test_a_bad_line_is_named_and_the_good_rows_stay(tmp_path, line, why):
    good = [row(1), row(3)]
    text = [json.dumps(good[0]).encode(), line, json.dumps(good[1]).encode(), b""]
    (tmp_path / run.METRICS).write_bytes(b"\n".join(text))
    said = []
    assert run.read_metrics(tmp_path, said.append) == good
    (only,) = said
    assert only.startswith(f"line 2 of {tmp_path / run.METRICS} is no row of a run (")
    assert re.search(why, only), only
    run.cut_metrics(tmp_path, 4, None)
    assert run.read_metrics(tmp_path) == good


def test_a_result_that_is_damaged_is_none(tmp_path):
    for text in ("", "[]", "[" * 200_000, '{"test": 3}', '{"test": {"accuracy": 1.0}}'):
        (tmp_path / run.RESULT).write_text(text)
        assert run.read_result(tmp_path) is None


def test_what_only_looks_like_a_checkpoint_is_passed_over(tmp_path):
    good = checkpoint.save(tmp_path, made(torch.zeros(3), 1), 1)
    (tmp_path / "checkpoint-00000004.safetensors").mkdir()
    os.mkfifo(tmp_path / "checkpoint-00000003.safetensors")
    (tmp_path / "checkpoint-00000002.safetensors").symlink_to("gone")
    said = []
    assert checkpoint.load(tmp_path, said.append).metadata["epoch"] == 1
    assert ["a folder" in said[0], "no file" in said[1], "no file" in said[2]] == [True] * 3 and len(said) == 3
    assert checkpoint.found(tmp_path) == [good] and selection.chosen(tmp_path, None).metadata["epoch"] == 1
    for step in (5, 6, 7):  # nor does it stand in the way
        checkpoint.save(tmp_path, made(torch.zeros(3), step), step)
    assert [checkpoint.step_of(path) for path in checkpoint.found(tmp_path)] == [7, 6, 5]


@pytest.mark.parametrize("where", ["the metadata", "the header"])
def test_json_that_is_nested_too_deeply_is_damage(tmp_path, where):
    good = checkpoint.save(tmp_path, made(torch.zeros(3), 1), 1)
    deep = '{"a":' * 200_000 + "1" + "}" * 200_000
    if where == "the metadata":
        content = serialise({"model.w": torch.zeros(3)}, {"trtkern": deep, "sha256": ""})
    else:
        content = len(deep).to_bytes(8, "little") + deep.encode()
    (tmp_path / "checkpoint-00000002.safetensors").write_bytes(content)
    said = []
    assert checkpoint.load(tmp_path, said.append).metadata["epoch"] == 1
    assert "checkpoint-00000002" in said[0] and good.name in said[0]
    (tmp_path / folder.PLAN).write_text(deep)
    with pytest.raises(ValueError, match=r"expected the plan.json of a run, got .*nested too deeply"):
        folder.read_plan(tmp_path)


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


def test_processes_that_are_started_anew_go_on_with_what_they_had(tmp_path, monkeypatch):
    """Not with an older run of the same plan: those that died before they had a folder had none."""
    monkeypatch.chdir(tmp_path)
    asked = plan.make()
    older = folder.create(asked, None)
    new, begun = folder.taken_up(asked, None, None)
    assert not begun and new == Path(f"{older}-2")
    assert folder.taken_up(asked, None, str(new)) == (new, True)
    assert folder.taken_up(asked, None, "runs/gone") == (Path(f"{older}-3"), False)
    assert folder.taken_up(asked, str(older), None) == (older, False)


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


# File systems that cannot do everything


def no_fsync_of_folders(number):
    """os.fsync where it is refused for folders with that error."""
    fsync = os.fsync

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    return refusing


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", no_fsync_of_folders(number))
    place = folder.create(plan.make(), str(tmp_path / "a"))
    checkpoint.save(place, made(torch.zeros(3)), 1)
    run.append_metrics(place, row(1))
    assert folder.read_plan(place) and checkpoint.load(place).metadata["epoch"] == 1
    assert not [path for path in place.iterdir() if path.name.endswith(".part")]


def test_a_disk_that_is_full_when_a_folder_is_flushed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_fsync_of_folders(errno.ENOSPC))
    words = f"train: expected to write {tmp_path}/a/plan.json, got No space left on device; make room on that disk"
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        folder.create(plan.make(), str(tmp_path / "a"))
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "a").exists(), "nothing stays in the way"
    monkeypatch.undo()
    assert folder.create(plan.make(), str(tmp_path / "a")).is_dir()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, monkeypatch, capsys, number):
    def refuse(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    place = folder.create(plan.make(), str(tmp_path / "a"))
    assert f"trtkern: the file system of {place} has no locks ({os.strerror(number)})" in capsys.readouterr().err
    part = place / ".config.json.part"
    part.touch()
    folder.hold(place)
    assert part.exists() and not capsys.readouterr().err, "said once; another process may be at that file"
    folder.discard(place)


def test_a_lock_that_fails_is_named(tmp_path, monkeypatch):
    def fail(handle, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=f"train: expected to lock {tmp_path}, got Input/output error"):
        folder.hold(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a run folder that can be read .*gone, got No such file"):
        folder.hold(tmp_path / "gone")


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    mine = [".plan.json.part", ".checkpoint-00000007.safetensors.part", ".best-00000007.safetensors.part"]
    others = [".notes.part", "checkpoint.part", ".plan.json.part.old"]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    folder.hold(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    (tmp_path / mine[0]).touch()
    folder.hold(tmp_path)
    assert (tmp_path / mine[0]).exists(), "of this process, which is alive"
    new = tmp_path / "new"
    new.mkdir()
    (new / ".plan.json.part").touch()  # killed while it wrote its plan: nothing was begun
    assert folder.create(plan.make(), str(new)) == new


def test_a_folder_that_holds_a_run_names_the_way_on(tmp_path):
    folder.create(plan.make(), str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"which holds a run; `trtkern train --resume .*a` goes on with it"):
        folder.create(plan.make(), str(tmp_path / "a"))
