"""Ordinary tools do their work on the mount, and every byte of it is right."""

from pathlib import Path

import pytest

from benchfs_fuse.testing import tools

pytest_plugins = ("mounts",)


def test_cp(workdir: Path, tmp_path: Path) -> None:
    tools.use_cp(workdir, tmp_path)


def test_tar(workdir: Path, tmp_path: Path) -> None:
    tools.use_tar(workdir, tmp_path)


def test_rsync(workdir: Path, tmp_path: Path) -> None:
    tools.use_rsync(workdir, tmp_path)


def test_dd(workdir: Path, tmp_path: Path) -> None:
    tools.use_dd(workdir, tmp_path)


#: Past the cache; all jobs with --all.
QUICK_JOBS = {("io_uring", 1, 8)}


@pytest.mark.parametrize(
    ("engine", "direct", "depth"),
    [pytest.param(*job, marks=() if job in QUICK_JOBS else pytest.mark.slow) for job in tools.FIO_JOBS],
)
def test_fio(workdir: Path, engine: str, direct: int, depth: int) -> None:
    tools.use_fio(workdir, engine, direct, depth)


def test_git(workdir: Path, tmp_path: Path) -> None:
    tools.use_git(workdir, tmp_path)


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(workdir: Path, journal: str) -> None:
    tools.use_sqlite(workdir, journal)


def test_make(workdir: Path) -> None:
    tools.use_make(workdir)


def test_find(workdir: Path, tmp_path: Path) -> None:
    tools.use_find(workdir, tmp_path)


def test_du_and_df(workdir: Path) -> None:
    tools.use_du_and_df(workdir)


def test_shell_append(workdir: Path) -> None:
    tools.use_shell_append(workdir, workdir)


def test_shell_append_across_two_mounts(mountpoint: Path, mountpoint2: Path) -> None:
    tools.use_shell_append(mountpoint, mountpoint2)
