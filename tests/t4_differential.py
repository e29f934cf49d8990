"""The mount answers random sequences of system calls as tmpfs and ext4 do."""

from pathlib import Path

import pytest

from benchfs_fuse.testing.differential import ALLOWANCES, check
from benchfs_fuse.testing.sides import Pair

pytest_plugins = ("mounts",)

CALLS_PER_RUN = 60
#: What docs/semantics.md says differs.
OURS = ("atime", "truncate-times", "chown-nothing", "nodev", "unnamed", "ofd-pid")
#: What ext4 does otherwise than tmpfs.
EXT4 = ("allocated", "xattr-ctime", "seekdir")


def compare(workdir: Path, reference: Path, seeds: range, *allowances: str) -> None:
    with Pair(workdir, reference, tuple(ALLOWANCES[name] for name in (*OURS, *allowances))) as pair:
        for seed in seeds:
            check(pair, seed, CALLS_PER_RUN)


@pytest.mark.parametrize("start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in range(5, 40, 5))])
def test_agrees_with_tmpfs(workdir: Path, reference: Path, start: int) -> None:
    compare(workdir, reference, range(start, start + 5), "map-times")


@pytest.mark.parametrize(
    "start", [5000, *(pytest.param(start, marks=pytest.mark.slow) for start in (5005, 5010, 5015))]
)
def test_agrees_with_ext4(workdir: Path, ext4: Path, start: int) -> None:
    compare(workdir, ext4, range(start, start + 5), *EXT4)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 100))
def test_agrees_with_tmpfs_for_long(workdir: Path, reference: Path, start: int) -> None:
    compare(workdir, reference, range(start, start + 100), "map-times")


@pytest.mark.slow
@pytest.mark.parametrize("start", range(6000, 7000, 100))
def test_agrees_with_ext4_for_long(workdir: Path, ext4: Path, start: int) -> None:
    compare(workdir, ext4, range(start, start + 100), *EXT4)
