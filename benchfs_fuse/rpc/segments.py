"""Remove the segments of shared memory that a killed peer has left behind.

UCX marks a System V segment for removal as soon as it has attached it: from then on the kernel removes it with the last
process that uses it. A process that is killed in the microseconds between shmget(2) and that mark leaves a segment of
some megabytes until the node boots again, and nobody but its peers knows that it was a process of ours.
"""

import ctypes
import logging
from collections.abc import Collection
from pathlib import Path

from .pidwatch import PidWatch

log = logging.getLogger(__name__)

_SEGMENTS = Path("/proc/sysvipc/shm")
#: From sys/ipc.h and sys/shm.h: the key of a segment that has no name, the mark, and what sets it.
_IPC_PRIVATE = 0
_SHM_DEST = 0o1000
_IPC_RMID = 0

_shmctl = ctypes.CDLL(None, use_errno=True).shmctl
_shmctl.argtypes, _shmctl.restype = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p], ctypes.c_int


def unmarked(pid: int, since_s: float) -> list[int]:
    """Return the ids of what a process has made since ``since_s`` (seconds of the epoch) and not marked for removal.

    The segment that a living process is about to mark is among them. See proc_sysvipc(5).
    """
    found = []
    for line in _SEGMENTS.read_text().splitlines()[1:]:
        key, shmid, mode, _, creator, *_, changed_s = line.split()[:14]
        mine = int(creator) == pid and int(changed_s) >= int(since_s) - 1  # the kernel's seconds may lag by a tick
        if mine and int(key) == _IPC_PRIVATE and not int(mode, 8) & _SHM_DEST:
            found.append(int(shmid))
    return found


async def remove_after(pid: int, shmids: Collection[int]) -> None:
    """Wait for the end of a process, then mark what of its segments ``shmids`` it has not marked itself.

    Where a process cannot be watched, they stay.
    """
    watch = PidWatch.open(pid)
    if watch is not None:
        try:
            await watch.wait_gone()
        finally:
            watch.close()
    for shmid in set(shmids) & set(unmarked(pid, 0)):
        if _shmctl(shmid, _IPC_RMID, None) == 0:  # or another peer was quicker
            log.info("removed segment %d of shared memory, which process %d had left behind", shmid, pid)
