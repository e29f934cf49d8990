"""Take chunk files away behind the daemons' backs, from files that nobody changes; see that exactly those are missed.

A block whose bytes are gone has to be an error for whoever reads it, never zeros and never other bytes; everything else
has to be there. ``benchfs check`` has to name those chunks, and no other.
"""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..limits import CHUNK_SIZE_MIN
from .manifest import Entry, content

#: Files that are kept, chunks of each, and bytes that are looked at at once.
FILES = 4
CHUNKS = 6
BLOCK = 4096
DIRECTORY = "kept"
#: What check calls a chunk file that is missing or short.
PROBLEM = "damaged chunk file"


def kept_bytes(number: int) -> bytes:
    """Return what the file of a number holds."""
    return content(number, CHUNKS * CHUNK_SIZE_MIN)


class HasChunkFiles(Protocol):
    """Be a cluster, as far as its chunk files go."""

    def chunk_files(self) -> list[Path]:
        """List the chunk files of all daemons."""
        ...


class Damage:
    """Remember what was taken away. ``kept``: the files, as they were found at first."""

    def __init__(self, cluster: HasChunkFiles, kept: Sequence[Entry], chance: random.Random) -> None:
        self._cluster = cluster
        self._random = chance
        self._numbers = {entry.ino: int(entry.path) for entry in kept if not entry.is_directory}
        #: Bytes that are left, by inode and chunk.
        self.left: dict[tuple[int, int], int] = {}

    def lose(self) -> bool:
        """Remove a chunk file or cut it short; tell whether there was one left."""
        files = {}
        for path in self._cluster.chunk_files():
            ino, index = (int(part, 16) for part in path.name.split(".")[:2])
            if ino in self._numbers and (ino, index) not in self.left:
                files[ino, index] = path
        if len(files) <= FILES * CHUNKS // 2:
            return False
        key = self._random.choice(sorted(files))
        if self._random.random() < 0.5:
            self.left[key] = 0
            files[key].unlink()
        else:
            self.left[key] = self._random.randrange(CHUNK_SIZE_MIN)
            os.truncate(files[key], self.left[key])
        return True

    def compare(self, blocks: dict[int, list[bytes | None]]) -> Iterator[str]:
        """Say what is wrong with the blocks that were read of each file; None could not be read."""
        per_chunk = CHUNK_SIZE_MIN // BLOCK
        for ino, number in self._numbers.items():
            right, there = kept_bytes(number), blocks.get(number, [])
            if len(there) != CHUNKS * per_chunk:
                yield f"{DIRECTORY}/{number} has {len(there)} blocks instead of {CHUNKS * per_chunk}"
                continue
            for position, block in enumerate(there):
                chunk, start = position // per_chunk, position % per_chunk * BLOCK
                left = self.left.get((ino, chunk), CHUNK_SIZE_MIN)
                where = f"{DIRECTORY}/{number} at {position * BLOCK}"
                if block is None and left >= start + BLOCK and (ino, chunk) not in self.left:
                    yield f"{where} cannot be read, though nothing was taken away there"
                if block is not None and block != right[position * BLOCK :][:BLOCK]:
                    yield f"{where} gives other bytes"
                if block is not None and left < start + BLOCK:
                    yield f"{where} can be read; its chunk {chunk} has {left} bytes left"

    def without(self, findings: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return what ``benchfs check`` found beside what was taken away; and what of that it did not find."""
        named = {(one["ino"], one["chunk"]): one for one in findings if one["problem"] == PROBLEM}
        others = [one for one in findings if (one["ino"], one["chunk"]) not in self.left or one["problem"] != PROBLEM]
        missed = self.left.keys() - named.keys()
        return others, [f"benchfs check does not name chunk {chunk} of inode {ino}" for ino, chunk in sorted(missed)]
