"""Measure: ``benchfs bench …``. A benchmark is one entry of ``BENCHMARKS``; ``benchfs_fuse.bench`` does the work."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .. import config
from ..errors import ConfigError
from . import arguments

#: Most iterations: the samples of a run are kept, and more of them say nothing more.
_ITERATIONS_MAX = 1_000_000
#: What a directory may be called in a report: the head of a column.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,24}")

_EXAMPLES_SMALL = """\
Creates files, then writes and reads 1, 4 and 16 KiB through the client library, without FUSE, one after the other.
Every write is flushed: the daemon has it before the next one begins, and its own counters must say so. Reads come from
the daemon: warm, then cold (caches dropped; as root all of them). Beside each, measured in the same run in alternating
rounds: a raw UCX round trip of that size, and raw storage (io_uring, pwrite, pread) in the data directory.

--mode local starts a daemon and measures it. On two nodes, --mode server serves and --mode client measures; without
the server's help (an ordinary benchfsd), the client measures without the raw figures. Where there is no cluster in
--registry-dir, local and server form one of one daemon; what they have formed, they take away in the end.

Exit codes: 1 it failed or the counters do not agree; what was measured until then is printed. 130 Ctrl-C, the same.

examples:
  benchfs bench small --mode local --registry-dir /tmp/reg --data-dir /data/bench
  benchfs bench small --mode local --registry-dir /tmp/reg --data-dir /dev/shm/bench --iterations 5000 --json
  benchfs bench small --mode server --registry-dir /shared/reg --data-dir /local/bench     on one node
  benchfs bench small --mode client --registry-dir /shared/reg                             on another
"""

_EXAMPLES_COMPARE = """\
Does the same work in the mount, in memory (--baseline), in the directory below the daemons' data where "benchfs up"
knows it, and in all others that are named, in alternating rounds: copies a tree of small files and a large file in and
out, and a large one inside, dd, fio (verified), metadata with one process and four, mmap; cold and warm apart. Every
byte is checked. OUT gets report.md, report.json (every sample, and what they were measured on), samples.csv and plots.

As root, cold means that the caches of the whole machine are dropped: others on it feel that; --keep-caches forgets
the pages of the files at hand alone. What breaks off keeps what was measured until then, marked as incomplete, and
removes everything else. Exit codes: 1 something failed; 130 Ctrl-C.

examples:
  benchfs bench compare /mnt/benchfs --quick --out before
  benchfs bench compare /mnt/benchfs --also nfs=/net/home/me --out report
  benchfs bench diff before after
"""
_EXAMPLES_GROWTH = """\
Makes files in one directory and spread over 100, and compares the first with the last; lists a short and a long
directory with attributes; reads the first and the last chunks of a sparse file of 10 GiB; lets one client, then four,
do small operations through the client library. All of it is removed again. Some minutes with 100,000 files.

examples:
  benchfs bench growth /mnt/benchfs
  benchfs bench growth /mnt/benchfs --files 10000 --json
"""

_EXAMPLES_PROTECTIONS = """\
Brings up clusters of two daemons below DIR, whole ones and some that lack one protection, and does in alternating
rounds what pays for it: recorded outcomes (create), marks of chunk files (the first write to a chunk), synced decisions
(mkdir on another daemon). All of it is removed again.

examples:
  benchfs bench protections --data-dir /data
  benchfs bench protections --data-dir /dev/shm --iterations 1000 --json
"""

_EXAMPLES_OBSERVING = """\
Counts the instructions of operations (valgrind), which do not depend on what else the machine does: with every hook of
the recording taken out of a copy of the package, with the hooks while nobody records, and while somebody does. A
mount's handlers, the client library, UCX, a daemon and its store run in one process; chunks are kept in memory. Needs
valgrind; some minutes.

examples:
  benchfs bench observing
  benchfs bench observing --iterations 1000 --json
"""

_EXAMPLES_DIFF = """\
A row changed if an exact rank test over its rounds says so (p of at most 0.01) and the medians differ by a tenth or
more, both also in relation to the baseline of the same run; docs/performance.md says it in full. A and B must have
done the same work (--quick, default, --full).

Exit codes: 0 nothing became slower; 1 something did; 2 a folder holds no report, or the two cannot be compared.

examples:
  benchfs bench diff before after
  benchfs bench diff before after --json | jq '.[] | select(.verdict == "slower")'
"""


_EXAMPLES_FLOORS = """\
Raw UCX between two processes, 64 bytes to 4 MiB there and 64 bytes back, over shared memory and TCP, polling and
sleeping (armed); raw io_uring, pwrite and pread of 1 KiB to 1 MiB in a directory and in memory (/dev/shm). Everything
else stands on these. The floor under a mount is a file system to be mounted and compared with, see the second example.

examples:
  benchfs bench floors --data-dir /data
  python -m benchfs_fuse.bench.memory_fs /mnt/floor &    then: benchfs bench compare /mnt/x --also floor=/mnt/floor …
"""


_EXAMPLES_CALLS = """\
Times single system calls in a mount, and on the floor: a file system that answers everything from its own memory,
mounted for the time of the run. Data goes past the page cache. For names and attributes to go past the kernel's caches
too, mount with -o attr_timeout=0, and say so here.

examples:
  benchfs up /mnt/x -o attr_timeout=0 && benchfs bench calls /mnt/x --attr-timeout 0
  benchfs bench calls /mnt/benchfs --json
"""


_EXAMPLES_NETWORK = """\
Joins two network namespaces of its own by a pair of virtual devices, and sends over TCP from one to the other in
alternating rounds: iperf3, and a connection as it is between a mount and a daemon, with four requests under way that
read and write 1 and 4 MiB each. No disk and no FUSE have a part in it. Root only; needs iperf3. Nothing of it stays.

examples:
  benchfs bench network
  benchfs bench network --rounds 3 --seconds 10 --json
"""


_EXAMPLES_STREAMS = """\
Brings up a cluster of one daemon and one of two below DIR, each with a mount, and in alternating rounds writes a file
from its beginning to its end, and reads it for the first time. Every byte is checked. All of it is removed again. DIR
needs room for two files. As root, the caches of the whole machine are dropped before reading: others on it feel that.

examples:
  benchfs bench streams --data-dir /data
  benchfs bench streams --data-dir /data --size 2048 --rounds 7 --json
"""


class Benchmark(NamedTuple):
    """Describe one command of the group."""

    name: str
    text: str
    examples: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_iterations(
    parser: argparse.ArgumentParser, default: int, text: str, most: int = _ITERATIONS_MAX, what: str = "a measurement"
) -> None:
    parser.add_argument(
        "--iterations",
        type=arguments.whole(1, most, f"{what} has {{}} iterations"),
        default=default,
        metavar="N",
        help=f"{text} (default: {default})",
    )


def _add_small(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=("local", "server", "client"), required=True, help="both ends here, or one of them"
    )
    parser.add_argument(
        "--registry-dir", type=arguments.path, required=True, metavar="DIR", help="the registry of the cluster"
    )
    parser.add_argument(
        "--data-dir", type=arguments.path, metavar="DIR", help="where the daemon keeps its data (local, server)"
    )
    _add_iterations(parser, 1000, "of each operation")
    parser.add_argument(
        "--warm-up",
        type=arguments.whole(0, _ITERATIONS_MAX, "{} iterations warm up"),
        default=100,
        metavar="N",
        help="iterations before them that do not count (default: 100)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: every sample, and what the daemons counted")
    config.add_options(parser, "ucx")


def _small(given: argparse.Namespace) -> int:
    from ..bench.small import Mode, Wanted, run_small

    settings = config.load(vars(given), os.environ)
    return run_small(
        Wanted(
            Mode(given.mode),
            given.registry_dir,
            given.data_dir,
            given.iterations,
            given.warm_up,
            given.json,
            settings,
        )
    )


def _named_directory(text: str) -> tuple[str, Path]:
    """Read NAME=DIR."""
    name, _, directory = text.partition("=")
    if not _NAME.fullmatch(name) or not directory:
        raise argparse.ArgumentTypeError(f"NAME=DIR, with a short name of letters and digits, not {text!r}")
    return name, Path(directory)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", type=arguments.path, metavar="MOUNTPOINT", help="a directory in a benchfs mount")
    parser.add_argument(
        "--baseline", type=arguments.path, metavar="DIR", help="what to compare with (default: tmpfs, at /dev/shm)"
    )
    parser.add_argument(
        "--also",
        type=_named_directory,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="measure this directory too",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="a minute or two (default: some minutes)")
    effort.add_argument("--full", action="store_true", help="as long as it takes for firm figures")
    parser.add_argument(
        "--out", type=arguments.path, required=True, metavar="DIR", help="a new folder, which gets the report"
    )
    parser.add_argument("--keep-caches", action="store_true", help="drop no caches but those of the files at hand")
    parser.add_argument(
        "--step-timeout",
        type=arguments.seconds,
        default=600.0,
        metavar="S",
        help="give up where nothing is done for so long (default: 600)",
    )


def _compare(given: argparse.Namespace) -> int:
    from ..bench import compare, report, work
    from ..kernel_mounts import plain_path
    from .local import data_dir_of

    data_dir = data_dir_of(plain_path(given.mountpoint))
    names = [name for name, _ in given.also]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two directories are called {repeated.pop()}")
    wanted = compare.Wanted(
        given.mountpoint,
        given.baseline,
        dict(given.also),
        data_dir if data_dir is not None and data_dir.is_dir() else None,
        work.QUICK if given.quick else work.FULL if given.full else work.USUAL,
        given.out,
        given.keep_caches,
        given.step_timeout,
    )
    report.show(compare.compare(wanted))
    sys.stdout.write(f"the report is in {given.out / 'report.md'}\n")
    return 0


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=arguments.path, metavar="A", help="the folder of a comparison")
    parser.add_argument("b", type=arguments.path, metavar="B", help="that of a later one")
    parser.add_argument("--json", action="store_true", help="for programs: every row, changed or not")


def _diff(given: argparse.Namespace) -> int:
    from ..bench import diff

    return diff.run_diff(given.a, given.b, given.json)


def _add_floors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=arguments.path, required=True, metavar="DIR", help="where a daemon would keep its data"
    )
    _add_iterations(parser, 1000, "of each operation; an eighth of it from 1 MiB on")
    parser.add_argument("--json", action="store_true", help="for programs: every sample")


def _floors(given: argparse.Namespace) -> int:
    from ..bench.floors import run_floors

    return run_floors(given.data_dir, given.iterations, given.json)


def _add_calls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", type=arguments.path, metavar="MOUNTPOINT", help="a directory in a benchfs mount")
    _add_iterations(parser, 100, "of each call in each round; an eighth of it for 1 MiB", 100_000, "a round")
    _add_rounds(parser, 7)
    parser.add_argument(
        "--attr-timeout",
        type=arguments.seconds_or_none,
        default=1.0,
        metavar="S",
        help="of the floor: what the mount has (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: every sample")


def _calls(given: argparse.Namespace) -> int:
    from ..bench.calls import run_calls

    return run_calls(
        given.mountpoint,
        iterations=given.iterations,
        rounds=given.rounds,
        attr_timeout_s=given.attr_timeout,
        as_json=given.json,
    )


def _add_growth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", type=arguments.path, metavar="MOUNTPOINT", help="a directory in a benchfs mount")
    parser.add_argument(
        "--files",
        type=arguments.whole(20, 10_000_000, "growth is seen with {} files"),
        default=100_000,
        metavar="N",
        help="to make in one directory, and spread over many (default: 100000)",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _growth(given: argparse.Namespace) -> int:
    from ..bench.growth import run_growth

    return run_growth(given.mountpoint, files=given.files, as_json=given.json)


def _add_observing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--iterations",
        type=arguments.whole(1, 10_000, "{} operations are counted"),
        default=300,
        metavar="N",
        help="of each operation (default: 300)",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _observing(given: argparse.Namespace) -> int:
    from ..bench.observing import run_observing

    return run_observing(given.iterations, given.json)


def _add_protections(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=arguments.path, required=True, metavar="DIR", help="where clusters may be")
    _add_iterations(parser, 200, "of each operation in each round", 100_000, "a round")
    parser.add_argument("--json", action="store_true", help="for programs: every sample")


def _protections(given: argparse.Namespace) -> int:
    from ..bench.protections import run_protections

    return run_protections(given.data_dir, given.iterations, given.json)


def _add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--rounds",
        type=arguments.whole(1, 1000, "a measurement has {} rounds"),
        default=default,
        metavar="N",
        help=f"of each in turn (default: {default})",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    _add_rounds(parser, 5)
    parser.add_argument(
        "--seconds",
        type=arguments.whole(1, 3600, "a round lasts {} seconds"),
        default=2,
        metavar="S",
        help="for each length and direction in each round (default: 2)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: every sample")


def _network(given: argparse.Namespace) -> int:
    from ..bench.network import run_network

    return run_network(rounds=given.rounds, seconds=given.seconds, as_json=given.json)


def _add_streams(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=arguments.path, required=True, metavar="DIR", help="where clusters may be")
    _add_rounds(parser, 5)
    parser.add_argument(
        "--size",
        type=arguments.whole(1, 1 << 24, "a file has {} MiB"),
        default=512,
        metavar="MIB",
        help="of the file, in MiB (default: 512)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: every sample")


def _streams(given: argparse.Namespace) -> int:
    from ..bench.streams import run_streams

    return run_streams(given.data_dir, rounds=given.rounds, size_mib=given.size, as_json=given.json)


BENCHMARKS = (
    Benchmark("floors", "time what everything else stands on", _EXAMPLES_FLOORS, _add_floors, _floors),
    Benchmark(
        "small", "time small operations through the client library, without FUSE", _EXAMPLES_SMALL, _add_small, _small
    ),
    Benchmark("calls", "time single system calls in a mount and on its floor", _EXAMPLES_CALLS, _add_calls, _calls),
    Benchmark("network", "hold a connection over TCP against iperf3", _EXAMPLES_NETWORK, _add_network, _network),
    Benchmark("growth", "tell what becomes of the speed as things grow", _EXAMPLES_GROWTH, _add_growth, _growth),
    Benchmark(
        "streams", "tell what a second daemon costs a sequential stream", _EXAMPLES_STREAMS, _add_streams, _streams
    ),
    Benchmark(
        "compare",
        "do the same work in a mount and elsewhere, and leave a report",
        _EXAMPLES_COMPARE,
        _add_compare,
        _compare,
    ),
    Benchmark("protections", "tell what each protection costs", _EXAMPLES_PROTECTIONS, _add_protections, _protections),
    Benchmark("observing", "tell what the hooks of trace cost", _EXAMPLES_OBSERVING, _add_observing, _observing),
    Benchmark("diff", "say what changed between two reports beyond noise", _EXAMPLES_DIFF, _add_diff, _diff),
)
