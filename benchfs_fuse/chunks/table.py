"""Know what a daemon's chunks hold, apart from its directories: the length of each and which blocks were written.

The table is what makes ``st_blocks`` independent of the file system below, and what tells a hole (zeros) from a chunk
file that was lost or cut (an error). It is the only truth about which chunks exist: a chunk file without a record is
nobody's.

Blocks are counted in granules: 4 KiB as long as the chunk is at most 4 MiB long, doubled whenever it grows out of
``GRANULES_MAX`` of them, so that a record stays small at any chunk size.

Record (value of a ``C`` key, big endian):

    offset  size  field
    0       1     version: 1
    1       1     granule: 4 KiB << this
    2       8     birth: names the chunk's file
    10      4     length in bytes
    14      2     allocated granules before the first hole
    16      rest  bits of the granules from there on, lowest first, without trailing zero bytes

A wholly written chunk of 4 MiB takes 16 bytes, any other at most 144.

Garbage (value of a ``G`` key): ino 8, index 8, birth 8. A chunk file that lost its record and is still to be removed.
Its key is a sequence number, so that garbage is removed in the order in which it came.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..disk import CHUNK, GARBAGE, after, key, key2, number, numbers
from ..errors import StorageError
from ..limits import CHUNK_SIZE_MAX, KIB
from ..model import ChunkId, DataRange
from ..ports import KeyValueStore, Mapped

#: Smallest unit of allocation: the block of common file systems and the page of the kernel.
GRANULE_MIN = 4 * KIB
#: Most granules in one record: a chunk of the default size in 4 KiB blocks.
GRANULES_MAX = 1024
#: Most records that one page of a map looks at: some 2 ms.
MAP_CHUNKS_MAX = 512

_VERSION = 1
_HEAD = struct.Struct(">BBQIH")
_SHIFT_MAX = (CHUNK_SIZE_MAX // GRANULES_MAX // GRANULE_MIN).bit_length() - 1
_GARBAGE = struct.Struct(">QQQ")
_SEQUENCE_END = (1 << 64) - 1


class Record(NamedTuple):
    """Describe one chunk: its file's ``birth``, ``length`` in bytes, granule ``shift`` and ``bitmap`` of granules."""

    birth: int
    length: int = 0
    shift: int = 0
    bitmap: int = 0

    @property
    def granule(self) -> int:
        """Return the bytes that one bit stands for."""
        return GRANULE_MIN << self.shift

    @property
    def allocated(self) -> int:
        """Return the bytes of allocated space."""
        return self.bitmap.bit_count() * (GRANULE_MIN << self.shift)

    def with_write(self, offset: int, length: int) -> "Record":
        """Return the record after a write of ``length`` > 0 bytes at ``offset``; itself if nothing changes."""
        birth, old_length, shift, bitmap = self
        end = offset + length
        assert 0 <= offset < end <= CHUNK_SIZE_MAX
        while end > GRANULES_MAX * GRANULE_MIN << shift:
            bitmap = _halved(bitmap)
            shift += 1
        granule = GRANULE_MIN << shift
        first = offset // granule
        bitmap |= ((1 << ((end - 1) // granule - first + 1)) - 1) << first
        if bitmap == self.bitmap and end <= old_length:
            return self
        return Record(birth, max(end, old_length), shift, bitmap)

    def without(self, offset: int, length: int) -> "Record":
        """Return the record after the granules that lie wholly in a range were freed."""
        first, stop = -(-offset // self.granule), (offset + length) // self.granule
        return self._replace(bitmap=self.bitmap & ~(((1 << max(0, stop - first)) - 1) << first))

    def ranges(self, offset: int = 0) -> Iterator[tuple[int, int]]:
        """Yield start and end of each run of allocated granules that ends behind ``offset``, in order."""
        granule = self.granule
        at = offset // granule
        rest = self.bitmap >> at
        if rest & 1:  # the run may have begun before
            before = ~self.bitmap & ((1 << at) - 1)
            at = before.bit_length()
            rest = self.bitmap >> at
        while rest:
            hole = (rest & -rest).bit_length() - 1
            rest >>= hole
            at += hole
            run = (~rest & (rest + 1)).bit_length() - 1
            yield at * granule, (at + run) * granule
            rest >>= run
            at += run

    def holds_any(self, offset: int, end: int) -> bool:
        """Tell whether anything in a range has a granule."""
        return offset < end and next(self.holes(offset, end), None) != (offset, end)

    def holes(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of each piece of a range that has no granule."""
        for start, stop in self.ranges(offset):
            if start >= end:
                break
            if start > offset:
                yield offset, start
            offset = stop
        if offset < end:
            yield offset, end

    def cut(self, offset: int) -> "Record":
        """Return the record after everything at and behind ``offset`` was dropped."""
        kept = -(-offset // self.granule)
        return self._replace(length=min(self.length, offset), bitmap=self.bitmap & ((1 << kept) - 1))


def mapped(index: int, record: Record, offset: int) -> Iterator[DataRange]:
    """Yield the data ranges of one chunk that end behind ``offset``."""
    return (DataRange(index, start, end - start) for start, end in record.ranges(offset))


def _halved(bitmap: int) -> int:
    """Join each pair of neighbouring bits into one: allocated if either was."""
    bits = f"{bitmap:b}"
    bits = bits.zfill(len(bits) + len(bits) % 2)
    return int("".join("0" if bits[at : at + 2] == "00" else "1" for at in range(0, len(bits), 2)), 2)


def encode(record: Record) -> bytes:
    """Encode a record; the inverse of ``decode``."""
    birth, length, shift, bitmap = record
    prefix = (~bitmap & (bitmap + 1)).bit_length() - 1
    rest = bitmap >> prefix
    return _HEAD.pack(_VERSION, shift, birth, length, prefix) + rest.to_bytes((rest.bit_length() + 7) // 8, "little")


def decode(value: bytes) -> Record:
    """Decode a record; raise StorageError for anything that ``encode`` does not make."""
    try:
        version, shift, birth, length, prefix = _HEAD.unpack_from(value)
    except struct.error:
        raise StorageError(f"chunk record of {len(value)} bytes") from None
    rest = int.from_bytes(value[_HEAD.size :], "little")
    record = Record(birth, length, shift, rest << prefix | (1 << prefix) - 1)
    if version != _VERSION or shift > _SHIFT_MAX or record.bitmap.bit_length() > -(-length // record.granule):
        raise StorageError(f"damaged chunk record {value[:20].hex()}")
    if length > record.granule * GRANULES_MAX or encode(record) != value:
        raise StorageError(f"damaged chunk record {value[:20].hex()}")
    return record


class Garbage(NamedTuple):
    """Name a chunk file to be removed: its place in the queue, its chunk and its birth."""

    sequence: int
    chunk: ChunkId
    birth: int


class ChunkTable:
    """Keep the records of a daemon's chunks in its key-value store, and the list of files to be removed.

    No record is cached here: whoever works on a chunk keeps its record with the open file. Every method is
    synchronous; errors are those of the store, and StorageError for a damaged record.
    """

    def __init__(self, store: KeyValueStore) -> None:
        self._store = store
        #: Nothing below is on the list of garbage any more: who has removed it says so, for scans to begin here.
        self.first_garbage = 0
        found = [number(name) for name, _ in store.scan(key(GARBAGE, 0), key(GARBAGE, _SEQUENCE_END))]
        #: How many chunk files an earlier run left to be removed.
        self.leftovers = len(found)
        self.next_garbage = found[-1] + 1 if found else 0

    @property
    def empty(self) -> bool:
        """Tell whether there are no chunks at all."""
        return next(iter(self._store.scan(CHUNK, after(CHUNK))), None) is None

    def get(self, chunk: ChunkId) -> Record | None:
        """Return a chunk's record, None if there is no such chunk."""
        value = self._store.get(key2(CHUNK, *chunk))
        return None if value is None else decode(value)

    def put(self, chunk: ChunkId, record: Record) -> None:
        """Write a chunk's record."""
        self._store.write([(key2(CHUNK, *chunk), encode(record))])

    def page(self, ino: int, index: int, count_max: int) -> list[tuple[int, Record]]:
        """Return the first ``count_max`` chunks of a file from ``index`` on, in order, with their records."""
        rows = self._store.scan(key2(CHUNK, ino, index), key(CHUNK, ino + 1))
        return [(numbers(name)[1], decode(value)) for (name, value), _ in zip(rows, range(count_max), strict=False)]

    def rows(self, chunk: ChunkId, count_max: int) -> list[tuple[ChunkId, bytes]]:
        """Return the first ``count_max`` records of all files from a chunk on, in order, as they are stored."""
        found = self._store.scan(key2(CHUNK, *chunk), after(CHUNK))
        return [(ChunkId(*numbers(name)), value) for (name, value), _ in zip(found, range(count_max), strict=False)]

    def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file as ChunkStore.map does, of at most ``MAP_CHUNKS_MAX`` chunks."""
        found: list[DataRange] = []
        page = self.page(ino, index, MAP_CHUNKS_MAX)
        for at, record in page:
            if at >= stop:
                return Mapped(tuple(found), None)
            if len(found) >= count_max:
                return Mapped(tuple(found), at)
            found += mapped(at, record, offset if at == index else 0)
        return Mapped(tuple(found), page[-1][0] + 1 if len(page) == MAP_CHUNKS_MAX else None)

    def bury(self, ino: int, chunks: Iterable[tuple[int, Record]]) -> None:
        """Turn chunks of a file into garbage, in one transaction."""
        puts, deletes = [], []
        for index, record in chunks:
            puts.append((key(GARBAGE, self.next_garbage), _GARBAGE.pack(ino, index, record.birth)))
            deletes.append(key2(CHUNK, ino, index))
            self.next_garbage += 1
        self._store.write(puts, deletes)

    def garbage(self, count_max: int, sequence: int = 0) -> list[Garbage]:
        """Return the oldest ``count_max`` pieces of garbage from a sequence number on."""
        start = max(sequence, self.first_garbage)
        rows = self._store.scan(key(GARBAGE, start), key(GARBAGE, self.next_garbage))
        found = []
        for (name, value), _ in zip(rows, range(count_max), strict=False):
            ino, index, birth = _GARBAGE.unpack(value)
            found.append(Garbage(number(name), ChunkId(ino, index), birth))
        return found

    def forget(self, garbage: Iterable[Garbage]) -> None:
        """Take pieces of garbage off the list: their files are gone."""
        self._store.write([], [key(GARBAGE, piece.sequence) for piece in garbage])
