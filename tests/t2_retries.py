"""A retry comes behind what it repeats: behind what is still being served, and behind what other daemons have to do."""

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.model import ROOT_INO, DaemonId
from benchfs_fuse.rpc.messages import Body, Done, Finish, Request, SetAttr, SyncChunks
from benchfs_fuse.services.calls import Call


class World(NamedTuple):
    """Hold a cluster of two daemons, of which daemon 1 takes no Finish before ``go_on``; ``came``: there was one."""

    whole: Whole
    one: Client
    came: trio.Event
    go_on: trio.Event


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Make a cluster whose next directory in the root lies on daemon 1; ``f`` is a link to a file that does, too."""
    async with whole_cluster(2) as whole, whole.client() as one:
        home = whole.cluster.shard_map.of_ino
        participant = whole.cluster.daemons[1]
        made = [await one.fs.mkdir(f"/d{number}") for number in range(3)]
        there = next(number for number, attrs in enumerate(made) if home(attrs.ino) == participant.daemon_id)
        await one.fs.mknod(f"/d{there}/f", stat.S_IFREG | 0o600)
        await one.fs.link(f"/d{there}/f", "/f")
        if home(made[-1].ino) == participant.daemon_id:
            await one.fs.mkdir("/d3")
        came, go_on = trio.Event(), trio.Event()
        finish = whole.service(participant).handlers_now()[Finish]

        async def later(request: Request, call: Call) -> Body:
            came.set()
            await go_on.wait()
            answer = finish(request, call)
            assert answer is not None
            return answer

        participant.server.register({Finish: later}, {Finish: lambda request, call: None})
        yield World(whole, one, came, go_on)


async def mkdir(one: Client) -> object:
    return await one.namespace.make(ROOT_INO, b"new", stat.S_IFDIR | 0o700, 0, 0)


async def unlink(one: Client) -> object:
    return await one.namespace.unlink(ROOT_INO, b"f")


@pytest.mark.parametrize("restart", [False, True], ids=["new connection", "new incarnation"])
@pytest.mark.parametrize("change", [mkdir, unlink])
async def test_a_retry_is_answered_when_every_daemon_has_done_its_part(
    change: Callable[[Client], Awaitable[object]], restart: bool
) -> None:
    async with world() as (whole, one, came, go_on):
        answered = trio.Event()

        async def ask() -> None:
            await change(one)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await came.wait()
            if restart:
                await whole.cluster.daemons[0].kill()
                await whole.cluster.daemons[0].start()
            else:
                for channel in list(one.node.channels):
                    await channel.aclose()
            await wait_all_tasks_blocked()
            assert not answered.is_set()
            go_on.set()
        assert answered.is_set()


@pytest.mark.parametrize("restart", [False, True], ids=["new connection", "new incarnation"])
async def test_the_retry_of_a_truncation_cuts_nothing_and_ends_behind_it(restart: bool) -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two, trio.open_nursery() as nursery:
        file = await one.fs.open("/f", os.O_RDWR | os.O_CREAT)
        await file.write(b"a" * 4 * CHUNK, 0)
        await file.fsync()
        home = whole.cluster.daemons[whole.cluster.shard_map.of_ino(file.ino)]
        came, go_on = whole.hold_trims(file.ino)
        ended = []

        async def cut() -> None:
            await file.truncate(CHUNK)
            ended.append("truncate")
            await file.write(b"b" * CHUNK, CHUNK)
            await file.fsync()

        async def grow() -> None:
            await two.fs.setattr("/f", size=3 * CHUNK)
            ended.append("grow")

        nursery.start_soon(cut)
        await came.wait()
        nursery.start_soon(grow)
        if restart:
            await home.kill()
            await home.start()
        else:
            for channel in list(one.node.channels):
                await channel.aclose()
        await wait_all_tasks_blocked()
        assert (await two.fs.stat("/f")).size == CHUNK, "it is decided"
        assert ended == []
        go_on.set()
        await wait_all_tasks_blocked()
        assert sorted(ended) == ["grow", "truncate"]
        assert (await two.fs.stat("/f")).size == 3 * CHUNK
        assert await file.read(2 * CHUNK, 0) == b"a" * CHUNK + b"b" * CHUNK
        await file.close()


async def test_the_retry_of_another_change_does_not_wait_for_a_truncation() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, trio.open_nursery() as nursery:
        file = await one.fs.open("/f", os.O_RDWR | os.O_CREAT)
        await file.write(b"a" * 4 * CHUNK, 0)
        await file.fsync()
        home = whole.cluster.daemons[whole.cluster.shard_map.of_ino(file.ino)]
        came, go_on = whole.hold_trims(file.ino)
        nursery.start_soon(file.truncate, 0)
        await came.wait()
        await whole.service(home).metadata.wait_done(SetAttr(file.ino, mode=0o600))
        go_on.set()
        await wait_all_tasks_blocked()
        await file.close()


async def test_who_finds_a_name_of_what_is_being_made_waits_for_it() -> None:
    async with world() as (whole, one, came, go_on), whole.client() as two:
        found = []

        async def look() -> None:
            found.append(await two.fs.stat("/new"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mkdir, one)
            await came.wait()
            nursery.start_soon(look)
            await wait_all_tasks_blocked()
            assert not found
            go_on.set()
        assert found[0].is_dir


async def test_a_retry_is_served_when_what_it_repeats_is_over() -> None:
    """A write that the disk is busy with cannot be called back: its retry, and all that follows, has to wait."""
    async with whole_cluster(1) as whole, whole.client() as one, trio.open_nursery() as nursery:
        came, go_on, over = trio.Event(), trio.Event(), trio.Event()
        repeated = []

        async def serve(request: Request, call: Call) -> Body:
            if came.is_set():
                repeated.append(over.is_set())
                return Done()
            came.set()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await go_on.wait()
                over.set()

        whole.cluster.daemons[0].server.register({SyncChunks: serve})
        nursery.start_soon(one.links.to(DaemonId(0)).call, SyncChunks(1), Done)
        await came.wait()
        for channel in list(one.node.channels):
            await channel.aclose()
        await wait_all_tasks_blocked()
        go_on.set()
    assert repeated == [True]
