"""The command line: what it prints, what it leaves, and how it ends."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_files import fashion_files, write
from patience import PATIENCE

from trtkern import backends, cli, data, selftest
from trtkern.commands import _runs
from trtkern.data import Split
from trtkern.training import checkpoint, run, selection
from trtkern.training.folder import PLAN

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if backends.named("cpu").missing() is None else "reference"
FAST = ["--backend", BACKEND, "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """Each test in a folder of its own, on one thread, at a wide terminal, without changing this process's malloc."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> str:
    """A folder with the four files of a tiny Fashion-MNIST."""
    return str(write(tmp_path_factory.mktemp("fashion"), fashion_files(120, 20), packed=True))


def accuracy(text: str) -> str:
    return re.search(r"test accuracy +│ (\S+ \(\d+ of \d+\))", text)[1]


def test_train_then_evaluate(fashion, capsys):
    options = ["--data", "fashion-mnist", "--data-dir", fashion, "--epochs", "2", "--batch-size", "16", "-T", "2"]
    assert cli.main(["train", *options, "--loss", "tet", "--lr", "1e-3", *FAST]) == 0
    out = capsys.readouterr().out
    folder = Path("runs/fashion-mnist-tet-seed0")
    rows = [json.loads(line) for line in (folder / run.METRICS).read_text().splitlines()]
    assert len(rows) == 2 and all(row["validation"]["accuracy"] >= 0 and "test" not in row for row in rows)
    lines = [line.split() for line in out.splitlines() if re.match(r" +[12]/2 ", line)]
    assert [line[0] for line in lines] == ["1/2", "2/2"]
    assert lines[1][1] == f"{rows[1]['train']['loss']:.4f}"
    printed = accuracy(out)
    reached = json.loads((folder / run.RESULT).read_text())
    assert printed == f"{reached['test']['accuracy']:.2%} ({round(20 * reached['test']['accuracy'])} of 20)"
    (best, *older) = checkpoint.found(folder, selection.BEST)
    assert checkpoint.step_of(best) == rows[reached["epoch"] - 1]["step"]
    names = {best.name, run.METRICS, run.CONFIG, run.CURVES, run.RESULT, run.REPORT}
    assert all(name in out for name in names)
    kept = {path.name for path in (*checkpoint.found(folder), *older)}
    assert {path.name for path in folder.iterdir()} == names | kept | {PLAN}
    config = json.loads((folder / run.CONFIG).read_text())
    assert config["settings"]["timesteps"] == 2 and config["settings"]["lr"] == 1e-3
    assert set(config["backends"].values()) == {BACKEND}

    # The folder, then the file; data from where training had it.
    for what in (folder, best):
        assert cli.main(["evaluate", str(what), "--workers", "2"]) == 0
        assert accuracy(capsys.readouterr().out) == printed
    assert cli.main(["evaluate", str(folder), "--data-dir", "elsewhere"]) == 2
    assert "expected the four Fashion-MNIST files in elsewhere" in capsys.readouterr().err


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("trtkern: "), captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "cifar"], "--data: expected one of digits, fashion-mnist, cifar10, cifar100, imagenet100"),
        (["train", "--loss", "l2"], "--loss: expected one of trt, tet, sdt"),
        (["train", "--backend", "numba"], "--backend: expected one of auto, cpu"),
        (["train", "--device", "tpu"], "--device: expected one of auto, cpu, cuda"),
        (["train", "--device", "cuda:99"], "use --device cpu"),
        (["train", "--epochs", "0"], "--epochs: expected an integer of at least 1, got 0"),
        (["train", "--batch-size", "-1"], "--batch-size: expected"),
        (["train", "--timesteps", "0"], "--timesteps: expected"),
        (["train", "--lr", "nan"], "--lr: expected a finite number above 0, got nan"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["train", "--lrr", "1"], "train: expected one of --recipe, --model, --set, "),
        (["train", "--lrr", "1"], "got '--lrr'; did you mean '--lr'? (`trtkern train --help` explains them)"),
        (["--versoin"], "got '--versoin'; did you mean '--version'?"),
        (["doctor", "--fast"], "doctor: expected one of --json, --help, got '--fast'"),
        (["train", "--lr"], "(try `trtkern train --help`)"),
        (["analyze", "fischer", "x"], "trtkern analyze: expected one of "),
        (["train", "digits"], "(try `trtkern train --help`)"),
        (["train", "--workers", "-1"], "--workers: expected an integer of at least 0, got -1"),
        (["train", "--threads", "0"], "--threads: expected an integer of at least 1, got 0"),
        (["train", "--seeds", "a,b"], "--seeds: expected different integers of at least 0 such as 0,1,2, got 'a,b'"),
        (["train", "--seeds", "0", "--seed", "1"], "--seeds: expected no --seed beside it"),
        (["train", "--run-dir", "full/file"], "got full/file, which is a file"),
        (["train", "--data", "digts"], "got 'digts'; did you mean 'digits'?"),
        (["train", "--loss", "ttr"], "got 'ttr'; did you mean 'trt'?"),
        (["train", "--data", "cifar10", "--data-dir", "gone"], "cifar-10-binary.tar.gz"),
        (["train", "--set", "lrr=1"], "got 'lrr'; did you mean 'lr'?"),
        (["evaluate", "full", "--device", "gpu"], "got 'gpu'; did you mean 'cpu'?"),
        (["evaluate", "full", "--backend", "triton2"], "got 'triton2'; did you mean 'triton'?"),
        (["profile", "vggsn"], "got 'vggsn'; did you mean 'vggsnn'?"),
        (["profile", "--steps", "0"], "--steps: expected an integer of at least 1, got 0"),
        (["bench", "--peers", "snntorhc"], "got 'snntorhc'; did you mean 'snntorch'?"),
        (["bench", "--device", "cuda:99"], "use --device cpu"),
        (["inspect", "--target", "sm_80", "--csv", "full"], "--csv: expected a file in a folder that exists, got full"),
        (["train", "--loss", "sdt", "--delta", "1"], "--delta: expected with --loss trt only"),
        (["train", "--data-dir", "."], "expected no --data-dir"),
        (["train", "--data", "fashion-mnist", "--data-dir", "gone"], "train-images-idx3-ubyte[.gz] (47,040,016 bytes"),
        (["train", "--run-dir", "/proc/nowhere"], "--run-dir: expected a folder that can be written"),
        (["train", "--run-dir", "full"], "--run-dir: expected an empty or new folder, got full"),
        (["evaluate", "gone"], "expected a run folder with checkpoint-*.safetensors or such a file, got gone"),
        (["evaluate", "full/file"], "expected a checkpoint of trtkern, got a damaged or different file"),
        (["evaluate"], "Missing argument"),
        (["evaluate", "gone", "--workers", "-1"], "--workers: expected an integer of at least 0, got -1"),
        (["fly"], "command: expected one of train, sweep, evaluate, "),
        (["trian"], "got 'trian'; did you mean 'train'?"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(capsys, arguments, message):
    Path("full").mkdir()
    Path("full/file").write_text("not a checkpoint")
    assert cli.main(arguments) == 2
    assert message in one_line(capsys)
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_named_backend_that_cannot_run_is_refused_with_its_reason(capsys):
    assert cli.main(["train", "--backend", "cuda"]) == 2
    assert "backend 'cuda' was asked for, but" in one_line(capsys)
    assert not Path("runs").exists()


def test_nan_ends_training_with_status_1_and_names_step_and_layer(capsys, monkeypatch):
    whole = data.load("digits")
    images = whole.train.images[:200].float()
    images[:, 0, 2, 2] = torch.nan
    part = dataclasses.replace(whole, train=Split(images, whole.train.labels[:200]))
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: part)
    assert cli.main(["train", *FAST]) == 1
    error = one_line(capsys)
    assert "NaN or Inf in epoch 1, step 1, first in the membrane potential of layer layers.0.norm" in error
    assert "no checkpoint was written" in error


def test_help_names_every_option(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "evaluate", "doctor"))
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    flags = ("data", "data-dir", "download", "loss", "lam", "delta", "eta", "timesteps", "backend", "device")
    for flag in (
        *flags,
        "recipe",
        "set",
        "seeds",
        "dry-run",
        "resume",
        "threads",
        "seed",
        "epochs",
        "batch-size",
        "lr",
        "amp",
        "select",
        "workers",
        "compile",
        "cuda-graphs",
        "tensorboard",
        "keep-every",
        "observe",
        "observe-every",
        "dvs-resize",
        "cache-dir",
        "class-list",
        "run-dir",
    ):
        assert f"--{flag} " in text
    for said in ("digits, fashion-mnist", "trt, tet, sdt", ", ".join(backends.NAMES), "of the recipe", "cuda:N"):
        assert said in text
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"trtkern \d+\.\d+\.\d+, Python 3\.\d+\.\d+, torch 2\S+, .*\n", capsys.readouterr().out)


def test_doctor_lists_every_backend_and_fails_with_a_failing_one(capsys, monkeypatch):
    rows = [selftest.Row("good", True, "fine"), selftest.Row("gone", None, "get it [there]")]
    monkeypatch.setattr(selftest, "run", lambda: rows)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "get it [there]" in out and "not available" in out and torch.__version__ in out and "CPU" in out
    rows.append(selftest.Row("bad", False, "off by 3"))
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out and "off by 3" in captured.out and "bad" in captured.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_names_the_pip_line(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["train"]) == 2
    said = f"trtkern: {missing} not installed; type: pip install trtkern (`trtkern doctor` runs as it is)\n"
    assert one_line(capsys) == said
    # The message can only be shown if the module itself imports nothing that may be missing.
    tree = ast.parse(Path(cli.__file__).read_text())
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_dry_run_shows_all_and_leaves_nothing(capsys):
    assert cli.main(["train", "--recipe", "digits+l2", "--set", "model.layers=[8]", "--dry-run", *FAST]) == 0
    out = capsys.readouterr().out
    for said in ('"delta": 0.0', "ConvSNN(", "TRTLoss(lam=1e-05, delta=0", "5,218 parameters", "kept for backward: "):
        assert said in out, said
    assert not Path("runs").exists()


def test_missing_matplotlib_is_said_before_any_work(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["train", *FAST]) == 2
    assert "matplotlib not installed; type: pip install 'trtkern[train]'" in one_line(capsys)
    assert not Path("runs").exists()


def test_ctrl_c_ends_the_program_with_a_checkpoint(fashion, capsys):
    options = ["--data", "fashion-mnist", "--data-dir", fashion, "--epochs", "100000", "-T", "1", *FAST]
    code = f"import sys, trtkern.cli; sys.exit(trtkern.cli.main({['train', *options]!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    for line in process.stdout:
        if line.lstrip().startswith("1/100000"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert re.fullmatch(r"trtkern: stopped in epoch \d+ after step 1 of 1, as asked; .*\n", err), err
    folder = "runs/fashion-mnist-trt-seed0"
    assert Path(folder, run.CURVES).is_file() and "validation accuracy" in out and "test accuracy" not in out
    assert not Path(folder, run.RESULT).exists()
    assert cli.main(["evaluate", folder]) == 0
    assert accuracy(capsys.readouterr().out)
