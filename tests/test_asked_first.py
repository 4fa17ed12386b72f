"""What the command line can say without torch it says before torch is loaded: help, versions, and what is misspelt."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from trtkern import cli

ROOT = Path(__file__).resolve().parent.parent
HELP = [
    ["--version"],
    ["--help"],
    *([name, "--help"] for name in (*cli.EXTRAS, "bench", "inspect", "doctor")),
    *(["analyze", name, "--help"] for name in ("fisher", "gradients", "landscape", "energy", "spikes", "early")),
    ["data", "check", "--help"],
    ["data", "shard", "--help"],
]
WRONG = {
    "trian": "did you mean 'train'",
    "train --lrr 1": "did you mean '--lr'",
    "train --recipe cifra10": "did you mean 'cifar10'",
    "train --recipe digits+l3": "l2",
    "train --data digts": "did you mean 'digits'",
    "train --backend tritn": "did you mean 'triton'",
    "train --loss ttr": "did you mean 'trt'",
    "train --device tpu": "--device: expected one of auto, cpu, cuda, cuda:N, got 'tpu'",
    "train --amp bf17": "did you mean 'bf16'",
    "train --select lats": "did you mean 'last'",
    "train --parallel fspd": "did you mean 'fsdp'",
    "train --observe fischer": "did you mean 'fisher'",
    "train --dvs-resize papre": "did you mean 'paper'",
    "train --set lrr=1": "did you mean 'lr'",
    "train --epochs 0": "at least 1",
    "train --resume gone": "got gone",
    "train --json x.json": "--json: expected --dry-run beside it",
    "train --dry-run --json gone/x.json": "--json: expected a file in a folder that exists",
    "sweep cifra10": "did you mean 'cifar10'",
    "sweep digits --grid lrr=1": "did you mean 'lr'",
    "sweep digits --jsn -": "did you mean '--json'",
    "evaluate gone": "expected a run folder",
    "evaluate gone --backend trion": "did you mean 'triton'",
    "evaluate . --device gpu": "got 'gpu'",
    "report gone": "nothing there",
    "report gone --only fischer": "did you mean 'fisher'",
    "report gone --backend trion": "did you mean 'triton'",
    "analyze fischer gone": "did you mean 'fisher'",
    "analyze fisher gone": "expected a run folder",
    "analyze fisher gone --split tset": "did you mean 'test'",
    "analyze gradients gone --backend trion": "did you mean 'triton'",
    "analyze gradients gone --max-k 0": "--max-k: expected an integer of at least 1, got 0",
    "analyze landscape gone --loss tte": "did you mean 'tet'",
    "analyze landscape gone --method exat": "did you mean 'exact'",
    "analyze energy gone --static onec": "did you mean 'once'",
    "analyze energy gone --zeros cuonted": "did you mean 'counted'",
    "analyze energy gone --integers macs": "did you mean 'mac'",
    "analyze early gone --confidence entrpoy": "did you mean 'entropy'",
    "analyze spikes gone --device gpu": "got 'gpu'",
    "analyze spikes gone --samples 0": "--samples: expected an integer of at least 1, got 0",
    "bench --op lfi": "did you mean 'lif'",
    "bench --neuron LFI": "did you mean 'LIF'",
    "bench --op step --network vgsnn": "did you mean 'vggsnn'",
    "bench --op step --candidates onw": "did you mean 'own'",
    "bench --dtype float33": "did you mean 'float32'",
    "bench --backend tritn": "did you mean 'triton'",
    "bench --direction forward": "did you mean 'fwd'",
    "bench --suite defalt": "did you mean 'default'",
    "bench --part 9/8": "1 <= K <= N",
    "bench --peers snntorhc": "did you mean 'snntorch'",
    "bench --shape 4,x": "whole numbers",
    "bench --device gpu": "got 'gpu'",
    "bench --rounds 0": "at least 1",
    "bench --page gone/x.md": "got gone",
    "inspect --target sm_91": "did you mean 'sm_90'",
    "inspect --op lfi": "did you mean 'lif'",
    "inspect --backend cpu": "expected one of triton, cuda, all",
    "inspect --neuron LFI": "did you mean 'LIF'",
    "inspect --dtype float33": "did you mean 'float32'",
    "inspect --timesteps 0": "at least 1",
    "inspect --csv gone/x.csv": "got gone/x.csv",
    "convert model": "expected module:function",
    "convert gone:net": "no module gone",
    "convert gone:net --check": "expected --input",
    "convert json:loads --checkpoint gone.pt": "got gone.pt: No such file",
    "export gone": "no such file",
    "export gone:net --input 4,2 --onnx x.onnx": "no module gone",
    "data check gone": "got no folder gone",
    "data check . --data imagnet": "did you mean 'imagenet'",
    "data check . --json gone/x.json": "--json: expected a file in a folder that exists",
    "data shard . x --size big": "--size",
}
"""Command lines with something wrong in them, and what is said of it."""
SCRIPT = """
import contextlib, io, json, sys
from trtkern import cli
found = {}
for line in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(line)
    found[" ".join(line)] = [status, err.getvalue(), "torch" in sys.modules]
    assert not found[" ".join(line)][2], line
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """{command line: its status, what it says, whether torch is loaded}, all of one process, which must not load it."""
    lines = [*HELP, *(line.split() for line in WRONG)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(lines), capture_output=True, text=True,
        cwd=tmp_path_factory.mktemp("empty"), env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_help_and_versions_need_no_torch(answers):
    for line in HELP:
        status, said, loaded = answers[" ".join(line)]
        assert (status, said, loaded) == (0, "", False), line


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_before_torch_is_loaded(answers, line):
    status, said, loaded = answers[line]
    assert status == 2 and WRONG[line] in said and said.count("\n") == 1 and not loaded, said


def test_every_command_has_a_wrong_line():
    commands = {*cli.EXTRAS, "bench", "inspect"} - {"profile"}
    assert commands <= {re.split(" ", line)[0] for line in WRONG}
