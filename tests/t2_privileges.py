"""What a whole cluster takes of set-ID bits and of security.capability, and when."""

import os
import stat
from collections.abc import Awaitable, Callable

import pytest
from whole import CHUNK, Client, whole_cluster

from benchfs_fuse import acl
from benchfs_fuse.acl import AclEntry
from benchfs_fuse.errors import NoAttribute
from benchfs_fuse.model import ROOT_INO
from benchfs_fuse.privileges import Caller
from benchfs_fuse.rpc.messages import TIME_NOW, Append, SetAttr

CAPABILITY = b"security.capability"
OWNER, GID = 1001, 3001
ROOT = Caller(True, frozenset([0]))
MEMBER = Caller(False, frozenset([GID]))
STRANGER = Caller(False, frozenset([OWNER]))
ACCESS = [
    AclEntry(acl.USER_OBJ, 7),
    AclEntry(acl.USER, 7, 4711),
    AclEntry(acl.GROUP_OBJ, 7),
    AclEntry(acl.MASK, 6),
    AclEntry(acl.OTHER, 7),
]


async def write(client: Client, ino: int, caller: Caller, flags: int = 0) -> None:
    handle = await client.files.open(ino, os.O_RDWR | flags)
    await client.files.write(handle, 0, b"y" * 100, lambda: caller)
    await client.files.release(handle)


async def write_directly(client: Client, ino: int, caller: Caller) -> None:
    await write(client, ino, caller, os.O_DIRECT)


async def append(client: Client, ino: int, caller: Caller) -> None:
    await write(client, ino, caller, os.O_APPEND)


async def change_otherwise(client: Client, ino: int, caller: Caller) -> None:
    """As fallocate(2) and copy_file_range(2) do."""
    handle = await client.files.open(ino, os.O_RDWR)
    await client.files.drop_privileges(handle, lambda: caller)
    await client.files.release(handle)


async def truncate(client: Client, ino: int, caller: Caller) -> None:
    await client.files.setattr(ino, size=10, who=lambda: caller)


async def extend(client: Client, ino: int, caller: Caller) -> None:
    await client.files.setattr(ino, size=3 * CHUNK, mtime_ns=TIME_NOW, who=lambda: caller)


async def open_truncating(client: Client, ino: int, caller: Caller) -> None:
    await client.files.release(await client.files.open(ino, os.O_WRONLY | os.O_TRUNC, who=lambda: caller))


async def change_owner(client: Client, ino: int, caller: Caller) -> None:
    await client.files.setattr(ino, uid=OWNER, who=lambda: caller)


async def change_group(client: Client, ino: int, caller: Caller) -> None:
    """To one that a stranger to the old one is in."""
    await client.files.setattr(ino, gid=OWNER, who=lambda: caller)


async def set_acl(client: Client, ino: int, caller: Caller) -> None:
    await client.files.setxattr(ino, acl.ACCESS, acl.encode(ACCESS), who=lambda: caller)


Act = Callable[[Client, int, Caller], Awaitable[None]]
WRITES: list[Act] = [write, write_directly, append, truncate, extend, open_truncating]


async def make(client: Client, mode: int) -> int:
    """Make a file of two chunks with these bits and a capability."""
    handle = await client.files.create(ROOT_INO, b"file", 0o600, OWNER, GID, os.O_RDWR)
    await client.files.write(handle, 0, b"x" * 2 * CHUNK)
    await client.files.release(handle)
    await client.files.setattr(handle.ino, mode=mode)
    await client.files.setxattr(handle.ino, CAPABILITY, b"powers")
    return handle.ino


async def left(client: Client, ino: int) -> tuple[int, bool]:
    """Return the permission bits, and whether the capability is still there."""
    try:
        await client.namespace.getxattr(ino, CAPABILITY)
    except NoAttribute:
        return stat.S_IMODE((await client.files.getattr(ino)).mode), False
    return stat.S_IMODE((await client.files.getattr(ino)).mode), True


async def check(act: Act, caller: Caller, mode: int, expected: int) -> bool:
    """Do it to a file; return whether the capability is left."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        ino = await make(one, mode)
        await act(two, ino, caller)
        bits, capability = await left(one, ino)
        assert f"{bits:o}" == f"{expected:o}"
        return capability


@pytest.mark.parametrize("act", [*WRITES, change_otherwise])
@pytest.mark.parametrize(
    ("caller", "mode", "expected"),
    [
        (ROOT, 0o6777, 0o6777),
        (MEMBER, 0o6777, 0o777),
        (MEMBER, 0o6767, 0o2767),
        (STRANGER, 0o2767, 0o767),
        (STRANGER, 0o1767, 0o1767),
    ],
)
async def test_what_changes_data_takes_set_id_bits(act: Act, caller: Caller, mode: int, expected: int) -> None:
    await check(act, caller, mode, expected)


@pytest.mark.parametrize("act", [change_owner, change_group])
@pytest.mark.parametrize(
    ("caller", "mode", "expected"), [(ROOT, 0o6777, 0o777), (ROOT, 0o6767, 0o2767), (STRANGER, 0o6767, 0o767)]
)
async def test_what_gives_a_file_away_takes_set_id_bits(act: Act, caller: Caller, mode: int, expected: int) -> None:
    assert await check(act, caller, mode, expected) is False


@pytest.mark.parametrize(("caller", "expected"), [(ROOT, 0o6767), (MEMBER, 0o6767), (STRANGER, 0o4767)])
async def test_an_acl_of_a_stranger_takes_the_set_group_id_bit(caller: Caller, expected: int) -> None:
    assert await check(set_acl, caller, 0o6777, expected) is True


@pytest.mark.parametrize("act", [append, truncate, extend, open_truncating])
async def test_the_daemon_takes_a_capability_that_no_kernel_takes(act: Act) -> None:
    assert await check(act, ROOT, 0o755, 0o755) is False


async def test_a_capability_that_was_given_before_the_flush_stays() -> None:
    """As install(1) and rsync(1) do: write, setcap, close."""
    async with whole_cluster(2) as whole, whole.client() as one:
        handle = await one.files.create(ROOT_INO, b"file", 0o755, OWNER, GID, os.O_RDWR)
        await one.files.write(handle, 0, b"program", lambda: MEMBER)
        await one.files.setxattr(handle.ino, CAPABILITY, b"powers")
        await one.files.release(handle)
        assert await left(one, handle.ino) == (0o755, True)


async def test_bits_are_gone_before_new_bytes_are_there() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        ino = await make(one, 0o4755)
        handle = await two.files.open(ino, os.O_RDWR)
        await two.files.write(handle, 0, b"evil", lambda: STRANGER)
        assert (await one.files.getattr(ino)).mode == stat.S_IFREG | 0o755
        reader = await one.files.open(ino, os.O_RDONLY)
        buffer = bytearray(4)
        await one.files.read(reader, 0, memoryview(buffer))
        assert buffer == b"xxxx"
        await one.files.release(reader)
        await two.files.release(handle)


async def test_bits_that_were_set_again_stay() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        ino = await make(one, 0o4755)
        handle = await one.files.open(ino, os.O_RDWR)
        await one.files.write(handle, 0, b"program", lambda: MEMBER)
        await one.files.setattr(ino, mode=0o4755)
        await one.files.release(handle)
        assert (await left(one, ino))[0] == 0o4755


async def test_who_is_asked_for_only_where_there_are_bits() -> None:
    def nobody() -> Caller:
        raise AssertionError("asked for")

    async with whole_cluster(1) as whole, whole.client() as one:
        ino = await make(one, 0o755)
        for flags in (0, os.O_APPEND, os.O_TRUNC):
            handle = await one.files.open(ino, os.O_RDWR | flags, who=nobody)
            await one.files.write(handle, 0, b"y", nobody)
            await one.files.drop_privileges(handle, nobody)
            await one.files.release(handle)
        await one.files.setattr(ino, uid=7, gid=8, who=nobody)
        directory = await one.namespace.make(ROOT_INO, b"dir", stat.S_IFDIR | 0o2755, OWNER, GID)
        await one.files.setattr(directory.ino, gid=8, who=nobody)
        assert (await one.files.getattr(directory.ino)).mode == stat.S_IFDIR | 0o2755


async def test_what_takes_nothing_is_no_change() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        ino = await make(one, 0o2767)
        before = await one.files.getattr(ino)
        assert await one.files.setattr(ino, taken=1) == before
        after = await one.files.setattr(ino, taken=2)
        assert (after.mode, after.version) == (stat.S_IFREG | 0o767, before.version + 1)
        assert after.ctime_ns > before.ctime_ns
        assert after.mtime_ns == before.mtime_ns


async def test_an_append_of_nothing_takes_nothing() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        ino = await make(one, 0o6777)
        link = one.namespace.link_of(ino)
        await link.call(Append(ino, 0, 3), Append.Reply)
        assert await left(one, ino) == (0o6777, True)
        await link.call(SetAttr(ino, mode=0o4755, taken=1), SetAttr.Reply)
        assert await left(one, ino) == (0o755, True)
