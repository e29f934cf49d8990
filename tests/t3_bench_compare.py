"""The works, the worker and the report of comparisons on plain directories; bad input in one sentence."""

import csv
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_help import TINY, make_report
from cli_help import refused

from benchfs_fuse.bench import compare, plots, report, tools, work
from benchfs_fuse.bench.report import BadReport, Row
from benchfs_fuse.bench.worker import Hung, Order, Task, Worker
from benchfs_fuse.errors import UserError

ROUNDS = [1_000_000, 1_100_000, 1_050_000]
SOME = make_report(
    {
        "mount": {("tree in", ""): [3 * one for one in ROUNDS], ("a|b", "cold"): ROUNDS},
        "tmpfs": {("tree in", ""): ROUNDS},
        "disk": {("tree in", ""): ROUNDS[:2]},
    }
)

#: What each work times, by the heat: what report.json, the tables and `diff` name.
ROWS = {
    "copy a tree": ["tree in", "tree out cold", "tree out warm", "tree remove"],
    "copy a large file": ["large in", "large out cold", "large out warm"],
    "copy a large file inside": ["large inside cold"],
    "dd": [
        *("dd write sparse", "dd write 4K", "dd write 1M fsync", "dd write 1M direct", "dd write 1M"),
        *("dd read 1M cold", "dd read 1M warm", "dd read 4K warm", "dd read 1M direct"),
    ],
    "fio": [
        f"fio {what}{how}{heat if what.startswith(('read', 'randread')) and not how else ''}"
        for how, heat in ((" direct", ""), ("", " cold"))
        for what in (
            *("write 1M", "randwrite 4K depth 1", "randwrite 4K depth 16"),
            *("read 1M", "randread 4K depth 1", "randread 4K depth 16"),
        )
    ]
    + ["fio randread 4K depth 1 warm"],
    "names": [
        f"{verb}, {who}{heat}"
        for who in ("1 process", "4 processes")
        for verb, heat in (("create", ""), ("readdir", " warm"), ("stat", " warm"), ("rename", ""), ("unlink", ""))
    ],
    "mmap": ["mmap write and sync", "mmap read random cold", "mmap read random warm"],
}


@pytest.fixture
def at(tmp_path: Path) -> work.At:
    """Give a place on whatever holds the tests' directories; what goes in lies beside it."""
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    place.mkdir()
    scratch.mkdir()
    work.stage(scratch, TINY)
    return work.At(place, scratch, TINY, drop=False)


def contents(scratch: Path) -> dict[str, tools.Entry]:
    """Read what lies there; the directory's own times may change."""
    return {name: entry for name, entry in tools.snapshot(scratch).items() if name != "."}


# ── works ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_work_has_its_rows() -> None:
    assert ROWS.keys() == work.WORKS.keys()


@pytest.mark.parametrize("name", list(ROWS))
def test_a_work_times_its_parts_and_leaves_the_scratch_as_it_was(at: work.At, name: str) -> None:
    before = contents(at.scratch)
    measures = list(work.WORKS[name](at))
    assert [f"{one.name} {one.heat}".rstrip() for one in measures] == ROWS[name]
    assert all(one.time_ns > 0 and one.operations + one.size > 0 for one in measures)
    for one in measures:
        if one.latencies_ns and one.operations:
            assert sum(one.latencies_ns.values()) == one.operations
    assert contents(at.scratch) == before
    assert at.left_out == []


@pytest.mark.parametrize("name", ["fio", "names"])
def test_cold_parts_follow_dropped_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    knob, place = tmp_path / "drop caches", tmp_path / "a 'place"
    knob.touch()
    place.mkdir()
    monkeypatch.setattr(tools, "DROP_CACHES", knob)
    measures = list(work.WORKS[name](work.At(place, tmp_path, TINY, drop=True, written=[tmp_path])))
    assert knob.read_text().strip() == "3"
    cold = {one.name for one in measures if one.heat == "cold"}
    assert (
        cold
        == {
            "fio": {"fio read 1M", "fio randread 4K depth 1", "fio randread 4K depth 16"},
            "names": {f"{verb}, {who}" for verb in ("readdir", "stat") for who in ("1 process", "4 processes")},
        }[name]
    )


def test_what_is_staged_is_the_same_every_time(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        work.stage(tmp_path / name, TINY)
        found.append({name: entry.content for name, entry in tools.snapshot(tmp_path / name).items()})
    assert found[0] == found[1]
    assert len(list((tmp_path / "a" / "tree").rglob("f*"))) == TINY.tree_files
    assert (tmp_path / "a" / "large").stat().st_size == (tmp_path / "a" / "sparse").stat().st_size == TINY.large_size


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        *(("copy a tree", "tree/d0/f0"), ("copy a large file", "large"), ("copy a large file inside", "large")),
        ("dd", "dd"),
    ],
)
def test_bytes_that_change_on_the_way_are_found(
    at: work.At, name: str, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(*files: Path) -> None:
        kept = (at.place / victim).stat()
        with (at.place / victim).open("r+b") as file:
            file.write(b"\0\1\2")
        os.utime(at.place / victim, ns=(kept.st_atime_ns, kept.st_mtime_ns))

    monkeypatch.setattr(tools, "drop_cached", corrupt)
    with pytest.raises(UserError, match=r"differ|is not what was written"):
        list(work.WORKS[name](at))


def test_names_that_get_lost_are_found(at: work.At, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_create", lambda path: None)
    with pytest.raises(UserError, match="does not list the names"):
        list(work.work_on_names(at))


def test_a_process_that_fails_says_why(at: work.At, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_create", os.rmdir)
    with pytest.raises(UserError, match=r"names-1-0/f0: No such file or directory"):
        list(work.work_on_names(at))


def test_where_direct_io_is_refused_it_is_left_out(at: work.At, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *more: int, **others: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", str(path))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    names = [one.name for one in work.copy_dd(at)]
    assert names and not any("direct" in name for name in names)
    assert at.left_out == ["direct I/O: Invalid argument"]


def test_dropping_caches_writes_back_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knob = tmp_path / "drop_caches"
    knob.touch()
    monkeypatch.setattr(tools, "DROP_CACHES", knob)
    assert tools.may_drop_caches()
    tools.drop_all_caches([tmp_path])
    assert knob.read_text() == "3"
    with pytest.raises(FileNotFoundError):
        tools.drop_all_caches([tmp_path / "none"])
    monkeypatch.setattr(tools, "DROP_CACHES", tmp_path)
    assert not tools.may_drop_caches()


# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def worker(at: work.At) -> Iterator[Worker]:
    one = Worker(Task(str(at.place), str(at.scratch), TINY, False))
    one.hello()
    yield one
    one.end(at_once=True)


def test_a_worker_leaves_nothing_and_ends_in_order(worker: Worker, at: work.At) -> None:
    measuring = worker.work(Order("copy a tree"), 60)
    assert [f"{one.name} {one.heat}".rstrip() for one in measuring] == ROWS["copy a tree"]
    assert list(at.place.iterdir()) == [Path(worker.workplace)]
    assert worker.end() == ""
    assert list(at.place.iterdir()) == []


def test_a_worker_that_is_broken_off_leaves_nothing(worker: Worker, at: work.At) -> None:
    measuring = worker.work(Order("fio"), 60)
    worker._send(Order("fio"))
    assert worker.end(at_once=True) == ""
    assert list(at.place.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        next(measuring)


def test_a_failing_tool_is_told_and_the_worker_lives(worker: Worker, at: work.At) -> None:
    (at.scratch / "large").unlink()
    with pytest.raises(UserError, match=r"cp failed: .*No such file or directory"):
        list(worker.work(Order("copy a large file"), 60))
    (Path(worker.workplace) / "work").rmdir()
    assert len(list(worker.work(Order("copy a tree"), 60))) == 4


def test_a_worker_that_dies_is_told(worker: Worker) -> None:
    os.kill(worker._process.pid, signal.SIGBUS)
    with pytest.raises(UserError, match="the process that worked there was killed by SIGBUS"):
        list(worker.work(Order("mmap"), 60))
    assert worker.end() == f"{worker.workplace} could not be removed"


def test_a_worker_that_hangs_is_given_up(worker: Worker) -> None:
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(Hung, match=r"nothing was done within 0\.2 s"):
        list(worker.work(Order("mmap"), 0.2))
    assert worker.end(0.2) == f"{worker.workplace} could not be removed"
    assert worker._process.returncode == -signal.SIGKILL


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    worker = Worker(Task(str(tmp_path / "none"), str(tmp_path / "scratch"), TINY, False))
    with pytest.raises(UserError, match="none: cannot make a directory there: No such file or directory"):
        worker.hello()
    assert worker.end() == ""


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report.save(SOME, tmp_path, ["ratios.png"])
    assert report.load(tmp_path) == SOME
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SOME.samples) == 11
    assert rows[0]["place"] == "mount" and rows[0]["time_ns"] == "3000000"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "samples.csv"]


def test_a_report_tells_people_what_counts(tmp_path: Path) -> None:
    text = report.markdown(SOME, ["ratios.png"])
    assert "| tree in |  | 3,175/s | 9,524/s | 9,524/s | 3.00 (3.00-3.00) | 1.00 (1.00-1.00) |" in text
    assert "| a\\|b | cold | 9,524/s | – | – | – | – |" in text
    for words in ("![ratios](ratios.png)", "* mount: mmap: No such device", "0=shm", "/sys/knob=1", "benchfs=0.1.0"):
        assert words in text
    assert "Incomplete" not in text
    assert "**Incomplete**: it rained." in report.markdown(make_report({}, trouble="it rained"), [])


def test_the_table_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(SOME)
    said = capsys.readouterr().out
    assert "3.00 (3.00-3.00)" in said and "medians of 3 alternating rounds (tiny)" in said
    assert "left out: mount: mmap: No such device\n" in said
    assert "…" not in said


def test_percentiles_are_samples() -> None:
    cells = report.table_of(SOME)[Row("tree in", "")]
    latencies = cells["tmpfs"].latencies_ns
    assert sum(latencies.values()) == 30
    assert [report.percentile_ns(latencies, percent) for percent in (0, 30, 50, 90, 91, 100)] == [
        *(100_000, 100_000, 105_000, 110_000, 1_000_000, 1_100_000),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "damaged"), (b"\xff{", "damaged"), (b'{"complete": true}', "of another version")],
)
def test_a_bad_folder_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BadReport, match=words):
        report.load(tmp_path)
    assert words in refused("bench", "diff", tmp_path, tmp_path, code=2)


def test_plots_are_drawn(tmp_path: Path) -> None:
    assert plots.draw(SOME, tmp_path) == ["ratios.png", "latencies.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ratios.png", "latencies.png"))


def test_without_matplotlib_one_sentence_stands_for_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed: there are no plots"):
        plots.draw(SOME, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_no_mount_is_refused(tmp_path: Path) -> None:
    assert "is not in a benchfs mount" in refused("bench", "compare", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("also", ["", "a", "=/tmp", "a=", "a b=/tmp", "x" * 25 + "=/tmp"])
def test_a_badly_named_directory_is_refused(tmp_path: Path, also: str) -> None:
    assert "NAME=DIR" in refused("bench", "compare", tmp_path, "--out", tmp_path / "out", "--also", also, code=2)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists"):
        compare._make_folder(tmp_path / "file", Path("/mnt"))
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        compare._make_folder(tmp_path, Path("/mnt"))
    with pytest.raises(UserError, match="lies in the mount that is measured"):
        compare._make_folder(tmp_path / "new", tmp_path)
    with pytest.raises(UserError, match="cannot write to /proc/none"):
        compare._make_folder(Path("/proc/none"), Path("/mnt"))
    assert compare._make_folder(tmp_path / "new" / "deep", Path("/mnt"))
    assert not compare._make_folder(tmp_path / "new" / "deep", Path("/mnt"))
    assert stat.S_ISDIR((tmp_path / "new" / "deep").stat().st_mode)


def test_too_little_room_to_work_with_is_refused() -> None:
    with pytest.raises(UserError, match=r"neither /dev/shm nor .* has .* MiB to work with"):
        compare._scratch_directory(1 << 60)
