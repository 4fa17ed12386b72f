"""A kernel that was compiled before is launched without Triton's search for it, and it is the one that Triton finds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """That of ``compiled_launches.py``, which must not run in the interpreter as the tests here do."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_launches.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_no_launch_takes_a_stale_kernel(report):
    assert report["wrong"] == []


def test_triton_is_asked_once_for_each_launch_of_its_kind(report):
    """Every launch was made twice in each setting; no more is asked than there are launches that differ."""
    assert report["launched"] == 2 * len(report["kernels"])
    assert len(set(report["kernels"].values())) <= report["asked"] <= len(report["kernels"])


@pytest.mark.parametrize(
    "change",
    [
        "dtype",
        "alignment",
        "size",
        "stride",
        "steps",
        "edges",
        "neuron",
        "options",
        "flag",
        "state",
        "parameters",
        "lengths",
    ],
)
def test_what_selects_code_is_another_kernel(report, change):
    kernels = report["kernels"]
    assert kernels[f"forward {change} 0 False"] != kernels["forward first 0 False"]


def test_a_device_and_a_debugger_have_their_own(report):
    kernels = report["kernels"]
    assert len({kernels[f"forward first {device} {debug}"] for device in (0, 1) for debug in (False, True)}) == 4
