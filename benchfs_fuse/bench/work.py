"""Be the work that is measured: the same in every directory, with the tools that people use.

A work gets an empty directory and leaves it as it likes (the caller empties it). Each function yields what it timed,
part by part; between the parts, untimed, it prepares, and checks every byte and every name that came out. *Cold* parts
follow after the caches were dropped, *warm* ones after the same was just done; parts without heat write.
"""

import json
import mmap
import os
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ..errors import UserError
from ..limits import KIB, MIB
from . import tools

#: No tool takes this long where anything proceeds at all.
TOOL_TIMEOUT_S = 1800.0
#: What a system call moves at once in the small variants: a page.
_SMALL = 4 * KIB
#: Requests that fio keeps under way where it keeps several.
_DEPTH = 16
#: Processes that work on names at once where it is not one.
_PROCESSES = 4
#: Files in one directory of the tree, and the largest of them: what source code looks like.
_PER_DIRECTORY = 50
_SMALL_FILE_MAX = 16 * KIB

Heat = Literal["", "cold", "warm"]


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say how much work there is. Sizes in bytes, multiples of 1 MiB; files in multiples of 4."""

    name: str
    rounds: int
    tree_files: int
    large_size: int
    fio_size: int
    names: int
    mmap_size: int

    @property
    def room(self) -> int:
        """Return how many bytes must be free in each directory: the most that lies there at once, and a third more."""
        most = max(self.tree_files * (_SMALL_FILE_MAX // 2 + _SMALL), 2 * self.large_size, 5 * self.fio_size)
        return max(most, self.mmap_size) * 4 // 3


#: One or two minutes for three directories. Five rounds are the fewest of which `diff` can tell a change.
QUICK = Sizes("quick", 5, 300, 32 * MIB, 4 * MIB, 400, 8 * MIB)
#: A few minutes.
USUAL = Sizes("usual", 7, 1000, 128 * MIB, 16 * MIB, 2000, 32 * MIB)
#: What a report about a release is made from.
FULL = Sizes("full", 11, 5000, 512 * MIB, 64 * MIB, 10_000, 128 * MIB)


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one timed part of a work.

    ``operations`` are what people count: files, names, blocks; 0 where only bytes say something. ``latencies_ns``: how
    often one operation took so long, rounded to three digits.
    """

    name: str
    heat: Heat
    time_ns: int
    operations: int
    size: int
    latencies_ns: dict[int, int] = {}


class At:
    """Be where a work is done: an empty directory, a scratch directory elsewhere with what goes in, and how to be cold.

    ``drop``: drop the whole machine's caches; ``written`` is then what has to be written back before. Otherwise only
    pages of the files at hand are forgotten, and nothing forgets names.
    """

    def __init__(self, place: Path, scratch: Path, sizes: Sizes, *, drop: bool, written: Sequence[Path] = ()) -> None:
        self.place = place
        self.scratch = scratch
        self.sizes = sizes
        self.drop = drop
        self.written = [place, *written]
        #: Sentences about what could not be measured here.
        self.left_out: list[str] = []

    def cold(self, *files: Path) -> None:
        """Forget what is cached, at least of these files."""
        if self.drop:
            tools.drop_all_caches(self.written)
        else:
            tools.drop_cached(*files)

    def takes_direct(self) -> bool:
        """Tell whether files here can be opened with O_DIRECT; if not, that is noted."""
        probe = self.place / "probe"
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
        except OSError as error:
            self.left_out.append(f"direct I/O: {error.strerror}")
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True


def histogram(durations_ns: Sequence[int]) -> dict[int, int]:
    """Count durations, each rounded to three digits: what is lost is less than any clock's noise."""
    counts: dict[int, int] = {}
    for duration in durations_ns:
        key = _rounded(duration)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _rounded(duration_ns: int) -> int:
    unit: int = 10 ** max(0, len(str(duration_ns)) - 3)
    return (duration_ns + unit // 2) // unit * unit


def _timed_ns(action: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - start


def _run(*command: str | Path) -> str:
    done = tools.run_tool(command, TOOL_TIMEOUT_S)
    return done.stdout + done.stderr


# ── what goes in ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stage(scratch: Path, sizes: Sizes) -> None:
    """Make what goes in: a tree of small files, a large file, one with holes. The same every time, everywhere."""
    dice = random.Random(sizes.tree_files)
    for index in range(sizes.tree_files):
        directory = scratch / "tree" / f"d{index // _PER_DIRECTORY}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{index}").write_bytes(dice.randbytes(dice.randrange(_SMALL_FILE_MAX)))
    stage_large(scratch, sizes)


def stage_large(scratch: Path, sizes: Sizes) -> None:
    """Make the large file, and the one with holes."""
    dice = random.Random(sizes.large_size)
    with (scratch / "large").open("wb") as large, (scratch / "sparse").open("wb") as sparse:
        for number in range(sizes.large_size // MIB):
            part = dice.randbytes(MIB)
            large.write(part)
            if number % 2:
                sparse.write(part)
            else:
                sparse.seek(MIB, os.SEEK_CUR)
        sparse.truncate(sizes.large_size)


# ── copying ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def copy_tree(at: At) -> Iterator[Measure]:
    """Copy a tree of many small files in, out cold, out warm, and remove it."""
    source, inside = at.scratch / "tree", at.place / "tree"
    expected = tools.snapshot(source)
    names, size = len(expected), sum(entry.size for entry in expected.values())

    def out(heat: Heat) -> Measure:
        _run("cp", "--version")  # what was dropped of cp itself is not to be paid here
        copy = at.scratch / "out"
        time_ns = _timed_ns(lambda: _run("cp", "-a", "--", inside, copy))
        tools.refuse_difference(expected, tools.snapshot(copy), inside)
        _run("rm", "-r", "--", copy)
        return Measure("tree out", heat, time_ns, names, size)

    yield Measure("tree in", "", _timed_ns(lambda: _run("cp", "-a", "--", source, inside)), names, size)
    at.cold(*tools.regular_files(inside))
    yield out("cold")
    yield out("warm")
    yield Measure("tree remove", "", _timed_ns(lambda: _run("rm", "-r", "--", inside)), names, 0)


def copy_large(at: At) -> Iterator[Measure]:
    """Copy a large file in, out cold and out warm, with cp."""
    source, inside, copy = at.scratch / "large", at.place / "large", at.scratch / "out"
    inside.unlink(missing_ok=True)
    size = at.sizes.large_size

    def out(heat: Heat) -> Measure:
        _run("cp", "--version")
        time_ns = _timed_ns(lambda: _run("cp", "--", inside, copy))
        _run("cmp", "--", source, copy)
        copy.unlink()
        return Measure("large out", heat, time_ns, 0, size)

    yield Measure("large in", "", _timed_ns(lambda: _run("cp", "--", source, inside)), 0, size)
    at.cold(inside)
    yield out("cold")
    yield out("warm")


def copy_inside(at: At) -> Iterator[Measure]:
    """Copy a large file from one place inside to another, with cp: some file systems do that by themselves."""
    source, inside, copy = at.scratch / "large", at.place / "large", at.place / "copy"
    _run("cp", "--", source, inside)
    at.cold(inside)
    _run("cp", "--version")
    time_ns = _timed_ns(lambda: _run("cp", "--", inside, copy))
    _run("cmp", "--", source, copy)
    yield Measure("large inside", "cold", time_ns, 0, at.sizes.large_size)


_DD_TIME = re.compile(r"copied, ([0-9.e+-]+) s")


def _dd_ns(source: Path, target: Path, *options: str) -> int:
    """Run dd and return the time that it says it took: from its first block to the end of its last close."""
    said = _run("dd", f"if={source}", f"of={target}", *options)
    found = _DD_TIME.search(said)
    if found is None:
        raise UserError(f"dd did not say how long it took: {said.strip()!r}")
    return max(1, round(float(found[1]) * 1e9))


def _dd_write(at: At, name: str, source: Path, *options: str) -> Measure:
    inside = at.place / "dd"
    inside.unlink(missing_ok=True)
    time_ns = _dd_ns(source, inside, *options)
    _run("cmp", "--", source, inside)
    return Measure(f"dd write {name}", "", time_ns, 0, at.sizes.large_size)


def _dd_read(at: At, name: str, heat: Heat, *options: str) -> Measure:
    copy = at.scratch / "out"
    time_ns = _dd_ns(at.place / "dd", copy, *options)
    _run("cmp", "--", at.scratch / "large", copy)
    copy.unlink()
    return Measure(f"dd read {name}", heat, time_ns, 0, at.sizes.large_size)


def copy_dd_once(at: At) -> Iterator[Measure]:
    """Write a large file with dd, 1 MiB at a time, and read it cold."""
    yield _dd_write(at, "1M", at.scratch / "large", "bs=1M")
    at.cold(at.place / "dd")
    yield _dd_read(at, "1M", "cold", "bs=1M")


def copy_dd(at: At) -> Iterator[Measure]:
    """Write and read a large file with dd: small and large blocks, synced, sparse, around the page cache."""
    large, direct = at.scratch / "large", at.takes_direct()
    yield _dd_write(at, "sparse", at.scratch / "sparse", "bs=64K", "conv=sparse")
    yield _dd_write(at, "4K", large, "bs=4K")
    yield _dd_write(at, "1M fsync", large, "bs=1M", "conv=fsync")
    if direct:
        yield _dd_write(at, "1M direct", large, "bs=1M", "oflag=direct")
    yield from copy_dd_once(at)
    yield _dd_read(at, "1M", "warm", "bs=1M")
    yield _dd_read(at, "4K", "warm", "bs=4K")
    if direct:
        yield _dd_read(at, "1M direct", "", "bs=1M", "iflag=direct")


# ── fio ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Job(NamedTuple):
    """Describe one job of fio. ``depth`` above 1 uses io_uring."""

    write: bool
    block: int
    depth: int
    direct: bool
    heat: Heat

    @property
    def kind(self) -> str:
        """Return what fio calls it."""
        return ("" if self.block == MIB else "rand") + ("write" if self.write else "read")

    @property
    def name(self) -> str:
        size = "1M" if self.block == MIB else f"4K depth {self.depth}"
        return f"fio {self.kind} {size}{' direct' if self.direct else ''}"

    def options(self, at: At) -> list[str]:
        engine = "psync" if self.depth == 1 else "io_uring"
        size = at.sizes.fio_size * (4 if self.block == MIB else 1)
        words = [
            *(f"--name={self.name} {self.heat}".rstrip(), f"--rw={self.kind}", f"--bs={self.block}", f"--size={size}"),
            *(f"--filename=fio-{self.block}", f"--ioengine={engine}", f"--iodepth={self.depth}"),
            *(f"--direct={self.direct:d}", f"--invalidate={self.heat != 'warm':d}", "--stonewall"),
        ]
        if self.heat == "cold" and at.drop:
            written, knob = shlex.join(map(str, at.written)), shlex.quote(str(tools.DROP_CACHES))
            # tee: fio sends what the last command says into a file.
            words.append(f"--exec_prerun=sync -f {written} && echo 3 | tee {knob}")
        return words


def _jobs(direct: bool) -> Iterator[_Job]:
    # Writes first: they make the files that are read. A file holds blocks of one size: fio verifies each by its header.
    for straight in (True, False) if direct else (False,):
        yield _Job(True, MIB, 1, straight, "")
        yield _Job(True, _SMALL, 1, straight, "")
        yield _Job(True, _SMALL, _DEPTH, straight, "")
        heat: Heat = "" if straight else "cold"
        yield _Job(False, MIB, 1, straight, heat)
        yield _Job(False, _SMALL, 1, straight, heat)
        yield _Job(False, _SMALL, _DEPTH, straight, heat)
    yield _Job(False, _SMALL, 1, False, "warm")


def run_fio(at: At) -> Iterator[Measure]:
    """Write and read blocks with fio, which verifies all of them. One start of fio for all jobs, one after the other.

    The time of a job is that of its operations, from submitting to completing, over its depth: fio counts its own
    run time in whole milliseconds, which is too coarse for memory.
    """
    jobs = list(_jobs(at.takes_direct()))
    common = (
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fallocate=none", "--thread"),
        *("--output-format=json+", "--lat_percentiles=1", "--clat_percentiles=0"),
    )
    words = [word for job in jobs for word in job.options(at)]
    said = tools.run_tool(["fio", *common, *words], TOOL_TIMEOUT_S, cwd=at.place).stdout
    for job, result in zip(jobs, json.loads(said[said.index("{") :])["jobs"], strict=True):
        part = result["write" if job.write else "read"]
        latencies = part["lat_ns"]
        time_ns = round(part["total_ios"] * latencies["mean"] / job.depth)
        bins = {int(duration): count for duration, count in latencies["bins"].items()}
        operations = part["total_ios"] if job.block == _SMALL else 0
        yield Measure(job.name, job.heat, time_ns, operations, part["total_ios"] * job.block, bins)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Told(msgspec.Struct):
    """Hold what one of several processes has measured, or why it could not."""

    start_ns: int
    end_ns: int
    durations_ns: list[int]
    trouble: str = ""


def _together(count: int, action: Callable[[int], list[int]]) -> tuple[int, list[int]]:
    """Do ``action(index)`` in so many processes at once; return the time of all in ns, and all that they returned.

    They start when the parent closes a pipe: at one moment. UserError if one fails.
    """
    waiting, starter = os.pipe()
    pipes, children = [], []
    for index in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(starter)
                os.read(waiting, 1)
                with os.fdopen(writer, "wb") as answer:
                    answer.write(msgspec.json.encode(_measured(action, index)))
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append(reader)
        children.append(child)
    os.close(waiting)
    os.close(starter)
    told = []
    for reader in pipes:
        with os.fdopen(reader, "rb") as answer:
            told.append(answer.read())
    for child in children:
        os.waitpid(child, 0)
    if not all(told):
        raise UserError("a process that worked on names was killed")
    results = [msgspec.json.decode(one, type=_Told) for one in told]
    for result in results:
        if result.trouble:
            raise UserError(result.trouble)
    time_ns = max(one.end_ns for one in results) - min(one.start_ns for one in results)
    return max(1, time_ns), [duration for one in results for duration in one.durations_ns]


def _measured(action: Callable[[int], list[int]], index: int) -> _Told:
    start = time.perf_counter_ns()  # CLOCK_MONOTONIC: the same for all processes
    try:
        durations = action(index)
    except OSError as error:
        return _Told(0, 0, [], f"{error.filename}: {error.strerror}")
    return _Told(start, time.perf_counter_ns(), durations)


def _each(operation: Callable[[str], object], paths: Sequence[str]) -> list[int]:
    durations, clock = [], time.perf_counter_ns
    for path in paths:
        start = clock()
        operation(path)
        durations.append(clock() - start)
    return durations


def _create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def _rename(path: str) -> None:
    os.rename(path, path + "-renamed")


def _names(at: At, processes: int) -> Iterator[Measure]:
    who = "1 process" if processes == 1 else f"{processes} processes"
    share = at.sizes.names // processes
    directories = [at.place / f"names-{processes}-{index}" for index in range(processes)]
    for directory in directories:
        directory.mkdir()
    files = [[f"{directory}/f{number}" for number in range(share)] for directory in directories]
    renamed = [[f"{path}-renamed" for path in paths] for paths in files]
    count = share * processes

    def done(verb: str, heat: Heat, operation: Callable[[str], object], paths: Sequence[Sequence[str]]) -> Measure:
        time_ns, durations = _together(processes, lambda index: _each(operation, paths[index]))
        return Measure(f"{verb}, {who}", heat, time_ns, count, 0, histogram(durations))

    def listed(heat: Heat) -> Measure:
        time_ns, _ = _together(processes, lambda index: [len(os.listdir(directories[index]))])
        return Measure(f"readdir, {who}", heat, time_ns, count, 0)

    def expect(paths: Sequence[Sequence[str]]) -> None:
        for directory, wanted in zip(directories, paths, strict=True):
            if {f"{directory}/{name}" for name in os.listdir(directory)} != set(wanted):
                raise UserError(f"{directory} does not list the names that were made in it")

    yield done("create", "", _create, files)
    expect(files)
    if at.drop:
        at.cold()
        yield listed("cold")
        at.cold()
        yield done("stat", "cold", os.stat, files)
    yield listed("warm")
    _together(processes, lambda index: _each(os.stat, files[index]))
    yield done("stat", "warm", os.stat, files)
    yield done("rename", "", _rename, files)
    expect(renamed)
    yield done("unlink", "", os.unlink, renamed)
    expect([[] for _ in directories])


def work_on_names(at: At) -> Iterator[Measure]:
    """Create, list, stat, rename and unlink files, by one process and by four in a directory each."""
    yield from _names(at, 1)
    yield from _names(at, _PROCESSES)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def map_memory(at: At) -> Iterator[Measure]:
    """Write a file through a mapping and sync it; read it through one, page by page at random, cold and warm."""
    path, size = at.place / "mapped", at.sizes.mmap_size
    pages = size // mmap.PAGESIZE
    content = random.Random(size).randbytes(size)
    order = random.Random(pages).sample(range(0, size, mmap.PAGESIZE), pages)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.truncate(fd, size)
        try:
            mapping = mmap.mmap(fd, size)
        except OSError as error:
            at.left_out.append(f"mmap: {error.strerror}")
            return
        with mapping:
            start = time.perf_counter_ns()
            for offset in range(0, size, mmap.PAGESIZE):
                mapping[offset : offset + mmap.PAGESIZE] = content[offset : offset + mmap.PAGESIZE]
            mapping.flush()
            yield Measure("mmap write and sync", "", time.perf_counter_ns() - start, pages, size)
        at.cold(path)
        heats: tuple[Heat, ...] = ("cold", "warm")
        for heat in heats:
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping:
                durations, clock = [], time.perf_counter_ns
                begin = clock()
                for offset in order:
                    start = clock()
                    mapping[offset : offset + mmap.PAGESIZE]
                    durations.append(clock() - start)
                yield Measure("mmap read random", heat, clock() - begin, pages, size, histogram(durations))
                if mapping[:] != content:
                    raise UserError(f"{path} does not hold what was written through the mapping")
    finally:
        os.close(fd)


Work = Callable[[At], Iterator[Measure]]

#: All works, in the order in which a round does them.
WORKS: dict[str, Work] = {
    "copy a tree": copy_tree,
    "copy a large file": copy_large,
    "copy a large file inside": copy_inside,
    "dd": copy_dd,
    "fio": run_fio,
    "names": work_on_names,
    "mmap": map_memory,
}
