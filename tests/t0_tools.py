"""The comparisons under the tests with real tools find each difference that they are for."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchfs_fuse.testing.tools import WrongResultError, check_same_file, check_same_tree, make_tree, run


def flip_a_byte(tree: Path) -> None:
    with (tree / "large").open("r+b") as file:
        file.seek(4 << 20)
        byte = file.read(1)
        file.seek(4 << 20)
        file.write(bytes([byte[0] ^ 1]))


def cut_the_end(tree: Path) -> None:
    os.truncate(tree / "sparse", (6 << 20) - 1)


def break_a_hard_link(tree: Path) -> None:
    shutil.copy2(tree / "large", tree / "copy")
    os.rename(tree / "copy", tree / "large")


def swap_hard_links(tree: Path) -> None:
    os.link(tree / "empty", tree / "d0" / "other")
    os.unlink(tree / "d0" / "other")
    (tree / "dangling").unlink()


def change_mode(tree: Path) -> None:
    (tree / "empty").chmod(0o755)


def change_owner(tree: Path) -> None:
    os.chown(tree / "d3", 1001, 1001)


def change_time(tree: Path) -> None:
    found = (tree / "d3").stat()
    os.utime(tree / "d3", ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def change_xattr(tree: Path) -> None:
    os.setxattr(tree / "d4", "user.colour", b"red")


def drop_acl(tree: Path) -> None:
    subprocess.run(["setfacl", "-b", tree / "d0" / "e0" / "file 0"], check=True)


def change_target(tree: Path) -> None:
    (tree / "link").unlink()
    (tree / "link").symlink_to("d0/hard  link")


def change_device(tree: Path) -> None:
    (tree / "device").unlink()
    os.mknod(tree / "device", 0o020600, os.makedev(1, 5))


def rename_a_file(tree: Path) -> None:
    os.rename(os.fsencode(tree) + b"/\xff\xfe not utf-8", os.fsencode(tree) + b"/\xff\xfd not utf-8")


CHANGES: list[Callable[[Path], None]] = [
    flip_a_byte,
    cut_the_end,
    break_a_hard_link,
    swap_hard_links,
    change_mode,
    change_owner,
    change_time,
    change_xattr,
    drop_acl,
    change_target,
    change_device,
    rename_a_file,
]


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    tree = make_tree(tmp_path / "tree")
    run(["cp", "-a", tree, tmp_path / "copy"])
    return tree, tmp_path / "copy"


def test_a_faithful_copy_is_the_same(trees: tuple[Path, Path]) -> None:
    check_same_tree(*trees)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_one_change_is_found(trees: tuple[Path, Path], change: Callable[[Path], None]) -> None:
    change(trees[1])
    with pytest.raises(WrongResultError):
        check_same_tree(*trees)


def test_the_first_wrong_byte_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    check_same_file(tmp_path / "file", b"abcdef")
    with pytest.raises(WrongResultError, match="first wrong byte at 3"):
        check_same_file(tmp_path / "file", b"abcXef")
    with pytest.raises(WrongResultError, match="6 bytes, must be 5; first wrong byte at 5"):
        check_same_file(tmp_path / "file", b"abcde")


def test_a_failing_tool_is_shown_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(WrongResultError, match="No such file"):
        run(["ls", tmp_path / "missing"])
