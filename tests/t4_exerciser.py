"""Every byte of one file is right through random changes, on one mount and across two."""

import os
from pathlib import Path

import pytest

from benchfs_fuse.testing.exerciser import Mode, exercise
from benchfs_fuse.testing.sides import space_modes

pytest_plugins = ("mounts",)

OPS = {Mode.MIXED: 600, Mode.DIRECT: 300, Mode.REGIONS: 60, Mode.APPEND: 60}
LONG = 10


def test_space_is_exercised_where_it_is_managed(mountpoint: Path) -> None:
    """Without the companion library the other operations are."""
    managed = os.environ.get("BENCHFS_MOUNT_COMPANION") != "false"
    assert space_modes(mountpoint) == ({0, 1, 3, 16, 17} if managed else set())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_byte_on_one_mount(mountpoint: Path, mode: Mode, seed: int) -> None:
    exercise(mode, mountpoint, None, seed, OPS[mode])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_byte_across_two_mounts(mountpoint: Path, mountpoint2: Path, mode: Mode, seed: int) -> None:
    exercise(mode, mountpoint, mountpoint2, seed, OPS[mode])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 12))
@pytest.mark.parametrize("mode", list(Mode))
def test_every_byte_in_long_runs(mountpoint: Path, mountpoint2: Path, mode: Mode, seed: int) -> None:
    exercise(mode, mountpoint, None, seed, OPS[mode] * LONG)
    exercise(mode, mountpoint, mountpoint2, seed, OPS[mode] * LONG)
