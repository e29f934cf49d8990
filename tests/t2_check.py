"""Check whole clusters in one process: planted damage of every kind, changes in between, and what repair must spare."""

import os
import random
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse import disk
from benchfs_fuse.comparison import Category, Finding, NameFacts, Problem
from benchfs_fuse.errors import FsError, InvalidArgument, NotFound
from benchfs_fuse.limits import BODY_MAX
from benchfs_fuse.model import ROOT_INO, ChunkId, make_ino
from benchfs_fuse.ports import StrayFile
from benchfs_fuse.rpc.messages import (
    FindInodes,
    FindInodesReply,
    Finish,
    ListRecords,
    ListRecordsReply,
    RemoveInode,
    RemoveOrphans,
    RemoveOrphansReply,
    Request,
    SweepRecords,
    SweepRecordsReply,
    encode,
)
from benchfs_fuse.services.checking import PREFIXES, Checked, Checker
from benchfs_fuse.services.inodes import Inode

RW = os.O_RDWR | os.O_CREAT
DAEMONS = 3


async def checked(client: Client) -> Checked:
    with trio.fail_after(30):
        return await Checker(client.links).check()


async def problems(client: Client) -> list[tuple[Problem, int]]:
    found = await checked(client)
    assert not found.undecided
    return [(one.problem, one.ino) for one in found.findings]


async def put(client: Client, path: str, chunks: int = 3) -> int:
    """Write a file of some chunks; return its inode."""
    async with await client.fs.open(path, RW) as file:
        await file.write(b"x" * CHUNK * chunks, 0)
        return file.ino


async def workload(client: Client) -> None:
    """Make some of everything: names on several daemons, links, holes, a renamed directory, removed things."""
    fs = client.fs
    for number in range(6):
        await fs.mkdir(f"/d{number}")
        for other in range(5):
            await put(client, f"/d{number}/f{other}", other % 3)
    await fs.link("/d0/f1", "/d1/link")
    await fs.link("/d0/f1", "/d2/link")
    await fs.rename("/d3/f2", "/d4/moved")
    await fs.rename("/d4", "/d5/below")
    await fs.symlink(b"target", "/d0/symlink")
    await fs.setxattr("/d0", b"user.x", b"1")
    await fs.setxattr("/d0/f2", b"user.x", b"1" * 1000)
    await fs.remove("/d0/f3")
    async with await fs.open("/sparse", RW) as file:
        await file.write(b"x", 20 * CHUNK)
        await file.fallocate(30 * CHUNK, 10, 1)
    await fs.setattr("/d1/f2", size=CHUNK // 2)


@asynccontextmanager
async def busy_cluster() -> AsyncIterator[tuple[Whole, Client]]:
    async with whole_cluster(DAEMONS) as whole, whole.client() as client:
        await workload(client)
        yield whole, client


async def at_rest(whole: Whole) -> None:
    await wait_all_tasks_blocked()
    for daemon in whole.cluster.daemons:
        await whole.service(daemon).metadata.wait_idle()
    await wait_all_tasks_blocked()


# ── whole clusters ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_whole_cluster_gives_nothing() -> None:
    async with busy_cluster() as (_, client):
        found = await checked(client)
        assert (found.findings, found.undecided, found.in_use) == ([], [], 0)
        assert len(found.comparison.inodes) == 1 + 6 + 29 + 1 + 1  # root, directories, files, symlink, sparse
        assert found.comparison.name_count == len(found.comparison.inodes) - 1 + 2


async def test_progress_ends_at_the_end() -> None:
    async with busy_cluster() as (_, client):
        came: dict[str, list[float]] = {}
        await Checker(client.links, lambda part, share: came.setdefault(part, []).append(share)).check()
        assert list(came) == ["inodes", "names", "chunks", "files", "records", "again"]
        assert all(shares[-1] == 1.0 and shares == sorted(shares) for shares in came.values())


async def test_what_is_open_is_no_orphan() -> None:
    async with busy_cluster() as (whole, client):
        file = await client.fs.open("/d0/f4", RW)
        await file.write(b"y" * CHUNK, 10 * CHUNK)
        await client.fs.remove("/d0/f4")
        directory = (await client.fs.stat("/d5")).ino
        for open_file in (True, False):
            found = await checked(client)
            assert (found.findings, found.undecided) == ([], [])
            repaired = await Checker(client.links).repair(found.findings)
            assert repaired == {}
            if open_file:
                assert await file.read(10, 10 * CHUNK) == b"y" * 10
                await file.close()
        await at_rest(whole)
        assert directory and await problems(client) == []


async def test_a_file_that_is_being_written_counts_as_in_use() -> None:
    """What is written and not published lies behind the end of the file."""
    async with busy_cluster() as (whole, client), whole.client(gather_bytes_max=0) as other:
        async with await other.fs.open("/new", RW) as file:
            await file.write(b"x" * CHUNK, 0)  # written at once, published later
            found = await checked(client)
            assert (found.findings, found.undecided, found.in_use) == ([], [], 1)
        found = await checked(client)
        assert (found.findings, found.in_use) == ([], 0)


# ── planted damage ───────────────────────────────────────────────────────────────────────────────────────────────────


class Cluster:
    """Get at what the daemons have stored, behind their backs."""

    def __init__(self, whole: Whole, client: Client) -> None:
        self.whole = whole
        self.client = client
        self.map = whole.cluster.shard_map

    def home(self, ino: int) -> int:
        return self.map.of_ino(ino)

    def change(self, ino: int, **changes: int) -> None:
        """Change an inode's record."""
        store, key = self.whole.cluster.daemons[self.home(ino)].store, disk.key(disk.INODE, ino)
        value = store.get(key)
        assert value is not None
        inode = msgspec.msgpack.decode(value, type=Inode)
        store.write([(key, msgspec.msgpack.encode(msgspec.structs.replace(inode, **changes)))])

    def write(self, ino: int, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Change records of the daemon of an inode."""
        self.whole.cluster.daemons[self.home(ino)].store.write(puts, deletes)

    def value(self, ino: int, key: bytes) -> bytes:
        value = self.whole.cluster.daemons[self.home(ino)].store.get(key)
        assert value is not None
        return value

    def drop_name(self, parent: int, name: bytes) -> None:
        """Take a name out of a directory as an unlink does, and leave its inode alone."""
        key = disk.key_name(disk.ENTRY, parent, name)
        position = disk.POSITION + key[1:9] + self.value(parent, key)[8:16]
        self.write(parent, [], [key, position])
        self.change(parent, entries=self.entries(parent) - 1)

    def entries(self, ino: int) -> int:
        return msgspec.msgpack.decode(self.value(ino, disk.key(disk.INODE, ino)), type=Inode).entries

    def put_name(self, parent: int, name: bytes, ino: int, kind: int, cookie: int = 999) -> None:
        row = ino.to_bytes(8, "big") + cookie.to_bytes(8, "big") + kind.to_bytes(2, "big")
        self.write(
            parent,
            [
                (disk.key_name(disk.ENTRY, parent, name), row),
                (disk.key2(disk.POSITION, parent, cookie), row[:8] + row[16:] + name),
            ],
        )
        self.change(parent, entries=self.entries(parent) + 1)

    async def put_chunk(self, daemon: int, ino: int, index: int) -> None:
        await self.whole.stores[daemon].write(ChunkId(ino, index), 0, b"x" * CHUNK)

    def lose_chunk(self, ino: int, index: int) -> int:
        daemon = self.map.of_chunk(ino, index, DAEMONS)
        del self.whole.stores[daemon]._chunks[ChunkId(ino, index)]
        return daemon

    async def ino(self, path: str) -> int:
        return (await self.client.fs.stat(path, follow=False)).ino


GONE = make_ino(11, 5_000_000)
Plant = Callable[[Cluster], Awaitable[list[tuple[Problem, int]]]]


async def _lost_inode(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1/f0")
    cluster.write(ino, [], [disk.key(disk.INODE, ino)])
    return [(Problem.NO_INODE, ino)]


async def _name_of_nothing(cluster: Cluster) -> list[tuple[Problem, int]]:
    cluster.put_name(await cluster.ino("/d1"), b"dangling", GONE, stat.S_IFREG)
    return [(Problem.NO_INODE, GONE)]


async def _wrong_kind(cluster: Cluster) -> list[tuple[Problem, int]]:
    parent, ino = await cluster.ino("/d1"), await cluster.ino("/d1/f0")
    key = disk.key_name(disk.ENTRY, parent, b"f0")
    row = cluster.value(parent, key)
    position = disk.POSITION + key[1:9] + row[8:16]
    kind = stat.S_IFIFO.to_bytes(2, "big")
    cluster.write(parent, [(key, row[:16] + kind), (position, row[:8] + kind + b"f0")])
    return [(Problem.KIND, ino)]


async def _unlisted(cluster: Cluster) -> list[tuple[Problem, int]]:
    parent = await cluster.ino("/d1")
    key = disk.key_name(disk.ENTRY, parent, b"f0")
    cluster.write(parent, [], [disk.POSITION + key[1:9] + cluster.value(parent, key)[8:16]])
    return [(Problem.UNLISTED, 0)]


async def _wrong_link_count(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d0/f1")
    cluster.change(ino, nlink=4)
    return [(Problem.LINKS, ino)]


async def _wrong_entry_count(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1")
    cluster.change(ino, entries=77)
    return [(Problem.ENTRIES, ino)]


async def _wrong_subdirectories(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1")
    cluster.change(ino, nlink=5)
    return [(Problem.ENTRIES, ino)]


async def _wrong_parent(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1")
    cluster.change(ino, parent=await cluster.ino("/d2"))
    return [(Problem.PARENT, ino)]


async def _circle(cluster: Cluster) -> list[tuple[Problem, int]]:
    """Take a directory's name away and give it one below itself."""
    outer, inner = await cluster.ino("/d5"), await cluster.ino("/d5/below")
    cluster.drop_name(ROOT_INO, b"d5")
    cluster.change(ROOT_INO, nlink=2 + 4)
    cluster.put_name(inner, b"d5", outer, stat.S_IFDIR)
    cluster.change(inner, nlink=3)
    cluster.change(outer, parent=inner)
    return [(Problem.CIRCLE, min(outer, inner))]


async def _nameless_directory(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1")
    cluster.drop_name(ROOT_INO, b"d1")
    cluster.change(ROOT_INO, nlink=2 + 4)
    return [(Problem.UNREACHABLE, ino)]


async def _no_target(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d0/symlink")
    cluster.write(ino, [], [disk.key(disk.TARGET, ino)])
    return [(Problem.NO_TARGET, ino)]


async def _unreadable_inode(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await cluster.ino("/d1/f0")
    cluster.write(ino, [(disk.key(disk.INODE, ino), b"\xc1rubbish")])
    return [(Problem.UNREADABLE, ino)]


async def _misplaced_name(cluster: Cluster) -> list[tuple[Problem, int]]:
    parent = await cluster.ino("/d1")
    other = cluster.whole.cluster.daemons[(cluster.home(parent) + 1) % DAEMONS].store
    key = disk.key_name(disk.ENTRY, parent, b"f0")
    other.write([(key, cluster.value(parent, key))])
    return [(Problem.MISPLACED, 0)]


async def _misplaced_chunk(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 1)
    right = cluster.lose_chunk(ino, 0)
    await cluster.put_chunk((right + 1) % DAEMONS, ino, 0)
    return [(Problem.MISPLACED, ino)]


async def _damaged_file(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 2)
    daemon = cluster.map.of_chunk(ino, 1, DAEMONS)
    cluster.whole.inspectors[daemon].troubles[ChunkId(ino, 1)] = "is missing"
    return [(Problem.CHUNK_FILE, ino)]


async def _lost_chunk(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 2)
    cluster.lose_chunk(ino, 1)
    return [(Problem.LOST, ino)]


async def _lost_record(cluster: Cluster) -> list[tuple[Problem, int]]:
    """Lose the record of a chunk and not its file, which is all that is left."""
    ino = await put(cluster.client, "/one", 2)
    daemon = cluster.lose_chunk(ino, 1)
    cluster.whole.inspectors[daemon].stray_files.append(StrayFile(0, "one", ChunkId(ino, 1), CHUNK))
    return [(Problem.LOST, ino), (Problem.LOST_RECORD, ino)]


DAMAGES = [
    _lost_inode,
    _name_of_nothing,
    _wrong_kind,
    _unlisted,
    _wrong_link_count,
    _wrong_entry_count,
    _wrong_subdirectories,
    _wrong_parent,
    _circle,
    _nameless_directory,
    _no_target,
    _unreadable_inode,
    _misplaced_name,
    _misplaced_chunk,
    _damaged_file,
    _lost_chunk,
    _lost_record,
]


@pytest.mark.parametrize("plant", DAMAGES, ids=lambda plant: plant.__name__.strip("_"))
async def test_damage_is_found_and_repair_leaves_it_alone(plant: Plant) -> None:
    async with busy_cluster() as (whole, client):
        wanted = await plant(Cluster(whole, client))
        found = await checked(client)
        assert set(wanted) <= {(one.problem, one.ino) for one in found.findings}
        damage = [one for one in found.findings if one.problem.category is Category.DAMAGED]
        before = [daemon.store.contents() for daemon in whole.cluster.daemons]
        repaired = await Checker(client.links).repair(damage)
        assert repaired == {}
        assert [daemon.store.contents() for daemon in whole.cluster.daemons] == before
        assert [one for one in (await checked(client)).findings if one in damage] == damage


async def _nameless(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/d2/orphan", 5)
    cluster.drop_name(await cluster.ino("/d2"), b"orphan")
    return [(Problem.NAMELESS, ino)]


async def _nameless_empty_directory(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = (await cluster.client.fs.mkdir("/d2/orphan")).ino
    parent = await cluster.ino("/d2")
    cluster.drop_name(parent, b"orphan")
    cluster.change(parent, nlink=2)
    return [(Problem.NAMELESS, ino)]


async def _orphaned_chunks(cluster: Cluster) -> list[tuple[Problem, int]]:
    for index in range(3):
        await cluster.put_chunk(1, GONE, index)
    return [(Problem.CHUNKS, GONE)]


async def _stray_file(cluster: Cluster) -> list[tuple[Problem, int]]:
    cluster.whole.inspectors[2].stray_files.append(StrayFile(0, "stray", ChunkId(GONE, 4), 100))
    return [(Problem.STRAY_FILE, GONE)]


async def _stray_file_of_a_whole_file(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 2)
    cluster.whole.inspectors[2].stray_files.append(StrayFile(0, "stray", ChunkId(ino, 0), 100))
    return [(Problem.STRAY_FILE, ino)]


async def _removed_and_not_open(cluster: Cluster) -> list[tuple[Problem, int]]:
    """Leave an orphan that nobody has open, and that nobody remembers."""
    ino = await put(cluster.client, "/d2/orphan", 2)
    cluster.drop_name(await cluster.ino("/d2"), b"orphan")
    cluster.change(ino, nlink=0)
    return [(Problem.UNUSED, ino)]


async def _removed_and_remembered(cluster: Cluster) -> list[tuple[Problem, int]]:
    ((_, ino),) = await _removed_and_not_open(cluster)
    cluster.write(ino, [(disk.key(disk.DEAD, ino), b"")])
    return [(Problem.UNUSED, ino)]


async def _space_behind_the_end(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 2)
    await cluster.put_chunk(cluster.map.of_chunk(ino, 9, DAEMONS), ino, 9)
    return [(Problem.SPACE, ino)]


async def _uncounted_space(cluster: Cluster) -> list[tuple[Problem, int]]:
    ino = await put(cluster.client, "/one", 2)
    cluster.change(ino, allocated=CHUNK)
    return [(Problem.SPACE, ino)]


async def _records_of_nobody(cluster: Cluster) -> list[tuple[Problem, int]]:
    parent = await cluster.ino("/d2")
    cluster.write(
        GONE,
        [
            (disk.key_name(disk.XATTR, GONE, b"user.x"), b"1"),
            (disk.key(disk.TARGET, GONE), b"target"),
            (disk.key2(disk.WRITE_OPEN, 12345, GONE), b""),
            (disk.key_slot(disk.OUTCOME, 12345, 3), b"outcome"),
        ],
    )
    cluster.write(parent, [(disk.key2(disk.POSITION, parent, 88), bytes(10) + b"ghost")])
    return [(Problem.RECORD, GONE), (Problem.RECORD, GONE), (Problem.RECORD, 12345), (Problem.RECORD, parent)]


LEFT_OVER = [
    _nameless,
    _nameless_empty_directory,
    _orphaned_chunks,
    _stray_file,
    _stray_file_of_a_whole_file,
    _removed_and_not_open,
    _removed_and_remembered,
    _space_behind_the_end,
    _uncounted_space,
    _records_of_nobody,
]


@pytest.mark.parametrize("plant", LEFT_OVER, ids=lambda plant: plant.__name__.strip("_"))
async def test_what_is_left_over_is_found_and_removed(plant: Plant) -> None:
    async with busy_cluster() as (whole, client):
        wanted = await plant(Cluster(whole, client))
        found = await checked(client)
        assert {(one.problem, one.ino) for one in found.findings} == set(wanted)
        assert all(one.problem.category is not Category.DAMAGED for one in found.findings)
        assert set((await Checker(client.links).repair(found.findings)).values()) == {""}
        await at_rest(whole)
        assert await problems(client) == []
        # Everything else is as it was.
        assert await client.fs.listdir("/d1") == [b"f0", b"f1", b"f2", b"f3", b"f4", b"link"]
        async with await client.fs.open("/d1/f4") as file:
            assert await file.read(2 * CHUNK, 0) == b"x" * CHUNK


async def test_space_that_is_removed_comes_back() -> None:
    async with busy_cluster() as (whole, client):
        before = [store._allocated for store in whole.stores]
        await _nameless(cluster := Cluster(whole, client))
        await _orphaned_chunks(cluster)
        assert [store._allocated for store in whole.stores] > before
        found = await checked(client)
        assert sum(one.size for one in found.findings) == 8 * CHUNK
        await Checker(client.links).repair(found.findings)
        await at_rest(whole)
        assert [store._allocated for store in whole.stores] == before


async def test_a_strangers_file_is_named_and_kept() -> None:
    async with busy_cluster() as (whole, client):
        whole.inspectors[0].stray_files.append(StrayFile(0, "notes.txt", None, 3))
        found = await checked(client)
        assert [(one.problem, one.file) for one in found.findings] == [(Problem.STRAY_FILE, "00/notes.txt")]
        assert await Checker(client.links).repair(found.findings) == {}
        assert len(whole.inspectors[0].stray_files) == 1


# ── a cluster in use ─────────────────────────────────────────────────────────────────────────────────────────────────


class Disturbed(Checker):
    """Let something happen before each part of the first look, and before each further look."""

    def __init__(self, client: Client, disturb: Callable[[], Awaitable[None]]) -> None:
        super().__init__(client.links)
        self.disturb = disturb
        self.suspected = 0

    async def _read_inodes(self, daemon: int) -> None:
        await self.disturb()
        await super()._read_inodes(daemon)

    async def _read_names(self, daemon: int, take: Callable[[NameFacts], None]) -> None:
        await self.disturb()
        await super()._read_names(daemon, take)

    async def _read_chunks(self, daemon: int) -> None:
        await self.disturb()
        await super()._read_chunks(daemon)

    async def _look_again(self, suspects: Sequence[Finding]) -> None:
        self.suspected += len(suspects)
        await self.disturb()
        await super()._look_again(suspects)


@pytest.mark.parametrize("seed", range(6))
async def test_a_cluster_in_use_gives_no_false_alarm(seed: int) -> None:
    """Names, links, directories, sizes and chunks change between any two looks; whatever is found is checked twice."""
    async with busy_cluster() as (whole, client), whole.client() as other:
        chance = random.Random(seed)
        count = 0

        async def something() -> None:
            nonlocal count
            fs = other.fs
            count += 1
            here, there = (f"/d{chance.choice((0, 1, 2, 3, 5))}" for _ in range(2))
            match chance.randrange(9):
                case 0:
                    await put(other, f"{here}/n{count}", chance.randrange(4))
                case 1:
                    await fs.mkdir(f"{here}/m{count}")
                case 2:
                    await fs.rename("/d5/below", f"{here}/below")
                    await fs.rename(f"{here}/below", "/d5/below")
                case 3:
                    await fs.remove(f"{here}/{os.fsdecode(chance.choice(await files_in(here)))}")
                case 4:
                    await fs.rename(f"{here}/{os.fsdecode(chance.choice(await files_in(here)))}", f"{there}/r{count}")
                case 5:
                    await fs.link(f"{here}/{os.fsdecode(chance.choice(await files_in(here)))}", f"{there}/l{count}")
                case 6:
                    await fs.setattr(f"{here}/{os.fsdecode(chance.choice(await files_in(here)))}", size=count * 1000)
                case 7:
                    async with await fs.open(f"{here}/w", RW) as file:
                        await file.write(b"x" * CHUNK, chance.randrange(9) * CHUNK)
                case 8:
                    await fs.mkdir(f"{here}/t{count}")
                    await fs.rename(f"{here}/t{count}", f"{there}/s{count}")
                    await fs.rmdir(f"{there}/s{count}")

        async def files_in(path: str) -> list[bytes]:
            return [one.name async for one in other.fs.scandir(path) if stat.S_ISREG(one.kind)]

        async def disturb() -> None:
            for _ in range(chance.randrange(6)):
                with suppress(FsError, IndexError):
                    await something()

        suspected = 0
        for _ in range(3):
            checker = Disturbed(client, disturb)
            with trio.fail_after(60):
                found = await checker.check()
            assert found.findings == []
            suspected += checker.suspected
        assert suspected, "nothing seemed wrong at the first look: the test shows nothing"
        # What is wrong is found all the same.
        planted = await _orphaned_chunks(Cluster(whole, client))
        found = await Disturbed(client, disturb).check()
        assert [(one.problem, one.ino) for one in found.findings] == planted


async def test_an_inode_whose_names_change_all_the_time_is_undecided() -> None:
    async with busy_cluster() as (whole, client), whole.client() as other:
        cluster = Cluster(whole, client)
        ino = await cluster.ino("/d0/f1")
        cluster.change(ino, nlink=7)
        one_at_a_time = trio.Lock()

        async def rename() -> None:
            async with one_at_a_time:
                await other.fs.rename("/d1/link", "/d1/renamed")
                await other.fs.rename("/d1/renamed", "/d1/link")

        with trio.fail_after(30):
            found = await Disturbed(client, rename).check()
        assert found.findings == []
        assert [(one.problem, one.ino) for one in found.undecided] == [(Problem.LINKS, ino)]
        assert await problems(client) == [(Problem.LINKS, ino)]


async def test_a_transaction_under_way_is_waited_for() -> None:
    """A directory's name is there, its inode is not yet: Finish is held up."""
    async with whole_cluster(2) as whole, whole.client() as client, whole.client() as other:
        go_on = trio.Event()
        for daemon in whole.cluster.daemons:
            later = whole.service(daemon).metadata.handlers()[Finish]

            async def held(request: Request, call: object, later: object = later) -> object:
                await go_on.wait()
                return await later(request, call)  # type: ignore[operator]

            daemon.server.register({Finish: held}, {Finish: lambda request, call: None})  # type: ignore[dict-item]
        done = trio.Event()
        async with trio.open_nursery() as nursery:

            async def make() -> None:
                for number in range(2):  # one of them has its inode on the other daemon
                    await other.fs.mkdir(f"/{number}")

            async def look() -> None:
                assert (await checked(client)).findings == []
                done.set()

            nursery.start_soon(make)
            await wait_all_tasks_blocked()
            assert any(whole.service(daemon).metadata.prepared for daemon in whole.cluster.daemons)
            nursery.start_soon(look)
            await wait_all_tasks_blocked()
            assert not done.is_set()
            go_on.set()


async def test_a_pending_drop_is_no_orphan() -> None:
    async with whole_cluster(2) as whole, whole.client() as client:
        ino = await put(client, "/f", 6)
        for store in whole.chunks:
            store.hold = trio.Event()
        await client.fs.remove("/f")
        await wait_all_tasks_blocked()
        held = [await store.inner.drop([]) for store in whole.chunks]
        assert held == [0, 0]
        assert [len(store.contents()) for store in whole.stores] != [0, 0]
        assert await problems(client) == []
        # Nor does a repair that was asked for anything touch it.
        for number in range(2):
            reply = await client.links.to(number).call(RemoveOrphans((ino,)), RemoveOrphansReply)
            assert reply.freed == 0
        for store in whole.chunks:
            assert store.hold is not None
            store.hold.set()
            store.hold = None
        await at_rest(whole)
        assert [len(store.contents()) for store in whole.stores] == [0, 0]


async def test_repair_spares_what_lives() -> None:
    """Whatever the client believes: the daemons look for themselves."""
    async with busy_cluster() as (whole, client):
        cluster = Cluster(whole, client)
        ino = await put(client, "/live", 4)
        for number in range(DAEMONS):
            assert (await client.links.to(number).call(RemoveOrphans((ino,)), RemoveOrphansReply)).freed == 0
        version = (await client.fs.stat("/live")).version
        # A nameless inode that got a name again, one that somebody has open, a directory that has entries.
        with pytest.raises(FsError, match="has changed"):
            await client.links.to(cluster.home(ino)).call(RemoveInode(ino, version - 1), RemoveInode.Reply)
        directory = await cluster.ino("/d1")
        version = (await client.fs.stat("/d1")).version
        with pytest.raises(FsError, match="directory"):
            await client.links.to(cluster.home(directory)).call(RemoveInode(directory, version), RemoveInode.Reply)
        async with await client.fs.open("/d2/held", RW) as file:
            await file.write(b"x" * CHUNK, 0)
            await file.fsync()
            parent = await cluster.ino("/d2")
            cluster.drop_name(parent, b"held")
            found = await checked(client)
            assert [(one.problem, one.ino) for one in found.findings] == [(Problem.NAMELESS, file.ino)]
            assert list((await Checker(client.links).repair(found.findings)).values()) == [""]
            await at_rest(whole)
            assert await file.read(10, 0) == b"x" * 10
            assert await problems(client) == []
        await at_rest(whole)
        assert await problems(client) == []
        with pytest.raises(NotFound):
            await client.fs.stat("/d2/held")
        async with await client.fs.open("/live") as file:
            assert await file.read(4 * CHUNK, 0) == b"x" * 4 * CHUNK


async def test_an_inode_that_gets_a_name_before_it_is_removed_stays() -> None:
    async with busy_cluster() as (whole, client):
        cluster = Cluster(whole, client)
        ino = await put(client, "/d2/orphan", 2)
        parent = await cluster.ino("/d2")
        key = disk.key_name(disk.ENTRY, parent, b"orphan")
        row = cluster.value(parent, key)
        cluster.drop_name(parent, b"orphan")
        found = await checked(client)
        cluster.put_name(parent, b"orphan", ino, stat.S_IFREG, int.from_bytes(row[8:16], "big"))
        await client.fs.link("/d2/orphan", "/d2/second")
        (answer,) = (await Checker(client.links).repair(found.findings)).values()
        assert "has changed" in answer
        assert await problems(client) == []


async def test_orphans_of_a_restarted_daemon_are_waited_for() -> None:
    """While mounts may claim what they had open, and until what nobody claimed was looked at, nothing is unused."""
    async with busy_cluster() as (whole, client):
        file = await client.fs.open("/d0/f2", RW)
        await client.fs.remove("/d0/f2")
        for daemon in whole.cluster.daemons:
            await daemon.kill()
            await daemon.start()
        assert await problems(client) == []
        await file.close()
        await at_rest(whole)
        assert await problems(client) == []


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pages_are_bounded_and_hold_everything() -> None:
    async with whole_cluster(1) as whole, whole.client() as client:
        names = [bytes([97 + number % 26]) * 250 + b"%05d" % number for number in range(1500)]
        for name in names:
            await client.fs.mknod(os.fsdecode(name), stat.S_IFREG | 0o644)
        start, found, pages, more = b"", [], 0, True
        while more:
            page = await client.links.to(0).call(ListRecords(disk.ENTRY, start), ListRecordsReply)
            assert len(encode(page)) <= BODY_MAX and len(page.rows) <= 512
            found += [key[9:] for key, _ in page.rows]
            start, more, pages = page.rows[-1][0] + b"\0", page.more, pages + 1
        assert found == sorted(names)
        assert pages >= 3
        assert await problems(client) == []
        assert (await checked(client)).comparison.name_count == 1500


@pytest.mark.parametrize(
    "request_",
    [
        ListRecords(disk.OUTCOME, b""),
        ListRecords(b"", b""),
        ListRecords(disk.INODE, b"D"),
        SweepRecords(disk.META, b"", True),
        SweepRecords(disk.CHUNK, b"", True),
        FindInodes(tuple(range(257))),
        FindInodes((-1,)),
        FindInodes(((1 << 64) - 1,)),
        RemoveOrphans(((1 << 64) - 1,)),
    ],
    ids=repr,
)
async def test_senseless_requests_are_refused(request_: Request) -> None:
    async with whole_cluster(1) as whole, whole.client() as client:
        before = whole.cluster.daemons[0].store.contents()
        with pytest.raises((InvalidArgument, FsError)):
            await client.links.to(0).call(request_, request_.Reply)
        assert whole.cluster.daemons[0].store.contents() == before


async def test_removing_needs_no_more_than_it_says() -> None:
    """Only records without an owner go, whatever else a sweep finds."""
    async with busy_cluster() as (whole, client):
        cluster = Cluster(whole, client)
        await _unlisted(cluster)
        await _no_target(cluster)
        before = [daemon.store.contents() for daemon in whole.cluster.daemons]
        for number in range(DAEMONS):
            for prefix in PREFIXES:
                await client.links.to(number).call(SweepRecords(prefix, b"", True), SweepRecordsReply)
        assert [daemon.store.contents() for daemon in whole.cluster.daemons] == before


async def test_states_are_those_of_the_inodes_asked_for() -> None:
    async with busy_cluster() as (whole, client):
        cluster = Cluster(whole, client)
        ino = await cluster.ino("/d0/f0")
        reply = await client.links.to(cluster.home(ino)).call(FindInodes((ino, ino + (1 << 30))), FindInodesReply)
        assert [bool(state.record) for state in reply.inodes] == [True, False]
        assert [(state.pending, state.held) for state in reply.inodes] == [(False, False)] * 2
