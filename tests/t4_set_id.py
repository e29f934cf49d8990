"""Set-ID bits and capabilities after everything that may take them away, compared with ext4."""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from posix_help import ALICE, BOB, as_user, opened

from benchfs_fuse import acl
from benchfs_fuse.acl import AclEntry

pytest_plugins = ("mounts",)

TEAM = 3001
SIZE = 8192
CAPABILITY = "security.capability"
#: struct vfs_cap_data of linux/capability.h, revision 2: CAP_CHOWN permitted.
POWERS = struct.pack("<IIIII", 0x02000000, 1, 0, 0, 0)
CAP_FSETID = 4

libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    """Be struct __user_cap_header_struct, version 3, of this thread."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    effective: int
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def without_fsetid() -> Iterator[None]:
    """Be root without CAP_FSETID."""
    header, data = _Header(0x20080522, 0), (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0

    def toggle() -> None:
        data[0].effective ^= 1 << CAP_FSETID
        assert libc.capset(ctypes.byref(header), data) == 0

    toggle()
    try:
        yield
    finally:
        toggle()


CALLERS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "root": contextlib.nullcontext,
    "root without CAP_FSETID": without_fsetid,
    "owner in the group": lambda: as_user(ALICE, groups=(TEAM,)),
    "owner not in the group": lambda: as_user(ALICE),
    "stranger": lambda: as_user(BOB),
}


def write(flags: int = 0, data: bytes = b"new") -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with opened(path, os.O_WRONLY | flags) as fd:
            assert os.write(fd, data) == len(data)

    return run


def write_pages(flags: int) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with opened(path, os.O_RDWR | os.O_DIRECT | flags) as fd, mmap.mmap(-1, 4096) as page:
            assert os.write(fd, page) == 4096

    return run


def write_mapped(path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 4096) as mapped:
        mapped[:3] = b"new"
        mapped.flush()


def cut(size: int) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with opened(path) as fd:
            os.ftruncate(fd, size)

    return run


def fallocate(mode: int) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with opened(path) as fd:
            if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")

    return run


def copy_into(path: Path) -> None:
    with opened(path.with_name("source"), os.O_RDONLY) as source, opened(path) as target:
        assert os.copy_file_range(source, target, 4096, 0, 0) == 4096


def set_acl(path: Path) -> None:
    entries = [AclEntry(acl.USER_OBJ, 7), AclEntry(acl.USER, 7, 4711), AclEntry(acl.GROUP_OBJ, 7)]
    os.setxattr(path, acl.ACCESS, acl.encode([*entries, AclEntry(acl.MASK, 6), AclEntry(acl.OTHER, 7)]))


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "write": write(),
    "write nothing": write(data=b""),
    "append": write(os.O_APPEND),
    "write synchronously": write(os.O_SYNC),
    "write pages": write_pages(0),
    "append pages": write_pages(os.O_APPEND),
    "write through a mapping": write_mapped,
    "truncate": lambda path: os.truncate(path, 10),
    "truncate to the same size": lambda path: os.truncate(path, SIZE),
    "extend": lambda path: os.truncate(path, 2 * SIZE),
    "ftruncate": cut(10),
    "ftruncate to the same size": cut(SIZE),
    "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "fallocate": fallocate(0),
    "fallocate, size kept": fallocate(1),
    "punch": fallocate(3),
    "zero": fallocate(16),
    "copy_file_range": copy_into,
    "chown to the same": lambda path: os.chown(path, ALICE, TEAM),
    "chown to another user": lambda path: os.chown(path, BOB, -1),
    "chown to another group": lambda path: os.chown(path, -1, ALICE),
    "chmod to the same": lambda path: path.chmod(path.stat().st_mode & 0o7777),
    "utimes": os.utime,
    "set an ACL": set_acl,
    "set an attribute": lambda path: os.setxattr(path, "user.a", b"1"),
}


class Outcome(NamedTuple):
    """Hold what the call said and what is left."""

    error: str
    mode: str
    capability: bool


def outcome(directory: Path, operation: Callable[[Path], None], caller: str, mode: int) -> Outcome:
    path = directory / "file"
    path.write_bytes(b"x" * SIZE)
    os.chown(path, ALICE, TEAM)
    path.chmod(mode)
    os.setxattr(path, CAPABILITY, POWERS)
    error = ""
    with CALLERS[caller]():
        try:
            operation(path)
        except OSError as caught:
            error = errno.errorcode[caught.errno or 0]
    left = Outcome(error, f"{path.stat().st_mode:o}", CAPABILITY in os.listxattr(path))
    path.unlink()
    return left


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_takes_what_ext4_takes(mountpoint: Path, ext4: Path, name: str) -> None:
    ext4.chmod(0o777)
    for directory in (mountpoint, ext4):
        (directory / "source").write_bytes(b"s" * SIZE)
    for caller in CALLERS:
        for mode in (0o6777, 0o6767, 0o2777, 0o2767):
            ours, theirs = (outcome(place, OPERATIONS[name], caller, mode) for place in (mountpoint, ext4))
            assert ours == theirs, f"{caller}, {mode:o}"
