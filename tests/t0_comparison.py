"""Compare what daemons hold: whole clusters give nothing, and every kind of damage is found where it was planted."""

import stat
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchfs_fuse.comparison import (
    Category,
    ChunkFacts,
    Comparison,
    Finding,
    InodeFacts,
    NameFacts,
    Problem,
    circles,
    printable,
)
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.model import ROOT_INO, make_ino

DAEMONS = 3
MAP = ShardMap.round_robin(DAEMONS)
FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
BLOCK = 4096
#: An inode number that nothing has.
NOBODY = make_ino(7, 999_999)


@dataclass
class World:
    """Be all that the daemons of a cluster hold."""

    inodes: dict[int, InodeFacts] = field(default_factory=dict)
    names: list[NameFacts] = field(default_factory=list)
    chunks: list[ChunkFacts] = field(default_factory=list)

    def put(self, inode: InodeFacts) -> None:
        self.inodes[inode.ino] = inode

    def change(self, ino: int, **changes: int) -> None:
        self.inodes[ino] = self.inodes[ino]._replace(**changes)

    def name(self, parent: int, name: bytes, ino: int, kind: int) -> None:
        self.names.append(NameFacts(MAP.of_ino(parent), parent, name, ino, stat.S_IFMT(kind)))
        directory = self.inodes[parent]
        self.put(directory._replace(entries=directory.entries + 1, nlink=directory.nlink + stat.S_ISDIR(kind)))

    def compare(self) -> Comparison:
        comparison = Comparison(MAP)
        for inode in self.inodes.values():
            comparison.add_inode(inode)
        for name in self.names:
            comparison.add_name(name)
        for chunk in self.chunks:
            comparison.add_chunk(chunk)
        return comparison

    def findings(self) -> list[Finding]:
        return list(self.compare().findings())

    @property
    def directories(self) -> list[int]:
        return [ino for ino, inode in self.inodes.items() if inode.is_dir]

    @property
    def files(self) -> list[int]:
        return [ino for ino, inode in self.inodes.items() if not inode.is_dir]


def _inode(ino: int, mode: int, parent: int = 0) -> InodeFacts:
    nlink = 2 if stat.S_ISDIR(mode) else 1
    return InodeFacts(MAP.of_ino(ino), ino, mode, nlink, 0, 0, CHUNK_SIZE_MIN, DAEMONS, parent, 0, 1)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Make a whole cluster: a tree of directories, files with chunks and holes, some with several names."""
    world = World()
    world.put(_inode(ROOT_INO, DIRECTORY))
    count = 1
    for place in draw(st.lists(st.integers(0, 1000), min_size=2, max_size=8)):
        parent = world.directories[place % len(world.directories)]
        ino = make_ino(place * 7 % 4096, count := count + 1)
        world.put(_inode(ino, DIRECTORY, parent))
        world.name(parent, b"d%d" % count, ino, DIRECTORY)
    for place, links, chunks in draw(
        st.lists(
            st.tuples(
                st.integers(0, 1000),
                st.integers(1, 3),
                st.lists(st.integers(1, CHUNK_SIZE_MIN) | st.none(), max_size=5),
            ),
            min_size=2,
            max_size=8,
        )
    ):
        ino = make_ino(place * 13 % 4096, count := count + 1)
        world.put(_inode(ino, FILE)._replace(nlink=links))
        for number in range(links):
            parent = world.directories[(place + number) % len(world.directories)]
            world.name(parent, b"f%d-%d" % (count, number), ino, FILE)
        allocated = end = 0
        for index, length in enumerate(chunks):
            if length is not None:
                space = -(-length // BLOCK) * BLOCK
                world.chunks.append(ChunkFacts(MAP.of_chunk(ino, index, DAEMONS), ino, index, length, space, ""))
                allocated, end = allocated + space, index * CHUNK_SIZE_MIN + length
        world.change(ino, allocated=allocated, end=end + place % 3)
    return world


@given(worlds())
def test_a_whole_cluster_gives_nothing(world: World) -> None:
    comparison = world.compare()
    assert list(comparison.findings()) == []
    assert comparison.name_count == len(world.names)
    assert comparison.chunk_count == len(world.chunks)
    for ino in world.inodes:
        assert comparison.path_of(ino).startswith("/")


#: What a planted damage has to be found as: problem, daemon, inode.
Expected = tuple[Problem, int, int]
Plant = Callable[[World, st.DataObject], Expected]


def _pick(data: st.DataObject, items: list[int]) -> int:
    return data.draw(st.sampled_from(items))


def _a_name(world: World, data: st.DataObject, directory: bool) -> NameFacts:
    return data.draw(st.sampled_from([name for name in world.names if stat.S_ISDIR(name.kind) is directory]))


def _lose_an_inode(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=False)
    del world.inodes[name.ino]
    return Problem.NO_INODE, name.daemon, name.ino


def _lose_a_directory(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=True)
    below = [one for one in world.names if one.parent == name.ino]
    del world.inodes[name.ino]
    if below:
        return Problem.NO_DIRECTORY, below[0].daemon, below[0].ino
    return Problem.NO_INODE, name.daemon, name.ino


def _change_a_kind(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=False)
    world.names[world.names.index(name)] = name._replace(kind=stat.S_IFIFO)
    return Problem.KIND, name.daemon, name.ino


def _put_a_name_elsewhere(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=False)
    world.names[world.names.index(name)] = name._replace(daemon=(name.daemon + 1) % DAEMONS)
    return Problem.MISPLACED, (name.daemon + 1) % DAEMONS, name.ino


def _put_an_inode_elsewhere(world: World, data: st.DataObject) -> Expected:
    ino = _pick(data, world.files)
    world.change(ino, daemon=(world.inodes[ino].daemon + 1) % DAEMONS)
    return Problem.MISPLACED, world.inodes[ino].daemon, ino


def _miscount_links(world: World, data: st.DataObject) -> Expected:
    ino = _pick(data, world.files)
    world.change(ino, nlink=data.draw(st.integers(0, 9).filter(lambda count: count != world.inodes[ino].nlink)))
    return Problem.LINKS, world.inodes[ino].daemon, ino


def _lose_a_name(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=False)
    world.names.remove(name)
    problem = Problem.LINKS if world.inodes[name.ino].nlink > 1 else Problem.NAMELESS
    return problem, world.inodes[name.ino].daemon, name.ino


def _lose_the_name_of_a_directory(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=True)
    world.names.remove(name)
    problem = Problem.UNREACHABLE if world.inodes[name.ino].entries else Problem.NAMELESS
    return problem, world.inodes[name.ino].daemon, name.ino


def _keep_a_removed_inode(world: World, data: st.DataObject) -> Expected:
    world.put(_inode(NOBODY, data.draw(st.sampled_from([FILE, DIRECTORY])))._replace(nlink=0))
    return Problem.UNUSED, MAP.of_ino(NOBODY), NOBODY


def _miscount_entries(world: World, data: st.DataObject) -> Expected:
    ino = _pick(data, world.directories)
    world.change(ino, entries=world.inodes[ino].entries + data.draw(st.sampled_from([-1, 1, 100])))
    return Problem.ENTRIES, world.inodes[ino].daemon, ino


def _miscount_subdirectories(world: World, data: st.DataObject) -> Expected:
    ino = _pick(data, world.directories)
    world.change(ino, nlink=world.inodes[ino].nlink + data.draw(st.integers(1, 9)))
    return Problem.ENTRIES, world.inodes[ino].daemon, ino


def _change_a_parent(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=True)
    other = data.draw(st.sampled_from([*(ino for ino in world.directories if ino != name.parent), NOBODY]))
    world.change(name.ino, parent=other)
    return Problem.PARENT, world.inodes[name.ino].daemon, name.ino


def _name_a_directory_twice(world: World, data: st.DataObject) -> Expected:
    name = _a_name(world, data, directory=True)
    world.name(ROOT_INO, b"again", name.ino, DIRECTORY)
    return Problem.SEVERAL, world.inodes[name.ino].daemon, name.ino


def _name_the_root(world: World, data: st.DataObject) -> Expected:
    world.name(_pick(data, world.directories), b"root", ROOT_INO, DIRECTORY)
    return Problem.SEVERAL, world.inodes[ROOT_INO].daemon, ROOT_INO


def _make_a_circle(world: World, data: st.DataObject) -> Expected:
    first, second = make_ino(1, 77), make_ino(2, 78)
    for ino, parent in ((first, second), (second, first)):
        world.put(_inode(ino, DIRECTORY, parent))
    world.name(first, b"x", second, DIRECTORY)
    world.name(second, b"y", first, DIRECTORY)
    return Problem.CIRCLE, MAP.of_ino(first), first


def _leave_chunks(world: World, data: st.DataObject) -> Expected:
    daemon = data.draw(st.integers(0, DAEMONS - 1))
    world.chunks += [ChunkFacts(daemon, NOBODY, index, 10, BLOCK, "") for index in range(3)]
    return Problem.CHUNKS, daemon, NOBODY


def _with_chunks(world: World) -> list[ChunkFacts]:
    if not world.chunks:
        ino = world.files[0]
        world.chunks.append(ChunkFacts(MAP.of_chunk(ino, 0, DAEMONS), ino, 0, 1, BLOCK, ""))
        world.change(ino, allocated=BLOCK, end=1)
    return world.chunks


def _lose_a_chunk(world: World, data: st.DataObject) -> Expected:
    chunk = data.draw(st.sampled_from(_with_chunks(world)))
    world.chunks.remove(chunk)
    return Problem.LOST, world.inodes[chunk.ino].daemon, chunk.ino


def _lose_a_file(world: World, data: st.DataObject) -> Expected:
    chunk = data.draw(st.sampled_from(_with_chunks(world)))
    world.chunks[world.chunks.index(chunk)] = chunk._replace(trouble="is missing")
    return Problem.CHUNK_FILE, chunk.daemon, chunk.ino


def _put_a_chunk_elsewhere(world: World, data: st.DataObject) -> Expected:
    chunk = data.draw(st.sampled_from(_with_chunks(world)))
    world.chunks[world.chunks.index(chunk)] = chunk._replace(daemon=(chunk.daemon + 1) % DAEMONS)
    return Problem.MISPLACED, (chunk.daemon + 1) % DAEMONS, chunk.ino


def _leave_space_behind_the_end(world: World, data: st.DataObject) -> Expected:
    ino = _pick(data, world.files)
    world.chunks.append(ChunkFacts(MAP.of_chunk(ino, 9, DAEMONS), ino, 9, 10, BLOCK, ""))
    return Problem.SPACE, world.inodes[ino].daemon, ino


def _reach_behind_the_end(world: World, data: st.DataObject) -> Expected:
    chunk = data.draw(st.sampled_from(_with_chunks(world)))
    world.change(chunk.ino, end=chunk.index * CHUNK_SIZE_MIN + chunk.length - 1)
    return Problem.SPACE, world.inodes[chunk.ino].daemon, chunk.ino


def _forget_space(world: World, data: st.DataObject) -> Expected:
    chunk = data.draw(st.sampled_from(_with_chunks(world)))
    world.change(chunk.ino, allocated=world.inodes[chunk.ino].allocated - BLOCK)
    return Problem.SPACE, world.inodes[chunk.ino].daemon, chunk.ino


PLANTS: list[Plant] = [
    _lose_an_inode,
    _lose_a_directory,
    _change_a_kind,
    _put_a_name_elsewhere,
    _put_an_inode_elsewhere,
    _miscount_links,
    _lose_a_name,
    _lose_the_name_of_a_directory,
    _keep_a_removed_inode,
    _miscount_entries,
    _miscount_subdirectories,
    _change_a_parent,
    _name_a_directory_twice,
    _name_the_root,
    _make_a_circle,
    _leave_chunks,
    _lose_a_chunk,
    _lose_a_file,
    _put_a_chunk_elsewhere,
    _leave_space_behind_the_end,
    _reach_behind_the_end,
    _forget_space,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.strip("_"))
@settings(max_examples=30)
@given(world=worlds(), data=st.data())
def test_what_is_planted_is_found(plant: Plant, world: World, data: st.DataObject) -> None:
    problem, daemon, ino = plant(world, data)
    found = world.findings()
    assert (problem, daemon, ino) in [(one.problem, one.daemon, one.ino) for one in found]


def test_every_problem_has_its_category() -> None:
    kept = [problem for problem in Problem if problem.category is Category.DAMAGED]
    assert set(Problem) - set(kept) == {
        Problem.NAMELESS,
        Problem.CHUNKS,
        Problem.STRAY_FILE,
        Problem.UNUSED,
        Problem.SPACE,
        Problem.RECORD,
    }


def test_findings_say_where() -> None:
    world = World()
    world.put(_inode(ROOT_INO, DIRECTORY))
    directory, file = make_ino(1, 5), make_ino(2, 6)
    world.put(_inode(directory, DIRECTORY, ROOT_INO))
    world.name(ROOT_INO, b"a b", directory, DIRECTORY)
    world.put(_inode(file, FILE)._replace(allocated=2 * BLOCK))
    world.name(directory, "ü\n".encode() + b"\xff", file, FILE)
    world.name(directory, b"gone", NOBODY, FILE)
    comparison = world.compare()
    found = {one.problem: one for one in comparison.findings()}
    assert comparison.path_to(found[Problem.LOST]) == "/a b/ü\\n\\xff"
    assert found[Problem.LOST].size == 2 * BLOCK
    assert comparison.path_to(found[Problem.NO_INODE]) == "/a b/gone"
    assert comparison.path_of(ROOT_INO) == "/"
    assert comparison.path_of(NOBODY) == "/a b/gone"
    assert comparison.path_of(NOBODY + 1) == ""


def test_names_are_shown_so_that_a_terminal_stays_whole() -> None:
    assert printable(b"\x1b[31m") == "\\x1b[31m"
    assert printable("naïve".encode()) == "naïve"
    assert printable(b"\xff") == "\\xff"


@given(st.dictionaries(st.integers(1, 12), st.integers(1, 14)))
def test_circles_are_those_that_walking_finds(parents: dict[int, int]) -> None:
    def walks_back(start: int) -> bool:
        ino = start
        for _ in range(20):
            ino = parents.get(ino, ROOT_INO) if ino != ROOT_INO else ROOT_INO
            if ino == start:
                return True
        return False

    wanted = {ino for ino in parents if ino != ROOT_INO and walks_back(ino)}
    found = list(circles(parents))
    assert sorted(ino for circle in found for ino in circle) == sorted(wanted)
    for circle in found:
        for ino, above in zip(circle, [*circle[1:], circle[0]], strict=True):
            assert parents[ino] == above
