"""A network that is really cut: daemons in one network namespace, a mount in another, a cable between them.

A second mount lives beside the daemons and sees what becomes of it all.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, cast

import pytest
from cli_help import HELD, holding, tell
from cluster import Mount, Process
from network_cluster import CHANGES, NetworkCluster, ask, check_changes, connected, eventually

from benchfs_fuse.hosts import Cable, Namespace
from benchfs_fuse.registry import Registry, init_registry

#: Every write is under way at once, and waits as long as it takes.
AT_ONCE = ("--gather-bytes-max=0", "--op-timeout=0")


class World(NetworkCluster):
    """Have both daemons at the near end of a cable, a mount there, and one at the far end."""

    def build(self) -> None:
        names = ("near", "far", "other")
        self.near, self.far, self.other = (self.stack.enter_context(Namespace(name)) for name in names)
        self.cable = Cable(self.near, self.far, 1)
        # The other host stands between the two; before anybody starts, as UCX reads the routes once.
        self.other_address = Cable(self.other, self.far, 2).near_address
        third = Cable(self.other, self.near, 3)
        self.near.ip("route", "add", self.other_address, "via", third.near_address)
        self.other.ip("route", "add", self.cable.near_address, "via", third.far_address)
        self.daemons = [self.start_daemon(number, self.near, self.cable.near_address) for number in range(2)]
        self.here = self.mount("here", self.near)
        self.there = self.mount("there", self.far, *AT_ONCE)

    def mend(self) -> None:
        self.cable.mend()

    def cut(self) -> None:
        """Cut the cable, and see that nothing passes any more."""
        assert self.far.reaches(self.address(0))
        self.cable.cut()
        assert not self.far.reaches(self.address(0)) and self.near.reaches(self.address(0))


def told(mount: Mount) -> list[dict[str, Any]]:
    """Return what the daemons say of themselves to a mount."""
    return [cast(dict[str, Any], daemon.status) for daemon in ask(mount).daemons]


def mounts_known(mount: Mount) -> list[set[str]]:
    """Return the mounts that have a session with each daemon."""
    return [{Path(one["label"]).name for one in daemon["sessions"] if one["kind"] == "mount"} for daemon in told(mount)]


@pytest.mark.parametrize(("lease_s", "given_up"), [(60.0, False), pytest.param(15.0, True, marks=pytest.mark.slow)])
def test_a_cut_shorter_than_the_lease_is_a_pause(lease_s: float, given_up: bool) -> None:
    """Without ``given_up``, the connections outlive the cut; with it, the mount gives them up and makes new ones."""
    with World(lease_s) as world:
        here, there = world.near.path(world.here.mountpoint), world.far.path(world.there.mountpoint)
        (here / "work").mkdir()
        with holding(CHANGES, world.there.mountpoint / "work", before=world.far.enter) as working:
            assert int(working.line()) == 0
            world.cut()
            known = world.far.count("Ip", "OutNoRoutes")
            eventually(lambda: world.far.count("Ip", "OutNoRoutes") >= known + 3)  # sent in vain, again and again
            if given_up:
                eventually(lambda: connected(world.there) == [False, False])
            (here / "meanwhile").write_text("nobody here notices")
            world.cable.mend()
            rounds = 0
            tell(working)
            while (line := working.line()) != "end\n":
                rounds = int(line) + 1
        assert rounds > 1
        check_changes(here / "work", rounds)
        check_changes(there / "work", rounds)
        assert (there / "meanwhile").read_text() == "nobody here notices"
        assert mounts_known(world.here) == [{"here", "there"}] * 2
        assert "started anew" not in world.there.log.read_text()


#: Hold a file with something in it, a removed one, and one in a directory, two of them locked; write and lock when told
#: to, and say what became of it.
LATE = """
import errno, fcntl
os.chdir(sys.argv[1])
kept = os.open("kept", os.O_RDWR | os.O_CREAT)
os.write(kept, b"first")
fcntl.lockf(kept, fcntl.LOCK_EX)
os.mkdir("d")
owned = os.open("d/owned", os.O_RDWR | os.O_CREAT)
fcntl.flock(owned, fcntl.LOCK_EX)
gone = os.open("gone", os.O_RDWR | os.O_CREAT)
os.write(gone, bytes(8 << 20))
os.unlink("gone")
os.fsync(kept), os.fsync(gone)
step()
print("writing", flush=True)
for attempt in (
    lambda: os.write(kept, b"late") + (os.fsync(kept) or 0),
    lambda: os.pread(gone, 1, 0),
    lambda: os.write(kept, b"later"),
    lambda: os.mkdir("new"),
    lambda: os.write(owned, b"late") + (os.fsync(owned) or 0),
    lambda: fcntl.lockf(kept, fcntl.LOCK_EX),
    lambda: fcntl.flock(owned, fcntl.LOCK_EX),
):
    try:
        attempt()
        print(0, flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


LATE_ATTEMPTS = 7

#: See that what LATE has locked is locked; wait until it is not, and write there.
HEIR = """
import fcntl
os.chdir(sys.argv[1])
kept, owned = (os.open(name, os.O_RDWR) for name in ("kept", "d/owned"))
for lock, fd in ((fcntl.lockf, kept), (fcntl.flock, owned)):
    try:
        lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        continue
    raise AssertionError("nobody has it locked")
step()
fcntl.lockf(kept, fcntl.LOCK_EX)
fcntl.flock(owned, fcntl.LOCK_EX)
os.write(owned, b"the heir's")
os.fsync(owned)
"""


def allocated(world: World) -> int:
    """Return the bytes that chunks take up in all data directories."""
    files = [file for number in range(2) for file in (world.directory / f"data{number}" / "chunks").rglob("*")]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


@pytest.mark.slow
def test_a_cut_longer_than_the_lease_ends_the_session() -> None:
    with World(lease_s=3.0) as world:
        here = world.near.path(world.here.mountpoint)
        (here / "work").mkdir()
        with (
            holding(CHANGES, world.here.mountpoint / "work", before=world.near.enter) as working,
            holding(LATE, world.there.mountpoint, before=world.far.enter) as late,
            holding(HEIR, world.here.mountpoint, before=world.near.enter) as heir,
        ):
            tell(heir)
            assert allocated(world) >= 8 << 20 and mounts_known(world.here) == [{"here", "there"}] * 2
            world.cut()
            tell(late)
            assert late.line() == "writing\n"
            eventually(lambda: mounts_known(world.here) == [{"here"}] * 2)
            eventually(lambda: all(daemon["orphans"] == daemon["to_drop"] == 0 for daemon in told(world.here)))
            eventually(lambda: allocated(world) < 4 << 20)
            assert (here / "kept").read_bytes() == b"first"
            assert heir.line() == HELD
            world.cable.mend()
            assert [late.line() for _ in range(LATE_ATTEMPTS)] == ["ESTALE\n"] * LATE_ATTEMPTS
            assert late.line() == HELD
            assert (here / "d" / "owned").read_bytes() == b"the heir's"
            tell(working)
            rounds = 0
            while (line := working.line()) != "end\n":
                rounds = int(line) + 1
        check_changes(here / "work", rounds)
        assert rounds > 1  # there was no pause here
        assert "does not know this session any more" in ask(world.there).expelled
        assert "open files are lost, start anew" in world.there.log.read_text()
        world.there.stop()
        assert (here / "kept").read_bytes() == b"first"
        anew = world.far.path(world.mount("anew", world.far).mountpoint)
        assert sorted(os.listdir(anew)) == ["d", "kept", "work"] and (anew / "kept").read_bytes() == b"first"
        assert (anew / "d" / "owned").read_bytes() == b"the heir's"
        assert "ERROR" not in world.here.log.read_text()


@pytest.mark.slow
def test_a_daemon_that_comes_back_at_another_address_is_found_there() -> None:
    with World(lease_s=60.0) as world:
        there = world.far.path(world.there.mountpoint)
        (there / "work").mkdir()
        with holding(LATE, world.there.mountpoint, before=world.far.enter) as held:
            with holding(CHANGES, world.there.mountpoint / "work", before=world.far.enter) as working:
                assert int(working.line()) == 0
                space = os.statvfs(there).f_blocks
                world.daemons[0].kill()
                eventually(lambda: connected(world.there) == [False, True])
                assert os.statvfs(there).f_blocks == space  # df answers all the same
                world.start_daemon(0, world.other, world.other_address)
                rounds = int(working.line())  # of before, or the first that needed it
                tell(working)
                while (line := working.line()) != "end\n":
                    rounds = int(line)
            check_changes(there / "work", rounds + 1)
            addresses = [daemon.address.rpartition(":")[0] for daemon in ask(world.there).daemons]
            assert addresses == [world.other_address, world.cable.near_address]
            tell(held)
            assert held.line() == "writing\n" and [held.line() for _ in range(LATE_ATTEMPTS)] == ["0\n"] * LATE_ATTEMPTS
        assert world.near.path(world.here.mountpoint / "kept").read_bytes() == b"firstlatelater"


def test_daemons_and_mounts_may_live_in_containers(tmp_path: Path) -> None:
    """A process id of one pid namespace says nothing in another one of the same host."""
    init_registry(tmp_path / "registry", 1)
    words = ["--registry-dir", str(tmp_path / "registry"), "--data-dir", str(tmp_path / "data")]
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    with contextlib.ExitStack() as stack:
        for name in ("first", "second"):
            daemon = Process(
                "benchfs_fuse.daemon", [*words, "--listen=127.0.0.1"], tmp_path / "daemon.log", before=container
            )
            stack.callback(daemon.kill)
            daemon.wait_ready()
            with Registry(tmp_path / "registry") as registry:
                assert registry.missing() == {}
                found = registry.find(0)
                assert found is not None and found.process.pid == 1
            mountpoint = tmp_path / name
            mountpoint.mkdir()
            mount = Mount(tmp_path / "registry", mountpoint, tmp_path / f"{name}.log")
            stack.callback(mount.stop)
            mount.wait_ready()
            (mountpoint / name).write_text(name)
            assert mount.stop() == 0
            daemon.kill()
        assert "also mounted" not in (tmp_path / "second.log").read_text()  # nobody takes the first for alive
