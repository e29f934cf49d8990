"""Know whose a daemon's store is: format, cluster and daemon number are written once and checked at every start."""

import os
import stat

from .. import disk
from ..errors import UserError
from ..layout import ShardMap
from ..model import ROOT_INO, Attrs
from ..ports import KeyValueStore
from .calls import Batch
from .inodes import GENERATION, Draft, Inode, Inodes

_FORMAT = disk.META + b"format"
_CLUSTER = disk.META + b"cluster"
_DAEMON = disk.META + b"daemon"
_INCARNATION = disk.META + b"incarnation"
#: The boot of the machine at the last start.
BOOT = disk.META + b"boot"
#: Power may have been lost, and the others were not told yet; files are to be compared with their chunks.
LOST = disk.META + b"lost"
_LOSSES = disk.META + b"losses"
RECOUNT = disk.META + b"recount"

#: Permissions of the root directory, as a fresh local file system has them. It belongs to whoever runs the daemon.
ROOT_MODE = 0o755


def open_store(
    store: KeyValueStore,
    cluster_id: str,
    daemon_id: int,
    shard_map: ShardMap,
    chunk_size: int,
    now_ns: int,
    boot_id: str = "",
) -> int:
    """Check that this store belongs here, lay it out if it is empty, count this start; return the incarnation.

    ``boot_id`` names the running machine: where it is another than at the last start, what was not synced may be lost.

    The daemon that holds the root's shard makes the root directory, whose ``chunk_size`` all directories inherit.
    UserError: the store is another cluster's, another daemon's, or of a newer format.
    """
    found = store.get(_FORMAT)
    batch = Batch(store)
    if found is None:
        batch = Draft(inodes := Inodes(store, daemon_id, shard_map, lambda: now_ns))
        batch.put(_FORMAT, b"%d" % disk.FORMAT)
        batch.put(_CLUSTER, cluster_id.encode())
        batch.put(_DAEMON, b"%d" % daemon_id)
        if inodes.home(ROOT_INO) == daemon_id:
            batch.add(_root(chunk_size, len(inodes.daemons), now_ns))
    else:
        if int(found) > disk.FORMAT:
            raise UserError(
                f"The data directory has format {int(found)}, this program knows {disk.FORMAT}: use the newer program."
            )
        if (cluster := (store.get(_CLUSTER) or b"").decode()) != cluster_id:
            raise UserError(f"The data directory belongs to cluster {cluster}, not to {cluster_id}.")
        if (owner := int(store.get(_DAEMON) or -1)) != daemon_id:
            raise UserError(f"The data directory belongs to daemon {owner}, not to daemon {daemon_id}.")
    if found is not None and store.get(BOOT) != boot_id.encode():
        batch.put(LOST, b"")
        batch.put(_LOSSES, b"%d" % (power_losses(store) + 1))
    batch.put(BOOT, boot_id.encode())
    incarnation = int(store.get(_INCARNATION) or 0) + 1
    batch.put(_INCARNATION, b"%d" % incarnation)
    batch.write()
    return incarnation


def power_losses(store: KeyValueStore) -> int:
    """Return how often a daemon was started on another boot of its machine than before."""
    return int(store.get(_LOSSES) or 0)


def daemon_of(store: KeyValueStore) -> tuple[str, int] | None:
    """Return the cluster and the daemon number that a store belongs to, None if it is empty."""
    cluster, daemon = store.get(_CLUSTER), store.get(_DAEMON)
    return None if cluster is None or daemon is None else (cluster.decode(), int(daemon))


def _root(chunk_size: int, width: int, now_ns: int) -> Inode:
    mode = stat.S_IFDIR | ROOT_MODE
    uid, gid = os.geteuid(), os.getegid()
    return Inode.of(
        Attrs(ROOT_INO, GENERATION, mode, 2, uid, gid, 0, 0, 0, now_ns, now_ns, now_ns, 1, chunk_size, width, ROOT_INO)
    )
