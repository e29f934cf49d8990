"""Serve the operations that pyfuse3 has no handlers for: space, holes, copies, locks, and attributes set by flags.

The companion library hands them over within pyfuse3's loop. Each becomes a task here, which answers when it is done.

**Locks and data.** A lock is what programs on two mounts use to take turns on a file, as they do over NFS. So whoever
gets a lock is to see what was written before it was given back: giving one back flushes the file first, and getting
one asks for the file's attributes and drops what the kernel has cached if they tell of a change made elsewhere.
"""

import errno
import fcntl
import functools
import math
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress

import trio

from .companion import Companion, Hooks
from .errors import BadHandle, DaemonUnreachable, FsError, InvalidArgument, NoDevice
from .fuse import BenchfsOperations, errno_of
from .interrupts import Interrupts
from .model import LOCK_END, LockKind, LockType
from .observe import recording
from .services.file_locks import FileLocks
from .services.files import Files, Handle

#: What gives the kernel its answer.
Answer = Callable[[], None]

_TYPES = {fcntl.F_RDLCK: LockType.READ, fcntl.F_WRLCK: LockType.WRITE, fcntl.F_UNLCK: LockType.UNLOCK}
_KINDS = {type_: kind for kind, type_ in _TYPES.items()}


class Extras:
    """Serve what the companion library adds. ``locks`` None leaves locks to the kernel of this mount."""

    def __init__(
        self,
        companion: Companion,
        operations: BenchfsOperations,
        files: Files,
        locks: FileLocks | None,
        interrupts: Interrupts,
        *,
        xattr: bool,
    ) -> None:
        self._companion = companion
        self._operations = operations
        self._files = files
        self._locks = locks
        self._interrupts = interrupts
        self._xattr = xattr
        self._nursery: trio.Nursery | None = None

    def hooks(self) -> Hooks:
        """Return what the library is to call."""
        locks = self._locks is not None
        return Hooks(
            fallocate=self._on_fallocate,
            lseek=self._on_lseek,
            copy_file_range=self._on_copy_file_range,
            getlk=self._on_getlk if locks else None,
            setlk=self._on_setlk if locks else None,
            setxattr=self._on_setxattr if self._xattr else None,
            interrupt=self._interrupts.signal,
        )

    async def serve(self, main: Callable[[], Awaitable[None]]) -> None:
        """Serve for as long as ``main`` runs; what waits then is answered with EINTR."""
        async with trio.open_nursery() as self._nursery:
            await main()
            self._nursery.cancel_scope.cancel()

    def _start(
        self,
        request: int,
        name: str,
        serve: Callable[[], Awaitable[Answer]],
        changed: int = 0,
        take_back: Callable[[], Awaitable[None]] | None = None,
        patient: bool = False,
    ) -> None:
        """Run a task that serves a request, which changes data of the file handle ``changed``.

        It has a deadline as handlers have (fuse.guarded), unless it is ``patient``: it may have much to do, or to wait.

        Whoever was freed meanwhile did not tell the kernel so: then it drops its data, and ``take_back`` undoes what
        the caller, who was told EINTR, does not know of.
        """
        unique = self._interrupts.begin()
        started_ns, asked = time.perf_counter_ns(), self._operations.asked()
        timeout_s = math.inf if patient else self._operations.timeout_s
        ino = 0
        with suppress(BadHandle):  # it may be closed before this is done
            ino = self._operations.handle(changed).ino if changed else 0

        async def run() -> None:
            recorder = recording.recorder
            operation = recorder.begin_operation(name, *asked) if recorder is not None else None
            failed = 0
            answer: Answer | None = None
            try:
                with trio.move_on_after(timeout_s):
                    answer = await serve()
                if answer is None:
                    raise DaemonUnreachable(f"{name} took longer than {timeout_s} s")
            except trio.Cancelled:
                self._companion.reply_error(request, errno.EINTR)
                raise
            except Exception as error:  # noqa: BLE001  whoever waits gets an answer, and what is unforeseen is logged
                failed = errno_of(error, name)
                self._companion.reply_error(request, failed)
            else:
                answer()
            finally:
                self._operations.statistics.add(name, started_ns)
                if recorder is not None and operation is not None:
                    recorder.end_operation(operation, failed)
                if not self._interrupts.end(unique):
                    if ino:
                        self._operations.invalidate_data(ino)
                    if take_back is not None:
                        await take_back()

        assert self._nursery is not None, "requests come while the file system is served"
        self._nursery.start_soon(run)

    def _reply(self, request: int, error: int = 0) -> Answer:
        return functools.partial(self._companion.reply_error, request, error)

    # ── space ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_fallocate(self, request: int, fh: int, mode: int, offset: int, length: int) -> None:
        who = self._operations.caller()

        async def serve() -> Answer:
            handle = self._operations.handle(fh)
            await self._files.drop_privileges(handle, who)
            await self._files.fallocate(handle, mode, offset, length)
            await self._operations.sync_data(handle)
            return self._reply(request)

        self._start(request, "fallocate", serve, changed=fh, patient=True)

    def _on_lseek(self, request: int, fh: int, offset: int, whence: int) -> None:
        async def serve() -> Answer:
            handle = self._operations.handle(fh)
            find = self._find_data if whence == os.SEEK_DATA else self._find_hole
            found = await find(handle, offset, whence)
            return functools.partial(self._companion.reply_offset, request, found)

        self._start(request, "lseek", serve)

    async def _find_data(self, handle: Handle, offset: int, whence: int) -> int:
        """Seek data, and in what looks like a hole before it what only the kernel knows: pages that a mapping wrote."""
        end = 0
        with suppress(NoDevice):
            end = await self._files.seek(handle, offset, whence)
            if end == offset:
                return end
        await self._write_back(handle.ino, offset, end - offset if end else 0)
        return await self._files.seek(handle, offset, whence)

    async def _find_hole(self, handle: Handle, offset: int, whence: int) -> int:
        """Seek a hole in which no mapping has written."""
        found = await self._files.seek(handle, offset, whence)
        while True:
            await self._write_back(handle.ino, found, 1)
            try:
                again = await self._files.seek(handle, found, whence)
            except NoDevice:  # the end of the file, which is where there is a hole in any case
                return found
            if again == found:
                return found
            found = again

    async def _write_back(self, ino: int, offset: int, length: int) -> None:
        await trio.to_thread.run_sync(self._companion.write_back, ino, offset, length, abandon_on_cancel=True)

    def _on_copy_file_range(
        self, request: int, fh: int, offset: int, target_fh: int, target_offset: int, length: int, flags: int
    ) -> None:
        who = self._operations.caller()

        async def serve() -> Answer:
            if flags:
                raise InvalidArgument(f"copy_file_range with flags {flags}")
            source, target = self._operations.handle(fh), self._operations.handle(target_fh)
            await self._files.drop_privileges(target, who)
            copied = await self._files.copy_range(source, offset, target, target_offset, length)
            await self._operations.sync_data(target)
            return functools.partial(self._companion.reply_count, request, copied)

        self._start(request, "copy_file_range", serve, changed=target_fh, patient=True)

    # ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_getlk(self, request: int, ino: int, owner: int, kind: int, start: int, length: int) -> None:
        async def serve() -> Answer:
            assert self._locks is not None
            found = await self._locks.get(ino, owner, _TYPES[kind], start, _last(start, length))
            if found is None:
                return functools.partial(self._companion.reply_lock, request, fcntl.F_UNLCK, 0, 0, 0)
            type_, first, last, pid = found
            rest = 0 if last == LOCK_END else last - first + 1
            return functools.partial(self._companion.reply_lock, request, _KINDS[type_], first, rest, pid)

        self._start(request, "getlk", serve)

    def _on_setlk(self, request: int, ino: int, fh: int, owner: int, *lock: int) -> None:
        flock, kind, start, length, pid, wait, unique = lock

        lock_kind, type_ = LockKind.FLOCK if flock else LockKind.POSIX, _TYPES[kind]
        last = _last(start, length)
        new: list[tuple[int, int]] = []

        async def serve() -> Answer:
            assert self._locks is not None
            waits = wait and type_ is not LockType.UNLOCK  # nothing else is for a signal to end: nobody expects it
            with self._interrupts.waiting(unique) if waits else nullcontext() as scope:
                if type_ is LockType.UNLOCK:
                    await self._files.settle(self._operations.handle(fh))
                else:
                    await self._operations.begin_lock(fh, owner, lock_kind)
                before = self._locks.not_held(ino, owner, lock_kind, start, last)
                await self._locks.set(ino, owner, lock_kind, type_, start, last, bool(wait), pid)
                if type_ is not LockType.UNLOCK:
                    new.extend(before)
            if scope is not None and scope.cancelled_caught:
                return self._reply(request, errno.EINTR)
            if type_ is not LockType.UNLOCK:
                await self._operations.revalidate(ino)
            return self._reply(request)

        async def take_back() -> None:
            """Unlock what was locked while the caller was freed. It knows nothing of that, or it is dead."""
            assert self._locks is not None
            with suppress(FsError):  # the daemon is away: the handle's release tries again
                for first, end in new:
                    await self._locks.set(ino, owner, lock_kind, LockType.UNLOCK, first, end)

        self._start(request, "setlk", serve, take_back=take_back, patient=bool(wait))

    # ── extended attributes ──────────────────────────────────────────────────────────────────────────────────────────

    def _on_setxattr(self, request: int, ino: int, name: bytes, value: bytes, flags: int, uid: int) -> None:
        who = self._operations.caller()

        async def serve() -> Answer:
            await self._operations.set_xattr(ino, name, value, flags, who)
            return self._reply(request)

        self._start(request, "setxattr", serve)


def _last(start: int, length: int) -> int:
    """Return the last byte of a range as struct flock gives it (fcntl(2))."""
    return start + length - 1 if length else LOCK_END
