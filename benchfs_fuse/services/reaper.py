"""Finish behind the reply what an unlink began: dead files give their chunks back on every daemon.

A file that loses its last name while somebody has it open is an *orphan*: its inode stays, with nlink 0, and a U record
without a value remembers it over a restart. With the last handle, or at once if nobody has it open, it is *dead*: the
inode goes, and the U record says what is left of it, in the same transaction. The reaper drops the chunks of dead files
page by page and then their records, which wait in the store and not in memory however many they are.

    U value: nothing for an orphan; for a dead file a MessagePack array ``Remains``

RPCs: one DropChunks to each daemon that holds chunks of any file of a page.
"""

import logging
from collections.abc import Sequence
from functools import partial

import msgspec
import trio

from .. import disk
from ..limits import CHUNK_SIZE_MIN, READDIR_ENTRIES_MAX
from ..rpc.messages import DropChunks, DropChunksReply
from .calls import Batch, Opens, Peers
from .inodes import Draft, Inode, Inodes
from .jobs import Jobs, persist
from .parallel import each
from .truncations import Truncations

_log = logging.getLogger(__name__)

#: Dead files dropped by one request: a few KiB, and as much work as a listing of their names.
PAGE_MAX = READDIR_ENTRIES_MAX
#: Pages under way: while a dead daemon holds one up, the space of the next thousands of files is still given back.
PAGES_MAX = 8

_ORPHAN = b""


class Remains(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Hold what is known of a dead file: its layout, where its space ends, and whether some lies ``anywhere``."""

    chunk_size: int
    width: int
    size: int
    anywhere: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Remains).decode


class Reaper:
    """Bury inodes without a name, and drop what is left of them."""

    def __init__(self, inodes: Inodes, opens: Opens, peers: Peers, jobs: Jobs, truncations: Truncations) -> None:
        self._inodes = inodes
        self._store = inodes.store
        self._opens = opens
        self._peers = peers
        self._jobs = jobs
        self._truncations = truncations
        #: Files without a name that are still open; dead files whose chunks are not yet dropped.
        self.orphans = 0
        self.to_drop = 0
        self._pages = 0
        self._under_way: set[int] = set()
        self._behind = disk.DEAD

    def unlinked(self, draft: Draft, inode: Inode) -> None:
        """Decide what becomes of an inode that lost its last name: dead, or an orphan while somebody has it open."""
        if self._opens.count(inode.ino):
            draft.put(disk.key(disk.DEAD, inode.ino), _ORPHAN)
            draft.after_write.append(partial(self._count, orphans=1))
        else:
            self._bury(draft, inode)

    def bury(self, ino: int) -> None:
        """Make an orphan that nobody has open any more dead. NoSpace, StorageError: it stays one for now."""
        draft = self._inodes.draft()
        inode = draft.inode(ino)
        assert inode.nlink == 0
        self._bury(draft, inode)
        draft.after_write.append(partial(self._count, orphans=-1))
        draft.write()

    def adopt(self, ino: int) -> bool:
        """Have chunks dropped, wherever they are, whose inode is not there; tell whether nobody had begun with it."""
        key = disk.key(disk.DEAD, ino)
        if self._store.get(key) is not None:
            return False
        batch = Batch(self._store)
        batch.put(key, _encode(Remains(CHUNK_SIZE_MIN, 1, 0, True)))
        batch.after_write.append(partial(self._count, dead=1))
        batch.write()
        return True

    def _bury(self, draft: Draft, inode: Inode) -> None:
        ino = inode.ino
        draft.remove(inode)
        if inode.xattr_size:
            prefix = disk.key(disk.XATTR, ino)
            for key, _ in draft.scan(prefix, disk.after(prefix)):
                draft.delete(key)
        if not (inode.is_file or inode.is_dir):
            draft.delete(disk.key(disk.TARGET, ino))
        anywhere = self._truncations.bury(draft, ino)
        if inode.is_file and (inode.end or anywhere):
            remains = Remains(inode.chunk_size, inode.width, inode.end, anywhere)
            draft.put(disk.key(disk.DEAD, ino), _encode(remains))
            draft.after_write.append(partial(self._count, dead=1))
        else:
            draft.delete(disk.key(disk.DEAD, ino))

    def _count(self, orphans: int = 0, dead: int = 0) -> None:
        self.orphans += orphans
        self.to_drop += dead
        if dead:
            self._next_page()

    def recover(self) -> None:
        """Count what earlier incarnations left, and go on with it. Once."""
        for _, value in self._store.scan(disk.DEAD, disk.after(disk.DEAD)):
            if value == _ORPHAN:
                self.orphans += 1
            else:
                self.to_drop += 1
        if self.to_drop:
            _log.info("files that were removed before this start: the space of %d is being given back", self.to_drop)
        self._next_page()

    async def review(self) -> None:
        """Bury the orphans that nobody has open: asked for when nobody may reclaim any more."""
        behind, buried = disk.DEAD, 0
        while rows := self._rows(behind):
            behind = rows[-1][0] + b"\0"
            for key, value in rows:
                if value == _ORPHAN and not self._opens.count(ino := disk.number(key)):
                    self.bury(ino)
                    buried += 1
            await trio.lowlevel.checkpoint()
        if buried:
            _log.info("files without a name that nobody has open any more: %d removed", buried)

    def _rows(self, start: bytes) -> list[tuple[bytes, bytes]]:
        found = []
        for row in self._store.scan(start, disk.after(disk.DEAD)):
            found.append(row)
            if len(found) == PAGE_MAX:
                break
        return found

    def _next_page(self) -> None:
        """Begin with the next dead files: any number if nothing is under way, else only when a whole page is there."""
        waiting = self.to_drop - len(self._under_way)
        if waiting <= 0 or (self._pages and (waiting < PAGE_MAX or self._pages == PAGES_MAX)):
            return
        page: dict[int, Remains] = {}
        wrapped = False
        while len(page) < PAGE_MAX:
            rows = self._rows(self._behind)
            for key, value in rows:
                ino = disk.number(key)
                if value != _ORPHAN and ino not in self._under_way and len(page) < PAGE_MAX:
                    page[ino] = _decode(value)
            if rows:
                self._behind = rows[-1][0] + b"\0"
            elif wrapped:
                break
            else:
                wrapped, self._behind = True, disk.DEAD
            if len(page) == waiting:
                break
        assert page, "counted, but not in the store"
        self._under_way.update(page)
        self._pages += 1
        self._jobs.start(self._drop, page)

    async def _drop(self, page: dict[int, Remains]) -> None:
        """Drop the chunks of these files on every daemon that may have some, then forget the files.

        First the store is synced: no power cut brings a name back whose chunks have gone elsewhere. They are not
        forgotten before the others have synced, too: no power cut brings chunks back that nobody drops.
        """
        homes: dict[int, list[int]] = {}
        for ino, remains in page.items():
            for daemon in self._daemons_of(ino, remains):
                homes.setdefault(daemon, []).append(ino)

        async def one(daemon: int) -> None:
            async def attempt() -> None:
                elsewhere = daemon != self._inodes.daemon_id
                await self._peers.call(daemon, DropChunks(tuple(homes[daemon]), elsewhere), DropChunksReply)

            await persist(f"DropChunks of {len(homes[daemon])} files at daemon {daemon}", attempt)

        if homes.keys() - {self._inodes.daemon_id}:
            await persist("sync of the records of dead files", self._store.sync)
        await each(one, homes)

        async def forget() -> None:
            batch = Batch(self._store)
            for ino in page:
                batch.delete(disk.key(disk.DEAD, ino))
            batch.write()

        await persist("removal of the records of dead files", forget)
        self._under_way.difference_update(page)
        self._pages -= 1
        self.to_drop -= len(page)
        self._next_page()

    def _daemons_of(self, ino: int, remains: Remains) -> Sequence[int] | set[int]:
        if remains.anywhere:
            return self._inodes.daemons
        chunks = range(-(-remains.size // remains.chunk_size))
        return {int(daemon) for daemon in self._inodes.shard_map.of_chunks(ino, chunks, remains.width)}
