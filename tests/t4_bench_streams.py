"""``benchfs bench streams``: what it measures, that it checks what it reads, and that nothing of it stays."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest
from cli_help import (
    PATIENCE_S,
    clean_directory,
    mounts_below,
    processes_below,
    records_below,
    refused,
    running_benchfs,
    wait_until,
)
from rich.console import Console

from benchfs_fuse import control, processes
from benchfs_fuse.bench import streams
from benchfs_fuse.bench.samples import Moved, ratio_of
from benchfs_fuse.bench.streams import REQUEST, Report, check, read, run_streams, write
from benchfs_fuse.errors import UserError
from benchfs_fuse.limits import MIB
from benchfs_fuse.runtime import runtime_dir

SIZE_MIB = 8
SIZE = SIZE_MIB * MIB


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """Give a directory, in which nothing may be left, nor anything elsewhere that belongs to it."""
    with clean_directory(tmp_path) as directory:
        yield directory
        assert list(directory.iterdir()) == []
        assert processes_below(directory) == [] and mounts_below(directory) == [] and records_below(directory) == []
        assert [path for path in runtime_dir().glob(f"{quote(str(directory), safe='')}*") if path.is_symlink()] == []


def record_of(mountpoint: Path) -> control.MountRecord:
    """Return the record of a mount that serves."""
    (found,) = [record for record in control.records() if Path(record.mountpoint) == mountpoint]
    return found


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_clusters_are_measured_in_turn_and_nothing_stays(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    real = streams.write

    def noted(path: Path, size: int, number: int) -> Moved:
        daemons = list((path.parent.parent / path.parent.name.replace("mount", "cluster")).glob("daemon-?"))
        order.append(f"{number}: {len(daemons)}")
        assert len(processes_below(data_dir)) == 5  # three daemons, two mounts
        return real(path, size, number)

    monkeypatch.setattr(streams, "write", noted)
    assert run_streams(data_dir, rounds=2, size_mib=SIZE_MIB, as_json=True) == 0
    assert order == ["0: 2", "0: 1", "1: 1", "1: 2", "2: 2", "2: 1"]
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert report.size == SIZE and report.storage.path == str(data_dir) and "dropped" in report.cold
    assert [row.what for row in report.rows] == ["write and close", "read for the first time"]
    for row in report.rows:
        for moved in (row.one, row.two):
            assert [one.bytes for one in moved.rounds] == [SIZE] * 2
            assert all(1 < one.mib_per_s < 100_000 for one in moved.rounds)
            assert min(moved.rates) <= moved.mib_per_s <= max(moved.rates)
        assert row.ratio == ratio_of(row.two.rates, row.one.rates)
        assert 0 < row.ratio.low <= row.ratio.value <= row.ratio.high
    streams.show(report, Console(highlight=False, width=100))
    table = capsys.readouterr().out
    for row in report.rows:
        (line,) = [line for line in table.splitlines() if line.strip().startswith(row.what)]
        assert str(row.one) in line and str(row.two) in line and str(row.ratio) in line
    assert "a file of 8 MiB in requests of 1 MiB" in table and "2 rounds" in table


# ── what is read is checked ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write(path, SIZE, 3).bytes == path.stat().st_size == SIZE
    assert read(path, SIZE, 3).bytes == SIZE


@pytest.mark.parametrize("offset", [0, 9, REQUEST - 1, 3 * REQUEST, SIZE - 1])
def test_a_byte_that_was_not_written_is_told(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "file"
    write(path, SIZE, 3)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    at = offset // REQUEST * REQUEST
    for look in (read, check):
        with pytest.raises(UserError, match=rf"does not hold what was written, from byte {at} on"):
            look(path, SIZE, 3)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (SIZE - 1, f"gives {REQUEST - 1} bytes at {SIZE - REQUEST} instead of {REQUEST}"),
        (SIZE - REQUEST, f"does not hold what was written, from byte {SIZE - REQUEST} on"),
        (0, "does not hold what was written, from byte 0 on"),
        (SIZE + REQUEST, f"does not hold what was written, from byte {SIZE} on"),
    ],
)
def test_another_size_is_told(tmp_path: Path, size: int, told: str) -> None:
    path = tmp_path / "file"
    write(path, SIZE, 3)
    os.truncate(path, size)
    with pytest.raises(UserError, match=told):
        read(path, SIZE, 3)


def test_another_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, SIZE, 3)
    with pytest.raises(UserError, match="does not hold what was written, from byte 0 on"):
        read(path, SIZE, 4)


def test_what_is_lost_in_a_cluster_is_told(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams.Cluster.forget

    def forgotten(self: streams.Cluster) -> str:
        os.truncate(self.file, SIZE - REQUEST)
        return real(self)

    monkeypatch.setattr(streams.Cluster, "forget", forgotten)
    with pytest.raises(UserError, match=f"does not hold what was written, from byte {SIZE - REQUEST} on"):
        run_streams(data_dir, rounds=1, size_mib=SIZE_MIB, as_json=True)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mount_that_dies_is_told(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams.write

    def killing(path: Path, size: int, number: int) -> Moved:
        process = record_of(path.parent).process
        os.kill(process.pid, signal.SIGKILL)
        assert processes.wait_end(process, PATIENCE_S)
        return real(path, size, number)

    monkeypatch.setattr(streams, "write", killing)
    with pytest.raises(UserError, match=r"the mount of the cluster with 2 daemons has died \(.+\)"):
        run_streams(data_dir, rounds=1, size_mib=SIZE_MIB, as_json=True)


def test_another_error_is_told_with_its_place(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams.write

    def in_the_way(path: Path, size: int, number: int) -> Moved:
        path.mkdir()
        return real(path, size, number)

    monkeypatch.setattr(streams, "write", in_the_way)
    with pytest.raises(UserError, match=r"the mount of the cluster with 2 daemons: .*/stream: File exists"):
        run_streams(data_dir, rounds=1, size_mib=SIZE_MIB, as_json=True)


def test_nothing_stays_of_an_interrupted_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams.read

    def interrupted(path: Path, size: int, number: int) -> Moved:
        os.kill(os.getpid(), signal.SIGINT)
        return real(path, size, number)

    monkeypatch.setattr(streams, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_streams(data_dir, rounds=1, size_mib=SIZE_MIB, as_json=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_stays_of_what_was_only_coming_up(data_dir: Path, number: signal.Signals, code: int) -> None:
    with running_benchfs("bench", "streams", "--data-dir", data_dir, "--size", 1) as running:
        wait_until(lambda: any(data_dir.iterdir()), data_dir)
        (place,) = data_dir.iterdir()
        wait_until((place / "cluster-2").is_dir, place)
        wait_until((place / "cluster-2" / "mount.log").exists, place / "cluster-2")
        os.kill(running.pid, number)
        assert running.wait().code == code


def test_bad_places_are_told(data_dir: Path) -> None:
    words = ("bench", "streams", "--data-dir")
    assert refused(*words, data_dir / "missing").endswith("missing cannot be written: No such file or directory")
    room = refused(*words, data_dir, "--size", 1 << 24)
    assert "MiB free, the measurement needs 33554560 MiB" in room
    assert "a file has 1 to 16777216 MiB" in refused(*words, data_dir, "--size", 0, code=2)
