"""Check a cluster while it is in use: compare everything, then look again at whatever does not seem to fit.

The first look reads all inodes, names, chunks and files of every daemon, one after the other, while others change them.
``Comparison`` says what does not fit. Nothing of that is believed before it was seen in a way that nothing under way
can bring about; what has gone meanwhile is forgotten. By problem:

    name without an inode      the name, then the inode when no transaction is about to make it, then the name again:
                               inode numbers are never given twice
    links, names, parents      inodes, then all names once more, then the inodes again: every change of a name changes
                               the version of its inode, in the same transaction, and an inode is looked at when no
                               transaction is about to change it. Same version: the names are those of that version
    circles                    all inodes of the circle twice: same versions, so they were a circle in between
    entries of a directory     counted by its daemon as of one moment
    chunks without an inode    the inode after the chunks, then the chunks again: it has gone, so has what would drop
                               them, and they are still there
    space, lost chunks         counted while the file's daemon holds up its publications; a file that somebody has open
                               for writing counts as in use and is not reported
    files, records, strays     the daemon itself looks twice, see chunks/inspector.py and services/inspection.py

What changes all the time is looked at ``ROUNDS_MAX`` times and then called undecided.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from .. import disk
from ..comparison import (
    Category,
    ChunkFacts,
    Comparison,
    Finding,
    InodeFacts,
    NameFacts,
    Problem,
    circle_finding,
    circles,
    entry_findings,
    home_of,
    link_findings,
    printable,
    space_findings,
)
from ..errors import Conflict, FsError, NotEmpty, Stale
from ..limits import ITEMS_MAX, SHARDS
from ..model import shard_of
from ..rpc.client import Links
from ..rpc.messages import (
    EXAMINED_IN_USE,
    EXAMINED_QUIET,
    Body,
    CountEntries,
    CountEntriesReply,
    Done,
    ExamineFile,
    ExamineFileReply,
    FindInodes,
    FindInodesReply,
    FindNames,
    FindNamesReply,
    HeldChunks,
    HeldChunksReply,
    InodeState,
    ListChunks,
    ListChunksReply,
    ListRecords,
    ListRecordsReply,
    ListStrays,
    ListStraysReply,
    RemoveInode,
    RemoveOrphans,
    RemoveOrphansReply,
    RemoveStrays,
    Request,
    StrayRow,
    SweepRecords,
    SweepRecordsReply,
)
from .inodes import Inode
from .parallel import each, some_at_once

R = TypeVar("R", bound=Body)
T = TypeVar("T")

#: Times that all names are read again for inodes that change all the time.
ROUNDS_MAX = 5
#: Requests under way at once to all daemons, when single things are looked at again.
REQUESTS_MAX = 8
#: Parts of a check, for whoever shows progress.
PARTS = ("inodes", "names", "chunks", "files", "records", "again")

#: Be told which part of the check has come how far (0 to 1).
Progress = Callable[[str, float], None]

_decode_inode = msgspec.msgpack.Decoder(Inode).decode
_LINKS = (Problem.LINKS, Problem.NAMELESS, Problem.UNUSED, Problem.PARENT, Problem.SEVERAL, Problem.UNREACHABLE)
_SPACE = (Problem.SPACE, Problem.LOST)
#: Prefixes of records that are compared by each daemon alone.
PREFIXES = (disk.INODE, disk.ENTRY, disk.POSITION, disk.XATTR, disk.TARGET, disk.WRITE_OPEN, disk.OUTCOME)


class Checked(NamedTuple):
    """Hold what a check has found. ``undecided``: what changed too often; ``in_use``: files open for writing."""

    comparison: Comparison
    findings: list[Finding]
    undecided: list[Finding]
    in_use: int


class Checker:
    """Check the cluster that ``links`` lead to. DaemonUnreachable: one of its daemons does not answer."""

    def __init__(self, links: Links, progress: Progress = lambda part, share: None) -> None:
        self._links = links
        self._progress = progress
        self._shares: dict[tuple[str, int], float] = {}
        self._comparison = Comparison(links.shard_map)
        self._found: list[Finding] = []
        self._undecided: list[Finding] = []
        self._in_use: set[int] = set()
        self._strays: list[tuple[int, StrayRow]] = []

    async def _ask(self, daemon: int, request: Request, reply: type[R]) -> R:
        return await self._links.to(daemon).call(request, reply)

    def _came(self, part: str, daemon: int, share: float) -> None:
        self._shares[part, daemon] = share
        shares = [share for (of, _), share in self._shares.items() if of == part]
        self._progress(part, sum(shares) / len(self._links.daemons))

    async def check(self) -> Checked:
        """Look at everything."""
        for part, read in (
            ("inodes", self._read_inodes),
            ("names", partial(self._read_names, take=self._comparison.add_name)),
            ("chunks", self._read_chunks),
            ("files", self._read_strays),
            ("records", self._read_records),
        ):
            await each(read, self._links.daemons)
            self._progress(part, 1.0)
        await self._look_again(list(self._comparison.findings()))
        self._progress("again", 1.0)
        order = list(Problem)
        self._found.sort(key=lambda one: (order.index(one.problem), one.ino, one.daemon, one.index, one.name))
        return Checked(self._comparison, self._found, self._undecided, len(self._in_use))

    # ── the first look ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _records(self, daemon: int, prefix: bytes, part: str, take: Callable[[bytes, bytes], None]) -> None:
        start, more = b"", True
        while more:
            page = await self._ask(daemon, ListRecords(prefix, start), ListRecordsReply)
            for key, value in page.rows:
                take(key, value)
            more = page.more
            if page.rows:
                start = page.rows[-1][0] + b"\0"
                self._came(part, daemon, shard_of(disk.number(start)) / SHARDS)
        self._came(part, daemon, 1.0)

    async def _read_inodes(self, daemon: int) -> None:
        def take(key: bytes, value: bytes) -> None:
            inode = inode_of(daemon, value)
            if inode is not None:
                self._comparison.add_inode(inode)

        await self._records(daemon, disk.INODE, "inodes", take)

    async def _read_names(self, daemon: int, take: Callable[[NameFacts], None]) -> None:
        await self._records(daemon, disk.ENTRY, "names", lambda key, value: take(name_of(daemon, key, value)))

    async def _read_chunks(self, daemon: int) -> None:
        ino = index = 0
        while page := (await self._ask(daemon, ListChunks(ino, index), ListChunksReply)).chunks:
            for one in page:
                self._comparison.add_chunk(
                    ChunkFacts(daemon, one.ino, one.index, one.length, one.allocated, one.trouble)
                )
            ino, index = page[-1].ino, page[-1].index + 1
            self._came("chunks", daemon, shard_of(ino) / SHARDS)
        self._came("chunks", daemon, 1.0)

    async def _read_strays(self, daemon: int) -> None:
        folder, folders = 0, 1
        while folder < folders:
            reply = await self._ask(daemon, ListStrays(folder), ListStraysReply)
            self._strays += ((daemon, row) for row in reply.files)
            folder, folders = reply.next, reply.folders
            self._came("files", daemon, folder / max(1, folders))

    async def _read_records(self, daemon: int) -> None:
        for position, prefix in enumerate(PREFIXES):
            for key, problem in await self._sweep(daemon, prefix, remove=False):
                self._found.append(_of_record(daemon, key, Problem(problem)))
            self._came("records", daemon, (position + 1) / len(PREFIXES))

    async def _sweep(self, daemon: int, prefix: bytes, *, remove: bool) -> list[tuple[bytes, str]]:
        found: list[tuple[bytes, str]] = []
        start = prefix
        while start:
            reply = await self._ask(daemon, SweepRecords(prefix, start, remove), SweepRecordsReply)
            found += reply.found
            start = reply.next
        return found

    # ── the second look ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _look_again(self, suspects: Sequence[Finding]) -> None:
        by_problem = defaultdict(list)
        for one in suspects:
            by_problem[one.problem].append(one)
        todo: list[Callable[[], Awaitable[None]]] = [
            partial(self._look_at_names, batch) for batch in _batches(by_problem[Problem.NO_INODE])
        ]
        todo += [partial(self._look_at_kinds, batch) for batch in _batches(by_problem[Problem.KIND])]
        todo += [partial(self._look_at_orphans, batch) for batch in _batches(by_problem[Problem.CHUNKS])]
        todo += [partial(self._look_at_entries, one) for one in by_problem[Problem.ENTRIES]]
        todo += [
            partial(self._look_at_space, ino) for ino in sorted({one.ino for p in _SPACE for one in by_problem[p]})
        ]
        chunks = [*by_problem[Problem.CHUNK_FILE], *(one for one in by_problem[Problem.MISPLACED] if one.index >= 0)]
        todo += [partial(self._look_at_chunk, one) for one in chunks]
        todo += [partial(self._look_at_stray, *stray) for stray in self._strays]
        todo.append(self._look_at_circles)
        done = 0

        async def one_of_them(look: Callable[[], Awaitable[None]]) -> None:
            nonlocal done
            await look()
            done += 1
            self._progress("again", done / (len(todo) + 1))

        await some_at_once(one_of_them, todo, REQUESTS_MAX)
        await self._look_at_links({one.ino for problem in _LINKS for one in by_problem[problem]})

    async def _states(self, inos: Iterable[int]) -> dict[int, InodeState]:
        """Look at inodes when no transaction is about to change them."""
        homes = defaultdict(list)
        for ino in set(inos):
            homes[home_of(self._links.shard_map, ino)].append(ino)
        found = {ino: InodeState(ino, b"", False, False) for ino in homes.pop(-1, [])}

        async def ask(item: tuple[int, Sequence[int]]) -> None:
            reply = await self._ask(item[0], FindInodes(tuple(item[1])), FindInodesReply)
            found.update((state.ino, state) for state in reply.inodes)

        batches = [(home, batch) for home, own in homes.items() for batch in _batches(own)]
        await some_at_once(ask, batches, REQUESTS_MAX)
        return found

    async def _rows(self, findings: Sequence[Finding]) -> list[NameFacts | None]:
        """Look at the names of findings when no transaction is about to change them."""
        found: dict[tuple[int, bytes], NameFacts | None] = {}
        by_daemon = defaultdict(list)
        for one in findings:
            by_daemon[one.daemon].append((one.parent, one.name))
        for daemon, places in by_daemon.items():
            reply = await self._ask(daemon, FindNames(tuple(places)), FindNamesReply)
            for (parent, name), record in zip(places, reply.records, strict=True):
                key = disk.key_name(disk.ENTRY, parent, name)
                found[parent, name] = name_of(daemon, key, record) if record else None
        return [found[one.parent, one.name] for one in findings]

    async def _look_at_names(self, suspects: Sequence[Finding]) -> None:
        before = await self._rows(suspects)
        states = await self._states(one.ino for one in suspects)
        after = await self._rows(suspects)
        for one, first, last in zip(suspects, before, after, strict=True):
            stands = first is not None and last is not None and first.ino == last.ino == one.ino
            if stands and not states[one.ino].record:
                self._found.append(one)

    async def _look_at_kinds(self, suspects: Sequence[Finding]) -> None:
        rows = await self._rows(suspects)
        states = await self._states(one.ino for one in suspects)
        for one, row in zip(suspects, rows, strict=True):
            inode = inode_of(0, states[one.ino].record)
            if inode is not None and row is not None and row.ino == one.ino and row.kind != inode.mode & 0o170000:
                self._found.append(one)

    async def _look_at_orphans(self, suspects: Sequence[Finding]) -> None:
        states = await self._states(one.ino for one in suspects)
        for one in suspects:
            state = states[one.ino]
            if state.record or state.pending:
                continue
            held = await self._ask(one.daemon, HeldChunks(one.ino, 0, 0), HeldChunksReply)
            if held.chunks:
                what = f"{held.chunks} chunks"
                self._found.append(msgspec.structs.replace(one, what=what, size=held.allocated))

    async def _look_at_entries(self, one: Finding) -> None:
        reply = await self._ask(one.daemon, CountEntries(one.ino), CountEntriesReply)
        inode = inode_of(one.daemon, reply.record)
        if inode is not None:
            self._found += entry_findings(inode, reply.entries, reply.subdirectories)

    async def _look_at_space(self, ino: int) -> None:
        home = self._links.shard_map.of_ino(ino)
        reply = await self._ask(home, ExamineFile(ino, settle=False), ExamineFileReply)
        if reply.state == EXAMINED_QUIET:
            self._found += space_findings(home, ino, reply.allocated, reply.held, reply.beyond)
        elif reply.state == EXAMINED_IN_USE:
            self._in_use.add(ino)

    async def _look_at_chunk(self, one: Finding) -> None:
        if not (await self._states([one.ino]))[one.ino].record:
            return
        reply = await self._ask(one.daemon, ListChunks(one.ino, one.index), ListChunksReply)
        for row in reply.chunks[:1]:
            if (row.ino, row.index) == (one.ino, one.index) and (row.trouble or one.problem is Problem.MISPLACED):
                self._found.append(msgspec.structs.replace(one, what=row.trouble or one.what))

    async def _look_at_stray(self, daemon: int, row: StrayRow) -> None:
        problem, what, undecided = Problem.STRAY_FILE, "", False
        if not row.ino:
            what = "not a chunk file, not ours to remove"
        elif (await self._states([row.ino]))[row.ino].record:
            home = self._links.shard_map.of_ino(row.ino)
            reply = await self._ask(home, ExamineFile(row.ino, settle=False), ExamineFileReply)
            if reply.state == EXAMINED_QUIET and reply.allocated > reply.held:
                problem, what = Problem.LOST_RECORD, "it is kept"
            undecided = reply.state == EXAMINED_IN_USE
        finding = Finding(
            problem=problem,
            daemon=daemon,
            ino=row.ino,
            index=row.index if row.ino else -1,
            what=what,
            size=row.length,
            file=f"{row.folder:02x}/{row.name}",
        )
        (self._undecided if undecided else self._found).append(finding)

    async def _look_at_circles(self) -> None:
        inodes = self._comparison.inodes
        for circle in circles({one.ino: one.parent for one in inodes.values() if one.is_dir}):
            before, after = await self._states(circle), await self._states(circle)
            now = {}
            for ino in circle:
                first, last = inode_of(0, before[ino].record), inode_of(0, after[ino].record)
                if first is not None and last is not None and first.version == last.version:
                    now[ino] = last.parent
            if any(set(again) == set(circle) for again in circles(now)):
                self._found.append(circle_finding(inodes, circle))

    async def _look_at_links(self, suspects: set[int]) -> None:
        for _ in range(ROUNDS_MAX):
            if not suspects:
                return
            names: defaultdict[int, list[NameFacts]] = defaultdict(list)

            def take(name: NameFacts, names: dict[int, list[NameFacts]] = names, suspects: set[int] = suspects) -> None:
                if name.ino in suspects:
                    names[name.ino].append(name)

            before = await self._states(suspects)
            await each(partial(self._read_names, take=take), self._links.daemons)
            after = await self._states(suspects)
            again = set()
            for ino in suspects:
                home = self._links.shard_map.of_ino(ino)
                first, last = inode_of(home, before[ino].record), inode_of(home, after[ino].record)
                if last is None:
                    continue
                if first is None or first.version != last.version:
                    again.add(ino)
                    continue
                kept = after[ino].pending and after[ino].held
                self._found += (
                    one for one in link_findings(last, names[ino]) if not (one.problem is Problem.UNUSED and kept)
                )
            suspects = again
        for ino in suspects:
            home = self._links.shard_map.of_ino(ino)
            self._undecided.append(Finding(problem=Problem.LINKS, daemon=home, ino=ino, what="it kept changing"))

    # ── repair ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """Remove what is orphaned or leaked; return what was dealt with, each with an error, empty if it has gone.

        The daemons look once more before they remove anything.
        """
        done: dict[Finding, str] = {}

        async def one_of_them(finding: Finding) -> None:
            try:
                done[finding] = "" if await self._remove(finding) else "it is in use now"
            except (Conflict, Stale, NotEmpty) as error:
                done[finding] = f"it has changed: {error}"
            except FsError as error:
                done[finding] = str(error)

        removable = [one for one in findings if _removable(one)]
        await some_at_once(one_of_them, removable, REQUESTS_MAX)
        return done

    async def _remove(self, finding: Finding) -> bool:
        daemon, ino = finding.daemon, finding.ino
        match finding.problem:
            case Problem.NAMELESS | Problem.UNUSED:
                await self._ask(daemon, RemoveInode(ino, finding.version), Done)
            case Problem.CHUNKS:
                await self._ask(daemon, RemoveOrphans((ino,)), RemoveOrphansReply)
                held = await self._ask(daemon, HeldChunks(ino, 0, 0), HeldChunksReply)
                return not held.chunks
            case Problem.STRAY_FILE:
                folder, _, name = finding.file.partition("/")
                await self._ask(daemon, RemoveStrays(int(folder, 16), (name,)), RemoveOrphansReply)
            case Problem.SPACE:
                reply = await self._ask(daemon, ExamineFile(ino, settle=True), ExamineFileReply)
                return reply.state == EXAMINED_QUIET
            case _:
                await self._sweep(daemon, finding.name[:1], remove=True)
        return True


def _removable(finding: Finding) -> bool:
    return bool(finding.problem.category is not Category.DAMAGED and (finding.ino or finding.problem is Problem.RECORD))


def inode_of(daemon: int, record: bytes) -> InodeFacts | None:
    """Read the record of an inode; None if there is none, or if it cannot be read: its daemon reports that."""
    try:
        inode = _decode_inode(record)
    except msgspec.DecodeError:
        return None
    return InodeFacts(
        daemon,
        inode.ino,
        inode.mode,
        inode.nlink,
        inode.end,
        inode.allocated,
        inode.chunk_size,
        inode.width,
        inode.parent,
        inode.entries,
        inode.version,
    )


def name_of(daemon: int, key: bytes, value: bytes) -> NameFacts:
    """Read the record of a name (services/inodes.py)."""
    return NameFacts(
        daemon, disk.number(key), key[9:], int.from_bytes(value[:8], "big"), int.from_bytes(value[16:18], "big")
    )


def _of_record(daemon: int, key: bytes, problem: Problem) -> Finding:
    number = disk.number(key)
    if problem is Problem.RECORD:
        what = f"{_RECORDS[key[:1]]} {printable(key[9:])}".rstrip()
        return Finding(problem=problem, daemon=daemon, ino=number, name=key, what=what)
    if key.startswith(disk.ENTRY):
        return Finding(problem=problem, daemon=daemon, ino=0, parent=number, name=key[9:], what="a name")
    return Finding(problem=problem, daemon=daemon, ino=number)


_RECORDS = {
    disk.POSITION: "position of a name",
    disk.XATTR: "extended attribute",
    disk.TARGET: "target of a symbolic link",
    disk.WRITE_OPEN: "file that a session has open, without the session",
    disk.OUTCOME: "outcome of a request, without its session",
}


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + ITEMS_MAX] for start in range(0, len(items), ITEMS_MAX))
