"""Do file I/O through io_uring from trio: the only importer of liburing.

An operation is submitted at once, by itself. What the kernel can do without blocking it has done when the submission
returns: a read from the page cache anywhere but on tmpfs, a buffered write on XFS. So the ring looks before it waits,
and such an operation costs no wait at all. Other operations are waited for through epoll on the ring's own file
descriptor, readable while there are completions (io_uring(7)). There is no reaping task: one of the waiting tasks, the
leader, waits for the descriptor and hands out everybody's completions; when its own is among them and others still
wait, the next one leads. With one operation under way that is one wake-up, of the task that wants the result. No timer
is involved anywhere.

An operation that was submitted cannot be cancelled: its task waits until the kernel has finished with the buffers.

liburing 2026.3.30 leaks: ``Iovec`` exports a memoryview's buffer and never releases the export, so that view and buffer
live for ever, 320 bytes and all the data per operation. ``_release_export`` makes up for it when the operation is done.

Measured (2 virtual cores, Linux 6.18, page cache warm, through trio, medians in µs; reads cost the same):

                              4 KiB         64 KiB         1 MiB          4 MiB
                            ring plain    ring plain    ring plain    ring plain
    ext4  write, handed over  15   6.5      25   8.8     114    69     376   319
    tmpfs write, handed over 6.6   0.8      11   5.3     132    87     474   417
    XFS   write, inline      3.8   1.0     6.0   3.2      62    50     297   289
    ext4, XFS read, inline   3.4   0.7     6.0   3.4      60    55     292   284

``plain`` is ``os.pwritev`` or ``os.preadv``. Handing over costs this little only while the worker thread is awake on
another core; when it has to be woken first, it is 50 to 60 µs. That is more than copying a few hundred KiB takes, so
where the probe sees hand-overs, small operations may be plain calls (``PLAIN_LENGTH_MAX``). RWF_NOWAIT would be no
third way: ext4 refuses it for writes and tmpfs for everything, and where it works io_uring completes inline as well.
"""

import ctypes
import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import liburing
import trio

from ..limits import KIB
from ..observe import recording, spans
from ..ports import Buffer

#: Operations that may be at the kernel at once. Enough for a fast NVMe drive; each is some 200 bytes of locked memory.
DEPTH = 256
#: Where operations are handed to a kernel worker, up to this length a plain call takes less time than the hand-over
#: alone, and blocks the event loop for less than 30 µs. Above it the copy is worth another core.
PLAIN_LENGTH_MAX = 256 * KIB
#: Submissions of one operation after EAGAIN (no memory for it just now) before it is given up as failed.
ATTEMPTS_MAX = 1000
#: Operations of each kind that the probe times, and their size: the median of some dozens of the commonest one.
PROBES = 32
PROBE_LENGTH = 4 * KIB


class _PyBuffer(ctypes.Structure):
    """Lay out CPython's ``Py_buffer`` (part of its stable ABI since 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_py_buffer = _PyBuffer()
_py_buffer_address = ctypes.addressof(_py_buffer)
_py_buffer_release = ctypes.pythonapi.PyBuffer_Release
_py_buffer_release.argtypes = (ctypes.c_void_p,)
_py_buffer_release.restype = None


def _release_export(view: memoryview) -> None:
    """Release one export of a memoryview: what ``Iovec`` should have done. PyBuffer_Release reads ``obj`` alone."""
    _py_buffer.obj = id(view)
    _py_buffer_release(_py_buffer_address)


def _iovec_leaks() -> bool:
    """Find out whether this version of the binding keeps a memoryview exported."""
    view = memoryview(bytearray(1))
    liburing.Iovec([view])
    try:
        view.release()
    except BufferError:
        _release_export(view)
        return True
    return False


_IOVEC_LEAKS = _iovec_leaks()


class RingStatistics(NamedTuple):
    """Count operations since the ring was made, by how they ended, and what is under way now."""

    #: Completed when the submission returned.
    at_once: int
    #: Waited for.
    waited: int
    #: Found the queue full and waited for a place first.
    queued: int
    in_flight: int


class _Operation:
    """Follow one submitted operation: its result once ``done``, and who waits for it: a parked task, or the leader."""

    __slots__ = ("done", "keep", "leads", "result", "task")

    def __init__(self, keep: "tuple[object, memoryview] | None") -> None:
        #: The Iovec and its buffer, referenced until the operation is done.
        self.keep = keep
        self.done = False
        self.result = 0
        self.task: trio.lowlevel.Task | None = None
        self.leads: trio.CancelScope | None = None


class Ring:
    """Submit operations on file descriptors and wait for them. Belongs to one trio run.

    Methods raise OSError with the operation's errno. Callers keep the file descriptor open until the method returns;
    buffers are referenced here until then.
    """

    def __init__(self, depth: int = DEPTH) -> None:
        """Set up a ring for ``depth`` operations at once; raise OSError where io_uring is not allowed."""
        self._ring = liburing.Ring()
        liburing.io_uring_queue_init(depth, self._ring)
        self._cqe = liburing.Cqe()
        self._fd: int = self._ring.ring_fd
        self._depth = depth
        self._operations: dict[int, _Operation] = {}
        self._serial = 0
        self._leader = False
        self._places = trio.lowlevel.ParkingLot()
        self._at_once = self._waited = self._queued = 0
        self._closed = False

    def statistics(self) -> RingStatistics:
        """Return the counters."""
        return RingStatistics(self._at_once, self._waited, self._queued, len(self._operations))

    async def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Read into ``into`` from ``offset`` until it is full or the file ends; return the bytes read."""
        total = 0
        while total < len(into):
            count = await self._vector(
                liburing.io_uring_prep_readv, fd, into[total:] if total else into, offset + total
            )
            if count == 0:
                break
            total += count
        return total

    async def write(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        left = memoryview(data)
        while left:
            count = await self._vector(liburing.io_uring_prep_writev, fd, left, offset)
            if count == 0:
                raise OSError(errno.EIO, "write made no progress")
            left = left[count:]
            offset += count

    async def fsync(self, fd: int, *, data_only: bool) -> None:
        """Bring a file to stable storage; ``data_only`` leaves out times (fdatasync)."""
        flags = liburing.IORING_FSYNC_DATASYNC if data_only else 0
        await self._run(lambda sqe: liburing.io_uring_prep_fsync(sqe, fd, flags), None)

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Do what fallocate(2) does; the kernel always hands it to a worker, as it may wait for the disk."""
        await self._run(lambda sqe: liburing.io_uring_prep_fallocate(sqe, fd, mode, offset, length), None)

    async def aclose(self) -> None:
        """Release the ring. Nothing may be under way."""
        assert not self._operations
        if not self._closed:
            self._closed = True
            liburing.io_uring_queue_exit(self._ring)
        await trio.lowlevel.checkpoint()

    async def _vector(self, prepare: Callable[..., None], fd: int, buffer: memoryview, offset: int) -> int:
        vector = liburing.Iovec([buffer])
        return await self._run(lambda sqe: prepare(sqe, fd, vector, offset), (vector, buffer))

    async def _run(self, prepare: Callable[[Any], None], keep: tuple[object, memoryview] | None) -> int:
        """Do one operation, ``keep`` referenced until it completed; return its result. Does not yield if inline."""
        for _ in range(ATTEMPTS_MAX):
            while len(self._operations) >= self._depth:
                self._queued += 1
                await self._places.park()
            started_ns = recording.now()
            operation = self._submit(prepare, keep)
            self._reap()
            recording.note(spans.SUBMIT, started_ns)
            if operation.done:
                self._at_once += 1
            else:
                self._waited += 1
                started_ns = recording.now()
                await self._wait(operation)
                recording.note(spans.COMPLETE, started_ns)
            if operation.result >= 0:
                return operation.result
            if -operation.result not in (errno.EINTR, errno.EAGAIN):
                break
            await trio.lowlevel.cancel_shielded_checkpoint()
        raise OSError(-operation.result, os.strerror(-operation.result))

    def _submit(self, prepare: Callable[[Any], None], keep: tuple[object, memoryview] | None) -> _Operation:
        assert not self._closed
        sqe = liburing.io_uring_get_sqe(self._ring)
        assert sqe is not None, "fewer operations than entries, and each is submitted at once"
        operation = _Operation(keep)
        self._serial += 1
        prepare(sqe)
        sqe.user_data = self._serial
        self._operations[self._serial] = operation
        while True:
            try:
                liburing.io_uring_submit(self._ring)
            except OSError as error:
                # The kernel was interrupted or short of memory and took nothing: the entry is still queued.
                if error.errno in (errno.EINTR, errno.EAGAIN):
                    continue
                raise
            return operation

    def _reap(self) -> None:
        """Hand every completion that is there to its operation, and wake the tasks concerned."""
        ready = liburing.io_uring_cq_ready(self._ring)
        for _ in range(ready):
            liburing.io_uring_peek_cqe(self._ring, self._cqe)
            cqe = self._cqe[0]
            operation = self._operations.pop(cqe.user_data)
            try:
                operation.result = cqe.res
            except OSError as error:
                # The binding raises a negative result as OSError.
                operation.result = -(error.errno or errno.EIO)
            liburing.io_uring_cqe_seen(self._ring, cqe)
            operation.done = True
            if operation.keep is not None and _IOVEC_LEAKS:
                _release_export(operation.keep[1])
            operation.keep = None
            if operation.task is not None:
                trio.lowlevel.reschedule(operation.task)
                operation.task = None
            elif operation.leads is not None:
                # Another task reaped it: the descriptor need not become readable again.
                operation.leads.cancel()
        if ready and self._places:
            self._places.unpark(count=self._depth - len(self._operations))

    async def _wait(self, operation: _Operation) -> None:
        """Wait until an operation is done, uncancellably; lead if nobody does."""
        while not operation.done:
            if self._leader:
                operation.task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
                continue
            self._leader = True
            try:
                with trio.CancelScope(shield=True) as operation.leads:
                    await trio.lowlevel.wait_readable(self._fd)
            finally:
                self._leader = False
            self._reap()
        if not self._leader:
            # The next leader: any operation whose task is parked.
            for other in self._operations.values():
                if other.task is not None:
                    trio.lowlevel.reschedule(other.task)
                    other.task = None
                    break


class BareRing:
    """Do one operation after the other, blocking in the kernel: what io_uring costs with nothing around it.

    For measuring. ``buffer`` is what all operations write from or read into; it is the ring's until ``close``.
    """

    def __init__(self, buffer: memoryview) -> None:
        """Set up a ring; raise OSError where io_uring is not allowed."""
        self._ring = liburing.Ring()
        liburing.io_uring_queue_init(1, self._ring)
        self._cqe = liburing.Cqe()
        self._buffer = buffer
        self._vector = liburing.Iovec([buffer])

    def write(self, fd: int, offset: int) -> int:
        """Write the buffer at ``offset``; return how many bytes went."""
        return self._run(liburing.io_uring_prep_writev, fd, offset)

    def read(self, fd: int, offset: int) -> int:
        """Fill the buffer from ``offset`` on; return how many bytes came."""
        return self._run(liburing.io_uring_prep_readv, fd, offset)

    def close(self) -> None:
        """Release the ring."""
        liburing.io_uring_queue_exit(self._ring)
        if _IOVEC_LEAKS:
            _release_export(self._buffer)

    def _run(self, prepare: Callable[..., None], fd: int, offset: int) -> int:
        prepare(liburing.io_uring_get_sqe(self._ring), fd, self._vector, offset)
        liburing.io_uring_submit_and_wait(self._ring, 1)
        liburing.io_uring_peek_cqe(self._ring, self._cqe)
        try:
            done: int = self._cqe[0].res  # the binding raises a negative result as OSError
        finally:
            liburing.io_uring_cqe_seen(self._ring, self._cqe[0])
        return done


class ProbeResult(NamedTuple):
    """Say how buffered I/O in a directory behaves: whether io_uring does it inline, and medians in microseconds."""

    filesystem: str
    buffered_write_inline: bool
    buffered_read_inline: bool
    uring_write_us: float
    pwrite_us: float
    uring_read_us: float
    pread_us: float


async def probe_inline(directory: Path) -> ProbeResult:
    """Measure buffered 4 KiB writes and reads in ``directory``, through a ring and by plain calls; raise OSError.

    Takes some milliseconds and leaves nothing behind. Time does not tell inline from handed over, as a busy worker on
    another core can be done before the submission returns. The kernel does: IORING_REGISTER_EVENTFD_ASYNC counts
    the completions by worker threads alone (io_uring_register(2)).
    """
    ring = Ring(depth=8)
    handed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            liburing.io_uring_register_eventfd_async(ring._ring, handed)
            fd = file.fileno()
            buffer = memoryview(bytearray(PROBE_LENGTH))
            os.pwrite(fd, bytes(PROBES * PROBE_LENGTH), 0)
            inline = []
            medians = []
            for operate, call in ((ring.write, os.pwritev), (ring.read, os.preadv)):
                ring_us, plain_us = [], []
                for offset in range(0, PROBES * PROBE_LENGTH, PROBE_LENGTH):
                    start = time.perf_counter()
                    await operate(fd, buffer, offset)
                    ring_us.append((time.perf_counter() - start) * 1e6)
                for offset in range(0, PROBES * PROBE_LENGTH, PROBE_LENGTH):
                    start = time.perf_counter()
                    call(fd, [buffer], offset)
                    plain_us.append((time.perf_counter() - start) * 1e6)
                inline.append(_drained(handed) <= PROBES // 2)
                medians += [median(ring_us), median(plain_us)]
        return ProbeResult(filesystem_of(directory), inline[0], inline[1], *medians)
    finally:
        os.close(handed)
        await ring.aclose()


def _drained(counter: int) -> int:
    """Return an eventfd's count and reset it."""
    try:
        return os.eventfd_read(counter)
    except BlockingIOError:
        return 0


def filesystem_of(directory: Path) -> str:
    """Name the type of the file system that holds a directory, by the kernel's list of mounts (proc(5))."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = "unknown"
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == wanted:
                found = fields[fields.index("-") + 1]
    return found
