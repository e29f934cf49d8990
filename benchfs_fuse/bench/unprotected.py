"""Run a daemon with one protection taken away, to see what that costs: for ``bench protections`` alone.

    python -m benchfs_fuse.bench.unprotected PROTECTION BENCHFSD-ARGUMENTS …

Nothing in the product can do that; what such a daemon keeps is good for nothing.
"""

import sys
from collections.abc import Callable

from .. import daemon
from ..chunks import disk as chunk_disk
from ..chunks.table import Record
from ..kv.rocks import RocksStore
from ..rpc.messages import Body
from ..rpc.server import ServedCall
from ..services.calls import Batch


def _without_outcomes() -> None:
    def commit(self: ServedCall, batch: Batch, reply: Body) -> None:
        batch.write()

    ServedCall.commit = commit  # type: ignore[method-assign]


def _without_marks() -> None:
    def mark(fd: int, birth: int) -> None:
        pass

    def trouble_with(fd: int, record: Record, strict: bool) -> str:
        return ""

    chunk_disk.mark = mark  # type: ignore[attr-defined]
    chunk_disk.trouble_with = trouble_with  # type: ignore[attr-defined]


def _without_syncs() -> None:
    async def sync(self: RocksStore) -> None:
        pass

    RocksStore.sync = sync  # type: ignore[method-assign]


#: What can be taken away, by name.
PROTECTIONS: dict[str, Callable[[], None]] = {
    "recorded outcomes": _without_outcomes,
    "marks of chunk files": _without_marks,
    "synced decisions": _without_syncs,
}

if __name__ == "__main__":
    PROTECTIONS[sys.argv[1]]()
    sys.exit(daemon.main(sys.argv[2:]))
