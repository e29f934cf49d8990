"""Check the chunk table: the records' arithmetic against sets of bytes, their encoding, and the list of garbage."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.chunks.table import GRANULE_MIN, GRANULES_MAX, ChunkTable, Record, decode, encode
from benchfs_fuse.disk import GARBAGE, key
from benchfs_fuse.errors import StorageError
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.limits import CHUNK_SIZE_DEFAULT, CHUNK_SIZE_MAX, MIB
from benchfs_fuse.model import ChunkId

SIZES = st.one_of(st.integers(1, 3 * GRANULE_MIN), st.integers(1, CHUNK_SIZE_MAX))
WRITES = st.tuples(st.just("write"), st.integers(0, CHUNK_SIZE_MAX - 1), SIZES)
CUTS = st.tuples(st.just("cut"), st.integers(1, CHUNK_SIZE_MAX), st.just(0))
BIRTHS = st.integers(0, (1 << 64) - 1)


def applied(birth: int, changes: list[tuple[str, int, int]]) -> Record:
    record = Record(birth)
    for name, offset, length in changes:
        if name == "write":
            record = record.with_write(offset, min(length, CHUNK_SIZE_MAX - offset))
        else:
            record = record.cut(offset)
    return record


@given(BIRTHS, st.lists(st.one_of(WRITES, CUTS)))
def test_decode_undoes_encode(birth: int, changes: list[tuple[str, int, int]]) -> None:
    record = applied(birth, changes)
    assert decode(encode(record)) == record
    assert len(encode(record)) <= 144


@given(st.binary(max_size=160))
def test_any_bytes_are_a_record_or_an_error(value: bytes) -> None:
    try:
        record = decode(value)
    except StorageError:
        return
    assert encode(record) == value


@given(st.binary(max_size=8), st.integers(0, 20), st.integers(0, 1100))
def test_any_tail_is_a_record_or_an_error(rest: bytes, shift: int, prefix: int) -> None:
    """Start from a plausible head, which random bytes rarely make."""
    value = (
        b"\1" + bytes([shift]) + bytes(8) + (CHUNK_SIZE_DEFAULT).to_bytes(4, "big") + prefix.to_bytes(2, "big") + rest
    )
    try:
        record = decode(value)
    except StorageError:
        return
    assert encode(record) == value
    assert record.allocated <= record.granule * GRANULES_MAX


@given(st.lists(st.one_of(WRITES, CUTS), max_size=20))
def test_allocated_is_what_the_granules_of_all_writes_cover(changes: list[tuple[str, int, int]]) -> None:
    """Keep the model as intervals in bytes, rounded out to the final granule."""
    record = applied(0, changes)
    granules: set[int] = set()
    length, granule = 0, GRANULE_MIN
    for name, offset, size in changes:
        if name == "write":
            end = offset + min(size, CHUNK_SIZE_MAX - offset)
            while end > granule * GRANULES_MAX:
                granule *= 2
                granules = {number // 2 for number in granules}
            granules |= set(range(offset // granule, (end - 1) // granule + 1))
            length = max(length, end)
        else:
            granules = {number for number in granules if number * granule < offset}
            length = min(length, offset)
    assert record.length == length
    assert record.granule == granule
    assert record.allocated == len(granules) * granule
    assert {bit for bit in range(GRANULES_MAX) if record.bitmap >> bit & 1} == granules


def test_a_write_that_changes_nothing_returns_the_same_record() -> None:
    record = Record(7).with_write(0, 10000)
    assert record.with_write(4096, 4096) is record
    assert record.with_write(0, 10000) is record
    assert record.with_write(0, 10001) is not record


def test_full_chunks_are_small() -> None:
    assert len(encode(Record(1).with_write(0, CHUNK_SIZE_DEFAULT))) == 16
    assert len(encode(Record(1).with_write(0, CHUNK_SIZE_MAX))) == 16
    assert Record(1).with_write(0, CHUNK_SIZE_MAX).granule == MIB
    assert Record(1).with_write(0, CHUNK_SIZE_DEFAULT).granule == GRANULE_MIN


def test_decode_refuses_other_versions_and_bits_behind_the_end() -> None:
    good = encode(Record(1).with_write(0, 4097))
    decode(good)
    for bad in (b"\2" + good[1:], good[:-1], good + b"\0", good[:14] + b"\0\3", good[:1] + b"\x09" + good[2:], b""):
        with pytest.raises(StorageError):
            decode(bad)


def test_pages_of_a_file_hold_its_chunks_alone() -> None:
    table = ChunkTable(MemoryStore())
    for ino in (1, 2, 3):
        for index in range(5):
            table.put(ChunkId(ino, index), Record(ino * 10 + index))
    assert table.page(2, 0, 100) == [(index, Record(20 + index)) for index in range(5)]
    assert table.page(2, 3, 100) == [(3, Record(23)), (4, Record(24))]
    assert table.page(2, 1, 2) == [(1, Record(21)), (2, Record(22))]
    assert table.page(2, 5, 100) == []


def test_garbage_that_is_gone_is_not_scanned_again() -> None:
    """Deleted keys stay in RocksDB for a while, and a scan over them takes its time."""

    class Recording(MemoryStore):
        starts: ClassVar[list[bytes]] = []

        def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
            self.starts.append(start)
            return super().scan(start, stop)

    store = Recording()
    table = ChunkTable(store)
    table.bury(1, [(index, Record(index)) for index in range(3)])
    table.forget(table.garbage(2))
    table.first_garbage = 2
    table.garbage(2)
    assert store.starts[-1] == key(GARBAGE, 2)


def test_garbage_is_kept_in_order_and_over_a_restart() -> None:
    store = MemoryStore()
    table = ChunkTable(store)
    assert table.leftovers == 0
    for ino in (1, 2):
        table.put(ChunkId(ino, 0), Record(ino * 100))
        table.put(ChunkId(ino, 7), Record(ino * 100 + 7))
    writes = store.writes
    table.bury(2, table.page(2, 0, 10))
    assert store.writes == writes + 1
    assert table.get(ChunkId(2, 7)) is None
    assert table.get(ChunkId(1, 7)) == Record(107)
    table.bury(1, [(7, Record(107))])
    births = [200, 207, 107]
    assert [piece.birth for piece in table.garbage(10)] == births
    table.forget(table.garbage(1))
    again = ChunkTable(store)
    assert again.leftovers == 2
    assert [(piece.chunk, piece.birth) for piece in again.garbage(10)] == [(ChunkId(2, 7), 207), (ChunkId(1, 7), 107)]
    again.bury(1, [(0, Record(100))])
    assert [piece.birth for piece in again.garbage(10)] == [207, 107, 100]
    again.forget(again.garbage(3))
    assert again.garbage(10) == []
    assert ChunkTable(store).leftovers == 0
