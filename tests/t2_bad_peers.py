"""Requests that no honest peer sends, over a whole cluster in one process: each is refused, and nobody else notices.

``tests/t4_fuzz.py`` throws such requests at a real daemon; what it found stands here, one test for each.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
import pytest
import trio
from whole import Client, Whole, whole_cluster
from wire_fuzz import encode

from benchfs_fuse import disk, errors, limits
from benchfs_fuse.model import INO_END, LOCK_END, ROOT_INO, LockKind, LockType
from benchfs_fuse.ports import Channel
from benchfs_fuse.rpc import messages as m
from benchfs_fuse.services import chunkserver, sessions

RW = os.O_RDWR | os.O_CREAT


class Stage(NamedTuple):
    """Hold an honest client with an open file, and a raw connection of a bad one with a session."""

    whole: Whole
    honest: Client
    ino: int
    bad: Channel

    async def ask(self, request: m.Request, slot: int = 0, seq: int = 1) -> int:
        """Return the status of the reply."""
        return (await self.bad.call(request.op, encode(request, slot, seq))).status

    async def ask_body(self, op: int, *fields: object) -> int:
        """Send a recorded request with any fields."""
        prefix = m.encode_recorded(m.Forget(), 0, 1)[:12]
        return (await self.bad.call(op, prefix + msgspec.msgpack.encode(fields))).status


@asynccontextmanager
async def stage(daemons: int = 1) -> AsyncIterator[Stage]:
    async with whole_cluster(daemons) as whole, whole.client() as honest:
        file = await honest.fs.open("/honest", RW)
        await file.write(b"x" * 1000, 0)
        await file.fsync()
        _, node = whole.cluster.links()
        place = whole.cluster.directory.find(0)
        assert place is not None
        bad = await node.connect(place.address)
        made = Stage(whole, honest, file.ino, bad)
        assert await made.ask(m.Hello("mount", "/bad", False)) == 0
        yield made
        assert await file.read(1000, 0) == b"x" * 1000


async def test_a_cut_with_rights_out_of_range_does_not_end_the_daemon() -> None:
    async with stage() as at:
        status = await at.ask_body(m.SetAttr.op, at.ino, 1 << 40, None, None, 10)
        assert status == errors.ProtocolError.status
        await trio.testing.wait_all_tasks_blocked()
        assert at.whole.cluster.daemons[0].store.get(disk.key(disk.TRUNCATING, at.ino)) is None


async def test_nobody_can_take_the_handles_of_others_away() -> None:
    async with stage() as at:
        await at.honest.fs.remove("/honest")
        negative = msgspec.msgpack.encode([[[at.ino, -5, -5]], True])
        reply = await at.bad.call(m.Reclaim.op, negative)
        assert reply.status == errors.ProtocolError.status
        assert await at.ask_body(m.Release.op, at.ino, -5, 0) == errors.ProtocolError.status
        assert await at.ask(m.Release(at.ino, 100, 100), seq=2) == 0


async def test_who_reclaims_again_gets_no_lock_that_is_anothers() -> None:
    async with stage() as at, await at.honest.fs.open("/honest", RW) as file:
        await file.lock()
        claim = m.LockClaim(at.ino, LockKind.POSIX, 1, LockType.WRITE, 0, LOCK_END, 1)
        assert await at.ask(m.Reclaim((m.OpenCount(at.ino, 1, 0),), True, (claim,))) == 0
        table = at.whole.cluster.daemons[0].sessions.locks
        assert len(table) == 1
        await file.unlock()
        assert len(table) == 0
        # What is free it may have: said again it is counted once.
        for _ in range(2):
            assert await at.ask(m.Reclaim((m.OpenCount(at.ino, 1, 0),), True, (claim,))) == 0
        assert len(table) == 1


async def test_handles_that_are_reclaimed_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as at:
        monkeypatch.setattr(sessions, "OPENS_MAX", 1)
        opens = (m.OpenCount(at.ino, 1, 0), m.OpenCount(ROOT_INO, 1, 0))
        assert await at.ask(m.Reclaim(opens, True)) == errors.TooManyOpen.status
        assert await at.ask(m.Reclaim(opens[:1], True)) == 0
        assert await at.ask(m.Open(at.ino, False)) == 0
        assert await at.ask(m.Open(ROOT_INO, False), seq=2) == errors.TooManyOpen.status


async def test_locks_that_are_reclaimed_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as at:
        table = at.whole.cluster.daemons[0].sessions.locks._table
        monkeypatch.setattr(table, "_locks_max", 3)
        claims = [m.LockClaim(at.ino, LockKind.POSIX, 1, LockType.READ, n * 10, n * 10, 1) for n in range(4)]
        opens = (m.OpenCount(at.ino, 1, 0),)
        assert await at.ask(m.Reclaim(opens, True, tuple(claims[:3]))) == 0
        assert await at.ask(m.Reclaim(opens, True, tuple(claims))) == errors.NoLocks.status
        assert len(table) == 3


async def test_hello_said_again_costs_nothing() -> None:
    async with stage() as at:
        await trio.testing.wait_all_tasks_blocked()
        nursery = at.whole.cluster.daemons[0].sessions._nursery
        assert nursery is not None
        before = len(nursery.child_tasks)
        for _ in range(20):
            assert await at.ask(m.Hello("mount", "/bad", False)) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == before


@pytest.mark.parametrize(("kind", "label"), [("king", "/bad"), ("daemon", "/bad"), ("mount", "x" * 5000)])
async def test_nobody_is_more_than_a_client_may_be(kind: str, label: str) -> None:
    async with stage() as at:
        assert await at.ask(m.Hello(kind, label, False)) in (
            errors.NotPermitted.status,
            errors.ProtocolError.status,
        )


def test_what_clients_call_themselves_is_one_line_in_a_log() -> None:
    record = sessions.SessionRecord("mount", "/a\nERROR \x1b[31m", "host", 1, "boot", False)
    assert sessions.describe(record) == "mount /a?ERROR ?[31m on host, pid 1"


@pytest.mark.parametrize("ino", [-1, 0, INO_END, (1 << 63) - 1, (1 << 64) - 1])
async def test_no_chunk_is_made_of_a_file_that_cannot_be(ino: int) -> None:
    """Recounting would stumble over it, for ever."""
    async with stage() as at:
        reply = await at.bad.call(m.WriteChunk.op, m.encode(m.WriteChunk(ino, 0, 0)), b"data")
        assert reply.status == errors.InvalidArgument.status
        for request in (m.AllocateChunk(ino, 0, 0, 10, False), m.CopyChunk(0, at.ino, 0, 0, ino, 0, 0, 10)):
            assert await at.ask(request) == errors.InvalidArgument.status


@pytest.mark.parametrize("ino", [-1, INO_END, (1 << 64) - 1])
async def test_what_has_no_possible_number_is_stale(ino: int, caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as at:
        for number, request in enumerate(
            [
                *(m.Lookup(ino, b"name"), m.GetAttr(ino), m.ReadLink(ino), m.GetXattr(ino, b"user.a")),
                *(m.ListXattr(ino), m.ReadDir(ino, 0, 10), m.Touch(ino), m.Unlink(ino, b"name"), m.Open(ino, True)),
                *(m.SetAttr(ino, size=0), m.Append(ino, 1), m.SetXattr(ino, b"user.a", b"", 0)),
                m.Make(ino, b"name", 0o100644, 0, 0),
            ]
        ):
            assert await at.ask(request, seq=number + 1) == errors.Stale.status, request
    assert "unexpectedly" not in caplog.text


async def test_no_file_counts_more_space_than_there_can_be(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as at:
        assert await at.ask(m.CommitWrite(at.ino, 10, 1 << 62)) == 0
        assert await at.ask(m.CommitWrite(at.ino, 10, (1 << 64) - 1), seq=2) == errors.FileTooLarge.status
        assert await at.ask(m.CommitWrite(at.ino, 10, -(1 << 62)), seq=3) == 0
    assert "unexpectedly" not in caplog.text


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"a\0b", b"x" * 256])
async def test_no_name_leads_anywhere_else(name: bytes) -> None:
    async with stage() as at:
        refused = {errors.InvalidArgument.status, errors.NameTooLong.status}
        for number, request in enumerate(
            [
                *(m.Lookup(ROOT_INO, name), m.Make(ROOT_INO, name, 0o100644, 0, 0), m.Unlink(ROOT_INO, name)),
                *(m.Rmdir(ROOT_INO, name), m.Link(at.ino, ROOT_INO, name)),
                m.Rename(ROOT_INO, b"honest", ROOT_INO, name, 0),
                m.Rename(ROOT_INO, name, ROOT_INO, b"other", 0),
            ]
        ):
            assert await at.ask(request, seq=number + 1) in refused, request


async def test_no_client_asks_what_only_daemons_may() -> None:
    async with stage() as at:
        for request in (
            *(m.TrimChunks(at.ino, 0, 0), m.DropChunks((at.ino,)), m.Prepare(m.TxId(1, 1, 1), ())),
            *(m.Finish(m.TxId(1, 1, 0), False), m.Secure(()), m.InDoubt(()), m.HeldFiles(0, 0), m.Recount()),
            m.Expel(at.honest.links.client_id),
        ):
            assert await at.ask(request) == errors.NotPermitted.status, request


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_session_too_many_gets_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as at:
        monkeypatch.setattr(sessions, "SESSIONS_MAX", 2)
        _, node = at.whole.cluster.links()
        place = at.whole.cluster.directory.find(0)
        assert place is not None
        channel = await node.connect(place.address)
        reply = await channel.call(m.Hello.op, m.encode(m.Hello("mount", "/third", False)))
        assert reply.status == errors.TooManyOpen.status
        assert m.decode(m.Failure, reply.body).message == "2 sessions"
        assert await at.ask(m.Goodbye()) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert (await channel.call(m.Hello.op, m.encode(m.Hello("mount", "/third", False)))).status == 0
        await channel.aclose()


async def test_a_transaction_of_too_many_steps_is_refused() -> None:
    steps = (m.Moved(1, 0),) * (limits.STEPS_MAX + 1)
    m.decode_request(m.Prepare.op, m.encode(m.Prepare(m.TxId(1, 1, 1), steps[1:])))
    with pytest.raises(errors.ProtocolError):
        m.decode_request(m.Prepare.op, m.encode(m.Prepare(m.TxId(1, 1, 1), steps)))


async def test_aborts_that_came_before_their_prepare_are_forgotten_in_the_end() -> None:
    async with whole_cluster(2) as whole:
        _, node = whole.cluster.links(kind="daemon", daemon_id=7)
        place = whole.cluster.directory.find(0)
        assert place is not None
        channel = await node.connect(place.address)
        assert (await channel.call(m.Hello.op, m.encode(m.Hello("daemon", "daemon 7", False)))).status == 0
        for counter in range(1, limits.REFUSED_MAX + 100):
            finish = m.Finish(m.TxId(1, 1, counter), False)
            assert (await channel.call(m.Finish.op, m.encode(finish))).status == 0
        service = whole.service(whole.cluster.daemons[0])
        assert len(service.metadata._transactions._refused) == limits.REFUSED_MAX
        await channel.aclose()


async def test_pages_end_where_they_must() -> None:
    async with stage() as at:
        for n in range(limits.READDIR_ENTRIES_MAX + 5):
            assert await at.ask(m.Make(ROOT_INO, b"%d" % n, 0o100644, 0, 0), seq=n + 1) == 0
        reply = await at.bad.call(m.ReadDir.op, m.encode(m.ReadDir(ROOT_INO, 0, 1 << 40)))
        page = m.decode(m.ReadDirReply, reply.body)
        assert len(page.entries) <= limits.READDIR_ENTRIES_MAX and not page.end
        too_many = m.FindInodes(tuple(range(1, limits.ITEMS_MAX + 2)))
        assert await at.ask(too_many) == errors.InvalidArgument.status
        assert await at.ask(m.FindInodes(too_many.inos[1:])) == 0


async def test_copies_from_one_daemon_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those from a daemon that is away hold up none from another."""
    async with stage(2) as at:
        await at.whole.cluster.daemons[1].kill()
        server = at.whole.service(at.whole.cluster.daemons[0]).chunks
        copy = m.CopyChunk(1, at.ino, 0, 0, at.ino, 5, 0, 10)
        async with trio.open_nursery() as nursery:
            for _ in range(limits.COPIES_MAX + 4):
                nursery.start_soon(at.ask, copy)
            await trio.testing.wait_all_tasks_blocked()
            assert server._copies[1].value == 0 and server._copies[1].statistics().tasks_waiting == 4
            with trio.fail_after(5):
                assert await at.ask(m.CopyChunk(0, at.ino, 0, 0, at.ino, 9, 0, 10)) == 0
            nursery.cancel_scope.cancel()


def test_idle_buffers_are_bounded() -> None:
    pool = chunkserver.BufferPool()
    count = limits.IDLE_BYTES_MAX // limits.PAYLOAD_MAX + 3
    for buffer in [pool.lend(limits.PAYLOAD_MAX) for _ in range(count)]:
        pool.give_back(buffer)
    assert pool._idle_bytes == limits.IDLE_BYTES_MAX and pool.lent_bytes == 0
