"""What /proc says of callers: groups and CAP_FSETID, of threads that live, have gone, or are of other users."""

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchfs_fuse.callers import read_caller
from benchfs_fuse.privileges import Caller

ALICE, BOB, TEAM = 1001, 1002, 3001


@contextmanager
def process(command: Sequence[str] = (), groups: Sequence[int] = (), user: int | None = None) -> Iterator[int]:
    """Have a process that waits, once it runs the program."""
    child = subprocess.Popen(
        [*command, "sh", "-c", "echo; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user,
        group=user,
        extra_groups=groups,
    )
    assert child.stdout is not None
    child.stdout.readline()
    try:
        yield child.pid
    finally:
        child.communicate(b"\n")


def test_root() -> None:
    with process(groups=[TEAM]) as pid:
        assert read_caller(pid, 0, 0) == Caller(True, frozenset([0, TEAM]))


def test_root_without_the_capability() -> None:
    with process(["setpriv", "--bounding-set", "-fsetid", "--inh-caps", "-fsetid"]) as pid:
        assert read_caller(pid, 0, 0) == Caller(False, frozenset([0]))


def test_a_user_with_his_groups() -> None:
    with process(groups=[BOB, TEAM], user=ALICE) as pid:
        assert read_caller(pid, ALICE, ALICE) == Caller(False, frozenset([ALICE, BOB, TEAM]))


def test_capabilities_in_another_user_namespace_are_worth_nothing() -> None:
    with process(["unshare", "--user", "--map-root-user"]) as pid:
        assert "CapEff:\t0000000000000000" not in Path(f"/proc/{pid}/status").read_text()
        assert read_caller(pid, 0, 0) == Caller(False, frozenset([0]))


def test_who_is_not_seen_is_judged_by_his_ids() -> None:
    with process() as gone:
        pass
    for pid in (0, gone):
        assert read_caller(pid, 0, 0) == Caller(True, frozenset([0]))
        assert read_caller(pid, ALICE, TEAM) == Caller(False, frozenset([TEAM]))


def test_a_thread_is_known_by_its_own_number() -> None:
    found: list[Caller] = []
    thread = threading.Thread(target=lambda: found.append(read_caller(threading.get_native_id(), ALICE, ALICE)))
    thread.start()
    thread.join()
    assert found == [read_caller(os.getpid(), ALICE, ALICE)]
    assert found[0].fsetid
