"""Use a directory as people do, with ordinary tools, and check every byte and meaning of what comes out.

Each function takes a directory on the file system under test. It raises WrongResultError where a tool fails or its
result is wrong, TimeoutExpired where it hangs. Data to start from and to compare with lies in a scratch directory
elsewhere.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

# Ends a tool that hangs: the slowest here take some seconds.
TOOL_DEADLINE_S = 300.0

# One past two chunks of the default size, and not a multiple of anything.
LARGE_FILE_LENGTH = (8 << 20) + 4321

# Modules of the C project: enough that `make -j2` has two compilers at work most of the time.
C_MODULES = 12


class WrongResultError(AssertionError):
    """A tool failed, or ended well with a wrong result."""


def run(command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output. Raises WrongResultError with what it printed, TimeoutExpired."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=TOOL_DEADLINE_S,
        check=False,
    )
    if done.returncode:
        raise WrongResultError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(condition: bool, what: str) -> None:
    """Raise WrongResultError unless the condition holds."""
    if not condition:
        raise WrongResultError(what)


def fill(path: Path, length: int, seed: int = 0) -> Path:
    """Write `length` random bytes that depend on the seed, and return the path."""
    path.write_bytes(random.Random(seed).randbytes(length))
    return path


def make_tree(root: Path, seed: int = 0) -> Path:
    """Make a tree of everything that archivers care about, and return it. Needs root for the device and the owners.

    Empty, small, large and sparse files, hard links, symbolic links (also dangling), FIFO, socket, device, modes,
    owners, times with nanoseconds, extended attributes, an ACL, names of 255 bytes and of bytes that are no UTF-8,
    nested and empty directories.
    """
    root.mkdir()
    dice = random.Random(seed)
    (root / "empty").touch()
    (root / "empty directory").mkdir()
    for index in range(40):
        directory = root / f"d{index % 5}" / f"e{index % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        fill(directory / f"file {index}", dice.randrange(20_000), index)
    fill(root / "large", LARGE_FILE_LENGTH, seed)
    with (root / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"after a hole")
        file.truncate(6 << 20)
    os.link(root / "large", root / "d0" / "hard link")
    (root / "link").symlink_to("d0/hard link")
    (root / "dangling").symlink_to("/nowhere/at/all")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "socket", 0o600 | stat.S_IFSOCK)
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    fill(root / ("n" * 255), 10)
    fill(Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe not utf-8")), 11)
    for path, mode in (
        (root / "d1", 0o2775),
        (root / "d2", 0o1777),
        (root / "empty", 0o4755),
        (root / "sparse", 0o400),
    ):
        path.chmod(mode)
    os.chown(root / "d3", 1001, 1002)
    os.chown(root / "link", 1002, 1001, follow_symlinks=False)
    os.setxattr(root / "large", "user.note", b"\0binary\xff")
    os.setxattr(root / "d4", "user.colour", b"blue")
    os.setxattr(root / "large", "trusted.note", b"root's")
    run(["setfacl", "-m", "u:1001:rw,g:1002:r", str(root / "d0" / "e0" / "file 0")])
    for index, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18 + index, 10**18 + 123_456_789 * index), follow_symlinks=False)
    return root


def _walk(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        directories.sort()
        for name in sorted(directories + files):
            yield Path(directory) / name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path, *, xattrs: bool, times: bool) -> dict[str, object]:
    found = path.lstat()
    facts: dict[str, object] = {"mode": oct(found.st_mode), "owner": (found.st_uid, found.st_gid)}
    if times:
        facts["mtime_ns"] = found.st_mtime_ns
    if stat.S_ISREG(found.st_mode):
        facts |= {"size": found.st_size, "nlink": found.st_nlink, "sha256": _digest(path)}
    if stat.S_ISLNK(found.st_mode):
        facts["target"] = os.readlink(path)
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        facts["rdev"] = found.st_rdev
    if xattrs:
        names = os.listxattr(path, follow_symlinks=False)
        facts["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return facts


def check_same_tree(original: Path, copy: Path, *, xattrs: bool = True, times: bool = True) -> None:
    """Compare two trees: names, types, contents, modes, owners, times, links, xattrs. Raises WrongResultError."""
    names = [path.relative_to(original) for path in _walk(original)]
    copied = [path.relative_to(copy) for path in _walk(copy)]
    expect(names == copied, f"names differ: {sorted(map(os.fsencode, set(names) ^ set(copied)))}")
    links: dict[int, set[Path]] = {}
    copied_links: dict[int, set[Path]] = {}
    for name in names:
        one = _describe(original / name, xattrs=xattrs, times=times)
        other = _describe(copy / name, xattrs=xattrs, times=times)
        expect(one == other, f"{os.fsencode(name)!r}: is {other}, must be {one}")
        links.setdefault((original / name).lstat().st_ino, set()).add(name)
        copied_links.setdefault((copy / name).lstat().st_ino, set()).add(name)
    groups = [sorted(map(str, group)) for group in links.values()]
    copied_groups = [sorted(map(str, group)) for group in copied_links.values()]
    expect(sorted(groups) == sorted(copied_groups), "hard links differ")


def check_same_file(path: Path, content: bytes) -> None:
    """Compare a file with what must be in it. Raises WrongResultError."""
    found = path.read_bytes()
    if found == content:
        return
    pairs = enumerate(zip(found, content, strict=False))
    index = next((index for index, (a, b) in pairs if a != b), min(len(found), len(content)))
    raise WrongResultError(f"{path}: {len(found)} bytes, must be {len(content)}; first wrong byte at {index}")


def use_cp(directory: Path, scratch: Path) -> None:
    """Copy a tree in and out with `cp -a`."""
    tree = make_tree(scratch / "tree")
    run(["cp", "-a", tree, directory / "in"])
    check_same_tree(tree, directory / "in")
    run(["cp", "-a", directory / "in", directory / "again"])
    run(["cp", "-a", directory / "again", scratch / "out"])
    check_same_tree(tree, scratch / "out")


def use_tar(directory: Path, scratch: Path) -> None:
    """Pack a tree, unpack it in the directory, pack it there and unpack it outside."""
    tree = make_tree(scratch / "tree")
    (tree / "socket").unlink()  # tar leaves sockets out
    everything = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--format=posix", "--sparse"]
    run(["tar", *everything, "-cf", scratch / "tree.tar", "-C", tree, "."])
    (directory / "in").mkdir()
    run(["tar", *everything, "-xpf", scratch / "tree.tar", "-C", directory / "in"])
    check_same_tree(tree, directory / "in")
    run(["tar", *everything, "-czf", directory / "tree.tar.gz", "-C", directory / "in", "."])
    run(["tar", *everything, "-df", directory / "tree.tar.gz", "-C", tree])
    (scratch / "out").mkdir()
    run(["tar", *everything, "-xzpf", directory / "tree.tar.gz", "-C", scratch / "out"])
    check_same_tree(tree, scratch / "out")


def use_rsync(directory: Path, scratch: Path) -> None:
    """Copy a tree in with `rsync -aHAX`, change it, synchronise, and find nothing left to do."""
    tree = make_tree(scratch / "tree")
    command = ["rsync", "-aHAX", "--delete", "--itemize-changes", f"{tree}/", f"{directory / 'in'}/"]
    run(command)
    check_same_tree(tree, directory / "in")
    with (tree / "large").open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"changed in the middle")
    shutil.rmtree(tree / "d2")
    fill(tree / "new", 1000)
    run([*command, "--inplace", "--no-whole-file"])
    check_same_tree(tree, directory / "in")
    changes = run([*command, "--checksum"])
    expect(not changes, f"rsync still finds changes: {changes}")


def use_dd(directory: Path, scratch: Path) -> None:
    """Write with dd, through the page cache and around it, sparse and with seek, and read back both ways."""
    content = fill(scratch / "source", LARGE_FILE_LENGTH // 4096 * 4096).read_bytes()
    source, target = f"if={scratch / 'source'}", directory / "target"
    run(["dd", source, f"of={target}", "bs=5000", "oflag=sync", "count=50"])
    check_same_file(target, content[:250_000])
    for options in (["bs=64k"], ["bs=1M", "oflag=direct"], ["bs=4M", "conv=fsync"]):
        run(["dd", source, f"of={target}", *options])
        check_same_file(target, content)
    for options in (["bs=64k"], ["bs=1M", "iflag=direct"]):
        run(["dd", f"if={target}", f"of={scratch / 'out'}", *options])
        check_same_file(scratch / "out", content)
    run(["dd", source, f"of={target}", "bs=1000", "seek=7", "skip=3", "count=4", "conv=notrunc"])
    check_same_file(target, content[:7000] + content[3000:7000] + content[11000:])
    run(["dd", source, f"of={directory / 'far'}", "bs=1M", "seek=2048", "count=1"])
    expect((directory / "far").stat().st_size == 2049 << 20, "dd seek: wrong size")
    expect((directory / "far").stat().st_blocks * 512 < 16 << 20, "dd seek: the hole takes space")
    with (directory / "far").open("rb") as file:
        expect(file.read(1 << 20) == bytes(1 << 20), "dd seek: the hole is not zeros")
        file.seek(2048 << 20)
        expect(file.read() == content[: 1 << 20], "dd seek: wrong bytes after the hole")
    sparse = bytes(3 << 20) + content[:4096] + bytes(3 << 20)
    (scratch / "sparse").write_bytes(sparse)
    run(["dd", f"if={scratch / 'sparse'}", f"of={directory / 'sparse'}", "bs=4k", "conv=sparse"])
    check_same_file(directory / "sparse", sparse)
    expect((directory / "sparse").stat().st_blocks * 512 < 2 << 20, "dd conv=sparse: the holes take space")


# Engine, whether direct, queue depth. mmap has neither direct I/O nor depth.
FIO_JOBS = (
    ("psync", 0, 1),
    ("psync", 1, 1),
    ("libaio", 1, 8),
    ("libaio", 0, 4),
    ("io_uring", 0, 16),
    ("io_uring", 1, 8),
    ("mmap", 0, 1),
)


def use_fio(directory: Path, engine: str, direct: int, depth: int) -> None:
    """Write and verify blocks of several sizes at random and in order, two jobs at once, every block checksummed."""
    for pattern, sizes in (("randwrite", "4k-64k"), ("write", "256k-256k"), ("randrw", "4k-4k")):
        output = run(
            [
                *("fio", f"--name={pattern}", f"--directory={directory}", f"--rw={pattern}", f"--bsrange={sizes}"),
                *(f"--ioengine={engine}", f"--direct={direct}", f"--iodepth={depth}", "--size=6m", "--numjobs=2"),
                *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=7", "--unlink=1"),
                *("--output-format=json", "--group_reporting"),
            ],
            cwd=directory,
        )
        job = json.loads(output[output.index("{") :])["jobs"][0]
        expect(job["error"] == 0, f"fio {engine} {pattern}: error {job['error']}")
        expect(job["write"]["total_ios"] > 0 and job["read"]["total_ios"] > 0, f"fio {engine} {pattern}: nothing done")


def use_git(directory: Path, scratch: Path) -> None:
    """Commit, branch, merge, clone, push, repack and check a repository."""
    who = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]

    def git(*arguments: str | Path, at: Path) -> str:
        return run(["git", *identity, *arguments], cwd=at, env=who)

    work = directory / "work"
    git("init", work, at=directory)
    for commit in range(6):
        for index in range(25):
            path = work / f"d{index % 4}" / f"f{index}"
            path.parent.mkdir(exist_ok=True)
            fill(path, 500 + index * 37, commit * 100 + index)
        git("add", "-A", at=work)
        git("commit", "-m", f"commit {commit}", at=work)
    git("checkout", "-b", "side", "HEAD~2", at=work)
    fill(work / "only here", 5000)
    git("add", "-A", at=work)
    git("commit", "-m", "side", at=work)
    git("checkout", "main", at=work)
    git("merge", "side", "-m", "merge", at=work)
    git("clone", "--no-local", work, directory / "clone", at=directory)
    git("clone", "--bare", work, directory / "bare", at=directory)
    git("gc", "--aggressive", "--prune=now", at=work)
    git("push", directory / "bare", "main:pushed", at=work)
    for repository in (work, directory / "clone", directory / "bare"):
        git("fsck", "--full", "--strict", at=repository)
    expect(not git("status", "--porcelain", at=work), "git finds changes that nobody made")
    git("clone", directory / "bare", scratch / "out", at=scratch)
    shutil.rmtree(scratch / "out" / ".git")
    shutil.rmtree(directory / "clone" / ".git")
    check_same_tree(scratch / "out", directory / "clone", times=False)


def use_sqlite(directory: Path, journal: str) -> None:
    """Let several processes and connections move sums between rows of one database: their total must stay."""
    path = directory / f"{journal}.db"
    with closing(sqlite3.connect(path)) as database:
        (mode,) = database.execute(f"PRAGMA journal_mode={journal}").fetchone()
        expect(mode == journal, f"sqlite took journal mode {mode}, not {journal}")
        database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, sum INTEGER, note BLOB)")
        rows = [(index, 100, random.Random(index).randbytes(700)) for index in range(200)]
        database.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
        database.commit()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_move_sums, args=(path, seed, 30)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TOOL_DEADLINE_S)
        expect(process.exitcode == 0, f"sqlite process ended with {process.exitcode}")
    with closing(sqlite3.connect(path)) as database:
        expect(database.execute("PRAGMA integrity_check").fetchone() == ("ok",), "sqlite: integrity check failed")
        expect(database.execute("SELECT sum(sum) FROM account").fetchone() == (200 * 100,), "sqlite: the total changed")
        expect(database.execute("SELECT count(*) FROM moved").fetchone() == (3 * 30,), "sqlite: a commit was lost")
        found = database.execute("SELECT id, 100, note FROM account ORDER BY id").fetchall()
        expect(found == rows, "sqlite: a row changed that nobody changed")
        database.execute("VACUUM")
        expect(database.execute("PRAGMA integrity_check").fetchone() == ("ok",), "sqlite: broken by VACUUM")


def _move_sums(path: Path, seed: int, count: int) -> None:
    dice = random.Random(seed)
    with closing(sqlite3.connect(path, timeout=TOOL_DEADLINE_S, isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS moved (who INTEGER, amount INTEGER)")
        for _ in range(count):
            amount = dice.randrange(50)
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE account SET sum = sum - ? WHERE id = ?", (amount, dice.randrange(200)))
            database.execute("UPDATE account SET sum = sum + ? WHERE id = ?", (amount, dice.randrange(200)))
            database.execute("INSERT INTO moved VALUES (?, ?)", (seed, amount))
            database.execute("COMMIT")


def use_make(directory: Path) -> None:
    """Build a C program of a dozen modules with `make -j2`, run it, and see that one change rebuilds one module."""
    project = directory / "project"
    project.mkdir()
    objects = " ".join(f"m{index}.o" for index in range(C_MODULES))
    (project / "all.h").write_text("".join(f"int m{index}(void);\n" for index in range(C_MODULES)))
    for index in range(C_MODULES):
        (project / f"m{index}.c").write_text(f'#include "all.h"\nint m{index}(void) {{ return {index}; }}\n')
    calls = " + ".join(f"m{index}()" for index in range(C_MODULES))
    (project / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (project / "Makefile").write_text(
        f"OBJECTS = main.o {objects}\n"
        "program: libm.a main.o\n\tcc -o $@ main.o libm.a\n"
        f"libm.a: {objects}\n\tar rcs $@ $^\n"
        "%.o: %.c all.h\n\tcc -c -o $@ $<\n"
        "clean:\n\trm -f *.o libm.a program\n"
    )
    run(["make", "-j2"], cwd=project)
    total = sum(range(C_MODULES))
    expect(run([project / "program"]) == f"{total}\n", "the built program is wrong")
    expect("up to date" in run(["make", "-j2"], cwd=project), "make finds work left although nothing changed")
    (project / "m3.c").write_text('#include "all.h"\nint m3(void) { return 1003; }\n')
    rebuilt = run(["make", "-j2"], cwd=project)
    expect(rebuilt.count("cc -c") == 1, f"make rebuilt other modules too:\n{rebuilt}")
    expect(run([project / "program"]) == f"{total + 1000}\n", "the rebuilt program is wrong")
    run(["make", "clean"], cwd=project)
    expect(not list(project.glob("*.o")), "make clean left objects")


def use_find(directory: Path, scratch: Path) -> None:
    """Ask find for names, types, sizes, links and modes, and remove with it."""
    tree = make_tree(scratch / "tree")
    run(["cp", "-a", tree, directory / "in"])
    for query in (
        ["-type", "f", "-size", "+4k"],
        ["-type", "d", "-empty"],
        ["-links", "2", "-type", "f"],
        ["-perm", "-4000"],
        ["-user", "1001"],
        ["-newermt", "2002-01-01"],
        ["-xtype", "l"],
        ["-samefile", "./large"],
    ):
        found, expected = (
            sorted(run(["find", ".", *query, "-printf", "%P\\n"], cwd=path).splitlines())
            for path in (directory / "in", tree)
        )
        expect(found == expected and bool(found), f"find {query}: {found}, must be {expected}")
    run(["find", directory / "in", "-mindepth", "1", "-delete"])
    expect(list((directory / "in").iterdir()) == [], "find -delete left something")


def use_du_and_df(directory: Path) -> None:
    """See used and free space move with what is written and removed."""
    megabytes = 24

    def free_kib() -> int:
        return int(run(["df", "--output=avail", "-k", directory]).split()[-1])

    def used_kib(path: Path) -> int:
        return int(run(["du", "-sk", path]).split()[0])

    total = int(run(["df", "--output=size", "-k", directory]).split()[-1])
    before = free_kib()
    expect(0 < before <= total, f"df: {before} KiB free of {total}")
    target = directory / "large"
    run(["dd", "if=/dev/urandom", f"of={target}", "bs=1M", f"count={megabytes}", "conv=fsync"])
    expect(abs(used_kib(target) - megabytes * 1024) <= 64, f"du: {used_kib(target)} KiB for {megabytes} MiB")
    expect(int(run(["du", "-sb", target]).split()[0]) == megabytes << 20, "du --apparent-size is wrong")
    expect(before - free_kib() > megabytes * 1024 // 2, "df: free space did not fall")
    target.unlink()
    expect(used_kib(directory) < 1024, "du: space is still used after the removal")
    run(["df", "-i", directory])


def use_shell_append(directory: Path, also: Path) -> None:
    """Append lines with `>>` from two shells, the second through `also`; each must be there, whole and in order."""
    count = 300
    name = "appended"
    script = 'for i in $(seq "$1"); do echo "$2 $i line of some length" >> "$3"; done'
    shells = [
        subprocess.Popen(["sh", "-c", script, "sh", str(count), who, str(place / name)])
        for who, place in (("one", directory), ("two", also))
    ]
    for shell in shells:
        expect(shell.wait(TOOL_DEADLINE_S) == 0, "a shell failed")
    for place in (directory, also):
        lines = (place / name).read_text().splitlines()
        for who in ("one", "two"):
            found = [line for line in lines if line.startswith(f"{who} ")]
            expected = [f"{who} {index} line of some length" for index in range(1, count + 1)]
            expect(found == expected, f"lines of {who} lost or out of order")
        expect(len(lines) == 2 * count, f"{len(lines)} lines, must be {2 * count}")
