"""Mount a cluster: one process, one mount point, from the first look at the directory to the last byte flushed.

The process stays in the foreground; whoever wants it in the background starts it with ``--ready-fd`` and waits for the
line that says that the mount answers. It ends when the file system is unmounted, or by SIGTERM or SIGINT: then it
flushes what it holds, unmounts and leaves; a second signal makes it leave at once, and it says what was lost.
"""

import argparse
import contextlib
import errno
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import trio

from . import __version__, companion, config, control, kernel_mounts, mountpoints, telling
from .client import Session, open_session
from .errors import FsError, UserError
from .interrupts import Interrupts, hush
from .observe.seldom import said_seldom
from .processes import identify, is_dying, is_held, say_ready
from .rpc.messages import StatusReply
from .scheduling import wish_short_slices
from .services.files import Files
from .services.jobs import Jobs
from .services.parallel import each

if TYPE_CHECKING:
    from . import fuse  # imports pyfuse3, before which the companion library has to be loaded

log = logging.getLogger(__name__)

#: Asynchronous requests that the kernel keeps under way, and from how many on it holds back readahead. Its default of
#: 12 starves a slow server: 225 instead of 1,150 reads per second were measured.
MAX_BACKGROUND = 256
CONGESTION_THRESHOLD = 192
#: Readahead in KiB. The default makes requests of 128 KiB; the longest request, 1 MiB, has one of them under way while
#: another is consumed, so disks, daemons and mount wait for each other. CephFS takes 8 MiB (rasize of mount.ceph(8));
#: as a fault of a mapped file reads as much around it, this is the half of that.
READ_AHEAD_KB = 4096
#: Nanoseconds to wait for the next request of the kernel behind one that was answered at once.
SOON_NS = 50_000
#: Capabilities that the companion library asks for and gives up. Splicing requests costs two more system calls each,
#: and pyfuse3 copies them out of the pipe anyhow.
WANT = companion.CAP_EXPLICIT_INVAL_DATA | companion.CAP_PARALLEL_DIROPS | companion.CAP_DONT_MASK
LOCKS = companion.CAP_POSIX_LOCKS | companion.CAP_FLOCK_LOCKS
UNWANTED = companion.CAP_AUTO_INVAL_DATA | companion.CAP_SPLICE_READ
#: Seconds that a daemon has to answer when somebody wants to know how it is.
STATUS_TIMEOUT_S = 2.0
#: Seconds that the daemons, all of which are there, have for the first answer to what comes through the mount; pause
#: before they are asked again.
ANSWER_TIMEOUT_S = 15.0
ANSWER_PAUSE_S = 0.1


class MountOptions(NamedTuple):
    """Say what to mount where. ``fuse_options`` go to libfuse as they are (``ro``, ``nodev``, …)."""

    mountpoint: Path
    registry: Path
    settings: config.Settings
    fuse_options: tuple[str, ...] = ()
    #: A line is written here when the mount answers.
    ready_fd: int | None = None


def tune_kernel(mountpoint: Path, library: companion.Companion | None) -> list[str]:
    """Set what makes the kernel ask for more at once; return sentences on what could not be set, and what it costs.

    What the companion library has set already is left alone.
    """
    mounted = kernel_mounts.find(mountpoint)
    assert mounted is not None, "just mounted"
    connection = kernel_mounts.connection(mounted.minor)
    wanted = [(Path(f"/sys/class/bdi/0:{mounted.minor}/read_ahead_kb"), READ_AHEAD_KB, "reads come as 128 KiB")]
    if library is None:
        wanted += [
            (connection / "max_background", MAX_BACKGROUND, "at most 12 asynchronous reads are under way at once"),
            (connection / "congestion_threshold", CONGESTION_THRESHOLD, "readahead stops at 9 requests under way"),
        ]
    complaints = []
    for path, value, cost in wanted:
        try:
            path.write_text(str(value))
        except OSError as error:
            complaints.append(f"{path} stays as it is ({error.strerror}): {cost}")
    return complaints


def prepare(library: companion.Companion, hooks: companion.Hooks) -> None:
    """Have the companion library complete what is mounted next."""
    library.wish(
        want=WANT | (LOCKS if hooks.setlk is not None else 0),
        unwanted=UNWANTED,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION_THRESHOLD,
    )
    library.hook(hooks)
    hush()


class Mount:
    """Serve one mount point (a plain path)."""

    def __init__(self, options: MountOptions, mountpoint: Path, library: companion.Companion | None) -> None:
        self._options = options
        self._mountpoint = mountpoint
        self._library = library
        self._not_tuned: tuple[str, ...] = ()

    async def run(self) -> None:
        """Mount and serve until unmounted or signalled. UserError, alone or in a group, when that does not work."""
        from . import fuse
        from .at_once import AtOnce
        from .extras import Extras

        settings = self._options.settings.mount
        async with (
            open_session(
                self._options.registry,
                self._options.settings,
                kind="mount",
                label=str(self._mountpoint),
            ) as session,
            trio.open_nursery() as nursery,
        ):
            library, interrupts, locks = self._library, None, None
            if library is not None:
                interrupts = Interrupts(library, session.links, is_dying, is_held)
                await nursery.start(interrupts.run)
                locks = session.locks if settings.locks else None
            operations = fuse.BenchfsOperations(
                session.namespace,
                session.files,
                nursery,
                cache_timeout_s=settings.attr_timeout_s,
                xattr=settings.xattr,
                companion=library,
                interrupts=interrupts,
                locks=locks,
                sync="sync" in self._options.fuse_options,
                dirsync="dirsync" in self._options.fuse_options,
            )
            session.files.on_dropped = operations.invalidate_data
            serve = fuse.serve
            if library is not None and interrupts is not None:
                extras = Extras(library, operations, session.files, locks, interrupts, xattr=settings.xattr)
                hooks = extras.hooks()
                # libfuse looks who asks, if it hears of a request.
                if not any("allow_root" in words.split(",") for words in self._options.fuse_options):
                    at_once = AtOnce(library, operations, session.files, session.network.note_turn)
                    hooks = at_once.hooks(hooks)
                prepare(library, hooks)
                library.wait_for_next(SOON_NS if session.network.spin_ns else 0)
                serve = functools.partial(extras.serve, fuse.serve)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                self._mount(operations, session)
                try:
                    nursery.start_soon(self._leave_on_signal, signals, session)
                    nursery.start_soon(self._announce, session, operations)
                    await serve()
                    await session.files.leave()
                finally:
                    fuse.unmount()
                    control.remove_record(self._mountpoint)
            nursery.cancel_scope.cancel()

    def _mount(self, operations: "fuse.BenchfsOperations", session: Session) -> None:
        from . import fuse

        settings = self._options.settings.mount
        options = [
            f"fsname=benchfs#{session.cluster_id}",
            "subtype=benchfs",
            "default_permissions",
            *(["allow_other"] if settings.allow_other else []),
            *self._options.fuse_options,
        ]
        try:
            fuse.mount(operations, str(self._mountpoint), options)
        except RuntimeError as error:
            raise UserError(
                f"the kernel did not mount {self._mountpoint} ({error}): is fuse3 installed, is /dev/fuse there, "
                f"may you mount there? `benchfs doctor` says"
            ) from None

    async def _leave_on_signal(self, signals: AsyncIterator[int], session: Session) -> None:
        """At the first signal flush everything, then stop; at the second leave at once."""
        leaving = False
        async with trio.open_nursery() as nursery:
            async for _ in signals:
                if leaving:
                    left = session.files.statistics()
                    log.error("left at once: %d bytes of %d files were not flushed", left.accepted_bytes, left.dirty)
                    with contextlib.suppress(OSError, UserError):
                        kernel_mounts.detach(self._mountpoint)
                    control.remove_record(self._mountpoint)
                    os._exit(1)
                leaving = True
                nursery.start_soon(self._leave, session)

    async def _leave(self, session: Session) -> None:
        left = session.files.statistics()
        log.warning("leaving: flushing %d bytes of %d files", left.accepted_bytes, left.dirty)
        await session.files.drain()
        from . import fuse

        fuse.stop()

    async def _announce(self, session: Session, operations: "fuse.BenchfsOperations") -> None:
        """Wait until the mount answers, then say so everywhere; answer questions from then on."""
        deadline_s = trio.current_time() + ANSWER_TIMEOUT_S
        while True:
            try:
                # The whole way through the kernel to every daemon; df shows these numbers while one is missing later.
                await trio.to_thread.run_sync(os.statvfs, self._mountpoint, abandon_on_cancel=True)
                break
            except OSError as error:
                # EIO: none of the daemons has said how much space it has in the time that df gives them; they are busy.
                if error.errno != errno.EIO or trio.current_time() > deadline_s:
                    raise UserError(f"{self._mountpoint} is mounted, but does not answer: {error.strerror}") from None
            await trio.sleep(ANSWER_PAUSE_S)
        self._not_tuned = tuple(tune_kernel(self._mountpoint, self._library))
        await self._say_if_second(session)
        path = control.socket_file(self._mountpoint)
        async with trio.open_nursery() as nursery:
            answer = functools.partial(self._answer, session=session, operations=operations)
            await nursery.start(control.serve, path, answer)
            process = identify(os.getpid())
            assert process is not None
            control.write_record(
                control.MountRecord(
                    str(self._mountpoint),
                    str(self._options.registry.absolute()),
                    session.cluster_id,
                    process,
                    str(path),
                    time.time(),
                )
            )
            say_ready(self._options.ready_fd)

    async def _say_if_second(self, session: Session) -> None:
        """Say, once and plainly, what does not hold when a cluster is mounted more than once."""
        if self._library is not None and self._options.settings.mount.locks:
            return
        try:
            sessions = (await session.namespace.status(session.links.daemons[0])).sessions
        except FsError as error:
            log.warning("cannot tell whether this cluster is mounted elsewhere: %s", error)
            return
        others = [other for other in sessions if other.kind == "mount" and other.client_id != session.links.client_id]
        if others:
            log.warning(
                "this cluster is also mounted at %s: locks (flock, fcntl) hold within one mount only",
                ", ".join(f"{other.label} on {other.host}" for other in others),
            )

    async def _answer(
        self, question: control.Question, asker: control.Asker, session: Session, operations: "fuse.BenchfsOperations"
    ) -> None:
        """Answer one question of the control socket."""
        send = asker.send
        if question.command == "layout":
            await send(await self._tell_layout(session, question.ino))
            return
        if question.command == "count":
            counts = await telling.count(session, operations)
            await send(msgspec.structs.replace(self._report(session, done=True), counts=counts))
            return
        if question.command == "trace":

            async def send_part(part: control.TracePart) -> None:
                await send(msgspec.structs.replace(self._report(session, done=False), trace=part))

            await telling.trace(session, question.seconds, asker.wait_shut, send_part)
            await send(self._report(session, done=True))
            return
        if question.command != "drain":
            daemons = await self._daemons(session) if question.command == "status" else ()
            await send(self._report(session, done=True, daemons=daemons))
            return
        steps, progress = trio.open_memory_channel[control.Report](1)

        def note() -> None:
            with contextlib.suppress(trio.WouldBlock):  # whoever reads slowly sees fewer steps
                steps.send_nowait(self._report(session, done=False))

        async def drain() -> None:
            async with steps:
                await session.files.drain(note)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            async for report in progress:
                await send(report)
        await send(self._report(session, done=True))

    def _report(
        self, session: Session, *, done: bool, daemons: tuple[control.DaemonReport, ...] = ()
    ) -> control.Report:
        counts, locks = session.files.statistics(), session.locks.statistics()
        return control.Report(
            done,
            counts.handles,
            counts.files,
            counts.dirty,
            counts.accepted_bytes,
            __version__,
            session.links.expelled_why,
            self._not_tuned,
            daemons,
            locks_held=locks.ranges,
            locks_waiting=locks.waiting,
        )

    async def _tell_layout(self, session: Session, ino: int) -> control.Report:
        report = self._report(session, done=True)
        try:
            return msgspec.structs.replace(report, layout=await _layout(session, ino))
        except FsError as error:
            return msgspec.structs.replace(report, trouble=str(error))

    async def _daemons(self, session: Session) -> tuple[control.DaemonReport, ...]:
        """Ask every daemon how it is; one that does not answer at once is reported without its own words."""
        answers: dict[int, StatusReply] = {}

        async def one(daemon_id: int) -> None:
            with trio.move_on_after(STATUS_TIMEOUT_S), contextlib.suppress(FsError):
                answers[daemon_id] = await session.namespace.status(daemon_id)

        await each(one, session.links.daemons)
        return tuple(
            control.DaemonReport(
                link.daemon_id,
                link.connected,
                link.missing_since_s,
                link.trouble,
                link.address,
                link.transport,
                link.in_flight,
                _plain(answers[link.daemon_id]) if link.daemon_id in answers else None,
            )
            for link in session.links.statistics()
        )


async def _layout(session: Session, ino: int) -> control.LayoutReport:
    """Say where the chunks of a file lie."""
    attrs = await session.files.getattr(ino)
    shard_map = session.links.shard_map
    size = attrs.size if attrs.is_file else 0
    count = -(-size // attrs.chunk_size)
    chunks = tuple(
        control.ChunkReport(
            index,
            index * attrs.chunk_size,
            min(attrs.chunk_size, size - index * attrs.chunk_size),
            shard_map.of_chunk(ino, index, attrs.width),
        )
        for index in range(min(count, control.CHUNKS_MAX))
    )
    daemon = shard_map.of_ino(ino)
    return control.LayoutReport(ino, daemon, size, attrs.allocated, attrs.chunk_size, attrs.width, count, chunks)


def _plain(status: StatusReply) -> dict[str, object]:
    """Turn what a daemon says into names and values."""
    return {
        **msgspec.structs.asdict(status),
        "usage": [msgspec.structs.asdict(usage) for usage in status.usage],
        "sessions": [msgspec.structs.asdict(session) for session in status.sessions],
    }


def run_mount(options: MountOptions) -> int:
    """Mount, serve, unmount; return the exit code. Errors of users are said in one sentence on stderr."""
    code = 0
    wish_short_slices()
    try:
        with said_seldom(Files.__module__, Jobs.__module__):  # what fails there is tried again and again
            mountpoint = mountpoints.prepare(options.mountpoint, options.registry, options.settings.mount.allow_other)
            library = companion.load() if options.settings.mount.companion else None  # before pyfuse3
            trio.run(Mount(options, mountpoint, library).run)
    except* UserError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        assert isinstance(first, UserError)
        sys.stderr.write(f"benchfs: {first}\n")
        code = first.exit_code
    except* KeyboardInterrupt:
        code = 130
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line: ``python -m benchfs_fuse.mount MOUNTPOINT --registry-dir DIR``."""
    parser = argparse.ArgumentParser(prog="benchfs mount --foreground", description=__doc__)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--registry-dir", type=Path, required=True, help="the registry directory of the cluster")
    parser.add_argument("-o", dest="fuse_options", default=[], action="append", metavar="OPTION", help="for the kernel")
    parser.add_argument("--ready-fd", type=int, help="write a line to this file descriptor when the mount answers")
    config.add_options(parser, "mount", "ucx")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    try:
        settings = config.load(vars(given), os.environ)
    except UserError as error:
        sys.stderr.write(f"benchfs: {error}\n")
        return error.exit_code
    return run_mount(
        MountOptions(given.mountpoint, given.registry_dir, settings, tuple(given.fuse_options), given.ready_fd)
    )


if __name__ == "__main__":
    sys.exit(main())
