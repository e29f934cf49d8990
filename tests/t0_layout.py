"""Check the layout: extents partition a range, rows cover all daemons, strides spread."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.layout import ShardMap, chunk_shard, extents
from benchfs_fuse.limits import CHUNK_SIZE_MIN, FILE_SIZE_MAX, SHARDS
from benchfs_fuse.model import make_ino, shard_of

SIZES = st.sampled_from([CHUNK_SIZE_MIN << power for power in range(8)])


@given(offset=st.integers(0, FILE_SIZE_MAX - (1 << 30)), length=st.integers(0, 1 << 24), chunk_size=SIZES)
def test_extents_partition_the_range(offset: int, length: int, chunk_size: int) -> None:
    at = offset
    for extent in extents(offset, length, chunk_size):
        assert extent.length > 0
        assert extent.index * chunk_size + extent.offset == at
        assert extent.position == at - offset
        assert extent.offset + extent.length <= chunk_size
        at += extent.length
    assert at == offset + length


@given(shard=st.integers(0, SHARDS - 1), counter=st.integers(1, (1 << 48) - 1))
def test_inode_number_holds_its_shard_and_stays_positive_in_64_bits(shard: int, counter: int) -> None:
    ino = make_ino(shard, counter)
    assert shard_of(ino) == shard
    assert 0 < ino < 1 << 63


@given(ino=st.integers(1, (1 << 60) - 1), row=st.integers(0, 1 << 40), width=st.integers(1, 256))
def test_a_row_lies_on_consecutive_shards(ino: int, row: int, width: int) -> None:
    first = chunk_shard(ino, row * width, width)
    assert first >= 0 and first + width <= SHARDS
    assert [chunk_shard(ino, row * width + column, width) for column in range(width)] == [*range(first, first + width)]


@pytest.mark.parametrize("daemons", [1, 2, 3, 5, 16])
def test_a_row_covers_every_daemon_once(daemons: int) -> None:
    shard_map = ShardMap.round_robin(daemons)
    for ino in range(1, 200):
        for row in range(20):
            indexes = range(row * daemons, (row + 1) * daemons)
            assert {shard_map.of_chunk(ino, index, daemons) for index in indexes} == set(range(daemons))


@pytest.mark.parametrize("daemons", [2, 3, 16])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 32, 256, 1000])
def test_no_stride_through_a_file_falls_on_few_daemons(daemons: int, stride: int) -> None:
    shard_map = ShardMap.round_robin(daemons)
    touched = 4096
    load = Counter(shard_map.of_chunk(12345, index * stride, daemons) for index in range(touched))
    fair = touched / daemons
    assert len(load) == daemons
    assert max(load.values()) < 1.3 * fair
    assert min(load.values()) > 0.7 * fair


@pytest.mark.parametrize("daemons", [2, 16])
def test_first_chunks_of_small_files_spread(daemons: int) -> None:
    shard_map = ShardMap.round_robin(daemons)
    load = Counter(shard_map.of_chunk(make_ino(7, counter), 0, daemons) for counter in range(1, 4097))
    assert max(load.values()) < 1.3 * 4096 / daemons


def test_of_chunks_looks_no_further_than_needed() -> None:
    shard_map = ShardMap.round_robin(3)
    assert shard_map.of_chunks(99, range(1 << 50), 3) == {0, 1, 2}
    assert shard_map.of_chunks(99, range(0), 3) == set()
    assert shard_map.of_chunks(99, range(5, 6), 3) == {shard_map.of_chunk(99, 5, 3)}


def test_a_foreign_inode_number_is_refused() -> None:
    with pytest.raises(ValueError, match="names no shard"):
        ShardMap.round_robin(2).of_ino(1 << 61)
