"""Be the floor under a mount: a pyfuse3 file system that answers everything from its own memory.

    python -m benchfs_fuse.bench.memory_fs MOUNTPOINT [--attr-timeout S] [--no-xattr] [--no-companion]

What it costs is what the kernel, FUSE, pyfuse3, trio and Python cost with no cluster behind. It is mounted as ours is:
same options, same companion library with the same wishes, same read-ahead and tasks, same time-outs, block size and
answers about caches and attributes; reads and writes come in the same sizes. Its handlers do the least that gives right
answers: one dictionary of inodes, a bytearray for a file, a dictionary for a directory. Locks stay with the kernel.

It is no file system to keep anything in: whatever is written takes as much memory, and goes with the process.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from .. import companion, kernel_mounts, mount
from ..errors import UserError
from ..processes import say_ready

log = logging.getLogger(__name__)

#: Type of the mount, after "fuse.".
SUBTYPE = "benchfs-floor"


async def _run(given: argparse.Namespace, mountpoint: Path) -> None:
    """Mount, serve until unmounted or told to end, unmount. UserError."""
    library = companion.load() if given.companion else None  # before pyfuse3
    from .. import fuse
    from .memory_operations import MemoryOperations

    operations = MemoryOperations(timeout_s=given.attr_timeout, xattr=given.xattr, library=library)
    if library is not None:
        mount.prepare(library, operations.hooks(library))
    options = [
        f"fsname={SUBTYPE}",
        f"subtype={SUBTYPE}",
        "default_permissions",
        *(["allow_other"] if os.geteuid() == 0 else []),
        *given.fuse_options,
    ]
    try:
        fuse.mount(operations, str(mountpoint), options)
    except RuntimeError as error:
        raise UserError(f"the kernel did not mount {mountpoint} ({error})") from None

    async def leave(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            fuse.stop()

    async def announce() -> None:
        await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
        for complaint in mount.tune_kernel(mountpoint, library):
            log.warning("not tuned: %s", complaint)
        say_ready(given.ready_fd)

    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave, signals)
                nursery.start_soon(announce)
                await fuse.serve()
                nursery.cancel_scope.cancel()
    finally:
        fuse.unmount()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="benchfs_fuse.bench.memory_fs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--attr-timeout", type=float, default=1.0, metavar="S", help="as of a mount (default: 1)")
    parser.add_argument("--no-xattr", dest="xattr", action="store_false", help="as of a mount")
    parser.add_argument("--no-companion", dest="companion", action="store_false", help="as of a mount")
    parser.add_argument("-o", dest="fuse_options", default=[], action="append", metavar="OPTION", help="for the kernel")
    parser.add_argument("--ready-fd", type=int, help="write a line to this file descriptor when it answers")
    given = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    try:
        mountpoint = kernel_mounts.plain_path(given.mountpoint)
        if not mountpoint.is_dir():
            raise UserError(f"{mountpoint} is no directory")
        trio.run(_run, given, mountpoint)
        code = 0
    except* UserError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        sys.stderr.write(f"benchfs: {first}\n")
        code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
