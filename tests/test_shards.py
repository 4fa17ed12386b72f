"""Several processes, each with its part of a model: the same numbers as one process with all of it.

``shard_checks.py`` has the checks, and says in their docstrings what they are about. All of them run in one start of
two processes and one of four; a test says how one of them went.
"""

import re
from pathlib import Path

import processes
import pytest

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
    return processes.said(FILE, tmp_path_factory.mktemp("shards"), CHECKS)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in CHECKS.items() for name in names])
def test_shards(said, world, name):
    processes.went_right(said, world, name)


def test_no_check_is_left_out():
    assert {*CHECKS[2], *CHECKS[4]} == {*re.findall(r"^def (\w+)\(rank, world\):", FILE.read_text(), flags=re.M)}
