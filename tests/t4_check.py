"""``benchfs check`` of real clusters: clean, damaged behind their backs, in use, repaired, asked for nonsense."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cluster import Cluster, running_cluster
from posix_help import wait_until

from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.limits import CHUNK_SIZE_MIN

DAEMONS = 2


class Said(NamedTuple):
    """Hold what the command said."""

    code: int
    text: str
    error: str


def check(*words: str | Path) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", "benchfs_fuse.cli", "check", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def findings(*words: str | Path, code: int) -> list[dict[str, Any]]:
    said = check(*words, "--json")
    assert (said.code, said.error) == (code, "")
    found: list[dict[str, Any]] = json.loads(said.text)["findings"]
    return found


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster(DAEMONS, chunk_size=CHUNK_SIZE_MIN) as cluster:
        yield cluster


def daemon_id(cluster: Cluster, number: int) -> int:
    """Return the number by which a cluster knows a daemon."""
    found: int = json.loads((cluster.data_dir(number) / "identity.json").read_text())["daemon_id"]
    return found


def held_bytes(cluster: Cluster) -> int:
    """Return what chunk files take on the disks of the daemons."""
    chunks = (path for number in range(DAEMONS) for path in (cluster.data_dir(number) / "chunks").glob("*/*"))
    return sum(path.stat().st_blocks * 512 for path in chunks)


def chunk_files(cluster: Cluster, ino: int) -> list[tuple[int, int, Path]]:
    """Return index, daemon and path of the chunk files of an inode, in order."""
    return sorted(
        (int(path.name.split(".")[1], 16), daemon_id(cluster, number), path)
        for number in range(DAEMONS)
        for path in (cluster.data_dir(number) / "chunks").rglob(f"{ino:016x}.*")
    )


def workload(mount: Path, name: str = "work") -> None:
    """Make some of everything."""
    work = mount / name
    work.mkdir()
    for number in range(4):
        (work / f"d{number}").mkdir()
        for other in range(8):
            (work / f"d{number}" / f"f{other}").write_bytes(os.urandom(CHUNK_SIZE_MIN * other // 2))
    os.link(work / "d0/f3", work / "d1/link")
    (work / "d2").rename(work / "d3/below")
    (work / "d0/f4").rename(work / "d1/moved")
    (work / "symlink").symlink_to("d0")
    os.mkfifo(work / "fifo")
    os.truncate(work / "d0/f7", CHUNK_SIZE_MIN + 17)
    with (work / "sparse").open("wb") as file:
        os.pwrite(file.fileno(), b"x", 50 * CHUNK_SIZE_MIN)
        os.posix_fallocate(file.fileno(), 60 * CHUNK_SIZE_MIN, CHUNK_SIZE_MIN)
    (work / "d0/f6").unlink()
    os.setxattr(work / "d0", b"user.x", b"1")


@pytest.mark.slow
def test_a_check_is_clean_after_a_workload_and_over_restarts(cluster: Cluster) -> None:
    mounted = cluster.mount()
    mount = mounted.mountpoint
    workload(mount)
    wait_until(lambda: cluster.at_rest(mounted))
    # Through the mount or the registry, it is the same.
    by_mount, by_registry = check(mount, "--json"), check(cluster.registry, "--json")
    assert by_mount == by_registry
    assert by_mount.code == 0
    said = json.loads(by_mount.text)
    assert said["findings"] == said["undecided"] == []
    assert (said["daemons"], said["inodes"], said["names"]) == (2, 40, 40)
    assert said["chunks"] == sum(1 for n in range(2) for _ in (cluster.data_dir(n) / "chunks").glob("*/*"))
    text = check(mount)
    assert text.code == 0
    assert text.text.splitlines()[-1] == "nothing is wrong"
    for number in range(DAEMONS):
        cluster.daemons[number].kill()
        cluster.restart_daemon(number)
    assert findings(mount, code=0) == []
    shutil.rmtree(mount / "work")
    assert findings(mount, code=0) == []


def test_damaged_chunk_files_are_named_with_path_inode_chunk_and_daemon(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    workload(mount)
    (mount / "work" / "big name").write_bytes(b"x" * 12 * CHUNK_SIZE_MIN)
    ino = (mount / "work" / "big name").stat().st_ino
    files = chunk_files(cluster, ino)
    files[0][2].unlink()
    os.truncate(files[1][2], 5)
    beside = next(one for one in files[3:] if one[1] == files[2][1])
    beside[2].rename(files[2][2])
    damaged = sorted([files[0], files[1], files[2], beside])
    found = findings(mount, code=4)
    assert sorted((one["chunk"], one["daemon"]) for one in found) == [(index, daemon) for index, daemon, _ in damaged]
    for one in found:
        assert (one["problem"], one["category"], one["ino"]) == ("damaged chunk file", "damaged", ino)
        assert (one["path"], one["bytes"], one["removed"]) == ("/work/big name", CHUNK_SIZE_MIN, False)
    what = {one["chunk"]: one["what"] for one in found}
    assert what[0] == f"{files[0][2]} is missing"
    assert what[1] == f"{files[1][2]} has 5 bytes, its record says {CHUNK_SIZE_MIN}"
    assert what[2] == f"{files[2][2]} is the file of another chunk"
    text = check(cluster.registry).text
    assert text.splitlines()[-1] == "4 damaged"
    assert f"damaged chunk file: /work/big name, chunk 0 of inode {ino} on daemon {files[0][1]}; {files[0][2]}" in text
    # Repair leaves it alone; who removes the file is rid of it.
    assert len(findings(mount, "--repair", code=4)) == 4
    (mount / "work" / "big name").unlink()
    assert findings(mount, code=0) == []


def test_orphans_are_named_and_repair_frees_their_space(cluster: Cluster) -> None:
    """The metadata of one daemon was lost with its disk and made anew: what others hold for it belongs to nothing."""
    mount = cluster.mount()
    workload(mount.mountpoint)
    (mount.mountpoint / "work" / "big").write_bytes(b"x" * 40 * CHUNK_SIZE_MIN)
    ino = (mount.mountpoint / "work" / "big").stat().st_ino
    mount.stop()
    for daemon in cluster.daemons:
        daemon.stop()
    shard_map_home = (ino >> 48) % DAEMONS
    home = next(number for number in range(DAEMONS) if daemon_id(cluster, number) == shard_map_home)
    # Its inode and its name are lost.
    store = RocksStore(cluster.data_dir(home) / "meta")
    names = [key for key, value in store.scan(b"D", b"E") if value[:8] == ino.to_bytes(8, "big")]
    store.write([], [b"I" + ino.to_bytes(8, "big"), *names])
    store.close()
    stray = cluster.data_dir(0) / "chunks" / "05" / f"{0x1005:016x}.00000000.{1:016x}"
    stray.write_bytes(b"x" * 1000)
    for number in range(DAEMONS):
        cluster.restart_daemon(number)
    mountpoint = cluster.mount().mountpoint
    before = len(chunk_files(cluster, ino))
    assert before == 40
    found = findings(mountpoint, code=4)
    by_problem = {one["problem"]: one for one in found}
    orphans = [one for one in found if one["problem"] == "chunks without an inode"]
    assert sorted(one["daemon"] for one in orphans) == [0, 1]
    assert sum(one["bytes"] for one in orphans) == 40 * CHUNK_SIZE_MIN
    assert {one["ino"] for one in orphans} == {ino}
    assert by_problem["chunk file without a record"]["file"] == f"05/{stray.name}"
    assert by_problem["chunk file without a record"]["daemon"] == daemon_id(cluster, 0)
    # The name has left its position behind, and its directory counts one too many: that is damage.
    assert by_problem["wrong count of entries"]["path"] == "/work"
    assert by_problem["record without an owner"]["category"] == "leaked"
    assert len(found) == 5
    before = held_bytes(cluster)
    repaired = findings(mountpoint, "--repair", code=4)
    assert [one["problem"] for one in repaired if not one["removed"]] == ["wrong count of entries"]
    assert all(one["error"] is None for one in repaired)
    assert not stray.exists()
    for number in range(DAEMONS):  # what is dropped is removed in the background: the next start waits for nobody
        cluster.daemons[number].stop()
        cluster.restart_daemon(number)
    assert [one["problem"] for one in findings(mountpoint, code=4)] == ["wrong count of entries"]
    assert chunk_files(cluster, ino) == []
    assert held_bytes(cluster) <= before - 40 * CHUNK_SIZE_MIN


@pytest.mark.slow
def test_what_was_repaired_is_clean(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    workload(mount)
    strays = [
        cluster.data_dir(number) / "chunks" / f"{index:02x}" / f"{0x7700 + index:016x}.{index:08x}.{9:016x}"
        for number, index in ((0, 3), (1, 0xE), (0, 7))
    ]
    for stray in strays:
        stray.write_bytes(b"x")
    assert len(findings(mount, code=3)) == 3
    said = check(mount)
    assert said.code == 3
    assert said.text.splitlines()[-1] == "3 orphaned; --repair removes what is orphaned or leaked"
    said = check(mount, "--repair")
    assert said.code == 0
    assert said.text.splitlines()[-1] == "3 orphaned; 3 removed, 3 bytes"
    assert not any(stray.exists() for stray in strays)
    assert findings(mount, code=0) == []
    # What is no chunk's file is somebody else's.
    notes = cluster.data_dir(0) / "chunks" / "00" / "notes.txt"
    notes.write_bytes(b"x")
    (one,) = findings(mount, "--repair", code=3)
    assert (one["file"], one["ino"], one["removed"]) == ("00/notes.txt", None, False)
    assert notes.exists()


def test_checks_of_a_cluster_in_use_are_quiet_and_repair_takes_nothing(cluster: Cluster) -> None:
    """Two mounts make, change, move and remove things meanwhile; some of them are open and removed."""
    mounts = [cluster.mount().mountpoint for _ in range(2)]
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = [0, 0]
    for mount in mounts[:1]:
        for number in range(4):
            (mount / f"d{number}").mkdir()
    kept = {}
    for number in range(20):
        kept[f"kept{number}"] = os.urandom(number * CHUNK_SIZE_MIN // 4 + 1)
        (mounts[0] / f"kept{number}").write_bytes(kept[f"kept{number}"])
    held = (mounts[0] / "held").open("w+b")
    held.write(b"x" * 3 * CHUNK_SIZE_MIN)
    held.flush()
    (mounts[0] / "held").unlink()

    def work(which: int) -> None:
        chance = random.Random(which)
        mount = mounts[which]
        while not stop.is_set():
            here, there = (mount / f"d{chance.randrange(4)}" for _ in range(2))
            name = f"m{which}-{chance.randrange(30)}"
            rounds[which] += 1
            try:
                with suppress(OSError):
                    match chance.randrange(8):
                        case 0 | 1:
                            (here / name).write_bytes(b"x" * chance.randrange(3 * CHUNK_SIZE_MIN))
                        case 2:
                            (here / name).unlink()
                        case 3:
                            (here / name).rename(there / name)
                        case 4:
                            os.link(here / name, there / f"l{name}")
                        case 5:
                            os.truncate(here / name, chance.randrange(CHUNK_SIZE_MIN))
                        case 6:
                            (here / f"s{name}").mkdir()
                            (here / f"s{name}").rename(there / f"s{name}")
                            (there / f"s{name}").rmdir()
                        case 7:
                            with (here / name).open("ab") as file:
                                file.write(b"y" * 1000)
                                (here / name).unlink()
                                file.write(b"z" * CHUNK_SIZE_MIN)
            except BaseException as error:
                errors.append(error)
                raise

    workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for worker in workers:
        worker.start()
    try:
        for words in ((), ("--repair",)):
            said = check(mounts[0], "--json", *words)
            assert json.loads(said.text)["findings"] == []
            assert said.code in (0, 5)  # 5: something changed all the time
            assert all(rounds)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert errors == []
    for name, content in kept.items():
        assert (mounts[1] / name).read_bytes() == content
    held.seek(0)
    assert held.read() == b"x" * 3 * CHUNK_SIZE_MIN
    held.close()
    assert findings(mounts[1], code=0) == []


def test_damage_is_found_while_the_cluster_is_in_use(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    (mount / "file").write_bytes(b"x" * 8 * CHUNK_SIZE_MIN)
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            (mount / f"new{number}").write_bytes(b"y" * CHUNK_SIZE_MIN)
            if number >= 5:
                (mount / f"new{number - 5}").unlink()
            number += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        index, daemon, path = chunk_files(cluster, (mount / "file").stat().st_ino)[3]
        path.unlink()
        (one,) = findings(mount, code=4)
        assert (one["path"], one["chunk"], one["daemon"]) == ("/file", index, daemon)
    finally:
        stop.set()
        worker.join()


def test_who_is_missing_is_said(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    cluster.daemons[1].kill()
    for place in (mount, cluster.registry):
        said = check(place)
        assert (said.code, said.text) == (1, "")
        assert said.error.count("\n") == 1
        assert f"missing: daemon {daemon_id(cluster, 1)} (" in said.error
    cluster.restart_daemon(1)
    assert findings(mount, code=0) == []


def test_bad_input_gets_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    mount = cluster.mount()
    (tmp_path / "file").write_text("")
    for words, code, sentence in (
        ([], 2, "required: MOUNTPOINT|REGISTRY"),
        ([""], 2, "it is empty"),
        ([str(tmp_path)], 1, "neither a benchfs mount nor the registry"),
        ([str(tmp_path / "nothing")], 1, "neither a benchfs mount nor the registry"),
        ([str(tmp_path / "file")], 1, "neither a benchfs mount nor the registry"),
        (["/proc"], 1, "is a mount of type proc, not benchfs"),
        ([str(mount.mountpoint), "--repare"], 2, "unrecognized arguments: --repare"),
        ([str(mount.mountpoint), "more"], 2, "unrecognized arguments: more"),
    ):
        said = check(*words)
        assert (said.code, said.text) == (code, ""), words
        assert sentence in said.error
        assert said.error.count("\n") == 1
    mount.kill()
    said = check(mount.mountpoint)
    assert said.code == 1
    assert "its process has died" in said.error
    assert findings(cluster.registry, code=0) == []
