"""A local cluster of somebody who is not root: `up`, a busy mount, force, `down`, all as uid 65534."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_help import (
    HELD,
    PATIENCE_S,
    Done,
    command_line,
    daemons_of,
    holding,
    processes_below,
    sentence_of,
    take_away,
    tell,
)
from cluster import end_with_parent

from benchfs_fuse import kernel_mounts, mount

NOBODY = 65534
#: Seconds that the promise gives to a forced unmount, and as many for what becomes somebody else before.
FORCE_S = 2.0 + 2.0
#: Mounts of one's own, and a device that everybody may open, as machines have it that run udev. Then wait to be killed.
_HOLD = 'mknod -m 666 "$1/fuse" c 10 229 && mount --bind "$1/fuse" /dev/fuse && echo && exec sleep infinity'
_IDS = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
#: For a Python that lies below a directory that is closed to others.
_CAPS = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
#: Hold a file; at the next step read what no cache has, and hold the error.
READER = """
fd = os.open(sys.argv[1] + '/f', os.O_RDONLY | os.O_DIRECT)
room = mmap.mmap(-1, 1 << 20)
step()
try:
    os.readv(fd, [room])
except OSError:
    held()
"""


class User:
    """Be an ordinary user with a directory of his own, ``place``, in a mount namespace of his own."""

    def __init__(self, place: Path, namespace: int) -> None:
        self.place, self.mnt, self.data = place, place / "mnt", place / "data"
        reaches = subprocess.run(["setpriv", *_IDS, "env", sys.executable, "-c", ""], check=False, capture_output=True)
        environ = [f"HOME={place}", f"XDG_RUNTIME_DIR={place}", "PYTHONDONTWRITEBYTECODE=1"]
        #: The words in front of a command of his.
        self.does = [
            *("nsenter", f"--target={namespace}", "--mount", f"--wdns={Path.cwd()}", "--"),
            *("setpriv", *_IDS, *(_CAPS if reaches.returncode else ())),
            *("env", *environ),
        ]

    def benchfs(self, *words: object) -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            [*self.does, *command_line(*words)], check=False, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def succeeds(self, *words: object) -> Done:
        """Run a command that works."""
        done = self.benchfs(*words)
        assert done.code == 0, done
        return done

    def run(self, *words: object) -> str:
        """Run a program that works; return what it says."""
        command = [*self.does, *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout

    def nothing_is_left(self) -> bool:
        """Tell whether no mount and no process of his is left."""
        return str(self.mnt) not in self.run("cat", "/proc/self/mounts") and processes_below(self.place) == []


@pytest.fixture
def user() -> Iterator[User]:
    place = Path(tempfile.mkdtemp(prefix="benchfs-user-"))
    (place / "mnt").mkdir()
    for path in (place, place / "mnt"):
        os.chown(path, NOBODY, NOBODY)
    place.chmod(0o700)
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", _HOLD, "sh", place],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=end_with_parent,  # noqa: PLW1509  it makes one system call and takes no lock
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"\n", "no namespace can be made"
            yield User(place, holder.pid)
        finally:
            take_away(place)
            holder.kill()  # and with it what is mounted there
    shutil.rmtree(place)


@pytest.mark.slow
def test_a_command_in_a_file_system_of_an_ordinary_user(user: User) -> None:
    work = f"id -u && echo text >{user.mnt}/f && cat {user.mnt}/f && stat -c %u {user.mnt}/f && exit 7"
    done = user.benchfs("up", user.mnt, "--data-dir", user.data, "--", "sh", "-c", work)
    assert (done.code, done.out) == (7, f"{NOBODY}\ntext\n{NOBODY}\n"), done.err
    assert user.nothing_is_left()
    user.succeeds("up", user.mnt, "--data-dir", user.data)
    assert user.run("cat", user.mnt / "f") == "text\n"
    user.succeeds("down", user.mnt)
    assert user.nothing_is_left()


@pytest.mark.slow
def test_an_ordinary_user_unmounts_what_is_busy_and_what_hangs(user: User) -> None:
    user.succeeds("up", user.mnt, "--data-dir", user.data)
    user.run("sh", "-c", f"head -c 1M /dev/zero >{user.mnt}/f")
    with holding("os.chdir(sys.argv[1])", user.mnt, before=user.does) as holder:
        said = sentence_of(user.benchfs("umount", user.mnt))
        assert said.startswith(f"{user.mnt} is busy: it is used by ") and f"(pid {holder.pid}, working dir" in said
    with holding(READER, user.mnt, before=user.does) as reader:
        for daemon in daemons_of(user.data):
            os.kill(daemon.pid, signal.SIGSTOP)
        tell(reader)
        start = time.monotonic()
        user.succeeds("umount", user.mnt, "--force")
        assert time.monotonic() - start < FORCE_S
        assert reader.line() == HELD  # with an error
    for daemon in daemons_of(user.data):
        os.kill(daemon.pid, signal.SIGCONT)
    user.succeeds("down", user.mnt)
    assert user.nothing_is_left()


@pytest.mark.slow
def test_what_a_mount_of_an_ordinary_user_can_set_in_the_kernel(user: User) -> None:
    """Requests under way, through the companion library; not the read-ahead, which the kernel lets root alone raise."""
    user.succeeds("up", user.mnt, "--data-dir", user.data)
    minor = os.minor(int(user.run("stat", "-c", "%d", user.mnt)))
    assert int((kernel_mounts.connection(minor) / "max_background").read_text()) == mount.MAX_BACKGROUND
    assert Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").read_text() == "128\n"
    (complaint,) = json.loads(user.succeeds("status", user.mnt, "--json").out)["not_tuned"]
    assert "read_ahead_kb stays as it is (Permission denied): reads come as 128 KiB" in complaint
    user.succeeds("down", user.mnt)
