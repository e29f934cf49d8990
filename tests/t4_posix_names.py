"""Names: what may be called how, and what create, link, symlink, mknod, rename and remove do to them."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest
from posix_help import is_fuse, opened, refused, working_directory

from benchfs_fuse.testing.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

pytest_plugins = ("mounts",)

PATH_MAX = 4096


def rename_with(flags: int, source: Path, target: Path) -> None:
    renameat2(os.fsencode(source), os.fsencode(target), flags)


def ino(path: Path) -> int:
    return path.lstat().st_ino


# --- what a name may be ---


def test_a_name_of_255_bytes_is_taken(mountpoint: Path) -> None:
    name = "é" * 127 + "x"
    (mountpoint / name).write_text("content")
    assert os.listdir(mountpoint) == [name]
    assert (mountpoint / name).read_text() == "content"


def test_a_name_of_256_bytes_is_refused_by_every_call(mountpoint: Path) -> None:
    long, file = mountpoint / ("x" * 256), mountpoint / "file"
    file.touch()
    with refused(errno.ENAMETOOLONG):
        os.close(os.open(long, os.O_CREAT | os.O_WRONLY))
    with refused(errno.ENAMETOOLONG):
        long.mkdir()
    with refused(errno.ENAMETOOLONG):
        long.symlink_to("target")
    with refused(errno.ENAMETOOLONG):
        os.link(file, long)
    with refused(errno.ENAMETOOLONG):
        os.rename(file, long)
    with refused(errno.ENAMETOOLONG):
        os.mkfifo(long)
    with refused(errno.ENAMETOOLONG):
        os.stat(long)
    assert os.listdir(mountpoint) == ["file"]


def test_any_byte_but_slash_and_nul_may_be_in_a_name(mountpoint: Path) -> None:
    root = os.fsencode(mountpoint)
    names = [b"<" + bytes([byte]) + b">" for byte in range(1, 256) if byte != ord("/")]
    for name in names:
        with opened(root + b"/" + name, os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, name)
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        with opened(root + b"/" + name, os.O_RDONLY) as fd:
            assert os.read(fd, 10) == name


def test_names_differ_by_case_and_by_unicode_form(mountpoint: Path) -> None:
    names = ["a", "A", "\u00e9", "e\u0301"]
    for name in names:
        (mountpoint / name).write_text(name)
    assert sorted(os.listdir(mountpoint)) == sorted(names)
    assert [(mountpoint / name).read_text() for name in names] == names


def test_paths_reach_to_path_max_and_directories_beyond(mountpoint: Path) -> None:
    with working_directory(mountpoint):
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        Path("file").write_text("deep")
        assert Path("file").read_text() == "deep"
    longest = b"./" * ((PATH_MAX - 2) // 2) + b"f"
    with working_directory(mountpoint):
        Path("f").write_text("at the end")
        assert len(longest) == PATH_MAX - 1
        with opened(longest, os.O_RDONLY) as fd:
            assert os.read(fd, 100) == b"at the end"
        with refused(errno.ENAMETOOLONG):
            os.stat(longest + b"f")


@pytest.mark.parametrize("suffix", ["/", "//", "/."])
def test_a_trailing_slash_asks_for_a_directory(mountpoint: Path, suffix: str) -> None:
    (mountpoint / "file").touch()
    (mountpoint / "directory").mkdir()
    assert stat.S_ISDIR(os.stat(f"{mountpoint}/directory{suffix}").st_mode)
    with refused(errno.ENOTDIR):
        os.stat(f"{mountpoint}/file{suffix}")


def test_dot_dot_leads_to_the_parent_wherever_the_directory_moved(mountpoint: Path) -> None:
    (mountpoint / "a" / "child").mkdir(parents=True)
    (mountpoint / "b").mkdir()
    assert ino(mountpoint / "a" / "child" / "..") == ino(mountpoint / "a")
    os.rename(mountpoint / "a" / "child", mountpoint / "b" / "child")
    assert ino(mountpoint / "b" / "child" / "..") == ino(mountpoint / "b")


# --- create ---


def test_exclusive_creation_refuses_whatever_is_there(mountpoint: Path) -> None:
    (mountpoint / "file").write_text("kept")
    (mountpoint / "directory").mkdir()
    (mountpoint / "dangling").symlink_to("nowhere")
    for name in ("file", "directory", "dangling"):
        with refused(errno.EEXIST):
            os.open(mountpoint / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert (mountpoint / "file").read_text() == "kept"
    assert not (mountpoint / "nowhere").exists()


def test_creation_follows_a_dangling_link(mountpoint: Path) -> None:
    (mountpoint / "link").symlink_to("target")
    (mountpoint / "link").write_text("through")
    assert (mountpoint / "target").read_text() == "through"


def test_creation_in_what_is_not_there_or_no_directory(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    with refused(errno.ENOENT):
        os.open(mountpoint / "missing" / "file", os.O_CREAT | os.O_WRONLY)
    with refused(errno.ENOTDIR):
        os.open(mountpoint / "file" / "file", os.O_CREAT | os.O_WRONLY)
    with refused(errno.ENOENT):
        os.open(mountpoint / "missing", os.O_RDONLY)


def test_directories_are_opened_for_reading_only(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "file").touch()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT | os.O_WRONLY):
        with refused(errno.EISDIR):
            os.open(mountpoint / "directory", flags)
    with opened(mountpoint / "directory", os.O_RDONLY) as fd, refused(errno.EISDIR):
        os.read(fd, 1)
    with refused(errno.ENOTDIR):
        os.open(mountpoint / "file", os.O_RDONLY | os.O_DIRECTORY)


def test_an_unnamed_file_is_refused_properly(workdir: Path) -> None:
    if is_fuse(workdir):
        with refused(errno.EOPNOTSUPP):
            os.open(workdir, os.O_TMPFILE | os.O_RDWR)
    else:
        with opened(workdir, os.O_TMPFILE | os.O_RDWR) as fd:
            assert os.fstat(fd).st_nlink == 0
    assert os.listdir(workdir) == []


# --- directories ---


def test_mkdir_and_rmdir(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    assert list(directory.iterdir()) == []
    with refused(errno.EEXIST):
        os.mkdir(directory)
    (directory / "file").touch()
    with refused(errno.ENOTEMPTY):
        os.rmdir(directory)
    with refused(errno.ENOTDIR):
        os.rmdir(directory / "file")
    with refused(errno.EISDIR):
        os.unlink(directory)
    (directory / "file").unlink()
    with refused(errno.EINVAL):
        os.rmdir(f"{directory}/.")
    with refused(errno.ENOTEMPTY):
        os.rmdir(f"{directory}/..")
    directory.rmdir()
    with refused(errno.ENOENT):
        os.rmdir(directory)


def test_unlink(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    (mountpoint / "file").unlink()
    assert not (mountpoint / "file").exists()
    with refused(errno.ENOENT):
        os.unlink(mountpoint / "file")


# --- links ---


def test_a_hard_link_is_the_same_file(mountpoint: Path) -> None:
    one, other = mountpoint / "one", mountpoint / "directory" / "other"
    other.parent.mkdir()
    one.write_text("before")
    os.link(one, other)
    assert ino(one) == ino(other)
    assert one.stat().st_nlink == other.stat().st_nlink == 2
    other.write_text("changed through the other")
    assert one.read_text() == "changed through the other"
    other.chmod(0o600)
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    one.unlink()
    assert other.stat().st_nlink == 1
    assert other.read_text() == "changed through the other"


def test_what_cannot_be_linked(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    (mountpoint / "directory").mkdir()
    with refused(errno.EPERM):
        os.link(mountpoint / "directory", mountpoint / "other")
    with refused(errno.EEXIST):
        os.link(mountpoint / "file", mountpoint / "directory")
    with refused(errno.EEXIST):
        os.link(mountpoint / "file", mountpoint / "file")
    with refused(errno.ENOENT):
        os.link(mountpoint / "missing", mountpoint / "other")
    assert (mountpoint / "file").stat().st_nlink == 1


def test_many_links_to_one_file(mountpoint: Path) -> None:
    (mountpoint / "0").write_text("one")
    for index in range(1, 200):
        os.link(mountpoint / "0", mountpoint / str(index))
    assert {(mountpoint / str(index)).stat().st_nlink for index in range(200)} == {200}
    for index in range(199):
        (mountpoint / str(index)).unlink()
    assert (mountpoint / "199").stat().st_nlink == 1
    assert (mountpoint / "199").read_text() == "one"


@pytest.mark.parametrize("target", [b"plain", b"/absolute/path", b"../up", b"\xff\xfe", b"t" * 4095])
def test_a_symbolic_link_holds_its_target(mountpoint: Path, target: bytes) -> None:
    link = os.fsencode(mountpoint / "link")
    os.symlink(target, link)
    assert os.readlink(link) == target
    found = os.lstat(link)
    assert stat.S_ISLNK(found.st_mode)
    assert found.st_size == len(target)
    assert stat.S_IMODE(found.st_mode) == 0o777


def test_symbolic_links_refuse(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    with refused(errno.ENAMETOOLONG):
        os.symlink(b"t" * 4096, mountpoint / "long")
    with refused(errno.ENOENT):
        os.symlink("", mountpoint / "empty")
    with refused(errno.EEXIST):
        os.symlink("target", mountpoint / "file")
    with refused(errno.EINVAL):
        os.readlink(mountpoint / "file")


def test_symbolic_links_are_followed_or_not(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "directory" / "file").write_text("found")
    (mountpoint / "link").symlink_to("directory")
    (mountpoint / "second").symlink_to("link/file")
    assert (mountpoint / "second").read_text() == "found"
    with refused(errno.ELOOP):
        os.open(mountpoint / "second", os.O_RDONLY | os.O_NOFOLLOW)
    with refused(errno.ENOTDIR):
        os.rmdir(mountpoint / "link")
    os.unlink(mountpoint / "link")
    assert (mountpoint / "directory" / "file").exists()


def test_a_loop_of_links_is_found(mountpoint: Path) -> None:
    (mountpoint / "a").symlink_to("b")
    (mountpoint / "b").symlink_to("a")
    with refused(errno.ELOOP):
        os.stat(mountpoint / "a")
    assert stat.S_ISLNK((mountpoint / "a").lstat().st_mode)


# --- nodes ---


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        (stat.S_IFREG, 0),
        (stat.S_IFIFO, 0),
        (stat.S_IFSOCK, 0),
        (stat.S_IFCHR, os.makedev(1, 3)),
        (stat.S_IFBLK, os.makedev(7, 300)),
        (stat.S_IFCHR, os.makedev(4095, 1048575)),
    ],
)
def test_mknod(mountpoint: Path, kind: int, device: int) -> None:
    os.mknod(mountpoint / "node", kind | 0o640, device)
    found = (mountpoint / "node").lstat()
    assert (stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode), found.st_rdev) == (kind, 0o640, device)
    assert (found.st_nlink, found.st_size) == (1, 0)
    with refused(errno.EEXIST):
        os.mknod(mountpoint / "node", kind | 0o640, device)


def test_mknod_makes_no_directory(mountpoint: Path) -> None:
    with refused(errno.EPERM):
        os.mknod(mountpoint / "node", stat.S_IFDIR | 0o755)


def test_a_fifo_passes_bytes(mountpoint: Path) -> None:
    os.mkfifo(mountpoint / "fifo")
    with (
        opened(mountpoint / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reader,
        opened(mountpoint / "fifo", os.O_WRONLY) as writer,
    ):
        os.write(writer, b"through")
        assert os.read(reader, 100) == b"through"
    assert (mountpoint / "fifo").stat().st_size == 0


def test_a_socket_is_bound_and_reached(mountpoint: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(mountpoint / "socket"))
        server.listen()
        client.connect(str(mountpoint / "socket"))
        connection, _ = server.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(10) == b"hello"
    assert stat.S_ISSOCK((mountpoint / "socket").stat().st_mode)


# --- rename ---


def test_rename_keeps_the_file(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "file").write_text("content")
    before = (mountpoint / "file").stat()
    os.rename(mountpoint / "file", mountpoint / "directory" / "moved")
    after = (mountpoint / "directory" / "moved").stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert os.listdir(mountpoint) == ["directory"]
    assert (mountpoint / "directory" / "moved").read_text() == "content"


def test_rename_replaces_a_file(mountpoint: Path) -> None:
    (mountpoint / "new").write_text("new")
    (mountpoint / "old").write_text("old")
    os.link(mountpoint / "old", mountpoint / "link to old")
    os.rename(mountpoint / "new", mountpoint / "old")
    assert (mountpoint / "old").read_text() == "new"
    assert sorted(os.listdir(mountpoint)) == ["link to old", "old"]
    assert (mountpoint / "link to old").read_text() == "old"
    assert (mountpoint / "link to old").stat().st_nlink == 1


def test_rename_of_a_file_to_itself_or_to_another_link_of_it_does_nothing(mountpoint: Path) -> None:
    (mountpoint / "one").write_text("content")
    os.rename(mountpoint / "one", mountpoint / "one")
    os.link(mountpoint / "one", mountpoint / "other")
    os.rename(mountpoint / "one", mountpoint / "other")
    assert sorted(os.listdir(mountpoint)) == ["one", "other"]
    assert (mountpoint / "one").stat().st_nlink == 2


def test_rename_moves_a_directory_with_all_below(mountpoint: Path) -> None:
    (mountpoint / "a" / "b" / "c").mkdir(parents=True)
    (mountpoint / "a" / "b" / "c" / "file").write_text("content")
    (mountpoint / "elsewhere").mkdir()
    os.rename(mountpoint / "a" / "b", mountpoint / "elsewhere" / "b")
    assert (mountpoint / "elsewhere" / "b" / "c" / "file").read_text() == "content"
    assert os.listdir(mountpoint / "a") == []
    assert (mountpoint / "a").stat().st_nlink == 2
    assert (mountpoint / "elsewhere").stat().st_nlink == 3


def test_rename_replaces_an_empty_directory_only(mountpoint: Path) -> None:
    for name in ("moved", "empty", "full"):
        (mountpoint / name).mkdir()
    (mountpoint / "full" / "file").touch()
    (mountpoint / "moved" / "mine").touch()
    with refused(errno.ENOTEMPTY):
        os.rename(mountpoint / "moved", mountpoint / "full")
    os.rename(mountpoint / "moved", mountpoint / "empty")
    assert os.listdir(mountpoint / "empty") == ["mine"]
    assert sorted(os.listdir(mountpoint)) == ["empty", "full"]


def test_rename_does_not_mix_files_and_directories(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    (mountpoint / "directory").mkdir()
    with refused(errno.EISDIR):
        os.rename(mountpoint / "file", mountpoint / "directory")
    with refused(errno.ENOTDIR):
        os.rename(mountpoint / "directory", mountpoint / "file")
    with refused(errno.ENOENT):
        os.rename(mountpoint / "missing", mountpoint / "file")
    with refused(errno.ENOENT):
        os.rename(mountpoint / "file", mountpoint / "missing" / "file")


@pytest.mark.parametrize("below", ["a/x", "a/b/x", "a/b/c/x"])
def test_a_directory_is_not_moved_below_itself(mountpoint: Path, below: str) -> None:
    (mountpoint / "a" / "b" / "c").mkdir(parents=True)
    with refused(errno.EINVAL):
        os.rename(mountpoint / "a", mountpoint / below)
    with refused(errno.ENOTEMPTY):
        os.rename(mountpoint / "a" / "b" / "c", mountpoint / "a")
    assert (mountpoint / "a" / "b" / "c").is_dir()


def test_rename_moves_the_link_and_not_its_target(mountpoint: Path) -> None:
    (mountpoint / "file").write_text("content")
    (mountpoint / "link").symlink_to("file")
    os.rename(mountpoint / "link", mountpoint / "moved")
    assert os.readlink(mountpoint / "moved") == "file"
    (mountpoint / "other").touch()
    os.rename(mountpoint / "other", mountpoint / "moved")
    assert not (mountpoint / "moved").is_symlink()
    assert (mountpoint / "file").read_text() == "content"


def test_rename_without_replacing(mountpoint: Path) -> None:
    (mountpoint / "one").write_text("one")
    (mountpoint / "other").write_text("other")
    with refused(errno.EEXIST):
        rename_with(RENAME_NOREPLACE, mountpoint / "one", mountpoint / "other")
    assert (mountpoint / "other").read_text() == "other"
    rename_with(RENAME_NOREPLACE, mountpoint / "one", mountpoint / "free")
    assert (mountpoint / "free").read_text() == "one"
    assert sorted(os.listdir(mountpoint)) == ["free", "other"]


def test_rename_exchanges(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "directory" / "inside").touch()
    (mountpoint / "place").mkdir()
    (mountpoint / "place" / "file").write_text("content")
    inos = ino(mountpoint / "directory"), ino(mountpoint / "place" / "file")
    rename_with(RENAME_EXCHANGE, mountpoint / "directory", mountpoint / "place" / "file")
    assert (ino(mountpoint / "place" / "file"), ino(mountpoint / "directory")) == inos
    assert os.listdir(mountpoint / "place" / "file") == ["inside"]
    assert (mountpoint / "directory").read_text() == "content"
    assert (mountpoint / "place").stat().st_nlink == 3
    with refused(errno.ENOENT):
        rename_with(RENAME_EXCHANGE, mountpoint / "directory", mountpoint / "missing")


def test_an_exchange_makes_no_cycle(mountpoint: Path) -> None:
    (mountpoint / "a" / "b").mkdir(parents=True)
    with refused(errno.EINVAL):
        rename_with(RENAME_EXCHANGE, mountpoint / "a", mountpoint / "a" / "b")
    with refused(errno.EINVAL):
        rename_with(RENAME_EXCHANGE, mountpoint / "a" / "b", mountpoint / "a")


@pytest.mark.parametrize(
    "flags", [RENAME_NOREPLACE | RENAME_EXCHANGE, RENAME_EXCHANGE | RENAME_WHITEOUT, 1 << 3, 1 << 31]
)
def test_other_rename_flags_are_refused(mountpoint: Path, flags: int) -> None:
    (mountpoint / "one").touch()
    (mountpoint / "other").touch()
    with refused(errno.EINVAL):
        rename_with(flags, mountpoint / "one", mountpoint / "other")
    assert sorted(os.listdir(mountpoint)) == ["one", "other"]


def test_rename_leaves_a_whiteout_or_refuses(mountpoint: Path) -> None:
    (mountpoint / "one").touch()
    if is_fuse(mountpoint):
        with refused(errno.EINVAL):
            rename_with(RENAME_WHITEOUT, mountpoint / "one", mountpoint / "other")
        assert os.listdir(mountpoint) == ["one"]
    else:
        rename_with(RENAME_WHITEOUT, mountpoint / "one", mountpoint / "other")
        assert stat.S_ISCHR((mountpoint / "one").stat().st_mode)
