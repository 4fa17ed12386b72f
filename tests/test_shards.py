"""Several processes, each with its part of a model: the same numbers as one process with all of it.

``shard_checks.py`` has the checks, and says in their docstrings what they are about. All of them run in one start of
two processes and one of four; a test says how one of them went.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

CHECKS = {
    2: (
        *("placements", "added_in_place", "refused", "losses"),
        *("networks", "scalars", "optimised", "half", "whole_again", "misused"),
        *("tensor_parallel", "carried", "local_output"),
        "shared_norm",
    ),
    4: ("placements", "two_dimensions", "hybrid", "whole_again", "carried"),
}
"""By the number of processes."""


FILE = Path(__file__).with_name("shard_checks.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process says of a check, by "world-check-rank": nothing where all was right."""
    folder = tmp_path_factory.mktemp("shards")
    asked = [f"{world}:{','.join(names)}" for world, names in CHECKS.items()]
    command = [sys.executable, str(FILE), str(folder), *asked]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in folder.glob("*-*-*")}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in CHECKS.items() for name in names])
def test_shards(said, world, name):
    wrong = [said.get(f"{world}-{name}-{rank}", "did not come to it") for rank in range(world)]
    assert wrong == [""] * world, "\n".join(wrong)


def test_no_check_is_left_out():
    assert {*CHECKS[2], *CHECKS[4]} == {*re.findall(r"^def (\w+)\(rank, world\):", FILE.read_text(), flags=re.M)}
