"""The registry and data directories: formed whole, taken once, refused in a sentence."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from hung import Hung
from trio.testing import wait_all_tasks_blocked

from benchfs_fuse import datadir, kernel_mounts, registry
from benchfs_fuse.datadir import DataDir
from benchfs_fuse.errors import DaemonUnreachable, UserError
from benchfs_fuse.kernel_mounts import KernelMount
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.processes import ProcessId, identify
from benchfs_fuse.registry import Claim, DaemonEntry, Registry, boot_id, init_registry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    init_registry(tmp_path / "registry", 3, 1 << 20)
    return tmp_path / "registry"


@pytest.fixture
def opened(path: Path) -> Iterator[Registry]:
    with Registry(path) as opened:
        yield opened


def entry_of(daemon_id: int, process: ProcessId | None = None, boot: str | None = None, port: int = 1) -> DaemonEntry:
    process = process or identify(os.getpid())
    assert process is not None
    return DaemonEntry(daemon_id, f"127.0.0.1:{port}", "here", boot or boot_id(), process, 1.5, 1, "/data", "1.0")


def dead_process() -> ProcessId:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identify(child.pid)
    child.communicate(b"\n")
    assert process is not None
    return process


def refused(words: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=words)


# ── forming ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_registry_holds_what_a_cluster_is(path: Path, opened: Registry) -> None:
    assert opened.cluster.daemons == 3 and opened.cluster.chunk_size == 1 << 20
    assert opened.cluster.shard_map == ShardMap.round_robin(3)
    assert len(opened.secret) == 32
    for file in (path, path / "secret", path / "cluster.json", path / "daemons", path / "claims"):
        assert not file.stat().st_mode & 0o077, file
    assert stat.S_IMODE((path / "secret").stat().st_mode) == 0o600
    assert opened.find(0) is None and opened.claims() == {}


def test_clusters_differ(tmp_path: Path) -> None:
    one, two = (init_registry(tmp_path / name, 1) for name in "ab")
    assert one.cluster_id != two.cluster_id
    assert (tmp_path / "a" / "secret").read_text() != (tmp_path / "b" / "secret").read_text()


def test_what_exists_is_not_formed_again(tmp_path: Path, path: Path) -> None:
    before = (path / "secret").read_text()
    for name in ("registry", "file", "dangling"):
        if name == "file":
            (tmp_path / name).write_text("mine")
        elif name == "dangling":
            (tmp_path / name).symlink_to("nowhere")
        with refused("exists already"):
            init_registry(tmp_path / name, 1)
    assert (path / "secret").read_text() == before
    (tmp_path / "empty").mkdir()
    init_registry(tmp_path / "empty", 1)


@pytest.mark.parametrize("count", [0, -1, 257])
def test_a_cluster_has_a_sensible_number_of_daemons(tmp_path: Path, count: int) -> None:
    with refused(f"1 to 256 daemons, not {count}"):
        init_registry(tmp_path / "registry", count)
    assert list(tmp_path.iterdir()) == []


def test_forming_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("cannot make the registry .*: No such file"):
        init_registry(tmp_path / "no" / "registry", 1)
    written = []
    write_file = registry.write_file

    def fail_at_the_second(file: Path, content: bytes) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_file(file, content)

    monkeypatch.setattr(registry, "write_file", fail_at_the_second)
    with refused("cannot make the registry .*: No space left"):
        init_registry(tmp_path / "registry", 1)
    assert list(tmp_path.iterdir()) == []


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_registry_that_is_not_there_or_not_whole_is_refused(tmp_path: Path, path: Path) -> None:
    with refused("there is no registry at .*/nothing .*benchfs init"):
        Registry(tmp_path / "nothing")
    for file, content, words in (
        ("secret", "abcd", "damaged"),
        ("secret", "not hexadecimal", "damaged"),
        ("cluster.json", "{", "damaged"),
        ("cluster.json", '{"format": 99, "whatever": 1}', "format 99, this program knows 1: use the newer program"),
        ("cluster.json", '{"format": 1}', "damaged"),
    ):
        before = (path / file).read_text()
        (path / file).write_text(content)
        with refused(words):
            Registry(path)
        (path / file).write_text(before)
    Registry(path)


def test_a_secret_that_others_can_read_is_refused(path: Path) -> None:
    (path / "secret").chmod(0o640)
    with refused("secret is open to other users: chmod 600"):
        Registry(path)


def test_nothing_of_a_cluster_may_lie_in_a_mount_of_benchfs(
    tmp_path: Path, path: Path, opened: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = KernelMount(tmp_path, "fuse.benchfs", "x", 1)
    monkeypatch.setattr(kernel_mounts, "mounts", lambda: [mount])
    with refused("lies in a benchfs mount"):
        Registry(path)
    with refused("lies in a benchfs mount"):
        init_registry(tmp_path / "other", 1)
    with refused("lies in a benchfs mount"):
        DataDir(tmp_path / "data", opened)
    assert not (tmp_path / "data").exists()


# ── entries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_entries_come_and_go(opened: Registry) -> None:
    one = entry_of(1)
    opened.publish(one)
    assert opened.find(1) == one and opened.find(0) is None
    later = msgspec.structs.replace(one, incarnation=2)
    opened.publish(later)
    opened.withdraw(one)  # it was replaced: not ours to remove
    assert opened.find(1) == later
    opened.withdraw(later)
    assert opened.find(1) is None
    assert os.listdir(opened.path / "daemons") == []


def test_entries_of_ended_processes_are_recognised(opened: Registry) -> None:
    assert not entry_of(0).has_ended() and registry.answers(entry_of(0))
    dead = entry_of(0, dead_process())
    assert dead.has_ended() and not registry.answers(dead)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        elsewhere = entry_of(0, dead_process(), boot="another host", port=port)
        assert not elsewhere.has_ended() and registry.answers(elsewhere)
        before_the_reboot = msgspec.structs.replace(elsewhere, host=socket.gethostname())
        assert not registry.answers(before_the_reboot)  # whoever it is that listens there now
    assert not registry.answers(elsewhere)
    opened.publish(entry_of(0))
    opened.publish(entry_of(1, dead.process))
    assert opened.missing() == {1: f"its process {dead.process.pid} has ended", 2: "never started"}


async def test_a_change_ends_the_wait(opened: Registry) -> None:
    seen: list[int] = []

    async def wait(daemon_id: int) -> None:
        await opened.wait_changed(daemon_id, None)
        seen.append(daemon_id)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(wait, 0)
                nursery.start_soon(wait, 1)
                nursery.start_soon(wait, 1)
                await wait_all_tasks_blocked()
            assert not scope.cancelled_caught and not opened._polled  # the tests' directory is a local one
            opened.publish(entry_of(1))
            while len(seen) < 2:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            assert seen == [1, 1]
            opened.publish(entry_of(0))
    await opened.wait_changed(0, None)


async def test_a_change_behind_a_look_is_seen_though_another_has_taken_its_event(
    opened: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, go_on = trio.Event(), trio.Event()
    look = opened.look

    async def slowly(daemon_id: int) -> object:
        found = await look(daemon_id)
        if daemon_id == 1 and not looked.is_set():
            looked.set()
            await go_on.wait()
        return found

    monkeypatch.setattr(opened, "look", slowly)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.wait_changed, 0, None)
            nursery.start_soon(opened.wait_changed, 1, None)
            await looked.wait()
            while not opened._leading:
                await trio.lowlevel.checkpoint()
            events = opened._events
            opened.publish(entry_of(1))
            while opened._events == events:
                await trio.lowlevel.checkpoint()
            go_on.set()
            await opened.wait_changed(1, None)
            nursery.cancel_scope.deadline = trio.current_time() + 3
            while len(nursery.child_tasks) > 1:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.deadline = float("inf")
            opened.publish(entry_of(0))
    assert not nursery.cancel_scope.cancelled_caught


async def test_who_watches_for_all_may_be_cancelled(opened: Registry) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def watch() -> None:
                with first:
                    await opened.wait_changed(0, None)

            nursery.start_soon(watch)
            await wait_all_tasks_blocked()
            nursery.start_soon(opened.wait_changed, 1, None)
            await wait_all_tasks_blocked()
            first.cancel()
            await wait_all_tasks_blocked()
            opened.publish(entry_of(1))


async def test_where_events_are_not_to_be_had_the_directory_is_read_again(
    opened: Registry, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(registry, "LOCAL_TYPES", frozenset())
    monkeypatch.setattr(registry, "_IN_EVENTS", 0x400)  # IN_DELETE_SELF: nothing that happens here
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened.wait_changed, 0, None)
        await trio.sleep(10)
        opened.publish(entry_of(0))
    assert 10 <= trio.current_time() <= 10 + registry.POLL_S


async def test_waiting_for_the_complete_set_says_what_is_missing(opened: Registry) -> None:
    said: list[str] = []
    opened.claim(Claim("token", "node7", "/scratch/d0"), 0)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.wait_complete, 1000, said.append)
            for daemon_id in range(3):
                while len(said) < daemon_id + 1:
                    await trio.lowlevel.checkpoint()
                opened.publish(entry_of(daemon_id))
    assert said == [
        "waiting for 3 of 3 daemons: 0 (last seen with /scratch/d0 on node7), 1 (never started), 2 (never started)",
        "waiting for 2 of 3 daemons: 1 (never started), 2 (never started)",
        "waiting for 1 of 3 daemons: 2 (never started)",
    ]


async def test_waiting_for_the_complete_set_ends_with_a_sentence(opened: Registry) -> None:
    opened.publish(entry_of(0))
    opened.publish(entry_of(2, dead_process()))
    with refused(r"gave up after 0 s without 2 of 3 daemons: 1 \(never started\), 2 \(its process \d+ has ended\)"):
        await opened.wait_complete(0.4, lambda sentence: None)  # time to look, also beside others


# ── a registry that hangs ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_registry_that_hangs_stops_nobody_but_who_asks_it(opened: Registry) -> None:
    opened.publish(entry_of(1))
    assert await opened.look(1) == entry_of(1)
    with trio.fail_after(10), Hung(opened.path / "daemons" / "0.json") as hung:
        seen: list[DaemonEntry | None] = []

        async def look(daemon_id: int) -> None:
            seen.append(await opened.look(daemon_id))

        threads = threading.active_count()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                with trio.move_on_after(0):
                    await opened.look(0)  # given up at once, again and again
                nursery.start_soon(look, 0)
                nursery.start_soon(look, 1)
                await wait_all_tasks_blocked()
            assert seen == [] and threading.active_count() <= threads + 1
            hung.recover()
    assert seen.count(None) == seen.count(entry_of(1)) == 20


async def test_what_cannot_be_read_is_a_daemon_that_cannot_be_reached(opened: Registry) -> None:
    (opened.path / "daemons" / "0.json").write_text("garbage")
    with pytest.raises(DaemonUnreachable, match=r"0\.json is damaged"):
        await opened.look(0)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.wait_changed, 0, None)
            await wait_all_tasks_blocked()
            opened.publish(entry_of(0))


async def test_a_start_gives_up_on_a_registry_that_hangs(opened: Registry) -> None:
    with Hung(opened.path / "daemons" / "0.json"), refused("gave up after 0 s: the registry .* does not answer"):
        await opened.wait_complete(0.01, lambda sentence: None)


# ── numbers and data directories ─────────────────────────────────────────────────────────────────────────────────────


def test_a_data_directory_keeps_its_number(tmp_path: Path, opened: Registry) -> None:
    for wanted, expected in ((None, 0), (2, 2), (None, 1)):
        with DataDir(tmp_path / f"data{expected}", opened, wanted) as data:
            assert data.daemon_id == expected
    for daemon_id in (2, 1, 0):
        with DataDir(tmp_path / f"data{daemon_id}", opened) as data:
            assert data.daemon_id == daemon_id
    assert (tmp_path / "data0").stat().st_mode & 0o777 == 0o700
    with refused(f"all 3 daemons .*0: {tmp_path}/data0 on {socket.gethostname()}.* not {tmp_path}/new"):
        DataDir(tmp_path / "new", opened)
    assert sorted(os.listdir(tmp_path / "new")) == ["lock"]
    assert sorted(os.listdir(opened.path / "claims")) == ["0", "1", "2"]


def test_numbers_are_taken_once_by_any_number_of_directories_at_once(path: Path) -> None:
    got: list[int] = []

    def take(number: int) -> None:
        with Registry(path) as mine:
            got.append(mine.claim(Claim(f"token{number}", "host", f"/d{number}"), None))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 1, 2]


def test_the_wrong_number_is_refused(tmp_path: Path, opened: Registry) -> None:
    DataDir(tmp_path / "one", opened, 1).__exit__()
    with refused("one is daemon 1's data directory, not daemon 2's"):
        DataDir(tmp_path / "one", opened, 2)
    with refused("daemon 1 has its data in .*/one on .*; .*/two is new"):
        DataDir(tmp_path / "two", opened, 1)
    with refused("has daemons 0 to 2, not 3"):
        DataDir(tmp_path / "three", opened, 3)
    with DataDir(tmp_path / "two", opened) as data:
        assert data.daemon_id == 0


def test_a_data_directory_serves_one_daemon_at_a_time(tmp_path: Path, opened: Registry) -> None:
    with DataDir(tmp_path / "data", opened), refused(f"in use by another daemon, pid {os.getpid()}"):
        DataDir(tmp_path / "data", opened)
    DataDir(tmp_path / "data", opened).__exit__()


def test_a_crash_while_a_number_is_taken_loses_nothing(
    tmp_path: Path, opened: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_file = registry.write_file

    def crash_at_the_second(file: Path, content: bytes) -> None:
        written.append(file)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_file(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(datadir, "write_file", crash_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            DataDir(tmp_path / "data", opened)
    with DataDir(tmp_path / "other", opened) as other, DataDir(tmp_path / "data", opened) as data:
        assert (data.daemon_id, other.daemon_id) == (0, 1)


def test_a_data_directory_of_another_cluster_or_format_is_refused(tmp_path: Path, opened: Registry) -> None:
    init_registry(tmp_path / "foreign", 1)
    with Registry(tmp_path / "foreign") as foreign:
        DataDir(tmp_path / "data", foreign).__exit__()
    with refused("belongs to cluster .*, not to"):
        DataDir(tmp_path / "data", opened)
    file = tmp_path / "data" / "identity.json"
    file.write_text(json.dumps({"format": 99, "new_key": 1}))
    with refused("identity.json has format 99, this program knows 1: use the newer program"):
        DataDir(tmp_path / "data", opened)
    file.write_text("garbage")
    with refused("identity.json is damaged"):
        DataDir(tmp_path / "data", opened)
    assert opened.claims() == {}


def test_a_copied_data_directory_is_refused_while_the_original_runs(tmp_path: Path, opened: Registry) -> None:
    DataDir(tmp_path / "data", opened).__exit__()
    subprocess.run(["cp", "-a", tmp_path / "data", tmp_path / "copy"], check=True)
    opened.publish(entry_of(0))
    with refused(f"daemon 0 runs already: pid {os.getpid()} on here"):
        DataDir(tmp_path / "copy", opened)
    opened.publish(entry_of(0, dead_process()))
    DataDir(tmp_path / "copy", opened).__exit__()


def test_what_cannot_be_a_data_directory_is_refused(tmp_path: Path, opened: Registry) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with refused("is not empty .it has thesis.tex. and no data directory of benchfs"):
        DataDir(tmp_path / "full", opened)
    (tmp_path / "file").write_text("")
    with refused("cannot use the data directory .*: (Not a directory|File exists)"):
        DataDir(tmp_path / "file", opened)
    with refused("cannot use the data directory"):
        DataDir(Path("/proc/benchfs"), opened)
    assert opened.claims() == {}
    (tmp_path / "fresh" / "lost+found").mkdir(parents=True)
    DataDir(tmp_path / "fresh", opened).__exit__()
