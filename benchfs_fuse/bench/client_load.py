"""Load a cluster with small operations through the client library, for some seconds: ``bench growth`` runs several.

    python -m benchfs_fuse.bench.client_load REGISTRY NAME SECONDS

Says "ready", waits for a line on standard input, works, and says how many operations it did in what time (JSON).
One turn: attributes, 4 KiB written past the gathering, 4 KiB read, each answered by a daemon.
"""

import os
import sys
import time
from pathlib import Path

import msgspec
import trio

from ..client import open_cluster
from ..limits import KIB

LENGTH = 4 * KIB
#: Operations of one turn.
TURN = 3


class Done(msgspec.Struct, frozen=True):
    """Say what one client has done."""

    operations: int
    seconds: float


async def main(registry: Path, name: str, seconds: float) -> None:
    """Work, and say so on standard output; the file is removed again."""
    async with open_cluster(registry) as fs:
        data, into = os.urandom(LENGTH), bytearray(LENGTH)
        async with await fs.open(f"/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_DIRECT) as file:
            await file.write(data, 0)
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await trio.to_thread.run_sync(sys.stdin.readline)
            operations, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                await file.stat()
                await file.write(data, 0)
                await file.read_into(into, 0)
                operations += TURN
            sys.stdout.write(msgspec.json.encode(Done(operations, elapsed)).decode() + "\n")
        await fs.remove(f"/{name}")


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
