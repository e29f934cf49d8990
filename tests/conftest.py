"""What every test level shares: the choice of tests, the devices that they need, and the counts at the end."""

from collections.abc import Sequence

import pytest

LEFT_OUT_WITHOUT_ALL = ("slow", "exhaustive")

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow or exhaustive too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the dear tests unless --all asks for them."""
    if config.getoption("--all"):
        return
    dear = [item for item in items if any(item.get_closest_marker(name) for name in LEFT_OUT_WITHOUT_ALL)]
    if dear:
        items[:] = [item for item in items if item not in dear]
        config.hook.pytest_deselected(items=dear)
    config.stash[_left_out] = len(dear)


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
