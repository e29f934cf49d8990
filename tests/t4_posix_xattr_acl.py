"""Extended attributes and access control lists."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from posix_help import ALICE, BOB, as_user, opened, refused

pytest_plugins = ("mounts",)

# xattr(7): the kernel's own limits.
NAME_MAX = 255
VALUE_MAX = 65536


def file(mountpoint: Path, mode: int = 0o644, content: bytes = b"content") -> Path:
    path = mountpoint / "file"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def setfacl(*arguments: str | Path) -> None:
    subprocess.run(["setfacl", *arguments], check=True, capture_output=True)


def getfacl(path: Path) -> set[str]:
    done = subprocess.run(["getfacl", "-cnE", path], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["user.a", "trusted.a", "security.a"])
@pytest.mark.parametrize("value", [b"", b"value", b"\0\xff" * 100, b"v" * 4000])
def test_a_value_is_kept(mountpoint: Path, name: str, value: bytes) -> None:
    path = file(mountpoint)
    os.setxattr(path, name, value)
    assert os.getxattr(path, name) == value
    assert os.listxattr(path) == [name]
    with opened(path) as fd:
        assert os.getxattr(fd, name) == value
    os.removexattr(path, name)
    assert os.listxattr(path) == []
    with refused(errno.ENODATA):
        os.getxattr(path, name)
    with refused(errno.ENODATA):
        os.removexattr(path, name)


def test_create_and_replace(mountpoint: Path) -> None:
    path = file(mountpoint)
    with refused(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    assert os.getxattr(path, "user.a") == b"1"
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"longer than before")
    assert os.getxattr(path, "user.a") == b"longer than before"


def test_limits_of_names(mountpoint: Path) -> None:
    path = file(mountpoint)
    longest = "user." + "n" * (NAME_MAX - 5)
    os.setxattr(path, longest, b"1")
    assert os.listxattr(path) == [longest]
    with refused(errno.ERANGE):
        os.setxattr(path, longest + "n", b"1")
    for name in ("other.a", "a"):
        with refused(errno.EOPNOTSUPP):
            os.setxattr(path, name, b"1")
    with refused(errno.EINVAL):
        os.setxattr(path, "user.", b"1")


def test_limits_of_values(mountpoint: Path) -> None:
    path = file(mountpoint)
    with refused(errno.E2BIG):
        os.setxattr(path, "user.a", b"v" * (VALUE_MAX + 1))
    for index in range(30):
        os.setxattr(path, f"user.{index}", b"v" * 64)
    assert set(os.listxattr(path)) == {f"user.{index}" for index in range(30)}
    assert all(os.getxattr(path, f"user.{index}") == b"v" * 64 for index in range(30))


def test_directories_have_them_and_links_do_not(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "link").symlink_to("directory")
    os.setxattr(mountpoint / "link", "user.a", b"1")
    assert os.getxattr(mountpoint / "directory", "user.a") == b"1"
    with refused(errno.EPERM):
        os.setxattr(mountpoint / "link", "user.a", b"1", follow_symlinks=False)
    os.setxattr(mountpoint / "link", "trusted.a", b"2", follow_symlinks=False)
    assert os.listxattr(mountpoint / "link", follow_symlinks=False) == ["trusted.a"]
    assert os.listxattr(mountpoint / "directory") == ["user.a"]


def test_they_belong_to_the_file_and_not_to_its_name(mountpoint: Path) -> None:
    path = file(mountpoint)
    os.setxattr(path, "user.a", b"1")
    os.link(path, mountpoint / "link")
    os.rename(path, mountpoint / "renamed")
    assert os.getxattr(mountpoint / "link", "user.a") == b"1"
    os.setxattr(mountpoint / "link", "user.a", b"2")
    assert os.getxattr(mountpoint / "renamed", "user.a") == b"2"
    (mountpoint / "file").touch()
    assert os.listxattr(mountpoint / "file") == []


def test_who_may(mountpoint: Path) -> None:
    path = file(mountpoint, 0o644)
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "trusted.a", b"1")
    with as_user(ALICE):
        assert os.getxattr(path, "user.a") == b"1"
        assert os.listxattr(path) == ["user.a"]
        with refused(errno.EACCES):
            os.setxattr(path, "user.a", b"2")
        with refused(errno.ENODATA):
            os.getxattr(path, "trusted.a")
        with refused(errno.EPERM):
            os.setxattr(path, "trusted.a", b"2")
    path.chmod(0o600)
    with as_user(ALICE), refused(errno.EACCES):
        os.getxattr(path, "user.a")


def test_an_acl_is_kept_and_shown(mountpoint: Path) -> None:
    path = file(mountpoint, 0o640)
    setfacl("-m", f"u:{ALICE}:rw,g:{BOB}:r", path)
    assert getfacl(path) == {
        "user::rw-",
        f"user:{ALICE}:rw-",
        "group::r--",
        f"group:{BOB}:r--",
        "mask::rw-",
        "other::---",
    }
    assert mode(path) == 0o660
    assert "system.posix_acl_access" in os.listxattr(path)
    setfacl("-b", path)
    assert mode(path) == 0o640
    assert os.listxattr(path) == []


def test_an_acl_that_says_no_more_than_the_mode_becomes_the_mode(mountpoint: Path) -> None:
    path = file(mountpoint, 0o644)
    setfacl("-m", "u::rw,g::-,o::r", path)
    assert mode(path) == 0o604
    assert os.listxattr(path) == []


def test_chmod_changes_the_mask(mountpoint: Path) -> None:
    path = file(mountpoint, 0o640)
    setfacl("-m", f"u:{ALICE}:rw", path)
    path.chmod(0o600)
    assert "mask::---" in getfacl(path)
    assert f"user:{ALICE}:rw-" in getfacl(path)
    with as_user(ALICE), refused(errno.EACCES):
        os.open(path, os.O_RDONLY)
    path.chmod(0o640)
    assert "mask::r--" in getfacl(path)
    with as_user(ALICE):
        assert path.read_bytes() == b"content"
        with refused(errno.EACCES):
            os.open(path, os.O_WRONLY)


def test_an_acl_grants_and_denies(mountpoint: Path) -> None:
    path = file(mountpoint, 0o604)
    setfacl("-m", f"u:{ALICE}:-,g:{BOB}:rw", path)
    with as_user(ALICE), refused(errno.EACCES):
        os.open(path, os.O_RDONLY)
    with as_user(BOB):
        path.write_bytes(b"by the group")
        assert os.access(path, os.W_OK)
    with as_user(ALICE, groups=(BOB,)), refused(errno.EACCES):
        os.open(path, os.O_RDONLY)
    with as_user(4711):
        assert path.read_bytes() == b"by the group"


def test_an_acl_of_a_directory_is_not_handed_down(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir(mode=0o700)
    setfacl("-m", f"u:{ALICE}:rwx", directory)
    with as_user(ALICE):
        (directory / "file").touch()
    assert os.listxattr(directory / "file") == []


def test_an_acl_is_for_the_owner_to_change(mountpoint: Path) -> None:
    path = file(mountpoint, 0o666)
    with as_user(ALICE), pytest.raises(subprocess.CalledProcessError):
        setfacl("-m", f"u:{ALICE}:rwx", path)
    os.chown(path, ALICE, ALICE)
    with as_user(ALICE):
        setfacl("-m", f"u:{BOB}:r", path)
    assert f"user:{BOB}:r--" in getfacl(path)


def test_a_malformed_acl_is_refused(mountpoint: Path) -> None:
    path = file(mountpoint, 0o644)
    for value in (b"x", b"\x02\0\0\0\xff\xff", b"\x09\0\0\0"):
        with refused(errno.EOPNOTSUPP if value == b"\x09\0\0\0" else errno.EINVAL):
            os.setxattr(path, "system.posix_acl_access", value)
    assert mode(path) == 0o644
