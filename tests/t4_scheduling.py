"""Mounts and daemons run soon after they wake up, beside programs that compute."""

import ctypes
import os
import platform

import pytest
from cluster import Cluster

from benchfs_fuse import scheduling
from benchfs_fuse.scheduling import SLICE_NS, _Attributes

pytest_plugins = ("mounts",)

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def slice_of(pid: int) -> int:
    """Return the slice of a process in ns (sched_getattr(2))."""
    attributes = _Attributes()
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SCHED_GETATTR[platform.machine()]
    assert libc.syscall(number, pid, ctypes.byref(attributes), ctypes.sizeof(attributes), 0) == 0, ctypes.get_errno()
    return int(attributes.runtime)


def grants_slices() -> bool:
    """Tell whether the kernel is one that grants slices."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (6, 12)


def test_mounts_and_daemons_have_short_slices(session_cluster: Cluster) -> None:
    mount = session_cluster.mount()
    processes = [mount, *session_cluster.daemons]
    wanted = SLICE_NS if grants_slices() else 0
    assert [slice_of(process.pid) for process in processes] == [wanted] * len(processes)
    mount.stop()


def test_a_thread_that_runs_otherwise_is_left_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = slice_of(0)
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_BATCH)
    scheduling.wish_short_slices()
    assert slice_of(0) == before
