"""Make good what a power cut took from one side: let inodes and chunks fit each other again.

Each daemon's store keeps a prefix of what was written to it, but one daemon's prefix ends elsewhere than another's, and
chunk files keep what they like. What was synced is there, names are whole (services/transactions.py); left over may be
chunks whose inode was never stored, or reaches less far, or counts other blocks; and chunk files that no record knows.

A daemon that finds itself started after its machine was (``open_store``) removes such files, tells all daemons to
recount, itself as well, and remembers both until they are done. Recounting: page by page, all daemons say what they
hold of the files of this one, and what does not fit is taken for doubtful (services/truncations.py), or for dead. So
nothing is done to a file that somebody has open, and nobody waits.

RPCs: 1 to each daemon (Recount), which sends HeldFiles to each, 1 for some hundred files.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from .. import disk
from ..model import INO_END
from ..ports import ChunkInspector
from ..rpc.messages import Body, Done, HeldFile, HeldFiles, HeldFilesReply, Recount, Request
from .calls import Call, Peers
from .identity import LOST, RECOUNT
from .inodes import Inode, Inodes
from .jobs import Jobs, persist
from .parallel import each
from .reaper import Reaper
from .truncations import Truncations

_log = logging.getLogger(__name__)

#: Inodes compared in one go: about a millisecond.
STEP_MAX = 128

_decode = msgspec.msgpack.Decoder(Inode).decode


class _Held(NamedTuple):
    """Sum up what all daemons hold of a file: its bytes, and the last of its chunks with the chunk's length."""

    allocated: int = 0
    last: tuple[int, int] = (0, 0)

    def with_part(self, part: HeldFile) -> "_Held":
        return _Held(self.allocated + part.allocated, max(self.last, (part.last, part.length)))

    def fits(self, inode: Inode) -> bool:
        index, length = self.last
        return self.allocated == inode.allocated and index * inode.chunk_size + length <= inode.end


class Recounting:
    """Recount when it is asked for. ``reviewed``: what nobody may reclaim any more has been looked at."""

    def __init__(
        self,
        inodes: Inodes,
        peers: Peers,
        jobs: Jobs,
        truncations: Truncations,
        reaper: Reaper,
        reviewed: trio.Event,
        inspector: ChunkInspector,
    ) -> None:
        self._inodes = inodes
        self._store = inodes.store
        self._peers = peers
        self._jobs = jobs
        self._truncations = truncations
        self._reaper = reaper
        self._reviewed = reviewed
        self._inspector = inspector
        self._running = self._again = False

    def handlers(self) -> Mapping[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return the handlers for Server.register."""
        return {Recount: self._recount, HeldFiles: self._held_files}

    @property
    def pending(self) -> bool:
        """Tell whether there is anything left to do."""
        return self._store.get(LOST) is not None or self._store.get(RECOUNT) is not None

    def recover(self) -> None:
        """Go on with what earlier incarnations have not finished. Once."""
        if self._store.get(LOST) is not None:
            self._jobs.start(self._tell)
        if self._store.get(RECOUNT) is not None:
            self._start()

    async def _tell(self) -> None:
        """Remove chunk files that nobody knows, and let everybody recount."""
        await persist("removal of chunk files without a record", self._remove_strays)

        async def one(daemon: int) -> None:
            await persist(f"Recount at daemon {daemon}", partial(self._peers.call, daemon, Recount(), Done))

        await each(one, self._inodes.daemons)
        await persist("end of telling that power was lost", partial(self._forget, LOST))

    async def _remove_strays(self) -> None:
        freed = 0
        for folder in range(self._inspector.folders):
            told: list[str] = []
            while True:  # of very many, some are told at once
                found = await self._inspector.strays(range(folder, folder + 1))
                names = [stray.name for stray in found if stray.chunk is not None]
                if not names or names == told:
                    break
                freed += await self._inspector.remove_strays(folder, names)
                told = names
        if freed:
            _log.info("removed chunk files without a record: %d bytes", freed)

    async def _forget(self, key: bytes) -> None:
        self._store.write([], [key])

    async def _recount(self, request: Request, call: Call) -> Body:
        """Note that a daemon lost power; the rest goes on behind the reply."""
        self._store.write([(RECOUNT, b"")])
        await self._store.sync()
        self._start()
        return Done()

    def _start(self) -> None:
        self._again = self._running
        if not self._running:
            self._running = True
            self._jobs.start(self._run)

    async def _run(self) -> None:
        """Recount, and once more if somebody asked for it meanwhile."""
        await self._reviewed.wait()
        while True:
            self._again = False
            await persist("recount", self._compare_all)
            if not self._again:
                break
        await persist("end of a recount", partial(self._forget, RECOUNT))
        self._running = False

    async def _compare_all(self) -> None:
        start = suspects = 0
        while start < INO_END:
            held: dict[int, _Held] = {}
            pages: list[HeldFilesReply] = []
            await each(partial(self._ask, HeldFiles(self._inodes.daemon_id, start), pages), self._inodes.daemons)
            end = min(page.next for page in pages)
            for page in pages:
                for part in page.files:
                    if part.ino < end:
                        held[part.ino] = held.get(part.ino, _Held()).with_part(part)
            suspects += await self._compare(start, end, held)
            start = end
        if suspects:
            _log.info("recounted after a power cut: %d files did not fit their chunks", suspects)

    async def _ask(self, request: HeldFiles, pages: list[HeldFilesReply], daemon: int) -> None:
        pages.append(await self._peers.call(daemon, request, HeldFilesReply))

    async def _compare(self, start: int, end: int, held: dict[int, _Held]) -> int:
        """Compare the inodes in a range with what is held of them; return how many did not fit."""
        suspects = 0
        stop = disk.key(disk.INODE, end)
        for position, (_, value) in enumerate(self._store.scan(disk.key(disk.INODE, start), stop)):
            if position % STEP_MAX == STEP_MAX - 1:
                await trio.lowlevel.checkpoint()
            inode = _decode(value)
            if not held.pop(inode.ino, _Held()).fits(inode) and inode.is_file:
                suspects += 1
                await self._truncations.settle_now(inode.ino)
        for ino in held:
            if self._inodes.find(ino) is None:
                suspects += self._reaper.adopt(ino)
        return suspects

    async def _held_files(self, request: Request, call: Call) -> Body:
        assert isinstance(request, HeldFiles)
        home = self._inodes.home
        found = await self._inspector.sums(request.start, lambda ino: home(ino) == request.home)
        return HeldFilesReply(tuple(HeldFile(*file) for file in found.files), found.next)
