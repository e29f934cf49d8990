"""Locks across mounts, over a whole cluster in one process: what two mounts see of each other, with every fault.

Every test in which time passes names ``autojump_clock`` itself: pytest-trio looks for a clock among its own arguments.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_locks import BYTES, FLOCK, POSIX, READ, UNLOCK, WRITE, Plain
from trio.testing import MockClock, wait_all_tasks_blocked
from whole import Client, Whole, whole_cluster

from benchfs_fuse.errors import DaemonUnreachable, Deadlock, FsError, InvalidArgument, Stale, WouldBlock
from benchfs_fuse.limits import IN_FLIGHT_MAX
from benchfs_fuse.model import LOCK_END, ClientId, LockKind, LockType
from benchfs_fuse.rpc.messages import CancelLock, LockGranted, SetLock
from benchfs_fuse.services.advisory import LockTable, Owner, Place, Wanted
from benchfs_fuse.services.sessions import RETURN_S
from benchfs_fuse.testing.daemons import MemoryDaemon

RW = os.O_RDWR | os.O_CREAT


def table_of(daemon: MemoryDaemon) -> LockTable:
    return daemon.sessions.locks._table


class Stage(NamedTuple):
    """Hold two mounts that have the same file open, on daemon 0; ``ino`` is that file."""

    whole: Whole
    one: Client
    two: Client
    ino: int

    @property
    def daemon(self) -> MemoryDaemon:
        return self.whole.cluster.daemons[0]

    def total(self) -> int:
        """Return how many locks and waiting requests the daemon has."""
        return len(table_of(self.daemon))

    async def restart(self) -> None:
        await self.daemon.kill()
        await self.daemon.start()

    def cut(self, client: Client) -> None:
        """Break a mount's connection to the daemon."""
        self.whole.network.silence(client.node, self.daemon.node)


@asynccontextmanager
async def two_mounts(*, op_timeout_s: float = float("inf")) -> AsyncIterator[Stage]:
    async with (
        whole_cluster(2) as whole,
        whole.client(op_timeout_s=op_timeout_s) as one,
        whole.client(op_timeout_s=op_timeout_s) as two,
    ):
        file = await one.fs.open("/f", RW)
        await two.fs.open("/f", os.O_RDWR)
        assert whole.cluster.shard_map.of_ino(file.ino) == 0
        yield Stage(whole, one, two, file.ino)


class Mount:
    """Be one mount that may be killed, with the tasks that use it."""

    def __init__(self, whole: Whole) -> None:
        self._whole = whole
        self.client: Client
        self.nursery: trio.Nursery

    async def start(self, nursery: trio.Nursery) -> None:
        """Begin, as another client than ever before."""
        await nursery.start(self._run)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        async with self._whole.client() as self.client, trio.open_nursery() as self.nursery:
            task_status.started()
            await trio.sleep_forever()

    @property
    def client_id(self) -> ClientId:
        return self.client.links.client_id

    def kill(self) -> None:
        """End as ``kill -9`` would."""
        self.client.node.kill()
        self.nursery.cancel_scope.cancel()


class Waiter:
    """Run one request for a lock as a task."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: Client,
        ino: int,
        owner: int,
        type_: LockType = WRITE,
        start: int = 0,
        end: int = LOCK_END,
        kind: LockKind = POSIX,
        wait: bool = True,
    ) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.error: FsError | None = None
        self._request = (ino, owner, kind, type_, start, end, wait)
        nursery.start_soon(self._run, client)

    async def _run(self, client: Client) -> None:
        with self.scope:
            try:
                await client.locks.set(*self._request)
            except FsError as error:
                self.error = error
        self.ended.set()

    @property
    def granted(self) -> bool:
        return self.ended.is_set() and self.error is None and not self.scope.cancelled_caught


# ── two mounts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", LockKind)
async def test_a_lock_of_one_mount_holds_at_the_other(kind: LockKind) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, kind, WRITE, wait=False)
        with pytest.raises(WouldBlock):
            await two.set(ino, 1, kind, READ, wait=False)
        waiter = Waiter(nursery, stage.two, ino, 1, kind=kind)
        await wait_all_tasks_blocked()
        assert not waiter.ended.is_set()
        await one.set(ino, 1, kind, UNLOCK)
        await waiter.ended.wait()
        assert waiter.granted
        await two.drop(ino, 1, kind)
        assert stage.total() == 0
        assert one.statistics() == two.statistics() == (0, 0, 0)


async def test_files_lock_ranges_and_give_them_back_when_they_are_closed() -> None:
    async with two_mounts() as stage:
        mine, theirs = await stage.one.fs.open("/f", os.O_RDWR), await stage.two.fs.open("/f", os.O_RDWR)
        beside = await stage.one.fs.open("/f", os.O_RDWR)
        await mine.lock(0, 10)
        await theirs.lock(10, 10)
        with pytest.raises(WouldBlock):
            await theirs.lock(9, 1, shared=True, wait=False)
        with pytest.raises(WouldBlock):
            await beside.lock(5, 1, wait=False)
        await mine.lock(0, 10, shared=True)
        await theirs.lock(9, 1, shared=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.lock)
            await wait_all_tasks_blocked()
            await mine.close()
        with pytest.raises(WouldBlock):
            await beside.lock(1 << 60, 1, wait=False)
        await theirs.unlock(100)
        await beside.lock(100, wait=False)
        with pytest.raises(InvalidArgument):
            await beside.lock(-1, 1)


async def test_a_deadlock_over_two_mounts_is_found() -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, POSIX, WRITE, 0, 0)
        await two.set(ino, 1, POSIX, WRITE, 1, 1)
        waiter = Waiter(nursery, stage.one, ino, 1, WRITE, 1, 1)
        await wait_all_tasks_blocked()
        with pytest.raises(Deadlock):
            await two.set(ino, 1, POSIX, WRITE, 0, 0)
        await two.drop(ino, 1, POSIX)
        await waiter.ended.wait()
        assert waiter.granted


async def test_who_holds_a_lock_is_told_with_the_pid_on_one_host() -> None:
    async with two_mounts() as stage:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, POSIX, WRITE, 10, 19, pid=4711)
        assert await two.get(ino, 1, READ, 0, LOCK_END) == (WRITE, 10, 19, 4711)
        assert await one.get(ino, 2, READ, 15, 15) == (WRITE, 10, 19, 4711)
        assert await one.get(ino, 1, WRITE, 0, LOCK_END) is None
        assert await two.get(ino, 1, WRITE, 20, LOCK_END) is None
        sessions = stage.daemon.sessions._sessions
        record = sessions[stage.two.links.client_id]
        record.record = type(record.record)("mount", "", "far", 1, "another boot", False)
        assert await two.get(ino, 1, READ, 0, LOCK_END) == (WRITE, 10, 19, 0)


async def test_an_unlinked_file_can_be_locked_while_it_is_open() -> None:
    async with two_mounts() as stage:
        await stage.one.fs.remove("/f")
        await stage.one.locks.set(stage.ino, 1, FLOCK, WRITE)
        with pytest.raises(WouldBlock):
            await stage.two.locks.set(stage.ino, 1, FLOCK, WRITE, wait=False)


async def test_what_is_not_open_cannot_be_locked_and_the_last_close_takes_the_locks_along() -> None:
    async with two_mounts() as stage:
        handle = await stage.one.files.create(1, b"g", 0o644, 0, 0, os.O_RDWR)
        await stage.one.locks.set(handle.ino, 1, POSIX, WRITE, 5, 9)
        with pytest.raises(Stale):
            await stage.two.locks.set(handle.ino, 1, POSIX, WRITE)
        with pytest.raises(Stale):
            await stage.two.locks.get(handle.ino, 1, WRITE, 0, 1)
        await stage.one.files.release(handle)
        assert sum(len(table_of(daemon)) for daemon in stage.whole.cluster.daemons) == 0
        await stage.one.locks.drop(handle.ino, 1, POSIX)
        assert stage.one.locks.statistics() == (0, 0, 0)


async def test_an_owner_that_holds_nothing_costs_no_request() -> None:
    async with two_mounts() as stage:
        locks, ino = stage.one.locks, stage.ino
        stage.whole.network.calls.clear()
        for kind in LockKind:
            await locks.drop(ino, 1, kind)
            await locks.set(ino, 1, kind, UNLOCK)
        assert stage.whole.network.calls.total() == 0
        await locks.set(ino, 1, POSIX, WRITE, 3, 5)
        await locks.drop(ino, 2, POSIX)
        await locks.drop(ino, 1, FLOCK)
        assert stage.whole.network.calls == {SetLock.op: 1}
        await locks.set(ino, 1, POSIX, UNLOCK, 0, 9)
        await locks.drop(ino, 1, POSIX)
        assert stage.whole.network.calls == {SetLock.op: 2}


# ── many who wait ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_thousand_waiters_use_up_no_places_and_are_served_as_they_came() -> None:
    count = 1000
    assert count > 2 * IN_FLIGHT_MAX
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        ino, done, all_done = stage.ino, list[int](), trio.Event()
        await stage.one.locks.set(ino, 1, FLOCK, WRITE)

        async def wait(number: int) -> None:
            await stage.two.locks.set(ino, number, FLOCK, WRITE)
            done.append(number)
            await stage.two.locks.set(ino, number, FLOCK, UNLOCK)
            if len(done) == count:
                all_done.set()

        for number in range(count):
            nursery.start_soon(wait, number)
            if number % 100 == 99:
                await wait_all_tasks_blocked()
        assert stage.total() == count + 1 and stage.two.locks.statistics().waiting == count
        await stage.two.fs.stat("/f")
        came = [wanted.owner.number for wanted in table_of(stage.daemon)._tickets.values()]
        with trio.fail_after(60):
            await stage.one.locks.set(ino, 1, FLOCK, UNLOCK)
            await all_done.wait()
        assert done == came
        nursery.cancel_scope.cancel()


async def test_all_readers_that_wait_go_on_together() -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        waiters = [Waiter(nursery, stage.two, stage.ino, number, READ) for number in range(300)]
        await wait_all_tasks_blocked()
        await stage.one.locks.drop(stage.ino, 1, POSIX)
        for waiter in waiters:
            await waiter.ended.wait()
        assert all(waiter.granted for waiter in waiters)


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", LockKind)
async def test_who_gives_up_waiting_leaves_nothing_behind(kind: LockKind) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, kind, WRITE)
        waiter = Waiter(nursery, stage.two, stage.ino, 1, kind=kind)
        await wait_all_tasks_blocked()
        assert stage.total() == 2
        waiter.scope.cancel()
        await waiter.ended.wait()
        await wait_all_tasks_blocked()
        assert stage.total() == 1 and stage.two.locks.statistics() == (0, 0, 0)


@pytest.mark.parametrize("kind", LockKind)
@pytest.mark.parametrize("after_turns", range(0, 40, 3))
async def test_a_grant_that_crosses_the_cancel_is_taken_back_or_told(kind: LockKind, after_turns: int) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, kind, WRITE)
        waiter = Waiter(nursery, stage.two, stage.ino, 1, kind=kind)
        await wait_all_tasks_blocked()
        nursery.start_soon(stage.one.locks.drop, stage.ino, 1, kind)
        for _ in range(after_turns):
            await trio.lowlevel.checkpoint()
        waiter.scope.cancel()
        await waiter.ended.wait()
        await wait_all_tasks_blocked()
        assert stage.total() == int(waiter.granted) == stage.two.locks.statistics().ranges


async def test_a_grant_on_its_way_is_taken_back_when_nobody_waits_any_more() -> None:
    """The daemon has granted; the news is held in the network while the waiter is killed."""
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        await stage.two.locks.set(stage.ino, 1, FLOCK, READ)
        waiter = Waiter(nursery, stage.two, stage.ino, 1, WRITE, 0, 99)
        await wait_all_tasks_blocked()
        stage.whole.network.partition(stage.two.node, stage.daemon.node)
        await stage.one.locks.drop(stage.ino, 1, POSIX)
        waiter.scope.cancel()
        await waiter.ended.wait()
        assert waiter.scope.cancelled_caught and stage.total() == 2
        stage.whole.network.heal(stage.two.node, stage.daemon.node)
        await wait_all_tasks_blocked()
        assert stage.total() == 1 and stage.two.locks.statistics() == (1, 1, 0)


@pytest.mark.parametrize("granted_before", [False, True])
async def test_what_was_held_before_a_wait_is_held_after_it_was_given_up(granted_before: bool) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, POSIX, READ, 0, 9)
        await two.set(ino, 1, POSIX, READ, 5, 14)
        await two.set(ino, 1, POSIX, WRITE, 20, 29)
        waiter = Waiter(nursery, stage.two, ino, 1, WRITE, 0, 99)
        await wait_all_tasks_blocked()
        stage.whole.network.partition(stage.two.node, stage.daemon.node)
        if granted_before:
            await one.drop(ino, 1, POSIX)
        waiter.scope.cancel()
        await waiter.ended.wait()
        stage.whole.network.heal(stage.two.node, stage.daemon.node)
        await wait_all_tasks_blocked()
        expected = [(5, 14, READ, 0), (20, 29, WRITE, 0)]
        assert [(claim.start, claim.end, claim.type, claim.pid) for claim in two.claims()] == expected
        held = table_of(stage.daemon)._places[Place(ino, POSIX)].held[Owner(stage.two.links.client_id, 1)]
        assert [(start, end, value.type, value.pid) for start, end, value in held] == expected


async def test_another_thread_that_waited_for_the_same_bytes_keeps_its_lock() -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        first, second = (Waiter(nursery, stage.two, stage.ino, 1, WRITE, 0, 9) for _ in range(2))
        await wait_all_tasks_blocked()
        stage.whole.network.partition(stage.two.node, stage.daemon.node)
        await stage.one.locks.drop(stage.ino, 1, POSIX)
        first.scope.cancel()
        await first.ended.wait()
        stage.whole.network.heal(stage.two.node, stage.daemon.node)
        await second.ended.wait()
        await wait_all_tasks_blocked()
        assert first.scope.cancelled_caught and second.granted
        with pytest.raises(WouldBlock):
            await stage.one.locks.set(stage.ino, 1, POSIX, WRITE, 0, 9, wait=False)
        assert stage.total() == 1 == stage.two.locks.statistics().ranges


async def test_a_thread_may_give_back_what_the_other_one_waits_behind() -> None:
    """While one thread of an owner waits, another's unlock goes through, and is not undone by the grant."""
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, POSIX, WRITE, 0, 9)
        await two.set(ino, 1, POSIX, WRITE, 50, 59)
        waiter = Waiter(nursery, stage.two, ino, 1, WRITE, 0, 59)
        await wait_all_tasks_blocked()
        await two.set(ino, 1, POSIX, UNLOCK, 50, 54)
        await one.set(ino, 1, POSIX, WRITE, 50, 54, wait=False)
        await one.drop(ino, 1, POSIX)
        await waiter.ended.wait()
        assert [(claim.start, claim.end) for claim in two.claims()] == [(0, 59)]


async def test_an_answer_may_overtake_an_older_grant() -> None:
    """The mount knows what is held, though it hears of an unlock before the grant that it cut."""
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        two, ino = stage.two.locks, stage.ino
        await stage.one.locks.set(ino, 1, POSIX, READ, 0, 9)
        await two.set(ino, 1, POSIX, READ, 0, 4)
        waiter = Waiter(nursery, stage.two, ino, 1, WRITE, 0, 9)
        await wait_all_tasks_blocked()
        late: list[tuple[int, LockGranted]] = []
        stage.two.links.on_granted = lambda daemon_id, told: late.append((daemon_id, told))
        await stage.one.locks.drop(ino, 1, POSIX)
        await two.set(ino, 1, POSIX, UNLOCK, 0, 4)
        await wait_all_tasks_blocked()
        assert not waiter.ended.is_set()
        two.granted(*late[0])
        await waiter.ended.wait()
        held = table_of(stage.daemon)._places[Place(ino, POSIX)].held[Owner(stage.two.links.client_id, 1)]
        known = [(claim.start, claim.end, claim.type) for claim in two.claims()]
        assert known == [(start, end, value.type) for start, end, value in held] == [(5, 9, WRITE)]


async def test_a_downgrade_that_cannot_be_taken_back_stays_shared() -> None:
    """An exclusive lock became shared by a request that was interrupted, and somebody else shares it by now."""
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await two.set(ino, 1, POSIX, WRITE, 0, 4)
        await one.set(ino, 1, POSIX, WRITE, 5, 9)
        waiter = Waiter(nursery, stage.two, ino, 1, READ, 0, 9)
        await wait_all_tasks_blocked()
        stage.whole.network.partition(stage.two.node, stage.daemon.node)
        await one.set(ino, 1, POSIX, READ, 5, 9)
        waiter.scope.cancel()
        await waiter.ended.wait()
        await one.set(ino, 1, POSIX, READ, 2, 3)
        stage.whole.network.heal(stage.two.node, stage.daemon.node)
        await wait_all_tasks_blocked()
        assert [(claim.start, claim.end, claim.type) for claim in two.claims()] == [(0, 4, READ)]
        await one.set(ino, 1, POSIX, WRITE, 5, 9, wait=False)


async def test_the_deadline_is_for_the_answer_and_not_for_the_wait(autojump_clock: MockClock) -> None:
    async with two_mounts(op_timeout_s=3.0) as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        waiter = Waiter(nursery, stage.two, stage.ino, 1)
        await trio.sleep(30)
        assert not waiter.ended.is_set()
        stage.whole.network.partition(stage.one.node, stage.daemon.node)
        moment = trio.current_time()
        with pytest.raises(DaemonUnreachable):
            await stage.one.locks.set(stage.ino, 1, POSIX, WRITE, 0, 5)
        with pytest.raises(DaemonUnreachable):
            await stage.one.locks.drop(stage.ino, 1, POSIX)
        assert trio.current_time() - moment == 6.0
        stage.whole.network.heal(stage.one.node, stage.daemon.node)
        await waiter.ended.wait()
        await trio.sleep(1)
        assert waiter.granted and stage.one.locks.statistics() == (0, 0, 0)


# ── lost messages ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lose", ["lose_request", "lose_reply"])
@pytest.mark.parametrize("op", [SetLock.op, CancelLock.op, LockGranted.op])
async def test_nothing_is_lost_or_left_when_a_message_is_lost(lose: str, op: int, autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        network, ino = stage.whole.network, stage.ino
        for round_ in range(4):
            await stage.one.locks.set(ino, 1, POSIX, WRITE)
            for _ in range(round_):
                getattr(network, lose)(op)
            waiter = Waiter(nursery, stage.two, ino, 1)
            leaver = Waiter(nursery, stage.two, ino, 2)
            await trio.sleep(20)
            leaver.scope.cancel()
            await stage.one.locks.drop(ino, 1, POSIX)
            with trio.fail_after(20):
                await waiter.ended.wait()
            await stage.two.locks.drop(ino, 1, POSIX)
            network.lose_nothing()
            await trio.sleep(20)
            assert waiter.granted and stage.total() == 0
            assert stage.one.locks.statistics() == stage.two.locks.statistics() == (0, 0, 0)


async def test_a_grant_decided_while_the_mount_was_away_is_learnt_when_it_is_back(autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        waiter = Waiter(nursery, stage.two, stage.ino, 1)
        await trio.sleep(1)
        stage.whole.network.partition(stage.two.node, stage.daemon.node)
        stage.cut(stage.two)
        await stage.one.locks.drop(stage.ino, 1, POSIX)
        await trio.sleep(1)
        assert not waiter.ended.is_set() and stage.total() == 1
        stage.whole.network.heal(stage.two.node, stage.daemon.node)
        with trio.fail_after(RETURN_S):
            await waiter.ended.wait()
        assert waiter.granted and stage.total() == 1


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def mortal_mount(whole: Whole) -> AsyncIterator["Mount"]:
    """Run a mount that can be killed, as its whole process would be."""
    async with trio.open_nursery() as nursery:
        mount = Mount(whole)
        await mount.start(nursery)
        yield mount
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_session_frees_its_locks_and_its_waiters(autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, mortal_mount(stage.whole) as mount, trio.open_nursery() as nursery:
        victim = mount.client
        await victim.fs.open("/f", os.O_RDWR)
        await victim.locks.set(stage.ino, 1, POSIX, WRITE, 0, 9)
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE, 20, 20)
        Waiter(mount.nursery, victim, stage.ino, 2, WRITE, 20, 20)
        waiter = Waiter(nursery, stage.two, stage.ino, 1)
        await trio.sleep(1)
        assert stage.total() == 4 and not waiter.ended.is_set()
        mount.kill()
        await stage.one.locks.drop(stage.ino, 1, POSIX)
        with trio.fail_after(RETURN_S + 1):
            await waiter.ended.wait()
        assert waiter.granted and stage.total() == 1


async def test_an_expelled_mount_stops_waiting(autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        await stage.one.locks.set(stage.ino, 1, POSIX, WRITE)
        waiter = Waiter(nursery, stage.two, stage.ino, 1)
        await trio.sleep(1)
        stage.two.links.expel("the test says so")
        await waiter.ended.wait()
        assert isinstance(waiter.error, Stale)
        with pytest.raises(Stale):
            await stage.two.locks.set(stage.ino, 1, POSIX, WRITE)


async def test_locks_are_reclaimed_and_waiters_go_on_as_soon_as_all_have_done_so(autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        one, two, ino = stage.one.locks, stage.two.locks, stage.ino
        await one.set(ino, 1, POSIX, WRITE, 0, 9)
        await one.set(ino, 1, POSIX, READ, 4, 4)
        await two.set(ino, 1, FLOCK, READ)
        waiter = Waiter(nursery, stage.two, ino, 2, WRITE, 9, 20)
        await trio.sleep(1)
        stage.whole.network.partition(stage.one.node, stage.daemon.node)
        old = stage.daemon.node
        await stage.restart()
        stage.whole.network.partition(stage.one.node, stage.daemon.node)
        free = Waiter(nursery, stage.two, ino, 2, WRITE, 500, 500)
        await trio.sleep(5)
        assert stage.daemon.sessions.grace and not free.ended.is_set()
        with pytest.raises(WouldBlock):
            await two.set(ino, 2, POSIX, READ, 600, 600, wait=False)
        asked: list[object] = []

        async def ask() -> None:
            asked.append(await two.get(ino, 3, WRITE, 4, 4))

        nursery.start_soon(ask)
        await two.set(ino, 1, FLOCK, UNLOCK)
        await trio.sleep(1)
        assert asked == []
        stage.whole.network.heal(stage.one.node, old)
        stage.whole.network.heal(stage.one.node, stage.daemon.node)
        with trio.fail_after(5):
            await free.ended.wait()
        await wait_all_tasks_blocked()
        assert free.granted and not waiter.ended.is_set() and asked == [(READ, 4, 4, 0)]
        with pytest.raises(WouldBlock):
            await two.set(ino, 3, POSIX, READ, 0, 0, wait=False)
        await two.set(ino, 3, POSIX, READ, 4, 4, wait=False)
        await one.drop(ino, 1, POSIX)
        await waiter.ended.wait()
        assert waiter.granted


async def test_locks_of_who_does_not_come_back_are_gone_after_the_grace(autojump_clock: MockClock) -> None:
    async with two_mounts() as stage, mortal_mount(stage.whole) as mount, trio.open_nursery() as nursery:
        victim = mount.client
        await victim.fs.open("/f", os.O_RDWR)
        await victim.locks.set(stage.ino, 1, POSIX, WRITE)
        await trio.sleep(1)
        mount.kill()
        await stage.restart()
        waiter = Waiter(nursery, stage.two, stage.ino, 1)
        await trio.sleep(stage.whole.cluster.lease_s / 2)
        assert not waiter.ended.is_set()
        with trio.fail_after(stage.whole.cluster.lease_s):
            await waiter.ended.wait()
        assert waiter.granted


async def test_many_locks_are_reclaimed_in_pages(autojump_clock: MockClock) -> None:
    count = 5000
    async with two_mounts() as stage:
        ranges = stage.one.locks
        for number in range(count):
            lane = ranges._lane(stage.ino, number % 7, POSIX)
            lane.note(WRITE, 10 * number, 10 * number, 0, 0)
        assert len(ranges.claims()) == count
        await stage.restart()
        await stage.one.fs.stat("/f")
        assert stage.total() == count


@pytest.mark.parametrize("turns", range(0, 60, 7))
async def test_requests_under_way_when_the_daemon_dies_are_done_once_it_is_back(
    turns: int, autojump_clock: MockClock
) -> None:
    """An unlock that was applied and not answered meets, in the reclaim, the lock that it made room for."""
    async with two_mounts() as stage, trio.open_nursery() as nursery:
        ino = stage.ino
        await stage.one.locks.set(ino, 1, POSIX, WRITE, 0, 99)
        waiter = Waiter(nursery, stage.two, ino, 1, WRITE, 10, 19)
        await trio.sleep(1)
        nursery.start_soon(stage.one.locks.set, ino, 1, POSIX, UNLOCK, 0, 49)
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        await stage.restart()
        with trio.fail_after(30):
            await waiter.ended.wait()
        await trio.sleep(5)
        assert waiter.granted and stage.total() == 2
        assert [(claim.start, claim.end) for claim in stage.one.locks.claims()] == [(50, 99)]
        assert await stage.one.locks.get(ino, 9, WRITE, 0, 49) == (WRITE, 10, 19, 0)


# ── against the reference ────────────────────────────────────────────────────────────────────────────────────────────

#: Seconds of the mock clock in which everything that a step has set off has come to rest.
SETTLE_S = 20.0
OWNERS = range(1, 4)


def compare(whole: Whole, mounts: list[Mount], plain: Plain, places: list[Place]) -> None:
    """Check that daemons and mounts know what the reference knows."""
    tables = [table_of(daemon) for daemon in whole.cluster.daemons]
    for place in places:
        for mount in mounts:
            claims = mount.client.locks.claims()
            for number in OWNERS:
                owner = Owner(mount.client_id, number)
                expected = {byte: held[owner] for byte, held in enumerate(plain.bytes.get(place, [])) if owner in held}
                known = {
                    byte: claim.type
                    for claim in claims
                    if (claim.ino, claim.kind, claim.owner) == (*place, number)
                    for byte in range(claim.start, min(claim.end, BYTES - 1) + 1)
                }
                held = {
                    byte: value.type
                    for table in tables
                    if place in table._places
                    for start, end, value in table._places[place].held.get(owner, ())
                    for byte in range(start, min(end, BYTES - 1) + 1)
                }
                assert held == expected, (place, owner)
                assert known == expected, (place, owner)
    waiting = sorted(ticket for table in tables for ticket in table._tickets)
    assert waiting == sorted((wanted.owner.client_id, wanted.ticket) for wanted in plain.waiting)


async def begin(mount: Mount, nursery: trio.Nursery) -> None:
    """Start a mount that has both files open."""
    await mount.start(nursery)
    for name in ("/a", "/b"):
        await mount.client.fs.open(name, RW)


async def run_plan(plan: list[tuple[Any, ...]], seed: int) -> None:
    async with whole_cluster(2, seed=seed) as whole, trio.open_nursery() as nursery:
        mounts = [Mount(whole), Mount(whole)]
        for mount in mounts:
            await begin(mount, nursery)
        inos = [(await mounts[0].client.fs.stat(name)).ino for name in ("/a", "/b")]
        places = [Place(ino, kind) for ino in inos for kind in LockKind]
        plain = Plain()
        #: What the reference waits for → the task that does.
        waiters: dict[tuple[ClientId, int], Waiter] = {}
        for step in plan:
            match step:
                case ("set", which, place_index, number, type_, (start, end), wait):
                    mount, place = mounts[which], places[place_index]
                    if place.kind is FLOCK or end == BYTES - 1:
                        start, end = (0 if place.kind is FLOCK else start), LOCK_END
                    before = set(mount.client.locks._waiting)
                    waiter = Waiter(mount.nursery, mount.client, place.ino, number, type_, start, end, place.kind, wait)
                    await trio.lowlevel.checkpoint()
                    await trio.lowlevel.checkpoint()
                    fresh = set(mount.client.locks._waiting) - before
                    asked = wait and type_ is not UNLOCK
                    ticket = max(fresh, default=0)
                    await trio.sleep(SETTLE_S)
                    wanted = Wanted(
                        place, Owner(mount.client_id, number), type_, start, end, 0, (ticket or 1 << 40) if asked else 0
                    )
                    outcome = plain.set(wanted)
                    if outcome is None:
                        assert not waiter.ended.is_set() and ticket
                        waiters[mount.client_id, ticket] = waiter
                    else:
                        assert waiter.ended.is_set()
                        expected = Deadlock if outcome is Deadlock else type(None) if outcome else WouldBlock
                        assert type(waiter.error) is expected
                case ("cancel", index) if plain.waiting:
                    wanted = plain.waiting[index % len(plain.waiting)]
                    waiters.pop((wanted.owner.client_id, wanted.ticket)).scope.cancel()
                    plain.waiting.remove(wanted)
                    await trio.sleep(SETTLE_S)
                case ("drop", which, place_index, number):
                    mount, place = mounts[which], places[place_index]
                    await mount.client.locks.drop(place.ino, number, place.kind)
                    plain.apply(Wanted(place, Owner(mount.client_id, number), UNLOCK, 0, LOCK_END))
                    plain.wake()
                    await trio.sleep(SETTLE_S)
                case ("lose", kind, op):
                    getattr(whole.network, kind)(op)
                case ("cut", which):
                    for channel in list(mounts[which].client.node.channels):
                        channel.cut_both(channel._ending)
                    await trio.sleep(SETTLE_S)
                case ("restart", number):
                    daemon = whole.cluster.daemons[number]
                    await daemon.kill()
                    await daemon.start()
                    await trio.sleep(SETTLE_S)
                case ("kill", which):
                    mount = mounts[which]
                    for key in [key for key in waiters if key[0] == mount.client_id]:
                        del waiters[key]
                    mount.kill()
                    plain.drop(mount.client_id)
                    await trio.sleep(200.0)
                    await begin(mount, nursery)
            # Who waits at a daemon that was started anew has come back in some order, which is the fair one from then.
            order = {
                key: place
                for place, key in enumerate(key for d in whole.cluster.daemons for key in table_of(d)._tickets)
            }
            plain.waiting.sort(key=lambda one: order.get((one.owner.client_id, one.ticket), 0))
            for key, waiter in list(waiters.items()):
                if waiter.ended.is_set():
                    assert waiter.granted and key[1] in plain.granted
                    del waiters[key]
            compare(whole, mounts, plain, places)
        whole.network.lose_nothing()
        for mount in mounts:
            mount.kill()
        await trio.sleep(200.0)
        assert [len(table_of(daemon)) for daemon in whole.cluster.daemons] == [0, 0]
        nursery.cancel_scope.cancel()


WHICH, PLACE, NUMBER = st.integers(0, 1), st.integers(0, 3), st.sampled_from(OWNERS)
POINT = st.integers(0, BYTES - 1)
SPAN = st.tuples(POINT, POINT).map(lambda pair: (min(pair), max(pair)))
TYPE = st.sampled_from([READ, WRITE, WRITE, UNLOCK])
SET = st.tuples(st.just("set"), WHICH, PLACE, NUMBER, TYPE, SPAN, st.booleans())
FAULT = st.one_of(
    st.tuples(
        st.just("lose"),
        st.sampled_from(["lose_request", "lose_reply"]),
        st.sampled_from([SetLock.op, SetLock.op, CancelLock.op, LockGranted.op]),
    ),
    st.tuples(st.just("cut"), WHICH),
    st.tuples(st.just("restart"), st.integers(0, 1)),
    st.tuples(st.just("kill"), WHICH),
)
STEP = st.one_of(
    SET,
    SET,
    SET,
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("drop"), WHICH, PLACE, NUMBER),
    FAULT,
)


def _model(examples: int) -> settings:
    slow = [HealthCheck.data_too_large, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, print_blob=True, suppress_health_check=slow)


@_model(30)
@given(plan=st.lists(STEP, max_size=25), seed=st.integers(0, 1 << 16))
def test_two_mounts_agree_with_the_reference_whatever_breaks(plan: list[tuple[Any, ...]], seed: int) -> None:
    trio.run(run_plan, plan, seed, clock=MockClock(autojump_threshold=0))


@pytest.mark.exhaustive
@_model(1500)
@given(plan=st.lists(STEP, max_size=40), seed=st.integers(0, 1 << 16))
def test_two_mounts_agree_with_the_reference_for_long(plan: list[tuple[Any, ...]], seed: int) -> None:
    trio.run(run_plan, plan, seed, clock=MockClock(autojump_threshold=0))
