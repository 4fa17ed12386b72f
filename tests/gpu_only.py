"""Plugin of pytest (``-p gpu_only``): of all tests those that only a GPU can run, for as long as there is time.

Kept, in an order that mixes the files, are tests of the backends cuda and triton, tests on a CUDA device, and those
that are skipped for "no GPU". Past the time that ``TRTKERN_UNTIL`` holds (of ``time.time``) the others are skipped, and
the last line but one counts them.
A test that fails is named at once, and tests that are interrupted are named with the time that they had taken: what
comes after may never be written.
"""

import os
import time
import zlib

import pytest

LATE = "out of time"
OURS = ("cuda", "triton")


def wants(item):
    """Whether a test needs a GPU."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(getattr(value, "name", value) in OURS for value in values if isinstance(getattr(value, "name", value), str)):
        return True
    return any(mark.kwargs.get("reason") == "no GPU" for mark in item.iter_markers("skipif"))


class Told:
    """What is said while the tests run; with pytest-xdist, by the process that the others report to."""

    def __init__(self, config):
        self.config, self.running = config, {}

    def _line(self, words):
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\n{words}")

    def pytest_runtest_logstart(self, nodeid):
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid):
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            last = str(report.longrepr).strip().splitlines()[-1:]
            self._line(f"FAILED {report.nodeid} ({report.when}): {' '.join(last)[:200]}")

    def pytest_keyboard_interrupt(self):
        for name, begin in self.running.items():
            self._line(f"interrupted: {name}, after {time.monotonic() - begin:.0f} s")


def pytest_configure(config):
    config.pluginmanager.register(Told(config), "gpu_only_told")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if wants(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    if len({item.path for item in chosen}) > 1:  # of each file some, where the time is up before the end
        chosen.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    items[:] = chosen


def pytest_runtest_setup(item):
    if time.time() > float(os.environ.get("TRTKERN_UNTIL", "inf")):
        pytest.skip(LATE)


def pytest_terminal_summary(terminalreporter):
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    late = sum(isinstance(why, (tuple, list)) and why[2].endswith(LATE) for why in skipped)
    if late:
        terminalreporter.write_line(f"{LATE}: {late} tests were not run; give GPU_MINUTES more")
