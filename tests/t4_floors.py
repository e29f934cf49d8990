"""The floors run, and give right answers: a floor that does less than what stands on it would be none."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from cli_help import benchfs, clean_directory, refused

from benchfs_fuse import companion, kernel_mounts
from benchfs_fuse.bench import floors, peer, storage
from benchfs_fuse.errors import UserError
from benchfs_fuse.limits import KIB, MIB
from benchfs_fuse.mount import MAX_BACKGROUND, READ_AHEAD_KB

BUILT = companion.LIBRARY.find() is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with clean_directory(tmp_path_factory.mktemp("floors")) as directory:
        (directory / "mnt").mkdir()
        yield directory


@pytest.fixture(scope="module")
def floor(place: Path) -> Iterator[Path]:
    with floors.memory_mount(place / "mnt") as path:
        yield path
    assert kernel_mounts.find(place / "mnt") is None


# ── raw ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_raw_floors_are_all_there(tmp_path: Path) -> None:
    done = benchfs("bench", "floors", "--data-dir", tmp_path, "--iterations", 10, "--json")
    assert (done.code, done.err) == (0, "")
    report = msgspec.json.decode(done.out, type=floors.Report)
    names = {(floor.kind.partition(" on ")[0], floor.name, floor.length) for floor in report.floors}
    messages = {
        (f"UCX {transport}", how, length)
        for transport in ("shm", "tcp")
        for how in ("polling", "armed")
        for length in (64, 4 * KIB, 16 * KIB, MIB, 4 * MIB)
    }
    stores = {
        (kind, way, length)
        for kind in (report.storage.filesystem, "tmpfs")
        for way in ("io_uring write", "io_uring read", "pwrite", "pread")
        for length in (KIB, 4 * KIB, 16 * KIB, MIB)
    }
    assert names == messages | stores
    for floor in report.floors:
        assert [len(one) for one in floor.samples.rounds] == [1 if floor.length >= MIB else 2] * floors.ROUNDS
        assert floor.samples.min_ns > 0 and floor.summary == floor.samples.summary()
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    out = benchfs("bench", "floors", "--data-dir", tmp_path, "--iterations", 1).out
    assert "UCX shm" in out and "armed" in out and "pwrite" in out and "16 KiB" in out and "…" not in out


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere cannot be written: No such file" in refused("bench", "floors", "--data-dir", tmp_path / "nowhere")


@pytest.mark.parametrize("way", storage.Way)
def test_storage_is_measured_cold_too(tmp_path: Path, way: storage.Way) -> None:
    for cold in (False, True):
        times = storage.measure(tmp_path, way, 4 * KIB, 7, cold=cold)
        assert len(times) == 7 and min(times) > 0
    assert list(tmp_path.iterdir()) == []


def test_offsets_are_scattered_and_whole() -> None:
    offsets = storage.scattered(KIB, 100)
    assert sorted(offsets) == list(range(0, 100 * KIB, KIB)) and offsets != sorted(offsets)


async def test_a_stranger_gets_no_raw_measurement() -> None:
    task = peer.Task("00" * 32, "11" * 16, "127.0.0.1", "", "", "")
    stranger = peer.Task("01" * 32, "11" * 16, "127.0.0.1", "", "", "")
    with peer.started(task) as process:
        with pytest.raises(UserError, match="could not prove"):
            async with peer.open_asker(process.address, stranger):
                pass
        async with peer.open_asker(process.address, task) as asker:
            assert len(await asker.round_trips(64, 3)) == 3
            with pytest.raises(UserError, match="no data directory was named there"):
                await asker.storage(storage.Way.PLAIN_READ, KIB, 1)


async def test_a_peer_that_dies_is_a_sentence() -> None:
    task = peer.Task("00" * 32, "11" * 16, "127.0.0.1", "", "tcp", "")
    with peer.started(task) as process:
        async with peer.open_asker(process.address, task) as asker:
            await asker.round_trips(64, 3)
            process.popen.kill()
            process.popen.wait()
            with pytest.raises(UserError, match="has gone"):
                await asker.round_trips(64, 3)


async def test_rounds_alternate() -> None:
    turns: list[str] = []

    async def measured(name: str) -> list[int]:
        turns.append(name)
        await trio.lowlevel.checkpoint()
        return [len(turns)]

    found = await floors.alternate(3, {"ours": lambda: measured("ours"), "floor": lambda: measured("floor")})
    assert turns == ["ours", "floor"] * 3
    assert found["ours"].rounds == ((1,), (3,), (5,)) and found["floor"].rounds == ((2,), (4,), (6,))


# ── the file system in memory ────────────────────────────────────────────────────────────────────────────────────────


def test_a_tree_goes_in_and_out(floor: Path, tmp_path: Path) -> None:
    source = Path(kernel_mounts.__file__).parent
    subprocess.run(["cp", "-a", "--", source, floor / "tree"], check=True)
    subprocess.run(["cp", "-a", "--", floor / "tree", tmp_path / "tree"], check=True)
    subprocess.run(["diff", "-r", "--", source, tmp_path / "tree"], check=True)
    shutil.rmtree(floor / "tree")
    assert not (floor / "tree").exists()


def test_data_is_what_was_written(floor: Path) -> None:
    (floor / "data").mkdir()
    subprocess.run(
        [sys.executable, "-m", "benchfs_fuse.testing.exerciser", floor / "data", "--ops", "200", "--seed", "1"],
        check=True,
        capture_output=True,
    )


def test_names(floor: Path) -> None:
    (floor / "a").write_text("a")
    os.link(floor / "a", floor / "b")
    (floor / "c").symlink_to("b")
    assert os.stat(floor / "a").st_nlink == 2 and (floor / "c").read_text() == "a"
    os.rename(floor / "a", floor / "d")
    (floor / "d").write_text("dd")
    assert (floor / "b").read_text() == "dd" and not (floor / "a").exists()
    (floor / "e").mkdir()
    (floor / "e" / "x").touch()
    with pytest.raises(OSError, match="not empty"):
        (floor / "e").rmdir()
    with (floor / "f").open("w+") as file:
        (floor / "f").unlink()
        file.write("still there")
        file.flush()
        file.seek(0)
        assert file.read() == "still there"
    names = set(os.listdir(floor))
    assert {"b", "c", "d", "e"} <= names and not {"a", "f"} & names


def test_it_is_mounted_as_ours(floor: Path) -> None:
    mounted = kernel_mounts.find(floor)
    assert mounted is not None and mounted.fstype == "fuse.benchfs-floor" and not kernel_mounts.is_benchfs(mounted)
    assert {"default_permissions", "nosuid", "nodev"} <= set(mounted.options.split(","))
    if os.geteuid() == 0 and BUILT:
        assert (kernel_mounts.connection(mounted.minor) / "max_background").read_text().strip() == str(MAX_BACKGROUND)
        assert Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").read_text().strip() == str(READ_AHEAD_KB)
    (floor / "size").write_bytes(bytes(3 * MIB))
    assert os.stat(floor / "size").st_blksize == MIB


def test_without_a_directory_it_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"), floors.memory_mount(tmp_path / "none"):
        pass
