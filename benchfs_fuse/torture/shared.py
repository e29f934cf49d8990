"""Remember what all workers did to the directory that they share; tell what cannot have come of it.

Everybody does the same few things there, of which each is done at most once, by one of them:

    counters/K     a number, read, counted up and written under a lock: no value is acknowledged twice, the last one is
                   how many times it was counted
    */N.G.W        tokens: moved between two directories by whoever is first, for the Gth time by worker W. (Each name
                   is new. If two mounts move one file to one name, both may succeed: the kernel of the late one takes
                   old and new name for two links of one file while it remembers the old one, and has nothing to do.)
    claims/N       made anew or by a link to ``source``: one winner
    log            records appended by all: each is there once, whole
    lock-K/holder  locked by one worker for a while, who has written there who it is: that is there as long
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .manifest import Entry, Words

COUNTERS = 2
#: In directories of their own: those are spread over the daemons.
LOCKS = 4
TOKENS = 8
PLACES = ("here", "there")
#: Bytes of one record of the log.
RECORD = 64
#: Kinds of operations of which something is left here (``Shared.end``).
KINDS = ("count", "move", "claim", "log")


def record(worker: int, serial: int) -> bytes:
    """Return a record of the log."""
    return (
        f"{worker}.{serial} {random.Random(f'{worker}.{serial}').random()}".ljust(RECORD - 1)[: RECORD - 1].encode()
        + b"\n"
    )


def holder(worker: int, serial: int) -> bytes:
    """Return what a worker writes into what it holds the lock of."""
    return f"{worker}.{serial}".encode().ljust(20)


def worker_of(holder: bytes) -> int:
    """Return who wrote that into a lock's file."""
    return int(holder.partition(b".")[0])


def lock_file(root: Path, number: int) -> Path:
    """Return where one of the locks is."""
    return root / f"lock-{number}" / "holder"


def token(number: int) -> bytes:
    """Return what a token holds."""
    return f"token {number}".encode()


class Shared:
    """Follow what all workers say of the shared directory."""

    def __init__(self) -> None:
        self._counted: dict[int, set[int]] = defaultdict(set)
        self._moved: dict[int, set[int]] = defaultdict(set)
        #: Winner and way by number of the claim.
        self._won: dict[int, tuple[int, str]] = {}
        self._lost: set[int] = set()
        self._logged: set[bytes] = set()
        self._unsure: list[tuple[int, Words]] = []
        #: What was seen to be wrong at once.
        self.complaints: list[str] = []

    def end(self, worker: int, words: Words, result: Any) -> None:
        """Take what was acknowledged: the value counted to; whether a token was moved, or a claim won."""
        match words:
            case ["count", number]:
                if result in self._counted[number]:
                    self.complaints.append(f"two workers counted counter {number} to {result}: one of them is lost")
                self._counted[number].add(result)
            case ["move", number, generation, *_] if result:
                if generation in self._moved[number]:
                    self.complaints.append(
                        f"token {number} was moved away from where it was after {generation} moves twice"
                    )
                self._moved[number].add(generation)
            case ["claim", number, _] if not result:
                self._lost.add(number)
            case ["claim", number, way]:
                if number in self._won:
                    self.complaints.append(f"workers {self._won[number][0]} and {worker} both made claims/{number}")
                self._won[number] = worker, way
            case ["log", serial]:
                self._logged.add(record(worker, serial))

    def doubt(self, worker: int, words: Words) -> None:
        """Take what was begun and not answered."""
        if words[0] in KINDS:
            self._unsure.append((worker, words))

    def _unsure_of(self, *start: Any) -> int:
        return sum(list(words[: len(start)]) == list(start) for _, words in self._unsure)

    def compare(self, found: Iterable[Entry]) -> Iterator[str]:
        """Say what is wrong with what is there when nobody works any more."""
        entries = {entry.path: entry for entry in found}
        yield from self.complaints
        yield from self._compare_counters(entries)
        yield from self._compare_tokens(entries)
        yield from self._compare_claims(entries)
        yield from self._compare_log(entries["log"].data if "log" in entries else b"")

    def _compare_counters(self, entries: dict[str, Entry]) -> Iterator[str]:
        for number in range(COUNTERS):
            entry = entries.get(f"counters/{number}")
            text = entry.data if entry is not None else b""
            value = int(text) if text.strip().isdigit() else -1
            acknowledged, unsure = self._counted[number], self._unsure_of("count", number)
            if not len(acknowledged) <= value <= len(acknowledged) + unsure:
                yield f"counter {number} is {text[:40]!r}; {len(acknowledged)} times counted, {unsure} times perhaps"
            elif acknowledged and max(acknowledged) > value:
                yield f"counter {number} is {value}, and was {max(acknowledged)}"

    def _compare_tokens(self, entries: dict[str, Entry]) -> Iterator[str]:
        found: dict[int, list[tuple[int, Entry]]] = defaultdict(list)
        for path, entry in entries.items():
            match path.split("/"):
                case [place, name] if place in PLACES:
                    one, times, _ = name.split(".")
                    found[int(one)].append((int(times), entry))
        for number in range(TOKENS):
            if len(found[number]) != 1:
                yield f"token {number} is at {len(found[number])} places"
                continue
            moves, entry = found[number][0]
            if entry.data != token(number) or entry.links != 1:
                yield f"token {number} is {entry.data[:40]!r} with {entry.links} links"
            unknown = set(range(moves)) - self._moved[number]
            if lost := [one for one in unknown if not self._unsure_of("move", number, one)]:
                yield f"token {number} was moved {moves} times; nobody was told of moves {lost}"
            if self._moved[number] and max(self._moved[number]) >= moves:
                yield f"token {number} was moved {moves} times; move {max(self._moved[number])} was acknowledged"

    def _compare_claims(self, entries: dict[str, Entry]) -> Iterator[str]:
        there = {int(path.rpartition("/")[2]): entry for path, entry in entries.items() if path.startswith("claims/")}
        for number in self._won.keys() - there.keys():
            yield f"claims/{number} is missing; worker {self._won[number][0]} made it"
        for number in self._lost - there.keys():
            yield f"claims/{number} is missing; it was there when somebody wanted to make it"
        for number in there.keys() - self._won.keys():
            if not self._unsure_of("claim", number):
                yield f"claims/{number} is there; nobody was told that it was made"
        source = entries.get("source")
        if source is None:
            yield "source is missing"
            return
        links = {number for number, entry in there.items() if entry.ino == source.ino}
        if source.links != len(links) + 1:
            yield f"source has {source.links} links and {len(links) + 1} names"
        for number, (_, way) in self._won.items():
            if number in there and (number in links) != (way == "link"):
                yield f"claims/{number} was made by {way}, and is {'' if number in links else 'no '}link"

    def _compare_log(self, log: bytes) -> Iterator[str]:
        records = Counter(log[start : start + RECORD] for start in range(0, len(log), RECORD))
        unsure = {record(worker, words[1]) for worker, words in self._unsure if words[0] == "log"}
        empty = records.pop(bytes(RECORD), 0)
        for one in self._logged - records.keys():
            yield f"the log lacks {one.split()[0].decode()}, which was acknowledged"
        for one, count in records.items():
            if count > 1:
                yield f"the log has {one[:20]!r} {count} times"
            elif one not in self._logged and one not in unsure:
                yield f"the log has {one[:20]!r}, which nobody has acknowledged"
        # A mount that is killed between reserving a range and writing it leaves zeros.
        if empty > len(unsure - records.keys()):
            yield f"the log has {empty} records of zeros"
