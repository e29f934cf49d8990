"""benchfs bench small: its numbers fit together, the daemons confirm them, and nothing is left behind."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cli_help import Done, Running, benchfs, clean_directory, command_line, processes_below, refused, sentence_of
from cluster import running_cluster
from posix_help import wait_until

from benchfs_fuse.bench.samples import Samples
from benchfs_fuse.bench.small import LENGTHS, Counted, Mode, Report, check_counted, floor_of, shares
from benchfs_fuse.chunks.disk import RESERVE_PART
from benchfs_fuse.errors import UserError
from benchfs_fuse.limits import KIB, MIB
from benchfs_fuse.registry import Registry, init_registry

ITERATIONS = 12
FEW = ("--iterations", ITERATIONS, "--warm-up", 2)
#: Enough that a run is still under way when a test has seen it begin to write.
MANY_COUNT = 1000
MANY = ("--iterations", MANY_COUNT, "--warm-up", 0)
#: Seconds for so many files to be created on a loaded machine.
WRITES_S = 120.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with clean_directory(tmp_path) as directory:
        yield directory


def words(mode: Mode, place: Path, *more: object) -> list[object]:
    """Return the command with its directories."""
    data = [] if mode is Mode.CLIENT else ["--data-dir", place / "data"]
    return ["bench", "small", "--mode", mode, "--registry-dir", place / "reg", *data, *more]


def report_of(done: Done) -> Report:
    return msgspec.json.decode(done.out, type=Report)


def check(report: Report, *, raw: bool = True) -> None:
    """See that a complete report fits together."""
    assert report.complete and report.trouble == ""
    kinds = ["write", "read", "read cold"] if raw else ["write", "read"]
    assert [(case.name, case.length) for case in report.cases] == [
        ("create", 0),
        *((kind, length) for length in LENGTHS for kind in kinds),
    ]
    for case in report.cases:
        assert case.samples.count == case.summary.count == ITERATIONS
        assert [len(one) for one in case.samples.rounds] == shares(ITERATIONS)
        assert case.summary == case.samples.summary()
        assert case.samples.min_ns > 0
        assert case.counted is not None
        written, read = case.name == "write", case.name.startswith("read")
        moved = ITERATIONS * case.length
        assert (case.counted.bytes_written, case.counted.bytes_read) == (moved * written, moved * read)
        request = "WriteChunk" if written else "ReadChunk" if read else "Make"
        assert case.counted.requests[request] == ITERATIONS
        floors = {"ucx"} if case.name == "create" else {"ucx", "io_uring", "plain"}
        assert set(case.floors) == (floors if raw else set())
        for floor in case.floors.values():
            assert [len(one) for one in floor.rounds] == shares(ITERATIONS) and floor.min_ns > 0
        assert (case.ratio is not None) == (case.above_us is not None) == raw
    assert report.machine.cpus > 0 and report.machine.versions["benchfs"]


# ── what is computed ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("total", "expected"), [(1, [1]), (4, [1] * 4), (5, [1] * 5), (12, [3, 3, 2, 2, 2])])
def test_rounds_share_the_iterations(total: int, expected: list[int]) -> None:
    assert shares(total) == expected


def test_the_floor_is_the_round_trip_and_the_faster_storage_of_each_round() -> None:
    measured = {
        "ucx": Samples.of([[10, 12, 11], [20]]),
        "io_uring": Samples.of([[5], [50]]),
        "plain": Samples.of([[7], [3]]),
    }
    assert floor_of(measured) == Samples.of([[16], [23]])
    assert floor_of({"ucx": measured["ucx"]}) == Samples.of([[11], [20]])
    assert floor_of({}) is None


@pytest.mark.parametrize(
    ("requests", "written"), [(9, 10 * KIB), (11, 10 * KIB), (10, 10 * KIB - 1), (10, 11 * KIB), (0, 0)]
)
def test_figures_that_the_daemons_do_not_confirm_are_refused(requests: int, written: int) -> None:
    with pytest.raises(UserError, match=f"daemons counted {requests} WriteChunk requests with {written} bytes"):
        check_counted("write", KIB, Counted({"WriteChunk": requests}, 0, written), {"WriteChunk": 10})
    check_counted("write", KIB, Counted({"WriteChunk": 10}, 0, 10 * KIB), {"WriteChunk": 10})


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_local_measures_and_leaves_nothing(place: Path, transport: str) -> None:
    tls = ["--tls", "tcp"] if transport == "tcp" else []
    done = benchfs(*words(Mode.LOCAL, place, *FEW, "--json", *tls))
    assert (done.code, done.err) == (0, "")
    report = report_of(done)
    check(report)
    assert (report.mode, report.transport, report.raw_transport) == ("local", transport, transport)
    assert report.storage and "dropped" in report.cold
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_cluster_that_was_there_stays(place: Path) -> None:
    init_registry(place / "reg", 1)
    done = benchfs(*words(Mode.LOCAL, place, *FEW))
    assert done.code == 0, done
    for text in ("create", *(f"{kind} {n} KiB" for kind in ("write", "read", "read cold") for n in (1, 4, 16))):
        assert f"\n {text} " in done.out or f"\n{text} " in done.out, done.out
    assert f"{ITERATIONS} WriteChunk" in done.out and f"{ITERATIONS * 4096} bytes written" in done.out
    with Registry(place / "reg") as registry:
        assert registry.find(0) is None, "the daemon has left"
    assert (place / "data" / "identity.json").exists()
    assert not (place / "reg" / "bench-small.log").exists()
    assert benchfs(*words(Mode.LOCAL, place, *FEW)).code == 0


def test_server_and_client(place: Path) -> None:
    with Running(*command_line(*words(Mode.SERVER, place)), env={"BENCHFS_DAEMON_LISTEN": "127.0.0.1"}) as server:
        assert f"serving {place / 'data'}" in server.line()
        assert f"--mode client --registry-dir {place / 'reg'}" in server.line()
        done = benchfs(*words(Mode.CLIENT, place, *FEW, "--json"))
        assert (done.code, done.err) == (0, "")
        check(report_of(done))
        server.popen.send_signal(signal.SIGINT)
        assert server.wait().code == 0
    assert list(place.iterdir()) == []


def test_a_client_of_ordinary_daemons_has_no_floors() -> None:
    with running_cluster(2) as cluster:
        done = benchfs("bench", "small", "--mode", "client", "--registry-dir", cluster.registry, *FEW, "--json")
    assert (done.code, done.err) == (0, "")
    report = report_of(done)
    check(report, raw=False)
    assert report.raw_transport == report.cold == ""


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_registry(place: Path) -> None:
    assert f"there is no registry at {place / 'reg'}" in refused(*words(Mode.CLIENT, place))


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.SERVER])
def test_a_daemon_needs_a_data_directory(place: Path, mode: Mode) -> None:
    said = refused("bench", "small", "--mode", mode, "--registry-dir", place / "reg")
    assert "needs --data-dir" in said and not (place / "reg").exists()


def test_a_data_directory_that_cannot_be_made(place: Path) -> None:
    (place / "data").touch()
    assert f"the data directory {place / 'data'}: File exists" in refused(*words(Mode.LOCAL, place))
    said = refused("bench", "small", "--mode", "local", "--registry-dir", place / "reg", "--data-dir", "/proc/sys")
    assert "/proc/sys cannot be written" in said
    assert [path.name for path in place.iterdir()] == ["data"]


def test_a_data_directory_of_somebody_else(place: Path) -> None:
    (place / "data").mkdir()
    (place / "data" / "thesis").write_text("years of work")
    assert "is not empty (it has thesis)" in refused(*words(Mode.LOCAL, place))
    assert (place / "data" / "thesis").read_text() == "years of work"
    assert not (place / "reg").exists()


def test_a_registry_of_several_daemons(place: Path) -> None:
    init_registry(place / "reg", 2)
    assert "is the registry of 2 daemons" in refused(*words(Mode.LOCAL, place))
    assert (place / "reg" / "cluster.json").exists() and not (place / "data").exists()


#: Size of a daemon's disk, and what it keeps free of that for its metadata.
DISK = 96 * MIB
RESERVE = DISK // RESERVE_PART


@pytest.fixture
def disk(place: Path) -> Iterator[Path]:
    """Give the data directory a disk of its own."""
    data = place / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "tmpfs", str(data)], check=True)
    try:
        yield data
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)
        data.rmdir()


def test_a_disk_without_room(place: Path, disk: Path) -> None:
    said = refused(*words(Mode.LOCAL, place, "--iterations", 10_000))
    assert f"{disk} has 96 MiB free, the measurement needs" in said
    assert not (place / "reg").exists() and list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_what_was_measured(place: Path, disk: Path) -> None:
    with Running(*command_line(*words(Mode.SERVER, place, *FEW)), env={"BENCHFS_DAEMON_LISTEN": "127.0.0.1"}) as server:
        assert "serving" in server.line()
        with (disk / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, os.statvfs(disk).f_bavail * 4096 - RESERVE // 2)
        done = benchfs(*words(Mode.CLIENT, place, *FEW, "--json"))
        (disk / "ballast").unlink()
        server.popen.send_signal(signal.SIGINT)
        server.wait()
    assert "no space left on device in the middle" in sentence_of(done)
    report = report_of(done)
    assert not report.complete and [case.name for case in report.cases] == ["create"]
    assert not (place / "reg").exists() and list(disk.iterdir()) == []


# ── endings in the middle ────────────────────────────────────────────────────────────────────────────────────────────


def writes(data: Path) -> Callable[[], bool]:
    """Tell whether the measurement has come to its writes."""
    return lambda: any((data / "chunks").glob("*/*"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_leaves_nothing(place: Path) -> None:
    with Running(*command_line(*words(Mode.LOCAL, place, *MANY, "--json"))) as run:
        wait_until(writes(place / "data"), WRITES_S)
        run.popen.send_signal(signal.SIGINT)
        done = run.wait()
    assert "interrupted by SIGINT" in sentence_of(done, 130)
    report = report_of(done)
    assert not report.complete and "SIGINT" in report.trouble and report.cases[0].name == "create"
    assert report.cases[0].samples.count == MANY_COUNT
    assert list(place.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.CLIENT])
def test_a_daemon_that_dies_in_the_middle(place: Path, mode: Mode) -> None:
    with contextlib.ExitStack() as stack:
        if mode is Mode.CLIENT:
            server = Running(*command_line(*words(Mode.SERVER, place)), env={"BENCHFS_DAEMON_LISTEN": "127.0.0.1"})
            stack.enter_context(server).line()
        run = stack.enter_context(Running(*command_line(*words(mode, place, *MANY, "--json"))))
        wait_until(writes(place / "data"), WRITES_S)
        (daemon,) = [process for process in processes_below(place) if b"benchfs_fuse.daemon" in cmdline(process.pid)]
        os.kill(daemon.pid, signal.SIGKILL)
        done = run.wait()
        if mode is Mode.CLIENT:
            assert "the daemon has ended" in sentence_of(server.wait())
    said = sentence_of(done)
    assert ("the daemon has died in the middle" if mode is Mode.LOCAL else "input/output error in the middle") in said
    assert "what was measured until then is above" in said
    report = report_of(done)
    assert not report.complete and report.cases[0].name == "create"
    assert list(place.iterdir()) == []


def cmdline(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def test_the_process_for_raw_measurements_ends_with_its_parent(place: Path) -> None:
    parent = (
        "import sys\n"
        "from benchfs_fuse.bench import peer\n"
        "task = peer.Task('00' * 32, '00' * 16, '127.0.0.1', '', '', '')\n"
        "with peer.started(task) as process:\n"
        "    print(process.popen.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with Running(sys.executable, "-c", parent) as running:
        pidfd = os.pidfd_open(int(running.line()))
        running.popen.kill()
        assert select.select([pidfd], [], [], 30.0)[0], "it goes on"
        os.close(pidfd)
