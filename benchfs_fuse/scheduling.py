"""Ask the kernel to let this process run soon after it wakes up, for a short time: it serves others, who wait for it.

Linux 6.12 gives a thread the slice of time that it asks for by sched_setattr(2) (``sched_runtime`` of SCHED_OTHER, 0.1
to 100 ms), and lets one that wakes up with a shorter slice go before one that computes. Nobody gets less than its fair
share by that, and it takes no privilege. Older kernels ignore it.
"""

import ctypes
import logging
import os
import platform

log = logging.getLogger(__name__)

#: Shortest slice that the kernel grants, in ns. Serving a request takes about as long.
SLICE_NS = 100_000

#: Number of the system call, by machine (asm/unistd.h).
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


class _Attributes(ctypes.Structure):
    """Lay out ``struct sched_attr`` in its first version (sched_setattr(2))."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def wish_short_slices() -> None:
    """Ask for short slices for this thread, and those that it starts. Whoever runs otherwise than usual is left so."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    attributes = _Attributes(size=ctypes.sizeof(_Attributes), nice=os.getpriority(os.PRIO_PROCESS, 0), runtime=SLICE_NS)
    if ctypes.CDLL(None, use_errno=True).syscall(number, 0, ctypes.byref(attributes), 0) != 0:
        log.info("the kernel grants no short slices: %s", os.strerror(ctypes.get_errno()))
