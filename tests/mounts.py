"""Where the tests of a mounted file system find it.

`mountpoint` is a directory on the file system under test, empty and open to everybody; `mountpoint2` the same directory
through a second mount of the same cluster. BENCHFS_TEST_DIR names the directory (BENCHFS_TEST_DIR2 the same through the
second mount); without it, both are one directory on tmpfs, which holds whatever POSIX promises.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")


def _fresh(parent: Path) -> Path:
    path = Path(tempfile.mkdtemp(prefix="benchfs-test-", dir=parent))
    path.chmod(0o777)
    return path


@pytest.fixture
def mountpoint() -> Iterator[Path]:
    path = _fresh(Path(os.environ.get("BENCHFS_TEST_DIR", SHARED_MEMORY)))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def mountpoint2(mountpoint: Path) -> Path:
    second = os.environ.get("BENCHFS_TEST_DIR2")
    return Path(second) / mountpoint.name if second else mountpoint


@pytest.fixture
def workdir(mountpoint: Path) -> Path:
    """Give a directory on the file system under test, for the tests that need no more than one."""
    path = mountpoint / "work"
    path.mkdir()
    path.chmod(0o777)
    return path


@pytest.fixture
def reference() -> Iterator[Path]:
    """Give a directory on tmpfs, the file system to compare with."""
    path = _fresh(SHARED_MEMORY)
    yield path
    shutil.rmtree(path)
