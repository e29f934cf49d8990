"""Operations on names over several daemons: all or nothing, whoever dies when, and the same as a plain tree's."""

import contextlib
import errno
import logging
import random
import re
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cluster import CLIENT, DAEMON_CLIENT, EVERYBODY, Called, Cluster, Crash, cluster_of
from reference_tree import Refused, Thing, Tree
from trio.testing import MockClock, wait_all_tasks_blocked

from benchfs_fuse.errors import (
    Conflict,
    Exists,
    FsError,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    ProtocolError,
    Stale,
)
from benchfs_fuse.model import ROOT_INO
from benchfs_fuse.rpc.messages import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    AddLink,
    DropDir,
    DropEntry,
    DropLink,
    Finish,
    GetAttr,
    Link,
    Lookup,
    Make,
    Moved,
    NewInode,
    Open,
    Prepare,
    PutEntry,
    ReadDir,
    Release,
    Rename,
    Request,
    Rmdir,
    Step,
    TxId,
    Unlink,
)
from benchfs_fuse.services import transactions

# ── against the reference ────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [b"a", b"b", b"c"]
INDEX = st.integers(0, 11)
NAME = st.sampled_from(NAMES)
KIND = st.sampled_from([stat.S_IFDIR, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO])
FLAGS = st.sampled_from([0, 0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_EXCHANGE, RENAME_EXCHANGE, 3, 4])
OPERATION = st.one_of(
    st.tuples(st.just("make"), INDEX, NAME, KIND),
    st.tuples(st.just("make"), INDEX, NAME, KIND),
    st.tuples(st.just("rename"), INDEX, NAME, INDEX, NAME, FLAGS),
    st.tuples(st.just("rename"), INDEX, NAME, INDEX, NAME, FLAGS),
    st.tuples(st.just("unlink"), INDEX, NAME),
    st.tuples(st.just("rmdir"), INDEX, NAME),
    st.tuples(st.just("link"), INDEX, INDEX, NAME),
    st.tuples(st.just("lookup"), INDEX, NAME),
    st.tuples(st.just("open"), INDEX),
    st.tuples(st.just("close"), INDEX),
)


class Pair:
    """Do the same to the cluster and to the reference, and compare. Things are chosen by their order of making."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tree = Tree()
        self.things: list[tuple[Thing, int]] = [(self.tree.root, ROOT_INO)]
        self.inos: dict[Thing, int] = {self.tree.root: ROOT_INO}

    def pick(self, index: int) -> tuple[Thing, int]:
        """Choose one of the newest things, or the root."""
        newest = [self.things[0], *self.things[-11:]]
        return newest[index % len(newest)]

    def pick_directory(self, index: int) -> tuple[Thing, int]:
        """Choose a directory, now and then something else."""
        thing = self.pick(index)
        return thing if thing[0].is_dir or index == 7 else self.things[0]

    async def do(self, operation: str, *arguments: Any, dies_at: tuple[int, int] | None = None) -> None:
        """Carry out one operation on both sides; ``dies_at``: see Cluster.count_points."""
        expected = 0
        try:
            step = getattr(self, f"_{operation}")(*arguments)
        except Refused as refused:
            expected = refused.number
            step = self.request
        error, reply = 0, None
        # Who has what open is not in a daemon's store: reclaiming handles is not the concern here.
        self.cluster.count_points(dies_at if operation not in ("open", "close") else None)
        try:
            reply = await self.cluster.ask(self.request)
        except FsError as caught:
            error = caught.errno
        self.cluster.count_points()
        assert errno.errorcode.get(error) == errno.errorcode.get(expected), self.request
        if reply is not None and callable(step):
            step(reply)

    request: Request

    def _make(self, index: int, name: bytes, kind: int) -> Callable[[Any], None]:
        directory, parent = self.pick_directory(index)
        target = b"anywhere" if kind == stat.S_IFLNK else b""
        self.request = Make(parent, name, kind | 0o755, 0, 0, target=target)
        thing = self.tree.make(directory, name, kind)

        def made(reply: Any) -> None:
            self.things.append((thing, reply.entry.ino))
            self.inos[thing] = reply.entry.ino
            assert reply.entry.attrs is None or reply.entry.attrs.nlink == thing.nlink

        return made

    def _link(self, index: int, directory_index: int, name: bytes) -> Callable[[Any], None]:
        thing, ino = self.pick(index)
        directory, parent = self.pick_directory(directory_index)
        self.request = Link(ino, parent, name)
        self.tree.link(thing, directory, name)

        def linked(reply: Any) -> None:
            assert (reply.attrs.ino, reply.attrs.nlink) == (ino, thing.nlink)

        return linked

    def _removed(self, thing: Thing) -> Callable[[Any], None]:
        def removed(reply: Any) -> None:
            assert reply.ino == self.inos[thing]
            assert reply.attrs is None or reply.attrs.nlink == thing.nlink

        return removed

    def _unlink(self, index: int, name: bytes) -> Callable[[Any], None]:
        directory, parent = self.pick_directory(index)
        self.request = Unlink(parent, name)
        return self._removed(self.tree.unlink(directory, name))

    def _rmdir(self, index: int, name: bytes) -> Callable[[Any], None]:
        directory, parent = self.pick_directory(index)
        self.request = Rmdir(parent, name)
        return self._removed(self.tree.rmdir(directory, name))

    def _rename(self, index: int, name: bytes, new_index: int, new_name: bytes, flags: int) -> None:
        old_dir, old_parent = self.pick_directory(index)
        new_dir, new_parent = self.pick_directory(new_index)
        self.request = Rename(old_parent, name, new_parent, new_name, flags)
        self.tree.rename(old_dir, name, new_dir, new_name, flags)

    def _lookup(self, index: int, name: bytes) -> Callable[[Any], None]:
        directory, parent = self.pick_directory(index)
        self.request = Lookup(parent, name)
        thing = self.tree.lookup(directory, name)

        def found(reply: Any) -> None:
            assert (reply.entry.ino, reply.entry.kind) == (self.inos[thing], thing.kind)
            assert reply.entry.attrs is None or reply.entry.attrs.nlink == thing.nlink

        return found

    def _open(self, index: int) -> None:
        thing, ino = self.pick(index)
        self.request = Open(ino, False)
        if thing.gone:
            raise Refused(errno.ESTALE)
        thing.handles += 1

    def _close(self, index: int) -> None:
        thing, ino = self.pick(index)
        self.request = Release(ino, 1, 0)
        thing.handles = max(0, thing.handles - 1)

    async def compare(self) -> None:
        """Compare everything that can be seen."""
        for thing, ino in self.things:
            if thing.gone:
                with pytest.raises(FsError) as caught:
                    await self.cluster.ask(GetAttr(ino))
                assert caught.value.errno == errno.ESTALE
                continue
            attrs = (await self.cluster.ask(GetAttr(ino))).attrs
            assert (attrs.nlink, stat.S_IFMT(attrs.mode)) == (thing.nlink, thing.kind)
            if thing.is_dir:
                reply = await self.cluster.ask(ReadDir(ino, 0, 500))
                listed = {entry.name: (entry.ino, entry.kind) for entry in reply.entries}
                assert listed == {name: (self.inos[below], below.kind) for name, below in thing.entries.items()}
                if thing.names:
                    assert reply.parent == self.inos[thing.parent or thing]


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATION, min_size=20, max_size=100), daemons=st.sampled_from([1, 3, 3]))
def test_names_mean_the_same_as_in_a_plain_tree(operations: list[tuple[Any, ...]], daemons: int) -> None:
    async def main() -> None:
        async with cluster_of(daemons) as cluster:
            pair = Pair(cluster)
            for parent, name, kind in ((0, b"a", stat.S_IFDIR), (0, b"b", stat.S_IFDIR), (1, b"a", stat.S_IFREG)):
                await pair.do("make", parent, name, kind)
            for operation in operations:
                await pair.do(*operation)
            await cluster.wait_idle()
            await pair.compare()
            cluster.check()

    trio.run(main)


@settings(max_examples=40, deadline=None)
@given(
    operations=st.lists(
        st.tuples(OPERATION, st.none() | st.tuples(st.integers(0, 15), st.integers(0, 2))), min_size=20, max_size=60
    )
)
def test_daemons_that_die_change_nothing_of_what_names_mean(
    operations: list[tuple[tuple[Any, ...], tuple[int, int] | None]],
) -> None:
    """Every operation happens exactly once, however often it is sent."""

    async def main() -> None:
        async with cluster_of(3) as cluster:
            pair = Pair(cluster)
            for parent, name, kind in ((0, b"a", stat.S_IFDIR), (0, b"b", stat.S_IFDIR), (1, b"a", stat.S_IFREG)):
                await pair.do("make", parent, name, kind)
            for operation, dies_at in operations:
                await pair.do(*operation, dies_at=dies_at)
            await cluster.wait_idle()
            await pair.compare()
            cluster.check()

    trio.run(main)


# ── many at once ─────────────────────────────────────────────────────────────────────────────────────────────────────

CLIENTS = 16
OPERATIONS_PER_CLIENT = 80


def random_request(rng: random.Random, directories: list[int], inos: list[int]) -> Request:
    """Invent an operation that is likely to meet others."""
    parent, other = rng.choice(directories[-8:]), rng.choice(directories[-8:])
    name, other_name = rng.choice(NAMES), rng.choice(NAMES)
    match rng.randrange(10):
        case 0 | 1 | 2:
            kind = rng.choice([stat.S_IFDIR, stat.S_IFREG])
            return Make(parent, name, kind | 0o755, 0, 0)
        case 3 | 4 | 5:
            flags = rng.choice([0, 0, RENAME_EXCHANGE, RENAME_NOREPLACE])
            return Rename(parent, name, other, other_name, flags)
        case 6:
            return Link(rng.choice(inos[-6:]), parent, name)
        case 7:
            return Unlink(parent, name)
        case 8:
            return Rmdir(parent, name)
        case _:
            return Lookup(parent, name)


def refused_for_a_reason(request: Request, error: FsError) -> bool:
    """Tell whether an operation on a changing tree may fail so. Plain renames never find that something exists."""
    allowed = {errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EINVAL}
    if isinstance(request, Rename) and request.flags != RENAME_NOREPLACE:
        allowed.remove(errno.EEXIST)
    if isinstance(request, Link):
        allowed.add(errno.EPERM)
    return error.errno in allowed


@pytest.mark.parametrize("crashes", [0, 3])
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.exhaustive] if seed >= 4 else []) for seed in range(24)]
)
def test_names_stay_whole_when_many_change_them_at_once(seed: int, crashes: int) -> None:
    """Let clients meet, messages take their time, and daemons die: nobody hangs, and the stores agree at the end."""
    succeeded: Counter[str] = Counter()

    async def main() -> None:
        async with cluster_of(3, seed) as cluster:
            rng = cluster.random
            directories = [ROOT_INO, *[await cluster.mkdir(ROOT_INO, NAMES[on], on) for on in range(3)]]
            inos = [await cluster.create(ROOT_INO, b"file")]
            cluster.delay_s_max = 0.01

            async def client(slot: int) -> None:
                for _ in range(OPERATIONS_PER_CLIENT):
                    request = random_request(rng, directories, inos)
                    error: FsError | None = None
                    try:
                        reply = await cluster.ask(request, slot=slot)
                    except FsError as caught:
                        error = caught
                    assert error is None or refused_for_a_reason(request, error), f"{request}: {error!r}"
                    if error is not None:
                        continue
                    succeeded[type(request).__name__] += 1
                    if isinstance(request, Make):
                        (directories if stat.S_ISDIR(request.mode) else inos).append(reply.entry.ino)

            async def crash() -> None:
                await trio.sleep(rng.random() * 1.5)
                rng.choice(cluster.nodes).die()

            with trio.fail_after(1000):
                async with trio.open_nursery() as nursery:
                    for slot in range(CLIENTS):
                        nursery.start_soon(client, slot + 1)
                    for _ in range(crashes):
                        nursery.start_soon(crash)
                await cluster.wait_idle()
            cluster.check()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert succeeded.keys() == {"Make", "Rename", "Link", "Unlink", "Rmdir", "Lookup"}


# ── crashes, one at every point ──────────────────────────────────────────────────────────────────────────────────────


class Scene:
    """Know the directories of a cluster of three: one on each daemon, with files and directories all over."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.dirs: list[int] = []

    async def build(self) -> None:
        """Make everything."""
        cluster = self.cluster
        self.dirs = [await cluster.mkdir(ROOT_INO, b"d%d" % on, on) for on in range(3)]
        for on, directory in enumerate(self.dirs):
            await cluster.create(directory, b"file")
            await cluster.mkdir(directory, b"empty", (on + 1) % 3)
            await cluster.create(await cluster.mkdir(directory, b"full", (on + 2) % 3), b"inside")
            await cluster.ask(Link(await cluster.lookup(directory, b"file"), self.dirs[(on + 1) % 3], b"linked"))
        await cluster.write(await cluster.lookup(self.dirs[1], b"linked"), 20 << 20)
        await cluster.wait_idle()

    async def find(self) -> None:
        """Look up what another cluster with these stores has made."""
        self.dirs = [await self.cluster.lookup(ROOT_INO, b"d%d" % on) for on in range(3)]


Act = Callable[[Scene], Awaitable[Request]]


async def make_directory_at_a_higher_daemon(scene: Scene) -> Request:
    scene.cluster.steer(scene.dirs[1], 2)
    return Make(scene.dirs[1], b"new", 0o40755, 0, 0)


async def make_directory_at_a_lower_daemon(scene: Scene) -> Request:
    scene.cluster.steer(scene.dirs[2], 0)
    return Make(scene.dirs[2], b"new", 0o40755, 0, 0)


async def make_what_exists(scene: Scene) -> Request:
    return Make(scene.dirs[0], b"full", 0o40755, 0, 0)


async def rename_a_file(scene: Scene) -> Request:
    return Rename(scene.dirs[0], b"file", scene.dirs[2], b"moved", 0)


async def rename_a_file_over_another(scene: Scene) -> Request:
    return Rename(scene.dirs[2], b"linked", scene.dirs[0], b"file", 0)


async def rename_a_file_over_its_last_name(scene: Scene) -> Request:
    await scene.cluster.ask(Unlink(scene.dirs[0], b"file"))
    return Rename(scene.dirs[2], b"file", scene.dirs[1], b"linked", 0)


async def exchange_a_directory_and_a_file(scene: Scene) -> Request:
    return Rename(scene.dirs[1], b"full", scene.dirs[2], b"file", RENAME_EXCHANGE)


async def rename_a_directory_in_its_parent(scene: Scene) -> Request:
    return Rename(scene.dirs[0], b"full", scene.dirs[0], b"renamed", 0)


async def move_a_directory(scene: Scene) -> Request:
    return Rename(scene.dirs[1], b"full", scene.dirs[2], b"moved", 0)


async def move_a_directory_over_an_empty_one(scene: Scene) -> Request:
    return Rename(scene.dirs[2], b"full", scene.dirs[1], b"empty", 0)


async def move_a_directory_over_a_full_one(scene: Scene) -> Request:
    return Rename(scene.dirs[2], b"empty", scene.dirs[1], b"full", 0)


async def move_a_directory_into_itself(scene: Scene) -> Request:
    return Rename(scene.dirs[1], b"full", await scene.cluster.lookup(scene.dirs[1], b"full"), b"inner", 0)


async def link_a_file(scene: Scene) -> Request:
    return Link(await scene.cluster.lookup(scene.dirs[0], b"file"), scene.dirs[1], b"another")


async def unlink_one_of_two_names(scene: Scene) -> Request:
    return Unlink(scene.dirs[2], b"linked")


async def unlink_the_last_name(scene: Scene) -> Request:
    await scene.cluster.ask(Unlink(scene.dirs[0], b"file"))
    return Unlink(scene.dirs[1], b"linked")


async def remove_an_empty_directory(scene: Scene) -> Request:
    return Rmdir(scene.dirs[0], b"empty")


async def remove_a_full_directory(scene: Scene) -> Request:
    return Rmdir(scene.dirs[1], b"full")


async def move_a_directory_over_a_full_one_that_is_asked_last(scene: Scene) -> Request:
    return Rename(scene.dirs[1], b"empty", scene.dirs[0], b"full", 0)


ACTS: list[tuple[Act, str]] = [
    (make_directory_at_a_higher_daemon, ""),
    (make_directory_at_a_lower_daemon, ""),
    (make_what_exists, "EEXIST"),
    (rename_a_file, ""),
    (rename_a_file_over_another, ""),
    (rename_a_file_over_its_last_name, ""),
    (exchange_a_directory_and_a_file, ""),
    (rename_a_directory_in_its_parent, ""),
    (move_a_directory, ""),
    (move_a_directory_over_an_empty_one, ""),
    (move_a_directory_over_a_full_one, "ENOTEMPTY"),
    (move_a_directory_over_a_full_one_that_is_asked_last, "ENOTEMPTY"),
    (move_a_directory_into_itself, "EINVAL"),
    (link_a_file, ""),
    (unlink_one_of_two_names, ""),
    (unlink_the_last_name, ""),
    (remove_an_empty_directory, ""),
    (remove_a_full_directory, "ENOTEMPTY"),
]


def shape(tree: dict[bytes, Any]) -> dict[bytes, bytes]:
    """Return the paths of a tree: of a directory as such, of anything else with the first path of the same inode."""
    first: dict[int, bytes] = {}
    found: dict[bytes, bytes] = {}

    def walk(prefix: bytes, directory: dict[bytes, Any]) -> None:
        for name, below in sorted(directory.items()):
            if isinstance(below, dict):
                found[prefix + name] = b"directory"
                walk(prefix + name + b"/", below)
            else:
                found[prefix + name] = first.setdefault(below, prefix + name)

    walk(b"", tree)
    return found


class Performance:
    """Hold how an act went."""

    def __init__(self) -> None:
        self.before: dict[bytes, bytes] = {}
        self.after: dict[bytes, bytes] = {}
        self.error = ""
        self.points: list[tuple[str, tuple[int, ...]]] = []


async def perform(
    contents: list[Any],
    act: Act,
    dies_at: tuple[int, int] | None = None,
    patient: bool = True,
    kept: float | None = None,
) -> Performance:
    """Let a cluster with these stores carry out an act, one daemon dying on the way; ``patient``: see Cluster.ask.

    ``kept``: it dies by a power cut, which leaves this part of what was not synced.
    """
    how = Performance()
    async with cluster_of(3, contents=contents) as cluster:
        scene = Scene(cluster)
        await scene.find()
        request = await act(scene)
        await cluster.wait_idle()
        how.before = shape(cluster.tree())
        await cluster.sync()
        if kept is not None:
            cluster.cuts_power, cluster.kept = True, kept
        cluster.count_points(dies_at)
        try:
            await cluster.ask(request, patient=patient)
        except FsError as error:
            how.error = errno.errorcode[error.errno]
        except Crash:
            how.error = "crash"
        await cluster.wait_idle()
        how.points = cluster.points
        cluster.check()
        how.after = shape(cluster.tree())
        # Nothing is left behind that would hold up the next: what was made can be removed again.
        for name in list(await cluster.names(scene.dirs[1])):
            below = cluster.tree()[b"d1"][name]
            if not isinstance(below, dict):
                await cluster.ask(Unlink(scene.dirs[1], name))
            elif not below:
                await cluster.ask(Rmdir(scene.dirs[1], name))
        await cluster.wait_idle()
        cluster.check()
    return how


@pytest.fixture(scope="module")
def built() -> list[Any]:
    """Return the stores of a cluster with the scene."""

    async def main() -> list[Any]:
        async with cluster_of(3) as cluster:
            await Scene(cluster).build()
            cluster.check()
            return cluster.contents()

    return trio.run(main)


@pytest.mark.parametrize(
    "patient", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["retry", "no retry"]
)
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some points", "all points"])
@pytest.mark.parametrize(("act", "error"), ACTS, ids=[act.__name__ for act, _ in ACTS])
def test_a_crash_anywhere_ends_in_all_or_nothing(
    built: list[Any], act: Act, error: str, step: int, patient: bool
) -> None:
    """Let every daemon die at every write, before and after, and at every message, sent and served."""
    whole = trio.run(perform, built, act)
    assert whole.error == error
    assert (whole.after == whole.before) == bool(error)
    assert len({daemon for _, daemons in whole.points for daemon in daemons}) > 1 or error == "EEXIST"
    crashed = 0
    places = [(number, what, daemon) for number, (what, daemons) in enumerate(whole.points) for daemon in daemons]
    for number, what, daemon in places[len(act.__name__) % step :: step]:
        how = trio.run(perform, built, act, (number, daemon), patient)
        where = f"{act.__name__}: daemon {daemon} dies at point {number}, {what}"
        assert how.before == whole.before
        if how.error == "crash":
            crashed += 1
            assert how.after in (whole.before, whole.after), where
        else:
            assert (how.error, how.after) == (error, whole.after), where
    assert crashed == 0 if patient else crashed > 0 or error == "EEXIST"


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["all lost", "half lost"])
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some points", "all points"])
@pytest.mark.parametrize(("act", "error"), ACTS, ids=[act.__name__ for act, _ in ACTS])
def test_a_power_cut_anywhere_ends_in_all_or_nothing(
    built: list[Any], act: Act, error: str, step: int, kept: float
) -> None:
    """Let one daemon or all lose power at every point, while the operation is under way and behind its answer.

    What was answered concerns several daemons and is there.
    """
    whole = trio.run(perform, built, act)
    places = [(number, daemon) for number, (_, daemons) in enumerate(whole.points) for daemon in (*daemons, EVERYBODY)]
    for number, daemon in places[int(kept * step) :: step]:
        how = trio.run(perform, built, act, (number, daemon), False, kept)
        where = f"{act.__name__}: daemon {daemon} loses power at point {number}, {whole.points[number][0]}"
        assert how.before == whole.before
        if how.error == "crash":
            assert how.after in (whole.before, whole.after), where
        else:
            assert (how.error, how.after) == (error, whole.after), where


async def unlink_with_a_power_cut(dies_at: tuple[int, int] | None) -> list[tuple[str, tuple[int, ...]]]:
    """Remove a file with chunks on all daemons; return the points at which one may die."""
    async with cluster_of(3) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"f")
        await cluster.write(ino, 6 * cluster.attrs(ino).chunk_size)
        await cluster.wait_idle()
        await cluster.sync()
        cluster.cuts_power = True
        cluster.count_points(dies_at)
        with contextlib.suppress(Crash):
            await cluster.ask(Unlink(directory, b"f"), patient=False)
        await cluster.wait_idle()
        points = cluster.points
        cluster.check()
        assert cluster.chunks_of(ino) == (set(range(6)) if b"f" in await cluster.names(directory) else set())
        return points


def test_no_power_cut_brings_a_name_back_whose_chunks_have_gone() -> None:
    points = trio.run(unlink_with_a_power_cut, None)
    for number, (_, daemons) in enumerate(points):
        for daemon in (*daemons, EVERYBODY):
            trio.run(unlink_with_a_power_cut, (number, daemon))


async def test_what_was_aborted_before_a_power_cut_is_not_held_for_ever() -> None:
    """An abort is not synced: the participant finds the steps prepared again, and nobody else remembers them."""
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"f")
        await cluster.wait_idle()
        await cluster.sync()
        txid = TxId(0, 1, 100)
        await tell(cluster, 1, Prepare(txid, (DropEntry(directory, b"f", ino),)))
        await tell(cluster, 1, Finish(txid, False))
        cluster.nodes[1].loses = True
        cluster.nodes[1].die()
        await cluster.nodes[1].up.wait()
        assert cluster.nodes[1].service.prepared == 1
        await cluster.wait_idle()
        cluster.check()
        assert await cluster.lookup(directory, b"f") == ino


async def test_a_daemon_says_how_many_operations_it_finished_or_undid_after_a_crash(
    built: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let all daemons die at every point of a rename; compare with what lay in their stores when they started anew."""
    caplog.set_level(logging.INFO, transactions.__name__)
    recover, found = transactions.Transactions.recover, Counter[str]()

    def recover_and_count(self: transactions.Transactions) -> None:
        recover(self)
        found["decided"] += len(self._inherited)
        found["prepared"] += self.prepared_count

    monkeypatch.setattr(transactions.Transactions, "recover", recover_and_count)

    def said(sentence: str) -> list[int]:
        numbers = [re.search(sentence, message) for message in caplog.messages]
        return [int(match[1]) for match in numbers if match is not None]

    points = (await perform(built, rename_a_file)).points
    assert not caplog.messages and not found.total()
    finished = undone = decided = 0
    for number in range(len(points)):
        found.clear()
        caplog.clear()
        await perform(built, rename_a_file, (number, EVERYBODY))
        told = said(r"decided before this start: (\d+) finished")
        ends = said(r"prepared here before this start: (\d+) finished"), said(r"finished, (\d+) undone")
        assert sum(told) == found["decided"] and 0 not in told
        assert sum(ends[0]) + sum(ends[1]) == found["prepared"]
        assert len(caplog.messages) == len(told) + len(ends[0])
        decided, finished, undone = decided + sum(told), finished + sum(ends[0]), undone + sum(ends[1])
    assert decided and finished and undone


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Gate:
    """Hold up the messages of one class to one daemon until it is opened."""

    def __init__(self, cluster: Cluster, request: type[Request], daemon: int) -> None:
        self._held = (request, daemon)
        self._open = trio.Event()
        self.reached = trio.Event()
        cluster.gate = self._pass

    async def _pass(self, source: int, target: int, request: Request) -> None:
        if (type(request), target) == self._held:
            self.reached.set()
            await self._open.wait()

    def open(self) -> None:
        """Let everything pass."""
        self._open.set()


class Asked:
    """Be a request under way."""

    def __init__(self, cluster: Cluster, nursery: trio.Nursery, request: Request, slot: int) -> None:
        self.done = False
        self.reply: Any = None
        self.error = ""
        self.scope = trio.CancelScope()
        self._request = request
        nursery.start_soon(self._run, cluster, slot)

    async def _run(self, cluster: Cluster, slot: int) -> None:
        with self.scope:
            try:
                self.reply = await cluster.ask(self._request, slot=slot)
            except FsError as error:
                self.error = errno.errorcode[error.errno]
            self.done = True


async def test_a_name_under_change_is_waited_for_and_its_inode_is_not(built: list[Any]) -> None:
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        ino = await cluster.lookup(scene.dirs[0], b"file")
        gate = Gate(cluster, Finish, 2)
        rename = Asked(cluster, nursery, Rename(scene.dirs[0], b"file", scene.dirs[2], b"moved", 0), 1)
        await gate.reached.wait()
        # Decided, and not yet known at daemon 2: the old name has gone, the new one is not yet to be seen, nor absent.
        with pytest.raises(NotFound):
            await cluster.lookup(scene.dirs[0], b"file")
        waiting = [
            Asked(cluster, nursery, Lookup(scene.dirs[2], b"moved"), 2),
            Asked(cluster, nursery, Make(scene.dirs[2], b"moved", 0o100644, 0, 0), 3),
            Asked(cluster, nursery, Rmdir(ROOT_INO, b"d2"), 4),
        ]
        assert (await cluster.ask(GetAttr(ino), slot=5)).attrs.nlink == 2
        assert b"moved" not in await cluster.names(scene.dirs[2])
        assert await cluster.lookup(scene.dirs[2], b"file") > 0
        await wait_all_tasks_blocked()
        assert not any(asked.done for asked in [rename, *waiting])
        gate.open()
        await wait_all_tasks_blocked()
        assert [asked.error for asked in waiting] == ["", "EEXIST", "ENOTEMPTY"]
        assert (rename.reply.moved, waiting[0].reply.entry.ino) == (ino, ino)


async def test_a_planning_waits_for_a_name_that_is_about_to_go(built: list[Any]) -> None:
    """While the removal of a name may still fail, nobody is told that the name is there, nor that it is not."""
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, Prepare, 1)
        rmdir = Asked(cluster, nursery, Rmdir(scene.dirs[0], b"empty"), 1)
        await gate.reached.wait()
        make = Asked(cluster, nursery, Make(scene.dirs[0], b"empty", 0o100644, 0, 0), 2)
        lookup = Asked(cluster, nursery, Lookup(scene.dirs[0], b"empty"), 3)
        await wait_all_tasks_blocked()
        assert not make.done
        assert not lookup.done
        gate.open()
        await wait_all_tasks_blocked()
        assert (rmdir.error, make.error) == ("", "")
        assert lookup.error == "ENOENT" or lookup.reply.entry.ino == make.reply.entry.ino


async def test_two_moves_cannot_make_a_cycle(built: list[Any]) -> None:
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, Prepare, 2)
        one = Asked(cluster, nursery, Rename(ROOT_INO, b"d1", scene.dirs[2], b"d1", 0), 1)
        await gate.reached.wait()
        two = Asked(cluster, nursery, Rename(ROOT_INO, b"d2", scene.dirs[1], b"d2", 0), 2)
        await wait_all_tasks_blocked()
        assert not two.done
        gate.open()
        await wait_all_tasks_blocked()
        assert (one.error, two.error) == ("", "EINVAL")
        await cluster.wait_idle()
        cluster.check()


async def test_a_move_waits_until_the_last_one_before_a_crash_is_known_everywhere(built: list[Any]) -> None:
    """The walk up to the root would trust a parent that is about to change."""
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, Finish, 1)
        one = Asked(cluster, nursery, Rename(ROOT_INO, b"d1", scene.dirs[2], b"d1", 0), 1)
        await gate.reached.wait()
        cluster.nodes[0].die()
        await cluster.nodes[0].up.wait()
        two = Asked(cluster, nursery, Rename(ROOT_INO, b"d2", scene.dirs[1], b"d2", 0), 2)
        await wait_all_tasks_blocked()
        assert (one.done, two.done) == (True, False)
        gate.open()
        await wait_all_tasks_blocked()
        assert (one.error, two.error) == ("", "EINVAL")


async def test_a_move_waits_for_the_one_whose_client_went_away(built: list[Any]) -> None:
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, Finish, 1)
        one = cluster.serve(
            cluster.nodes[0],
            Rename(ROOT_INO, b"d1", scene.dirs[2], b"d1", 0),
            lambda store: Called(store, CLIENT, 1, 1),
        )
        await gate.reached.wait()
        one.scope.cancel()
        two = Asked(cluster, nursery, Rename(ROOT_INO, b"d2", scene.dirs[1], b"d2", 0), 2)
        await wait_all_tasks_blocked()
        assert not two.done
        gate.open()
        await wait_all_tasks_blocked()
        assert two.error == "EINVAL"
        await cluster.wait_idle()
        cluster.check()


@pytest.mark.parametrize("waits_for", [Lookup, GetAttr])
async def test_a_move_that_waits_for_a_dead_daemon_lets_others_move_in_time(
    built: list[Any], waits_for: type[Request], autojump_clock: MockClock
) -> None:
    async with cluster_of(3, contents=built, prepare_timeout_s=20.0) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, waits_for, 2)
        one = Asked(cluster, nursery, Rename(ROOT_INO, b"d1", scene.dirs[2], b"d1", 0), 1)
        await gate.reached.wait()
        two = Asked(cluster, nursery, Rename(scene.dirs[1], b"full", ROOT_INO, b"full", 0), 2)
        await trio.sleep(19.9)
        assert not one.done
        assert not two.done
        await trio.sleep(0.2)
        assert (one.error, two.error, two.done) == ("EIO", "", True)
        gate.open()
        await cluster.wait_idle()
        cluster.check()


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE])
async def test_a_name_that_appears_under_a_rename_is_replaced_or_spared(built: list[Any], flags: int) -> None:
    async with cluster_of(3, contents=built) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        gate = Gate(cluster, Prepare, 2)
        rename = Asked(cluster, nursery, Rename(scene.dirs[0], b"file", scene.dirs[2], b"new", flags), 1)
        await gate.reached.wait()
        other = await cluster.create(scene.dirs[2], b"new")
        gate.open()
        await wait_all_tasks_blocked()
        if flags:
            assert rename.error == "EEXIST"
            assert await cluster.lookup(scene.dirs[2], b"new") == other
        else:
            assert rename.reply.other == other
        await cluster.wait_idle()
        cluster.check()


async def test_a_daemon_that_cannot_be_prepared_in_time_ends_the_operation(
    built: list[Any], autojump_clock: MockClock
) -> None:
    async with cluster_of(3, contents=built, prepare_timeout_s=20.0) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        before = cluster.tree()
        cluster.steer(scene.dirs[1], 2)
        gate = Gate(cluster, Prepare, 2)
        make = Asked(cluster, nursery, Make(scene.dirs[1], b"new", 0o40755, 0, 0), 1)
        await gate.reached.wait()
        lookup = Asked(cluster, nursery, Lookup(scene.dirs[1], b"new"), 2)
        await trio.sleep(19.9)
        assert not make.done
        assert not lookup.done
        await trio.sleep(0.2)
        assert (make.error, lookup.error) == ("EIO", "ENOENT")
        gate.open()
        await cluster.wait_idle()
        cluster.check()
        assert cluster.tree() == before


async def test_a_prepare_that_waits_for_a_lock_ends_when_its_transaction_is_aborted(
    built: list[Any], autojump_clock: MockClock
) -> None:
    """The Prepare is still being served when its coordinator has given up: it must not be kept for ever."""
    async with cluster_of(3, contents=built, prepare_timeout_s=20.0) as cluster, trio.open_nursery() as nursery:
        scene = Scene(cluster)
        await scene.find()
        ino = await cluster.lookup(scene.dirs[1], b"linked")
        gate = Gate(cluster, Finish, 0)
        one = Asked(cluster, nursery, Link(ino, scene.dirs[1], b"one"), 1)
        await gate.reached.wait()
        two = Asked(cluster, nursery, Link(ino, scene.dirs[1], b"two"), 2)
        await trio.sleep(30)
        assert two.error == "EIO"
        gate.open()
        await wait_all_tasks_blocked()
        assert one.error == ""
        await cluster.wait_idle()
        cluster.check()
        assert (await cluster.ask(GetAttr(ino))).attrs.nlink == 3


async def test_an_operation_that_is_cancelled_before_the_decision_has_not_happened(built: list[Any]) -> None:
    async with cluster_of(3, contents=built) as cluster:
        scene = Scene(cluster)
        await scene.find()
        before = cluster.tree()
        gate = Gate(cluster, Prepare, 2)
        request = Rename(scene.dirs[0], b"linked", scene.dirs[1], b"file", 0)
        answer = cluster.serve(cluster.nodes[0], request, lambda store: Called(store, CLIENT, 1, 1))
        await gate.reached.wait()
        assert cluster.nodes[1].service.prepared == 1
        answer.scope.cancel()
        gate.open()
        await cluster.wait_idle()
        cluster.check()
        assert cluster.tree() == before


# ── a participant by itself ──────────────────────────────────────────────────────────────────────────────────────────


async def tell(cluster: Cluster, daemon: int, request: Request) -> Any:
    """Send a request as a daemon does."""
    answer = cluster.serve(cluster.nodes[daemon], request, lambda store: Called(store, DAEMON_CLIENT, 0, 0))
    await answer.done.wait()
    if answer.error is not None:
        raise answer.error
    return answer.reply


async def test_prepare_and_finish_can_be_repeated() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"f")
        txid = TxId(0, 1, 99)
        prepare = Prepare(txid, (DropEntry(directory, b"f", ino), DropLink(ino)))
        for _ in range(2):
            await tell(cluster, 1, prepare)
            assert cluster.nodes[1].service.prepared == 1
        cluster.nodes[1].die()
        await cluster.nodes[1].up.wait()
        assert cluster.nodes[1].service.prepared == 1
        await tell(cluster, 1, prepare)
        assert [attrs.nlink for attrs in (await tell(cluster, 1, Finish(txid, True))).attrs] == [0]
        assert (await tell(cluster, 1, Finish(txid, True))).attrs == ()
        await cluster.wait_idle()
        cluster.check()
        assert cluster.tree() == {b"d": {}}


async def test_a_prepare_after_its_abort_is_refused() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"f")
        txid = TxId(0, 1, 99)
        await tell(cluster, 1, Finish(txid, False))
        with pytest.raises(Conflict):
            await tell(cluster, 1, Prepare(txid, (DropLink(ino),)))
        cluster.check()


async def test_a_coordinator_that_starts_anew_ends_what_it_had_not_decided_and_nothing_else() -> None:
    async with cluster_of(3) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        inos = [await cluster.create(directory, b"%d" % number) for number in range(4)]
        for daemon, incarnation, ino in zip((0, 0, 2, 0), (1, 2, 1, 3), inos, strict=True):
            await tell(cluster, 1, Prepare(TxId(daemon, incarnation, 7), (DropLink(ino),)))
        await tell(cluster, 1, Finish(TxId(0, 3, 0), False))
        assert cluster.nodes[1].service.prepared == 2
        for daemon, incarnation in ((2, 1), (0, 3)):
            await tell(cluster, 1, Finish(TxId(daemon, incarnation, 7), False))
        cluster.check()


@pytest.mark.parametrize("txid", [TxId(-1, 1, 1), TxId(1 << 16, 1, 1), TxId(0, 1 << 64, 1), TxId(0, 1, -1)])
async def test_a_transaction_number_out_of_range_is_refused(txid: TxId) -> None:
    async with cluster_of(2) as cluster:
        with pytest.raises(ProtocolError):
            await tell(cluster, 1, Prepare(txid, ()))


async def test_a_step_that_names_what_is_not_there_is_refused() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"f")
        kind = stat.S_IFREG
        refused: list[tuple[Step, type[FsError]]] = [
            (PutEntry(directory, b"f", ino, kind, 0), Exists),
            (PutEntry(directory, b"f", ino, kind, ino + 1), Conflict),
            (PutEntry(directory, b"g", ino, kind, ino), Conflict),
            (PutEntry(ino, b"g", ino, kind, 0), NotADirectory),
            (PutEntry(directory + 1000, b"g", ino, kind, 0), Stale),
            (DropEntry(directory, b"g", ino), Conflict),
            (DropEntry(directory, b"f", ino + 1), Conflict),
            (NewInode(cluster.attrs(ino)), Conflict),
            (AddLink(directory), NotPermitted),
            (AddLink(ino + 1000), Conflict),
            (DropLink(ino + 1000), Conflict),
            (DropDir(directory), NotEmpty),
            (DropDir(ino + 1000), Conflict),
            (Moved(ino + 1000, 0), Conflict),
        ]
        for number, (step, error) in enumerate(refused):
            with pytest.raises(error):
                await tell(cluster, 1, Prepare(TxId(0, 1, number + 100), (step,)))
        cluster.check()


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("act", "messages"),
    [
        (make_directory_at_a_higher_daemon, {"Prepare": 1, "Finish": 1, "Secure": 1}),
        (rename_a_file, {"Lookup": 1, "Prepare": 1, "Finish": 1, "Secure": 1}),
        (rename_a_file_over_another, {"Lookup": 1, "Prepare": 2, "Finish": 2, "Secure": 2}),
        (rename_a_directory_in_its_parent, {"Prepare": 1, "Finish": 1, "Secure": 1}),
        (move_a_directory, {"Lookup": 3, "GetAttr": 1, "Prepare": 2, "Finish": 2, "Secure": 2}),
        (link_a_file, {"GetAttr": 1, "Prepare": 1, "Finish": 1, "Secure": 1}),
        (unlink_one_of_two_names, {"Prepare": 1, "Finish": 1, "Secure": 1}),
        (remove_an_empty_directory, {"Prepare": 1, "Finish": 1, "Secure": 1}),
        (remove_a_full_directory, {"Prepare": 1}),
        (make_what_exists, {}),
    ],
)
async def test_the_number_of_messages_between_daemons(built: list[Any], act: Act, messages: dict[str, int]) -> None:
    async with cluster_of(3, contents=built) as cluster:
        scene = Scene(cluster)
        await scene.find()
        request = await act(scene)
        await cluster.wait_idle()
        cluster.messages.clear()
        with contextlib.suppress(FsError):
            await cluster.ask(request)
        await cluster.wait_idle()
        assert cluster.messages == messages


async def test_what_lies_on_one_daemon_takes_one_write_and_no_message() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d", 1)
        ino = await cluster.create(directory, b"first")
        for request in (
            Make(directory, b"f", 0o100644, 0, 0, open_writers=1),
            Make(directory, b"s", 0o120777, 0, 0, target=b"f"),
            Rename(directory, b"f", directory, b"g", 0),
            Rename(directory, b"g", directory, b"s", 0),
            Link(ino, directory, b"h"),
            Unlink(directory, b"h"),
        ):
            cluster.messages.clear()
            writes = cluster.nodes[1].store.writes
            await cluster.ask(request)
            assert cluster.nodes[1].store.writes - writes == 1, request
            assert not cluster.messages
