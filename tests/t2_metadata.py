"""Names and attributes by the rules of POSIX and Linux, on several daemons; truncation; files without a name."""

import errno
import logging
import stat
from typing import Any

import pytest
import trio
from metadata_cluster import CLIENT, Called, Cluster, cluster_of
from trio.testing import MockClock, wait_all_tasks_blocked

from benchfs_fuse import acl, services
from benchfs_fuse.acl import AclEntry
from benchfs_fuse.errors import FsError, NoSpace, StorageError
from benchfs_fuse.limits import (
    BODY_MAX,
    CHUNK_SIZE_DEFAULT,
    CHUNK_SIZE_MAX,
    CHUNK_SIZE_MIN,
    FILE_SIZE_MAX,
    LINK_MAX,
    XATTR_LIST_MAX,
    XATTR_VALUE_MAX,
)
from benchfs_fuse.model import ROOT_INO, ClientId
from benchfs_fuse.rpc import messages
from benchfs_fuse.rpc.messages import (
    TIME_NOW,
    XATTR_CREATE,
    XATTR_REPLACE,
    Append,
    CommitWrite,
    DropChunks,
    GetAttr,
    GetXattr,
    Link,
    ListXattr,
    Lookup,
    Make,
    Open,
    OpenCount,
    ReadDir,
    ReadLink,
    Release,
    RemoveXattr,
    Rename,
    Request,
    Rmdir,
    SetAttr,
    SetXattr,
    SyncMeta,
    Touch,
    TrimChunks,
    Unlink,
    encode,
)
from benchfs_fuse.services.attributes import RELATIME_NS
from benchfs_fuse.services.names import SPREAD_EVERY

OTHER_CLIENT = ClientId(2)
DAY_NS = 24 * 3600 * 10**9


async def refusal(cluster: Cluster, request: Request) -> str:
    """Return the name of the errno that a request fails with, "" if it succeeds."""
    try:
        await cluster.ask(request)
    except FsError as error:
        return errno.errorcode[error.errno]
    return ""


# ── making ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a b", b"...", b"x" * 255, "ö".encode(), b"\n", b"-"])
async def test_any_bytes_but_slash_and_nul_are_a_name(name: bytes) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, name)
        assert await cluster.lookup(ROOT_INO, name) == ino
        assert await cluster.names(ROOT_INO) == [name]


@pytest.mark.parametrize(
    ("name", "error"),
    [(b"x" * 256, "ENAMETOOLONG"), *((name, "EINVAL") for name in (b"", b".", b"..", b"a/b", b"/", b"a\0"))],
)
async def test_what_is_no_name_is_refused_everywhere(name: bytes, error: str) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for request in (
            Lookup(ROOT_INO, name),
            Make(ROOT_INO, name, 0o100644, 0, 0),
            Unlink(ROOT_INO, name),
            Rmdir(ROOT_INO, name),
            Link(ino, ROOT_INO, name),
            Rename(ROOT_INO, b"file", ROOT_INO, name, 0),
            Rename(ROOT_INO, name, ROOT_INO, b"other", 0),
        ):
            assert await refusal(cluster, request) == error, request


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
async def test_every_type_of_node_is_made_as_asked(kind: int) -> None:
    async with cluster_of(2) as cluster:
        before = cluster.attrs(ROOT_INO)
        reply = await cluster.ask(Make(ROOT_INO, b"node", kind | 0o4751, 7, 8, rdev=0x0105))
        attrs = reply.entry.attrs
        assert (attrs.mode, attrs.nlink, attrs.uid, attrs.gid, attrs.size) == (kind | 0o4751, 1, 7, 8, 0)
        assert attrs.rdev == (0x0105 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        assert attrs.atime_ns == attrs.mtime_ns == attrs.ctime_ns > before.ctime_ns
        assert (attrs.chunk_size, attrs.width, attrs.parent) == (CHUNK_SIZE_DEFAULT, 2, 0)
        assert (await cluster.ask(GetAttr(attrs.ino))).attrs == attrs
        assert (await cluster.ask(Lookup(ROOT_INO, b"node"))).entry == reply.entry
        after = cluster.attrs(ROOT_INO)
        assert (after.nlink, after.mtime_ns, after.ctime_ns) == (2, attrs.ctime_ns, attrs.ctime_ns)
        assert after.version > before.version
        cluster.check()


async def test_a_mode_without_a_type_makes_a_regular_file() -> None:
    async with cluster_of(1) as cluster:
        reply = await cluster.ask(Make(ROOT_INO, b"file", 0o640, 0, 0))
        assert reply.entry.kind == stat.S_IFREG
        assert reply.entry.attrs.mode == stat.S_IFREG | 0o640


@pytest.mark.parametrize("on", [0, 1])
async def test_a_directory_counts_in_its_parent_wherever_it_is(on: int) -> None:
    async with cluster_of(2) as cluster:
        cluster.steer(ROOT_INO, on)
        reply = await cluster.ask(Make(ROOT_INO, b"dir", 0o40750, 7, 8))
        attrs = reply.entry.attrs
        assert cluster.shard_map.of_ino(attrs.ino) == on
        assert (attrs.mode, attrs.nlink, attrs.uid, attrs.gid, attrs.parent) == (0o40750, 2, 7, 8, ROOT_INO)
        assert (await cluster.ask(GetAttr(attrs.ino))).attrs == attrs
        assert cluster.attrs(ROOT_INO).nlink == 3
        found = (await cluster.ask(Lookup(ROOT_INO, b"dir"))).entry
        assert (found.ino, found.kind) == (attrs.ino, stat.S_IFDIR)
        assert found.attrs == (attrs if on == 0 else None)


async def test_directories_are_spread_evenly_over_the_daemons() -> None:
    async with cluster_of(3) as cluster:
        homes = [int(cluster.shard_map.of_ino(await cluster.mkdir(ROOT_INO, b"%d" % at))) for at in range(30)]
        assert [homes.count(daemon) for daemon in range(3)] == [10, 10, 10]


async def test_deep_directories_stay_with_their_parent_but_for_some() -> None:
    async with cluster_of(3) as cluster:
        project = await cluster.mkdir(await cluster.mkdir(ROOT_INO, b"home"), b"project", on=1)
        home = cluster.home(project)
        names = [b"%d" % at for at in range(3 * SPREAD_EVERY + 1)]
        made = [await cluster.mkdir(project, name) for name in names]
        beside = [cluster.home(ino) is home for ino in made]
        assert beside.count(False) in (2, 3)  # round three daemons: one of three comes back
        assert all(beside[: SPREAD_EVERY - 1])
        inside = [cluster.home(await cluster.mkdir(made[0], name)) is home for name in names]
        assert inside.count(False) in (2, 3)


async def test_a_symbolic_link_keeps_its_target() -> None:
    async with cluster_of(2) as cluster:
        for number, target in enumerate([b"a", b"/x" * 2047, b"\xff/../ \n", b"x" * 4095]):
            reply = await cluster.ask(Make(ROOT_INO, b"%d" % number, 0o120777, 0, 0, target=target))
            assert reply.entry.attrs.size == len(target)
            assert (await cluster.ask(ReadLink(reply.entry.ino))).target == target
        cluster.check()
        file = await cluster.create(ROOT_INO, b"file")
        for ino, error in ((file, "EINVAL"), (ROOT_INO, "EINVAL"), (file + 50, "ESTALE")):
            assert await refusal(cluster, ReadLink(ino)) == error
        await cluster.ask(Unlink(ROOT_INO, b"0"))
        cluster.check()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Make(ROOT_INO, b"x", 0o120777, 0, 0, target=b"x" * 4096), "ENAMETOOLONG"),
        (Make(ROOT_INO, b"x", 0o120777, 0, 0, target=b""), "ENOENT"),
        (Make(ROOT_INO, b"x", 0o120777, 0, 0, target=b"a\0b"), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o100644, 0, 0, target=b"a"), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o40755, 0, 0, open_readers=1), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o010644, 0, 0, open_writers=1), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o160000, 0, 0), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o100644, 0, 0, umask=0o1000), "EINVAL"),
        (Make(ROOT_INO, b"x", 0o100644, 0, 0, umask=-1), "EINVAL"),
        (Make(ROOT_INO, b"taken", 0o100644, 0, 0), "EEXIST"),
        (Make(ROOT_INO, b"taken", 0o40755, 0, 0), "EEXIST"),
        (Make(1 << 48, b"x", 0o100644, 0, 0), "ESTALE"),
        (Make(-1, b"x", 0o100644, 0, 0), "ESTALE"),
    ],
)
async def test_what_cannot_be_made_leaves_nothing(request_: Make, error: str) -> None:
    async with cluster_of(2) as cluster:
        await cluster.create(ROOT_INO, b"taken")
        before = cluster.contents()
        if request_.parent < 0:
            with pytest.raises(ValueError, match="names no shard"):
                await cluster.ask(request_)
            return
        assert await refusal(cluster, request_) == error
        assert [records for records, _ in cluster.contents()] == [records for records, _ in before]


async def test_nothing_is_made_in_what_is_no_directory() -> None:
    async with cluster_of(2) as cluster:
        file = await cluster.create(ROOT_INO, b"file")
        for request in (
            Make(file, b"x", 0o100644, 0, 0),
            Make(file, b"x", 0o40755, 0, 0),
            Link(file, file, b"x"),
            Lookup(file, b"x"),
            ReadDir(file, 0, 10),
            Rename(ROOT_INO, b"file", file, b"x", 0),
            Unlink(file, b"x"),
        ):
            assert await refusal(cluster, request) == "ENOTDIR", request
        cluster.check()


@pytest.mark.parametrize("on", [0, 1])
async def test_a_set_group_id_directory_hands_on_its_group(on: int) -> None:
    async with cluster_of(2) as cluster:
        parent = await cluster.mkdir(ROOT_INO, b"parent", on)
        await cluster.ask(SetAttr(parent, mode=0o2775, gid=500))
        file = (await cluster.ask(Make(parent, b"file", 0o100755, 7, 8))).entry.attrs
        assert (file.mode, file.uid, file.gid) == (0o100755, 7, 500)
        below = (await cluster.ask(Make(parent, b"dir", 0o40755, 7, 8))).entry.attrs
        assert (below.mode, below.uid, below.gid) == (0o42755, 7, 500)
        plain = (await cluster.ask(Make(ROOT_INO, b"plain", 0o100755, 7, 8))).entry.attrs
        assert (plain.mode, plain.gid) == (0o100755, 8)


async def test_a_file_can_be_made_open() -> None:
    async with cluster_of(1) as cluster:
        ino = (await cluster.ask(Make(ROOT_INO, b"f", 0o100644, 0, 0, open_writers=1))).entry.ino
        assert cluster.home(ino).handles.held[CLIENT, ino, True] == 1
        cluster.home(ino).handles.full = True
        before = cluster.contents()
        assert await refusal(cluster, Make(ROOT_INO, b"g", 0o100644, 0, 0, open_readers=1)) == "ENFILE"
        assert cluster.contents() == before


async def test_a_failing_store_leaves_nothing_behind() -> None:
    async with cluster_of(1) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"d")
        before = cluster.contents()

        def fail(number: int) -> None:
            raise NoSpace("the test says so")

        node = cluster.nodes[0]
        hook, node.store.before_write = node.store.before_write, fail
        assert await refusal(cluster, Make(directory, b"f", 0o100644, 0, 0)) == "ENOSPC"
        assert await refusal(cluster, Rmdir(ROOT_INO, b"d")) == "ENOSPC"
        node.store.before_write = hook
        assert cluster.contents() == before
        await cluster.create(directory, b"f")
        cluster.check()


# ── removing and linking ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", [0, 1])
async def test_removing_by_the_wrong_call_is_refused(on: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", on)
        await cluster.create(directory, b"file")
        await cluster.create(ROOT_INO, b"file")
        for request, error in (
            (Unlink(ROOT_INO, b"dir"), "EISDIR"),
            (Rmdir(ROOT_INO, b"file"), "ENOTDIR"),
            (Rmdir(ROOT_INO, b"dir"), "ENOTEMPTY"),
            (Unlink(ROOT_INO, b"none"), "ENOENT"),
            (Rmdir(ROOT_INO, b"none"), "ENOENT"),
        ):
            assert await refusal(cluster, request) == error, request
        cluster.check()


@pytest.mark.parametrize("on", [0, 1])
async def test_removing_changes_the_times_of_the_parent_and_of_what_is_left(on: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", on)
        file = await cluster.create(directory, b"file")
        await cluster.ask(Link(file, ROOT_INO, b"other"))
        before, root = cluster.attrs(file), cluster.attrs(ROOT_INO)
        await cluster.ask(Unlink(ROOT_INO, b"other"))
        after = cluster.attrs(file)
        assert (after.nlink, after.mtime_ns) == (1, before.mtime_ns)
        assert after.ctime_ns > before.ctime_ns
        assert cluster.attrs(ROOT_INO).mtime_ns > root.mtime_ns
        assert cluster.attrs(ROOT_INO).ctime_ns > root.ctime_ns
        await cluster.ask(Unlink(directory, b"file"))
        await cluster.ask(Rmdir(ROOT_INO, b"dir"))
        assert cluster.attrs(ROOT_INO).nlink == 2
        for ino in (file, directory):
            assert await refusal(cluster, GetAttr(ino)) == "ESTALE"
        await cluster.wait_idle()
        cluster.check()


async def test_what_has_gone_is_stale_for_every_request() -> None:
    async with cluster_of(2) as cluster:
        file = await cluster.create(ROOT_INO, b"file")
        directory = await cluster.mkdir(ROOT_INO, b"dir", 1)
        await cluster.ask(Unlink(ROOT_INO, b"file"))
        await cluster.ask(Rmdir(ROOT_INO, b"dir"))
        for request in (
            GetAttr(file),
            SetAttr(file, mode=0),
            SetAttr(file, size=0),
            Open(file, False),
            Open(file, True),
            CommitWrite(file, 1, 1),
            Append(file, 1),
            Touch(file),
            ReadLink(file),
            GetXattr(file, b"user.a"),
            SetXattr(file, b"user.a", b"", 0),
            RemoveXattr(file, b"user.a"),
            ListXattr(file),
            Lookup(directory, b"x"),
            ReadDir(directory, 0, 1),
            Make(directory, b"x", 0o100644, 0, 0),
            Rename(directory, b"x", ROOT_INO, b"x", 0),
        ):
            assert await refusal(cluster, request) == "ESTALE", request
        assert await refusal(cluster, Release(file, 1, 0)) == ""
        assert await refusal(cluster, Link(file, ROOT_INO, b"again")) == "ENOENT"
        assert await refusal(cluster, Link(directory, ROOT_INO, b"again")) == "ENOENT"


@pytest.mark.parametrize("on", [0, 1])
async def test_a_link_is_another_name_of_the_same_inode(on: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", on)
        for kind, target in ((stat.S_IFREG, b""), (stat.S_IFLNK, b"x"), (stat.S_IFIFO, b"")):
            name = b"%o" % kind
            made = (await cluster.ask(Make(directory, name, kind | 0o644, 0, 0, target=target))).entry.attrs
            attrs = (await cluster.ask(Link(made.ino, ROOT_INO, name))).attrs
            assert (attrs.ino, attrs.nlink, attrs.mtime_ns) == (made.ino, 2, made.mtime_ns)
            assert attrs.ctime_ns > made.ctime_ns
            assert attrs == cluster.attrs(made.ino)
            found = (await cluster.ask(Lookup(ROOT_INO, name))).entry
            assert (found.ino, found.kind) == (made.ino, kind)
        assert await refusal(cluster, Link(directory, ROOT_INO, b"x")) == "EPERM"
        assert await refusal(cluster, Link(directory, ROOT_INO, b"dir")) == "EEXIST"
        cluster.check()


@pytest.mark.parametrize("on", [0, 1])
async def test_an_inode_has_no_more_names_than_the_limit(on: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", on)
        ino = await cluster.create(directory, b"file")
        inode = cluster.inode(ino)
        assert inode is not None
        inode.nlink = LINK_MAX
        draft = cluster.home(ino).service._inodes.draft()
        draft.changed(inode)
        draft.write()
        assert await refusal(cluster, Link(ino, ROOT_INO, b"x")) == "EMLINK"
        assert cluster.tree() == {b"dir": {b"file": ino}}


# ── renaming: what the reference tree does not know ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", [0, 1])
async def test_a_rename_changes_the_times_that_it_should(on: int) -> None:
    async with cluster_of(2) as cluster:
        old = await cluster.mkdir(ROOT_INO, b"old", 0)
        new = await cluster.mkdir(ROOT_INO, b"new", on)
        ino = await cluster.create(old, b"file")
        replaced = await cluster.create(new, b"file")
        await cluster.ask(Link(replaced, ROOT_INO, b"kept"))
        before = {inode: cluster.attrs(inode) for inode in (old, new, ino, replaced)}
        await cluster.ask(Rename(old, b"file", new, b"file", 0))
        for inode, was in before.items():
            now = cluster.attrs(inode)
            assert now.ctime_ns > was.ctime_ns
            assert now.version > was.version
            assert (now.mtime_ns > was.mtime_ns) == (inode in (old, new))
        assert (cluster.attrs(ino).nlink, cluster.attrs(replaced).nlink) == (1, 1)
        await cluster.wait_idle()
        cluster.check()


async def test_renaming_to_another_name_of_the_same_file_changes_nothing() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", 1)
        ino = await cluster.create(ROOT_INO, b"a")
        await cluster.ask(Link(ino, ROOT_INO, b"b"))
        await cluster.ask(Link(ino, directory, b"c"))
        before = cluster.tree(), cluster.attrs(ino), cluster.attrs(ROOT_INO)
        for new_parent, name in ((ROOT_INO, b"a"), (ROOT_INO, b"b"), (directory, b"c")):
            for flags in (0, messages.RENAME_EXCHANGE):
                reply = await cluster.ask(Rename(ROOT_INO, b"a", new_parent, name, flags))
                assert (reply.moved, reply.other) == (ino, 0)
            assert (
                await refusal(cluster, Rename(ROOT_INO, b"a", new_parent, name, messages.RENAME_NOREPLACE)) == "EEXIST"
            )
        assert (cluster.tree(), cluster.attrs(ino), cluster.attrs(ROOT_INO)) == before
        cluster.check()


async def test_a_moved_inode_keeps_its_number_and_daemon() -> None:
    async with cluster_of(3) as cluster:
        directories = [await cluster.mkdir(ROOT_INO, b"%d" % on, on) for on in range(3)]
        ino = await cluster.create(directories[0], b"file")
        for old, new in ((0, 1), (1, 2), (2, 0), (0, 2)):
            await cluster.ask(Rename(directories[old], b"file", directories[new], b"file", 0))
            assert await cluster.lookup(directories[new], b"file") == ino
            assert cluster.attrs(ino).nlink == 1
        assert cluster.shard_map.of_ino(ino) == 0
        await cluster.ask(Unlink(directories[2], b"file"))
        await cluster.wait_idle()
        cluster.check()


async def test_a_directory_tells_its_new_parent_after_a_move() -> None:
    async with cluster_of(3) as cluster:
        directories = [await cluster.mkdir(ROOT_INO, b"%d" % on, on) for on in range(3)]
        await cluster.mkdir(directories[0], b"x", 1)
        inner = await cluster.mkdir(directories[1], b"y", 2)
        await cluster.ask(Rename(directories[1], b"y", directories[0], b"x", 0))
        assert (await cluster.ask(ReadDir(inner, 0, 1))).parent == directories[0]
        assert cluster.attrs(inner).parent == directories[0]
        await cluster.ask(Rename(directories[0], b"x", ROOT_INO, b"2", messages.RENAME_EXCHANGE))
        assert (cluster.attrs(inner).parent, cluster.attrs(directories[2]).parent) == (ROOT_INO, directories[0])
        await cluster.wait_idle()
        cluster.check()


# ── listing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def listing(cluster: Cluster, ino: int, count: int, cookie: int = 0) -> list[Any]:
    """List a directory in pages of ``count``."""
    entries: list[Any] = []
    while True:
        page = await cluster.ask(ReadDir(ino, cookie, count))
        assert len(page.entries) <= count
        entries.extend(page.entries)
        if page.end:
            return entries
        assert page.entries
        cookie = page.entries[-1].cookie


@pytest.mark.parametrize("count", [1, 3, 7, 500, 10**6])
async def test_pages_of_a_listing_make_it_whole(count: int) -> None:
    async with cluster_of(2) as cluster:
        names = [b"%d" % number for number in range(20)]
        inos = [await cluster.create(ROOT_INO, name) for name in names]
        remote = await cluster.mkdir(ROOT_INO, b"remote", 1)
        entries = await listing(cluster, ROOT_INO, count)
        assert [entry.name for entry in entries] == [*names, b"remote"]
        assert [entry.ino for entry in entries] == [*inos, remote]
        assert [entry.attrs for entry in entries] == [*(cluster.attrs(ino) for ino in inos), None]
        assert [entry.kind for entry in entries] == [stat.S_IFREG] * 20 + [stat.S_IFDIR]


async def test_positions_stay_while_entries_come_and_go() -> None:
    async with cluster_of(2) as cluster:
        for name in (b"a", b"b", b"c", b"d"):
            await cluster.create(ROOT_INO, name)
        first = (await cluster.ask(ReadDir(ROOT_INO, 0, 2))).entries
        assert [entry.name for entry in first] == [b"a", b"b"]
        await cluster.ask(Unlink(ROOT_INO, b"b"))
        await cluster.ask(Unlink(ROOT_INO, b"c"))
        await cluster.create(ROOT_INO, b"b")
        await cluster.ask(Rename(ROOT_INO, b"a", ROOT_INO, b"d", 0))
        rest = await listing(cluster, ROOT_INO, 2, first[-1].cookie)
        assert [entry.name for entry in rest] == [b"d", b"b"]
        assert [entry.name for entry in await listing(cluster, ROOT_INO, 2, first[0].cookie)] == [b"d", b"b"]
        cookies = [entry.cookie for entry in await listing(cluster, ROOT_INO, 5)]
        assert cookies == sorted(set(cookies))
        assert cookies[0] >= 3


async def test_a_directory_can_be_emptied_while_it_is_listed() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", 1)
        for number in range(25):
            await cluster.create(directory, b"%d" % number)
        cookie, removed = 0, 0
        while True:
            page = await cluster.ask(ReadDir(directory, cookie, 4))
            for entry in page.entries:
                await cluster.ask(Unlink(directory, entry.name))
                removed += 1
                cookie = entry.cookie
            if page.end:
                break
        assert removed == 25
        assert await refusal(cluster, Rmdir(ROOT_INO, b"dir")) == ""


async def test_a_page_of_long_names_fits_into_a_body() -> None:
    async with cluster_of(1) as cluster:
        for number in range(600):
            await cluster.create(ROOT_INO, b"%0255d" % number)
        page = await cluster.ask(ReadDir(ROOT_INO, 0, 512))
        assert len(encode(page)) <= BODY_MAX
        assert 200 < len(page.entries) < 512
        assert not page.end
        assert len(await listing(cluster, ROOT_INO, 512)) == 600


@pytest.mark.parametrize(("cookie", "count"), [(-1, 10), (0, 0), (0, -5)])
async def test_a_listing_that_makes_no_sense_is_refused(cookie: int, count: int) -> None:
    async with cluster_of(1) as cluster:
        assert await refusal(cluster, ReadDir(ROOT_INO, cookie, count)) == "EINVAL"


# ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_setattr_changes_what_it_names_and_the_ctime() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for request, changed in (
            (SetAttr(ino, mode=0o4751), {"mode": 0o104751}),
            (SetAttr(ino, mode=0o40600), {"mode": 0o100600}),
            (SetAttr(ino, uid=5), {"uid": 5}),
            (SetAttr(ino, gid=6, mode=0o644), {"gid": 6, "mode": 0o100644}),
            (SetAttr(ino, atime_ns=123456789, mtime_ns=-5), {"atime_ns": 123456789, "mtime_ns": -5}),
            (SetAttr(ino, mtime_ns=(1 << 62)), {"mtime_ns": 1 << 62}),
        ):
            before = cluster.attrs(ino)
            after = (await cluster.ask(request)).attrs
            assert after == cluster.attrs(ino)
            assert after.ctime_ns > before.ctime_ns
            expected = {**changed, "ctime_ns": after.ctime_ns, "version": before.version + 1}
            assert {name for name in before.__struct_fields__ if getattr(after, name) != getattr(before, name)} <= set(
                expected
            )
            assert all(getattr(after, name) == value for name, value in expected.items())


async def test_time_now_is_the_daemons_clock() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(SetAttr(ino, atime_ns=1, mtime_ns=2))
        after = (await cluster.ask(SetAttr(ino, atime_ns=TIME_NOW))).attrs
        assert (after.atime_ns, after.mtime_ns) == (after.ctime_ns, 2)
        after = (await cluster.ask(SetAttr(ino, mtime_ns=TIME_NOW))).attrs
        assert after.mtime_ns == after.ctime_ns > after.atime_ns


async def test_setattr_of_nothing_changes_nothing() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        before = cluster.attrs(ino)
        assert (await cluster.ask(SetAttr(ino))).attrs == before == cluster.attrs(ino)


async def test_a_write_makes_mtime_now_even_if_it_was_in_the_future() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(SetAttr(ino, mtime_ns=1 << 62))
        after = (await cluster.ask(CommitWrite(ino, 5, 4096))).attrs
        assert after.mtime_ns == after.ctime_ns < 1 << 62


@pytest.mark.parametrize(
    ("size", "error"), [(-1, "EINVAL"), (FILE_SIZE_MAX + 1, "EFBIG"), (1 << 63, "EFBIG"), (FILE_SIZE_MAX, "")]
)
async def test_sizes_have_a_limit(size: int, error: str) -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        assert await refusal(cluster, SetAttr(ino, size=size)) == error
        assert await refusal(cluster, CommitWrite(ino, size, 0)) == error
        if not error:
            assert cluster.attrs(ino).size == size
            assert await refusal(cluster, Append(ino, 1)) == "EFBIG"
            assert await refusal(cluster, Append(ino, 0)) == ""
        assert await refusal(cluster, Append(ino, -1)) == "EINVAL"


async def test_only_regular_files_have_a_size_to_set() -> None:
    async with cluster_of(1) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir")
        fifo = (await cluster.ask(Make(ROOT_INO, b"fifo", 0o010644, 0, 0))).entry.ino
        link = (await cluster.ask(Make(ROOT_INO, b"link", 0o120777, 0, 0, target=b"x"))).entry.ino
        for ino, error in ((directory, "EISDIR"), (fifo, "EINVAL"), (link, "EINVAL")):
            for request in (SetAttr(ino, size=0), CommitWrite(ino, 1, 1), Append(ino, 1), Open(ino, True)):
                assert await refusal(cluster, request) == error, request
        assert await refusal(cluster, SetAttr(link, mode=0o600)) == "ENOTSUP"
        assert await refusal(cluster, SetAttr(link, uid=5)) == ""
        assert await refusal(cluster, Open(directory, False)) == ""


async def test_published_writes_grow_the_file_and_count_its_space() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for end, delta, size, allocated in ((100, 4096, 100, 4096), (50, 0, 100, 4096), (5000, 4096, 5000, 8192)):
            before = cluster.attrs(ino)
            after = (await cluster.ask(CommitWrite(ino, end, delta))).attrs
            assert (after.size, after.allocated) == (size, allocated)
            assert after.mtime_ns == after.ctime_ns > before.ctime_ns
            assert after.version == before.version + 1
        assert (await cluster.ask(CommitWrite(ino, 0, -(1 << 40)))).attrs.allocated == 0


async def test_what_is_changed_with_published_writes_is_one_change_behind_them() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        before = cluster.attrs(ino)
        change = SetAttr(ino, mode=0o4711, uid=5, atime_ns=3, mtime_ns=7)
        after = (await cluster.ask(CommitWrite(ino, 100, 4096, 0, change))).attrs
        assert (after.size, after.allocated, after.mode & 0o7777, after.uid) == (100, 4096, 0o4711, 5)
        assert (after.atime_ns, after.mtime_ns) == (3, 7) and after.ctime_ns > before.ctime_ns
        assert after.version == before.version + 1
        written = (await cluster.ask(CommitWrite(ino, 200, 0, 0, SetAttr(ino, uid=6)))).attrs
        assert written.mtime_ns == written.ctime_ns > after.ctime_ns and written.atime_ns == 3
        for change in (SetAttr(ino, size=0), SetAttr(ROOT_INO, mode=0)):
            assert await refusal(cluster, CommitWrite(ino, 300, 0, 0, change)) == "EINVAL"
        assert cluster.attrs(ino) == written


async def test_appends_get_ranges_of_their_own() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        offsets: list[int] = []

        async def client(slot: int) -> None:
            for _ in range(10):
                reply = await cluster.ask(Append(ino, 7), slot=slot)
                assert reply.attrs.size >= reply.offset + 7
                offsets.append(reply.offset)

        async with trio.open_nursery() as nursery:
            for slot in range(5):
                nursery.start_soon(client, slot + 1)
        assert sorted(offsets) == list(range(0, 350, 7))
        before = cluster.attrs(ino)
        assert (await cluster.ask(Append(ino, 0))).offset == 350
        assert cluster.attrs(ino) == before


async def test_atime_follows_relatime() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        made = cluster.attrs(ino)
        first = (await cluster.ask(Touch(ino))).attrs
        assert first.atime_ns > made.ctime_ns
        assert (first.ctime_ns, first.mtime_ns, first.version) == (made.ctime_ns, made.mtime_ns, made.version)
        assert (await cluster.ask(Touch(ino))).attrs == first
        await cluster.ask(CommitWrite(ino, 1, 1))
        second = (await cluster.ask(Touch(ino))).attrs
        assert second.atime_ns > first.atime_ns
        cluster.advance(RELATIME_NS - DAY_NS // 100)
        assert (await cluster.ask(Touch(ino))).attrs == second
        cluster.advance(DAY_NS // 100)
        assert (await cluster.ask(Touch(ino))).attrs.atime_ns >= second.atime_ns + RELATIME_NS
        assert cluster.attrs(ino).version == second.version


async def test_names_and_attributes_can_be_made_durable() -> None:
    async with cluster_of(1) as cluster:
        before = cluster.nodes[0].store.syncs
        answer = cluster.serve(cluster.nodes[0], SyncMeta(), lambda store: Called(store, CLIENT, 0, 0))
        await answer.done.wait()
        assert answer.error is None
        assert cluster.nodes[0].store.syncs == before + 1


# ── extended attributes ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_extended_attributes_are_kept_listed_and_removed() -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        values = {
            b"user.a": b"1",
            b"user.b": b"",
            b"trusted.\xff": bytes(range(256)),
            b"security.x": b"y" * XATTR_VALUE_MAX,
        }
        for name, value in values.items():
            before = cluster.attrs(ino)
            after = (await cluster.ask(SetXattr(ino, name, value, 0))).attrs
            assert after.ctime_ns > before.ctime_ns
            assert (after.mtime_ns, after.version) == (before.mtime_ns, before.version + 1)
        assert set((await cluster.ask(ListXattr(ino))).names) == set(values)
        for name, value in values.items():
            assert (await cluster.ask(GetXattr(ino, name))).value == value
        await cluster.ask(SetXattr(ino, b"user.a", b"new", 0))
        assert (await cluster.ask(GetXattr(ino, b"user.a"))).value == b"new"
        cluster.check()
        await cluster.ask(RemoveXattr(ino, b"user.a"))
        assert await refusal(cluster, GetXattr(ino, b"user.a")) == "ENODATA"
        assert await refusal(cluster, RemoveXattr(ino, b"user.a")) == "ENODATA"
        cluster.check()
        await cluster.ask(Unlink(ROOT_INO, b"file"))
        await cluster.wait_idle()
        cluster.check()


async def test_attributes_are_created_or_replaced_as_the_flags_say() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for flags, error in (
            (XATTR_REPLACE, "ENODATA"),
            (4, "EINVAL"),
            (XATTR_CREATE, ""),
            (XATTR_CREATE, "EEXIST"),
            (XATTR_REPLACE, ""),
            (0, ""),
        ):
            assert await refusal(cluster, SetXattr(ino, b"user.a", b"%d" % flags, flags)) == error
        assert (await cluster.ask(GetXattr(ino, b"user.a"))).value == b"0"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"user.", "EINVAL"),
        (b"user.a\0b", "EINVAL"),
        (b"nothing", "ENOTSUP"),
        (b"system.other", "ENOTSUP"),
        (b"system.posix_acl_default", "EINVAL"),
        (b"user.benchfs.layout", "ENOTSUP"),
        (b"user.benchfs.chunk_size", "ENOTSUP"),
        (b"user." + b"x" * 251, "ERANGE"),
        (b"user." + b"x" * 250, ""),
    ],
)
async def test_names_of_attributes_that_a_file_cannot_have(name: bytes, error: str) -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        assert await refusal(cluster, SetXattr(ino, name, b"1", 0)) == error
        cluster.check()


async def test_attributes_have_limits() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        assert await refusal(cluster, SetXattr(ino, b"user.a", bytes(XATTR_VALUE_MAX + 1), 0)) == "E2BIG"
        for number in range(XATTR_LIST_MAX // 256):
            await cluster.ask(SetXattr(ino, b"user.%0250d" % number, b"", 0))
        assert await refusal(cluster, SetXattr(ino, b"user.a", b"", 0)) == "ENOSPC"
        assert await refusal(cluster, SetXattr(ino, b"user.%0250d" % 0, b"again", 0)) == ""
        assert len(encode(await cluster.ask(ListXattr(ino)))) <= BODY_MAX
        cluster.check()


async def test_user_attributes_are_for_files_and_directories() -> None:
    async with cluster_of(1) as cluster:
        link = (await cluster.ask(Make(ROOT_INO, b"link", 0o120777, 0, 0, target=b"x"))).entry.ino
        assert await refusal(cluster, SetXattr(link, b"user.a", b"", 0)) == "EPERM"
        assert await refusal(cluster, GetXattr(link, b"user.a")) == "ENODATA"
        assert await refusal(cluster, SetXattr(link, b"trusted.a", b"", 0)) == ""
        assert await refusal(cluster, SetXattr(link, b"system.posix_acl_access", b"", 0)) == "ENOTSUP"
        assert await refusal(cluster, SetXattr(ROOT_INO, b"user.a", b"", 0)) == ""
        cluster.check()
        await cluster.ask(Unlink(ROOT_INO, b"link"))
        cluster.check()


async def test_attributes_that_there_are_none_of() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for name, error in (
            (b"security.capability", "ENODATA"),
            (b"system.posix_acl_access", "ENODATA"),
            (b"system.posix_acl_default", "ENODATA"),
            (b"user.benchfs.unknown", "ENODATA"),
            (b"unknown.a", "ENOTSUP"),
        ):
            assert await refusal(cluster, GetXattr(ino, name)) == error
        for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
            assert await refusal(cluster, RemoveXattr(ino, name)) == ""
        assert await refusal(cluster, RemoveXattr(ino, b"user.benchfs.chunk_size")) == "ENOTSUP"
        assert (await cluster.ask(ListXattr(ino))).names == ()


ACL = [
    AclEntry(acl.USER_OBJ, 6),
    AclEntry(acl.USER, 7, 1000),
    AclEntry(acl.GROUP_OBJ, 4),
    AclEntry(acl.MASK, 5),
    AclEntry(acl.OTHER, 1),
]
ACCESS = b"system.posix_acl_access"


async def test_an_access_acl_goes_with_the_permission_bits() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(SetAttr(ino, mode=0o4644))
        attrs = (await cluster.ask(SetXattr(ino, ACCESS, acl.encode(ACL), 0))).attrs
        assert attrs.mode == 0o104651
        assert acl.decode((await cluster.ask(GetXattr(ino, ACCESS))).value) == ACL
        assert (await cluster.ask(ListXattr(ino))).names == (ACCESS,)
        await cluster.ask(SetAttr(ino, mode=0o720))
        changed = acl.decode((await cluster.ask(GetXattr(ino, ACCESS))).value)
        assert changed == acl.with_mode(ACL, 0o720)
        cluster.check()
        minimal = [AclEntry(acl.USER_OBJ, 6), AclEntry(acl.GROUP_OBJ, 4), AclEntry(acl.OTHER, 4)]
        attrs = (await cluster.ask(SetXattr(ino, ACCESS, acl.encode(minimal), 0))).attrs
        assert attrs.mode == 0o100644
        assert await refusal(cluster, GetXattr(ino, ACCESS)) == "ENODATA"
        cluster.check()


@pytest.mark.parametrize("way", ["remove", "empty", "no entries"])
async def test_an_access_acl_can_be_removed(way: str) -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(SetXattr(ino, ACCESS, acl.encode(ACL), 0))
        if way == "remove":
            attrs = (await cluster.ask(RemoveXattr(ino, ACCESS))).attrs
        else:
            attrs = (await cluster.ask(SetXattr(ino, ACCESS, b"" if way == "empty" else acl.encode([]), 0))).attrs
        assert attrs.mode == 0o100651
        assert await refusal(cluster, GetXattr(ino, ACCESS)) == "ENODATA"
        cluster.check()


async def test_what_is_no_acl_changes_nothing() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        before = cluster.contents()
        assert await refusal(cluster, SetXattr(ino, ACCESS, acl.encode(ACL[1:]), 0)) == "EINVAL"
        assert await refusal(cluster, SetXattr(ino, ACCESS, b"\1\0\0\0", 0)) == "ENOTSUP"
        assert cluster.contents() == before


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (b"65536", CHUNK_SIZE_MIN),
        (b"64K", CHUNK_SIZE_MIN),
        (b"1M", 1 << 20),
        (b" 8M\n", 8 << 20),
        (b"1024M", CHUNK_SIZE_MAX),
        (b"32K", 0),
        (b"2048M", 0),
        (b"100000", 0),
        (b"3M", 0),
        (b"", 0),
        (b"M", 0),
        (b"1m", 0),
        (b"0x100000", 0),
        (b"-65536", 0),
        (b"9" * 30, 0),
    ],
)
async def test_the_chunk_size_of_a_directory_is_what_new_files_get(value: bytes, size: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", 1)
        old = await cluster.create(directory, b"old")
        name = b"user.benchfs.chunk_size"
        assert await refusal(cluster, SetXattr(directory, name, value, 0)) == ("" if size else "EINVAL")
        size = size or CHUNK_SIZE_DEFAULT
        new = await cluster.create(directory, b"new")
        below = await cluster.mkdir(directory, b"below", 0)
        for ino, chunk_size in ((directory, size), (new, size), (below, size), (old, CHUNK_SIZE_DEFAULT)):
            assert cluster.attrs(ino).chunk_size == chunk_size
            assert (await cluster.ask(GetXattr(ino, name))).value == b"%d" % chunk_size
        assert (await cluster.ask(ListXattr(directory))).names == ()
        assert await refusal(cluster, SetXattr(directory, name, b"1M", XATTR_CREATE)) == "EEXIST"


# ── open files without a name ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", [0, 1])
async def test_an_open_file_outlives_its_last_name(on: int) -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", on)
        ino = await cluster.create(directory, b"file")
        await cluster.write(ino, 3 * CHUNK_SIZE_DEFAULT)
        await cluster.ask(SetXattr(ino, b"user.a", b"1", 0))
        await cluster.ask(Rename(directory, b"file", ROOT_INO, b"moved", 0))
        await cluster.ask(Open(ino, False))
        await cluster.ask(Open(ino, True), OTHER_CLIENT)
        await cluster.ask(Unlink(ROOT_INO, b"moved"))
        for _ in range(2):
            attrs = (await cluster.ask(GetAttr(ino))).attrs
            assert (attrs.nlink, attrs.size) == (0, 3 * CHUNK_SIZE_DEFAULT)
            assert (await cluster.ask(CommitWrite(ino, 5, 0))).attrs.nlink == 0
            assert (await cluster.ask(GetXattr(ino, b"user.a"))).value == b"1"
            assert await refusal(cluster, Link(ino, ROOT_INO, b"again")) == "ENOENT"
            assert cluster.chunks_of(ino) == {0, 1, 2}
            assert cluster.home(ino).service.orphans == 1
            await cluster.wait_idle()
            cluster.check()
            cluster.home(ino).die()
            await cluster.wait_idle()
        await cluster.ask(Release(ino, 1, 0))
        assert (await cluster.ask(GetAttr(ino))).attrs.nlink == 0
        await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
        assert await refusal(cluster, GetAttr(ino)) == "ESTALE"
        await cluster.wait_idle()
        assert cluster.chunks_of(ino) == set()
        cluster.check()


async def test_an_open_directory_outlives_its_name_empty() -> None:
    async with cluster_of(2) as cluster:
        directory = await cluster.mkdir(ROOT_INO, b"dir", 1)
        await cluster.ask(Open(directory, False))
        await cluster.ask(Rmdir(ROOT_INO, b"dir"))
        page = await cluster.ask(ReadDir(directory, 0, 10))
        assert (page.entries, page.end) == ((), True)
        assert (await cluster.ask(GetAttr(directory))).attrs.nlink == 0
        for request in (
            Lookup(directory, b"x"),
            Make(directory, b"x", 0o100644, 0, 0),
            Make(directory, b"x", 0o40755, 0, 0),
            Unlink(directory, b"x"),
        ):
            assert await refusal(cluster, request) == "ENOENT", request
        await cluster.ask(Release(directory, 1, 0))
        assert await refusal(cluster, GetAttr(directory)) == "ESTALE"
        cluster.check()


async def test_while_sessions_may_reclaim_nothing_is_taken_for_closed() -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 10)
        node = cluster.home(ino)
        node.handles.grace = True
        await cluster.ask(Unlink(ROOT_INO, b"file"))
        node.die()
        await cluster.wait_idle()
        assert (await cluster.ask(GetAttr(ino))).attrs.nlink == 0
        node.handles.grace = False
        node.service.grace_ended()
        await cluster.wait_idle()
        assert await refusal(cluster, GetAttr(ino)) == "ESTALE"
        cluster.check()


async def test_many_dead_files_are_dropped_page_by_page() -> None:
    async with cluster_of(2) as cluster:
        released = trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            await released.wait()

        for number in range(1300):
            await cluster.write(await cluster.create(ROOT_INO, b"%d" % number), 10)
        cluster.gate = gate
        cluster.messages.clear()
        for number in range(1300):
            await cluster.ask(Unlink(ROOT_INO, b"%d" % number))
        assert cluster.nodes[0].service.to_drop == 1300
        released.set()
        await cluster.wait_idle()
        cluster.check()
        # The first by itself, at one daemon; then, when it was there, a page at both; and the rest.
        assert cluster.messages == {"DropChunks": 1 + 2 * 3}


async def test_what_was_to_be_dropped_is_dropped_after_a_crash() -> None:
    async with cluster_of(2) as cluster:
        for number in range(700):
            await cluster.write(await cluster.create(ROOT_INO, b"%d" % number), 10)
        open_ = await cluster.lookup(ROOT_INO, b"5")
        await cluster.ask(Open(open_, False))

        async def gate(source: int, target: int, request: Request) -> None:
            await trio.sleep_forever()

        cluster.gate = gate
        for number in range(700):
            await cluster.ask(Unlink(ROOT_INO, b"%d" % number))
        cluster.gate = None
        cluster.nodes[0].die()
        await cluster.wait_idle()
        assert cluster.nodes[0].service.orphans == 1
        assert sum(len(node.chunks) for node in cluster.nodes) == 1
        cluster.check()


async def test_a_daemon_says_what_it_finishes_after_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, services.__name__)
    async with cluster_of(2) as cluster:
        cut, *removed = [await cluster.create(ROOT_INO, b"%d" % number) for number in range(5)]
        for ino in (cut, *removed):
            await cluster.write(ino, 6 * CHUNK)
        unnamed = await cluster.create(ROOT_INO, b"unnamed")
        await cluster.ask(Open(unnamed, False))
        node = cluster.nodes[0]
        node.die()
        await cluster.wait_idle()
        assert caplog.messages == []

        async def gate(source: int, target: int, request: Request) -> None:
            await trio.sleep_forever()

        cluster.gate = gate
        await cluster.ask(Unlink(ROOT_INO, b"unnamed"))
        for number in range(1, 5):
            await cluster.ask(Unlink(ROOT_INO, b"%d" % number))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.ask, SetAttr(cut, size=1))
            await wait_all_tasks_blocked()
            cluster.gate = None
            node.handles.held.clear()
            node.die()
        await cluster.wait_idle()
        cluster.check()
        assert sorted(caplog.messages) == [
            "files that were removed before this start: the space of 4 is being given back",
            "files without a name that nobody has open any more: 1 removed",
            "truncations that were under way before this start: 1 finished",
        ]
        caplog.clear()
        node.die()
        await cluster.wait_idle()
        assert caplog.messages == []


async def test_no_file_is_dropped_on_two_pages_at_once() -> None:
    async with cluster_of(2) as cluster:
        released = trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            await released.wait()

        for number in range(1200):
            await cluster.write(await cluster.create(ROOT_INO, b"%d" % number), 10)
        cluster.gate = gate
        # The first page holds 600 alone; the second begins behind it and goes round; the third meets it.
        for number in (600, *range(600), *range(601, 1200)):
            await cluster.ask(Unlink(ROOT_INO, b"%d" % number))
        released.set()
        await cluster.wait_idle()
        assert cluster.nodes[0].service.to_drop == 0
        cluster.check()


async def test_a_burial_that_fails_is_tried_again(autojump_clock: MockClock) -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(Open(ino, False))
        await cluster.write(ino, 10)
        await cluster.ask(Unlink(ROOT_INO, b"file"))
        node = cluster.nodes[0]
        first = node.store.writes + 1

        def fail(number: int) -> None:
            if first < number < first + 4:
                raise NoSpace("the test says so")

        node.store.before_write = fail
        assert await refusal(cluster, Release(ino, 1, 0)) == ""
        await cluster.wait_idle()
        assert node.store.writes > first + 4
        cluster.check()


async def test_a_dead_daemon_holds_up_the_space_of_others_no_further_than_some_pages(autojump_clock: MockClock) -> None:
    async with cluster_of(2) as cluster:
        released = trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            if target == 1 and isinstance(request, DropChunks):
                await released.wait()

        cluster.gate = gate
        for number in range(1200):
            await cluster.write(await cluster.create(ROOT_INO, b"%d" % number), 10)
        for number in range(1200):
            await cluster.ask(Unlink(ROOT_INO, b"%d" % number))
        await trio.sleep(1)
        assert 0 < len(cluster.nodes[0].chunks) < 512
        assert len(cluster.nodes[1].chunks) > 512
        released.set()
        await cluster.wait_idle()
        cluster.check()


# ── truncation ───────────────────────────────────────────────────────────────────────────────────────────────────────

CHUNK = CHUNK_SIZE_DEFAULT


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (0, {}),
        (1, {0: 1}),
        (CHUNK - 1, {0: CHUNK - 1}),
        (CHUNK, {0: CHUNK}),
        (2 * CHUNK + 5, {0: CHUNK, 1: CHUNK, 2: 5}),
        (5 * CHUNK - 1, {0: CHUNK, 1: CHUNK, 2: CHUNK, 3: CHUNK, 4: CHUNK - 1}),
    ],
)
async def test_a_truncation_drops_what_lies_behind_on_every_daemon(size: int, left: dict[int, int]) -> None:
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 5 * CHUNK)
        other = await cluster.create(ROOT_INO, b"other")
        await cluster.write(other, 2 * CHUNK)
        before = cluster.attrs(ino)
        after = (await cluster.ask(SetAttr(ino, size=size, mode=0o600))).attrs
        assert (after.size, after.allocated, after.mode) == (size, size, 0o100600)
        assert after.mtime_ns == after.ctime_ns > before.ctime_ns
        assert after.version > before.version
        chunks = {index: length for node in cluster.nodes for (of, index), length in node.chunks.items() if of == ino}
        assert chunks == left
        assert cluster.chunks_of(other) == {0, 1}
        cluster.check()


async def test_only_daemons_with_chunks_of_the_file_are_asked() -> None:
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 10)
        cluster.messages.clear()
        await cluster.ask(SetAttr(ino, size=5))
        assert cluster.messages == {"TrimChunks": 1}
        await cluster.write(ino, 20 * CHUNK)
        cluster.messages.clear()
        await cluster.ask(SetAttr(ino, size=0))
        assert cluster.messages == {"TrimChunks": 3}


async def test_extending_and_keeping_the_size_touch_no_chunk() -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 10)
        cluster.messages.clear()
        grown = (await cluster.ask(SetAttr(ino, size=1 << 40))).attrs
        assert (grown.size, grown.allocated) == (1 << 40, 10)
        assert grown.mtime_ns == grown.ctime_ns
        assert (await cluster.ask(SetAttr(ino, size=1 << 40))).attrs == grown
        given_ = (await cluster.ask(SetAttr(ino, size=1 << 40, mtime_ns=77))).attrs
        assert (given_.mtime_ns, given_.size) == (77, 1 << 40)
        assert not cluster.messages


async def test_what_would_publish_data_waits_for_a_truncation_and_nothing_else_does() -> None:
    async with cluster_of(2) as cluster, trio.open_nursery() as nursery:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 3 * CHUNK)
        reached, released = trio.Event(), trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            if isinstance(request, TrimChunks):
                reached.set()
                await released.wait()

        cluster.gate = gate
        done: list[str] = []

        async def ask(slot: int, request: Request) -> None:
            await cluster.ask(request, slot=slot)
            done.append(type(request).__name__)

        nursery.start_soon(ask, 1, SetAttr(ino, size=0))
        await reached.wait()
        for slot, request in enumerate(
            (
                CommitWrite(ino, 10, 10),
                Append(ino, 5),
                Open(ino, True),
                SetAttr(ino, size=1),
                SetAttr(ino, size=1 << 30),
            )
        ):
            nursery.start_soon(ask, slot + 2, request)
        await wait_all_tasks_blocked()
        assert done == []
        assert (await cluster.ask(GetAttr(ino))).attrs.size == 0
        await cluster.ask(SetAttr(ino, mode=0o600))
        await cluster.ask(Open(ino, False))
        await cluster.ask(Rename(ROOT_INO, b"file", ROOT_INO, b"renamed", 0))
        assert await cluster.names(ROOT_INO) == [b"renamed"]
        released.set()
        await wait_all_tasks_blocked()
        assert sorted(done) == ["Append", "CommitWrite", "Open", "SetAttr", "SetAttr", "SetAttr"]
        await cluster.wait_idle()
        cluster.check()


async def test_a_file_can_be_removed_while_it_is_truncated() -> None:
    async with cluster_of(2) as cluster, trio.open_nursery() as nursery:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 3 * CHUNK)
        reached, released = trio.Event(), trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            if isinstance(request, TrimChunks):
                reached.set()
                await released.wait()

        cluster.gate = gate
        errors: list[str] = []

        async def truncate() -> None:
            errors.append(await refusal(cluster, SetAttr(ino, size=0)))

        nursery.start_soon(truncate)
        await reached.wait()
        await cluster.ask(Unlink(ROOT_INO, b"file"), OTHER_CLIENT)
        released.set()
        await wait_all_tasks_blocked()
        assert errors == ["ESTALE"]
        await cluster.wait_idle()
        cluster.check()


@pytest.mark.parametrize("patient", [True, False])
async def test_a_crash_anywhere_in_a_truncation_leaves_it_undone_or_done(patient: bool) -> None:
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 7 * CHUNK)
        cluster.check()
        contents = cluster.contents()

    async def truncate(dies_at: tuple[int, int] | None) -> list[tuple[str, tuple[int, ...]]]:
        async with cluster_of(3, contents=contents) as cluster:

            async def gate(source: int, target: int, request: Request) -> None:
                cutting = isinstance(request, TrimChunks)
                assert not cutting or cluster.attrs(ino).size == CHUNK + 5, "somebody can see that it is half done"

            cluster.gate = gate
            cluster.count_points(dies_at)
            with trio.move_on_after(100):
                await cluster.ask_once(SetAttr(ino, size=CHUNK + 5), patient)
            await cluster.wait_idle()
            cluster.check()
            attrs = cluster.attrs(ino)
            if patient or attrs.size != 7 * CHUNK:
                assert (attrs.size, attrs.allocated) == (CHUNK + 5, CHUNK + 5)
                assert cluster.chunks_of(ino) == {0, 1}
            else:
                assert cluster.chunks_of(ino) == set(range(7))
            await cluster.ask(CommitWrite(ino, 1, 1))
            return cluster.points

    points = await truncate(None)
    assert len(points) > 6
    for number, (_, daemons) in enumerate(points):
        for daemon in daemons:
            await truncate((number, daemon))


async def test_a_daemon_that_cannot_trim_fails_the_client_at_once_and_is_asked_again(autojump_clock: MockClock) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 6 * CHUNK)
        failures = 3

        async def gate(source: int, target: int, request: Request) -> None:
            nonlocal failures
            if isinstance(request, TrimChunks) and target == 1 and failures:
                failures -= 1
                raise StorageError("the test says so")

        cluster.gate = gate
        assert await refusal(cluster, SetAttr(ino, size=0)) == "EIO"
        assert failures == 2
        # Until it is done nothing may be published, and then it is done.
        assert (await cluster.ask(CommitWrite(ino, 5, 5))).attrs.size == 5
        assert failures == 0
        await cluster.wait_idle()
        cluster.check()


async def test_a_store_that_fails_at_the_end_of_a_truncation_fails_the_client_at_once(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 6 * CHUNK)
        writes = 0

        def fail(number: int) -> None:
            nonlocal writes
            writes += 1
            if 2 <= writes < 10:
                raise StorageError("the test says so")

        cluster.home(ino).store.before_write = fail
        assert await refusal(cluster, SetAttr(ino, size=0)) == "EIO"
        assert writes == 2
        assert (await cluster.ask(CommitWrite(ino, 5, 5))).attrs.size == 5
        assert writes > 10
        await cluster.wait_idle()
        cluster.check()


async def test_a_truncation_leaves_no_reach_and_shows_more_space_as_a_change() -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        for index in range(3):
            cluster.write_chunk(cluster.attrs(ino), index, CHUNK)
        await cluster.ask(CommitWrite(ino, 3 * CHUNK, 10))  # counts less than there is
        during = []

        async def gate(source: int, target: int, request: Request) -> None:
            if isinstance(request, TrimChunks):
                during.append(cluster.attrs(ino))

        cluster.gate = gate
        done = (await cluster.ask(SetAttr(ino, size=CHUNK))).attrs
        assert (during[0].size, during[0].allocated, done.allocated) == (CHUNK, 10, CHUNK)
        assert done.version > during[0].version
        inode = cluster.inode(ino)
        assert inode is not None and inode.reach == 0


async def test_a_truncation_whose_client_went_away_is_finished() -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.write(ino, 6 * CHUNK)
        reached, released = trio.Event(), trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            if isinstance(request, TrimChunks):
                reached.set()
                await released.wait()

        cluster.gate = gate
        answer = cluster.serve(cluster.home(ino), SetAttr(ino, size=5), lambda store: Called(store, OTHER_CLIENT, 1, 1))
        await reached.wait()
        answer.scope.cancel()
        await wait_all_tasks_blocked()
        released.set()
        await cluster.wait_idle()
        cluster.check()
        assert cluster.attrs(ino).size == 5


# ── sessions that end ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_clean_end_releases_everything() -> None:
    async with cluster_of(2) as cluster:
        file = await cluster.create(ROOT_INO, b"file")
        gone = await cluster.create(ROOT_INO, b"gone")
        for ino in (file, gone):
            await cluster.ask(Open(ino, True))
            await cluster.write(ino, 10)
        await cluster.ask(Unlink(ROOT_INO, b"gone"))
        cluster.messages.clear()
        opens = [OpenCount(file, 0, 1), OpenCount(gone, 0, 1), OpenCount(gone + 1000, 1, 1)]
        await cluster.nodes[0].service.session_ended(CLIENT, opens, True)
        await cluster.wait_idle()
        assert cluster.messages == {"DropChunks": 1}
        assert not cluster.nodes[0].handles.count(file)
        assert await refusal(cluster, GetAttr(gone)) == "ESTALE"
        cluster.check()


async def test_what_a_dead_client_wrote_and_did_not_publish_never_appears() -> None:
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        reader = await cluster.create(ROOT_INO, b"reader")
        await cluster.ask(Open(ino, True))
        await cluster.ask(Open(reader, False))
        await cluster.write(ino, CHUNK + 10)
        cluster.write_chunk(cluster.attrs(ino), 1, CHUNK)
        for index in (2, 50, 1000):
            cluster.write_chunk(cluster.attrs(ino), index, 77)
        cluster.messages.clear()
        opens = [OpenCount(ino, 0, 1), OpenCount(reader, 1, 0), OpenCount(ino + 1000, 0, 1)]
        await cluster.nodes[0].service.session_ended(CLIENT, opens, False)
        await cluster.wait_idle()
        assert cluster.chunks_of(ino) == {0, 1}
        assert cluster.messages == {"TrimChunks": 3}
        attrs = cluster.attrs(ino)
        assert (attrs.size, attrs.allocated) == (CHUNK + 10, CHUNK + 10)
        cluster.check()


async def test_a_doubtful_file_is_settled_when_the_last_handle_goes() -> None:
    """Others who have it open may have written what they have not yet published: that must not be cut."""
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(Open(ino, True))
        await cluster.ask(Open(ino, True), OTHER_CLIENT)
        cluster.write_chunk(cluster.attrs(ino), 3, 5)
        await cluster.ask(Release(ino, 0, 1, True))
        await cluster.wait_idle()
        cluster.write_chunk(cluster.attrs(ino), 0, 10)
        for _ in range(2):
            assert cluster.chunks_of(ino) == {0, 3}
            cluster.home(ino).die()
            await cluster.wait_idle()
        await cluster.ask(CommitWrite(ino, 10, 10), OTHER_CLIENT)
        await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
        await cluster.wait_idle()
        assert cluster.chunks_of(ino) == {0}
        assert (cluster.attrs(ino).size, cluster.attrs(ino).allocated) == (10, 10)
        cluster.check()


@pytest.mark.parametrize("way", ["truncated", "removed", "removed while open"])
async def test_a_doubtful_file_loses_its_doubts_with_its_end(way: str) -> None:
    async with cluster_of(3) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(Open(ino, True))
        await cluster.ask(Open(ino, True), OTHER_CLIENT)
        await cluster.write(ino, 10)
        for index in (7, 8, 9, 10):
            cluster.write_chunk(cluster.attrs(ino), index, 5)
        await cluster.ask(Release(ino, 0, 1, True))
        if way == "truncated":
            attrs = (await cluster.ask(SetAttr(ino, size=2), OTHER_CLIENT)).attrs
            assert (attrs.size, attrs.allocated) == (2, 2)
            assert cluster.chunks_of(ino) == {0}
            cluster.messages.clear()
            await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
            await cluster.wait_idle()
            assert not cluster.messages
        elif way == "removed":
            await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
            await cluster.ask(Unlink(ROOT_INO, b"file"))
        else:
            await cluster.ask(Unlink(ROOT_INO, b"file"))
            cluster.home(ino).die()
            await cluster.wait_idle()
            await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
        await cluster.wait_idle()
        if way != "truncated":
            assert cluster.chunks_of(ino) == set()
        cluster.check()


async def test_the_end_of_a_session_waits_for_a_truncation_of_its_file() -> None:
    async with cluster_of(2) as cluster, trio.open_nursery() as nursery:
        ino = await cluster.create(ROOT_INO, b"file")
        other = await cluster.create(ROOT_INO, b"other")
        for one in (ino, other):
            await cluster.ask(Open(one, True))
            await cluster.write(one, 3 * CHUNK)
        reached, released = trio.Event(), trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            if isinstance(request, TrimChunks) and request.ino == ino:
                reached.set()
                await released.wait()

        cluster.gate = gate
        nursery.start_soon(cluster.ask, SetAttr(ino, size=CHUNK))
        await reached.wait()
        cluster.write_chunk(cluster.attrs(ino), 60, 5)
        opens = [OpenCount(ino, 0, 1), OpenCount(other, 0, 1)]
        nursery.start_soon(cluster.nodes[0].service.session_ended, CLIENT, opens, False)
        await wait_all_tasks_blocked()
        assert cluster.home(ino).handles.count(ino)
        assert not cluster.home(other).handles.count(other)
        released.set()
        await wait_all_tasks_blocked()
        await cluster.wait_idle()
        assert not cluster.home(ino).handles.count(ino)
        assert cluster.chunks_of(ino) == {0}
        cluster.check()


async def test_a_doubtful_file_whose_truncation_crashed_is_trimmed_everywhere() -> None:
    async with cluster_of(3) as cluster, trio.open_nursery() as nursery:
        ino = await cluster.create(ROOT_INO, b"file")
        await cluster.ask(Open(ino, True))
        await cluster.ask(Open(ino, True), OTHER_CLIENT)
        await cluster.write(ino, 10)
        for index in (7, 8, 9, 10):
            cluster.write_chunk(cluster.attrs(ino), index, 5)
        await cluster.ask(Release(ino, 0, 1, True))
        reached = trio.Event()

        async def gate(source: int, target: int, request: Request) -> None:
            reached.set()
            await trio.sleep_forever()

        cluster.gate = gate
        nursery.start_soon(cluster.ask_once, SetAttr(ino, size=2), False)
        await reached.wait()
        cluster.gate = None
        cluster.home(ino).die()
        await cluster.wait_idle()
        assert cluster.attrs(ino).size == 2
        assert cluster.chunks_of(ino) == {0}
        # Whoever has it open for writing may still publish what was cut off.
        await cluster.ask(CommitWrite(ino, 0, 7), OTHER_CLIENT)
        await cluster.ask(Release(ino, 0, 1), OTHER_CLIENT)
        await cluster.wait_idle()
        assert cluster.attrs(ino).allocated == 2
        cluster.check()


async def test_a_file_removed_while_its_dead_writer_is_dealt_with_leaves_no_chunks() -> None:
    """A session may have a million files open; the last of them is doubtful from the first moment on."""
    async with cluster_of(3) as cluster:
        inos = [await cluster.create(ROOT_INO, b"%d" % number) for number in range(3)]
        for index in range(20):
            cluster.write_chunk(cluster.attrs(inos[-1]), index, 5)
        node = cluster.nodes[0]

        def remove_the_last(number: int) -> None:
            node.store.after_write = None
            request = Unlink(ROOT_INO, b"2")
            node.service.handlers_now()[Unlink](request, Called(node.store, OTHER_CLIENT, 1, 1))

        node.store.after_write = remove_the_last
        await node.service.session_ended(CLIENT, [OpenCount(ino, 0, 1) for ino in inos], False)
        await cluster.wait_idle()
        assert cluster.chunks_of(inos[-1]) == set()
        assert await cluster.names(ROOT_INO) == [b"0", b"1"]
        cluster.check()


# ── how it is offered ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_request_on_names_and_attributes_is_served() -> None:
    async with cluster_of(1) as cluster:
        service = cluster.nodes[0].service
        expected = {cls for op, cls in messages.REQUESTS.items() if 16 <= op < 40}
        expected |= {messages.Prepare, messages.Finish, messages.Secure, messages.InDoubt}
        assert service.handlers().keys() == service.handlers_now().keys() == expected


async def test_what_answers_at_once_does_so_without_a_task() -> None:
    async with cluster_of(1) as cluster:
        now = cluster.nodes[0].service.handlers_now()

        def at_once(request: Request) -> Any:
            return now[type(request)](request, Called(cluster.nodes[0].store, CLIENT, 0, 0))

        ino = at_once(Make(ROOT_INO, b"file", 0o100644, 0, 0)).entry.ino
        directory = at_once(Make(ROOT_INO, b"dir", 0o40755, 0, 0)).entry.ino
        for request in (
            Lookup(ROOT_INO, b"file"),
            GetAttr(ino),
            Open(ino, True),
            CommitWrite(ino, 10, 10),
            Append(ino, 10),
            SetAttr(ino, size=100),
            ReadDir(ROOT_INO, 0, 10),
            SetXattr(ino, b"user.a", b"", 0),
            GetXattr(ino, b"user.a"),
            Rename(ROOT_INO, b"file", directory, b"file", 0),
            Link(ino, ROOT_INO, b"link"),
            Unlink(ROOT_INO, b"link"),
            Release(ino, 0, 1),
        ):
            assert at_once(request) is not None, request
        assert at_once(SetAttr(ino, size=5)) is None
        assert at_once(Rename(ROOT_INO, b"dir", ROOT_INO, b"dir2", 0)) is not None
        cluster.check()
