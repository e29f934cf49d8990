"""Compare what the daemons of a cluster have stored: names and inodes, inodes and chunks, records and files.

Everything is read from the stores themselves, while nothing goes on. What is found is said in sentences; an empty list
means that the cluster is whole and that nothing was left behind.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchfs_fuse import disk
from benchfs_fuse.chunks.table import Record, decode
from benchfs_fuse.comparison import ChunkFacts, Comparison
from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.model import ChunkId
from benchfs_fuse.ports import KeyValueStore
from benchfs_fuse.services.checking import inode_of, name_of


class Stored(NamedTuple):
    """Hold what one daemon has: its records, and the records of its chunks."""

    records: KeyValueStore
    chunks: Mapping[ChunkId, Record]


def _rows(stored: Stored, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    return stored.records.scan(prefix, disk.after(prefix))


def complaints(cluster: Sequence[Stored], shard_map: ShardMap, clients: int = 0) -> list[str]:
    """Say what is wrong in a cluster at rest, with so many clients that have nothing open. Daemons by number."""
    return [*_compare(cluster, shard_map), *_positions(cluster), *_leftovers(cluster, clients)]


def _compare(cluster: Sequence[Stored], shard_map: ShardMap) -> Iterator[str]:
    """Compare names with inodes and inodes with chunks, as ``benchfs check`` does."""
    comparison = Comparison(shard_map)
    for daemon, stored in enumerate(cluster):
        for _, value in _rows(stored, disk.INODE):
            inode = inode_of(daemon, value)
            assert inode is not None
            comparison.add_inode(inode)
    for daemon, stored in enumerate(cluster):
        for key, value in _rows(stored, disk.ENTRY):
            comparison.add_name(name_of(daemon, key, value))
        for chunk, record in stored.chunks.items():
            comparison.add_chunk(ChunkFacts(daemon, *chunk, record.length, record.allocated, ""))
    for finding in comparison.findings():
        yield f"{finding.problem}: inode {finding.ino} on daemon {finding.daemon}: {finding.what} {finding.name!r}"


def _positions(cluster: Sequence[Stored]) -> Iterator[str]:
    """Compare the names of directories with their listings."""
    for daemon, stored in enumerate(cluster):
        entries = 0
        for key, value in _rows(stored, disk.ENTRY):
            entries += 1
            position = stored.records.get(disk.POSITION + key[1:9] + value[8:16])
            if position is None or position[10:] != key[9:] or position[:8] != value[:8]:
                yield f"{key[9:]!r} in directory {disk.number(key)} has no position"
        positions = sum(1 for _ in _rows(stored, disk.POSITION))
        if positions != entries:
            yield f"daemon {daemon} holds {positions} positions and {entries} entries"


#: Records that nothing at rest leaves behind.
_PASSING = {
    disk.DEAD: "dead file or orphan",
    disk.TRUNCATING: "truncation or doubt",
    disk.TRANSACTION: "transaction",
    disk.WRITE_OPEN: "file open for writing",
    disk.GARBAGE: "chunk file to be removed",
}


def _leftovers(cluster: Sequence[Stored], clients: int) -> Iterator[str]:
    for daemon, stored in enumerate(cluster):
        for prefix, what in _PASSING.items():
            for key, value in _rows(stored, prefix):
                yield f"daemon {daemon} holds a {what}: {key.hex()} {value.hex()}"
        sessions = {disk.number(key) for key, _ in _rows(stored, disk.SESSION)}
        if len(sessions) != clients:
            yield f"daemon {daemon} holds {len(sessions)} sessions"
        if strays := {disk.number(key) for key, _ in _rows(stored, disk.OUTCOME)} - sessions:
            yield f"daemon {daemon} holds outcomes of {len(strays)} clients that have no session"


def complaints_on_disk(data_dirs: Sequence[Path], shard_map: ShardMap) -> list[str]:
    """Say what is wrong in a cluster whose daemons have stopped and whose clients have left."""
    by_number = {json.loads((path / "identity.json").read_bytes())["daemon_id"]: path for path in data_dirs}
    with contextlib.ExitStack() as stack:
        cluster = []
        for _, path in sorted(by_number.items()):
            store = RocksStore(path / "meta")
            stack.callback(store.close)
            rows = store.scan(disk.CHUNK, disk.after(disk.CHUNK))
            cluster.append(Stored(store, {ChunkId(*disk.numbers(key)): decode(value) for key, value in rows}))
        found = complaints(cluster, shard_map)
        for number, path in sorted(by_number.items()):
            found += _files(path, cluster[number])
    return found


def _files(path: Path, stored: Stored) -> Iterator[str]:
    """Compare the records of chunks with chunk files."""
    there = {
        (ChunkId(ino, index), birth): Path(folder, name).stat().st_size
        for folder, _, names in os.walk(path / "chunks")
        for name in names
        for ino, index, birth in [[int(part, 16) for part in name.split(".")]]
    }
    known = {(chunk, record.birth): record.length for chunk, record in stored.chunks.items()}
    for key in there.keys() - known.keys():
        yield f"{path.name} holds a file of chunk {key[0]}, which has no record"
    for key, length in known.items():
        if there.get(key, -1) < length:
            yield f"{path.name} lacks bytes of chunk {key[0]}: {there.get(key)} of {length}"
