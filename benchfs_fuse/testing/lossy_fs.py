"""Mount a disk that loses power: a pyfuse3 file system over ``lossy_disk``, held in memory.

    python -m benchfs_fuse.testing.lossy_fs MOUNTPOINT --control SOCKET

Programs work in it as on any disk, mappings and locks included. Whoever connects to the socket holds the plug; a line
is a command, and each is answered by one line of JSON:

    cut LOSS SEED   from here on every request fails with EIO, and what is left is decided (``lossy_disk.Loss``);
                    answers what there was to lose
    power           serve what is left. Nobody may have anything open any more: the programs have died with the power.
    unsynced        answers what a cut could take now

The kernel caches pages of one open file and nothing else here, and what is left gets new inode numbers: so nothing that
was lost is ever seen again. ``fallocate`` is there where the companion library was built.
"""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from .. import companion
from ..processes import say_ready
from .lossy_disk import Loss, Refused

if TYPE_CHECKING:
    from .lossy_operations import LossyOperations

#: Type of the mount, after "fuse.".
SUBTYPE = "lossy"
#: Longest command.
_LINE_MAX = 256


class _Plug:
    """Obey whoever holds the plug."""

    def __init__(self, operations: "LossyOperations") -> None:
        self._operations = operations

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        received = b""
        async for data in stream:
            received += data
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                await stream.send_all(json.dumps(self._obey(line.decode().split())).encode() + b"\n")
            if len(received) > _LINE_MAX:
                return

    def _obey(self, words: list[str]) -> dict[str, int]:
        unsynced = self._operations.disk.unsynced()._asdict()
        match words:
            case ["cut", loss, seed]:
                self._operations.cut(Loss(loss), int(seed))
            case ["power"]:
                self._operations.power()
            case ["unsynced"]:
                pass
            case _:
                return {}
        return unsynced


def _hooks(operations: "LossyOperations", library: companion.Companion) -> companion.Hooks:
    def fallocate(request: int, fh: int, mode: int, offset: int, length: int) -> None:
        try:
            if not operations.powered:
                raise Refused(errno.EIO)
            operations.fallocate(fh, mode, offset, length)
        except Refused as error:
            library.reply_error(request, error.number)
        else:
            library.reply_error(request, 0)

    return companion.Hooks(fallocate=fallocate)


async def _run(mountpoint: Path, control: Path, ready_fd: int | None) -> None:
    library = companion.load()  # before pyfuse3
    from .. import fuse
    from .lossy_operations import LossyOperations

    operations = LossyOperations()
    if library is not None:
        library.wish(want=0, unwanted=0, max_background=64, congestion_threshold=48)
        library.hook(_hooks(operations, library))
    fuse.mount(operations, str(mountpoint), [f"fsname={SUBTYPE}", f"subtype={SUBTYPE}", "default_permissions"])

    async def leave(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            fuse.stop()

    async def announce() -> None:
        await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
        say_ready(ready_fd)

    try:
        with (
            trio.socket.socket(trio.socket.AF_UNIX) as listening,
            trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        ):
            await listening.bind(str(control))
            listening.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave, signals)
                nursery.start_soon(trio.serve_listeners, _Plug(operations).serve, [trio.SocketListener(listening)])
                nursery.start_soon(announce)
                await fuse.serve()
                nursery.cancel_scope.cancel()
    finally:
        fuse.unmount()


def main() -> int:
    """Run from the command line, until unmounted."""
    parser = argparse.ArgumentParser(
        prog="benchfs_fuse.testing.lossy_fs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--control", type=Path, required=True, metavar="SOCKET", help="where commands are taken")
    parser.add_argument("--ready-fd", type=int, help="write a line to this file descriptor when it answers")
    given = parser.parse_args()
    trio.run(_run, given.mountpoint, given.control, given.ready_fd)
    return 0


if __name__ == "__main__":
    sys.exit(main())
