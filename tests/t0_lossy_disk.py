"""Hold the disk that loses power to its word: what was synced is there, what was not is old, new or between, no more.

The reference keeps the whole disk after every step. What is left of a file must consist of sectors that it had since it
was last synced; of a directory, of entries that it had since then.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchfs_fuse.testing.lossy_disk import PAGE, ROOT, SECTOR, Directory, Disk, File, Loss, Refused

NAMES = [b"a", b"b", b"c", b"d"]
SEED = st.integers(0, 1 << 20)
OFFSET = st.integers(0, 3 * PAGE)


class Snapshots:
    """Remember what every file and directory held since it was last synced, by inode number."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.files: dict[int, list[bytes]] = {}
        self.xattrs: dict[int, list[dict[str, bytes]]] = {}
        self.names: dict[int, list[dict[bytes, int]]] = {ROOT: [{}]}

    def look(self) -> None:
        """Note how everything is now."""
        for ino, node in self.disk.nodes.items():
            if isinstance(node, File):
                self.files.setdefault(ino, [b""]).append(node.read(0, node.size))
                self.xattrs.setdefault(ino, [{}]).append(node.xattrs)
            else:
                self.names.setdefault(ino, [{}]).append(dict(node.entries))

    def sync_file(self, ino: int, data_only: bool) -> None:
        del self.files[ino][:-1]
        if not data_only:
            del self.xattrs[ino][:-1]

    def sync_directory(self, ino: int) -> None:
        del self.names[ino][:-1]


def is_mixture(found: bytes, versions: list[bytes]) -> bool:
    """Tell whether every sector is one of a version's, zeros behind their ends, and the size that of one."""
    if len(found) not in map(len, versions):
        return False
    whole = max(map(len, versions)) + SECTOR
    padded = [version.ljust(whole, b"\0") for version in versions]
    for at in range(0, len(found), SECTOR):
        piece = found[at : at + SECTOR]
        if not any(version[at : at + len(piece)] == piece for version in padded):
            # Where the end cuts a sector, what was behind it is zeros.
            ends = {len(version) for version in versions if at < len(version) < at + SECTOR}
            if not any(version[at:end].ljust(len(piece), b"\0") == piece for version in padded for end in ends):
                return False
    return True


STEP = st.one_of(
    st.tuples(st.just("make"), st.sampled_from(NAMES)),
    st.tuples(st.just("mkdir"), st.sampled_from(NAMES)),
    st.tuples(st.just("write"), st.sampled_from(NAMES), OFFSET, st.binary(min_size=1, max_size=2 * PAGE)),
    st.tuples(st.just("resize"), st.sampled_from(NAMES), OFFSET),
    st.tuples(st.just("zero"), st.sampled_from(NAMES), OFFSET, OFFSET),
    st.tuples(st.just("xattr"), st.sampled_from(NAMES), st.binary(max_size=2)),
    st.tuples(st.just("fsync"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("fsyncdir"), st.sampled_from([b"", *NAMES])),
    st.tuples(st.just("link"), st.sampled_from(NAMES), st.sampled_from([b"", *NAMES]), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from([b"", *NAMES]), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from([b"", *NAMES]), st.sampled_from(NAMES)),
)


class Run:
    """Carry steps out on a disk. Names are in the root, or in the directory that one of them stands for."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.seen = Snapshots(self.disk)
        #: What had a name when the root was synced, and what was removed or replaced. Modes are numbers here: they tell
        #: after a cut what is what.
        self.named: set[int] = set()
        self.removed: set[int] = set()

    def place(self, name: bytes) -> int:
        return self.disk.find(ROOT, name) if name else ROOT

    def step(self, kind: str, *given: Any) -> None:
        try:
            getattr(self, kind)(*given)
        except Refused:
            return
        self.seen.look()

    def make(self, name: bytes) -> None:
        self.disk.make(ROOT, name, self.disk.next_ino)

    def mkdir(self, name: bytes) -> None:
        self.disk.make(ROOT, name, self.disk.next_ino, directory=True)

    def _file(self, name: bytes) -> File:
        return self.disk.file(self.disk.find(ROOT, name))

    def write(self, name: bytes, offset: int, data: bytes) -> None:
        self._file(name).write(self.disk.tick(), offset, data)

    def resize(self, name: bytes, size: int) -> None:
        self._file(name).resize(self.disk.tick(), size)

    def zero(self, name: bytes, offset: int, end: int) -> None:
        self._file(name).zero(self.disk.tick(), offset, end)

    def xattr(self, name: bytes, value: bytes) -> None:
        self._file(name).set_xattrs(self.disk.tick(), {"user.a": value})

    def fsync(self, name: bytes, data_only: bool) -> None:
        self._file(name).sync(data_only)
        self.seen.look()
        self.seen.sync_file(self.disk.find(ROOT, name), data_only)

    def fsyncdir(self, name: bytes) -> None:
        ino = self.place(name)
        self.disk.directory(ino)
        self.disk.sync_directory(ino)
        self.seen.look()
        self.seen.sync_directory(ino)
        if ino == ROOT:
            self.named.update(self.disk.directory(ROOT).entries.values())

    def link(self, name: bytes, parent: bytes, new_name: bytes) -> None:
        self.disk.link(self.disk.find(ROOT, name), self.place(parent), new_name)

    def remove(self, parent: bytes, name: bytes) -> None:
        ino = self.disk.find(self.place(parent), name)
        directory = isinstance(self.disk.nodes[ino], Directory)
        self.disk.remove(self.place(parent), name, directory=directory)
        self.removed.add(ino)

    def rename(self, name: bytes, parent: bytes, new_name: bytes) -> None:
        old, place = self.disk.find(ROOT, name), self.place(parent)
        if old == place:
            return
        there = self.disk.directory(place).entries.get(new_name)
        self.disk.rename(ROOT, name, place, new_name)
        if there is not None and there != old:
            self.removed.add(there)


@given(st.lists(STEP, max_size=40), st.sampled_from(list(Loss)), SEED)
@settings(max_examples=300)
def test_what_is_left_is_what_was_synced_and_some_of_the_rest(steps: list[Any], loss: Loss, seed: int) -> None:
    run = Run()
    for step in steps:
        run.step(*step)
    left = run.disk.left(loss, seed)
    check_left(run, left)
    assert not any(left.unsynced())
    assert left.nodes.keys() & run.disk.nodes.keys() <= {ROOT}
    assert {node.mode for node in left.nodes.values()} >= run.named - run.removed, "neither the old name nor the new"
    # A second cut takes nothing more.
    again = left.left(Loss.ALL, 0)
    assert contents(again) == contents(left)


def contents(disk: Disk) -> dict[bytes, bytes | None]:
    """Return every path with its bytes, None for a directory."""

    def read(ino: int) -> bytes | None:
        node = disk.nodes[ino]
        return node.read(0, node.size) if isinstance(node, File) else None

    return {path: read(ino) for path, ino in disk.walk()}


def check_left(run: Run, left: Disk) -> None:
    """Compare what is left with what there was; nodes that are left are known by where they can come from."""
    seen = run.seen

    def check(old_ino: int, new_ino: int) -> None:
        node = left.nodes[new_ino]
        if isinstance(node, File):
            assert is_mixture(node.read(0, node.size), seen.files[old_ino]), "bytes that it never had"
            assert node.xattrs in seen.xattrs[old_ino]
            return
        versions = seen.names[old_ino]
        for name in {name for version in versions for name in version} | node.entries.keys():
            possible = {version.get(name) for version in versions}
            child = node.entries.get(name)
            if child is None:
                assert None in possible, f"{name!r} was synced and is gone"
            else:
                sources = [ino for ino in possible if ino is not None and fits(ino, child)]
                assert sources, f"{name!r} stands for what it never stood for"

    def fits(old_ino: int, new_ino: int) -> bool:
        if run.disk.nodes[old_ino].mode != left.nodes[new_ino].mode:
            return False
        try:
            check(old_ino, new_ino)
        except AssertionError:
            return False
        return True

    check(ROOT, ROOT)


def many(
    arrange: Callable[[Disk], None], loss: Loss = Loss.RANDOM, count: int = 200
) -> list[dict[bytes, bytes | None]]:
    """Do the same on many disks, and cut each with another seed."""
    found = []
    for seed in range(count):
        disk = Disk()
        arrange(disk)
        found.append(contents(disk.left(loss, seed)))
    return found


def synced_file(disk: Disk, name: bytes, data: bytes) -> int:
    ino = disk.make(ROOT, name, 0o600)
    disk.file(ino).write(disk.tick(), 0, data)
    disk.file(ino).sync(data_only=True)
    disk.sync_directory(ROOT)
    return ino


def test_everything_that_was_not_synced_may_go() -> None:
    def arrange(disk: Disk) -> None:
        synced_file(disk, b"kept", b"1")
        disk.make(ROOT, b"new", 0o600)

    assert many(arrange, Loss.ALL, 1) == [{b"/kept": b"1"}]


def test_a_page_is_old_or_new_or_torn_by_sectors() -> None:
    old, new = b"o" * PAGE, b"n" * PAGE

    def arrange(disk: Disk) -> None:
        disk.file(synced_file(disk, b"file", old)).write(disk.tick(), 0, new)

    found = {left[b"/file"] for left in many(arrange)}
    assert {old, new} < found
    for page in found:
        assert page is not None and len(page) == PAGE
        assert {page[at : at + SECTOR] for at in range(0, PAGE, SECTOR)} <= {old[:SECTOR], new[:SECTOR]}


def test_a_longer_file_may_have_zeros_for_what_was_written() -> None:
    def arrange(disk: Disk) -> None:
        disk.file(synced_file(disk, b"file", b"a" * PAGE)).write(disk.tick(), PAGE, b"b" * PAGE)

    found = {left[b"/file"] for left in many(arrange)}
    assert {b"a" * PAGE, b"a" * PAGE + bytes(PAGE), b"a" * PAGE + b"b" * PAGE} <= found


def test_a_file_that_was_synced_may_lose_its_name() -> None:
    def arrange(disk: Disk) -> None:
        disk.file(disk.make(ROOT, b"file", 0o600)).sync(data_only=False)

    assert {tuple(left) for left in many(arrange)} == {(), (b"/file",)}


def test_a_rename_leaves_one_name_at_least() -> None:
    def arrange(disk: Disk) -> None:
        synced_file(disk, b"old", b"1")
        synced_file(disk, b"new", b"2")
        disk.rename(ROOT, b"old", ROOT, b"new")

    found = {tuple(sorted((path, data or b"") for path, data in left.items())) for left in many(arrange)}
    assert found == {
        ((b"/new", b"2"), (b"/old", b"1")),  # not done
        ((b"/new", b"1"), (b"/old", b"1")),  # done in part
        ((b"/new", b"1"),),
    }


def test_a_synced_old_directory_brings_the_new_name_along() -> None:
    def arrange(disk: Disk) -> None:
        synced_file(disk, b"file", b"1")
        directory = disk.make(ROOT, b"there", 0o700, directory=True)
        disk.sync_directory(ROOT)
        disk.rename(ROOT, b"file", directory, b"file")
        disk.sync_directory(ROOT)

    assert all(left == {b"/there": None, b"/there/file": b"1"} for left in many(arrange))


def test_what_was_moved_is_not_lost_with_its_new_directory() -> None:
    def arrange(disk: Disk) -> None:
        synced_file(disk, b"file", b"1")
        directory = disk.make(ROOT, b"there", 0o700, directory=True)
        disk.rename(ROOT, b"file", directory, b"file")

    assert all(b"1" in left.values() for left in many(arrange))

    def synced_in_between(disk: Disk) -> None:
        synced_file(disk, b"file", b"1")
        above = disk.make(ROOT, b"above", 0o700, directory=True)
        disk.sync_directory(ROOT)
        below = disk.make(above, b"below", 0o700, directory=True)
        disk.rename(ROOT, b"file", below, b"file")
        disk.sync_directory(ROOT)

    assert all(left[b"/above/below/file"] == b"1" for left in many(synced_in_between))


def test_what_was_moved_out_is_not_lost_with_its_old_directory() -> None:
    def arrange(disk: Disk) -> None:
        directory = disk.make(ROOT, b"there", 0o700, directory=True)
        disk.sync_directory(ROOT)
        ino = disk.make(directory, b"file", 0o600)
        disk.file(ino).write(disk.tick(), 0, b"1")
        disk.file(ino).sync(data_only=False)
        disk.sync_directory(directory)
        disk.rename(directory, b"file", ROOT, b"file")
        disk.remove(ROOT, b"there", directory=True)

    assert all(b"1" in left.values() for left in many(arrange))


def test_directories_are_not_lost_in_a_circle() -> None:
    def arrange(disk: Disk) -> None:
        one, other = (disk.make(ROOT, name, 0o700, directory=True) for name in (b"one", b"other"))
        disk.make(one, b"1", 0o600)
        disk.make(other, b"2", 0o600)
        for ino in (ROOT, one, other):
            disk.sync_directory(ino)
        disk.rename(ROOT, b"one", other, b"one")
        disk.rename(other, b"one", ROOT, b"one")
        disk.rename(ROOT, b"other", one, b"other")

    assert all(sum(path.endswith((b"/1", b"/2")) for path in left) == 2 for left in many(arrange))


def test_attributes_need_more_than_fdatasync() -> None:
    left = []
    for data_only in (True, False):
        disk = Disk()
        file = disk.file(synced_file(disk, b"file", b"1"))
        file.set_xattrs(disk.tick(), {"user.a": b"1"})
        file.sync(data_only)
        found = disk.left(Loss.ALL, 0)
        left.append(found.file(found.find(ROOT, b"file")).xattrs)
    assert left == [{}, {"user.a": b"1"}]


def test_a_lost_tail_keeps_everything_before_it() -> None:
    def arrange(disk: Disk) -> None:
        for number in range(10):
            disk.file(disk.make(ROOT, b"%d" % number, 0o600)).write(disk.tick(), 0, b"x")

    for left in many(arrange, Loss.TAIL):
        whole = [path for path, data in left.items() if data == b"x"]
        assert sorted(left) == [b"/%d" % number for number in range(len(left))]
        assert len(left) - len(whole) in (0, 1)


@pytest.mark.parametrize("loss", list(Loss))
def test_the_same_seed_gives_the_same(loss: Loss) -> None:
    def arrange(disk: Disk) -> None:
        for number in range(20):
            disk.file(disk.make(ROOT, b"%d" % number, 0o600)).write(disk.tick(), number * 1000, b"x" * 5000)

    assert many(arrange, loss, 3) == many(arrange, loss, 3)
