"""Use a cluster from a Python program, without a mount: the same name space, the same files, the same promises.

    async with open_cluster("/shared/registry") as fs:
        await fs.mkdir("/results")
        async with await fs.open("/results/a", os.O_RDWR | os.O_CREAT) as file:
            await file.write(b"...", 0)
            await file.read_into(buffer, 0)

Paths are str or bytes, start at the cluster's root whether they begin with a slash or not, and follow symbolic links
as open(2) does. Whoever holds the cluster's secret may do everything: permission bits are stored, not checked.

Errors are the classes of ``benchfs_fuse.errors``; each carries the errno that a mount would give. Every method may be
cancelled; a cancelled change may have been made. Times are ns since the epoch, sizes and offsets bytes.
"""

import itertools
import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import trio

from .config import Settings
from .errors import (
    AuthenticationFailed,
    Exists,
    InvalidArgument,
    IsADirectory,
    NotADirectory,
    NotFound,
    Stale,
    SymlinkLoop,
    UserError,
)
from .limits import READDIR_ENTRIES_MAX
from .model import LOCK_END, ROOT_INO, Attrs, ClientId, DirEntry, LockKind, LockType
from .ports import Peer
from .registry import Registry, boot_id
from .rpc.client import Links, open_links
from .rpc.messages import TIME_NOW, TIME_OMIT
from .rpc.ucx import UcxEngine
from .services.file_locks import FileLocks, open_locks
from .services.files import Files, Handle, open_files
from .services.namespace import Namespace, Space

__all__ = ["TIME_NOW", "TIME_OMIT", "Attrs", "DirEntry", "File", "FileSystem", "Space", "open_cluster"]

#: A path as callers give it.
StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

log = logging.getLogger(__name__)

#: Seconds to wait for daemons that are not there yet: starting all of a cluster's daemons takes a few.
COMPLETE_TIMEOUT_S = 30.0
#: Seconds to connect to daemons that say that they are there.
CONNECT_TIMEOUT_S = 15.0
#: Seconds to flush behind a program that failed or was cancelled and wants to end.
LEAVE_TIMEOUT_S = 10.0
#: Symbolic links followed in one path: MAXSYMLINKS of Linux (include/linux/namei.h).
SYMLINKS_MAX = 40
#: Times that a file is opened again that was replaced or made between looking and opening.
OPENS_MAX = 100


class File:
    """Be one open file of a ``FileSystem``; several tasks may use it at once. Close it, or use it in ``async with``.

    After that everything but ``close`` raises BadHandle.
    """

    def __init__(self, files: Files, locks: FileLocks, handle: Handle, owner: int) -> None:
        self._files = files
        self._locks = locks
        self._handle = handle
        #: Whose the locks are that are taken here.
        self._owner = owner

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def ino(self) -> int:
        """Return the inode number."""
        return self._handle.ino

    async def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill a writable buffer from ``offset`` on; return how many bytes there were: fewer only at the end.

        The buffer belongs to the call until it returns; all of it may be overwritten.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            found = await self._files.read(self._handle, offset + done, view[done:])
            if not found:
                break
            done += found
        return done

    async def read(self, length: int, offset: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on; fewer only at the end."""
        buffer = bytearray(length)
        found = await self.read_into(buffer, offset)
        return bytes(memoryview(buffer)[:found])

    async def write(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Write all of ``data`` at ``offset`` (a file opened with O_APPEND: at its end); return its length.

        On return ``data`` is the caller's again. The bytes may be on their way still (accepted); ``fsync`` and
        ``close`` wait for them, and report those that could not be written.
        """
        length = await self._files.write(self._handle, offset, memoryview(data).cast("B"))
        if self._handle.syncs:
            await self._files.fsync(self._handle)
        return length

    async def truncate(self, size: int) -> None:
        """Cut or extend the file."""
        self._files.check_open(self._handle)
        await self._files.setattr(self.ino, size=size, mtime_ns=TIME_NOW)

    async def fallocate(self, offset: int, length: int, mode: int = 0) -> None:
        """Reserve space for a range, or do what ``mode`` of fallocate(2) says. NoSpace; NotSupported: any other mode.

        Known are FALLOC_FL_KEEP_SIZE (1), FALLOC_FL_ZERO_RANGE (16), both, and FALLOC_FL_PUNCH_HOLE with the first (3).
        """
        await self._files.fallocate(self._handle, mode, offset, length)
        if self._handle.syncs:
            await self._files.fsync(self._handle)

    async def seek_data(self, offset: int) -> int:
        """Return the first byte at or behind ``offset`` that is not in a hole. NoDevice (ENXIO): there is none."""
        return await self._files.seek(self._handle, offset, os.SEEK_DATA)

    async def seek_hole(self, offset: int) -> int:
        """Return the first byte at or behind ``offset`` in a hole, or the size. NoDevice (ENXIO): behind the end."""
        return await self._files.seek(self._handle, offset, os.SEEK_HOLE)

    async def copy_range(self, offset: int, target: "File", target_offset: int, length: int) -> int:
        """Have the daemons copy bytes of this file into another, or to another place of it; return how many.

        That may be fewer than asked for; 0 at the end of this file. Ranges that overlap are an InvalidArgument.
        """
        copied = await self._files.copy_range(self._handle, offset, target._handle, target_offset, length)
        if target._handle.syncs:
            await target._files.fsync(target._handle)
        return copied

    async def stat(self) -> Attrs:
        """Return the attributes."""
        self._files.check_open(self._handle)
        return await self._files.getattr(self.ino)

    async def fsync(self) -> None:
        """Bring everything written here to stable storage."""
        await self._files.fsync(self._handle)

    async def lock(self, offset: int = 0, length: int = 0, *, shared: bool = False, wait: bool = True) -> None:
        """Lock ``length`` bytes (0: however long the file gets) against everybody, or, ``shared``, against writers.

        These are the locks of fcntl(2); this open file is their owner, as with F_OFD_SETLK. What it holds of these
        bytes is replaced. Cancelled: nothing has changed. WouldBlock, if it should not ``wait``; Deadlock, NoLocks.
        """
        await self._lock(LockType.READ if shared else LockType.WRITE, offset, length, wait)

    async def unlock(self, offset: int = 0, length: int = 0) -> None:
        """Give back ``length`` bytes (0: all behind ``offset``), whether they were locked or not."""
        await self._lock(LockType.UNLOCK, offset, length, wait=False)

    async def _lock(self, type_: LockType, offset: int, length: int, wait: bool) -> None:
        self._files.check_open(self._handle)
        end = offset + length - 1 if length else LOCK_END
        await self._locks.set(self.ino, self._owner, LockKind.POSIX, type_, offset, end, wait, os.getpid())

    async def close(self) -> None:
        """Flush, unlock and close. What an earlier write failed with comes out once; the file is closed even so."""
        try:
            await self._files.flush(self._handle)
        finally:
            try:
                await self._locks.drop(self.ino, self._owner, LockKind.POSIX)
            finally:
                await self._files.release(self._handle)


class _Place(NamedTuple):
    """Say where a path leads: the directory, the name in it, and what the name stands for, if anything."""

    parent: int
    name: bytes
    attrs: Attrs | None


class FileSystem:
    """Be the file system of a cluster. ``uid`` and ``gid`` own what is made here."""

    def __init__(self, namespace: Namespace, files: Files, locks: FileLocks, uid: int, gid: int) -> None:
        self.namespace = namespace
        self.files = files
        self.locks = locks
        self._owners = itertools.count(1)
        self._uid = uid
        self._gid = gid

    # ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _walk(self, path: StrPath, follow: bool, last: bool = True) -> _Place:
        """Find where a path leads; with ``follow``, through a symbolic link at its end too.

        Without ``last`` the name at the end is not looked up: what it stands for is None, whatever there is.
        """
        todo = _components(path)
        directory: Attrs | None = None  # stands for the root: nothing has to be asked about it on the way
        links = 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                if directory is not None:
                    directory = await self.files.getattr(directory.parent or ROOT_INO)
                continue
            parent = directory.ino if directory is not None else ROOT_INO
            if not todo and not last:
                return _Place(parent, name, None)
            try:
                attrs = await self.files.fresh(await self.namespace.lookup(parent, name))
            except NotFound:
                if todo:
                    raise
                return _Place(parent, name, None)
            if stat.S_ISLNK(attrs.mode) and (todo or follow):
                links += 1
                if links > SYMLINKS_MAX:
                    raise SymlinkLoop(repr(path))
                target = await self.namespace.readlink(attrs.ino)
                if target.startswith(b"/"):
                    directory = None
                todo = _components(target) + todo
                continue
            if not todo:
                return _Place(parent, name, attrs)
            if not attrs.is_dir:
                raise NotADirectory(repr(name))
            directory = attrs
        directory = directory or await self.files.getattr(ROOT_INO)
        return _Place(directory.ino, b"", directory)

    async def _find(self, path: StrPath, follow: bool = True) -> Attrs:
        attrs = (await self._walk(path, follow)).attrs
        if attrs is None:
            raise NotFound(repr(path))
        return attrs

    async def _new_place(self, path: StrPath) -> _Place:
        """Find where something is to be made or removed; the root is no such place."""
        place = await self._walk(path, follow=False, last=False)
        if not place.name:
            raise InvalidArgument(f"{path!r} ends in no name")
        return place

    # ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def stat(self, path: StrPath, *, follow: bool = True) -> Attrs:
        """Return the attributes of what a path leads to."""
        return await self._find(path, follow)

    async def setattr(
        self,
        path: StrPath,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int = TIME_OMIT,
        mtime_ns: int = TIME_OMIT,
        follow: bool = True,
    ) -> Attrs:
        """Change attributes, return them all. TIME_NOW is the daemon's clock; ``size`` truncates or extends."""
        attrs = await self._find(path, follow)
        if size is not None and not attrs.is_file:
            raise IsADirectory(repr(path)) if attrs.is_dir else InvalidArgument(f"{path!r} has no size to set")
        return await self.files.setattr(
            attrs.ino, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns
        )

    async def getxattr(self, path: StrPath, name: bytes, *, follow: bool = True) -> bytes:
        """Return an extended attribute. NoAttribute."""
        return await self.namespace.getxattr((await self._find(path, follow)).ino, name)

    async def setxattr(self, path: StrPath, name: bytes, value: bytes, flags: int = 0, *, follow: bool = True) -> None:
        """Set an extended attribute; ``flags``: os.XATTR_CREATE, os.XATTR_REPLACE."""
        attrs = await self.namespace.setxattr((await self._find(path, follow)).ino, name, value, flags)
        self.files.known.see(attrs, own=True)

    async def listxattr(self, path: StrPath, *, follow: bool = True) -> Sequence[bytes]:
        """List the names of extended attributes."""
        return await self.namespace.listxattr((await self._find(path, follow)).ino)

    async def removexattr(self, path: StrPath, name: bytes, *, follow: bool = True) -> None:
        """Remove an extended attribute. NoAttribute."""
        attrs = await self.namespace.removexattr((await self._find(path, follow)).ino, name)
        self.files.known.see(attrs, own=True)

    async def statfs(self) -> Space:
        """Sum up the space under all daemons."""
        return await self.namespace.space()

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, path: StrPath, flags: int = os.O_RDONLY, mode: int = 0o666) -> File:
        """Open a regular file with ``flags`` of open(2); O_CREAT makes it with ``mode`` (no umask is applied)."""
        for _ in range(OPENS_MAX):
            new = bool(flags & os.O_CREAT and flags & os.O_EXCL)  # the daemon says if it is not
            place = await self._walk(path, follow=not flags & (os.O_NOFOLLOW | os.O_EXCL), last=not new)
            try:
                handle = await self._open(place, flags, mode)
                return File(self.files, self.locks, handle, next(self._owners))
            except (Stale, Exists) as error:
                if isinstance(error, Exists) and flags & os.O_EXCL:
                    raise
        raise NotFound(f"{path!r} was replaced {OPENS_MAX} times while it was opened")

    async def _open(self, place: _Place, flags: int, mode: int) -> Handle:
        attrs = place.attrs
        if attrs is None:
            if not flags & os.O_CREAT:
                raise NotFound(repr(place.name))
            return await self.files.create(place.parent, place.name, mode, self._uid, self._gid, flags)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise Exists(repr(place.name))
        if stat.S_ISLNK(attrs.mode):
            raise SymlinkLoop(repr(place.name))
        if attrs.is_dir:
            raise IsADirectory(repr(place.name))
        if not attrs.is_file:
            raise InvalidArgument(f"{place.name!r} is no regular file")
        return await self.files.open(attrs.ino, flags)

    async def mkdir(self, path: StrPath, mode: int = 0o777) -> Attrs:
        """Make a directory. Exists."""
        return await self._make(path, stat.S_IFDIR | stat.S_IMODE(mode))

    async def mknod(self, path: StrPath, mode: int, rdev: int = 0) -> Attrs:
        """Make a file, FIFO, socket or device; ``mode`` holds the type too. Exists."""
        return await self._make(path, mode, rdev=rdev)

    async def symlink(self, target: bytes | str, path: StrPath) -> Attrs:
        """Make a symbolic link to ``target``. Exists."""
        return await self._make(path, stat.S_IFLNK | 0o777, target=os.fsencode(target))

    async def _make(self, path: StrPath, mode: int, *, rdev: int = 0, target: bytes = b"") -> Attrs:
        place = await self._walk(path, follow=False, last=False)
        if place.attrs is not None:
            raise Exists(repr(path))
        attrs = await self.namespace.make(
            place.parent, place.name, mode, self._uid, self._gid, rdev=rdev, target=target
        )
        return self.files.known.see(attrs)

    async def readlink(self, path: StrPath) -> bytes:
        """Return where a symbolic link points. InvalidArgument for anything else."""
        return await self.namespace.readlink((await self._find(path, follow=False)).ino)

    async def link(self, path: StrPath, new_path: StrPath) -> Attrs:
        """Give a file another name. Exists."""
        attrs = await self._find(path, follow=False)
        place = await self._new_place(new_path)
        return self.files.known.see(await self.namespace.link(attrs.ino, place.parent, place.name))

    async def remove(self, path: StrPath) -> None:
        """Remove a name that is not a directory's."""
        place = await self._new_place(path)
        await self.namespace.unlink(place.parent, place.name)

    async def rmdir(self, path: StrPath) -> None:
        """Remove an empty directory."""
        place = await self._new_place(path)
        await self.namespace.rmdir(place.parent, place.name)

    async def rename(self, old_path: StrPath, new_path: StrPath, flags: int = 0) -> None:
        """Move a name, over whatever is at the new place; ``flags`` of renameat2(2): NOREPLACE is 1, EXCHANGE 2."""
        old, new = await self._new_place(old_path), await self._new_place(new_path)
        await self.namespace.rename(old.parent, old.name, new.parent, new.name, flags)

    async def scandir(self, path: StrPath = "/") -> AsyncIterator[DirEntry]:
        """Iterate over a directory, in no particular order, with attributes, without ``.`` and ``..``."""
        ino, cookie = (await self._find(path)).ino, 0
        while True:
            page = await self.namespace.readdir(ino, cookie, READDIR_ENTRIES_MAX)
            for entry in page.entries:
                yield entry
            if page.end:
                return
            cookie = page.cookie

    async def listdir(self, path: StrPath = "/") -> list[bytes]:
        """Return the names in a directory, sorted."""
        return sorted([entry.name async for entry in self.scandir(path)])


def _components(path: StrPath) -> list[bytes]:
    return [name for name in os.fsencode(path).split(b"/") if name not in (b"", b".")]


class Session(NamedTuple):
    """Hold what a process has of one cluster."""

    cluster_id: str
    links: Links
    namespace: Namespace
    files: Files
    locks: FileLocks
    network: UcxEngine


@asynccontextmanager
async def open_session(registry: Path, settings: Settings, *, kind: str, label: str) -> AsyncIterator[Session]:
    """Be a client of a cluster, all of whose daemons are there; ``kind`` and ``label`` as in Hello.

    UserError when the cluster cannot be reached or does not let us in.
    """
    mount, ucx = settings.mount, settings.ucx
    failure: Exception | None = None
    with Registry(registry) as directory:
        cluster = directory.cluster
        client_id = ClientId(secrets.randbits(63))
        async with UcxEngine(
            Peer(client_id, -1, socket.gethostname(), os.getpid(), boot_id()),
            directory.secret,
            bytes.fromhex(cluster.cluster_id),
            tls=ucx.tls or None,
            net_devices=ucx.net_devices or None,
            public=ucx.public,
            spin_us=mount.spin_us,
        ) as engine:
            await directory.wait_complete(COMPLETE_TIMEOUT_S, log.warning)
            async with open_links(
                engine,
                directory,
                cluster.shard_map,
                client_id,
                kind=kind,
                label=label,
                op_timeout_s=mount.op_timeout_s or float("inf"),
            ) as links:
                namespace = Namespace(links)
                try:
                    await _connect(links)
                    async with (
                        open_locks(links) as locks,
                        open_files(
                            namespace,
                            gather_bytes_max=mount.gather_bytes_max,
                            gather_time_s=mount.gather_time_s,
                            atime=not mount.noatime,
                        ) as files,
                    ):
                        links.opens, links.on_lost = files.opens, files.lose
                        links.on_power_lost = files.power_lost
                        yield Session(cluster.cluster_id, links, namespace, files, locks, engine)
                except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it into a group
                    failure = error
    if failure is not None:
        raise failure


async def _connect(links: Links) -> None:
    """Wait for all daemons. UserError says which one could not be reached, and why."""
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            await links.wait_connected()
    except (AuthenticationFailed, Stale) as refusal:
        raise UserError(f"the cluster does not let us in: {refusal}") from None
    except trio.TooSlowError:
        away = [
            f"{state.daemon_id} at {state.address} ({state.trouble})"
            for state in links.statistics()
            if not state.connected
        ]
        raise UserError(f"gave up after {CONNECT_TIMEOUT_S:.0f} s without daemon {', '.join(away)}") from None


@asynccontextmanager
async def open_cluster(
    registry: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    uid: int | None = None,
    gid: int | None = None,
) -> AsyncIterator[FileSystem]:
    """Open a cluster by its registry directory; at the end, however it comes, all is flushed and every file closed.

    What is made belongs to ``uid`` and ``gid``, by default those of this process. One open cluster is one session:
    locks, caches and accepted writes are its own. UserError when the cluster cannot be reached or does not let us in.
    """
    failure: Exception | None = None
    ended = trio.Event()
    scope = trio.CancelScope()

    async def be_session(task_status: trio.TaskStatus[Session]) -> None:
        label = Path(sys.argv[0]).name or "python"
        with scope:
            async with open_session(Path(registry), settings or Settings(), kind="tool", label=label) as session:
                scope.shield = True  # it outlives a block that is cancelled, and flushes what that has written
                task_status.started(session)
                await ended.wait()
                await session.files.leave()

    async with trio.open_nursery() as nursery:
        in_order = False
        try:
            session = await nursery.start(be_session)
            yield FileSystem(
                session.namespace,
                session.files,
                session.locks,
                os.geteuid() if uid is None else uid,
                os.getegid() if gid is None else gid,
            )
            in_order = True
        except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it into a group
            failure = error
        finally:
            if not in_order:
                scope.deadline = trio.current_time() + LEAVE_TIMEOUT_S
            ended.set()
    if scope.cancelled_caught:
        log.warning("not everything could be flushed in %.0f s", LEAVE_TIMEOUT_S)
    if failure is not None:
        raise failure
