"""Plugin of pytest (``-p gpu_only``): of all tests those that only a GPU can run, for as long as there is time.

Kept are tests of the backends cuda and triton, tests on a CUDA device, and those that are skipped for "no GPU". Past
the time that ``TRTKERN_UNTIL`` holds (of ``time.time``) the others are skipped, and the last line but one counts them.
"""

import os
import time

import pytest

LATE = "out of time"
OURS = ("cuda", "triton")


def wants(item):
    """Whether a test needs a GPU."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(getattr(value, "name", value) in OURS for value in values if isinstance(getattr(value, "name", value), str)):
        return True
    return any(mark.kwargs.get("reason") == "no GPU" for mark in item.iter_markers("skipif"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if wants(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_runtest_setup(item):
    if time.time() > float(os.environ.get("TRTKERN_UNTIL", "inf")):
        pytest.skip(LATE)


def pytest_terminal_summary(terminalreporter):
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    late = sum(isinstance(why, (tuple, list)) and why[2].endswith(LATE) for why in skipped)
    if late:
        terminalreporter.write_line(f"{LATE}: {late} tests were not run; give GPU_MINUTES more")
