"""Be the other process in the tests of rpc/ucx: serve, and call back if asked to, until somebody kills it.

    python tests/ucx_peer.py TLS

Prints the address that it listens at. TLS is empty for the transport of UCX's choice.
"""

import ctypes
import mmap
import os
import random
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import trio

from benchfs_fuse.errors import Disconnected
from benchfs_fuse.limits import PAYLOAD_MAX
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Channel, Peer, Reply
from benchfs_fuse.rpc.ucx import UcxEngine

SECRET = bytes(range(32))
CLUSTER = b"cluster-id-16-by"

#: Operations: checksum of the payload; as many bytes as there is room for; processor time used so far; large requests
#: and replies back to the caller without end; a segment of shared memory as UCX has it for an instant.
SUM, READ, CPU, FLOOD, SEGMENT = range(1, 6)
FLOOD_CALLS = 6


def buffer(size: int) -> memoryview:
    """Make a buffer that goes back to the system when it is dropped, so that leaks can be told from malloc's habits."""
    return memoryview(mmap.mmap(-1, size))


def attached_segment() -> int:
    """Make and attach a segment, as UCX does before it marks it for removal; return its id."""
    c = ctypes.CDLL(None)
    c.shmat.argtypes, c.shmat.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_void_p
    shmid = int(c.shmget(0, mmap.PAGESIZE, 0o660))
    assert shmid >= 0 and c.shmat(shmid, None, 0) != ctypes.c_void_p(-1).value
    return shmid


class Service:
    """Serve the operations above."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._data = buffer(PAYLOAD_MAX)
        self._data[:] = random.randbytes(PAYLOAD_MAX)

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        if op == SUM:
            return Reply(0, b"%d" % zlib.crc32(payload or b""))
        if op == READ:
            return Reply(0, b"%d" % zlib.crc32(self._data[:want]), self._data[:want])
        if op == FLOOD:
            for number in range(FLOOD_CALLS):
                self._nursery.start_soon(self._flood, channel, number % 2 == 0)
        if op == SEGMENT:
            return Reply(0, b"%d" % attached_segment())
        return Reply(0, b"%d" % time.process_time_ns())

    async def _flood(self, channel: Channel, send: bool) -> None:
        try:
            while True:
                if send:
                    reply = await channel.call(SUM, b"", self._data)
                    assert int(reply.body) == zlib.crc32(self._data)
                else:
                    into = buffer(PAYLOAD_MAX)
                    reply = await channel.call(READ, b"", into=into)
                    assert int(reply.body) == zlib.crc32(into)
        except Disconnected:
            pass


async def main(tls: str | None) -> None:
    """Serve until killed."""
    peer = Peer(ClientId(os.getpid()), 1, "peer", os.getpid(), "boot")
    async with trio.open_nursery() as nursery, UcxEngine(peer, SECRET, CLUSTER, tls=tls) as engine:
        sys.stdout.write(await engine.listen(Service(nursery)) + "\n")
        sys.stdout.flush()
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1] or None)
