"""See a tree and the open files on it as data that two file systems must agree on.

Times become relations (how each call moved them), inode numbers become names (which names are the same inode, what an
inode was called before). Directory sizes, blocks of files with data and orders of entries are left out: POSIX leaves
them free.
"""

import os
import stat
import time
import zlib
from collections.abc import Iterator

from benchfs_fuse.testing.calls import PLACES, Fields, Sut, Value, attributes, failing, is_direct

# Larger files are read around `PLACES` only, this many bytes of them.
WINDOW_LENGTH = 65536
WHOLE_LENGTH_MAX = 16 << 20

# Times between 2020 and 2100 are taken for readings of a clock, which differ from run to run; others a call has set.
CLOCK_NS_MIN = 1_577_836_800_000_000_000
CLOCK_NS_MAX = 4_102_444_800_000_000_000


def _time(now_ns: int, before_ns: int | None) -> Value:
    """Say what became of a time: where it was set by a call its value, else how it moved since the last look."""
    if not CLOCK_NS_MIN <= now_ns < CLOCK_NS_MAX:
        return now_ns
    if before_ns is None:
        return "new"
    return "same" if now_ns == before_ns else "later" if now_ns > before_ns else "earlier"


def _content(fd: int, size: int) -> Value:
    """Read a file's bytes, around the places that matter if it is large: pairs of an offset and compressed bytes."""
    windows = [(0, size)]
    if size > WHOLE_LENGTH_MAX:
        centres = [*PLACES, size]
        spans = [(max(0, at - WINDOW_LENGTH // 2), min(size, at + WINDOW_LENGTH // 2)) for at in centres]
        windows = [(start, stop) for start, stop in spans if start < stop]
    parts: list[Value] = []
    for start, stop in windows:
        data = bytearray()
        while len(data) < stop - start:
            piece = os.pread(fd, min(1 << 20, stop - start - len(data)), start + len(data))
            if not piece:
                break
            data += piece
        parts.append((start, zlib.compress(data, 1)))
    return tuple(parts)


def wait_for_tick() -> None:
    """Wait until the kernel's coarse clock moves on, so that the next call's times differ from the last call's.

    File systems stamp inodes by that clock (1 to 10 ms, CONFIG_HZ): without this, "changed" would depend on luck.
    """
    clock = 5  # CLOCK_REALTIME_COARSE, <linux/time.h>
    start_ns = time.clock_gettime_ns(clock)
    while time.clock_gettime_ns(clock) == start_ns:
        time.sleep(time.clock_getres(clock) / 4)


class Witness:
    """See a tree and the open files of a `Sut`, comparing each look with the one before.

    `look` returns fields by place: b"/path" for what has a name, b"fd 0" for what is open in slot 0.
    """

    def __init__(self, sut: Sut, root: bytes) -> None:
        self._sut = sut
        self._root = root
        self._stats: dict[bytes, os.stat_result] = {}

    def look(self, *, content: bool) -> dict[bytes, Fields]:
        """See everything; with `content`, read every file too. Never raises OSError: a failure is something seen."""
        stats: dict[bytes, os.stat_result] = {}
        places = {self._root: self._see(self._root, stats)}
        for directory, entries in self._walk(self._root):
            for name, ino, is_directory in entries:
                place = os.path.join(directory, name)
                places[place] = self._see(place, stats)
                if place in stats:
                    found = stats[place]
                    agrees = (ino, is_directory) == (found.st_ino, stat.S_ISDIR(found.st_mode))
                    places[place]["entry agrees"] = agrees
        for place, found in stats.items() if content else ():
            if stat.S_ISREG(found.st_mode):
                places[place]["content"] = self._read(place)
        for slot, fd in sorted(self._sut.slots.items()):
            places[b"fd %d" % slot] = self._see_open(slot, fd, stats, content=content)
        self._stats = stats
        return places

    def _walk(self, directory: bytes) -> Iterator[tuple[bytes, list[tuple[bytes, int, bool]]]]:
        try:
            with os.scandir(directory) as entries:
                found = sorted((entry.name, entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            return
        yield directory, found
        for name, _, is_directory in found:
            if is_directory:
                yield from self._walk(os.path.join(directory, name))

    def _see(self, path: bytes, stats: dict[bytes, os.stat_result]) -> Fields:
        try:
            found = os.lstat(path)
        except OSError as error:
            return {"stat": failing(error)}
        stats[path] = found
        fields = attributes(found)
        fields |= self._identity(path, found, stats)
        if stat.S_ISREG(found.st_mode) and found.st_size == 0:
            fields["allocated"] = found.st_blocks > 0
        try:
            if stat.S_ISLNK(found.st_mode):
                fields["target"] = os.readlink(path)
            if stat.S_ISDIR(found.st_mode):
                fields["entries"] = tuple(sorted(os.listdir(path)))
            for name in os.listxattr(path, follow_symlinks=False):
                fields[f"xattr {name}"] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            fields["look"] = failing(error)
        return fields

    def _identity(self, place: bytes, found: os.stat_result, stats: dict[bytes, os.stat_result]) -> Fields:
        """Say which names are the same inode, what it was called before, and what its times did."""
        same = [path for path, other in stats.items() if other.st_ino == found.st_ino]
        was = [path for path, other in self._stats.items() if other.st_ino == found.st_ino]
        before = self._stats[was[0]] if was else None
        fields: Fields = {
            "same inode as": min(same, default=place),
            "was": min(was, default=None),
            "mtime": _time(found.st_mtime_ns, before.st_mtime_ns if before else None),
            "ctime": _time(found.st_ctime_ns, before.st_ctime_ns if before else None),
            "size moved": before is not None and stat.S_ISREG(found.st_mode) and found.st_size != before.st_size,
        }
        if stat.S_ISREG(found.st_mode):  # the witness itself reads directories and links
            fields["atime"] = _time(found.st_atime_ns, before.st_atime_ns if before else None)
        if {fields["mtime"], fields["ctime"]} & {"new", "later", "earlier"} and not isinstance(fields["mtime"], int):
            difference_ns = found.st_mtime_ns - found.st_ctime_ns
            fields["mtime to ctime"] = "=" if difference_ns == 0 else "<" if difference_ns < 0 else ">"
        return fields

    def _read(self, path: bytes) -> Value:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW)
        except OSError as error:
            return failing(error)
        try:
            return _content(fd, os.fstat(fd).st_size)
        except OSError as error:
            return failing(error)
        finally:
            os.close(fd)

    def _see_open(self, slot: int, fd: int, stats: dict[bytes, os.stat_result], *, content: bool) -> Fields:
        try:
            found = os.fstat(fd)
        except OSError as error:
            return {"stat": failing(error)}
        place = b"fd %d" % slot
        fields = attributes(found) | self._identity(place, found, stats)
        stats[place] = found
        try:
            fields["position"] = os.lseek(fd, 0, os.SEEK_CUR)
            if content and stat.S_ISREG(found.st_mode) and not is_direct(fd):
                fields["content"] = _content(fd, found.st_size)
        except OSError as error:
            fields["look"] = failing(error)
        return fields
