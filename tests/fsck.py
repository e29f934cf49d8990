"""Compare what the daemons of a cluster have stored: names and inodes, inodes and chunks, records and files.

Everything is read from the stores themselves, while nothing goes on. What is found is said in sentences; an empty list
means that the cluster is whole and that nothing was left behind.
"""

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchfs_fuse import disk
from benchfs_fuse.chunks.table import Record, decode
from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.model import ROOT_INO, ChunkId
from benchfs_fuse.ports import KeyValueStore
from benchfs_fuse.services.inodes import Inode


class Stored(NamedTuple):
    """Hold what one daemon has: its records, and the records of its chunks."""

    records: KeyValueStore
    chunks: Mapping[ChunkId, Record]


def _rows(stored: Stored, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    return stored.records.scan(prefix, disk.after(prefix))


def complaints(cluster: Sequence[Stored], shard_map: ShardMap, clients: int = 0) -> list[str]:
    """Say what is wrong in a cluster at rest, with so many clients that have nothing open. Daemons by number."""
    return [*_names(cluster, shard_map), *_space(cluster, shard_map), *_leftovers(cluster, clients)]


def _inodes(cluster: Sequence[Stored]) -> dict[int, Inode]:
    return {
        disk.number(key): msgspec.msgpack.decode(value, type=Inode)
        for stored in cluster
        for key, value in _rows(stored, disk.INODE)
    }


def _names(cluster: Sequence[Stored], shard_map: ShardMap) -> Iterator[str]:
    """Compare entries with inodes."""
    inodes = _inodes(cluster)
    links, subdirectories, entries = Counter[int](), Counter[int](), Counter[int]()
    for daemon, stored in enumerate(cluster):
        for key, value in _rows(stored, disk.ENTRY):
            parent, name = disk.number(key), key[9:]
            ino, cookie = disk.numbers(b"." + value[:16])
            links[ino] += 1
            entries[parent] += 1
            if shard_map.of_ino(parent) != daemon:
                yield f"{name!r} in directory {parent} is on daemon {daemon}"
            if parent not in inodes:
                yield f"{name!r} is in directory {parent}, which is not there"
            if ino not in inodes:
                yield f"{name!r} in directory {parent} names inode {ino}, which is not there"
                continue
            if stat.S_IFMT(inodes[ino].mode) != int.from_bytes(value[16:18], "big"):
                yield f"{name!r} in directory {parent} says what inode {ino} is not"
            if inodes[ino].is_dir:
                subdirectories[parent] += 1
                if inodes[ino].parent != parent:
                    yield f"directory {ino} is in {parent} and believes to be in {inodes[ino].parent}"
            position = stored.records.get(disk.key2(disk.POSITION, parent, cookie))
            if position is None or position[10:] != name or position[:8] != value[:8]:
                yield f"{name!r} in directory {parent} has no position"
        positions = sum(1 for _ in _rows(stored, disk.POSITION))
        if positions != sum(1 for _ in _rows(stored, disk.ENTRY)):
            yield f"daemon {daemon} holds {positions} positions, not as many as entries"
    for ino, inode in inodes.items():
        if inode.is_dir:
            if links[ino] != (ino != ROOT_INO):
                yield f"directory {ino} has {links[ino]} names"
            if inode.nlink != 2 + subdirectories[ino]:
                yield f"directory {ino} has {subdirectories[ino]} subdirectories and {inode.nlink} links"
            if inode.entries != entries[ino]:
                yield f"directory {ino} has {entries[ino]} entries and counts {inode.entries}"
        elif inode.nlink != links[ino] or not links[ino]:
            yield f"inode {ino} has {links[ino]} names and {inode.nlink} links"


def _space(cluster: Sequence[Stored], shard_map: ShardMap) -> Iterator[str]:
    """Compare inodes with chunks."""
    inodes = _inodes(cluster)
    allocated = Counter[int]()
    for daemon, stored in enumerate(cluster):
        for chunk, record in stored.chunks.items():
            inode = inodes.get(chunk.ino)
            if inode is None:
                yield f"daemon {daemon} holds chunk {chunk.index} of inode {chunk.ino}, which is not there"
                continue
            allocated[chunk.ino] += record.allocated
            if shard_map.of_chunk(chunk.ino, chunk.index, inode.width) != daemon:
                yield f"daemon {daemon} holds chunk {chunk.index} of inode {chunk.ino}, which belongs elsewhere"
            if chunk.index * inode.chunk_size + record.length > inode.size:
                yield f"chunk {chunk.index} of inode {chunk.ino} reaches behind its size of {inode.size}"
    for ino, inode in inodes.items():
        if inode.allocated != allocated[ino]:
            yield f"inode {ino} counts {inode.allocated} bytes, its chunks have {allocated[ino]}"


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
