"""Check the table of advisory locks: against a table of single bytes, and rule by rule."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_locks import BYTES, FLOCK, POSIX, READ, UNLOCK, WRITE, Plain

from benchfs_fuse.errors import Deadlock, InvalidArgument, NoLocks
from benchfs_fuse.model import LOCK_END, ClientId, LockType
from benchfs_fuse.services.advisory import LockTable, Owner, Place, Ranges, Wanted

ONE, TWO = ClientId(1), ClientId(2)
A, B, C, D = Owner(ONE, 1), Owner(ONE, 2), Owner(TWO, 1), Owner(TWO, 2)
FILE, OTHER = Place(7, POSIX), Place(8, POSIX)
WHOLE = Place(7, FLOCK)


class Table(LockTable):
    """Remember what was granted."""

    def __init__(self, locks_max: int = 1000) -> None:
        self.granted: list[int] = []
        self.refused: list[int] = []
        super().__init__(self._told, locks_max=locks_max)
        self.resume()

    def _told(self, client_id: ClientId, ticket: int, version: int) -> None:
        (self.granted if version else self.refused).append(ticket)

    def ask(
        self, owner: Owner, type_: LockType, start: int = 0, end: int = LOCK_END, ticket: int = 0, place: Place = FILE
    ) -> bool | None:
        return self.set(Wanted(place, owner, type_, start, end, 100 * owner.client_id + owner.number, ticket)).outcome

    def holds(self, owner: Owner, place: Place = FILE) -> list[tuple[int, int, LockType]]:
        locked = self._places.get(place)
        held = locked.held.get(owner, ()) if locked is not None else ()
        return [(start, end, value.type) for start, end, value in held]


# ── ranges ───────────────────────────────────────────────────────────────────────────────────────────────────────────

POINTS = st.integers(0, BYTES - 1)


def spans() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(POINTS, POINTS).map(lambda pair: (min(pair), max(pair)))


@settings(deadline=None)
@given(st.lists(st.tuples(spans(), st.sampled_from(["a", "b", None, "+"]))))
def test_ranges_are_what_single_bytes_are(changes: list[tuple[tuple[int, int], str | None]]) -> None:
    ranges: Ranges[str] = Ranges()
    plain: list[str | None] = [None] * BYTES
    for (start, end), value in changes:

        def new(old: str | None, value: str | None = value) -> str | None:
            return (old or "") + "+" if value == "+" else value

        ranges.change(start, end, new)
        plain[start : end + 1] = [new(old) for old in plain[start : end + 1]]
        seen: list[str | None] = [None] * BYTES
        for first, last, found in ranges:
            seen[first : last + 1] = [found] * (last - first + 1)
        assert seen == plain
        pieces = list(ranges)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(pieces))
        assert all(one[1] + 1 < other[0] or one[2] != other[2] for one, other in itertools.pairwise(pieces))
        divided = ranges.segments(start, end)
        assert [byte for first, last, _ in divided for byte in range(first, last + 1)] == list(range(start, end + 1))
        assert ranges.overlapping(start, end) == [piece for piece in pieces if piece[0] <= end and start <= piece[1]]


# ── against the reference ─────────────────────────────────────────────────────────────────────────────────────────────


def same(table: Table, plain: Plain) -> None:
    """Check that both hold and await the same, and that the table's own indexes agree with it."""
    for place in {*plain.bytes, *table._places}:
        for owner in (A, B, C, D):
            held: dict[int, LockType] = {}
            for start, end, type_ in table.holds(owner, place):
                held.update(dict.fromkeys(range(start, min(end, BYTES - 1) + 1), type_))
            expected = {
                byte: by_owner[owner] for byte, by_owner in enumerate(plain.bytes.get(place, [])) if owner in by_owner
            }
            assert held == expected, (place, owner)
    assert sorted(ticket for _, ticket in table._tickets) == sorted(wanted.ticket for wanted in plain.waiting)
    assert sorted(table.granted) == sorted(plain.granted)
    pieces = sum(len(held) for locked in table._places.values() for held in locked.held.values())
    assert len(table) == pieces + len(plain.waiting)
    for locked in table._places.values():
        assert locked.held or locked.waiting
        writers = {owner for owner, held in locked.held.items() if any(value.type is WRITE for _, _, value in held)}
        assert locked.writers == writers
    assert set(table._where) == {
        owner.client_id
        for locked in table._places.values()
        for owner in [*locked.held, *(wanted.owner for wanted in locked.waiting.values())]
    }


STEP = st.one_of(
    st.tuples(
        st.just("set"),
        st.sampled_from([FILE, FILE, OTHER, WHOLE]),
        st.sampled_from([A, B, C, D]),
        st.sampled_from([READ, WRITE, WRITE, UNLOCK]),
        spans(),
        st.booleans(),
    ),
    st.tuples(st.just("cancel"), st.integers(1, 30)),
    st.tuples(st.just("drop"), st.sampled_from([ONE, TWO])),
    st.tuples(st.just("get"), st.sampled_from([A, C]), st.sampled_from([READ, WRITE]), spans()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_the_table_is_what_single_bytes_are(steps: list[tuple[object, ...]]) -> None:
    table, plain = Table(), Plain()
    for number, step in enumerate(steps, start=1):
        match step:
            case ("set", Place() as place, Owner() as owner, LockType() as type_, (int(start), int(end)), wait):
                if place.kind is FLOCK or end == BYTES - 1:
                    start, end = (0 if place.kind is FLOCK else start), LOCK_END
                wanted = Wanted(place, owner, type_, start, end, 0, number if wait and type_ is not UNLOCK else 0)
                expected = plain.set(wanted)
                if expected is Deadlock:
                    with pytest.raises(Deadlock):
                        table.set(wanted)
                else:
                    assert table.set(wanted).outcome is expected
            case ("cancel", int(ticket)):
                waits = [wanted for wanted in plain.waiting if wanted.ticket == ticket]
                for client_id in (ONE, TWO):
                    mine = any(wanted.owner.client_id == client_id for wanted in waits)
                    assert table.cancel(client_id, ticket) == mine
                plain.waiting = [wanted for wanted in plain.waiting if wanted not in waits]
            case ("drop", client_id):
                table.drop_client(ClientId(int(str(client_id))))
                plain.drop(ClientId(int(str(client_id))))
            case ("get", Owner() as owner, LockType() as type_, (int(start), int(end))):
                wanted = Wanted(FILE, owner, type_, start, end)
                found, blockers = table.get(wanted), plain.blockers(wanted)
                assert (found is None) == (not blockers)
                assert found is None or (found.owner in blockers and found.start <= end and start <= found.end)
        same(table, plain)
    for client_id in (ONE, TWO):
        table.drop_client(client_id)
    assert len(table) == 0 and not table._places and not table._tickets and not table._waiting and not table._where


# ── rule by rule ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranges_split_and_merge() -> None:
    table = Table()
    table.ask(A, WRITE, 0, 99)
    table.ask(A, UNLOCK, 40, 49)
    assert table.holds(A) == [(0, 39, WRITE), (50, 99, WRITE)]
    table.ask(A, READ, 30, 59)
    assert table.holds(A) == [(0, 29, WRITE), (30, 59, READ), (60, 99, WRITE)]
    table.ask(A, WRITE, 30, 59)
    assert table.holds(A) == [(0, 99, WRITE)]


def test_the_two_kinds_do_not_see_each_other() -> None:
    table = Table()
    assert table.ask(A, WRITE)
    assert table.ask(C, WRITE, place=WHOLE)
    assert table.ask(A, WRITE, place=WHOLE) is False
    assert table.ask(C, WRITE) is False


def test_those_that_exclude_each_other_are_granted_first_come_first_served() -> None:
    table = Table()
    table.ask(A, WRITE)
    for ticket in range(1, 6):
        assert table.ask(Owner(TWO, ticket), WRITE, ticket=ticket) is None
    for ticket in range(1, 6):
        table.ask(A if ticket == 1 else Owner(TWO, ticket - 1), UNLOCK)
        assert table.granted == list(range(1, ticket + 1))


def test_a_reader_is_not_kept_waiting_by_a_writer_that_waits() -> None:
    table = Table()
    table.ask(A, READ)
    assert table.ask(B, WRITE, ticket=1) is None
    assert table.ask(C, READ, ticket=2) is True
    table.ask(A, UNLOCK)
    assert table.granted == []
    table.ask(C, UNLOCK)
    assert table.granted == [1]


def test_a_grant_that_is_a_downgrade_lets_those_before_it_go_on() -> None:
    table = Table()
    table.ask(A, WRITE, 0, 9)
    table.ask(D, WRITE, 20, 20)
    assert table.ask(B, READ, 0, 5, ticket=1) is None
    assert table.ask(A, READ, 0, 20, ticket=2) is None
    table.ask(D, UNLOCK)
    assert table.granted == [2, 1]


def test_a_deadlock_is_found_over_several_files_and_owners() -> None:
    table = Table()
    table.ask(A, WRITE)
    table.ask(B, WRITE, place=OTHER)
    table.ask(C, WRITE, 5, 5, place=Place(9, POSIX))
    assert table.ask(A, READ, ticket=1, place=OTHER) is None
    assert table.ask(B, READ, ticket=2, place=Place(9, POSIX)) is None
    with pytest.raises(Deadlock):
        table.ask(C, WRITE, 3, 4, ticket=3)
    assert table.holds(C, Place(9, POSIX)) == [(5, 5, WRITE)], "nothing is lost by it"
    assert table.ask(C, WRITE, 3, 4) is False, "who does not wait is merely refused"


def test_two_readers_that_want_to_write_are_a_deadlock() -> None:
    table = Table()
    table.ask(A, READ)
    table.ask(C, READ)
    assert table.ask(A, WRITE, ticket=1) is None
    with pytest.raises(Deadlock):
        table.ask(C, WRITE, ticket=2)
    table.ask(C, UNLOCK)
    assert table.granted == [1] and table.holds(A) == [(0, LOCK_END, WRITE)]


def test_flock_converts_by_giving_back_first_and_knows_no_deadlock() -> None:
    table = Table()
    table.ask(A, READ, place=WHOLE)
    table.ask(C, READ, place=WHOLE)
    assert table.ask(A, WRITE, ticket=1, place=WHOLE) is None
    assert table.holds(A, WHOLE) == []
    assert table.ask(C, WRITE, place=WHOLE) is True
    assert table.ask(C, READ, place=WHOLE) is True and table.granted == []
    assert table.ask(B, WRITE, place=WHOLE) is False
    table.ask(C, UNLOCK, place=WHOLE)
    assert table.granted == [1]
    assert table.ask(C, READ, place=WHOLE, ticket=2) is None
    assert table.ask(A, READ, place=WHOLE) is True and table.granted == [1, 2]


def test_what_is_in_the_way_is_told_with_its_pid() -> None:
    table = Table()
    table.ask(C, WRITE, 50, 59)
    table.ask(B, READ, 10, 19)
    found = table.get(Wanted(FILE, A, WRITE, 0, LOCK_END))
    assert found is not None and (found.owner, found.type, found.start, found.end, found.pid) == (B, READ, 10, 19, 102)
    found = table.get(Wanted(FILE, A, READ, 0, LOCK_END))
    assert found is not None and (found.owner, found.type, found.pid) == (C, WRITE, 201)
    assert table.get(Wanted(FILE, B, WRITE, 0, 49)) is None


def test_a_client_has_so_many_locks_and_no_more() -> None:
    table = Table(locks_max=10)
    for byte in range(9):
        table.ask(A, WRITE, 10 * byte, 10 * byte + 4)
    table.ask(C, WRITE, 1000, 1000)
    assert table.ask(B, WRITE, 1000, 1000, ticket=1) is None
    for owner in (A, B):
        with pytest.raises(NoLocks):
            table.ask(owner, READ, 2000, 2000)
    with pytest.raises(NoLocks):
        table.ask(A, UNLOCK, 1, 2)
    table.ask(A, UNLOCK, 0, 2)
    table.ask(A, UNLOCK, 3, 4)
    assert table.ask(A, READ, 2000, 2000)
    assert table.ask(C, READ, 3000, 3000), "others have their own"


def test_while_locks_may_be_reclaimed_nobody_gets_what_he_has_not() -> None:
    table = Table()
    table.paused = True
    table.claim(Wanted(FILE, A, WRITE, 0, 9))
    assert table.ask(A, READ, 2, 3) is True
    assert table.ask(A, WRITE, 2, 3) is False
    assert table.ask(C, READ, 20, 29, ticket=1) is None
    assert table.ask(B, READ, 4, 4, ticket=2) is None
    table.ask(A, UNLOCK, 4, 4)
    assert table.granted == []
    table.claim(Wanted(FILE, D, WRITE, 20, 20))
    table.resume()
    assert table.granted == [2]
    table.ask(D, UNLOCK)
    assert table.granted == [2, 1]


def test_a_deadlock_that_nobody_could_see_before_all_had_reclaimed() -> None:
    table = Table()
    table.paused = True
    table.claim(Wanted(FILE, A, WRITE, 0, 0))
    assert table.ask(A, WRITE, 1, 1, ticket=1) is None
    assert table.ask(C, WRITE, 0, 0, ticket=2) is None
    table.claim(Wanted(FILE, C, WRITE, 1, 1))
    table.resume()
    assert table.refused == [1] and table.granted == []
    with pytest.raises(Deadlock):
        table.ask(A, WRITE, 1, 1, ticket=1)


def test_locks_that_two_reclaimed_are_free_when_both_are_given_back() -> None:
    table = Table()
    table.paused = True
    table.claim(Wanted(FILE, A, WRITE, 0, 9))
    table.claim(Wanted(FILE, C, WRITE, 0, 9))
    table.resume()
    assert table.ask(D, READ, 0, 0, ticket=1) is None
    table.ask(A, UNLOCK)
    assert table.granted == []
    table.ask(C, UNLOCK)
    assert table.granted == [1]


def test_one_inode_of_a_client_is_dropped() -> None:
    table = Table()
    for owner, place in ((A, FILE), (A, OTHER), (B, WHOLE), (C, Place(9, POSIX))):
        table.ask(owner, WRITE, place=place)
    table.ask(C, READ, ticket=1)
    table.ask(D, READ, ticket=2, place=WHOLE)
    table.drop_ino(ONE, 7)
    assert sorted(table.granted) == [1, 2]
    assert table.holds(A, OTHER) == [(0, LOCK_END, WRITE)]


@pytest.mark.parametrize(
    ("place", "start", "end"),
    [(FILE, -1, 5), (FILE, 5, 4), (FILE, 0, LOCK_END + 1), (WHOLE, 0, 5), (WHOLE, 1, LOCK_END)],
)
def test_bad_ranges_are_refused(place: Place, start: int, end: int) -> None:
    with pytest.raises(InvalidArgument):
        Table().ask(A, WRITE, start, end, place=place)


def test_a_request_that_waits_is_not_put_in_twice() -> None:
    table = Table()
    table.ask(A, WRITE)
    for _ in range(3):
        assert table.ask(C, WRITE, ticket=5) is None
    assert len(table) == 2
    table.ask(A, UNLOCK)
    assert table.granted == [5]
    assert table.ask(C, WRITE, ticket=5) is True
