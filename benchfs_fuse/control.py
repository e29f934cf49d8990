"""Talk to a running mount process beside the file system: a Unix socket in the runtime directory, JSON lines.

The process that mounts leaves a ``MountRecord`` in the runtime directory, which names its process and its socket. A
client sends one line, a ``Question``; the process answers with lines, each a ``Report``, the last with ``done`` set.

    status   one report: what is open, what is under way, how the daemons are reached
    left     one report, without asking anybody: what is under way
    drain    flush everything; a report after every file
    layout   one report: where the chunks of inode ``ino`` lie
    count    one report: what the mount and the daemons have counted
    trace    record; a report when everybody does, then, when the client has shut its side down (shutdown(2)), reports
             with what was recorded
"""

import contextlib
import hashlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import trio

from .errors import UserError
from .observe.durations import Counters, Durations
from .observe.spans import Operation, Served
from .observe.spans import Request as TracedRequest
from .processes import ProcessId
from .runtime import file_for, runtime_dir

log = logging.getLogger(__name__)

#: Longest line that is read: a question is short; a report grows with the daemons of a cluster.
_LINE_MAX = 4 << 20
#: Chunks listed of one file: enough for 16 GiB in chunks of the default size.
CHUNKS_MAX = 4096
#: Clients that wait to be accepted: people and their scripts.
_BACKLOG = 8


class MountRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say who serves a mount point, and since when (seconds since the epoch)."""

    mountpoint: str
    registry: str
    cluster_id: str
    process: ProcessId
    socket: str
    since_s: float


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask a mount process for something."""

    command: Literal["status", "left", "drain", "layout", "count", "trace"]
    ino: int = 0
    #: How long to record at most.
    seconds: float = 0.0


class DaemonReport(msgspec.Struct, frozen=True):
    """Describe the way to one daemon, and what it says of itself (None if it does not answer)."""

    daemon_id: int
    connected: bool
    missing_since_s: float
    trouble: str
    address: str
    transport: str
    in_flight: int
    status: dict[str, object] | None = None


class ChunkReport(msgspec.Struct, frozen=True):
    """Say where one chunk lies: its place in the file, how much of the file's size falls into it, its daemon."""

    index: int
    offset: int
    length: int
    daemon: int


class LayoutReport(msgspec.Struct, frozen=True):
    """Say how a file is laid out. ``chunks``: the first ``CHUNKS_MAX``; ``count``: how many its size makes."""

    ino: int
    daemon: int
    size: int
    allocated: int
    chunk_size: int
    width: int
    count: int
    chunks: tuple[ChunkReport, ...]


class DaemonCounts(msgspec.Struct, frozen=True):
    """Say what one daemon has counted; see rpc.messages.StatisticsReply."""

    daemon_id: int
    uptime_s: float
    operations: dict[str, Durations]
    bytes_read: int
    bytes_written: int
    counters: Counters


class Counts(msgspec.Struct, frozen=True):
    """Say what a mount has counted, and what its daemons have, those that answered.

    ``time_s``: when (monotonic). ``absent_asked``: questions for attributes that hardly any file has, ``absent_known``:
    how many of them were answered from memory. ``requests``: of the kernel, ``at_once``: how many of them were answered
    in the step in which they were read. ``spins`` and ``sleeps``: calls answered without waiting, waits.
    """

    time_s: float
    operations: dict[str, Durations]
    bytes_read: int
    bytes_written: int
    in_flight: int
    absent_asked: int
    absent_known: int
    requests: int
    at_once: int
    spins: int
    sleeps: int
    daemons: tuple[DaemonCounts, ...]


class TracePart(msgspec.Struct, frozen=True):
    """Carry a part of what was recorded. ``recording``: everybody does, from now on; ``lost``: spans without room."""

    recording: bool = False
    operations: tuple[Operation, ...] = ()
    requests: tuple[TracedRequest, ...] = ()
    daemon: int = -1
    served: tuple[Served, ...] = ()
    lost: int = 0
    #: Why a daemon's part is missing, for people.
    trouble: str = ""


class Report(msgspec.Struct, frozen=True):
    """Tell how a mount is. ``not_tuned``: what could not be set in the kernel, and what that costs."""

    done: bool
    handles: int
    files: int
    dirty_files: int
    accepted_bytes: int
    version: str = ""
    expelled: str = ""
    not_tuned: tuple[str, ...] = ()
    daemons: tuple[DaemonReport, ...] = ()
    layout: LayoutReport | None = None
    #: Why the question could not be answered, for people.
    trouble: str = ""
    #: Ranges that are locked through this mount, and requests for locks that wait.
    locks_held: int = 0
    locks_waiting: int = 0
    counts: Counts | None = None
    trace: TracePart | None = None


class Asker(Protocol):
    """Be who has asked, for as long as the answer takes."""

    async def send(self, report: Report) -> None:
        """Send a report."""
        ...

    async def wait_shut(self) -> None:
        """Wait until the client has shut its side of the connection down, or has gone."""
        ...


#: Answer a question by sending reports, the last one with ``done`` set.
Answer = Callable[[Question, Asker], Awaitable[None]]

_encode = msgspec.json.Encoder().encode


def record_file(mountpoint: Path) -> Path:
    """Return where the record of a mount point lies (absolute, without symbolic links)."""
    return file_for(mountpoint, ".mount.json")


def socket_file(mountpoint: Path) -> Path:
    """Return where the socket lies. Its name is a hash: a socket's path has 107 bytes at most (unix(7))."""
    return runtime_dir() / (hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock")


def write_record(record: MountRecord) -> None:
    """Leave a record, whole or not at all."""
    path = record_file(Path(record.mountpoint))
    new = path.with_suffix(".new")
    new.write_bytes(_encode(record))
    new.rename(path)


def read_record(mountpoint: Path) -> MountRecord | None:
    """Return the record of a mount point, None if there is none that can be read."""
    try:
        return msgspec.json.decode(record_file(mountpoint).read_bytes(), type=MountRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def records() -> Iterator[MountRecord]:
    """Yield the records of all mounts of this user, dead ones among them."""
    for path in sorted(runtime_dir().glob("*.mount.json")):
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            yield msgspec.json.decode(path.read_bytes(), type=MountRecord)


def remove_record(mountpoint: Path) -> None:
    """Take the record and the socket away."""
    record_file(mountpoint).unlink(missing_ok=True)
    socket_file(mountpoint).unlink(missing_ok=True)


def ask(
    record: MountRecord, question: Question, timeout_s: float, meanwhile: Callable[[], None] | None = None
) -> Iterator[Report]:
    """Ask a mount process; yield its reports. For synchronous programs.

    ``timeout_s`` bounds the whole answer. UserError when the process does not answer, or not in time. ``meanwhile`` is
    called when a trace is being recorded; when it returns, or raises, the recording ends. Its time does not count.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(record.socket)
            connection.sendall(_encode(question) + b"\n")
            with connection.makefile("rb") as lines:
                while line := lines.readline(_LINE_MAX):
                    report = msgspec.json.decode(line, type=Report)
                    if meanwhile is not None and report.trace is not None and report.trace.recording:
                        begun = time.monotonic()
                        meanwhile()
                        deadline += time.monotonic() - begun
                        connection.shutdown(socket.SHUT_WR)
                    yield report
                    if report.done:
                        return
                    connection.settimeout(max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            raise UserError(
                f"the process {record.process.pid} behind {record.mountpoint} did not answer in {timeout_s:g} s"
            ) from None
        except (OSError, msgspec.DecodeError) as error:
            raise UserError(
                f"cannot ask the process {record.process.pid} behind {record.mountpoint}: {error}"
            ) from None
    raise UserError(f"the process {record.process.pid} behind {record.mountpoint} broke off its answer")


async def serve(
    path: Path,
    answer: Answer,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer questions on a socket until cancelled. What is left of an earlier process at ``path`` is replaced."""
    await trio.Path(path).unlink(missing_ok=True)
    with trio.socket.socket(trio.socket.AF_UNIX) as listening:
        await listening.bind(str(path))
        listening.listen(_BACKLOG)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await listening.accept()
                nursery.start_soon(_answer_one, trio.SocketStream(connection), answer)


class _Asker:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send(self, report: Report) -> None:
        await self._stream.send_all(_encode(report) + b"\n")

    async def wait_shut(self) -> None:
        while await self._stream.receive_some():
            pass


async def _answer_one(stream: trio.SocketStream, answer: Answer) -> None:
    """Answer one question. Whoever hangs up before the answer ends that answer; so does an error, which is logged."""
    async with stream:
        try:
            line = b""
            while not line.endswith(b"\n"):
                if len(line) > _LINE_MAX or not (more := await stream.receive_some()):
                    return
                line += more
            try:
                question = msgspec.json.decode(line, type=Question)
            except msgspec.DecodeError:
                return
            await answer(question, _Asker(stream))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            log.exception("a question was not answered")
