"""Do random things to a tree of one's own, whose every outcome is known: whoever runs beside, dies or comes back.

A ``Strain`` remembers what its tree must hold. Nobody else changes that tree, so no operation may fail and each must
have happened exactly once: a second application of a create, a rename or an unlink fails, of an append or a link shows.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

#: Largest content and hole: a few chunks of the smallest size.
LENGTH_MAX = 200_000
#: Names that a tree holds at most: more are removed than made then.
NAMES_MAX = 60


class _Content:
    """Be one file: its bytes, and its names."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.names: set[str] = set()


class Strain:
    """Hold one tree below ``root``, which must exist and be empty. Paths are relative to it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self._random = random.Random(seed)
        self._serial = 0
        self.files: dict[str, _Content] = {}
        self.directories: set[str] = {""}
        #: Operations done so far.
        self.done = 0
        self.doing = ""
        self._operations: list[Callable[[], None]] = [
            *[self._make] * 4,
            *[self._append] * 3,
            *[self._patch] * 2,
            *[self._cut] * 2,
            *[self._rename] * 4,
            *[self._rename_over] * 2,
            *[self._link] * 2,
            *[self._unlink] * 3,
            *[self._mkdir] * 2,
            *[self._rmdir] * 2,
            *[self._move] * 2,
            *[self._read] * 2,
            self._list,
        ]

    def go_on(self, steps: int, seconds: float = float("inf")) -> Self:
        """Do so many things, or for so long; return this strain, which may have travelled from another process."""
        end_s = time.monotonic() + seconds
        for _ in range(steps):
            self.step()
            if time.monotonic() >= end_s:
                break
        return self

    def step(self) -> None:
        """Do one thing."""
        operation = self._random.choice(self._operations)
        if len(self.files) > NAMES_MAX:
            operation = self._unlink
        self.doing = operation.__name__
        try:
            operation()
        except Exception as error:
            raise AssertionError(f"{self.root}, operation {self.done}: {self.doing}: {error}") from error
        self.done += 1

    # What is chosen.

    def _new(self) -> str:
        self._serial += 1
        return os.path.join(self._random.choice(sorted(self.directories)), f"n{self._serial}")

    def _some(self) -> str | None:
        return self._random.choice(sorted(self.files)) if self.files else None

    def _bytes(self) -> bytes:
        return self._random.randbytes(self._random.choice([1, 100, 5000, self._random.randrange(1, LENGTH_MAX)]))

    def _say(self, *what: object) -> None:
        self.doing = " ".join(map(str, what))

    # What is done.

    def _make(self) -> None:
        name, content = self._new(), _Content()
        offset = self._random.choice([0, 0, self._random.randrange(LENGTH_MAX)])
        data = self._bytes()
        self._say("make", name, offset, len(data))
        fd = os.open(self.root / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        content.names.add(name)
        self.files[name] = content
        self._write(fd, content, offset, data)

    def _write(self, fd: int, content: _Content, offset: int, data: bytes) -> None:
        """Write, close, and remember."""
        try:
            assert os.pwrite(fd, data, offset) == len(data)
        finally:
            os.close(fd)
        content.data.extend(bytes(max(0, offset - len(content.data))))
        content.data[offset : offset + len(data)] = data

    def _append(self) -> None:
        if (name := self._some()) is None:
            return
        data = self._bytes()
        self._say("append", name, len(data))
        fd = os.open(self.root / name, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.files[name].data.extend(data)

    def _patch(self) -> None:
        if (name := self._some()) is None:
            return
        offset, data = self._random.randrange(LENGTH_MAX), self._bytes()
        self._say("patch", name, offset, len(data))
        flags = os.O_RDWR | self._random.choice([0, 0, os.O_SYNC])
        self._write(os.open(self.root / name, flags), self.files[name], offset, data)

    def _cut(self) -> None:
        if (name := self._some()) is None:
            return
        size = self._random.choice([0, self._random.randrange(LENGTH_MAX)])
        self._say("truncate", name, size)
        os.truncate(self.root / name, size)
        data = self.files[name].data
        del data[size:]
        data.extend(bytes(size - len(data)))

    def _rename(self) -> None:
        if (name := self._some()) is None:
            return
        new = self._new()
        self._say("rename", name, new)
        os.rename(self.root / name, self.root / new)
        content = self.files.pop(name)
        content.names.remove(name)
        content.names.add(new)
        self.files[new] = content

    def _rename_over(self) -> None:
        name, over = self._some(), self._some()
        if name is None or over is None or self.files[name] is self.files[over]:
            return
        self._say("rename", name, "over", over)
        os.rename(self.root / name, self.root / over)
        self.files[over].names.remove(over)
        content = self.files.pop(name)
        content.names.remove(name)
        content.names.add(over)
        self.files[over] = content

    def _link(self) -> None:
        if (name := self._some()) is None:
            return
        new = self._new()
        self._say("link", name, new)
        os.link(self.root / name, self.root / new)
        self.files[new] = self.files[name]
        self.files[new].names.add(new)

    def _unlink(self) -> None:
        if (name := self._some()) is None:
            return
        self._say("unlink", name)
        os.unlink(self.root / name)
        self.files.pop(name).names.remove(name)

    def _mkdir(self) -> None:
        if len(self.directories) > NAMES_MAX // 4:
            return
        new = self._new()
        self._say("mkdir", new)
        os.mkdir(self.root / new)
        self.directories.add(new)

    def _children(self, directory: str) -> set[str]:
        return {
            os.path.basename(name)
            for name in [*self.files, *self.directories]
            if name and os.path.dirname(name) == directory
        }

    def _rmdir(self) -> None:
        name = self._random.choice(sorted(self.directories))
        if not name or self._children(name):
            return
        self._say("rmdir", name)
        os.rmdir(self.root / name)
        self.directories.remove(name)

    def _move(self) -> None:
        old, new = self._random.choice(sorted(self.directories)), self._new()
        if not old or f"{new}/".startswith(f"{old}/"):
            return
        self._say("move", old, new)
        os.rename(self.root / old, self.root / new)

        def moved(name: str) -> str:
            return new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name

        self.directories = {moved(name) for name in self.directories}
        self.files = {moved(name): content for name, content in self.files.items()}
        for content in set(self.files.values()):
            content.names = {moved(name) for name in content.names}

    def _read(self) -> None:
        if (name := self._some()) is None:
            return
        self._say("read", name)
        self._compare(self.root, name)

    def _list(self) -> None:
        name = self._random.choice(sorted(self.directories))
        self._say("list", name)
        assert set(os.listdir(self.root / name)) == self._children(name)

    # What must hold.

    def _compare(self, root: Path, name: str) -> None:
        content = self.files[name]
        found = (root / name).read_bytes()
        assert len(found) == len(content.data), f"{name}: {len(found)} bytes instead of {len(content.data)}"
        if found != content.data:
            at = next(i for i, (one, other) in enumerate(zip(found, content.data, strict=True)) if one != other)
            raise AssertionError(f"{name} differs at {at} of {len(found)}")

    def check(self, root: Path) -> None:
        """Compare everything with the tree at ``root``, which may be seen through another mount."""
        for name in sorted(self.directories):
            assert set(os.listdir(root / name)) == self._children(name), name
            subdirectories = sum(os.path.dirname(other) == name for other in self.directories if other)
            assert (root / name).stat().st_nlink == 2 + subdirectories, name
        for name, content in self.files.items():
            self._compare(root, name)
            assert (root / name).stat().st_nlink == len(content.names), name
