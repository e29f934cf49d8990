"""Records of inodes and entries, inode numbers, drafts, locks, and whose store it is: one daemon, no requests."""

import stat

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from benchfs_fuse import disk
from benchfs_fuse.errors import NoSpace, Stale, UserError
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_DEFAULT, SHARDS
from benchfs_fuse.model import ROOT_INO, Attrs, shard_of
from benchfs_fuse.services import inodes as records
from benchfs_fuse.services.identity import daemon_of, open_store
from benchfs_fuse.services.inodes import RESERVE, Inode, Inodes, Row
from benchfs_fuse.services.locks import Blocked, Locks

U64 = st.integers(0, 2**64 - 1)
SHARD_MAP = ShardMap.round_robin(3)


def inodes_over(store: MemoryStore, daemon_id: int = 0, now_ns: int = 1000) -> Inodes:
    return Inodes(store, daemon_id, SHARD_MAP, lambda: now_ns)


def file_of(ino: int, **values: int) -> Inode:
    known = dict.fromkeys(Inode.__struct_fields__[:16], 0)
    return Inode(**{**known, "ino": ino, "mode": stat.S_IFREG | 0o644, "nlink": 1, **values})


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(U64, min_size=16, max_size=16), U64, U64, U64)
def test_an_inode_is_read_as_it_was_written(attrs: list[int], entries: int, cookie: int, xattr_size: int) -> None:
    store = MemoryStore()
    inodes = inodes_over(store)
    known = Attrs(**dict(zip(Attrs.__struct_fields__, attrs, strict=False)), xattrs=xattr_size > 0)
    inode = Inode.of(known)
    inode.entries, inode.next_cookie, inode.xattr_size = entries, cookie, xattr_size
    draft = inodes.draft()
    draft.add(inode)
    draft.write()
    assert inodes.find(inode.ino) == inode
    assert inode.attrs() == known


def test_the_attributes_come_first_in_an_inode() -> None:
    *stored, derived = Attrs.__struct_fields__
    assert list(Inode.__struct_fields__[: len(stored)]) == stored and derived == "xattrs"


@given(st.integers(0, 2**60), st.binary(min_size=1, max_size=255), st.integers(0, 2**60), st.integers(1, 2**40))
def test_a_name_is_found_by_name_and_by_position(parent: int, name: bytes, ino: int, cookie: int) -> None:
    inodes = inodes_over(MemoryStore())
    row = Row(ino, stat.S_IFDIR, cookie)
    draft = inodes.draft()
    draft.put_row(parent, name, row)
    assert draft.row(parent, name) == row
    assert inodes.row(parent, name) is None
    draft.write()
    assert inodes.row(parent, name) == row
    assert inodes.listing(parent, 0, 10) == [(cookie, name, ino, stat.S_IFDIR)]
    assert inodes.listing(parent, cookie - 1, 1) == inodes.listing(parent, 0, 1)
    assert inodes.listing(parent, cookie, 10) == inodes.listing(parent + 1, 0, 10) == []
    draft = inodes.draft()
    draft.drop_row(parent, name, row)
    assert draft.row(parent, name) is None
    draft.write()
    assert inodes.row(parent, name) is None
    assert inodes.listing(parent, 0, 10) == []


@pytest.mark.parametrize("ino", [-1, 1 << 64, 1 << 70])
def test_what_is_no_inode_number_is_stale(ino: int) -> None:
    inodes = inodes_over(MemoryStore())
    for look in (inodes.find, inodes.home, lambda ino: inodes.row(ino, b"name")):
        with pytest.raises(Stale):
            look(ino)


# ── drafts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draft_changes_nothing_until_it_is_written() -> None:
    inodes = inodes_over(MemoryStore())
    first = inodes.draft()
    first.add(file_of(7, version=1))
    assert inodes.find(7) is None
    first.write()
    second = inodes.draft()
    second.stamp(second.inode(7))
    assert inodes.get(7).version == 1
    second.write()
    assert inodes.get(7).version == 2


def test_a_removed_inode_is_still_shown_by_its_draft() -> None:
    inodes = inodes_over(MemoryStore())
    draft = inodes.draft()
    draft.add(file_of(7))
    draft.write()
    draft = inodes.draft()
    inode = draft.inode(7)
    inode.nlink = 0
    draft.stamp(inode)
    draft.remove(inode)
    attrs = draft.attrs(7)
    assert attrs is not None
    assert attrs.nlink == 0
    draft.write()
    with pytest.raises(Stale):
        inodes.get(7)


def test_times_never_run_backwards_and_no_two_changes_share_one() -> None:
    inodes = inodes_over(MemoryStore(), now_ns=500)
    draft = inodes.draft()
    inode = file_of(7, ctime_ns=900, mtime_ns=10**19)
    draft.stamp(inode)
    assert (inode.ctime_ns, inode.mtime_ns, inode.version) == (901, 10**19, 1)
    draft.stamp(inode, data=True)
    assert (inode.ctime_ns, inode.mtime_ns, inode.version) == (902, 902, 2)
    later = inodes_over(MemoryStore(), now_ns=5000).draft()
    later.stamp(inode)
    assert inode.ctime_ns == 5000


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_number_is_given_twice_over_restarts_and_daemons() -> None:
    given_: set[int] = {ROOT_INO}
    for daemon_id in (0, 1, 255):
        store = MemoryStore()
        for _ in range(3):
            inodes = inodes_over(store, daemon_id)
            for count in range(RESERVE + 10):
                ino = inodes.allocate(count % SHARDS)
                assert shard_of(ino) == count % SHARDS
                assert ino not in given_
                given_.add(ino)
            store = MemoryStore(store.contents())


def test_no_number_is_given_twice_over_a_power_cut_that_takes_reservations_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "RESERVE_START", 5 * RESERVE)
    store = MemoryStore()
    given_: set[int] = set()
    for _ in range(3):
        inodes = inodes_over(store)
        inodes.begin()
        synced = store.contents()
        for _ in range(9 * RESERVE):
            ino = inodes.allocate(0)
            assert ino not in given_
            given_.add(ino)
        store = MemoryStore(synced)


def test_numbers_are_reserved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESERVE_START", 5)
    store = MemoryStore()
    inodes = inodes_over(store)
    inodes.begin()
    for writes, numbers in ((1, 5), (2, RESERVE), (3, 1)):
        for _ in range(numbers):
            inodes.allocate(0)
        assert store.writes == writes


def test_when_all_numbers_are_given_there_is_no_space() -> None:
    store = MemoryStore()
    store.write([(disk.COUNTER, ((1 << records.MAKER_SHIFT) - 1).to_bytes(8, "big"))])
    inodes = inodes_over(store)
    assert inodes.allocate(0) == (1 << records.MAKER_SHIFT) - 1
    with pytest.raises(NoSpace):
        inodes.allocate(0)


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_locks_are_shared_or_exclusive() -> None:
    locks = Locks()
    locks.take({b"a": True, b"b": False})
    locks.take({b"b": False})
    for wanted in ({b"a": True}, {b"a": False}, {b"b": True}, {b"c": True, b"b": True}):
        with pytest.raises(Blocked):
            locks.check(wanted)
        with pytest.raises(Blocked):
            locks.take(wanted)
    locks.check({b"b": False, b"c": True})
    with pytest.raises(Blocked):
        locks.check_exclusive(b"b")
    locks.check_exclusive(b"c")
    locks.release({b"b": False})
    with pytest.raises(Blocked):
        locks.check({b"b": True})
    locks.release({b"b": False, b"a": True})
    assert len(locks) == 0
    locks.check({b"a": True, b"b": True})


async def test_acquire_takes_all_or_nothing_when_all_is_free() -> None:
    locks = Locks()
    locks.take({b"a": True})
    locks.take({b"b": False})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(locks.acquire, {b"a": False, b"b": True})
        await wait_all_tasks_blocked()
        locks.release({b"a": True})
        await wait_all_tasks_blocked()
        locks.check({b"a": True, b"b": False})
        locks.release({b"b": False})
    with pytest.raises(Blocked):
        locks.check({b"a": True})
    locks.release({b"a": False, b"b": True})
    assert len(locks) == 0


async def test_a_cancelled_acquire_has_taken_nothing() -> None:
    locks = Locks()
    locks.take({b"a": True})
    with trio.move_on_after(0):
        await locks.acquire({b"b": True, b"a": True})
    locks.release({b"a": True})
    assert len(locks) == 0


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def opened(store: MemoryStore, cluster: str = "c", daemon_id: int = 0) -> int:
    return open_store(store, cluster, daemon_id, SHARD_MAP, CHUNK_SIZE_DEFAULT, 5)


def test_an_empty_store_is_laid_out_with_the_root_where_it_belongs() -> None:
    store = MemoryStore()
    assert daemon_of(store) is None
    assert opened(store) == 1
    assert daemon_of(store) == ("c", 0)
    root = inodes_over(store).get(ROOT_INO)
    assert (root.mode, root.nlink, root.uid, root.gid, root.parent) == (0o40755, 2, 0, 0, ROOT_INO)
    assert (root.chunk_size, root.width, root.ctime_ns) == (CHUNK_SIZE_DEFAULT, 3, 5)
    other = MemoryStore()
    opened(other, daemon_id=1)
    assert inodes_over(other, 1).find(ROOT_INO) is None


def test_every_start_is_another_incarnation_and_changes_nothing_else() -> None:
    store = MemoryStore()
    assert [opened(store) for _ in range(3)] == [1, 2, 3]
    inodes = inodes_over(store)
    draft = inodes.draft()
    draft.stamp(draft.inode(ROOT_INO))
    draft.write()
    before = inodes.get(ROOT_INO)
    opened(store)
    assert inodes.get(ROOT_INO) == before


def test_a_store_of_another_cluster_daemon_or_newer_format_is_refused() -> None:
    store = MemoryStore()
    opened(store)
    before = store.contents()
    with pytest.raises(UserError, match="belongs to cluster c, not to d"):
        opened(store, cluster="d")
    with pytest.raises(UserError, match="belongs to daemon 0, not to daemon 1"):
        opened(store, daemon_id=1)
    store.write([(disk.META + b"format", b"%d" % (disk.FORMAT + 1))])
    with pytest.raises(UserError, match=f"format {disk.FORMAT + 1}"):
        opened(store)
    assert {**before, disk.META + b"format": b"%d" % (disk.FORMAT + 1)} == store.contents()
