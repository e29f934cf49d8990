"""Check the ring on the real kernel. Pipes stand for slow disks: their operations end when the test lets them."""

import errno
import gc
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from benchfs_fuse.chunks.uring import PLAIN_LENGTH_MAX, Ring, filesystem_of, probe_inline
from benchfs_fuse.limits import MIB


@pytest.fixture
async def ring() -> AsyncIterator[Ring]:
    ring = Ring(depth=4)
    yield ring
    assert ring.statistics().in_flight == 0
    await ring.aclose()


class Pipes:
    """Open pipes, and close what is open at the end."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def make(self) -> tuple[int, int]:
        ends = os.pipe()
        self.ends += ends
        return ends

    def close(self) -> None:
        for end in self.ends:
            os.close(end)


@pytest.fixture
async def pipes() -> AsyncIterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


@pytest.mark.parametrize("length", [1, 4096, 65537, MIB + 3])
async def test_bytes_come_back_from_where_they_were_written(ring: Ring, tmp_path: Path, length: int) -> None:
    data = os.urandom(length)
    with (tmp_path / "file").open("w+b") as file:
        for offset in (0, 5, 3 * MIB):
            await ring.write(file.fileno(), data, offset)
            into = bytearray(b"." * (length + 2))
            assert await ring.read(file.fileno(), memoryview(into)[1:-1], offset) == length
            assert into == b"." + data + b"."
    assert (tmp_path / "file").read_bytes()[3 * MIB :] == data


async def test_a_read_ends_at_the_end_of_the_file(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    into = bytearray(b"." * 8)
    with (tmp_path / "file").open("rb") as file:
        assert await ring.read(file.fileno(), memoryview(into), 6) == 4
        assert into == b"6789...."
        assert await ring.read(file.fileno(), memoryview(into), 10) == 0
        assert await ring.read(file.fileno(), memoryview(b"")[:0], 0) == 0


@pytest.mark.parametrize("make", [bytes, bytearray, lambda data: memoryview(data)[:]])
async def test_any_buffer_can_be_written(ring: Ring, tmp_path: Path, make: type[bytes]) -> None:
    with (tmp_path / "file").open("w+b") as file:
        await ring.write(file.fileno(), make(b"content"), 0)
    assert (tmp_path / "file").read_bytes() == b"content"


async def test_every_errno_comes_home(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left") as caught:
        await ring.write(full, b"x", 0)
    assert caught.value.errno == errno.ENOSPC
    os.close(full)
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            await ring.write(file.fileno(), b"x", 0)
        assert caught.value.errno == errno.EBADF
        gone = os.dup(file.fileno())
        os.close(gone)
        for data_only in (True, False):
            with pytest.raises(OSError, match="Bad file descriptor"):
                await ring.fsync(gone, data_only=data_only)
            await ring.fsync(file.fileno(), data_only=data_only)


async def test_short_writes_go_on_until_all_is_written(ring: Ring, pipes: Pipes) -> None:
    """A pipe takes 64 KiB at a time."""
    reading, writing = pipes.make()
    data = os.urandom(300_000)
    received = b""

    def drain() -> None:
        nonlocal received
        while len(received) < len(data):
            received += os.read(reading, 10_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, drain)
        await ring.write(writing, data, 0)
    assert received == data
    assert ring.statistics().waited > 1


async def test_short_reads_go_on_until_the_buffer_is_full(ring: Ring, pipes: Pipes) -> None:
    reading, writing = pipes.make()
    into = bytearray(6)
    ended = trio.Event()

    async def read() -> None:
        assert await ring.read(reading, memoryview(into), 0) == 6
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for piece in (b"ab", b"cd"):
            os.write(writing, piece)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not ended.is_set()
        os.write(writing, b"ef")
        with trio.fail_after(5):
            await ended.wait()
    assert into == b"abcdef"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_completions_in_any_order_reach_their_tasks(ring: Ring, pipes: Pipes, order: tuple[int, ...]) -> None:
    """The first to wait leads; whoever is left when it has gone must be led on."""
    ends = [pipes.make() for _ in range(3)]
    done = [trio.Event() for _ in range(3)]

    async def read(number: int) -> None:
        into = bytearray(1)
        assert await ring.read(ends[number][0], memoryview(into), 0) == 1
        assert into == bytes([number])
        done[number].set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(read, number)
                await trio.testing.wait_all_tasks_blocked()
            for count, number in enumerate(order, 1):
                os.write(ends[number][1], bytes([number]))
                await done[number].wait()
                assert sum(event.is_set() for event in done) == count
                assert ring.statistics().in_flight == 3 - count


async def test_a_completion_that_another_task_reaped_wakes_the_leader(ring: Ring, pipes: Pipes, tmp_path: Path) -> None:
    """Nothing completes afterwards, so the descriptor never becomes readable again for the leader."""
    reading, writing = pipes.make()
    (tmp_path / "file").write_bytes(b"x")
    into = bytearray(1)
    with trio.fail_after(5), (tmp_path / "file").open("rb") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring.read, reading, memoryview(into), 0)
            await trio.testing.wait_all_tasks_blocked()
            assert ring.statistics().in_flight == 1
            os.write(writing, b"y")
            assert await ring.read(file.fileno(), memoryview(bytearray(1)), 0) == 1
            assert ring.statistics().in_flight == 0
    assert into == b"y"


async def test_a_cancelled_operation_keeps_its_buffer_until_it_completed(ring: Ring, pipes: Pipes) -> None:
    reading, writing = pipes.make()
    into = bytearray(2)
    ended = []

    async def read() -> None:
        ended.append(await ring.read(reading, memoryview(into), 0))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
            assert ring.statistics().in_flight == 2
            with pytest.raises(BufferError):
                into.append(0)
            assert ended == []
            os.write(writing, b"abcd")
    assert ended == [2, 2]


async def test_buffers_are_released(ring: Ring, pipes: Pipes, tmp_path: Path) -> None:
    """A bytearray that is exported anywhere cannot grow."""
    reading, writing = pipes.make()
    into = bytearray(100)
    with (tmp_path / "file").open("w+b") as file:
        await ring.write(file.fileno(), into, 0)
        await ring.write(file.fileno(), memoryview(into)[10:20], 0)
        await ring.read(file.fileno(), memoryview(into)[:50], 0)
        with pytest.raises(OSError, match="Bad file"):
            await ring.read(writing, memoryview(into)[:50], 0)
    os.write(writing, b"1")
    os.set_blocking(reading, False)
    await ring.read(reading, memoryview(into)[:1], 0)
    into.append(0)


@pytest.mark.parametrize("operation", ["read", "write", "failing"])
async def test_memory_does_not_grow(ring: Ring, tmp_path: Path, operation: str) -> None:
    """Count live allocations of Python, and pages for what the binding might take by itself."""
    pages = re.compile(rb"\d+ (\d+)")

    def resident() -> int:
        found = pages.match(Path("/proc/self/statm").read_bytes())
        assert found is not None
        return int(found[1]) * os.sysconf("SC_PAGE_SIZE")

    with (tmp_path / "file").open("w+b" if operation != "failing" else "wb") as file:
        data = bytearray(4096)
        file.write(data)
        file.flush()

        async def work(count: int) -> None:
            for _ in range(count):
                if operation == "write":
                    await ring.write(file.fileno(), memoryview(data)[1:], 0)
                elif operation == "read":
                    await ring.read(file.fileno(), memoryview(data)[1:], 0)
                else:
                    with pytest.raises(OSError, match="Bad file"):
                        await ring.read(file.fileno(), memoryview(data)[1:], 0)

        await work(500)
        gc.collect()
        blocks, size = sys.getallocatedblocks(), resident()
        await work(5000)
        gc.collect()
        assert sys.getallocatedblocks() - blocks < 500
        assert resident() - size < 500_000


async def test_a_full_queue_is_waited_for(ring: Ring, pipes: Pipes) -> None:
    ends = [pipes.make() for _ in range(10)]
    got = []

    async def read(number: int) -> None:
        into = bytearray(1)
        await ring.read(ends[number][0], memoryview(into), 0)
        got.append(into[0])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(read, number)
            await trio.testing.wait_all_tasks_blocked()
            assert ring.statistics().in_flight == 4
            assert ring.statistics().queued == 6
            for number in range(10):
                os.write(ends[number][1], bytes([number]))
    assert sorted(got) == list(range(10))


async def test_many_tasks_at_once(tmp_path: Path) -> None:
    ring = Ring(depth=8)
    with trio.fail_after(30), (tmp_path / "file").open("w+b") as file:

        async def work(number: int) -> None:
            for turn in range(20):
                offset = (turn * 40 + number) * 512
                data = bytes([number + 1]) * 512
                await ring.write(file.fileno(), data, offset)
                into = bytearray(512)
                assert await ring.read(file.fileno(), memoryview(into), offset) == 512
                assert into == data
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(work, number)
    statistics = ring.statistics()
    assert statistics.at_once + statistics.waited == 40 * 20 * 2
    assert statistics.in_flight == 0
    await ring.aclose()
    await ring.aclose()


async def test_an_idle_ring_leaves_no_task_behind() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    ring = Ring()
    assert trio.lowlevel.current_statistics().tasks_living == before
    await ring.aclose()


async def test_the_probe_tells_inline_from_handed_over(tmp_path: Path) -> None:
    """Tmpfs hands everything over (no FMODE_NOWAIT in mm/shmem.c); reads from the page cache are inline elsewhere."""
    shm = Path("/dev/shm")
    result = await probe_inline(shm)
    assert result.filesystem == filesystem_of(shm) == "tmpfs"
    assert not result.buffered_write_inline
    assert not result.buffered_read_inline
    assert all(value > 0 for value in result[3:])
    here = await probe_inline(tmp_path)
    if here.filesystem in ("ext4", "xfs"):
        assert here.buffered_read_inline
        assert here.buffered_write_inline == (here.filesystem == "xfs")
    assert os.listdir(tmp_path) == []


def test_plain_operations_are_short() -> None:
    """Twenty times the smallest write: a bound on how long one of them can keep the event loop, page cache warm."""
    assert PLAIN_LENGTH_MAX <= 256 * 1024
