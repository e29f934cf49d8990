"""The manifests of the torture: what they complain about, and what they do not."""

import random
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.torture.damage import BLOCK, CHUNKS, FILES, PROBLEM, Damage, kept_bytes
from benchfs_fuse.torture.manifest import Entry, Names, Tree, content
from benchfs_fuse.torture.shared import COUNTERS, TOKENS, Shared, record, token

MODE = 0o640
TOP = Entry("", 1, stat.S_IFDIR | 0o755, 2, 0, b"")
#: Two pieces of data, one over the other.
FIRST, SECOND = content(1, 100), content(2, 50)


def file(
    path: str,
    data: bytes = b"",
    *,
    ino: int = 7,
    mode: int = MODE,
    links: int = 1,
    mtime_ns: int = 0,
    mark: str = "",
) -> Entry:
    return Entry(path, ino, stat.S_IFREG | mode, links, len(data), data, mtime_ns, mark)


def folder(path: str, *, links: int = 2, mode: int = 0o700) -> Entry:
    return Entry(path, hash(path), stat.S_IFDIR | mode, links, 0, b"")


def tree(*done: Sequence[Any]) -> Tree:
    """Return a tree with the file ``1``, which is open, and what was done to it since."""
    made = Tree()
    for words in (["create", "1", 1, MODE], *done):
        made.apply(words)
    return made


#: What was done; what was under way; whether a file may then have these bytes.
WRITE = ["write", 1, 0, 1, 100, False]
OVER = ["write", 1, 50, 2, 50, False]
CLOSE = ["close", 1]
BYTES: list[tuple[list[list[Any]], list[Any] | None, bytes, bool]] = [
    ([WRITE], None, FIRST, True),
    ([WRITE], None, b"", True),  # accepted: may be lost
    ([WRITE], None, FIRST[:60], True),  # in parts
    ([WRITE], None, FIRST[:60].ljust(100, b"\0"), True),
    ([WRITE], None, FIRST[:60] + b"?" * 40, False),
    ([WRITE], None, FIRST + b"?", False),
    ([WRITE, CLOSE], None, b"", False),
    ([WRITE, ["fsync", 1]], None, FIRST[:99], False),
    ([WRITE, ["fsync", 1]], None, FIRST, True),
    ([["write", 1, 0, 1, 100, True]], None, b"", False),
    ([WRITE, OVER], None, FIRST[:50] + SECOND, True),
    ([WRITE, OVER], None, b"\0" * 50 + SECOND, True),
    ([WRITE, OVER], None, FIRST, True),
    ([WRITE, CLOSE, OVER], None, FIRST[:50] + SECOND, True),
    ([WRITE, CLOSE, OVER], None, b"\0" * 50 + SECOND, False),
    ([WRITE, ["write_synced", 1, 50, 2, 50]], None, b"\0" * 50 + SECOND, True),
    ([WRITE, ["write_synced", 1, 50, 2, 50]], None, FIRST, False),
    ([WRITE, ["write_synced", 1, 50, 2, 50]], None, FIRST[:50], False),
    ([WRITE, CLOSE, ["append", 1, 2, 50]], None, FIRST + SECOND, True),
    ([WRITE, CLOSE, ["append", 1, 2, 50]], None, FIRST + SECOND + SECOND, False),
    ([WRITE, CLOSE, ["append", 1, 2, 50]], None, FIRST, False),
    ([WRITE, CLOSE], ["append", 1, 2, 50], FIRST, True),
    ([WRITE, CLOSE], ["append", 1, 2, 50], FIRST + SECOND, True),
    ([WRITE, CLOSE], ["append", 1, 2, 50], FIRST + bytes(50), True),  # reserved and not written
    ([WRITE, CLOSE], ["append", 1, 2, 50], FIRST + SECOND + SECOND, False),
    ([WRITE, CLOSE, ["truncate", 1, 30]], None, FIRST[:30], True),
    ([WRITE, CLOSE, ["truncate", 1, 30]], None, FIRST, False),
    ([WRITE, ["truncate", 1, 30]], None, FIRST[:30], True),
    ([WRITE, ["truncate", 1, 30]], None, bytes(30), True),
    ([WRITE, ["truncate", 1, 30]], None, b"", False),
    ([WRITE, CLOSE, ["truncate", 1, 30], ["truncate", 1, 60]], None, FIRST[:30] + bytes(30), True),
    ([WRITE, CLOSE, ["truncate", 1, 30], ["truncate", 1, 60]], None, FIRST[:60], False),  # came back
    ([WRITE, CLOSE], ["truncate", 1, 30], FIRST[:30], True),
    ([WRITE, CLOSE], ["truncate", 1, 30], FIRST, True),
    ([WRITE, CLOSE], ["truncate", 1, 30], FIRST[:40], False),
    ([WRITE, CLOSE, ["punch", 1, 10, 20]], None, FIRST[:10] + bytes(20) + FIRST[30:], True),
    ([WRITE, CLOSE, ["punch", 1, 10, 20]], None, FIRST, False),
    ([WRITE, ["punch", 1, 10, 20]], None, FIRST, False),
    ([WRITE, ["punch", 1, 10, 20]], None, FIRST[:10] + bytes(20) + FIRST[30:], True),
    ([WRITE, ["punch", 1, 10, 200]], None, FIRST[:10] + bytes(90), True),
    ([WRITE, ["punch", 1, 10, 200]], None, FIRST[:10] + bytes(89) + FIRST[99:], False),
    ([WRITE, CLOSE], ["punch", 1, 10, 20], FIRST, True),
    ([WRITE, CLOSE], ["punch", 1, 10, 20], FIRST[:10] + bytes(20) + FIRST[30:], True),
    ([WRITE, CLOSE], ["punch", 1, 10, 2000], FIRST[:10] + bytes(90), True),
    ([WRITE, CLOSE], ["write_synced", 1, 0, 2, 50], SECOND + FIRST[50:], True),
    ([WRITE, CLOSE], ["write_synced", 1, 0, 2, 50], SECOND[:20] + FIRST[20:], True),
    ([WRITE, CLOSE], ["fsync", 1], FIRST[:50], False),
]


@pytest.mark.parametrize(("done", "under_way", "found", "right"), BYTES)
def test_bytes_are_those_that_may_be_there(
    done: list[list[Any]], under_way: list[Any] | None, found: bytes, right: bool
) -> None:
    assert (not tree(*done).settle([TOP, file("1", found)], under_way)) == right


def test_what_is_there_counts_from_then_on() -> None:
    made = tree(WRITE)
    assert made.settle([TOP, file("1", FIRST[:60])], None) == []
    assert made.settle([TOP, file("1", FIRST)], None) != []
    assert made.settle([TOP, file("1", FIRST[:60])], None) == []


NAMES: list[tuple[list[list[Any]], list[Any] | None, list[Entry], bool]] = [
    ([], None, [file("1")], True),
    ([], None, [], False),
    ([], None, [file("1"), file("2")], False),
    ([], None, [folder("1")], False),
    ([], None, [file("1", mode=0o600)], False),
    ([], None, [file("1", links=2)], False),
    ([["chmod", "1", 0o600]], None, [file("1", mode=0o600)], True),
    ([["chmod", "1", 0o600]], None, [file("1")], False),
    ([], ["chmod", "1", 0o600], [file("1", mode=0o600)], True),
    ([], ["chmod", "1", 0o600], [file("1")], True),
    ([], ["chmod", "1", 0o600], [file("1", mode=0o666)], False),
    ([], None, [file("1", mtime_ns=5)], True),
    ([], None, [file("1", mark="x")], False),
    ([["setxattr", "1", "x"]], None, [file("1", mark="x")], True),
    ([["setxattr", "1", "x"]], None, [file("1")], False),
    ([["setxattr", "1", "x"], ["setxattr", "1", ""]], None, [file("1", mark="x")], False),
    ([["setxattr", "1", "x"]], ["setxattr", "1", "y"], [file("1", mark="x")], True),
    ([["setxattr", "1", "x"]], ["setxattr", "1", "y"], [file("1", mark="y")], True),
    ([["setxattr", "1", "x"]], ["setxattr", "1", ""], [file("1", mark="y")], False),
    ([["utimens", "1", 5]], None, [file("1", mtime_ns=5)], True),
    ([["utimens", "1", 5]], None, [file("1", mtime_ns=6)], False),
    ([["utimens", "1", 5], ["close", 1]], None, [file("1", mtime_ns=6)], False),
    ([["utimens", "1", 5], ["truncate", 1, 0]], None, [file("1", mtime_ns=6)], True),
    ([["utimens", "1", 5]], ["truncate", 1, 0], [file("1", mtime_ns=6)], True),
    ([["utimens", "1", 5]], ["utimens", "1", 6], [file("1", mtime_ns=6)], True),
    ([["utimens", "1", 5]], ["utimens", "1", 6], [file("1", mtime_ns=5)], True),
    ([["utimens", "1", 5]], ["utimens", "1", 6], [file("1", mtime_ns=7)], False),
    ([["link", "1", "2"]], None, [file("1", links=2), file("2", links=2)], True),
    ([["link", "1", "2"]], None, [file("1"), file("2")], False),
    ([["link", "1", "2"]], None, [file("1", links=2), file("2", links=2, ino=8)], False),
    ([["link", "1", "2"]], None, [file("1")], False),
    ([], ["link", "1", "2"], [file("1")], True),
    ([], ["link", "1", "2"], [file("1", links=2), file("2", links=2)], True),
    ([], ["link", "1", "2"], [file("1", links=2)], False),
    ([["rename", "1", "2"]], None, [file("2")], True),
    ([["rename", "1", "2"]], None, [file("1")], False),
    ([], ["rename", "1", "2"], [file("1")], True),
    ([], ["rename", "1", "2"], [file("2")], True),
    ([], ["rename", "1", "2"], [], False),
    ([], ["rename", "1", "2"], [file("1", links=2), file("2", links=2)], False),
    ([["unlink", "1"]], None, [], True),
    ([["unlink", "1"]], None, [file("1")], False),
    ([], ["unlink", "1"], [file("1")], True),
    ([], ["unlink", "1"], [], True),
    ([["unlink", "1"]], ["write", 1, 0, 1, 100, False], [], True),
    ([["mkdir", "2", 0o700]], None, [file("1"), folder("2")], True),
    ([["mkdir", "2", 0o700]], None, [file("1"), folder("2", mode=0o755)], False),
    ([["mkdir", "2", 0o700]], None, [file("1"), folder("2", links=3)], False),
    ([["mkdir", "2", 0o700]], None, [file("1")], False),
    ([], ["mkdir", "2", 0o700], [file("1"), folder("2")], True),
    ([["mkdir", "2", 0o700], ["rename", "1", "2/3"], ["rename", "2", "4"]], None, [folder("4"), file("4/3")], True),
    ([["mkdir", "2", 0o700], ["rename", "1", "2/3"]], ["rename", "2", "4"], [folder("4"), file("4/3")], True),
    ([["mkdir", "2", 0o700], ["rename", "1", "2/3"]], ["rename", "2", "4"], [folder("4"), file("2/3")], False),
    ([["mkdir", "2", 0o700], ["rmdir", "2"]], None, [file("1")], True),
    ([], ["create", "2", 2, 0o644], [file("1"), file("2", ino=8, mode=0o644)], True),
    ([], ["create", "2", 2, 0o644], [file("1"), file("2", ino=7, mode=0o644)], False),
    ([], ["create", "2", 2, 0o644], [file("1"), file("2", b"x", ino=8, mode=0o644)], False),
]


@pytest.mark.parametrize(("done", "under_way", "found", "right"), NAMES)
def test_names_and_attributes_are_those_that_may_be_there(
    done: list[list[Any]], under_way: list[Any] | None, found: list[Entry], right: bool
) -> None:
    top = TOP._replace(links=2 + sum(one.is_directory for one in found))
    assert (not tree(*done).settle([top, *found], under_way)) == right


def test_an_inode_stays() -> None:
    made = tree()
    assert made.settle([TOP, file("1", ino=7)], None) == []
    assert "should be inode 7" in made.settle([TOP, file("1", ino=8)], None)[0]


def test_a_file_that_is_open_lives_without_a_name() -> None:
    made = tree(["unlink", "1"], WRITE)
    assert made.files[1].now == FIRST
    made.apply(CLOSE)
    assert made.files == {}


def test_numbers_are_not_given_twice() -> None:
    made = tree(["mkdir", "5", 0o700], ["log", 9])
    assert made.serial == 9
    made.settle([TOP._replace(links=3), file("1"), folder("5")], ["create", "5/12", 12, MODE])
    assert made.serial == 12


def test_a_difference_is_named() -> None:
    assert Names({"a": 1}, {"": 0o755, "d": 0o700}).difference([TOP, file("b")]) == "missing: a, d/; not to be there: b"


# ── shared ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def together() -> dict[str, Entry]:
    """Return what lies in the shared directory at first."""
    entries = [file(f"counters/{number}", b"0".ljust(20)) for number in range(COUNTERS)]
    entries += [file(f"here/{number}.0.x", token(number)) for number in range(TOKENS)]
    entries += [file("source", ino=9), file("log")]
    return {entry.path: entry for entry in entries}


def with_files(*files: Entry) -> Callable[[dict[str, Entry]], None]:
    return lambda entries: entries.update({one.path: one for one in files})


def moved(moves: int, data: bytes = token(3), links: int = 1) -> Callable[[dict[str, Entry]], None]:
    def change(entries: dict[str, Entry]) -> None:
        del entries["here/3.0.x"]
        entries[f"there/3.{moves}.1"] = file(f"there/3.{moves}.1", data, links=links)

    return change


def counted(value: bytes) -> Callable[[dict[str, Entry]], None]:
    return with_files(file("counters/1", value))


def nothing(entries: dict[str, Entry]) -> None:
    pass


def lost(path: str) -> Callable[[dict[str, Entry]], None]:
    return lambda entries: entries.__delitem__(path)


COUNT, MOVE, LOG = ["count", 1], ["move", 3, 0, "here", "there"], ["log", 5]
CREATE, LINK = ["claim", 1, "create"], ["claim", 1, "link"]
LINKED = with_files(file("source", ino=9, links=2), file("claims/1", ino=9, links=2))
DONE: list[tuple[list[tuple[int, list[Any], Any]], list[list[Any]], Callable[[dict[str, Entry]], None], bool]] = [
    ([], [], nothing, True),
    ([], [], lost("source"), False),
    ([], [], lost("counters/1"), False),
    ([], [], lost("here/3.0.x"), False),
    ([(1, COUNT, 1), (2, COUNT, 2)], [], counted(b"2"), True),
    ([(1, COUNT, 1), (2, COUNT, 2)], [], counted(b"1"), False),
    ([(1, COUNT, 1), (2, COUNT, 2)], [], counted(b"3"), False),
    ([(1, COUNT, 1), (2, COUNT, 1)], [COUNT], counted(b"2"), False),  # one read what the other was about to change
    ([(1, COUNT, 1)], [COUNT], counted(b"2"), True),
    ([(1, COUNT, 1)], [COUNT], counted(b"1"), True),
    ([(1, COUNT, 1)], [COUNT], counted(b""), False),
    ([(1, MOVE, True)], [], moved(1), True),
    ([(1, MOVE, True)], [], nothing, False),
    ([(1, MOVE, False)], [], nothing, True),
    ([(1, MOVE, False)], [], moved(1), False),  # done, and said to have failed: as a retry would that is applied twice
    ([(1, MOVE, True), (2, MOVE, True)], [], moved(1), False),
    ([(1, MOVE, True)], [], moved(1, data=b"other"), False),
    ([(1, MOVE, True)], [], moved(1, links=2), False),
    ([], [MOVE], moved(1), True),
    ([], [MOVE], nothing, True),
    ([], [MOVE], moved(2), False),
    ([], [MOVE], with_files(file("there/3.1.1", token(3))), False),
    ([(1, CREATE, True)], [], with_files(file("claims/1")), True),
    ([(1, CREATE, True)], [], nothing, False),
    ([(1, CREATE, True), (2, CREATE, True)], [], with_files(file("claims/1")), False),
    ([(1, CREATE, True), (2, CREATE, False)], [], with_files(file("claims/1")), True),
    ([(2, CREATE, False)], [], with_files(file("claims/1")), False),
    ([(2, CREATE, False)], [CREATE], nothing, False),
    ([], [CREATE], with_files(file("claims/1")), True),
    ([(1, LINK, True)], [], LINKED, True),
    ([(1, LINK, True)], [], with_files(file("claims/1")), False),
    ([(1, LINK, True)], [], with_files(file("source", ino=9), file("claims/1", ino=9)), False),
    ([(1, CREATE, True)], [], LINKED, False),
    ([], [LINK], with_files(file("source", ino=9, links=2)), False),
    ([(1, LOG, None)], [], with_files(file("log", record(1, 5))), True),
    ([(1, LOG, None)], [], nothing, False),
    ([(1, LOG, None)], [], with_files(file("log", record(1, 5) * 2)), False),
    ([(1, LOG, None)], [], with_files(file("log", bytes(64) + record(1, 5))), False),  # reserved twice
    ([], [LOG], with_files(file("log", record(3, 5))), True),
    ([], [LOG], with_files(file("log", bytes(64))), True),
    ([], [LOG], with_files(file("log", bytes(64) + record(3, 5))), False),
    ([(1, LOG, None)], [LOG], with_files(file("log", record(3, 5)[:32] + record(1, 5) + record(3, 5)[32:])), False),
]


@pytest.mark.parametrize(("done", "unsure", "change", "right"), DONE)
def test_what_is_shared_is_what_became_of_it(
    done: list[tuple[int, list[Any], Any]],
    unsure: list[list[Any]],
    change: Callable[[dict[str, Entry]], None],
    right: bool,
) -> None:
    manifest = Shared()
    for worker, words, result in done:
        manifest.end(worker, words, result)
    for words in unsure:
        manifest.doubt(3, words)
    entries = together()
    change(entries)
    assert (not list(manifest.compare(entries.values()))) == right


# ── taken away ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Files:
    """Be a cluster as far as its chunk files go."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for ino in range(100, 100 + FILES):
            for index in range(CHUNKS):
                (directory / f"{ino:016x}.{index:08x}").write_bytes(bytes(CHUNK_SIZE_MIN))

    def chunk_files(self) -> list[Path]:
        return list(self._directory.iterdir())


def read_blocks(damage: Damage) -> dict[int, list[bytes | None]]:
    """Return what has to be read: all but what was taken away."""
    per_chunk = CHUNK_SIZE_MIN // BLOCK
    found: dict[int, list[bytes | None]] = {}
    for number in range(FILES):
        data = kept_bytes(number)
        found[number] = [
            data[at * BLOCK :][:BLOCK]
            if damage.left.get((100 + number, at // per_chunk), CHUNK_SIZE_MIN) >= (at % per_chunk + 1) * BLOCK
            else None
            for at in range(CHUNKS * per_chunk)
        ]
    return found


def test_exactly_what_was_taken_away_is_missed(tmp_path: Path) -> None:
    kept = [file(str(number), ino=100 + number) for number in range(FILES)]
    damage = Damage(Files(tmp_path), [TOP, *kept], random.Random(1))
    while damage.lose():
        pass
    assert len(damage.left) == FILES * CHUNKS // 2
    assert {0} < set(damage.left.values())
    assert len(list(tmp_path.iterdir())) == FILES * CHUNKS - list(damage.left.values()).count(0)
    right = read_blocks(damage)
    assert list(damage.compare(right)) == []
    found = [{"ino": ino, "chunk": chunk, "problem": PROBLEM} for ino, chunk in damage.left]
    assert damage.without(found) == ([], [])
    other = {"ino": 1, "chunk": 0, "problem": PROBLEM}
    assert damage.without([*found, other]) == ([other], [])
    assert len(damage.without(found[1:])[1]) == 1
    for number in range(FILES):
        for at, block in enumerate(right[number]):
            if block is None or at == 0:
                wrong = [*right[number]]
                wrong[at] = bytes(BLOCK)  # zeros, whether it was taken away or not
                assert len(list(damage.compare({**right, number: wrong}))) >= 1
    whole = next(
        (ino - 100, chunk) for ino in range(100, 104) for chunk in range(CHUNKS) if (ino, chunk) not in damage.left
    )
    lacking = [*right[whole[0]]]
    lacking[whole[1] * CHUNK_SIZE_MIN // BLOCK] = None
    assert len(list(damage.compare({**right, whole[0]: lacking}))) == 1
    assert len(list(damage.compare({}))) == FILES
