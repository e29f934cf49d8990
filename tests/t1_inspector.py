"""Hold every ChunkInspector to the same suite: the one of the disk store, and its twin in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from benchfs_fuse.chunks.disk import DiskChunkStore
from benchfs_fuse.chunks.inspector import PAGE_MAX, STEP_MAX, DiskInspector
from benchfs_fuse.chunks.memory import MemoryChunkStore, MemoryInspector
from benchfs_fuse.chunks.uring import Ring
from benchfs_fuse.disk import CHUNK, key2
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.model import ChunkId
from benchfs_fuse.ports import ChunkInspector, ChunkState, ChunkStore, Held

pytest_plugins = ("mounts",)

BLOCK = 4096


@asynccontextmanager
async def disk_store(
    directory: Path, kv: MemoryStore | None = None
) -> AsyncIterator[tuple[DiskChunkStore, DiskInspector]]:
    ring = Ring()
    async with trio.open_nursery() as nursery:
        store = DiskChunkStore(directory, kv or MemoryStore(), ring, nursery, reserve=0)
        yield store, DiskInspector(store)
        nursery.cancel_scope.cancel()
    await store.aclose()
    await ring.aclose()


@asynccontextmanager
async def opened(kind: str, directory: Path) -> AsyncIterator[tuple[ChunkStore, ChunkInspector]]:
    if kind == "disk":
        async with disk_store(directory) as both:
            yield both
    else:
        store = MemoryChunkStore()
        yield store, MemoryInspector(store)


async def everything(inspector: ChunkInspector) -> list[ChunkState]:
    found: list[ChunkState] = []
    start = ChunkId(0, 0)
    while page := await inspector.page(start):
        assert page[0].chunk >= start
        found += page
        start = ChunkId(page[-1].chunk.ino, page[-1].chunk.index + 1)
    return found


@pytest.mark.parametrize("kind", ["disk", "memory"])
async def test_pages_show_every_chunk_once_in_order(tmp_path: Path, kind: str) -> None:
    async with opened(kind, tmp_path) as (store, inspector):
        assert await everything(inspector) == []
        chunks = sorted(ChunkId(ino, index) for ino in (1, 2, 300, 1 << 60) for index in (0, 1, 7, 1 << 40))
        for chunk in reversed(chunks):
            await store.write(chunk, 0, b"x" * (chunk.index % 8 + 1))
        found = await everything(inspector)
        assert [one.chunk for one in found] == chunks
        assert [(one.length, one.allocated, one.trouble) for one in found] == [
            (chunk.index % 8 + 1, BLOCK, "") for chunk in chunks
        ]
        await store.drop([2])
        assert [one.chunk for one in await everything(inspector)] == [chunk for chunk in chunks if chunk.ino != 2]
        assert await inspector.strays(range(inspector.folders)) == []


@pytest.mark.parametrize("kind", ["disk", "memory"])
async def test_held_sums_up_one_file(tmp_path: Path, kind: str) -> None:
    async with opened(kind, tmp_path) as (store, inspector):
        assert await inspector.held(5, 0, 0) == Held(0, 0, 0)
        for index in range(STEP_MAX + 5):
            await store.write(ChunkId(5, index), 0, b"x" * 100)
        await store.write(ChunkId(6, 0), 0, b"y")
        count = STEP_MAX + 5
        assert await inspector.held(5, 0, 0) == Held(count, count * BLOCK, count)
        assert await inspector.held(5, count, 0) == Held(count, count * BLOCK, 0)
        assert await inspector.held(5, count - 1, 99) == Held(count, count * BLOCK, 1)
        assert await inspector.held(5, count - 1, 100) == Held(count, count * BLOCK, 0)
        assert await inspector.held(4, 0, 0) == Held(0, 0, 0)


async def test_a_damaged_record_is_told_with_its_chunk(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with disk_store(tmp_path, kv) as (store, inspector):
        for index in range(3):
            await store.write(ChunkId(5, index), 0, b"x")
        kv.write([(key2(CHUNK, 5, 1), b"rubbish")])
        assert [one.trouble for one in await everything(inspector)] == ["", "chunk record of 7 bytes", ""]
        assert await inspector.held(5, 0, 0) == Held(3, 2 * BLOCK, 2)
        # Its file is not taken for a stray.
        assert await inspector.strays(range(inspector.folders)) == []


async def test_strays_are_what_no_record_knows(tmp_path: Path) -> None:
    async with disk_store(tmp_path) as (store, inspector):
        await store.write(ChunkId(5, 0), 0, b"x" * 10)
        folder = tmp_path / "chunks" / "05"
        (own,) = folder.iterdir()
        names = {
            "another birth": (f"{own.name[:-1]}{'0' if own.name[-1] != '0' else '1'}", ChunkId(5, 0)),
            "another chunk": (f"{5:016x}.00000001.{1:016x}", ChunkId(5, 1)),
            "a chunk far out": (f"{5:016x}.10000000000.{1:016x}", ChunkId(5, 1 << 40)),
            "not written so": (f"{5:016x}.000000001.{1:016x}", None),
            "capitals": (f"{5:016x}.0000000A.{1:016x}", None),
            "anything": ("core", None),
        }
        for name, _ in names.values():
            (folder / name).write_bytes(b"123")
        found = {file.name: (file.chunk, file.length) for file in await inspector.strays(range(5, 6))}
        assert found == {name: (chunk, 3) for name, chunk in names.values()}
        assert await inspector.strays(range(6, inspector.folders)) == []
        # In another directory, its own file would not be found either.
        (tmp_path / "chunks" / "06" / own.name).write_bytes(b"")
        (misplaced,) = await inspector.strays(range(6, 7))
        assert (misplaced.folder, misplaced.chunk) == (6, ChunkId(5, 0))
        freed = await inspector.remove_strays(5, [own.name, "gone", *(name for name, _ in names.values())])
        assert freed == 9
        assert {path.name for path in folder.iterdir()} == {
            own.name,
            *(name for name, chunk in names.values() if chunk is None),
        }
        into = bytearray(10)
        assert await store.read(ChunkId(5, 0), 0, memoryview(into)) == 10


async def test_what_is_still_to_be_removed_is_no_stray(tmp_path: Path) -> None:
    """Hold the removal of dropped files up; what it fails at counts as stray."""
    kv = MemoryStore()
    go_on = trio.Event()
    async with disk_store(tmp_path, kv) as (store, inspector):
        for index in range(STEP_MAX + 5):
            await store.write(ChunkId(5, index), 0, b"x")
        stuck = next((tmp_path / "chunks" / "05").glob("*.00000003.*"))
        stuck.unlink()
        stuck.mkdir()
        kv.sync = go_on.wait  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.drop, [5])
            await wait_all_tasks_blocked()
            assert len(list((tmp_path / "chunks" / "05").iterdir())) == STEP_MAX + 5
            assert await inspector.strays(range(16)) == []
            assert inspector.to_remove == STEP_MAX + 5
            go_on.set()
        with trio.fail_after(10):
            while inspector.to_remove:
                await wait_all_tasks_blocked(0.001)
        assert [file.chunk for file in await inspector.strays(range(16))] == [ChunkId(5, 3)]


#: Files to be unlinked at once while chunks change.
GARBAGE_MAX = 400


async def test_chunks_that_change_meanwhile_are_not_damaged(plain_dir: Path) -> None:
    """Pages are read while chunks are made, grown, cut and dropped side by side."""
    async with disk_store(plain_dir) as (store, inspector):
        stop = False

        async def change(ino: int) -> None:
            number = 0
            while not stop:
                number += 1
                await store.write(ChunkId(ino, number % 40), (number % 5) * BLOCK, b"x" * BLOCK)
                if number % 7 == 0:
                    await store.trim(ino, number % 40, BLOCK // 2)
                if number % 50 == 0:
                    await store.drop([ino])
                # A thread unlinks files: on a busy machine it falls behind, and looks at them take ever longer.
                while store.table.next_garbage - store.removed_to > GARBAGE_MAX and not stop:  # noqa: ASYNC110
                    await trio.sleep(0.001)

        seen = 0
        async with trio.open_nursery() as nursery:
            for ino in range(1, 9):
                nursery.start_soon(change, ino)
            looks = 0
            while looks < 8 or seen <= PAGE_MAX:
                states = await everything(inspector)
                looks, seen = looks + 1, seen + len(states)
                assert [one for one in states if one.trouble] == []
                assert await inspector.strays(range(16)) == []
            stop = True
