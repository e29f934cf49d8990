"""`bench compare` on a real mount: a whole folder, and what is left when something breaks off."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from bench_help import TINY
from cli_help import refused, running_benchfs, sentence_of, wait_until
from cluster import Cluster, Mount, running_cluster

from benchfs_fuse.bench import compare, report, work
from benchfs_fuse.bench.report import Row
from benchfs_fuse.bench.work import Measure
from benchfs_fuse.bench.worker import PREFIX, Order, Worker
from benchfs_fuse.errors import UserError


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def mount(cluster: Cluster) -> Iterator[Mount]:
    mount = cluster.mount()
    for left in mount.mountpoint.iterdir():  # by a test whose mount died
        shutil.rmtree(left)
    yield mount
    mount.stop()


@pytest.fixture
def baseline() -> Iterator[Path]:
    """Give a directory on tmpfs where nobody else works: what lies there was left behind."""
    directory = Path(tempfile.mkdtemp(prefix="benchfs-test-", dir="/dev/shm"))
    yield directory
    assert list(directory.iterdir()) == []
    directory.rmdir()


def wanted(mount: Mount, baseline: Path, out: Path, *, step_timeout_s: float = 60.0) -> compare.Wanted:
    return compare.Wanted(
        mount.mountpoint, baseline, {}, None, TINY, out, keep_caches=True, step_timeout_s=step_timeout_s
    )


def interfere(monkeypatch: pytest.MonkeyPatch, order: str, action: Mount | Cluster | None) -> None:
    """Have something happen just before the mount gets an order: its process dies, or the daemons stop."""
    real = Worker.work

    def working(self: Worker, given: Order, timeout_s: float) -> Generator[Measure, None, tuple[str, ...]]:
        if given.work == order:
            match action:
                case Mount():
                    action.kill()
                case Cluster():
                    for daemon in action.daemons:
                        daemon.signal(signal.SIGSTOP)
                case None:
                    os.kill(os.getpid(), signal.SIGINT)
        return (yield from real(self, given, timeout_s))

    monkeypatch.setattr(Worker, "work", working)


def without_fio(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "fio" else which(name))


@pytest.mark.slow
def test_a_comparison_leaves_a_whole_folder_and_nothing_else(mount: Mount, baseline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare.compare(wanted(mount, baseline, out))
    assert report.load(out) == result
    assert result.complete and not result.trouble
    assert sorted(path.name for path in out.iterdir()) == [
        *("latencies.png", "ratios.png", "report.json", "report.md", "samples.csv"),
    ]
    assert [place.name for place in result.places] == ["mount", "baseline"]
    assert result.places[0].storage.filesystem == "fuse.benchfs" and result.places[1].storage.filesystem == "tmpfs"
    assert set(result.mount.transports) == {"0", "1"} and all(result.mount.transports.values())
    assert any("read_ahead_kb" in knob for knob in result.mount.storage.knobs)
    assert {sample.work for sample in result.samples} == work.WORKS.keys()
    table = report.table_of(result)
    assert len(table) > 35
    for row, cells in table.items():
        assert cells.keys() == {"mount", "baseline"}, row
    assert table[Row("fio randread 4K depth 16", "cold")]["mount"].latencies_ns
    assert list(mount.mountpoint.iterdir()) == []


def test_a_mount_that_dies_in_the_middle(
    mount: Mount, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_fio(monkeypatch)
    interfere(monkeypatch, "copy a large file", mount)
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        compare.compare(wanted(mount, baseline, out))
    sentence = str(caught.value)
    assert sentence.startswith(f"mount ({mount.mountpoint}), copy a large file: {mount.mountpoint}/{PREFIX}")
    assert "Transport endpoint is not connected; " in sentence
    assert sentence.endswith(f"could not be removed; what was measured so far is in {out}, marked as incomplete")
    kept = report.load(out)
    assert not kept.complete and "Transport endpoint" in kept.trouble
    assert {sample.work for sample in kept.samples} == {"copy a tree"}
    assert {sample.place for sample in kept.samples} == {"mount", "baseline"}
    assert "fio: it is not installed" in kept.left_out
    assert "**Incomplete**" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_mount_that_hangs_is_not_waited_for(
    cluster: Cluster, mount: Mount, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfere(monkeypatch, "copy a large file", cluster)
    monkeypatch.setattr(compare, "_HUNG_S", 0.5)
    out = tmp_path / "out"
    try:
        with pytest.raises(UserError, match=r"nothing was done within 1 s: it hangs, .* could not be removed"):
            compare.compare(wanted(mount, baseline, out, step_timeout_s=1.0))
    finally:
        for daemon in cluster.daemons:
            daemon.signal(signal.SIGCONT)
    assert {sample.work for sample in report.load(out).samples} == {"copy a tree"}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(
    mount: Mount,
    baseline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interfere(monkeypatch, "copy a large file", None)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare.compare(wanted(mount, baseline, out))
    said = capsys.readouterr().err
    assert said == f"benchfs: it was interrupted; what was measured so far is in {out}, marked as incomplete\n"
    assert {sample.work for sample in report.load(out).samples} == {"copy a tree"}
    assert list(mount.mountpoint.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_by_a_signal_and_leaves_nothing(
    mount: Mount, baseline: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words = ("bench", "compare", mount.mountpoint, "--baseline", baseline, "--quick", "--keep-caches")
    with running_benchfs(*words, "--out", tmp_path / "out") as running:
        wait_until(lambda: any(baseline.iterdir()), baseline)
        os.kill(running.pid, number)
        done = running.wait()
    assert sentence_of(done, code).startswith("it was interrupted")
    assert list(mount.mountpoint.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full(mount: Mount, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    assert os.system(f"mount -t tmpfs -o size=512k none {disk}") == 0
    try:
        words = ("bench", "compare", mount.mountpoint, "--baseline", disk, "--quick", "--out", tmp_path / "out")
        assert "0 MiB are free, the comparison needs" in refused(*words)
        assert not (tmp_path / "out").exists()
        # What is full only later: somebody else is faster than the look at the room.
        monkeypatch.setattr(work.Sizes, "room", 1)
        with pytest.raises(
            UserError,
            match=r"also \(.*disk\), copy a large file: cp failed: .*No space left on device; what was measured so far",
        ):
            compare.compare(wanted(mount, baseline, tmp_path / "out")._replace(also={"also": disk}))
        assert report.load(tmp_path / "out").samples
        assert list(disk.iterdir()) == list(mount.mountpoint.iterdir()) == []
    finally:
        assert os.system(f"umount {disk}") == 0


def test_the_command_shows_a_table_and_diff_reads_the_folder(
    mount: Mount, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchfs_fuse import cli

    monkeypatch.setattr(work, "QUICK", TINY)
    monkeypatch.setattr(work, "WORKS", {"names": work.WORKS["names"]})
    monkeypatch.setattr(compare, "WORKS", work.WORKS)
    out = tmp_path / "out"
    words = ["bench", "compare", str(mount.mountpoint), "--quick", "--keep-caches", "--out", str(out)]
    assert cli.main([*words, "--also", f"here={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "mount ÷ tmpfs" in said and "here ÷ tmpfs" in said and "unlink, 4 processes" in said
    assert f"the report is in {out}/report.md" in said
    assert cli.main(["bench", "diff", str(out), str(out), "--json"]) == 0
    assert {one["verdict"] for one in json.loads(capsys.readouterr().out)} == {"too few rounds"}
