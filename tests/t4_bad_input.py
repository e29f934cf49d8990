"""Senseless ranges, wrong files and wrong opens get the errno that ext4 gives: the same table tried on both.

`DIFFERENT` is all that differs, and docs/semantics.md says why.
"""

import contextlib
import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from posix_help import opened

from benchfs_fuse import acl
from benchfs_fuse.acl import AclEntry
from benchfs_fuse.limits import FILE_SIZE_MAX
from benchfs_fuse.testing import syscalls
from benchfs_fuse.testing.calls import failing

pytest_plugins = ("mounts",)

SIZE = 10_000
#: The largest size of a file on ext4 with blocks of 4 KiB: ext4(5), 2^32 - 1 blocks.
EXT4_FILE_SIZE_MAX = (1 << 44) - 4096
TOP = (1 << 63) - 1
BOTTOM = -(1 << 63)


class Place(NamedTuple):
    """Name a directory to try things in, and the largest size of its files."""

    path: Path
    limit: int


class From(NamedTuple):
    """Stand for a number that counts from the largest size of a file."""

    offset: int


Number = int | From


def number(value: Number, place: Place) -> int:
    return place.limit + value.offset if isinstance(value, From) else value


# ── what is open ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def closed(place: Place) -> Iterator[int]:
    """Give the number of a descriptor that is closed."""
    with opened(place.path / "file") as fd:
        pass
    yield fd


Open = Callable[[Place], contextlib.AbstractContextManager[int]]


def opens(name: str, flags: int) -> Open:
    return lambda place: opened(place.path / name, flags)


OPENS: dict[str, Open] = {
    "read-write": opens("file", os.O_RDWR),
    "read-only": opens("file", os.O_RDONLY),
    "write-only": opens("file", os.O_WRONLY),
    "append": opens("file", os.O_RDWR | os.O_APPEND),
    "path": opens("file", os.O_PATH),
    "directory": opens("directory", os.O_RDONLY),
    "directory path": opens("directory", os.O_PATH | os.O_DIRECTORY),
    "pipe": opens("pipe", os.O_RDWR | os.O_NONBLOCK),
    "link": opens("link", os.O_PATH | os.O_NOFOLLOW),
    "closed": closed,
}
#: What is copied to; the first is what is copied from, too, if that is open for reading and writing.
TARGETS: dict[str, Open] = {
    "same": opens("file", os.O_RDWR),
    **{
        name: opens("other", flags)
        for name, flags in {
            "read-write": os.O_RDWR,
            "read-only": os.O_RDONLY,
            "write-only": os.O_WRONLY,
            "append": os.O_WRONLY | os.O_APPEND,
            "path": os.O_PATH,
        }.items()
    },
    **{name: OPENS[name] for name in ("directory", "pipe", "closed")},
}


def make(place: Place) -> None:
    """Make a file of every sort."""
    (place.path / "file").write_bytes(b"x" * SIZE)
    (place.path / "other").write_bytes(b"y" * SIZE)
    (place.path / "directory").mkdir()
    os.mkfifo(place.path / "pipe")
    (place.path / "link").symlink_to("file")


@pytest.fixture
def places(mountpoint: Path, ext4: Path) -> tuple[Place, Place]:
    """Give the mount and ext4, with the same files in both."""
    theirs = ext4 / mountpoint.name
    theirs.mkdir()
    both = Place(mountpoint, FILE_SIZE_MAX), Place(theirs, EXT4_FILE_SIZE_MAX)
    for place in both:
        make(place)
    return both


# ── what is tried ────────────────────────────────────────────────────────────────────────────────────────────────────

#: Offsets and lengths: negative, empty, unaligned, huge, overflowing, at and beyond the largest size.
RANGES: tuple[tuple[Number, Number], ...] = (
    (0, 0),
    (0, -1),
    (-1, 0),
    (-1, 10),
    (-1, -1),
    (BOTTOM, 10),
    (0, BOTTOM),
    (BOTTOM, BOTTOM),
    (3, 7),
    (SIZE, 1),
    (SIZE + 5, 3),
    (TOP, 1),
    (TOP - 5, 10),
    (TOP, TOP),
    (1, TOP),
    (From(0), 1),
    (From(-1), 2),
    (From(0), 0),
)
MODES = (0, 1, 2, 3, 4, 16, 17, 18, 19, 64, 65, 128, 129, 256, 1 << 10, 1 << 30, -1)

Attempt = Callable[[int, Place], object]


def _fallocate(mode: int, offset: Number, length: Number) -> Attempt:
    return lambda fd, place: syscalls.fallocate(fd, mode, number(offset, place), number(length, place))


def _posix_fallocate(offset: Number, length: Number) -> Attempt:
    return lambda fd, place: os.posix_fallocate(fd, number(offset, place), number(length, place))


def _lseek(offset: Number, whence: int) -> Attempt:
    return lambda fd, place: os.lseek(fd, number(offset, place), whence)


def _ftruncate(size: Number) -> Attempt:
    return lambda fd, place: os.ftruncate(fd, number(size, place))


def _pread(offset: Number, length: int) -> Attempt:
    return lambda fd, place: os.pread(fd, length, number(offset, place))


def _pwrite(offset: Number, data: bytes) -> Attempt:
    return lambda fd, place: os.pwrite(fd, data, number(offset, place))


def _flock(operation: int) -> Attempt:
    return lambda fd, place: fcntl.flock(fd, operation)


def _setlk(kind: int, start: Number, length: Number, ofd: bool) -> Attempt:
    return lambda fd, place: syscalls.setlk(fd, kind, number(start, place), number(length, place), ofd=ofd)


def _getlk(kind: int, start: Number, length: Number, ofd: bool) -> Attempt:
    def ask(fd: int, place: Place) -> object:
        return syscalls.getlk(fd, kind, number(start, place), number(length, place), ofd=ofd)[0]

    return ask


def _ioctl(request: int, argument: bytes) -> Attempt:
    return lambda fd, place: fcntl.ioctl(fd, request, argument)


def _setxattr(name: str, value: bytes, flags: int) -> Attempt:
    return lambda fd, place: os.setxattr(fd, name, value, flags)


def _removexattr(name: str) -> Attempt:
    return lambda fd, place: os.removexattr(fd, name)


_SEEKS = (-1, 0, 1, SIZE - 1, SIZE, SIZE + 1, BOTTOM)
_WHENCES = (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE, 5, -1)
_LOCK_OPERATIONS = (0, fcntl.LOCK_SH, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_EX, fcntl.LOCK_UN, 64)
_LOCK_KINDS = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK, 3, -1)


def _acl(*entries: tuple[int, int, int]) -> bytes:
    return acl.encode([AclEntry(*entry) for entry in entries])


_BASE = ((acl.USER_OBJ, 6), (acl.GROUP_OBJ, 4), (acl.OTHER, 0))
_ACLS = (
    b"",
    b"\x02",
    b"\x02\0\0\0",
    b"\x03\0\0\0",
    b"\x02\0\0\0\1",
    acl.encode([AclEntry(*entry) for entry in _BASE]),
    acl.encode([AclEntry(*entry) for entry in _BASE[:2]]),
    acl.encode([AclEntry(*entry) for entry in (*_BASE, _BASE[0])]),
    acl.encode([AclEntry(*entry) for entry in reversed(_BASE)]),
    acl.encode(
        [AclEntry(acl.USER_OBJ, 6), AclEntry(acl.USER, 6, 1001), AclEntry(acl.GROUP_OBJ, 4), AclEntry(acl.OTHER, 0)]
    ),
    acl.encode([AclEntry(acl.USER_OBJ, 8), AclEntry(acl.GROUP_OBJ, 4), AclEntry(acl.OTHER, 0)]),
    acl.encode([AclEntry(3, 6), AclEntry(acl.GROUP_OBJ, 4), AclEntry(acl.OTHER, 0)]),
)
_XATTR_NAMES = ("user.a", "user.", "user", "other.a", "a", "", "user." + "n" * 250, "user." + "n" * 251, "security.a")
_XATTR_FLAGS = (0, os.XATTR_CREATE, os.XATTR_REPLACE, os.XATTR_CREATE | os.XATTR_REPLACE, 4, -1)
_ACL_NAMES = ("system.posix_acl_access", "system.posix_acl_default", "system.other")

#: Requests of linux/fs.h and others that no file system knows.
IOCTLS = {
    "FITRIM": (0xC0185879, bytes(24)),
    "FIDEDUPERANGE": (0xC0189436, bytes(24)),
    "unknown": (0x1234, b""),
    "unknown, with data": (0xC0087A7A, bytes(8)),
    "TCGETS": (0x5401, bytes(60)),
}

FICLONE, FICLONERANGE = 0x40049409, 0x4020940D

Group = dict[str, Attempt]
GROUPS: dict[str, Group] = {
    "fallocate": {
        f"mode {mode} {range_}": _fallocate(mode, *range_) for mode, range_ in itertools.product(MODES, RANGES)
    },
    "posix_fallocate": {f"{range_}": _posix_fallocate(*range_) for range_ in RANGES},
    "lseek": {
        f"{offset} by {whence}": _lseek(offset, whence) for offset, whence in itertools.product(_SEEKS, _WHENCES)
    },
    "ftruncate": {f"{size}": _ftruncate(size) for size in (-1, BOTTOM, 0, 3, SIZE)},
    "pread": {
        f"{length} at {offset}": _pread(offset, length)
        for offset, length in itertools.product((-1, BOTTOM, SIZE), (0, 10))
    },
    "pwrite": {
        f"{data!r} at {offset}": _pwrite(offset, data)
        for offset, data in itertools.product((-1, BOTTOM, SIZE), (b"", b"1", b"12"))
    },
    "flock": {f"{operation}": _flock(operation) for operation in _LOCK_OPERATIONS},
    "setlk": {
        f"{kind} {range_} {ofd}": _setlk(kind, *range_, ofd)
        for kind, range_, ofd in itertools.product(_LOCK_KINDS, RANGES, (False, True))
    },
    "getlk": {
        f"{kind} {range_} {ofd}": _getlk(kind, *range_, ofd)
        for kind, range_, ofd in itertools.product(_LOCK_KINDS, RANGES, (False, True))
    },
    "setxattr": {
        f"{name} {value[:5]!r} {flags}": _setxattr(name, value, flags)
        for name, value, flags in itertools.product(_XATTR_NAMES, (b"", b"1", b"v" * 65537), _XATTR_FLAGS)
    },
    "ACL": {
        f"{name} {index} {flags}": _setxattr(name, value, flags)
        for name, (index, value), flags in itertools.product(
            _ACL_NAMES, enumerate(_ACLS), (0, os.XATTR_CREATE, os.XATTR_REPLACE)
        )
    },
    "removexattr": {name: _removexattr(name) for name in ("user.missing", *_XATTR_NAMES[1:], *_ACL_NAMES)},
    "ioctl": {name: _ioctl(*arguments) for name, arguments in IOCTLS.items()},
}


#: Numbers around the largest size, which on tmpfs is the same.
LARGEST: dict[str, Group] = {
    "lseek": {
        f"{offset} by {whence}": _lseek(offset, whence)
        for offset, whence in itertools.product((TOP, TOP - 1), _WHENCES)
    },
    "ftruncate": {f"{size}": _ftruncate(size) for size in (TOP, TOP - 1)},
    "pread": {
        f"{length} at {offset}": _pread(offset, length)
        for offset, length in itertools.product((TOP, TOP - 5), (0, 1, 10))
    },
    "pwrite": {
        f"{data!r} at {offset}": _pwrite(offset, data)
        for offset, data in itertools.product((TOP, TOP - 5, TOP - 1), (b"", b"1", b"123456789"))
    },
}

#: Ranges to copy: from, to, length.
COPIES: tuple[tuple[Number, Number, Number], ...] = (
    (0, 0, 0),
    (-1, 0, 10),
    (0, -1, 10),
    (0, 5, 10),
    (0, 10, 10),
    (SIZE, 0, 10),
    (SIZE + 5, 0, 10),
    (SIZE - 5, SIZE, 10),
    (TOP, 0, 10),
    (TOP - 5, 0, 10),
    (0, TOP, 10),
    (0, TOP, 0),
    (0, 0, TOP),
    (0, SIZE, TOP),
    (0, From(0), 1),
)
#: Positions in a directory are each file system's own.
LIKE_EXT4 = [(group, open_) for group in GROUPS for open_ in OPENS if (group, open_) != ("lseek", "directory")]


def outcome(attempt: Attempt, fd: int, place: Place) -> str:
    """Return the errno's name, or what came."""
    try:
        return repr(attempt(fd, place))
    except OSError as error:
        return failing(error)


def tried(group: Group, open_: Open, place: Place) -> dict[str, str]:
    """Return what comes of a group."""
    found = {}
    for name, attempt in group.items():
        with open_(place) as fd:
            found[name] = outcome(attempt, fd, place)
        restore(place)
    return found


def restore(place: Place) -> None:
    """Make the files as long as they were."""
    for name in ("file", "other"):
        path = place.path / name
        if path.stat().st_size != SIZE:
            os.truncate(path, SIZE)


def compare(group: Group, open_: Open, ours: Place, theirs: Place) -> dict[str, tuple[str, str]]:
    """Return where what comes of a group differs."""
    found, expected = tried(group, open_, ours), tried(group, open_, theirs)
    return {name: (found[name], expected[name]) for name in group if found[name] != expected[name]}


@pytest.mark.parametrize(("group", "open_"), LIKE_EXT4)
def test_what_is_senseless_is_refused_as_on_ext4(places: tuple[Place, Place], group: str, open_: str) -> None:
    expected = DIFFERENT.get(group, {}) if open_ in ON_FILES else {}
    if (group, open_) == ("ioctl", "directory"):
        expected = DIFFERENT[group]
    assert compare(GROUPS[group], OPENS[open_], *places) == expected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", OPENS)
def test_senseless_copies_are_refused_as_on_ext4(places: tuple[Place, Place], source: str, target: str) -> None:
    def copying(from_: Number, to: Number, length: Number) -> Attempt:
        def copy(fd: int, place: Place) -> object:
            with TARGETS[target](place) as there:
                numbers = [number(value, place) for value in (length, from_, to)]
                return os.copy_file_range(fd, there, *numbers)

        return copy

    group = {f"{range_}": copying(*range_) for range_ in COPIES}
    assert compare(group, OPENS[source], *places) == {}


@pytest.mark.parametrize("open_", ["read-write", "read-only", "write-only", "append"])
@pytest.mark.parametrize("group", LARGEST)
def test_files_reach_as_far_as_on_tmpfs(mountpoint: Path, reference: Path, group: str, open_: str) -> None:
    ours, theirs = Place(mountpoint, FILE_SIZE_MAX), Place(reference, FILE_SIZE_MAX)
    for place in (ours, theirs):
        make(place)
    assert compare(LARGEST[group], OPENS[open_], ours, theirs) == {}


@pytest.mark.parametrize("open_", ["read-write", "read-only", "append", "directory"])
def test_no_ioctl_is_known(places: tuple[Place, Place], open_: str) -> None:
    ours, theirs = places
    found = tried(GROUPS["ioctl"], OPENS[open_], ours)
    assert found.pop("FIDEDUPERANGE") == ("<EISDIR>" if open_ == "directory" else "<ENOTSUP>")
    assert set(found.values()) == {"<ENOTTY>"}

    def clone(fd: int, place: Place) -> object:
        with opened(place.path / "other", os.O_RDONLY) as source:
            return fcntl.ioctl(fd, FICLONE, source)

    def clone_range(fd: int, place: Place) -> object:
        with opened(place.path / "other", os.O_RDONLY) as source:
            return fcntl.ioctl(fd, FICLONERANGE, struct.pack("qQQQ", source, 0, 4096, 0))

    clones: Group = {"FICLONE": clone, "FICLONERANGE": clone_range}
    assert compare(clones, OPENS[open_], ours, theirs) == {}
    refusal = {"directory": "<EISDIR>", "read-write": "<ENOTSUP>"}.get(open_, "<EBADF>")
    assert set(tried(clones, OPENS[open_], ours).values()) == {refusal}


ON_FILES = ("read-write", "read-only", "write-only", "append")
#: What ours and ext4 answer, where that is not the same.
DIFFERENT: dict[str, dict[str, tuple[str, str]]] = {
    "getlk": {
        f"{fcntl.F_UNLCK} {range_} True": ("<EINVAL>", f"{fcntl.F_UNLCK}")
        for range_ in ((0, 0), (3, 7), (SIZE, 1), (SIZE + 5, 3), (TOP, 1), (1, TOP), *RANGES[-3:])
    },
    "ioctl": {"FITRIM": ("<ENOTTY>", "<EINVAL>")},
}
