"""The mount answers random sequences of system calls as tmpfs does."""

from pathlib import Path

import pytest

from benchfs_fuse.testing.differential import ALLOWANCES, check
from benchfs_fuse.testing.sides import Pair

pytest_plugins = ("mounts",)

CALLS_PER_RUN = 60
#: What docs/semantics.md says differs.
OURS = tuple(ALLOWANCES[name] for name in ("atime", "truncate-times", "now", "set-id", "chown-nothing", "nodev"))


def compare(workdir: Path, reference: Path, seeds: range) -> None:
    with Pair(workdir, reference, OURS) as pair:
        for seed in seeds:
            check(pair, seed, CALLS_PER_RUN)


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_agrees_with_tmpfs(workdir: Path, reference: Path, start: int) -> None:
    compare(workdir, reference, range(start, start + 10))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 100))
def test_agrees_with_tmpfs_for_long(workdir: Path, reference: Path, start: int) -> None:
    compare(workdir, reference, range(start, start + 100))
