"""Tell whether a chunk file is the one that its record means: there, long enough, and not another chunk's.

A chunk file carries the birth of its chunk as a *mark*, an extended attribute of 8 bytes, big endian, that it gets when
it is made. So a file that was put into the place of another is known for what it is, unless it was overwritten in
place: content is not checked. On file systems without such attributes nothing carries a mark, and nobody asks for one.
"""

import errno
import os
import stat
from typing import NamedTuple

from .table import Record

_MARK = "user.benchfs.birth"
_ALL = b"all"


class Marking(NamedTuple):
    """Say whether new files in a directory get marks, and whether all files there have theirs."""

    possible: bool
    everywhere: bool


def begin_marking(directory: str, empty: bool) -> Marking:
    """Find out about marks in a directory, which is ``empty`` when it is new. OSError: it cannot be used at all.

    That all have marks is said by one of the directory itself: a copy without such attributes loses both.
    """
    try:
        if empty:
            os.setxattr(directory, _MARK, _ALL)
        return Marking(True, os.getxattr(directory, _MARK) == _ALL)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENODATA):
            raise
        return Marking(error.errno == errno.ENODATA, False)


def mark(fd: int, birth: int) -> None:
    """Give a new chunk file its mark. OSError."""
    os.setxattr(fd, _MARK, birth.to_bytes(8, "big"))


def trouble_with(fd: int, record: Record, strict: bool) -> str:
    """Say what is wrong with an open chunk file of a record that is not empty; nothing if it is right. OSError.

    ``strict``: all files carry marks, so that one without is a stranger.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_size < record.length:
        return f"has {status.st_size} bytes, its record says {record.length}"
    try:
        found = os.getxattr(fd, _MARK)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ""
        if error.errno != errno.ENODATA:
            raise
        return "is not the file that was made here: it carries no mark" if strict else ""
    if found != record.birth.to_bytes(8, "big"):
        return "is the file of another chunk"
    return ""


def trouble_at(path: str, record: Record, strict: bool) -> str:
    """Say what is wrong with the chunk file at a path; nothing if it is right. An empty chunk needs no file."""
    if record.length == 0:
        return ""
    try:
        # What is no file must not be waited for.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            return trouble_with(fd, record, strict)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be used: {error.strerror}"
