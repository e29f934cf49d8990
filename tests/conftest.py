"""What every test level shares: the choice of tests, the devices that they need, and the counts at the end."""

import functools
import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings

from benchfs_fuse import doctor

LEFT_OUT_WITHOUT_ALL = ("slow", "exhaustive")

#: Set by .ci/run: there a missing device fails the tests that need it. Elsewhere it skips them, saying so at the end.
REQUIRE_DEVICES = "BENCHFS_REQUIRE_DEVICES"

#: Levels that work with real devices.
DEVICE_LEVELS = ("t4_", "t5_")

_LEFT_OUT = "benchfs_left_out"
_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow or exhaustive too")


def pytest_configure(config: pytest.Config) -> None:
    """Make the default run the same each time, with failures that are cheap to report.

    Random plans are drawn anew with --all only: exploring is its work, while the default run guards what was reached.

    Where CI is set, pytest draws the whole difference of two long byte strings, for minutes; it names the first byte
    that differs without that (pytest 9.2, `running_on_ci`).
    """
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    # Programs in the background of a shell start with interrupts ignored, and so do all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("same", derandomize=True, database=None, print_blob=True)
    settings.register_profile("anew", print_blob=True)
    settings.load_profile("anew" if config.getoption("--all") else "same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the dear tests unless --all asks for them."""
    if config.getoption("--all"):
        return
    dear = [item for item in items if any(item.get_closest_marker(name) for name in LEFT_OUT_WITHOUT_ALL)]
    if dear:
        items[:] = [item for item in items if item not in dear]
        config.hook.pytest_deselected(items=dear)
    config.stash[_left_out] = len(dear)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where several processes share the tests, tell the one that prints the end how many were left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_LEFT_OUT] = session.config.stash.get(_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear that from a process that has ended; one that crashed says nothing."""
    left_out = getattr(node, "workeroutput", {}).get(_LEFT_OUT, 0)
    node.config.stash[_left_out] = max(left_out, node.config.stash.get(_left_out, 0))


@functools.cache
def missing_devices() -> str:
    """Name the devices that tests need and this machine lacks; empty if none."""
    checks = (doctor.check_fuse_device(), doctor.check_io_uring())
    return "; ".join(f"{check.name} {check.found}" for check in checks if check.level == "fail")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a test whose devices are missing, before any fixture trips over it."""
    if item.path.name.startswith(DEVICE_LEVELS) and missing_devices():
        refuse = pytest.fail if os.environ.get(REQUIRE_DEVICES) else pytest.skip
        refuse(missing_devices())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the counts, zeros included; `-ra` in setup.cfg has printed each skip's and expected failure's reason."""

    def count(*categories: str) -> int:
        reports: list[Sequence[object]] = [terminalreporter.stats.get(category, ()) for category in categories]
        return sum(map(len, reports))

    terminalreporter.write_line(
        f"{count('passed')} passed, {count('failed', 'error')} failed, {count('skipped')} skipped, "
        f"{count('xfailed')} expected failures"
    )
    left_out = config.stash.get(_left_out, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} slow or exhaustive tests left out: scripts/test --all runs them")
