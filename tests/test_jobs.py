"""Several processes that train together: the numbers of one that trains alone, and one voice.

``job_checks.py`` has the checks, and says in their docstrings what they are about. All of them run in one start of two
processes and one of four; a test says how one of them went.
"""

from pathlib import Path

import processes
import pytest

FILE = Path(__file__).with_name("job_checks.py")
CHECKS = {
    2: (
        *("losses", "accumulated", "in_parts", "odd_weights", "one_by_one", "shared_statistics", "own_statistics"),
        *("resumed", "refused", "silent"),
    ),
    4: ("losses", "in_parts", "shared_statistics", "refused"),
}
"""By the number of processes."""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return processes.said(FILE, tmp_path_factory.mktemp("jobs"), CHECKS)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in CHECKS.items() for name in names])
def test_processes_are_as_one(said, world, name):
    processes.went_right(said, world, name)
