"""Wall clocks that differ by hours and are set again and again: times never run backwards, and deadlines stay."""

import logging
import os
import random
import stat
import time

import pytest
import trio
from trio.testing import MockClock
from whole import CHUNK, Client, whole_cluster

from benchfs_fuse.errors import DaemonUnreachable, Stale
from benchfs_fuse.model import Attrs
from benchfs_fuse.ports import Ending
from benchfs_fuse.rpc.messages import TIME_NOW

HOUR_NS = 3600 * 10**9
#: Longest jump of a clock, and the share of looks at it before which it is set.
JUMP_NS_MAX = 30 * HOUR_NS
JUMP_SHARE = 0.3
OPERATIONS = 60


class WallClock:
    """Be a clock that somebody sets back and forth."""

    def __init__(self, chance: random.Random, ahead_ns: int = 0, share: float = JUMP_SHARE) -> None:
        self._random = chance
        self._ahead_ns = ahead_ns
        self._share = share
        self._real_ns = time.time_ns
        #: How often it was set back.
        self.back = 0

    def __call__(self) -> int:
        if self._random.random() < self._share:
            jump_ns = self._random.randint(-JUMP_NS_MAX, JUMP_NS_MAX)
            self._ahead_ns += jump_ns
            self.back += jump_ns < 0
        return self._real_ns() + self._ahead_ns


class Watched:
    """Do things to names over two mounts, and look at everything after each of them."""

    def __init__(self, clients: tuple[Client, Client], chance: random.Random) -> None:
        self._clients = clients
        self._random = chance
        self._serial = 0
        self._files: list[str] = []
        self._directories = ["", *(f"/d{number}" for number in range(4))]
        self._seen: dict[int, Attrs] = {}

    @property
    def one(self) -> Client:
        return self._random.choice(self._clients)

    async def prepare(self) -> None:
        for path in self._directories[1:]:
            await self.one.fs.mkdir(path)

    def _new(self) -> str:
        self._serial += 1
        return f"{self._random.choice(self._directories)}/f{self._serial}"

    async def step(self) -> None:
        """Change something: its ctime has to be later than it was, and its mtime if its data was changed."""
        path = self._random.choice(self._files) if self._files else ""
        what = self._random.choice(["write", "append", "truncate", "chmod", "touch", "link", "rename"]) if path else ""
        fs = self.one.fs
        match what:
            case "write" | "append":
                flags = os.O_RDWR | (os.O_APPEND if what == "append" else 0)
                async with await fs.open(path, flags) as file:
                    await file.write(b"x" * self._random.choice([10, 2 * CHUNK]), 0)
            case "truncate":
                await fs.setattr(path, size=self._random.randrange(3 * CHUNK), mtime_ns=TIME_NOW)
            case "chmod":
                await fs.setattr(path, mode=self._random.choice([0o600, 0o644]))
            case "touch":
                await fs.setattr(path, atime_ns=TIME_NOW, mtime_ns=TIME_NOW)
            case "link":
                self._files.append(self._new())
                await fs.link(path, self._files[-1])
            case "rename":
                self._files.remove(path)
                self._files.append(self._new())
                await fs.rename(path, self._files[-1])
            case _:
                self._files.append(self._new())
                async with await fs.open(self._files[-1], os.O_CREAT | os.O_EXCL | os.O_RDWR):
                    pass
        await self.look(
            self._files[-1] if what in ("link", "rename", "") else path,
            data=what in ("write", "append", "truncate", "touch"),
            stamped=what not in ("rename", ""),
        )
        if self._random.random() < 0.2:
            self._files.append(self._new())
            async with await self.one.fs.open(self._files[-1], os.O_CREAT | os.O_EXCL | os.O_RDWR):
                pass

    async def look(self, changed: str, *, data: bool, stamped: bool) -> None:
        """See that what was changed is newer than it was, and that nothing is older; a rename may leave the times."""
        ino = (await self.one.fs.stat(changed)).ino
        seen = dict(self._seen)
        for path in [*self._directories, *self._files]:
            attrs = await self.one.fs.stat(path or "/")
            before = seen.get(attrs.ino)
            self._seen[attrs.ino] = attrs
            if before is None:
                continue
            assert attrs.mtime_ns >= before.mtime_ns and attrs.ctime_ns >= before.ctime_ns
            if attrs.ino == ino:
                assert attrs.ctime_ns > before.ctime_ns or not stamped
                assert (attrs.mtime_ns > before.mtime_ns) == data
            elif not stat.S_ISDIR(attrs.mode):  # nobody touched it
                assert (attrs.mtime_ns, attrs.ctime_ns) == (before.mtime_ns, before.ctime_ns)


@pytest.mark.parametrize("seed", range(3))
async def test_times_never_run_backwards_while_clocks_are_set(seed: int) -> None:
    chance = random.Random(seed)
    clocks = [WallClock(chance, -5 * HOUR_NS), WallClock(chance, 7 * HOUR_NS)]
    async with whole_cluster(2, seed, clocks) as whole, whole.client() as one, whole.client() as two:
        watched = Watched((one, two), chance)
        await watched.prepare()
        for _ in range(OPERATIONS):
            await watched.step()
    assert all(clock.back > 5 for clock in clocks)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """Have the one wall clock of this process set before every look at it."""
    clock = WallClock(random.Random(1), share=1.0)
    monkeypatch.setattr(time, "time_ns", clock)
    monkeypatch.setattr(time, "time", lambda: clock() / 1e9)
    return clock


async def test_a_lease_lasts_as_long_as_it_lasts_while_clocks_are_set(
    set_clock: WallClock, autojump_clock: MockClock
) -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        lease_s = whole.cluster.lease_s
        file = await one.fs.open("/f", os.O_CREAT | os.O_RDWR)
        for _ in range(20):
            await trio.sleep(lease_s / 3)
            await file.write(b"x", 0)
            await file.fsync()
        for daemon in whole.cluster.daemons:
            whole.network.partition(one.node, daemon.node)
        await trio.sleep(lease_s * 0.8)
        for daemon in whole.cluster.daemons:
            whole.network.heal(one.node, daemon.node)
        await file.write(b"y", 0)
        await file.fsync()
        for daemon in whole.cluster.daemons:
            whole.network.partition(one.node, daemon.node)
        await trio.sleep(lease_s * 1.2)
        for daemon in whole.cluster.daemons:
            whole.network.heal(one.node, daemon.node)
        with pytest.raises(Stale):
            await file.fsync()
        with pytest.raises(Stale):
            await one.fs.stat("/f")
        assert set_clock.back > 10


async def test_a_deadline_is_as_late_as_it_is_while_clocks_are_set(
    set_clock: WallClock, autojump_clock: MockClock
) -> None:
    async with whole_cluster(1) as whole, whole.client(op_timeout_s=30) as one:
        await whole.cluster.daemons[0].kill()
        for _ in range(3):
            started = trio.current_time()
            with pytest.raises(DaemonUnreachable):
                await one.fs.mkdir("/d")
            assert trio.current_time() == started + 30


async def test_how_long_a_daemon_was_away_is_told_right_while_clocks_are_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    async with whole_cluster(1) as whole, whole.client() as one:
        caplog.set_level(logging.INFO)
        whole.cluster.directory.withdraw(0)
        for channel in list(one.node.channels):
            channel.cut_both(Ending.PEER)
        while one.links.statistics()[0].trouble == "":
            await trio.lowlevel.checkpoint()
        ahead[0] = -3600.0
        address = await whole.cluster.daemons[0].node.listen(whole.cluster.daemons[0].server)
        whole.cluster.directory.publish(0, address)
        await one.links.wait_connected()
        (told,) = [record.getMessage() for record in caplog.records if "is there after" in record.getMessage()]
        assert 0 <= float(told.split()[-2]) < 60
