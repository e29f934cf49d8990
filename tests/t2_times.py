"""UTIME_NOW is the time of the inode's daemon: of no client, and never before what was written or made there before."""

import os
import stat

import pytest
from metadata_cluster import cluster_of
from whole import whole_cluster

from benchfs_fuse.model import ROOT_INO
from benchfs_fuse.rpc.messages import TIME_NOW, TIME_OMIT, SetAttr

LONG_AGO_NS = 5


@pytest.mark.parametrize("atime_ns", [TIME_OMIT, TIME_NOW, LONG_AGO_NS])
@pytest.mark.parametrize("mtime_ns", [TIME_OMIT, TIME_NOW, LONG_AGO_NS])
async def test_each_time_is_set_as_it_is_asked_for(atime_ns: int, mtime_ns: int) -> None:
    async with cluster_of(2) as cluster:
        ino = await cluster.create(ROOT_INO, b"file")
        before = cluster.attrs(ino)
        start_ns = cluster.clock()
        attrs = (await cluster.ask(SetAttr(ino, atime_ns=atime_ns, mtime_ns=mtime_ns))).attrs
        if atime_ns == mtime_ns == TIME_OMIT:
            assert attrs == before
            return
        assert start_ns < attrs.ctime_ns < cluster.clock()
        expected = {TIME_NOW: attrs.ctime_ns, LONG_AGO_NS: LONG_AGO_NS}
        assert attrs.atime_ns == expected.get(atime_ns, before.atime_ns)
        assert attrs.mtime_ns == expected.get(mtime_ns, before.mtime_ns)


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR])
@pytest.mark.parametrize("still_open", [False, True])
async def test_what_is_touched_is_newer_than_what_was_written_before(kind: int, still_open: bool) -> None:
    """On one daemon, as make(1) has it in a directory; also where the bytes were only gathered when it was touched."""
    async with whole_cluster(1) as whole, whole.client() as one, whole.client() as two:
        target = await two.namespace.make(ROOT_INO, b"target", kind | 0o755, 0, 0)
        for _ in range(20):
            handle = await one.files.create(ROOT_INO, b"source", 0o600, 0, 0, os.O_RDWR)
            await one.files.write(handle, 0, b"x")
            if not still_open:
                await one.files.release(handle)
            source = await one.files.getattr(handle.ino)
            touched = await two.files.setattr(target.ino, atime_ns=TIME_NOW, mtime_ns=TIME_NOW)
            assert touched.mtime_ns == touched.atime_ns == touched.ctime_ns > source.mtime_ns
            if still_open:
                await one.files.release(handle)
            assert (await two.files.getattr(handle.ino)).mtime_ns == source.mtime_ns
            await one.namespace.unlink(ROOT_INO, b"source")


async def test_a_touch_of_what_was_just_written_stays() -> None:
    """What was gathered is published first, and not again at the close."""
    async with whole_cluster(2) as whole, whole.client() as one:
        handle = await one.files.create(ROOT_INO, b"file", 0o600, 0, 0, os.O_RDWR)
        for mtime_ns in (TIME_NOW, LONG_AGO_NS):
            before = await one.files.getattr(handle.ino)
            await one.files.write(handle, 0, b"x" * 1000)
            touched = await one.files.setattr(handle.ino, mtime_ns=mtime_ns)
            assert touched.size == 1000
            assert touched.mtime_ns == (touched.ctime_ns if mtime_ns == TIME_NOW else LONG_AGO_NS)
            assert touched.ctime_ns > before.ctime_ns
        await one.files.release(handle)
        assert (await one.files.getattr(handle.ino)).mtime_ns == LONG_AGO_NS
