"""After a power cut inodes and chunks are made to fit again, while the cluster is used."""

import os

import pytest
import trio
from fsck import Stored, complaints
from trio.testing import wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_DEFAULT
from benchfs_fuse.model import ChunkId, make_ino
from benchfs_fuse.rpc.messages import Done, Recount
from benchfs_fuse.services.identity import LOST, RECOUNT, open_store, power_losses


async def recount(whole: Whole) -> None:
    """Let all daemons recount, and wait for the end of it."""
    for daemon in whole.cluster.daemons:
        await daemon.server.call_local(Recount(), Done)
    for _ in range(3):
        await wait_all_tasks_blocked()
        for daemon in whole.cluster.daemons:
            await whole.service(daemon).metadata.wait_idle()
    for daemon in whole.cluster.daemons:
        assert daemon.store.get(RECOUNT) is None


def wrong(whole: Whole, clients: int = 1) -> list[str]:
    stored = [
        Stored(daemon.store, {chunk: record for chunk, (record, _) in chunks.contents().items()})
        for daemon, chunks in zip(whole.cluster.daemons, whole.stores, strict=True)
    ]
    return complaints(stored, whole.cluster.shard_map, clients)


async def file_of(client: Client, name: str, chunks: int) -> int:
    async with await client.fs.open(name, os.O_RDWR | os.O_CREAT) as file:
        await file.write(b"x" * (chunks * CHUNK - 100), 0)
        return file.ino


async def home_of(whole: Whole, client: Client, ino: int, index: int) -> int:
    width = (await client.files.getattr(ino)).width
    return whole.cluster.shard_map.of_chunk(ino, index, width)


async def test_chunks_without_an_inode_are_dropped() -> None:
    async with whole_cluster(3) as whole, whole.client() as client:
        for number in range(20):
            await file_of(client, f"kept{number}", 4)
        for shard in range(9):  # inodes that were never stored, at all daemons
            for index, store in enumerate(whole.stores):
                await store.write(ChunkId(make_ino(shard, 12345), index), 0, b"?" * 5000)
        assert wrong(whole)
        await recount(whole)
        assert wrong(whole) == []
        for number in range(20):
            async with await client.fs.open(f"kept{number}") as file:
                assert await file.read(5 * CHUNK, 0) == b"x" * (4 * CHUNK - 100)


async def test_what_was_never_published_is_cut_off() -> None:
    async with whole_cluster(3) as whole, whole.client() as client:
        ino = await file_of(client, "file", 4)
        for index in (3, 7):
            daemon = await home_of(whole, client, ino, index)
            await whole.stores[daemon].write(ChunkId(ino, index), CHUNK - 100, b"?" * 100)
        await recount(whole)
        assert wrong(whole) == []
        await client.fs.setattr("file", size=8 * CHUNK)
        async with await client.fs.open("file") as file:
            assert await file.read(8 * CHUNK, 0) == (b"x" * (4 * CHUNK - 100)).ljust(8 * CHUNK, b"\0")


async def test_space_is_counted_anew_when_chunks_were_lost() -> None:
    async with whole_cluster(3) as whole, whole.client() as client:
        ino = await file_of(client, "file", 4)
        daemon = await home_of(whole, client, ino, 2)
        del whole.stores[daemon]._chunks[ChunkId(ino, 2)]
        before = (await client.files.getattr(ino)).allocated
        await recount(whole)
        assert wrong(whole) == []
        async with await client.fs.open("file") as file:
            assert (await file.stat()).allocated == before - CHUNK
            assert await file.read(CHUNK, 2 * CHUNK) == bytes(CHUNK)


async def test_a_file_in_use_is_left_alone_until_it_is_closed() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_time_s=3600.0) as client:
        async with await client.fs.open("file", os.O_RDWR | os.O_CREAT) as file:
            await file.write(b"a" * CHUNK, 0)
            await client.files.flush(file._handle)
            # Written, and not yet published.
            daemon = await home_of(whole, client, file.ino, 1)
            await whole.stores[daemon].write(ChunkId(file.ino, 1), 0, b"b" * CHUNK)
            await recount(whole)
            assert whole.stores[daemon].contents()[ChunkId(file.ino, 1)][1] == b"b" * CHUNK
            assert len(wrong(whole)) > 1
        with trio.fail_after(5):
            while [sentence for sentence in wrong(whole) if "session" not in sentence]:
                await wait_all_tasks_blocked()
                for one in whole.cluster.daemons:
                    await whole.service(one).metadata.wait_idle()


@pytest.mark.parametrize("first", ["", "boot-1"])
def test_a_start_on_another_boot_is_taken_for_a_power_cut(first: str) -> None:
    store = MemoryStore()

    def start(boot_id: str) -> None:
        open_store(store, "cluster", 0, ShardMap.round_robin(1), CHUNK_SIZE_DEFAULT, 5, boot_id)

    start(first)
    start(first)
    assert store.get(LOST) is None
    assert power_losses(store) == 0
    start("boot-2")
    assert store.get(LOST) is not None
    store.write([], [LOST])
    start("boot-2")
    assert store.get(LOST) is None
    assert power_losses(store) == 1
