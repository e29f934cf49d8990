"""Work on a cluster through the client library and say, before and after, what is done: for ``t4_power_cut.py``.

    python power_work.py REGISTRY

Commands come as lines of JSON on standard input, what is said goes as lines of JSON to standard output, "ready" first:

    ["work", NAME, SEED]   run TASKS tasks, each below a new directory of its own, until "stop" or until something fails
                           ["begin", TASK, KIND, ARGUMENTS] and ["end", TASK, RESULT] or ["fail", TASK, SENTENCE]
    ["stop"]               let every task end what it does; ["stopped"]
    ["dump", FILE]         write everything that is there to FILE, a pickled list of ``Found``; ["dumped"]
    ["remove"]             remove everything; ["removed"]
    ["rest"]               wait until the daemons have nothing left to do; ["rested"]

Bytes are given by a number (``content``), directories by their inodes.
"""

import json
import os
import pickle
import random
import stat
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import trio

from benchfs_fuse.client import File, FileSystem, open_cluster
from benchfs_fuse.errors import FsError, StorageError
from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.model import ROOT_INO
from benchfs_fuse.rpc.messages import BEHIND_REPLIES

TASKS = 4
#: Names of one task at most; directories of one task at most.
NAMES_MAX = 10
DIRECTORIES_MAX = 6
#: Largest offset: a few chunks of the smallest size.
SIZE_MAX = 5 * CHUNK_SIZE_MIN // 2
#: Files that a task keeps open.
OPEN_MAX = 4
#: Bytes read at once when everything is looked at: a page.
BLOCK = 4096
PUNCH = 3
#: Seconds between looks at daemons that have something to do.
REST_S = 0.05
#: What a daemon's status says of things that are under way.
UNDER_WAY = (*BEHIND_REPLIES, "locks")


def content(number: int, length: int) -> bytes:
    """Return the bytes that a number stands for."""
    return random.Random(number).randbytes(length)


class Found(NamedTuple):
    """Be one name that is there. ``blocks``: of a file, None for each block that could not be read."""

    parent: int
    name: str
    ino: int
    is_dir: bool
    nlink: int
    size: int
    blocks: list[bytes | None]


class Task:
    """Do random things in a directory of one's own."""

    def __init__(self, fs: FileSystem, say: Callable[..., Awaitable[None]], number: int, root: str, seed: int) -> None:
        self._fs = fs
        self._say = say
        self._number = number
        self._root = root
        self._random = random.Random(f"{seed}.{number}")
        self._serial = 0
        self._dirs: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._sizes: dict[int, int] = {}
        self._open: dict[int, File] = {}
        self.stopped = False
        data = [self.write, self.write, self.write, self.append, self.write_synced, self.cut, self.extend, self.punch]
        names = [self.rename, self.rename, self.rename_over, self.link, self.unlink, self.mkdir, self.rmdir, self.move]
        self._operations = [
            *data,
            self.fsync,
            self.fsync,
            self.fsync,
            *names,
            self.create,
            self.create,
            self.sync_names,
        ]

    async def run(self) -> None:
        """Go on until stopped or until something fails."""
        try:
            await self.do("mkdir", self._make_root, parent=ROOT_INO, name=self._root)
            while not self.stopped:
                await self._random.choice(self._operations)()
        except FsError:
            pass

    async def do(self, kind: str, step: Callable[[], Awaitable[Any]], **arguments: Any) -> Any:
        """Do one thing, and say so."""
        await self._say("begin", self._number, kind, arguments)
        try:
            result = await step()
        except FsError as error:
            await self._say("fail", self._number, f"{kind} {arguments}: {error!r}")
            raise
        await self._say("end", self._number, result)
        return result

    async def _make_root(self) -> int:
        ino = (await self._fs.mkdir(self._root)).ino
        self._dirs[self._root] = ino
        return ino

    def _new_name(self) -> tuple[str, str, int]:
        """Return a free path, its last part, and the inode of its directory."""
        self._serial += 1
        directory = self._random.choice(list(self._dirs))
        return f"{directory}/{self._serial}", str(self._serial), self._dirs[directory]

    def _place(self, path: str) -> dict[str, Any]:
        directory, _, name = path.rpartition("/")
        return {"parent": self._dirs[directory], "name": name}

    def _pick(self) -> str | None:
        return self._random.choice(list(self._names)) if self._names else None

    async def _file(self, path: str) -> File:
        """Return an open file; some are kept open."""
        ino = self._names[path]
        file = self._open.get(ino)
        if file is None:
            file = await self._fs.open(path, os.O_RDWR)
            self._open[ino] = file
        return file

    async def _done(self, ino: int) -> None:
        if self._random.random() < 0.5 or len(self._open) > OPEN_MAX:
            file = self._open.pop(ino, None)
            if file is not None:
                await file.close()

    async def _change(self, kind: str, path: str, change: Callable[[File], Awaitable[Any]], **arguments: Any) -> None:
        ino = self._names[path]

        async def step() -> Any:
            file = await self._file(path)
            result = await change(file)
            await self._done(ino)
            return result

        await self.do(kind, step, ino=ino, **arguments)

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _piece(self) -> tuple[int, int]:
        """Return a number of bytes and a number for them."""
        return self._random.choice([1, 100, 5000, 20000]), self._random.getrandbits(32)

    async def write(self) -> None:
        if (path := self._pick()) is not None:
            offset = self._random.randrange(SIZE_MAX)
            length, number = self._piece()

            async def change(file: File) -> None:
                await file.write(content(number, length), offset)

            await self._change("write", path, change, offset=offset, length=length, number=number)
            ino = self._names[path]
            self._sizes[ino] = max(self._sizes[ino], offset + length)

    async def write_synced(self) -> None:
        """Write as O_SYNC does."""
        if (path := self._pick()) is not None:
            ino, offset = self._names[path], self._random.randrange(SIZE_MAX)
            length, number = self._piece()

            async def step() -> None:
                async with await self._fs.open(path, os.O_RDWR | os.O_SYNC) as file:
                    await file.write(content(number, length), offset)

            await self.do("write_synced", step, ino=ino, offset=offset, length=length, number=number)
            self._sizes[ino] = max(self._sizes[ino], offset + length)

    async def append(self) -> None:
        if (path := self._pick()) is not None:
            ino = self._names[path]
            length, number = self._piece()

            async def step() -> None:
                async with await self._fs.open(path, os.O_RDWR | os.O_APPEND) as file:
                    await file.write(content(number, length), 0)

            await self.do("write", step, ino=ino, offset=self._sizes[ino], length=length, number=number)
            self._sizes[ino] += length

    async def cut(self) -> None:
        if (path := self._pick()) is not None and (old := self._sizes[self._names[path]]):
            size = self._random.choice([0, self._random.randrange(old)])
            await self._change("truncate", path, lambda file: file.truncate(size), size=size)
            self._sizes[self._names[path]] = size

    async def extend(self) -> None:
        if (path := self._pick()) is not None:
            size = self._sizes[self._names[path]] + self._random.randrange(30000)
            await self._change("truncate", path, lambda file: file.truncate(size), size=size)
            self._sizes[self._names[path]] = size

    async def punch(self) -> None:
        if (path := self._pick()) is not None:
            offset, length = self._random.randrange(SIZE_MAX), self._random.randrange(1, 30000)
            await self._change(
                "punch", path, lambda file: file.fallocate(offset, length, PUNCH), offset=offset, length=length
            )

    async def fsync(self) -> None:
        if (path := self._pick()) is not None:
            await self._change("fsync", path, lambda file: file.fsync())

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(self) -> None:
        if len(self._names) < NAMES_MAX:
            path, name, parent = self._new_name()

            async def step() -> int:
                file = await self._fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._names[path] = file.ino
                self._sizes[file.ino] = 0
                self._open[file.ino] = file
                return file.ino

            await self.do("create", step, parent=parent, name=name)

    async def rename(self) -> None:
        if (path := self._pick()) is not None:
            new_path, name, parent = self._new_name()
            await self._rename(path, new_path, {"parent": parent, "name": name}, None)

    async def rename_over(self) -> None:
        path, other = self._pick(), self._pick()
        if path is not None and other is not None and self._names[path] != self._names[other]:
            await self._rename(path, other, self._place(other), self._names[other])

    async def _rename(self, path: str, new_path: str, new: dict[str, Any], replaced: int | None) -> None:
        ino = self._names[path]
        await self.do(
            "rename",
            lambda: self._fs.rename(path, new_path),
            ino=ino,
            old=self._place(path),
            new=new,
            replaced=replaced,
        )
        self._names[new_path] = self._names.pop(path)

    async def link(self) -> None:
        if (path := self._pick()) is not None and len(self._names) < NAMES_MAX:
            new_path, name, parent = self._new_name()

            async def step() -> None:
                await self._fs.link(path, new_path)

            await self.do("link", step, ino=self._names[path], parent=parent, name=name)
            self._names[new_path] = self._names[path]

    async def unlink(self) -> None:
        if (path := self._pick()) is not None:
            await self.do("unlink", lambda: self._fs.remove(path), ino=self._names[path], **self._place(path))
            del self._names[path]

    async def mkdir(self) -> None:
        if len(self._dirs) < DIRECTORIES_MAX:
            path, name, parent = self._new_name()

            async def step() -> int:
                return (await self._fs.mkdir(path)).ino

            self._dirs[path] = await self.do("mkdir", step, parent=parent, name=name)

    def _below(self, directory: str, paths: dict[str, int]) -> list[str]:
        return [path for path in paths if path.startswith(f"{directory}/")]

    async def rmdir(self) -> None:
        path = self._random.choice(list(self._dirs))
        if path != self._root and not self._below(path, self._dirs) and not self._below(path, self._names):
            await self.do("unlink", lambda: self._fs.rmdir(path), ino=self._dirs[path], **self._place(path))
            del self._dirs[path]

    async def move(self) -> None:
        """Move a directory into another one."""
        path = self._random.choice(list(self._dirs))
        new_path, name, parent = self._new_name()
        if path == self._root or new_path.startswith(f"{path}/"):
            return
        await self.do(
            "rename",
            lambda: self._fs.rename(path, new_path),
            ino=self._dirs[path],
            old=self._place(path),
            new={"parent": parent, "name": name},
            replaced=None,
        )
        for paths in (self._dirs, self._names):
            for below in self._below(path, paths):
                paths[new_path + below[len(path) :]] = paths.pop(below)
        self._dirs[new_path] = self._dirs.pop(path)

    async def sync_names(self) -> None:
        await self.do("sync_names", self._fs.namespace.sync_names)


async def dump(fs: FileSystem, path: str) -> list[Found]:
    """Look at everything below a directory."""
    found = []
    directory = (await fs.stat(path)).ino
    for name in await fs.listdir(path):
        below = f"{path}/{os.fsdecode(name)}"
        attrs = await fs.stat(below)
        blocks: list[bytes | None] = []
        if attrs.is_dir:
            found += await dump(fs, below)
        else:
            async with await fs.open(below) as file:
                for offset in range(0, attrs.size, BLOCK):
                    try:
                        blocks.append(await file.read(BLOCK, offset))
                    except StorageError as error:
                        sys.stderr.write(f"{below} at {offset}: {error}\n")
                        blocks.append(None)
        is_dir = stat.S_ISDIR(attrs.mode)
        found.append(Found(directory, os.fsdecode(name), attrs.ino, is_dir, attrs.nlink, attrs.size, blocks))
    return found


async def remove(fs: FileSystem, path: str) -> None:
    """Remove everything below a directory, and it."""
    for name in await fs.listdir(path):
        below = f"{path}/{os.fsdecode(name)}"
        if (await fs.stat(below)).is_dir:
            await remove(fs, below)
        else:
            await fs.remove(below)
    await fs.rmdir(path)


class Rest:
    """Find out whether nothing goes on at the daemons, and nobody else is there; what changes is written down."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._seen: list[dict[str, object]] = []

    async def is_there(self) -> bool:
        namespace = self._fs.namespace
        found = [await namespace.status(daemon) for daemon in namespace.links.daemons]
        seen = [
            {
                **{name: getattr(one, name) for name in UNDER_WAY},
                "tools": sum(session.kind == "tool" for session in one.sessions),
            }
            for one in found
        ]
        if seen != self._seen:
            sys.stderr.write(f"not at rest yet? {seen}\n")
            self._seen = seen
        return all(one.pop("tools") == 1 and not any(one.values()) for one in map(dict.copy, seen))


async def main(registry: str) -> None:
    """Obey standard input until it ends."""
    output = trio.lowlevel.FdStream(os.dup(1))
    output_lock = trio.Lock()

    async def say(*words: Any) -> None:
        async with output_lock:
            await output.send_all(json.dumps(words).encode() + b"\n")

    async with open_cluster(registry) as fs, trio.open_nursery() as nursery:
        tasks: list[Task] = []
        idle = trio.Event()

        async def work(root: str, seed: int) -> None:
            tasks[:] = [Task(fs, say, number, f"{root}.{number}", seed) for number in range(TASKS)]
            async with trio.open_nursery() as workers:
                for task in tasks:
                    workers.start_soon(task.run)
            idle.set()

        await say("ready")
        received = b""
        async for data in trio.lowlevel.FdStream(os.dup(0)):
            received += data
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                match json.loads(line):
                    case ["work", str(root), int(seed)]:
                        nursery.start_soon(work, root, seed)
                    case ["stop"]:
                        for task in tasks:
                            task.stopped = True
                        await idle.wait()
                        await say("stopped")
                    case ["dump", str(path)]:
                        found = await dump(fs, "/")
                        await trio.Path(path).write_bytes(pickle.dumps([tuple(one) for one in found]))
                        await say("dumped")
                    case ["remove"]:
                        for name in await fs.listdir("/"):
                            await remove(fs, os.fsdecode(name))
                        await say("removed")
                    case ["rest"]:
                        rest = Rest(fs)
                        while not await rest.is_there():  # noqa: ASYNC110  nobody tells without being asked
                            await trio.sleep(REST_S)
                        await say("rested")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
