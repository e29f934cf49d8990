"""The handlers of the FUSE adapter, called without a mount, over a whole cluster in one process."""

import errno
import fcntl
import logging
import math
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, NamedTuple, cast

import msgspec
import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields
from trio.testing import wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse import errors, fuse
from benchfs_fuse.chunks.faulty import Rates
from benchfs_fuse.extras import Extras
from benchfs_fuse.fuse import BenchfsOperations, errno_of, guarded
from benchfs_fuse.model import Attrs, ChunkId, LockKind, LockType, make_ino
from benchfs_fuse.observe import recording
from benchfs_fuse.observe.statistics import Statistics
from benchfs_fuse.rpc.messages import GetAttr, GetXattr, Lookup, ReadDir, SyncChunks, SyncMeta, Touch
from benchfs_fuse.services import namespace
from benchfs_fuse.services.known import Known


class Caller(NamedTuple):
    """Stand for the process behind a request."""

    uid: int = 1000
    gid: int = 1000
    pid: int = 1
    umask: int = 0o022


CTX = cast(RequestContext, Caller())
ROOT_CTX = cast(RequestContext, Caller(0, 0))


class Fields(NamedTuple):
    """Say what a setattr changes."""

    update_atime: bool = False
    update_mtime: bool = False
    update_ctime: bool = False
    update_mode: bool = False
    update_uid: bool = False
    update_gid: bool = False
    update_size: bool = False


class Kernel:
    """Record what the kernel is told, and list directories as it does, with room for ``room`` entries at a time."""

    def __init__(self) -> None:
        self.invalidated: list[tuple[int, bool]] = []
        self.forgotten: list[tuple[int, bytes]] = []
        self.room = 10**6
        self.listed: list[tuple[bytes, int]] = []

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        self.invalidated.append((inode, attr_only))

    def invalidate_entry(self, inode_p: int, name: bytes, deleted: int = 0) -> None:
        self.forgotten.append((inode_p, name))

    def readdir_reply(self, token: object, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
        if len(self.listed) == self.room:
            return False
        if name not in (b".", b".."):
            self.listed.append((name, next_id))
        return True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(pyfuse3, "invalidate_inode", fake.invalidate_inode)
    monkeypatch.setattr(pyfuse3, "invalidate_entry", fake.invalidate_entry)
    monkeypatch.setattr(pyfuse3, "readdir_reply", fake.readdir_reply)
    return fake


class Mounted(NamedTuple):
    """Hold the operations of one mount and what is below."""

    ops: BenchfsOperations
    client: Client
    whole: Whole


@asynccontextmanager
async def operations(
    whole: Whole,
    *,
    xattr: bool = True,
    cache_timeout_s: float = 1.0,
    gather_bytes_max: int = 1 << 20,
    sync: bool = False,
    dirsync: bool = False,
    op_timeout_s: float = math.inf,
) -> AsyncIterator[Mounted]:
    async with (
        whole.client(gather_bytes_max=gather_bytes_max, op_timeout_s=op_timeout_s) as client,
        trio.open_nursery() as nursery,
    ):
        ops = BenchfsOperations(
            client.namespace,
            client.files,
            nursery,
            cache_timeout_s=cache_timeout_s,
            xattr=xattr,
            locks=client.locks,
            sync=sync,
            dirsync=dirsync,
        )
        client.files.on_dropped = ops.invalidate_data
        yield Mounted(ops, client, whole)


@asynccontextmanager
async def mounted(daemons: int = 2, **options: Any) -> AsyncIterator[Mounted]:
    async with whole_cluster(daemons) as whole, operations(whole, **options) as mount:
        yield mount


async def listing(ops: BenchfsOperations, kernel: Kernel, inode: int) -> list[bytes]:
    fh = await ops.opendir(inode, CTX)
    kernel.listed.clear()
    await ops.readdir(fh, 0, pyfuse3.ReaddirToken())
    await ops.releasedir(fh)
    return [name for name, _ in kernel.listed]


def change(**values: int) -> EntryAttributes:
    entry = EntryAttributes()
    for name, value in values.items():
        setattr(entry, name, value)
    return entry


def fields(*names: str) -> SetattrFields:
    return cast(SetattrFields, Fields(**dict.fromkeys([f"update_{name}" for name in names], True)))


class Counting:
    """Be as much of the operations as counting takes."""

    timeout_s = 30.0

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.begun = None
        self.by_hand = False

    def asked(self) -> tuple[int, int]:
        return 42, 7


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_error_has_its_errno_alone_and_in_groups(caplog: pytest.LogCaptureFixture) -> None:
    for cls in errors.BY_STATUS.values():
        assert errno_of(cls("x"), "op") == cls.errno
        group = ExceptionGroup("g", [ExceptionGroup("h", [ValueError("other"), cls("x")])])
        assert errno_of(group, "op") == cls.errno
    assert errno_of(FUSEError(errno.ENOSYS), "op") == errno.ENOSYS
    assert not caplog.records


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError(1), ExceptionGroup("g", [ValueError("bug")])])
async def test_the_unforeseen_is_logged_and_becomes_eio(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    @guarded
    async def handler(operations: Counting) -> None:
        raise error

    with caplog.at_level(logging.ERROR), pytest.raises(FUSEError) as raised:
        await handler(Counting())
    assert raised.value.errno == errno.EIO
    assert ("handler failed" in caplog.text and "bug" in caplog.text) or "KeyError" in caplog.text


async def test_cancellation_passes_a_handler() -> None:
    @guarded
    async def handler(operations: Counting) -> None:
        await trio.sleep_forever()

    with trio.move_on_after(0) as scope:
        await handler(Counting())
    assert scope.cancelled_caught


async def test_what_a_handler_does_is_counted_and_recorded_while_somebody_wants_that() -> None:
    @guarded
    async def handler(operations: Counting, number: int) -> int:
        if number:
            raise errors.NoSpace("x")
        return number

    operations = Counting()
    await handler(operations, 0)
    recorder = recording.start()
    with pytest.raises(FUSEError):
        await handler(operations, 1)
    recording.stop()
    await handler(operations, 0)
    assert operations.statistics.count("handler") == 3
    (operation,) = recorder.operations
    assert (operation.name, operation.unique, operation.error) == ("handler", 42, errno.ENOSPC)
    assert 7 < operation.started_ns <= operation.ended_ns


def test_every_operation_of_pyfuse3_is_guarded_or_left_to_it() -> None:
    inherited = {"access", "poll", "stacktrace", "init"}
    raises_nothing = {"forget"}
    for name in vars(pyfuse3.Operations):
        if name.startswith("_") or not callable(getattr(pyfuse3.Operations, name)):
            continue
        own = vars(BenchfsOperations).get(name)
        assert (own is None) == (name in inherited), name
        assert name in inherited | raises_nothing or hasattr(own, "__wrapped__"), name


async def test_unknown_handles_and_names() -> None:
    async with mounted() as (ops, _, _):
        cases: list[tuple[Callable[[], Any], int]] = [
            (lambda: ops.lookup(1, b"none", CTX), errno.ENOENT),
            (lambda: ops.getattr(99, CTX), errno.ESTALE),
            (lambda: ops.getattr(1 << 62, CTX), errno.ESTALE),
            (lambda: ops.read(5, 0, 1), errno.EBADF),
            (lambda: ops.open(99, os.O_RDONLY, CTX), errno.ESTALE),
            (lambda: ops.lookup(1, b"x" * 256, CTX), errno.ENAMETOOLONG),
        ]
        for case, code in cases:
            with pytest.raises(FUSEError) as raised:
                await case()
            assert raised.value.errno == code


# ── names and attributes ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_dot_and_dot_dot() -> None:
    async with mounted() as (ops, _, _):
        directory = await ops.mkdir(1, b"d", 0o755, CTX)
        inner = await ops.mkdir(directory.st_ino, b"e", 0o755, CTX)
        file = await ops.mknod(1, b"f", stat.S_IFREG | 0o644, 0, CTX)
        assert (await ops.lookup(inner.st_ino, b".", CTX)).st_ino == inner.st_ino
        assert (await ops.lookup(inner.st_ino, b"..", CTX)).st_ino == directory.st_ino
        assert (await ops.lookup(1, b"..", CTX)).st_ino == 1
        with pytest.raises(FUSEError):
            await ops.lookup(file.st_ino, b"..", CTX)


async def test_attributes_as_the_kernel_gets_them() -> None:
    async with mounted(cache_timeout_s=0.25) as (ops, _, _):
        made = await ops.mknod(1, b"dev", stat.S_IFCHR | 0o640, 0x105, CTX)
        found = await ops.lookup(1, b"dev", CTX)
        for entry in (made, found):
            assert (entry.st_mode, entry.st_rdev, entry.st_uid, entry.st_gid) == (
                stat.S_IFCHR | 0o640,
                0x105,
                1000,
                1000,
            )
            assert (entry.entry_timeout, entry.attr_timeout, entry.generation) == (0.25, 0.25, 1)
        link = await ops.symlink(1, b"l", b"target", CTX)
        assert stat.S_ISLNK(link.st_mode) and await ops.readlink(link.st_ino, CTX) == b"target"
        again = await ops.link(made.st_ino, 1, b"dev2", CTX)
        assert (again.st_ino, again.st_nlink) == (made.st_ino, 2)


async def test_setattr_changes_what_its_fields_say() -> None:
    async with mounted() as (ops, _, _):
        ino = (await ops.mknod(1, b"f", stat.S_IFREG | 0o644, 0, CTX)).st_ino
        wanted = change(
            st_mode=stat.S_IFREG | 0o4755, st_uid=5, st_gid=6, st_size=7, st_atime_ns=8 * 10**9 + 1, st_mtime_ns=9
        )
        for names, expected in (
            (("mode",), (0o4755, 1000, 1000, 0)),
            (("uid",), (0o755, 5, 1000, 0)),  # to give a file away takes its set-ID bits
            (("gid",), (0o755, 5, 6, 0)),
            (("size",), (0o755, 5, 6, 7)),
        ):
            entry = await ops.setattr(ino, wanted, fields(*names), None, CTX)
            assert (stat.S_IMODE(entry.st_mode), entry.st_uid, entry.st_gid, entry.st_size) == expected
        entry = await ops.setattr(ino, wanted, fields("atime", "mtime"), None, CTX)
        assert (entry.st_atime_ns, entry.st_mtime_ns) == (8 * 10**9 + 1, 9)


async def test_nothing_is_remembered_of_a_file_that_the_kernel_forgets_right_behind_its_close() -> None:
    """It does: where the file was removed, the answer to the last close is what makes it forget the inode."""
    async with mounted() as (ops, _, _):
        made, entry = await ops.create(1, b"f", 0o600, os.O_RDWR, CTX)
        await ops.flush(made.fh)
        assert not ops.release_soon(made.fh), "it writes"
        info = await ops.open(entry.st_ino, os.O_RDONLY, CTX)
        await ops.release(made.fh)
        await ops.unlink(1, b"f", CTX)
        assert ops.release_soon(info.fh)
        with pytest.raises(StopIteration):  # no task has had its turn between
            ops.forget([(entry.st_ino, 1)]).send(None)
        assert entry.st_ino not in ops._told
        with pytest.raises(FUSEError) as raised:
            await ops.release(info.fh)
        assert raised.value.errno == errno.EIO


async def test_somebody_in_a_removed_directory_sees_it_without_links() -> None:
    async with mounted() as (ops, _, _):
        ino = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        await ops.rmdir(1, b"d", CTX)
        assert (await ops.getattr(ino, CTX)).st_nlink == 0
        assert list(await ops.listxattr(ino, CTX)) == []
        await ops.releasedir(await ops.opendir(ino, CTX))
        with pytest.raises(FUSEError) as raised:
            await ops.getxattr(ino, b"user.a", CTX)
        assert raised.value.errno == errno.ENODATA
        await ops.forget([(ino, 1)])
        with pytest.raises(FUSEError) as raised:
            await ops.getattr(ino, CTX)
        assert raised.value.errno == errno.ESTALE


async def test_times_of_what_was_removed_never_run_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are this machine's then, whose clock is an hour behind the daemon's here."""
    real = time.time_ns
    async with mounted() as (ops, _, _):
        made = await ops.mkdir(1, b"d", 0o755, CTX)
        monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
        await ops.rmdir(1, b"d", CTX)
        removed = await ops.getattr(made.st_ino, CTX)
        assert removed.st_nlink == 0 and removed.st_ctime_ns > made.st_ctime_ns
        wanted = EntryAttributes()
        wanted.st_mode = stat.S_IFDIR | 0o700
        changed = await ops.setattr(made.st_ino, wanted, fields("mode"), None, CTX)
        assert changed.st_mode == wanted.st_mode and changed.st_ctime_ns > removed.st_ctime_ns


async def test_a_directory_that_was_changed_here_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to each change says what the directory is like; within the time-out that is good."""
    asked: list[int] = []
    async with mounted(cache_timeout_s=60.0) as (ops, _, whole):
        directory = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        whole.network.on_call = lambda op, source, target: asked.append(op)
        before = await ops.getattr(directory, CTX)
        asked.clear()
        made = await ops.mknod(directory, b"f", stat.S_IFREG | 0o644, 0, CTX)
        changes: list[Callable[[], Awaitable[object]]] = [
            lambda: ops.link(made.st_ino, directory, b"g", CTX),
            lambda: ops.rename(directory, b"g", directory, b"h", 0, CTX),
            lambda: ops.unlink(directory, b"h", CTX),
            lambda: ops.mkdir(directory, b"s", 0o755, CTX),
        ]
        for change in changes:
            asked.clear()
            assert (await ops.getattr(directory, CTX)).st_mtime_ns > before.st_mtime_ns
            assert GetAttr.op not in asked
            before = await ops.getattr(directory, CTX)
            await change()
        after = await ops.getattr(directory, CTX)
        assert (after.st_nlink, after.st_mtime_ns > before.st_mtime_ns) == (3, True)
        assert 0 < after.attr_timeout < 60.0
        later_s = time.monotonic() + 61.0
        monkeypatch.setattr(time, "monotonic", lambda: later_s)
        asked.clear()
        assert (await ops.getattr(directory, CTX)).attr_timeout == 60.0
        assert asked == [GetAttr.op]


async def test_a_directory_is_asked_for_where_the_kernel_may_keep_nothing() -> None:
    asked: list[int] = []
    async with mounted(cache_timeout_s=0.0) as (ops, _, whole):
        directory = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        whole.network.on_call = lambda op, source, target: asked.append(op)
        await ops.getattr(directory, CTX)
        assert asked == [GetAttr.op]


async def test_rename_with_flags() -> None:
    async with mounted() as (ops, _, _):
        one = (await ops.mknod(1, b"one", stat.S_IFREG | 0o644, 0, CTX)).st_ino
        two = (await ops.mknod(1, b"two", stat.S_IFREG | 0o644, 0, CTX)).st_ino
        await ops.rename(1, b"one", 1, b"two", pyfuse3.RENAME_EXCHANGE, CTX)
        assert (await ops.lookup(1, b"one", CTX)).st_ino == two
        with pytest.raises(FUSEError) as raised:
            await ops.rename(1, b"one", 1, b"two", pyfuse3.RENAME_NOREPLACE, CTX)
        assert raised.value.errno == errno.EEXIST
        with pytest.raises(FUSEError) as raised:
            await ops.rename(1, b"one", 1, b"two", 4, CTX)
        assert raised.value.errno == errno.EINVAL
        await ops.rename(1, b"one", 1, b"two", 0, CTX)
        assert (await ops.lookup(1, b"two", CTX)).st_ino == two
        assert (await ops.getattr(one, CTX)).st_nlink == 0


async def test_statfs_counts_every_file_system_once() -> None:
    async with mounted() as (ops, client, _):
        data, space = await ops.statfs(CTX), await client.namespace.space()
        assert data.f_blocks * data.f_frsize == space.total
        assert data.f_bavail * data.f_frsize == space.available
        assert data.f_namemax == 255


async def test_statfs_answers_while_a_daemon_is_missing_or_silent(autojump_clock: object) -> None:
    async with mounted() as (ops, client, whole):

        async def sizes() -> tuple[int, int]:
            data = await ops.statfs(CTX)
            return data.f_blocks * data.f_frsize, data.f_bavail * data.f_frsize

        node = whole.cluster.daemons[1].node
        whole.network.partition(node, client.node)
        before = trio.current_time()
        one_total, _ = await sizes()  # nothing was ever heard of the second
        assert trio.current_time() - before == namespace.SPACE_TIMEOUT_S
        whole.network.heal(node, client.node)
        both = await sizes()
        assert both[0] == 2 * one_total
        for missing in (0, 1):  # whichever it is, its last words count, and the other's present ones
            daemon, other = whole.cluster.daemons[missing], whole.stores[1 - missing]
            chunk = ChunkId(make_ino(1 - missing, 7 + missing), 0)
            await daemon.kill()
            while client.links.to(missing).connected:
                await trio.lowlevel.checkpoint()
            await other.write(chunk, 0, bytes(CHUNK))
            before = trio.current_time()
            assert await sizes() == (both[0], both[1] - CHUNK)
            assert trio.current_time() - before < namespace.SPACE_TIMEOUT_S  # known to be missing: no wait
            await other.drop([chunk.ino])
            await daemon.start()
            await client.links.wait_connected()
            assert await sizes() == both


async def test_statfs_of_which_nothing_is_known_fails(autojump_clock: object) -> None:
    async with mounted(1) as (ops, client, whole):
        whole.network.partition(whole.cluster.daemons[0].node, client.node)
        with pytest.raises(FUSEError) as raised:
            await ops.statfs(CTX)
        assert raised.value.errno == errno.EIO


# ── files and caches ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_write_read_and_the_buffers() -> None:
    async with mounted() as (ops, client, _):
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        assert stat.S_ISREG(entry.st_mode) and not info.direct_io
        data = os.urandom(3 * CHUNK)
        assert await ops.write(info.fh, 0, data) == len(data)
        assert (await ops.getattr(entry.st_ino, CTX)).st_size == len(data)
        assert bytes(await ops.read(info.fh, 0, len(data))) == data
        assert bytes(await ops.read(info.fh, 10, 5)) == data[10:15]
        assert bytes(await ops.read(info.fh, len(data) - 3, 100)) == data[-3:]
        assert bytes(await ops.read(info.fh, len(data), 100)) == b""
        both: list[bytes] = []

        async def read(offset: int) -> None:
            both.append(bytes(await ops.read(info.fh, offset, CHUNK)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            nursery.start_soon(read, CHUNK)
        assert sorted(both) == sorted([data[:CHUNK], data[CHUNK : 2 * CHUNK]])
        await ops.fsync(info.fh, False)
        await ops.flush(info.fh)
        await ops.release(info.fh)
        assert client.files.statistics() == (0, 0, 0, 0)


async def test_cached_data_stays_unless_somebody_else_changed_the_file(kernel: Kernel) -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, _, _), whole.client() as other:
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await ops.write(info.fh, 0, b"mine")
        await ops.flush(info.fh)
        await ops.release(info.fh)

        async def reopen() -> tuple[bool, list[tuple[int, bool]]]:
            kernel.invalidated.clear()
            info = await ops.open(entry.st_ino, os.O_RDONLY, CTX)
            await ops.release(info.fh)
            return info.keep_cache, list(kernel.invalidated)

        assert await reopen() == (True, [])
        async with await other.fs.open("/f", os.O_WRONLY) as file:
            await file.write(b"theirs", 0)
        assert await reopen() == (False, [(entry.st_ino, True)])
        assert await reopen() == (True, [])
        async with await other.fs.open("/f", os.O_WRONLY) as file:
            await file.write(b"again!", 0)
        await ops.getattr(entry.st_ino, CTX)
        assert await reopen() == (False, [])  # the attributes were fresh already
        await ops.forget([(entry.st_ino, 1)])
        assert (await reopen())[0] is False


async def test_new_and_lost_names_of_our_own_leave_the_data_in_the_cache(kernel: Kernel) -> None:
    """As an editor does that writes a new file and moves it to the old one's place."""
    async with mounted() as (ops, _, _):
        directory = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        info, entry = await ops.create(directory, b"new", 0o644, os.O_RDWR, CTX)
        await ops.write(info.fh, 0, b"mine")
        await ops.flush(info.fh)
        await ops.release(info.fh)
        for name in (b"old", b"older"):
            other, _ = await ops.create(directory, name, 0o644, os.O_RDWR, CTX)
            await ops.release(other.fh)

        async def keeps() -> bool:
            info = await ops.open(entry.st_ino, os.O_RDONLY, CTX)
            await ops.release(info.fh)
            return info.keep_cache and (entry.st_ino, False) not in kernel.invalidated

        assert await keeps()
        await ops.rename(directory, b"new", directory, b"old", 0, CTX)
        assert await keeps()
        await ops.rename(directory, b"old", directory, b"older", pyfuse3.RENAME_EXCHANGE, CTX)
        assert await keeps()
        await ops.rename(directory, b"old", directory, b"older", pyfuse3.RENAME_EXCHANGE, CTX)
        assert await keeps()
        await ops.link(entry.st_ino, directory, b"another", CTX)
        assert await keeps()
        await ops.unlink(directory, b"another", CTX)
        assert await keeps()


@pytest.mark.parametrize("what", ["getattr", "truncate", "flush", "fsync", "lookup", "write"])
async def test_many_who_wait_for_one_daemon_are_all_told_in_time(what: str, autojump_clock: object) -> None:
    """They wait for each other first: ten together take no longer than one."""
    deadline_s = 30.0
    async with whole_cluster() as whole, operations(whole, op_timeout_s=deadline_s) as (ops, client, _):
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        ino = entry.st_ino
        handles = [info, *[await ops.open(ino, os.O_RDWR, CTX) for _ in range(9)]]
        await ops.write(info.fh, 0, b"accepted")
        await whole.cluster.daemons[client.links.shard_map.of_ino(ino)].kill()
        calls: dict[str, Callable[[int], Awaitable[object]]] = {
            "getattr": lambda fh: ops.getattr(ino, CTX),
            "truncate": lambda fh: ops.setattr(ino, change(st_size=3), fields("size"), None, CTX),
            "flush": ops.flush,
            "fsync": lambda fh: ops.fsync(fh, False),
            "lookup": lambda fh: ops.lookup(1, b"f", CTX),
            "write": lambda fh: ops.write(fh, 0, bytes(2 << 20)),
        }
        ended: list[float] = []

        async def call(fh: int) -> None:
            with pytest.raises(FUSEError) as raised:
                await calls[what](fh)
            assert raised.value.errno == errno.EIO
            ended.append(trio.current_time() - started)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(call, handle.fh)
        assert len(ended) == 10
        assert max(ended) <= deadline_s


async def lock(mount: Mounted, fh: int, owner: int, kind: LockKind = LockKind.POSIX) -> None:
    """Lock a file as the companion library has it locked."""
    await mount.ops.begin_lock(fh, owner, kind)
    await mount.client.locks.set(mount.ops.handle(fh).ino, owner, kind, LockType.WRITE)


async def test_a_handle_that_is_inherited_takes_no_locks_along_that_came_later() -> None:
    """A process locks, forks, closes, and locks anew; then the child closes its handle, the last one."""
    parent, child = 7, 8
    async with mounted() as mount:
        ops, client, _ = mount
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await lock(mount, info.fh, parent)
        await ops.flush_for(info.fh, parent)
        assert client.locks.statistics().ranges == 0
        again = await ops.open(entry.st_ino, os.O_RDWR, CTX)
        await lock(mount, again.fh, parent)
        await ops.flush_for(info.fh, child)
        await ops.release(info.fh)
        assert client.locks.statistics().ranges == 1
        await ops.flush_for(again.fh, parent)
        await ops.release(again.fh)
        assert client.locks.statistics() == (0, 0, 0)


@pytest.mark.parametrize("kind", list(LockKind))
async def test_a_late_release_takes_no_lock_along_that_came_later(kind: LockKind) -> None:
    """RELEASE waits for somebody's writes; meanwhile the same owner (its number may be given anew) locks again."""
    async with whole_cluster() as whole, operations(whole) as mount, trio.open_nursery() as nursery:
        ops, client, _ = mount
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        other = await ops.open(entry.st_ino, os.O_RDWR, CTX)
        await lock(mount, info.fh, 7, kind)
        await ops.write(other.fh, 1000, b"theirs")
        hold = trio.Event()
        for store in whole.chunks:
            store.hold = hold
        nursery.start_soon(ops.release, info.fh)
        await wait_all_tasks_blocked()
        again = await ops.open(entry.st_ino, os.O_RDWR, CTX)
        nursery.start_soon(lock, mount, again.fh, 7, kind)
        await wait_all_tasks_blocked()
        hold.set()
        await wait_all_tasks_blocked()
        assert client.locks.statistics().ranges == 1
        await ops.release(again.fh)
        await ops.release(other.fh)
        assert client.locks.statistics() == (0, 0, 0)


async def test_all_locks_of_a_handle_are_given_back_though_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mounted() as mount:
        ops, client, _ = mount
        info, _ = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await lock(mount, info.fh, 7, LockKind.POSIX)
        await lock(mount, info.fh, 7, LockKind.FLOCK)
        drop = client.locks.drop
        failures = [errors.DaemonUnreachable("away")]

        async def fail_once(ino: int, owner: int, kind: LockKind) -> None:
            await drop(ino, owner, kind)
            if failures:
                raise failures.pop()

        monkeypatch.setattr(client.locks, "drop", fail_once)
        with pytest.raises(FUSEError) as caught:
            await ops.release(info.fh)
        assert caught.value.errno == errno.EIO
        assert client.locks.statistics().ranges == 0


async def test_o_trunc_in_open_cuts_the_file(kernel: Kernel) -> None:
    async with mounted() as (ops, client, _):
        async with await client.fs.open("/f", os.O_RDWR | os.O_CREAT, 0o6755) as file:
            await file.write(b"old", 0)
        info = await ops.open(file.ino, os.O_WRONLY | os.O_TRUNC, CTX)
        attrs = await ops.getattr(file.ino, CTX)
        assert (attrs.st_size, stat.S_IMODE(attrs.st_mode)) == (0, 0o755)
        await ops.release(info.fh)


async def test_a_file_that_appears_between_lookup_and_create_is_not_opened_past_its_permissions() -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, client, _), whole.client() as other:
        await (await other.fs.open("/f", os.O_RDWR | os.O_CREAT, 0o600)).close()
        with pytest.raises(FUSEError) as raised:
            await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        assert raised.value.errno == errno.ESTALE
        with pytest.raises(FUSEError) as raised:
            await ops.create(1, b"f", 0o644, os.O_RDWR | os.O_EXCL, CTX)
        assert raised.value.errno == errno.EEXIST
        assert client.files.statistics().handles == 0


async def test_a_file_that_is_replaced_again_and_again_can_be_opened_at_the_second_try(
    kernel: Kernel, autojump_clock: object
) -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, client, _), whole.client() as other:

        async def replace(content: bytes) -> None:
            async with await other.fs.open("/new", os.O_RDWR | os.O_CREAT) as file:
                await file.write(content, 0)
            await other.fs.rename("/new", "/f")

        await replace(b"1")
        first = (await ops.lookup(1, b"f", CTX)).st_ino
        await replace(b"2")
        with pytest.raises(FUSEError) as raised:
            await ops.open(first, os.O_RDONLY, CTX)
        assert raised.value.errno == errno.ESTALE
        await replace(b"3")
        second = (await ops.lookup(1, b"f", CTX)).st_ino
        await replace(b"4")
        info = await ops.open(second, os.O_RDONLY, CTX)
        assert bytes(await ops.read(info.fh, 0, 10)) == b"2"
        await ops.release(info.fh)
        third = await ops.open((await ops.lookup(1, b"f", CTX)).st_ino, os.O_RDONLY, CTX)
        assert bytes(await ops.read(third.fh, 0, 10)) == b"4"
        await ops.release(third.fh)
        await trio.sleep(1)
        assert client.files.statistics().handles == 0


async def test_appending_handles_bypass_the_cache_and_do_the_kernels_duties(kernel: Kernel) -> None:
    async with mounted() as (ops, client, whole):
        async with await client.fs.open("/f", os.O_RDWR | os.O_CREAT, 0o6755) as file:
            await file.write(b"12345", 0)
        info = await ops.open(file.ino, os.O_WRONLY | os.O_APPEND | os.O_DSYNC, CTX)
        assert info.direct_io
        assert await ops.write(info.fh, 2, b"678") == 3  # the kernel's offset does not count
        attrs = await ops.getattr(file.ino, CTX)
        assert (attrs.st_size, stat.S_IMODE(attrs.st_mode)) == (8, 0o755)
        assert whole.cluster.daemons[whole.cluster.shard_map.of_ino(file.ino)].server.requests["SyncMeta"] == 1
        await ops.release(info.fh)
        async with await client.fs.open("/f") as again:
            assert await again.read(100, 0) == b"12345678"


async def test_an_append_through_a_handle_that_root_opened_drops_set_id_bits(kernel: Kernel) -> None:
    async with mounted() as (ops, client, _):
        await (await client.fs.open("/f", os.O_RDWR | os.O_CREAT, 0o6755)).close()
        ino = (await client.fs.stat("/f")).ino
        info = await ops.open(ino, os.O_WRONLY | os.O_APPEND, ROOT_CTX)
        await ops.write(info.fh, 0, b"x")
        assert stat.S_IMODE((await ops.getattr(ino, CTX)).st_mode) == 0o755
        await ops.release(info.fh)


async def test_the_kernel_drops_pages_of_bytes_that_were_not_written(kernel: Kernel) -> None:
    async with mounted(1) as (ops, _, whole):
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        whole.chunks[0].rates = Rates(no_space=1.0)
        await ops.write(info.fh, 0, b"x")
        with pytest.raises(FUSEError) as raised:
            await ops.flush(info.fh)
        assert raised.value.errno == errno.ENOSPC
        while not kernel.invalidated:
            await trio.lowlevel.checkpoint()
        assert kernel.invalidated == [(entry.st_ino, False)]
        await ops.flush(info.fh)
        await ops.release(info.fh)


# ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_listing_goes_on_where_it_stopped_while_names_come_and_go(kernel: Kernel) -> None:
    async with mounted() as (ops, _, whole):
        for number in range(30):
            await ops.mknod(1, b"%02d" % number, stat.S_IFREG | 0o644, 0, CTX)
        fh = await ops.opendir(1, CTX)
        kernel.room = 10
        await ops.readdir(fh, 0, pyfuse3.ReaddirToken())
        seen = list(kernel.listed)
        kernel.listed.clear()
        await ops.readdir(fh, seen[-1][1], pyfuse3.ReaddirToken())
        assert whole.network.calls[ReadDir.op] == 1  # the second part came from the page that was there
        seen += kernel.listed
        await ops.unlink(1, b"00", CTX)
        await ops.unlink(1, b"25", CTX)
        await ops.mknod(1, b"99", stat.S_IFREG | 0o644, 0, CTX)
        kernel.room = 100
        kernel.listed.clear()
        await ops.readdir(fh, seen[-1][1], pyfuse3.ReaddirToken())
        assert whole.network.calls[ReadDir.op] == 2  # what was removed here is not listed from an old page
        seen += kernel.listed
        assert [name for name, _ in seen] == [b"%02d" % number for number in [*range(25), *range(26, 30), 99]]
        await ops.releasedir(fh)


async def test_an_entry_for_which_the_kernel_had_no_room_is_not_remembered(kernel: Kernel) -> None:
    async with whole_cluster(1) as whole, operations(whole) as (ops, _, _), whole.client() as other:
        inos = [(await other.fs.mknod(f"/{number}", stat.S_IFREG | 0o600)).ino for number in range(3)]
        fh = await ops.opendir(1, CTX)
        kernel.room = 2
        await ops.readdir(fh, 0, pyfuse3.ReaddirToken())
        assert [ino in ops._told for ino in inos] == [True, True, False]
        await ops.releasedir(fh)


async def test_a_listing_begins_with_the_directory_and_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[tuple[bytes, int, int]] = []

    def reply(token: object, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
        listed.append((name, attr.st_ino, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    async with mounted() as (ops, _, _):
        outer = (await ops.mkdir(1, b"outer", 0o755, CTX)).st_ino
        inner = (await ops.mkdir(outer, b"inner", 0o755, CTX)).st_ino
        for inode, parent, rest in ((1, 1, [b"outer"]), (outer, 1, [b"inner"]), (inner, outer, [])):
            listed.clear()
            fh = await ops.opendir(inode, CTX)
            await ops.readdir(fh, 0, pyfuse3.ReaddirToken())
            assert listed[:2] == [(b".", inode, 1), (b"..", parent, 2)]
            assert [name for name, _, _ in listed[2:]] == rest
            everything = list(listed)
            listed.clear()
            await ops.readdir(fh, 1, pyfuse3.ReaddirToken())
            assert listed == everything[1:]
            await ops.releasedir(fh)


async def test_in_a_directory_that_was_removed_elsewhere_the_kernel_looks_twice_and_finds_nothing() -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, _, _), whole.client() as other:
        ino = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        await other.fs.rmdir("/d")
        await other.fs.mkdir("/d")
        for code in (errno.ESTALE, errno.ENOENT):
            with pytest.raises(FUSEError) as raised:
                await ops.lookup(ino, b"f", CTX)
            assert raised.value.errno == code
        for operation in (
            lambda: ops.create(ino, b"f", 0o644, os.O_RDWR, CTX),
            lambda: ops.mkdir(ino, b"f", 0o755, CTX),
            lambda: ops.rename(1, b"d", ino, b"f", 0, CTX),
        ):
            with pytest.raises(FUSEError) as raised:
                await cast(Any, operation())
            assert raised.value.errno == errno.ENOENT
        with pytest.raises(FUSEError) as raised:
            await ops.opendir(ino, CTX)
        assert raised.value.errno == errno.ESTALE


async def test_the_kernel_forgets_from_where_a_directory_was_moved_elsewhere(kernel: Kernel) -> None:
    async with whole_cluster() as whole, whole.client() as other:
        async with operations(whole) as (ops, _, _):
            one, two = [(await ops.mkdir(1, name, 0o755, CTX)).st_ino for name in (b"one", b"two")]
            for name in (b"moved", b"renamed", b"replaced"):
                await ops.mkdir(one, name, 0o755, CTX)
            await other.fs.rename("/one/moved", "/two/moved")
            await other.fs.rename("/one/renamed", "/one/new")  # the kernel needs no locks for that
            await other.fs.rename("/one/replaced", "/two/replaced")
            await other.fs.mkdir("/one/replaced")  # which may be mounted on by now
            for parent, name in ((two, b"moved"), (one, b"new"), (two, b"replaced"), (two, b"moved")):
                await ops.lookup(parent, name, CTX)
        assert kernel.forgotten == [(one, b"moved")]


async def test_a_place_is_known_though_a_forget_comes_behind_a_newer_answer(kernel: Kernel) -> None:
    async with whole_cluster() as whole, whole.client() as other:
        async with operations(whole) as (ops, _, _):
            one, two = [(await ops.mkdir(1, name, 0o755, CTX)).st_ino for name in (b"one", b"two")]
            ino = (await ops.mkdir(one, b"moved", 0o755, CTX)).st_ino
            await ops.lookup(one, b"moved", CTX)
            await ops.forget([(ino, 1)])  # the kernel said so before it asked again
            await other.fs.rename("/one/moved", "/two/moved")
            await ops.lookup(two, b"moved", CTX)
            await ops.forget([(ino, 2)])
            await other.fs.rename("/two/moved", "/one/moved")
            await ops.lookup(one, b"moved", CTX)  # which the kernel knows from nowhere else
        assert kernel.forgotten == [(one, b"moved")]


async def test_a_directory_that_was_moved_is_found_while_its_old_places_daemon_is_missing(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with whole_cluster() as whole, whole.client() as other, operations(whole, op_timeout_s=30.0) as mount:
        one, two = [(await mount.ops.mkdir(1, name, 0o755, CTX)).st_ino for name in (b"one", b"two")]
        await mount.ops.mkdir(one, b"moved", 0o755, CTX)
        await other.fs.rename("/one/moved", "/two/moved")
        lookup = mount.client.namespace.lookup

        async def missing(parent: int, name: bytes) -> Attrs:
            if parent == one:
                await trio.sleep(30)
                raise errors.DaemonUnreachable("it is missing")
            return await lookup(parent, name)

        monkeypatch.setattr(mount.client.namespace, "lookup", missing)
        with trio.fail_after(1):
            await mount.ops.lookup(two, b"moved", CTX)
    assert kernel.forgotten == []


async def test_a_page_is_not_served_past_its_time(kernel: Kernel, autojump_clock: object) -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, _, _), whole.client() as other:
        for number in range(4):
            await ops.mknod(1, b"%d" % number, stat.S_IFREG | 0o644, 0, CTX)
        fh = await ops.opendir(1, CTX)
        kernel.room = 2
        await ops.readdir(fh, 0, pyfuse3.ReaddirToken())
        position = kernel.listed[-1][1]
        await other.fs.remove("/2")
        await trio.sleep(1.5)
        kernel.listed.clear()
        await ops.readdir(fh, position, pyfuse3.ReaddirToken())
        assert [name for name, _ in kernel.listed] == [b"3"]
        await ops.releasedir(fh)


async def test_listing_directories_makes_their_attributes_known(kernel: Kernel) -> None:
    async with mounted(3) as (ops, _, _):
        for number in range(9):
            await ops.mkdir(1, b"%d" % number, 0o755, CTX)
        assert await listing(ops, kernel, 1) == [b"%d" % number for number in range(9)]
        fh = await ops.opendir(1, CTX)
        await ops.fsyncdir(fh, False)
        await ops.releasedir(fh)


async def test_a_file_that_is_being_written_is_listed_with_its_size(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def reply(token: object, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
        if name == b"f":
            sizes.append(attr.st_size)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    async with mounted() as (ops, _, _):
        info, _ = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await ops.write(info.fh, 0, b"12345")
        assert (await ops.lookup(1, b"f", CTX)).st_size == 5
        await ops.write(info.fh, 5, b"67890")
        await listing(ops, kernel, 1)
        assert sizes == [10]
        await ops.release(info.fh)


# ── extended attributes ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_error_that_another_process_met_at_its_close_is_still_told_by_fsync() -> None:
    """A child closes what it has inherited, and mostly asks nobody whether that went well."""
    async with mounted(1) as (ops, _, whole):
        info, _ = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        whole.chunks[0].rates = Rates(no_space=1.0)
        assert await ops.write(info.fh, 0, b"lost") == 4
        with pytest.raises(FUSEError) as raised:
            await ops.flush(info.fh)
        assert raised.value.errno == errno.ENOSPC
        whole.chunks[0].rates = Rates()
        await ops.flush(info.fh)
        assert await ops.write(info.fh, 4, b"kept") == 4
        with pytest.raises(FUSEError) as raised:
            await ops.fsync(info.fh, False)
        assert raised.value.errno == errno.ENOSPC
        await ops.fsync(info.fh, False)
        assert bytes(await ops.read(info.fh, 0, 10)) == b"\0\0\0\0kept"
        await ops.flush(info.fh)
        await ops.release(info.fh)


async def test_what_the_kernel_asks_before_every_write_is_answered_from_memory(kernel: Kernel) -> None:
    async with whole_cluster() as whole, operations(whole) as (ops, _, _), whole.client() as other:

        async def capability(inode: int) -> bytes | None:
            try:
                return await ops.getxattr(inode, fuse.CAPABILITY, CTX)
            except FUSEError as error:
                return None if error.errno == pyfuse3.ENOATTR else b"another error"

        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        for number in range(5):
            assert await capability(entry.st_ino) is None
            await ops.write(info.fh, number, b"x")
            await ops.flush(info.fh)
        assert whole.network.calls[GetXattr.op] == 0
        await other.fs.setxattr("/f", fuse.CAPABILITY, b"caps")
        await ops.getattr(entry.st_ino, CTX)
        assert await capability(entry.st_ino) == b"caps"
        await ops.removexattr(entry.st_ino, fuse.CAPABILITY, CTX)
        assert await capability(entry.st_ino) is None
        asked = whole.network.calls[GetXattr.op]
        assert await capability(entry.st_ino) is None
        assert whole.network.calls[GetXattr.op] == asked
        await ops.setxattr(entry.st_ino, fuse.CAPABILITY, b"mine", CTX)
        assert await capability(entry.st_ino) == b"mine"
        await ops.release(info.fh)


async def test_extended_attributes_and_what_is_refused() -> None:
    async with mounted() as (ops, _, _):
        ino = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        await ops.setxattr(ino, b"user.a", b"1", CTX)
        assert await ops.getxattr(ino, b"user.a", CTX) == b"1"
        assert list(await ops.listxattr(ino, CTX)) == [b"user.a"]
        with pytest.raises(FUSEError) as raised:
            await ops.setxattr(ino, fuse.DEFAULT_ACL, b"", CTX)
        assert raised.value.errno == errno.EOPNOTSUPP


async def test_switched_off_the_kernel_is_told_never_to_ask_again() -> None:
    async with mounted(xattr=False) as (ops, _, _):
        assert not ops.enable_acl
        calls: list[Callable[[], Any]] = [
            lambda: ops.getxattr(1, b"user.a", CTX),
            lambda: ops.setxattr(1, b"user.a", b"", CTX),
            lambda: ops.listxattr(1, CTX),
            lambda: ops.removexattr(1, b"user.a", CTX),
        ]
        for call in calls:
            with pytest.raises(FUSEError) as raised:
                await call()
            assert raised.value.errno == errno.ENOSYS


async def test_listing_and_reading_links_set_access_times_once(kernel: Kernel) -> None:
    async with mounted() as (ops, client, whole):
        entry = await ops.symlink(1, b"l", b"t", CTX)
        await client.files.setattr(entry.st_ino, atime_ns=1)
        await client.files.setattr(1, atime_ns=1)
        for _ in range(3):
            await ops.readlink(entry.st_ino, CTX)
            await listing(ops, kernel, 1)
        await wait_all_tasks_blocked()
        assert whole.network.calls[Touch.op] == 2
        assert (await ops.getattr(entry.st_ino, CTX)).st_atime_ns > 1
        assert (await ops.getattr(1, CTX)).st_atime_ns > 1


class Library:
    """Stand for the companion library: take answers."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int]] = []

    def reply_error(self, request: int, error: int) -> None:
        self.answers.append((request, error))


class Freeing:
    """Stand for Interrupts: the caller of every request was freed by a signal when it was done."""

    def begin(self, *, watch: bool = False) -> int:
        return 1

    def end(self, unique: int) -> bool:
        return False

    def waiting(self, unique: int) -> AbstractContextManager[trio.CancelScope]:
        return trio.CancelScope()

    def signal(self, unique: int) -> None:
        raise AssertionError("nobody sends one")


async def test_a_lock_whose_caller_was_told_eintr_is_taken_back() -> None:
    """The signal came behind the grant, while the file was asked for: what was held before stays."""
    async with mounted() as mount:
        ops, client, _ = mount
        info, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await ops.begin_lock(info.fh, 7, LockKind.POSIX)
        await client.locks.set(entry.st_ino, 7, LockKind.POSIX, LockType.READ, 10, 19)
        library = Library()
        extras = Extras(cast(Any, library), ops, client.files, client.locks, cast(Any, Freeing()), xattr=True)

        async def ask() -> None:
            hooks = extras.hooks()
            assert hooks.setlk is not None
            hooks.setlk(5, entry.st_ino, info.fh, 7, 0, fcntl.F_WRLCK, 0, 100, 1, 1, 1)
            await wait_all_tasks_blocked()

        await extras.serve(ask)
        assert library.answers == [(5, 0)]  # which nobody took
        assert [claim[4:6] for claim in map(msgspec.structs.astuple, client.locks.claims())] == [(10, 19)]
        await ops.flush_for(info.fh, 7)
        assert client.locks.statistics() == (0, 0, 0)


@pytest.mark.parametrize(
    ("option", "syncs_data", "syncs_names", "syncs_attributes"),
    [(None, 0, 0, 0), ("dirsync", 0, 1, 0), ("sync", 1, 1, 1)],
)
async def test_what_is_mounted_sync_or_dirsync_syncs_what_the_kernel_does_not(
    option: str | None, syncs_data: int, syncs_names: int, syncs_attributes: int
) -> None:
    async with mounted(**({option: True} if option else {})) as (ops, _, whole):
        directory = (await ops.mkdir(1, b"d", 0o755, CTX)).st_ino
        fields_of_mode, values = fields("mode"), change(st_mode=0o600)

        async def syncs(work: Awaitable[object]) -> tuple[int, int]:
            """Say how many requests to sync chunks, and names on all daemons, an operation makes."""
            whole.network.calls.clear()
            await work
            calls = whole.network.calls
            return calls[SyncChunks.op], calls[SyncMeta.op]

        info, entry = await ops.create(directory, b"f", 0o644, os.O_RDWR | os.O_APPEND, CTX)
        data, names = await syncs(ops.write(info.fh, 0, b"appended"))
        assert (data > 0, names > 0) == (bool(syncs_data), bool(syncs_data))
        everywhere = len(whole.chunks)
        for work in (
            lambda: ops.mkdir(directory, b"dd", 0o755, CTX),
            lambda: ops.rmdir(directory, b"dd", CTX),
            lambda: ops.mknod(directory, b"n", stat.S_IFREG | 0o644, 0, CTX),
            lambda: ops.symlink(directory, b"s", b"target", CTX),
            lambda: ops.create(directory, b"g", 0o644, os.O_RDWR, CTX),
            lambda: ops.link(entry.st_ino, directory, b"l", CTX),
            lambda: ops.rename(directory, b"l", directory, b"m", 0, CTX),
            lambda: ops.unlink(directory, b"m", CTX),
        ):
            assert (await syncs(work()))[1] == syncs_names * everywhere
        changed = await syncs(ops.setattr(entry.st_ino, values, fields_of_mode, None, CTX))
        assert changed[1] == syncs_attributes * everywhere


async def test_an_attribute_that_was_set_meanwhile_is_not_remembered_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mounted() as (ops, client, _), trio.open_nursery() as nursery:
        _, entry = await ops.create(1, b"f", 0o644, os.O_RDWR, CTX)
        await ops.setxattr(entry.st_ino, b"user.a", b"1", CTX)
        answered, go_on = trio.Event(), trio.Event()
        getxattr = client.namespace.getxattr

        async def late(ino: int, name: bytes) -> bytes:
            try:
                return await getxattr(ino, name)
            finally:
                answered.set()
                await go_on.wait()

        async def ask() -> None:
            with pytest.raises(FUSEError):
                await ops.getxattr(entry.st_ino, b"security.capability", CTX)

        with monkeypatch.context() as patch:
            patch.setattr(client.namespace, "getxattr", late)
            nursery.start_soon(ask)
            await answered.wait()
            await ops.setxattr(entry.st_ino, b"security.capability", b"set", CTX)
            go_on.set()
            await wait_all_tasks_blocked()
        assert await ops.getxattr(entry.st_ino, b"security.capability", CTX) == b"set"


async def test_lookups_are_one_request() -> None:
    async with mounted() as (ops, _, whole):
        await ops.mknod(1, b"f", stat.S_IFREG | 0o644, 0, CTX)
        whole.network.calls.clear()
        await ops.lookup(1, b"f", CTX)
        assert whole.network.calls == {Lookup.op: 1}


async def test_data_is_kept_of_what_was_forgotten_and_has_not_changed(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BenchfsOperations, "_granted", lambda ops, capability: True)
    async with whole_cluster(2) as whole, operations(whole) as (ops, client, _), whole.client() as other:
        client.files.known = Known(count_max=2)
        inos = []
        for number in range(6):
            info, entry = await ops.create(1, b"%d" % number, 0o600, os.O_RDWR, ROOT_CTX)
            await ops.write(info.fh, 0, b"content")
            await ops.flush(info.fh)
            await ops.release(info.fh)
            inos.append(entry.st_ino)
        await other.fs.setattr("/3", size=4)
        kernel.invalidated.clear()
        for ino in inos:
            assert client.files.known.get(ino) is None or ino in inos[-2:]
            await ops.getattr(ino, ROOT_CTX)
        assert kernel.invalidated == [(inos[3], False)]
