"""Where files lie, and what a second mount says: promises of docs/semantics.md that need a cluster of one's own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Mount, running_cluster

from benchfs_fuse.limits import KIB, MIB


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as one:
        yield one


@pytest.fixture(scope="module")
def mount(cluster: Cluster) -> Mount:
    return cluster.mount()


def layout_of(file: Path) -> dict[str, Any]:
    """Ask where a file lies, as people do."""
    command = [sys.executable, "-m", "benchfs_fuse.cli", "layout", "--json", str(file)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def test_the_chunk_size_of_a_directory_is_inherited(mount: Mount) -> None:
    directory = mount.mountpoint / "small chunks"
    directory.mkdir()
    os.setxattr(directory, "user.benchfs.chunk_size", b"64K")
    (directory / "below").mkdir()
    for file in (directory / "file", directory / "below" / "file"):
        file.write_bytes(os.urandom(300 * KIB))
        found = layout_of(file)
        assert found["chunk_size"] == 64 * KIB
        assert [chunk["length"] for chunk in found["chunks"]] == [*[64 * KIB] * 4, 44 * KIB]
    assert os.getxattr(directory / "file", "user.benchfs.chunk_size") == b"65536"
    assert "user.benchfs.chunk_size" not in os.listxattr(directory / "file")


def test_a_layout_is_for_ever(mount: Mount) -> None:
    directory = mount.mountpoint / "changed later"
    directory.mkdir()
    content = os.urandom(MIB)
    (directory / "before").write_bytes(content)
    os.setxattr(directory, "user.benchfs.chunk_size", b"65536")
    assert layout_of(directory / "before")["chunk_size"] == 4 * MIB
    assert (directory / "before").read_bytes() == content


def test_chunks_lie_on_all_daemons(mount: Mount) -> None:
    file = mount.mountpoint / "striped"
    file.write_bytes(bytes(16 * MIB))
    found = layout_of(file)
    assert found["size"] == found["allocated"] == 16 * MIB
    rows = [{chunk["daemon"] for chunk in found["chunks"][row : row + 2]} for row in (0, 2)]
    assert rows == [{0, 1}, {0, 1}]


@pytest.mark.parametrize("value", [b"", b"65537", b"1", b"2G", b"lots", b"-65536"])
def test_bad_chunk_sizes_are_refused(mount: Mount, value: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.setxattr(mount.mountpoint, "user.benchfs.chunk_size", value)
