"""Default ACLs, umasks and set-group-ID directories, compared with ext4: random trees made on both."""

import errno
import os
import random
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from posix_help import ALICE, BOB, as_user, umask

from benchfs_fuse import acl
from benchfs_fuse.acl import AclEntry

pytest_plugins = ("mounts",)

TEAM = 3001
#: Who acts: uid and further groups.
USERS = ((0, ()), (ALICE, (TEAM,)), (BOB, ()))
STEPS_PER_RUN = 80


class Step(NamedTuple):
    """Say what one user does to one path (below the top) under a umask."""

    what: str
    user: tuple[int, Sequence[int]]
    umask: int
    path: str
    mode: int
    value: bytes


def random_acl(rng: random.Random) -> bytes:
    def bits() -> int:
        return rng.choice((0, 4, 5, 6, 7, 7))

    uids = sorted(rng.sample((ALICE, BOB, 4711), rng.choice((0, 0, 1, 2))))
    users = [AclEntry(acl.USER, bits(), uid) for uid in uids]
    groups = [AclEntry(acl.GROUP, bits(), gid) for gid in rng.sample((TEAM, BOB), rng.choice((0, 0, 1)))]
    mask = [AclEntry(acl.MASK, bits())] if users or groups or rng.random() < 0.2 else []
    owner, group, other = (AclEntry(tag, bits()) for tag in (acl.USER_OBJ, acl.GROUP_OBJ, acl.OTHER))
    return acl.encode([owner, *users, group, *groups, *mask, other])


def random_steps(seed: int) -> list[Step]:
    """Invent a plan: names are drawn from few, so that most steps meet what earlier ones made."""
    rng = random.Random(seed)
    paths = ["."]
    steps: list[Step] = []
    for number in range(STEPS_PER_RUN):
        what = rng.choice(
            ["mkdir"] * 4 + ["create"] * 3 + ["default"] * 4 + ["mknod", "symlink", "access", "chmod", "chown", "none"]
        )
        path = rng.choice(paths)
        if what in ("mkdir", "create", "mknod", "symlink"):
            path = f"{path}/{number}"
            if what == "mkdir":
                paths.append(path)
        elif what != "default" and steps:
            path = rng.choice(steps).path
        mode = rng.choice((0o777, 0o666, 0o755, 0o640, 0o700, 0o2775, 0o2767, 0o1777, rng.randrange(0o10000)))
        mask = rng.choice((0, 0o22, 0o77, 0o27, rng.randrange(0o1000)))
        value = rng.choice((b"", b"x")) if rng.random() < 0.05 else random_acl(rng)
        steps.append(Step(what, rng.choice((*USERS, USERS[0])), mask, path, mode, value))
    return steps


def act(step: Step, path: Path) -> None:
    match step.what:
        case "mkdir":
            path.mkdir(step.mode)
        case "create":
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, step.mode))
        case "mknod":
            os.mknod(path, stat.S_IFIFO | step.mode)
        case "symlink":
            path.symlink_to("anywhere")
        case "default":
            os.setxattr(path, acl.DEFAULT, step.value, follow_symlinks=False)
        case "access":
            os.setxattr(path, acl.ACCESS, step.value, follow_symlinks=False)
        case "none":
            os.removexattr(path, acl.DEFAULT, follow_symlinks=False)
        case "chmod":
            path.chmod(step.mode)
        case "chown":
            os.chown(path, -1, TEAM, follow_symlinks=False)


def outcome(step: Step, top: Path) -> str:
    """Do a step; return the errno's name, or "" if it succeeds."""
    uid, groups = step.user
    with as_user(uid, groups=tuple(groups)), umask(step.umask):
        try:
            act(step, top / step.path)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return ""


def look(path: Path) -> object:
    """Return mode, owners and ACLs."""
    if not os.path.lexists(path):
        return None
    attrs = path.lstat()
    acls = {
        name: [*acl.decode(os.getxattr(path, name, follow_symlinks=False))]
        for name in os.listxattr(path, follow_symlinks=False)
    }
    return f"{attrs.st_mode:o}", attrs.st_uid, attrs.st_gid, acls


def looks(top: Path) -> dict[str, object]:
    """Look at a directory and everything below."""
    return {str(path.relative_to(top)): look(path) for path in (top, *top.rglob("*"))}


def compare(ours: Path, theirs: Path, seed: int) -> int:
    """Do the same on both; return how many directories have a default ACL in the end."""
    tops = [place / f"run {seed}" for place in (ours, theirs)]
    for top in tops:
        top.mkdir()
        top.chmod(0o777)
    for number, step in enumerate(random_steps(seed)):
        here, there = (outcome(step, top) for top in tops)
        assert here == there, f"seed {seed}, step {number}: {step}"
        here_seen, there_seen = (look(top / step.path) for top in tops)
        assert here_seen == there_seen, f"seed {seed}, step {number}: {step}"
    found, expected = map(looks, tops)
    assert found == expected, f"seed {seed}"
    return sum(acl.DEFAULT.decode() in str(seen) for seen in found.values())


def run(mountpoint: Path, ext4: Path, seeds: range) -> None:
    assert sum(compare(mountpoint, ext4, seed) for seed in seeds) > len(seeds)


@pytest.mark.parametrize("start", range(0, 12, 4))
def test_what_is_made_inherits_as_on_ext4(mountpoint: Path, ext4: Path, start: int) -> None:
    run(mountpoint, ext4, range(start, start + 4))


def test_a_default_acl_is_handed_down(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    subprocess.run(["setfacl", "-d", "-m", f"u:{ALICE}:rwx", directory], check=True)
    (directory / "file").touch()
    (directory / "below").mkdir()
    (directory / "below" / "file").touch()

    def lines(path: Path) -> list[str]:
        return subprocess.run(["getfacl", "-cpE", path], check=True, capture_output=True, text=True).stdout.splitlines()

    assert {f"user:{ALICE}:rwx", "mask::rw-"} <= set(lines(directory / "file"))
    assert f"default:user:{ALICE}:rwx" in lines(directory / "below")
    assert {f"user:{ALICE}:rwx", "mask::rw-"} <= set(lines(directory / "below" / "file"))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 1500, 50))
def test_what_is_made_inherits_as_on_ext4_for_long(mountpoint: Path, ext4: Path, start: int) -> None:
    run(mountpoint, ext4, range(start, start + 50))
