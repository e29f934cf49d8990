"""Check every KeyValueStore against one suite, and RocksDB's promises for crashes by crashing it."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rocksdict
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from benchfs_fuse.errors import NoSpace, StorageError, UserError
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.kv.rocks import RocksStore, _translate
from benchfs_fuse.ports import KeyValueStore

Open = Callable[[Path], KeyValueStore]

#: Others may append their own.
IMPLEMENTATIONS: list[tuple[str, Open]] = [("memory", lambda _: MemoryStore()), ("rocks", RocksStore)]


@pytest.fixture(params=[make for _, make in IMPLEMENTATIONS], ids=[name for name, _ in IMPLEMENTATIONS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyValueStore]:
    store: KeyValueStore = request.param(tmp_path / "kv")
    yield store
    store.close()


def test_get_of_what_was_written(store: KeyValueStore) -> None:
    assert store.get(b"a") is None
    store.write([(b"a", b"1"), (b"b", b"")])
    assert store.get(b"a") == b"1"
    assert store.get(b"b") == b""
    store.write([(b"a", b"2")], [b"b", b"never there"])
    assert store.get(b"a") == b"2"
    assert store.get(b"b") is None


def test_keys_and_values_hold_any_bytes(store: KeyValueStore) -> None:
    keys = [b"\0", b"\0\0", b"\xff", b"\xff\xff", bytes(range(256)), b"k" * 1000]
    store.write([(key, key[::-1] * 100) for key in keys])
    assert [store.get(key) for key in keys] == [key[::-1] * 100 for key in keys]
    assert [key for key, _ in store.scan(b"\0", b"\xff\xff\xff")] == sorted(keys)


def test_a_delete_in_the_same_transaction_wins(store: KeyValueStore) -> None:
    store.write([(b"a", b"1")], [b"a"])
    assert store.get(b"a") is None


def test_scan_is_ordered_and_half_open(store: KeyValueStore) -> None:
    store.write([(b"b", b"2"), (b"d", b"4"), (b"a", b"1"), (b"c", b"3")])
    assert list(store.scan(b"b", b"d")) == [(b"b", b"2"), (b"c", b"3")]
    assert list(store.scan(b"", b"\xff")) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3"), (b"d", b"4")]
    assert list(store.scan(b"b", b"b")) == []
    assert list(store.scan(b"c", b"a")) == []
    assert list(store.scan(b"x", b"y")) == []


def test_scan_sees_the_state_as_of_the_call(store: KeyValueStore) -> None:
    store.write([(b"a", b"1"), (b"b", b"2"), (b"c", b"3")])
    rows = store.scan(b"a", b"z")
    store.write([(b"a", b"new"), (b"d", b"4")], [b"b"])
    assert next(rows) == (b"a", b"1")
    store.write([(b"c", b"new")])
    assert list(rows) == [(b"b", b"2"), (b"c", b"3")]
    assert list(store.scan(b"a", b"z")) == [(b"a", b"new"), (b"c", b"new"), (b"d", b"4")]


def test_many_scans_at_once_keep_their_own_bounds(store: KeyValueStore) -> None:
    store.write([(b"%03d" % number, b"") for number in range(200)])
    scans = [store.scan(b"%03d" % number, b"%03d" % (number + 7)) for number in range(190)]
    gc.collect()
    for number, rows in enumerate(scans):
        assert [key for key, _ in rows] == [b"%03d" % key for key in range(number, number + 7)]


async def test_sync_of_many_callers_at_once(store: KeyValueStore) -> None:
    store.write([(b"a", b"1")])
    ended = 0

    async def one() -> None:
        nonlocal ended
        await store.sync()
        ended += 1

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert ended == 20


KEYS = st.binary(max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.tuples(KEYS, st.binary(max_size=5))), st.lists(KEYS)),
        st.tuples(st.just("scan"), KEYS, KEYS),
    )
)


@pytest.mark.parametrize("make", [make for _, make in IMPLEMENTATIONS], ids=[name for name, _ in IMPLEMENTATIONS])
@settings(max_examples=30, deadline=None)
@given(operations=OPERATIONS)
def test_behaves_like_a_dictionary(make: Open, operations: list[tuple[str, object, object]]) -> None:
    model: dict[bytes, bytes] = {}
    with tempfile.TemporaryDirectory() as directory:
        store = make(Path(directory))
        for name, first, second in operations:
            if name == "write":
                assert isinstance(first, list)
                assert isinstance(second, list)
                store.write(first, second)
                model.update(first)
                for key in second:
                    model.pop(key, None)
            else:
                assert isinstance(first, bytes)
                assert isinstance(second, bytes)
                assert list(store.scan(first, second)) == sorted(
                    (key, value) for key, value in model.items() if first <= key < second
                )
        assert {key: store.get(key) for key in model} == model
        store.close()


# The twin's hooks.


def test_memory_hooks_play_a_crash_before_and_after_the_write() -> None:
    def die(number: int) -> None:
        if number == 2:
            raise InterruptedError

    for hook, present in (("before_write", None), ("after_write", b"2")):
        store = MemoryStore()
        setattr(store, hook, die)
        store.write([(b"a", b"1")])
        with pytest.raises(InterruptedError):
            store.write([(b"b", b"2")])
        successor = MemoryStore(store.contents())
        assert successor.get(b"a") == b"1"
        assert successor.get(b"b") == present


# RocksDB's promises.


def test_rocks_keeps_everything_over_a_reopening(tmp_path: Path) -> None:
    store = RocksStore(tmp_path)
    store.write([(b"%05d" % number, b"x" * number) for number in range(1000)])
    store.close()
    store = RocksStore(tmp_path)
    assert [(key, len(value)) for key, value in store.scan(b"", b"a")] == [
        (b"%05d" % number, number) for number in range(1000)
    ]
    store.close()


def test_rocks_refuses_a_directory_in_use(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "kv")
    script = (
        "import sys; from pathlib import Path\n"
        "from benchfs_fuse.kv.rocks import RocksStore\n"
        "from benchfs_fuse.errors import UserError\n"
        "try: RocksStore(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "kv")], capture_output=True, text=True, check=True, timeout=60
    )
    assert "in use by another process" in result.stdout
    with pytest.raises(UserError, match="in use"):
        RocksStore(tmp_path / "kv")
    store.close()
    RocksStore(tmp_path / "kv").close()


def test_rocks_says_why_it_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="Cannot open"):
        RocksStore(tmp_path / "file")


def test_rocks_translates_a_full_disk() -> None:
    text = "IO error: No space left on device: While appending to file: /d/kv/000004.log: No space left on device"
    assert isinstance(_translate(RuntimeError(text), "here"), NoSpace)
    assert type(_translate(RuntimeError("Corruption: checksum mismatch"), "here")) is StorageError


@pytest.mark.parametrize("write_meanwhile", [False, True])
async def test_rocks_sync_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_meanwhile: bool) -> None:
    """Callers share the sync that is running if it covers their writes, else the next one."""
    store = RocksStore(tmp_path)
    begun = 0
    first_running = trio.Event()
    go_on = trio.Event()
    token = trio.lowlevel.current_trio_token()

    class Counting:
        """Count the syncs; hold the first one up."""

        def write(self, batch: rocksdict.WriteBatch) -> None:
            db.write(batch)

        def flush_wal(self, sync: bool) -> None:
            nonlocal begun
            assert sync
            begun += 1
            if begun == 1:
                trio.from_thread.run_sync(first_running.set, trio_token=token)
                trio.from_thread.run(go_on.wait, trio_token=token)

    db = store._db
    monkeypatch.setattr(store, "_db", Counting())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.sync)
        await first_running.wait()
        if write_meanwhile:
            store.write([(b"b", b"")])
        for _ in range(10):
            nursery.start_soon(store.sync)
        await trio.testing.wait_all_tasks_blocked()
        assert begun == 1
        go_on.set()
    assert begun == (2 if write_meanwhile else 1)
    await store.sync()
    assert begun == (2 if write_meanwhile else 1)
    monkeypatch.setattr(store, "_db", db)
    store.close()


async def test_rocks_sync_that_fails_fails_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RocksStore(tmp_path)

    class Broken:
        """Fail every sync as a broken disk does."""

        def flush_wal(self, sync: bool) -> None:
            raise RuntimeError("IO error: While fsync: Input/output error")

    db = store._db
    monkeypatch.setattr(store, "_db", Broken())
    failed = 0

    async def one() -> None:
        nonlocal failed
        with pytest.raises(StorageError):
            await store.sync()
        failed += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert failed == 5
    monkeypatch.setattr(store, "_db", db)
    store.close()


WRITER = """
import sys
from pathlib import Path
from benchfs_fuse.kv.rocks import RocksStore
store = RocksStore(Path(sys.argv[1]))
for number in range(1_000_000):
    store.write([(b"%d/%08d" % (part, number), bytes(100)) for part in range(4)], [b"3/%08d" % (number - 1)])
    sys.stdout.buffer.write(b"%08d\\n" % number)
    sys.stdout.buffer.flush()
"""


def write_and_kill(directory: Path, acknowledged_min: int) -> int:
    """Run a writer, kill it after so many acknowledgements; return how many it gave before it died."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(acknowledged_min):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        return acknowledged_min + len(process.stdout.read().splitlines())


def check_prefix(directory: Path) -> int:
    """Check that the store holds the first n transactions whole, nothing else; return n."""
    store = RocksStore(directory)
    numbers = [[int(key[2:]) for key, _ in store.scan(b"%d/" % part, b"%d0" % part)] for part in range(4)]
    store.close()
    count = len(numbers[0])
    assert numbers[0] == numbers[1] == numbers[2] == list(range(count))
    assert numbers[3] == list(range(count))[-1:]
    return count


@pytest.mark.parametrize("acknowledged_min", [1, 100, 3000])
def test_rocks_keeps_what_was_acknowledged_when_killed(tmp_path: Path, acknowledged_min: int) -> None:
    acknowledged = write_and_kill(tmp_path, acknowledged_min)
    # One more may have been applied without its acknowledgement.
    assert check_prefix(tmp_path) in (acknowledged, acknowledged + 1)


def test_rocks_keeps_a_prefix_of_a_torn_log(tmp_path: Path) -> None:
    """Cut and damage the log at many places: what a power cut leaves of bytes that nobody synced."""
    acknowledged = write_and_kill(tmp_path / "kv", 300)
    (log,) = (tmp_path / "kv").glob("*.log")
    whole = log.read_bytes().rstrip(b"\0")
    counts = []
    for numerator in range(1, 16):
        position = len(whole) * numerator // 16
        for name, torn in (
            ("cut", whole[:position]),
            ("zeros", whole[:position] + bytes(4096)),
            ("hole", whole[:position] + bytes(512) + whole[position + 512 :]),
        ):
            copy = tmp_path / f"{name}{numerator}"
            shutil.copytree(tmp_path / "kv", copy)
            (copy / log.name).write_bytes(torn)
            counts.append(check_prefix(copy))
            assert counts[-1] <= acknowledged * (numerator + 1) // 16
            shutil.rmtree(copy)
    assert counts == sorted(counts)
    assert counts[-1] > acknowledged // 2


def test_rocks_idles_without_waking_up(tmp_path: Path) -> None:
    """Read RocksDB's own record of its options: no thread is set up to wake for statistics."""
    store = RocksStore(tmp_path)
    store.close()
    (options,) = tmp_path.glob("OPTIONS-*")
    text = options.read_text()
    for line in ("stats_dump_period_sec=0", "stats_persist_period_sec=0", "wal_recovery_mode=kPointInTimeRecovery"):
        assert line in text
    assert os.path.getsize(tmp_path / "LOG") > 0
    assert rocksdict.Rdict.list_cf(str(tmp_path)) == ["default"]
