"""Worker processes: what they need, and what is said when one dies, hangs or the user stops; nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
from image_files import write_folder
from patience import PATIENCE, no_hang

from trtkern import cli
from trtkern.data.folder import ImageFiles
from trtkern.training import checkpoint, workers
from trtkern.training.workers import WorkerError, ahead

MAIN = os.getpid()
READ = ImageFiles.read


@pytest.fixture(autouse=True)
def _no_hang():
    """What waits for ever fails its test instead of the whole run, and leaves no process."""

    with no_hang():
        yield
    assert not multiprocessing.active_children()


def batch(step: int) -> torch.Tensor:
    return torch.full((5, 1 + step % 2), step, dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_batches_come_in_order(count):
    with closing(ahead(batch, 11, count, 10)) as made:
        for step, got in enumerate(made):
            assert torch.equal(got, batch(step))
    assert step == 10


def test_no_file_of_shared_memory_is_opened():
    """Of the process and of its workers: where there is none, nothing can be too small."""

    def mapped(process):  # a lock that another test has not let go yet is there before
        return {line for line in Path(f"/proc/{process}/maps").read_text().splitlines() if "/dev/shm/" in line}

    def opened(process):
        for path in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since the folder was listed, as the folder's own is
                yield str(path.readlink())

    before = mapped("self")
    with closing(ahead(batch, 11, 2, 10)) as made:
        next(made)
        for process in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
            assert mapped(process) <= before
            assert not {path for path in opened(process) if path.startswith("/dev/shm")}


def test_a_small_dev_shm_is_enough():
    """1 MiB, with batches of 3 MiB: 64 MB is what a container of Docker has."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    code = (
        "import torch, trtkern.training.workers as w\n"
        "made = w.ahead(lambda step: torch.full((3 << 20,), step, dtype=torch.uint8), 6, 2, 3 << 20)\n"
        "print([int(got.sum()) >> 20 for got in made])"
    )
    done = subprocess.run([*small, sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 3, 6, 9, 12, 15]\n", "")


def test_no_memory_is_said_with_the_numbers(monkeypatch):
    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(workers.mmap, "mmap", refuse)
    with pytest.raises(WorkerError, match=r"expected 12 MiB of memory for 2 workers x 2 batches of 3\.0 MiB, got none"):
        next(ahead(batch, 6, 2, 3 << 20))


def hang_up():
    """Also where the tests were started by nohup, which has the signal ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL, as the kernel does where memory runs out"),
        (hang_up, "killed by SIGHUP"),
        (lambda: os._exit(3), "ended with status 3"),
    ],
)
def test_a_worker_that_ends_is_said(end, said):
    def make(step):
        return end() if step == 3 else batch(step)

    came = []
    with pytest.raises(
        WorkerError, match=f"expected worker 2 of 2 to decode images to the end, got it {said}; use fewer --workers"
    ):
        came.extend(int(got[0, 0]) for got in ahead(make, 6, 2, 10))
    assert came == [0, 1, 2]


def test_an_exception_of_a_worker_is_raised_as_it_is():
    def make(step):
        raise ZeroDivisionError("of step 0")

    with pytest.raises(ZeroDivisionError, match="of step 0"):
        next(ahead(make, 6, 2, 10))


def test_a_worker_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    monkeypatch.setattr(workers, "LOOK", 0.01)
    with pytest.raises(WorkerError, match="expected a batch within 0 s, got none from worker 1 of 1"):
        next(ahead(lambda step: time.sleep(600), 1, 1, 10))


def test_the_user_may_stop_while_a_batch_is_waited_for():
    asked = iter([False, True])
    assert list(ahead(lambda step: time.sleep(600), 1, 1, 10, lambda: next(asked))) == []


def train(folder: Path, monkeypatch, read, *more: str) -> tuple[int, Path]:
    """Train on 9 tiny images through one worker that reads images with ``read``."""
    monkeypatch.setattr(ImageFiles, "read", read)
    (folder / "recipe.toml").write_text(
        'data = "imagenet"\ntimesteps = 1\nepochs = 3\nbatch_size = 3\nlr = 1e-3\nselect = "last"\n'
        'augment = [{name = "resized_crop", size = 16}]\nmodel = {name = "topology", layers = "CONV-2-3-1-1"}\n'
        'loss = {name = "sdt"}\n'
    )
    data = write_folder(folder / "data")
    options = ["--recipe", str(folder / "recipe.toml"), "--data-dir", str(data), "--workers", "1", "--device", "cpu"]
    return cli.main(["train", *options, "--run-dir", str(folder / "run"), *more]), folder / "run"


def later(folder: Path, what):
    """Read as always, but do that in a worker of training when the run has a checkpoint."""

    def read(self, index, crop=None, seed=None):
        if os.getpid() != MAIN and crop is not None and checkpoint.found(folder / "run"):
            what()
        return READ(self, index, crop, seed)

    return read


def test_a_killed_worker_ends_a_run_with_a_line(tmp_path, monkeypatch, capsys):
    status, folder = train(tmp_path, monkeypatch, later(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    (kept,) = checkpoint.found(folder)
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1
    assert error.startswith(
        "trtkern: loader: expected worker 1 of 1 to decode images to the end, got it killed by SIGKILL"
    )
    assert "--workers" in error and f"the last good checkpoint is {kept}" in error


def test_ctrl_c_ends_a_run_that_waits_for_a_batch(tmp_path, monkeypatch, capsys):
    def hang():
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)

    status, folder = train(tmp_path, monkeypatch, later(tmp_path, hang))
    assert status == 130 and "stopped in epoch 2 after step 0 of 3, as asked" in capsys.readouterr().err
    monkeypatch.setattr(ImageFiles, "read", READ)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    capsys.readouterr()

    def die(self, index, crop=None, seed=None):
        return READ(self, index, crop, seed) if os.getpid() == MAIN else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageFiles, "read", die)
    assert cli.main(["evaluate", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trtkern: loader: expected worker 1 of 1 to decode") and error.count("\n") == 1
