"""Default ACLs: who may have one, what is inherited from it and where, and what umask and set-group-ID do beside it."""

import errno
import stat
from typing import NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cluster import Cluster, cluster_of
from t0_acl import acls, created
from whole import whole_cluster

from benchfs_fuse import acl
from benchfs_fuse.acl import AclEntry
from benchfs_fuse.errors import Exists, FsError, NoAttribute
from benchfs_fuse.limits import BODY_MAX, XATTR_VALUE_MAX
from benchfs_fuse.model import ROOT_INO
from benchfs_fuse.rpc.messages import (
    XATTR_CREATE,
    XATTR_REPLACE,
    GetXattr,
    ListXattr,
    Make,
    NewInode,
    RemoveXattr,
    Request,
    SetAttr,
    SetXattr,
    encode,
)

NAMED = [
    AclEntry(acl.USER_OBJ, 7),
    AclEntry(acl.USER, 6, 1000),
    AclEntry(acl.GROUP_OBJ, 5),
    AclEntry(acl.MASK, 7),
    AclEntry(acl.OTHER, 1),
]
MINIMAL = [AclEntry(acl.USER_OBJ, 7), AclEntry(acl.GROUP_OBJ, 5), AclEntry(acl.OTHER, 1)]


async def refusal(cluster: Cluster, request: Request) -> str:
    """Return the name of the errno that a request fails with, "" if it succeeds."""
    try:
        await cluster.ask(request)
    except FsError as error:
        return errno.errorcode[error.errno]
    return ""


async def acl_of(cluster: Cluster, ino: int, name: bytes) -> list[AclEntry] | None:
    try:
        return list(acl.decode((await cluster.ask(GetXattr(ino, name))).value))
    except NoAttribute:
        return None


async def set_default(cluster: Cluster, ino: int, entries: list[AclEntry]) -> None:
    await cluster.ask(SetXattr(ino, acl.DEFAULT, acl.encode(entries), 0))


async def make(cluster: Cluster, parent: int, name: bytes, mode: int, umask: int = 0, gid: int = 8) -> int:
    target = b"x" if stat.S_ISLNK(mode) else b""
    ino: int = (await cluster.ask(Make(parent, name, mode, 7, gid, target=target, umask=umask))).entry.ino
    return ino


# ── the attribute ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("entries", [NAMED, MINIMAL])
async def test_a_default_acl_is_kept_shown_replaced_and_removed(entries: list[AclEntry]) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.mkdir(ROOT_INO, b"dir")
        before = cluster.attrs(ino)
        await set_default(cluster, ino, entries)
        after = cluster.attrs(ino)
        assert (after.mode, after.version) == (before.mode, before.version + 1)
        assert await acl_of(cluster, ino, acl.DEFAULT) == entries
        assert await acl_of(cluster, ino, acl.ACCESS) is None
        assert (await cluster.ask(ListXattr(ino))).names == (acl.DEFAULT,)
        cluster.check()
        await set_default(cluster, ino, MINIMAL)
        await cluster.ask(SetAttr(ino, mode=0o700))
        assert await acl_of(cluster, ino, acl.DEFAULT) == MINIMAL
        for _ in range(2):
            await cluster.ask(RemoveXattr(ino, acl.DEFAULT))
            assert await acl_of(cluster, ino, acl.DEFAULT) is None
        assert (await cluster.ask(ListXattr(ino))).names == ()
        cluster.check()


@pytest.mark.parametrize("nothing", [b"", acl.encode([])])
async def test_an_empty_default_acl_is_none(nothing: bytes) -> None:
    async with cluster_of(1) as cluster:
        ino = await cluster.mkdir(ROOT_INO, b"dir")
        await set_default(cluster, ino, NAMED)
        await cluster.ask(SetXattr(ino, acl.DEFAULT, nothing, 0))
        assert await acl_of(cluster, ino, acl.DEFAULT) is None
        cluster.check()


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        (stat.S_IFDIR, b"x", "EINVAL"),
        (stat.S_IFDIR, acl.encode(NAMED[1:]), "EINVAL"),
        (stat.S_IFDIR, acl.encode(NAMED)[:-1], "EINVAL"),
        (stat.S_IFDIR, b"\1\0\0\0", "ENOTSUP"),
        (stat.S_IFREG, acl.encode(NAMED), "EACCES"),
        (stat.S_IFIFO, acl.encode(NAMED), "EACCES"),
        (stat.S_IFREG, b"", ""),
        (stat.S_IFLNK, acl.encode(NAMED), "ENOTSUP"),
    ],
)
async def test_what_is_refused_as_a_default_acl(kind: int, value: bytes, error: str) -> None:
    async with cluster_of(1) as cluster:
        ino = await make(cluster, ROOT_INO, b"x", kind | 0o755)
        assert await refusal(cluster, SetXattr(ino, acl.DEFAULT, value, 0)) == error
        assert (await cluster.ask(ListXattr(ino))).names == ()
        cluster.check()


async def test_flags_mean_nothing_for_acls() -> None:
    """As on Linux, where do_setxattr() of fs/xattr.c does not hand them on."""
    async with cluster_of(1) as cluster:
        ino = await cluster.mkdir(ROOT_INO, b"dir")
        for name in (acl.ACCESS, acl.DEFAULT):
            for flags in (XATTR_REPLACE, XATTR_CREATE, XATTR_CREATE):
                assert await refusal(cluster, SetXattr(ino, name, acl.encode(NAMED), flags)) == ""


# ── inheritance ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    """Say what is made where: ``default`` is the parent's default ACL."""

    default: list[AclEntry] | None
    setgid: bool
    kind: int
    mode: int
    umask: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        draw(st.none() | acls()),
        draw(st.booleans()),
        draw(st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR])),
        draw(st.integers(0, 0o7777)),
        draw(st.integers(0, 0o777)),
    )


async def check_case(cluster: Cluster, parent: int, name: bytes, case: Case) -> int:
    """Make an inode and compare it with what the kernel's rules give."""
    ino = await make(cluster, parent, name, case.kind | case.mode, case.umask)
    expected_mode, access = case.mode, None
    if case.kind != stat.S_IFLNK:
        if case.default is None:
            expected_mode = case.mode & ~case.umask
        else:
            access, expected_mode, kept = created(case.default, case.mode)
            access = access if kept else None
    directory = case.kind == stat.S_IFDIR
    if directory and case.setgid:
        expected_mode |= stat.S_ISGID
    attrs = cluster.attrs(ino)
    assert (attrs.mode, attrs.gid) == (case.kind | expected_mode, 4711 if case.setgid else 8)
    assert await acl_of(cluster, ino, acl.ACCESS) == access
    assert await acl_of(cluster, ino, acl.DEFAULT) == (case.default if directory else None)
    return ino


@settings(deadline=None, max_examples=40)
@given(st.lists(cases(), min_size=1, max_size=8))
def test_what_is_made_inherits_as_on_linux(drawn: list[Case]) -> None:
    """New directories go round the daemons, so some are made by two of them."""

    async def run() -> None:
        async with cluster_of(2) as cluster:
            for number, case in enumerate(drawn):
                parent = await cluster.mkdir(ROOT_INO, b"parent %d" % number)
                await cluster.ask(SetAttr(parent, mode=0o2777 if case.setgid else 0o777, gid=4711))
                if case.default is not None:
                    await set_default(cluster, parent, case.default)
                ino = await check_case(cluster, parent, b"x", case)
                if case.kind == stat.S_IFDIR:  # and once more from there
                    setgid = case.setgid or bool(case.mode & stat.S_ISGID)
                    await cluster.ask(SetAttr(ino, gid=4711))
                    for kind in (stat.S_IFREG, stat.S_IFDIR):
                        below = case._replace(kind=kind, mode=0o666, setgid=setgid)
                        await check_case(cluster, ino, b"%d" % kind, below)
            cluster.check()

    trio.run(run)


@pytest.mark.parametrize("on", [0, 1])
async def test_a_crash_leaves_no_directory_without_its_acls(on: int) -> None:
    """The directory and what it inherits lie on another daemon than its name; either daemon dies, at every point.

    A coordinator that has died puts it elsewhere, maybe.
    """
    number = 0
    while True:
        async with cluster_of(2) as cluster:
            parent = await cluster.mkdir(ROOT_INO, b"parent", 0)
            await set_default(cluster, parent, NAMED)
            cluster.steer(parent, 1)
            cluster.count_points((number, on))
            ino = await make(cluster, parent, b"dir", stat.S_IFDIR | 0o750)
            passed = len(cluster.points)
            await cluster.wait_idle()
            assert cluster.attrs(ino).mode == stat.S_IFDIR | 0o750
            assert await acl_of(cluster, ino, acl.ACCESS) == created(NAMED, 0o750)[0]
            assert await acl_of(cluster, ino, acl.DEFAULT) == NAMED
            cluster.check()
        number += 1
        if number >= passed:
            break
    assert number > 5


async def test_the_largest_acl_is_inherited_on_another_daemon() -> None:
    entries = (XATTR_VALUE_MAX - 4) // 8
    users = [AclEntry(acl.USER, 5, uid) for uid in range(entries - 4)]
    largest = [NAMED[0], *users, *NAMED[2:]]
    async with cluster_of(2) as cluster:
        parent = await cluster.mkdir(ROOT_INO, b"parent", 0)
        await set_default(cluster, parent, largest)
        cluster.steer(parent, 1)
        ino = await make(cluster, parent, b"dir", stat.S_IFDIR | 0o700)
        assert await acl_of(cluster, ino, acl.ACCESS) == created(largest, 0o700)[0]
        assert len(encode(NewInode(cluster.attrs(ino), acl.encode(largest)))) < BODY_MAX


async def test_chmod_of_what_inherited_changes_its_mask() -> None:
    async with cluster_of(1) as cluster:
        await set_default(cluster, ROOT_INO, NAMED)
        ino = await make(cluster, ROOT_INO, b"dir", stat.S_IFDIR | 0o777)
        await cluster.ask(SetAttr(ino, mode=0o740))
        access = await acl_of(cluster, ino, acl.ACCESS)
        assert access == acl.with_mode(NAMED, 0o740)
        assert await acl_of(cluster, ino, acl.DEFAULT) == NAMED


async def test_a_client_hands_the_umask_on() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        names, files = one.namespace, one.files
        await names.setxattr(ROOT_INO, acl.DEFAULT, acl.encode(MINIMAL))
        inherits = await names.make(ROOT_INO, b"inherits", stat.S_IFDIR | 0o777, 0, 0, umask=0o77)
        assert stat.S_IMODE(inherits.mode) == 0o751
        handle = await files.create(ROOT_INO, b"file", 0o666, 0, 0, 2, umask=0o77)
        assert stat.S_IMODE(handle.node.attrs.mode) == 0o640
        await names.removexattr(ROOT_INO, acl.DEFAULT)
        plain = await names.make(ROOT_INO, b"plain", stat.S_IFDIR | 0o777, 0, 0, umask=0o27)
        assert stat.S_IMODE(plain.mode) == 0o750
        other = await files.create(ROOT_INO, b"other", 0o666, 0, 0, 2, umask=0o27)
        assert stat.S_IMODE(other.node.attrs.mode) == 0o640
        as_it_is = await names.make(ROOT_INO, b"as it is", stat.S_IFREG | 0o666, 0, 0)
        assert stat.S_IMODE(as_it_is.mode) == 0o666
        for opened in (handle, other):
            await files.release(opened)


# ── who was first ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("flags", "winners"), [(XATTR_CREATE, 1), (XATTR_REPLACE, 0), (0, 8)])
async def test_of_clients_that_create_an_attribute_at_once_one_wins(flags: int, winners: int) -> None:
    won: list[bytes] = []

    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        file = await one.namespace.make(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0)

        async def race(number: int) -> None:
            names = (one, two)[number % 2].namespace
            try:
                await names.setxattr(file.ino, b"user.a", b"%d" % number, flags)
            except (Exists, NoAttribute):
                return
            won.append(b"%d" % number)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(race, number)
        assert len(won) == winners
        if winners:
            assert await two.namespace.getxattr(file.ino, b"user.a") in won
