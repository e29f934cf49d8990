"""Many processes on two mounts at once: afterwards everything is as it must be, and nothing is left."""

import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Mount, running_cluster
from elsewhere import Elsewhere
from posix_help import opened, wait_until
from strain import Strain

from benchfs_fuse.limits import CHUNK_SIZE_MIN

DAEMONS = 2
#: Seconds for what goes on in the background.
DEADLINE_S = 60.0
#: Where the random operations begin: another number gives others.
SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))
#: What the workers fight over.
NAMES = 12
LINE = 64


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster(DAEMONS, chunk_size=CHUNK_SIZE_MIN) as cluster:
        yield cluster
        for log in sorted(cluster.directory.glob("*.log")):  # pytest shows it if the test failed
            sys.stdout.write(f"{log.name}:\n{log.read_text()}\n")


class Fight(Counter[str]):
    """Do random things to names that others use too; count what succeeded. ``number`` tells the fighters apart."""

    def go(self, root: Path, number: int, seconds: float, seed: int) -> "Fight":
        """Go on for some seconds; only what a loser may be told is let pass."""
        rng = random.Random(seed)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            old, new = (root / f"d{rng.randrange(3)}" / f"n{rng.randrange(NAMES)}" for _ in range(2))
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                self._one(rng, root, number, old, new)
        return self

    def _one(self, rng: random.Random, root: Path, number: int, old: Path, new: Path) -> None:
        match rng.randrange(7):
            case 0 | 1:
                with opened(old, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
                    self["made"] += 1
                    os.write(fd, os.urandom(rng.randrange(2 * CHUNK_SIZE_MIN)))
            case 2:
                old.rename(new)
            case 3:
                os.link(old, new)
                self["linked"] += 1
            case 4:
                old.unlink()
                self["unlinked"] += 1
            case 5:
                with opened(old, os.O_RDONLY) as fd:
                    os.pread(fd, CHUNK_SIZE_MIN, 0)
            case _:
                with opened(root / "log", os.O_WRONLY | os.O_APPEND) as fd:
                    os.write(fd, f"{number} {self['lines']}".encode().ljust(LINE - 1) + b"\n")
                    self["lines"] += 1


def at_rest(cluster: Cluster, mount: Mount) -> bool:
    """Tell whether a mount holds nothing, and the daemons hold nothing for anybody and have nothing left to do."""
    report = mount.report()
    mine = report.handles == report.files == report.dirty_files == report.accepted_bytes == 0
    sessions = [session for one in mount.statuses() for session in one["sessions"] if session["kind"] != "daemon"]
    return mine and cluster.at_rest(mount) and all(session["opens"] == 0 for session in sessions)


def stress(cluster: Cluster, seconds: float) -> None:
    sys.stdout.write(f"BENCHFS_TEST_SEED={SEED}\n")
    mounts = [cluster.mount("--attr-timeout", "0"), cluster.mount("--attr-timeout", "0")]
    shared = mounts[0].mountpoint / "shared"
    shared.mkdir()
    (shared / "log").touch()
    for number in range(3):
        (shared / f"d{number}").mkdir()
    with contextlib.ExitStack() as stack:
        straining, fighting = [], []
        for number in range(4):
            mount = mounts[number % 2]
            root = mount.mountpoint / f"own{number}"
            root.mkdir()
            one, other = stack.enter_context(Elsewhere()), stack.enter_context(Elsewhere())
            straining.append(one.start(Strain.go_on, Strain(root, SEED + number), sys.maxsize, seconds))
            fighting.append(other.start(Fight.go, Fight(), mount.mountpoint / "shared", number, seconds, SEED + number))
        strains = [future.result(seconds + DEADLINE_S) for future in straining]
        fights = [future.result(seconds + DEADLINE_S) for future in fighting]
    assert all(strain.done for strain in strains) and all(fight["lines"] for fight in fights)
    # Each sees what the other's processes have done.
    for strain in strains:
        for mount in mounts:
            strain.check(mount.mountpoint / strain.root.name)
    lines = [line.split() for line in (shared / "log").read_text().splitlines()]
    for number, fight in enumerate(fights):
        own = [int(count) for who, count in lines if int(who) == number]
        assert own == list(range(fight["lines"]))
    assert len(lines) * LINE == (shared / "log").stat().st_size
    for mount in mounts:
        wait_until(lambda mount=mount: at_rest(cluster, mount), DEADLINE_S)  # type: ignore[misc]
    names: list[set[str]] = [
        {f"{path.parent.name}/{path.name}/{path.stat().st_ino}" for path in (mount.mountpoint / "shared").glob("d*/*")}
        for mount in mounts
    ]
    assert names[0] == names[1]
    assert cluster.end() == []


def test_many_processes_on_two_mounts(cluster: Cluster) -> None:
    stress(cluster, 4.0)


@pytest.mark.slow
def test_many_processes_on_two_mounts_for_long(cluster: Cluster) -> None:
    stress(cluster, 300.0)
