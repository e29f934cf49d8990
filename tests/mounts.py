"""Where the tests of a mounted file system find it.

`mountpoint` is a directory on the file system under test, empty and open to everybody; `mountpoint2` the same directory
through a second mount of the same cluster. The cluster (two daemons) and its mounts run for the whole session.
BENCHFS_TEST_DIR names another place to test, BENCHFS_TEST_DIR2 the same through another mount: so the suite can be
tried on tmpfs, which holds whatever POSIX promises.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster

SHARED_MEMORY = Path("/dev/shm")
#: Bytes of the ext4 to compare with: as much as it takes to have a journal.
EXT4_SIZE = 64 << 20


def _fresh(parent: Path) -> Path:
    path = Path(tempfile.mkdtemp(prefix="benchfs-test-", dir=parent))
    path.chmod(0o777)
    return path


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Run a cluster for the tests that leave it as they found it."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def first_mount(request: pytest.FixtureRequest) -> Path:
    """Give a place on the file system under test."""
    if place := os.environ.get("BENCHFS_TEST_DIR"):
        return Path(place)
    cluster: Cluster = request.getfixturevalue("session_cluster")
    return cluster.mount().mountpoint


@pytest.fixture(scope="session")
def second_mount(request: pytest.FixtureRequest, first_mount: Path) -> Path:
    """Give the same place through another mount."""
    if "BENCHFS_TEST_DIR" in os.environ:
        return Path(os.environ.get("BENCHFS_TEST_DIR2", first_mount))
    cluster: Cluster = request.getfixturevalue("session_cluster")
    return cluster.mount().mountpoint


@pytest.fixture
def mountpoint(first_mount: Path) -> Iterator[Path]:
    path = _fresh(first_mount)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def mountpoint2(mountpoint: Path, second_mount: Path) -> Path:
    return second_mount / mountpoint.name


@pytest.fixture
def workdir(mountpoint: Path) -> Path:
    """Give a directory on the file system under test, for the tests that need no more than one."""
    path = mountpoint / "work"
    path.mkdir()
    path.chmod(0o777)
    return path


@pytest.fixture
def plain_dir() -> Iterator[Path]:
    """Give a directory on tmpfs, for the tests of the tools that need no more than any directory."""
    path = _fresh(SHARED_MEMORY)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def reference() -> Iterator[Path]:
    """Give a directory on tmpfs, the file system to compare with."""
    path = _fresh(SHARED_MEMORY)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def ext4() -> Iterator[Path]:
    """Mount a new ext4 where other users reach it, the other file system to compare with."""
    with tempfile.TemporaryDirectory(prefix="benchfs-test-") as name:
        place = Path(name)
        place.chmod(0o755)
        image, disk = place / "image", place / "disk"
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(EXT4_SIZE)
        # ea_inode: attributes of the size that others take too.
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "ea_inode", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        try:
            yield disk
        finally:
            subprocess.run(["umount", disk], check=True)
