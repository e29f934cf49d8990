"""Do the steps of an operation on names, on this daemon at once, over several daemons by two-phase commit.

On one daemon the steps are checked and applied without an await in between, in one batch. Over several:

1. Every daemon concerned is prepared, in ascending order of their numbers, this one in its turn: locks taken (waited
   for by event), steps checked, and at the others written to the store under T and synced. The order is the same
   everywhere, so two transactions cannot wait for each other.
2. One batch here is the commit point: our own steps applied, the decision under T with the daemons to be told, and the
   client's recorded outcome. It is synced.
3. The others are told, all at once, for as long as it takes, and apply what they prepared. When all have answered the
   client is answered, so that its next operation sees the result everywhere.
4. Behind the reply the others sync what they applied (Secure, for all decisions told meanwhile at once); then the
   decision record goes.

Before the decision an error, the deadline or a cancellation aborts: nothing has happened, the others are told behind
the reply. After it a cancellation changes nothing.

What a crash leaves, and who ends it:

    crash of                        left behind                 ended by
    coordinator before the decision prepared steps at others    its next start: Finish with counter 0 aborts all that
                                                                earlier incarnations left undecided (presumed abort)
    coordinator after the decision  decision record             its next start: tells everybody again
    participant, prepared           its record                  its next start: takes the locks before it serves; the
                                                                coordinator's Finish is sent until it is answered

A power cut takes back what a store was not asked to sync, on each daemon from another moment on. So nobody applies
anything before all have prepared, and the coordinator has decided, on stable storage, and the decision stays until all
have applied it there. What is left to be taken back:

    Finish, commit                  the steps are prepared again: Secure finishes them, sent until it is answered
    Finish, abort                   likewise: the participant asks at its start (InDoubt) and is told
    the coordinator's forgetting    it tells everybody again, who knows nothing of it any more

These two syncs are all that an operation over several daemons pays; one on a single daemon pays none.

RPCs between daemons per transaction: 2 for each participant besides the coordinator (Prepare, Finish), and behind the
reply 1 for all that were told meanwhile (Secure); at each start of a daemon 1 to every other daemon. An operation on
one daemon needs none.
"""

import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from .. import disk
from ..errors import Conflict, DaemonUnreachable, FsError, ProtocolError
from ..limits import REFUSED_MAX
from ..model import Attrs
from ..rpc.messages import (
    Body,
    Done,
    Finish,
    FinishReply,
    InDoubt,
    InDoubtReply,
    Prepare,
    Secure,
    Step,
    TxId,
)
from .calls import Call, Peers
from .inodes import Draft, Inode, Inodes
from .jobs import Jobs, persist
from .locks import Locks
from .parallel import each
from .steps import apply, check, place, wanted

_log = logging.getLogger(__name__)

#: Transactions in one Secure or InDoubt: some 10 KiB.
PAGE_MAX = 512

_KEY = struct.Struct(">HQQ")
_encode = msgspec.msgpack.Encoder().encode
_decode_steps = msgspec.msgpack.Decoder(tuple[Step, ...]).decode
_decode_daemons = msgspec.msgpack.Decoder(tuple[int, ...]).decode

#: Return the attributes that an inode has after a transaction, as far as they are known here.
AttrsOf = Callable[[int], Attrs | None]


class Plan(NamedTuple):
    """Say what an operation does: its steps, its reply, and what else of this daemon's goes into the same batch.

    ``reply`` is called after the steps were applied in a draft; over several daemons a second time, when the others
    have told their inodes' attributes. A retry gets the first.
    """

    steps: Sequence[Step]
    reply: Callable[[AttrsOf], Body]
    also: Callable[[Draft, Call], None] | None = None


class _Telling:
    """Follow the telling of one decision: ``told`` is set when all have answered."""

    def __init__(self) -> None:
        self.told = trio.Event()
        self.attrs: dict[int, Attrs] = {}


class Transactions:
    """Coordinate and take part. ``unlinked`` is called in a draft with an inode that lost its last name."""

    def __init__(
        self,
        inodes: Inodes,
        locks: Locks,
        peers: Peers,
        jobs: Jobs,
        incarnation: int,
        unlinked: Callable[[Draft, Inode], None],
        prepare_timeout_s: float,
    ) -> None:
        self._inodes = inodes
        self._store = inodes.store
        self._locks = locks
        self._peers = peers
        self._jobs = jobs
        self._incarnation = incarnation
        self._unlinked = unlinked
        self.prepare_timeout_s = prepare_timeout_s
        self._counter = 0
        #: Ours and decided by earlier incarnations, with the daemons to be told, and those that are still to be told.
        self._inherited: dict[bytes, tuple[TxId, Sequence[int], set[int]]] = {}
        #: Others', prepared here.
        self._prepared: dict[bytes, tuple[Step, ...]] = {}
        #: Others', aborted before their Prepare came; oldest first.
        self._refused: dict[bytes, None] = {}
        self._inherited_told = trio.Event()
        #: Of those that were prepared when we started: whose end we have not heard, and how many ended in which way.
        self._found: set[bytes] = set()
        self._found_committed = self._found_aborted = 0
        #: Ours that are under way and not yet decided.
        self._undecided: set[bytes] = set()
        #: Ours that were told and are not known to be on stable storage everywhere, by daemon; and the daemons that
        #: each decision waits for.
        self._to_secure: dict[int, dict[bytes, TxId]] = {}
        self._unsecured: dict[bytes, set[int]] = {}
        #: Decisions that are being told and whose clients have gone away.
        self._abandoned: set[_Telling] = set()

    @property
    def prepared_count(self) -> int:
        """Count the transactions of others that wait here for their end."""
        return len(self._prepared)

    # ── coordinator ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply_here(self, plan: Plan, draft: Draft, call: Call) -> Body | None:
        """Do a plan whose steps all concern this daemon; None if they do not. Blocked, and what a step raises.

        ``draft`` may hold what was read for the plan, if nothing was awaited since.
        """
        here = self._inodes.daemon_id
        home = self._inodes.home
        if any(home(place(step)) != here for step in plan.steps):
            return None
        if len(self._locks):
            self._locks.check(wanted(plan.steps))
        for step in plan.steps:
            check(draft, step)
        for step in plan.steps:
            apply(draft, step, self._unlinked)
        return self._commit(plan, draft, call)

    def _commit(self, plan: Plan, draft: Draft, call: Call) -> Body:
        if plan.also is not None:
            plan.also(draft, call)
        reply = plan.reply(draft.attrs)
        call.commit(draft, reply)
        return reply

    async def execute(self, plan: Plan, call: Call) -> Body:
        """Do a plan wherever its steps are. Conflict: look again and make another plan.

        DaemonUnreachable: a daemon did not answer in time; nothing was changed.
        """
        here = self._inodes.daemon_id
        homes: dict[int, list[Step]] = {}
        for step in plan.steps:
            homes.setdefault(self._inodes.home(place(step)), []).append(step)
        if homes.keys() <= {here}:
            reply = self.apply_here(plan, self._inodes.draft(), call)
            assert reply is not None
            return reply
        self._counter += 1
        txid = TxId(here, self._incarnation, self._counter)
        key = _key(txid)
        self._undecided.add(key)
        own = homes.get(here, [])
        locked: dict[bytes, bool] = {}
        asked: list[int] = []
        try:
            with trio.fail_after(self.prepare_timeout_s):
                for daemon in sorted(homes):
                    if daemon == here:
                        await self._locks.acquire(keys := wanted(own))
                        locked = keys
                        draft = self._inodes.draft()
                        for step in own:
                            check(draft, step)
                    else:
                        asked.append(daemon)
                        await self._prepare_at(daemon, Prepare(txid, tuple(homes[daemon])), asked)
            draft = self._inodes.draft()
            for step in own:
                apply(draft, step, self._unlinked)
            draft.put(key, _encode(asked))
            reply = self._commit(plan, draft, call)
        except BaseException as error:
            if asked:
                self._jobs.start(self._tell, txid, asked, False, _Telling())
            if isinstance(error, trio.TooSlowError):
                raise DaemonUnreachable(f"daemons {asked} were not prepared in {self.prepare_timeout_s} s") from None
            raise
        finally:
            self._undecided.discard(key)
            self._locks.release(locked)
        telling = _Telling()
        self._jobs.start(self._tell, txid, asked, True, telling)
        try:
            await telling.told.wait()
        except trio.Cancelled:
            self._abandoned.add(telling)
            raise
        return plan.reply(lambda ino: telling.attrs.get(ino) or self._attrs_here(ino)) if telling.attrs else reply

    async def wait_told(self) -> None:
        """Wait until everybody knows what earlier incarnations decided."""
        await self._inherited_told.wait()

    async def wait_settled(self) -> None:
        """Wait until everybody knows our earlier decisions, but for those whose clients wait for that themselves."""
        await self.wait_told()
        for telling in tuple(self._abandoned):
            await telling.told.wait()

    def _attrs_here(self, ino: int) -> Attrs | None:
        inode = self._inodes.find(ino)
        return None if inode is None else inode.attrs()

    async def _prepare_at(self, daemon: int, request: Prepare, asked: list[int]) -> None:
        """Prepare another daemon. One that refuses has kept nothing and need not be told the end."""
        try:
            await self._peers.call(daemon, request, Done)
        except FsError:
            asked.remove(daemon)
            raise

    async def _tell(self, txid: TxId, daemons: Sequence[int], commit: bool, telling: _Telling) -> None:
        """Tell the end of a transaction to everybody, a decision when it is on stable storage."""
        if commit:
            await persist(f"sync of the decision on {txid}", self._store.sync)

        async def one(daemon: int) -> None:
            telling.attrs.update((attrs.ino, attrs) for attrs in await self._finish_at(daemon, txid, commit))

        await each(one, daemons)
        telling.told.set()
        self._abandoned.discard(telling)
        if commit:
            self._told(txid, daemons)

    async def _finish_at(self, daemon: int, txid: TxId, commit: bool) -> Sequence[Attrs]:
        attrs: Sequence[Attrs] = ()

        async def attempt() -> None:
            nonlocal attrs
            attrs = (await self._peers.call(daemon, Finish(txid, commit), FinishReply)).attrs

        await persist(f"Finish of {txid} at daemon {daemon}", attempt)
        return attrs

    def _told(self, txid: TxId, daemons: Sequence[int]) -> None:
        """See to it that a decision is forgotten when those who were told have it on stable storage."""
        key = _key(txid)
        self._unsecured[key] = set(daemons)
        for daemon in daemons:
            waiting = self._to_secure.setdefault(daemon, {})
            if not waiting:
                self._jobs.start(self._secure_at, daemon)
            waiting[key] = txid

    async def _secure_at(self, daemon: int) -> None:
        """Have one daemon sync what it was told, until it has been told nothing more meanwhile."""
        waiting = self._to_secure[daemon]
        while waiting:
            page = dict(itertools.islice(waiting.items(), PAGE_MAX))
            what = f"Secure of {len(page)} transactions at daemon {daemon}"
            await persist(what, partial(self._peers.call, daemon, Secure(tuple(page.values())), Done))
            for key in page:
                self._unsecured[key].discard(daemon)
            await persist("removal of decision records", partial(self._forget, page))
            for key in page:
                del waiting[key]

    async def _forget(self, page: Iterable[bytes]) -> None:
        """Forget the decisions that nobody can lose any more."""
        keys = [key for key in page if not self._unsecured.get(key, True)]
        self._store.write([], keys)
        for key in keys:
            del self._unsecured[key]

    # ── participant ──────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, request: Prepare, call: Call) -> Body:
        """Check, lock and remember. Blocked while somebody else holds a lock; a second Prepare finds the first's."""
        key = _key(request.txid)
        if key in self._prepared:
            return Done()
        if key in self._refused:
            raise Conflict(f"{request.txid} was aborted")
        keys = wanted(request.steps)
        self._locks.check(keys)
        draft = self._inodes.draft()
        for step in request.steps:
            check(draft, step)
        draft.put(key, _encode(request.steps))
        draft.after_write.append(lambda: self._hold(key, request.steps))
        reply = Done()
        call.commit(draft, reply)
        return reply

    def _hold(self, key: bytes, steps: tuple[Step, ...]) -> None:
        self._locks.take(wanted(steps))
        self._prepared[key] = steps

    def finish(self, request: Finish, call: Call) -> Body:
        """Apply or forget what was prepared, and unlock."""
        if request.txid.counter == 0:
            return self._finish_older(request.txid, call)
        key = _key(request.txid)
        steps = self._prepared.get(key)
        if steps is None:
            if not request.commit:
                self._refuse(key)
            return FinishReply(())
        draft = self._inodes.draft()
        changed: list[int] = []
        if request.commit:
            changed = [ino for step in steps if (ino := apply(draft, step, self._unlinked))]
        reply = FinishReply(tuple(attrs for ino in changed if (attrs := draft.attrs(ino)) is not None))
        self._end(draft, key, commit=request.commit)
        call.commit(draft, reply)
        return reply

    def _finish_older(self, txid: TxId, call: Call) -> Body:
        """Abort what a coordinator's earlier incarnations prepared here and did not decide: it told the rest before."""
        first, last = (_KEY.pack(txid.daemon, incarnation, 0) for incarnation in (0, txid.incarnation))
        draft = self._inodes.draft()
        for key in self._prepared:
            if first <= key[1:] < last:
                self._end(draft, key, commit=False)
        reply = FinishReply(())
        call.commit(draft, reply)
        return reply

    def secure(self, request: Secure, call: Call) -> Body:
        """Finish what a power cut has taken back; the store is to be synced before this is answered."""
        for txid in request.txids:
            self.finish(Finish(txid, True), call)
        return Done()

    def in_doubt(self, request: InDoubt, call: Call) -> Body:
        """Tell which of our transactions are aborted: those that were not decided and are not under way."""
        del call
        return InDoubtReply(tuple(txid for txid in request.txids if not self._is_known(_key(txid))))

    def _is_known(self, key: bytes) -> bool:
        return key in self._undecided or self._store.get(key) is not None

    def _end(self, draft: Draft, key: bytes, *, commit: bool) -> None:
        """Forget a prepared transaction with the draft, and unlock when it is written."""

        def unlock() -> None:
            self._locks.release(wanted(self._prepared.pop(key)))
            if key in self._found:
                self._note_found_ended(key, commit)

        draft.delete(key)
        draft.after_write.append(unlock)

    def _note_found_ended(self, key: bytes, commit: bool) -> None:
        """Count the end of what an earlier run had prepared; say what became of it all with the last."""
        self._found.remove(key)
        if commit:
            self._found_committed += 1
        else:
            self._found_aborted += 1
        if not self._found:
            _log.info(
                "operations on names that were prepared here before this start: %d finished, %d undone",
                self._found_committed,
                self._found_aborted,
            )

    def _refuse(self, key: bytes) -> None:
        self._refused[key] = None
        if len(self._refused) > REFUSED_MAX:
            del self._refused[next(iter(self._refused))]

    # ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def recover(self) -> None:
        """Take the locks of prepared transactions again; begin to tell the ends of our own. Once."""
        doubtful: dict[int, list[TxId]] = {}
        for key, value in self._store.scan(disk.TRANSACTION, disk.after(disk.TRANSACTION)):
            txid = TxId(*_KEY.unpack_from(key, 1))
            if txid.daemon == self._inodes.daemon_id:
                daemons = _decode_daemons(value)
                self._inherited[key] = (txid, daemons, set(daemons))
            else:
                self._hold(key, _decode_steps(value))
                self._found.add(key)
                doubtful.setdefault(txid.daemon, []).append(txid)
        if not self._inherited:
            self._inherited_told.set()
        else:
            self._jobs.start(self._say_told, len(self._inherited))
        for daemon in self._inodes.daemons:
            if daemon != self._inodes.daemon_id:
                self._jobs.start(self._resume, daemon, doubtful.get(daemon, []))

    async def _say_told(self, count: int) -> None:
        await self._inherited_told.wait()
        _log.info("operations on names that were decided before this start: %d finished at the other daemons", count)

    async def _resume(self, daemon: int, doubtful: list[TxId]) -> None:
        """Tell another daemon what earlier incarnations decided, that everything else of them is aborted; and ask it.

        ``doubtful``: its transactions that are prepared here.
        """
        for key, (txid, daemons, waiting) in list(self._inherited.items()):
            if daemon in waiting:
                await self._finish_at(daemon, txid, True)
                waiting.discard(daemon)
                if not waiting:
                    self._told(txid, daemons)
                    del self._inherited[key]
        if not self._inherited:
            self._inherited_told.set()
        await self._finish_at(daemon, TxId(self._inodes.daemon_id, self._incarnation, 0), False)
        while page := doubtful[:PAGE_MAX]:
            del doubtful[:PAGE_MAX]
            await persist(f"InDoubt to daemon {daemon}", partial(self._ask, daemon, page))

    async def _ask(self, daemon: int, txids: Sequence[TxId]) -> None:
        """Ask a coordinator about what it has prepared here; forget what it has aborted."""
        reply = await self._peers.call(daemon, InDoubt(tuple(txids)), InDoubtReply)
        draft = self._inodes.draft()
        for txid in reply.aborted:
            key = _key(txid)
            if key in self._prepared:
                self._end(draft, key, commit=False)
        draft.write()


def _key(txid: TxId) -> bytes:
    """Return the key of a transaction: prepared at a participant, decided at its coordinator."""
    try:
        return disk.TRANSACTION + _KEY.pack(txid.daemon, txid.incarnation, txid.counter)
    except struct.error:
        raise ProtocolError(f"{txid} is out of range") from None
