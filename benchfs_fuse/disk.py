"""Lay out a daemon's key-value store: every key prefix, in one table. Pure; integers in keys are big endian.

    prefix  key after the prefix              value
    M       name                              facts about this store: format, cluster id, daemon id
    I       ino 8                             inode (services/inodes.py)
    D       directory ino 8, name             directory entry by name
    O       directory ino 8, cookie 8         directory entry by position
    X       ino 8, attribute name             extended attribute
    L       ino 8                             target of a symbolic link
    N                                         inode counters of this daemon below this number may be in use
    U       ino 8                             dead or orphaned inode whose chunks are still to be dropped
    P       ino 8                             truncation under way
    T       daemon 2, incarnation 8, count 8  transaction: prepared here, or decided here
    S       client id 8                       session
    R       client id 8, slot 2               outcome of the newest recorded request of a slot
    W       client id 8, ino 8                this session holds the file open for writing
    F       client id 8                       client that was expelled
    C       ino 8, chunk index 8              chunk table (chunks/table.py)
    G       sequence 8                        garbage: a chunk file that is to be removed (chunks/table.py)

Numbers are unsigned and of 64 bits. Whatever else somebody asks for under a number is not there: Stale.

``FORMAT`` is raised by every change of a key or value; a daemon refuses a store with a newer one.
"""

import struct

from .errors import Stale

FORMAT = 1

_U64 = struct.Struct(">Q")
_U64_U64 = struct.Struct(">QQ")
_U64_U16 = struct.Struct(">QH")

META = b"M"
INODE = b"I"
ENTRY = b"D"
POSITION = b"O"
XATTR = b"X"
TARGET = b"L"
COUNTER = b"N"
DEAD = b"U"
TRUNCATING = b"P"
TRANSACTION = b"T"
SESSION = b"S"
OUTCOME = b"R"
WRITE_OPEN = b"W"
FENCED = b"F"
CHUNK = b"C"
GARBAGE = b"G"


def _pack(layout: struct.Struct, *numbers: int) -> bytes:
    try:
        return layout.pack(*numbers)
    except struct.error:
        raise Stale(f"nothing has the number {' or '.join(map(str, numbers))}") from None


def key(prefix: bytes, number: int) -> bytes:
    """Join a prefix and one 64-bit number."""
    return prefix + _pack(_U64, number)


def key2(prefix: bytes, first: int, second: int) -> bytes:
    """Join a prefix and two 64-bit numbers."""
    return prefix + _pack(_U64_U64, first, second)


def key_slot(prefix: bytes, number: int, slot: int) -> bytes:
    """Join a prefix, a 64-bit number and a 16-bit slot."""
    return prefix + _pack(_U64_U16, number, slot)


def key_name(prefix: bytes, number: int, name: bytes) -> bytes:
    """Join a prefix, a 64-bit number and a name."""
    return prefix + _pack(_U64, number) + name


def numbers(found: bytes) -> tuple[int, int]:
    """Split a key that ``key2`` made into its two numbers."""
    return _U64_U64.unpack_from(found, 1)


def number(found: bytes) -> int:
    """Return the first 64-bit number of a key."""
    return int.from_bytes(found[1:9], "big")


def after(prefix: bytes) -> bytes:
    """Return the smallest key behind all keys that start with ``prefix`` (for scans)."""
    value = int.from_bytes(prefix, "big") + 1
    return value.to_bytes(len(prefix), "big")
