"""A mount is cut off from some of the daemons and reaches the others: what ends at one of them ends at all."""

import os
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.client import File
from benchfs_fuse.errors import Stale, WouldBlock
from benchfs_fuse.model import LockKind, LockType
from benchfs_fuse.ports import Trimmed
from benchfs_fuse.rpc.memory import MemoryNode
from benchfs_fuse.services.truncations import Truncations

OWNER = 7


async def file_on(whole: Whole, client: Client, daemon_id: int) -> str:
    """Make a file whose inode and first chunk lie with a daemon; return its path."""
    shard_map = whole.cluster.shard_map
    for number in range(64):
        directory = f"/d{daemon_id}-{number}"
        await client.fs.mkdir(directory)
        path = f"{directory}/f"
        async with await client.fs.open(path, os.O_CREAT | os.O_RDWR) as file:
            if shard_map.of_ino(file.ino) == daemon_id == shard_map.of_chunk(file.ino, 0, len(whole.chunks)):
                await file.write(b"precious", 0)
                return path
    raise AssertionError("chance is against it")


async def lock(client: Client, file: File) -> None:
    await client.locks.set(file.ino, OWNER, LockKind.FLOCK, LockType.WRITE)


async def write_late(file: File) -> None:
    await file.write(b"one, late", 0)
    await file.fsync()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
async def test_who_loses_a_lock_writes_nothing_any_more(flags: int, autojump_clock: MockClock) -> None:
    """The daemon of the lock's file hears nothing of its holder, whose data lies elsewhere. flock(1) opens to read."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        guard, data = await file_on(whole, one, 0), await file_on(whole, one, 1)
        held = await one.fs.open(guard, flags)
        await lock(one, held)
        mine = await one.fs.open(data, os.O_RDWR)
        whole.network.partition(one.node, whole.cluster.daemons[0].node)
        async with await two.fs.open(guard, flags) as waiting:
            await lock(two, waiting)
            async with await two.fs.open(data, os.O_RDWR) as theirs:
                await theirs.write(b"two", 0)
                await theirs.fsync()
                with pytest.raises(Stale):
                    await write_late(mine)
                buffer = bytearray(8)
                assert await theirs.read_into(buffer, 0) == 8
                assert buffer == b"twocious"
        assert one.links.expelled.is_set()
        whole.network.heal(one.node, whole.cluster.daemons[0].node)


async def test_who_loses_an_unlinked_file_reads_no_zeros(autojump_clock: MockClock) -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        shard_map = whole.cluster.shard_map
        for number in range(64):  # the inode with one daemon, the chunk with the other
            file = await one.fs.open(f"/f{number}", os.O_CREAT | os.O_RDWR)
            if shard_map.of_ino(file.ino) == 0 and shard_map.of_chunk(file.ino, 0, 2) == 1:
                break
            await file.close()
        await file.write(b"precious", 0)
        await file.close()
        file = await one.fs.open(f"/f{number}")
        await two.fs.remove(f"/f{number}")
        buffer = bytearray(8)
        assert await file.read_into(buffer, 0) == 8
        assert buffer == b"precious"
        whole.network.partition(one.node, whole.cluster.daemons[0].node)
        await trio.sleep(whole.cluster.lease_s * 1.5)
        with pytest.raises(Stale):
            await file.read_into(buffer, 0)
        whole.network.heal(one.node, whole.cluster.daemons[0].node)


async def test_who_does_not_come_back_after_a_restart_is_expelled_everywhere(autojump_clock: MockClock) -> None:
    """Nobody knows what it had locked: the daemon was started anew."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        guard, data = await file_on(whole, one, 0), await file_on(whole, one, 1)
        await lock(one, await one.fs.open(guard))
        mine = await one.fs.open(data, os.O_RDWR)
        whole.network.partition(one.node, whole.cluster.daemons[0].node)
        await whole.cluster.daemons[0].kill()
        await whole.cluster.daemons[0].start()
        whole.network.partition(one.node, whole.cluster.daemons[0].node)
        async with await two.fs.open(guard) as waiting:
            await lock(two, waiting)
            with pytest.raises(Stale):
                await write_late(mine)


def cut_off(whole: Whole, daemon_id: int, *clients: Client) -> list[tuple[MemoryNode, MemoryNode]]:
    """Cut a daemon off from all others and these clients; return what to heal."""
    daemons = whole.cluster.daemons
    others = [daemon.node for daemon in daemons if daemon.daemon_id != daemon_id]
    pairs = [(daemons[daemon_id].node, node) for node in [*others, *[client.node for client in clients]]]
    for pair in pairs:
        whole.network.partition(*pair)
    return pairs


@pytest.mark.parametrize("leases", [0.7, 1.1, 1.7, 4.0])
@pytest.mark.parametrize("holds", [False, True])
async def test_a_daemon_that_is_cut_off_expels_nobody(holds: bool, leases: float, autojump_clock: MockClock) -> None:
    """Its clients are as far away as all other daemons: it is its own network that is gone."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        path = await file_on(whole, one, 0)
        if holds:
            mine = await one.fs.open(path, os.O_RDWR)
            await lock(one, mine)
        pairs = cut_off(whole, 0, one, two)
        await trio.sleep(leases * whole.cluster.lease_s)
        for pair in pairs:
            whole.network.heal(*pair)
        assert await one.fs.listdir("/") == await two.fs.listdir("/")
        if holds:
            await mine.write(b"still", 0)
            await mine.fsync()
            async with await two.fs.open(path) as theirs:
                with pytest.raises(WouldBlock):
                    await two.locks.set(theirs.ino, OWNER, LockKind.FLOCK, LockType.WRITE, wait=False)
        assert not one.links.expelled.is_set()
        assert not two.links.expelled.is_set()


async def test_after_a_daemon_was_cut_off_who_is_silent_is_ended_again(autojump_clock: MockClock) -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        await one.fs.open(await file_on(whole, one, 0))
        pairs = cut_off(whole, 0, one)
        await trio.sleep(2 * whole.cluster.lease_s)
        whole.network.heal(*pairs[0])  # the other daemon is back, the client is not
        await trio.sleep(2 * whole.cluster.lease_s)
        assert one.links.expelled.is_set()


@pytest.mark.parametrize("holds", [False, True])
async def test_a_session_that_held_nothing_is_begun_anew(holds: bool, autojump_clock: MockClock) -> None:
    """A lone daemon cannot tell who of the two is cut off."""
    async with whole_cluster(1) as whole, whole.client() as one:
        file = await one.fs.open("/f", os.O_CREAT | os.O_RDWR)
        if not holds:
            await file.close()
        (pair,) = cut_off(whole, 0, one)
        await trio.sleep(2 * whole.cluster.lease_s)
        whole.network.heal(*pair)
        if holds:
            with pytest.raises(Stale):
                await one.fs.listdir("/")
        else:
            assert await one.fs.listdir("/") == [b"f"]
            await one.fs.mkdir("/d")
        assert one.links.expelled.is_set() == holds


async def test_a_session_ends_though_a_file_that_it_may_have_open_is_being_cut(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon was started anew during the truncation: nobody knows what else the session had open."""
    settled: list[int] = []

    def settle_and_count(self: Truncations, ino: int) -> None:
        settled.append(ino)
        assert len(settled) < 1000, "a file is settled again and again"
        settle(self, ino)

    async def trim_later(ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
        await may_trim.wait()
        return await trim(ino, index, offset, durable=durable)

    settle, may_trim = Truncations.settle, trio.Event()
    monkeypatch.setattr(Truncations, "settle", settle_and_count)
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        daemon, trim = whole.cluster.daemons[0], whole.chunks[1].trim
        monkeypatch.setattr(whole.chunks[1], "trim", trim_later)
        path = await file_on(whole, one, 0)
        mine = await one.fs.open(path, os.O_RDWR)
        await mine.write(bytes(3 * CHUNK), 0)
        await mine.fsync()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(two.files.setattr, mine.ino, size=1))
            await wait_all_tasks_blocked()
            whole.network.partition(one.node, daemon.node)
            await daemon.kill()
            await daemon.start()
            whole.network.partition(one.node, daemon.node)
            await trio.sleep(3 * whole.cluster.lease_s)
            assert one.links.client_id in [session.client_id for session in daemon.sessions.statuses()]
            may_trim.set()
        async with await two.fs.open(path, os.O_RDWR) as theirs:
            await theirs.write(b"again", 0)
        assert one.links.client_id not in [session.client_id for session in daemon.sessions.statuses()]
