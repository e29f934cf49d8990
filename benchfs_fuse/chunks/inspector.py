"""Look at the chunk files of a store that is in use: which of its table's are damaged, which files nobody knows.

The disk is looked at in threads, a page at a time, while the store works on. So whatever looks wrong there is looked at
once more on the spot, without an ``await`` in between: then the table and the files belong together. For at every
such moment, a record that is not empty has its file, as long as it says at least, and a file without a record is on
the list of what is to be removed or is a stray.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from ..errors import StorageError
from ..model import INO_END, ChunkId
from ..ports import ChunkState, FileSum, Held, StrayFile, Sums
from .disk import DIRECTORIES, DiskChunkStore
from .identity import trouble_at
from .table import Record, decode

#: Chunk files looked at in one go: half a millisecond of a thread, and what is wrong with each fits into a reply.
PAGE_MAX = 128
#: Records summed up in one go, names of files compared with records in one go: about half a millisecond.
STEP_MAX = 128
#: Files summed up in one go: their sums fit into a reply.
FILES_MAX = 512
#: Strays told in one go.
STRAYS_MAX = 256
#: Characters that tell what is wrong with a file.
TROUBLE_MAX = 300


class DiskInspector:
    """Implement ChunkInspector for the disk store."""

    folders = DIRECTORIES

    def __init__(self, store: DiskChunkStore) -> None:
        self._store = store
        self._table = store.table

    @property
    def to_remove(self) -> int:
        """Return how many files of dropped chunks are still to be removed, but for those that could not be."""
        return self._store.to_remove

    async def page(self, start: ChunkId) -> list[ChunkState]:
        """Return some of the chunks from ``start`` on, in order; an empty list: there are no more."""
        rows = self._table.rows(start, PAGE_MAX)
        known: list[tuple[ChunkId, Record]] = []
        found: dict[ChunkId, ChunkState] = {}
        for chunk, value in rows:
            try:
                known.append((chunk, decode(value)))
            except StorageError as error:
                found[chunk] = ChunkState(chunk, 0, 0, 0, str(error)[:TROUBLE_MAX])
        troubles = await trio.to_thread.run_sync(self._look_at, known)
        for (chunk, record), trouble in zip(known, troubles, strict=True):
            if trouble:
                await trio.lowlevel.checkpoint()
                # From here to the answer there is no await.
                now = self._table.get(chunk)
                if now is None:
                    continue
                record, trouble = now, self._look_at([(chunk, now)])[0]
                if trouble:
                    trouble = f"{self._store.path(chunk, record.birth)} {trouble}"[:TROUBLE_MAX]
            found[chunk] = ChunkState(chunk, record.birth, record.length, record.allocated, trouble)
        if rows and not found:  # all of them have gone meanwhile
            last = rows[-1][0]
            return await self.page(ChunkId(last.ino, last.index + 1))
        return [found[chunk] for chunk, _ in rows if chunk in found]

    def _look_at(self, chunks: Sequence[tuple[ChunkId, Record]]) -> list[str]:
        return [
            trouble_at(self._store.path(chunk, record.birth), record, self._store.marking.everywhere)
            for chunk, record in chunks
        ]

    async def held(self, ino: int, index: int, offset: int) -> Held:
        """Sum up the chunks of a file, and count those that reach behind byte ``offset`` of chunk ``index``."""
        chunks = allocated = beyond = 0
        rows = self._table.rows(ChunkId(ino, 0), STEP_MAX)
        while own := [row for row in rows if row[0].ino == ino]:
            for chunk, value in own:
                chunks += 1
                try:
                    record = decode(value)
                except StorageError:  # ``page`` tells
                    continue
                allocated += record.allocated
                beyond += chunk.index > index or (chunk.index == index and record.length > offset)
            if len(own) < STEP_MAX:
                break
            await trio.lowlevel.checkpoint()
            rows = self._table.rows(ChunkId(ino, own[-1][0].index + 1), STEP_MAX)
        return Held(chunks, allocated, beyond)

    async def sums(self, start: int, wanted: Callable[[int], bool]) -> Sums:
        """Sum up some of the files from inode ``start`` on; damaged records count as nothing."""
        files: list[FileSum] = []
        at = ChunkId(start, 0)
        while rows := self._table.rows(at, STEP_MAX):
            for chunk, value in rows:
                if chunk.ino != at.ino and len(files) >= FILES_MAX:
                    return Sums(files, chunk.ino)
                at = ChunkId(chunk.ino, chunk.index + 1)
                if not wanted(chunk.ino):
                    continue
                try:
                    record = decode(value)
                except StorageError:  # ``page`` tells
                    continue
                allocated = record.allocated
                if files and files[-1].ino == chunk.ino:
                    allocated += files.pop().allocated
                files.append(FileSum(chunk.ino, allocated, chunk.index, record.length))
            await trio.lowlevel.checkpoint()
        return Sums(files, INO_END)

    async def strays(self, folders: range) -> list[StrayFile]:
        """Return the files of some directories that no record knows; of very many, the first ``STRAYS_MAX``."""
        suspects: list[tuple[int, str]] = []
        for folder in folders:
            names = await trio.to_thread.run_sync(os.listdir, self._store.folder(folder))
            for start in range(0, len(names), STEP_MAX):
                await trio.lowlevel.checkpoint()
                suspects += (
                    (folder, name) for name in names[start : start + STEP_MAX] if not self._is_known(folder, name)
                )
        if not suspects:
            return []
        # What was dropped by now is still on the list of garbage, or has gone.
        dropped = await self._dropped()
        found = []
        for folder, name in suspects:
            parsed = _parse(name)
            if parsed is not None and parsed[1] in dropped:
                continue
            await trio.lowlevel.checkpoint()
            try:
                length = os.stat(f"{self._store.folder(folder)}/{name}", follow_symlinks=False).st_size
            except OSError:
                continue
            found.append(StrayFile(folder, name, parsed[0] if parsed is not None else None, length))
            if len(found) == STRAYS_MAX:
                break
        return found

    async def _dropped(self) -> set[int]:
        """Return the births of all chunks whose files are still to be removed, but for those where that has failed."""
        births: set[int] = set()
        sequence = self._store.removed_to
        while page := self._table.garbage(STEP_MAX, sequence):
            births.update(piece.birth for piece in page)
            sequence = page[-1].sequence + 1
            await trio.lowlevel.checkpoint()
        return births

    def _is_known(self, folder: int, name: str) -> bool:
        """Tell whether a chunk's record means this file."""
        parsed = _parse(name)
        if parsed is None:
            return False
        chunk, birth = parsed
        try:
            record = self._table.get(chunk)
        except StorageError:
            return True  # it cannot be told: told with the record
        return record is not None and record.birth == birth and chunk.ino % DIRECTORIES == folder

    async def remove_strays(self, folder: int, names: Sequence[str]) -> int:
        """Remove those of these files that no record knows and that are chunk files; return their bytes.

        What no record knows is never known again: births are random.
        """
        path = Path(self._store.folder(folder))
        await self._store.sync_table()
        freed = 0
        for name in names:
            if _parse(name) is not None and not self._is_known(folder, name):
                freed += await trio.to_thread.run_sync(_unlink, path / name)
        return freed


def _unlink(path: Path) -> int:
    """Remove a file; return how long it was."""
    try:
        length = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"{path} cannot be removed: {error.strerror}") from error
    return length


def _parse(name: str) -> tuple[ChunkId, int] | None:
    """Return the chunk and the birth that the name of a chunk file says, None for any other name."""
    parts = name.split(".")
    try:
        ino, index, birth = (int(part, 16) for part in parts)
    except ValueError:
        return None
    return (ChunkId(ino, index), birth) if name == f"{ino:016x}.{index:08x}.{birth:016x}" else None
